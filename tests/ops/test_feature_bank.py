from __future__ import annotations

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from trimtab.ops import feature_bank
from trimtab.ops.feature_bank import FeatureBank

NAN = float("nan")


def drawn(rows: int, dim: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def labelled(capacity: int | None, rows: int, dim: int = 4) -> FeatureBank:
    bank = FeatureBank(capacity, dim, payload=(), payload_dtype=torch.int64)
    bank.add(drawn(rows, dim), torch.arange(rows))
    return bank


def held(bank: FeatureBank) -> set[int]:
    return set(bank.payload[bank.filled].tolist())


@pytest.mark.parametrize("sizes", [[3], [3, 3], [2, 5, 1], [12], [5, 5, 5]])
def test_the_oldest_make_room(sizes: list[int]) -> None:
    bank, added = FeatureBank(5, 4, payload=(), payload_dtype=torch.int64), 0
    for size in sizes:
        bank.add(drawn(size), torch.arange(added, added + size))
        added += size
    assert held(bank) == set(range(max(0, added - 5), added))
    assert len(bank) == min(added, 5)


def test_rows_have_length_one_and_carry_their_payload() -> None:
    bank, z = FeatureBank(6, 4, payload=(3,)), drawn(6)
    probs = drawn(6, 3).softmax(1)
    bank.add(100 * z, probs)
    torch.testing.assert_close(bank.features, F.normalize(z))
    torch.testing.assert_close(bank.payload, probs)


@pytest.mark.parametrize("at_once", [1, 50, 1 << 22])
def test_neighbours_are_those_of_sklearn(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(feature_bank, "_AT_ONCE", at_once)
    rows, queries = drawn(30), drawn(7, seed=1)
    bank = FeatureBank(None, 4).double()
    bank.add(rows.double())
    values, places = bank.nearest(queries.double(), k=5)
    distance, expected = NearestNeighbors(n_neighbors=5, metric="cosine").fit(rows.numpy()).kneighbors(queries.numpy())
    np.testing.assert_array_equal(places, expected)
    np.testing.assert_allclose(values, 1 - distance, atol=1e-6)


def test_the_query_itself_is_left_out() -> None:
    z = drawn(10)
    z[4] = 3 * z[7]  # the same direction twice
    bank = FeatureBank(10, 4)
    bank.write(torch.arange(10), z)
    own = torch.arange(10)
    _, places = bank.nearest(z, 9, exclude_self=own)
    assert not (places == own[:, None]).any()
    assert (places[4, 0], places[7, 0]) == (7, 4)
    dropped, _ = bank.nearest(z, 3, exclude_self=True)
    torch.testing.assert_close(dropped, bank.nearest(z, 4)[0][:, 1:])


def test_own_rows_are_left_out_in_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_bank, "_AT_ONCE", 30)
    bank = labelled(10, 10)
    own = torch.arange(10).flip(0)
    _, places = bank.nearest(drawn(10)[own], 9, exclude_self=own)
    assert not (places == own[:, None]).any()


def test_beyond_what_is_held_cosines_are_minus_infinity() -> None:
    bank = labelled(8, 3)
    values, places = bank.nearest(drawn(2), 5)
    assert values[:, :3].isfinite().all()
    assert (values[:, 3:] == -torch.inf).all()
    assert set(places[0, :3].tolist()) == {0, 1, 2}


def test_rows_that_are_not_finite_are_left_out() -> None:
    z = drawn(3)
    z[1, 2] = NAN
    queue = FeatureBank(3, 4)
    queue.add(z)
    assert queue.filled.tolist() == [True, False, True]
    assert queue.features.isfinite().all()
    indexed = FeatureBank(3, 4, payload=(2,))
    indexed.write(torch.arange(3), drawn(3, seed=1), torch.ones(3, 2))
    payload = torch.zeros(3, 2)
    payload[0, 0] = NAN
    before = indexed.features.clone()
    indexed.write(torch.arange(3), z, payload)
    assert torch.equal(indexed.features[:2], before[:2])
    assert indexed.payload[:, 0].tolist() == [1, 1, 0]
    torch.testing.assert_close(indexed.features[2], F.normalize(z[2], dim=0))


def test_a_payload_that_is_not_finite_is_not_queued() -> None:
    bank = FeatureBank(2, 4, payload=())
    bank.add(drawn(2), torch.tensor([1.0, NAN]))
    assert bank.filled.tolist() == [True, False]


def test_gradients_reach_the_query_also_after_more_was_added() -> None:
    bank = labelled(5, 5)
    z = drawn(2, seed=3).double().float().requires_grad_()
    values, _ = bank.nearest(z, 2)
    bank.add(drawn(5, seed=4), torch.arange(5))
    values.sum().backward()
    assert z.grad is not None
    assert z.grad.abs().sum() > 0
    torch.testing.assert_close((z.grad * z.detach()).sum(1), torch.zeros(2), atol=1e-6, rtol=0)  # of a cosine


def test_length_of_a_query_does_not_matter() -> None:
    bank = labelled(6, 6)
    for scale in (1e-4, 1e4):
        torch.testing.assert_close(bank.nearest(scale * drawn(3), 4), bank.nearest(drawn(3), 4))


def test_autocast_keeps_cosines_in_full_precision() -> None:
    bank = labelled(6, 6)
    expected = bank.nearest(drawn(3), 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(bank.nearest(drawn(3), 4), expected)
    assert bank.nearest(drawn(3).bfloat16(), 4)[0].dtype == torch.float32


def test_nothing_asked_nothing_found() -> None:
    values, places = labelled(4, 4).nearest(torch.zeros(0, 4), 2)
    assert values.shape == places.shape == (0, 2)
    bank = labelled(4, 2)
    bank.add(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert len(bank) == 2


@pytest.mark.parametrize("capacity", [6, None])
def test_reset_forgets_all_but_the_first(capacity: int | None) -> None:
    bank, fresh = labelled(capacity, 3), labelled(capacity, 3)
    bank.add(drawn(2, seed=5), torch.tensor([8, 9]))
    bank.reset(keep=3)
    assert {n: v.tolist() for n, v in bank.state_dict().items()} == {
        n: v.tolist() for n, v in fresh.state_dict().items()
    }
    bank.reset()
    assert len(bank) == 0


@pytest.mark.parametrize("capacity", [5, None])
def test_a_saved_bank_goes_on_where_it_was(capacity: int | None) -> None:
    bank = labelled(capacity, 7)
    file = io.BytesIO()
    torch.save(torch.nn.ModuleDict({"bank": bank}).state_dict(), file)
    file.seek(0)
    again = FeatureBank(capacity, 4, payload=(), payload_dtype=torch.int64)
    torch.nn.ModuleDict({"bank": again}).load_state_dict(torch.load(file, weights_only=True))
    for one in (bank, again):
        one.add(drawn(1, seed=6), torch.tensor([20]))
    for name, value in bank.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


@pytest.mark.parametrize("capacity", [5, None])
def test_a_refused_state_changes_nothing(capacity: int | None) -> None:
    bank = labelled(capacity, 3)
    before = {name: value.clone() for name, value in bank.state_dict().items()}
    with pytest.raises(ValueError, match="state_dict must"):
        bank.load_state_dict(FeatureBank(4, 3).state_dict())
    for name, value in bank.state_dict().items():
        assert torch.equal(value, before[name])
    bank.load_state_dict(before)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda bank: bank.add(drawn(2)), "payload"),
        (lambda bank: bank.add(drawn(2), torch.zeros(3)), "payload"),
        (lambda bank: bank.add(drawn(2, 3), torch.zeros(2)), "z"),
        (lambda bank: bank.add(torch.ones(2, 4, dtype=torch.int64), torch.zeros(2)), "z"),
        (lambda bank: bank.write(torch.tensor([0, 0]), drawn(2), torch.zeros(2)), "index"),
        (lambda bank: bank.write(torch.tensor([0, 6]), drawn(2), torch.zeros(2)), "index"),
        (lambda bank: bank.write(torch.tensor([0.0, 1.0]), drawn(2), torch.zeros(2)), "index"),
        (lambda bank: bank.write(torch.tensor([0]), drawn(2), torch.zeros(2)), "index"),
        (lambda bank: bank.add(drawn(2), torch.tensor([float("nan"), 1.0])), "payload"),
        (lambda bank: bank.add(drawn(2), torch.tensor([0.5, 1.0])), "payload"),
        (lambda bank: bank.add(drawn(2), torch.zeros(2).numpy()), "payload"),
        (lambda bank: bank.nearest(drawn(2), 7), "k"),
        (lambda bank: bank.nearest(drawn(2), 6, exclude_self=True), "k"),
        (lambda bank: bank.nearest(drawn(2), 0), "k"),
        (lambda bank: bank.nearest(drawn(2), 2, exclude_self=torch.tensor([0])), "exclude_self"),
        (lambda bank: bank.reset(keep=7), "keep"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(call, name: str) -> None:
    bank = labelled(6, 4)
    before = {held: value.clone() for held, value in bank.state_dict().items()}
    with pytest.raises((ValueError, TypeError), match=f"^{name} must"):
        call(bank)
    for held_name, value in bank.state_dict().items():
        assert torch.equal(value, before[held_name])


def test_sizes_are_refused_by_name() -> None:
    for options, name in (((0, 2), "capacity"), ((2, 0), "dim"), ((2, 2, (0,)), "payload")):
        with pytest.raises(ValueError, match=name):
            FeatureBank(*options)
    with pytest.raises(ValueError, match="capacity"):
        FeatureBank(None, 2).write(torch.tensor([0]), torch.ones(1, 2))
