"""The sparse plan as a function of the cost through which gradients flow."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trimtab.ops.arguments import tensor_problem
from trimtab.solvers.sparse_transport.ascent import Form
from trimtab.solvers.sparse_transport.solver import sparse_transport


class _Plan(torch.autograd.Function):
    """The sparse plan of a cost, with its derivative."""

    @staticmethod
    def forward(ctx: Any, cost: Tensor, solve: Callable[[Tensor], Tensor], reg: float) -> Tensor:
        plan = solve(cost.detach())
        ctx.save_for_backward(plan)
        ctx.reg = reg
        return plan

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (plan,) = ctx.saved_tensors
        return -project_on_face(grads[0], plan > 0) / ctx.reg, None, None


def project_on_face(direction: Float[Tensor, "n m"], support: Bool[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    """The nearest matrix that is zero off the support and has row and column sums of zero.

    The change of a plan, whose marginals are fixed, with the cost is minus the change of the cost so projected, over
    `reg`; being symmetric, the same map takes gradients back.

    Example:
        >>> project_on_face(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.ones(2, 2, dtype=torch.bool))
        tensor([[ 0.2500, -0.2500],
                [-0.2500,  0.2500]])
    """
    if support.shape[0] < support.shape[1]:  # the system to solve is as large as the number of columns
        return project_on_face(direction.T, support.T).T
    mask = support.double()
    inside = direction.double() * mask
    per_row = mask.sum(1).clamp_min(1)
    scaled = mask / per_row[:, None]
    # Centring the rows leaves the columns' normal equations, with the rows eliminated.
    matrix = mask.sum(0).diag() - mask.T @ scaled
    centred = inside - scaled * inside.sum(1, keepdim=True)
    v = torch.linalg.pinv(matrix, hermitian=True, rtol=1e-10) @ centred.sum(0)
    u = (inside.sum(1) - mask @ v) / per_row
    projected: Tensor = inside - mask * (u[:, None] + v)
    return projected.to(direction.dtype)


def sparse_plan(
    cost: Float[Tensor, "n m"],
    a: Float[Tensor, " n"],
    b: Float[Tensor, " m"],
    reg: float,
    k: int,
    *,
    form: Form = "semidual",
    tol: float = 1e-6,
    max_iter: int = 1000,
    max_proximal: int = 50,
) -> Float[Tensor, "n m"]:
    """The plan of `sparse_transport`, through which gradients flow to the cost.

    By implicit differentiation: away from ties, a small change of the cost leaves the plan's support as it is, and the
    plan moves within the matrices on that support that keep both marginals. No warning is given where the gap stays
    above `tol`: at the kinks of small k it is a surrogate gradient. Arguments and errors as for `sparse_transport`.

    Raises:
        TypeError: an argument is no real tensor.

    Example:
        >>> cost = torch.tensor([[0.0, 0.3], [0.2, 0.0]], requires_grad=True)
        >>> half = torch.tensor([0.5, 0.5])
        >>> plan = sparse_plan(cost, half, half, reg=1.0, k=2)
        >>> plan
        tensor([[0.3750, 0.1250],
                [0.1250, 0.3750]], grad_fn=<_PlanBackward>)
        >>> plan[0, 0].backward()
        >>> cost.grad
        tensor([[-0.2500,  0.2500],
                [ 0.2500, -0.2500]])
    """
    if problem := tensor_problem(cost=cost, a=a, b=b):
        raise TypeError(problem)

    def solve(cost: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="sparse_transport stopped")
            result = sparse_transport(
                cost, a, b, reg, k, form=form, tol=tol, max_iter=max_iter, max_proximal=max_proximal
            )
        return torch.as_tensor(result.plan)

    return cast(Tensor, _Plan.apply(cost, solve, reg))  # type: ignore[no-untyped-call]
