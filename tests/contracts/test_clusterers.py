"""What every clusterer keeps: scikit-learn's conventions, the same clusters from one seed, nothing after a refusal.

A new one joins by one line in MEMBERS: an estimator that is quick to fit. Rules that train a network on clusters from
batches of the user's join RULES.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import make_blobs
from sklearn.utils.estimator_checks import check_estimator
from torch import Tensor, nn

from trimtab.ops.cluster_scores import cluster_accuracy
from trimtab.semisup import DEPICT, MRDD, SP2OT, MaskedCrossViewVAE, SP2OTClustering, ViewSpecificVAE, mlp_autoencoder

MEMBERS: dict[str, Any] = {
    "DEPICT": DEPICT(3, pretrain_epochs=60, init_epochs=5, epochs=5, random_state=0),
    "DEPICT, sharper targets": DEPICT(
        3, targets="dec", pretrain_epochs=60, init_epochs=5, epochs=5, batch_size=32, random_state=0
    ),
    "SP2OTClustering": SP2OTClustering(3, epochs=8, batch_size=16, random_state=0),
    "SP2OTClustering, all at once": SP2OTClustering(
        3, epochs=8, batch_size=16, initial_mass=1.0, semantic=0.0, random_state=0
    ),
}


@pytest.fixture(params=MEMBERS.values(), ids=MEMBERS)
def member(request: pytest.FixtureRequest) -> Any:
    return clone(request.param)


def blobs() -> tuple[np.ndarray, np.ndarray]:
    return make_blobs(90, 4, centers=3, cluster_std=0.8, random_state=3)


X, CLASSES = blobs()


def test_finds_what_is_plain(member: Any) -> None:
    found = member.fit_predict(X)
    assert cluster_accuracy(CLASSES, found) > 0.95
    assert found.dtype.kind == "i"
    np.testing.assert_array_equal(found, member.labels_)
    np.testing.assert_array_equal(member.predict(X), found)
    probs = member.predict_proba(X)
    np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-5)
    np.testing.assert_array_equal(probs.argmax(1), found)
    assert member.n_features_in_ == 4


def test_same_seed_same_bits_and_nothing_else_is_touched(member: Any) -> None:
    kept, states = X.copy(), (torch.get_rng_state(), np.random.get_state()[1].copy())  # type: ignore[index]  # noqa: NPY002
    first, second = (clone(member).fit(X).predict_proba(X) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(X, kept)
    assert torch.equal(torch.get_rng_state(), states[0])
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])  # type: ignore[index]  # noqa: NPY002


def test_other_seeds_draw_otherwise(member: Any) -> None:
    first = clone(member).fit(X).predict_proba(X)
    assert not np.array_equal(clone(member).set_params(random_state=1).fit(X).predict_proba(X), first)


def test_units_origin_and_types_do_not_matter(member: Any) -> None:
    found = clone(member).fit_predict(X)
    for moved in ((X * 1e4 + 5).tolist(), torch.tensor(X * 1e-4).float()):
        assert cluster_accuracy(found, clone(member).fit_predict(moved)) > 0.97


def test_a_refused_fit_leaves_what_was_fitted(member: Any) -> None:
    held = member.fit(X).predict_proba(X)
    holed = X.copy()
    holed[3, 1] = np.nan
    for bad in (holed, X[:2], X[:0], X[:, 0]):
        with pytest.raises(ValueError):
            member.fit(bad)
        assert member.n_features_in_ == 4
        np.testing.assert_array_equal(member.predict_proba(X), held)
    for bad in (X[:, :2], holed):
        with pytest.raises(ValueError):
            member.predict(bad)


def test_parameters_are_read_and_set(member: Any) -> None:
    for name, value in member.get_params(deep=False).items():
        assert getattr(member, name) is value
    assert clone(member).get_params().keys() == member.get_params().keys()


QUICK = [
    DEPICT(3, pretrain_epochs=10, init_epochs=3, epochs=2, batch_size=16),
    SP2OTClustering(3, epochs=3, warmup=5, batch_size=16),
]


@pytest.mark.parametrize("estimator", QUICK, ids=lambda estimator: type(estimator).__name__)
def test_scikit_learns_checks(estimator: Any) -> None:
    check_estimator(estimator, on_skip=None)


# --- rules that are given batches -------------------------------------------------------------------------------------


class Rule(NamedTuple):
    make: Callable[[int], Any]
    step: Callable[[Any, int], dict[str, Tensor]]
    """With the batch of a number."""
    refused: list[Callable[[Any], Any]]


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def sp2ot(seed: int) -> SP2OT:
    return SP2OT(3, 4, 20, bank_size=12, neighbors=3, lam=5.0)


def sp2ot_step(rule: SP2OT, number: int) -> dict[str, Tensor]:
    first, second = (drawn(number + i, 6, 3).requires_grad_() for i in (0, 50))
    found = rule.loss(first, second, drawn(number + 100, 6, 4))
    found["total"].backward()
    rule.update()
    assert first.grad is not None
    return {"total": found["total"].detach(), "mass": found["mass"], "gradient": first.grad}


def image(inputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 16), nn.Unflatten(1, (1, 4, 4)))


def mrdd(seed: int) -> MRDD:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first = MaskedCrossViewVAE(nn.Flatten(), [image(16), image(16)], 16, 2, patch=2)
        own = [
            ViewSpecificVAE(nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), image(4), 2),
            ViewSpecificVAE(nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), image(4), 2),
        ]
        return MRDD(first, own, generator=torch.Generator().manual_seed(seed))


def mrdd_step(rule: MRDD, number: int) -> dict[str, Tensor]:
    batch = [drawn(number + i, 6, 1, 4, 4) for i in (0, 50)]
    first = rule.step_consistency(batch)
    return {**first, **{f"specific {name}": value for name, value in rule.step_specific(batch).items()}}


RULES = {
    "SP2OT": Rule(
        sp2ot,
        sp2ot_step,
        [
            lambda rule: rule.loss(drawn(0, 6, 3), drawn(0, 6, 2), drawn(0, 6, 4)),
            lambda rule: rule.loss(drawn(0, 0, 3), drawn(0, 0, 3), drawn(0, 0, 4)),
            lambda rule: rule.loss(drawn(0, 6, 3), drawn(0, 6, 3) * torch.nan, drawn(0, 6, 4)),
            lambda rule: rule.load_state_dict({}),
            lambda rule: rule.load_state_dict({**rule.state_dict(), "bank.features": torch.ones(3, 3)}),
        ],
    ),
    "MRDD": Rule(
        mrdd,
        mrdd_step,
        [
            lambda rule: rule.step_consistency([drawn(0, 6, 1, 4, 4)]),
            lambda rule: rule.step_specific([drawn(0, 6, 1, 4, 4), drawn(0, 5, 1, 4, 4)]),
            lambda rule: rule.step_specific([drawn(0, 0, 1, 4, 4)] * 2),
            lambda rule: rule.load_state_dict({}),
            lambda rule: rule.load_state_dict({**rule.state_dict(), "optimizers": {}}),
            lambda rule: rule.load_state_dict({**rule.state_dict(), "specific": {}}),
        ],
    ),
}


@pytest.fixture(params=RULES.values(), ids=RULES)
def rule(request: pytest.FixtureRequest) -> Rule:
    return request.param


def saved(held: Any) -> bytes:
    file = io.BytesIO()
    torch.save(held.state_dict(), file)
    return file.getvalue()


def test_a_rule_resumes_bit_exactly(rule: Rule) -> None:
    held = rule.make(0)
    for number in range(3):
        rule.step(held, number)
    again = rule.make(1)
    again.load_state_dict(torch.load(io.BytesIO(saved(held)), weights_only=True))
    for number in range(3, 6):
        one, other = rule.step(held, number), rule.step(again, number)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_rule_draws_from_its_generator_alone(rule: Rule) -> None:
    state = torch.get_rng_state()
    first, second = ([rule.step(held, number) for number in range(3)] for held in (rule.make(0), rule.make(0)))
    assert all(torch.equal(a[name], b[name]) for a, b in zip(first, second, strict=True) for name in a)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_refused_call_of_a_rule_changes_nothing(rule: Rule) -> None:
    held = rule.make(0)
    rule.step(held, 0)
    before = saved(held)
    for call in rule.refused:
        with pytest.raises((ValueError, TypeError)):
            call(held)
        assert saved(held) == before


# Networks that hold weights alone: CLUB, DenoisingAutoencoder, MaskedCrossViewVAE and ViewSpecificVAE.
# TransductiveClusterer holds its settings alone; its episodes are functions of what they are given.


def test_an_autoencoder_passes_alike_in_both_modes() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = mlp_autoencoder(4, 2)
    x = torch.tensor(X[:5]).float()
    assert torch.equal(network.train()(x).code, network.eval()(x).code)
