"""Consensus-based optimization beside cbx, and gradient-normalized Newton beside SciPy and scikit-learn."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import cbx.dynamics
import numpy as np
import scipy.optimize
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from benchmarks.timing import compared, medians
from trimtab import optim

PARTICLES_AIM = 0.5


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Seconds of the same number of evaluations, and seconds to the same norm of the gradient, on one thread.

    More would serve torch alone: NumPy works through an array on one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for runs, n, d in [(1, 50, 2)] if quick else [(1, 200, 2), (1, 200, 10), (1, 1000, 20), (50, 200, 10)]:
            for noise in ("isotropic", "anisotropic"):
                yield _particles(runs, n, d, noise, steps=5 if quick else 200, repeats=2 if quick else 15)
        yield from _regression("breast cancer", *_breast_cancer(), repeats=1 if quick else 15)
        if not quick:
            yield from _regression("digits", *_digits(), repeats=5)
    finally:
        torch.set_num_threads(threads)


def _particles(runs: int, n: int, d: int, noise: str, steps: int, repeats: int) -> dict[str, object]:
    """Both in double precision, with the same update and nothing tracked but the consensus point or the best one."""
    start = np.random.default_rng(0).normal(4, 1, (runs, n, d))
    options = {"alpha": 1e3, "sigma": 1.0, "dt": 0.01, "noise": noise}

    def peer() -> None:
        dynamics = cbx.dynamics.CBO(
            lambda x: (x**2 + 2.5 * (1 - np.cos(2 * np.pi * x))).sum(-1),
            f_dim="3D",
            check_f_dims=False,
            x=start,
            max_it=steps,
            verbosity=0,
            track_args={"names": []},
            seed=0,
            **options,
        )
        dynamics.optimize(sched=None)

    def ours() -> None:
        generator = torch.Generator().manual_seed(0)
        optim.CBO(torch.from_numpy(start), generator=generator, **options).minimize(
            lambda x: (x**2 + 2.5 * (1 - torch.cos(2 * torch.pi * x))).sum(-1), steps
        )

    seconds = medians({"ours": ours, "peer": peer}, repeats)
    evaluations = runs * n * steps / 1e6
    ratio = seconds["ours"] / seconds["peer"]
    return {
        "what": f"CBO, {runs} x {n} particles, {d}-d, {noise}",
        "ours": evaluations / seconds["ours"],
        "peer": evaluations / seconds["peer"],
        "ratio": ratio,
        "unit": "million evaluations a second",
        "aim": f"time <= {PARTICLES_AIM} of cbx's",
        "met": ratio <= PARTICLES_AIM,
        "note": "against cbx on Rastrigin's function; the ratio is of times",
    }


Solver = Callable[[], torch.Tensor]


def _breast_cancer() -> tuple[optim.LogisticObjective, LogisticRegression, tuple[np.ndarray, np.ndarray]]:
    x, y = load_breast_cancer(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    objective = optim.LogisticObjective(torch.from_numpy(x), torch.from_numpy(2.0 * y - 1), l2=1 / len(x))
    return objective, LogisticRegression(solver="newton-cholesky", fit_intercept=False, tol=1e-8), (x, y)


def _digits() -> tuple[optim.SoftmaxObjective, LogisticRegression, tuple[np.ndarray, np.ndarray]]:
    x, y = load_digits(return_X_y=True)
    x = np.c_[x / 16, np.ones(len(x))]
    objective = optim.SoftmaxObjective(torch.from_numpy(x), torch.from_numpy(y), 10, l2=1 / len(x))
    return objective, LogisticRegression(solver="newton-cholesky", fit_intercept=False, tol=1e-8), (x, y)


def _steps(model: LogisticRegression) -> int:
    return int(np.max(model.n_iter_))


def _regression(
    where: str,
    objective: optim.LogisticObjective | optim.SoftmaxObjective,
    model: LogisticRegression,
    data: tuple[np.ndarray, np.ndarray],
    repeats: int,
) -> Iterator[dict[str, object]]:
    """From zero to a gradient of 1e-8, scikit-learn's largest entry of it."""
    d = data[0].shape[1] * getattr(objective, "num_classes", 1)
    zero = torch.zeros(d, dtype=torch.float64)

    def ours() -> torch.Tensor:
        return optim.gradient_normalized_newton(objective, zero).x

    def trust_exact() -> torch.Tensor:
        found = scipy.optimize.minimize(
            lambda z: float(objective(torch.from_numpy(z))),
            zero.numpy(),
            method="trust-exact",
            jac=lambda z: objective.gradient(torch.from_numpy(z)).numpy(),
            hess=lambda z: objective.hessian(torch.from_numpy(z)).numpy(),
            options={"gtol": 1e-8},
        )
        return torch.from_numpy(found.x)

    def newton_cholesky() -> torch.Tensor:
        return torch.from_numpy(model.fit(*data).coef_).flatten()

    solvers: dict[str, Solver] = {"ours": ours, "trust-exact": trust_exact, "newton-cholesky": newton_cholesky}
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")  # of a line search that ends at rounding
        norms = {name: float(objective.gradient(solve()).norm()) for name, solve in solvers.items()}
        seconds = medians(solvers, repeats, warmup=1)
    found = optim.gradient_normalized_newton(objective, zero)
    hessian, slope = objective.hessian(found.x), found.jac[:, None]

    def systems() -> None:
        """The Hessians and the factors of as many steps, which the method's rule asks for."""
        for _ in range(found.nit):
            torch.cholesky_solve(slope, torch.linalg.cholesky(objective.hessian(found.x)))
        for _ in range(found.n_solves - found.nit):
            torch.cholesky_solve(slope, torch.linalg.cholesky(hessian))

    limit = medians({"ours": ours, "peer": systems}, repeats, warmup=1)
    note = f"against its {found.nit} Hessians and {found.n_solves} factorisations alone; its rule sets their number"
    yield compared(f"logistic regression, {where}", limit, 1.15, f"{note}, newton-cholesky's is {_steps(model)}")
    for name in ("trust-exact", "newton-cholesky"):
        yield {
            "what": f"logistic regression, {where}",
            "ours": 1e3 * seconds["ours"],
            "peer": 1e3 * seconds[name],
            "ratio": seconds["ours"] / seconds[name],
            "unit": "ms",
            "aim": "",
            "met": None,
            "note": f"against {name}; last gradients {norms['ours']:.0e} and {norms[name]:.0e}",
        }
