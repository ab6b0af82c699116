"""AdaMixUp against its equations: mixtures, regions, both losses, and who receives which gradient."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trimtab.optim import AdaMixUp, MixPolicy, Region, mix, mixup


def trunk(inputs=5, width=16):
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh())


def model_of(seed=0, folds=2, dtype=torch.float64, gated=False, policy=None):
    torch.manual_seed(seed)
    policy = policy or MixPolicy(trunk(5 if gated else 5 * folds), 16, folds, gated=gated)
    return AdaMixUp(trunk(), 16, 3, policy).to(dtype)


def enlarge(model):
    """Heads of ordinary size: at the start theirs are too small for some gradients to show."""
    for layer in (model.head, *model.discriminator, *model.policy.head):
        nn.init.normal_(layer.weight, std=0.3)
    return model


def batch_of(size=8, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 5, generator=generator, dtype=dtype), torch.randint(0, 3, (size,), generator=generator)


class Fixed(nn.Module):
    """A policy that always gives these shares, of which the last is the width."""

    def __init__(self, *shares):
        super().__init__()
        self.shares = torch.tensor(shares)
        self.folds = len(shares) - 1

    def forward(self, parts, *, generator=None):
        return self.shares.log().expand(parts.shape[1], -1).to(parts)


# --- mixing ---


def test_mixtures_of_one_hot_labels_split_the_cross_entropy():
    logits, y = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 4
    partner, share = y.roll(1), torch.rand(6, dtype=torch.float64)
    onehot = F.one_hot(torch.stack([y, partner]), 4).double()
    soft = mix(onehot, torch.stack([share, 1 - share], 1))
    torch.testing.assert_close(soft.sum(1), torch.ones(6, dtype=torch.float64))
    one, other = (F.cross_entropy(logits, labels, reduction="none") for labels in (y, partner))
    torch.testing.assert_close(F.cross_entropy(logits, soft), (share * one + (1 - share) * other).mean())


def test_mixup_mixes_inputs_and_labels_alike():
    x, y = torch.randn(5, 2, 3, 3), torch.eye(5)
    partner, weights = torch.tensor([1, 2, 3, 4, 0]), torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    mixed, soft = mixup(x, y, weights=weights, partner=partner)
    for i, share in enumerate(weights):
        torch.testing.assert_close(mixed[i], share * x[i] + (1 - share) * x[partner[i]])
        torch.testing.assert_close(soft[i], share * y[i] + (1 - share) * y[partner[i]])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixup_draws_from_beta(alpha):
    generator, count = torch.Generator().manual_seed(0), 20_000
    labels = torch.tensor([[1.0], [0.0]]).repeat(count // 2, 1)
    weights, _ = mixup(labels, labels, alpha, partner=torch.arange(count).roll(1), generator=generator)
    drawn = weights[::2, 0]  # of a sample at one and its partner at zero
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.02)
    assert drawn.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.06)


def test_mixup_goes_by_the_generator():
    x, y = batch_of(dtype=torch.float32)
    first, second = (mixup(x, F.one_hot(y, 3).float(), generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"targets": torch.arange(8) % 3}, TypeError, "targets"),
        ({"targets": torch.zeros(7, 3)}, ValueError, "targets"),
        ({"alpha": 0.0}, ValueError, "alpha"),
        ({"weights": torch.tensor(0.3)}, ValueError, "weights"),
        ({"partner": torch.arange(7)}, ValueError, "partner"),
        ({"alpha": float("nan")}, ValueError, "alpha"),
    ],
)
def test_mixup_refuses_by_name(arguments, error, name):
    x, _ = batch_of()
    with pytest.raises(error, match=name):
        mixup(**{"x": x, "targets": torch.zeros(8, 3), **arguments})


# --- regions ---


def test_known_region():
    region = Region(torch.tensor([[0.3, 0.3]]), torch.tensor([0.4]))
    torch.testing.assert_close(region.weights(torch.tensor([[0.5, 0.5]])), torch.tensor([[0.5, 0.5]]))
    torch.testing.assert_close(region.weights(torch.tensor([[0.0, 1.0]])), torch.tensor([[0.3, 0.7]]))


@given(seed=st.integers(0, 999), folds=st.integers(2, 4))
@settings(max_examples=25, deadline=None)
def test_weights_stay_in_the_region_and_on_the_simplex(seed, folds):
    generator = torch.Generator().manual_seed(seed)
    region = Region.from_logits(5 * torch.randn(30, folds + 1, generator=generator, dtype=torch.float64))
    e = torch.rand(30, folds, generator=generator, dtype=torch.float64)
    weights = region.weights(e / e.sum(1, keepdim=True))
    torch.testing.assert_close(weights.sum(1), torch.ones(30, dtype=torch.float64))
    assert (weights >= region.low).all()
    assert (weights <= region.low + region.width[:, None] + 1e-12).all()
    assert (region.low >= 0).all()
    assert (region.low + region.width[:, None] <= 1 + 1e-12).all()


@pytest.mark.parametrize("folds", [2, 3])
def test_points_of_the_region_are_uniform(folds):
    """With the whole simplex as region, the first sample's mean weight and its variance are those of Dirichlet(1)."""
    torch.manual_seed(0)
    policy = Fixed(*[0.0] * folds, 1.0)
    seen = []
    model = AdaMixUp(nn.Identity(), 1, 2, policy)
    model.trunk.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    x = torch.zeros(20_000, 1)
    x[:10_000] = 1.0
    partners = torch.randint(10_000, 20_000, (folds - 1, 10_000))
    model.loss(x, torch.zeros(20_000, dtype=torch.int64), partners=partners)
    first = seen[0][:10_000]
    assert first.mean().item() == pytest.approx(1 / folds, abs=0.01)
    assert first.var().item() == pytest.approx((folds - 1) / (folds**2 * (folds + 1)), rel=0.05)


# --- the policy ---


def test_policy_starts_at_thirds():
    region = Region.from_logits(MixPolicy(trunk(), 16)(torch.randn(2, 6, 5)))
    torch.testing.assert_close(region.width, torch.full((6,), 1 / 3), atol=1e-4, rtol=0)
    torch.testing.assert_close(region.low, torch.full((6, 2), 1 / 3), atol=1e-4, rtol=0)


def test_gated_policy_sees_the_average_under_its_gates():
    seen = []
    policy = MixPolicy(trunk(), 16)
    policy.trunk.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    parts, gates = torch.randn(2, 6, 5), torch.randn(2, 6, 5)
    policy(parts, gates=gates)
    torch.testing.assert_close(seen[0], (gates[0] * parts[0] + gates[1] * parts[1]) / 2)
    policy(torch.ones(2, 4000, 5), generator=torch.Generator().manual_seed(0))
    drawn = seen[1] * 2
    # Two normal variables truncated at two deviations: each has variance 0.774 and is at most 2.
    assert drawn.abs().max() <= 4
    assert drawn.var().item() == pytest.approx(2 * 0.7737, rel=0.03)


def test_ungated_policy_tells_the_samples_of_a_pair_apart():
    policy = enlarge(model_of()).policy
    one, other = torch.randn(2, 6, 5, dtype=torch.float64)
    assert not torch.allclose(policy(torch.stack([one, other])), policy(torch.stack([other, one])))
    torch.testing.assert_close(policy(torch.stack([one, other])), policy.head(policy.trunk(torch.cat([one, other], 1))))


# --- the loss ---


@pytest.mark.parametrize("folds", [2, 3])
def test_loss_is_the_sum_of_its_two_means(folds):
    """Written out sample by sample, with 9 samples of which 4 are mixed."""
    model = enlarge(model_of(folds=folds))
    x, y = batch_of(9)
    partners = torch.tensor([[5, 0, 8, 2], [1, 1, 7, 6]])[: folds - 1]
    e = torch.tensor([[0.2, 0.5, 0.3], [0.0, 0.0, 1.0], [0.6, 0.2, 0.2], [0.1, 0.8, 0.1]], dtype=torch.float64)
    e = e[:, :folds] / e[:, :folds].sum(1, keepdim=True).clamp(min=1e-9)
    e[1] = F.one_hot(torch.tensor(folds - 1), folds)
    losses = model.loss(x, y, partners=partners, e=e)

    classification, intrusion = [], []
    for i in range(4):
        members = [i, *partners[:, i].tolist()]
        shares = model.policy(x[members].unsqueeze(1))[0].softmax(0)
        weights = [shares[j] + shares[-1] * e[i, j] for j in range(folds)]
        mixed = sum(w * x[m] for w, m in zip(weights, members, strict=True))
        log_p = model(mixed[None])[0].log_softmax(0)
        classification.append(-sum(w * log_p[y[m]] for w, m in zip(weights, members, strict=True)))
        intrusion.append(-model.discriminator(model.trunk(mixed[None]))[0].log_softmax(0)[0])
    classification += [-model(x[i : i + 1])[0].log_softmax(0)[y[i]] for i in range(4)]
    intrusion += [-model.discriminator(model.trunk(x[i : i + 1]))[0].log_softmax(0)[1] for i in range(9)]
    expected = torch.stack(classification).mean(), torch.stack(intrusion).mean()
    torch.testing.assert_close(losses["classification"], expected[0].detach())
    torch.testing.assert_close(losses["intrusion"], expected[1].detach())
    torch.testing.assert_close(losses["total"], expected[0] + expected[1])


def test_a_policy_that_mixes_nothing_leaves_plain_cross_entropy():
    model = model_of(policy=Fixed(1.0, 0.0, 0.0))
    x, y = batch_of()
    losses = model.loss(x, y)
    torch.testing.assert_close(losses["classification"], F.cross_entropy(model(x[:4]), y[:4]).detach())
    torch.testing.assert_close(losses["low"], torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(4, 2))


def test_at_the_start_nothing_is_known():
    losses = model_of().loss(*batch_of(64))
    assert losses["intrusion"].item() == pytest.approx(math.log(2), abs=1e-2)
    assert losses["classification"].item() == pytest.approx(math.log(3), abs=2e-2)


def test_all_three_networks_minimise_the_one_loss():
    """Gradients of the total, the policy's among them, equal the slopes of its value."""
    model = enlarge(model_of())
    x, y = batch_of()
    drawn = {"partners": torch.tensor([[5, 0, 7, 2]]), "e": torch.tensor([[0.3, 0.7]] * 4, dtype=torch.float64)}
    model.loss(x, y, **drawn)["total"].backward()
    for p in (model.policy.head[1].bias, model.policy.trunk[0].bias, model.trunk[0].bias, model.discriminator[1].bias):
        with torch.no_grad():
            values = []
            for move in (1e-6, -2e-6):
                p[0] += move
                losses = model.loss(x, y, **drawn)
                values.append(losses["classification"] + losses["intrusion"])
            p[0] += 1e-6
        slope = ((values[0] - values[1]) / 2e-6).item()
        assert abs(slope) > 1e-5
        assert p.grad[0].item() == pytest.approx(slope, rel=1e-4)


def test_the_discriminator_alone_moves_the_policy_too():
    """Towards mixtures that it can tell from real samples: a step down its loss lowers it."""
    model = enlarge(model_of())
    x, y = batch_of()
    drawn = {"partners": torch.tensor([[5, 0, 7, 2]]), "e": torch.tensor([[0.3, 0.7]] * 4, dtype=torch.float64)}
    nn.init.zeros_(model.head.weight)  # a classifier that sees nothing gives no gradient
    nn.init.zeros_(model.head.bias)
    losses = model.loss(x, y, **drawn)
    losses["total"].backward()
    gradients = [p.grad for p in model.policy.parameters()]
    assert all(g.abs().sum() > 0 for g in gradients)
    with torch.no_grad():
        for p, g in zip(model.policy.parameters(), gradients, strict=True):
            p -= 1e-2 * g
    assert model.loss(x, y, **drawn)["intrusion"] < losses["intrusion"]


def test_one_pass_through_the_trunk_whose_statistics_see_all_samples():
    model = model_of(dtype=torch.float32)
    model.trunk = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 16))
    sizes = []
    model.trunk.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    model.loss(*batch_of(8, dtype=torch.float32))
    assert sizes == [12]
    assert model.trunk[0].num_batches_tracked == 1


def test_draws_come_from_the_generator_alone():
    model, (x, y) = model_of(gated=True), batch_of()

    def total(seed):
        return model.loss(x, y, generator=torch.Generator().manual_seed(seed))["total"].item()

    state = torch.random.get_rng_state()
    assert total(1) == total(1)
    assert total(1) != total(2)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_partners_differ_within_a_batch_and_reach_its_second_half():
    model, seen = model_of(), []
    model.policy.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.arange(64, dtype=torch.float64)[:, None].expand(64, 5)
    model.loss(x, torch.zeros(64, dtype=torch.int64))
    own, partners = seen[0][..., 0].long()
    assert torch.equal(own, torch.arange(32))
    assert partners.unique().numel() == 32
    assert partners.max() >= 32


def test_images_and_half_precision():
    def features():
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 16))

    model = AdaMixUp(features(), 16, 3, MixPolicy(features(), 16))
    x, y = torch.rand(8, 1, 8, 8), torch.arange(8) % 3
    with torch.autocast("cpu", torch.bfloat16):
        total = model.loss(x, y)["total"]
    total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_learns_and_its_policy_moves():
    model = model_of(dtype=torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 5, generator=generator)
    y = x[:, :3].argmax(1)
    for _ in range(150):
        losses = model.loss(x, y, generator=generator)
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
    assert (model(x).argmax(1) == y).float().mean() > 0.9
    assert (losses["width"] - 1 / 3).abs().max() > 0.05


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"targets": torch.zeros(8)}, TypeError, "targets"),
        ({"targets": torch.zeros(7, dtype=torch.int64)}, ValueError, "targets"),
        ({"x": torch.zeros(3, 5), "targets": torch.zeros(3, dtype=torch.int64)}, ValueError, "x"),
        ({"partners": torch.zeros(4, dtype=torch.int64)}, ValueError, "partners"),
        ({"e": torch.zeros(4, 3)}, ValueError, "e must have shape"),
    ],
)
def test_loss_refuses_by_name(arguments, error, name):
    x, y = batch_of()
    with pytest.raises(error, match=name):
        model_of().loss(**{"x": x, "targets": y, **arguments})


def test_arguments_out_of_range_are_named():
    with pytest.raises(ValueError, match="folds"):
        MixPolicy(trunk(), 16, folds=1)
    with pytest.raises(ValueError, match="num_classes"):
        AdaMixUp(trunk(), 16, 1, MixPolicy(trunk(), 16))


class TestWhatMayBeMixed:
    def test_integers_are_refused_for_they_would_all_be_rounded_away(self):
        pictures = torch.randint(0, 255, (4, 3), dtype=torch.uint8)
        with pytest.raises(TypeError, match="x must be floating point.*torch.uint8"):
            mixup(pictures, torch.eye(4))
        with pytest.raises(TypeError, match="parts must be floating point"):
            mix(torch.stack([pictures, pictures]), torch.full((4, 2), 0.5))
        model = AdaMixUp(nn.Identity(), 3, 4, MixPolicy(nn.Identity(), 3))
        with pytest.raises(TypeError, match="x must be floating point"):
            model.loss(pictures, torch.arange(4))

    def test_a_tiny_alpha_takes_one_of_the_two_whole(self):
        """Beta(a, a) tends to a coin's toss as a goes to 0; both its gammas are too small for a number."""
        labels = torch.eye(2)[torch.arange(4000) % 2]
        partner = (torch.arange(4000) + 1) % 4000
        _, mixed = mixup(
            torch.zeros(4000, 1), labels, 1e-4, partner=partner, generator=torch.Generator().manual_seed(0)
        )
        share = (mixed * labels).sum(1)
        assert ((share < 1e-3) | (share > 1 - 1e-3)).double().mean() > 0.99
        assert abs(share.mean() - 0.5) < 0.03
