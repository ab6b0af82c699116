"""Rules that combine updates of many workers, and clients with rules of their own, beside what does the same today."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.timing import medians
from trimtab.federated import (
    FedAvg,
    FedLabel,
    FlagAggregator,
    HideNseek,
    coordinate_median,
    multi_krum,
    principal_aggregate,
    simulate,
)
from trimtab.nets import mlp


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds to combine 15 updates of a million numbers, and of a round of 10 clients with 250 images each."""
    size, repeats = (20_000, 3) if quick else (1_000_000, 10)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        updates = torch.randn(15, size, generator=torch.Generator().manual_seed(0)) + 1
        array = updates.numpy()
        calls: dict[str, Callable[[], object]] = {
            "FlagAggregator": lambda: FlagAggregator(n_iter=1)(updates),
            "the authors'": lambda: released_flag(updates),
            "principal_aggregate": lambda: principal_aggregate(updates),
            "by SVD": lambda: principal_by_svd(updates),
            "coordinate_median": lambda: coordinate_median(updates),
            "NumPy": lambda: np.median(array, axis=0),
            "multi_krum": lambda: multi_krum(updates, 3),
            "all pairs": lambda: krum_by_hand(updates, 3),
        }
        seconds = medians(calls, repeats, warmup=1)
        yield row("FlagAggregator", seconds["FlagAggregator"], seconds["the authors'"], "SVD of the columns")
        yield row("principal_aggregate", seconds["principal_aggregate"], seconds["by SVD"], "SVD of the updates")
        yield row("coordinate_median", seconds["coordinate_median"], seconds["NumPy"], "numpy.median")
        yield row("multi_krum", seconds["multi_krum"], seconds["all pairs"], "a loop over pairs, as Krum is written")
        yield from rounds(quick, repeats)
    finally:
        torch.set_num_threads(threads)


def rounds(quick: bool, repeats: int) -> Iterator[dict[str, object]]:
    """Rounds of federations of our own, beside FedAvg's with as many gradients."""
    draw, samples = torch.Generator().manual_seed(0), 60 if quick else 250
    clients = [(torch.randn(samples, 196, generator=draw), torch.arange(samples) % 10) for _ in range(10)]
    few = [(x, torch.where(torch.arange(samples) < 20, y, -1)) for x, y in clients]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = mlp(196, (64,))

    def one_round(algorithm: FedAvg | HideNseek, data: list[tuple[Tensor, Tensor]]) -> Callable[[], object]:
        own = copy.deepcopy(model)
        return lambda: simulate(algorithm, own, data, rounds=1)

    seconds = medians(
        {
            "FedAvg": one_round(FedAvg(0.1, 2), clients),
            "HideNseek": one_round(HideNseek(10.0, (196,), 0.3, 2), clients),
            "FedLabel": one_round(FedLabel(0.1, 1, 50, unlabeled_epochs=2, threshold=0.1), few),
        },
        repeats,
        warmup=1,
    )
    yield row("HideNseek, a round", seconds["HideNseek"], seconds["FedAvg"], "our FedAvg, as many gradients", 2.0)
    yield row("FedLabel, a round", seconds["FedLabel"], seconds["FedAvg"], "our FedAvg, about as many gradients", 2.0)


def released_flag(updates: Tensor) -> Tensor:
    """A step of the authors' release, re-written: a random start, weights, and an SVD as long as the updates."""
    x, rank = nn.functional.normalize(updates).T, 8
    start = torch.linalg.qr(torch.rand(len(x), rank, generator=torch.Generator().manual_seed(0)) - 0.5).Q
    weights = ((1 - (start.T @ x).square().sum(0)).abs() + 1e-7) ** -0.25
    basis = torch.linalg.svd(x * weights, full_matrices=False).U[:, :rank]
    return basis @ (basis.T @ x.sum(1)) / rank


def principal_by_svd(updates: Tensor, kept: int = 12) -> Tensor:
    """The rule as it is written, by an SVD of all updates."""
    left, values, right = torch.linalg.svd(updates, full_matrices=False)
    shares = (values.square() / values.square().sum())[:kept]
    amounts = (updates.norm(dim=1, keepdim=True) * left[:, :kept].sign()).mean(0)
    return (shares * amounts) @ right[:kept]


def krum_by_hand(updates: Tensor, byzantine: int) -> Tensor:
    """Multi-Krum with a loop over all pairs."""
    workers = len(updates)
    scores = []
    for one in updates:
        away = sorted(float((one - other).square().sum()) for other in updates)
        scores.append(sum(away[1 : workers - byzantine - 1]))
    return updates[np.argsort(scores)[: workers - byzantine]].mean(0)


def row(what: str, ours: float, peer: float, note: str, aim: float = 1.0) -> dict[str, object]:
    return {
        "what": what,
        "ours": 1e3 * ours,
        "peer": 1e3 * peer,
        "ratio": ours / peer,
        "unit": "ms",
        "aim": f"<= {aim:g}",
        "met": ours / peer <= aim,
        "note": f"peer: {note}",
    }
