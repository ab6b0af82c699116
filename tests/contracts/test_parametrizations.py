"""What every parametrization keeps: output unchanged at the start, removing it bakes the weights in, save and load.

A new parametrization joins by one line in MEMBERS: how it is put on a network and taken off again.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trimtab.optim import WeightCompander, apply_weight_compander, compander_param_groups, remove_weight_compander


@dataclass(frozen=True)
class Member:
    """A parametrization and its variant.

    Attributes:
        apply: puts it on a network, in place.
        remove: takes it off, in place.
        kind: class of the parametrization.
        groups: makes an optimizer's groups: the network's own parameters (with the weight decay given), then, where
            it has any, the parametrization's.
        own: names of its parameters in each layer.
    """

    apply: Callable[[nn.Module], nn.Module]
    remove: Callable[[nn.Module], nn.Module]
    kind: type[nn.Module]
    groups: Callable[..., list[dict[str, Any]]]
    own: frozenset[str] = field(default_factory=frozenset)


def compander(own: Iterable[str] = (), **options: Any) -> Member:
    return Member(
        apply=lambda net: apply_weight_compander(net, **options),
        remove=remove_weight_compander,
        kind=WeightCompander,
        groups=compander_param_groups,
        own=frozenset(own),
    )


MEMBERS: dict[str, Member] = {
    "WeightCompander": compander(),
    "WeightCompander, given": compander(a=0.7, b=0.3),
    "WeightCompander, learnable": compander(own=["log_a", "log_b"], learnable=True),
    "WeightCompander, compressing": compander(slope=0.7, bound=3.0),
}


class Net(nn.Module):
    """A convolution, attention, normalisation and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm = nn.LayerNorm(6)
        self.first = nn.Linear(6, 12)
        self.head = nn.Linear(12, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv(x).flatten(2).mT
        tokens = self.norm(tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0])
        return self.head(self.first(tokens.mean(1)).relu())


WEIGHTS = ["conv.weight", "attention.out_proj.weight", "first.weight", "head.weight"]


@pytest.fixture(params=MEMBERS.values(), ids=MEMBERS)
def member(request: pytest.FixtureRequest) -> Member:
    return request.param


@pytest.fixture
def base() -> Net:
    return Net()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(7, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def trained(base: Net, member: Member, x: Tensor, steps: int = 3) -> nn.Module:
    model = member.apply(copy.deepcopy(base))
    optimizer = torch.optim.SGD(member.groups(model, weight_decay=0.01), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum(1).mean().backward()
        optimizer.step()
    return model


def test_output_is_unchanged_at_the_start(base: Net, member: Member, x: Tensor) -> None:
    model = copy.deepcopy(base)
    assert member.apply(model) is model
    torch.testing.assert_close(model(x), base(x), atol=1e-6, rtol=1e-5)
    for name in WEIGHTS:
        torch.testing.assert_close(weight(model, name), weight(base, name), atol=1e-6, rtol=1e-5)


def weight(model: nn.Module, name: str) -> Tensor:
    layer, _, parameter = name.rpartition(".")
    return getattr(model.get_submodule(layer), parameter)


def test_every_weight_and_every_parameter_of_its_own_trains(base: Net, member: Member, x: Tensor) -> None:
    model = trained(base, member, x)
    for name in WEIGHTS:
        assert not torch.allclose(weight(model, name), weight(base, name), atol=1e-5), name
    start = dict(member.apply(copy.deepcopy(base)).named_parameters())
    for name, value in model.named_parameters():
        if name.rpartition(".")[2] in member.own:
            assert not torch.equal(value, start[name]), name


def test_groups_hold_each_parameter_once_and_its_own_undecayed(base: Net, member: Member) -> None:
    model = member.apply(base)
    own = {id(p) for part in model.modules() if isinstance(part, member.kind) for p in part.parameters()}
    groups = member.groups(model, weight_decay=0.3)
    assert len(own) == len(WEIGHTS) * len(member.own)
    held = [id(p) for group in groups for p in group["params"]]
    assert len(held) == len(set(held)) == len(list(model.parameters()))
    assert groups[0]["weight_decay"] == 0.3
    assert not own & {id(p) for p in groups[0]["params"]}
    for group in groups[1:]:
        assert group["weight_decay"] == 0
    assert {id(p) for group in groups[1:] for p in group["params"]} == own


def test_removing_changes_nothing_and_leaves_a_plain_model(base: Net, member: Member, x: Tensor) -> None:
    model = trained(base, member, x)
    expected = model(x).detach()
    member.remove(model)
    torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-5)
    assert {type(part) for part in model.modules()} == {type(part) for part in base.modules()}
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in base.named_parameters()}
    assert all(p.requires_grad for p in model.parameters())
    plain = Net()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(x), expected, atol=1e-6, rtol=1e-5)


def test_what_was_removed_is_not_removed_again(base: Net, member: Member, x: Tensor) -> None:
    model = trained(base, member, x)
    member.remove(model)
    expected = model(x)
    with pytest.raises(ValueError, match="module must have a"):
        member.remove(model)
    member.apply(model)
    torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-5)


def test_applying_twice_is_refused_and_changes_nothing(base: Net, member: Member, x: Tensor) -> None:
    model = trained(base, member, x)
    expected, keys = model(x), model.state_dict().keys()
    with pytest.raises(ValueError, match="parametrized already"):
        member.apply(model)
    assert torch.equal(model(x), expected)
    assert model.state_dict().keys() == keys


def test_state_dict_round_trip(base: Net, member: Member, x: Tensor) -> None:
    model = trained(base, member, x)
    held = io.BytesIO()
    torch.save(model.state_dict(), held)
    held.seek(0)
    other = member.apply(Net())
    other.load_state_dict(torch.load(held, weights_only=True))
    assert torch.equal(other(x), model(x))


def test_copies_live_on_their_own(base: Net, member: Member, x: Tensor) -> None:
    model = trained(base, member, x)
    expected, copied = model(x), copy.deepcopy(model)
    member.remove(model)
    torch.testing.assert_close(copied(x), expected)
    with torch.no_grad():
        weight(model, "head.weight").zero_()
    torch.testing.assert_close(copied(x), expected)


def test_assigned_weights_are_taken_over(base: Net, member: Member) -> None:
    model = member.apply(base)
    wanted = 0.05 * torch.randn(5, 12, generator=torch.Generator().manual_seed(2))
    model.head.weight = wanted
    torch.testing.assert_close(model.head.weight.detach(), wanted, atol=1e-6, rtol=1e-5)


def test_autocast_and_half_precision(base: Net, member: Member, x: Tensor) -> None:
    model = member.apply(copy.deepcopy(base))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
        torch.testing.assert_close(model(x), base(x), atol=0.05, rtol=0.05)
    half = copy.deepcopy(base).bfloat16()
    expected = half(x.bfloat16())
    member.apply(half)
    torch.testing.assert_close(half(x.bfloat16()), expected, atol=0.05, rtol=0.05)
    member.remove(half)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_double_precision(base: Net, member: Member, x: Tensor) -> None:
    model = member.apply(copy.deepcopy(base).double())
    torch.testing.assert_close(model(x.double()), copy.deepcopy(base).double()(x.double()))


def test_compiles_in_one_graph(base: Net, member: Member, x: Tensor) -> None:
    model = trained(base, member, x, steps=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), atol=1e-6, rtol=1e-5)


def test_parametrization_alone_can_be_pickled(base: Net, member: Member) -> None:
    model = member.apply(base)
    (part,) = model.head.parametrizations.weight
    again = pickle.loads(pickle.dumps(part))
    latent = model.head.parametrizations.weight.original
    assert torch.equal(again(latent), model.head.weight)
