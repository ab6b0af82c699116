r"""TRAM: sharpness-aware minimisation whose radius is how far the model's predictions have moved from an anchor.

For fine-tuning that has to keep what the pre-trained network knows outside the new domain. There is no radius to tune:
the anchor (the model's own past weights, or its weights now under input noise) sets it at every step.

$$
d = D\bigl(p_{\text{anchor}}(\cdot \mid x) \,\|\, p_\theta(\cdot \mid x)\bigr), \qquad
\epsilon = d\,\frac{\nabla L(\theta)}{\lVert \nabla L(\theta) \rVert_2}, \qquad
\theta \leftarrow \operatorname{base}\bigl(\theta,\; \nabla L(\theta + \epsilon)\bigr)
$$

Reference: Tom Sherborne, Naomi Saphra, Pradeep Dasigi, Hao Peng, "TRAM: Bridging Trust Regions and Sharpness Aware
Minimization", ICLR 2024, arXiv 2310.03646.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal, cast, get_args

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from trimtab.ops.arguments import in_range, non_negative, one_of, same_shape, tensor_problem
from trimtab.ops.tempered_kl import tempered_kl
from trimtab.optim.two_pass import TwoPassOptimizer, ascent_direction, frozen_norm_stats

Divergence = float | Tensor | Callable[[], Tensor]
Kind = Literal["kl", "reverse_kl", "symmetric", "l2", "mmd"]
Reduction = Literal["batchmean", "official"]
Noise = Literal["normal", "uniform"]


@torch.no_grad()
def trust_region_divergence(
    anchor_logits: Float[Tensor, "batch classes"],
    logits: Float[Tensor, "batch classes"],
    kind: Kind = "kl",
    reduction: Reduction = "batchmean",
) -> Float[Tensor, ""]:
    r"""How far predictions are from the anchor's, a number of at least 0 without gradient.

    Args:
        anchor_logits: the anchor's scores; for sequences, a row for each position that counts.
        logits: the model's scores.
        kind: "kl" is $KL(\text{anchor} \,\|\, \text{model})$, "reverse_kl" the other way round, "symmetric" their
            sum; "l2" is the distance of the scores; "mmd" the squared maximum mean discrepancy of the two batches of
            scores under a sum of inverse multiquadrics.
        reduction: "batchmean" is the mean over rows; "official" divides that by the batch size again, and the
            Kullback-Leibler kinds by the number of classes too, as the authors' release does.

    Raises:
        TypeError: the scores are not floating-point numbers.
        ValueError: shapes differ or are not (batch, classes), the batch is empty, or a word is unknown.

    Example:
        >>> one, two = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> round(trust_region_divergence(one, two).item(), 6)
        0.462117
    """
    if problem := tensor_problem(anchor_logits=anchor_logits, logits=logits):
        raise TypeError(problem)
    one_of("kind", kind, get_args(Kind))
    one_of("reduction", reduction, get_args(Reduction))
    for name, scores in (("anchor_logits", anchor_logits), ("logits", logits)):
        if not scores.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {scores.dtype}")
    if logits.ndim != 2 or not logits.numel():
        raise ValueError(f"logits must have shape (batch, classes) with at least one row, got {tuple(logits.shape)}")
    same_shape("anchor_logits", anchor_logits, "logits", logits)
    a, z = (x.float() if x.dtype.itemsize < 4 else x for x in (anchor_logits, logits))
    if kind == "mmd":
        value = _multiquadric(a, a) + _multiquadric(z, z) - 2 * _multiquadric(a, z)
    elif kind == "l2":
        value = (a - z).norm(dim=1).mean()
    else:
        forward = tempered_kl(z, a).mean() if kind != "reverse_kl" else 0.0
        backward = tempered_kl(a, z).mean() if kind != "kl" else 0.0
        value = cast(Tensor, forward + backward)
    if reduction == "official":
        value = value / (len(z) * (z.shape[1] if kind in ("kl", "reverse_kl", "symmetric") else 1))
    return value.clamp(min=0)  # of two nearly equal distributions, rounding can leave less


def _multiquadric(x: Tensor, y: Tensor) -> Tensor:
    """Mean over all pairs of rows of the sum over seven widths of an inverse multiquadric."""
    squared = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
    return torch.stack([(width**2 + squared).rsqrt() for width in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)]).sum(0).mean()


class TRAM(TwoPassOptimizer):
    """Trust-region aware minimisation: the ascent step is as long as the divergence from the anchor (Algorithm 1).

    The closure returns the loss and the divergence; given as a function, the divergence is computed once in a step,
    not in the second pass. A loop of its own calls `perturb(divergence)`. With `torch.distributed`, the divergence is
    averaged over the ranks, as gradients are, so that all of them look at the same weights.

    A divergence that is negative or not finite is refused where it is a number or a tensor on the CPU. On an
    accelerator its value is not looked at, as the host would have to wait for it. Dropout draws new masks in the
    second pass.

    The release adds `d / |g|` to every weight, or `w**2` times that, and leaves out the gradient; here is the paper's
    formula.

    Args:
        base: the optimizer that makes the step.
        model: its batch-normalisation layers keep their running statistics during the second pass of `step`.
        adaptive: measure the length relative to the weights, as ASAM does.
        scale: the radius is this times the divergence; at least 0.
        max_radius: the longest step up; without end, if None.

    Raises:
        TypeError: `base` is not an optimizer.
        ValueError: `scale` or `max_radius`, here or in a group, is negative or not finite.

    Example:
        >>> model = nn.Linear(2, 3)
        >>> optimizer = TRAM(torch.optim.AdamW(model.parameters(), lr=1e-3), model)
        >>> anchor = ParameterAnchor(model, optimizer=optimizer)
        >>> x, y = torch.eye(2), torch.tensor([0, 2])
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     logits = model(x)
        ...     loss = nn.functional.cross_entropy(logits, y)
        ...     loss.backward()
        ...     return loss, lambda: trust_region_divergence(anchor(x), logits)
        >>> losses = [optimizer.step(closure).item() for _ in range(3)]
        >>> losses[2] < losses[0]
        True
    """

    def __init__(
        self,
        base: Optimizer,
        model: nn.Module | None = None,
        adaptive: bool = False,
        scale: float = 1.0,
        max_radius: float | None = None,
    ) -> None:
        non_negative("scale", scale)
        if max_radius is not None:
            non_negative("max_radius", max_radius)
        longest = math.inf if max_radius is None else max_radius
        super().__init__(base, {"adaptive": adaptive, "scale": scale, "max_radius": longest}, model=model)

    def _check(self, group: Mapping[str, Any]) -> None:
        non_negative("scale", group["scale"])
        if group["max_radius"] != math.inf:
            non_negative("max_radius", group["max_radius"])

    @torch.no_grad()
    def perturb(self, divergence: Divergence | None = None) -> None:
        """Move to the perturbed weights, by the gradients that the parameters hold.

        Args:
            divergence: a number, a scalar tensor, or a function that returns one.

        Raises:
            RuntimeError: the weights are perturbed already, or a gradient is sparse.
            TypeError: the divergence is of another kind.
            ValueError: it is not given or not a scalar, or is known to be negative or not finite.
        """
        value = _checked(divergence() if callable(divergence) else divergence)
        self._divergence = _over_ranks(value.to(self.param_groups[0]["params"][0].device))
        super().perturb()

    def ascend(self, first: Any) -> Any:
        if not isinstance(first, tuple) or len(first) != 2:
            raise ValueError(f"closure must return (loss, divergence), got {type(first).__name__}")
        loss, divergence = first
        self.perturb(divergence)
        return loss

    def perturbation(self, params: list[Tensor], grads: list[Tensor], groups: list[dict[str, Any]]) -> list[Tensor]:
        weights = [p if group["adaptive"] else None for p, group in zip(params, groups, strict=True)]
        radii = [(group["scale"] * self._divergence).clamp(max=group["max_radius"]) for group in groups]
        return [d.mul_(radius.to(d)) for d, radius in zip(ascent_direction(grads, weights), radii, strict=True)]


def _checked(divergence: float | Tensor | None) -> Tensor:
    if divergence is None:
        raise ValueError("divergence must be given (without one there is no radius), got None")
    if not isinstance(divergence, float | int | Tensor):
        raise TypeError(f"divergence must be a number or a tensor, got {type(divergence).__name__}")
    value = torch.as_tensor(divergence).detach()
    if value.numel() != 1:
        raise ValueError(f"divergence must be a scalar, got shape {tuple(value.shape)}")
    if value.device.type == "cpu" and not 0 <= value < math.inf:
        raise ValueError(f"divergence must be finite and at least 0, got {value.item()}")
    return value.float().reshape(())


def _over_ranks(value: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


@contextmanager
def _as_anchor(module: nn.Module, model: nn.Module) -> Iterator[None]:
    """Within the block, the module runs without dropout, and normalises by batch statistics where the model does."""
    pairs = zip(module.modules(), model.modules(), strict=True)
    wanted = [(m, isinstance(m, _BatchNorm) and other.training) for m, other in pairs]
    switched = [(m, mode) for m, mode in wanted if m.training != mode]
    try:
        for m, mode in switched:
            m.training = mode
        with frozen_norm_stats(module), torch.no_grad():
            yield
    finally:
        for m, mode in switched:
            m.training = not mode


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


class ParameterAnchor(nn.Module):
    r"""The anchor of TRAM-theta: past weights of the model.

    The average of the weights at all steps before this one, $\theta_a \leftarrow \beta\,\theta_a + (1 - \beta)\,
    \theta$, starts as the weights now; at decay 0 it is the previous step's weights, at decay 1 those it started from.
    It takes in the present weights just before they change: give it the optimizer, or call `update()` then.

    Its forward takes what the model's does and returns the scores, without gradient and without dropout. Batch
    normalisation uses batch statistics where the model's does, so that only the weights make the difference.

    Args:
        model: the network that is trained.
        decay: $\beta$, in [0, 1].
        optimizer: before each of its steps (or those of its base), the average is updated.

    Raises:
        ValueError: `decay` is out of its range.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> anchor = ParameterAnchor(model, decay=0.0, optimizer=optimizer)
        >>> before = model.weight.item()
        >>> model(torch.ones(1, 1)).sum().backward()
        >>> optimizer.step()
        >>> anchor(torch.ones(1, 1)).item() == before
        True
    """

    def __init__(self, model: nn.Module, decay: float = 0.0, optimizer: Optimizer | None = None) -> None:
        super().__init__()
        in_range("decay", decay, 0, 1)
        self._model = (_unwrapped(model),)  # in a tuple, so that it is not taken for a part of this module
        self.average = copy.deepcopy(self._model[0]).requires_grad_(False)
        self.decay = decay
        if optimizer is not None:
            base = optimizer.base if isinstance(optimizer, TwoPassOptimizer) else optimizer
            base.register_step_pre_hook(lambda *_: self.update())

    @torch.no_grad()
    def update(self) -> None:
        """Take in the present weights and buffers; call it before the optimizer's step, not after."""
        held, now = (list(chain(m.parameters(), m.buffers())) for m in (self.average, self._model[0]))
        averaged = [i for i, value in enumerate(held) if value.is_floating_point() or value.is_complex()]
        torch._foreach_lerp_([held[i] for i in averaged], [now[i] for i in averaged], 1 - self.decay)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _as_anchor(self.average, self._model[0]):
            return self.average(*args, **kwargs)


class InputNoiseAnchor:
    """The anchor of TRAM-x: the model as it is now, on inputs with noise.

    Its call takes what the model's does and returns the scores, without gradient and without dropout. Batch
    normalisation works as in the model and keeps its statistics.

    Args:
        model: the network that is trained.
        std: standard deviation of normal noise; uniform noise lies within `std` of zero. At least 0.
        kind: "normal" or "uniform".
        layer: a part of the model whose output takes the noise, say an embedding; else the first input does.
        generator: for the noise.

    Raises:
        ValueError: `std` is negative or not finite, or `kind` is unknown.

    Example:
        >>> model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2))
        >>> anchor = InputNoiseAnchor(model, std=0.1, layer=model[0])
        >>> anchor(torch.tensor([[0, 4]])).shape
        torch.Size([1, 2])
    """

    def __init__(
        self,
        model: nn.Module,
        std: float,
        kind: Noise = "normal",
        *,
        layer: nn.Module | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        non_negative("std", std)
        one_of("kind", kind, get_args(Noise))
        self.model, self.std, self.kind, self.layer, self.generator = _unwrapped(model), std, kind, layer, generator

    def __call__(self, *args: Any, noise: Tensor | None = None, **kwargs: Any) -> Any:
        """Scores under noise.

        Args:
            args: the model's arguments.
            noise: what is added, instead of a draw.
            kwargs: the model's named arguments.
        """

        if self.layer is None and not args:
            raise TypeError("args must begin with the input that takes the noise where there is no layer, got none")

        def noisy(x: Tensor) -> Tensor:
            if not x.is_floating_point():
                raise TypeError(f"input must be floating point to take noise (or give a layer), got {x.dtype}")
            return x + (self._draw(x) if noise is None else noise)

        with _as_anchor(self.model, self.model):
            if self.layer is None:
                return self.model(noisy(args[0]), *args[1:], **kwargs)
            handle = self.layer.register_forward_hook(lambda layer, inputs, output: noisy(output))
            try:
                return self.model(*args, **kwargs)
            finally:
                handle.remove()

    def _draw(self, x: Tensor) -> Tensor:
        device = self.generator.device if self.generator is not None else x.device
        draw = torch.randn if self.kind == "normal" else torch.rand
        unit = draw(x.shape, dtype=x.dtype, device=device, generator=self.generator).to(x.device)
        return self.std * (unit if self.kind == "normal" else 2 * unit - 1)
