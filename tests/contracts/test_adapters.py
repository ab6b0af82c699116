"""What every adapter keeps: output unchanged at the start, merging changes nothing, only adapters train, save and load.

A new adapter joins by one line in MEMBERS: its config for the given targets.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from trimtab.finetune import (
    AdaptedModel,
    AdapterConfig,
    LoRAConfig,
    MaskTuningConfig,
    SaRAConfig,
    SoMAConfig,
    SORSAConfig,
    apply_adapter,
)
from trimtab.finetune.adapter import low_rank

MEMBERS: dict[str, Callable[[list[str]], AdapterConfig]] = {
    "LoRA": lambda targets: LoRAConfig(r=2, alpha=4.0, target_modules=targets),
    "mask tuning": lambda targets: MaskTuningConfig(init=5.001e-3, target_modules=targets),
    "SaRA": lambda targets: SaRAConfig(quantile=0.5, target_modules=targets),
    "SoMA": lambda targets: SoMAConfig(r=2, target_modules=targets),
    "SoMA, scaled": lambda targets: SoMAConfig(r=3, alpha=6.0, target_modules=targets),
    "SORSA": lambda targets: SORSAConfig(r=2, target_modules=targets),
    "SORSA, scaled": lambda targets: SORSAConfig(r=3, alpha=6.0, target_modules=targets),
}

# Those that large linear layers are computed from.
LOW_RANK = {"LoRA", "SoMA", "SoMA, scaled", "SORSA", "SORSA, scaled"}


class Net(nn.Module):
    """A convolution, attention and linear layers, each of them a target."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.first = nn.Linear(6, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv(x).flatten(2).mT
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.head(self.first(tokens.mean(1)).relu())


TARGETS = ["conv", "attention", "attention.out_proj", "first"]
WEIGHTS = ["conv.weight", "attention.in_proj_weight", "attention.out_proj.weight", "first.weight"]


@pytest.fixture(
    params=[(name, large) for name in MEMBERS for large in (False, True) if not large or name in LOW_RANK],
    ids=lambda param: f"{param[0]}, large" if param[1] else param[0],
)
def config(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AdapterConfig:
    """Every member; those of low rank also with the linear layers computed as only large ones are."""
    name, large = request.param
    monkeypatch.setattr(low_rank, "_is_less_work", lambda weight, rank: large)
    return MEMBERS[name](TARGETS)


@pytest.fixture
def base() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(7, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def trained(base: Net, config: AdapterConfig, x: Tensor, steps: int = 3) -> tuple[Net, AdaptedModel]:
    model = copy.deepcopy(base)
    adapters = apply_adapter(model, config)
    optimizer = torch.optim.SGD(adapters.trainable_parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum(1).mean().backward()
        optimizer.step()
    return model, adapters


def test_output_is_unchanged_at_the_start(base: Net, config: AdapterConfig, x: Tensor) -> None:
    model = copy.deepcopy(base)
    apply_adapter(model, config)
    torch.testing.assert_close(model(x), base(x), atol=1e-5, rtol=0)


def test_only_adapters_train(base: Net, config: AdapterConfig, x: Tensor) -> None:
    model, adapters = trained(base, config, x)
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in adapters.trainable_parameters()}
    assert adapters.num_trainable() == sum(p.numel() for p in model.parameters() if p.requires_grad) > 0
    before, effective = base.state_dict(), {name: model.get_parameter(name) for name in ("head.weight", "head.bias")}
    for name, value in effective.items():
        assert torch.equal(value, before[name])
    for name in WEIGHTS:  # each adapted weight moves, and its frozen base does not
        module, _, parameter = name.rpartition(".")
        layer = model.get_submodule(module)
        assert not torch.allclose(getattr(layer, parameter), before[name], atol=1e-4)
        assert torch.equal(layer.parametrizations[parameter].original, before[name])


def test_every_adapter_tensor_learns(base: Net, config: AdapterConfig, x: Tensor) -> None:
    _, adapters = trained(base, config, x, steps=2)  # LoRA's first factor waits for its second
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters.trainable_parameters())


def test_merge_changes_nothing_and_leaves_a_plain_model(base: Net, config: AdapterConfig, x: Tensor) -> None:
    model, adapters = trained(base, config, x)
    expected = model(x)
    adapters.merge()
    torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-5)
    plain = Net()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(x), expected, atol=1e-6, rtol=1e-5)
    assert {type(m) for m in model.modules()} == {type(m) for m in base.modules()}
    assert all(type(model.get_parameter(name)) is nn.Parameter for name in WEIGHTS)


def test_unmerge_restores_bit_for_bit(base: Net, config: AdapterConfig, x: Tensor) -> None:
    model, adapters = trained(base, config, x)
    state, expected = copy.deepcopy(model.state_dict()), model(x)
    adapters.merge()
    adapters.unmerge()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(x), expected)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in adapters.trainable_parameters()}


def test_merging_twice_warns_and_does_nothing(base: Net, config: AdapterConfig, x: Tensor) -> None:
    model, adapters = trained(base, config, x)
    adapters.merge()
    expected = model(x)
    with pytest.warns(UserWarning, match="merged already"):
        adapters.merge()
    assert torch.equal(model(x), expected)
    adapters.unmerge()
    with pytest.warns(UserWarning, match="not merged"):
        adapters.unmerge()


def test_copies_live_on_their_own(base: Net, config: AdapterConfig, x: Tensor) -> None:
    model, adapters = trained(base, config, x)
    expected, average, copied = model(x), copy.deepcopy(model), copy.deepcopy(adapters)
    adapters.remove(keep_merged=False)
    torch.testing.assert_close(average(x), expected)
    copied.merge()
    torch.testing.assert_close(copied.model(x), expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(model(x), base(x))


@pytest.mark.parametrize("merged", [False, True])
def test_remove_gives_the_base_back(base: Net, config: AdapterConfig, x: Tensor, merged: bool) -> None:
    model, adapters = trained(base, config, x)
    if merged:
        adapters.merge()
    adapters.remove(keep_merged=False)
    assert model.state_dict().keys() == base.state_dict().keys()
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("merged", [False, True])
def test_remove_keeps_what_was_learned(base: Net, config: AdapterConfig, x: Tensor, merged: bool) -> None:
    model, adapters = trained(base, config, x)
    expected = model(x)
    if merged:
        adapters.merge()
    adapters.remove()
    torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-5)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(RuntimeError, match="removed"):
        adapters.merge()


def test_adapters_alone_are_saved_and_loaded(base: Net, config: AdapterConfig, x: Tensor) -> None:
    model, adapters = trained(base, config, x)
    buffer = io.BytesIO()
    torch.save(adapters.adapter_state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert all(any(name.startswith(weight + ".") for weight in WEIGHTS) for name in state["tensors"])
    other = copy.deepcopy(base)
    restored = apply_adapter(other, type(config)(**state["config"]))
    restored.load_adapter_state_dict(state)
    torch.testing.assert_close(other(x), model(x), atol=1e-6, rtol=1e-6)


def test_whole_model_state_dict_round_trip(base: Net, config: AdapterConfig, x: Tensor) -> None:
    model, _ = trained(base, config, x)
    other = Net()
    apply_adapter(other, config)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_state_of_another_adapter_is_refused(base: Net, config: AdapterConfig, x: Tensor) -> None:
    model, adapters = trained(base, config, x)
    expected, state = model(x), adapters.adapter_state_dict()
    name, tensor = next(iter(state["tensors"].items()))
    others = {
        "kind": {**state, "adapter": "Another"},
        "missing": {**state, "tensors": {k: v for k, v in state["tensors"].items() if k != name}},
        "unknown": {**state, "tensors": {**state["tensors"], "stray": tensor}},
        "shape": {**state, "tensors": {**state["tensors"], name: tensor[:1]}},
        "nothing": {},
    }
    for other in others.values():
        with pytest.raises(ValueError, match="state"):
            adapters.load_adapter_state_dict(other)
    assert torch.equal(model(x), expected)
    adapters.merge()
    with pytest.raises(RuntimeError, match="unmerge"):
        adapters.load_adapter_state_dict(state)


def test_applying_twice_is_refused_and_changes_nothing(base: Net, config: AdapterConfig, x: Tensor) -> None:
    model, adapters = trained(base, config, x)
    expected = model(x)
    with pytest.raises(ValueError, match="target_modules must be without parametrizations"):
        apply_adapter(model, config)
    assert torch.equal(model(x), expected)
    assert adapters.trainable_parameters()[0].requires_grad


def test_autocast_and_half_precision(base: Net, config: AdapterConfig, x: Tensor) -> None:
    model = copy.deepcopy(base)
    apply_adapter(model, config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
        torch.testing.assert_close(model(x), base(x), atol=0.05, rtol=0.05)
    half = copy.deepcopy(base).bfloat16()
    expected = half(x.bfloat16())
    adapters = apply_adapter(half, config)
    torch.testing.assert_close(half(x.bfloat16()), expected, atol=0.02, rtol=0.02)
    assert all(p.dtype == torch.float32 for p in adapters.trainable_parameters())
    adapters.merge()
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_compiles_in_one_graph(base: Net, config: AdapterConfig, x: Tensor) -> None:
    torch._dynamo.reset()  # every adapted layer has a class of its own
    model, _ = trained(base, config, x, steps=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), atol=1e-6, rtol=1e-5)


def test_a_refused_state_changes_nothing(base: Net, config: AdapterConfig, x: Tensor) -> None:
    model, adapters = trained(base, config, x)
    good = adapters.adapter_state_dict()
    tensors = good["tensors"]
    last = list(tensors)[-1]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for wrong in (
        {},
        good | {"adapter": "Other"},
        good | {"config": {name: name[1:] for name in good["config"]}},
        good | {"tensors": {name: value + 1 for name, value in tensors.items() if name != last}},
        good | {"tensors": {name: value + 1 for name, value in tensors.items()} | {last: torch.zeros(7)}},
        good | {"tensors": {name: value + 1 for name, value in tensors.items()} | {"more": torch.zeros(7)}},
    ):
        with pytest.raises(ValueError, match="state must"):
            adapters.load_adapter_state_dict(wrong)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
