"""supnotMIWAE: exact likelihoods, what is read and what is not, and what each part is there for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, MultivariateNormal, Normal

from trimtab.generative import (
    SupNotMIWAE,
    cauchy_kernel,
    decay_impute,
    last_observed,
    latent_log_prob,
    obs_dropout,
)

SLOPE, OFFSET, NOISE = 1.5, 0.3, 0.8
LEAST_LATENT, LEAST = 1e-4, 1e-3


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def raw(std: float, least: float) -> float:
    """What the networks must say for this standard deviation."""
    return math.log(math.expm1((std - least) / (1 - least)))


class Posterior(nn.Module):
    """The exact posterior of one latent a step where x = SLOPE z + OFFSET + noise; the prior where nothing is seen."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        value, seen = x.chunk(2, -1)
        precision = 1 + seen * SLOPE**2 / NOISE**2
        mean = seen * SLOPE / NOISE**2 * (value - OFFSET) / precision + self.shift
        std = (precision.rsqrt() - LEAST_LATENT) / (1 - LEAST_LATENT)
        return torch.cat([mean, torch.expm1(std).log()], -1)


class Likelihood(nn.Module):
    def forward(self, z: Tensor, valid: Tensor) -> Tensor:
        return torch.cat([SLOPE * z + OFFSET, torch.full_like(z, raw(NOISE, LEAST))], -1)


class Steps(nn.Module):
    """A step at a time; with `pooled`, the mean over the steps that a series has."""

    def __init__(self, inputs: int, outputs: int, pooled: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))
        self.pooled = pooled

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        h = self.net(x)
        return (h * valid[..., None]).sum(1) / valid.sum(1, keepdim=True) if self.pooled else h


def linear_gaussian(shift: float = 0.0, **options) -> SupNotMIWAE:
    options = {"rate": 0.0, "length_scale": None, **options}
    return SupNotMIWAE(Posterior(shift), Likelihood(), nn.Identity(), 1, **options).double()


def small(features: int = 2, classes: int = 3, **options) -> SupNotMIWAE:
    options = {"num_latents": 4, "missingness": nn.Linear(features, features), **options}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        networks = Steps(2 * features, 6), Steps(3, 2 * features), Steps(features, classes, pooled=True)
        return SupNotMIWAE(*networks, features, **options).double()


def batch(features: int = 2, steps: int = 6, size: int = 5, share: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    generator = seeded(1)
    x = torch.randn(size, steps, features, dtype=torch.float64, generator=generator)
    mask = torch.rand(x.shape, generator=generator) < share
    return x, mask, torch.arange(size) % 3


# --- the bound --------------------------------------------------------------------------------------------------------


def evidence(x: Tensor, mask: Tensor) -> Tensor:
    exact = Normal(OFFSET, math.sqrt(SLOPE**2 + NOISE**2)).log_prob(x)
    return torch.where(mask, exact, 0).sum((1, 2))


@pytest.mark.parametrize("latents", [1, 7])
def test_with_the_exact_posterior_it_is_the_evidence_whatever_is_drawn(latents: int) -> None:
    x, mask, _ = batch(features=1)
    found = linear_gaussian(num_latents=latents).loss(x, mask, generator=seeded())
    torch.testing.assert_close(found["total"], -evidence(x, mask).mean())
    assert found["ess"].item() == pytest.approx(latents)  # all ratios are equal


def test_a_worse_posterior_gives_a_bound_that_tightens() -> None:
    x, mask, _ = batch(features=1)
    exact = -evidence(x, mask).mean().item()
    x, mask = x.repeat(400, 1, 1), mask.repeat(400, 1, 1)
    found = [
        linear_gaussian(shift=0.5, num_latents=k).loss(x, mask, generator=seeded())["total"].item()
        for k in (1, 5, 25, 125)
    ]
    assert found == sorted(found, reverse=True)
    assert found[0] > exact + 0.5
    assert exact - 0.02 < found[-1] < found[0]


def test_one_latent_is_the_evidence_lower_bound() -> None:
    """log p(x | z) + log p(z) - log q(z | x), with the draw taken from the generator."""
    x, mask, _ = batch(features=1)
    model = linear_gaussian(shift=0.4, num_latents=1)
    z_mean, z_raw = Posterior(0.4)(torch.cat([torch.where(mask, x, 0), mask.double()], -1), mask).chunk(2, -1)
    q = Normal(z_mean, LEAST_LATENT + (1 - LEAST_LATENT) * nn.functional.softplus(z_raw))
    z = q.mean + q.stddev * torch.randn(1, *x.shape, dtype=x.dtype, generator=seeded())
    likelihood = torch.where(mask, Normal(SLOPE * z + OFFSET, NOISE).log_prob(x), 0)
    elbo = (likelihood + Normal(0.0, 1.0).log_prob(z) - q.log_prob(z)).sum((-2, -1))
    torch.testing.assert_close(model.loss(x, mask, generator=seeded())["total"], -elbo.mean())


def test_the_parts_of_the_whole_bound_add_up() -> None:
    """With a decoder that ignores z, everything but what is drawn for x cancels or is known."""

    class Prior(nn.Module):
        def forward(self, x: Tensor, valid: Tensor) -> Tensor:
            zero = torch.zeros_like(x[..., :1])
            return torch.cat([zero, torch.full_like(zero, raw(1.0, LEAST_LATENT))], -1)

    class Fixed(nn.Module):
        def forward(self, z: Tensor, valid: Tensor) -> Tensor:  # far from spread: the filling is 2
            return torch.cat([torch.full_like(z, 2.0), torch.full_like(z, -50.0)], -1)

    missing, classes = nn.Linear(1, 1).double(), Steps(1, 3, pooled=True).double()
    x, mask, y = batch(features=1)
    model = SupNotMIWAE(
        Prior(), Fixed(), classes, 1, missingness=missing, rate=0.0, length_scale=None, num_latents=3, decay=False
    ).double()
    x = torch.where(mask, torch.full_like(x, 2.0), x)  # at the decoder's mean, so that its density is known
    filled = torch.full_like(x, 2.0)
    log_px = mask.sum((1, 2)) * (-math.log(LEAST) - 0.5 * math.log(2 * math.pi))
    log_ps = Bernoulli(logits=missing(filled)).log_prob(mask.double()).sum((1, 2))
    log_py = classes(filled, torch.ones(5, 6, dtype=torch.bool)).log_softmax(-1)[torch.arange(5), y]
    found = model.loss(x, mask, y, generator=seeded())
    torch.testing.assert_close(found["total"], -(log_px + log_ps + log_py).mean(), atol=0.2, rtol=0.0)
    torch.testing.assert_close(found["classification"], -log_py.mean(), atol=0.01, rtol=0.0)


# --- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_what_is_missing_is_not_read(training: bool) -> None:
    x, mask, y = batch()
    model = small().train(training)
    found = []
    for stored in (0.0, 1e6, math.nan):
        held = torch.where(mask, x, stored)
        losses = model.loss(held, mask, y, generator=seeded())
        model.zero_grad()
        losses["total"].backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        found.append((losses["total"], gradient, model.predict(held, mask, generator=seeded()).probs))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert torch.equal(one, two)
            assert bool(one.isfinite().all())


def test_steps_past_the_end_do_not_count() -> None:
    x, mask, _ = batch(features=1)
    valid = torch.arange(6) < torch.tensor([6, 3, 4, 1, 5])[:, None]
    found = linear_gaussian(num_latents=3).loss(x, mask, valid=valid, generator=seeded())["total"]
    torch.testing.assert_close(found, -evidence(x, mask & valid[..., None]).mean())
    # A value that only stands past the end is no observation of the missingness model either.
    model = small()
    x, mask, y = batch()
    changed = torch.where(valid[..., None], x, 7.0)
    for given, seen in ((changed, mask), (changed, mask & valid[..., None])):
        torch.testing.assert_close(
            model.loss(given, seen, y, valid=valid, generator=seeded())["total"],
            model.loss(x, mask, y, valid=valid, generator=seeded())["total"],
        )


class Constant(nn.Module):
    """The logit of being observed, step by step."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, x: Tensor) -> Tensor:
        return self.logits[:, None].expand(x.shape)


def test_what_the_missingness_model_says_of_steps_past_the_end_does_not_count() -> None:
    x, mask, y = batch()
    valid = torch.arange(6) < torch.tensor([[3], [2], [3], [1], [3]])
    found = []
    for past in (0.0, 50.0):
        logits = torch.tensor([0.3, -0.2, 0.1, past, past, past], dtype=torch.float64)
        found.append(small(missingness=Constant(logits)).loss(x, mask, y, valid=valid, generator=seeded())["total"])
    torch.testing.assert_close(found[1], found[0])


def test_nothing_is_hidden_but_in_training_and_the_mask_that_is_explained_is_what_was_left() -> None:
    x, mask, y = batch(size=400, share=1.1)
    models = [small(rate=rate, missingness=None).eval() for rate in (0.0, 0.7)]
    losses = [model.loss(x, mask, y, generator=seeded())["total"] for model in models]
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=0)

    def total(logit: float) -> float:
        options = {"num_latents": 1, "missingness": Constant(torch.full((6,), logit, dtype=torch.float64))}
        return small(rate=0.4, **options).loss(x, mask, y, generator=seeded())["total"].item()

    # Of n entries a series k are left: log p(s') = k log p + (n - k) log(1 - p), and all else stays.
    entries, logit = 12, 1.5
    log_p, log_not = -math.log1p(math.exp(-logit)), -math.log1p(math.exp(logit))
    left = (total(0.0) - total(logit) - entries * (math.log(2) + log_not)) / (log_p - log_not)
    assert left == pytest.approx(0.6 * entries, rel=0.02)


def test_every_series_keeps_its_own_steps_in_all_networks() -> None:
    """With a series' number for its values, what comes with a draw of it must be as long as the series is."""
    valid = torch.arange(6) < torch.tensor([[1], [2], [3], [4], [5]])
    x = torch.arange(5.0, dtype=torch.float64)[:, None, None].expand(5, 6, 1)
    checked = []

    class Told(nn.Module):
        def __init__(self, made: nn.Module) -> None:
            super().__init__()
            self.made = made

        def forward(self, values: Tensor, valid: Tensor) -> Tensor:
            checked.append(torch.equal(valid.sum(1), values[:, 0, 0].round().long() + 1))
            return self.made(values)

    sure = torch.tensor(-40.0, dtype=torch.float64)
    encoder = Told(Lambda(lambda v: torch.cat([v[..., :1], sure.expand(v[..., :1].shape)], -1)))
    decoder = Told(Lambda(lambda z: torch.cat([z, sure.expand(z.shape)], -1)))
    classifier = Told(Lambda(lambda v: v[:, 0].expand(-1, 3)))
    model = SupNotMIWAE(encoder, decoder, classifier, 1, num_latents=3, num_imputations=2, rate=0.0).double()
    model.loss(x, torch.ones_like(x, dtype=torch.bool), torch.zeros(5, dtype=torch.int64), valid=valid)
    assert checked == [True] * 3


class Lambda(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_a_full_series_is_classified_as_it_is() -> None:
    x, _, _ = batch()
    full, model = torch.ones_like(x, dtype=torch.bool), small().eval()
    found = model.predict(x, full, generator=seeded())
    plain = model.classifier(x, full[..., 0]).softmax(-1)
    torch.testing.assert_close(found.probs, plain)
    torch.testing.assert_close(found.disagreement, torch.zeros(5, dtype=x.dtype), atol=1e-12, rtol=0.0)
    fillings = model.impute(x, full, generator=seeded())
    torch.testing.assert_close(fillings.mean, x)
    torch.testing.assert_close(fillings.std, torch.zeros_like(x), atol=1e-7, rtol=0.0)


# --- the prior --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length_scale", [None, 2.5])
def test_the_prior_of_a_shorter_series_is_that_of_its_own_steps(length_scale: float | None) -> None:
    times = torch.tensor([0.0, 1.0, 2.5, 3.0], dtype=torch.float64)
    z = torch.randn(2, 3, 4, 2, dtype=torch.float64, generator=seeded())
    valid = torch.arange(4) < torch.tensor([4, 2, 3])[:, None]
    found = latent_log_prob(z, valid, times, length_scale)
    for series, length in enumerate((4, 2, 3)):
        own = times[:length]
        covariance = torch.eye(length, dtype=own.dtype) if length_scale is None else cauchy_kernel(own, length_scale)
        exact = MultivariateNormal(torch.zeros(length, dtype=own.dtype), covariance)
        expected = exact.log_prob(z[:, series, :length].mT).sum(-1)
        torch.testing.assert_close(found[:, series], expected)


# --- dropout and decay ------------------------------------------------------------------------------------------------


def test_obs_dropout_hides_at_its_rate_and_knows_its_probability() -> None:
    mask = torch.rand(200, 20, 10, generator=seeded()) < 0.6
    visible, log_prob = obs_dropout(mask, 0.3, generator=seeded(1))
    assert not bool((visible & ~mask).any())
    assert (visible.sum() / mask.sum()).item() == pytest.approx(0.7, abs=0.01)
    exact = torch.where(mask, Bernoulli(0.7).log_prob(visible.float()), 0).sum((1, 2))
    torch.testing.assert_close(log_prob, exact, rtol=1e-4, atol=1e-3)
    same, nothing = obs_dropout(mask, 0.0, generator=seeded())
    assert torch.equal(same, mask)
    assert not bool(nothing.any())


def test_only_dropout_lets_the_classifier_teach_the_decoder_where_nothing_is_missing() -> None:
    x, _, y = batch()
    full = torch.ones_like(x, dtype=torch.bool)
    for rate in (0.0, 0.5):
        with_label, without = small(rate=rate, missingness=None), small(rate=rate, missingness=None)
        with_label.loss(x, full, y, generator=seeded())["total"].backward()
        without.loss(x, full, generator=seeded())["total"].backward()
        taught = with_label.decoder.net[0].weight.grad - without.decoder.net[0].weight.grad
        assert bool(taught.abs().max() > 1e-6) == (rate > 0)
    # In eval mode nothing is hidden.
    model = small(rate=0.9).eval()
    torch.testing.assert_close(model.impute(x, full, generator=seeded()).mean, x)


def test_last_observed_by_hand_in_any_layout() -> None:
    generator = seeded(2)
    x = torch.randn(2, 3, 7, 2, dtype=torch.float64, generator=generator)
    mask = torch.rand(x.shape, generator=generator) < 0.4
    times = torch.tensor([0.0, 0.5, 2.0, 3.0, 3.5, 6.0, 7.0], dtype=torch.float64)
    values, elapsed = last_observed(x, mask, times)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in (2, 3, 2))):
        a, b, feature = place.tolist()
        last, when = 0.0, 0.0
        for step in range(7):
            if mask[a, b, step, feature]:
                last, when = x[a, b, step, feature].item(), times[step].item()
            assert values[a, b, step, feature].item() == last
            assert elapsed[a, b, step, feature].item() == times[step].item() - when


def test_decay_goes_from_the_last_value_to_the_sample() -> None:
    x, mask, _ = batch()
    sample, times = torch.full_like(x, 9.0), torch.arange(6, dtype=x.dtype)
    last, elapsed = last_observed(x, mask, times)
    zero, one = torch.zeros(2, dtype=x.dtype), torch.ones(2, dtype=x.dtype)
    torch.testing.assert_close(decay_impute(x, mask, sample, times, zero, zero), last)
    torch.testing.assert_close(decay_impute(x, mask, sample, times, zero, 1e3 * one), torch.where(mask, x, sample))
    share = (-0.7 * elapsed - 0.1).exp()
    torch.testing.assert_close(
        decay_impute(x, mask, sample, times, 0.7 * one, 0.1 * one),
        torch.where(mask, x, share * last + (1 - share) * sample),
    )


# --- weights of fillings ----------------------------------------------------------------------------------------------


def test_a_share_is_never_above_one_whatever_was_learned() -> None:
    x, mask, y = batch()
    sample, times = torch.full_like(x, 9.0), torch.arange(6, dtype=torch.float64)
    found = decay_impute(x, mask, sample, times, torch.full((2,), -5.0).double(), torch.zeros(2).double())
    last, _ = last_observed(x, mask, times)
    torch.testing.assert_close(found, torch.where(mask, x, last))
    losses = []
    for bias in (0.0, -3.0):
        model = small(rate=0.0, missingness=None)
        model.decay_weight.data.fill_(0.5)
        model.decay_bias.data.fill_(bias)
        losses.append(model.loss(x, mask, y, generator=seeded())["total"])
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=0)


def test_the_missingness_model_moves_fillings_to_what_would_be_missing() -> None:
    """Values are N(0, 1) and observed with probability sigmoid(-3 x): what is missing is large, by a known amount."""

    class Standard(nn.Module):
        def forward(self, z: Tensor, valid: Tensor) -> Tensor:
            return torch.cat([torch.zeros_like(z), torch.full_like(z, raw(1.0, LEAST))], -1)

    missing = nn.Linear(1, 1).double()
    nn.init.constant_(missing.weight, -3.0)
    nn.init.zeros_(missing.bias)
    options = {"rate": 0.0, "length_scale": None, "num_latents": 40_000, "decay": False}
    grid = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = Normal(0.0, 1.0).log_prob(grid).exp() * (3 * grid).sigmoid()
    expected = (grid * density).sum() / density.sum()
    x, mask = torch.zeros(1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, dtype=torch.bool)
    model = SupNotMIWAE(Posterior(), Standard(), nn.Identity(), 1, missingness=missing, **options)
    found = model.impute(x, mask, generator=seeded())
    assert found.mean.item() == pytest.approx(expected.item(), abs=0.02)
    second = ((grid - expected).square() * density).sum() / density.sum()
    assert found.std.item() == pytest.approx(second.sqrt().item(), abs=0.02)
    model.missingness = None
    assert model.impute(x, mask, generator=seeded()).mean.item() == pytest.approx(0.0, abs=0.02)


def test_fillings_and_predictions_are_averages_by_their_weights() -> None:
    x, mask, _ = batch()
    model = small(num_imputations=3).eval()
    found = model.impute(x, mask, generator=seeded())
    assert found.samples.shape == (12, 5, 6, 2)
    torch.testing.assert_close(found.weights.sum(0), torch.ones(5, dtype=x.dtype))
    torch.testing.assert_close(found.weights.unflatten(0, (3, 4)).sum(1), torch.full((3, 5), 1 / 3, dtype=x.dtype))
    assert torch.equal(found.samples[:, mask], x[mask].expand(12, -1))
    probs = torch.stack([model.classifier(s, mask.any(-1) | True).softmax(-1) for s in found.samples])
    mixed = (found.weights[..., None] * probs).sum(0)
    prediction = model.predict(x, mask, generator=seeded())
    torch.testing.assert_close(prediction.probs, mixed)
    torch.testing.assert_close(prediction.entropy, -(mixed * mixed.log()).sum(-1))
    divergence = (found.weights[..., None] * probs * (probs.log() - mixed.log())).sum((0, 2))
    torch.testing.assert_close(prediction.disagreement, divergence)
    assert bool((prediction.disagreement > 0).all())


# --- manners ----------------------------------------------------------------------------------------------------------


def test_the_generator_decides_all_that_is_drawn_and_order_does_not_matter() -> None:
    x, mask, y = batch()
    model = small()
    state = torch.random.get_rng_state()
    first, again = (model.loss(x, mask, y, generator=seeded(3))["total"] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, model.loss(x, mask, y, generator=seeded(4))["total"])
    assert torch.equal(torch.random.get_rng_state(), state)
    # With many latents the order of the batch changes the estimate by little.
    many = small(num_latents=4000, rate=0.0)
    turned = many.predict(x.flip(0), mask.flip(0), generator=seeded(5)).probs.flip(0)
    torch.testing.assert_close(many.predict(x, mask, generator=seeded(6)).probs, turned, atol=0.05, rtol=0.0)


def test_state_dict_brings_everything_back() -> None:
    x, mask, y = batch()
    model, other = small(), small()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for step in range(5):
        optimizer.zero_grad()
        model.loss(x, mask, y, generator=seeded(step))["total"].backward()
        optimizer.step()
    other.load_state_dict(model.state_dict())
    assert torch.equal(
        model.predict(x, mask, generator=seeded()).probs, other.predict(x, mask, generator=seeded()).probs
    )
    assert not torch.equal(model.decay_bias, torch.full((2,), 0.05, dtype=x.dtype))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(5, 6, 3, dtype=torch.float64)}, ValueError, r"x must be of shape \(batch, steps, 2\)"),
        ({"x": torch.zeros(5, 6, 2, dtype=torch.int64)}, TypeError, "x must be floating point"),
        ({"mask": torch.ones(5, 6, 1, dtype=torch.bool)}, ValueError, "mask must be of shape"),
        ({"mask": torch.ones(5, 6, 2)}, TypeError, "mask and valid must be bool"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, ValueError, "targets must be 5 labels"),
        ({"targets": torch.zeros(5)}, TypeError, "targets must be int64"),
        ({"valid": torch.ones(5, 5, dtype=torch.bool)}, ValueError, "valid must be of shape"),
        ({"times": torch.zeros(5, dtype=torch.float64)}, ValueError, "times must be of shape"),
    ],
)
def test_a_refused_batch_draws_nothing(change, error, message: str) -> None:
    x, mask, y = batch()
    generator = seeded()
    state = generator.get_state()
    given = {"x": x, "mask": mask, "targets": y, **change}
    with pytest.raises(error, match=message):
        small().loss(given.pop("x"), given.pop("mask"), given.pop("targets"), **given, generator=generator)
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 1.0}, r"rate must be in \[0, 1\)"),
        ({"num_latents": 0}, "num_latents must be at least 1"),
        ({"num_imputations": 0}, "num_imputations must be at least 1"),
        ({"length_scale": 0.0}, "length_scale must be"),
    ],
)
def test_bad_arguments(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)
    with pytest.raises(ValueError, match="keep must be of shape"):
        obs_dropout(torch.ones(2, 3, dtype=torch.bool), 0.5, keep=torch.ones(3, 2, dtype=torch.bool))


def test_targets_that_no_class_has_and_no_imputations_are_refused() -> None:
    model, x = small(), torch.randn(2, 4, 2, dtype=torch.float64)
    mask = torch.ones(2, 4, 2, dtype=torch.bool)
    for target in (-1, 3):
        with pytest.raises(ValueError, match=r"targets must be in \[0, 3\)"):
            model.loss(x, mask, torch.tensor([0, target]))
    with pytest.raises(ValueError, match="num_imputations must be at least 1, got -1"):
        model.predict(x, mask, num_imputations=-1)
    with pytest.raises(TypeError, match="num_imputations must be an integer"):
        model.impute(x, mask, num_imputations=1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="mask must be bool"):
        obs_dropout(mask.float(), 0.5)  # type: ignore[arg-type]
