"""FOA-Attack's centres and transport beside one image at a time, as its authors' code does them."""

from __future__ import annotations

from collections.abc import Iterator

import ot
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor

from benchmarks.timing import compared, medians
from trimtab.robust import cluster_tokens, local_alignment


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds for one batch."""
    repeats = 3 if quick else 10
    batch, tokens, dim, clusters = (4, 20, 8, 3) if quick else (32, 256, 192, 10)
    points = _random(batch, tokens, dim)
    clustering = {
        "ours": lambda: cluster_tokens(points, clusters),
        "peer": lambda: [
            KMeans(clusters, init="random", n_init=1, random_state=0).fit(image.numpy()) for image in points
        ],
    }
    yield compared(
        "cluster_tokens, against scikit-learn's k-means image by image",
        medians(clustering, repeats, warmup=1),
        1.0,
        f"{batch} images of {tokens} tokens in {dim} dimensions, {clusters} clusters",
    )

    here, there = _random(batch, clusters, dim), _random(batch, clusters, dim) + 0.3
    found = local_alignment(here, there, iters=2000)
    torch.testing.assert_close(found, pair_by_pair(here, there), rtol=1e-2, atol=1e-3)
    aligning = {
        "ours": lambda: local_alignment(here, there),
        "peer": lambda: pair_by_pair(here, there),
    }
    yield compared(
        "local_alignment, against POT's Sinkhorn image by image",
        medians(aligning, repeats),
        0.3,
        f"{batch} images of {clusters} centres in {dim} dimensions",
    )


def pair_by_pair(here: Tensor, there: Tensor, reg: float = 0.1) -> Tensor:
    """The mean cosine of centres under POT's plan, for one image at a time."""
    scores = []
    for ours, theirs in zip(here.double(), there.double(), strict=True):
        similarity = F.normalize(theirs, dim=1) @ F.normalize(ours, dim=1).T
        share = torch.full((len(ours),), 1 / len(ours), dtype=torch.float64)
        scores.append((ot.sinkhorn(share, share, 1 - similarity, reg, stopThr=1e-3) * similarity).sum())
    return torch.stack(scores).float()


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
