from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import nn

from trimtab.federated import (
    Broadcast,
    FedAvg,
    ServerState,
    SimulationState,
    Update,
    finish,
    simulate,
    to_client_app,
    to_strategy,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


CLIENTS = [(torch.randn(6, 3, generator=seeded(i)), torch.full((6,), i % 2)) for i in range(10)]


class CountingClasses(FedAvg):
    """A toy with a final exchange: every client reports its label counts and the server stores log-priors as bias."""

    has_final_exchange: ClassVar[bool] = True

    def client_report(self, model, broadcast, client, data, *, generator) -> Update:
        return Update({}, len(data[1]), {"counts": torch.bincount(data[1], minlength=2).float()})

    def finalize(self, model, server, reports, *, generator) -> ServerState:
        counts = torch.stack([report.extras["counts"] for report in reports]).sum(0)
        return ServerState(server.params | {"bias": counts.log()}, server.memory, server.round)


def test_participants_and_records() -> None:
    seen: list[int] = []

    def evaluate(model: nn.Module, state: SimulationState) -> dict[str, float]:
        assert not model.training
        assert torch.equal(model.weight, state.server.params["weight"])
        seen.append(state.server.round)
        return {"round": float(state.server.round)}

    model = nn.Linear(3, 2)
    history = simulate(FedAvg(0.1), model, CLIENTS, rounds=4, fraction=0.3, generator=seeded(), evaluate=evaluate)
    assert model.training
    assert seen == [1, 2, 3, 4]
    assert history.curve("round") == [1.0, 2.0, 3.0, 4.0]
    for entry in history.rounds:
        assert len(entry.participants) == 3
        assert entry.participants == sorted(entry.participants)
        assert entry.bytes_up == entry.bytes_down == 3 * 8 * 4
        assert [m["gradients"] for m in entry.metrics] == [1.0] * 3
    assert len({tuple(entry.participants) for entry in history.rounds}) > 1
    assert set(history.state.clients) == {i for entry in history.rounds for i in entry.participants}


def test_no_rounds_leave_the_model_alone() -> None:
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    history = simulate(FedAvg(0.1), model, CLIENTS, rounds=0)
    assert torch.equal(history.state.server.params["weight"], before)
    assert history.rounds == []


def test_the_final_exchange_is_the_same_under_flower() -> None:
    pytest.importorskip("flwr")
    from flwr.app import ArrayRecord, Context, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    algorithm, model = CountingClasses(0.1), nn.Linear(3, 2)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    history = simulate(algorithm, model, CLIENTS, rounds=2, fraction=0.2, generator=seeded())
    state = finish(algorithm, model, CLIENTS, history.state)
    torch.testing.assert_close(model.bias.detach(), torch.tensor([30.0, 30.0]).log())

    app = to_client_app(
        algorithm, lambda: nn.Linear(3, 2), lambda i: CLIENTS[i],
        evaluate_fn=lambda model, data: {"loss": float(len(data[0])), "num-examples": len(data[0])},
    )  # fmt: skip
    contexts = {50 + i: Context(1, 50 + i, {"partition-id": i}, RecordDict(), {}) for i in range(len(CLIENTS))}

    class Grid:
        def get_node_ids(self):
            return list(contexts)

        def send_and_receive(self, messages, *, timeout=None):
            return [app(m, contexts[m.metadata.dst_node_id]) for m in messages]

    strategy = to_strategy(algorithm, nn.Linear(3, 2), fraction=0.2, fraction_evaluate=1.0, generator=seeded())
    result = strategy.start(Grid(), ArrayRecord(start), num_rounds=2)
    assert result.evaluate_metrics_clientapp[2]["loss"] == pytest.approx(6.0)
    assert result.train_metrics_clientapp[1]["gradients"] == pytest.approx(1.0)
    for name, value in result.arrays.to_torch_state_dict().items():
        assert torch.equal(value, state.server.params[name])


def test_finish_leaves_the_others_alone() -> None:
    history = simulate(FedAvg(0.1), nn.Linear(3, 2), CLIENTS, rounds=1, generator=seeded())
    assert finish(FedAvg(0.1), nn.Linear(3, 2), CLIENTS, history.state) is history.state
    with pytest.raises(NotImplementedError, match="client_report"):
        FedAvg(0.1).client_report(nn.Linear(3, 2), Broadcast({}), {}, CLIENTS[0], generator=seeded())


@pytest.mark.parametrize(
    ("options", "named"),
    [({"clients": []}, "clients"), ({"rounds": -1}, "rounds"), ({"fraction": 0.0}, "fraction"),
     ({"fraction": 1.1}, "fraction")],
)  # fmt: skip
def test_bad_arguments_are_named(options: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        simulate(FedAvg(0.1), nn.Linear(3, 2), **{"clients": CLIENTS, "rounds": 1, **options})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"fraction": 2.0}, "fraction"),
        ({"fraction_evaluate": -1.0}, "fraction_evaluate"),
        ({"num_clients": 0}, "num_clients"),
    ],
)
def test_bad_strategy_arguments_are_named(options: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        to_strategy(FedAvg(0.1), nn.Linear(3, 2), **options)


def test_without_flower_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "trimtab.federated.flower_nodes", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == "flwr"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flwr", None)
    with pytest.raises(ImportError, match=r"trimtab\[federated\]"):
        to_strategy(FedAvg(0.1), nn.Linear(3, 2))
    with pytest.raises(ImportError, match=r"trimtab\[federated\]"):
        to_client_app(FedAvg(0.1), lambda: nn.Linear(3, 2), lambda i: CLIENTS[i])


def test_states_refuse_what_they_did_not_make() -> None:
    with pytest.raises(ValueError, match="state"):
        ServerState.from_state_dict({"params.w": torch.ones(1)})
    with pytest.raises(ValueError, match="clients"):
        SimulationState.from_state_dict({"server": {}, "seed": 1})


class Odd(nn.Sequential):
    """In training mode, but for a part that is not."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
        self.train()
        self[1].eval()


def modes(model: nn.Module) -> list[bool]:
    return [part.training for part in model.modules()]


def test_modes_are_as_before_after_a_run_and_after_an_error() -> None:
    def refuse(*arguments: object) -> torch.Tensor:
        raise RuntimeError("enough")

    for options, algorithm in (({}, FedAvg(0.1)), ({"evaluate": refuse}, FedAvg(0.1)), ({}, FedAvg(0.1, loss=refuse))):
        model = Odd()
        before = modes(model)
        try:
            simulate(algorithm, model, CLIENTS, rounds=1, **options)
        except RuntimeError:
            assert options or algorithm.local.loss is refuse
        assert modes(model) == before


def test_generators_of_devices_that_nothing_runs_on_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded_devices: list[str] = []
    for place in ("manual_seed", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, place, lambda seed, place=place: seeded_devices.append(place))
    model = Odd()
    before = torch.get_rng_state()
    simulate(FedAvg(0.1), model, CLIENTS, rounds=1, generator=seeded())
    assert not seeded_devices
    assert torch.equal(torch.get_rng_state(), before)
