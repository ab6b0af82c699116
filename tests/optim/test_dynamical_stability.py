"""The stability of SGD at a minimum: cases with known answers, identities, and the dynamics themselves."""

import dataclasses
import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trimtab.ops.per_sample_gradients import per_sample_gradients
from trimtab.optim import (
    critical_lr,
    gauss_newton_eigenvalues,
    gauss_newton_frobenius,
    gauss_newton_trace,
    gd_critical_lr,
    spectral_radius,
    stability_operator,
    stability_report,
)


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def curvature(gradients):
    g = gradients.reshape(-1, gradients.shape[-1])
    return g.T @ g / len(gradients)


def full_operator(gradients, lr, batch_size):
    """T as a matrix on vec(S), in the space of all weights, straight from its definition."""
    g = gradients.reshape(len(gradients), -1, gradients.shape[-1])
    identity = torch.eye(g.shape[-1], dtype=g.dtype)
    hessians = [one.T @ one for one in g]
    h = torch.stack(hessians).mean(0)
    stay = identity - lr * h
    noise = torch.stack([torch.kron(one, one) for one in hessians]).mean(0) - torch.kron(h, h)
    return torch.kron(stay, stay) + lr**2 / batch_size * noise


# --- closed forms ---


@pytest.mark.parametrize("dim", [1, 2, 7])
def test_orthogonal_gradients(dim):
    """H is the identity; a step on one sample moves along one axis, d times as far."""
    g = math.sqrt(dim) * torch.eye(dim, dtype=torch.float64)
    assert gauss_newton_trace(g) == pytest.approx(dim)
    assert gauss_newton_frobenius(g) == pytest.approx(math.sqrt(dim))
    assert gd_critical_lr(g) == pytest.approx(2.0)
    assert critical_lr(g, 1) == pytest.approx(2 / dim)


@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_equal_gradients_make_no_noise(batch_size):
    g = torch.full((5, 1), 3.0)
    assert critical_lr(g, batch_size) == pytest.approx(2 / 9, rel=1e-6)
    assert spectral_radius(g, 0.3, batch_size) == pytest.approx((1 - 0.3 * 9) ** 2, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_symmetric_designs_have_the_gaussian_closed_form_with_their_kurtosis(batch_size):
    """g = +-1 signs in all 2^d corners: E[g g' S g g'] = 2 S + tr(S) I - 2 diag(S), and the identity stays an
    eigenvector, of which the radius is 1 - 2 lr + lr^2 (1 + (d - 1) / B)."""
    dim = 4
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * dim)
    lr = 0.3
    expected = 1 - 2 * lr + lr**2 * (1 + (dim - 1) / batch_size)
    assert spectral_radius(corners, lr, batch_size) == pytest.approx(expected)
    assert critical_lr(corners, batch_size) == pytest.approx(2 / (1 + (dim - 1) / batch_size))


def test_gaussian_gradients_in_the_limit_of_many():
    dim, batch_size = 3, 2
    g = draws(40_000, dim)
    expected = 2 / (1 + (dim + 1) / batch_size)
    assert critical_lr(g, batch_size) == pytest.approx(expected, rel=0.03)
    assert spectral_radius(g, 0.2, batch_size) == pytest.approx(1 - 0.4 + 0.04 * (1 + (dim + 1) / 2), rel=0.01)


def test_full_batch_is_gradient_descent():
    g = draws(6, 4)
    assert critical_lr(g, None) == pytest.approx(gd_critical_lr(g), rel=1e-8)
    assert critical_lr(g, 10**9) == pytest.approx(gd_critical_lr(g), rel=1e-6)
    values = gauss_newton_eigenvalues(g)
    assert spectral_radius(g, 0.4, None) == pytest.approx(((1 - 0.4 * values) ** 2).max().item(), rel=1e-8)


# --- against the definition ---


SHAPES = [(6, 3), (3, 6), (5, 5), (4, 2, 3), (2, 2, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_of_the_hessian(shape):
    g = draws(*shape)
    values = torch.linalg.eigvalsh(curvature(g))
    nonzero = values[values > 1e-9]
    torch.testing.assert_close(gauss_newton_eigenvalues(g), nonzero)
    assert gauss_newton_trace(g) == pytest.approx(values.sum().item())
    assert gauss_newton_frobenius(g) == pytest.approx(curvature(g).norm().item())
    assert gd_critical_lr(g) == pytest.approx(2 / values[-1].item())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("lr", [0.05, 0.7])
def test_radius_is_that_of_the_whole_operator_on_the_span(shape, batch_size, lr):
    g = draws(*shape, seed=3)
    rows = g.reshape(-1, shape[-1])
    onto = torch.linalg.pinv(rows) @ rows  # the projection onto the span; beyond it T is the identity
    whole = torch.kron(onto, onto) @ full_operator(g, lr, batch_size) @ torch.kron(onto, onto)
    expected = torch.linalg.eigvals(whole).abs().max().item()
    assert spectral_radius(g, lr, batch_size) == pytest.approx(expected, rel=1e-8)


def test_an_awkward_sample_is_not_overlooked():
    """One gradient far larger than the rest: the moment that grows is nearly of rank one."""
    g = draws(12, 8)
    g[0] *= 20
    whole = torch.linalg.eigvals(full_operator(g, 1e-3, 1)).abs().max().item()
    assert spectral_radius(g, 1e-3, 1) == pytest.approx(max(whole, 0.0), rel=1e-8)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 8), st.integers(1, 8), st.integers(1, 3), st.integers(1, 20))
def test_at_the_critical_rate_the_radius_is_one_and_the_necessary_bounds_hold(seed, n, params, outputs, batch_size):
    g = draws(n, outputs, params, seed=seed) * torch.rand(n, 1, 1, generator=torch.Generator().manual_seed(seed))
    if gauss_newton_trace(g) < 1e-6:
        return
    lr = critical_lr(g, batch_size)
    assert spectral_radius(g, lr, batch_size) == pytest.approx(1.0, abs=1e-6)
    assert spectral_radius(g, 1.01 * lr, batch_size) > 1
    assert gauss_newton_trace(g) <= 2 * batch_size * outputs / lr * (1 + 1e-9)
    trace, norm = gauss_newton_trace(g), gauss_newton_frobenius(g)
    fourth = torch.stack([(one @ one.T).square().sum() for one in g]).mean().item()
    assert (1 - 1 / batch_size) * norm**2 + fourth / batch_size <= 2 * trace / lr * (1 + 1e-9)
    rates = [critical_lr(g, size) for size in (1, 2, 5, 50, None)]
    assert all(a <= b * (1 + 1e-9) for a, b in itertools.pairwise(rates))
    assert rates[-1] == pytest.approx(gd_critical_lr(g), rel=1e-6)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_scale(factor):
    """Gradients twice as large: a Hessian four times as large, and a critical rate of a quarter."""
    g = draws(5, 4)
    assert critical_lr(factor * g, 2) == pytest.approx(critical_lr(g, 2) / factor**2)
    assert spectral_radius(factor * g, 0.1 / factor**2, 2) == pytest.approx(spectral_radius(g, 0.1, 2))


def test_single_precision_and_turned_axes_change_nothing():
    g = draws(5, 9)
    turn = torch.linalg.qr(draws(9, 9, seed=1)).Q
    assert critical_lr(g @ turn, 2) == pytest.approx(critical_lr(g, 2), rel=1e-8)
    assert critical_lr(g.float(), 2) == pytest.approx(critical_lr(g, 2), rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_operator_in_its_basis(shape):
    g = draws(*shape, seed=4)
    step, basis = stability_operator(g, 0.3, 2)
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64))
    inside = draws(basis.shape[1], basis.shape[1])
    inside = inside + inside.T
    outside = basis @ inside @ basis.T
    expected = (full_operator(g, 0.3, 2) @ outside.flatten()).view_as(outside)
    torch.testing.assert_close(basis @ step(inside) @ basis.T, expected)


# --- against the dynamics ---


@pytest.mark.parametrize("batch_size", [1, 3])
def test_second_moments_of_simulated_sgd(batch_size):
    """Mean squared distance over many runs of linearised SGD, after each of four steps."""
    n, dim, lr, runs = 4, 3, 0.15, 60_000
    g = draws(n, dim, seed=2)
    generator = torch.Generator().manual_seed(0)
    start = draws(dim, seed=5)
    theta = start.repeat(runs, 1)
    step, basis = stability_operator(g, lr, batch_size)
    inside = basis.T @ start
    moment = torch.outer(inside, inside)
    for _ in range(4):
        picked = g[torch.randint(n, (runs, batch_size), generator=generator)]
        theta = theta - lr * (picked * (picked @ theta[:, :, None])).mean(1)
        moment = step(moment)
        squares = theta.square().sum(1)
        error = 4 * squares.std() / math.sqrt(runs)
        assert abs(squares.mean() - moment.trace()) < error
        assert error < 0.05 * squares.mean()


def test_growth_of_simulated_sgd_in_the_long_run():
    """Two equally likely samples on one axis: the squared distance is multiplied by (1 - lr g^2)^2 of either."""
    g, lr = torch.tensor([[1.0], [2.0]], dtype=torch.float64), 0.55
    expected = ((1 - lr) ** 2 + (1 - 4 * lr) ** 2) / 2
    assert spectral_radius(g, lr, 1) == pytest.approx(expected)
    generator, runs, steps = torch.Generator().manual_seed(1), 200_000, 6
    factors = (1 - lr * g[torch.randint(2, (runs, steps), generator=generator), 0] ** 2).square().prod(1)
    assert abs(factors.mean() - expected**steps) < 3 * factors.std() / math.sqrt(runs)


def test_gd_turns_unstable_at_its_critical_rate():
    g = draws(5, 3)
    h = curvature(g)
    for factor, grows in ((0.99, False), (1.01, True)):
        theta = torch.ones(3, dtype=torch.float64)
        for _ in range(2000):
            theta = theta - factor * gd_critical_lr(g) * h @ theta
        assert bool(theta.norm() > 10) is grows


# --- reports ---


class Diagonal(nn.Module):
    """f(x) = <a * b, x>."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    def forward(self, x):
        return x @ (self.a * self.b)


def signs(n, d):
    return draws(n, d).sign()


def test_trace_of_a_diagonal_net():
    a, b, x = draws(6, seed=1), draws(6, seed=2), signs(9, 6)
    model = Diagonal(a, b)
    report = stability_report(model, x, model(x).detach(), lr=0.1)
    assert report.trace == pytest.approx((a.square() + b.square()).sum().item())
    assert report.trace >= 2 * (a * b).abs().sum().item()


def test_trace_of_a_two_layer_relu_net():
    model = nn.Sequential(nn.Linear(4, 7, bias=False), nn.ReLU(), nn.Linear(7, 1, bias=False)).double()
    x = draws(9, 4)
    report = stability_report(model, x, model(x).detach(), lr=0.1)
    hidden, a = model[1](x @ model[0].weight.T), model[2].weight[0]
    expected = (hidden.square().sum(1) + x.square().sum(1) * ((hidden > 0) * a.square()).sum(1)).mean()
    assert report.trace == pytest.approx(expected.item())


def test_report_agrees_with_the_functions_and_reads_its_tests_right():
    model = Diagonal(draws(6, seed=1), draws(6, seed=2))
    x = signs(9, 6)
    g = per_sample_gradients(model, x)
    critical, gd = critical_lr(g, 2), gd_critical_lr(g)
    assert critical < gd
    for lr, sgd_stable, gd_stable in (
        (0.9 * critical, True, True),
        (1.1 * critical, False, True),
        (1.1 * gd,) + (False,) * 2,
    ):
        report = stability_report(model, x, model(x).detach(), lr, 2, chunk_size=4)
        assert (report.sgd_stable, report.gd_stable) == (sgd_stable, gd_stable)
        assert (report.spectral_radius <= 1) is sgd_stable
        assert report.spectral_radius == pytest.approx(spectral_radius(g, lr, 2))
        assert report.critical_lr == pytest.approx(critical)
        assert report.gd_critical_lr == pytest.approx(gd)
        assert report.frobenius == pytest.approx(gauss_newton_frobenius(g))
        assert report.top_eigenvalue == pytest.approx(2 / gd)
        assert report.trace_bound == pytest.approx(4 / lr)
        assert report.passes_trace_test is (report.trace <= 4 / lr)
        assert report.residual == 0.0
    sharp = stability_report(model, x, model(x).detach(), lr=2.1 / report.trace)
    assert not sharp.passes_trace_test
    assert not sharp.sgd_stable
    whole = stability_report(model, x, model(x).detach(), 0.9 * gd, None)
    assert whole.sgd_stable
    assert whole.passes_trace_test
    with pytest.raises(dataclasses.FrozenInstanceError):
        whole.lr = 1.0


def hessian_trace_of(model, loss):
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()), create_graph=True)])
    rows = []
    for entry in gradient:
        row = torch.autograd.grad(entry, list(model.parameters()), retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([r.flatten() for r in row]))
    return torch.stack(rows)


def test_the_whole_hessian_of_a_net_with_several_outputs():
    """At a minimum that fits all samples nothing is missing, the factor of one half included."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = draws(6, 3)
    y = model(x).detach()
    report = stability_report(model, x, y, lr=0.1)
    hessian = hessian_trace_of(model, 0.5 * (model(x) - y).square().sum(1).mean())
    values = torch.linalg.eigvalsh(hessian)
    assert report.trace == pytest.approx(values.sum().item())
    assert report.frobenius == pytest.approx(hessian.norm().item())
    assert report.top_eigenvalue == pytest.approx(values[-1].item())
    assert report.trace_bound == pytest.approx(2 * 2 / 0.1)


def test_another_loss():
    """Cross-entropy of a linear model, whose Hessian is of the Gauss-Newton kind everywhere."""
    model = nn.Linear(3, 4).double()
    x, y = draws(6, 3), torch.tensor([0, 1, 2, 3, 0, 1])
    with pytest.warns(RuntimeWarning, match="residuals"):
        report = stability_report(model, x, y, lr=0.1, loss=F.cross_entropy)
    hessian = hessian_trace_of(model, F.cross_entropy(model(x), y))
    assert report.trace == pytest.approx(hessian.trace().item())
    assert report.top_eigenvalue == pytest.approx(torch.linalg.eigvalsh(hessian)[-1].item())
    doubled = stability_report(
        model, x, y, lr=0.1, loss=lambda outputs, target: 2 * F.cross_entropy(outputs, target), tolerance=10.0
    )
    assert doubled.critical_lr == pytest.approx(report.critical_lr / 2)


def test_residuals_are_warned_about_where_they_are_large():
    model, x = nn.Linear(3, 1).double(), draws(6, 3)
    y = model(x).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert stability_report(model, x, y + 0.01, lr=0.1).residual == pytest.approx(0.01)
    with pytest.warns(RuntimeWarning, match="residuals of 0.5") as caught:
        stability_report(model, x, y + 0.5, lr=0.1)
    assert caught[0].filename == __file__


def test_the_residual_is_the_root_of_the_mean_square():
    model, x = nn.Linear(3, 1).double(), draws(8, 3)
    y = model(x).detach()
    y[0] += 0.8  # one of eight: 0.1 in the mean, 0.8 / sqrt(8) = 0.28 in the root of the mean square
    with pytest.warns(RuntimeWarning, match="residuals of 0.28"):
        report = stability_report(model, x, y, lr=0.1, tolerance=0.2)
    assert report.residual == pytest.approx(0.8 / math.sqrt(8))


def test_bad_arguments_are_named():
    g = draws(4, 3)
    for lr in (0.0, -0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="lr"):
            spectral_radius(g, lr)
    for batch_size in (0, -1):
        with pytest.raises(ValueError, match="batch_size"):
            critical_lr(g, batch_size)
    for bad in (torch.zeros(0, 3), torch.zeros(3), torch.full((2, 2), math.nan)):
        with pytest.raises(ValueError, match="gradients"):
            gauss_newton_trace(bad)
    for function in (critical_lr, gd_critical_lr):
        with pytest.raises(ValueError, match="gradients"):
            function(torch.zeros(2, 3))
    model, x = nn.Linear(3, 1).double(), draws(6, 3)
    with pytest.raises(ValueError, match="y"):
        stability_report(model, x, torch.zeros(5, 1), lr=0.1)
    with pytest.raises(ValueError, match="y"):
        stability_report(model, x, torch.zeros(6), lr=0.1)
    normed = nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1)).double()
    with pytest.raises(ValueError, match="eval"):
        stability_report(normed, x, torch.zeros(6, 1), lr=0.1)
    assert normed[1].num_batches_tracked == 0
    with pytest.raises(ValueError, match="convex"):
        stability_report(model, x, model(x).detach(), lr=0.1, loss=lambda a, b: -(a - b).square().sum())
