"""Energy confusion beside its pairs and the loss it is added to; local matching and aggregation beside plain code."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import TripletMarginLoss
from torch import Tensor, nn

from benchmarks.timing import compared, medians
from trimtab.metric import EnergyConfusion, SinkhornAggregator, mutual_nn_score


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds of forward and backward, or of scoring, on one batch."""
    repeats = 3 if quick else 15
    batch, dim, classes = (96, 32, 16) if quick else (512, 512, 64)
    labels = torch.arange(batch) % classes
    confusion, triplet = EnergyConfusion(), TripletMarginLoss()
    embeddings = _random(batch, dim).requires_grad_()
    what = f"batch {batch}, {dim} dimensions, {classes} classes"
    by_pairs = {
        "ours": _trained(lambda: confusion(embeddings, labels), embeddings),
        "peer": _trained(lambda: pairwise_confusion(embeddings, labels), embeddings),
    }
    yield compared("EnergyConfusion, against the mean over all pairs", medians(by_pairs, repeats), 0.5, what)
    with_base = {
        "ours": _trained(lambda: confusion(embeddings, labels), embeddings),
        "peer": _trained(lambda: triplet(embeddings, labels), embeddings),
    }
    yield compared(
        "EnergyConfusion, against pytorch-metric-learning's triplet loss that it is added to",
        medians(with_base, 1 if quick else 3, warmup=1),
        0.1,
        what,
    )

    candidates, patches, width = (8, 20, 16) if quick else (100, 225, 128)
    query, database = _random(patches, width), _random(candidates, patches, width)
    with torch.no_grad():
        scoring = {
            "ours": lambda: mutual_nn_score(query, database, 0.1),
            "peer": lambda: matches_one_by_one(query, database, 0.1),
        }
        assert torch.equal(scoring["ours"](), scoring["peer"]())
        yield compared(
            "mutual_nn_score, against a loop over candidates",
            medians(scoring, repeats),
            1.0,
            f"{candidates} candidates of {patches} patches, {width} dimensions",
        )

    images, channels, side = (4, 32, 9) if quick else (8, 256, 16)
    features = _random(images, channels, side, side).requires_grad_()
    ours, peer = SinkhornAggregator(channels), SoftAssignment(channels)
    aggregating = {
        "ours": _trained(lambda: ours(features).descriptor.square().sum(), features),
        "peer": _trained(lambda: peer(features).square().sum(), features),
    }
    yield compared(
        "SinkhornAggregator, against the same with a softmax over clusters (NetVLAD's assignment)",
        medians(aggregating, repeats),
        1.3,
        f"{images} maps of {side} x {side} patches, {channels} channels",
    )


def pairwise_confusion(embeddings: Tensor, labels: Tensor) -> Tensor:
    """The mean squared distance between the classes of every pair, from the distances of all samples."""
    distance = _squared(embeddings)
    member = F.one_hot(labels.unique(return_inverse=True)[1]).to(distance)
    member = member / member.sum(0)
    return _upper_mean(member.T @ distance @ member)


def _squared(x: Tensor) -> Tensor:
    squares = x.square().sum(1)
    return squares[:, None] + squares - 2 * x @ x.T


def _upper_mean(matrix: Tensor) -> Tensor:
    row, column = torch.triu_indices(*matrix.shape, offset=1)
    return matrix[row, column].mean()


def matches_one_by_one(query: Tensor, database: Tensor, threshold: float) -> Tensor:
    """Counts mutual nearest neighbours of one candidate after the other."""
    counts = []
    for candidate in database:
        cosine = F.normalize(query, dim=1) @ F.normalize(candidate, dim=1).T
        forward, backward = cosine.argmax(1), cosine.argmax(0)
        own = torch.arange(len(query))
        counts.append(int(((backward[forward] == own) & (cosine[own, forward] > threshold)).sum()))
    return torch.tensor(counts)


class SoftAssignment(nn.Module):
    """The aggregator with a softmax in place of the transport plan."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.parts = SinkhornAggregator(channels)

    def forward(self, features: Tensor) -> Tensor:
        assignment = self.parts.score(features).flatten(2).softmax(1)
        sums = torch.einsum("bkn,bdn->bdk", assignment, self.parts.features(features).flatten(2))
        token = self.parts.token(features.mean((2, 3)))
        return F.normalize(torch.cat([F.normalize(token, dim=1), F.normalize(sums, dim=1).flatten(1)], 1), dim=1)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def _trained(value: Callable[[], Tensor], leaf: Tensor) -> Callable[[], None]:
    def call() -> None:
        leaf.grad = None
        value().backward()

    return call
