from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import Tensor

from trimtab.solvers import MatrixCompletion, complete_matrix
from trimtab.solvers.matrix_completion.designs import Designs, SketchedPreconditioner, _block_ends, exact_grams
from trimtab.solvers.matrix_completion.regressions import Regressions, conjugate_gradients
from trimtab.solvers.matrix_completion.solver import Inner, spectral_start

INNER: list[Inner] = ["sketch", "cholesky", "cg"]


def instance(
    m: int = 60, n: int = 50, k: int = 2, share: float = 0.5, noise: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A matrix of rank k, and a uniform sample of its entries."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(m, k, generator=generator, dtype=torch.float64) @ torch.randn(
        k, n, generator=generator, dtype=torch.float64
    )
    rows, cols = (torch.rand(m, n, generator=generator) < share).nonzero(as_tuple=True)
    wrong = noise * torch.randn(len(rows), generator=generator, dtype=torch.float64)
    return truth, rows, cols, truth[rows, cols] + wrong


def error(found: object, truth: Tensor) -> float:
    return float((torch.as_tensor(found) - truth).norm() / truth.norm())


def quiet(*args: object, **options: object):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return complete_matrix(*args, **options)  # type: ignore[arg-type]


def uneven(n: int = 9, m: int = 300, k: int = 4, seed: int = 0) -> tuple[Regressions, Tensor, Tensor, Tensor]:
    """Regressions with 5 to 300 entries, an orthonormal design with a few large rows, and both as dense matrices."""
    generator = torch.Generator().manual_seed(seed)
    seen = torch.rand(n, m, generator=generator) < torch.linspace(0.02, 1, n)[:, None]
    seen[:, :5] = True
    of, row = seen.nonzero(as_tuple=True)
    design = torch.randn(m, k, generator=generator, dtype=torch.float64)
    design[::10] *= 10
    design = torch.linalg.qr(design).Q
    values = torch.randn(n, m, generator=generator, dtype=torch.float64)
    shuffled = torch.randperm(len(of), generator=generator)
    of, row = of[shuffled], row[shuffled]
    return Regressions(of, row, values[of, row], (n, m), "row"), design, seen.double(), values * seen


def exact(design: Tensor, seen: Tensor, values: Tensor, reg: float = 0.0) -> Tensor:
    ridge = reg * torch.eye(design.shape[1], dtype=torch.float64)
    return torch.stack(
        [
            torch.linalg.solve(design.T @ (s[:, None] * design) + ridge, design.T @ v)
            for s, v in zip(seen, values, strict=True)
        ]
    )


@pytest.mark.parametrize("inner", INNER)
def test_recovers_a_low_rank_matrix(inner: Inner) -> None:
    truth, rows, cols, values = instance(200, 200, 5, 0.3)
    found = quiet(rows, cols, values, (200, 200), 5, inner=inner, tol=1e-12, max_iter=30)
    assert error(found.matrix, truth) < 1e-6
    assert found.history[-1] < 1e-7
    # Regressions solved to 1 % need no more sweeps than exact ones.
    assert all(after < before for before, after in zip(found.history, found.history[1:], strict=False))


@pytest.mark.parametrize("inner", INNER)
def test_sparse_samples_too(inner: Inner) -> None:
    truth, rows, cols, values = instance(300, 250, 2, 0.12)
    found = complete_matrix(rows, cols, values, (300, 250), 2, inner=inner)
    assert error(found.matrix, truth) < 1e-4


def test_rough_regressions_reach_what_exact_ones_reach() -> None:
    truth, rows, cols, values = instance(100, 80, 3, 0.4, noise=0.1)
    best = complete_matrix(rows, cols, values, (100, 80), 3, inner="cholesky", tol=1e-9)
    for inner in ("sketch", "cg"):
        for inner_tol in (0.3, 1e-4):
            found = complete_matrix(rows, cols, values, (100, 80), 3, inner=inner, inner_tol=inner_tol, tol=1e-9)
            assert error(found.matrix, torch.as_tensor(best.matrix)) < 1e-3
    assert error(best.matrix, truth) < 0.06


@pytest.mark.parametrize("inner", INNER)
def test_all_entries_give_the_singular_value_decomposition(inner: Inner) -> None:
    full = torch.randn(30, 20, dtype=torch.float64)
    rows, cols = torch.ones(30, 20).nonzero(as_tuple=True)
    found = quiet(rows, cols, full[rows, cols], (30, 20), 4, inner=inner, tol=1e-12, max_iter=300)
    left, singular, right = torch.linalg.svd(full, full_matrices=False)
    torch.testing.assert_close(found.matrix, (left[:, :4] * singular[:4]) @ right[:4], atol=1e-4, rtol=0)
    assert found.history[-1] == pytest.approx(float(singular[4:].norm() / singular.norm()), rel=1e-6)


def test_ridge_shrinks_what_the_entries_do_not_say() -> None:
    full = torch.randn(30, 20, dtype=torch.float64)
    rows, cols = torch.ones(30, 20).nonzero(as_tuple=True)
    left, singular, right = torch.linalg.svd(full, full_matrices=False)
    shrunk = (singular - 0.75 * singular[0]).clamp_min(0)
    assert 0 < int((shrunk > 0).sum()) < 8
    for inner in INNER:
        found = quiet(rows, cols, full[rows, cols], (30, 20), 8, reg=0.75, inner=inner, tol=1e-10, max_iter=500)
        # With everything seen, a nuclear norm lowers all singular values alike.
        torch.testing.assert_close(found.matrix, (left * shrunk) @ right, atol=2e-3, rtol=0)


@pytest.mark.parametrize("inner", INNER)
def test_ridge_of_one_leaves_nothing(inner: Inner) -> None:
    _, rows, cols, values = instance(noise=0.1)
    found = quiet(rows, cols, values, (60, 50), 2, reg=1.01, inner=inner, max_iter=1000, tol=1e-9)
    assert error(found.matrix, torch.zeros(60, 50) + float(values.norm())) > 0.99
    assert float(torch.as_tensor(found.matrix).norm()) < 0.05 * float(values.norm())


@pytest.mark.parametrize("inner", INNER)
def test_ridge_is_the_nuclear_norm_of_soft_impute(inner: Inner) -> None:
    _, rows, cols, values = instance(30, 25, 2, 0.6, noise=0.3)
    seen = torch.zeros(30, 25, dtype=torch.float64)
    seen[rows, cols] = values
    mask = seen != 0
    threshold = 0.2 * float(torch.linalg.svdvals(seen)[0])
    expected = torch.zeros_like(seen)
    for _ in range(300):
        left, singular, right = torch.linalg.svd(torch.where(mask, seen, expected), full_matrices=False)
        expected = (left * (singular - threshold).clamp_min(0)) @ right
    found = quiet(rows, cols, values, (30, 25), 10, reg=0.2, inner=inner, tol=1e-12, max_iter=500)
    assert error(found.matrix, expected) < 1e-3


def test_factors_and_counts() -> None:
    _, rows, cols, values = instance(noise=0.1)
    found = complete_matrix(rows, cols, values, (60, 50), 3)
    V = torch.as_tensor(found.V)
    torch.testing.assert_close(V.T @ V, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(found.predict(rows, cols), torch.as_tensor(found.matrix)[rows, cols])
    rest = values - found.predict(rows, cols)
    assert found.history[-1] == pytest.approx(float(rest.norm() / values.norm()))
    assert found.converged
    assert len(found.history) == found.n_iter
    assert found.inner_steps >= 2 * found.n_iter
    assert complete_matrix(rows, cols, values, (60, 50), 3, inner="cholesky").inner_steps == 0


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_order_of_entries_rows_and_columns_does_not_matter(seed: int) -> None:
    _, rows, cols, values = instance(40, 30, 2, 0.6, noise=0.05, seed=seed % 5)
    generator = torch.Generator().manual_seed(seed)
    order, of_rows, of_cols = (torch.randperm(size, generator=generator) for size in (len(rows), 40, 30))
    plain = complete_matrix(rows, cols, values, (40, 30), 2, tol=1e-9)
    moved = complete_matrix(of_rows[rows[order]], of_cols[cols[order]], values[order], (40, 30), 2, tol=1e-9)
    torch.testing.assert_close(moved.matrix[of_rows][:, of_cols], plain.matrix, atol=1e-3, rtol=0)


def test_units_do_not_matter() -> None:
    _, rows, cols, values = instance(noise=0.1)
    plain = complete_matrix(rows, cols, values, (60, 50), 2)
    for unit in (1e-200, 1e200):
        scaled = complete_matrix(rows, cols, unit * values, (60, 50), 2)
        torch.testing.assert_close(scaled.matrix / unit, plain.matrix)


def test_the_generator_decides() -> None:
    _, rows, cols, values = instance(300, 20, 2, 0.9, noise=0.1)  # columns have more entries than a sketch has rows
    results = [
        complete_matrix(rows, cols, values, (300, 20), 2, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(results[0].matrix, results[1].matrix)
    assert not torch.equal(results[0].matrix, results[2].matrix)
    torch.testing.assert_close(results[0].matrix, results[2].matrix, atol=1e-3, rtol=0)


@pytest.mark.parametrize("form", ["dense", "sparse", "without MKL"])
def test_products_on_the_sample(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.solvers.matrix_completion.regressions._DENSE", 0.0 if form == "dense" else 1.0)
    if form == "without MKL":
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    regressions, design, seen, values = uneven()
    assert (regressions.values.layout == torch.strided) is (form == "dense")
    x = torch.randn(9, 4, dtype=torch.float64)

    def dense(matrix: Tensor) -> Tensor:
        return matrix if matrix.layout == torch.strided else matrix.to_dense()

    torch.testing.assert_close(dense(regressions.values), values)
    torch.testing.assert_close(dense(regressions.products(x, design)), seen * (x @ design.T))
    torch.testing.assert_close(dense(regressions.residual(x, design)), values - seen * (x @ design.T))
    torch.testing.assert_close(dense(regressions.values), values)  # and they are left alone


@pytest.mark.parametrize("block", [1, 2000, 2**20])
def test_gram_matrices_without_a_sketch_are_exact(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.solvers.matrix_completion.designs.BLOCK", block)
    regressions, design, seen, _ = uneven()
    designs = Designs(regressions, 4, None, torch.float64, torch.Generator())
    expected = torch.einsum("nm,mi,mj->nij", seen, design, design)
    torch.testing.assert_close(designs.grams(design), expected)
    for dense in (0.0, 1.0):
        monkeypatch.setattr("trimtab.solvers.matrix_completion.regressions._DENSE", dense)
        again = uneven()[0]
        assert (again.mask is not None) is (dense == 0.0)
        torch.testing.assert_close(exact_grams(again, 4)(design), expected)


def test_sketched_gram_matrices_are_right_on_average_and_exact_for_short_designs() -> None:
    regressions, design, seen, _ = uneven()
    expected = torch.einsum("nm,mi,mj->nij", seen, design, design)
    draws = [
        Designs(regressions, 4, 32, torch.float64, torch.Generator().manual_seed(seed)).grams(design)
        for seed in range(200)
    ]
    mean = torch.stack(draws).mean(0)
    short = regressions.counts <= 32
    assert 0 < int(short.sum()) < 9
    torch.testing.assert_close(draws[0][short], expected[short])
    assert not torch.allclose(draws[0][~short], expected[~short], rtol=0.01)
    torch.testing.assert_close(mean, expected, atol=0.05, rtol=0)


def test_blocks_hold_everything_once() -> None:
    ends = _block_ends(list(range(1, 50)), 3)
    assert ends == [49]
    assert _block_ends([2**18, 2**18, 2**18], 2) == [1, 2, 3]


@pytest.mark.parametrize("reg", [0.0, 0.3])
def test_preconditioned_gradients_solve_the_regressions(reg: float) -> None:
    regressions, design, seen, values = uneven()
    expected = exact(design, seen, values, reg)
    designs = Designs(regressions, 4, 16, torch.float32, torch.Generator().manual_seed(0))
    start = torch.zeros_like(expected)
    found, steps = conjugate_gradients(
        regressions,
        design,
        start,
        SketchedPreconditioner(designs)(design, torch.full((4,), reg).double()),
        tol=1e-10,
        ridge=reg,
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    _, plain_steps = conjugate_gradients(regressions, design, start, lambda g: g, tol=1e-10, ridge=reg)
    assert steps > 1
    if not reg:
        assert steps < plain_steps
    # The residual is within the tolerance of the least one, and a start at the solution is left alone.
    rough, _ = conjugate_gradients(regressions, design, start, lambda g: g, tol=0.1, ridge=reg)
    assert float((rough - expected).norm()) < float((start - expected).norm())
    again, _ = conjugate_gradients(regressions, design, expected, lambda g: g, tol=0.5, ridge=reg)
    torch.testing.assert_close(again, expected)


def test_residuals_are_within_the_tolerance_of_the_least() -> None:
    regressions, design, seen, values = uneven()
    best = exact(design, seen, values)
    designs = Designs(regressions, 4, None, torch.float64, torch.Generator())
    inverses = torch.linalg.inv(designs.grams(design))

    def excess(x: Tensor) -> float:
        return float((seen * (x @ design.T) - values).norm() ** 2 - (seen * (best @ design.T) - values).norm() ** 2)

    start = best + torch.randn_like(best)
    found, _ = conjugate_gradients(regressions, design, start, lambda g: 2 * g, tol=0.05)
    assert excess(found) < excess(start)
    one, steps = conjugate_gradients(
        regressions, design, start, lambda g: torch.einsum("nij,nj->ni", inverses, g), tol=0.05
    )
    assert steps == 1  # with exact preconditioning
    torch.testing.assert_close(one, best)


def test_a_turned_design_is_preconditioned_without_a_new_sketch(monkeypatch: pytest.MonkeyPatch) -> None:
    regressions, design, _, _ = uneven()
    designs = Designs(regressions, 4, None, torch.float64, torch.Generator())
    made = []
    grams = designs.grams
    monkeypatch.setattr(designs, "grams", lambda design: made.append(1) or grams(design))
    preconditioner, ridge = SketchedPreconditioner(designs), torch.zeros(4, dtype=torch.float64)
    gradients = torch.randn(9, 4, dtype=torch.float64)
    preconditioner(design, ridge)
    turned = design @ torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    expected = torch.linalg.solve(grams(turned), gradients[:, :, None])[:, :, 0]
    torch.testing.assert_close(preconditioner(turned, ridge)(gradients), expected, rtol=1e-3, atol=1e-3)
    assert len(made) == 1
    other = torch.linalg.qr(torch.randn(300, 4, dtype=torch.float64)).Q
    expected = torch.linalg.solve(grams(other), gradients[:, :, None])[:, :, 0]
    torch.testing.assert_close(preconditioner(other, ridge)(gradients), expected, rtol=1e-2, atol=1e-2)
    assert len(made) == 2
    preconditioner(other, ridge + 1)
    assert len(made) == 3


def test_the_start_spans_the_leading_singular_vectors_and_is_clipped() -> None:
    truth, rows, cols, _ = instance(50, 40, 2, 1.0)
    truth[7] += 1000 * torch.randn(40, dtype=torch.float64)
    parts = (
        Regressions(rows, cols, truth[rows, cols], (50, 40), "row"),
        Regressions(cols, rows, truth[rows, cols], (40, 50), "column"),
    )
    left = torch.linalg.svd(truth).U[:, :2]
    plain, singular = spectral_start(*parts, 2, None, torch.Generator().manual_seed(0))
    torch.testing.assert_close(singular, torch.linalg.svdvals(truth)[:2])
    torch.testing.assert_close(plain @ plain.T, left @ left.T, atol=1e-6, rtol=0)
    assert float(plain[7].norm()) > 0.99
    clipped, _ = spectral_start(*parts, 2, 2.0, torch.Generator().manual_seed(0))
    assert float(clipped[7].norm()) < 0.3
    torch.testing.assert_close(clipped.T @ clipped, torch.eye(2, dtype=torch.float64))


def test_too_few_sweeps_are_told() -> None:
    _, rows, cols, values = instance(noise=0.1)
    with pytest.warns(ConvergenceWarning, match="complete_matrix stopped after 2 sweeps") as caught:
        found = complete_matrix(rows, cols, values, (60, 50), 2, max_iter=2)
    assert caught[0].filename == __file__
    assert not found.converged
    assert found.n_iter == 2


def test_unknown_rows_are_zero_with_a_ridge_and_refused_without() -> None:
    truth, rows, cols, values = instance(noise=0.1)
    kept = rows != 5
    entries = rows[kept], cols[kept], values[kept]
    for inner in INNER:
        with pytest.raises(ValueError, match="row 5 has 0; give a reg"):
            complete_matrix(*entries, (60, 50), 2, inner=inner)
        found = complete_matrix(*entries, (60, 50), 2, inner=inner, reg=1e-3)
        assert float(torch.as_tensor(found.matrix)[5].abs().max()) < 1e-12
        assert error(found.matrix, truth) < 0.3


def test_entries_that_do_not_determine_a_factor_are_refused() -> None:
    values = torch.zeros(20, 10, dtype=torch.float64)
    values[:, :5] = torch.randn(20, 5, dtype=torch.float64)
    seen = torch.ones(20, 10, dtype=torch.bool)
    seen[0, :5] = False  # row 0 is only seen where all is zero
    rows, cols = seen.nonzero(as_tuple=True)
    with pytest.raises(ValueError, match="more than the entries of row 0 determine"):
        complete_matrix(rows, cols, values[rows, cols], (20, 10), 2, inner="cholesky")
    for inner in ("sketch", "cg"):
        found = complete_matrix(rows, cols, values[rows, cols], (20, 10), 2, inner=inner)
        assert torch.as_tensor(found.matrix).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kind_and_dtype_are_kept(dtype: torch.dtype) -> None:
    truth, rows, cols, values = instance()
    found = complete_matrix(rows, cols, values.to(dtype), (60, 50), 2, tol=1e-5)
    assert isinstance(found.U, Tensor)
    assert found.U.dtype == found.V.dtype == dtype
    assert error(found.matrix.double(), truth) < 1e-3
    arrays = complete_matrix(rows.numpy(), cols.numpy(), values.to(dtype).numpy(), (60, 50), 2, tol=1e-5)
    assert isinstance(arrays.U, np.ndarray)
    np.testing.assert_array_equal(arrays.U, found.U.numpy())
    np.testing.assert_allclose(arrays.matrix, found.matrix.numpy(), atol=1e-6)
    assert isinstance(arrays.predict(rows.numpy(), cols.numpy()), np.ndarray)


BAD: dict[str, tuple[dict[str, object], type[Exception], str]] = {
    "list": ({"values": [1.0]}, TypeError, "values must be a tensor"),
    "integers": ({"values": torch.ones(12).long()}, TypeError, "values must be floating point"),
    "NaN": ({"values": torch.full((12,), torch.nan)}, ValueError, "values must be finite"),
    "empty": ({"values": torch.ones(0)}, ValueError, "values must be a non-empty vector"),
    "float rows": ({"rows": torch.ones(12)}, TypeError, "rows must be integers"),
    "short cols": ({"cols": torch.arange(11)}, ValueError, r"cols must have shape \(12,\)"),
    "row too large": ({"rows": torch.full((12,), 4)}, ValueError, r"rows must be in \[0, 4\)"),
    "negative col": ({"cols": torch.full((12,), -1)}, ValueError, r"cols must be in \[0, 3\)"),
    "twice": ({"rows": torch.zeros(12).long()}, ValueError, r"every entry once, got \(0, 0\) more"),
    "shape": ({"shape": (4, 3, 1)}, ValueError, "shape must be two numbers"),
    "rank 0": ({"rank": 0}, ValueError, r"rank must be in \[1, 3\]"),
    "rank 4": ({"rank": 4}, ValueError, r"rank must be in \[1, 3\]"),
    "inner": ({"inner": "lu"}, ValueError, "inner must be one of 'sketch', 'cholesky', 'cg'"),
    "inner_tol": ({"inner_tol": 1.0}, ValueError, r"inner_tol must be in \(0, 1\)"),
    "reg": ({"reg": -1.0}, ValueError, "reg must be at least 0"),
    "incoherence": ({"incoherence": 0.0}, ValueError, "incoherence must be positive"),
    "max_iter": ({"max_iter": 0}, ValueError, "max_iter must be at least 1"),
    "tol": ({"tol": 0.0}, ValueError, "tol must be positive"),
}


@pytest.mark.parametrize(("change", "kind", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused(change: dict[str, object], kind: type[Exception], message: str) -> None:
    rows, cols = torch.ones(4, 3).nonzero(as_tuple=True)
    arguments = {"rows": rows, "cols": cols, "values": torch.rand(12), "shape": (4, 3), "rank": 1, **change}
    with pytest.raises(kind, match=message):
        complete_matrix(**arguments)  # type: ignore[arg-type]


@parametrize_with_checks(
    [MatrixCompletion(), MatrixCompletion(rank=1, reg=0.0), MatrixCompletion(rank=2, inner="cholesky", reg=0.01)]
)
def test_scikit_learn_estimator(estimator: MatrixCompletion, check: object) -> None:
    check(estimator)  # type: ignore[operator]


def table(seed: int = 0, **options: object) -> tuple[np.ndarray, np.ndarray]:
    truth, rows, cols, _ = instance(seed=seed, **options)  # type: ignore[arg-type]
    gaps = np.full(truth.shape, np.nan)
    gaps[rows, cols] = truth[rows, cols]
    return truth.numpy(), gaps


def test_imputer_fills_gaps_and_keeps_the_rest() -> None:
    truth, gaps = table()
    before = gaps.copy()
    imputer = MatrixCompletion(rank=2, reg=0.0, random_state=0)
    filled = imputer.fit_transform(gaps)
    np.testing.assert_array_equal(gaps, before)
    np.testing.assert_allclose(filled, truth, atol=1e-3)
    known = ~np.isnan(gaps)
    np.testing.assert_array_equal(filled[known], truth[known])
    np.testing.assert_allclose(imputer.U_ @ imputer.V_.T, truth, atol=1e-3)
    assert imputer.n_iter_ == len(imputer.history_)
    np.testing.assert_array_equal(clone(imputer).fit_transform(gaps), filled)
    tensor = MatrixCompletion(rank=2, reg=0.0, random_state=0).fit_transform(torch.as_tensor(gaps))
    np.testing.assert_array_equal(tensor, filled)


def test_imputer_fills_rows_it_has_not_seen() -> None:
    truth, gaps = table(m=90)
    imputer = MatrixCompletion(rank=2, reg=0.0).fit(gaps[:60])
    np.testing.assert_allclose(imputer.transform(gaps[60:]), truth[60:], atol=1e-3)
    alone = gaps[60:61].copy()
    alone[0, 1:] = np.nan
    alone[0, 0] = 1.0
    with pytest.raises(ValueError, match="row 0 has 1; give a reg"):
        imputer.transform(alone)
    ridged = MatrixCompletion(rank=2, reg=0.01).fit(gaps[:60])
    assert np.isfinite(ridged.transform(np.full((1, 50), np.nan))).all()


def hidden_error(x: np.ndarray, imputer: MatrixCompletion) -> float:
    """Of the entries hidden from the imputer, three in ten, as a share of their size."""
    hidden = np.random.default_rng(0).random(x.shape) < 0.3
    filled = imputer.fit_transform(np.where(hidden, np.nan, x))
    return float(np.sqrt(((filled - x)[hidden] ** 2).mean() / (x[hidden] ** 2).mean()))


@pytest.mark.parametrize(("load", "bound"), [(load_wine, 0.8), (load_breast_cancer, 0.55)])
def test_defaults_are_safe_on_real_tables(load: Callable[[], Any], bound: float) -> None:
    # 1.0 is what the columns' means give; without a ridge the error is above 3.
    x = load().data
    assert hidden_error((x - x.mean(0)) / x.std(0), MatrixCompletion(random_state=0)) < bound


def test_defaults_follow_the_table() -> None:
    truth, gaps = table()
    exact = MatrixCompletion(random_state=0).fit(gaps)
    assert exact.reg_ == 0.003
    assert np.linalg.norm(exact.transform(gaps) - truth) < 0.02 * np.linalg.norm(truth)
    noise = np.random.default_rng(0).normal(size=(100, 30))
    assert MatrixCompletion(random_state=0).fit(noise).reg_ == 0.3
    narrow = MatrixCompletion(random_state=0).fit(noise[:, :3])
    assert narrow.rank_ == 3
    assert MatrixCompletion().fit(noise[:5, :3]).reg_ == 0.1  # too few entries to hold any out


@pytest.mark.parametrize("unit", [1e-4, 1e4])
def test_filled_table_is_in_the_unit_of_the_given_one(unit: float) -> None:
    _, gaps = table(noise=0.1)
    plain = MatrixCompletion(random_state=0).fit_transform(gaps)
    np.testing.assert_allclose(MatrixCompletion(random_state=0).fit_transform(unit * gaps), unit * plain, rtol=1e-6)


def test_rank_may_be_numpys() -> None:
    truth, rows, cols, values = instance()
    found = complete_matrix(rows, cols, values, truth.shape, np.int64(2))  # type: ignore[arg-type]
    assert torch.equal(found.U, complete_matrix(rows, cols, values, (60, 50), 2).U)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("inner", INNER)
def test_cuda_agrees_with_cpu(inner: Inner) -> None:
    _, rows, cols, values = instance(noise=0.1)
    here = complete_matrix(rows, cols, values, (60, 50), 2, inner=inner)
    there = complete_matrix(rows.cuda(), cols.cuda(), values.cuda(), (60, 50), 2, inner=inner)
    torch.testing.assert_close(there.matrix.cpu(), here.matrix, atol=1e-4, rtol=0)


def test_entries_that_are_not_in_the_matrix_are_not_predicted() -> None:
    truth = torch.outer(torch.arange(1.0, 7), torch.arange(1.0, 6))
    rows, cols = torch.ones(6, 5).nonzero(as_tuple=True)
    found = complete_matrix(rows, cols, truth.flatten(), (6, 5), rank=1)
    for name, place in {"rows": ([-1], [0]), "cols": ([0], [5])}.items():
        for kind in (torch.tensor, np.array):
            with pytest.raises(ValueError, match=f"^{name} must be in"):
                found.predict(*map(kind, place))
    with pytest.raises(ValueError, match="^cols must be 2 as rows"):
        found.predict(torch.tensor([0, 1]), torch.tensor([0]))
