r"""GLAD: low-rank fine-tuning along a task gradient that the sharpness-aware one steers.

A model that is adapted to a few classes or to one domain should still work on others. GLAD trains LoRA adapters, and
turns the gradient of the task away from conflict with the gradient a small distance uphill, and towards it: to flat
regions that still fit the task. A step takes two passes.

$$
W_{\text{eff}} = W + \tfrac{\alpha}{r} B A, \qquad
g = \nabla L(\theta), \quad g_s = \nabla L\bigl(\theta + \rho\, g / \lVert g \rVert\bigr)
$$
$$
g' = g - \frac{\min(\langle g, g_s \rangle, 0)}{\lVert g_s \rVert^2}\, g_s, \qquad
d = (1 - \lambda)\, g' + \lambda\, \frac{\lVert g' \rVert}{\lVert g_s \rVert}\, g_s
$$

Yuqi Peng, Pengfei Wang, Jianzhuang Liu and Shifeng Chen, "GLAD: Generalizable Tuning for Vision-Language Models",
ICCV Workshops 2025, arXiv 2507.13089. Only the abstract and the overview figure were at hand, no code is released: how
exactly the gradient is steered, and the values of rank, radius and share, are reconstructed here. The mode "project"
has the first half alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from trimtab.finetune.adapter import AdapterConfig, LoRADelta
from trimtab.finetune.svd import as_matrix
from trimtab.ops.arguments import in_range, integer, non_negative, one_of, positive, tensor_problem
from trimtab.optim.two_pass import TwoPassOptimizer, ascent_direction

Mode = Literal["steer", "project"]
_TINY = 1e-12


class LoRAWeight(nn.Module):
    """Parametrization of a weight by itself and a low-rank change, which starts at zero.

    Args:
        weight: the pre-trained weight; kernels count as (out, in * height * width) matrices.
        r: rank, at least 1.
        alpha: the change is scaled by alpha / r; by 1 without it.
        A: where the right factor starts, (r, in); drawn from torch's global state without it, as layers are.

    Attributes:
        A: right factor (r, in), trained.
        B: left factor (out, r), trained, zero at the start.

    Raises:
        TypeError: `weight` is not floating-point.
        ValueError: `weight` is not a finite matrix, `r` or `alpha` is out of range, or `A` has another shape.

    Example:
        >>> lora = LoRAWeight(torch.eye(2), r=1, A=torch.tensor([[1.0, 2.0]]))
        >>> with torch.no_grad():
        ...     lora.B[0, 0] = 1.0
        >>> lora(torch.eye(2)).data
        tensor([[2., 2.],
                [0., 1.]])
    """

    def __init__(
        self,
        weight: Float[Tensor, "out ..."],
        r: int,
        alpha: float | None = None,
        *,
        A: Float[Tensor, "r in"] | None = None,
    ) -> None:
        super().__init__()
        if problem := tensor_problem(A=A):
            raise TypeError(problem)
        matrix = as_matrix(weight)
        integer("r", r)
        self.scale = 1.0 if alpha is None else positive("alpha", alpha) / r
        shape = (r, matrix.shape[1])
        if A is None:
            A = nn.init.kaiming_uniform_(matrix.new_empty(shape), a=math.sqrt(5))
        elif A.shape != shape:
            raise ValueError(f"A must have shape {shape}, got {tuple(A.shape)}")
        self.A = nn.Parameter(A.detach().to(matrix, copy=True))
        self.B = nn.Parameter(matrix.new_zeros(len(matrix), r))

    def forward(self, weight: Float[Tensor, "out ..."]) -> Float[Tensor, "out ..."]:
        """The effective weight, in the type of the pre-trained one."""
        # autocast would round the small learned change away before it is added
        with torch.autocast(weight.device.type, enabled=False):
            matrix = torch.addmm(weight.flatten(1).to(self.A.dtype), self.B, self.A, alpha=self.scale)
        return matrix.to(weight.dtype).view_as(weight)

    def to_lora_delta(self) -> LoRADelta:
        """The change from the pre-trained weight, as factors which gradients reach."""
        return LoRADelta(self.A, self.B * self.scale)

    def extra_repr(self) -> str:
        return f"r={len(self.A)}, scale={self.scale:g}"


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(AdapterConfig):
    """Where LoRA goes, and its rank; for `apply_adapter`.

    Attributes:
        r: rank of each weight's change.
        alpha: the change is scaled by alpha / r; by 1 without it.

    Raises:
        ValueError: `r` or `alpha` is out of range.

    Example:
        >>> from trimtab.finetune import apply_adapter
        >>> model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
        >>> adapters = apply_adapter(model, LoRAConfig(r=2, target_modules=["0"]))
        >>> optimizer = GradientSteering(torch.optim.AdamW(adapters.trainable_parameters(), lr=1e-2))
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = model(torch.ones(4, 6)).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> losses = [optimizer.step(closure).item() for _ in range(3)]
        >>> losses[2] < losses[0]
        True
    """

    r: int = 4
    alpha: float | None = None

    def __post_init__(self) -> None:
        integer("r", self.r)
        if self.alpha is not None:
            positive("alpha", self.alpha)

    def build(self, weight: Float[Tensor, "out ..."]) -> LoRAWeight:
        return LoRAWeight(weight, self.r, self.alpha)


def steer_gradient(
    g: Sequence[Float[Tensor, "..."]], ref: Sequence[Float[Tensor, "..."]], lam: float = 0.5, mode: Mode = "steer"
) -> list[Tensor]:
    """The gradient without what conflicts with a reference, and turned towards it; over all tensors together.

    The result never points against the reference.

    Args:
        g: gradient of the task.
        ref: the reference, in the same shapes.
        lam: share of the reference's direction, from 0 to 1; at 1 the direction is the reference's, with the length of
            the gradient.
        mode: "project" takes the conflict away and does nothing more.

    Raises:
        ValueError: the shapes differ, or `lam` or `mode` is out of range.

    Example:
        >>> steer_gradient([torch.tensor([1.0, 0.0])], [torch.tensor([-1.0, 1.0])], mode="project")
        [tensor([0.5000, 0.5000])]
    """
    in_range("lam", lam, 0, 1)
    one_of("mode", mode, ("steer", "project"))
    if [x.shape for x in g] != [x.shape for x in ref]:
        raise ValueError(f"ref must have shapes {[tuple(x.shape) for x in g]}, got {[tuple(x.shape) for x in ref]}")
    if not g:
        return []
    squared = _inner(ref, ref)
    conflict = _inner(g, ref).clamp(max=0) / (squared + _TINY**2)
    free = [x - conflict.to(x) * s for x, s in zip(g, ref, strict=True)]
    if mode == "project":
        return free
    ratio = (_inner(free, free) / (squared + _TINY**2)).sqrt()
    return [(1 - lam) * x + lam * ratio.to(x) * s for x, s in zip(free, ref, strict=True)]


def _inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    kind = torch.promote_types(a[0].dtype, torch.float32)
    return torch.stack(
        [(x.to(a[0].device, kind) * y.to(a[0].device, kind)).sum() for x, y in zip(a, b, strict=True)]
    ).sum()


class GradientSteering(TwoPassOptimizer):
    """A base optimizer that steps along the task gradient, steered by the one a distance `rho` uphill.

    See `TwoPassOptimizer` for loops that call `perturb()` and `restore()` themselves: what the parameters hold as
    gradients after `restore()` is the steered direction. With a gradient scaler, unscale the second gradient too,
    before `restore()`.

    Args:
        base: the optimizer that makes the step.
        rho: length of the ascent step, over all parameters together.
        lam: see `steer_gradient`; at 0 without conflict the step is the base's own.
        mode: "steer" or "project".
        model: its batch-normalisation layers keep their running statistics during the second pass. Dropout draws new
            masks there.

    Raises:
        TypeError: `base` is not an optimizer.
        ValueError: a number or `mode` is out of range.

    Example:
        >>> weight = nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = GradientSteering(torch.optim.SGD([weight], lr=0.1), rho=0.5)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = 0.5 * weight.square().sum()
        ...     loss.backward()
        ...     return loss
        >>> optimizer.step(closure).item()
        12.5
        >>> weight.data  # uphill the gradient has the same direction here
        tensor([2.7000, 3.6000])
    """

    def __init__(
        self,
        base: Optimizer,
        rho: float = 0.05,
        lam: float = 0.5,
        mode: Mode = "steer",
        *,
        model: nn.Module | None = None,
    ) -> None:
        options = {
            "rho": non_negative("rho", rho),
            "lam": in_range("lam", lam, 0, 1),
            "mode": one_of("mode", mode, ("steer", "project")),
        }
        super().__init__(base, options, model=model)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._task: list[tuple[Tensor, Tensor]] = []
        super().__setstate__(state)

    def perturbation(self, params: list[Tensor], grads: list[Tensor], groups: list[dict[str, Any]]) -> list[Tensor]:
        self._task = [(p, gradient.clone()) for p, gradient in zip(params, grads, strict=True)]
        ascent = ascent_direction(grads)
        return [d.mul_(group["rho"]) for d, group in zip(ascent, groups, strict=True)]

    @torch.no_grad()
    def restore(self) -> None:
        """Move back, and leave the steered direction as the gradients; without `perturb`, do nothing."""
        super().restore()
        task, self._task = self._task, []
        both = [(p, first, p.grad) for p, first in task if p.grad is not None]
        group = self.param_groups[0]
        steered = steer_gradient([g for _, g, _ in both], [s for _, _, s in both], group["lam"], group["mode"])
        for (p, _, _), direction in zip(both, steered, strict=True):
            p.grad = direction.to(p.dtype)
