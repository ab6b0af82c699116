"""The training rule: a step on a batch of source images and a batch of the few target images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.diffusion.phasic.content import ContentFused
from trimtab.diffusion.phasic.losses import (
    DirectionalDistributionLoss,
    Form,
    PhasicWeights,
    gram_style_loss,
    phasic_weights,
)
from trimtab.diffusion.prediction import convert, target
from trimtab.ops.arguments import non_negative, number, one_of, real_problem, same_shape, tensor
from trimtab.ops.states import fits

Features = Callable[[Tensor], Tensor]
"""Maps images to features (batch, dim), such as CLIP's."""
Maps = Callable[[Tensor], Sequence[Tensor]]
"""Maps images to feature maps, layer by layer, such as VGG's."""


class PhasicAdapter:
    """Adapts a content-fused denoiser of source images to a few target images.

    With `form="paper"` times are uniform over all steps, and both parts are weighed at one time per sample. With `code`
    times are from 300 to 800 for both, and the target is denoised once more at times from 0 to 300, at a fifth of the
    weight; the release gathers these two gradients over two batches before each step of the optimizer. Target images
    are denoised without content.

    Args:
        denoiser: trained on the source; its schedule's times count steps up to `total`.
        optimizer: of its parameters.
        features: of images, frozen; gradients go through it to the image.
        shots: the few target images.
        source: images of the source domain, for the mean of their features.
        maps: feature maps for the style loss; None for none.
        form: weights of the `paper` or of the release, `code`.
        alpha: exponent of the paper's weights.
        transfer_weights: of the directional loss and of the style loss.
        total: number of steps of the schedule.
        clip: bound of clean predictions.

    Raises:
        TypeError: `denoiser` is no `ContentFused`, or images are no tensors.
        ValueError: an argument is out of its range.

    Example:
        >>> from torch import nn
        >>> from trimtab.diffusion import ContentFusion, Discrete
        >>> class Halves(nn.Module):
        ...     def encode(self, x, t):
        ...         return x, None
        ...
        ...     def decode(self, features, rest, t):
        ...         return features
        >>> schedule = Discrete(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0))
        >>> denoiser = ContentFused(Halves(), ContentFusion(1), schedule)
        >>> source, shots = torch.zeros(8, 1, 4, 4), torch.ones(8, 1, 4, 4)
        >>> adam = torch.optim.Adam(denoiser.parameters(), lr=1e-4, betas=(0.9, 0.99))
        >>> rule = PhasicAdapter(denoiser, adam, features=lambda x: x.flatten(1), shots=shots, source=source)
        >>> sorted(rule.step(source, shots))
        ['directional', 'style', 'target', 'total']
    """

    def __init__(
        self,
        denoiser: ContentFused,
        optimizer: torch.optim.Optimizer,
        *,
        features: Features,
        shots: Float[Tensor, "shots channels height width"],
        source: Float[Tensor, "n channels height width"],
        maps: Maps | None = None,
        form: Form = "paper",
        alpha: float = 1.0,
        transfer_weights: tuple[float, float] = (1.0, 1.0),
        total: float = 1000.0,
        clip: float = 1.0,
    ) -> None:
        if not isinstance(denoiser, ContentFused):
            raise TypeError(f"denoiser must be a ContentFused, got {type(denoiser).__name__}")
        if not isinstance(shots, Tensor) or not isinstance(source, Tensor):
            raise TypeError(f"shots and source must be tensors, got {type(shots).__name__} and {type(source).__name__}")
        if min(number("alpha", alpha), number("total", total), number("clip", clip)) <= 0:
            raise ValueError(f"alpha, total and clip must be positive, got {alpha}, {total} and {clip}")
        self.denoiser, self.optimizer, self.features, self.maps = denoiser, optimizer, features, maps
        self.form: Form = one_of("form", form, ("paper", "code"))
        self.alpha, self.total, self.clip = alpha, total, clip
        self.weights = tuple(non_negative("transfer_weights", weight) for weight in transfer_weights)
        with torch.no_grad():
            self.directional = DirectionalDistributionLoss.between(features(source), features(shots), reduction="none")
            self.style = [layer.detach() for layer in maps(shots)] if maps is not None else []

    def step(
        self,
        source: Float[Tensor, "batch channels height width"],
        shots: Float[Tensor, "batch channels height width"],
        *,
        t: Float[Tensor, " batch"] | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """One step of the optimizer.

        Args:
            source: clean images of the source domain.
            shots: as many of the target images, repeated as need be.
            t: times of the samples; drawn if None. The low times of `code` are always drawn.
            generator: of times and noise.

        Returns:
            The losses `directional`, `style`, `target` as they were weighed, and their sum `total`.

        Raises:
            TypeError: images are not floating point.
            ValueError: the shapes differ, or images have not four dimensions.
        """
        source, shots = (tensor(name, x, ndim=4, floating=True) for name, x in (("source", source), ("shots", shots)))
        same_shape("shots", shots, "source", source)
        if t is not None and t.shape != source.shape[:1]:
            raise ValueError(f"t must be one time per image ({len(source)}), got shape {tuple(t.shape)}")
        if t is None:
            t = _times(source, *((0.0, self.total - 1) if self.form == "paper" else (300.0, 800.0)), generator)
        directional, style = self._transfer(source, t, generator)
        transfer = self._weights(t).transfer
        parts = {
            "directional": self.weights[0] * (transfer * directional).mean(),
            "style": self.weights[1] * (transfer * style).mean(),
            "target": self._target(shots, t, generator),
        }
        if self.form == "code":
            parts["target"] = parts["target"] + self._target(shots, _times(shots, 0.0, 300.0, generator), generator) / 5
        parts["total"] = torch.stack(list(parts.values())).sum()
        self.optimizer.zero_grad()
        parts["total"].backward()
        self.optimizer.step()
        return {name: value.detach() for name, value in parts.items()}

    def _weights(self, t: Tensor) -> PhasicWeights:
        return phasic_weights(t, self.form, total=self.total, t_switch=self.denoiser.t_switch, alpha=self.alpha)

    def _target(self, x0: Tensor, t: Tensor, generator: torch.Generator | None) -> Tensor:
        """The weighed absolute error of the denoiser's own prediction."""
        noise = _noise(x0, generator)
        schedule = self.denoiser.schedule
        said = self.denoiser(schedule.add_noise(x0, noise, t), t)
        wanted = target(x0, noise, schedule.alpha(t), schedule.sigma(t), self.denoiser.prediction)
        return (self._weights(t).target * (said - wanted).abs().flatten(1).mean(1)).mean()  # type: ignore[no-any-return]

    def _transfer(self, source: Tensor, t: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        schedule = self.denoiser.schedule
        x = schedule.add_noise(source, _noise(source, generator), t)
        said = self.denoiser(x, t, source, generator=generator)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        made = convert(said, x, alpha, sigma, self.denoiser.prediction, "x0").clamp(-self.clip, self.clip)
        with torch.no_grad():
            before = self.features(source)
        directional = self.directional(self.features(made), before)
        style = gram_style_loss(self.maps(made), self.style) if self.maps is not None else torch.zeros_like(directional)
        return directional, style

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on: model, optimizer, direction."""
        return {
            "denoiser": self.denoiser.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "directional": self.directional.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where a run was.

        Raises:
            ValueError: the state is of another network or optimizer; nothing is loaded then.
        """
        own = self.state_dict()
        if state.keys() != own.keys() or not all(fits(state[name], own[name]) for name in ("denoiser", "directional")):
            raise ValueError("state must be of the same networks, got another's")
        self.optimizer.load_state_dict(state["optimizer"])  # refuses other groups before it takes anything
        self.denoiser.load_state_dict(state["denoiser"])
        self.directional.load_state_dict(state["directional"])


def fusion_loss(
    denoiser: ContentFused,
    x0: Float[Tensor, "batch channels height width"],
    t: Float[Tensor, " batch"],
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The loss that first trains the fusion on source images, each shown itself: the absolute error of a prediction.

    Only the parameters of `denoiser.fusion` should be in the optimizer.

    Args:
        denoiser: trained on the source without content.
        x0: clean source images.
        t: their times, in steps.
        generator: of the noise.

    Example:
        >>> from torch import nn
        >>> from trimtab.diffusion import ContentFusion, Discrete
        >>> class Halves(nn.Module):
        ...     def encode(self, x, t):
        ...         return x, None
        ...
        ...     def decode(self, features, rest, t):
        ...         return features
        >>> schedule = Discrete(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0))
        >>> denoiser = ContentFused(Halves(), ContentFusion(1), schedule)
        >>> fusion_loss(denoiser, torch.zeros(2, 1, 4, 4), torch.full((2,), 600.0)).shape
        torch.Size([])
    """
    if problem := real_problem(x0=x0, t=t):
        raise TypeError(problem)
    noise = _noise(x0, generator)
    schedule = denoiser.schedule
    said = denoiser(schedule.add_noise(x0, noise, t), t, x0, generator=generator)
    wanted = target(x0, noise, schedule.alpha(t), schedule.sigma(t), denoiser.prediction)
    return (said - wanted).abs().mean()  # type: ignore[no-any-return]


def _times(x: Tensor, low: float, high: float, generator: torch.Generator | None) -> Tensor:
    return (low + (high - low) * torch.rand(len(x), generator=generator)).to(x.device, x.dtype)


def _noise(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
