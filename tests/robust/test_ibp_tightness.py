from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.ops.intervals import box_around, propagate
from trimtab.robust import (
    IBPLoss,
    can_be_propagation_invariant,
    expected_tightness,
    is_propagation_invariant,
    propagation_tightness,
    worst_case_logits,
)


def chain(*weights: list[list[float]] | Tensor, relu: bool = False) -> nn.Sequential:
    """Linear layers without biases, in float64."""
    layers: list[nn.Module] = []
    for weight in weights:
        matrix = torch.as_tensor(weight, dtype=torch.float64)
        layers.append(nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, dtype=torch.float64))
        layers[-1].weight.data.copy_(matrix)
        if relu:
            layers.append(nn.ReLU())
    return nn.Sequential(*(layers[:-1] if relu else layers))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mlp(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)).double()


X = torch.rand(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 3, 1, 1])


def test_one_layer_is_tight() -> None:
    torch.testing.assert_close(
        propagation_tightness(chain(drawn(4, 5)), X, 0.1, Y), torch.ones(6, 3, dtype=torch.float64)
    )


def test_positive_weights_are_tight() -> None:
    net = chain(drawn(7, 5).abs(), drawn(6, 7, seed=1).abs(), drawn(3, 6, seed=2).abs(), relu=True)
    torch.testing.assert_close(propagation_tightness(net, X, 0.1), torch.ones(6, 3, dtype=torch.float64))


def test_rounding_never_leaves_a_ratio_above_one() -> None:
    for seed in range(20):
        net = chain(drawn(40, 30, seed=seed).abs(), drawn(30, 40, seed=seed + 50).abs(), drawn(9, 30).abs()).float()
        x = torch.rand(8, 30, generator=torch.Generator().manual_seed(seed))
        found = propagation_tightness(net, x, 0.1)
        assert (found <= 1).all()
        torch.testing.assert_close(found, torch.ones(8, 9), rtol=1e-5, atol=1e-5)


def test_what_cancels_is_at_the_floor() -> None:
    found = propagation_tightness(chain([[1.0], [1.0]], [[1.0, -1.0]]), X[:, :1] * 0 + 0.5, 0.1)
    torch.testing.assert_close(found, torch.full_like(found, 1e-8 / 0.2))


@pytest.mark.parametrize("relu", ["local", None])
def test_it_is_the_ratio_of_products_of_matrices(relu: str | None) -> None:
    net, radius = mlp(), 0.05
    found = propagation_tightness(net, X, radius, Y, relu=relu, bounds=None)
    for row, (x, y) in enumerate(zip(X, Y, strict=True)):
        first, second, last = (layer.weight.detach() for layer in net[::2])
        on = [(h >= 0).double() for h in (net[0](x), net[2](net[1](net[0](x))))]
        on = on if relu else [torch.ones_like(h) for h in on]
        margins = torch.stack([last[y] - last[k] for k in range(4) if k != y])
        exact = (margins * on[1] @ second * on[0] @ first).abs().sum(1)
        widened = (margins.abs() * on[1] @ second.abs() * on[0] @ first.abs()).sum(1)
        torch.testing.assert_close(found[row], exact / widened)
    assert (found < 0.9).all()


def test_units_at_zero_count_as_active() -> None:
    net = chain([[1.0, -1.0]], [[1.0]], relu=True)
    found = propagation_tightness(net, torch.full((1, 2), 0.5, dtype=torch.float64), 0.1)
    assert found.item() == pytest.approx(1.0)
    dead = propagation_tightness(chain([[-1.0, -1.0]], [[1.0]], relu=True), X[:1, :2] + 0.1, 0.01)
    assert dead.item() == 1.0  # a box without width


def test_neither_radius_nor_the_scale_of_layers_matters() -> None:
    net = chain(drawn(7, 5), drawn(6, 7, seed=1), drawn(3, 6, seed=2), relu=True)
    expected = propagation_tightness(net, X, 0.1, bounds=None)
    torch.testing.assert_close(propagation_tightness(net, X, 1e-3, bounds=None), expected)
    for layer, scale in zip(net[::2], (3.0, 1e-2, 20.0), strict=True):
        layer.weight.data.mul_(scale)
    torch.testing.assert_close(propagation_tightness(net, X, 0.1, bounds=None), expected)


def test_the_box_ends_at_the_bounds() -> None:
    net = chain([[1.0, 0.0], [1.0, 1.0]], [[2.0, -1.0]])  # exact |[1, -1]|, propagated [3, 1]
    x = torch.tensor([[0.5, 1.0]], dtype=torch.float64)
    found = propagation_tightness(net, x, 0.25)  # radii 0.25 and 0.125
    assert found.item() == pytest.approx((0.25 + 0.125) / (0.75 + 0.125))


def test_convolutions_and_normalisation_are_linear_maps() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        conv, norm = nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2)
        norm.running_var.uniform_(0.5, 2.0)
        nn.init.uniform_(norm.weight, -1.0, 1.0)
        net = nn.Sequential(conv, norm, nn.ReLU(), nn.Flatten(), nn.Linear(18, 3)).double()
    x = torch.rand(2, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = propagation_tightness(net, x, 0.1, bounds=None)
    assert net.training  # as it was
    net.eval()
    columns = torch.eye(9, dtype=torch.float64).view(9, 1, 3, 3)
    first = (net[:2](columns) - net[:2](torch.zeros_like(columns[:1]))).flatten(1).T
    for row in range(2):
        on = (net[:2](x[row : row + 1]).flatten() >= 0).double()
        exact = (net[4].weight * on @ first).abs().sum(1)
        torch.testing.assert_close(found[row], (exact / (net[4].weight.abs() * on @ first.abs()).sum(1)).detach())


def test_expected_tightness_has_its_closed_forms() -> None:
    assert expected_tightness(1) == pytest.approx(1.0)
    assert expected_tightness(2) == pytest.approx(math.pi / 4)
    assert expected_tightness(100) == pytest.approx(0.1250185, abs=1e-6)
    assert expected_tightness(10_000) == pytest.approx(math.sqrt(math.pi / 20_000), rel=1e-4)
    assert expected_tightness(100, 4) == pytest.approx(expected_tightness(100) ** 3)
    assert expected_tightness(100, 1) == 1.0


@pytest.mark.parametrize(("width", "depth", "draws"), [(100, 2, 200), (10, 3, 2000), (5, 4, 4000)])
def test_random_networks_have_the_expected_tightness(width: int, depth: int, draws: int) -> None:
    exact, propagated = torch.eye(1, dtype=torch.float64), torch.eye(1, dtype=torch.float64)
    for layer, (rows, columns) in enumerate([*[(1, width)], *[(width, width)] * (depth - 2), (width, 16)]):
        w = drawn(draws, rows, columns, seed=layer)
        exact, propagated = exact @ w, propagated @ w.abs()
    assert (exact.abs().mean() / propagated.mean()).item() == pytest.approx(expected_tightness(width, depth), rel=0.03)


def test_propagation_invariance_is_that_of_signs_along_paths() -> None:
    first, last = drawn(4, 3).abs(), drawn(2, 4, seed=1).abs()
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert is_propagation_invariant([signs[:, None] * first, last * signs])
    assert not is_propagation_invariant([first, last * signs])
    assert is_propagation_invariant([drawn(3, 3)])
    product = last * signs @ first
    assert is_propagation_invariant([product, torch.eye(2, dtype=torch.float64)])


def test_one_output_that_loses_makes_a_network_not_invariant() -> None:
    first = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    assert is_propagation_invariant([first, torch.tensor([[1.0, 0.0]])])
    assert not is_propagation_invariant([first, torch.tensor([[1.0, 0.0], [1.0, 1.0]])])


def test_blocks_with_an_odd_number_of_negative_entries_cannot_be_tight() -> None:
    even = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert can_be_propagation_invariant(even)
    for place in range(4):
        odd = even.abs().clone()
        odd.view(-1)[place] = -1.0
        assert not can_be_propagation_invariant(odd)
        assert not can_be_propagation_invariant(torch.block_diag(odd, torch.ones(1, 2)))
        odd.view(-1)[3 - place] = 0.0
        assert can_be_propagation_invariant(odd)
    # A tight product with all units in use never has such a block.
    signs, rows, columns = drawn(6).sign(), drawn(3, seed=1).sign(), drawn(5, seed=2).sign()
    first, last = drawn(6, 5).abs() * signs[:, None] * columns, drawn(3, 6).abs() * rows[:, None] * signs
    assert is_propagation_invariant([first, last])
    assert can_be_propagation_invariant(last @ first)


def test_worst_case_logits_are_never_exceeded() -> None:
    net = mlp()
    worst = worst_case_logits(net, box_around(X, 0.1), Y, 4)
    assert (worst.gather(1, Y[:, None]) == 0).all()
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        moved = (X + 0.1 * (2 * torch.rand(X.shape, generator=generator, dtype=X.dtype) - 1)).clamp(0, 1)
        logits = net(moved)
        assert (logits - logits.gather(1, Y[:, None]) <= worst + 1e-12).all()


def test_the_loss_without_a_radius_is_cross_entropy() -> None:
    net = mlp()
    plain = F.cross_entropy(net(X), Y)
    torch.testing.assert_close(IBPLoss(0.0)(net, X, Y), plain)
    torch.testing.assert_close(IBPLoss(0.1, kappa=1.0)(net, X, Y), plain)
    loss = IBPLoss(0.1, kappa=0.0)
    loss.set_progress(0.0)
    torch.testing.assert_close(loss(net, X, Y), plain)


@pytest.mark.parametrize(("progress", "risen"), [(0.1, 0.25), (0.4, 1.0), (1.0, 1.0)])
def test_the_radius_rises_and_the_plain_share_falls(progress: float, risen: float) -> None:
    net, loss = mlp(), IBPLoss(0.1, kappa=0.5, ramp=0.4)
    loss.set_progress(progress)
    worst = worst_case_logits(net, box_around(X, 0.1 * risen), Y, 4)
    kappa = 1 - 0.5 * risen
    expected = kappa * F.cross_entropy(net(X), Y) + (1 - kappa) * F.cross_entropy(worst, Y)
    torch.testing.assert_close(loss(net, X, Y), expected, rtol=1e-6, atol=1e-6)


def test_the_loss_trains_a_network_that_is_tighter() -> None:
    net, loss = mlp(), IBPLoss(0.1, ramp=0.1)
    before = propagation_tightness(net, X, 0.1, Y).mean()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for step in range(60):
        loss.set_progress(step / 60)
        optimizer.zero_grad()
        loss(net, X, Y).backward()
        optimizer.step()
    assert propagation_tightness(net, X, 0.1, Y).mean() > 1.5 * before


def test_progress_is_kept_with_the_state() -> None:
    loss, other = IBPLoss(0.1), IBPLoss(0.1)
    loss.set_progress(0.3)
    other.load_state_dict(loss.state_dict())
    torch.testing.assert_close(other(mlp(), X, Y), loss(mlp(), X, Y), rtol=0, atol=0)


def test_bad_arguments_are_refused_by_name() -> None:
    net = mlp()
    state = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="eps"):
        propagation_tightness(net, X, 0.0)
    with pytest.raises(ValueError, match="relu must be one of"):
        propagation_tightness(net, X, 0.1, relu="all")
    with pytest.raises(ValueError, match="targets must be in"):
        propagation_tightness(net, X, 0.1, Y + 1)
    with pytest.raises(ValueError, match="x must"):
        propagation_tightness(net, X[:0], 0.1)
    with pytest.raises(ValueError, match="x must be finite"):
        propagation_tightness(net, X * math.nan, 0.1)
    with pytest.raises(NotImplementedError, match="Softmax"):
        propagation_tightness(nn.Sequential(net, nn.Softmax(1)), X, 0.1)
    for options, name in (({"eps": -1.0}, "eps"), ({"kappa": 2.0}, "kappa"), ({"ramp": 0.0}, "ramp")):
        with pytest.raises(ValueError, match=name):
            IBPLoss(**{"eps": 0.1, **options})
    with pytest.raises(ValueError, match="fraction"):
        IBPLoss(0.1).set_progress(1.5)
    with pytest.raises(ValueError, match="same number of samples"):
        IBPLoss(0.1)(net, X, Y[:-1])
    with pytest.raises(ValueError, match="weights must chain"):
        is_propagation_invariant([drawn(2, 3), drawn(3, 3)])
    with pytest.raises(ValueError, match="weights must hold"):
        is_propagation_invariant([])
    for call in (lambda: expected_tightness(0), lambda: expected_tightness(3, 0)):
        with pytest.raises(ValueError, match="width|depth"):
            call()
    torch.testing.assert_close(net.state_dict(), state, rtol=0, atol=0)


def exact_range(first: nn.Linear, last: nn.Linear, x: Tensor, eps: float) -> tuple[float, float]:
    """The least and the largest output over a box, by a linear program for every pattern of active units."""
    from scipy.optimize import linprog

    w, b, v = (p.detach().numpy() for p in (first.weight, first.bias, last.weight))
    box = [(float(c) - eps, float(c) + eps) for c in x]
    found = []
    for pattern in itertools.product((0.0, 1.0), repeat=len(b)):
        on = torch.tensor(pattern).double().numpy()
        side = 1 - 2 * on  # an active unit is at least 0, the others at most
        slope, offset = (v[0] * on) @ w, float((v[0] * on) @ b + last.bias.detach())
        for sign in (1, -1):
            done = linprog(sign * slope, A_ub=side[:, None] * w, b_ub=-side * b, bounds=box)
            if done.status == 0:
                found.append(sign * done.fun + offset)
    return min(found), max(found)


@pytest.mark.parametrize("eps", [1e-3, 0.5])
def test_an_oracle_of_a_small_network_lies_within_and_is_met_where_no_unit_switches(eps: float) -> None:
    generator = torch.Generator().manual_seed(0)
    first, last = nn.Linear(2, 4).double(), nn.Linear(4, 1).double()
    with torch.no_grad():
        for p in (*first.parameters(), *last.parameters()):
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    net, x = nn.Sequential(first, nn.ReLU(), last), torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    least, largest = exact_range(first, last, x[0], eps)
    box = propagate(net, box_around(x, eps, None))
    assert box.lower.item() <= least + 1e-9
    assert largest - 1e-9 <= box.upper.item()
    if eps < 0.1:
        tight = propagation_tightness(net, x, eps, bounds=None).item()
        assert (largest - least) / (box.upper - box.lower).item() == pytest.approx(tight, rel=1e-6)


def test_parity_with_auto_lirpa() -> None:
    lirpa = pytest.importorskip("auto_LiRPA")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))
    x = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    bounded = lirpa.BoundedModule(net, torch.zeros_like(x))
    inside = lirpa.BoundedTensor(x, lirpa.PerturbationLpNorm(norm=math.inf, eps=0.1))
    lower, upper = bounded.compute_bounds(x=(inside,), method="IBP")
    ours = propagate(net, box_around(x, 0.1, None))
    torch.testing.assert_close(ours.lower, lower, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.upper, upper, atol=1e-6, rtol=0)
