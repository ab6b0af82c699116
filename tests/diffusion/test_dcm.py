"""DCM: straight-line jumps, the phases and their targets, two experts in one network, and the losses of each stage."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trimtab.diffusion import (
    DCM,
    DualExpert,
    LoRALinear,
    consistency_pair,
    flow_sample,
    phase_jump,
    renoise,
    shifted_levels,
    temporal_coherence_loss,
)
from trimtab.diffusion.dcm.objectives import huber
from trimtab.nets import DenoisingMLP

LEVELS = shifted_levels(10, shift=3.0)
SPLIT = 7
SHAPE = (6, 1, 4, 2)  # batch, channels, frames, pixels


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*(shape or SHAPE), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def network(seed: int = 0, classes: int = 0) -> DenoisingMLP:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = DenoisingMLP(8, classes, hidden=32, blocks=3)
        for layer in (net.outward, *(block.second for block in net.blocks)):
            nn.init.normal_(layer.weight, std=0.3)
    return net.double()


def dual(net: nn.Module | None = None, rank: int = 2) -> DualExpert:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return DualExpert(
            net or network(), float(LEVELS[SPLIT]), [r"blocks\.\d\.(first|second)"], ["outward"], rank
        ).double()


def test_levels() -> None:
    levels = shifted_levels()
    assert len(levels) == 51
    assert abs(float(levels[38]) - 17 * 0.76 / (1 + 16 * 0.76)) < 1e-12
    assert 0.9815 < levels[38] < 0.982  # the release switches at time 981 of 1000
    torch.testing.assert_close(shifted_levels(5, shift=1.0), torch.linspace(0, 1, 6, dtype=torch.float64))


def test_a_jump_along_the_exact_velocity_lands_on_the_exact_point() -> None:
    x0, noise = normal(), normal(seed=1)
    level, end = torch.linspace(0.3, 1, 6).double(), torch.linspace(0.0, 0.4, 6).double()
    at = lambda s: s.view(-1, 1, 1, 1) * noise + (1 - s.view(-1, 1, 1, 1)) * x0
    torch.testing.assert_close(phase_jump(at(level), noise - x0, level, end), at(end))
    torch.testing.assert_close(phase_jump(at(level), noise - x0, level, 0.0), x0)


def test_the_pair_of_a_phase_by_hand() -> None:
    student, target, teacher = network(0), network(1), network(2)
    x0, noise, index, end = normal(), normal(seed=1), torch.tensor([8, 9, 10, 8, 9, 10]), float(LEVELS[SPLIT])
    estimate, wanted = consistency_pair(student, target, teacher, x0, noise, index, LEVELS, end)
    assert not wanted.requires_grad
    for k in range(6):
        s, below = LEVELS[index[k]], LEVELS[index[k] - 1]
        x = (s * noise + (1 - s) * x0)[k : k + 1]
        torch.testing.assert_close(estimate[k : k + 1], x + (end - s) * student(x, s[None]))
        lower = x + (below - s) * teacher(x, s[None])
        torch.testing.assert_close(wanted[k : k + 1], lower + (end - below) * target(lower, below[None]))
    # One step above the phase's end the target is the teacher's step itself.
    assert LEVELS[7] == end
    x = (LEVELS[8] * noise + (1 - LEVELS[8]) * x0)[:1]
    torch.testing.assert_close(wanted[:1], x + (end - LEVELS[8]) * teacher(x, LEVELS[8:9]))


def test_straight_paths_are_a_fixed_point() -> None:
    x0, noise = normal(), normal(seed=1)
    exact = lambda x, t, cond: noise - x0
    estimate, wanted = consistency_pair(exact, exact, exact, x0, noise, torch.arange(1, 7), LEVELS, 0.0)
    torch.testing.assert_close(estimate, x0)
    torch.testing.assert_close(wanted, x0)


def test_huber() -> None:
    a = normal()
    torch.testing.assert_close(huber(a, a + 3e-6, c=1e-3), torch.tensor(9e-12 / 2e-3).double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(huber(a, a + 5, c=1e-3), torch.tensor(4.999).double(), rtol=1e-4, atol=0)


def test_temporal_coherence() -> None:
    still, moving = normal(2, 1, 1, 3).expand(2, 1, 5, 3), normal(2, 1, 5, 3, seed=1)
    assert temporal_coherence_loss(moving + still, moving, lag=2) < 1e-28
    other = normal(2, 1, 5, 3, seed=2)
    gap = other - moving
    expected = (gap[:, :, 2:] - gap[:, :, :-2]).square().mean()
    torch.testing.assert_close(temporal_coherence_loss(other, moving, lag=2), expected)
    torch.testing.assert_close(temporal_coherence_loss(other.mT, moving.mT, lag=2, dim=3), expected)
    # Steady motion of one per frame against none: each difference over two frames is 2.
    ramp = torch.arange(5.0).view(1, 1, 5, 1)
    assert temporal_coherence_loss(ramp, torch.zeros(1, 1, 5, 1), lag=2) == 4.0
    with pytest.raises(ValueError, match="pred must have more than 5 frames"):
        temporal_coherence_loss(moving, moving, lag=5)
    with pytest.raises(ValueError, match="pred must be of shape"):
        temporal_coherence_loss(moving, moving[:, :, :4])


def test_renoise() -> None:
    """At the phase's end nothing changes; above it the marginal is that of a path through the end."""
    y, noise = normal(), normal(seed=1)
    torch.testing.assert_close(renoise(y, noise, torch.full((6,), 0.3, dtype=y.dtype), end=0.3), y)
    torch.testing.assert_close(renoise(y, noise, torch.ones(6).double(), end=0.3), noise)
    level = torch.full((6,), 0.6, dtype=y.dtype)
    torch.testing.assert_close(renoise(y, noise, level, end=0.0), 0.6 * noise + 0.4 * y)


def test_low_rank_layer() -> None:
    base, x = nn.Linear(5, 3).double(), normal(4, 5)
    layer = LoRALinear(base, rank=2, alpha=6.0).double()
    assert torch.equal(layer(x), base(x))
    nn.init.normal_(layer.B)
    torch.testing.assert_close(layer(x), x @ (base.weight + 3.0 * layer.B @ layer.A).T + base.bias)


def test_each_sample_goes_to_its_expert_and_the_split_is_the_details() -> None:
    net = network()
    both, x = dual(net), normal()
    t = torch.tensor([0.1, float(LEVELS[SPLIT]), float(LEVELS[SPLIT]) + 1e-6, 1.0, 0.5, 0.99]).double()
    torch.testing.assert_close(both(x, t), net(x, t))  # before training both say the same
    assert torch.equal(both(x, torch.full_like(t, 0.2)), net(x, torch.full_like(t, 0.2)))
    with torch.no_grad():
        for name, p in both.detail.named_parameters():
            if p.requires_grad and not name.endswith(".A"):
                p.add_(0.1)
    low = torch.tensor([True, True, False, False, True, False])
    found = both(x, t)
    torch.testing.assert_close(found[~low], net(x[~low], t[~low]))
    torch.testing.assert_close(found[low], both.detail(x[low], t[low]))
    assert not torch.isclose(found[low], net(x[low], t[low])).any()
    for row in range(6):
        torch.testing.assert_close(both(x[row : row + 1], t[row : row + 1]), found[row : row + 1])


def test_detail_is_small_and_alone_trains() -> None:
    net = network()
    both = dual(net)
    own = {id(p) for p in both.detail_parameters()}
    assert own == {id(p) for p in both.parameters() if p.requires_grad}
    assert own.isdisjoint(id(p) for p in net.parameters())
    assert 0.05 < both.detail_share() < 0.25
    # The rest is shared, not copied.
    assert both.detail.inward.weight is net.inward.weight
    assert both.detail.blocks[0].first.base.weight is net.blocks[0].first.weight
    assert type(both.detail.outward) is nn.Linear
    before = copy.deepcopy(net.state_dict())
    rule = DCM(both, network(2), "detail", levels=LEVELS, split=SPLIT, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(both.detail_parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        rule.losses(normal())["total"].backward()
        optimizer.step()
    assert all(p.grad is None for p in net.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in both.detail_parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_copies_and_state_dicts_of_two_experts() -> None:
    both = dual()
    with torch.no_grad():
        for p in both.detail_parameters():
            p.normal_()
    x, t = normal(), torch.linspace(0.1, 1, 6).double()
    twin = copy.deepcopy(both)
    assert torch.equal(twin(x, t), both(x, t))
    assert twin.detail.inward.weight is twin.semantic.inward.weight is not both.semantic.inward.weight
    file = io.BytesIO()
    torch.save(both.state_dict(), file)
    file.seek(0)
    other = dual(network(5))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x, t), both(x, t))


def rule(stage: Any = "semantic", seed: int = 0, **options: Any) -> DCM:
    student = network(classes=3) if stage == "semantic" else dual(network(classes=3))
    options = {"levels": LEVELS, "split": SPLIT, "lag": 1, **options}
    return DCM(student, network(2, classes=3), stage, generator=torch.Generator().manual_seed(seed), **options)


COND = torch.arange(6) % 3


def test_stages_train_at_their_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[int]] = {}
    ends = {}

    def spy(student: Any, target: Any, teacher: Any, x0: Tensor, noise: Tensor, index: Tensor, levels: Tensor,
            end: float, cond: Any = None) -> tuple[Tensor, Tensor]:  # fmt: skip
        seen.setdefault(stage, set()).update(index.tolist())
        ends[stage] = end
        return x0, x0

    monkeypatch.setattr("trimtab.diffusion.dcm.rule.consistency_pair", spy)
    for stage in ("semantic", "detail"):
        found = rule(stage)
        for _ in range(40):
            found.losses(normal(), COND)
    assert seen == {"semantic": {8, 9, 10}, "detail": {1, 2, 3, 4, 5, 6, 7}}
    assert ends == {"semantic": float(LEVELS[7]), "detail": 0.0}


def test_losses_of_the_semantic_stage() -> None:
    found = rule(temporal_weight=0.7).losses(normal(), COND)
    torch.testing.assert_close(found["total"], found["consistency"] + 0.7 * found["temporal"])
    estimate, wanted = rule()._pair(normal(), COND)
    torch.testing.assert_close(found["consistency"], huber(estimate, wanted))
    torch.testing.assert_close(found["temporal"], temporal_coherence_loss(estimate, wanted, 1))
    assert set(rule(temporal_weight=0.0).losses(normal().flatten(1), COND)) == {"total", "consistency"}


def test_losses_of_the_detail_stage() -> None:
    critic = nn.Linear(8, 1).double()
    asked: list[Tensor] = []

    def features(x: Tensor, level: Tensor, cond: Any) -> list[Tensor]:
        asked.append(level)
        return [x.flatten(1), 2 * x.flatten(1)]

    options = {"features": features, "adversarial_weight": 0.3}
    plain = rule("detail").losses(normal(), COND)
    matched = rule("detail", **options).losses(normal(), COND)
    torch.testing.assert_close(matched["total"], plain["consistency"] + 0.3 * matched["matching"])
    assert torch.equal(asked[0], asked[1])  # both ends get the same noise
    assert set(asked[0].tolist()) <= set(LEVELS[:SPLIT].tolist())
    found = rule("detail", **options, discriminator=lambda f: [critic(part) for part in f])
    losses = found.losses(normal(), COND)
    torch.testing.assert_close(
        losses["total"], losses["consistency"] + 0.3 * (5 * losses["adversarial"] + losses["matching"])
    )
    critic.zero_grad()
    found.discriminator_loss(normal(), COND).backward()
    assert critic.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in found.student.parameters())


def test_the_target_is_the_student_or_its_average() -> None:
    assert rule().target is not None
    found = rule()
    assert found.target is found.student
    averaged = rule(decay=0.5)
    before = averaged.target.outward.weight.clone()
    with torch.no_grad():
        averaged.student.outward.weight.add_(1.0)
    averaged.update_target()
    torch.testing.assert_close(averaged.target.outward.weight, before + 0.5)


def test_learns_to_jump_as_the_teacher_steps() -> None:
    """Gaussian data of deviation 0.5, whose velocity is known: one jump comes near the teacher's many steps."""
    levels = shifted_levels(8, shift=3.0)

    def teacher(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        s = t.view(-1, 1, 1, 1)
        return (x - (1 - s) * 0.25 / ((1 - s) ** 2 * 0.25 + s**2) * x) / s

    student = network()
    found = DCM(student, teacher, "semantic", levels=levels, split=2, lag=1, temporal_weight=0.1,
                generator=torch.Generator().manual_seed(0))  # fmt: skip
    x = normal(64, 1, 4, 2, seed=4)
    many = flow_sample(teacher, x, levels[2:])

    def error() -> float:
        return float((flow_sample(student, x, levels[[2, 8]]) - many).square().mean())

    before, optimizer = error(), torch.optim.Adam(student.parameters(), lr=3e-3)
    for k in range(80):
        losses = found.losses(0.5 * normal(64, 1, 4, 2, seed=k))
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
    assert error() < 0.1 * before


def test_sampling() -> None:
    x, calls = normal(), []

    def model(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        calls.append(float(t[0]))
        return x

    found = flow_sample(model, x, torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(found, 0.25 * x)
    assert calls == [1.0, 0.5]
    for levels in (LEVELS.flip(0), torch.tensor([0.0]), torch.tensor([-0.1, 1.0])):
        with pytest.raises(ValueError, match="levels must rise"):
            flow_sample(model, x, levels)


def test_refused() -> None:
    with pytest.raises(TypeError, match="x0 must be floating point"):
        rule().losses(torch.zeros(SHAPE, dtype=torch.long))
    found = rule(lag=4)
    state = found.generator.get_state()
    with pytest.raises(ValueError, match="x0 must have more than 4 frames"):
        found.losses(normal())
    assert torch.equal(found.generator.get_state(), state)
    for options, message in (({"split": 10}, "split"), ({"split": 0}, "split"), ({"decay": 1.1}, "decay"),
                             ({"levels": LEVELS.flip(0)}, "levels"), ({"discriminator": lambda f: f}, "features"),
                             ({"temporal_weight": -1.0}, "temporal_weight")):  # fmt: skip
        with pytest.raises(ValueError, match=f"{message} must be"):
            rule(**options)
    with pytest.raises(ValueError, match="stage must be one of"):
        rule("both")
    with pytest.raises(ValueError, match="discriminator must be given"):
        rule("detail").discriminator_loss(normal())
    net = network()
    for lora, own, message in ((["conv.*"], [], "lora"), ([], [], "lora"), (["outward"], ["nothing"], "own")):
        with pytest.raises(ValueError, match=f"{message} must be"):
            DualExpert(net, 0.5, lora, own)
    assert all(p.requires_grad for p in net.parameters())
    with pytest.raises(ValueError, match=r"split must be in \(0, 1\)"):
        DualExpert(net, 1.0, ["outward"])


@pytest.mark.parametrize("index", [0, 5])
def test_a_level_without_one_below_is_refused(index: int) -> None:
    """Below the first would be the last."""

    def net(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return x

    x, levels = torch.randn(2, 3), shifted_levels(4)
    with pytest.raises(ValueError, match=r"index must be in \[1, 5\)"):
        consistency_pair(net, net, net, x, x, torch.full((2,), index), levels, 0.0)
    for end in (1.0, float("nan")):
        with pytest.raises(ValueError, match=r"end must be in \[0, 1\)"):
            renoise(x, x, torch.full((2,), 0.5), end)
