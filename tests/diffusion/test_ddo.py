"""DDO: the loss at its known points, its optimum, both kinds of log-ratio, and self-play."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.diffusion import (
    AnalyticGMM,
    DDOLoss,
    Denoiser,
    EDMPreconditioned,
    SelfPlay,
    Split,
    VPLinear,
    autoregressive_log_ratio,
    degrade,
    diffusion_log_ratio,
)
from trimtab.nets import MADE, DenoisingMLP

DATA = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
REFERENCE = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
SCHEDULE = VPLinear()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def expected_loss(logits: Tensor, alpha: float, beta: float) -> Tensor:
    """The loss in expectation, of a table."""
    ratio = logits.log_softmax(0) - REFERENCE.log()
    loss = DDOLoss(alpha, beta)
    each = [loss(r[None], torch.zeros(1)) - alpha * math.log(2) for r in ratio]
    fakes = [loss(torch.zeros(1), r[None]) - math.log(2) for r in ratio]
    return (DATA * torch.stack(each)).sum() + (REFERENCE * torch.stack(fakes)).sum()


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (4.0, 0.1)])
def test_at_the_reference(alpha: float, beta: float) -> None:
    """(1 + alpha) log 2, with the gradient -beta/2 (data - alpha reference) of the log-likelihoods."""
    data, fake = torch.zeros(5, requires_grad=True), torch.zeros(3, requires_grad=True)
    value = DDOLoss(alpha, beta)(data, fake)
    assert value.item() == pytest.approx((1 + alpha) * math.log(2))
    value.backward()
    torch.testing.assert_close(data.grad, torch.full((5,), -beta / 2 / 5))
    torch.testing.assert_close(fake.grad, torch.full((3,), alpha * beta / 2 / 3))


def minimised(alpha: float, beta: float, steps: int = 3000) -> Tensor:
    logits = REFERENCE.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = expected_loss(logits, alpha, beta)
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    return logits.detach().softmax(0)


def test_the_optimum_is_the_data() -> None:
    torch.testing.assert_close(minimised(1.0, 1.0), DATA, atol=1e-4, rtol=0)


def test_a_smaller_beta_goes_beyond_the_data() -> None:
    """In the direction of r = log(data / reference) / beta; free of a norm it would be p_r^(1-1/beta) p^(1/beta)."""
    found = minimised(1.0, 0.5)
    assert float(found[2]) > float(DATA[2]) + 0.05
    assert float(found[0]) < float(DATA[0]) - 0.05
    # Without the norm the pointwise optimum is exact.
    for p, q in zip(DATA, REFERENCE, strict=True):
        ratio = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        alpha, beta = 2.0, 0.5
        best = torch.log(p / (alpha * q)) / beta
        with torch.no_grad():
            ratio.fill_(best)
        loss = p * F.softplus(-beta * ratio) + alpha * q * F.softplus(beta * ratio)
        loss.sum().backward()
        assert ratio.grad.item() == pytest.approx(0.0, abs=1e-12)


def test_swapping_the_groups_and_their_signs_changes_nothing_at_alpha_one() -> None:
    data, fake = torch.randn(2, 6, generator=seeded())
    loss = DDOLoss(beta=0.3)
    torch.testing.assert_close(loss(data, fake), loss(-fake, -data))
    assert float((DDOLoss(2.0)(data, fake) - DDOLoss(2.0)(-fake, -data)).abs()) > 1e-3


def test_reductions_and_numbers() -> None:
    data, fake = torch.randn(5, generator=seeded()), torch.randn(3, generator=seeded(1))
    mean, total = DDOLoss(2.0, 0.3)(data, fake), DDOLoss(2.0, 0.3, reduction="sum")(data, fake)
    torch.testing.assert_close(mean, F.softplus(-0.3 * data).mean() + 2 * F.softplus(0.3 * fake).mean())
    torch.testing.assert_close(total, F.softplus(-0.3 * data).sum() + 2 * F.softplus(0.3 * fake).sum())
    extreme = DDOLoss()(torch.tensor([1e4, -1e4]), torch.tensor([1e4]))
    assert bool(torch.isfinite(extreme))
    x = torch.randn(4, dtype=torch.float64, generator=seeded(), requires_grad=True)
    assert torch.autograd.gradcheck(DDOLoss(2.0, 0.5), (x, x.detach().clone()))


RING = AnalyticGMM.ring(dtype=torch.float64)


def test_a_diffusion_ratio_is_the_difference_of_weighted_errors() -> None:
    good, bad = RING.denoiser(SCHEDULE), degrade(RING.denoiser(SCHEDULE), shrink=0.5)
    x0, noise = RING.sample(64, generator=seeded()), torch.randn(64, 2, generator=seeded(1), dtype=torch.float64)
    t = torch.rand(64, generator=seeded(2), dtype=torch.float64) * 0.9 + 0.05
    weight = torch.rand(64, generator=seeded(3), dtype=torch.float64)
    x = SCHEDULE.add_noise(x0, noise, t)
    expected = weight * ((bad(x, t) - x0).square() - (good(x, t) - x0).square()).sum(1)
    found = diffusion_log_ratio(good, bad, x0, t, noise, weight=weight)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(diffusion_log_ratio(bad, good, x0, t, noise, weight=weight), -expected)
    assert bool((diffusion_log_ratio(good, good, x0, t, noise) == 0).all())
    # The better model is the more probable one, on average over data.
    assert float(found.mean()) > 0


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
def test_each_kind_of_prediction_has_its_own_weight(kind) -> None:
    """Errors of the noise are (alpha / sigma)^2 times those of the clean sample."""
    good, bad = RING.denoiser(SCHEDULE, kind), degrade(RING.denoiser(SCHEDULE, kind), shrink=0.5)
    clean, poor = RING.denoiser(SCHEDULE), degrade(RING.denoiser(SCHEDULE), shrink=0.5)
    x0, noise = RING.sample(16, generator=seeded()), torch.randn(16, 2, generator=seeded(1), dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 16, dtype=torch.float64)
    alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
    factor = {"eps": (alpha / sigma) ** 2, "v": 1 / sigma**2, "flow": (1 + alpha / sigma) ** 2}[kind]
    found = diffusion_log_ratio(good, bad, x0, t, noise)
    torch.testing.assert_close(found, factor * diffusion_log_ratio(clean, poor, x0, t, noise))


def test_edm_weights_make_it_the_raw_network() -> None:
    torch.manual_seed(0)
    models = []
    for _ in range(2):
        net = DenoisingMLP(2, hidden=16, blocks=1)
        for p in net.parameters():
            nn.init.normal_(p, std=0.3)
        models.append(EDMPreconditioned(net, sigma_data=0.7))
    x0, noise, t = torch.randn(8, 2), torch.randn(8, 2), torch.rand(8) + 0.1
    skip, out = models[0].scalings(t)
    x, size = x0 + t[:, None] * noise, (t**2 + 0.49).rsqrt()
    wanted = (x0 - skip[:, None] * x) / out[:, None]
    raw = [model.net(size[:, None] * x, t.log() / 4) for model in models]
    expected = (raw[1] - wanted).square().sum(1) - (raw[0] - wanted).square().sum(1)
    found = diffusion_log_ratio(*models, x0, t, noise, weight=models[0].weight(t))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    found.sum().backward()
    assert any(bool((p.grad != 0).any()) for p in models[0].parameters() if p.grad is not None)
    assert all(p.grad is None for p in models[1].parameters())


def test_an_autoregressive_ratio_is_that_of_the_likelihoods() -> None:
    torch.manual_seed(0)
    ours, theirs = MADE(4, 3, 16, 1), MADE(4, 3, 16, 1)
    tokens = torch.randint(3, (5, 4), generator=seeded())

    def log_prob(net: nn.Module) -> Tensor:
        return -F.cross_entropy(net(tokens).flatten(0, 1), tokens.flatten(), reduction="none").view(5, 4).sum(1)

    found = autoregressive_log_ratio(ours(tokens), theirs(tokens), tokens)
    torch.testing.assert_close(found, log_prob(ours) - log_prob(theirs))
    found.sum().backward()
    assert all(p.grad is None for p in theirs.parameters())
    assert bool((autoregressive_log_ratio(ours(tokens), ours(tokens), tokens) == 0).all())


class Table(nn.Module):
    """A categorical distribution."""

    def __init__(self, probs: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(probs.log().clone())


def play(beta: float = 1.0, lr: float = 0.5) -> SelfPlay:
    def log_ratio(model: nn.Module, reference: nn.Module, tokens: Tensor) -> Tensor:
        scores = [net.logits.expand(len(tokens), 1, -1) for net in (model, reference)]
        return autoregressive_log_ratio(*scores, tokens)

    generator = seeded(5)

    def sample(model: nn.Module, count: int) -> Tensor:
        return torch.multinomial(model.logits.softmax(0), count, replacement=True, generator=generator)[:, None]

    model = Table(REFERENCE)
    return SelfPlay(model, torch.optim.SGD(model.parameters(), lr=lr), log_ratio, sample, beta=beta)


def test_self_play_over_rounds_comes_to_the_data() -> None:
    """With a beta of 1 every round aims at the data; a round alone, cut short, is on its way."""
    rule = play()
    data = torch.multinomial(DATA, 20_000, replacement=True, generator=seeded())[:, None]
    distances = [float((rule.model.logits.detach().softmax(0) - DATA).abs().sum())]
    for _ in range(4):
        for _ in range(15):
            rule.step(data)
        rule.next_round()
        assert torch.equal(rule.reference.logits, rule.model.logits)
        distances.append(float((rule.model.logits.detach().softmax(0) - DATA).abs().sum()))
    assert all(later < earlier for earlier, later in itertools.pairwise(distances))
    assert distances[-1] < 0.05
    assert rule.reference.logits.grad is None


def test_the_first_step_of_a_round_starts_from_two_logarithms_of_two() -> None:
    rule = play()
    data = torch.multinomial(DATA, 100, replacement=True, generator=seeded())[:, None]
    for _ in range(2):
        assert rule.step(data)["loss"].item() == pytest.approx(2 * math.log(2))
        assert rule.step(data)["loss"].item() != pytest.approx(2 * math.log(2), abs=1e-6)
        rule.next_round()


def test_dropout_is_off_in_both() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.dropout = nn.Linear(3, 3), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.dropout(self.layer(x)).sum(1)

    model = Noisy().train()
    rule = SelfPlay(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        lambda ours, theirs, x: ours(x) - theirs(x).detach(),
        lambda reference, count: torch.ones(count, 3),
    )
    assert rule.step(torch.ones(64, 3))["loss"].item() == pytest.approx(2 * math.log(2))


def test_fakes_are_the_references_and_not_those_of_the_model_that_is_tuned() -> None:
    rule = play()
    asked, drawn = [], rule.sample

    def sample(model: nn.Module, count: int) -> Tensor:
        asked.append(model)
        return drawn(model, count)

    rule.sample = sample
    for _ in range(2):
        rule.step(torch.zeros(20, 1, dtype=torch.int64))
    assert all(model is rule.reference for model in asked)
    torch.testing.assert_close(rule.reference.logits, Table(REFERENCE).logits)


def test_a_training_continues_from_its_state() -> None:
    data = torch.multinomial(DATA, 50, replacement=True, generator=seeded())[:, None]
    rule = play()
    rule.step(data)
    rule.next_round()
    rule.step(data)
    other = play()
    other.load_state_dict(copy.deepcopy(rule.state_dict()))
    assert torch.equal(other.model.logits, rule.model.logits)
    assert torch.equal(other.reference.logits, rule.reference.logits)
    assert not torch.equal(other.reference.logits, other.model.logits)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="alpha must be positive"):
        DDOLoss(alpha=0)
    with pytest.raises(ValueError, match="beta must be positive"):
        play(beta=-1.0)
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum'"):
        DDOLoss(reduction="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fake must be a vector of at least one"):
        DDOLoss()(torch.zeros(3), torch.zeros(0))
    with pytest.raises(TypeError, match="data must be floating point"):
        DDOLoss()(torch.zeros(3, dtype=torch.int64), torch.zeros(3))
    denoiser = RING.denoiser(SCHEDULE)
    x0, t = torch.zeros(3, 2, dtype=torch.float64), torch.full((3,), 0.5, dtype=torch.float64)
    with pytest.raises(ValueError, match="noise must be of shape"):
        diffusion_log_ratio(denoiser, denoiser, x0, t, x0[:2])
    with pytest.raises(ValueError, match=r"t must have shape \(3,\)"):
        diffusion_log_ratio(denoiser, denoiser, x0, t[:2], x0)
    with pytest.raises(ValueError, match=r"weight must have shape \(3,\)"):
        diffusion_log_ratio(denoiser, denoiser, x0, t, x0, weight=t[:2])
    split = Denoiser(lambda x, t: Split(x, x), SCHEDULE)
    with pytest.raises(TypeError, match="denoiser must return one prediction"):
        diffusion_log_ratio(split, denoiser, x0, t, x0)
    with pytest.raises(ValueError, match="tokens must have shape"):
        autoregressive_log_ratio(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="reference_scores must be of shape"):
        autoregressive_log_ratio(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64))
