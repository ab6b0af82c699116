"""Guided distillation: both targets in closed form, the rule's stages, and the stochastic sampler's marginals."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trimtab.diffusion import (
    EDM,
    AnalyticGMM,
    ClassifierFreeGuidance,
    CountNFE,
    Denoiser,
    EDMPreconditioned,
    GuidedDistillation,
    ScaleConditioned,
    ScaleEmbedding,
    VPLinear,
    convert,
    ddim,
    grids,
    guidance_matching_loss,
    guided_clean_sample,
    progressive_loss,
    progressive_target,
    stochastic_ddim,
    truncated_snr,
)
from trimtab.nets import DenoisingMLP

RING = AnalyticGMM.ring(4, dtype=torch.float64)
SCHEDULES = {"vp": VPLinear(), "edm": EDM()}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def column(value: float, count: int = 6) -> Tensor:
    return torch.full((count,), value, dtype=torch.float64)


def noisy(count: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class WithScale:
    """An exact denoiser that takes a scale and follows it by classifier-free guidance."""

    def __init__(self, schedule: Any, prediction: Any = "x0") -> None:
        self.inner, self.schedule, self.prediction = RING.denoiser(schedule, prediction), schedule, prediction

    def __call__(self, z: Tensor, t: Tensor, cond: Tensor, scale: Tensor) -> Tensor:
        cond_says, uncond_says = self.inner(z, t, cond), self.inner(z, t)
        return uncond_says + scale[:, None] * (cond_says - uncond_says)


@pytest.mark.parametrize("kind", ["x0", "eps", "v"])
def test_stage_one_target_is_classifier_free_guidance(kind: Any) -> None:
    schedule, cond = VPLinear(), torch.arange(6) % 4
    denoiser = RING.denoiser(schedule, kind)
    z, t = noisy(), column(0.4)
    scale = torch.tensor([1.0, 1.5, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    found = guided_clean_sample(denoiser, z, t, cond, scale)
    for k in range(6):
        one = ClassifierFreeGuidance(denoiser, cond, scale=float(scale[k]))(z, t)
        wanted = convert(one, z, schedule.alpha(t), schedule.sigma(t), kind, "x0")
        torch.testing.assert_close(found[k], wanted[k])


def test_stage_one_vanishes_at_the_guided_model_and_is_positive_elsewhere() -> None:
    schedule, cond = VPLinear(), torch.arange(6) % 4
    exact = RING.denoiser(schedule)
    x0, noise, t = noisy(), noisy(seed=1), column(0.5)
    scale = column(3.0)
    assert guidance_matching_loss(WithScale(schedule), exact, x0, t, noise, cond, scale) < 1e-20
    wrong = guidance_matching_loss(WithScale(schedule), exact, x0, t, noise, cond, scale, uncond=torch.zeros_like(cond))
    assert wrong > 1e-4


def test_weight_is_the_truncated_snr() -> None:
    """A student off by a constant d has the loss mean(omega) d^2."""
    schedule, cond, exact = VPLinear(), torch.arange(6) % 4, WithScale(VPLinear())
    t = torch.linspace(0.05, 0.95, 6, dtype=torch.float64)
    omega = (schedule.alpha(t) / schedule.sigma(t)).square().clamp_min(1)
    torch.testing.assert_close(truncated_snr(schedule, t), omega)
    assert set((omega == 1).tolist()) == {False, True}

    class Off(WithScale):
        def __call__(self, *args: Tensor) -> Tensor:
            return super().__call__(*args) + 0.1

    found = guidance_matching_loss(Off(schedule), exact.inner, noisy(), t, noisy(seed=1), cond, column(2.0))
    torch.testing.assert_close(found, 0.01 * omega.mean())


@every_schedule
@pytest.mark.parametrize("kind", ["x0", "eps", "v"])
def test_one_step_to_the_target_ends_where_two_of_the_teacher_do(schedule: Any, kind: Any) -> None:
    teacher, cond, scale = WithScale(schedule, kind), torch.arange(6) % 4, column(2.5)
    times = grids.karras(schedule, 6)
    z = schedule.prior(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t, middle, end = (column(float(times[i])) for i in (0, 1, 2))
    target = progressive_target(teacher, z, t, middle, end, cond, scale)
    at_scale = Denoiser(lambda x, t: teacher(x, t, cond, scale), schedule, kind)
    two = ddim(at_scale, z, times[:3])
    one = ddim(Denoiser(lambda x, t: target, schedule, "x0"), z, times[[0, 2]])
    torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-8)


def test_target_of_a_constant_teacher_is_its_constant() -> None:
    schedule, point = VPLinear(), torch.tensor([0.3, -0.8], dtype=torch.float64)
    teacher = Denoiser(lambda z, t: point.expand_as(z), schedule, "x0")
    target = progressive_target(teacher, noisy(), column(0.8), column(0.6), column(0.3))
    torch.testing.assert_close(target, point.expand(6, 2))


def test_target_at_the_ends() -> None:
    """Without noise at the end, the target is the end itself; where the middle is the end, the teacher's prediction."""
    schedule = VPLinear(t_min=0.0)
    teacher = RING.denoiser(schedule)
    z, t, middle = noisy(), column(0.6), column(0.3)
    alpha, sigma = schedule.alpha(middle)[:, None], schedule.sigma(middle)[:, None]
    eps = (z - schedule.alpha(t)[:, None] * teacher(z, t)) / schedule.sigma(t)[:, None]
    halfway = alpha * teacher(z, t) + sigma * eps
    torch.testing.assert_close(progressive_target(teacher, z, t, middle, column(0.0)), teacher(halfway, middle))
    torch.testing.assert_close(progressive_target(teacher, z, t, middle, middle), teacher(z, t))


def test_gaussian_data_need_one_step() -> None:
    """Halved without error from many steps to one, the map is the exact one of the ODE."""
    schedule, mean, std = VPLinear(), torch.tensor([[0.4, -0.2]], dtype=torch.float64), 0.5
    times = grids.log_snr(schedule, 256)
    z = schedule.prior(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = AnalyticGMM.isotropic(mean, std).denoiser(schedule)
    x = ddim(exact, z, times)
    ends = times[[0, -1]]
    alpha, sigma = schedule.alpha(ends), schedule.sigma(ends)
    spread = (alpha**2 * std**2 + sigma**2).sqrt()
    torch.testing.assert_close(x, alpha[1] * mean + spread[1] / spread[0] * (z - alpha[0] * mean), atol=0.02, rtol=0)
    ratio = sigma[1] / sigma[0]
    clean = (x - ratio * z) / (alpha[1] - ratio * alpha[0])
    torch.testing.assert_close(ddim(Denoiser(lambda z, t: clean, schedule, "x0"), z, ends), x)


def student_and_teacher() -> tuple[EDMPreconditioned, EDMPreconditioned]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = EDMPreconditioned(DenoisingMLP(2, num_classes=4, hidden=32, blocks=2))
        for layer in (teacher.net.outward, *(block.second for block in teacher.net.blocks)):
            nn.init.normal_(layer.weight, std=0.2)  # both are zero, and deaf to the class, before training
        net = ScaleConditioned(copy.deepcopy(teacher.net), {"noise_level": ScaleEmbedding(32)})
    return EDMPreconditioned(net), teacher


def rule(seed: int = 0, steps: int = 8, **options: Any) -> GuidedDistillation:
    student, teacher = student_and_teacher()
    generator = torch.Generator().manual_seed(seed)
    return GuidedDistillation(student, teacher, grids.karras(EDM(), steps), generator=generator, **options)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return RING.sample(16, generator=generator).float(), torch.arange(16) % 4


def test_at_scale_one_a_copy_of_the_teacher_has_nothing_to_learn() -> None:
    # But for rounding: levels down to 0.002 weigh the squared error by 250,000.
    assert rule(scales=(1.0, 1.0)).loss(*data()) < 1e-6
    assert rule(scales=(3.0, 3.0)).loss(*data()) > 1e-3


def test_no_gradient_reaches_a_teacher_that_could_take_it() -> None:
    class Learned(WithScale):
        def __init__(self) -> None:
            super().__init__(VPLinear())
            self.factor = torch.ones((), dtype=torch.float64, requires_grad=True)

        def __call__(self, z: Tensor, t: Tensor, cond: Any = None, scale: Any = None) -> Tensor:
            plain = self.inner(z, t, cond) if scale is None else super().__call__(z, t, cond, scale)
            return self.factor * plain

    student, teacher, cond, scale = Learned(), Learned(), torch.arange(6) % 4, column(2.0)
    losses = [
        guidance_matching_loss(student, teacher, noisy(), column(0.6), noisy(seed=1), cond, scale),
        progressive_loss(student, teacher, noisy(), column(0.6), column(0.5), column(0.4), noisy(seed=1), cond, scale),
    ]
    for loss in losses:
        ours, theirs = torch.autograd.grad(loss, [student.factor, teacher.factor], allow_unused=True)
        assert ours is not None
        assert theirs is None


def test_stages_and_their_times() -> None:
    found = rule(steps=8)
    torch.testing.assert_close(found.sampling_times, grids.karras(EDM(), 8))
    kept = found.teacher
    found.halve()
    assert found.stage == 2
    assert found.teacher is not kept
    torch.testing.assert_close(found.sampling_times, grids.karras(EDM(), 8)[::2])
    assert all(torch.equal(a, b) for a, b in zip(found.teacher.parameters(), found.student.parameters(), strict=True))
    found.halve()
    found.halve()
    assert len(found.sampling_times) == 2
    with pytest.raises(ValueError, match="even number of steps"):
        found.halve()
    assert found.stage == 4


def test_times_that_are_trained_at() -> None:
    """Deterministic students at the starts of their own steps; stochastic ones wherever the teacher was."""
    found = rule(steps=8)
    times = found.times.float()
    x0 = torch.zeros(2000, 2)
    drawn = found._draw(x0)
    assert times[-1] <= drawn.t.min() < drawn.t.max() <= times[0]
    assert len(drawn.t.unique()) > 1000
    assert 1.0 <= drawn.scale.min() < drawn.scale.max() <= 5.0
    found.halve()
    drawn = found._draw(x0)
    assert sorted(drawn.t.unique().tolist()) == sorted(times[[0, 2, 4, 6]].tolist())
    for ahead, name in ((1, "middle"), (2, "end")):
        at = {float(times[i]): float(times[i + ahead]) for i in (0, 2, 4, 6)}
        assert getattr(drawn, name).tolist() == [at[float(t)] for t in drawn.t]
    found.halve(stochastic=True)
    drawn = found._draw(x0)
    assert sorted(drawn.t.unique().tolist()) == sorted(times[[0, 2, 4, 6]].tolist())
    last = drawn.t == times[6]
    assert (drawn.end[last] == times[8]).all()
    assert (drawn.middle[last] == times[8]).all()
    assert (drawn.end[drawn.t == times[0]] == times[4]).all()
    with pytest.raises(ValueError, match="must be the last"):
        found.halve()


def test_training_brings_the_student_to_its_target() -> None:
    found = rule(scales=(3.0, 3.0), steps=4)
    optimizer = torch.optim.Adam(found.student.parameters(), lr=1e-2)
    for halving in (False, True):
        if halving:
            found.halve()
        losses = []
        for _ in range(50):
            loss = found.loss(*data())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def trained(found: GuidedDistillation, steps: int) -> list[float]:
    optimizer = torch.optim.SGD(found.student.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        loss = found.loss(*data())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_resumes_bit_exactly_and_the_generator_decides() -> None:
    state = torch.random.get_rng_state()
    found = rule()
    trained(found, 2)
    found.halve()
    trained(found, 2)
    file = io.BytesIO()
    torch.save(found.state_dict(), file)
    file.seek(0)
    again = rule(seed=5)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(again.sampling_times, found.sampling_times)
    assert trained(again, 3) == trained(found, 3)
    assert trained(rule(), 2) == trained(rule(), 2) != trained(rule(seed=1), 2)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_refused_calls_change_nothing() -> None:
    found = rule()
    x0, cond = data()
    state = found.generator.get_state()
    with pytest.raises(TypeError, match="x0 must be floating point"):
        found.loss(x0.long(), cond)
    assert torch.equal(found.generator.get_state(), state)
    with pytest.raises(TypeError, match="student must be a torch"):
        GuidedDistillation(lambda *args: None, found.teacher, found.times)
    with pytest.raises(ValueError, match="scales must be two rising numbers"):
        rule(scales=(5.0, 1.0))
    with pytest.raises(ValueError, match="times must be"):
        GuidedDistillation(found.student, found.teacher, found.times.flip(0))
    for loss in (
        lambda noise: guidance_matching_loss(found.student, found.teacher, x0, x0[:, 0], noise, cond, x0[:, 0]),
        lambda noise: progressive_loss(found.student, found.student, x0, *3 * [x0[:, 0]], noise, cond, x0[:, 0]),
    ):
        with pytest.raises(ValueError, match="noise must be of shape"):
            loss(x0[:3])


@every_schedule
def test_noise_put_back_keeps_the_marginal(schedule: Any) -> None:
    """On standard data whose denoiser is exact, states have the spread that the schedule says, at every step."""
    std = 0.5
    exact = AnalyticGMM.isotropic(torch.zeros(1, 2, dtype=torch.float64), std).denoiser(schedule)
    times, seen = grids.karras(schedule, 200), {}
    x = torch.randn(4000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first = times[0]
    x = x * (schedule.alpha(first) ** 2 * std**2 + schedule.sigma(first) ** 2).sqrt()
    stochastic_ddim(exact, x, times, generator=torch.Generator().manual_seed(1),
                    callback=lambda step, time, x: seen.update({time: float(x.std())}))  # fmt: skip
    for time in (float(times[50]), float(times[120]), float(times[200])):
        t = torch.tensor(time, dtype=torch.float64)
        wanted = float((schedule.alpha(t) ** 2 * std**2 + schedule.sigma(t) ** 2).sqrt())
        assert abs(seen[time] / wanted - 1) < 0.05


def test_stochastic_steps_by_hand() -> None:
    """Two steps of the sampler on VP: down over two lengths, up by one with variance (1 - e^(l_s - l_k)) sigma_s^2."""
    schedule, times = VPLinear(), torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)
    denoiser = RING.denoiser(schedule)
    z = noisy()
    counted = CountNFE(denoiser)
    found = stochastic_ddim(counted, z, times, generator=torch.Generator().manual_seed(4))
    assert counted.count == 2
    generator = torch.Generator().manual_seed(4)
    low = ddim(denoiser, z, times[[0, 2]])
    variance = (1 - (schedule.log_snr(times[1]) - schedule.log_snr(times[2])).exp()) * schedule.sigma(times[1]) ** 2
    up = schedule.alpha(times[1]) / schedule.alpha(times[2]) * low
    up = up + variance.sqrt() * torch.randn(6, 2, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(found, ddim(denoiser, up, times[[1, 2]]))
