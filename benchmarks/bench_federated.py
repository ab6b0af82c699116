"""Rounds of a federation in one process, beside Flower's simulation and a loop written by hand around Flower."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.timing import medians
from trimtab.federated import FedAvg, FedSpeed, simulate
from trimtab.nets import mlp

CLIENTS, FRACTION, SAMPLES, BATCH = 20, 0.5, 500, 50


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return mlp(784, (128, 64))


def client_data(i: int, samples: int = SAMPLES) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(i)
    return torch.randn(samples, 784, generator=draw), torch.randint(10, (samples,), generator=draw)


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds of a round: 10 of 20 clients, 500 images of 784 pixels each, one local epoch of an MLP."""
    samples, repeats = (100, 3) if quick else (SAMPLES, 15)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        clients = [client_data(i, samples) for i in range(CLIENTS)]
        model, peer = network(), network()

        def one_round(algorithm: FedAvg | FedSpeed) -> object:
            return simulate(algorithm, model, clients, rounds=1, fraction=FRACTION)

        seconds = medians(
            {
                "FedAvg": lambda: one_round(FedAvg(0.1, batch_size=BATCH)),
                "FedSpeed": lambda: one_round(FedSpeed(0.1, batch_size=BATCH, local_epochs=1)),
                "by hand": lambda: round_by_hand(peer, clients[: int(CLIENTS * FRACTION)]),
            },
            repeats,
            warmup=1,
        )
        yield row(
            "simulate(FedAvg), a round", seconds["FedAvg"], seconds["by hand"], "DataLoader and Flower's averaging"
        )
        yield row(
            "simulate(FedSpeed), a round", seconds["FedSpeed"], seconds["FedAvg"], "our FedAvg; 2 gradients a step", 2.5
        )
        if not quick:
            ours, flower, note = flower_simulation()
            yield row("simulate(FedAvg), a round", ours or seconds["FedAvg"], flower, note)
    finally:
        torch.set_num_threads(threads)


def row(what: str, ours: float, peer: float | None, note: str, aim: float = 1.0) -> dict[str, object]:
    ratio = None if peer is None else ours / peer
    return {
        "what": what,
        "ours": 1e3 * ours,
        "peer": None if peer is None else 1e3 * peer,
        "ratio": ratio,
        "unit": "ms",
        "aim": f"<= {aim:g}",
        "met": None if ratio is None else ratio <= aim,
        "note": f"peer: {note}",
    }


def round_by_hand(model: nn.Module, clients: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """What a user writes: Flower's records and weighted mean around PyTorch's usual training loop."""
    from flwr.app import ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    sent, replies = ArrayRecord(model.state_dict()), []
    for x, y in clients:
        train_plainly(model, sent.to_torch_state_dict(), x, y)
        metrics = MetricRecord({"num-examples": len(x)})
        replies.append(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}))
    model.load_state_dict(aggregate_arrayrecords(replies, "num-examples").to_torch_state_dict())


def train_plainly(model: nn.Module, state: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> None:
    model.load_state_dict(state)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for inputs, targets in DataLoader(TensorDataset(x, y), batch_size=BATCH, shuffle=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()


def flower_simulation(rounds: int = 10, timeout: float = 180) -> tuple[float | None, float | None, str]:
    """Median seconds of our round and of one in `flwr.simulation`, taking turns in a process of their own."""
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-m", "benchmarks.flower_simulation", str(rounds)]
    try:
        done = subprocess.run(
            command, env=os.environ | quiet | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=timeout
        )
        found = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, IndexError, json.JSONDecodeError) as error:
        return None, None, f"flwr.simulation on Ray did not run here ({type(error).__name__})"
    note = f"flwr.simulation on Ray with all cores, ours on one; its start of {found['start']:.0f} s left out"
    return found["ours"], found["round"], note
