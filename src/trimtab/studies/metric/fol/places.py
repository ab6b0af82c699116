"""Recognise places that training has not seen: things in a fixed arrangement, on ground that many places share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.data import load
from trimtab.metric.local_matching import discriminative_patches, local_triplet_loss, rerank
from trimtab.metric.sinkhorn_aggregation import Aggregation, SinkhornAggregator
from trimtab.ops.pairwise import pairwise_cosine
from trimtab.studies.engine.study import Metric, Result, Trial
from trimtab.studies.tools.descent import descend, reported

Patches = Literal["all", "discriminative", "random"]

WORLD, VIEW, ITEM = 80, 48, 20


@dataclass(frozen=True)
class Views:
    """Pictures of places.

    Attributes:
        images: (n, 1, 48, 48).
        things: 1 where an image shows a thing, in its own form.
        places: which place is shown.
    """

    images: Tensor
    things: Tensor
    places: Tensor


def photograph(items: Tensor, num_places: int, num_views: int, generator: torch.Generator) -> Views:
    """Places with six things each on one of eight grounds, seen from several sides.

    A view is turned, shifted, scaled and tilted at random, lit differently, and half covered at places by one or two
    rectangles of another ground.
    """
    grounds = torch.cat(
        [
            F.interpolate(torch.rand(1, 1, *cells, generator=generator), size=(160, 160), mode="bicubic")[0]
            for cells in ((16, 16), (24, 24), (36, 36), (54, 54), (16, 54), (54, 16), (24, 80), (80, 24))
        ]
    ).clamp(0, 1)
    grounds = 0.15 + 0.35 * grounds
    worlds, shown = [], []
    small = F.interpolate(items, size=ITEM, mode="bilinear")[:, 0]
    for _ in range(num_places):
        ground = int(torch.randint(8, (), generator=generator))
        y, x = torch.randint(160 - WORLD, (2,), generator=generator).tolist()
        world, thing = grounds[ground, y : y + WORLD, x : x + WORLD].clone(), torch.zeros(WORLD, WORLD)
        # Six of the nine cells in the middle, each thing a little off its cell's centre.
        for cell in torch.randperm(9, generator=generator)[:6].tolist():
            picture = small[int(torch.randint(len(small), (), generator=generator))]
            top, left = (8 + 21 * (cell // 3), 8 + 21 * (cell % 3))
            dy, dx = torch.randint(-4, 5, (2,), generator=generator).tolist()
            rows, columns = slice(top + dy, top + dy + ITEM), slice(left + dx, left + dx + ITEM)
            form = (picture > 0.1).float()
            world[rows, columns] = form * picture + (1 - form) * world[rows, columns]
            thing[rows, columns] = torch.maximum(thing[rows, columns], form)
        worlds.append(world)
        shown.append(thing)
    scene = torch.stack([torch.stack(worlds), torch.stack(shown)], dim=1).repeat_interleave(num_views, 0)
    n = len(scene)
    seen = F.grid_sample(scene, _viewpoints(n, generator), align_corners=False, padding_mode="border")
    images, things = seen[:, 0], (seen[:, 1] > 0.5).float()
    light = 0.7 + 0.6 * torch.rand(n, 1, 1, generator=generator)
    images = images * light + 0.2 * (torch.rand(n, 1, 1, generator=generator) - 0.5)
    across = torch.arange(VIEW)
    for _ in range(2):
        at = torch.randint(-8, VIEW - 8, (2, n, 1), generator=generator)
        size = torch.randint(6, 17, (2, n, 1), generator=generator)
        inside = (across >= at) & (across < at + size)
        covered = inside[0][:, :, None] & inside[1][:, None]
        cover = grounds[torch.randint(8, (n,), generator=generator), :VIEW, :VIEW]
        images, things = torch.where(covered, cover, images), torch.where(covered, 0.0, things)
    images = images + 0.05 * torch.randn(images.shape, generator=generator)
    places = torch.arange(num_places).repeat_interleave(num_views)
    return Views((2 * images - 0.6)[:, None], things, places)


def _viewpoints(n: int, generator: torch.Generator) -> Tensor:
    """Sampling grids: a plane seen by a camera of random turn, shift, distance and tilt."""

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    turn, scale = draw(-0.35, 0.35), draw(0.6, 0.85)
    cos, sin, zero, one = turn.cos() * scale, turn.sin() * scale, torch.zeros(n), torch.ones(n)
    homography = torch.stack(
        [cos, -sin, draw(-0.2, 0.2), sin, cos, draw(-0.2, 0.2), draw(-0.2, 0.2), draw(-0.2, 0.2), one + zero], 1
    ).view(n, 3, 3)
    line = torch.linspace(-1, 1, VIEW)
    grid = torch.stack([line.expand(VIEW, VIEW), line[:, None].expand(VIEW, VIEW), torch.ones(VIEW, VIEW)], -1)
    points = grid.view(1, -1, 3) @ homography.mT
    return (points[..., :2] / points[..., 2:]).view(n, VIEW, VIEW, 2)


@dataclass(frozen=True)
class Seen:
    """What the network makes of a batch, for losses on regions.

    Attributes:
        features: the backbone's map, (batch, channels, height, width).
        local: local features, (batch, dim, height, width).
        importance: attention on the patches, summed over heads, (batch, patches).
        aggregation: the descriptor and the assignment of patches.
    """

    features: Tensor
    local: Tensor
    importance: Tensor
    aggregation: Aggregation


# A loss on regions: `loss(seen, places, generator)`.
RegionLoss = Callable[[Seen, Tensor, torch.Generator], Tensor]


class PlaceNet(nn.Module):
    """A CNN with a map of 12 x 12 patches, four heads of attention that pool a token, an aggregator, local features."""

    def __init__(self, channels: int = 40, heads: int = 4) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, size, stride in ((1, 16, 5, 2), (16, channels, 3, 2), (channels, channels, 3, 1)):
            layers += [nn.Conv2d(before, after, size, stride, size // 2, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.backbone = nn.Sequential(*layers)
        self.query = nn.Conv2d(channels, heads, 1)
        self.aggregator = SinkhornAggregator(
            channels, clusters=16, cluster_dim=16, token_dim=32, hidden=64, dropout=0.0
        )
        self.local = nn.Sequential(nn.Conv2d(channels, 64, 1), nn.ReLU(), nn.Conv2d(64, 32, 1))

    def forward(self, x: Tensor) -> Seen:
        features = self.backbone(x)
        attention = self.query(features).flatten(2).softmax(2)
        token = torch.einsum("bhn,bcn->bc", attention, features.flatten(2)) / attention.shape[1]
        importance = attention.sum(1)
        return Seen(features, self.local(features), importance, self.aggregator(features, token, importance))


METRICS: Mapping[str, Metric] = {
    "recall_at_1": Metric("recall@1 (%)", percent=True),
    "recall_at_5": Metric("recall@5 (%)", percent=True),
    "foreground_mass": Metric("pooled mass on things (%)", percent=True),
    "attention_mass": Metric("attention on things (%)", percent=True),
    "rerank_ms": Metric("re-ranking a query (ms)", best="min"),
    "seconds": Metric("training time (s)", best="min"),
}
KEEP = 0.4


def recognise(trial: Trial, *, region_loss: RegionLoss | None = None, patches: Patches | None = None) -> Result:
    """Retrieve a place among others from another view: by a global descriptor, and by local features after it.

    Places are arrangements of six pictures of clothing on one of eight grounds (of digits at the smoke budget);
    training and test use different pictures and places. Of each test place one view is in the database and two are
    queries. The network's patches are first trained to know themselves again in a warped image, in the place of a
    pre-trained transformer; then it is trained by a multi-similarity loss on descriptors and the triplet loss of local
    matches, for every contestant alike.

    Args:
        trial: seed and budget.
        region_loss: added to the loss, called (seen, places, generator).
        patches: which patches of each image to compare: all, the 40 % of the largest confidence, or as many random
            ones; without it the global descriptor decides alone.
    """
    data = load("digits" if trial.budget == "smoke" else "fashion_mnist")
    num_test = trial.pick(smoke=12, laptop=300, paper=3_000)
    test = photograph(data.x_test, num_test, 3, trial.generator(1))
    key = f"places, seed {trial.seed}, {'plain' if region_loss is None else region_loss.__name__}"
    kept = trial.cached(partial(_trained, trial, data.x_train, region_loss), key=key)
    model = PlaceNet().to(trial.device).eval()
    model.load_state_dict(kept["model"])
    parts = [_on_patches(model, part) for part in test.images.to(trial.device).split(256)]
    descriptor, local, confidence, importance = (torch.cat(columns).cpu() for columns in zip(*parts, strict=True))
    things = F.adaptive_avg_pool2d(test.things[:, None], 12).flatten(1)

    first = torch.arange(len(test.places)) % 3 == 0
    similarity = pairwise_cosine(descriptor[~first], descriptor[first])
    order = similarity.argsort(dim=1, descending=True)
    milliseconds = 0.0
    if patches is not None:
        local = _chosen(local, confidence, patches, trial.generator(4))
        order, milliseconds = _reranked(local[~first], local[first], order)
    hits = test.places[first][order] == test.places[~first, None]

    def mass(weights: Tensor) -> float:
        return float(((weights * things).sum(1) / weights.sum(1)).mean())

    return Result(
        {
            "recall_at_1": float(hits[:, 0].float().mean()),
            "recall_at_5": float(hits[:, :5].any(1).float().mean()),
            "foreground_mass": mass(confidence),
            "attention_mass": mass(importance),
            **({"rerank_ms": milliseconds} if patches is not None else {}),
            "seconds": float(kept["seconds"]),
        }
    )


def _trained(trial: Trial, items: Tensor, region_loss: RegionLoss | None) -> dict[str, Any]:
    from pytorch_metric_learning import losses, miners

    global_loss, miner = losses.MultiSimilarityLoss(alpha=1.0, beta=50.0, base=0.0), miners.MultiSimilarityMiner()
    num_places = trial.pick(smoke=16, laptop=600, paper=20_000)
    views = photograph(items, num_places, 4, trial.generator(0))
    images = views.images.view(num_places, 4, 1, VIEW, VIEW).to(trial.device)
    model = PlaceNet().to(trial.device)
    before = trial.cached(partial(_pretrained, trial, images.flatten(0, 1)), key=f"places, seed {trial.seed}")
    model.load_state_dict(before)
    steps = trial.pick(smoke=3, laptop=250, paper=20_000)
    heads = [*model.query.parameters(), *model.aggregator.parameters()]
    optimizer = torch.optim.Adam(
        [
            {"params": heads, "lr": 4e-3},
            {"params": model.backbone.parameters(), "lr": 1e-3},
            {"params": model.local.parameters(), "lr": 1e-5},
        ]
    )
    draws, pairing = trial.generator(2), torch.Generator(trial.device).manual_seed(trial.seed)

    def loss(step: int) -> Tensor:
        chosen = torch.randperm(num_places, generator=draws)[:12].to(trial.device)
        places = chosen.repeat_interleave(4)
        seen: Seen = model(images[chosen].flatten(0, 1))
        descriptor = seen.aggregation.descriptor
        value: Tensor = global_loss(descriptor, places, miner(descriptor, places))
        value = value + local_triplet_loss(seen.local.flatten(2).mT, descriptor, places)
        return value if region_loss is None else value + region_loss(seen, places, pairing)

    started = time.process_time()
    descend(optimizer, loss, reported(steps, trial.report), anneal=steps)
    return {"model": model.state_dict(), "seconds": time.process_time() - started}


def _pretrained(trial: Trial, images: Tensor) -> dict[str, Tensor]:
    """A network whose patches know themselves again after a known warp and other light, as a pre-trained one's do."""
    generator = trial.generator(3)
    with torch.random.fork_rng():
        torch.manual_seed(trial.seed)
        model = PlaceNet().to(trial.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    steps = trial.pick(smoke=2, laptop=300, paper=10_000)
    rows = (torch.randint(len(images), (24,), generator=generator).to(images.device) for _ in range(steps))
    descend(optimizer, lambda index: _dense_contrast(model, images[index], generator), rows)
    return model.state_dict()


def _dense_contrast(model: PlaceNet, images: Tensor, generator: torch.Generator, points: int = 40) -> Tensor:
    """InfoNCE between the local features of images and of their warps, at points that both show."""

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return (low + (high - low) * torch.rand(len(images), *shape, generator=generator)).to(images.device)

    turn, scale = draw(-0.5, 0.5), draw(0.7, 1.2)
    cos, sin = turn.cos() * scale, turn.sin() * scale
    across, down = draw(-0.15, 0.15), draw(-0.15, 0.15)
    warp = torch.stack([torch.stack([cos, -sin, across], 1), torch.stack([sin, cos, down], 1)], 1)
    grid = F.affine_grid(warp, list(images.shape), align_corners=False)
    warped = F.grid_sample(images, grid, align_corners=False, padding_mode="reflection")
    first, second = (
        model.local(model.backbone(x * draw(0.7, 1.3, 1, 1, 1) + 0.1 * draw(-1.0, 1.0, *x.shape[1:])))
        for x in (images, warped)
    )
    where = F.affine_grid(warp, [len(images), 1, *second.shape[2:]], align_corners=False)
    first = F.grid_sample(first, where, align_corners=False)
    inside = (where.abs().amax(-1) < 0.95).flatten(1)
    chosen = draw(0.0, 1.0, inside.shape[1]).masked_fill(~inside, -1.0).topk(points, dim=1).indices
    shown = inside.gather(1, chosen)
    a, b = (
        F.normalize(x.flatten(2).mT.gather(1, chosen[..., None].expand(-1, -1, x.shape[1]))[shown], dim=1)
        for x in (first, second)
    )
    logits = a @ b.T / 0.1
    same = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2


@torch.no_grad()
def _on_patches(model: PlaceNet, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    seen = model(images)
    return seen.aggregation.descriptor, seen.local.flatten(2).mT, seen.aggregation.confidence, seen.importance


def _chosen(local: Tensor, confidence: Tensor, patches: Patches, generator: torch.Generator) -> Tensor:
    if patches == "all":
        return local
    weights = confidence if patches == "discriminative" else torch.rand(confidence.shape, generator=generator)
    return discriminative_patches(local, weights, KEEP)


def _reranked(queries: Tensor, database: Tensor, order: Tensor) -> tuple[Tensor, float]:
    """Each query's first hundred candidates in the order of their matches, and the time for one query."""
    started = time.process_time()
    found = torch.stack([rerank(query, database, ranks) for query, ranks in zip(queries, order, strict=True)])
    return found, 1e3 * (time.process_time() - started) / max(1, len(queries))
