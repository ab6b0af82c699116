from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from trimtab.domain import AdaNPC, AdaNPCBN, NeighbourLoss, neighbour_vote


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(count: int, classes: int = 3, seed: int = 0) -> Tensor:
    return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed))


def model(**options: object) -> AdaNPC:
    found = AdaNPC(nn.Identity(), 4, 3, **{"k": 5, "threshold": 0.0, **options}).double()  # type: ignore[arg-type]
    found.remember(drawn(30, 4), labels(30))
    return found


# --- the vote ---


def test_one_neighbour_decides_alone() -> None:
    scores = model(k=1).predict(drawn(6, 4, seed=1), adapt=False)
    nearest = torch.nn.functional.cosine_similarity(drawn(6, 4, seed=1)[:, None], drawn(30, 4)[None], dim=2).argmax(1)
    expected = torch.full((6, 3), 1e-5, dtype=torch.float64).scatter(1, labels(30)[nearest][:, None], 1.0)
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_scores_are_those_of_sklearn(temperature: float) -> None:
    def weights(distance: np.ndarray) -> np.ndarray:
        return torch.from_numpy((1 - distance) / temperature).softmax(1).numpy()

    peer = KNeighborsClassifier(5, metric="cosine", weights=weights).fit(drawn(30, 4).numpy(), labels(30).numpy())
    x = drawn(8, 4, seed=1)
    found = model(temperature=temperature).predict(x, adapt=False)
    np.testing.assert_allclose(found, np.minimum(peer.predict_proba(x.numpy()) + 1e-5, 1), atol=1e-9)


def test_scores_sum_to_one_and_their_floor() -> None:
    scores = neighbour_vote(drawn(6, 9), labels(54).view(6, 9), 3, 0.3)
    torch.testing.assert_close(scores.sum(1), torch.full((6,), 1 + 3e-5, dtype=torch.float64))
    assert neighbour_vote(torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.int64), 3, 0.1).max() == 1


def test_temperature_goes_from_the_nearest_to_a_plain_vote() -> None:
    similarity, of = drawn(6, 9).sort(1, descending=True).values, labels(54).view(6, 9)
    cold = neighbour_vote(similarity, of, 3, 1e-4, floor=0)
    torch.testing.assert_close(cold, torch.nn.functional.one_hot(of[:, 0], 3).double())
    warm = neighbour_vote(similarity, of, 3, 1e6, floor=0)
    torch.testing.assert_close(warm, torch.nn.functional.one_hot(of, 3).double().mean(1), atol=1e-5, rtol=0)


def test_what_is_not_there_has_no_vote() -> None:
    similarity = torch.tensor([[0.5, -math.inf]])
    assert neighbour_vote(similarity, torch.tensor([[1, 0]]), 2, 0.1, floor=0).tolist() == [[0, 1]]


# --- the memory ---


def test_a_batch_is_scored_before_it_is_remembered() -> None:
    x = drawn(10, 4, seed=1)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    one, other = model(), model()
    torch.testing.assert_close(one.predict(x)[order], other.predict(x[order]))
    torch.testing.assert_close(one.predict(x, adapt=False), other.predict(x, adapt=False))
    assert len(one.memory) == 40


def test_what_was_learned_counts() -> None:
    """A chain of samples leads the memory from one class's place to where another's was."""
    angles = torch.linspace(0, 1.4, 15, dtype=torch.float64)
    chain = torch.stack([angles.cos(), angles.sin()], 1)
    source = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)

    def made(threshold: float) -> AdaNPC:
        found = AdaNPC(nn.Identity(), 2, 2, k=1, threshold=threshold).double()
        found.remember(source, torch.arange(2))
        return found

    learning, fixed = made(0.0), made(1.1)
    said = [[int(held.predict(x[None]).argmax()) for x in chain] for held in (learning, fixed)]
    assert said[0] == [0] * 15
    assert said[1] == [0] * 8 + [1] * 7


def test_above_one_nothing_is_remembered_and_reset_is_exact() -> None:
    never = model(threshold=1.1)
    before = {name: value.clone() for name, value in never.state_dict().items()}
    never.predict(drawn(10, 4, seed=1))
    learned = model()
    learned.predict(drawn(10, 4, seed=1))
    learned.predict(drawn(3, 4, seed=2))
    learned.reset()
    for held in (never, learned):
        for name, value in held.state_dict().items():
            assert torch.equal(value, before[name])


def test_confidence_has_two_readings() -> None:
    x = drawn(40, 4, seed=1)
    scores = model().predict(x, adapt=False)
    for reading, best in (("softmax", scores.softmax(1).amax(1)), ("score", scores.amax(1))):
        threshold = float(best.median())
        held = model(threshold=threshold, confidence=reading)
        held.predict(x)
        assert len(held.memory) == 30 + int((best >= threshold).sum())
    assert scores.softmax(1).max() <= math.e / (math.e + 2) + 1e-4


def test_labels_that_are_learned_are_its_own() -> None:
    held, x = model(), drawn(6, 4, seed=1)
    scores = held.predict(x)
    assert torch.equal(held.memory.payload[30:], scores.argmax(1))
    torch.testing.assert_close(held.memory.features[30:], torch.nn.functional.normalize(x))


def test_within_a_radius_everyone_votes() -> None:
    x = drawn(6, 4, seed=1)
    everyone = model(radius=-1.0).scores(x)
    torch.testing.assert_close(everyone, model(k=30).scores(x))
    torch.testing.assert_close(model(radius=1.0).scores(x), model().scores(x))  # nobody is as near
    held = model(radius=0.9)
    cosines = held.memory.cosines(x)
    found = held.scores(x)
    for row in range(6):
        near = cosines[row] >= 0.9
        if near.any():
            weight = (cosines[row][near] / 0.1).softmax(0)
            expected = torch.zeros(3, dtype=torch.float64).scatter_add(0, labels(30)[near], weight)
            torch.testing.assert_close(found[row], (expected + 1e-5).clamp(max=1))


def test_fewer_entries_than_neighbours_all_vote() -> None:
    x = drawn(6, 4, seed=1)
    torch.testing.assert_close(model(k=100).scores(x), model(k=30).scores(x))


def test_the_encoder_is_not_disturbed() -> None:
    encoder = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    held = AdaNPC(encoder, 4, 3, k=3)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    held.remember(drawn(20, 4).float(), labels(20))
    held.predict(drawn(5, 4).float())
    assert encoder.training
    assert encoder[1].training
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name])


# --- the variant with a batch normalisation ---


def test_one_round_is_the_vote_on_normalised_features() -> None:
    x, plain = drawn(8, 4, seed=1), model()
    asked = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
    found = AdaNPCBN(model(), steps=1).predict(x)
    torch.testing.assert_close(found, plain.scores(asked))
    held = AdaNPCBN(model(), steps=1)
    held.predict(x)
    torch.testing.assert_close(held.model.memory.features[30:], torch.nn.functional.normalize(asked))
    assert torch.equal(held.model.memory.payload[30:], found.argmax(1))


def test_scale_and_shift_of_the_features_do_not_count() -> None:
    x = drawn(8, 4, seed=1)
    moved = x * torch.tensor([2.0, 0.5, 10.0, 1.0]) + torch.tensor([3.0, -1.0, 0.0, 50.0])
    here, there = (AdaNPCBN(model(), steps=3, lr=0.05).predict(part) for part in (x, moved.double()))
    torch.testing.assert_close(here, there, atol=1e-3, rtol=0)


def test_rounds_make_the_votes_more_certain_and_remember_each_time() -> None:
    x = drawn(20, 4, seed=1)

    def entropy(scores: Tensor) -> float:
        return float(-(scores.softmax(1) * scores.log_softmax(1)).sum(1).mean())

    held = AdaNPCBN(model(k=30, temperature=0.5, threshold=1.1), steps=30, lr=0.02)
    before = entropy(AdaNPCBN(model(k=30, temperature=0.5, threshold=1.1), steps=1).predict(x))
    assert entropy(held.predict(x)) < before
    assert len(held.model.memory) == 30  # nothing is confident
    keen = AdaNPCBN(model(), steps=3)
    keen.predict(x)
    assert len(keen.model.memory) == 30 + 3 * 20
    first = AdaNPCBN(model(), steps=1, lr=0.1)
    first.predict(x)
    assert (first.norm.weight.sub(1).abs() > 0.05).all()  # Adam's first step is as long as its rate


def test_reset_and_a_saved_state_bring_the_variant_back() -> None:
    x, held, other = drawn(10, 4, seed=1), AdaNPCBN(model(), lr=0.1), AdaNPCBN(model(), lr=0.1)
    fresh = held.predict(x)
    state = held.state_dict()
    again = held.predict(x)
    assert not torch.equal(again, fresh)
    other.load_state_dict(state)
    assert torch.equal(other.predict(x), again)
    held.reset()
    assert torch.equal(held.predict(x), fresh)
    with pytest.raises(ValueError, match="state must be"):
        held.load_state_dict({"model": state["model"]})


def test_the_variant_refuses_single_inputs_and_other_models() -> None:
    with pytest.raises(ValueError, match="x must be a batch of at least two"):
        AdaNPCBN(model()).predict(drawn(1, 4))
    with pytest.raises(TypeError, match="model must be AdaNPC"):
        AdaNPCBN(nn.Identity())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps must"):
        AdaNPCBN(model(), steps=0)
    with pytest.raises(RuntimeError, match="remember"):
        AdaNPCBN(AdaNPC(nn.Identity(), 4, 3)).predict(drawn(2, 4).float())


# --- training for the vote ---


def test_the_loss_is_minus_the_log_of_the_score() -> None:
    loss = NeighbourLoss(4, 3, capacity=20, k=5, temperature=(0.5, 0.5)).double()
    loss.update(drawn(20, 4), labels(20))
    z, targets = drawn(6, 4, seed=1), labels(6, seed=1)
    held = AdaNPC(nn.Identity(), 4, 3, k=5, temperature=0.5).double()
    held.remember(drawn(20, 4), labels(20))
    expected = -held.scores(z).gather(1, targets[:, None]).log().mean()
    torch.testing.assert_close(loss(z, targets), expected)


def test_temperature_falls_linearly_and_stays() -> None:
    loss = NeighbourLoss(4, 3, capacity=20, k=20, temperature=(1.0, 0.1), anneal_steps=4).double()
    loss.update(drawn(20, 4), labels(20))
    z, targets = drawn(6, 4, seed=1), labels(6, seed=1)
    for steps, temperature in ((1, 0.775), (2, 0.55), (4, 0.1), (9, 0.1)):
        loss.step.fill_(steps)
        similarity, near = loss.queue.nearest(z, 20)
        scores = neighbour_vote(similarity, loss.queue.payload[near], 3, temperature)
        torch.testing.assert_close(loss(z, targets), -scores.gather(1, targets[:, None]).log().mean())


def test_gradient_pulls_towards_the_right_class() -> None:
    loss = NeighbourLoss(2, 2, capacity=2, k=2).double()
    loss.update(torch.eye(2, dtype=torch.float64), torch.arange(2))
    z = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
    loss(z, torch.tensor([0])).backward()
    assert z.grad[0, 0] < 0 < z.grad[0, 1]
    assert loss.queue.features.grad is None


def test_an_empty_queue_gives_no_gradient() -> None:
    loss = NeighbourLoss(2, 2, capacity=4, k=2)
    z = torch.ones(3, 2, requires_grad=True)
    value = loss(z, torch.tensor([0, 1, 0]))
    value.backward()
    assert value == 0
    assert (z.grad == 0).all()


def test_training_by_the_vote_learns() -> None:
    torch.manual_seed(0)
    encoder, loss = nn.Linear(6, 4), NeighbourLoss(4, 3, capacity=128, k=10, anneal_steps=100)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.02)
    for step in range(150):
        x = drawn(32, 6, seed=step).float()
        targets = x[:, :3].argmax(1)
        z = encoder(x)
        value = loss(z, targets)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        loss.update(z, targets)
    held = AdaNPC(encoder, 4, 3, k=10)
    x = drawn(300, 6, seed=999).float()
    held.remember(x, x[:, :3].argmax(1))
    test = drawn(300, 6, seed=1000).float()
    assert (held(test).argmax(1) == test[:, :3].argmax(1)).float().mean() > 0.85


# --- refusals ---


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"k": 0}, "k"),
        ({"temperature": 0.0}, "temperature"),
        ({"threshold": -0.1}, "threshold"),
        ({"confidence": "margin"}, "confidence"),
        ({"radius": 1.5}, "radius"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must"):
        model(**options)


def test_an_empty_memory_and_late_source_samples_are_refused() -> None:
    with pytest.raises(RuntimeError, match="remember"):
        AdaNPC(nn.Identity(), 4, 3).predict(drawn(2, 4).float())
    held = model()
    held.predict(drawn(2, 4))
    with pytest.raises(RuntimeError, match="reset"):
        held.remember(drawn(2, 4), labels(2))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: model().remember(drawn(2, 4), torch.tensor([0, 3])), "y"),
        (lambda: model().remember(drawn(2, 4), torch.tensor([0])), "y"),
        (lambda: model().remember(drawn(2, 4), torch.tensor([0.0, 1.0])), "y"),
        (lambda: neighbour_vote(drawn(2, 3), labels(2).view(2, 1), 3, 1.0), "similarity and labels"),
        (lambda: NeighbourLoss(4, 3, capacity=5, k=6), "k"),
        (lambda: NeighbourLoss(4, 3)(drawn(0, 4), labels(0)), "z and targets"),
        (lambda: NeighbourLoss(4, 3)(drawn(2, 4), torch.tensor([0, 3])), "targets"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call, name: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{name} must"):
        call()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state["model"].update({"num_source": torch.zeros(7)}),
        lambda state: state["norm"].update({"weight": torch.zeros(7)}),
        lambda state: state["optimizer"].update({"param_groups": []}),
        lambda state: state.update({"optimizer": {}}),
        lambda state: state["optimizer"]["state"][0].update({"exp_avg": torch.zeros(7)}),
    ],
)
def test_a_state_of_another_variant_changes_nothing(spoil) -> None:
    held, other = AdaNPCBN(model(), lr=0.1), AdaNPCBN(model(), lr=0.1)
    other.predict(drawn(10, 4, seed=1))
    state, before = other.state_dict(), held.state_dict()
    spoil(state)
    with pytest.raises(ValueError, match="must"):
        held.load_state_dict(state)
    for part in ("model", "norm"):
        for name, value in held.state_dict()[part].items():
            assert torch.equal(value, before[part][name]), name
    assert held.state_dict()["optimizer"] == before["optimizer"]
