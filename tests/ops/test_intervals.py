from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.ops.intervals import Interval, Linearised, box_around, margin_rows, propagate


def seeded(build: object, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().double().eval()  # type: ignore[operator]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.head = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Linear(4 * 4 + 4, 3)
        self.norm.running_mean.uniform_(-1, 1)
        self.norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(self.norm.weight, -1, 1)  # a negative scale turns the box round

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.first(x)))
        h = h + 0.5 * torch.tanh(self.second(h)) - 1.0
        pooled = F.max_pool2d(h, 2)
        mean = h.mean((2, 3))
        return self.head(torch.cat([pooled.reshape(pooled.size(0), -1), -mean], dim=1))


NETS = {
    "mlp": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 3)
    ),
    "conv": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, padding_mode="circular"),
        nn.LeakyReLU(0.1),
        nn.AvgPool2d(2),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(4, 3),
    ),
    "residual": Residual,
}


def inputs() -> Tensor:
    return torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", NETS)
def test_bounds_hold_at_random_points_and_corners_of_the_box(name: str) -> None:
    net, x = seeded(NETS[name]), inputs()
    box = box_around(x, 0.1)
    out = propagate(net, box)
    generator = torch.Generator().manual_seed(2)
    for k in range(50):
        share = torch.rand(x.shape, generator=generator, dtype=x.dtype)
        share = share.round() if k % 2 else share
        y = net(box.lower + share * (box.upper - box.lower))
        assert (y >= out.lower - 1e-12).all()
        assert (y <= out.upper + 1e-12).all()


@pytest.mark.parametrize("name", NETS)
def test_a_box_without_width_gives_the_network_itself(name: str) -> None:
    net, x = seeded(NETS[name]), inputs()
    out = propagate(net, box_around(x, 0.0))
    torch.testing.assert_close(out.lower, net(x))
    torch.testing.assert_close(out.upper, net(x))


def test_a_linear_layer_is_bounded_exactly() -> None:
    net, x = seeded(lambda: nn.Linear(4, 3)), torch.zeros(1, 4, dtype=torch.float64)
    out = propagate(net, box_around(x, 0.5, None))
    torch.testing.assert_close(out.upper[0], net.bias + 0.5 * net.weight.abs().sum(1))
    torch.testing.assert_close(out.lower[0], net.bias - 0.5 * net.weight.abs().sum(1))


def test_margins_are_merged_with_the_last_layer_and_tighter_for_it() -> None:
    net, x = seeded(NETS["mlp"]), inputs()
    box, spec = box_around(x, 0.1), margin_rows(torch.tensor([0, 2, 1]), 3).double()
    merged = propagate(net, box, spec)
    torch.testing.assert_close(merged.centre.shape, torch.Size([3, 2]))
    apart = propagate(net, box)
    looser = apart.lower.gather(1, torch.tensor([[0], [2], [1]])) - apart.upper
    others = torch.stack([row[[k for k in range(3) if k != y]] for row, y in zip(looser, (0, 2, 1), strict=True)])
    assert (merged.lower > others + 1e-6).all()
    # Behind what is no linear layer the matrix is a layer of its own.
    last = nn.Sequential(net, nn.Sigmoid())
    out = propagate(last, box, spec)
    ends = propagate(last, box)
    expected = ends.affine(lambda c: (spec @ c[..., None])[..., 0], lambda r: (spec.abs() @ r[..., None])[..., 0])
    torch.testing.assert_close(out.lower, expected.lower)
    single = propagate(net[-1], Interval(x[:, 0].flatten(1)[:, :8], x[:, 1].flatten(1)[:, :8] + 1), spec)
    assert single.lower.shape == (3, 2)


def test_one_matrix_serves_all_samples() -> None:
    net, x = seeded(NETS["conv"]), inputs()
    spec = torch.tensor([[1.0, -1.0, 0.0]], dtype=torch.float64)
    one, each = (propagate(net, box_around(x, 0.1), s) for s in (spec, spec.expand(3, 1, 3)))
    torch.testing.assert_close(one.lower, each.lower)


def test_the_linearisation_has_the_networks_values_and_slopes() -> None:
    net, x = seeded(lambda: nn.Sequential(*NETS["mlp"]()[:4], nn.LeakyReLU(0.2), nn.Linear(8, 3))), inputs()
    x.requires_grad_()
    at = propagate(net, Linearised(x, torch.full_like(x, 0.1)))
    torch.testing.assert_close(at.centre, net(x))
    ours, torchs = (torch.autograd.grad(out.square().sum(), x)[0] for out in (at.centre, net(x)))
    torch.testing.assert_close(ours, torchs)
    jacobian = torch.stack([torch.autograd.grad(net(x)[:, k].sum(), x)[0] for k in range(3)], dim=1).flatten(2)
    assert (at.radius + 1e-12 >= 0.1 * jacobian.abs().sum(2)).all()
    with pytest.raises(NotImplementedError, match="another activation"):
        propagate(seeded(NETS["mlp"]), Linearised(x, x))


def test_bounds_have_gradients() -> None:
    net, x = seeded(NETS["residual"]), inputs()[:1]
    assert torch.autograd.gradcheck(lambda a: propagate(net, Interval(a, a + 0.1)).lower, x.requires_grad_())
    propagate(net, box_around(x, 0.1)).upper.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_the_graph_follows_changes_of_the_network() -> None:
    net, x = seeded(NETS["mlp"]), inputs()
    propagate(net, box_around(x, 0.0))
    net[2] = nn.LeakyReLU(0.3)
    torch.testing.assert_close(propagate(net, box_around(x, 0.0)).lower, net(x))


def test_autocast_does_not_narrow_the_bounds() -> None:
    net, x = seeded(NETS["mlp"]).float(), inputs().float()
    expected = propagate(net, box_around(x, 0.1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = propagate(net, box_around(x, 0.1))
    torch.testing.assert_close(out.lower, expected.lower, rtol=0, atol=0)


def test_margin_rows_take_the_target_against_every_other_class() -> None:
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 4, 2, 2])
    found = (margin_rows(targets, 5) @ logits[..., None])[..., 0]
    for row, (z, y) in enumerate(zip(logits, targets, strict=True)):
        torch.testing.assert_close(found[row], z[y] - torch.cat([z[:y], z[y + 1 :]]))


def test_what_is_not_known_is_named() -> None:
    x = inputs()
    with pytest.raises(NotImplementedError, match="Softmax"):
        propagate(nn.Sequential(nn.Flatten(), nn.Softmax(1)), box_around(x, 0.1))
    with pytest.raises(ValueError, match="batch normalisation must be in eval mode"):
        propagate(nn.Sequential(nn.BatchNorm2d(2)).train(), box_around(x.float(), 0.1))
    with pytest.raises(ValueError, match="dropout must be in eval mode"):
        propagate(nn.Sequential(nn.Dropout()).train(), box_around(x, 0.1))
    with pytest.raises(ValueError, match="eps"):
        box_around(x, -0.1)
    with pytest.raises(TypeError, match="x must be floating point"):
        box_around(x.long(), 0.1)

    class Squared(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x

    with pytest.raises(NotImplementedError, match="mul"):
        propagate(Squared(), box_around(x, 0.1))


@pytest.mark.parametrize(
    ("layer", "name"),
    [(nn.ELU(-1.0), "alpha"), (nn.Softplus(threshold=0.1), "threshold"), (nn.LeakyReLU(-0.1), "negative_slope")],
)
def test_an_activation_that_falls_is_refused(layer: nn.Module, name: str) -> None:
    x = torch.tensor([[-1.0, 1.0]])
    with pytest.raises(ValueError, match=f"^{name} must be at least"):
        propagate(layer, box_around(x, 0.5, None))


@pytest.mark.parametrize(
    "layer",
    [nn.ELU(0.5), nn.Softplus(2.0), nn.Softplus(-1.0), nn.Hardtanh(), nn.ReLU6(), nn.AvgPool1d(2), nn.Sigmoid()],
)
def test_bounds_of_single_layers_hold_on_a_grid(layer: nn.Module) -> None:
    values = torch.linspace(-4, 4, 41)
    x = torch.stack(torch.meshgrid(values, values, indexing="ij"), -1).reshape(-1, 2)
    box = propagate(layer, Interval(x[:1].clone() + 1, x[:1].clone() + 5))
    within = x[((x >= -3) & (x <= 1)).all(1)]
    out = layer(within)
    assert (out >= box.lower - 1e-6).all()
    assert (out <= box.upper + 1e-6).all()
    assert torch.allclose(out.amin(0), box.lower[0], atol=1e-6)
    assert torch.allclose(out.amax(0), box.upper[0], atol=1e-6)


class Weighted(nn.Module):
    """A sum with what its module holds beside weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale, self._skip, self.shares = nn.Linear(3, 3), 1.0, True, [1.0]

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x) * self.scale * self.shares[0]
        return h + x if self._skip else h


@pytest.mark.parametrize(("name", "value"), [("scale", 5.0), ("_skip", False), ("shares", [-2.0])])
def test_constants_that_have_changed_since_the_network_was_traced_count(name: str, value: object) -> None:
    net = seeded(Weighted)
    x = torch.rand(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    propagate(net, box_around(x, 0.1))
    if name == "shares":
        net.shares[0] = -2.0
    else:
        setattr(net, name, value)
    at_a_point = propagate(net, box_around(x, 0.0))
    assert torch.allclose(at_a_point.lower, net(x))
    assert torch.allclose(at_a_point.upper, net(x))


class Scaled(nn.Module):
    def __init__(self, method: bool) -> None:
        super().__init__()
        self.method = method

    def forward(self, x: Tensor) -> Tensor:
        return x.add(x, alpha=-3) if self.method else torch.sub(x, 1.0, alpha=2)


@pytest.mark.parametrize("method", [True, False])
def test_a_sum_with_a_factor_is_refused_rather_than_taken_without_it(method: bool) -> None:
    with pytest.raises(NotImplementedError, match="no rule for the function (add|sub) with alpha"):
        propagate(Scaled(method), box_around(torch.rand(1, 2), 0.1))


class Overwriting(nn.Module):
    """Networks that change in place what they use again, or not."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.relu = how, nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        doubled = 2 * x
        if self.how == "layer":
            return self.relu(doubled) + doubled
        if self.how == "function":
            return F.relu(doubled, inplace=True) + doubled
        if self.how == "method":
            doubled.relu_()
            return doubled
        if self.how == "underscore":
            torch.relu_(doubled)
            return doubled
        return self.relu(doubled) + x  # nothing looks at `doubled` again


@pytest.mark.parametrize("how", ["layer", "function", "method", "underscore"])
def test_what_is_overwritten_and_used_again_is_refused_rather_than_bounded_as_it_was(how: str) -> None:
    box = Interval(torch.tensor([[-1.0]]), torch.tensor([[-0.5]]))
    with pytest.raises(NotImplementedError, match="in place"):
        propagate(Overwriting(how), box)


def test_what_is_overwritten_for_good_is_bounded() -> None:
    out = propagate(Overwriting("for good"), Interval(torch.tensor([[-1.0]]), torch.tensor([[0.5]])))
    assert (out.lower.item(), out.upper.item()) == (-1.0, 1.5)


class InPlace(nn.Module):
    """Changes in place what a linear layer gives."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.how = nn.Linear(3, 3), how

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        seen = h.view(-1, 3) if self.how.startswith("seen") else h
        if "+" in self.how:
            h += x
        elif "-" in self.how:
            h -= x
        elif "*" in self.how:
            h *= -2
        else:
            h /= -2
        return seen + h if self.how.endswith("twice") else seen if self.how.startswith("seen") else h


@pytest.mark.parametrize("how", ["+", "-", "*", "/"])
def test_operators_in_place_are_bounded(how: str) -> None:
    net, lower = InPlace(how), torch.rand(64, 3)
    out = propagate(net, Interval(lower, lower + 0.5))
    for corner in (0.0, 0.25, 0.5):
        value = net(lower + corner)
        assert (value >= out.lower - 1e-5).all()
        assert (value <= out.upper + 1e-5).all()
    point = propagate(net, Interval(lower, lower))
    torch.testing.assert_close(point.lower, net(lower.clone()))


@pytest.mark.parametrize("how", [f"{seen}{sign}twice" for seen in ("", "seen") for sign in "+-*/"])
def test_operators_in_place_on_what_is_used_again_are_refused(how: str) -> None:
    with pytest.raises(NotImplementedError, match="in place on what is used again"):
        propagate(InPlace(how), Interval(torch.zeros(2, 3), torch.ones(2, 3)))


def test_a_view_of_what_is_overwritten_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="in place on what is used again"):
        propagate(InPlace("seen+"), Interval(torch.zeros(2, 3), torch.ones(2, 3)))
