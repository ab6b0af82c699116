from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.federated import (
    RobustFedAvg,
    Update,
    bulyan,
    coordinate_median,
    krum,
    krum_scores,
    multi_krum,
    plain_mean,
    simulate,
    trimmed_mean,
)
from trimtab.federated.robust_means import gram


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_median_and_trimmed_mean_are_numpys_and_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    for workers in (1, 2, 7, 8):
        rows = drawn(workers, 20)
        np.testing.assert_allclose(coordinate_median(rows), np.median(rows, axis=0))
    rows = drawn(10, 20)
    np.testing.assert_allclose(trimmed_mean(rows, 2), stats.trim_mean(rows.numpy(), 0.2))
    torch.testing.assert_close(trimmed_mean(rows, 0), rows.mean(0))


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 8, 17, 64, 65])
def test_trimmed_means_are_those_of_sorted_columns_to_the_bit(workers: int) -> None:
    updates = torch.randn(workers, 20_000, generator=torch.Generator().manual_seed(workers))
    updates[:, ::3] = updates[:, ::3].round()  # with ties
    for trim in {0, (workers - 1) // 2}:
        expected = updates.sort(0).values[trim : workers - trim].mean(0)
        assert torch.equal(trimmed_mean(updates, trim), expected)


def test_krum_by_its_definition() -> None:
    rows, f = drawn(9, 4), 2
    scores = []
    for i in range(9):
        away = sorted(((rows[i] - rows[j]) ** 2).sum().item() for j in range(9) if j != i)
        scores.append(sum(away[: 9 - f - 2]))
    np.testing.assert_allclose(krum_scores(rows, f), scores)
    order = np.argsort(scores)
    assert torch.equal(krum(rows, f), rows[order[0]])
    torch.testing.assert_close(multi_krum(rows, f, keep=3), rows[order[:3].copy()].mean(0))
    torch.testing.assert_close(multi_krum(rows, f), rows[order[:7].copy()].mean(0))


def test_krum_keeps_its_distances_beside_a_huge_update() -> None:
    rows = drawn(9, 4).float()
    spoilt = rows.clone()
    spoilt[8] = 1e15
    honest = krum_scores(spoilt, 1)[:8]
    torch.testing.assert_close(honest, krum_scores(rows[:8], 0), rtol=1e-5, atol=0)


def test_multi_krum_is_flowers() -> None:
    pytest.importorskip("flwr")
    from flwr.app import Array, ArrayRecord, RecordDict
    from flwr.serverapp.strategy.multikrum import select_multikrum

    rows = drawn(9, 6)
    contents = [RecordDict({"arrays": ArrayRecord({"w": Array(row.numpy())})}) for row in rows]
    chosen = select_multikrum(contents, 2, 4)
    peer = np.mean([content["arrays"]["w"].numpy() for content in chosen], axis=0)
    np.testing.assert_allclose(multi_krum(rows, 2, keep=4), peer)


def _bulyan_choices(rows: list[list[float]], left: tuple[int, ...], f: int, wanted: int) -> set[frozenset[int]]:
    """All sets that Krum may choose one after the other: of two that are each other's nearest either may be first."""
    if wanted == 0:
        return {frozenset()}
    scores = {}
    for i in left:
        away = sorted(sum((a - b) ** 2 for a, b in zip(rows[i], rows[j], strict=True)) for j in left if j != i)
        scores[i] = sum(away[: max(1, len(left) - f - 2)])
    best = [i for i in left if scores[i] <= min(scores.values()) * (1 + 1e-9)]
    rest = {i: tuple(j for j in left if j != i) for i in best}
    return {more | {i} for i in best for more in _bulyan_choices(rows, rest[i], f, wanted - 1)}


@pytest.mark.parametrize("seed", range(4))
def test_bulyan_by_its_definition(seed: int) -> None:
    """n - 2f by Krum, one after the other; of these the n - 4f values nearest to the median in each coordinate."""
    f, rows = 2, drawn(11, 3, seed=seed).tolist()
    possible = []
    for chosen in _bulyan_choices(rows, tuple(range(11)), f, 11 - 2 * f):
        means = []
        for column in zip(*(rows[i] for i in chosen), strict=True):
            nearest = sorted(column, key=lambda value: abs(value - np.median(column)))
            means.append(float(np.mean(nearest[: 11 - 4 * f])))
        possible.append(torch.tensor(means, dtype=torch.float64))
    found = bulyan(torch.tensor(rows, dtype=torch.float64), f)
    assert any(torch.allclose(found, one) for one in possible)


def test_bulyan_without_wrong_workers_is_nearly_all_of_them() -> None:
    rows = drawn(7, 5)
    torch.testing.assert_close(bulyan(rows, 0), rows.mean(0))
    rows[2] = 1e9
    kept = bulyan(rows, 1)
    others = rows[[0, 1, 3, 4, 5, 6]]
    assert ((kept >= others.amin(0)) & (kept <= others.amax(0))).all()


def test_gram_in_pieces() -> None:
    rows = drawn(4, 11).float()
    torch.testing.assert_close(gram(rows, chunk=3), rows.double() @ rows.double().T)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda rows: trimmed_mean(rows, 3), "trim"),
        (lambda rows: krum(rows, 2), "updates must be at least 7"),
        (lambda rows: krum(rows, -1), "byzantine"),
        (lambda rows: multi_krum(rows, 1, keep=7), "keep"),
        (lambda rows: bulyan(rows, 1), "updates must be at least 7"),
    ],
)
def test_too_few_workers_are_named(call, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call(drawn(6, 3))


class TestRobustFedAvg:
    def test_the_rule_acts_on_moves_and_not_on_statistics(self) -> None:
        model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
        clients = [(drawn(8, 3, seed=i).float() + i, torch.full((8,), i % 2)) for i in range(3)]
        start = {name: value.clone() for name, value in model.state_dict().items()}
        algorithm = RobustFedAvg(lambda updates: torch.ones_like(updates[0]), lr=0.1)
        params = simulate(algorithm, model, clients, rounds=1).state.server.params
        assert list(params) == list(start)
        for name in ("0.weight", "1.weight", "1.bias"):
            torch.testing.assert_close(params[name], start[name] + 1)
        means = torch.stack([0.1 * x.mean(0) for x, _ in clients])
        torch.testing.assert_close(params["0.running_mean"], means.median(0).values)
        assert params["0.num_batches_tracked"] == 1

    def test_a_client_with_wrong_labels_and_a_large_step_is_outvoted(self) -> None:
        data = [(x := drawn(40, 4, seed=i).float(), (x[:, 0] > 0).long()) for i in range(5)]
        data[2] = (1000 * data[2][0], 1 - data[2][1])
        ends = {}
        for rule in (plain_mean, coordinate_median):
            model = nn.Linear(4, 2)
            nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
            draws = torch.Generator().manual_seed(0)
            simulate(RobustFedAvg(rule, lr=0.2, batch_size=40), model, data, rounds=10, generator=draws)
            ends[rule] = (model(data[0][0]).argmax(1) == data[0][1]).float().mean()
        assert ends[coordinate_median] > 0.8 > ends[plain_mean]


@pytest.mark.parametrize("size", [1e3, 1e6, 1e25])
def test_bulyan_chooses_alike_in_any_order_beside_huge_updates(size: float) -> None:
    draws = torch.Generator().manual_seed(0)
    for seed in range(10):
        rows = drawn(11, 20, seed=seed).float()
        rows[3], rows[5] = size, -size
        found = [bulyan(rows[torch.randperm(11, generator=draws)], 2) for _ in range(5)]
        torch.testing.assert_close(torch.stack(found), found[0].expand(5, 20))


@pytest.mark.parametrize("scale", [1e-25, 1e-15, 1e15, 1e25])
def test_krum_has_no_unit(scale: float) -> None:
    rows = drawn(7, 9).float()
    for rule in (krum, multi_krum, bulyan):
        torch.testing.assert_close(rule(scale * rows, 1) / scale, rule(rows, 1))


class TestWhatIsNoNumber:
    """Buffers that no step is taken on: one client must not decide them."""

    @staticmethod
    def model() -> nn.Module:
        model = nn.Linear(2, 2)
        model.register_buffer("phase", torch.tensor([1 + 1j, 2.0]))
        model.register_buffer("places", torch.tensor([0, 1, 2]))
        model.register_buffer("on", torch.tensor([True, False]))
        return model

    @pytest.mark.parametrize("wrong", [0, 1, 2])
    def test_one_wrong_client_of_three_changes_nothing(self, wrong: int) -> None:
        algorithm = RobustFedAvg(coordinate_median, lr=0.1)
        server = algorithm.init_server(self.model(), 3)
        spoilt = {
            "phase": torch.full((2,), 1e9j),
            "places": torch.tensor([9, -9, 9]),
            "on": torch.tensor([False, True]),
        }
        sent = [Update(server.params | (spoilt if i == wrong else {}), 1) for i in range(3)]
        after = algorithm.aggregate(server, sent).params
        assert list(after) == list(server.params)
        for name, value in server.params.items():
            assert torch.equal(after[name], value)
            assert after[name].dtype == value.dtype

    def test_of_two_the_lower_one(self) -> None:
        algorithm = RobustFedAvg(coordinate_median, lr=0.1)
        server = algorithm.init_server(self.model(), 2)
        sent = [Update(server.params | {"places": torch.tensor(v)}, 1) for v in ([5, 1, 2], [4, 7, 2])]
        assert algorithm.aggregate(server, sent).params["places"].tolist() == [4, 1, 2]

    def test_nobody_is_named(self) -> None:
        algorithm = RobustFedAvg(coordinate_median, lr=0.1)
        with pytest.raises(ValueError, match="updates must be at least one"):
            algorithm.aggregate(algorithm.init_server(self.model(), 2), [])
