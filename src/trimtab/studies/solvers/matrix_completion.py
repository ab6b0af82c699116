"""Alternating minimisation with regressions solved roughly against exactly: error, time for a sweep, its growth."""

from __future__ import annotations

import math
import time
import warnings

import torch

from trimtab.solvers import complete_matrix
from trimtab.studies.study import Arm, Claim, Curve, Result, Study, Trial
from trimtab.studies.tasks.matrix_recovery import (
    Instance,
    MatrixRecovery,
    Solution,
    iterative_imputer,
    knn_imputer,
    tuned,
)

SIZE = 1000
SAMPLED = {
    rank: MatrixRecovery(
        size=SIZE,
        rank=rank,
        samples=round(min(0.5, 10 * rank * math.log(SIZE) / SIZE), 3),
        noise=0.01,
        outliers=0.0,
        psd=False,
    )
    for rank in (5, 20, 50)
}
CLEAN = MatrixRecovery(size=200, rank=5, samples=0.3, noise=0.0, outliers=0.0, psd=False)
DIGITS = MatrixRecovery(seen="digits", rank=10, samples=0.7, noise=0.0, outliers=0.0)

SEARCHED = [{"rank": rank, "reg": reg} for rank in (5, 10, 20) for reg in (3e-3, 1e-2, 3e-2, 0.1)]


def complete(
    instance: Instance,
    inner: str,
    rank: int | None = None,
    reg: float = 0.0,
    inner_tol: float = 1e-2,
    tol: float = 1e-6,
    max_iter: int = 100,
) -> Solution:
    """`complete_matrix` as it comes, with the instance's rank."""
    if instance.entries is None:
        raise ValueError("matrix completion needs an instance whose measurements are entries")
    found = complete_matrix(
        *instance.entries,
        instance.values,
        instance.shape,
        rank or instance.rank,
        inner="sketch" if inner == "sketch" else "cg" if inner == "cg" else "cholesky",
        reg=reg,
        inner_tol=inner_tol,
        tol=tol,
        max_iter=max_iter,
    )
    return Solution(torch.as_tensor(found.matrix), found.n_iter, found.history)


def growth(trial: Trial, inner: str) -> Result:
    """How the time of a sweep grows with the rank, on one sample of half of the entries: the slope of the logarithms.

    What is done once (index structures, sketches' layout, the start) is left out, as the difference of two runs.
    """
    size = trial.pick(smoke=100, laptop=SIZE, paper=4 * SIZE)
    ranks = trial.pick(smoke=(2, 4, 8), laptop=(5, 10, 20, 50), paper=(5, 10, 20, 50, 100))
    few, many, repeats = 2, 8, 3
    seconds = []
    for rank in ranks:
        task = MatrixRecovery(size=size, rank=rank, samples=0.5, noise=0.01, outliers=0.0, psd=False)
        _, instance = task.instance(trial)

        def spent(sweeps: int, instance: Instance = instance, rank: int = rank) -> float:
            started = time.process_time()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of not having converged
                complete(instance, inner, rank=rank, tol=1e-300, max_iter=sweeps)
            return time.process_time() - started

        sweep = sorted((spent(many) - spent(few)) / (many - few) for _ in range(repeats))[repeats // 2]
        seconds.append(max(sweep, 1e-6))
        trial.report(len(seconds) / len(ranks))
    x = torch.tensor([math.log(rank) for rank in ranks])
    y = torch.tensor([math.log(value) for value in seconds])
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return Result(
        {"exponent": float(slope), "seconds_per_iteration": seconds[-1]},
        {"seconds of a sweep over rank": Curve(list(ranks), seconds)},
    )


INNER = {
    "sketch": lambda instance: complete(instance, "sketch"),
    "cg": lambda instance: complete(instance, "cg"),
    "exact": lambda instance: complete(instance, "cholesky"),
}

study = Study(
    paper="matrix_completion",
    arms={
        **{
            f"{inner}, rank {rank}": task.solve(solver)
            for rank, task in SAMPLED.items()
            for inner, solver in INNER.items()
        },
        "sketch, no noise": CLEAN.solve(lambda instance: complete(instance, "sketch", tol=1e-12, max_iter=30)),
        "exact, no noise": CLEAN.solve(lambda instance: complete(instance, "cholesky", tol=1e-12, max_iter=30)),
        "sketch, growth": Arm(growth, {"inner": "sketch"}),
        "cg, growth": Arm(growth, {"inner": "cg"}),
        "exact, growth": Arm(growth, {"inner": "cholesky"}),
        "sketch, digits": DIGITS.solve(
            lambda instance: tuned(lambda part, **more: complete(part, "sketch", **more), SEARCHED, instance)
        ),
        "exact, digits": DIGITS.solve(
            lambda instance: tuned(lambda part, **more: complete(part, "cholesky", **more), SEARCHED, instance)
        ),
        "soft-impute, digits": DIGITS.solve(),
        "IterativeImputer, digits": DIGITS.solve(iterative_imputer),
        "KNNImputer, digits": DIGITS.solve(knn_imputer),
    },
    claims=[
        *(
            Claim(
                f"sketch, rank {rank}",
                below=f"exact, rank {rank}",
                on="error",
                times=0.95,
                text=f"At rank {rank}, regressions solved to 1 % reach the error of exact ones within 5 %",
            )
            for rank in SAMPLED
        ),
        Claim("sketch, no noise", at_most=1e-6, on="error"),
        Claim("sketch, growth", at_most=1.15, on="exponent"),
        Claim("sketch, growth", below="exact, growth", on="exponent", by=0.3),
        Claim("sketch, growth", below="exact, growth", on="seconds_per_iteration"),
        Claim(
            "sketch, digits",
            below="soft-impute, digits",
            on="error",
            times=0.95,
            text=("On digits, its error is no more than 5 % above soft-impute's"),
        ),
        Claim("sketch, digits", below="soft-impute, digits", on="seconds"),
        Claim("sketch, digits", below="IterativeImputer, digits", on="seconds", times=3),
    ],
    log="xy",
    leaderboard=["sketch, rank 5", "cg, rank 5", "exact, rank 5", "soft-impute, digits"],
    notes="Matrices of 1,000 x 1,000 with 1 % noise, of which 10 k log(n) / n of the entries are seen, at most half. "
    "Growth is the slope of the logarithm of a sweep's time over that of the rank, 5 to 50, on half of the entries: 1 "
    "is linear. Time is that of one thread. Of a sample this dense, products are computed densely, and regressions are "
    "so well conditioned that conjugate gradients do well without a preconditioner. Digits are the 1,797 images as "
    "rows of 64 pixels, 30 % of them missing, and the error is on those; rank and ridge, soft-impute's penalty and the "
    "number of neighbours are chosen by the mean error on a fifth of the known pixels, and seconds are of the fit "
    "that follows.",
)
