from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from trimtab.finetune import (
    FeatureGate,
    GradientRouting,
    LoRAConfig,
    apply_adapter,
    closed_share,
    feature_gate,
    fold_gates,
    gate_parameters,
    initial_gates,
    insert_gates,
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(norm: bool = False) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6) if norm else nn.ReLU(), nn.Linear(6, 3))


def gated(norm: bool = False) -> nn.Sequential:
    model = network(norm)
    insert_gates(model, ["0"], generator=torch.Generator().manual_seed(1))
    return model


def routing_of(model: nn.Module, **options: object) -> GradientRouting:
    gates = list(gate_parameters(model).values())
    weights = [p for name, p in model.named_parameters() if not name.endswith("feature_gate")]
    return GradientRouting(torch.optim.SGD(gates, lr=0.5), torch.optim.SGD(weights, lr=0.1), model, **options)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_gate_scales_each_channel() -> None:
    x = drawn(2, 3, 4, 5)
    assert torch.equal(feature_gate(x, torch.zeros(3)), x / 2)
    torch.testing.assert_close(feature_gate(x, torch.full((3,), 40.0)), x, atol=1e-6, rtol=0)
    g = torch.tensor([0.0, 40.0, -40.0])
    expected = torch.stack([x[:, 0] / 2, x[:, 1], 0 * x[:, 2]], dim=1)
    torch.testing.assert_close(feature_gate(x, g), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(feature_gate(x.mT.mT.movedim(1, -1), g, -1).movedim(-1, 1), expected, atol=1e-6, rtol=0)
    assert feature_gate(x.bfloat16(), g).dtype == torch.bfloat16


def test_gradient_of_the_gates() -> None:
    x, upstream = drawn(2, 3, 4).double(), drawn(2, 3, 4, seed=1).double()
    g = drawn(3, seed=2).double().requires_grad_(True)
    (feature_gate(x, g) * upstream).sum().backward()
    s = g.detach().sigmoid()
    torch.testing.assert_close(g.grad, (upstream * x).sum((0, 2)) * s * (1 - s))


def test_start() -> None:
    many = initial_gates(10_000, generator=torch.Generator().manual_seed(0))
    assert many.std().item() == pytest.approx(math.sqrt(2 / 10_001), rel=0.03)
    he = initial_gates(2, "he", generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(he, drawn(2))  # std sqrt(2 / 2)
    assert torch.equal(FeatureGate(3, init=4.0).feature_gate.data, torch.full((3,), 4.0))


@pytest.mark.parametrize("init", ["xavier", "he"])
def test_starts_are_as_wide_as_torchs_own_of_a_column(init: str) -> None:
    draws = torch.Generator().manual_seed(0)
    ours = torch.cat([initial_gates(3, init, draws) for _ in range(4000)])
    columns = torch.empty(4000, 3, 1)
    for column in columns:  # a layer from one feature to three
        if init == "xavier":
            nn.init.xavier_normal_(column, generator=draws)
        else:
            nn.init.kaiming_normal_(column, mode="fan_out", generator=draws)
    assert ours.std().item() == pytest.approx(columns.std().item(), rel=0.03)


def test_inserted_gates_act_on_outputs_and_copies_have_their_own() -> None:
    base, model = network(), network()
    (g,) = insert_gates(model, ["0"], init=0.3)
    x = drawn(5, 4)
    expected = base[2]((base[0](x) * torch.sigmoid(torch.tensor(0.3))).relu())
    torch.testing.assert_close(model(x), expected)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].feature_gate.fill_(-40.0)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(other(x), base[2].bias.expand(5, 3), atol=1e-5, rtol=0)
    assert list(gate_parameters(model)) == ["0.feature_gate"]
    assert gate_parameters(model)["0.feature_gate"] is g


def test_gates_on_blocks_and_sequences() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()), nn.Flatten(), nn.Linear(16, 2))
    x = drawn(3, 1, 4, 4)
    inner = model[0](x)
    insert_gates(model, {"0": 4}, init=0.0)
    torch.testing.assert_close(model[0](x), inner / 2)
    with pytest.raises(ValueError, match="gates to fold must be on"):
        fold_gates(model)
    tokens = nn.Sequential(nn.LayerNorm(6))
    insert_gates(tokens, {"0": 6}, dim=-1, init=0.0)
    torch.testing.assert_close(tokens(drawn(2, 5, 6)), nn.LayerNorm(6)(drawn(2, 5, 6)) / 2)


def test_folding_changes_nothing_and_leaves_a_plain_model() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(16, 6), nn.Linear(6, 2))
    plain = copy.deepcopy(model)
    insert_gates(model, ["0", "3"])
    x = drawn(3, 1, 4, 4)
    expected = model(x)
    fold_gates(model)
    torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-5)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(x), expected, atol=1e-6, rtol=1e-5)
    assert not gate_parameters(model)


def test_routing_moves_gates_first_and_the_weights_see_them() -> None:
    model, x = gated(), drawn(8, 4)
    before, seen = snapshot(model), []

    def loss() -> Tensor:
        seen.append(snapshot(model))
        return model(x).square().mean()

    twin = copy.deepcopy(model)
    routing_of(model).step(loss)
    after = snapshot(model)
    assert all(torch.equal(seen[0][name], before[name]) for name in before)
    for name in before:
        is_gate = name.endswith("feature_gate")
        assert torch.equal(seen[1][name], before[name]) != is_gate  # the first pass moves the gates alone
        assert torch.equal(after[name], seen[1][name]) == is_gate  # the second all else
    gate = twin[0].feature_gate
    expected = gate - 0.5 * torch.autograd.grad(twin(x).square().mean(), gate)[0]
    torch.testing.assert_close(after["0.feature_gate"], expected.detach())
    with torch.no_grad():
        gate.copy_(expected)
    (slope,) = torch.autograd.grad(twin(x).square().mean(), twin[0].weight)
    torch.testing.assert_close(after["0.weight"], before["0.weight"] - 0.1 * slope)


def test_losses_of_their_own() -> None:
    model, x = gated(), drawn(8, 4)
    gate = gate_parameters(model)["0.feature_gate"]
    before = gate.detach().clone()
    found = routing_of(model).step(lambda: model(x).square().mean(), lambda: 0.1 * gate.sum())
    torch.testing.assert_close(gate.detach(), before - 0.05)
    assert found["gate"].item() == pytest.approx(0.1 * before.sum().item())
    assert not any(value.requires_grad for value in found.values())


def test_releases_sum_of_both_passes() -> None:
    model, x = gated(), drawn(8, 4)
    clean, twin = copy.deepcopy(model), copy.deepcopy(model)
    (first,) = torch.autograd.grad(twin(x).square().mean(), twin[0].weight)
    routing_of(model, zero_between=False).step(lambda: model(x).square().mean())
    routing_of(clean).step(lambda: clean(x).square().mean())
    torch.testing.assert_close(model[0].weight, clean[0].weight - 0.1 * first)
    assert torch.equal(model[0].feature_gate, clean[0].feature_gate)


def test_clipping() -> None:
    model, x = gated(), 100 * drawn(8, 4)
    before = snapshot(model)
    routing_of(model, clip_gate=1e-3, clip_main=1e-2).step(lambda: model(x).square().mean())
    after = snapshot(model)
    moved = {name: (after[name] - before[name]).norm().item() for name in before}
    assert moved.pop("0.feature_gate") == pytest.approx(0.5 * 1e-3, rel=1e-2)
    assert math.hypot(*moved.values()) == pytest.approx(0.1 * 1e-2, rel=1e-2)


def test_batch_statistics_are_taken_once_a_step() -> None:
    model = gated(norm=True)
    routing_of(model).step(lambda: model(drawn(8, 4)).square().mean())
    assert model[1].num_batches_tracked.item() == 1


def test_optimizers_are_disjoint_and_complete() -> None:
    model = gated()
    gates = list(gate_parameters(model).values())
    sgd = torch.optim.SGD
    with pytest.raises(ValueError, match="opt_gate must have no parameter of opt_main, got 1"):
        GradientRouting(sgd(gates, lr=0.1), sgd(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="opt_main must have every parameter"):
        GradientRouting(sgd(gates, lr=0.1), sgd(model[2].parameters(), lr=0.1), model)
    model[0].weight.requires_grad_(False)
    model[0].bias.requires_grad_(False)
    GradientRouting(sgd(gates, lr=0.1), sgd(model[2].parameters(), lr=0.1), model)


def test_resumes() -> None:
    def build(model: nn.Module) -> GradientRouting:
        gates = list(gate_parameters(model).values())
        weights = [p for name, p in model.named_parameters() if not name.endswith("feature_gate")]
        return GradientRouting(torch.optim.Adam(gates, lr=0.1), torch.optim.Adam(weights, lr=0.1), model)

    first, second = gated(), gated()
    one, other = build(first), build(second)
    for step in range(3):
        one.step(lambda step=step: first(drawn(8, 4, seed=step)).square().mean())
    second.load_state_dict(first.state_dict())
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for routing, model in ((one, first), (other, second)):
        routing.step(lambda model=model: model(drawn(8, 4, seed=9)).square().mean())
    assert torch.equal(first[0].weight, second[0].weight)
    assert torch.equal(first[0].feature_gate, second[0].feature_gate)


def test_closed_share() -> None:
    model = gated()
    with torch.no_grad():
        model[0].feature_gate.copy_(torch.tensor([-5.0, -5.0, 0.0, 1.0, 2.0, 3.0]))
    assert closed_share(model) == pytest.approx(1 / 3)
    with torch.no_grad():
        model[0].feature_gate.copy_(torch.tensor([0.05, 0.099, 0.101, 0.15, 0.2, 0.9]).logit())
    assert closed_share(model) == pytest.approx(1 / 3)
    assert closed_share(model, 0.175) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="model must have gates"):
        closed_share(network())


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="^x must have 3 channels in dimension 1"):
        feature_gate(torch.ones(2, 4), torch.zeros(3))
    with pytest.raises(ValueError, match="^x must have"):
        feature_gate(torch.ones(3), torch.zeros(3), dim=1)
    with pytest.raises(ValueError, match="^init must be one of"):
        FeatureGate(3, init="glorot")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^channels must be at least 1"):
        FeatureGate(0)
    model = gated()
    for wrong in (["2", "0"], ["2", "9"], ["2", "1"]):
        with pytest.raises(ValueError, match="^target_modules must"):
            insert_gates(model, wrong)
    assert list(gate_parameters(model)) == ["0.feature_gate"]
    with pytest.raises(ValueError, match="^clip_main must be positive"):
        routing_of(model, clip_main=0.0)


def test_gates_that_could_not_act_once_are_refused_before_anything_is_drawn() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    for targets in (["0", "0"], ["0", "9"], ["0", "1"]):
        with pytest.raises(ValueError, match="target_modules must"):
            insert_gates(model, targets, generator=generator)
    with pytest.raises(ValueError, match="init must be one of"):
        insert_gates(model, ["0"], init="none", generator=generator)
    assert torch.equal(generator.get_state(), before)
    assert not gate_parameters(model)
    # Attention reads this layer's weight and never calls it.
    with pytest.raises(ValueError, match="that are called, got 'out_proj'"):
        insert_gates(nn.MultiheadAttention(8, 2), ["out_proj"])


def test_folding_refuses_weights_that_are_not_the_layers_own() -> None:
    shared = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    shared[2].weight = shared[0].weight
    adapted = nn.Sequential(nn.Linear(4, 4))
    apply_adapter(adapted, LoRAConfig(r=1, target_modules=["0"]))
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    x = drawn(3, 4)
    for model in (shared, adapted, normed):
        insert_gates(model, ["0"], init=0.5)
        before = model(x)
        with pytest.raises(ValueError, match="plain weights that no other layer shares, got weight of '0'"):
            fold_gates(model)
        assert torch.equal(model(x), before)
