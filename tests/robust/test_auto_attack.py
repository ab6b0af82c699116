"""AutoAttack: exact on linear classifiers, stronger than PGD on others, and no change beyond what is allowed."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linprog
from torch import nn

from trimtab.ops.attack import pgd
from trimtab.robust import auto_attack, auto_pgd, boundary_attack, square_attack
from trimtab.robust.auto_attack.boundary import nearest_on_plane
from trimtab.robust.auto_attack.gradient import checkpoints, logit_difference_ratio


@pytest.fixture
def linear():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).double()
    x = 0.2 + 0.6 * torch.rand(40, 3, 2, 2, dtype=torch.float64)
    with torch.no_grad():
        return net, x, net(x).argmax(1)


@pytest.fixture
def trained():
    torch.manual_seed(0)
    x = torch.rand(200, 1, 4, 4)
    y = (x[:, 0, :2].sum((1, 2)) > x[:, 0, 2:].sum((1, 2))).long() + (x[:, 0, 0, 0] > 0.8).long()
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 3))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net, x, y


def distances(net, x, y):
    """How far the nearest other class of a linear classifier is, in the largest change of an entry."""
    weight, logits = net[1].weight, net(x)
    gaps = logits.gather(1, y[:, None]) - logits
    slopes = (weight[y][:, None] - weight[None]).abs().sum(2)
    return (gaps / slopes).scatter(1, y[:, None], torch.inf).amin(1).detach()


@pytest.mark.parametrize("eps", [0.01, 0.05])
def test_who_withstands_is_exact_for_a_linear_classifier(linear, eps):
    net, x, y = linear
    found = auto_attack(net, x, y, eps, steps=20, num_queries=10, generator=torch.Generator().manual_seed(0))
    away = distances(net, x, y)
    assert torch.equal(found.robust, away > eps)
    assert 0 < found.robust.sum() < len(x)
    assert (found.adversarial - x).abs().max() <= eps + 1e-12
    assert torch.equal(net(found.adversarial).argmax(1) == y, found.robust)
    assert found.accuracy["clean"] == 1.0
    held = list(found.accuracy.values())
    assert held == sorted(held, reverse=True)
    assert held[-1] == pytest.approx(found.robust.double().mean().item())


def test_a_walk_ends_at_the_nearest_boundary(linear):
    net, x, y = linear
    # Towards the class whose boundary is the nearest, a linear classifier's is found at once.
    gaps = (net(x).gather(1, y[:, None]) - net(x)) / (net[1].weight[y][:, None] - net[1].weight[None]).abs().sum(2)
    target = gaps.scatter(1, y[:, None], torch.inf).argmin(1)
    moved = boundary_attack(net, x, y, target, 0.2, steps=30)
    away = (moved - x).abs().flatten(1).amax(1)
    near = distances(net, x, y) < 0.15
    torch.testing.assert_close(away[near], distances(net, x, y)[near], rtol=0.06, atol=0)
    assert (net(moved).argmax(1) != y)[near].all()
    out_of_reach = boundary_attack(net, x, y, target, 1e-6, steps=5)
    assert torch.equal(out_of_reach, x)


class Step(nn.Module):
    """On the way from 0.5 upwards the other class is a tenth away, and twice as far once that is gone."""

    def __init__(self, there=1.0):
        super().__init__()
        self.asked, self.there = [], there

    def forward(self, x):
        x = x.flatten(1)
        self.asked.append(x.detach().item())
        gap = (x - 0.6 if len(self.asked) == 1 else x - x.detach() - 0.2) if self.there else x - 0.6
        return torch.cat([0 * gap, gap], 1)


def test_a_walk_that_misses_goes_on_and_is_pulled_home_by_a_tenth_at_most():
    net = Step()
    boundary_attack(net, torch.full((1, 1, 1, 1), 0.5), torch.tensor([0]), torch.tensor([1]), 0.5, steps=2)
    first, second = net.asked[1], net.asked[-1]
    assert first == pytest.approx(0.5 + 1.05 * 0.1)
    # From there the plane is 0.2 away, from home 0.305: the share of home would be 0.4.
    assert second == pytest.approx(0.9 * (first + 1.05 * 0.2) + 0.1 * (0.5 + 1.05 * 0.305))


def test_a_walk_that_arrived_goes_a_tenth_of_its_way_back():
    net = Step(there=0.0)
    boundary_attack(net, torch.full((1, 1, 1, 1), 0.5), torch.tensor([0]), torch.tensor([1]), 0.5, steps=2)
    assert net.asked[1] == pytest.approx(0.605)
    assert net.asked[2] == pytest.approx(0.5 + 0.9 * 0.105)


@pytest.mark.parametrize("seed", range(3))
def test_projections_onto_a_plane_are_those_of_a_linear_program(seed):
    draws = np.random.default_rng(seed)
    x, w = draws.random((6, 7)), draws.normal(size=(6, 7))
    w[0, :3] = 0.0
    height = draws.normal(size=6)
    moves = nearest_on_plane(*map(torch.tensor, (x, w, height)), (0.0, 1.0)).numpy()
    assert ((x + moves >= -1e-12) & (x + moves <= 1 + 1e-12)).all()
    for row in range(6):
        # min t with -t <= d <= t, bounds on x + d and the plane.
        cost = np.append(np.zeros(7), 1.0)
        both = np.block([[np.eye(7), -np.ones((7, 1))], [-np.eye(7), -np.ones((7, 1))]])
        limits = [*zip(-x[row], 1 - x[row], strict=True), (0, None)]
        best = linprog(cost, both, np.zeros(14), np.append(w[row], 0)[None], [-height[row]], limits)
        if best.success:
            assert abs(moves[row]).max() == pytest.approx(best.fun, abs=1e-9)
            assert height[row] + w[row] @ moves[row] == pytest.approx(0, abs=1e-9)
        else:
            corner = np.where(-height[row] * w[row] > 0, 1, 0)[w[row] != 0]
            np.testing.assert_allclose((x + moves)[row][w[row] != 0], corner, atol=1e-12)


def test_adaptive_steps_climb_no_less_than_fixed_ones(trained):
    net, x, y = trained
    net.eval()

    def loss(moved):
        return F.cross_entropy(net(moved), y, reduction="none")

    fixed = pgd(loss, x, 0.1, steps=40, bounds=(0, 1))
    ours = auto_pgd(lambda moved: (loss(moved), torch.zeros(len(y), dtype=torch.bool)), x, 0.1, steps=40, bounds=(0, 1))
    assert (ours - x).abs().max() <= 0.1 + 1e-6
    assert ours.min() >= 0
    assert ours.max() <= 1
    assert loss(ours).mean() >= loss(fixed).mean() - 1e-3


def one_number_by_auto_pgd(f, slope, x0, start, eps, steps):
    """Where algorithm 1 of Croce and Hein (2020) looks, for one number, in its words."""

    def inside(z):
        return min(max(z, x0 - eps), x0 + eps)

    def sign(z):
        return (z > 0) - (z < 0)

    stops, last, at = [], 0.0, 0.22
    while math.ceil(round(at * steps, 9)) <= steps:
        stops.append(math.ceil(round(at * steps, 9)))
        last, at = at, at + max(at - last - 0.03, 0.06)
    step, points, values, seen = 2 * eps, [start], [f(start)], [start]
    top, where, since, halved_before, top_before = values[0], start, 0, True, values[0]
    for k in range(1, steps + 1):
        now, before = points[-1], points[-2] if k > 1 else points[-1]
        z = inside(now + step * sign(slope(now)))
        momentum = 1.0 if k == 1 else 0.75
        after = inside(now + momentum * (z - now) + (1 - momentum) * (now - before))
        points.append(after)
        seen.append(after)
        values.append(f(after))
        if values[-1] > top:
            top, where = values[-1], after
        if k in stops:
            rises = sum(b > a for a, b in zip(values[since:], values[since + 1 :], strict=False))
            first = rises < 0.75 * (k - since)
            second = not halved_before and top <= top_before
            halved_before, top_before, since = first or second, top, k
            if halved_before:
                step /= 2
                points[-1], values[-1] = where, top
    return where, seen


@pytest.mark.parametrize("steps", [10, 47, 150])
@pytest.mark.parametrize("spikes", [0.0, 2.0])
def test_each_number_moves_as_the_authors_algorithm_has_it(steps, spikes):
    """Over many hills of unequal height, and over a slope with narrow spikes, where it climbs below its best."""
    parts = [(2.0, 0.3, 3.0)] if spikes else [(7.0, 0.3, 1.0), (19.0, 2.0, 0.6), (43.0, 1.0, 0.3)]
    draws = np.random.default_rng(0)
    x, start = draws.uniform(-1, 1, 60), draws.uniform(-0.4, 0.4, 60)
    looked = []

    def value(z, sin, exp):
        spike = exp(-((z * 40 - (z * 40).round() if sin is torch.sin else z * 40 - round(z * 40)) ** 2) / 0.003)
        return sum(size * sin(rate * z + shift) for rate, shift, size in parts) + spikes * spike

    def height(z):
        looked.append(z[:, 0].detach())
        return value(z[:, 0], torch.sin, torch.exp), torch.zeros(60).bool()

    def slope(z):
        at = torch.tensor(z, dtype=torch.float64, requires_grad=True)
        (found,) = torch.autograd.grad(value(at, torch.sin, torch.exp), at)
        return found.item()

    moved = auto_pgd(height, torch.tensor(x)[:, None], 0.4, steps=steps, start=torch.tensor(start)[:, None])
    expected = [
        one_number_by_auto_pgd(lambda z: value(z, math.sin, math.exp), slope, home, home + by, 0.4, steps)
        for home, by in zip(x.tolist(), start.tolist(), strict=True)
    ]
    np.testing.assert_allclose(moved[:, 0].numpy(), [best for best, _ in expected], atol=1e-9)
    np.testing.assert_allclose(torch.stack(looked, 1).numpy(), [seen for _, seen in expected], atol=1e-9)


def test_misclassified_points_are_kept_even_where_others_are_higher():
    def height(z):
        return z[:, 0], (z[:, 0] > 0.2) & (z[:, 0] < 0.4)

    at = auto_pgd(height, torch.zeros(1, 1), 0.5, steps=3, start=torch.full((1, 1), 0.3))
    assert at.item() == pytest.approx(0.3), "the first point was fooled, those after it are not"


def test_nobody_counts_as_robust_whom_plain_ascent_beats(trained):
    net, x, y = trained
    net.train()
    found = auto_attack(net, x, y, 0.08, steps=30, num_queries=200, generator=torch.Generator().manual_seed(0))
    assert net.training
    assert all(p.grad is not None for p in net.parameters())
    net.eval()
    for margin in (False, True):

        def climb(moved, margin=margin):
            logits = net(moved)
            return logit_difference_ratio(logits, y) if margin else F.cross_entropy(logits, y, reduction="none")

        beaten = net(pgd(climb, x, 0.08, steps=50, bounds=(0, 1))).argmax(1) != y
        assert not (beaten & found.robust).any()
    again = auto_attack(net, x, y, 0.08, steps=30, num_queries=200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.adversarial, found.adversarial)


@pytest.mark.parametrize("eps", [0.03, 0.08])
def test_who_withstands_is_whom_torchattacks_finds(eps):
    torchattacks = pytest.importorskip("torchattacks")
    torch.manual_seed(0)
    x = torch.rand(150, 1, 4, 4)
    y = 2 * (x[:, 0, :2].sum((1, 2)) > x[:, 0, 2:].sum((1, 2))) + (x[:, 0, :, :2].sum((1, 2)) > 4)
    y[x[:, 0, 0, 0] > 0.85] = 4  # a targeted loss of theirs needs four classes
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 5))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    net.eval()
    theirs = torchattacks.AutoAttack(net, norm="Linf", eps=eps, version="standard", n_classes=5, seed=0)(x, y)
    withstood = net(theirs).argmax(1) == y
    ours = auto_attack(net, x, y, eps, generator=torch.Generator().manual_seed(0)).robust
    assert 0.05 < withstood.float().mean() < 0.95
    assert (ours == withstood).float().mean() >= 0.99


def test_squares_lower_accuracy_without_gradients(trained):
    net, x, y = trained
    net.eval()
    for p in net.parameters():
        p.requires_grad_(False)
    moved = square_attack(net, x, y, 0.1, num_queries=300, generator=torch.Generator().manual_seed(0))
    assert (moved - x).abs().max() <= 0.1 + 1e-6
    before, after = ((net(at).argmax(1) == y).float().mean() for at in (x, moved))
    assert after < before - 0.1
    wrong = net(x).argmax(1) != y
    stay = square_attack(net, x[wrong], y[wrong], 1e-9, num_queries=50)
    torch.testing.assert_close(stay, x[wrong])


class Stubborn(nn.Module):
    """Answers the first query as it should be, and every later one even more so; keeps what it was asked."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, x):
        self.asked.append(x.clone())
        return torch.tensor([1.0 if len(self.asked) == 1 else 2.0, 0.0]).expand(len(x), -1)


def test_squares_cover_the_share_of_the_image_that_the_authors_schedule_says():
    net, queries = Stubborn(), 200
    x = torch.full((1, 3, 20, 20), 0.5)
    square_attack(net, x, torch.tensor([0]), 0.1, num_queries=queries, generator=torch.Generator().manual_seed(0))
    stripes, *moves = net.asked
    assert (stripes == stripes[:, :, :1]).all()  # the start is vertical stripes
    highest, signs = {}, set()
    for query, moved in enumerate(moves, 1):
        changed = moved != stripes
        rows = changed.any((0, 1, 3)).nonzero()
        if len(rows):
            spent = query / queries
            highest.setdefault(
                sum(spent > at for at in (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)), set()
            ).add(int(rows.max() - rows.min()) + 1)
        colours = [moved[0, channel][changed[0, channel]].unique() for channel in range(3)]
        if all(len(colour) == 1 for colour in colours):
            signs.add(tuple(bool(colour > 0.5) for colour in colours))
    # 80 % of the pixels at first, half of that at each of the marks.
    assert highest == {halved: {max(1, round((0.8 * 0.5**halved * 400) ** 0.5))} for halved in highest}
    assert len(highest) >= 8
    assert len(signs) == 8  # every channel has a sign of its own


def test_checkpoints_come_ever_sooner():
    assert checkpoints(50) == [11, 21, 29, 35, 40, 44, 47, 50]


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_the_ratio_knows_no_scale_nor_offset(classes):
    logits, y = torch.randn(9, classes), torch.arange(9) % classes
    target = (y + 1) % classes
    for aim in (None, target):
        ratio = logit_difference_ratio(logits, y, aim)
        torch.testing.assert_close(logit_difference_ratio(40 * logits + 3, y, aim), ratio, rtol=1e-3, atol=1e-4)
        if aim is None:
            assert torch.equal(ratio > 0, logits.argmax(1) != y)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"eps": 0.0}, "eps must be positive"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"num_targets": 0}, "num_targets must be at least 1"),
        ({"num_queries": 0}, "num_queries must be at least 1"),
        ({"y": torch.tensor([0, 9])}, "y must"),
        ({"x": torch.full((2, 3, 2, 2), torch.nan)}, "x must be finite"),
    ],
)
def test_bad_arguments_are_refused_by_name(linear, changed, message):
    arguments = {"x": torch.rand(2, 3, 2, 2), "y": torch.tensor([0, 1]), "eps": 0.1} | changed
    with pytest.raises(ValueError, match=message):
        auto_attack(linear[0].float(), **arguments)


def test_a_network_that_answers_with_nan_is_no_robust_one() -> None:
    """NaN is the largest of all to argmax, so that class 0 would seem to stand every attack."""

    class Broken(nn.Module):
        def __init__(self, beyond: float) -> None:
            super().__init__()
            self.beyond = beyond

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            own = x.flatten(1).sum(1)
            return torch.stack([own, -own], 1).where(x.flatten(1).amax(1, keepdim=True) <= self.beyond, torch.nan)

    x = torch.full((2, 1, 2, 2), 0.5)
    for beyond in (0.0, 0.5):
        with pytest.raises(ValueError, match="^model must give logits, got NaN"):
            auto_attack(Broken(beyond), x, torch.tensor([0, 0]), 0.1, steps=2, num_queries=3)
