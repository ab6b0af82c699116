r"""Grokking without regularisation: a softmax that does not round to one, and gradients that do not lengthen weights.

Once a network fits its training set, cross-entropy is lowered most easily by scaling all logits up, until in floating
point the softmax is exactly one, the loss exactly zero, and learning stops: softmax collapse. `StableMax` grows too
slowly to collapse; `PerpGrad` wraps any optimizer and takes out of the gradient what only scales the weights.
`softmax_collapse_fraction` and `nlm_alignment` tell whether a training suffers from it.

$$
\operatorname{StableMax}(z)_i = \frac{s(z_i)}{\sum_j s(z_j)}, \quad
s(z) = \begin{cases} z + 1 & z \ge 0 \\ 1 / (1 - z) & z < 0 \end{cases}
\qquad
\nabla_\perp L = \nabla L - \frac{\theta^\top \nabla L}{\theta^\top \theta}\,\theta
$$

Reference: Lucas Prieto, Melih Barsbey, Pedro A. M. Mediano, Tolga Birdal, "Grokking at the Edge of Numerical
Stability", ICLR 2025, arXiv 2501.04697.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, cast, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer

from trimtab.ops.arguments import class_indices, floating_tensor, indices, one_of, tensor_problem
from trimtab.ops.units import power_of_two_unit, squares_are_kept
from trimtab.optim.wrapping import OptimizerWrapper

Scope = Literal["tensor", "global"]
_REDUCTIONS = ("mean", "sum", "none")


def _log_s(z: Tensor) -> Tensor:
    # Each branch sees only the arguments it is meant for, so that neither spoils the other's gradient.
    return torch.where(z < 0, -torch.log1p(-z.clamp(max=0)), torch.log1p(z.clamp(min=0)))


def stablemax(logits: Float[Tensor, "..."], dim: int = -1) -> Float[Tensor, "..."]:
    r"""StableMax: softmax with the rational $s$ in place of the exponential.

    Args:
        logits: scores of any real value.
        dim: the dimension that sums to one.

    Raises:
        TypeError: an argument is no real tensor.

    Example:
        >>> stablemax(torch.tensor([2.0, 0.0, -1.0])) * 4.5
        tensor([3.0000, 1.0000, 0.5000])
    """
    if problem := tensor_problem(logits=logits):
        raise TypeError(problem)
    return log_stablemax(logits, dim).exp()


def log_stablemax(logits: Float[Tensor, "..."], dim: int = -1) -> Float[Tensor, "..."]:
    r"""Logarithm of StableMax, which is the log-softmax of $\log s(z) = \operatorname{sign}(z) \log(1 + |z|)$.

    Args:
        logits: scores of any real value.
        dim: the dimension whose exponentials sum to one.

    Raises:
        TypeError: an argument is no real tensor.
    """
    if problem := tensor_problem(logits=logits):
        raise TypeError(problem)
    return F.log_softmax(_log_s(logits), dim)


class StableMax(nn.Module):
    """`stablemax` as a module, to stand where `torch.nn.Softmax` does.

    Args:
        dim: the dimension that sums to one.
    """

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, logits: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """See `stablemax`."""
        return stablemax(logits, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


def stablemax_cross_entropy(
    logits: Float[Tensor, "batch classes"],
    targets: Int[Tensor, " batch"],
    reduction: str = "mean",
    dtype: torch.dtype | None = torch.float64,
) -> Float[Tensor, ""] | Float[Tensor, " batch"]:
    r"""Cross-entropy of StableMax: $-\log \operatorname{StableMax}(z)_y$.

    Unlike softmax, StableMax changes when all logits are shifted: a logit's sign matters.

    Args:
        logits: scores of any real value.
        targets: class indices.
        reduction: "mean", "sum" or "none".
        dtype: precision it is computed in, as the authors do in float64; None for that of the logits.

    Returns:
        A scalar, or shape `(batch,)` with `reduction="none"`; in the precision of the logits, at least float32.

    Raises:
        TypeError: `logits` is not floating point, or `targets` not int64.
        ValueError: the shapes disagree, the batch is empty, or `reduction` is unknown.

    Example:
        >>> logits, targets = torch.tensor([[0.0, 30.0]]), torch.tensor([1])
        >>> F.cross_entropy(logits, targets).item(), round(stablemax_cross_entropy(logits, targets).item(), 5)
        (0.0, 0.03175)
    """
    _check_labelled(logits, targets)
    one_of("reduction", reduction, _REDUCTIONS)
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    log_probs = log_stablemax(logits.to(dtype or logits.dtype))
    return F.nll_loss(log_probs, targets, reduction=reduction).to(logits.dtype)


class StableMaxCrossEntropyLoss(nn.Module):
    """`stablemax_cross_entropy` as a module, with its arguments, to stand where `torch.nn.CrossEntropyLoss` does.

    Raises:
        ValueError: `reduction` is unknown.

    Example:
        >>> criterion = StableMaxCrossEntropyLoss()
        >>> criterion(torch.zeros(4, 10, requires_grad=True), torch.arange(4)).backward()
    """

    def __init__(self, reduction: str = "mean", dtype: torch.dtype | None = torch.float64) -> None:
        super().__init__()
        one_of("reduction", reduction, _REDUCTIONS)
        self.reduction, self.dtype = reduction, dtype

    def forward(
        self, logits: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"]
    ) -> Float[Tensor, ""] | Float[Tensor, " batch"]:
        """The loss of a batch; see `stablemax_cross_entropy`."""
        return stablemax_cross_entropy(logits, targets, self.reduction, self.dtype)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, dtype={self.dtype}"


def orthogonal_gradients(
    grads: Sequence[Float[Tensor, "..."]],
    weights: Sequence[Float[Tensor, "..."]],
    *,
    rescale: bool = False,
    scope: Scope = "tensor",
) -> list[Float[Tensor, "..."]]:
    r"""What is left of gradients without their part along the weights: $\nabla_\perp L$ (Section 5).

    Weights that are all zero have no direction, and leave their gradient as it is. A tensor of one number has no other
    direction, and loses its gradient.

    Args:
        grads: gradients.
        weights: the weights they belong to.
        rescale: stretch the rest to the length of the gradient. Where a gradient lies along its weights up to
            rounding, there is no rest to stretch, and zero is left.
        scope: take each tensor on its own ("tensor"), or all of them as one vector ("global").

    Raises:
        ValueError: `scope` is unknown.

    Example:
        >>> orthogonal_gradients([torch.tensor([1.0, 1.0])], [torch.tensor([2.0, 0.0])], rescale=True)
        [tensor([0.0000, 1.4142])]
    """
    one_of("scope", scope, get_args(Scope))

    def pooled(values: list[Tensor]) -> list[Tensor]:
        if scope == "tensor" or not values:
            return values
        total = torch.stack([value.to(values[0]) for value in values]).sum()
        return [total.to(value) for value in values]

    # Of a tensor that is sharded over ranks each works on its own part; only the inner products are of the whole.
    slopes, places = [_real(_local(g)) for g in grads], [_real(_local(w)) for w in weights]
    inner = pooled([_dot(w, g, of) for w, g, of in zip(places, slopes, grads, strict=True)])
    square = pooled([_dot(w, w, of) for w, of in zip(places, grads, strict=True)])
    share = [torch.where(s > 0, i / s, 0.0) for i, s in zip(inner, square, strict=True)]
    rest = [torch.addcmul(g, w, a, value=-1) for g, w, a in zip(slopes, places, share, strict=True)]
    if rescale:
        before, after = (pooled(_squares(vectors, grads)) for vectors in (slopes, rest))
        if not all(squares_are_kept(square.sqrt()) for square in before):
            # In units of the gradients, which are so small, or so large, that their squares may be lost.
            peaks = [_peak(g, of) for g, of in zip(slopes, grads, strict=True)]
            if scope == "global" and peaks:
                highest = torch.stack([peak.to(peaks[0]) for peak in peaks]).amax()
                peaks = [highest.to(peak) for peak in peaks]
            units = [power_of_two_unit(peak[None]) for peak in peaks]
            before, after = (
                pooled(_squares([x / unit for x, unit in zip(vectors, units, strict=True)], grads))
                for vectors in (slopes, rest)
            )
        for x, long, short in zip(rest, before, after, strict=True):
            rounding = (4 * torch.finfo(x.dtype).eps) ** 2
            x.mul_(torch.where(short > rounding * long, (long / short).sqrt(), 0.0))
    plain = [(torch.view_as_complex(x) if g.is_complex() else x).to(g.dtype) for x, g in zip(rest, grads, strict=True)]
    return [_as_part_of(g, x) for g, x in zip(grads, plain, strict=True)]


class PerpGrad(OptimizerWrapper):
    r"""$\perp$Grad, in the authors' release OrthoGrad: any optimizer, fed gradients orthogonal to the weights.

    Parameter groups, state and `state_dict` are the base optimizer's own; see `OptimizerWrapper`. The projection comes
    before the base's momentum and moments. It acts for the length of a step; afterwards each `p.grad` is the gradient
    it was.

    The default is that of the authors' release, with which the results were made: each tensor is taken on its own, and
    what is left is stretched to the gradient's length. The paper writes the projection of the whole weight vector,
    without stretching: `rescale=False, scope="global"`. With no part along any tensor a gradient has none along the
    whole, so "tensor" is the stronger.

    Args:
        base: the optimizer that makes the step.
        rescale, scope: see `orthogonal_gradients`.

    Raises:
        TypeError: `base` is not an optimizer.
        ValueError: `scope` is unknown.
        RuntimeError: at `step`, for a sparse gradient.

    Example:
        >>> weight = nn.Parameter(torch.tensor([2.0, 0.0]))
        >>> optimizer = PerpGrad(torch.optim.SGD([weight], lr=0.5), rescale=False)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> weight.tolist(), weight.grad.tolist()
        ([2.0, -0.5], [1.0, 1.0])
    """

    rescale: bool
    scope: Scope

    def __init__(self, base: Optimizer, *, rescale: bool = True, scope: Scope = "tensor") -> None:
        one_of("scope", scope, get_args(Scope))
        super().__init__(base, rescale=rescale, scope=scope)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of the base optimizer, on projected gradients.

        Args:
            closure: evaluates the model again, with gradients, and returns the loss; what it leaves is projected.

        Returns:
            What the base optimizer returns.
        """
        found: list[tuple[Tensor, Tensor]] = []

        def evaluate() -> Any:
            _put_back(found)
            with torch.enable_grad():
                loss = closure() if closure is not None else None
            self._project(found)
            return loss

        try:
            if closure is not None:
                return self.base.step(evaluate)
            evaluate()
            return self.base.step()
        finally:
            _put_back(found)

    @torch.no_grad()
    def _project(self, found: list[tuple[Tensor, Tensor]]) -> None:
        """Exchange the gradients for projected ones, and note what they were."""
        held = [(p, p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(g.layout != torch.strided for _, g in held):
            raise RuntimeError("PerpGrad does not take sparse gradients")
        projected = orthogonal_gradients(
            [g for _, g in held], [p for p, _ in held], rescale=self.rescale, scope=self.scope
        )
        found.extend(held)
        for (p, _), g in zip(held, projected, strict=True):
            p.grad = g


def _put_back(found: list[tuple[Tensor, Tensor]]) -> None:
    while found:
        p, grad = found.pop()
        p.grad = grad


def softmax_collapse_fraction(
    logits: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"], dtype: torch.dtype | None = None
) -> Float[Tensor, ""]:
    r"""Share of samples whose softmax cross-entropy is exactly zero, so that they teach nothing (Section 3).

    That is so where $\sum_k e^{z_k - z_y}$ rounds to one: all other classes together are lost in rounding.

    Args:
        logits: scores.
        targets: class indices.
        dtype: precision of the arithmetic; that of the logits, if None.

    Raises:
        TypeError: `logits` is not floating point, or `targets` not int64.
        ValueError: the shapes disagree, or the batch is empty.

    Example:
        >>> logits, targets = torch.tensor([[0.0, 30.0], [0.0, 3.0]]), torch.tensor([1, 1])
        >>> softmax_collapse_fraction(logits, targets).item()
        0.5
        >>> softmax_collapse_fraction(logits, targets, dtype=torch.float64).item()
        0.0
    """
    if problem := tensor_problem(logits=logits):
        raise TypeError(problem)
    _check_labelled(logits, targets)
    relative = logits.to(dtype or logits.dtype)
    relative = relative - relative.amax(1, keepdim=True)
    loss = relative.exp().sum(1).log() - relative.gather(1, targets[:, None]).squeeze(1)
    return (loss == 0).to(torch.float32).mean()


def nlm_alignment(parameters: Iterable[Tensor]) -> Float[Tensor, ""]:
    r"""How far descent goes along the weights themselves: $\cos(-\nabla L, \theta)$, all parameters as one vector.

    Close to one, training is naive loss minimisation (NLM): in a network that is homogeneous in its weights it scales
    the logits and changes no prediction (Section 4). After `backward()`; parameters without gradient are left out.

    Args:
        parameters: as `torch.nn.utils.clip_grad_norm_` takes them.

    Returns:
        A number in [-1, 1]; zero where weights or gradients are zero.

    Raises:
        ValueError: no parameter has a gradient.

    Example:
        >>> weight = nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> (-weight).sum().backward()
        >>> round(nlm_alignment([weight]).item(), 4)
        0.9899
    """
    held = [(_real(p.detach()).flatten(), _real(p.grad).flatten()) for p in parameters if p.grad is not None]
    if not held:
        raise ValueError("parameters must have gradients (call backward() first), got none")
    place, slope = (torch.cat([x.to(held[0][0]) for x in part]) for part in zip(*held, strict=True))
    place, slope = (x / power_of_two_unit(x[None])[0] for x in (place, slope))  # gradients may be as small as 1e-30
    return F.cosine_similarity(-slope, place, dim=0, eps=torch.finfo(place.dtype).tiny)


def _real(x: Tensor) -> Tensor:
    """In at least float32; a complex tensor as pairs of real numbers."""
    x = torch.view_as_real(x) if x.is_complex() else x
    return x.float() if x.dtype.itemsize < 4 else x


def _dot(x: Tensor, y: Tensor, of: Tensor) -> Tensor:
    """The inner product of two tensors laid out over ranks as `of` is."""
    inner = torch.dot(x.reshape(-1), y.reshape(-1))
    if _is_sharded(of):
        for axis, placement in enumerate(of.placements):  # type: ignore[attr-defined]
            if placement.is_shard():
                dist.all_reduce(inner, group=of.device_mesh.get_group(axis))  # type: ignore[attr-defined]
    return inner


def _squares(vectors: Sequence[Tensor], of: Sequence[Tensor]) -> list[Tensor]:
    return [_dot(x, x, like) for x, like in zip(vectors, of, strict=True)]


def _peak(x: Tensor, of: Tensor) -> Tensor:
    """The largest size of an entry of a tensor laid out over ranks as `of` is."""
    peak = x.abs().amax() if x.numel() else x.new_zeros(())
    if _is_sharded(of):
        for axis, placement in enumerate(of.placements):  # type: ignore[attr-defined]
            if placement.is_shard():
                group = of.device_mesh.get_group(axis)  # type: ignore[attr-defined]
                dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    return peak


def _is_sharded(x: Tensor) -> bool:
    return hasattr(x, "placements") and hasattr(x, "to_local")  # a DTensor, whose module needs torch.distributed


def _local(x: Tensor) -> Tensor:
    return cast(Tensor, x.to_local()) if _is_sharded(x) else x  # type: ignore[attr-defined]


def _as_part_of(whole: Any, part: Tensor) -> Tensor:
    if not _is_sharded(whole):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        whole.device_mesh,
        whole.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def _check_labelled(logits: Tensor, targets: Tensor) -> None:
    if problem := tensor_problem(logits=logits, targets=targets):
        raise TypeError(problem)
    floating_tensor("logits", logits)
    class_indices("targets", targets)
    if logits.ndim != 2 or not len(logits):
        raise ValueError(f"logits must have shape (batch, classes) with at least one sample, got {tuple(logits.shape)}")
    if targets.shape != logits.shape[:1]:
        raise ValueError(f"targets must have shape ({len(logits)},), got {tuple(targets.shape)}")
    indices("targets", targets, logits.shape[1])
