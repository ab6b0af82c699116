"""AGD: what adapters are given and add, that the base stays, what is recorded, and that guidance is learned."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trimtab.diffusion import (
    AnalyticGMM,
    ClassifierFreeGuidance,
    CountNFE,
    CrossAttentionAdapter,
    Denoiser,
    DistilledGuidance,
    EDMPreconditioned,
    GuidanceAdapters,
    GuidedTrajectories,
    OffsetAdapter,
    TrajectoryRecorder,
    VPLinear,
    adapt_to_guidance,
    ddim,
    deis_rk,
    grids,
    trajectory_loss,
)
from trimtab.nets import DenoisingMLP

SCHEDULE = VPLinear()
RING = AnalyticGMM.ring(4, dtype=torch.float64)
LABELS = torch.arange(8) % 4
KINDS = ("offset", "cross_attention")
every_kind = pytest.mark.parametrize("kind", KINDS)


class Transformer(nn.Module):
    """Attention over the numbers of a sample, with a class, a time and a batch norm whose statistics must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.time, self.classes = nn.Linear(1, 8), nn.Linear(1, 8), nn.Embedding(5, 8)
        self.attention = nn.ModuleList(nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))
        self.norm, self.dropout, self.leave = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(8, 1)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        cond = torch.full((len(x),), 4) if cond is None else cond
        tokens = self.enter(x[..., None]) + (self.time(t[:, None]) + self.classes(cond))[:, None]
        for layer in self.attention:
            tokens = tokens + layer(tokens, tokens, tokens)[0]
        return self.leave(self.dropout(self.norm(tokens)))[..., 0]


def transformer() -> Transformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Transformer().eval()


def adapted(kind: Any, network: nn.Module | None = None) -> GuidanceAdapters:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers = {"attention.0": 8, "attention.1": 8}
        return adapt_to_guidance(network or transformer(), layers, kind, hidden=8, num_classes=4)


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 4, generator=generator), torch.rand(8, generator=generator), LABELS


def steps(seed: int = 0) -> GuidedTrajectories:
    x, t, cond = batch(seed)
    scale = 1 + 5 * torch.rand(8, generator=torch.Generator().manual_seed(seed))
    return GuidedTrajectories(x, t, cond, scale, x.roll(1, 0))


def trained(model: GuidanceAdapters, count: int = 3) -> GuidanceAdapters:
    optimizer = torch.optim.SGD(model.adapter_parameters(), lr=0.1)
    for k in range(count):
        optimizer.zero_grad()
        trajectory_loss(Denoiser(model, SCHEDULE), steps(k)).backward()
        optimizer.step()
    return model


@every_kind
def test_unchanged_at_the_start_and_when_switched_off(kind: Any) -> None:
    expected = transformer()(*batch())
    model = adapted(kind)
    for scale in (None, 1.0, 4.5, torch.rand(8)):
        assert torch.equal(model(*batch(), scale), expected)
    trained(model)
    assert torch.equal(model(*batch()), expected)
    assert torch.equal(model.network(*batch()), expected)
    assert not torch.allclose(model(*batch(), 4.5), expected)


@every_kind
def test_only_adapters_train_and_all_of_them_do(kind: Any) -> None:
    model = adapted(kind)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in model.adapter_parameters()}
    base = copy.deepcopy(model.network.state_dict())
    first = copy.deepcopy(model.adapter_state_dict())
    model.train()
    trained(model)
    assert all(torch.equal(value, base[name]) for name, value in model.network.state_dict().items())
    assert all(p.grad is None for p in model.network.parameters())
    # Keys shift all scores of a query alike until values differ; everything else must have moved.
    still = [name for name, value in model.adapter_state_dict().items() if torch.equal(value, first[name])]
    buffers = {name for name in first if name.endswith(("frequencies", "phases"))}
    assert set(still) <= buffers


@every_kind
def test_the_network_stays_in_eval_mode(kind: Any) -> None:
    model = adapted(kind).train()
    assert model.residuals.training
    assert not model.network.dropout.training
    assert torch.equal(model(*batch()), model(*batch()))


@every_kind
def test_adapters_alone_are_saved_and_fit_another_checkpoint(kind: Any) -> None:
    model = trained(adapted(kind))
    file = io.BytesIO()
    torch.save(model.adapter_state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert all(name.startswith(("attention.0.", "attention.1.")) for name in state)
    assert sum(v.numel() for v in state.values()) < sum(v.numel() for v in model.state_dict().values())
    other = adapted(kind)
    other.load_adapter_state_dict(state)
    assert torch.equal(other(*batch(), 3.0), model(*batch(), 3.0))
    fine_tuned = transformer()
    with torch.no_grad():
        fine_tuned.leave.bias.add_(1)
    moved = adapted(kind, fine_tuned)
    moved.load_adapter_state_dict(state)
    torch.testing.assert_close(moved(*batch(), 3.0), model(*batch(), 3.0) + 1)


@every_kind
def test_a_refused_state_changes_nothing(kind: Any) -> None:
    model = trained(adapted(kind))
    before, good = copy.deepcopy(model.state_dict()), model.adapter_state_dict()
    last = list(good)[-1]
    doubled = {name: 2 * value for name, value in good.items()}
    for wrong in ({}, {**doubled, "more": torch.zeros(1)}, {**doubled, last: torch.zeros(99)},
                  {name: value for name, value in doubled.items() if name != last}):  # fmt: skip
        with pytest.raises(ValueError, match="state must be of the same adapters"):
            model.load_adapter_state_dict(wrong)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_offset_is_one_vector_for_all_tokens_and_attention_is_not() -> None:
    tokens, scale, t = torch.randn(3, 5, 8), torch.tensor([1.0, 2.0, 5.0]), torch.rand(3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        offset, attention = OffsetAdapter(8, 4), CrossAttentionAdapter(8, 4, heads=2)
    for adapter in (offset, attention):
        nn.init.normal_(adapter.last.weight)
    assert offset(tokens, scale, t).shape == (3, 8)
    assert torch.equal(offset(tokens, scale, t), offset(torch.zeros(3, 5, 8), scale, t))
    found = attention(tokens, scale, t)
    assert found.shape == tokens.shape
    assert not torch.allclose(found[:, 0], found[:, 1])
    torch.testing.assert_close(attention(tokens[:, 2], scale, t), found[:, 2])
    torch.testing.assert_close(attention(tokens.flip(1), scale, t), found.flip(1))


def test_attention_by_hand() -> None:
    """With queries of zero every embedding weighs the same: the output is the mean of the values, projected."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = CrossAttentionAdapter(8, 4, num_classes=3)
    nn.init.normal_(adapter.last.weight)
    nn.init.zeros_(adapter.query.weight)
    scale, t, cond = torch.tensor([2.0, 3.0]), torch.rand(2), torch.tensor([0, 2])
    read = torch.stack(
        [adapter.embeddings.scale(scale), adapter.embeddings.time(t), adapter.embeddings.classes(cond)], dim=1
    )
    expected = adapter.last(adapter.value(read + adapter.positions).mean(1))
    torch.testing.assert_close(adapter(torch.randn(2, 8), scale, t, cond), expected)


def test_scale_time_and_class_each_matter() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapters = OffsetAdapter(8, 4, num_classes=3), CrossAttentionAdapter(8, 4, num_classes=3)
    tokens, scale, t, cond = torch.randn(2, 8), torch.tensor([2.0, 3.0]), torch.rand(2), torch.tensor([0, 2])
    for adapter in adapters:
        nn.init.normal_(adapter.last.weight)
        plain = adapter(tokens, scale, t, cond)
        for changed in ((scale + 1, t, cond), (scale, t + 0.3, cond), (scale, t, cond - 2 + 2 * (cond == 0)),
                        (scale, t, None)):  # fmt: skip
            assert not torch.allclose(adapter(tokens, *changed), plain)


@pytest.mark.parametrize("kind", ["x0", "eps"])
def test_recorded_steps_are_those_of_guided_sampling(kind: Any) -> None:
    denoiser = RING.denoiser(SCHEDULE, kind)
    times = grids.power(SCHEDULE, 5)
    noise = SCHEDULE.prior(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counted = CountNFE(denoiser)
    recorder = TrajectoryRecorder(counted, LABELS, scale=3.0)
    guided = ClassifierFreeGuidance(denoiser, LABELS, scale=3.0)
    x = ddim(recorder, noise, times)
    torch.testing.assert_close(x, ddim(guided, noise, times))
    assert counted.count == 10
    found = recorder.trajectories()
    assert found.x.shape == (40, 2)
    assert torch.equal(found.x[:8], noise)
    for k in range(5):
        rows = found.rows(torch.arange(8 * k, 8 * k + 8))
        assert (rows.t == times[k]).all()
        assert torch.equal(rows.cond, LABELS)
        torch.testing.assert_close(rows.guided, guided(rows.x, rows.t))
    # A new run replaces the last; a scale per sample is each sample's own.
    scales = torch.linspace(1, 5, 8, dtype=torch.float64)
    recorder = TrajectoryRecorder(denoiser, LABELS, scale=scales)
    for _ in range(2):
        deis_rk(recorder, noise, times, method="heun")
    found = recorder.trajectories()
    assert len(found.x) == 80
    one = ClassifierFreeGuidance(denoiser, LABELS, scale=float(scales[3]))
    torch.testing.assert_close(found.guided[3], one(noise, found.t[:8])[3])
    assert len(GuidedTrajectories.joined([found, found]).t) == 160


def test_what_is_recorded_does_not_move_with_the_sampler() -> None:
    denoiser = Denoiser(lambda x, t, cond: x if cond is None else 2 * x, VPLinear())
    recorder = TrajectoryRecorder(denoiser, torch.tensor([0, 1]), 3.0)
    x, t = torch.ones(2, 3), torch.full((2,), 0.5)
    recorder(x, t)
    x.add_(1.0)  # as a sampler that works in place does
    t.sub_(0.1)
    recorder(x, t)
    steps = recorder.trajectories()
    assert steps.x[:, 0].tolist() == [1.0, 1.0, 2.0, 2.0]
    torch.testing.assert_close(steps.t, torch.tensor([0.5, 0.5, 0.4, 0.4]))


def test_loss_is_the_weighted_squared_error() -> None:
    found = steps()
    student = Denoiser(lambda x, t, cond, scale: x + scale[:, None], SCHEDULE)
    error = (found.x + found.scale[:, None] - found.guided).square().mean(1)
    torch.testing.assert_close(trajectory_loss(student, found), error.mean())
    weight = torch.arange(8.0)
    torch.testing.assert_close(trajectory_loss(student, found, weight), (weight * error).mean())
    with pytest.raises(ValueError, match="weight must have shape"):
        trajectory_loss(student, found, weight[:3])


def test_a_base_deaf_to_its_condition_has_nothing_to_distil() -> None:
    class Deaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, t: Tensor, cond: object = None) -> Tensor:
            return self.layer(x)

    student = Denoiser(adapt_to_guidance(Deaf(), {"layer": 4}, hidden=4), SCHEDULE)
    recorder = TrajectoryRecorder(student, LABELS, scale=4.0)
    with torch.no_grad():
        ddim(recorder, SCHEDULE.prior(8, 4), grids.power(SCHEDULE, 4))
        # Equal, but for the rounding of u + w (c - u).
        assert trajectory_loss(student, recorder.trajectories()) < 1e-12


def test_learns_to_guide_at_half_of_the_evaluations() -> None:
    """A little network that knows four classes; adapters on its blocks come nearer to guidance than the base does."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = DenoisingMLP(2, num_classes=4, hidden=32, blocks=2)
        for layer in (net.outward, *(block.second for block in net.blocks)):
            nn.init.normal_(layer.weight, std=0.2)
        model = adapt_to_guidance(net, {"blocks.0": 32, "blocks.1": 32}, hidden=8, num_classes=4)
    student = EDMPreconditioned(model)
    times = grids.karras(student.schedule, 6)
    generator = torch.Generator().manual_seed(0)
    noise = student.schedule.prior(64, 2, generator=generator)
    cond, scale = torch.arange(64) % 4, 1 + 5 * torch.rand(64, generator=generator)
    recorder = TrajectoryRecorder(student, cond, scale)
    wanted = ddim(recorder, noise, times)
    found = recorder.trajectories()
    found = GuidedTrajectories(*(part.detach() for part in found))
    before = float(trajectory_loss(student, found, student.weight(found.t)).detach())
    optimizer = torch.optim.Adam(model.adapter_parameters(), lr=1e-2)
    for _ in range(80):
        loss = trajectory_loss(student, found, student.weight(found.t))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3 * before
    counted = CountNFE(DistilledGuidance(student, cond, scale))
    ours = ddim(counted, noise, times)
    assert counted.count == 6
    plain = ddim(DistilledGuidance(student, cond, torch.ones(64)), noise, times)
    base = ddim(Denoiser(lambda x, t: student(x, t, cond), student.schedule, "x0"), noise, times)
    assert (ours - wanted).square().mean() < 0.3 * (base - wanted).square().mean()
    assert not torch.equal(plain, ours)


def test_refused() -> None:
    with pytest.raises(ValueError, match="kind must be one of"):
        adapted("lora")
    with pytest.raises(ValueError, match="residuals must name layers"):
        adapt_to_guidance(transformer(), {"nowhere": 8})
    with pytest.raises(ValueError, match="hidden must be a multiple of heads"):
        CrossAttentionAdapter(8, 5, heads=2)
    with pytest.raises(ValueError, match="bandwidth must be positive"):
        OffsetAdapter(8, 4, bandwidth=0.0)
    with pytest.raises(ValueError, match="trajectories must be recorded"):
        TrajectoryRecorder(RING.denoiser(SCHEDULE), LABELS, 2.0).trajectories()


@pytest.mark.parametrize(("scale", "error"), [(float("nan"), ValueError), ("2", TypeError), (True, TypeError)])
def test_a_scale_that_is_none_is_refused_at_once(scale, error) -> None:
    model = Denoiser(lambda x, t, *rest: x, VPLinear())
    for rule in (TrajectoryRecorder, DistilledGuidance):
        with pytest.raises(error, match="scale must be"):
            rule(model, torch.arange(2), scale)
