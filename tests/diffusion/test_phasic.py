"""Phasic content fusion: gate and weights at known times, losses, the low-pass projection, training and translation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from trimtab.diffusion import Discrete, VPCosine
from trimtab.diffusion.phasic import (
    ContentFused,
    ContentFusion,
    DirectionalDistributionLoss,
    PhasicAdapter,
    fusion_loss,
    gram_style_loss,
    guide_structure,
    low_pass,
    phase_gate,
    phasic_weights,
    translate,
)

SCHEDULE = Discrete(VPCosine().alpha(torch.linspace(0.001, 0.99, 1000, dtype=torch.float64)) ** 2)
TIMES = torch.linspace(600, 0, 9)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Halves(nn.Module):
    """A network of two halves."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)

    def encode(self, x: Tensor, t: Tensor) -> tuple[Tensor, None]:
        return self.first(x).tanh() * (1 + t / 1000)[:, None, None, None], None

    def decode(self, features: Tensor, rest: None, t: Tensor) -> Tensor:
        return self.second(features)


class Knowing(nn.Module):
    """A network that knows the clean image, at the bottleneck itself: a function of the source and a shift."""

    def __init__(self, clean: Tensor) -> None:
        super().__init__()
        self.register_buffer("clean", clean)

    def encode(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x, x

    def decode(self, features: Tensor, rest: Tensor, t: Tensor) -> Tensor:
        return self.clean.expand_as(rest)


def model(prediction: str = "eps") -> ContentFused:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ContentFused(Halves(), ContentFusion(4), SCHEDULE, prediction=prediction)


def images(count: int = 5, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, 4, 4, generator=generator(seed)) * 2 - 1


# Times


def test_the_gate_switches_within_a_few_steps() -> None:
    t = torch.arange(0, 1000, 5).double()
    gate = phase_gate(t)
    assert (gate.diff() >= 0).all()
    assert phase_gate(torch.tensor(300.0)) == 0.5
    assert phase_gate(torch.tensor(310.0)) > 0.9999
    torch.testing.assert_close(phase_gate(300 + t) + phase_gate(300 - t), torch.ones_like(t))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
def test_the_papers_weights_go_from_the_target_to_the_transfer(alpha: float) -> None:
    t = torch.linspace(0, 1000, 101, dtype=torch.float64)
    transfer, target = phasic_weights(t, alpha=alpha)
    assert target[0] == 1
    assert transfer[0] < 1e-12
    torch.testing.assert_close(transfer[-1], torch.tensor(1.0).double())
    torch.testing.assert_close(target[-1], torch.tensor(0.0).double())
    assert (transfer + target <= 1 + 1e-12).all()
    # Above the switch nothing is lost.
    torch.testing.assert_close((transfer + target)[t >= 340], torch.ones(int((t >= 340).sum())).double())
    torch.testing.assert_close(target, 1 - (t / 1000) ** alpha)


def test_the_releases_weights() -> None:
    transfer, target = phasic_weights(torch.tensor([0.0, 500.0, 900.0, 1000.0]).double(), "code")
    torch.testing.assert_close(transfer, torch.tensor([1, math.sqrt(20), 20**0.9, 20]).double())
    torch.testing.assert_close(target, 20**0.9 - transfer)
    assert target[3] < 0
    with pytest.raises(ValueError, match="form must be one of"):
        phasic_weights(torch.zeros(1), "talk")


# Losses


def test_the_directional_loss_is_zero_where_features_moved_as_the_mean_did() -> None:
    source, target = torch.randn(6, 3, generator=generator()), torch.randn(9, 3, generator=generator(1))
    direction = target.mean(0) - source.mean(0)
    loss = DirectionalDistributionLoss.between(source, target)
    assert loss(source + direction, source) < 1e-12
    x = torch.randn(6, 3, generator=generator(2))
    expected = (x - source - direction).square().mean()
    torch.testing.assert_close(loss(x, source), expected)
    each = DirectionalDistributionLoss(direction, reduction="none")(x, source)
    torch.testing.assert_close(each.mean(), expected)
    copied = DirectionalDistributionLoss(torch.zeros(3))
    copied.load_state_dict(loss.state_dict())
    assert torch.equal(copied(x, source), loss(x, source))


def test_its_gradient_keeps_the_arrangement() -> None:
    """All are pulled alike if all are off alike: differences between images do not change."""
    source = torch.randn(6, 3, generator=generator())
    x = source.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(DirectionalDistributionLoss(torch.tensor([1.0, -2.0, 0.5]))(x, source), x)
    torch.testing.assert_close(gradient, gradient[:1].expand(6, 3))


def test_style_is_blind_to_places() -> None:
    maps = torch.randn(3, 5, 4, 4, generator=generator())
    shuffled = maps.flatten(2)[:, :, torch.randperm(16, generator=generator(1))].reshape(3, 5, 4, 4)
    style = torch.randn(2, 5, 4, 4, generator=generator(2))
    torch.testing.assert_close(gram_style_loss([maps], [style]), gram_style_loss([shuffled], [style]))
    assert (gram_style_loss([maps], [maps[:1]])[0] < 1e-10).all()
    both = torch.stack([gram_style_loss([maps], [style[i : i + 1]]) for i in range(2)]).mean(0)
    torch.testing.assert_close(gram_style_loss([maps], [style]), both)
    with pytest.raises(ValueError, match="maps and style must be as many layers"):
        gram_style_loss([maps], [])


# Content


def test_style_is_a_mean_over_layers() -> None:
    made, wanted = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0)).unbind(0)
    one = gram_style_loss([made], [wanted])
    torch.testing.assert_close(gram_style_loss([made, made], [wanted, wanted]), one)


def test_below_the_switch_the_source_does_not_matter() -> None:
    denoiser, x, noise = model(), images(), torch.randn(5, 4, 4, 4, generator=generator(3))
    low, high = torch.full((5,), 100.0), torch.full((5,), 500.0)
    sources = images(seed=1), images(seed=2)
    outs = [[denoiser(x, t, source, noise=noise) for source in sources] for t in (low, high)]
    assert torch.equal(*outs[0])
    assert not torch.allclose(*outs[1])


def test_above_it_the_noise_does_not_matter() -> None:
    denoiser, x = model(), images()
    outs = [denoiser(x, torch.full((5,), 500.0), images(seed=1), generator=generator(s)) for s in (0, 1)]
    torch.testing.assert_close(*outs)


def test_without_a_source_it_is_the_network() -> None:
    denoiser, x, t = model(), images(), torch.full((5,), 400.0)
    plain = denoiser.network.decode(*denoiser.network.encode(x, t), t)
    assert torch.equal(denoiser(x, t), plain)


def test_the_content_takes_no_gradient() -> None:
    fusion, features = ContentFusion(4), torch.randn(2, 4, 3, 3, requires_grad=True)
    content = torch.randn(2, 4, 3, 3, requires_grad=True)
    fusion(features, content, torch.ones(2)).sum().backward()
    assert content.grad is None
    assert features.grad.abs().sum() > 0


# Structure


def test_the_low_pass_is_a_projection() -> None:
    x = images()
    torch.testing.assert_close(low_pass(low_pass(x, 2), 2), low_pass(x, 2))
    constant = torch.full((1, 1, 4, 4), 0.3)
    torch.testing.assert_close(low_pass(constant, 4), constant)
    guided = guide_structure(x, images(seed=1), 2)
    torch.testing.assert_close(low_pass(guided, 2), low_pass(images(seed=1), 2))
    torch.testing.assert_close(guided - low_pass(guided, 2), x - low_pass(x, 2))
    with pytest.raises(ValueError, match="sides divisible by 3"):
        low_pass(x, 3)


# Training


def adapter(form: str = "paper", **kwargs) -> PhasicAdapter:
    denoiser = model()
    return PhasicAdapter(
        denoiser,
        torch.optim.SGD(denoiser.parameters(), lr=0.05),
        features=lambda x: x.flatten(1),
        shots=images(3, seed=7),
        source=images(20, seed=8),
        form=form,
        **kwargs,
    )


def test_a_step_at_the_first_time_is_plain_denoising_and_at_the_last_plain_transfer() -> None:
    rule = adapter(maps=lambda x: [x])
    first = rule.step(images(), images(seed=1), t=torch.zeros(5), generator=generator())
    assert first["directional"] < 1e-10
    assert first["style"] < 1e-10
    torch.testing.assert_close(first["total"], first["target"])
    last = rule.step(images(), images(seed=1), t=torch.full((5,), 1000.0 - 1), generator=generator())
    assert last["target"] < 0.002 * last["total"]
    assert last["directional"] > 0


def test_the_direction_is_between_the_means() -> None:
    rule = adapter()
    expected = images(3, seed=7).flatten(1).mean(0) - images(20, seed=8).flatten(1).mean(0)
    torch.testing.assert_close(rule.directional.direction, expected)


def test_the_release_denoises_the_target_at_low_noise_too() -> None:
    """A network that is off by one everywhere: its errors are the weights, at the time given and at times below 300."""

    class Off(Halves):
        def decode(self, features: Tensor, rest: None, t: Tensor) -> Tensor:
            return shots + 1 + 0 * self.second(features)

    shots = images(3, seed=7)
    denoiser = ContentFused(Off(), ContentFusion(4), SCHEDULE, prediction="x0")
    optimizer = torch.optim.SGD(denoiser.parameters(), lr=0.0)
    rule = PhasicAdapter(
        denoiser, optimizer, features=lambda x: x.flatten(1), shots=shots, source=images(20), form="code"
    )
    found = rule.step(images(3), shots, t=torch.full((3,), 800.0), generator=generator())
    high = 20**0.9 - 20**0.8
    low = 5 * (float(found["target"]) - high)  # the mean of 20^0.9 - 20^(t / 1000) over times from 0 to 300
    assert 20**0.9 - 20**0.3 < low < 20**0.9 - 1
    torch.testing.assert_close(found["total"], found["target"] + found["directional"])


@pytest.mark.parametrize("form", ["paper", "code"])
def test_a_run_goes_on_where_it_was(form: str) -> None:
    rule = adapter(form)
    rule.step(images(), images(seed=1), generator=generator())
    other = adapter(form)
    other.load_state_dict(rule.state_dict())
    found = [r.step(images(), images(seed=1), generator=generator(5)) for r in (rule, other)]
    assert found[0] == found[1]
    torch.testing.assert_close(rule.denoiser.state_dict(), other.denoiser.state_dict(), rtol=0, atol=0)


def test_a_refused_step_changes_nothing() -> None:
    rule = adapter()
    before = {name: value.clone() for name, value in rule.denoiser.state_dict().items()}
    with pytest.raises(ValueError, match="shots must be of shape"):
        rule.step(images(), images(3))
    assert all(torch.equal(value, before[name]) for name, value in rule.denoiser.state_dict().items())


def test_training_lowers_the_directional_loss() -> None:
    rule, x, shots = adapter(), images(16), images(16, seed=7)
    rule.optimizer = torch.optim.Adam(rule.denoiser.parameters(), lr=0.02)
    t = torch.full((16,), 600.0)
    values = [float(rule.step(x, shots, t=t, generator=generator(i))["directional"]) for i in range(60)]
    assert sum(values[-10:]) < 0.7 * sum(values[:10])


def test_the_fusion_learns_from_the_source_alone() -> None:
    denoiser = model()
    loss = fusion_loss(denoiser, images(), torch.full((5,), 600.0), generator=generator())
    gradients = torch.autograd.grad(loss, list(denoiser.fusion.parameters()))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


# Translation


def test_a_model_that_knows_the_image_ends_on_it() -> None:
    clean = images(1)
    knowing = ContentFused(Knowing(clean), ContentFusion(1), SCHEDULE, prediction="x0")
    for kwargs in ({"t_guide": None}, {"t_guide": 300.0, "style_passes": 1}, {"eta": 1.0}):
        out = translate(knowing, images(3, seed=1), TIMES, fuse=False, factor=2, generator=generator(), **kwargs)
        torch.testing.assert_close(out, clean.expand(3, 1, 4, 4), atol=0.15, rtol=0)


def test_it_is_decided_by_the_generator_and_leaves_the_source_alone() -> None:
    source = images(3, seed=1)
    kept = source.clone()
    runs = [translate(model(), source, TIMES, factor=2, generator=generator(s)) for s in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert torch.equal(source, kept)
    assert runs[0].shape == source.shape


def test_a_callback_sees_every_step_and_may_replace_the_images() -> None:
    source, seen = images(3, seed=1), []
    watched = translate(
        model(), source, TIMES, factor=2, generator=generator(), callback=lambda *step: seen.append(step)
    )
    assert [step for step, _, _ in seen] == list(range(len(TIMES) - 1))
    assert [time for _, time, _ in seen] == TIMES[1:].tolist()
    assert seen[-1][2] is watched
    assert torch.equal(watched, translate(model(), source, TIMES, factor=2, generator=generator()))
    zero = translate(model(), source, TIMES, factor=2, callback=lambda step, time, x: torch.zeros_like(x))
    assert bool((zero == 0).all())
    with pytest.raises(ValueError, match="callback must return None or the shape of x"):
        translate(model(), source, TIMES, factor=2, callback=lambda step, time, x: x[:1])


def test_guidance_brings_the_coarse_structure_of_the_source() -> None:
    """A model that knows another image: how far the source, raised by a constant, raises the first state."""
    source, ends = 0.5 * images(3, seed=1), torch.tensor([600.0, 500.0])
    knowing = ContentFused(Knowing(images(1)), ContentFusion(1), SCHEDULE, prediction="x0")
    alpha, sigma = SCHEDULE.alpha(ends.double()), SCHEDULE.sigma(ends.double())

    def raised(bound: float | None) -> Tensor:
        low, high = (
            translate(knowing, x, ends, t_guide=bound, factor=4, style_passes=0, fuse=False, generator=generator())
            for x in (source, source + 0.1)
        )
        return (high - low) / 0.1

    # Without guidance the source shrinks with the noise that it came in; with it there is as much as in a noised one.
    torch.testing.assert_close(raised(None), torch.full((3, 1, 4, 4), float(alpha[0] * sigma[1] / sigma[0])))
    torch.testing.assert_close(raised(300.0), torch.full((3, 1, 4, 4), float(alpha[1])), atol=0.02, rtol=0)
    assert torch.equal(raised(550.0), raised(None))


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="network must have encode"):
        ContentFused(nn.Identity(), ContentFusion(1), SCHEDULE)
    with pytest.raises(ValueError, match="source must be of shape"):
        model()(images(), torch.zeros(5), images(3))
    with pytest.raises(ValueError, match="direction must be a vector"):
        DirectionalDistributionLoss(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="features must have shape"):
        DirectionalDistributionLoss(torch.zeros(2))(torch.zeros(3, 4), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="times"):
        translate(model(), images(), torch.tensor([0.0, 600.0]))
    with pytest.raises(ValueError, match="eta must be in"):
        translate(model(), images(), TIMES, eta=2.0)
    with pytest.raises(ValueError, match="sides divisible by 3"):
        translate(model(), images(), TIMES, factor=3)
    with pytest.raises(TypeError, match="denoiser must be a ContentFused"):
        PhasicAdapter(nn.Identity(), None, features=None, shots=images(), source=images())


@pytest.mark.parametrize("name", ["alpha", "total", "clip"])
def test_settings_are_refused_at_once(name: str) -> None:
    for value in (math.nan, 0.0, -1.0):
        with pytest.raises(ValueError, match=f"{name} must be|alpha, total and clip must be positive"):
            adapter(**{name: value})
    with pytest.raises(TypeError, match=f"{name} must be a number"):
        adapter(**{name: "1"})
    with pytest.raises(ValueError, match="clip must be"):
        translate(model(), images(), torch.linspace(600, 0, 3), clip=math.nan)
    with pytest.raises(ValueError, match="times must be from 0 to 999"):
        translate(model(), images(), torch.linspace(6000, 0, 3))
