"""Gradient-normalized smoothness against its closed forms, its guarantees, and scikit-learn."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trimtab.optim import (
    GradientNormalizedNewton,
    LogisticObjective,
    NonlinearEquations,
    SoftmaxObjective,
    gradient_normalized_newton,
    gradient_normalized_smoothness,
    gradient_normalized_step,
)


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spd(d, seed=0):
    root = draws(d, d, seed=seed)
    return root @ root.mT + torch.eye(d).double()


def rosenbrock(x):
    return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


def logistic(l2=0.01):
    features = draws(60, 4)
    labels = torch.where(features @ draws(4, seed=1) + 0.5 * draws(60, seed=2) > 0, 1.0, -1.0)
    return LogisticObjective(features, labels, l2=l2)


def accept(f, x, hessian, gamma):
    """One step at x, with everything from autograd."""
    value, gradient = f(x), torch.func.grad(f)(x)
    return gradient_normalized_step(lambda d: (f(x + d), torch.func.grad(f)(x + d)), value, gradient, hessian(x), gamma)


# --- the step ---


def test_first_step_on_half_a_squared_norm():
    """lambda = 1, so x moves half-way; the decrease of 0.375 is above |g+|^2 / (8 lambda) = 0.03."""
    x = torch.tensor([1.0, 0.0]).double()
    step = accept(lambda z: 0.5 * z.square().sum(), x, lambda z: torch.eye(2).double(), gamma=1.0)
    torch.testing.assert_close(step.direction, -x / 2)
    assert (step.regularizer, step.gamma, step.n_solves) == (1.0, 2.0, 1)
    torch.testing.assert_close(step.value, torch.tensor(0.125).double())


def test_every_accepted_step_keeps_the_inequality_and_every_refused_one_breaks_it():
    f, x = rosenbrock, torch.tensor([-2.0, 2.0]).double()
    gamma, refused = 1.0, 0
    for _ in range(15):
        value, gradient = f(x), torch.func.grad(f)(x)
        length, hessian = gradient.norm().item(), torch.func.hessian(f)(x)
        step = accept(f, x, torch.func.hessian(f), gamma)
        torch.testing.assert_close(
            (hessian + step.regularizer * torch.eye(2)) @ step.direction, -gradient, rtol=1e-6, atol=1e-6
        )
        ahead = torch.func.grad(f)(x + step.direction)
        assert value - step.value >= ahead.square().sum() / (8 * step.regularizer) - 1e-15 * max(1, value)
        assert step.value < value
        tried = length / step.regularizer
        assert tried == pytest.approx(gamma / 2 ** (step.n_solves - 1))
        assert step.gamma == pytest.approx(2 * tried)
        if step.n_solves > 1:  # the radius twice as long was refused, and rightly so
            system = hessian + step.regularizer / 2 * torch.eye(2)
            if torch.linalg.eigvalsh(system).min() > 0:
                d = -torch.linalg.solve(system, gradient)
                loss = torch.func.grad(f)(x + d).square().sum() / (4 * step.regularizer)
                assert value - f(x + d) < loss
            refused += 1
        x, gamma = x + step.direction, step.gamma
    assert refused > 2


def test_a_zero_hessian_gives_gradient_steps_with_a_rate_that_fits():
    """For a convex function with gradients L-Lipschitz every lambda of at least L is accepted."""
    matrix = spd(4)
    lipschitz = torch.linalg.eigvalsh(matrix).max().item()
    x, gamma = draws(4, seed=3), 1e3
    for _ in range(50):
        gradient = matrix @ x
        step = gradient_normalized_step(
            lambda d, x=x: (0.5 * (x + d) @ matrix @ (x + d), matrix @ (x + d)),
            0.5 * x @ gradient,
            gradient,
            None,
            gamma,
        )
        torch.testing.assert_close(step.direction, -gradient / step.regularizer)
        assert step.regularizer <= 2 * lipschitz * (1 + 1e-12)
        x, gamma = x + step.direction, step.gamma


@pytest.mark.parametrize(("curvature", "accepted"), [(1.8, True), (1.95, False)])
def test_a_step_is_accepted_up_to_eight_times_the_decrease(curvature, accepted):
    """Without a Hessian, from a gradient of length one and at radius 1, a parabola's step is minus the gradient.

    It falls by 1 - a / 2 and leaves a gradient of |1 - a|.
    """
    one = torch.ones(1, dtype=torch.float64)

    def evaluate(step):
        return (step + curvature / 2 * step**2).sum(), one + curvature * step

    step = gradient_normalized_step(evaluate, torch.zeros((), dtype=torch.float64), one, None, 1.0, max_halvings=1)
    assert (8 * (1 - curvature / 2) >= (1 - curvature) ** 2) == accepted
    assert (step is not None) == accepted


def test_a_decrease_that_rounding_hides_is_accepted():
    one = torch.full((1,), 1e-9, dtype=torch.float64)
    value = torch.ones((), dtype=torch.float64)  # a fall of 1e-18 below 1 is not to be seen
    step = gradient_normalized_step(lambda step: (value, one + step), value, one, torch.eye(1).double(), 1e-9)
    assert step is not None
    assert step.n_solves == 1


def test_no_step_where_the_gradient_is_wrong():
    uphill = lambda d: (-d.sum(), -torch.ones(2))
    assert gradient_normalized_step(uphill, torch.tensor(0.0), torch.ones(2), None, 1.0, max_halvings=9) is None


def test_values_that_overflow_are_refused_and_shorter_steps_tried():
    def f(x):
        return torch.exp(50 * x.abs().sum()) if x.dtype == torch.float32 else x.sum()

    x = torch.tensor([1.5])
    step = accept(f, x, lambda z: None, gamma=1e4)  # a first step to where the value is infinite
    assert step.n_solves > 5
    assert step.value < f(x)


# --- whole searches ---


def test_on_a_quadratic_the_regulariser_halves_relative_to_the_gradient_and_convergence_is_superlinear():
    matrix = spd(5)
    result = gradient_normalized_newton(lambda x: 0.5 * x @ matrix @ x, draws(5, seed=1), grad_tol=1e-12)
    assert result.success
    assert result.nit < 15
    assert result.gammas == pytest.approx([2.0**k for k in range(result.nit)])
    assert result.n_solves == result.nit
    ratios = [b / a for a, b in itertools.pairwise(result.grad_norms)]
    assert ratios[-1] < 1e-3 < ratios[0]


@given(seed=st.integers(0, 999), scale=st.floats(0.1, 10.0))
@settings(max_examples=6, deadline=None)
def test_affine_invariance(seed, scale):
    """f(Pz) in the metric P^T B P has the iterates P^-1 x."""
    f, start = logistic(), scale * draws(4, seed=seed)
    change, metric = draws(4, 4, seed=seed + 1) + 3 * torch.eye(4).double(), spd(4, seed=2)
    ours, theirs = [], []
    gradient_normalized_newton(f, start, metric=metric, max_iter=6, callback=ours.append)
    gradient_normalized_newton(
        lambda z: f(change @ z),
        torch.linalg.solve(change, start),
        metric=change.mT @ metric @ change,
        max_iter=6,
        callback=theirs.append,
    )
    for x, z in zip(ours, theirs, strict=False):
        torch.testing.assert_close(change @ z, x, rtol=1e-5, atol=1e-7)


def test_a_search_descends_from_anywhere_and_reports_what_it_did():
    f, path = logistic(), []
    result = gradient_normalized_newton(f, 30 * draws(4, seed=5), callback=lambda x: path.append(x.clone()))
    values = [f(x).item() for x in path]
    assert result.success
    assert len(path) == result.nit + 1 == len(result.grad_norms) == len(result.gammas) + 1
    assert all(b < a + 1e-15 for a, b in itertools.pairwise(values))
    assert result.fun == values[-1]
    torch.testing.assert_close(result.jac, f.gradient(result.x))
    assert result.grad_norms[-1] == result.jac.norm().item() <= 1e-8


@pytest.mark.parametrize("hessian", ["exact", "gauss_newton"])
@pytest.mark.parametrize("power", [2.0, 4.0])
def test_rosenbrock_as_a_power_of_residuals(hessian, power):
    f = NonlinearEquations(lambda x: torch.stack([1 - x[0], 10 * (x[1] - x[0] ** 2)]), power=power)
    result = gradient_normalized_newton(f, torch.tensor([-1.2, 1.0]).double(), hessian=hessian, grad_tol=1e-9)
    assert result.success
    torch.testing.assert_close(result.x, torch.ones(2).double(), atol=2e-3 if power == 4 else 1e-8, rtol=0)


def test_fisher_term_alone_is_a_hessian_too():
    matrix = draws(6, 3)
    f = NonlinearEquations(lambda x: matrix @ x, power=4.0)
    runs = {h: gradient_normalized_newton(f, draws(3, seed=1), hessian=h, max_iter=40) for h in ("fisher", "zero")}
    assert runs["fisher"].fun < 1e-6
    assert runs["fisher"].fun != runs["zero"].fun


def test_derivatives_given_found_and_own_agree():
    f, x = logistic(), draws(4, seed=7)
    own = gradient_normalized_newton(f, x)
    found = gradient_normalized_newton(lambda z: f(z), x)
    given = gradient_normalized_newton(lambda z: f(z), x, gradient=f.gradient, hessian=f.hessian)
    for other in (found, given):
        torch.testing.assert_close(other.x, own.x)
        assert other.n_solves == own.n_solves


def test_solution_is_scikit_learns():
    from sklearn.datasets import load_breast_cancer
    from sklearn.linear_model import LogisticRegression

    x, y = load_breast_cancer(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    peer = LogisticRegression(C=1.0, solver="newton-cholesky", fit_intercept=False, tol=1e-12).fit(x, y)
    f = LogisticObjective(torch.from_numpy(x), torch.from_numpy(2.0 * y - 1), l2=1 / len(x))
    result = gradient_normalized_newton(f, torch.zeros(30).double(), grad_tol=1e-11)
    assert result.success
    assert result.nit < 20
    np.testing.assert_allclose(result.x.numpy(), peer.coef_[0], atol=1e-8)


def test_softmax_regression_with_a_matrix_that_is_not_its_hessian():
    features, labels = draws(40, 3), torch.arange(40) % 3
    f = SoftmaxObjective(features, labels, 3, l2=0.1)
    exact = gradient_normalized_newton(f, draws(9, seed=1))
    near = gradient_normalized_newton(f, draws(9, seed=1), hessian="gauss_newton")
    assert exact.success
    assert near.success
    assert exact.nit < near.nit
    torch.testing.assert_close(near.x, exact.x, atol=1e-6, rtol=0)


def test_near_the_solution_rounding_costs_no_tries():
    """Without allowance for rounding the last steps are refused forty times over."""
    result = gradient_normalized_newton(logistic(), draws(4, seed=1), grad_tol=1e-14, max_iter=20)
    assert result.grad_norms[-1] < 1e-13
    assert result.n_solves <= 2 * result.nit + 40


def test_a_search_that_cannot_go_on_says_so():
    f = logistic()
    stuck = gradient_normalized_newton(f, draws(4), gradient=lambda x: -f.gradient(x), max_halvings=5)
    assert not stuck.success
    assert "no step was accepted" in stuck.message
    assert stuck.n_solves == 5
    short = gradient_normalized_newton(f, draws(4), max_iter=2)
    assert (short.success, short.nit, short.message) == (False, 2, "the iterations are used up")


# --- the radius ---


def test_radius_of_a_quadratic_is_infinite_and_without_a_hessian_known():
    matrix, x = spd(3), draws(3, seed=1)
    f = lambda z: 0.5 * z @ matrix @ z
    assert gradient_normalized_smoothness(f, x, n_directions=4) == math.inf
    values, vectors = torch.linalg.eigh(matrix)
    radius = gradient_normalized_smoothness(f, x, hessian="zero", directions=vectors.mT)
    assert radius == pytest.approx((matrix @ x).norm().item() / values.max().item(), rel=2e-3)


def test_radius_of_a_cubic_is_known():
    """The error of the exact Hessian of |x|^3 / 6 at 2 is h^2 / 2, so that r^2 = 2 |g| = 4."""
    f = lambda z: (z.abs() ** 3).sum() / 6
    x = torch.tensor([2.0]).double()
    radius = gradient_normalized_smoothness(f, x, directions=torch.ones(1, 1).double())
    assert radius == pytest.approx(2.0, rel=2e-3)


@pytest.mark.parametrize("seed", range(3))
def test_radius_is_no_shorter_than_lipschitz_constants_promise(seed):
    f, x = logistic(l2=0.0), draws(4, seed=seed)
    options = {"n_directions": 16, "generator": torch.Generator().manual_seed(seed)}
    rows = f.features.norm(dim=1)
    length = f.gradient(x).norm().item()
    second = (rows**3).mean().item() / (6 * 3**0.5)  # the largest third derivative of the logistic function's integral
    assert gradient_normalized_smoothness(f, x, **options) >= math.sqrt(2 * length / second)
    first = torch.linalg.eigvalsh(f.hessian_bound(x)).max().item()
    assert gradient_normalized_smoothness(f, x, hessian="zero", **options) >= length / first * (1 - 2e-3)


def test_steps_within_the_radius_are_accepted():
    """What the theory promises for a convex function, at the estimate of the radius."""
    f = logistic()
    for seed in range(3):
        x = 3 * draws(4, seed=seed)
        radius = gradient_normalized_smoothness(f, x, n_directions=16, generator=torch.Generator().manual_seed(seed))
        step = accept(f, x, f.hessian, min(radius, 1e6))
        assert step.n_solves == 1


def test_radius_scales_with_the_metric():
    f, x, metric = logistic(), draws(4), spd(4, seed=4)
    directions = draws(8, 4, seed=5)
    factor = torch.linalg.cholesky(metric).mT  # |h|_B = |factor h|: the plain radius in the coordinates factor h
    inside = torch.linalg.inv(factor)
    ours = gradient_normalized_smoothness(f, x, metric=metric, directions=directions)
    plain = gradient_normalized_smoothness(lambda z: f(inside @ z), factor @ x, directions=directions @ factor.mT)
    assert ours == pytest.approx(plain, rel=2e-3)


# --- the optimizer ---


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def test_optimizer_takes_the_functions_steps():
    x, y = draws(30, 3), draws(30, 1, seed=1)
    model = network()
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def f(vector):
        parts = vector.split([math.prod(shape) for shape in shapes.values()])
        params = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return nn.functional.mse_loss(torch.func.functional_call(model, params, (x,)), y)

    start = nn.utils.parameters_to_vector(model.parameters()).detach()
    expected = gradient_normalized_newton(f, start, max_iter=5)
    optimizer = GradientNormalizedNewton(model.parameters())
    for _ in range(5):
        optimizer.step(lambda: nn.functional.mse_loss(model(x), y))
    torch.testing.assert_close(nn.utils.parameters_to_vector(model.parameters()), expected.x)


def test_optimizer_resumes_from_its_state():
    x, y = draws(30, 3), draws(30, 1, seed=1)
    model = network()
    optimizer = GradientNormalizedNewton(model.parameters())
    closure = lambda: nn.functional.mse_loss(model(x), y)
    for _ in range(3):
        optimizer.step(closure)
    twin = copy.deepcopy(model)
    resumed = GradientNormalizedNewton(twin.parameters(), gamma=7.0)
    resumed.load_state_dict(optimizer.state_dict())
    optimizer.step(closure)
    resumed.step(lambda: nn.functional.mse_loss(twin(x), y))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_optimizer_leaves_parameters_where_no_step_is_accepted_and_at_the_minimum():
    calls = []
    weight = nn.Parameter(torch.ones(2).double())

    def worse():
        calls.append(1)
        return weight.sum() + 100 * (len(calls) > 1)

    GradientNormalizedNewton([weight], max_halvings=3).step(worse)
    assert torch.equal(weight.data, torch.ones(2).double())
    assert len(calls) == 4
    still = nn.Parameter(torch.zeros(2).double())
    GradientNormalizedNewton([still]).step(lambda: still.square().sum())
    assert not still.any()


def test_optimizer_names_what_it_cannot_take():
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="at most 10000"):
        GradientNormalizedNewton([nn.Parameter(torch.zeros(10_001))])
    with pytest.raises(ValueError, match="one group"):
        GradientNormalizedNewton([{"params": [weight]}, {"params": [nn.Parameter(torch.ones(1))]}])
    with pytest.raises(ValueError, match="one dtype"):
        GradientNormalizedNewton([weight, nn.Parameter(torch.ones(1).double())])
    with pytest.raises(ValueError, match="gamma"):
        GradientNormalizedNewton([weight], gamma=0.0)

    def stepped():
        loss = weight.sum()
        loss.backward()
        return loss.detach()

    with pytest.raises(ValueError, match="without calling backward"):
        GradientNormalizedNewton([weight]).step(stepped)


# --- bad input ---


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"gamma": 0.0}, "gamma"),
        ({"grad_tol": -1.0}, "grad_tol"),
        ({"max_iter": -1}, "max_iter"),
        ({"max_halvings": 0}, "max_halvings"),
        ({"hessian": "bfgs"}, "hessian must be a function or one of exact"),
        ({"hessian": "fisher"}, "hessian must be a method of the function"),
        ({"hessian": lambda x: torch.eye(3)}, r"hessian must give a matrix of shape \(2, 2\)"),
        ({"hessian": lambda x: torch.full((2, 2), torch.nan)}, "hessian must be finite"),
        ({"gradient": lambda x: x[:1]}, "gradient of shape"),
        ({"gradient": lambda x: x * torch.nan}, "finite at the start"),
        ({"metric": -torch.eye(2).double()}, "metric must be positive definite"),
        ({"metric": torch.ones(2).double()}, "metric must be a square matrix"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        gradient_normalized_newton(rosenbrock, torch.zeros(2).double(), **kwargs)


def test_the_radius_needs_a_gradient():
    with pytest.raises(ValueError, match="stationary"):
        gradient_normalized_smoothness(rosenbrock, torch.ones(2).double())
    with pytest.raises(ValueError, match="n_directions"):
        gradient_normalized_smoothness(rosenbrock, torch.zeros(2).double(), n_directions=0)


def test_a_closure_that_fails_at_a_try_leaves_the_weights_in_place():
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    optimizer, calls = GradientNormalizedNewton([weight]), []

    def closure():
        calls.append(1)
        if len(calls) == 2:
            raise ArithmeticError
        return weight.square().sum()

    with pytest.raises(ArithmeticError):
        optimizer.step(closure)
    assert weight.tolist() == [1.0, 2.0]
    assert optimizer.param_groups[0]["gamma"] == 1.0


class TestOneGroupOfOneOptimizer:
    def test_a_second_group_is_refused_later_too(self):
        first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
        optimizer = GradientNormalizedNewton([first])
        with pytest.raises(ValueError, match="params must be one group"):
            optimizer.add_param_group({"params": [second]})
        assert len(optimizer.param_groups) == 1

    def test_the_state_of_another_optimizer_is_refused_before_anything_changes(self):
        weight = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
        optimizer = GradientNormalizedNewton([weight], gamma=2.0)
        before = copy.deepcopy(optimizer.state_dict())
        spoilt = copy.deepcopy(before)
        spoilt["param_groups"][0]["gamma"] = math.nan
        for state, message in (
            (torch.optim.SGD([weight], lr=0.1).state_dict(), "state_dict must be of a GradientNormalizedNewton"),
            (spoilt, "gamma must be positive"),
        ):
            with pytest.raises(ValueError, match=message):
                optimizer.load_state_dict(state)
            assert optimizer.state_dict() == before
        optimizer.step(lambda: weight.square().sum())
