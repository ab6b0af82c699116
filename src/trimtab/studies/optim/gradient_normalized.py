"""Does Newton's method with gradient-normalized smoothness arrive in few passes, with approximate Hessians too?

A pass counts the multiplications of one gradient; a Hessian in the 650 variables of digits counts as 325 passes, and
the weighted Gauss-Newton matrix, which leaves out the term -pp', as 32. Linear systems are not counted, but the time
beside the passes includes them. For two classes the Gauss-Newton matrix is the Hessian, so that the approximation tried
there is its constant bound. Rosenbrock's function is chained over ten variables and not convex; a matrix of second
derivatives counts ten evaluations.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from trimtab import optim
from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.tasks.logistic_regression import breast_cancer, digits, few_threes
from trimtab.studies.tasks.test_functions import GlobalMinimizer, Problem, restarted, valley
from trimtab.studies.tools import newton
from trimtab.studies.tools.full_batch import Minimizer, Oracle


def exact(oracle: Oracle) -> None:
    """The method with the Hessian."""
    optim.gradient_normalized_newton(
        oracle, oracle.start, grad_tol=0.0, max_iter=10**6, hessian="exact", callback=oracle.record
    )


def approximate(oracle: Oracle) -> None:
    """The method with the weighted Gauss-Newton matrix; for two classes with the constant bound of the Hessian."""
    optim.gradient_normalized_newton(
        oracle, oracle.start, grad_tol=0.0, max_iter=10**6, hessian=oracle.gauss_newton, callback=oracle.record
    )


def gradients_alone(oracle: Oracle) -> None:
    """The method with a Hessian of zero: normalised gradient steps that find their length."""
    optim.gradient_normalized_newton(
        oracle, oracle.start, grad_tol=0.0, max_iter=10**6, hessian="zero", callback=oracle.record
    )


def super_universal_approximate(oracle: Oracle) -> None:
    """Super-universal Newton with the same approximate matrix: what the matrix alone brings."""
    newton.super_universal_newton(oracle, oracle.start, 0.0, 10**6, oracle.record, hessian=oracle.gauss_newton)


def with_hessian(problem: Problem, start: Tensor) -> None:
    """The method with the Hessian on a test function."""
    optim.gradient_normalized_newton(problem, start)


def with_residuals(problem: Problem, start: Tensor) -> None:
    """The method with the Gauss-Newton matrix; Ackley's function is no sum of squares and has its Hessian."""
    optim.gradient_normalized_newton(
        problem, start, hessian="exact" if problem.function == "ackley" else "gauss_newton"
    )


regressions = (digits, breast_cancer, few_threes)
on_data = {
    "GNS Newton": exact,
    "GNS Newton, approximate": approximate,
    "GNS, gradients alone": gradients_alone,
    "super-universal Newton, approximate": super_universal_approximate,
}

study = Study(
    paper="gradient_normalized",
    entrants={
        **{name: dict.fromkeys(regressions, Minimizer(minimize=method)) for name, method in on_data.items()},
        "GNS Newton, restarted": {valley: GlobalMinimizer(minimize=partial(restarted, with_hessian))},
        "GNS Gauss-Newton, restarted": {valley: GlobalMinimizer(minimize=partial(restarted, with_residuals))},
    },
    on=[*regressions, valley],
    headline=Claim(
        "GNS Newton, approximate",
        below="super-universal Newton",
        on="passes",
        at=digits,
        text="GNS Newton with approximate Hessians needs fewer passes than super-universal Newton with exact ones",
    ),
    claims=[
        Claim("GNS Newton, approximate", below="super-universal Newton, approximate", on="passes", at=digits),
        Claim("GNS Newton", below="super-universal Newton", on="iterations", at=digits),
        Claim("GNS Newton", below="cubic Newton", on="passes", at=digits),
        Claim("GNS Newton, approximate", below="L-BFGS", on="passes", at=digits),
        Claim("GNS, gradients alone", below="gradient descent", on="passes", at=breast_cancer),
        Claim("GNS Newton, restarted", below="L-BFGS, restarted", on="evaluations", at=valley),
        Claim("GNS Gauss-Newton, restarted", below="GNS Newton, restarted", on="evaluations", at=valley),
    ],
)
