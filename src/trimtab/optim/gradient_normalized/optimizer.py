"""The method as a PyTorch optimizer of a small model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.ops.arguments import integer, positive
from trimtab.optim.gradient_normalized.step import gradient_normalized_step

MAX_PARAMETERS = 10_000


class GradientNormalizedNewton(torch.optim.Optimizer):
    """The same method for the parameters of a small model, on a loss that is the same at every call (no minibatches).

    A step is one iteration of Algorithm 3, with the exact Hessian. It needs a closure that returns the loss and does
    not call `backward`; it is called once more for every try. Time grows like the third power of the number of
    parameters, memory like the second.

    Args:
        params: parameters of one group, of one precision and device; at most ten thousand numbers.
        gamma: radius of the first try, positive.
        max_halvings: most tries for a step, at least 1.

    Raises:
        ValueError: an argument is out of its range, there are several groups, or too many parameters.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 0.0], dtype=torch.float64))
        >>> optimizer = GradientNormalizedNewton([weight])
        >>> loss = optimizer.step(lambda: 0.5 * weight.square().sum())
        >>> weight.data
        tensor([0.5000, 0.0000], dtype=torch.float64)
    """

    def __init__(self, params: Iterable[nn.Parameter], *, gamma: float = 1.0, max_halvings: int = 40) -> None:
        positive("gamma", gamma)
        integer("max_halvings", max_halvings)
        super().__init__(params, {"gamma": gamma, "max_halvings": max_halvings})
        held: list[nn.Parameter] = self.param_groups[0]["params"]
        count = sum(p.numel() for p in held)
        if count > MAX_PARAMETERS:
            raise ValueError(f"params must be at most {MAX_PARAMETERS} numbers (the Hessian is dense), got {count}")
        if len({(p.dtype, p.device) for p in held}) != 1:
            raise ValueError("params must be of one dtype on one device, got several")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take the group that the constructor was given; another one is refused, as the step is one for all."""
        if self.param_groups:
            raise ValueError("params must be one group (the step is one for all), got more")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of another of this class.

        Raises:
            TypeError: a saved hyper-parameter is not a number.
            ValueError: it is the state of another optimizer, or a hyper-parameter is out of its range; nothing changes.
        """
        for group in state_dict["param_groups"]:
            if missing := self.defaults.keys() - group.keys():
                raise ValueError(f"state_dict must be of a {type(self).__name__}, got none of {sorted(missing)}")
            positive("gamma", group["gamma"])
            integer("max_halvings", group["max_halvings"])
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        """One accepted step; none where the gradient is zero or no try is accepted.

        Args:
            closure: returns the loss, with its graph.

        Returns:
            The loss before the step.
        """
        group = self.param_groups[0]
        params: list[nn.Parameter] = group["params"]
        start = nn.utils.parameters_to_vector(params)
        with torch.enable_grad():
            loss = closure()
            if not loss.requires_grad:
                raise ValueError("closure must return the loss with its graph, without calling backward, got none")
            gradient = _flat(torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True))
            hessian = _rows(gradient, params)
        if not gradient.any():
            return loss.detach()

        def evaluate(direction: Tensor) -> tuple[Tensor, Tensor]:
            nn.utils.vector_to_parameters(start + direction, params)
            with torch.enable_grad():
                value = closure()
                return value.detach(), _flat(torch.autograd.grad(value, params, materialize_grads=True))

        step = None
        try:
            step = gradient_normalized_step(
                evaluate, loss.detach(), gradient.detach(), hessian, group["gamma"], max_halvings=group["max_halvings"]
            )
        finally:
            if step is None:  # refused, or the closure failed
                nn.utils.vector_to_parameters(start, params)
        if step is not None:
            group["gamma"] = step.gamma
        return loss.detach()


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def _rows(gradient: Tensor, params: list[nn.Parameter]) -> Tensor:
    """The Hessian, from a gradient that has its graph."""
    if not gradient.requires_grad:  # the loss is linear
        return gradient.new_zeros(len(gradient), len(gradient))
    unit = torch.eye(len(gradient), dtype=gradient.dtype, device=gradient.device)
    rows = torch.autograd.grad(gradient, params, unit, is_grads_batched=True, materialize_grads=True)
    return torch.cat([row.reshape(len(gradient), -1) for row in rows], dim=1)
