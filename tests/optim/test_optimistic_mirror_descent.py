"""Optimistic mirror descent: its regret inequality in every domain, its limits, and the rates of its theory."""

import copy
import math
import pickle
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from trimtab.ops.simplex import project_simplex
from trimtab.optim import (
    Ball,
    Box,
    ConvexRate,
    DynamicOMD,
    EntropicSimplex,
    OptimisticGD,
    OptimisticNewton,
    OptimisticOMD,
    SEAEnvironment,
    Simplex,
    StronglyConvexRate,
    Unconstrained,
)
from trimtab.optim.domains import MatrixNorm, shrink_to_ball

N = 5
DOMAINS = {
    "unconstrained": Unconstrained(),
    "ball": Ball(radius=0.8, center=torch.full((N,), 0.1, dtype=torch.float64)),
    "box": Box(low=-0.3, high=torch.linspace(0.1, 0.9, N, dtype=torch.float64)),
    "simplex": Simplex(),
    "entropic simplex": EntropicSimplex(),
}
domains = pytest.mark.parametrize("domain", DOMAINS.values(), ids=DOMAINS)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inside(domain, *shape, seed=0):
    """Points of a domain; of the simplex, positive ones."""
    if isinstance(domain, Simplex | EntropicSimplex):
        return normal(*shape, seed=seed).softmax(-1)
    return domain.project(normal(*shape, seed=seed))


def play(learner, gradients, hints=None):
    """Plays and anchors of all rounds, and the last anchor."""
    plays, anchors = [], []
    for t, gradient in enumerate(gradients):
        plays.append(learner.predict())
        anchors.append(learner.anchor)
        learner.update(gradient, hint=None if hints is None else hints[t + 1])
    return torch.stack(plays), torch.stack([*anchors, learner.anchor])


# --- the regret inequality, which a wrong step, sign, projection or order would break ---


@domains
@pytest.mark.parametrize("lr", [0.05, 0.7, 5.0])
@pytest.mark.parametrize("hinted", ["last gradient", "random", "none"])
def test_regret_inequality(domain, lr, hinted):
    """Any gradients, any hints, any comparator, of 40 learners at once; round by round and in sum."""
    gradients = normal(30, 40, N, seed=1)
    gradients[10:20] *= 20 / max(1, 2 * lr)  # far outside, so that projections matter
    hints = {
        "last gradient": torch.cat([torch.zeros(1, 40, N, dtype=torch.float64), gradients]),
        "random": normal(31, 40, N, seed=2),
        "none": torch.zeros(31, 40, N, dtype=torch.float64),
    }[hinted]
    learner = OptimisticOMD(inside(domain, 40, N, seed=3), domain, lr=lr, hint=hints[0])
    plays, anchors = play(learner, gradients, hints if hinted != "last gradient" else None)
    u = inside(domain, 40, N, seed=4)
    gained = (gradients * (plays - u)).sum(-1)
    surprise = domain.dual_norm(gradients - hints[:-1]).square()
    moved = domain.divergence(plays, anchors[:-1])
    toward = domain.divergence(u, anchors[:-1]) - domain.divergence(u, anchors[1:])
    every_round = toward / lr + lr / 2 * surprise - moved / lr
    assert (gained <= every_round + 1e-9).all()
    bound = domain.divergence(u, anchors[0]) / lr + lr / 2 * surprise.sum(0) - moved.sum(0) / lr
    assert (gained.sum(0) <= bound + 1e-9).all()
    # The sharper statement is an identity up to what projections gain; unconstrained it is exact.
    exact = (
        toward / lr
        + ((gradients - hints[:-1]) * (plays - anchors[1:])).sum(-1)
        - (moved + domain.divergence(anchors[1:], plays)) / lr
    )
    assert (gained <= exact + 1e-9).all()
    if isinstance(domain, Unconstrained | EntropicSimplex):
        torch.testing.assert_close(gained, exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("hinted", ["last gradient", "random", "none"])
@pytest.mark.parametrize("domain", [DOMAINS["unconstrained"], DOMAINS["ball"]], ids=["unconstrained", "ball"])
def test_regret_inequality_in_the_norms_that_gradients_shape(domain, hinted):
    gradients = normal(30, 40, N, seed=1)
    gradients[10:20] *= 5
    hints = normal(31, 40, N, seed=2) if hinted == "random" else torch.zeros(31, 40, N, dtype=torch.float64)
    learner = OptimisticNewton(
        inside(domain, 40, N, seed=3), domain, exp_concavity=2.0, diameter=0.5, gradient_bound=0.5, hint=hints[0]
    )
    u, outside = inside(domain, 40, N, seed=4), 0
    for t, gradient in enumerate(gradients):
        x, anchor, norm, hint = learner.predict(), learner.anchor, learner.norm, hints[t]
        if hinted == "last gradient":
            hint = gradients[t - 1] if t else hint
            learner.update(gradient)
        else:
            learner.update(gradient, hint=hints[t + 1])

        def squared(v, norm=norm):
            return 0.5 * (v * (norm.matrix @ v[..., None])[..., 0]).sum(-1)

        surprise = 0.5 * ((gradient - hint) * norm.solve(gradient - hint)).sum(-1)
        bound = squared(u - anchor) - squared(u - learner.anchor) + surprise - squared(x - anchor)
        assert ((gradient * (x - u)).sum(-1) <= bound + 1e-9).all()
        stopped = (x - (anchor - norm.solve(hint))).norm(dim=-1) > 1e-6
        outside += int(stopped.sum())
        # Where nothing is in the way, the play is the free step.
        assert isinstance(domain, Ball) or not stopped.any()
    if isinstance(domain, Ball) and hinted != "none":
        assert outside > 100, "the ball was never in the way"


@domains
@given(seed=st.integers(0, 10_000), lr=st.floats(1e-3, 30.0))
@settings(max_examples=15, deadline=None)
def test_plays_are_in_the_domain(domain, seed, lr):
    learner = OptimisticOMD(inside(domain, 3, N, seed=seed), domain, lr=lr)
    for gradient in 10 * normal(5, 3, N, seed=seed + 1):
        learner.update(gradient)
        x = learner.predict()
        torch.testing.assert_close(x, project_simplex(x) if "Simplex" in repr(domain) else domain.project(x))


def test_perfect_hints_leave_regret_that_does_not_grow():
    gradients = 3 * normal(400, N, seed=1)
    hints = torch.cat([gradients, gradients[:1]])
    for domain in DOMAINS.values():
        x0 = inside(domain, N, seed=3)
        learner = OptimisticOMD(x0, domain, lr=0.3, hint=hints[0])
        plays, _ = play(learner, gradients, hints)
        for seed in range(4, 9):
            u = inside(domain, N, seed=seed)
            regret = (gradients * (plays - u)).sum(-1).cumsum(0)
            assert (regret <= domain.divergence(u, x0) / 0.3 + 1e-9).all()


# --- what it reduces to ---


@pytest.mark.parametrize("name", ["unconstrained", "ball", "box", "simplex"])
def test_with_hints_of_zero_it_is_projected_gradient_descent(name):
    domain, gradients = DOMAINS[name], normal(12, N, seed=1)
    x = x0 = inside(domain, N, seed=3)
    plays, _ = play(OptimisticOMD(x0, domain, lr=0.2), gradients, torch.zeros(13, N, dtype=torch.float64))
    for t in range(12):
        torch.testing.assert_close(plays[t], x)
        x = domain.project(x - 0.2 * gradients[t])


def test_with_hints_of_zero_entropy_gives_exponential_weights():
    gradients = normal(50, N, seed=1)
    x0 = inside(EntropicSimplex(), N, seed=3)
    plays, _ = play(OptimisticOMD(x0, EntropicSimplex(), lr=0.4), gradients, torch.zeros(51, N, dtype=torch.float64))
    for t in range(50):
        weights = x0 * torch.exp(-0.4 * gradients[:t].sum(0))
        torch.testing.assert_close(plays[t], weights / weights.sum())


def test_exponential_weights_recover_from_where_weights_would_underflow():
    down = torch.tensor([0.0, 1000.0], dtype=torch.float64)
    learner = OptimisticOMD(torch.full((2,), 0.5, dtype=torch.float64), EntropicSimplex(), lr=1.0)
    zero = torch.zeros(2, dtype=torch.float64)
    for gradient in (down, down, down.flip(0), down.flip(0)):
        learner.update(gradient, hint=zero)
    torch.testing.assert_close(learner.predict(), torch.full((2,), 0.5, dtype=torch.float64))


def test_unconstrained_plays_follow_the_one_line_rule():
    gradients, x0 = normal(20, N, seed=1), normal(N, seed=2)
    plays, _ = play(OptimisticOMD(x0, Unconstrained(), lr=0.3), gradients)
    previous = torch.zeros(N, dtype=torch.float64)
    for t in range(19):
        torch.testing.assert_close(plays[t + 1], plays[t] - 0.6 * gradients[t] + 0.3 * previous)
        previous = gradients[t]


def test_optimizer_is_the_learner_on_the_whole_space():
    gradients, x0 = normal(20, N, seed=1), normal(N, seed=2)
    plays, _ = play(OptimisticOMD(x0, Unconstrained(), lr=0.3), gradients)
    weight = torch.nn.Parameter(x0.clone())
    optimizer = OptimisticGD([weight], lr=0.3)
    for t in range(20):
        torch.testing.assert_close(weight.detach(), plays[t])
        weight.grad = gradients[t].clone()
        optimizer.step()


def test_weight_decay_is_the_gradient_of_the_penalty():
    plain, decayed = (torch.nn.Parameter(torch.linspace(-1, 2, 4, dtype=torch.float64)) for _ in range(2))
    steps = OptimisticGD([plain], lr=0.1), OptimisticGD([decayed], lr=0.1, weight_decay=0.5)
    for _ in range(5):
        plain.grad = plain.detach().cos() + 0.5 * plain.detach()
        decayed.grad = decayed.detach().cos()
        for optimizer in steps:
            optimizer.step()
    torch.testing.assert_close(plain, decayed)


# --- games ---


def test_bilinear_game_converges_where_gradient_descent_ascent_spirals_out():
    def norms(cls, steps=1500, lr=0.1):
        x, y = (torch.nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2))
        players = cls([x], lr=lr), cls([y], lr=lr, maximize=True)
        found = [math.hypot(x.item(), y.item())]
        for _ in range(steps):
            for player in players:
                player.zero_grad()
            (x * y).sum().backward()
            for player in players:
                player.step()
            found.append(math.hypot(x.item(), y.item()))
        return found

    optimistic, plain = norms(OptimisticGD), norms(torch.optim.SGD, steps=50)
    assert optimistic[-1] < 1e-3 * optimistic[0]
    for before, after in pairwise(plain):
        assert after / before == pytest.approx(math.sqrt(1.01), rel=1e-9)


def test_last_iterate_of_a_matrix_game_reaches_the_equilibrium_with_entropy():
    """Rock, paper, scissors with unequal stakes: the value is 0, at weights proportional to (c, b, a)."""
    a, b, c = 1.0, 2.0, 3.0
    payoff = torch.tensor([[0, -a, b], [a, 0, -c], [-b, c, 0]], dtype=torch.float64)
    equilibrium = torch.tensor([c, b, a], dtype=torch.float64) / (a + b + c)
    start = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    rows, columns = (OptimisticOMD(start, EntropicSimplex(), lr=0.1) for _ in range(2))
    for _ in range(2000):
        x, y = rows.predict(), columns.predict()
        rows.update(payoff @ y)
        columns.update(-payoff.T @ x)
    torch.testing.assert_close(rows.predict(), equilibrium, atol=1e-3, rtol=0)


# --- step sizes ---


def test_convex_rate_counts_the_changes_before_the_round():
    rate = ConvexRate(diameter=3.0, gradient_bound=2.0, smoothness=0.5)
    learner = OptimisticOMD(torch.zeros(2, 2, dtype=torch.float64), Unconstrained(), rate)
    gradients = normal(6, 2, 2, seed=1)
    anchor, variation = torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    previous = torch.zeros(2, 2, dtype=torch.float64)
    for gradient in gradients:
        eta = 3.0 / torch.sqrt(10 * (3.0 * 0.5) ** 2 + 4 * 4 + variation)[:, None]
        torch.testing.assert_close(learner.anchor, anchor)
        torch.testing.assert_close(learner.predict(), anchor - eta * previous)
        learner.update(gradient)
        anchor = anchor - eta * gradient
        variation = variation + ((gradient - previous) ** 2).sum(1)
        previous = gradient


def test_changes_are_measured_in_the_dual_norm():
    learner = OptimisticOMD(torch.full((3,), 1 / 3), EntropicSimplex(), lr=0.1)
    learner.update(torch.tensor([3.0, -4.0, 0.0]))
    learner.update(torch.tensor([3.0, -3.0, 0.5]))
    assert learner.variation.item() == pytest.approx(16 + 1)


def test_strongly_convex_rate_uses_the_same_step_twice_a_round():
    learner = OptimisticOMD(torch.zeros(1), Unconstrained(), StronglyConvexRate(0.5))
    learner.update(torch.tensor([1.0]))  # 2 / (0.5 * 1) = 4, and then 2 for the second round's guess
    assert (learner.anchor.item(), learner.predict().item()) == (-4.0, -6.0)
    learner.update(torch.tensor([2.0]))
    assert learner.anchor.item() == pytest.approx(-8.0)
    assert learner.predict().item() == pytest.approx(-8.0 - 2 * 4 / 3)


def test_newton_follows_its_formulas_without_constraint():
    beta = 0.5 * min(1 / (4 * 2.0 * 3.0), 0.7)
    learner = OptimisticNewton(normal(N), Unconstrained(), exp_concavity=0.7, diameter=3.0, gradient_bound=2.0)
    assert learner.beta == beta
    hessian = (1 + beta / 2 * 4) * torch.eye(N, dtype=torch.float64)
    anchor, hint = normal(N), torch.zeros(N, dtype=torch.float64)
    for gradient in normal(8, N, seed=1):
        torch.testing.assert_close(learner.predict(), anchor - torch.linalg.inv(hessian) @ hint)
        learner.update(gradient)
        anchor = anchor - torch.linalg.inv(hessian) @ gradient
        hessian = hessian + beta / 2 * torch.outer(gradient, gradient)
        hint = gradient


def test_regret_of_strongly_convex_losses_is_logarithmic_and_below_the_convex_rates():
    means = torch.full((1500, 4), 0.2, dtype=torch.float64)
    environment = SEAEnvironment(means, sigma=0.7, generator=torch.Generator().manual_seed(0))
    domain, found = Ball(1.5), {}
    for name, rate in {"strong": StronglyConvexRate(1.0), "convex": ConvexRate(3.0, 2.6, 1.0)}.items():
        learner, total, at = OptimisticOMD(torch.zeros(4, dtype=torch.float64), domain, rate), 0.0, {}
        for t in range(1500):
            x = learner.predict()
            total += environment.loss(t, x).item()
            learner.update(environment.gradient(t, x))
            if t + 1 in (150, 1500):
                best = environment.best_fixed(domain, t + 1)
                at[t + 1] = total - 0.5 * (best - environment.centers[: t + 1]).square().sum().item()
        found[name] = at
    assert found["strong"][1500] - found["strong"][150] < 0.5 * 4 * math.log(10)
    assert found["strong"][1500] < 0.5 * found["convex"][1500]


# --- two layers ---


def test_two_layers_follow_their_formulas():
    """Plain loops over base learners, with projections onto a ball of radius 1."""
    horizon, D, G, L = 200, 2.0, 2.0, 0.4
    domain, x0 = Ball(1.0), torch.zeros(N, dtype=torch.float64)
    learner = DynamicOMD(x0, domain, horizon=horizon, diameter=D, gradient_bound=G, smoothness=L)
    smallest = math.sqrt(D**2 / (8 * G**2 * horizon))
    count = math.ceil(0.5 * math.log2(G**2 * horizon / (8 * D**2 * L**2))) + 1
    rates = [min(1 / (8 * L), smallest * 2**i) for i in range(count)]
    torch.testing.assert_close(learner.rates, torch.tensor(rates, dtype=torch.float64))
    bases = [OptimisticOMD(x0, domain, lr=rate) for rate in rates]
    weights, losses = [1 / count] * count, [0.0] * count
    before = [x0] * count
    variation, previous = 0.0, torch.zeros(N, dtype=torch.float64)
    for gradient in normal(25, N, seed=1):
        points = [base.predict() for base in bases]
        torch.testing.assert_close(learner.predict(), sum(w * x for w, x in zip(weights, points, strict=True)))
        learner.update(gradient)
        variation += (gradient - previous).square().sum().item()
        rate = min(1 / (8 * D**2 * L), math.sqrt(math.log(count) / (D**2 * variation)))
        logits = []
        for i, base in enumerate(bases):
            losses[i] += (gradient @ points[i] + 2 * L * (points[i] - before[i]).square().sum()).item()
            base.update(gradient)
            ahead = base.predict()
            logits.append(-rate * (losses[i] + (gradient @ ahead + 2 * L * (ahead - points[i]).square().sum()).item()))
        weights = torch.tensor(logits, dtype=torch.float64).softmax(0).tolist()
        before, previous = points, gradient
    torch.testing.assert_close(learner.weights, torch.tensor(weights, dtype=torch.float64))


def test_two_layers_follow_a_moving_centre_and_pick_long_steps_for_it():
    """The centre jumps every hundred rounds, which shrinks the convex rate's steps but not the base learners'."""
    centers = normal(8, N, seed=1).mul(0.3).repeat_interleave(100, 0)
    learner = DynamicOMD(
        torch.zeros(N, dtype=torch.float64),
        Ball(1.5),
        horizon=800,
        diameter=3.0,
        gradient_bound=3.0,
        smoothness=1.0,
    )
    total = 0.0
    for center in centers:
        x = learner.predict()
        total += 0.5 * (x - center).square().sum().item()
        learner.update(x - center)
    still = 0.5 * (centers.mean(0) - centers).square().sum().item()
    assert total < 0.5 * still
    assert learner.weights[-1] == learner.weights.max()


def test_leading_dimensions_are_independent_games():
    gradients, x0 = normal(10, 3, 2, N, seed=1), normal(3, 2, N, seed=2).mul(0.1)
    makers = [
        lambda x: OptimisticOMD(x, Ball(1.0), ConvexRate(2.0, 3.0)),
        lambda x: OptimisticNewton(x, Ball(1.0), exp_concavity=0.5, diameter=2.0, gradient_bound=3.0),
        lambda x: DynamicOMD(x, Ball(1.0), horizon=50, diameter=2.0, gradient_bound=3.0, smoothness=0.5),
    ]
    for make in makers:
        together, alone = make(x0), make(x0[1, 0])
        for gradient in gradients:
            together.update(gradient)
            alone.update(gradient[1, 0])
        torch.testing.assert_close(together.predict()[1, 0], alone.predict())


# --- domains ---


@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3))
@settings(max_examples=30, deadline=None)
def test_projection_onto_the_simplex_meets_the_variational_inequality(seed, scale):
    x = scale * normal(4, N, seed=seed)
    p = project_simplex(x)
    torch.testing.assert_close(p.sum(-1), torch.ones(4, dtype=torch.float64))
    assert (p >= 0).all()
    corners = torch.eye(N, dtype=torch.float64)
    assert (((x - p)[:, None] * (corners - p[:, None])).sum(-1) <= 1e-9 * max(1, scale)).all()


@given(seed=st.integers(0, 10_000), condition=st.floats(0.0, 6.0))
@settings(max_examples=30, deadline=None)
def test_ball_step_in_a_norm_is_optimal(seed, condition):
    """First-order condition against every point of the ball, for condition numbers up to 1e6."""
    factor = torch.linalg.qr(normal(7, N, N, seed=seed)).Q
    matrix = factor @ torch.diag(torch.logspace(0, condition, N, dtype=torch.float64)) @ factor.mT
    x, gradient = DOMAINS["ball"].project(normal(7, N, seed=seed + 1)), 10**condition * normal(7, N, seed=seed + 2)
    u = DOMAINS["ball"].newton_step(x, gradient, MatrixNorm((matrix + matrix.mT) / 2))
    slope = gradient + (matrix @ (u - x)[..., None])[..., 0]
    worst = 0.1 - 0.8 * slope / slope.norm(dim=-1, keepdim=True)
    assert ((slope * (worst - u)).sum(-1) >= -1e-7 * slope.norm(dim=-1) - 1e-12 * 10**condition).all()
    assert ((u - 0.1).norm(dim=-1) <= 0.8 + 1e-12).all()


def test_ball_step_in_a_norm_agrees_with_scipy():
    matrix = normal(N, N)
    matrix = matrix @ matrix.T + 0.1 * torch.eye(N, dtype=torch.float64)
    x, gradient = normal(N, seed=1) * 0.1, 3 * normal(N, seed=2)

    def objective(u):
        step = torch.as_tensor(u) - x
        return (gradient @ torch.as_tensor(u) + 0.5 * step @ matrix @ step).item()

    found = minimize(
        objective,
        x.numpy(),
        method="SLSQP",
        constraints={"type": "ineq", "fun": lambda u: 1 - u @ u},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    ours = Ball(1.0).newton_step(x, gradient, MatrixNorm(matrix))
    torch.testing.assert_close(ours, torch.as_tensor(found.x), atol=1e-5, rtol=0)


def test_shrinking_leaves_points_inside_and_zero_where_they_are():
    points = torch.tensor([[0.3, -0.2], [0.0, 0.0], [3.0, 4.0]])
    out = shrink_to_ball(points, torch.tensor([1.0, 1.0]), radius=1.0)
    torch.testing.assert_close(out, torch.tensor([[0.3, -0.2], [0.0, 0.0], [0.6, 0.8]]))


# --- the environment ---


def test_environment_states_its_variance_and_variation_exactly():
    means = normal(2000, 2, N, seed=1).cumsum(0) * 0.01
    environment = SEAEnvironment(means, sigma=0.5, generator=torch.Generator().manual_seed(0))
    assert environment.stochastic_variance == pytest.approx(2000 * 0.25)
    differences = environment.centers - means
    torch.testing.assert_close(differences.norm(dim=-1), torch.full((2000, 2), 0.5, dtype=torch.float64))
    assert differences.mean(0).abs().max() < 0.03
    steps = means[1:] - means[:-1]
    torch.testing.assert_close(environment.adversarial_variation, (steps * steps).sum(-1).sum(0))
    x = normal(2, N, seed=3).requires_grad_()
    environment.loss(7, x).sum().backward()
    torch.testing.assert_close(environment.gradient(7, x), x.grad)


def test_where_the_mean_lies_outside_the_best_point_is_the_domains_nearest():
    environment = SEAEnvironment(torch.tensor([[3.0, 0.2], [5.0, -0.6]], dtype=torch.float64), sigma=0.0)
    box = Box(low=-1.0, high=1.0)
    torch.testing.assert_close(environment.best_fixed(box), torch.tensor([1.0, -0.2], dtype=torch.float64))


@pytest.mark.parametrize("radius", [0.05, 5.0])
def test_best_fixed_point_is_best(radius):
    environment = SEAEnvironment(normal(50, N, seed=1), sigma=0.0)
    domain = Ball(radius)
    best = environment.best_fixed(domain, 20)

    def total(x):
        return sum(environment.loss(t, x) for t in range(20))

    for seed in range(20):
        other = domain.project(best + 0.1 * normal(N, seed=seed))
        assert total(best) <= total(other) + 1e-12


# --- use ---


def test_learners_can_be_copied_and_pickled():
    learner = OptimisticOMD(torch.zeros(3), Ball(1.0), ConvexRate(2.0, 1.0))
    learner.update(torch.tensor([1.0, 0.0, 0.5]))
    others = copy.deepcopy(learner), pickle.loads(pickle.dumps(learner))
    learner.update(torch.tensor([0.0, 1.0, 0.5]))
    for other in others:
        assert not torch.equal(other.predict(), learner.predict())
        other.update(torch.tensor([0.0, 1.0, 0.5]))
        assert torch.equal(other.predict(), learner.predict())


def test_what_was_given_is_left_as_it_was():
    x0, gradient = torch.zeros(3), torch.tensor([1.0, 0.0, 0.5])
    learner = OptimisticOMD(x0, Ball(1.0), 0.1)
    learner.update(gradient)
    learner.update(gradient)
    assert torch.equal(x0, torch.zeros(3))
    assert torch.equal(gradient, torch.tensor([1.0, 0.0, 0.5]))


BAD = {
    "x0 outside": (lambda: OptimisticOMD(torch.ones(3), Ball(1.0), 0.1), ValueError, "x0 must be in the domain Ball"),
    "x0 off the simplex": (lambda: OptimisticOMD(torch.ones(3), Simplex(), 0.1), ValueError, "x0 must be"),
    "x0 with a zero": (
        lambda: OptimisticOMD(torch.tensor([1.0, 0.0]), EntropicSimplex(), 0.1),
        ValueError,
        "x0 must have positive entries",
    ),
    "integers": (lambda: OptimisticOMD(torch.zeros(3, dtype=torch.long), Ball(1.0), 0.1), ValueError, "x0 must be a v"),
    "NaN": (lambda: OptimisticOMD(torch.full((3,), math.nan), Unconstrained(), 0.1), ValueError, "x0 must be finite"),
    "lr": (lambda: OptimisticOMD(torch.zeros(3), Ball(1.0), 0.0), ValueError, "lr must be positive and finite"),
    "hint": (
        lambda: OptimisticOMD(torch.zeros(3), Ball(1.0), 0.1, hint=torch.zeros(2)),
        ValueError,
        r"hint must have shape \(3,\)",
    ),
    "radius": (lambda: Ball(0.0), ValueError, "radius must be positive and finite"),
    "bounds": (lambda: Box(1.0, 1.0), ValueError, "low must be below high"),
    "diameter": (lambda: ConvexRate(-1.0, 1.0), ValueError, "diameter must be"),
    "gradient_bound": (lambda: ConvexRate(1.0, math.inf), ValueError, "gradient_bound must be"),
    "smoothness": (lambda: ConvexRate(1.0, 1.0, -0.1), ValueError, "smoothness must be"),
    "strong_convexity": (lambda: StronglyConvexRate(0.0), ValueError, "strong_convexity must be"),
    "domain": (
        lambda: OptimisticNewton(torch.zeros(3), Box(-1, 1), exp_concavity=1.0, diameter=1.0, gradient_bound=1.0),
        TypeError,
        "domain must be a Ball or Unconstrained for OptimisticNewton, got Box",
    ),
    "exp_concavity": (
        lambda: OptimisticNewton(torch.zeros(3), Ball(1.0), exp_concavity=0.0, diameter=1.0, gradient_bound=1.0),
        ValueError,
        "exp_concavity must be",
    ),
    "horizon": (
        lambda: DynamicOMD(torch.zeros(3), Ball(1.0), horizon=0, diameter=1.0, gradient_bound=1.0, smoothness=1.0),
        ValueError,
        "horizon must be",
    ),
    "sigma": (lambda: SEAEnvironment(torch.zeros(3, 2), sigma=-1.0), ValueError, "sigma must be"),
    "means": (lambda: SEAEnvironment(torch.zeros(3), sigma=1.0), ValueError, "means must have shape"),
    "noise": (lambda: SEAEnvironment(torch.zeros(3, 2), 1.0, noise=torch.zeros(3, 1)), ValueError, "noise must have"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(("grad", "message"), [(torch.zeros(2), "grad must have shape"), (None, "grad must be finite")])
def test_a_refused_gradient_changes_nothing(grad, message):
    for learner in (
        OptimisticOMD(torch.zeros(3), Ball(1.0), 0.1),
        OptimisticNewton(torch.zeros(3), Ball(1.0), exp_concavity=1.0, diameter=2.0, gradient_bound=1.0),
        DynamicOMD(torch.zeros(3), Ball(1.0), horizon=9, diameter=2.0, gradient_bound=1.0, smoothness=1.0),
    ):
        learner.update(torch.ones(3))
        before = learner.predict().clone()
        with pytest.raises(ValueError, match=message):
            learner.update(torch.full((3,), math.inf) if grad is None else grad)
        assert torch.equal(learner.predict(), before)


@pytest.mark.parametrize("variation", [-1.0, float("nan"), float("inf")])
def test_a_rate_of_what_is_no_variation_is_refused(variation):
    with pytest.raises(ValueError, match="variation must be at least 0 and finite"):
        ConvexRate(diameter=1.0, gradient_bound=1.0)(2, torch.tensor([1.0, variation]))


@pytest.mark.parametrize("kind", ["omd", "newton", "dynamic"])
def test_a_refused_round_leaves_the_learner_as_it_was(kind):
    domain, x0 = Ball(1.0), torch.zeros(2)
    numbers = {"diameter": 2.0, "gradient_bound": 2.0}
    learner = {
        "omd": lambda: OptimisticOMD(x0, domain, lr=0.1),
        "newton": lambda: OptimisticNewton(x0, domain, exp_concavity=0.1, **numbers),
        "dynamic": lambda: DynamicOMD(x0, domain, horizon=100, smoothness=1.0, **numbers),
    }[kind]()
    twin = copy.deepcopy(learner)
    good, bad = torch.tensor([1.0, 0.5]), torch.tensor([1.0, float("nan")])
    wrong = [(bad,), (torch.ones(3),)] + ([] if kind == "dynamic" else [(good, bad), (good, torch.ones(3))])
    for each in (learner, twin):
        each.update(good)
    for arguments in wrong:
        with pytest.raises(ValueError, match="must"):
            learner.update(*arguments)
    for each in (learner, twin):
        each.update(good)
    assert torch.equal(learner.predict(), twin.predict())


class TestARefusedRound:
    def test_a_rate_that_refuses_leaves_the_learner_as_it_was(self):
        """The variation of such gradients is no number of single precision any more."""
        learner = OptimisticOMD(torch.zeros(2), Ball(1.0), lr=ConvexRate(diameter=2.0, gradient_bound=1.0))
        learner.update(torch.tensor([1.0, 0.0]))
        before = copy.deepcopy(vars(learner))
        with pytest.raises(ValueError, match="variation must be"):
            learner.update(torch.tensor([1e30, 0.0]))
        assert learner.t == before["t"]
        for name in ("variation", "_anchor", "_hint", "_point"):
            assert torch.equal(getattr(learner, name), before[name])
        twin = OptimisticOMD(torch.zeros(2), Ball(1.0), lr=ConvexRate(diameter=2.0, gradient_bound=1.0))
        twin.update(torch.tensor([1.0, 0.0]))
        for held in (learner, twin):
            held.update(torch.tensor([0.0, 1.0]))
        assert torch.equal(learner.predict(), twin.predict())

    @pytest.mark.parametrize("smoothness", [100.0, 0.01])
    def test_a_first_gradient_of_zero_leaves_plays_that_are_numbers(self, smoothness):
        """So smooth a loss has a single base learner, whose weight is one whatever the variation."""
        learner = DynamicOMD(
            torch.zeros(2), Ball(1.0), horizon=10, diameter=2.0, gradient_bound=1.0, smoothness=smoothness
        )
        assert (len(learner.rates) == 1) == (smoothness == 100.0)
        for gradient in ([0.0, 0.0], [1.0, 0.0]):
            learner.update(torch.tensor(gradient))
            assert learner.predict().isfinite().all()
            torch.testing.assert_close(learner.weights.sum(0), torch.tensor(1.0))
        assert learner.predict()[0] < 0
