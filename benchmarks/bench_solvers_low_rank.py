"""Matrix completion beside alternating least squares as users write it, and beside scikit-learn's imputers; growth."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import svds
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, KNNImputer

from benchmarks.timing import compared, medians
from trimtab.data import load
from trimtab.solvers import MatrixCompletion, MatrixCompletionResult, complete_matrix, subgradient_recovery
from trimtab.solvers.matrix_completion.solver import Inner
from trimtab.solvers.subgradient_recovery import matrix_operator, sign_spectral_start

SLOPE_AIM = 1.15
SWEEPS = 5


@dataclass(frozen=True)
class Sample:
    """Entries that are seen of a square matrix, and the matrix."""

    rows: torch.Tensor
    cols: torch.Tensor
    values: torch.Tensor
    rank: int
    truth: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.truth), len(self.truth)


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Seconds to equal accuracy, and how a sweep's time grows with the entries times the rank."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if quick else 2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sweeps that were limited on purpose
            yield from _beside_als(quick)
            yield from _growth(quick)
            yield from _digits(quick)
            yield _recovery(*(8, 60, 5) if quick else (30, 1200, 100))
    finally:
        torch.set_num_threads(threads)


def numpy_als(sample: Sample, sweeps: int) -> np.ndarray:
    """Alternating least squares by normal equations, one row and one column after the other."""
    places = sample.rows.numpy(), sample.cols.numpy()
    by_row = sparse.csr_matrix((sample.values.numpy(), places), shape=sample.shape)
    by_col = by_row.T.tocsr()
    u = svds(by_row, k=sample.rank, rng=np.random.default_rng(0))[0]
    for _ in range(sweeps):
        v = np.linalg.qr(_solve_each(by_col, np.linalg.qr(u)[0]))[0]
        u = _solve_each(by_row, v)
    return np.asarray(u @ v.T)


def _solve_each(table: sparse.csr_matrix, design: np.ndarray) -> np.ndarray:
    found = np.empty((table.shape[0], design.shape[1]))
    for j in range(table.shape[0]):
        part = slice(table.indptr[j], table.indptr[j + 1])
        seen = design[table.indices[part]]
        found[j] = np.linalg.solve(seen.T @ seen, seen.T @ table.data[part])
    return found


def _sampled(size: int, rank: int, share: float) -> Sample:
    """Entries of a random matrix of a spectral norm about one, with 1 % of noise."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, size, rank, generator=generator, dtype=torch.float64)
    truth = left @ right.T / size
    rows, cols = (torch.rand(size, size, generator=generator) < share).nonzero(as_tuple=True)
    values = truth[rows, cols]
    noise = torch.randn(len(values), generator=generator, dtype=torch.float64)
    return Sample(rows, cols, values + 0.01 * values.square().mean().sqrt() * noise, rank, truth)


def _complete(sample: Sample, inner: Inner, sweeps: int) -> MatrixCompletionResult:
    return complete_matrix(
        sample.rows, sample.cols, sample.values, sample.shape, sample.rank, inner=inner, tol=1e-300, max_iter=sweeps
    )


def _error(found: object, truth: torch.Tensor) -> float:
    return float((torch.as_tensor(found) - truth).norm() / truth.norm())


def _beside_als(quick: bool) -> Iterator[dict[str, object]]:
    """The same number of sweeps from the same kind of start; errors agree to a per cent."""
    sizes = [(100, 3, 0.5)] if quick else [(1000, 5, 0.345), (1000, 20, 0.5), (1000, 50, 0.5), (3000, 20, 0.1)]
    for size, rank, share in sizes:
        sample = _sampled(size, rank, share)
        found: list[np.ndarray] = []

        def peer(sample: Sample = sample, found: list[np.ndarray] = found) -> None:
            found[:] = [numpy_als(sample, SWEEPS)]

        calls: dict[str, Callable[[], object]] = {"peer": peer}
        for inner in ("sketch", "cg", "cholesky"):
            calls[inner] = partial(_complete, sample, inner, SWEEPS)
        seconds = medians(calls, repeats=1 if quick else 3, warmup=0)
        expected = _error(found[0], sample.truth)
        for inner in ("sketch", "cg", "cholesky"):
            reached = _error(_complete(sample, inner, SWEEPS).matrix, sample.truth)
            ratio = seconds[inner] / seconds["peer"]
            yield {
                "what": f"completion, {inner}, against NumPy ALS, {size} x {size}, rank {rank}, {share:.0%} seen",
                "ours": 1e3 * seconds[inner],
                "peer": 1e3 * seconds["peer"],
                "ratio": ratio,
                "unit": "ms",
                "aim": "at most 1, at equal error",
                "met": ratio <= 1 and reached <= 1.01 * expected,
                "note": f"{SWEEPS} sweeps, error {reached:.2e} against {expected:.2e}",
            }


def _growth(quick: bool) -> Iterator[dict[str, object]]:
    """Slope of the logarithm of a sweep's time over that of |Omega| k, what is done once left out."""
    size, few, many = (150, 2, 5) if quick else (2000, 2, 5)
    grid = [(2, 0.15), (4, 0.18)] if quick else [(5, 0.1), (10, 0.1), (20, 0.1), (40, 0.1), (40, 0.18)]
    work, seconds = [], {"sketch": [], "cg": [], "cholesky": []}
    for rank, share in grid:
        sample = _sampled(size, rank, share)
        work.append(len(sample.values) * rank)
        for inner, spent in seconds.items():
            calls = {
                "many": partial(_complete, sample, inner, many),
                "few": partial(_complete, sample, inner, few),
            }
            found = medians(calls, repeats=1 if quick else 3, warmup=0)
            spent.append(max(found["many"] - found["few"], 1e-6) / (many - few))
    for inner, spent in seconds.items():
        slope = float(np.polyfit(np.log(work), np.log(spent), 1)[0])
        yield {
            "what": f"completion, {inner}: time of a sweep over |Omega| k, {size} x {size}",
            "ours": slope,
            "unit": "slope of the logarithms",
            "aim": f"at most {SLOPE_AIM}" if inner == "sketch" else "",
            "met": slope <= SLOPE_AIM if inner == "sketch" else None,
            "note": f"|Omega| k from {work[0]:.1e} to {work[-1]:.1e}, {1e3 * spent[0]:.0f} to {1e3 * spent[-1]:.0f} ms",
        }


def _digits(quick: bool) -> Iterator[dict[str, object]]:
    """Thirty per cent of the pixels missing."""
    data = load("digits")
    truth = torch.cat([data.x_train, data.x_test]).flatten(1).double().numpy()[: 200 if quick else None]
    gaps = np.random.default_rng(0).random(truth.shape) < 0.3
    table = np.where(gaps, np.nan, truth)
    ours = partial(MatrixCompletion(rank=20, reg=0.03, random_state=0).fit_transform, table)
    peers = {
        "IterativeImputer": IterativeImputer(max_iter=1 if quick else 10, random_state=0, keep_empty_features=True),
        "KNNImputer": KNNImputer(n_neighbors=10, weights="distance", keep_empty_features=True),
    }

    def error(filled: np.ndarray) -> float:
        return float(np.linalg.norm((filled - truth)[gaps]) / np.linalg.norm(truth[gaps]))

    reached = error(ours())
    for name, imputer in peers.items():
        filled: list[np.ndarray] = []

        def peer(imputer: IterativeImputer | KNNImputer = imputer, filled: list[np.ndarray] = filled) -> None:
            filled[:] = [imputer.fit_transform(table)]

        seconds = medians(
            {"ours": ours, "peer": peer}, repeats=1 if quick or name == "IterativeImputer" else 3, warmup=0
        )
        expected = error(filled[0])
        ratio = seconds["ours"] / seconds["peer"]
        yield {
            "what": f"MatrixCompletion against {name}, digits with 30 % missing",
            "ours": 1e3 * seconds["ours"],
            "peer": 1e3 * seconds["peer"],
            "ratio": ratio,
            "unit": "ms",
            "aim": "at most 1, at equal error",
            "met": ratio <= 1 and reached <= 1.01 * expected,
            "note": f"relative error of the missing pixels {reached:.3f} against {expected:.3f}",
        }


def _recovery(size: int, count: int, steps: int) -> dict[str, object]:
    """The subgradient method against the same steps by autograd, from the same start."""
    generator = torch.Generator().manual_seed(0)
    left, measured = torch.randn(size, 2, generator=generator), torch.randn(count, size, size, generator=generator)
    y = torch.einsum("mij,ij->m", measured, left @ left.T)
    y[: count // 3] += 100 * torch.randn(count // 3, generator=generator)
    found: dict[str, torch.Tensor] = {}

    def ours() -> None:
        found["ours"] = subgradient_recovery(y, measured, size, init_scale=1e-2, n_iter=steps).matrix

    def peer() -> None:
        factor = 1e-2 * sign_spectral_start(y, matrix_operator(measured)[1], size)
        for step in range(steps):
            matrix = (factor @ factor.T).requires_grad_()
            loss = (torch.einsum("mij,ij->m", measured, matrix) - y).abs().mean()
            slope = torch.autograd.grad(loss, matrix)[0]
            direction = (slope + slope.T) / 2
            factor = factor - 2 * 0.3 * 0.985**step / direction.norm() * (direction @ factor)
        found["peer"] = factor @ factor.T

    seconds = medians({"ours": ours, "peer": peer}, repeats=2 if steps < 10 else 5)
    return compared(
        "subgradient_recovery against the same steps by autograd",
        seconds,
        1.0,
        f"{steps} steps, {count} measurements of {size} x {size}; the matrices agree",
        met=_error(found["ours"], found["peer"]) < 1e-3,
    )
