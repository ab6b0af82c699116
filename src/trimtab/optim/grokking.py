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
Stability", ICLR 2025, arXiv:2501.04697.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer

Scope = Literal["tensor", "global"]


def _log_s(z: Tensor) -> Tensor:
    # Each branch sees only the arguments it is meant for, so that neither spoils the other's gradient.
    return torch.where(z < 0, -torch.log1p(-z.clamp(max=0)), torch.log1p(z.clamp(min=0)))


def stablemax(logits: Float[Tensor, "..."], dim: int = -1) -> Float[Tensor, "..."]:
    r"""StableMax: softmax with the rational \(s\) in place of the exponential.

    Args:
        logits: scores of any real value.
        dim: the dimension that sums to one.

    Example:
        >>> stablemax(torch.tensor([2.0, 0.0, -1.0])) * 4.5
        tensor([3.0000, 1.0000, 0.5000])
    """
    return log_stablemax(logits, dim).exp()


def log_stablemax(logits: Float[Tensor, "..."], dim: int = -1) -> Float[Tensor, "..."]:
    r"""Logarithm of StableMax, which is the log-softmax of \(\log s(z) = \operatorname{sign}(z) \log(1 + |z|)\).

    Args:
        logits: scores of any real value.
        dim: the dimension whose exponentials sum to one.
    """
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
    r"""Cross-entropy of StableMax: \(-\log \operatorname{StableMax}(z)_y\).

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
    _check_reduction(reduction)
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    log_probs = log_stablemax(logits.to(dtype or logits.dtype))
    return F.nll_loss(log_probs, targets, reduction=reduction).to(logits.dtype)


class StableMaxCrossEntropyLoss(nn.Module):
    """`stablemax_cross_entropy` as a module, to stand where `torch.nn.CrossEntropyLoss` does.

    Args:
        reduction: "mean", "sum" or "none".
        dtype: precision it is computed in; None for that of the logits.

    Raises:
        ValueError: `reduction` is unknown.

    Example:
        >>> criterion = StableMaxCrossEntropyLoss()
        >>> criterion(torch.zeros(4, 10, requires_grad=True), torch.arange(4)).backward()
    """

    def __init__(self, reduction: str = "mean", dtype: torch.dtype | None = torch.float64) -> None:
        super().__init__()
        _check_reduction(reduction)
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
    r"""What is left of gradients without their part along the weights: \(\nabla_\perp L\) (Section 5).

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
    _check_scope(scope)

    def pooled(values: list[Tensor]) -> list[Tensor]:
        if scope == "tensor" or not values:
            return values
        total = torch.stack([value.to(values[0]) for value in values]).sum()
        return [total.to(value) for value in values]

    slopes, places = [_real(g) for g in grads], [_real(w) for w in weights]
    inner = pooled([_dot(w, g) for w, g in zip(places, slopes, strict=True)])
    square = pooled([_dot(w, w) for w in places])
    share = [torch.where(s > 0, i / s, 0.0) for i, s in zip(inner, square, strict=True)]
    rest = [torch.addcmul(g, w, a, value=-1) for g, w, a in zip(slopes, places, share, strict=True)]
    if rescale:
        before, after = (pooled([_dot(x, x) for x in vectors]) for vectors in (slopes, rest))
        for x, long, short in zip(rest, before, after, strict=True):
            rounding = (4 * torch.finfo(x.dtype).eps) ** 2
            x.mul_(torch.where(short > rounding * long, (long / short).sqrt(), 0.0))
    return [(torch.view_as_complex(x) if g.is_complex() else x).to(g.dtype) for x, g in zip(rest, grads, strict=True)]


class PerpGrad(Optimizer):
    r"""\(\perp\)Grad, in the authors' release OrthoGrad: any optimizer, fed gradients orthogonal to the weights.

    Parameter groups, state and `state_dict` are the base optimizer's own, so a learning-rate scheduler works on either.
    The projection comes before the base's momentum and moments. It acts for the length of a step; afterwards
    each `p.grad` is the gradient it was.

    The paper writes the projection of the whole weight vector, without stretching; its release, with which the results
    were made, takes each tensor on its own and stretches to the gradient's length: `rescale=True`. With no part along
    any tensor a gradient has none along the whole, so "tensor" is the stronger, and the default.

    Args:
        base: the optimizer that makes the step.
        rescale: stretch the projected gradient to its former length.
        scope: take each tensor on its own ("tensor"), or all of them as one vector ("global").

    Raises:
        TypeError: `base` is not an optimizer.
        ValueError: `scope` is unknown.
        RuntimeError: at `step`, for a sparse gradient.

    Example:
        >>> weight = nn.Parameter(torch.tensor([2.0, 0.0]))
        >>> optimizer = PerpGrad(torch.optim.SGD([weight], lr=0.5))
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> weight.tolist(), weight.grad.tolist()
        ([2.0, -0.5], [1.0, 1.0])
    """

    base: Optimizer
    rescale: bool
    scope: Scope

    def __init__(self, base: Optimizer, *, rescale: bool = False, scope: Scope = "tensor") -> None:
        if not isinstance(base, Optimizer):
            raise TypeError(f"PerpGrad: base must be an Optimizer, got {type(base).__name__}")
        _check_scope(scope)
        # Optimizer.__init__ would make groups of its own; its hooks are all that is needed beside the base's.
        self.__setstate__({"base": base, "rescale": rescale, "scope": scope, "defaults": base.defaults})

    def __getstate__(self) -> dict[str, Any]:
        return {"base": self.base, "rescale": self.rescale, "scope": self.scope, "defaults": self.base.defaults}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's own list."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base.param_groups = value

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The base optimizer's own state."""
        return self.base.state

    @state.setter
    def state(self, value: defaultdict[Tensor, Any]) -> None:
        self.base.state = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the base optimizer."""
        self.base.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state; the projection has none."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the base optimizer's state."""
        self.base.load_state_dict(state_dict)

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

    That is so where \(\sum_k e^{z_k - z_y}\) rounds to one: all other classes together are lost in rounding.

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
    _check_labelled(logits, targets)
    relative = logits.to(dtype or logits.dtype)
    relative = relative - relative.amax(1, keepdim=True)
    loss = relative.exp().sum(1).log() - relative.gather(1, targets[:, None]).squeeze(1)
    return (loss == 0).to(torch.float32).mean()


def nlm_alignment(parameters: Iterable[Tensor]) -> Float[Tensor, ""]:
    r"""How far descent goes along the weights themselves: \(\cos(-\nabla L, \theta)\), all parameters as one vector.

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
        raise ValueError("parameters: none has a gradient; call backward() first")
    place, slope = (torch.cat([x.to(held[0][0]) for x in part]) for part in zip(*held, strict=True))
    return F.cosine_similarity(-slope, place, dim=0, eps=torch.finfo(place.dtype).tiny)


def _real(x: Tensor) -> Tensor:
    """In at least float32; a complex tensor as pairs of real numbers."""
    x = torch.view_as_real(x) if x.is_complex() else x
    return x.float() if x.dtype.itemsize < 4 else x


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return torch.dot(x.reshape(-1), y.reshape(-1))


def _check_scope(scope: str) -> None:
    if scope not in get_args(Scope):
        raise ValueError(f"scope: {scope!r}; it must be one of {', '.join(map(repr, get_args(Scope)))}")


def _check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: {reduction!r}; it must be one of 'mean', 'sum', 'none'")


def _check_labelled(logits: Tensor, targets: Tensor) -> None:
    if not logits.is_floating_point():
        raise TypeError(f"logits: dtype {logits.dtype}; it must be a floating-point type")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets: dtype {targets.dtype}; it must be torch.int64 (class indices)")
    if logits.ndim != 2 or not len(logits):
        raise ValueError(f"logits: shape {tuple(logits.shape)}; it must be (batch, classes) with at least one sample")
    if targets.shape != logits.shape[:1]:
        raise ValueError(f"targets: shape {tuple(targets.shape)}; it must be ({len(logits)},)")
