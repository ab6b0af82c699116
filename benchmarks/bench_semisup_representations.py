"""Parts of learning without labels: contrastive losses, negatives from a memory, ranks of patches, matched graphs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator

import torch
from pytorch_metric_learning.losses import NTXentLoss
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from benchmarks.timing import compared, medians
from trimtab.ops.info_nce import nt_xent
from trimtab.semisup import (
    draw_negatives,
    match_graphs,
    neighbour_edges,
    relative_loss_prediction,
    singular_value_loss,
)


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds; of forward and backward where there is a gradient."""
    repeats = 3 if quick else 15
    yield _contrast(*((8, 16) if quick else (256, 128)), repeats)
    yield from _contrast_of_lightly(*((8, 16) if quick else (256, 128)), repeats)
    yield _negatives(*((4, 60) if quick else (128, 10_000)), repeats)
    yield _ranks(*((4, 9) if quick else (64, 147)), repeats)
    yield _graphs(*((2, 6) if quick else (4, 10)), repeats)
    yield _spectrum(*((16, 4) if quick else (256, 128)), repeats)


def _contrast(batch: int, dim: int, repeats: int) -> dict[str, object]:
    z = torch.randn(2 * batch, dim, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels, peer = torch.arange(batch).repeat(2), NTXentLoss(0.5)
    calls = {"": _stepped(z, lambda: nt_xent(z, 2, 0.5)), "peer": _stepped(z, lambda: peer(z, labels))}
    return compared(
        "nt_xent against pytorch-metric-learning's NTXentLoss",
        medians(calls, repeats),
        1.0,
        f"{2 * batch} x {dim}",
        ours="",
    )


def _contrast_of_lightly(batch: int, dim: int, repeats: int) -> Iterator[dict[str, object]]:
    """Against the package's own loss, where it is installed."""
    try:
        losses = importlib.import_module("lightly.loss")
    except ImportError:
        return
    z = torch.randn(2 * batch, dim, generator=torch.Generator().manual_seed(0), requires_grad=True)
    peer = losses.NTXentLoss(0.5)
    torch.testing.assert_close(nt_xent(z, 2, 0.5), peer(*z.chunk(2)))
    calls = {"": _stepped(z, lambda: nt_xent(z, 2, 0.5)), "peer": _stepped(z, lambda: peer(*z.chunk(2)))}
    note = f"{2 * batch} x {dim}"
    yield compared("nt_xent against lightly's NTXentLoss", medians(calls, repeats), 1.0, note, ours="")


def _negatives(batch: int, samples: int, repeats: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    cosines = torch.randn(batch, samples, generator=generator).tanh()
    labels = torch.randint(max(2, samples // 100), (samples,), generator=generator)
    same = labels[:batch, None] == labels
    pool, count = samples // 10, samples // 50

    def one_by_one() -> list[Tensor]:
        """Every query draws from its pool, and draws again what shares its label."""
        found = []
        for row, mine in zip(cosines, same, strict=True):
            near = row.topk(pool).indices
            drawn = near[torch.randperm(pool, generator=generator)[:count]]
            while bool((clash := mine[drawn]).any()):
                drawn[clash] = near[torch.randint(pool, (int(clash.sum()),), generator=generator)]
            found.append(drawn)
        return found

    calls: dict[str, Callable[[], object]] = {
        "": lambda: draw_negatives(cosines, same, count, pool, generator=generator),
        "peer": one_by_one,
    }
    return compared(
        "draw_negatives against one query at a time", medians(calls, repeats), 1.0, f"{batch} of {samples}", ours=""
    )


def _ranks(batch: int, patches: int, repeats: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randn(batch, patches, generator=generator, requires_grad=True)
    target = torch.rand(batch, patches, generator=generator)

    def both_signs() -> Tensor:
        """As in its repository: both targets, and logarithms of guarded sigmoids."""
        above, below = (target[:, None] > target[:, :, None]).float(), (target[:, None] < target[:, :, None]).float()
        chance = torch.sigmoid(predicted[:, None] - predicted[:, :, None])
        cost = -above * torch.log(chance + 1e-6) - below * torch.log(1 - chance + 1e-6)
        return cost.sum() / (above + below).sum()

    calls = {
        "": _stepped(predicted, lambda: relative_loss_prediction(predicted, target)),
        "peer": _stepped(predicted, both_signs),
    }
    return compared(
        "relative_loss_prediction against its repository's form",
        medians(calls, repeats),
        1.0,
        f"{batch} x {patches}",
        ours="",
    )


def _graphs(groups: int, n: int, repeats: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(groups, n, n, generator=generator)
    edges = [neighbour_edges(torch.randn(groups, n, 4, generator=generator), 5) for _ in range(2)]
    q = 0.3 * torch.randn(groups, 5 * n, 5 * n, generator=generator)

    def cost(group: int, partner: list[int]) -> float:
        at = torch.tensor(partner)
        matched = (at[edges[0][group, :, None]] == edges[1][group, None]).all(2)
        return float(u[group, torch.arange(n), at].sum() + q[group][matched].sum())

    def one_by_one() -> None:
        """The same search, one exchange at a time."""
        for group in range(groups):
            current = linear_sum_assignment(u[group].numpy())[1].tolist()
            best = cost(group, current)
            while True:
                tried = []
                for i in range(n):
                    for j in range(i):
                        other = list(current)
                        other[i], other[j] = other[j], other[i]
                        tried.append((cost(group, other), other))
                value, partner = min(tried)
                if value >= best - 1e-9:
                    break
                best, current = value, partner

    calls: dict[str, Callable[[], object]] = {
        "": lambda: match_graphs(u, q, *edges, method="exchange"),
        "peer": one_by_one,
    }
    seconds = medians(calls, min(repeats, 3), warmup=1)
    return compared("match_graphs against one exchange at a time", seconds, 0.1, f"{groups} groups of {n}", ours="")


def _spectrum(batch: int, dim: int, repeats: int) -> dict[str, object]:
    z = torch.randn(batch, dim, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def by_singular_values() -> Tensor:
        """As the term is written: the singular values of the second moments, and how far they are from one."""
        standard = (z - z.mean(0)) / z.std(0, correction=0)
        return (torch.linalg.svdvals(standard.mT @ standard / len(z)) - 1).square().sum() / z.shape[1]

    torch.testing.assert_close(singular_value_loss(z), by_singular_values(), rtol=1e-3, atol=1e-4)
    calls = {"": _stepped(z, lambda: singular_value_loss(z)), "peer": _stepped(z, by_singular_values)}
    name = "singular_value_loss against singular values"
    return compared(name, medians(calls, repeats), 1.0, f"{batch} x {dim}", ours="")


def _stepped(z: Tensor, loss: Callable[[], Tensor]) -> Callable[[], None]:
    def call() -> None:
        z.grad = None
        loss().backward()

    return call
