r"""Concept domain correction (DoCo): what a diffusion model makes of a sensitive prompt is to pass for an anchor's.

For concepts that a text- or class-conditional model should not generate. Matching a frozen model's output point by
point forgets the prompts that it is trained on; here a discriminator must tell outputs under sensitive prompts from
outputs under anchor prompts, and fooling it carries over to prompts nearby. Where the gradient would undo what must be
kept, that part of it is projected out.

$$
\hat x(c) = \frac{x_t - \sqrt{1 - \bar\alpha_t}\, \epsilon(x_t, t, c)}{\sqrt{\bar\alpha_t}}, \qquad
L_D = \mathrm{BCE}\bigl(D(\hat x_\theta(c)), 1\bigr) + \mathrm{BCE}\bigl(D(\hat x_{\theta_0}(a)), 0\bigr), \qquad
L_U = \mathrm{BCE}\bigl(D(\hat x_\theta(c)), 0\bigr),
$$

$$
g = a - \lambda \min(0, \langle a, \hat b \rangle)\, \hat b, \qquad
a = \nabla L_U, \quad b = \nabla \| \epsilon_\theta(x'_t, t, c') - \epsilon \|^2, \quad \hat b = b / \| b \|,
$$

for each weight tensor on its own. The step is along g alone: the loss b is of is never descended.

Reference: Yongliang Wu, Shiji Zhou, Mingzhuo Yang, Lianzhe Wang, Heng Chang, Wenbo Zhu, Xinting Hu, Xiao Zhou and
Xu Yang, "Unlearning Concepts in Diffusion Model via Concept Domain Correction and Concept Preserving Gradient", AAAI
2025, arXiv 2405.15304. The authors' code takes away the cosine, not the projection: `scale="unit"`.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, overload

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from trimtab.ops.arguments import (
    floating_tensor,
    integer,
    looked_at,
    non_negative,
    number,
    one_of,
    positive,
    same_shape,
    tensor,
    tensor_problem,
)
from trimtab.ops.averaging import frozen_copy
from trimtab.ops.units import power_of_two_unit, squares_are_kept

Scale = Literal["projection", "unit"]


@overload
def preserve_gradient(g_unlearn: Tensor, g_retain: Tensor, lam: float = ..., *, scale: Scale = ...) -> Tensor: ...
@overload
def preserve_gradient(
    g_unlearn: Mapping[str, Tensor], g_retain: Mapping[str, Tensor], lam: float = ..., *, scale: Scale = ...
) -> dict[str, Tensor]: ...
def preserve_gradient(
    g_unlearn: Tensor | Mapping[str, Tensor],
    g_retain: Tensor | Mapping[str, Tensor],
    lam: float = 1.0,
    *,
    scale: Scale = "projection",
) -> Tensor | dict[str, Tensor]:
    r"""The gradient of unlearning without the part that climbs the loss of what must be kept.

    Args:
        g_unlearn: a gradient, or several by name, of which each is treated on its own.
        g_retain: the gradient of what must be kept, likewise.
        lam: share of that part which is taken away; 0 for none.
        scale: "projection" takes it away in full length; "unit", as the authors' code does, in the length that it
            would have if the gradient's were 1.

    Returns:
        The gradient, unchanged where the two do not conflict.

    Raises:
        TypeError: one is a tensor, the other is not.
        ValueError: names or shapes differ, `lam` is not finite or `scale` is unknown.

    Example:
        >>> preserve_gradient(torch.tensor([2.0, 0.0]), torch.tensor([-1.0, 1.0])).round(decimals=4)
        tensor([1., 1.])
        >>> preserve_gradient(torch.tensor([2.0, 0.0]), torch.tensor([-1.0, 1.0]), scale="unit")
        tensor([1.5000, 0.5000])
    """
    number("lam", lam)
    one_of("scale", scale, get_args(Scale))
    if isinstance(g_unlearn, Tensor) and (problem := tensor_problem(g_unlearn=g_unlearn)):
        raise TypeError(problem)
    if isinstance(g_retain, Tensor) and (problem := tensor_problem(g_retain=g_retain)):
        raise TypeError(problem)
    if isinstance(g_unlearn, Tensor):
        kept = tensor("g_retain", g_retain)
        same_shape("g_retain", kept, "g_unlearn", g_unlearn)
        unit = _direction(kept)
        along = ((_direction(g_unlearn) if scale == "unit" else g_unlearn) * unit).sum()
        found: Tensor | dict[str, Tensor] = g_unlearn - lam * along.clamp(max=0) * unit
        return found
    if not isinstance(g_retain, Mapping):
        raise TypeError(f"g_retain must be gradients by name as g_unlearn, got {type(g_retain).__name__}")
    if g_unlearn.keys() != g_retain.keys():
        raise ValueError(f"g_retain must have the names {sorted(g_unlearn)}, got {sorted(g_retain)}")
    for name, gradient in g_unlearn.items():
        same_shape(f"g_retain[{name!r}]", g_retain[name], f"g_unlearn[{name!r}]", gradient)
    return {name: preserve_gradient(g, g_retain[name], lam, scale=scale) for name, g in g_unlearn.items()}


def _direction(v: Tensor) -> Tensor:
    """Of length one, however short the vector is; zero where that is zero."""
    length = v.norm()
    if v.numel() and not squares_are_kept(length):
        v = v / power_of_two_unit(v[None])[0]
        length = v.norm().clamp(min=torch.finfo(v.dtype).tiny)
    unit: Tensor = v / length
    return unit


def clean_estimate(
    x_t: Float[Tensor, "batch ..."], noise: Float[Tensor, "batch ..."], alpha_bar: Float[Tensor, " batch"]
) -> Float[Tensor, "batch ..."]:
    r"""Noisy samples without their noise, $(x_t - \sqrt{1 - \bar\alpha}\, \epsilon) / \sqrt{\bar\alpha}$.

    Args:
        x_t: noisy samples.
        noise: of unit variance, as it was or is predicted to be.
        alpha_bar: share of the signal in the variance of each sample, in (0, 1].

    Raises:
        TypeError: an argument is no real tensor.
        ValueError: a share is out of range.

    Example:
        >>> clean_estimate(torch.tensor([[1.4]]), torch.tensor([[1.0]]), torch.tensor([0.36])).round(decimals=4)
        tensor([[1.]])
    """
    if problem := tensor_problem(x_t=x_t, noise=noise, alpha_bar=alpha_bar):
        raise TypeError(problem)
    if looked_at(alpha_bar) and not bool(((alpha_bar > 0) & (alpha_bar <= 1)).all()):
        raise ValueError("alpha_bar must be in (0, 1], got other numbers")
    signal = alpha_bar.to(x_t).view(-1, *[1] * (x_t.ndim - 1))
    return (x_t - (1 - signal).sqrt() * noise) / signal.sqrt()


class PatchDiscriminator(nn.Module):
    """Strided convolutions to a map with one score for each patch of an image.

    Args:
        channels: of the images.
        width: channels of the first layer; each further one has twice as many.
        depth: layers, each of which halves the side; 4 as in the paper, fewer for small images.

    Raises:
        TypeError, ValueError: a size is not positive.

    Example:
        >>> PatchDiscriminator(1, width=8, depth=2)(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 1, 2, 2])
    """

    def __init__(self, channels: int, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        sizes = [
            integer("channels", channels),
            *(integer("width", width) * 2**k for k in range(integer("depth", depth))),
        ]
        layers: list[nn.Module] = []
        for k, (before, after) in enumerate(itertools.pairwise(sizes)):
            layers.append(nn.Conv2d(before, after, 4, stride=2, padding=1, bias=k == 0))
            layers.extend([nn.BatchNorm2d(after)] if k else [])
            layers.append(nn.LeakyReLU(0.2))
        self.layers = nn.Sequential(*layers, nn.Conv2d(sizes[-1], 1, 3, padding=1))

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch 1 rows columns"]:
        """Scores, high where a patch seems to come from a sensitive prompt."""
        found: Tensor = self.layers(x)
        return found


class ConceptDomainCorrection:
    """Trains a discriminator and then, in turn with it, the model that it should not be able to tell from the anchor.

    A training rule for your own loop; networks and optimizers are yours. What the model's optimizer holds is trained,
    as in the paper the weights of cross-attention; the original model is kept as a frozen copy.

    Args:
        model: predicts noise, called `model(x_t, t, cond)` with t the number of the step.
        discriminator: maps images to scores of any shape, such as `PatchDiscriminator`.
        optimizers: of the model and of the discriminator, in this order; the authors take Adam at 1e-4, betas (0.5,
            0.999), for the second.
        alphas_cumprod: share of the signal in the variance at each step, falling, in (0, 1].
        warmup: steps of the discriminator alone, 500 to 1000 in the paper.
        lam: of `preserve_gradient`; 0 switches it off, and costs no gradient of what is kept.
        scale: of `preserve_gradient`.
        retain_weight: weight of the loss of what must be kept, which is then descended too; the authors use it in
            place of the projection only.
        max_grad_norm: both gradients are clipped to this norm, over all weights, before they are compared.
        clamp: clean estimates are cut off at plus and minus this value, above all where there is much noise.
        generator: draws steps and noise.

    Raises:
        TypeError, ValueError: a number is out of range, or there are not two optimizers.

    Example:
        >>> class Net(nn.Linear):
        ...     def forward(self, x, t, cond):
        ...         return super().forward(x.flatten(1) + cond[:, None]).view_as(x)
        >>> net, critic = Net(16, 16), PatchDiscriminator(1, width=4, depth=1)
        >>> optimizers = [torch.optim.Adam(part.parameters(), lr=1e-3) for part in (net, critic)]
        >>> rule = ConceptDomainCorrection(net, critic, optimizers, torch.linspace(0.99, 0.01, 10), warmup=0)
        >>> images, ones = torch.randn(6, 1, 4, 4), torch.ones(6)
        >>> sorted(rule.step(images, ones, 0 * ones, images, 2 * ones))
        ['discriminator', 'retain', 'unlearn']
    """

    def __init__(
        self,
        model: nn.Module,
        discriminator: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        alphas_cumprod: Float[Tensor, " steps"],
        *,
        warmup: int = 500,
        lam: float = 1.0,
        scale: Scale = "projection",
        retain_weight: float = 0.0,
        max_grad_norm: float = 1.0,
        clamp: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if len(optimizers) != 2:
            raise ValueError(f"optimizers must be two, the model's first, got {len(optimizers)}")
        self.alphas_cumprod = tensor("alphas_cumprod", alphas_cumprod, ndim=1, floating=True)
        if not len(self.alphas_cumprod) or not bool(((self.alphas_cumprod > 0) & (self.alphas_cumprod <= 1)).all()):
            raise ValueError("alphas_cumprod must be one number or more in (0, 1], got others or none")
        self.warmup = integer("warmup", warmup, 0)
        self.lam = non_negative("lam", lam)
        self.scale: Scale = one_of("scale", scale, get_args(Scale))
        self.retain_weight = non_negative("retain_weight", retain_weight)
        self.max_grad_norm = positive("max_grad_norm", max_grad_norm)
        self.clamp = None if clamp is None else positive("clamp", clamp)
        self.model, self.frozen, self.discriminator = model, frozen_copy(model), discriminator
        self.optimizers = list(optimizers)
        self.generator = generator
        self.steps_done = 0

    def step(
        self,
        x0: Float[Tensor, "batch ..."],
        target_cond: Any,
        anchor_cond: Any,
        prior_x0: Float[Tensor, "prior ..."],
        prior_cond: Any,
        *,
        t: Int64[Tensor, " batch"] | None = None,
        noise: Float[Tensor, "batch ..."] | None = None,
    ) -> dict[str, Tensor]:
        """One step of the discriminator and, after the warm-up, one of the model.

        Args:
            x0: images that the original model makes of anchor prompts.
            target_cond: sensitive prompts, as many, in the form that the model takes.
            anchor_cond: anchor prompts, as many.
            prior_x0: images of what must be kept.
            prior_cond: their prompts, as many.
            t: steps of `x0`; drawn by default, equally likely.
            noise: of `x0`; drawn by default. Steps and noise of `prior_x0` are always drawn.

        Returns:
            The losses, detached: "discriminator", and after the warm-up "unlearn", and "retain" where it is used.

        Raises:
            TypeError: images are not floating point.
            ValueError: there are no images, or prompts, steps or noise do not fit them.
        """
        x0, prior_x0 = floating_tensor("x0", x0), floating_tensor("prior_x0", prior_x0)
        for name, images, conds in (
            ("x0", x0, {"target_cond": target_cond, "anchor_cond": anchor_cond}),
            ("prior_x0", prior_x0, {"prior_cond": prior_cond}),
        ):
            if not len(images):
                raise ValueError(f"{name} must be one image or more, got none")
            for cond_name, cond in conds.items():
                if len(cond) != len(images):
                    raise ValueError(f"{cond_name} must be {len(images)} prompts as {name}, got {len(cond)}")
        if t is not None and (t.shape != x0.shape[:1] or t.dtype != torch.int64):
            raise ValueError(f"t must be {len(x0)} int64 steps as x0, got {t.dtype} of shape {tuple(t.shape)}")
        if t is not None and looked_at(t) and not 0 <= int(t.min()) <= int(t.max()) < len(self.alphas_cumprod):
            raise ValueError(f"t must be in [0, {len(self.alphas_cumprod)}), got {int(t.min())} to {int(t.max())}")
        if noise is not None:
            same_shape("noise", noise, "x0", x0)
        own, other = self.optimizers
        x_t, t, _ = self._noisy(x0, t, noise)
        unlearning = self.steps_done >= self.warmup
        with torch.set_grad_enabled(unlearning):
            concept = self._estimate(self.model, x_t, t, target_cond)
        with torch.no_grad():
            anchor = self._estimate(self.frozen, x_t, t, anchor_cond)
        scores = self.discriminator(concept.detach()), self.discriminator(anchor)
        loss_d = _bce(scores[0], 1.0) + _bce(scores[1], 0.0)
        other.zero_grad()
        loss_d.backward()
        other.step()
        found = {"discriminator": loss_d.detach()}
        if unlearning:
            trained = [p for group in own.param_groups for p in group["params"] if p.requires_grad]
            loss_u = _bce(self.discriminator(concept), 0.0)
            gradients = self._clipped(loss_u, trained)
            found["unlearn"] = loss_u.detach()
            if self.lam or self.retain_weight:
                x_p, t_p, wanted = self._noisy(prior_x0)
                loss_r = F.mse_loss(self.model(x_p, t_p, prior_cond), wanted)
                kept = self._clipped(loss_r, trained)
                found["retain"] = loss_r.detach()
                gradients = [
                    preserve_gradient(g, k, self.lam, scale=self.scale) + self.retain_weight * k
                    for g, k in zip(gradients, kept, strict=True)
                ]
            for p, gradient in zip(trained, gradients, strict=True):
                p.grad = gradient
            own.step()
        self.steps_done += 1
        return found

    def _noisy(self, x: Tensor, t: Tensor | None = None, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        if t is None:
            t = torch.randint(len(self.alphas_cumprod), x.shape[:1], generator=self.generator).to(x.device)
        if noise is None:
            noise = torch.randn(x.shape, generator=self.generator, dtype=x.dtype).to(x.device)
        signal = self.alphas_cumprod.to(x)[t].view(-1, *[1] * (x.ndim - 1))
        return signal.sqrt() * x + (1 - signal).sqrt() * noise, t, noise

    def _estimate(self, model: nn.Module, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        found = clean_estimate(x_t, model(x_t, t, cond), self.alphas_cumprod.to(x_t)[t])
        return found if self.clamp is None else found.clamp(-self.clamp, self.clamp)

    def _clipped(self, loss: Tensor, trained: list[Tensor]) -> list[Tensor]:
        found = torch.autograd.grad(loss, trained, allow_unused=True)
        gradients = [torch.zeros_like(p) if g is None else g for g, p in zip(found, trained, strict=True)]
        norm = torch.stack([g.norm() for g in gradients]).norm()
        return [g * (self.max_grad_norm / (norm + 1e-6)).clamp(max=1) for g in gradients]

    def state_dict(self) -> dict[str, Any]:
        """Networks, optimizers, the count of steps and the generator of randomness."""
        return {
            **{name: getattr(self, name).state_dict() for name in ("model", "frozen", "discriminator")},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "steps_done": self.steps_done,
            "generator": None if self.generator is None else self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where `state_dict` was called; a state that does not fit is refused and changes nothing.

        Raises:
            KeyError, RuntimeError, TypeError, ValueError: the state is another rule's or of other networks.
        """
        before = copy.deepcopy(self.state_dict())
        try:
            self._restore(state)
        except Exception:
            self._restore(before)
            raise

    def _restore(self, state: dict[str, Any]) -> None:
        for name in ("model", "frozen", "discriminator"):
            getattr(self, name).load_state_dict(state[name])
        for optimizer, held in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(held)
        self.steps_done = integer("steps_done", state["steps_done"], 0)
        if self.generator is not None:
            self.generator.set_state(state["generator"])


def _bce(scores: Tensor, label: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(scores.float(), torch.full_like(scores.float(), label))
