from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.unlearning import ConceptDomainCorrection, PatchDiscriminator, clean_estimate, preserve_gradient

BARS = torch.linspace(0.98, 0.05, 8)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.prompts, self.unused = nn.Linear(16, 16), nn.Embedding(4, 16), nn.Linear(1, 1)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return self.inner((x.flatten(1) + self.prompts(cond)).tanh()).view_as(x)


IMAGES, PRIOR = drawn(6, 1, 4, 4), drawn(6, 1, 4, 4, seed=1)
TARGET, ANCHOR, KEPT = (torch.full((6,), k) for k in (0, 1, 2))


def made(lr: float = 0.1, **options: object) -> ConceptDomainCorrection:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, critic = Net(), PatchDiscriminator(1, width=4, depth=2)
    optimizers = (torch.optim.SGD(net.parameters(), lr=lr), torch.optim.Adam(critic.parameters(), lr=1e-2))
    generator = torch.Generator().manual_seed(3)
    return ConceptDomainCorrection(net, critic, optimizers, BARS, generator=generator, **options)  # type: ignore[arg-type]


def step(rule: ConceptDomainCorrection, **options: Tensor) -> dict[str, Tensor]:
    return rule.step(IMAGES, TARGET, ANCHOR, PRIOR, KEPT, **options)


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_gradients_in_conflict_by_hand() -> None:
    kept = torch.tensor([-1.0, 1.0])
    for scale in ("projection", "unit"):
        found = preserve_gradient(torch.tensor([1.0, 0.0]), kept, scale=scale)  # type: ignore[arg-type]
        torch.testing.assert_close(found, torch.tensor([0.5, 0.5]))
    two = torch.tensor([2.0, 0.0])
    torch.testing.assert_close(preserve_gradient(two, kept), torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(preserve_gradient(two, kept, scale="unit"), torch.tensor([1.5, 0.5]))


def test_what_is_kept_is_orthogonal_after_the_projection_whatever_its_size() -> None:
    a, b = drawn(7, 3), drawn(7, 3, seed=1)
    b = b if (a * b).sum() < 0 else -b
    found = preserve_gradient(a, b)
    assert (found * b).sum().abs() < 1e-5
    torch.testing.assert_close(found, preserve_gradient(a, 1e3 * b))
    torch.testing.assert_close(preserve_gradient(10 * a, b), 10 * found)
    torch.testing.assert_close(preserve_gradient(a, b, 0.5), (a + found) / 2)


def test_without_conflict_or_lam_nothing_changes() -> None:
    a = drawn(5)
    assert torch.equal(preserve_gradient(a, a + 0.1 * a), a)
    assert torch.equal(preserve_gradient(a, -a, 0.0), a)
    assert torch.equal(preserve_gradient(a, torch.zeros(5)), a)


def test_tensors_are_treated_on_their_own() -> None:
    a, b = {"w": drawn(4), "v": drawn(3, seed=1)}, {"w": -drawn(4), "v": drawn(3, seed=1)}
    found = preserve_gradient(a, b)
    torch.testing.assert_close(found["w"], torch.zeros(4), atol=1e-6, rtol=0)
    assert torch.equal(found["v"], a["v"])
    with pytest.raises(ValueError, match="g_retain"):
        preserve_gradient(a, {"w": b["w"]})
    with pytest.raises(ValueError, match="g_retain"):
        preserve_gradient(drawn(3), drawn(4))
    with pytest.raises(ValueError, match="scale"):
        preserve_gradient(drawn(3), drawn(3), scale="cosine")  # type: ignore[call-overload]


def test_the_true_noise_gives_the_image_back() -> None:
    x, noise, bars = drawn(5, 1, 3, 3), drawn(5, 1, 3, 3, seed=1), torch.linspace(0.01, 1.0, 5)
    share = bars.view(-1, 1, 1, 1)
    torch.testing.assert_close(
        clean_estimate(share.sqrt() * x + (1 - share).sqrt() * noise, noise, bars), x, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_discriminator_scores_patches(depth: int) -> None:
    critic = PatchDiscriminator(3, width=2, depth=depth)
    assert critic(drawn(2, 3, 32, 32)).shape == (2, 1, 32 // 2**depth, 32 // 2**depth)
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in critic.modules()) == depth - 1


def test_the_warmup_trains_the_discriminator_alone() -> None:
    rule = made(warmup=2)
    before, critic = weights(rule.model), weights(rule.discriminator)
    for _ in range(2):
        assert step(rule).keys() == {"discriminator"}
    assert torch.equal(weights(rule.model), before)
    assert not torch.equal(weights(rule.discriminator), critic)
    assert step(rule).keys() == {"discriminator", "unlearn", "retain"}
    assert not torch.equal(weights(rule.model), before)
    assert torch.equal(weights(rule.frozen), before)
    assert all(p.grad is None for p in rule.frozen.parameters())


def test_the_discriminators_step_by_hand() -> None:
    rule = made(warmup=5)
    rule.optimizers[1] = torch.optim.SGD(rule.discriminator.parameters(), lr=0.1)
    t, noise = torch.arange(6), drawn(6, 1, 4, 4, seed=4)
    critic, net = copy.deepcopy(rule.discriminator), rule.frozen
    bars = BARS[t].view(-1, 1, 1, 1)
    x_t = bars.sqrt() * IMAGES + (1 - bars).sqrt() * noise
    with torch.no_grad():
        sides = [clean_estimate(x_t, net(x_t, t, cond), BARS[t]) for cond in (TARGET, ANCHOR)]
    loss = F.softplus(-critic(sides[0])).mean() + F.softplus(critic(sides[1])).mean()
    loss.backward()
    found = step(rule, t=t, noise=noise)
    torch.testing.assert_close(found["discriminator"], loss.detach())
    expected = torch.cat([(p - 0.1 * p.grad).detach().flatten() for p in critic.parameters()])
    torch.testing.assert_close(weights(rule.discriminator), expected)


@pytest.mark.parametrize("clip", [1e3, 1e-2])
def test_the_models_step_without_projection_fools_the_discriminator(clip: float) -> None:
    rule = made(warmup=0, lam=0.0, max_grad_norm=clip)
    t, noise = torch.arange(6), drawn(6, 1, 4, 4, seed=4)
    net = copy.deepcopy(rule.model)
    before = weights(net)
    found = step(rule, t=t, noise=noise)
    assert found.keys() == {"discriminator", "unlearn"}
    bars = BARS[t].view(-1, 1, 1, 1)
    x_t = bars.sqrt() * IMAGES + (1 - bars).sqrt() * noise
    loss = F.softplus(rule.discriminator(clean_estimate(x_t, net(x_t, t, TARGET), BARS[t]))).mean()
    loss.backward()
    gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in net.parameters()])
    gradient = gradient * min(1.0, clip / float(gradient.norm()))
    torch.testing.assert_close(weights(rule.model), before - 0.1 * gradient, atol=1e-5, rtol=1e-3)
    assert all(p.grad is None or p.grad.isfinite().all() for p in rule.discriminator.parameters())


def test_what_is_kept_is_never_descended() -> None:
    # With a discriminator that gives no gradient there is nothing to unlearn, and nothing moves.
    rule = made(warmup=0)
    rule.discriminator = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
    for p in rule.discriminator.parameters():
        nn.init.zeros_(p)
    rule.optimizers[1] = torch.optim.SGD(rule.discriminator.parameters(), lr=1e-30)
    before = weights(rule.model)
    step(rule)
    torch.testing.assert_close(weights(rule.model), before, atol=1e-7, rtol=0)
    rule.retain_weight = 1.0
    step(rule)
    assert not torch.allclose(weights(rule.model), before, atol=1e-4)


def test_the_anchor_stays_the_frozen_models_whatever_the_model_has_become() -> None:
    rule, seen = made(warmup=0), []
    with torch.no_grad():
        for p in rule.model.parameters():
            p.add_(0.3)
    rule.discriminator.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    t, noise = torch.arange(6), drawn(6, 1, 4, 4, seed=5)
    signal = BARS[t].view(-1, 1, 1, 1)
    x_t = signal.sqrt() * IMAGES + (1 - signal).sqrt() * noise
    with torch.no_grad():
        expected = [
            clean_estimate(x_t, model(x_t, t, cond), BARS[t])
            for model, cond in ((rule.model, TARGET), (rule.frozen, ANCHOR))
        ]
    step(rule, t=t, noise=noise)
    torch.testing.assert_close(seen[:2], expected)


def test_a_weight_of_what_is_kept_descends_its_loss() -> None:
    moved = []
    for weight in (0.0, 0.5, 1.0):
        rule = made(warmup=0, lam=0.0, retain_weight=weight)
        before = weights(rule.model)
        step(rule)
        moved.append(weights(rule.model) - before)
    torch.testing.assert_close(moved[2] - moved[0], 2 * (moved[1] - moved[0]), rtol=1e-3, atol=1e-6)
    rule = made(warmup=0)
    rule._noisy(IMAGES)  # what a step draws first
    x_t, t, noise = rule._noisy(PRIOR)
    F.mse_loss(rule.model(x_t, t, KEPT), noise).backward()
    slopes = [torch.zeros_like(p) if p.grad is None else p.grad for p in rule.model.parameters()]
    uphill = torch.cat([slope.flatten() for slope in slopes])
    assert F.cosine_similarity(moved[2] - moved[0], -uphill, dim=0) > 0.999


def test_equal_prompts_and_weights_give_equal_estimates() -> None:
    rule = made(warmup=0)
    t = torch.arange(6)
    one, other = (rule._estimate(net, IMAGES, t, TARGET) for net in (rule.model, rule.frozen))
    assert torch.equal(one, other)
    rule.clamp = 0.5
    assert rule._estimate(rule.model, IMAGES, t, TARGET).abs().max() == 0.5


def test_a_concept_moves_to_the_anchor() -> None:
    rule = made(lr=0.3, warmup=20, lam=0.0, max_grad_norm=10.0)
    t = torch.full((6,), 3)

    def apart() -> float:
        with torch.no_grad():
            sides = rule.model(IMAGES, t, TARGET), rule.frozen(IMAGES, t, ANCHOR)
        return float((sides[0].mean((0, 1)) - sides[1].mean((0, 1))).norm())

    before = apart()
    for _ in range(120):
        step(rule)
    assert math.isfinite(apart())
    assert apart() < before


def test_it_resumes_bit_exactly() -> None:
    rule, again = made(warmup=1), made(warmup=1)
    for _ in range(3):
        step(rule)
    again.load_state_dict(copy.deepcopy(rule.state_dict()))
    for _ in range(2):
        one, other = step(rule), step(again)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_bad_input_is_named() -> None:
    rule = made()
    for name, arguments in {
        "target_cond": (IMAGES, TARGET[:5], ANCHOR, PRIOR, KEPT),
        "anchor_cond": (IMAGES, TARGET, ANCHOR[:5], PRIOR, KEPT),
        "prior_cond": (IMAGES, TARGET, ANCHOR, PRIOR, KEPT[:5]),
        "x0": (IMAGES[:0], TARGET[:0], ANCHOR[:0], PRIOR, KEPT),
    }.items():
        with pytest.raises(ValueError, match=name):
            rule.step(*arguments)
    with pytest.raises(TypeError, match="prior_x0"):
        rule.step(IMAGES, TARGET, ANCHOR, PRIOR.long(), KEPT)
    with pytest.raises(ValueError, match="t must"):
        step(rule, t=torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="noise"):
        step(rule, noise=IMAGES[:5])
    for options in ({"lam": -1.0}, {"warmup": -1}, {"max_grad_norm": 0.0}, {"clamp": 0.0}, {"scale": "cosine"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            made(**options)
    with pytest.raises(ValueError, match="alphas_cumprod"):
        ConceptDomainCorrection(rule.model, rule.discriminator, rule.optimizers, torch.tensor([0.0, 0.5]))


def test_steps_and_shares_out_of_range_are_named() -> None:
    for share in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="alpha_bar must be in"):
            clean_estimate(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([share]))


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e20])
def test_gradients_of_any_length_are_kept_from(size: float) -> None:
    g_unlearn, g_retain = torch.tensor([2.0, 0.0]), torch.tensor([-1.0, 1.0])
    found = preserve_gradient(g_unlearn, size * g_retain)
    torch.testing.assert_close(found, torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(preserve_gradient(size * g_unlearn, g_retain) / size, torch.tensor([1.0, 1.0]))
    unit = preserve_gradient(size * g_unlearn, g_retain, scale="unit")  # a length of 1 / sqrt(2) is taken away
    torch.testing.assert_close(unit, size * g_unlearn - torch.tensor([0.5, -0.5]))
    torch.testing.assert_close(preserve_gradient(g_unlearn, 0 * g_retain), g_unlearn)
