"""What every sampler keeps: exact where the truth is known, of its order, reproducible, at home with every guidance.

A new sampler joins with one line in MEMBERS.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from trimtab.diffusion import (
    EDM,
    VE,
    AdaptiveGuidance,
    AdaptiveProjectedGuidance,
    AnalyticGMM,
    CFGPlusPlus,
    ClassifierFreeGuidance,
    CountNFE,
    Denoiser,
    Discrete,
    DualFast,
    Flow,
    LayerSkipping,
    SubVP,
    VPCosine,
    VPLinear,
    consistency_sample,
    ddim,
    deis,
    deis_rk,
    dpm_solver,
    euler,
    flow_sample,
    gamma_sampling,
    grids,
    ipndm,
    predict,
    predictor_corrector,
    stochastic_ddim,
    universal_sampler,
)
from trimtab.diffusion.denoiser import reset
from trimtab.diffusion.prediction import PREDICTIONS
from trimtab.diffusion.schedules import NoiseSchedule, per_sample

SCHEDULE = VPLinear(t_min=0.01)


class Member(NamedTuple):
    """A sampler `(denoiser, x, times, generator=...)`: what it costs per step and how fast it converges.

    `exponential` ones solve the ODE's linear part exactly. One that is made for a schedule is run on it, and one that
    takes a plain function instead of a denoiser says what it calls it.
    """

    sample: Callable[..., Tensor]
    order: int
    evaluations: int = 1
    grid: Callable[..., Tensor] = grids.power
    stochastic: bool = False
    exponential: bool = True
    schedule: NoiseSchedule = SCHEDULE
    takes: str = "denoiser"


class Jumps:
    """A denoiser as a trajectory model: straight to what it says, as far as the level aimed at."""

    def __init__(self, denoiser: Any) -> None:
        self.denoiser = denoiser

    schedule = property(lambda self: self.denoiser.schedule)
    prediction = property(lambda self: self.denoiser.prediction)

    def reset(self) -> None:
        reset(self.denoiser)

    def __call__(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return self.denoiser(x, t)

    def jump(self, x: Tensor, t: Tensor, s: Tensor, cond: Any = None) -> Tensor:
        kept = per_sample(s / t, x)
        return kept * x + (1 - kept) * predict(self.denoiser, x, t, "x0")


def by_jumps(denoiser: Any, x: Tensor, times: Tensor, **options: Any) -> Tensor:
    return gamma_sampling(Jumps(denoiser) if hasattr(denoiser, "schedule") else denoiser, x, times, **options)


def by_velocity(denoiser: Any, x: Tensor, times: Tensor, **options: Any) -> Tensor:
    """Nobody tells a denoiser that a run of a plain function starts."""
    reset(denoiser)
    velocity = (lambda x, t, cond: predict(denoiser, x, t, "flow")) if hasattr(denoiser, "schedule") else None
    return flow_sample(velocity, x, times.flip(0), **options)


MEMBERS: dict[str, Member] = {
    "ddim": Member(ddim, order=1),
    "euler": Member(euler, order=1, exponential=False),
    "dpm-solver": Member(dpm_solver, order=2),
    "deis-t0": Member(functools.partial(deis, order=0), order=1),
    "deis-t1": Member(functools.partial(deis, order=1), order=2),
    "deis-t2": Member(functools.partial(deis, order=2), order=3),
    "deis-t3": Member(deis, order=4),
    "deis-rho3": Member(functools.partial(deis, variable="rho"), order=4),
    "deis-log-rho2": Member(functools.partial(deis, order=2, variable="log_rho"), order=3),
    "deis-heun": Member(functools.partial(deis_rk, method="heun"), order=2, evaluations=2, grid=grids.karras),
    "deis-kutta3": Member(deis_rk, order=3, evaluations=3, grid=grids.karras),
    "deis-rk4": Member(functools.partial(deis_rk, method="rk4"), order=4, evaluations=4, grid=grids.karras),
    "reverse-diffusion": Member(functools.partial(predictor_corrector, corrections=0), order=1, stochastic=True),
    "predictor-corrector": Member(
        functools.partial(predictor_corrector, snr=0.05), order=1, evaluations=2, stochastic=True
    ),
    "ipndm": Member(ipndm, order=1, grid=functools.partial(grids.power, p=1.0)),
    "consistency": Member(consistency_sample, order=1, stochastic=True),
    "stochastic-ddim": Member(stochastic_ddim, order=1, stochastic=True),
    "ctm-gamma-0": Member(by_jumps, order=1, grid=grids.karras, schedule=EDM(t_min=0.01, t_max=20.0), takes="model"),
    "ctm-gamma-1": Member(
        functools.partial(by_jumps, gamma=1.0),
        order=1,
        grid=grids.karras,
        stochastic=True,
        schedule=EDM(t_min=0.01, t_max=20.0),
        takes="model",
    ),
    "dcm-flow": Member(
        by_velocity,
        order=1,
        grid=functools.partial(grids.power, p=1.0),
        schedule=Flow(t_min=0.01, t_max=0.999),
        takes="model",
    ),
}
every_sampler = pytest.mark.parametrize("member", MEMBERS.values(), ids=MEMBERS)

MEAN, STD = torch.tensor([[0.5, -1.0]], dtype=torch.float64), 0.6
GAUSSIAN = AnalyticGMM.isotropic(MEAN, STD)
RING = AnalyticGMM.ring(dtype=torch.float64)
# Eight classes at corners of a cube in 16 dimensions: far enough from two that lengths and spreads mean something.
CORNERS = torch.randint(0, 2, (8, 16), generator=torch.Generator().manual_seed(0)) * 1.4 - 0.7
CLASSES = AnalyticGMM.isotropic(CORNERS.double(), std=0.3, labels=torch.arange(8))


def skipping(denoiser: Any, labels: Tensor) -> LayerSkipping:
    """A network with a block that does little, left out of every other evaluation."""
    block = torch.nn.Hardtanh(-1e3, 1e3)
    inner = ClassifierFreeGuidance(denoiser, labels, scale=3.0)
    network = Denoiser(lambda x, t: inner(block(x), t), denoiser.schedule, denoiser.prediction)
    return LayerSkipping(network, [block], [{0}, set()] * 60)


GUIDANCE: dict[str, Callable[[object, Tensor], object]] = {
    "none": lambda denoiser, labels: denoiser,
    "cfg": lambda denoiser, labels: ClassifierFreeGuidance(denoiser, labels, scale=3.0),
    "cfg-rescale": lambda denoiser, labels: ClassifierFreeGuidance(denoiser, labels, scale=3.0, rescale=0.7),
    "dualfast": lambda denoiser, labels: DualFast(ClassifierFreeGuidance(denoiser, labels, scale=3.0)),
    "apg": lambda denoiser, labels: AdaptiveProjectedGuidance(denoiser, labels, scale=3.0),
    "adaptive": lambda denoiser, labels: AdaptiveGuidance(denoiser, labels, scale=3.0),
    "cfgpp": lambda denoiser, labels: CFGPlusPlus(denoiser, labels, scale=1.0),
    "layers-skipped": skipping,
}


def noise(member: Member, count: int, dim: int = 2) -> Tensor:
    return member.schedule.prior(count, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def run(member: Member, denoiser: object, x: Tensor, steps: int, seed: int = 0, **extra: Any) -> Tensor:
    if member.stochastic:
        extra["generator"] = torch.Generator().manual_seed(seed)
    return member.sample(denoiser, x, member.grid(member.schedule, steps), **extra)


def gaussian_solution(member: Member, x: Tensor) -> Tensor:
    """The ODE moves a Gaussian's samples at their number of standard deviations."""
    schedule = member.schedule
    ends = torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64)
    alpha, sigma = schedule.alpha(ends), schedule.sigma(ends)
    spread = torch.sqrt(alpha**2 * STD**2 + sigma**2)
    return alpha[1] * MEAN + spread[1] / spread[0] * (x - alpha[0] * MEAN)


@every_sampler
def test_exact_on_gaussian_data(member: Member) -> None:
    x = run(member, GAUSSIAN.denoiser(member.schedule), noise(member, 64), 200 if member.order > 2 else 400)
    if member.stochastic:
        torch.testing.assert_close(x.mean(0), MEAN[0], atol=0.3, rtol=0)
    else:
        torch.testing.assert_close(
            x, gaussian_solution(member, noise(member, 64)), atol=1e-2 if member.order == 1 else 5e-4, rtol=0
        )


@every_sampler
def test_exact_for_a_single_point(member: Member) -> None:
    """One data point: the noise in x never changes, and any number of steps is exact."""
    if not member.exponential:
        pytest.skip("it does not solve the linear part exactly")
    point = torch.tensor([0.3, -0.7], dtype=torch.float64)
    denoiser = Denoiser(lambda x, t: point.expand_as(x), member.schedule, prediction="x0")
    x = run(member, denoiser, noise(member, 8), 5)
    if member.stochastic:
        torch.testing.assert_close(x, point.expand(8, 2), atol=0.2, rtol=0)
    else:
        first, last = torch.tensor([member.schedule.t_max, member.schedule.t_min], dtype=torch.float64)
        eps = (noise(member, 8) - member.schedule.alpha(first) * point) / member.schedule.sigma(first)
        torch.testing.assert_close(
            x, member.schedule.alpha(last) * point + member.schedule.sigma(last) * eps, rtol=1e-8, atol=1e-8
        )


@every_sampler
def test_order_of_convergence(member: Member) -> None:
    if member.stochastic:
        pytest.skip("its error to the ODE does not vanish")
    exact = gaussian_solution(member, noise(member, 64))
    errors = [
        (run(member, GAUSSIAN.denoiser(member.schedule), noise(member, 64), steps) - exact)
        .square()
        .mean()
        .sqrt()
        .item()
        for steps in (80, 160)
    ]
    # The multistep forms start at order 0, which costs a little of the last order.
    assert math.log2(errors[0] / errors[1]) > member.order - 0.6


@every_sampler
def test_reproducible(member: Member) -> None:
    runs = [run(member, RING.denoiser(member.schedule), noise(member, 8), 6, seed=5) for _ in range(2)]
    assert torch.equal(*runs)
    if member.stochastic:
        assert not torch.equal(runs[0], run(member, RING.denoiser(member.schedule), noise(member, 8), 6, seed=6))


@every_sampler
def test_noise_is_left_as_it_was_and_samples_are_independent(member: Member) -> None:
    x = noise(member, 8)
    out = run(member, RING.denoiser(member.schedule), x, 6)
    assert torch.equal(x, noise(member, 8))
    assert out.shape == x.shape
    if not member.stochastic:
        torch.testing.assert_close(run(member, RING.denoiser(member.schedule), x[2:3], 6), out[2:3])


@every_sampler
def test_evaluations(member: Member) -> None:
    counted = CountNFE(RING.denoiser(member.schedule))
    run(member, counted, noise(member, 2), 6)
    assert counted.count == 6 * member.evaluations


@every_sampler
def test_a_callback_sees_every_step_and_may_replace_the_sample(member: Member) -> None:
    seen: list[tuple[int, float, Tensor]] = []
    times = member.grid(member.schedule, 6)
    out = run(member, RING.denoiser(member.schedule), noise(member, 4), 6, callback=lambda *step: seen.append(step))
    assert [step for step, _, _ in seen] == list(range(6))
    torch.testing.assert_close(torch.tensor([time for _, time, _ in seen], dtype=torch.float64), times[1:])
    assert seen[-1][2] is out
    assert torch.equal(out, run(member, RING.denoiser(member.schedule), noise(member, 4), 6))
    replaced = run(
        member, RING.denoiser(member.schedule), noise(member, 4), 6, callback=lambda step, time, x: torch.zeros_like(x)
    )
    assert bool((replaced == 0).all())
    with pytest.raises(ValueError, match="callback must return None or the shape of x"):
        run(member, RING.denoiser(member.schedule), noise(member, 4), 6, callback=lambda step, time, x: x[:1])


@every_sampler
def test_every_kind_of_prediction_gives_the_same_samples(member: Member) -> None:
    runs = [run(member, RING.denoiser(member.schedule, kind), noise(member, 8), 8) for kind in PREDICTIONS]
    for other in runs[1:]:
        torch.testing.assert_close(other, runs[0], rtol=1e-6, atol=1e-6)


@every_sampler
@pytest.mark.parametrize("guidance", GUIDANCE.values(), ids=GUIDANCE)
def test_composes_with_every_guidance(member: Member, guidance: Callable[[object, Tensor], object]) -> None:
    labels = torch.arange(8).repeat(2)
    guided = guidance(CLASSES.denoiser(member.schedule, "eps"), labels)
    x = run(member, guided, noise(member, 16, dim=16), 30)
    assert bool(torch.isfinite(x).all())
    # A guidance with a memory starts afresh with each run.
    assert torch.equal(run(member, guided, noise(member, 16, dim=16), 30), x)
    if guidance is not GUIDANCE["none"]:
        assert (CLASSES.class_log_posterior(x).argmax(1) == labels).double().mean() > 0.9


@every_sampler
def test_single_precision_and_images(member: Member) -> None:
    denoiser = Denoiser(lambda x, t: x * member.schedule.sigma(t)[:, None, None, None], member.schedule)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    out = run(member, denoiser, x, 10)
    assert out.dtype == torch.float32
    assert out.shape == x.shape
    assert bool(torch.isfinite(out).all())


@every_sampler
def test_bad_input(member: Member) -> None:
    with pytest.raises(TypeError, match=f"{member.takes} must"):
        run(member, torch.nn.Identity(), noise(member, 2), 3)
    with pytest.raises(TypeError, match="x must be floating point"):
        run(member, RING.denoiser(member.schedule), torch.zeros(2, 2, dtype=torch.long), 3)
    with pytest.raises(ValueError, match="times|levels"):
        member.sample(RING.denoiser(member.schedule), noise(member, 2), torch.tensor([0.1, 0.9]))


DISCRETE = Discrete(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0))
# Those that see nothing but noise levels; the others take steps, or extrapolate, in a schedule's own time.
IN_NOISE_LEVELS = [
    "ddim",
    "dpm-solver",
    "deis-t0",
    "deis-rho3",
    "deis-log-rho2",
    "deis-heun",
    "deis-kutta3",
    "deis-rk4",
]


@pytest.mark.parametrize("name", IN_NOISE_LEVELS)
@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_a_schedule_is_a_change_of_variables(name: str, steps: int) -> None:
    """At the same noise levels, samples over alpha are the same on every schedule, whatever is predicted."""
    rho = torch.linspace(20**0.2, 0.05**0.2, steps + 1, dtype=torch.float64) ** 5
    start = rho[0] * torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    schedules = (VPLinear(), SubVP(), VPCosine(), VE(), EDM(), Flow(), DISCRETE)
    for schedule, kind in zip(schedules, itertools.cycle(PREDICTIONS), strict=False):
        times = schedule.t_of_rho(rho)
        alpha = schedule.alpha(times)
        x = MEMBERS[name].sample(RING.denoiser(schedule, kind), alpha[0] * start, times)
        found.append(x / alpha[-1])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-8, atol=1e-8)


# A blind denoiser is not told the level, so that its sampler has no times and no order: the rest it keeps, too.


def blind(y: Tensor, **options: Any) -> Tensor:
    options = {"generator": torch.Generator().manual_seed(0), "step": 0.1} | options
    return universal_sampler(lambda y: 0.3 + 0.01 * (y - 0.3), y, **options).images


def test_a_blind_sampler_is_exact_for_a_single_point() -> None:
    point = torch.tensor([0.3, -0.7], dtype=torch.float64)
    y = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = universal_sampler(lambda y: point.expand_as(y), y, step=0.1).images
    torch.testing.assert_close(made, point.expand(8, 2))


def test_a_blind_sampler_is_reproducible_and_leaves_noise_as_it_was() -> None:
    for shape in ((8, 2), (2, 3, 4, 4)):
        y = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        before = y.clone()
        out = blind(y)
        assert (out.dtype, out.shape) == (y.dtype, y.shape)
        assert torch.equal(y, before)
        assert torch.equal(out, blind(y))
        assert not torch.equal(out, blind(y, generator=torch.Generator().manual_seed(1)))


def test_a_blind_sampler_calls_back_after_every_step() -> None:
    y = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    seen: list[tuple[int, float]] = []
    out = blind(y, callback=lambda step, sigma, y: seen.append((step, sigma)))
    assert torch.equal(out, blind(y))
    assert [step for step, _ in seen] == list(range(len(seen)))
    assert seen[0][1] > 0.3 > seen[-1][1]
    replaced = blind(y, callback=lambda step, sigma, y: torch.full_like(y, 0.3))
    torch.testing.assert_close(replaced, torch.full_like(y, 0.3))
    with pytest.raises(ValueError, match="callback must return None or the shape of x"):
        blind(y, callback=lambda step, sigma, y: y[:1])


def test_bad_input_of_a_blind_sampler() -> None:
    with pytest.raises(TypeError, match="denoiser must be callable"):
        universal_sampler(None, torch.zeros(2, 2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="y must be floating point"):
        blind(torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="y must have shape"):
        blind(torch.zeros(0, 2))
