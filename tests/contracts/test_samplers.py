"""What every sampler keeps: exact where the truth is known, of its order, reproducible, at home with every guidance.

A new sampler joins with one line in MEMBERS.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from trimtab.diffusion import (
    AdaptiveGuidance,
    AdaptiveProjectedGuidance,
    AnalyticGMM,
    CFGPlusPlus,
    ClassifierFreeGuidance,
    CountNFE,
    Denoiser,
    DualFast,
    VPLinear,
    consistency_sample,
    ddim,
    deis,
    deis_rk,
    dpm_solver,
    euler,
    grids,
    ipndm,
    predictor_corrector,
    stochastic_ddim,
)
from trimtab.diffusion.prediction import PREDICTIONS


class Member(NamedTuple):
    """A sampler `(denoiser, x, times, generator=...)`: what it costs per step and how fast it converges.

    `exponential` ones solve the ODE's linear part exactly.
    """

    sample: Callable[..., Tensor]
    order: int
    evaluations: int = 1
    grid: Callable[..., Tensor] = grids.power
    stochastic: bool = False
    exponential: bool = True


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
}
every_sampler = pytest.mark.parametrize("member", MEMBERS.values(), ids=MEMBERS)

SCHEDULE = VPLinear(t_min=0.01)
MEAN, STD = torch.tensor([[0.5, -1.0]], dtype=torch.float64), 0.6
GAUSSIAN = AnalyticGMM.isotropic(MEAN, STD)
RING = AnalyticGMM.ring(dtype=torch.float64)
# Eight classes at corners of a cube in 16 dimensions: far enough from two that lengths and spreads mean something.
CORNERS = torch.randint(0, 2, (8, 16), generator=torch.Generator().manual_seed(0)) * 1.4 - 0.7
CLASSES = AnalyticGMM.isotropic(CORNERS.double(), std=0.3, labels=torch.arange(8))
GUIDANCE: dict[str, Callable[[object, Tensor], object]] = {
    "none": lambda denoiser, labels: denoiser,
    "cfg": lambda denoiser, labels: ClassifierFreeGuidance(denoiser, labels, scale=3.0),
    "cfg-rescale": lambda denoiser, labels: ClassifierFreeGuidance(denoiser, labels, scale=3.0, rescale=0.7),
    "dualfast": lambda denoiser, labels: DualFast(ClassifierFreeGuidance(denoiser, labels, scale=3.0)),
    "apg": lambda denoiser, labels: AdaptiveProjectedGuidance(denoiser, labels, scale=3.0),
    "adaptive": lambda denoiser, labels: AdaptiveGuidance(denoiser, labels, scale=3.0),
    "cfgpp": lambda denoiser, labels: CFGPlusPlus(denoiser, labels, scale=1.0),
}


def noise(count: int, dim: int = 2) -> Tensor:
    return SCHEDULE.prior(count, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def run(member: Member, denoiser: object, x: Tensor, steps: int, seed: int = 0, **extra: Any) -> Tensor:
    if member.stochastic:
        extra["generator"] = torch.Generator().manual_seed(seed)
    return member.sample(denoiser, x, member.grid(SCHEDULE, steps), **extra)


def gaussian_solution(x: Tensor) -> Tensor:
    """The ODE moves a Gaussian's samples at their number of standard deviations."""
    ends = torch.tensor([SCHEDULE.t_max, SCHEDULE.t_min], dtype=torch.float64)
    alpha, sigma = SCHEDULE.alpha(ends), SCHEDULE.sigma(ends)
    spread = torch.sqrt(alpha**2 * STD**2 + sigma**2)
    return alpha[1] * MEAN + spread[1] / spread[0] * (x - alpha[0] * MEAN)


@every_sampler
def test_exact_on_gaussian_data(member: Member) -> None:
    x = run(member, GAUSSIAN.denoiser(SCHEDULE), noise(64), 200 if member.order > 2 else 400)
    if member.stochastic:
        torch.testing.assert_close(x.mean(0), MEAN[0], atol=0.3, rtol=0)
    else:
        torch.testing.assert_close(x, gaussian_solution(noise(64)), atol=1e-2 if member.order == 1 else 5e-4, rtol=0)


@every_sampler
def test_exact_for_a_single_point(member: Member) -> None:
    """One data point: the noise in x never changes, and any number of steps is exact."""
    if not member.exponential:
        pytest.skip("it does not solve the linear part exactly")
    point = torch.tensor([0.3, -0.7], dtype=torch.float64)
    denoiser = Denoiser(lambda x, t: point.expand_as(x), SCHEDULE, prediction="x0")
    x = run(member, denoiser, noise(8), 5)
    if member.stochastic:
        torch.testing.assert_close(x, point.expand(8, 2), atol=0.2, rtol=0)
    else:
        first, last = torch.tensor([SCHEDULE.t_max, SCHEDULE.t_min], dtype=torch.float64)
        eps = (noise(8) - SCHEDULE.alpha(first) * point) / SCHEDULE.sigma(first)
        torch.testing.assert_close(x, SCHEDULE.alpha(last) * point + SCHEDULE.sigma(last) * eps, rtol=1e-8, atol=1e-8)


@every_sampler
def test_order_of_convergence(member: Member) -> None:
    if member.stochastic:
        pytest.skip("its error to the ODE does not vanish")
    exact = gaussian_solution(noise(64))
    errors = [
        (run(member, GAUSSIAN.denoiser(SCHEDULE), noise(64), steps) - exact).square().mean().sqrt().item()
        for steps in (80, 160)
    ]
    # The multistep forms start at order 0, which costs a little of the last order.
    assert math.log2(errors[0] / errors[1]) > member.order - 0.6


@every_sampler
def test_reproducible(member: Member) -> None:
    runs = [run(member, RING.denoiser(SCHEDULE), noise(8), 6, seed=5) for _ in range(2)]
    assert torch.equal(*runs)
    if member.stochastic:
        assert not torch.equal(runs[0], run(member, RING.denoiser(SCHEDULE), noise(8), 6, seed=6))


@every_sampler
def test_noise_is_left_as_it_was_and_samples_are_independent(member: Member) -> None:
    x = noise(8)
    out = run(member, RING.denoiser(SCHEDULE), x, 6)
    assert torch.equal(x, noise(8))
    assert out.shape == x.shape
    if not member.stochastic:
        torch.testing.assert_close(run(member, RING.denoiser(SCHEDULE), x[2:3], 6), out[2:3])


@every_sampler
def test_evaluations(member: Member) -> None:
    counted = CountNFE(RING.denoiser(SCHEDULE))
    run(member, counted, noise(2), 6)
    assert counted.count == 6 * member.evaluations


@every_sampler
def test_a_callback_sees_every_step_and_may_replace_the_sample(member: Member) -> None:
    seen: list[tuple[int, float, Tensor]] = []
    times = member.grid(SCHEDULE, 6)
    out = run(member, RING.denoiser(SCHEDULE), noise(4), 6, callback=lambda *step: seen.append(step))
    assert [step for step, _, _ in seen] == list(range(6))
    torch.testing.assert_close(torch.tensor([time for _, time, _ in seen], dtype=torch.float64), times[1:])
    assert seen[-1][2] is out
    assert torch.equal(out, run(member, RING.denoiser(SCHEDULE), noise(4), 6))
    replaced = run(member, RING.denoiser(SCHEDULE), noise(4), 6, callback=lambda step, time, x: torch.zeros_like(x))
    assert bool((replaced == 0).all())
    with pytest.raises(ValueError, match="callback must return None or the shape of x"):
        run(member, RING.denoiser(SCHEDULE), noise(4), 6, callback=lambda step, time, x: x[:1])


@every_sampler
def test_every_kind_of_prediction_gives_the_same_samples(member: Member) -> None:
    runs = [run(member, RING.denoiser(SCHEDULE, kind), noise(8), 8) for kind in PREDICTIONS]
    for other in runs[1:]:
        torch.testing.assert_close(other, runs[0], rtol=1e-6, atol=1e-6)


@every_sampler
@pytest.mark.parametrize("guidance", GUIDANCE.values(), ids=GUIDANCE)
def test_composes_with_every_guidance(member: Member, guidance: Callable[[object, Tensor], object]) -> None:
    labels = torch.arange(8).repeat(2)
    guided = guidance(CLASSES.denoiser(SCHEDULE, "eps"), labels)
    x = run(member, guided, noise(16, dim=16), 30)
    assert bool(torch.isfinite(x).all())
    # A guidance with a memory starts afresh with each run.
    assert torch.equal(run(member, guided, noise(16, dim=16), 30), x)
    if guidance is not GUIDANCE["none"]:
        assert (CLASSES.class_log_posterior(x).argmax(1) == labels).double().mean() > 0.9


@every_sampler
def test_single_precision_and_images(member: Member) -> None:
    denoiser = Denoiser(lambda x, t: x * SCHEDULE.sigma(t)[:, None, None, None], SCHEDULE)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    out = run(member, denoiser, x, 10)
    assert out.dtype == torch.float32
    assert out.shape == x.shape
    assert bool(torch.isfinite(out).all())


@every_sampler
def test_bad_input(member: Member) -> None:
    with pytest.raises(TypeError, match="denoiser"):
        run(member, torch.nn.Identity(), noise(2), 3)
    with pytest.raises(TypeError, match="x must be floating point"):
        run(member, RING.denoiser(SCHEDULE), torch.zeros(2, 2, dtype=torch.long), 3)
    with pytest.raises(ValueError, match="times"):
        member.sample(RING.denoiser(SCHEDULE), noise(2), torch.tensor([0.1, 0.9]))
