from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from trimtab.solvers import entry_operator, rank_one_operator, subgradient_recovery
from trimtab.solvers.subgradient_recovery import best_scale, l1_subgradient, matrix_operator, sign_spectral_start


def instance(
    d: int = 20, r: int = 3, m: int = 1200, outliers: float = 0.0, magnitude: float = 10.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix of largest eigenvalue one, Gaussian measurement matrices, and measurements some of which are wrong."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(d, r, generator=generator, dtype=torch.float64)
    truth = factor @ factor.T
    truth = truth / torch.linalg.matrix_norm(truth, 2)
    matrices = torch.randn(m, d, d, generator=generator, dtype=torch.float64)
    y = torch.einsum("mij,ij->m", matrices, truth)
    wrong = torch.rand(m, generator=generator) < outliers
    y = y + wrong * magnitude * y.std() * torch.randn(m, generator=generator, dtype=torch.float64)
    return truth, matrices, y


def error(found: object, truth: Tensor) -> float:
    return float((torch.as_tensor(found) - truth).norm() / truth.norm())


def quiet(*args: object, **options: object):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return subgradient_recovery(*args, **options)  # type: ignore[arg-type]


def test_subgradient_is_that_of_autograd() -> None:
    _, matrices, y = instance(d=6, r=2, m=30, outliers=0.3)
    factor = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    predicted = torch.einsum("mij,ik,jk->m", matrices, factor, factor)
    (predicted - y).abs().mean().backward()
    loss, direction = l1_subgradient(factor.detach(), y, *matrix_operator(matrices))
    torch.testing.assert_close(loss, (predicted - y).abs().mean().detach())
    torch.testing.assert_close(2 * direction @ factor.detach(), factor.grad)
    assert torch.equal(direction, direction.T)


def test_a_residual_of_zero_pulls_nowhere() -> None:
    _, matrices, _ = instance(d=5, r=1, m=10)
    factor = torch.randn(5, 2, dtype=torch.float64)
    y = matrix_operator(matrices)[0](factor @ factor.T)
    loss, direction = l1_subgradient(factor, y, *matrix_operator(matrices))
    assert float(loss) == 0
    assert not direction.any()


def test_first_steps_by_hand() -> None:
    _, matrices, y = instance(d=5, r=2, m=40, outliers=0.2)
    mean = (y.sign()[:, None, None] * (matrices + matrices.mT) / 2).mean(0)
    values, vectors = torch.linalg.eigh(mean / mean.norm())
    factor = 1e-3 * vectors[:, -3:] * values[-3:].clamp_min(0).sqrt()
    for schedule in ("geometric", "residual"):
        expected = factor
        for step in range(3):
            residual = torch.einsum("mij,ij->m", matrices, expected @ expected.T) - y
            q = (residual.sign()[:, None, None] * (matrices + matrices.mT) / 2).mean(0)
            size = 0.2 * 0.9**step / q.norm() if schedule == "geometric" else 0.2 * residual.abs().mean()
            expected = expected - 2 * size * q @ expected
        found = quiet(y, matrices, 3, init_scale=1e-3, schedule=schedule, lr=0.2, decay=0.9, n_iter=3)
        torch.testing.assert_close(found.matrix, expected @ expected.T, rtol=1e-9, atol=0)
        assert len(found.losses) == 4
        assert found.losses[0] == pytest.approx(float(y.abs().mean()), rel=1e-4)


def test_start_sees_signs_alone_and_leading_eigenvectors() -> None:
    truth, matrices, y = instance()
    adjoint = matrix_operator(matrices)[1]
    start = sign_spectral_start(y, adjoint, 3)
    torch.testing.assert_close(start, sign_spectral_start(y * torch.rand_like(y).exp(), adjoint, 3))
    leading = torch.linalg.eigh(truth).eigenvectors[:, -3:]
    assert float((leading.T @ torch.linalg.qr(start).Q).det().abs()) > 0.9
    full = sign_spectral_start(y, adjoint, 20)
    torch.testing.assert_close(full[:, :3].abs(), start.abs())
    negative = int((torch.linalg.eigvalsh(adjoint(y.sign()) + adjoint(y.sign()).T) < 0).sum())
    assert negative > 0
    assert int((full.norm(dim=0) == 0).sum()) == negative  # what is negative is cut off, not turned round


def test_exact_measurements_converge_linearly() -> None:
    truth, matrices, y = instance()
    found = subgradient_recovery(y, matrices, 3, schedule="residual")
    assert error(found.matrix, truth) < 1e-8
    assert found.converged
    assert found.scale == pytest.approx(1)
    torch.testing.assert_close(found.factor @ found.factor.T, found.matrix)


def test_small_start_forgives_too_large_a_rank() -> None:
    truth, matrices, y = instance()
    small = subgradient_recovery(y, matrices, 20, schedule="residual")
    large = subgradient_recovery(y, matrices, 20, schedule="residual", init_scale=0.1)
    assert error(small.matrix, truth) < 1e-6
    assert error(large.matrix, truth) > 1e-3


@pytest.mark.parametrize("magnitude", [10.0, 1e4])
def test_outliers_of_any_size_do_no_harm(magnitude: float) -> None:
    truth, matrices, y = instance(outliers=0.4, magnitude=magnitude)
    found = subgradient_recovery(y, matrices, 20)
    assert error(found.matrix, truth) < 1e-3
    assert found.converged
    least_squares = torch.linalg.lstsq(matrices.flatten(1), y).solution.view(20, 20)
    assert error(least_squares, truth) > 1


def test_scaling_the_measurements_scales_the_matrix() -> None:
    _, matrices, y = instance(m=400, outliers=0.2)
    plain = quiet(y, matrices, 5, n_iter=60)
    scaled = quiet(4 * y, matrices, 5, n_iter=60, init_scale=2e-6)
    torch.testing.assert_close(scaled.matrix, 4 * plain.matrix)
    # The residual schedule has a unit.
    plain = quiet(y, matrices, 5, n_iter=60, schedule="residual", lr=0.2)
    scaled = quiet(4 * y, matrices, 5, n_iter=60, schedule="residual", lr=0.05, init_scale=2e-6)
    torch.testing.assert_close(scaled.matrix, 4 * plain.matrix)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_rotating_the_problem_rotates_the_matrix(seed: int) -> None:
    _, matrices, y = instance(d=6, r=2, m=80, outliers=0.2, seed=seed)
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    plain = quiet(y, matrices, 6, n_iter=30)
    turned = quiet(y, turn @ matrices @ turn.T, 6, n_iter=30)
    torch.testing.assert_close(turned.matrix, turn @ plain.matrix @ turn.T, rtol=1e-6, atol=1e-12)


def test_only_the_symmetric_part_of_a_measurement_matters() -> None:
    _, matrices, y = instance(d=8, m=100)
    skew = torch.randn_like(matrices)
    plain = quiet(y, matrices, 4, n_iter=40)
    moved = quiet(y, matrices + skew - skew.mT, 4, n_iter=40)
    torch.testing.assert_close(moved.matrix, plain.matrix)


@pytest.mark.parametrize("kind", ["rank one", "entries"])
def test_operators_are_what_their_matrices_are(kind: str) -> None:
    vectors = torch.randn(7, 4, dtype=torch.float64)
    rows, cols = torch.tensor([0, 1, 3, 3, 2, 1, 0]), torch.tensor([2, 1, 0, 0, 3, 2, 0])
    if kind == "rank one":
        pair = rank_one_operator(vectors)
        matrices = vectors[:, :, None] * vectors[:, None, :]
    else:
        pair = entry_operator(rows, cols, 4)
        matrices = torch.zeros(7, 4, 4, dtype=torch.float64)
        matrices[torch.arange(7), rows, cols] = 1
    expected = matrix_operator(matrices)
    x, w = torch.randn(4, 4, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    torch.testing.assert_close(pair[0](x), expected[0](x))
    torch.testing.assert_close(pair[1](w), expected[1](w))
    torch.testing.assert_close(pair[0](x) @ w, (x * pair[1](w)).sum())  # one is the other's adjoint


def test_recovers_from_entries_with_outliers() -> None:
    truth, _, _ = instance(d=40, r=2, m=2)
    generator = torch.Generator().manual_seed(1)
    rows, cols = (torch.rand(40, 40, generator=generator) < 0.7).nonzero(as_tuple=True)
    y = truth[rows, cols]
    wrong = torch.rand(len(y), generator=generator) < 0.1
    y = y + wrong * torch.randn(len(y), generator=generator, dtype=torch.float64)
    found = subgradient_recovery(y, entry_operator(rows, cols, 40), 40, n_iter=800, decay=0.99)
    assert error(found.matrix, truth) < 1e-2


def test_best_scale_is_the_minimiser() -> None:
    predicted, y = torch.randn(2, 51, dtype=torch.float64)
    predicted[3] = 0
    scale = best_scale(predicted, y)

    def loss(c: float) -> float:
        return float((y - c * predicted).abs().sum())

    assert all(loss(scale) <= loss(scale + shift) for shift in (-1e-3, 1e-3, -0.3, 0.3))
    assert best_scale(torch.zeros(3), torch.ones(3)) == float("inf")


def test_steps_that_end_too_early_are_told() -> None:
    _, matrices, y = instance(outliers=0.3)
    with pytest.warns(ConvergenceWarning, match="fits better if multiplied by") as caught:
        found = subgradient_recovery(y, matrices, 3, decay=0.9)
    assert caught[0].filename == __file__
    assert not found.converged
    assert found.scale > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kind_and_dtype_are_kept(dtype: torch.dtype) -> None:
    truth, matrices, y = instance(outliers=0.2)
    found = subgradient_recovery(y.to(dtype), matrices.to(dtype), 20)
    assert isinstance(found.matrix, Tensor)
    assert found.matrix.dtype == found.factor.dtype == dtype
    assert error(found.matrix.double(), truth) < 1e-2
    arrays = subgradient_recovery(y.to(dtype).numpy(), matrices.to(dtype).numpy(), 20)
    assert isinstance(arrays.matrix, np.ndarray)
    np.testing.assert_array_equal(arrays.matrix, found.matrix.numpy())


def test_inputs_are_left_alone_and_no_gradient_flows() -> None:
    _, matrices, y = instance(d=6, m=60)
    y.requires_grad_()
    before = y.detach().clone(), matrices.clone()
    assert not quiet(y, matrices, 2, n_iter=10).matrix.requires_grad
    assert torch.equal(y, before[0])
    assert torch.equal(matrices, before[1])


BAD: dict[str, tuple[dict[str, object], type[Exception], str]] = {
    "list": ({"measurements": [1.0, 2.0]}, TypeError, "measurements must be a tensor"),
    "integers": ({"measurements": torch.ones(30).long()}, TypeError, "measurements must be floating point"),
    "NaN": ({"measurements": torch.full((30,), torch.nan)}, ValueError, "measurements must be finite"),
    "matrix of measurements": ({"measurements": torch.ones(5, 6)}, ValueError, "measurements must be a vector"),
    "zeros": ({"measurements": torch.zeros(30, dtype=torch.float64)}, ValueError, "must agree in sign with"),
    "too few matrices": ({"operator": torch.ones(29, 6, 6)}, ValueError, r"operator must have shape \(30, d, d\)"),
    "not square": ({"operator": torch.ones(30, 6, 5)}, ValueError, r"operator must have shape \(30, d, d\)"),
    "infinite": ({"operator": torch.full((30, 6, 6), torch.inf)}, ValueError, "operator must be finite"),
    "one function": ({"operator": torch.trace}, TypeError, "operator must be a tensor, an array, or a pair"),
    "bad adjoint": ({"operator": (torch.trace, lambda w: w)}, ValueError, "operator's adjoint must return a square"),
    "bad forward": (
        {"operator": (lambda x: x, lambda w: w.new_zeros(6, 6))},
        ValueError,
        "operator's forward must return shape",
    ),
    "rank 0": ({"rank": 0}, ValueError, r"rank must be in \[1, 6\]"),
    "rank 7": ({"rank": 7}, ValueError, r"rank must be in \[1, 6\]"),
    "init_scale": ({"init_scale": 0.0}, ValueError, "init_scale must be positive and finite"),
    "schedule": ({"schedule": "constant"}, ValueError, "schedule must be one of 'geometric', 'residual'"),
    "lr": ({"lr": -1.0}, ValueError, "lr must be positive and finite"),
    "decay": ({"decay": 1.1}, ValueError, r"decay must be in \(0, 1\]"),
    "n_iter": ({"n_iter": 0}, ValueError, "n_iter must be at least 1"),
    "divergence": (
        {"schedule": "residual", "lr": 100.0},
        ValueError,
        "lr must be smaller for the residual schedule, got 100.0",
    ),
}


@pytest.mark.parametrize(("change", "kind", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused(change: dict[str, object], kind: type[Exception], message: str) -> None:
    _, matrices, y = instance(d=6, r=2, m=30)
    arguments = {"measurements": y, "operator": matrices, "rank": 2, **change}
    with pytest.raises(kind, match=message):
        quiet(**arguments)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_places_of_entries_are_right_in_any_type_of_integer(dtype: torch.dtype) -> None:
    rows, cols = torch.tensor([10, 3], dtype=dtype), torch.tensor([20, 99], dtype=dtype)
    forward, adjoint = entry_operator(rows, cols, 100)
    matrix = torch.arange(10_000.0).view(100, 100)
    assert forward(matrix).tolist() == [1020.0, 399.0]
    assert adjoint(torch.ones(2)).nonzero().tolist() == [[3, 99], [10, 20]]
