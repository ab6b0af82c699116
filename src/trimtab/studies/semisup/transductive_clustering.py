"""Is few-shot classification solved by clustering, and do neighbours add to it?

The paper takes features of large networks on miniImageNet, tieredImageNet and CUB; here the features are the pixels of
digits of 8 x 8, less the mean of the training part and brought to length one. A run is 60 tasks with 15 queries a class
from a third of the digits; weights are chosen among four on 15 tasks from the rest, which hold the same classes, where
the paper has classes of their own. 'Support let go' is the release, in which support samples keep their class only at
the start of each update. The headline is the paper's title: clustering alone against the prototypes that it starts
from. Where classes are to be discovered, which the paper does not speak of, it goes on from semi-supervised k-means,
and labelled images are its support.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from trimtab.data import load
from trimtab.semisup import TransductiveClusterer, center_normalize, laplacian_shot, slk
from trimtab.studies.engine.study import Claim, Experiment, Metric, Result, Study, Trial
from trimtab.studies.tasks import category_discovery
from trimtab.studies.tasks.category_discovery import Discovery, Found
from trimtab.studies.tasks.clustering import Clustering, Sample, digits, long_tail
from trimtab.studies.tools.deep_clustering import k_means
from trimtab.studies.tools.discovery import known_kmeans

Episode = tuple[Tensor, Tensor, Tensor, Tensor]
"""Support (shots, dim) and its classes, queries (queries, dim) and theirs."""
Solve = Callable[[Episode, int, float], Int[Tensor, " queries"]]
"""Classes of the queries of an episode of so many classes, with a weight of the neighbours."""

_QUERIES = 15
WEIGHTS = (0.1, 0.3, 0.7, 1.0)


def prototypes(episode: Episode, ways: int, weight: float, *, rectify: bool = False) -> Tensor:
    """The nearest class mean."""
    return laplacian_shot(*episode[:3], ways, lam=0.0, rectify=rectify)


def laplacian(episode: Episode, ways: int, weight: float) -> Tensor:
    """LaplacianShot: rectified prototypes, and a graph of the queries."""
    return laplacian_shot(*episode[:3], ways, lam=weight)


def clustered(
    episode: Episode,
    ways: int,
    weight: float,
    *,
    kind: Literal["means", "modes"] = "means",
    clamp: Literal["always", "init"] = "always",
    neighbours: bool = True,
) -> Tensor:
    """Clustering of support and queries from the class means."""
    rule = TransductiveClusterer(ways, lam=weight if neighbours else 0.0, kind=kind, clamp=clamp)
    return rule.fit_predict(*episode[:3])


def spreading(episode: Episode, ways: int, weight: float) -> Tensor:
    """scikit-learn's label spreading on a Gaussian graph; the weight is the share that neighbours have."""
    from sklearn.semi_supervised import LabelSpreading

    support, y, query, _ = episode
    x = torch.cat([support, query]).double().numpy()
    known = np.concatenate([y.numpy(), np.full(len(query), -1)])
    model = LabelSpreading(gamma=10.0, alpha=min(0.95, weight), max_iter=100).fit(x, known)
    return torch.from_numpy(np.asarray(model.transduction_[len(support) :])).long()


SOLVERS: dict[str, tuple[Solve, tuple[float, ...]]] = {
    "prototypes": (prototypes, (0.0,)),
    "rectified prototypes": (partial(prototypes, rectify=True), (0.0,)),
    "LaplacianShot": (laplacian, WEIGHTS),
    "K-means": (partial(clustered, neighbours=False), (0.0,)),
    "K-modes": (partial(clustered, neighbours=False, kind="modes"), (0.0,)),
    "SLK-Means": (clustered, WEIGHTS),
    "SLK-MS": (partial(clustered, kind="modes"), WEIGHTS),
    "SLK-Means, support let go": (partial(clustered, clamp="init"), WEIGHTS),
    "label spreading": (spreading, (0.2, 0.5, 0.8, 0.95)),
}


def episodes(x: Tensor, y: Tensor, ways: int, shots: int, count: int, generator: torch.Generator) -> Iterator[Episode]:
    """Tasks of some classes: labelled samples of each, and queries."""
    members = [(y == label).nonzero()[:, 0] for label in range(int(y.max()) + 1)]
    for _ in range(count):
        chosen = torch.randperm(len(members), generator=generator)[:ways]
        drawn = torch.stack(
            [
                members[label][torch.randperm(len(members[label]), generator=generator)[: shots + _QUERIES]]
                for label in chosen.tolist()
            ]
        )
        classes = torch.arange(ways)
        yield (
            x[drawn[:, :shots].flatten()],
            classes.repeat_interleave(shots),
            x[drawn[:, shots:].flatten()],
            classes.repeat_interleave(_QUERIES),
        )


def few_shot(trial: Trial, *, solver: str, ways: int, shots: int) -> Result:
    """Mean accuracy over episodes of unseen digits, the weight chosen on episodes of others."""
    data = load("digits")
    mean = data.x_train.flatten(1).mean(0)
    parts = [
        (center_normalize(x.flatten(1), mean).double(), y)
        for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test))
    ]
    solve, weights = SOLVERS[solver]

    def accuracy(part: int, weight: float, count: int) -> float:
        right = [
            float((solve(episode, ways, weight) == episode[3]).double().mean())
            for episode in episodes(*parts[part], ways, shots, count, trial.generator(part))
        ]
        return sum(right) / len(right)

    weight = weights[0]
    if len(weights) > 1:
        weight = max(weights, key=lambda tried: accuracy(0, tried, trial.pick(smoke=2, laptop=15, paper=300)))
    return Result({"accuracy": accuracy(1, weight, trial.pick(smoke=5, laptop=60, paper=10_000)), "weight": weight})


def experiment(name: str, ways: int, shots: int, skip: tuple[str, ...] = ()) -> Experiment:
    """All solvers on tasks of one size."""
    return Experiment(
        name,
        {solver: partial(few_shot, solver=solver, ways=ways, shots=shots) for solver in SOLVERS if solver not in skip},
        {"accuracy": Metric("accuracy of the queries (%)", percent=True), "weight": Metric("chosen weight", best=None)},
        reads=("digits",),
        cost=1.5,
    )


one_shot = experiment("one shot of five classes", 5, 1)
ten_classes = experiment("one shot of ten classes", 10, 1, skip=("SLK-Means, support let go", "K-modes", "SLK-MS"))
five_shots = experiment("five shots of five classes", 5, 5, skip=("K-modes", "SLK-MS", "rectified prototypes"))


def clusters(sample: Sample, **options: Any) -> Int[Tensor, " n"]:
    """SLK without labels, on centred pixels of length one, from the clusters of k-means."""
    x = center_normalize(sample.x, sample.x.mean(0))
    _, centers = k_means(x, sample.num_clusters, sample.seed)
    return slk(x, centers, **options).labels


def discovered(start: Found) -> Int[Tensor, " n"]:
    """SLK-Means on pre-trained features from the clusters of semi-supervised k-means; labelled images keep theirs."""
    features = start.features(start.x).detach()
    x = center_normalize(features, features.mean(0))
    found = known_kmeans(x, start.targets, start.labelled, start.num_classes, start.seed)
    members = F.one_hot(found, start.num_classes).to(x)
    centers = members.T @ x / members.sum(0).clamp_min(1)[:, None]
    known = torch.where(start.labelled, found, -1)
    return slk(x, centers, lam=0.5, n_neighbors=6, known=known).labels


_means = Clustering(fit=partial(clusters, lam=0.5, n_neighbors=6))

study = Study(
    paper="transductive_clustering",
    entrants={
        "SLK-Means": {
            digits: _means,
            long_tail: _means,
            category_discovery.digits: Discovery(assign=discovered, search={}),
        },
        "SLK-MS": Clustering(fit=partial(clusters, lam=0.5, n_neighbors=6, kind="modes")),
    },
    controls={"k-means on centred pixels of length one": Clustering(fit=partial(clusters, lam=0.0))},
    on=[digits, long_tail, category_discovery.digits],
    experiments=[one_shot, ten_classes, five_shots],
    headline=Claim("K-means", beats="prototypes", on="accuracy", by=0.05, at=one_shot),
    claims=[
        Claim("K-means", beats="rectified prototypes", on="accuracy", at=one_shot),
        Claim("SLK-Means", beats="K-means", on="accuracy", at=one_shot),
        Claim("SLK-MS", beats="LaplacianShot", on="accuracy", at=one_shot),
        Claim("SLK-Means", beats="label spreading", on="accuracy", at=one_shot),
        Claim("SLK-Means", beats="SLK-Means, support let go", on="accuracy", at=one_shot),
        Claim("LaplacianShot", beats="rectified prototypes", on="accuracy", by=0.01, at=ten_classes),
        Claim("SLK-Means", beats="LaplacianShot", on="accuracy", at=five_shots),
        Claim("SLK-Means", beats="k-means on centred pixels of length one", on="accuracy", at=digits),
    ],
)
