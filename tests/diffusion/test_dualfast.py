"""DualFast: the rule, where it changes nothing, and what it repairs; the two errors told apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.diffusion import (
    AnalyticGMM,
    CountNFE,
    Denoiser,
    DualFast,
    VPLinear,
    compensate,
    ddim,
    degrade,
    dpm_solver,
    error_decomposition,
    grids,
)
from trimtab.diffusion.denoiser import Split
from trimtab.diffusion.prediction import PREDICTIONS

SCHEDULE = VPLinear()
RING = AnalyticGMM.ring(dtype=torch.float64)
TIMES = grids.power(SCHEDULE, 5, p=1)


def noise(count: int = 16) -> Tensor:
    return SCHEDULE.prior(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def at(value: float, count: int = 16) -> Tensor:
    return torch.full((count,), value, dtype=torch.float64)


def test_the_rule() -> None:
    eps, reference = torch.tensor([[3.0, -1.0]]), torch.tensor([[1.0, 1.0]])
    assert compensate(eps, reference, 0.5).tolist() == [[4.0, -2.0]]
    assert torch.equal(compensate(eps, reference, 0.0), eps)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_off_is_exactly_the_model(kind) -> None:
    model = RING.denoiser(SCHEDULE, kind)
    assert torch.equal(ddim(DualFast(model, 0.0), noise(), TIMES), ddim(model, noise(), TIMES))


def test_the_first_step_is_the_model_and_costs_do_not_change() -> None:
    seen: list[list[Tensor]] = [[], []]
    counted = CountNFE(RING.denoiser(SCHEDULE))
    for model, held in ((counted, seen[0]), (DualFast(counted), seen[1])):
        ddim(model, noise(), TIMES, callback=lambda step, time, x, held=held: held.append(x))
        assert counted.count == 5
    assert torch.equal(seen[0][0], seen[1][0])
    assert not torch.equal(seen[0][1], seen[1][1])


@pytest.mark.parametrize("growth", ["growing", "constant"])
def test_how_c_grows(growth) -> None:
    """A model that says 0 at first and 1 later: what comes out is 1 + c_t."""
    first = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        first.append(0)
        return torch.zeros_like(x) if len(first) == 1 else torch.ones_like(x)

    wrapped = DualFast(Denoiser(model, SCHEDULE), 0.4, growth=growth)
    out = [wrapped(noise(), at(t)).unique() for t in (1.0, 0.9, 0.5, SCHEDULE.t_min)]
    c = torch.stack(out)[:, 0] - 1
    assert c[0] == -1  # the first prediction is the model's
    expected = (1 - torch.tensor([0.9, 0.5, SCHEDULE.t_min], dtype=torch.float64)) / (1 - SCHEDULE.t_min)
    torch.testing.assert_close(c[1:], 0.4 * expected if growth == "growing" else torch.full_like(expected, 0.4))


def test_a_step_is_affine_in_c() -> None:
    def sample(c: float) -> Tensor:
        wrapped = DualFast(RING.denoiser(SCHEDULE, "eps"), c, growth="constant")
        wrapped(noise(), at(1.0))
        return wrapped(0.5 * noise(), at(0.4))

    torch.testing.assert_close(sample(0.2) - sample(0.0), (sample(0.8) - sample(0.0)) / 4)


def test_nothing_changes_where_the_noise_never_does() -> None:
    """One data point: the predicted noise is the same at every step."""
    model = AnalyticGMM.isotropic(torch.tensor([[0.5, -0.2]], dtype=torch.float64), std=0.0).denoiser(SCHEDULE)
    torch.testing.assert_close(ddim(DualFast(model, 0.5), noise(), TIMES), ddim(model, noise(), TIMES))


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("sampler", [ddim, dpm_solver])
def test_every_kind_of_prediction_is_corrected_alike(kind, sampler) -> None:
    expected = sampler(DualFast(RING.denoiser(SCHEDULE, "eps")), noise(), TIMES)
    torch.testing.assert_close(sampler(DualFast(RING.denoiser(SCHEDULE, kind)), noise(), TIMES), expected)


def test_it_repairs_a_model_that_shrinks_and_the_other_sign_would_not() -> None:
    class Pulled(DualFast):
        """The rule with the wrong sign."""

        def __init__(self, denoiser: object, c: float) -> None:
            super().__init__(denoiser, 0.0)
            self.c = -c

    model, many = degrade(RING.denoiser(SCHEDULE), shrink=0.3), noise(400)

    def error(wrapped: object) -> float:
        return abs(float(ddim(wrapped, many, TIMES).norm(dim=1).mean()) - 1)

    assert error(DualFast(model, 0.2)) < error(model) < error(Pulled(model, 0.2))


def test_a_run_starts_afresh_and_a_batch_may_not_change_within_it() -> None:
    wrapped = DualFast(RING.denoiser(SCHEDULE))
    runs = [ddim(wrapped, noise(), TIMES) for _ in range(2)]
    assert torch.equal(*runs)
    wrapped.reset()
    wrapped(noise(), at(1.0))
    with pytest.raises(ValueError, match="x must keep the shape"):
        wrapped(noise(3), at(0.9, 3))
    fresh = DualFast(RING.denoiser(SCHEDULE))
    fresh(noise(), at(1.0))
    assert torch.equal(wrapped(noise(), at(0.9)), fresh(noise(), at(0.9)))


def test_samples_do_not_depend_on_their_batch() -> None:
    wrapped = DualFast(RING.denoiser(SCHEDULE))
    out = ddim(wrapped, noise(), TIMES)
    torch.testing.assert_close(ddim(wrapped, noise()[3:5], TIMES), out[3:5])


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="denoiser must have a schedule"):
        DualFast(torch.nn.Identity())
    with pytest.raises(ValueError, match="c must be at least 0"):
        DualFast(RING.denoiser(SCHEDULE), -0.1)
    with pytest.raises(ValueError, match="growth must be one of 'growing', 'constant', got 'falling'"):
        DualFast(RING.denoiser(SCHEDULE), growth="falling")

    class Parts:
        schedule, prediction = SCHEDULE, "x0"

        def __call__(self, x: Tensor, t: Tensor) -> Split:
            return Split(x, x)

    with pytest.raises(TypeError, match="denoiser returned a Split"):
        DualFast(Parts())(noise(), at(0.5))


def test_errors_of_one_point_are_none() -> None:
    """The noise in a sample of one data point is known, so one step is exact, and so is the kernel."""
    point = torch.tensor([[0.5, -0.2]], dtype=torch.float64)
    model = AnalyticGMM.isotropic(point, std=0.0).denoiser(SCHEDULE)
    found = error_decomposition(model, point.expand(16, 2), 0.8, 0.2, noise=noise())
    assert found.approximation == pytest.approx(0, abs=1e-20)
    assert found.discretisation == pytest.approx(0, abs=1e-20)


def test_errors_in_closed_form() -> None:
    """Gaussian data: the ODE keeps a sample's number of standard deviations, and DDIM's step is linear."""
    std, s, t = 0.5, torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    data = AnalyticGMM.isotropic(torch.zeros(1, 2, dtype=torch.float64), std=std)
    x0, eps = data.sample(64, generator=torch.Generator().manual_seed(0)), noise(64)
    found = error_decomposition(data.denoiser(SCHEDULE), x0, s.item(), t.item(), noise=eps)
    start = SCHEDULE.add_noise(x0, eps, s)
    alpha, sigma = (f(torch.stack([s, t])) for f in (SCHEDULE.alpha, SCHEDULE.sigma))
    spread = (alpha**2 * std**2 + sigma**2).sqrt()
    fine, kernel = spread[1] / spread[0] * start, alpha[1] * x0 + sigma[1] * eps
    clean = alpha[0] * std**2 / spread[0] ** 2 * start
    coarse = alpha[1] * clean + sigma[1] * (start - alpha[0] * clean) / sigma[0]
    assert found.approximation == pytest.approx((fine - kernel).square().mean().item(), rel=1e-6)
    assert found.discretisation == pytest.approx((coarse - fine).square().mean().item(), rel=1e-6)
    assert found.total == pytest.approx((coarse - kernel).square().mean().item(), rel=1e-6)


def test_the_network_s_error_is_told_from_the_step_s() -> None:
    exact, weak = RING.denoiser(SCHEDULE), degrade(RING.denoiser(SCHEDULE), shrink=0.3)
    x0, eps = RING.sample(64, generator=torch.Generator().manual_seed(1)), noise(64)

    def errors(model: object, t: float):
        return error_decomposition(model, x0, 0.5, t, noise=eps, steps=20, truth=exact)

    assert errors(exact, 0.3).approximation == 0
    assert errors(weak, 0.3).approximation > 1e-4
    # A step of a quarter of the length has less than a quarter of the error.
    assert errors(exact, 0.45).discretisation < errors(exact, 0.3).discretisation / 4
    with pytest.raises(ValueError, match="noise must be of shape"):
        error_decomposition(exact, x0, 0.5, 0.3, noise=eps[:3])
