"""Objectives against automatic differentiation, and the order of their Hessians' approximations."""

import pytest
import torch

from trimtab.optim import LogisticObjective, NonlinearEquations, SoftmaxObjective


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


FEATURES = draws(20, 3)
CLASSES = torch.arange(20) % 4


def curve(x):
    return torch.stack([1 - x[0], 3 * (x[1] - x[0] ** 2), x[2] * x[0]])


OBJECTIVES = {
    "logistic": (LogisticObjective(FEATURES, 2.0 * (CLASSES > 1) - 1, l2=0.1), 3),
    "softmax": (SoftmaxObjective(FEATURES, CLASSES, 4, l2=0.1), 12),
    "least squares": (NonlinearEquations(curve), 3),
    "fifth power": (NonlinearEquations(curve, power=5.0), 3),
}
objectives = pytest.mark.parametrize(("f", "d"), OBJECTIVES.values(), ids=OBJECTIVES)


@objectives
def test_derivatives_are_those_of_the_value(f, d):
    x = draws(d, seed=1)
    torch.testing.assert_close(f.gradient(x), torch.func.grad(f)(x))
    torch.testing.assert_close(f.hessian(x), torch.func.hessian(f)(x))


def test_logistic_loss_by_hand():
    f = LogisticObjective(torch.tensor([[2.0], [-1.0]]), torch.tensor([1.0, 1.0]), l2=0.5)
    expected = (torch.log1p(torch.exp(torch.tensor(-2.0))) + torch.log1p(torch.exp(torch.tensor(1.0)))) / 2 + 0.25
    torch.testing.assert_close(f(torch.tensor([1.0])), expected)


def test_logistic_loss_of_huge_margins_is_finite():
    f = LogisticObjective(1e4 * FEATURES, 2.0 * (CLASSES > 1) - 1)
    x = draws(3)
    assert f(x).isfinite()
    assert f.gradient(x).isfinite().all()
    assert f.hessian(x).isfinite().all()


def test_two_class_softmax_is_logistic_regression():
    labels = (CLASSES > 1).long()
    logistic, softmax = LogisticObjective(FEATURES, 2.0 * labels - 1), SoftmaxObjective(FEATURES, labels, 2)
    x = draws(3, seed=2)
    torch.testing.assert_close(softmax(torch.cat([-x / 2, x / 2])), logistic(x))


def least(matrix):
    return torch.linalg.eigvalsh(matrix).min()


def test_bounds_are_above_the_hessian_and_touch_it_where_they_should():
    f, x = OBJECTIVES["logistic"][0], draws(3, seed=3)
    assert least(f.hessian_bound(x) - f.hessian(x)) > 0
    torch.testing.assert_close(f.hessian_bound(x), f.hessian(torch.zeros(3, dtype=x.dtype)))
    g, z = OBJECTIVES["softmax"][0], draws(12, seed=3)
    gap = g.gauss_newton(z) - g.hessian(z)
    assert least(gap) > -1e-12
    # What is left out is the mean of (p a)(p a)^T over the samples.
    pa = (g.scores(z).softmax(1)[:, :, None] * FEATURES[:, None]).flatten(1)
    torch.testing.assert_close(gap, pa.mT @ pa / len(FEATURES))
    blocks = g.gauss_newton(z).view(4, 3, 4, 3)
    assert not blocks[0, :, 1].any()


@pytest.mark.parametrize("power", [2.0, 3.0, 4.0, 5.0])
def test_of_linear_equations_gauss_newton_is_exact(power):
    matrix, target = draws(5, 3), draws(5, seed=1)
    f, x = NonlinearEquations(lambda x: matrix @ x - target, power=power), draws(3, seed=2)
    torch.testing.assert_close(f.gauss_newton(x), f.hessian(x))
    gradient, norm = f.gradient(x), (matrix @ x - target).norm()
    torch.testing.assert_close(f.fisher(x), (power - 2) * torch.outer(gradient, gradient) / norm**power)


@pytest.mark.parametrize("power", [2.0, 3.0, 4.0])
def test_equations_that_are_solved_give_no_nan(power):
    f = NonlinearEquations(lambda x: 2 * x, power=power)
    x = torch.zeros(2, dtype=torch.float64)
    expected = torch.eye(2, dtype=torch.float64) * (4 if power == 2 else 0)
    for matrix in (f.hessian(x), f.gauss_newton(x)):
        torch.testing.assert_close(matrix, expected)
    assert not f.fisher(x).any()
    assert not f.gradient(x).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogisticObjective(FEATURES, torch.zeros(20)), "labels must be 1 or -1"),
        (lambda: LogisticObjective(FEATURES, torch.ones(19)), r"labels must have shape \(20,\)"),
        (lambda: LogisticObjective(FEATURES * torch.nan, torch.ones(20)), "features must be finite"),
        (lambda: LogisticObjective(FEATURES[0], torch.ones(3)), "features must be a floating point matrix"),
        (lambda: LogisticObjective(FEATURES, torch.ones(20), l2=-1.0), "l2"),
        (lambda: SoftmaxObjective(FEATURES, CLASSES, 3), r"labels must be in \[0, 3\), got 3"),
        (lambda: SoftmaxObjective(FEATURES, CLASSES, 1), "num_classes"),
        (lambda: NonlinearEquations(curve, power=1.5), "power"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_any_integer_type_count_alike(dtype) -> None:
    features = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels, x = torch.tensor([0, 1, 2, 0, 1, 2]), torch.linspace(-1, 1, 9, dtype=torch.float64)
    wide, narrow = (SoftmaxObjective(features, held, 3) for held in (labels, labels.to(dtype)))
    assert torch.equal(narrow(x), wide(x))
    assert torch.equal(narrow.gradient(x), wide.gradient(x))
