"""Both stages, the networks of each and the training that goes through them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from trimtab.ops.arguments import (
    floating_tensor,
    in_range,
    integer,
    non_negative,
    positive,
    real_problem,
)
from trimtab.ops.attack import eval_mode
from trimtab.ops.patch_masks import random_patch_mask
from trimtab.ops.states import fits
from trimtab.ops.whole_state import WholeState
from trimtab.semisup.mrdd.information import CLUB, gaussian_kl

Views = Sequence[Float[Tensor, "batch channels height width"]]


class MaskedCrossViewVAE(WholeState, nn.Module):
    """The first stage: one code of all views, each masked by itself, that reconstructs every view.

    Args:
        encoder: shared by the views; from a view to features, which are flattened.
        decoders: one a view; from (batch, feature_dim) to the view.
        feature_dim: numbers that the encoder gives for a view.
        code_dim: length of the shared code; short ones leave to the views what is theirs.
        patch: side of the masked patches in pixels.
        mask_ratio: share of the patches that is masked, in [0, 1).
        kl_weight: of the divergence from the prior. The authors' is 1 beside an error that is summed over a batch of
            512; here the error is the mean of the batch.

    Raises:
        ValueError: there are fewer than two views, or an argument is out of its range.

    Example:
        >>> encoder, decoders = nn.Flatten(), [nn.Sequential(nn.Linear(16, 16), nn.Unflatten(1, (1, 4, 4)))] * 2
        >>> model = MaskedCrossViewVAE(encoder, decoders, feature_dim=16, code_dim=3, patch=2)
        >>> model.code([torch.zeros(5, 1, 4, 4)] * 2).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoders: Sequence[nn.Module],
        feature_dim: int,
        code_dim: int,
        *,
        patch: int = 4,
        mask_ratio: float = 0.7,
        kl_weight: float = 1 / 512,
    ) -> None:
        super().__init__()
        if len(decoders) < 2:
            raise ValueError(f"decoders must be two or more, one a view, got {len(decoders)}")
        feature_dim, self.code_dim = integer("feature_dim", feature_dim), integer("code_dim", code_dim)
        self.encoder, self.decoders = encoder, nn.ModuleList(decoders)
        self.to_code = nn.Linear(len(decoders) * feature_dim, 2 * self.code_dim)
        self.from_code = nn.Linear(self.code_dim, feature_dim)
        self.patch, self.kl_weight = integer("patch", patch), non_negative("kl_weight", kl_weight)
        self.mask_ratio = in_range("mask_ratio", mask_ratio, 0, 1, "left")

    def posterior(self, views: Views) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of the code, of views as they are."""
        features = torch.cat([self.encoder(view).flatten(1) for view in views], 1)
        mean, log_var = self.to_code(features).chunk(2, 1)
        return mean, log_var

    @torch.no_grad()
    def code(self, views: Views) -> Float[Tensor, "batch code"]:
        """The mean of the code, of views without masks."""
        return self.posterior(_checked(views, len(self.decoders)))[0]

    def loss(
        self,
        views: Views,
        *,
        masks: Sequence[Bool[Tensor, "batch 1 height width"]] | None = None,
        noise: Float[Tensor, "batch code"] | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """The loss ("total") and its parts, "reconstruction" and "kl", each summed over a sample, the batch's mean.

        Args:
            views: one tensor each, of one batch.
            masks: True where a view is hidden; drawn if not given.
            noise: standard normal, of the code; drawn if not given.
            generator: decides what is drawn.

        Raises:
            TypeError: a view is not floating point.
            ValueError: there are not as many views as decoders, or they are not of one batch, or it is empty.
        """
        views = _checked(views, len(self.decoders))
        if masks is None:
            masks = [
                random_patch_mask(
                    (len(view), view.shape[2], view.shape[3]),
                    self.patch,
                    self.mask_ratio,
                    exact=True,
                    generator=generator,
                    device=view.device,
                )
                for view in views
            ]
        seen = [view.masked_fill(mask, 0) for view, mask in zip(views, masks, strict=True)]
        mean, log_var = self.posterior(seen)
        features = self.from_code(_sample(mean, log_var, noise, generator))
        whole = [decoder(features) for decoder in self.decoders]
        error = torch.stack([_squares(found, view) for found, view in zip(whole, views, strict=True)]).sum()
        kl = gaussian_kl(mean, log_var)
        return {"total": error + self.kl_weight * kl, "reconstruction": error.detach(), "kl": kl.detach()}


class ViewSpecificVAE(nn.Module):
    """The second stage, for one view: a code of what the shared code lacks.

    Args:
        encoder: from a view to (batch, 2 code_dim), means and logarithms of variances.
        decoder: from (batch, code_dim + shared dimensions) to the view.
        code_dim: length of the code.
        kl_weight: of the divergence from the prior. The authors' is one half beside an error that is summed over a
            batch of 1,024.

    Example:
        >>> encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
        >>> decoder = nn.Sequential(nn.Linear(2 + 3, 16), nn.Unflatten(1, (1, 4, 4)))
        >>> ViewSpecificVAE(encoder, decoder, code_dim=2).code(torch.zeros(5, 1, 4, 4)).shape
        torch.Size([5, 2])
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, code_dim: int, *, kl_weight: float = 0.5 / 1024) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.code_dim, self.kl_weight = integer("code_dim", code_dim), non_negative("kl_weight", kl_weight)

    def posterior(self, view: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of the code."""
        if problem := real_problem(view=view):
            raise TypeError(problem)
        mean, log_var = self.encoder(view).chunk(2, 1)
        return mean, log_var

    @torch.no_grad()
    def code(self, view: Tensor) -> Float[Tensor, "batch code"]:
        """The mean of the code."""
        if problem := real_problem(view=view):
            raise TypeError(problem)
        return self.posterior(view)[0]


class MRDD:
    """Trains both stages, one batch at a time: `step_consistency` until the shared code is good, then `step_specific`.

    Args:
        consistency: the first stage.
        specific: of each view, the second stage.
        mi_weight: of the bound of the mutual information between a view's code and the shared one. The authors' is 1
            beside an error that is summed over a batch of 1,024. Large weights let a code run from the bound's network,
            which makes the bound negative, and no bound.
        lr: learning rate of AdamW, for all networks.
        hidden: width of the networks of the bounds.
        generator: of masks, noise and permutations, and of the start of the bounds' networks if given.

    Attributes:
        clubs: the bounds, one a view.

    Raises:
        ValueError: there are not as many views in both stages, or an argument is out of its range.

    Example:
        >>> image = nn.Unflatten(1, (1, 4, 4))
        >>> first = MaskedCrossViewVAE(nn.Flatten(), [nn.Sequential(nn.Linear(16, 16), image) for _ in range(2)], 16, 3)
        >>> of_view = lambda: ViewSpecificVAE(
        ...     nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), nn.Sequential(nn.Linear(5, 16), image), code_dim=2
        ... )
        >>> rule, views = MRDD(first, [of_view(), of_view()]), [torch.rand(8, 1, 4, 4) for _ in range(2)]
        >>> sorted(rule.step_consistency(views)), sorted(rule.step_specific(views))
        (['kl', 'reconstruction', 'total'], ['estimator', 'information', 'kl', 'reconstruction', 'total'])
        >>> rule.transform(views).shape
        torch.Size([8, 7])
    """

    def __init__(
        self,
        consistency: MaskedCrossViewVAE,
        specific: Sequence[ViewSpecificVAE],
        *,
        mi_weight: float = 1 / 1024,
        lr: float = 5e-4,
        hidden: int = 50,
        generator: torch.Generator | None = None,
    ) -> None:
        if len(specific) != len(consistency.decoders):
            raise ValueError(f"specific must be one a view, {len(consistency.decoders)}, got {len(specific)}")
        self.mi_weight, lr = non_negative("mi_weight", mi_weight), positive("lr", lr)
        integer("hidden", hidden)
        self.consistency, self.specific, self.generator = consistency, list(specific), generator
        with torch.random.fork_rng(devices=[], enabled=generator is not None):
            if generator is not None:
                torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            self.clubs = [CLUB(part.code_dim, consistency.code_dim, hidden) for part in specific]
        self.modules: dict[str, nn.Module] = {
            "consistency": consistency,
            "specific": nn.ModuleList(self.specific),
            "clubs": nn.ModuleList(self.clubs),
        }
        self.optimizers = {name: torch.optim.AdamW(part.parameters(), lr=lr) for name, part in self.modules.items()}

    def step_consistency(self, views: Views) -> dict[str, Tensor]:
        """One step of the first stage; raises as `MaskedCrossViewVAE.loss` does."""
        views = _checked(views, len(self.specific))
        losses = self.consistency.train().loss(views, generator=self.generator)
        self._step("consistency", losses["total"])
        return {name: value.detach() for name, value in losses.items()}

    def step_specific(self, views: Views) -> dict[str, Tensor]:
        """One step of the bounds, and one of the views' own networks; the first stage stays as it is.

        Raises:
            TypeError: a view is not floating point.
            ValueError: there are not as many views as networks, or they are not of one batch, or it is empty.
        """
        views = _checked(views, len(self.specific))
        shared = self.consistency.eval().code(views)
        self.modules["specific"].train()
        posteriors = [part.posterior(view) for part, view in zip(self.specific, views, strict=True)]
        codes = [_sample(mean, log_var, None, self.generator) for mean, log_var in posteriors]
        fit = [club.learning_loss(z.detach(), shared) for club, z in zip(self.clubs, codes, strict=True)]
        estimator = torch.stack(fit).sum()
        self._step("clubs", estimator)
        error, kl, information = shared.new_zeros(3).unbind()
        for part, club, view, z, (mean, log_var) in zip(
            self.specific, self.clubs, views, codes, posteriors, strict=True
        ):
            error = error + _squares(part.decoder(torch.cat([z, shared], 1)), view)
            kl = kl + part.kl_weight * gaussian_kl(mean, log_var)
            information = information + club.upper_bound(z, shared, generator=self.generator)
        total = error + kl + self.mi_weight * information
        self._step("specific", total)
        found = {"total": total, "reconstruction": error, "kl": kl, "information": information, "estimator": estimator}
        return {name: value.detach() for name, value in found.items()}

    @torch.no_grad()
    def codes(self, views: Views) -> tuple[Tensor, list[Tensor]]:
        """The shared code and the code of each view, means all."""
        views = _checked(views, len(self.specific))
        with eval_mode(self.consistency), eval_mode(self.modules["specific"]):
            shared = self.consistency.code(views)
            return shared, [part.code(view) for part, view in zip(self.specific, views, strict=True)]

    def transform(self, views: Views) -> Float[Tensor, "batch dim"]:
        """All codes of samples side by side, the shared one first."""
        shared, own = self.codes(views)
        return torch.cat([shared, *own], 1)

    def state_dict(self) -> dict[str, Any]:
        """Networks, optimizers and the generator's state."""
        state: dict[str, Any] = {name: part.state_dict() for name, part in self.modules.items()}
        state["optimizers"] = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        if self.generator is not None:
            state["generator"] = self.generator.get_state()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes a state of `state_dict`; one that does not fit changes nothing.

        Raises:
            ValueError: it is of a rule of another form.
        """
        own = self.state_dict()
        loaded = state.get("optimizers", {}) if isinstance(state, Mapping) else {}
        sizes = {
            name: [group["params"] for group in part["param_groups"]]
            for name, part in loaded.items()
            if isinstance(part, Mapping) and "param_groups" in part
        }
        named = {name: [group["params"] for group in part["param_groups"]] for name, part in own["optimizers"].items()}
        rest = {name: part for name, part in own.items() if name != "optimizers"}
        if sizes != named or not fits({k: v for k, v in state.items() if k != "optimizers"}, rest):
            raise ValueError("state must be of a rule with the same networks, got another")
        for name, part in self.modules.items():
            part.load_state_dict(state[name])
            self.optimizers[name].load_state_dict(state["optimizers"][name])
        if self.generator is not None:
            self.generator.set_state(state["generator"])

    def _step(self, name: str, loss: Tensor) -> None:
        """A step of one optimizer; the other networks get no gradient."""
        parameters = [p for p in self.modules[name].parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        self.optimizers[name].step()
        for p in parameters:
            p.grad = None


def _sample(mean: Tensor, log_var: Tensor, noise: Tensor | None, generator: torch.Generator | None) -> Tensor:
    if noise is not None and noise.shape != mean.shape:
        raise ValueError(f"noise must be of shape {tuple(mean.shape)}, got {tuple(noise.shape)}")
    if noise is None:
        at = mean.device if generator is None else generator.device
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=at).to(mean.device)
    return mean + (0.5 * log_var).exp() * noise


def _squares(found: Tensor, wanted: Tensor) -> Tensor:
    return (found - wanted).square().flatten(1).sum(1).mean()


def _checked(views: Views, count: int) -> list[Tensor]:
    if len(views) != count:
        raise ValueError(f"views must be {count}, got {len(views)}")
    found = [floating_tensor("views", view) for view in views]
    if any(view.ndim != 4 or len(view) != len(found[0]) or len(view) == 0 for view in found):
        shapes = ", ".join(str(tuple(view.shape)) for view in found)
        raise ValueError(f"views must be images (batch, channels, height, width) of one batch, got {shapes}")
    return found
