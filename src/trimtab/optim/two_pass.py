r"""Optimizers that look at the gradient a second time, at perturbed weights, before the base optimizer steps.

The shared piece of the sharpness-aware family, and SAM itself as the baseline.

$$
\epsilon = \rho\,\frac{g(\theta)}{\lVert g(\theta) \rVert_2}, \qquad
\theta \leftarrow \operatorname{base}\bigl(\theta,\; g(\theta + \epsilon)\bigr)
$$

Reference: Pierre Foret, Ariel Kleiner, Hossein Mobahi, Behnam Neyshabur, "Sharpness-Aware Minimization for
Efficiently Improving Generalization", ICLR 2021, arXiv 2010.01412; adaptive form: Jungmin Kwon, Jeongseop Kim,
Hyunseo Park, In Kwon Choi, "ASAM", ICML 2021, arXiv 2102.11600.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trimtab.ops.arguments import non_negative
from trimtab.optim.wrapping import OptimizerWrapper

_TINY = 1e-12


def ascent_direction(grads: list[Tensor], weights: list[Tensor | None] | None = None) -> list[Tensor]:
    r"""The steepest direction of unit length, over all tensors together: the gradient over its norm.

    Args:
        grads: gradients.
        weights: tensors relative to which length is measured (ASAM), where given: $w^2 g / \lVert |w| g \rVert$.

    Example:
        >>> ascent_direction([torch.tensor([3.0, 4.0])])
        [tensor([0.6000, 0.8000])]
    """
    scales = [None if w is None else w.abs() for w in weights or [None] * len(grads)]
    slopes = [g if w is None else g * w for g, w in zip(grads, scales, strict=True)]
    norm = torch.stack([n.to(grads[0].device, torch.float32) for n in torch._foreach_norm(slopes)]).norm()
    inverse = 1 / (norm + _TINY)
    return [s * inverse.to(s) if w is None else s * w * inverse.to(s) for s, w in zip(slopes, scales, strict=True)]


@contextmanager
def frozen_norm_stats(model: nn.Module) -> Iterator[None]:
    """Within the block, batch normalisation works as before but leaves its running statistics alone."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    layers = [m for m in model.modules() if isinstance(m, kinds) and m.track_running_stats]
    for layer in layers:
        # Not a momentum of 0, which would still let a NaN in from weights that an overflow has spoilt.
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


class TwoPassOptimizer(OptimizerWrapper):
    """A base optimizer that is fed the gradient at perturbed weights.

    Parameter groups, state and `state_dict` are the base optimizer's own; see `OptimizerWrapper`. A method of the
    family defines `perturbation`, and keeps its hyper-parameters in the groups.

    `step(closure)` calls the closure twice: at the weights, and at the perturbed weights. A loop that needs more
    control calls `perturb()` after the first backward pass and `restore()` after the second, and then steps `base`
    (a scheduler is then given `base`). Gradients may be accumulated over any number of backward passes before either
    call. With a gradient scaler, the wrapper stands for the first pass and the base for the second:

        scaler.scale(loss_of(model)).backward()
        scaler.unscale_(optimizer)
        optimizer.perturb()
        optimizer.zero_grad()
        with frozen_norm_stats(model):
            scaler.scale(loss_of(model)).backward()
        optimizer.restore()
        scaler.step(optimizer.base)
        scaler.update()

    An overflow in the first pass reaches the second through the weights, so that either one leads to no step.

    Args:
        base: the optimizer that makes the step.
        options: hyper-parameters, added to the groups that do not have their own.
        model: its batch-normalisation layers keep their running statistics during the second pass of `step`.

    Raises:
        TypeError: `base` is not an optimizer.
    """

    model: nn.Module | None

    def __init__(
        self, base: Optimizer, options: dict[str, Any] | None = None, *, model: nn.Module | None = None
    ) -> None:
        super().__init__(base, options, model=model)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._home: list[tuple[Tensor, Tensor]] = []
        super().__setstate__(state)

    def perturbation(self, params: list[Tensor], grads: list[Tensor], groups: list[dict[str, Any]]) -> list[Tensor]:
        """What to add to each weight before the second pass.

        Args:
            params: weights that have a gradient.
            grads: their gradients.
            groups: the parameter group of each.
        """
        raise NotImplementedError("a two-pass optimizer must define perturbation(params, grads, groups)")

    @torch.no_grad()
    def perturb(self) -> None:
        """Move to the perturbed weights, by the gradients that the parameters hold.

        Raises:
            RuntimeError: the weights are perturbed already, or a gradient is sparse.
        """
        name = type(self).__name__
        if self._home:
            raise RuntimeError(f"{name}: the weights are perturbed already; call restore() first")
        found = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(p.grad.layout != torch.strided for p, _ in found):
            raise RuntimeError(f"{name} does not take sparse gradients")
        if not found:
            return
        params, grads = [p for p, _ in found], [p.grad for p, _ in found]
        moves = self.perturbation(params, grads, [group for _, group in found])
        self._home = [(p, p.clone()) for p in params]
        torch._foreach_add_(params, moves)
        torch.clear_autocast_cache()  # it holds casts of the weights as they were

    @torch.no_grad()
    def restore(self) -> None:
        """Move back, to the very weights that `perturb` left; without it, do nothing."""
        for p, home in self._home:
            p.copy_(home)
        self._home = []
        torch.clear_autocast_cache()

    def ascend(self, first: Any) -> Any:
        """Perturb after the first pass of `step`.

        Args:
            first: what the closure returned: the loss, unless the method asks for more.

        Returns:
            The loss.
        """
        self.perturb()
        return first

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Both passes, and the base optimizer's step.

        Args:
            closure: clears the gradients, evaluates the model, calls `backward` and returns the loss.

        Returns:
            The loss of the first pass, at the weights themselves.

        Raises:
            ValueError: there is no closure.
        """
        if closure is None:
            # No weight moves at a rate of 0: that is how torch.distributed.checkpoint has state made.
            if all(group.get("lr") == 0 for group in self.param_groups):
                return self.base.step()
            raise ValueError("closure must be a function, which is called twice in a step, got None")
        with torch.enable_grad():
            first = closure()
        try:
            loss = self.ascend(first)
            with frozen_norm_stats(self.model) if self.model is not None else nullcontext(), torch.enable_grad():
                closure()
        finally:
            self.restore()
        self.base.step()
        return loss


class SAM(TwoPassOptimizer):
    """Sharpness-aware minimisation: the gradient is taken a distance `rho` up the steepest slope.

    Args:
        base: the optimizer that makes the step.
        rho: length of the ascent step, over all parameters together; at least 0.
        adaptive: measure the length relative to the weights (ASAM; take a `rho` about ten times larger).
        model: its batch-normalisation layers keep their running statistics during the second pass.

    Raises:
        TypeError: `base` is not an optimizer.
        ValueError: `rho`, here or in a group, is negative or not finite, or `base` has a hyper-parameter of that name,
            as Adadelta.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = SAM(torch.optim.SGD([weight], lr=0.1), rho=0.5)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = 0.5 * (weight**2).sum()
        ...     loss.backward()
        ...     return loss
        >>> optimizer.step(closure).item()
        12.5
        >>> weight.tolist()  # 0.1 of (3.3, 4.4) less
        [2.6700000762939453, 3.559999942779541]
    """

    def __init__(
        self, base: Optimizer, rho: float = 0.05, *, adaptive: bool = False, model: nn.Module | None = None
    ) -> None:
        non_negative("rho", rho)
        super().__init__(base, {"rho": rho, "adaptive": adaptive}, model=model)

    def _check(self, group: Mapping[str, Any]) -> None:
        non_negative("rho", group["rho"])

    def perturbation(self, params: list[Tensor], grads: list[Tensor], groups: list[dict[str, Any]]) -> list[Tensor]:
        weights = [p if group["adaptive"] else None for p, group in zip(params, groups, strict=True)]
        ascent = ascent_direction(grads, weights)
        return [d.mul_(group["rho"]) for d, group in zip(ascent, groups, strict=True)]
