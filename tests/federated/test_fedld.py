from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from trimtab.federated import FedLD, MarginControlLoss, ServerState, Update, confidence_penalty, principal_aggregate
from trimtab.federated.simulation import simulate


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestMarginControlLoss:
    def test_uniform_outputs(self) -> None:
        loss = MarginControlLoss(0.03)(torch.zeros(4, 10, dtype=torch.float64), torch.arange(4))
        assert loss.item() == pytest.approx(math.log(10) + 0.03 * math.log(1.4))
        mean = MarginControlLoss(0.03, "sample")(torch.zeros(4, 10, dtype=torch.float64), torch.arange(4))
        assert mean.item() == pytest.approx(math.log(10) + 0.03 * math.log(1.1))

    def test_by_the_formula(self) -> None:
        logits = drawn(5, 3)
        p = logits.softmax(1)
        assert confidence_penalty(logits).item() == pytest.approx(math.log(1 + (p**2).sum()))
        assert confidence_penalty(logits, "sample").item() == pytest.approx(
            sum(math.log(1 + (row**2).sum()) for row in p) / 5
        )

    def test_only_the_mean_over_samples_is_free_of_the_batch_size(self) -> None:
        logits = drawn(5, 3)
        twice = logits.repeat(2, 1)
        torch.testing.assert_close(confidence_penalty(twice, "sample"), confidence_penalty(logits, "sample"))
        assert confidence_penalty(twice) > confidence_penalty(logits) + 0.3

    def test_it_holds_back_the_margin(self) -> None:
        logits = torch.tensor([[4.0, 0.0]], requires_grad=True)
        confidence_penalty(logits).backward()
        assert logits.grad[0, 0] > 0 > logits.grad[0, 1]

    def test_without_weight_it_is_cross_entropy(self) -> None:
        logits, targets = drawn(5, 3), torch.tensor([0, 1, 2, 0, 1])
        assert torch.equal(MarginControlLoss(0.0)(logits, targets), nn.functional.cross_entropy(logits, targets))

    def test_bad_arguments_are_named(self) -> None:
        with pytest.raises(ValueError, match="weight"):
            MarginControlLoss(-1.0)
        with pytest.raises(ValueError, match="reduction"):
            MarginControlLoss(reduction="mean")


class TestPrincipalAggregate:
    def test_by_hand(self) -> None:
        rows = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
        one = principal_aggregate(rows, 0.5)  # share 4/5, length 2 of the first, which is orthogonal to the second
        torch.testing.assert_close(one, torch.tensor([0.8, 0.0], dtype=torch.float64))
        both = principal_aggregate(rows, 1.0)
        torch.testing.assert_close(both, torch.tensor([0.8, 0.1], dtype=torch.float64))

    def test_as_written_in_the_module(self) -> None:
        rows, m, k = drawn(5, 12), 5, 4
        left, s, _ = torch.linalg.svd(rows, full_matrices=False)
        s = s.square() / m
        total = torch.zeros(12, dtype=torch.float64)
        for g in rows:
            for j in range(k):
                u = rows.T @ left[:, j]
                total += g.norm() * s[j] / s.sum() * torch.sign(g @ u) * u / u.norm()
        torch.testing.assert_close(principal_aggregate(rows, 0.8), total / m)

    def test_the_number_of_directions_is_rounded_down(self) -> None:
        rows = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        two, three = principal_aggregate(rows, 0.5), principal_aggregate(rows, 0.75)
        torch.testing.assert_close(principal_aggregate(rows, 0.7), two)  # 2.8 of four
        assert not torch.allclose(two, three)

    def test_equal_updates_give_themselves_and_opposed_ones_nothing(self) -> None:
        row = drawn(7)
        torch.testing.assert_close(principal_aggregate(row.expand(4, 7)), row)
        assert principal_aggregate(torch.stack([row, -row])).abs().max() < 1e-7
        assert not principal_aggregate(torch.zeros(3, 4)).any()

    def test_rotation(self) -> None:
        rows, turn = drawn(6, 10), torch.linalg.qr(drawn(10, 10, seed=1)).Q
        torch.testing.assert_close(principal_aggregate(rows @ turn), principal_aggregate(rows) @ turn)

    def test_one_direction_at_least_is_kept(self) -> None:
        rows = drawn(3, 5)
        torch.testing.assert_close(principal_aggregate(rows, 0.01), principal_aggregate(rows, 0.34))

    @pytest.mark.parametrize("proportion", [0.0, 1.5, float("nan")])
    def test_bad_proportions_are_named(self, proportion: float) -> None:
        with pytest.raises(ValueError, match="proportion"):
            principal_aggregate(drawn(3, 4), proportion)
        with pytest.raises(ValueError, match="proportion"):
            FedLD(proportion=proportion)

    def test_one_worker_has_no_directions_to_compare(self) -> None:
        with pytest.raises(ValueError, match="updates must be of at least 2"):
            principal_aggregate(drawn(1, 4))


class TestServer:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))

    def sent(self, count: int = 3) -> list[Update]:
        return [
            Update(
                {
                    name: drawn(*value.shape, seed=i).float() if value.is_floating_point() else value + i
                    for name, value in self.model.state_dict().items()
                },
                10 * i + 1,
            )
            for i in range(count)
        ]

    def server(self, round: int, algorithm: FedLD) -> ServerState:
        start = algorithm.init_server(self.model, 5)
        return ServerState(start.params, start.memory, round)

    def test_each_tensor_by_itself_after_the_first_round(self) -> None:
        algorithm = FedLD(proportion=0.7)
        updates, server = self.sent(), self.server(1, algorithm)
        params = algorithm.aggregate(server, updates).params
        start = server.params["0.weight"]
        moves = torch.stack([(update.params["0.weight"] - start).flatten() for update in updates])
        torch.testing.assert_close(params["0.weight"], start + principal_aggregate(moves, 0.7).view(2, 3))
        for name in ("1.running_mean", "2.bias"):  # statistics, and a tensor of one element
            mean = torch.stack([update.params[name] for update in updates]).mean(0)
            torch.testing.assert_close(params[name], mean)

    def test_the_first_round_is_a_mean_and_so_is_one_client(self) -> None:
        algorithm = FedLD()
        for round, count in ((0, 3), (4, 1)):
            updates = self.sent(count)
            params = algorithm.aggregate(self.server(round, algorithm), updates).params
            mean = torch.stack([update.params["0.weight"] for update in updates]).mean(0)
            torch.testing.assert_close(params["0.weight"], mean)

    @pytest.mark.parametrize("proportion", [None, 0.8])
    def test_the_servers_step(self, proportion: float | None) -> None:
        one, two = FedLD(proportion=proportion), FedLD(proportion=proportion, server_lr=2.0)
        start = self.server(1, one)
        moved = [algorithm.aggregate(start, self.sent()).params["0.weight"] for algorithm in (one, two)]
        origin = start.params["0.weight"]
        torch.testing.assert_close(moved[1] - origin, 2 * (moved[0] - origin))


def test_clients_train_on_the_penalised_loss() -> None:
    data = [(drawn(6, 3, seed=i).float(), torch.arange(6) % 3) for i in range(2)]
    ends = []
    for options in ({"weight": 5.0}, {"weight": 0.0}, {"loss": MarginControlLoss(5.0)}):
        model = nn.Linear(3, 3)
        nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
        simulate(FedLD(0.5, **options), model, data, rounds=2, generator=torch.Generator().manual_seed(0))
        ends.append(model.weight.detach())
    assert torch.equal(ends[0], ends[2])
    assert ends[0].norm() < ends[1].norm()


def test_bad_arguments_are_named() -> None:
    for name, value in {"weight": -1.0, "server_lr": 0.0, "lr": -1.0, "local_epochs": 0}.items():
        with pytest.raises(ValueError, match=name):
            FedLD(**{name: value})


def test_complex_weights_move_along_the_directions_of_their_pairs() -> None:
    model = nn.Linear(2, 3, bias=False, dtype=torch.cfloat)
    algorithm = FedLD(lr=0.1)
    server = replace(algorithm.init_server(model, 4), round=1)
    moves = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    parts = [torch.view_as_complex(move.view(3, 2, 2)) for move in moves]
    after = algorithm.aggregate(server, [Update({"weight": server.params["weight"] + part}, 1) for part in parts])
    found = torch.view_as_real(after.params["weight"] - server.params["weight"]).flatten()
    torch.testing.assert_close(found, principal_aggregate(moves), atol=1e-6, rtol=1e-5)


def test_an_unknown_reduction_and_no_rows_are_named() -> None:
    with pytest.raises(ValueError, match="reduction must be one of"):
        confidence_penalty(torch.zeros(2, 3), "bath")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="logits must have shape"):
        confidence_penalty(torch.zeros(0, 3), "sample")
