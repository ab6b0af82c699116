"""Averaged teachers, masks of patches, HIAST's pseudo-labels and regions, and T-JEPA's masks, beside plain ways."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import compared, medians
from trimtab.domain import HIASTLoss, InstanceAdaptiveSelector
from trimtab.ops.averaging import Teacher
from trimtab.ops.patch_masks import random_patch_mask
from trimtab.semisup import sample_column_masks


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds of a call."""
    repeats = 3 if quick else 25
    yield from _teacher(4 if quick else 40, repeats)
    yield from _mask(4 if quick else 32, repeats)
    yield from _selection((8, 8) if quick else (128, 256), 19, repeats)
    yield from _regions((1, 8, 8) if quick else (2, 96, 96), 19, repeats)
    yield from _columns(16 if quick else 512, 14, repeats)


def _teacher(layers: int, repeats: int) -> Iterator[dict[str, object]]:
    network = nn.Sequential(*[nn.Linear(128, 128) for _ in range(layers)])
    teacher, other = Teacher(network, 0.999), copy.deepcopy(network)

    def plain() -> None:
        """Parameter by parameter, as repositories have it."""
        for mine, its in zip(other.parameters(), network.parameters(), strict=True):
            mine.data = 0.999 * mine.data + (1 - 0.999) * its.data

    calls = {"ours": lambda: teacher.update(network), "plain": plain}
    averaged = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn())
    calls["torch"] = lambda: averaged.update_parameters(network)
    seconds = medians(calls, repeats)
    for peer, words in (("plain", "a loop over parameters"), ("torch", "torch's AveragedModel")):
        yield compared(f"Teacher.update against {words}", seconds, 1.0, f"{layers} layers of 128 x 128", peer=peer)


def _mask(batch: int, repeats: int) -> Iterator[dict[str, object]]:
    def plain() -> Tensor:
        """MIC's way: noise of the patches, interpolated."""
        noise = torch.rand(batch, 1, 7, 7)
        return F.interpolate((noise > 0.7).float(), size=(224, 224), mode="nearest")

    seconds = medians({"ours": lambda: random_patch_mask((batch, 224, 224), 32, 0.7), "plain": plain}, repeats)
    yield compared(
        "random_patch_mask against interpolation", seconds, 1.0, f"{batch} images of 224 x 224", peer="plain"
    )


def _selection(size: tuple[int, int], classes: int, repeats: int) -> Iterator[dict[str, object]]:
    probs = (3 * torch.randn(1, classes, *size, generator=torch.Generator().manual_seed(0))).softmax(1)
    selector, thresholds = InstanceAdaptiveSelector(classes), np.full(classes, 0.9)

    def plain() -> Tensor:
        """A quantile for one class after the other, and thresholds looked up row by row, as the repository has it."""
        confidence, labels = (part.numpy() for part in probs.max(1))
        found = np.ones(classes)
        for c in range(classes):
            values = [thresholds[c], *confidence[labels == c]]
            found[c] = np.quantile(values, 1 - 0.5 * thresholds[c] ** 8)
        new = 0.9 * thresholds + 0.1 * found
        least = np.apply_along_axis(lambda row: [new[c] for c in row], 1, labels[0])
        return torch.from_numpy(np.where(confidence[0] >= least, labels[0], 255))

    seconds = medians({"ours": lambda: selector(probs), "plain": plain}, max(3, repeats // 5))
    yield compared(
        "InstanceAdaptiveSelector against NumPy's quantiles", seconds, 1.0, f"{size}, {classes} classes", peer="plain"
    )


def _regions(shape: tuple[int, int, int], classes: int, repeats: int) -> Iterator[dict[str, object]]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape[0], classes, *shape[1:], generator=generator, requires_grad=True)
    labels = torch.randint(classes, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.5] = 255
    told = torch.randn(logits.shape, generator=generator).softmax(1)
    loss = HIASTLoss()

    def stepped(value: Callable[[], Tensor]) -> Callable[[], None]:
        def call() -> None:
            logits.grad = None
            value().backward()

        return call

    def plain() -> Tensor:
        """Weights of the size of the logits for both regions, and counts of what is not zero."""
        kept = (labels != 255).float()[:, None] * torch.ones_like(logits)
        ignored = 1 - kept
        log_probs = logits.log_softmax(1)
        smooth = (-kept * log_probs / classes).sum() / kept[kept > 0].numel()
        sharp = (-ignored * logits.softmax(1) * logits.log_softmax(1)).sum() / ignored[ignored > 0].numel()
        word = -told * logits.log_softmax(1) * (labels == 255)[:, None]
        entropy = F.cross_entropy(logits, labels, ignore_index=255)
        return entropy + 0.1 * smooth + sharp + 0.5 * word.sum() / (word != 0).sum()

    calls = {"ours": stepped(lambda: loss(logits, labels, told)), "plain": stepped(plain)}
    yield compared(
        "HIASTLoss against its repository's way", medians(calls, repeats), 1.0, f"{tuple(logits.shape)}", peer="plain"
    )


def _columns(batch: int, columns: int, repeats: int) -> Iterator[dict[str, object]]:
    draws = np.random.default_rng(0)

    def plain() -> tuple[np.ndarray, np.ndarray]:
        """Row by row, as the repository's collator."""
        context, targets = [], []
        for _ in range(batch):
            order = np.arange(columns)
            draws.shuffle(order)
            context.append(order[:3])
            rest = np.setdiff1d(order, context[-1])
            sets = []
            for _ in range(4):
                draws.shuffle(rest)
                sets.append(rest[:5].copy())
            targets.append(sets)
        return np.array(context), np.array(targets)

    seconds = medians({"ours": lambda: sample_column_masks(batch, columns), "plain": plain}, max(3, repeats // 5))
    yield compared(
        "sample_column_masks against a loop over rows", seconds, 1.0, f"{batch} rows of {columns} columns", peer="plain"
    )
