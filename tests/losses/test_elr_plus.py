from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trimtab.losses import ELRPlus
from trimtab.losses.elr_plus import Mixture, draw_mixture, elr_plus_loss
from trimtab.ops.rampup import sigmoid_rampup

X = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
Y = torch.arange(8) % 3
INDEX = torch.tensor([5, 1, 9, 3, 0, 7, 2, 11])


def networks(seed: int = 0) -> list[nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return [nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)) for _ in range(2)]


def rule(nets: list[nn.Module], seed: int = 0, **options: object) -> ELRPlus:
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in nets]
    return ELRPlus(nets, optimizers, 12, 3, generator=torch.Generator().manual_seed(seed), **options)  # type: ignore[arg-type]


def test_switched_off_it_trains_both_networks_by_cross_entropy() -> None:
    nets, plain = networks(), networks()
    trainer = rule(nets, lam=0.0, mixup_alpha=0.0)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in plain]
    for _ in range(3):
        values = trainer.step(X, Y, INDEX)
        for number, (net, optimizer) in enumerate(zip(plain, optimizers, strict=True)):
            loss = F.cross_entropy(net(X), Y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            torch.testing.assert_close(values[f"loss_{number}"], loss.detach())
    for net, other in zip(nets, plain, strict=True):
        torch.testing.assert_close(net.state_dict(), other.state_dict())


def test_a_step_from_its_definition() -> None:
    nets = networks()
    trainer = rule(nets, lam=2.0, beta=0.6, ema_decay=0.9, ema_rampup=0, lam_rampup=10)
    trainer.step(X.flip(0), Y, INDEX)  # so that averages and memories are no longer blank
    trainer.step(X, Y, INDEX)
    frozen, averages = copy.deepcopy(nets), copy.deepcopy(trainer.averages)
    before = [memory.rows.clone() for memory in trainer.memories]
    mixtures = [Mixture(0.8, torch.arange(8).roll(1)), Mixture(0.6, torch.arange(8).roll(3))]
    values = trainer.step(X, Y, INDEX, mixtures)
    onehot = F.one_hot(Y, 3).float()
    for number, (weight, partner) in enumerate(mixtures):
        teacher = averages[1 - number](X).softmax(1).detach()
        past = 0.6 * before[number][INDEX] + 0.4 * teacher
        torch.testing.assert_close(trainer.memories[number].rows[INDEX], past)
        logits = frozen[number](weight * X + (1 - weight) * X[partner])
        soft = weight * onehot + (1 - weight) * onehot[partner]
        q = weight * past + (1 - weight) * past[partner]
        penalty = (1 - (q * logits.softmax(1)).sum(1)).log().mean()
        lam = 2.0 * sigmoid_rampup(3, 10)
        expected = -(soft * logits.log_softmax(1)).sum(1).mean() + lam * penalty
        torch.testing.assert_close(values[f"loss_{number}"], expected.detach())
        for averaged, old, new in zip(
            trainer.averages[number].module.parameters(),
            averages[number].module.parameters(),
            nets[number].parameters(),
            strict=True,
        ):
            torch.testing.assert_close(averaged, 0.9 * old + 0.1 * new)


def test_each_network_learns_from_the_others_average() -> None:
    nets = networks()
    trainer = rule(nets)
    with torch.no_grad():
        trainer.averages[1].module[-1].bias.copy_(
            torch.tensor([9.0, 0.0, 0.0])
        )  # the second one's average says class 0
    trainer.step(X, Y, INDEX)
    assert (trainer.memories[0].rows[INDEX].argmax(1) == 0).all()
    assert not (trainer.memories[1].rows[INDEX].argmax(1) == 0).all()


def test_average_follows_closely_before_the_ramp_ends() -> None:
    nets = networks()
    trainer = rule(nets, ema_decay=0.997, ema_rampup=1000)
    for _ in range(3):
        trainer.step(X, Y, INDEX)
    gap = max(
        (averaged - new).abs().max().item()
        for averaged, new in zip(trainer.averages[0].module.parameters(), nets[0].parameters(), strict=True)
    )
    assert gap < 0.01


def test_averages_ramp_up_by_the_authors_curve_and_see_batches_as_they_are() -> None:
    """The first average is the network; at the n-th step the decay is exp(-5 (1 - n / length)^2) of its last value."""
    nets = networks()
    trainer = rule(nets, ema_decay=0.9, ema_rampup=10)
    assert all(part.training for average in trainer.averages for part in average.modules())
    held = []
    for _ in range(3):
        trainer.step(X, Y, INDEX)
        held.append((nets[0][0].weight.detach().clone(), trainer.averages[0].module[0].weight.detach().clone()))
    torch.testing.assert_close(held[0][1], held[0][0])
    for step in (2, 3):
        decay = 0.9 * math.exp(-5 * (1 - step / 10) ** 2)
        now, before = held[step - 1], held[step - 2]
        torch.testing.assert_close(now[1], decay * before[1] + (1 - decay) * now[0])


def test_resumes_exactly() -> None:
    one = rule(networks())
    for _ in range(3):
        one.step(X, Y, INDEX)
    other = rule(networks(seed=5), seed=7)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for _ in range(2):
        torch.testing.assert_close(one.step(X, Y, INDEX), other.step(X, Y, INDEX), rtol=0, atol=0)
    torch.testing.assert_close(one.predict(X), other.predict(X), rtol=0, atol=0)


def test_the_generator_alone_decides() -> None:
    state = torch.random.get_rng_state()
    first, again, different = rule(networks()), rule(networks()), rule(networks(), seed=1)
    for _ in range(2):
        value = first.step(X, Y, INDEX)
        torch.testing.assert_close(again.step(X, Y, INDEX), value, rtol=0, atol=0)
        other = different.step(X, Y, INDEX)
    assert other["loss_0"] != value["loss_0"]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_prediction_is_the_mean_of_both() -> None:
    nets = networks()
    value = rule(nets).predict(X)
    torch.testing.assert_close(value, (nets[0].eval()(X) + nets[1].eval()(X)) / 2)


def test_reweighting_multiplies_the_targets_by_the_past() -> None:
    logits, soft = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([[0.6, 0.4, 0.0]] * 2)
    past = torch.tensor([[0.1, 0.6, 0.3]] * 2)
    expected = F.cross_entropy(logits, torch.tensor([[0.2, 0.8, 0.0]] * 2))
    torch.testing.assert_close(elr_plus_loss(logits, soft, past, lam=0.0, reweight=True), expected)


def test_mixtures_are_drawn_from_the_beta_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.tensor([draw_mixture(2, 1.0, generator).weight for _ in range(2000)])
    assert weights.min() >= 0.5
    assert weights.mean().item() == pytest.approx(0.75, abs=0.02)  # the larger part of a uniformly broken stick
    assert draw_mixture(3, 0.0).weight == 1.0


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"lam": -1.0}, "lam"),
        ({"beta": 1.0}, "beta"),
        ({"mixup_alpha": -1.0}, "mixup_alpha"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"ema_rampup": -1}, "ema_rampup"),
        ({"lam_rampup": -1}, "lam_rampup"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        rule(networks(), **options)


def test_two_different_networks_and_optimizers_are_needed() -> None:
    nets = networks()
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]
    with pytest.raises(ValueError, match="networks"):
        ELRPlus([nets[0], nets[0]], optimizers, 12, 3)
    with pytest.raises(ValueError, match="optimizers"):
        ELRPlus(nets, optimizers[:1], 12, 3)


def test_bad_batches_change_nothing() -> None:
    trainer = rule(networks())
    trainer.step(X, Y, INDEX)
    before = copy.deepcopy([net.state_dict() for net in trainer.networks])
    rows = [memory.rows.clone() for memory in trainer.memories]
    for x, y, index, message in [
        (X, Y[:-1], INDEX, "targets"),
        (X, Y, INDEX[:-1], "index"),
        (X, Y, torch.zeros(8, dtype=torch.int64), "index"),
    ]:
        with pytest.raises(ValueError, match=message):
            trainer.step(x, y, index)
    for net, old in zip(trainer.networks, before, strict=True):
        torch.testing.assert_close(net.state_dict(), old, rtol=0, atol=0)
    assert all(torch.equal(memory.rows, old) for memory, old in zip(trainer.memories, rows, strict=True))


def test_a_row_without_a_past_keeps_its_targets_when_reweighted() -> None:
    logits, soft = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([[0.6, 0.4, 0.0]] * 2)
    value = elr_plus_loss(logits, soft, torch.zeros(2, 3), lam=0.0, reweight=True)
    torch.testing.assert_close(value, F.cross_entropy(logits, soft))


def test_a_wrong_label_or_index_changes_nothing_not_even_the_draws() -> None:
    trainer = rule(networks())
    trainer.step(X, Y, INDEX)
    before = copy.deepcopy(trainer.state_dict())
    for labels, index in ((Y + 3, INDEX), (Y - 5, INDEX), (Y, INDEX + 100)):
        with pytest.raises(ValueError, match=r"targets|index"):
            trainer.step(X, labels, index)
    torch.testing.assert_close(trainer.state_dict(), before, rtol=0, atol=0)


def test_a_foreign_state_is_refused_and_changes_nothing() -> None:
    trainer = rule(networks())
    trainer.step(X, Y, INDEX)
    before = copy.deepcopy(trainer.state_dict())
    foreign = copy.deepcopy(before)
    foreign["memories"][1]["rows"] = torch.zeros(2, 2)
    with pytest.raises(RuntimeError):
        trainer.load_state_dict(foreign)
    torch.testing.assert_close(trainer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("mixtures", "error"),
    [
        ([Mixture(0.7, torch.arange(8))], "two, one per network"),
        ([Mixture(0.7, torch.arange(3))] * 2, "a partner for each of 8"),
        ([Mixture(0.7, torch.arange(8) + 1)] * 2, r"in \[0, 8\)"),
        ([Mixture(math.nan, torch.arange(8))] * 2, "finite"),
    ],
)
def test_mixtures_that_do_not_fit_change_nothing(mixtures: list[Mixture], error: str) -> None:
    nets = networks()
    rule = ELRPlus(nets, [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets], 12, 3)
    before = copy.deepcopy(rule.state_dict())
    with pytest.raises(ValueError, match=f"mixtures must .*{error}|mixtures must be {error}"):
        rule.step(X, Y, INDEX, mixtures)
    with pytest.raises(TypeError, match="index must be a tensor, got list"):
        rule.step(X, Y, INDEX.tolist())
    torch.testing.assert_close(rule.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("alpha", [1e-3, 1e-6, 1e-300])
def test_hardly_anything_is_mixed_where_alpha_is_tiny(alpha: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [draw_mixture(4, alpha, generator).weight for _ in range(200)]
    assert sum(weight < 0.99 for weight in weights) <= 2  # the chance of one is about 10 alpha
