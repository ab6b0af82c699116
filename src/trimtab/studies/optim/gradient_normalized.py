"""Does Newton's method with gradient-normalized smoothness reach 1e-8 in few steps, with approximate Hessians too?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from trimtab import optim
from trimtab.optim.gradient_normalized import Curvature, HessianName
from trimtab.studies import newton
from trimtab.studies.study import Arm, Claim, Study
from trimtab.studies.tasks.convex import Convex, Instance
from trimtab.studies.tasks.test_functions import FunctionMinimization, Problem

logistic, softmax = Convex("logistic"), Convex("softmax")
valleys = [FunctionMinimization("rosenbrock", dim=dim) for dim in (2, 10)]
grid = (1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)
adaptive_grid = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
valley_grid = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def gns(instance: Instance, hessian: HessianName | Curvature) -> int:
    """The method with one kind of Hessian."""
    found = optim.gradient_normalized_newton(
        instance.objective,
        instance.start,
        hessian=hessian,
        grad_tol=instance.tol,
        max_iter=instance.max_iter,
        callback=instance.record,
    )
    return found.n_solves


def approximation(instance: Instance) -> Curvature:
    """Of the logistic problem the constant bound of its Hessian, of softmax the weighted Gauss-Newton matrix."""
    objective = instance.objective
    return objective.hessian_bound if isinstance(objective, optim.LogisticObjective) else objective.gauss_newton


def gns_valley(problem: Problem, hessian: HessianName) -> Tensor:
    """The method on Rosenbrock's function, from one point of the cloud."""
    return optim.gradient_normalized_newton(problem, problem.cloud(1)[0], hessian=hessian).x


def trust_region_valley(problem: Problem) -> Tensor:
    """SciPy's trust-region Newton method, from one point of the cloud."""
    last: list[Tensor] = []
    newton.trust_ncg(problem, problem.cloud(1)[0], 1e-8, 1000, lambda x: last.__setitem__(slice(None), [x.clone()]))
    return last[0]


def baseline(method: Callable[..., int], **options: float) -> Callable[[Instance], int]:
    """A second-order method from `trimtab.studies.newton` on an instance."""
    return lambda instance: method(
        instance.objective, instance.start, instance.tol, instance.max_iter, instance.record, **options
    )


def gradient_descent(
    params: Sequence[nn.Parameter], lr: float, generator: torch.Generator | None = None
) -> torch.optim.Optimizer:
    """Plain gradient descent."""
    return torch.optim.SGD(params, lr=lr)


def adam(params: Sequence[nn.Parameter], lr: float, generator: torch.Generator | None = None) -> torch.optim.Optimizer:
    """Adam."""
    return torch.optim.Adam(params, lr=lr)


def contestants(task: Convex) -> dict[str, Arm]:
    """Everybody who solves both problems."""
    return {
        "GNS, exact": task.solve(lambda instance: gns(instance, "exact")),
        "GNS, zero": task.solve(lambda instance: gns(instance, "zero")),
        "super-universal Newton, power 1": task.solve(baseline(newton.super_universal_newton, power=1.0)),
        "super-universal Newton, power 2/3": task.solve(baseline(newton.super_universal_newton, power=2 / 3)),
        "cubic Newton": task.solve(baseline(newton.cubic_newton)),
        "damped Newton": task.solve(baseline(newton.damped_newton)),
        "trust-ncg": task.solve(baseline(newton.trust_ncg)),
        "GD": task.descend(gradient_descent, grid),
        "Adam": task.descend(adam, adaptive_grid),
    }


study = Study(
    paper="gradient_normalized",
    arms={
        **{f"{name}, logistic": arm for name, arm in contestants(logistic).items()},
        "GNS, bound, logistic": logistic.solve(lambda instance: gns(instance, approximation(instance))),
        **{f"{name}, softmax": arm for name, arm in contestants(softmax).items()},
        "GNS, weighted Gauss-Newton, softmax": softmax.solve(lambda instance: gns(instance, approximation(instance))),
        **{
            f"{name}, Rosenbrock {task.dim}-d": arm
            for task in valleys
            for name, arm in {
                "GNS, exact": task.minimize(lambda problem: gns_valley(problem, "exact")),
                "GNS, Gauss-Newton": task.minimize(lambda problem: gns_valley(problem, "gauss_newton")),
                "trust-ncg": task.minimize(trust_region_valley),
                "GD, 200 starts": task.descend(gradient_descent, valley_grid, starts=200),
                "Adam, 200 starts": task.descend(adam, valley_grid, starts=200),
            }.items()
        },
    },
    claims=[
        Claim("GNS, exact, logistic", at_most=25, on="iterations"),
        Claim("GNS, exact, softmax", at_most=25, on="iterations"),
        Claim("GNS, weighted Gauss-Newton, softmax", at_most=25, on="iterations"),
        Claim("GD, logistic", at_least=500, on="iterations"),
        Claim("GD, softmax", at_least=500, on="iterations"),
    ],
    plot=["gradient_norm"],
    log="y",
    leaderboard=[f"{name}, logistic" for name in (*contestants(logistic), "GNS, bound")],
    notes="Both regressions have scikit-learn's default penalty, the intercept's weight included, and start from "
    "standard normal weights; a seed draws the start and the four fifths of the samples to train on. Iterations "
    "of who does not arrive are the limit of 1000. Of logistic regression the Gauss-Newton and Fisher matrices "
    "are the Hessian, so the approximation tried there is its constant bound, with a quarter for every weight; of "
    "softmax regression it is the paper's weighted Gauss-Newton matrix, which leaves the term -pp' out. A zero "
    "Hessian makes the method a gradient method that finds its step by itself. Solves count factorised matrices, "
    "refused tries included; cubic Newton needs one eigendecomposition for a step, and conjugate gradients none. "
    "Learning rates are the best of seven by the value after half of the iterations. On Rosenbrock's chained "
    "function, which is not convex, second-order methods run from one point and first-order ones from 200 at "
    "once; a Hessian counts as many evaluations as dimensions.",
)
