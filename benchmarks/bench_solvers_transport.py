"""Sparsity-constrained transport and the Monge gap beside POT, at equal accuracy."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator

import numpy as np
import ot
import torch

from benchmarks.timing import medians
from trimtab.ops.point_costs import point_costs
from trimtab.solvers import monge_gap, sparse_transport
from trimtab.solvers.sparse_transport.k_support import column_plans


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Seconds to the same value of the semi-dual, and to the same gap with its gradient."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # as NumPy, which POT runs on
        for n, k in ((60, 5),) if quick else ((500, 5), (100, 2)):
            yield from _sparse(n, k, repeats=1 if quick else 3)
        torch.set_num_threads(1 if quick else 2)
        for n in (50,) if quick else (256, 1000):
            yield from _gap(n, repeats=1 if quick else 5)
    finally:
        torch.set_num_threads(threads)


def _sparse(n: int, k: int, repeats: int) -> Iterator[dict[str, object]]:
    """POT stops where L-BFGS-B does; ours stops at the first iteration that is no worse."""
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(n, n, generator=generator, dtype=torch.float64)
    a, b = (torch.rand(2, n, generator=generator, dtype=torch.float64) + 0.1).unbind()
    a, b, reg = a / a.sum(), b / b.sum(), 20.0
    arrays = [value.numpy() for value in (a, b, cost)]
    regulariser = ot.smooth.SparsityConstrained(k, gamma=reg)

    def peer() -> np.ndarray:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a shape at every evaluation
            return ot.smooth.solve_semi_dual(*arrays, regulariser, max_iter=500, tol=1e-9)[0]

    def value(f: torch.Tensor) -> float:
        return float(a @ f - column_plans(f - cost.T, b, reg, k)[0].sum())

    best = sparse_transport(cost, a, b, reg, k, max_iter=200, tol=1e-5)
    theirs = value(torch.from_numpy(peer()))
    history = sparse_transport(cost, a, b, reg, k, max_iter=1000, max_proximal=0, tol=1e-12).values
    enough = next((i for i, reached in enumerate(history) if reached >= theirs), len(history) - 1)

    def ours() -> object:
        return sparse_transport(cost, a, b, reg, k, max_iter=max(enough, 1), max_proximal=0, tol=1e-12)

    def ours_to_the_end() -> object:
        return sparse_transport(cost, a, b, reg, k, max_iter=200, tol=1e-4)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seconds = medians({"ours": ours, "end": ours_to_the_end, "peer": peer}, repeats, 0)
    short = (best.value - theirs) / best.value
    for name, what in (("ours", "to POT's value"), ("end", "to a gap of 0.01 %")):
        ratio = seconds[name] / seconds["peer"]
        yield {
            "what": f"sparse transport against POT sparsity_constrained, {n} x {n}, k = {k}, {what}",
            "ours": 1e3 * seconds[name],
            "peer": 1e3 * seconds["peer"],
            "ratio": ratio,
            "unit": "ms",
            "aim": "at most 1" if name == "ours" else "",
            "met": ratio <= 1 and history[enough] >= theirs if name == "ours" else None,
            "note": f"1 thread; POT stops {short:.1e} short of the optimum; ours is there in {enough} iterations",
        }


def _gap(n: int, repeats: int) -> Iterator[dict[str, object]]:
    """The exact gap and its gradient."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, n, 10, generator=generator, dtype=torch.float64)
    weights = torch.full((n,), 1 / n, dtype=torch.float64)

    def ours() -> torch.Tensor:
        moved = y.clone().requires_grad_()
        gap = monge_gap(x, moved, reg=0.0)
        gap.backward()
        return gap.detach()

    def peer() -> torch.Tensor:
        moved = y.clone().requires_grad_()
        costs = point_costs(x, moved)
        gap = costs.diagonal().mean() - ot.emd2(weights, weights, costs)
        gap.backward()
        return gap.detach()

    off = abs(float(ours() - peer()))
    seconds = medians({"ours": ours, "peer": peer}, repeats, 1)
    ratio = seconds["ours"] / seconds["peer"]
    yield {
        "what": f"exact Monge gap and gradient against POT emd2, n = {n}",
        "ours": 1e3 * seconds["ours"],
        "peer": 1e3 * seconds["peer"],
        "ratio": ratio,
        "unit": "ms",
        "aim": "at most 1",
        "met": ratio <= 1 and off < 1e-9,
        "note": f"values differ by {off:.0e}",
    }
