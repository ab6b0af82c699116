"""AugSelf-GAN: both losses in closed form, what teaches whom, and the plain rule when it is switched off."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from trimtab.generative import (
    GAN,
    AugSelfGAN,
    AugSelfHead,
    DiffAugment,
    augself_discriminator_loss,
    augself_generator_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
)

POLICY = DiffAugment(("light", "translation"))


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Flatten())
        self.head = nn.Linear(256, 1)

    def features(self, x: Tensor) -> Tensor:
        return self.trunk(x)

    def score(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.head(features)[:, 0] + (0 if labels is None else 0.1 * labels)


class Maker(nn.Linear):
    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        return (super().forward(z) + (0 if labels is None else 0.1 * labels[:, None])).view(-1, 1, 8, 8).sigmoid()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def built(seed: int = 0, kind: str = "augself", **options) -> GAN:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        maker, critic, head = Maker(3, 64), Critic(), AugSelfHead(256, POLICY.counts)
    groups = [list(maker.parameters()), [*critic.parameters(), *(head.parameters() if kind == "augself" else [])]]
    optimizers = [torch.optim.Adam(group, lr=0.01) for group in groups]
    options = {"augment": POLICY, "generator": seeded(seed), **options}
    if kind == "augself":
        return AugSelfGAN(maker, critic, head, optimizers, 3, **options)
    return GAN(maker, critic, optimizers, 3, **options)


def batch(step: int = 0, count: int = 12) -> tuple[Tensor, Tensor]:
    return torch.rand(count, 1, 8, 8, generator=seeded(100 + step)), torch.arange(count) % 3


def read(count: int = 5, seed: int = 0) -> dict[str, Tensor]:
    generator = seeded(seed)
    sizes = {"color": 3, "cutout": 2}
    return {n: torch.rand(count, k, generator=generator, dtype=torch.float64) for n, k in sizes.items()}


# --- losses -----------------------------------------------------------------------------------------------------------


def test_the_generators_term_is_minus_four_times_what_agrees() -> None:
    predicted, params = read(seed=1), read(seed=2)
    expected = sum(-4 * (predicted[name] * params[name]).mean() for name in params)
    torch.testing.assert_close(augself_generator_loss(predicted, params), expected)


def test_the_discriminators_targets_are_opposite() -> None:
    params, fake_params = read(seed=1), read(seed=2)
    minus = {name: -value for name, value in fake_params.items()}
    assert augself_discriminator_loss(params, minus, params, fake_params).item() == 0
    # With the signs the other way round, every error is twice the parameter.
    wrong = augself_discriminator_loss({n: -v for n, v in params.items()}, fake_params, params, fake_params)
    expected = sum((4 * held[name].square()).mean() for held in (params, fake_params) for name in params)
    torch.testing.assert_close(wrong, expected)


def test_the_best_head_knows_the_share_of_real_images() -> None:
    """For one image with probability p of being real the loss is least at (2 p - 1) w, where the generator has -4 (2 p
    - 1) w^2: none where p is a half, and less the likelier the image is real."""
    w = {"cutout": torch.tensor([[0.8, 0.3]], dtype=torch.float64)}
    for p in (0.1, 0.5, 0.9):
        guess = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
        none = {"cutout": torch.zeros(1, 2, dtype=torch.float64)}
        real = augself_discriminator_loss({"cutout": guess}, none, w, none)
        fake = augself_discriminator_loss(none, {"cutout": guess}, none, w)
        # A quadratic in the guess: one step of Newton's method finds its least value.
        (gradient,) = torch.autograd.grad(p * real + (1 - p) * fake, guess)
        best = -gradient / (2 / guess.numel())
        torch.testing.assert_close(best, (2 * p - 1) * w["cutout"])
        value = augself_generator_loss({"cutout": best}, w)
        torch.testing.assert_close(value, -4 * (2 * p - 1) * w["cutout"].square().mean())


def test_hinge_losses() -> None:
    real, fake = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([-2.0, 0.5])
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(1.0 + 0.75)
    assert hinge_generator_loss(fake).item() == pytest.approx(0.75)


def test_an_image_that_is_not_changed_gives_the_head_nothing_to_read() -> None:
    head = AugSelfHead(4, {"translation": 2})
    features = torch.randn(3, 4, generator=seeded())
    torch.testing.assert_close(head(features, features)["translation"], head.heads["translation"].bias.expand(3, 2))
    with pytest.raises(ValueError, match="augmented must be of shape"):
        head(features, features[:2])


def test_the_head_reads_what_the_augmentation_added() -> None:
    head = AugSelfHead(2, {"light": 2})
    head.heads["light"].weight.data.copy_(torch.eye(2))
    head.heads["light"].bias.data.zero_()
    plain, change = torch.randn(3, 2), torch.tensor([0.5, -2.0])
    torch.testing.assert_close(head(plain + change, plain)["light"], change.expand(3, -1))


def test_predictions_of_other_augmentations_are_refused() -> None:
    params = read()
    with pytest.raises(ValueError, match="params must be of color, cutout, got color"):
        augself_generator_loss(params, {"color": params["color"]})
    with pytest.raises(ValueError, match="color must be of shape"):
        augself_generator_loss({"color": params["color"][:2]}, params)
    with pytest.raises(ValueError, match="params must be of an augmentation"):
        augself_generator_loss({}, params)


# --- training ---------------------------------------------------------------------------------------------------------


def weights(rule: GAN) -> list[Tensor]:
    return [p.detach().clone() for part in rule._parts().values() for p in part.parameters()]


@pytest.mark.parametrize("labelled", [False, True])
def test_with_weights_of_zero_it_is_diffaugment(labelled: bool) -> None:
    rule, plain = built(discriminator_weight=0.0, generator_weight=0.0), built(kind="plain")
    for step in range(3):
        x, labels = batch(step)
        mine = rule.step(x, labels if labelled else None)
        theirs = plain.step(x, labels if labelled else None)
        for name, value in theirs.items():
            torch.testing.assert_close(mine[name], value)
    for one, other in zip(weights(plain), weights(rule), strict=False):
        torch.testing.assert_close(one, other)


def test_the_losses_are_those_of_the_parts() -> None:
    rule = built(discriminator_weight=0.7, generator_weight=0.4)
    (x, _), fake = batch(), batch(1)[0]
    state = rule.generator.get_state()
    found = rule.discriminator_loss(x, fake)
    rule.generator.set_state(state)
    (ax, px), (af, pf) = POLICY(x, generator=rule.generator), POLICY(fake, generator=rule.generator)
    phi, critic = rule.discriminator.features, rule.discriminator.score
    expected = hinge_discriminator_loss(critic(phi(ax)), critic(phi(af))) + 0.7 * augself_discriminator_loss(
        rule.head(phi(ax), phi(x)), rule.head(phi(af), phi(fake)), px, pf
    )
    torch.testing.assert_close(found, expected)
    rule.generator.set_state(state)
    again = rule.generator_loss(x)
    expected = hinge_generator_loss(critic(phi(ax))) + 0.4 * augself_generator_loss(rule.head(phi(ax), phi(x)), px)
    torch.testing.assert_close(again, expected)


def test_each_step_trains_its_own_network() -> None:
    rule = built()
    before = copy.deepcopy(rule.state_dict())
    rule.optimizers[0].param_groups[0]["lr"] = 0.0
    rule.step(*batch())
    assert all(torch.equal(v, before["synthesis"][k]) for k, v in rule.synthesis.state_dict().items())
    for part in ("discriminator", "head"):
        held = rule._parts()[part].state_dict()
        assert not all(torch.equal(value, before[part][name]) for name, value in held.items())
    assert all(p.requires_grad for part in rule._parts().values() for p in part.parameters())
    other = built()
    other.optimizers[1].param_groups[0]["lr"] = 0.0
    other.step(*batch())
    assert not all(torch.equal(v, before["synthesis"][k]) for k, v in other.synthesis.state_dict().items())
    assert all(torch.equal(v, before["head"][k]) for k, v in other.head.state_dict().items())


def test_a_batch_is_shared_out_among_the_discriminators_steps() -> None:
    seen: list[Tensor] = []

    class Watched(GAN):
        def discriminator_loss(self, real: Tensor, fake: Tensor, labels: Tensor | None = None) -> Tensor:
            seen.append(real)
            return super().discriminator_loss(real, fake, labels)

    plain = built(kind="plain")
    rule = Watched(plain.synthesis, plain.discriminator, plain.optimizers, 3, discriminator_steps=3)
    x, labels = batch()
    rule.step(x, labels)
    assert [len(part) for part in seen] == [4, 4, 4]
    assert torch.equal(torch.cat(seen), x)


def test_it_learns_a_simple_picture() -> None:
    rule = built()
    stripe = torch.zeros(1, 1, 8, 8)
    stripe[:, :, 3:5] = 1.0
    for _ in range(150):
        rule.step(stripe.expand(16, -1, -1, -1))
    made = rule.make(50).detach()
    assert (made[:, :, 3:5].mean() - made[:, :, [0, 1, 6, 7]].mean()).item() > 0.3


def test_resumes_bit_exactly() -> None:
    rule = built()
    for step in range(2):
        rule.step(*batch(step))
    file = io.BytesIO()
    torch.save(rule.state_dict(), file)
    file.seek(0)
    again = built(seed=1)
    again.load_state_dict(torch.load(file, weights_only=True))
    for step in range(2, 4):
        mine, its = rule.step(*batch(step)), again.step(*batch(step))
        assert all(torch.equal(mine[name], its[name]) for name in mine)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(1, 1, 8, 8)}, ValueError, "x must be at least 2 images"),
        ({"x": torch.zeros(12, 1, 8, 8, dtype=torch.int64)}, TypeError, "x must be floating point"),
        ({"labels": torch.zeros(12)}, TypeError, "labels must be int64"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, "labels must be 12"),
    ],
)
def test_a_refused_step_changes_nothing(change, error, message: str) -> None:
    rule = built(discriminator_steps=2)
    rule.step(*batch())
    before, state = weights(rule), rule.generator.get_state()
    x, labels = batch(1)
    given = {"x": x, "labels": labels, **change}
    with pytest.raises(error, match=message):
        rule.step(**given)
    assert all(torch.equal(one, other) for one, other in zip(before, weights(rule), strict=True))
    assert torch.equal(state, rule.generator.get_state())


def test_bad_arguments() -> None:
    for options, message in (
        ({"discriminator_weight": -1.0}, "discriminator_weight must be"),
        ({"generator_weight": float("nan")}, "generator_weight must be"),
        ({"discriminator_steps": 0}, "discriminator_steps must be at least 1"),
        ({"augment": DiffAugment(("light",))}, "head must be of augmentations among light"),
    ):
        with pytest.raises(ValueError, match=message):
            built(**options)
    rule = built(kind="plain")
    with pytest.raises(ValueError, match="optimizers must be two"):
        GAN(rule.synthesis, rule.discriminator, rule.optimizers[:1], 3)
    with pytest.raises(ValueError, match="in_features must be at least 1"):
        AugSelfHead(0, {})
