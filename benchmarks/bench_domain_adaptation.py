"""What adapts a trained classifier, beside what a user would write or pick today."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage as ndi
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn

from benchmarks.timing import compared, medians
from trimtab import domain
from trimtab.nets import small_cnn
from trimtab.ops.feature_bank import FeatureBank


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds of a search among neighbours, adaptation steps, a mixture of heads, and a batch of edge maps."""
    yield _bank(*(2_000, 64, 3) if quick else (20_000, 256, 10))
    yield from _source_free(*(1_000, 64, 3) if quick else (10_000, 256, 10))
    yield _masked(*(8, 3) if quick else (64, 15))
    yield _heads(*(64, 3) if quick else (256, 20))
    yield _vote(*(2_000, 3) if quick else (20_000, 10))
    yield from _edges(*(16, 3) if quick else (128, 5))


def _bank(n: int, dim: int, repeats: int) -> dict[str, object]:
    z, queries = torch.randn(n, dim), torch.randn(128, dim)
    bank = FeatureBank(n, dim)
    bank.add(z)
    peer = NearestNeighbors(n_neighbors=5, metric="cosine", algorithm="brute").fit(z.numpy())
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: bank.nearest(queries, 5),
        "peer": lambda: peer.kneighbors(queries.numpy()),
    }
    return compared(
        "FeatureBank against NearestNeighbors", medians(calls, repeats, 1), 1.0, f"{n} rows of {dim}, 128 queries"
    )


def _source_free(n: int, dim: int, repeats: int) -> Iterator[dict[str, object]]:
    """A step of SF(DA)² against one of SHOT's information maximisation, networks included.

    SHOT keeps nothing. SF(DA)² looks for neighbours among all target samples, sums all stored predictions, moves a
    covariance of the features for each class, weighs it by the differences of the classes' weights and compares it
    with the others: the limit is SHOT's step and that work alone, with its gradient, in as few products as it has.
    What is beyond it are sums and quotients over the covariances, which the release's formula has one by one.
    """
    torch.manual_seed(0)
    features = nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, dim), nn.BatchNorm1d(dim))
    head, x, index = nn.Linear(dim, 12), torch.randn(64, 784), torch.arange(64)
    rule = domain.SFDA2(features, head, n, 100)
    rule.bank.write(torch.arange(n), torch.randn(n, dim), torch.randn(n, 12).softmax(1))

    def shot() -> None:
        probs = head(features(x)).softmax(1)
        mean = probs.mean(0)
        (torch.special.entr(probs).sum(1).mean() - torch.special.entr(mean).sum()).backward()

    bank, stored, moments = torch.randn(n, dim), torch.randn(n, 12), torch.randn(12, dim, dim)
    queries, apart, member = torch.randn(64, dim, requires_grad=True), torch.randn(12, dim, 12), torch.randn(64, 12)

    def needed() -> None:
        (queries.detach() @ bank.mT).topk(6)
        stored.mT @ stored
        covariance = moments.lerp(torch.einsum("bc,bi,bj->cij", member, queries, queries), 0.1)
        ((covariance @ apart).sum() + (covariance.flatten(1) @ covariance.flatten(1).mT).sum()).backward()

    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: rule.loss(x, index)["total"].backward(),
        "peer": shot,
        "limit": needed,
    }
    seconds = medians(calls, repeats, 1)
    seconds["limit"] += seconds["peer"]
    note = f"{n} target samples, 12 classes, {dim} features"
    yield compared("SFDA2 against SHOT-IM", seconds, 5.0, note)
    yield compared("SFDA2 against SHOT-IM and what it must add", seconds, 1.5, note, peer="limit")


def _masked(batch: int, repeats: int) -> dict[str, object]:
    """Masked consistency, its gradient and its teacher's move against the two passes and the average that it needs."""
    torch.manual_seed(0)
    net, x = small_cnn(), torch.rand(batch, 1, 28, 28)
    teacher, hidden = copy.deepcopy(net).requires_grad_(False), torch.rand(batch, 1, 28, 28) < 0.7
    mic = domain.MaskedImageConsistency(net, patch=4, decay=0.9)

    def ours() -> None:
        mic.loss(net, x)["total"].backward()
        mic.update(net)

    def peer() -> None:
        certainty, told = teacher(x).softmax(1).max(1)
        (certainty * F.cross_entropy(net(x.masked_fill(hidden, 0.0)), told, reduction="none")).mean().backward()
        with torch.no_grad():
            for old, new in zip(teacher.parameters(), net.parameters(), strict=True):
                old.lerp_(new, 0.1)

    seconds = medians({"ours": ours, "peer": peer}, repeats)
    return compared("a step of MIC against its passes", seconds, 1.1, f"{batch} images of 28 x 28, small CNN")


def _heads(batch: int, repeats: int) -> dict[str, object]:
    """The mixture of ten domains' heads against a loop over modules."""
    model = domain.DomainHeads(nn.Identity(), 512, 65, 10, gamma=1.0).eval()
    loop, z = [nn.Linear(512, 65) for _ in range(11)], torch.randn(batch, 512)

    def peer() -> Tensor:
        probs = [layer(z).softmax(1) for layer in loop]
        weights = torch.stack([1 / torch.special.entr(p).sum(1) for p in probs])
        return sum((w[:, None] * p for w, p in zip(weights / weights.sum(0), probs, strict=True)), torch.zeros(()))

    with torch.no_grad():
        seconds = medians({"ours": lambda: model(z), "peer": peer}, repeats)
    return compared("DomainHeads against a loop over heads", seconds, 1.0, f"11 heads of 65 classes, {batch} samples")


def _vote(n: int, repeats: int) -> dict[str, object]:
    """A prediction of AdaNPC against all similarities and a one-hot product, as the authors' release has it."""
    z, y, x = torch.randn(n, 256), torch.randint(10, (n,)), torch.randn(32, 256)
    model = domain.AdaNPC(nn.Identity(), 256, 10, k=100, threshold=1.1)
    model.remember(z, y)
    memory = F.normalize(z, dim=1)

    def peer() -> Tensor:
        found, near = (F.normalize(x, dim=1) @ memory.T).topk(100, dim=1)
        return ((found / 0.1).softmax(1)[:, :, None] * F.one_hot(y[near], 10)).sum(1)

    seconds = medians({"ours": lambda: model.predict(x), "peer": peer}, repeats, 1)
    return compared("AdaNPC against its formula", seconds, 1.5, f"{n} entries of 256, 32 queries, k 100")


def _edges(batch: int, repeats: int) -> Iterator[dict[str, object]]:
    """Edge maps against SciPy's smoothing and gradients alone, and against its whole way to edges, image by image.

    Gradients are the first of four parts: a threshold for each image, ridges and hysteresis follow. SciPy has their
    primitives, without which no edge is found: a histogram, two shifted comparisons and connected components.
    """
    x = torch.rand(batch, 1, 64, 64)
    canny = domain.EnhancedCanny().eval()

    def peer() -> None:
        for image in x[:, 0].numpy():
            smooth = ndi.gaussian_filter(image, 1.0)
            ndi.sobel(smooth, 0), ndi.sobel(smooth, 1)

    def edges() -> None:
        for image in x[:, 0].numpy():
            smooth = ndi.gaussian_filter(image, 1.0)
            size = np.hypot(ndi.sobel(smooth, 0), ndi.sobel(smooth, 1))
            threshold = np.histogram(size, 256)[1][128]
            ridge = (size >= np.roll(size, 1, 0)) & (size >= np.roll(size, -1, 0))
            parts, count = ndi.label((size > 0.5 * threshold) & ridge, np.ones((3, 3)))
            ndi.maximum(size, parts, np.arange(1, count + 1))

    seconds = medians({"ours": lambda: canny(x), "peer": peer, "edges": edges}, repeats, 1)
    note = f"{batch} images of 64 x 64"
    yield compared("EnhancedCanny against SciPy's gradients", seconds, 5.0, f"{note}; the peer's are no edges yet")
    yield compared("EnhancedCanny against SciPy's parts of Canny's edges", seconds, 1.5, note, peer="edges")
