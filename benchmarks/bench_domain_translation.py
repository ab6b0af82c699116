"""Matching of conditional distributions, alignment of poses and robust self-training beside plain code."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from sklearn.semi_supervised import SelfTrainingClassifier
from torch import Tensor

from benchmarks.timing import compared, medians
from trimtab.domain import RSSLinearClassifier, conditional_energy_distance, global_position_alignment


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds on one batch, or of one fit."""
    repeats = 3 if quick else 15
    samples, conditions = (60, 3) if quick else (1000, 10)
    x, y = _random(samples, 2).requires_grad_(), _random(samples, 2)
    u, v = (torch.arange(samples) % conditions for _ in range(2))
    matching = {
        "ours": lambda: conditional_energy_distance(x, y, u, v, conditions).sum().backward(),
        "peer": lambda: one_by_one(x, y, u, v, conditions).backward(),
    }
    torch.testing.assert_close(
        conditional_energy_distance(x, y, u, v, conditions).sum(), one_by_one(x, y, u, v, conditions)
    )
    # A batch on an accelerator is not looked at, so all pairs are gone through, of other conditions with weight zero:
    # conditions times as many distances as the loop's, in three calls instead of three a condition; each pair has a
    # weight of its own.
    member = torch.nn.functional.one_hot(u, conditions).to(x)
    matching["limit"] = lambda: distances(x, y, member @ member.mT).backward()
    seconds, note = medians(matching, repeats), f"{samples} samples of {conditions} conditions, forward and backward"
    yield compared("conditional_energy_distance, against a loop over conditions", seconds, 1.5, note)
    yield compared("conditional_energy_distance, against all weighted distances", seconds, 1.2, note, peer="limit")

    poses = 100 if quick else 4096
    source, target, camera = _random(poses, 16, 3), _random(poses, 16, 2), torch.tensor([0.0, 0.0, 2.0, 2.0])
    pairing = torch.arange(poses)
    aligning = {
        "ours": lambda: global_position_alignment(source, target, camera, pairing=pairing),
        "peer": lambda: pose_by_pose(source[:100], target[:100], camera),
    }
    torch.testing.assert_close(aligning["ours"]()[:100], aligning["peer"]())
    times = medians(aligning, repeats)
    times["peer"] *= poses / 100
    yield compared("global_position_alignment, against pose by pose", times, 0.2, f"{poses} poses of 16 joints")

    labelled, crowd, width = (20, 200, 10) if quick else (20, 10_000, 200)
    X, few = _random(labelled, width).numpy(), (torch.arange(labelled) % 2).numpy()
    others = _random(crowd, width).numpy()
    everyone = torch.cat([torch.tensor(X), torch.tensor(others)]).numpy()
    marked = torch.cat([torch.tensor(few), torch.full((crowd,), -1)]).numpy()

    def self_training() -> object:
        from sklearn.linear_model import LogisticRegression

        return SelfTrainingClassifier(LogisticRegression()).fit(everyone, marked)

    fitting: dict[str, Callable[[], object]] = {
        "ours": lambda: RSSLinearClassifier().fit(X, few, others),
        "peer": self_training,
    }
    yield compared(
        "RSSLinearClassifier, against scikit-learn's self-training",
        medians(fitting, 1 if quick else 3, warmup=1),
        2.0,
        f"{labelled} labelled and {crowd} unlabelled samples of {width} features",
    )


def one_by_one(x: Tensor, y: Tensor, u: Tensor, v: Tensor, conditions: int) -> Tensor:
    """The sum of the conditions' energy distances, each from its own samples."""
    total = x.new_zeros(())
    for k in range(conditions):
        a, b = x[u == k], y[v == k]
        total = total + 2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()
    return total


def distances(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of the distances of all pairs across and within."""
    mode = "donot_use_mm_for_euclid_dist"
    pairs = (torch.cdist(a, b, compute_mode=mode) * weights for a, b in ((x, y), (x, x), (y, y)))
    across, within, between = (found.sum() for found in pairs)
    return across + within + between


def pose_by_pose(source: Tensor, target: Tensor, camera: Tensor) -> Tensor:
    """The alignment as its formula reads, for one pose at a time."""
    placed = []
    for x, u in zip(source, target, strict=True):
        width, height = u.max(0).values - u.min(0).values
        dx, dy, _ = x.max(0).values - x.min(0).values
        z = (camera[2] * dx + camera[3] * dy) / (width + height)
        ray = (u[0] - camera[:2]) / camera[2:]
        placed.append(x - x[0] + torch.stack([ray[0] * z, ray[1] * z, z]))
    return torch.stack(placed)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
