"""The form of a denoiser, and what samplers do with it."""

from __future__ import annotations

import pytest
import torch

from trimtab.diffusion import (
    AdaptiveProjectedGuidance,
    AnalyticGMM,
    ClassifierFreeGuidance,
    CountNFE,
    Denoiser,
    DualFast,
    LayerSkipping,
    Split,
    VPLinear,
    deis,
    denoising_loss,
    diffusion_log_ratio,
    error_decomposition,
    grids,
    inpaint,
    log_likelihood,
    predict,
)
from trimtab.diffusion.denoiser import model_times, start, state_and_noise
from trimtab.diffusion.prediction import PREDICTIONS

SCHEDULE = VPLinear()


def test_every_kind_of_prediction_says_the_same() -> None:
    ring = AnalyticGMM.ring(dtype=torch.float64)
    x, t = torch.randn(5, 2, dtype=torch.float64), torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    exact = ring.posterior_mean(x, SCHEDULE.alpha(t), SCHEDULE.sigma(t))
    for kind in PREDICTIONS:
        torch.testing.assert_close(predict(ring.denoiser(SCHEDULE, kind), x, t, "x0"), exact)
    torch.testing.assert_close(
        predict(ring.denoiser(SCHEDULE), x, t, "score"), ring.score(x, SCHEDULE.alpha(t), SCHEDULE.sigma(t))
    )


def test_split_puts_other_noise_back() -> None:
    """The state of a split is the one that has its clean part and its noise; without a difference, x itself."""
    x = torch.randn(3, 2, dtype=torch.float64)
    t = torch.full((3,), 0.4, dtype=torch.float64)
    alpha, sigma = SCHEDULE.alpha(t)[0].item(), SCHEDULE.sigma(t)[0].item()
    x0, eps = torch.randn(2, 3, 2, dtype=torch.float64)
    denoiser = Denoiser(lambda x, t: Split(x0, eps), SCHEDULE)  # type: ignore[arg-type, return-value]
    state, noise = state_and_noise(denoiser, x, t, alpha, sigma)
    torch.testing.assert_close(state, alpha * x0 + sigma * eps)
    assert noise is eps
    assert predict(denoiser, x, t, "eps") is eps
    assert predict(denoiser, x, t, "x0") is x0
    # A DDIM step then is alpha' x0 + sigma' eps.
    times = torch.tensor([0.4, 0.2], dtype=torch.float64)
    out = deis(denoiser, x, times, order=0)
    torch.testing.assert_close(out, SCHEDULE.alpha(times[1]) * x0 + SCHEDULE.sigma(times[1]) * eps)


def test_split_of_one_prediction_changes_nothing() -> None:
    ring = AnalyticGMM.ring(dtype=torch.float64).denoiser(SCHEDULE, "eps")

    def split(x: torch.Tensor, t: torch.Tensor) -> Split:
        return Split(predict(ring, x, t, "x0"), predict(ring, x, t, "eps"))

    noise = SCHEDULE.prior(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    times = grids.power(SCHEDULE, 8)
    torch.testing.assert_close(
        deis(Denoiser(split, SCHEDULE), noise, times),  # type: ignore[arg-type]
        deis(ring, noise, times),
    )


def test_count_forgets_with_each_run() -> None:
    counted = CountNFE(CountNFE(AnalyticGMM.ring().denoiser(SCHEDULE)))
    for _ in range(2):
        deis(counted, SCHEDULE.prior(2, 2), grids.power(SCHEDULE, 6))
        assert counted.count == 6
        assert counted.denoiser.count == 6  # type: ignore[attr-defined]


def test_networks_see_one_time_per_sample_and_never_half_precision_times() -> None:
    seen: list[torch.Tensor] = []

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(t)
        return torch.zeros_like(x)

    deis(Denoiser(network, SCHEDULE), SCHEDULE.prior(3, 2, dtype=torch.bfloat16), grids.power(SCHEDULE, 2))
    assert [t.shape for t in seen] == [(3,), (3,)]
    assert seen[0].dtype == torch.float32
    assert model_times(torch.ones(4), torch.zeros(2, 1)).shape == (4, 2)


def test_a_network_that_returns_another_shape_is_refused() -> None:
    learned_variance = Denoiser(lambda x, t: torch.cat([x, x], dim=1), SCHEDULE)
    with pytest.raises(ValueError, match=r"denoiser must return the shape of x, \(2, 3\), got \(2, 6\)"):
        deis(learned_variance, torch.zeros(2, 3), grids.power(SCHEDULE, 2))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, SCHEDULE), TypeError, "model"),
        ((torch.sin, "linear"), TypeError, "schedule"),
        ((torch.sin, SCHEDULE, "noise"), ValueError, "prediction"),
    ],
)
def test_bad_denoiser(arguments, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Denoiser(*arguments)


@pytest.mark.parametrize(
    ("x", "times", "error", "message"),
    [
        (torch.zeros(2, 2, dtype=torch.long), [1.0, 0.5], TypeError, "x must be floating point"),
        (torch.zeros(2), [1.0, 0.5], ValueError, "x must have shape"),
        (torch.zeros(0, 2), [1.0, 0.5], ValueError, "x must have shape"),
        (torch.zeros(2, 2), [0.5, 1.0], ValueError, "times"),
        (torch.zeros(2, 2), [1.0], ValueError, "times"),
        (torch.zeros(2, 2), [1.0, float("nan")], ValueError, "times"),
    ],
)
def test_bad_run(x: torch.Tensor, times: list[float], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        start(Denoiser(torch.zeros_like, SCHEDULE), x, torch.tensor(times))


def test_a_bare_network_is_told_how_to_be_wrapped() -> None:
    with pytest.raises(TypeError, match=r"wrap the network as Denoiser\(model, schedule, prediction\)"):
        deis(torch.nn.Linear(2, 2), torch.zeros(1, 2), torch.tensor([1.0, 0.5]))  # type: ignore[arg-type]


def test_evaluations_of_parts_of_a_batch_count_as_parts() -> None:
    counted = CountNFE(AnalyticGMM.ring().denoiser(SCHEDULE))
    x, t = torch.randn(4, 2), torch.full((4,), 0.5)
    counted(x, t)
    counted(x[:1], t[:1])
    assert (counted.count, counted.per_sample) == (2, 1.25)
    counted.reset()
    assert (counted.count, counted.per_sample) == (0, 0)


def test_arrays_and_what_is_no_denoiser_are_refused_by_name() -> None:
    schedule = VPLinear()
    times, still = grids.power(schedule, 4), Denoiser(lambda x, t: x, schedule)
    with pytest.raises(TypeError, match="x must be a tensor, got ndarray"):
        deis(still, torch.zeros(2, 2).numpy(), times)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="times must be a tensor of falling times"):
        deis(still, torch.zeros(2, 2), None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="denoiser must have a schedule"):
        CountNFE(torch.nn.Identity())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="schedule must be a NoiseSchedule"):
        grids.power(None, 4)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="t_max must be a number"):
        VPLinear(t_max="1")  # type: ignore[arg-type]


X, T = torch.zeros(2, 2), torch.full((2,), 0.5)
TIMES = torch.tensor([0.9, 0.1])
TAKERS = {
    "deis": lambda bare: deis(bare, X, TIMES),
    "inpaint": lambda bare: inpaint(bare, X, TIMES, X, X > 0),
    "log_likelihood": lambda bare: log_likelihood(bare, X),
    "CountNFE": CountNFE,
    "guidance": lambda bare: ClassifierFreeGuidance(bare, 1),
    "DualFast": DualFast,
    "LayerSkipping": lambda bare: LayerSkipping(bare, [], []),
    "error_decomposition": lambda bare: error_decomposition(bare, X, 0.9, 0.1, noise=X),
    "denoising_loss": lambda bare: denoising_loss(bare, X, T, X),
    "diffusion_log_ratio": lambda bare: diffusion_log_ratio(bare, bare, X, T, X),
}


@pytest.mark.parametrize("take", TAKERS.values(), ids=TAKERS)
def test_whoever_takes_a_denoiser_asks_for_its_form_in_the_same_words(take) -> None:
    with pytest.raises(
        TypeError, match="^denoiser must have a schedule and a prediction: wrap the network as Denoiser"
    ):
        take(torch.nn.Identity())


def test_a_run_that_a_callback_breaks_off_leaves_nothing_behind() -> None:
    ring = AnalyticGMM.ring(dtype=torch.float64).denoiser(SCHEDULE)
    noise, times = SCHEDULE.prior(8, 2, dtype=torch.float64), grids.power(SCHEDULE, 4)
    guided = DualFast(AdaptiveProjectedGuidance(ring, torch.arange(8), scale=3.0))
    expected = deis(guided, noise, times)

    def stop(step: int, time: float, x: torch.Tensor) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        deis(guided, noise, times, callback=stop)
    assert torch.is_grad_enabled()
    assert torch.equal(deis(guided, noise, times), expected)
