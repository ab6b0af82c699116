"""Segmentation from noisy or sparse masks: the losses, forward and backward, and the correction of masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import compared, medians
from trimtab import losses


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds at batches of 8 images of 128 x 128 pixels in 9 classes."""
    batch, side, classes, repeats = (2, 16, 4, 3) if quick else (8, 128, 9, 20)
    generator = torch.Generator().manual_seed(0)
    first, second, third = torch.randn(3, batch, classes, side, side, generator=generator).requires_grad_()
    features = torch.randn(2, batch, 64, side // 16, side // 16, generator=generator).requires_grad_()
    labels = torch.randint(classes, (batch, side, side), generator=generator)
    note = f"{batch} images of {side} x {side}, {classes} classes"
    yield from _adawac(first, second, features, labels, repeats, note)
    yield from _dice(first, labels, repeats, note)
    yield from _scales(torch.stack([first, second, third], dim=1).detach().requires_grad_(), labels, repeats, note)
    yield from _correction(4 * first.detach(), labels, max(3, repeats // 4), note)
    yield from _detection(repeats)


def _adawac(
    first: Tensor, second: Tensor, features: Tensor, labels: Tensor, repeats: int, note: str
) -> Iterator[dict[str, object]]:
    index, loss, plain = torch.arange(len(labels)), losses.AdaWAC(10_000), nn.CrossEntropyLoss()

    def parts() -> Tensor:
        """The same three terms with equal weights."""
        fit = (plain(first, labels) + plain(second, labels)) / 2
        dice = (losses.dice_loss(first, labels) + losses.dice_loss(second, labels)) / 2
        return (fit + F.mse_loss(*features) + dice) / 2

    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: loss(first, second, labels, labels, *features, index).backward(),
        "peer": lambda: parts().backward(),
    }
    yield compared("AdaWAC against its terms with equal weights", medians(calls, repeats), 1.1, note)


def _dice(logits: Tensor, labels: Tensor, repeats: int, note: str) -> Iterator[dict[str, object]]:
    try:
        from monai.losses import DiceLoss
    except ImportError:
        return
    peer = DiceLoss(softmax=True, to_onehot_y=True, squared_pred=True, batch=True)
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: losses.dice_loss(logits, labels).backward(),
        "peer": lambda: peer(logits, labels[:, None]).backward(),
    }
    yield compared("dice_loss against MONAI's", medians(calls, repeats), 1.1, note)


def _scales(logits: Tensor, labels: Tensor, repeats: int, note: str) -> Iterator[dict[str, object]]:
    criterion, plain = losses.MultiScaleConsistencyLoss(), nn.CrossEntropyLoss()

    def released() -> Tensor:
        """Scale by scale, with a clamped mean, as the authors' repository has it."""
        views = logits.unbind(1)
        probs = [view.softmax(1) for view in views]
        mean = (sum(probs) / 3).clamp(1e-3, 1 - 1e-3)
        chosen = mean.amax((1, 2, 3), keepdim=True).ge(0.8).float()
        log_mean = mean.log()
        apart = sum((F.kl_div(log_mean, p, reduction="none") * chosen).sum(1) for p in probs)
        return (sum(plain(view, labels) for view in views) + apart.mean()) / 3

    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: criterion(logits, labels).backward(),
        "peer": lambda: released().backward(),
    }
    yield compared("MultiScaleConsistencyLoss against one scale after the other", medians(calls, repeats), 1.1, note)


def _correction(logits: Tensor, labels: Tensor, repeats: int, note: str) -> Iterator[dict[str, object]]:
    probs, classes = logits.softmax(1), [1, 3]
    arrays, maps = probs.numpy(), labels.numpy()

    def image_by_image() -> list[np.ndarray]:
        """A loop over images in NumPy, as the authors' repository has it."""
        corrected = []
        for p, y in zip(arrays, maps, strict=True):
            new = p.argmax(0)
            confident = (p[1:].max(0) > 0.8) | (p[0] > 0.8)
            old_in, new_in, there = y == 0, new == 0, new == 0
            for label in classes:
                old_in, new_in = old_in | (y == label), new_in | (new == label)
            for label in np.unique(y):
                there = there | (new == label)
            corrected.append(np.where(confident & old_in & new_in & there, new, y))
        return corrected

    if not np.array_equal(losses.correct_labels(labels, probs, classes).numpy(), np.stack(image_by_image())):
        raise RuntimeError("the two corrections differ")
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: losses.correct_labels(labels, probs, classes),
        "peer": image_by_image,
    }
    yield compared("correct_labels against a loop over images in NumPy", medians(calls, repeats), 1.0, note)


def _detection(repeats: int) -> Iterator[dict[str, object]]:
    iou = losses.LearningCurve(0.8, 0.9, 3.0).value(np.arange(1, 51))
    seconds = medians({"ours": lambda: losses.memorization_epoch(iou)}, repeats)
    ours = 1e3 * seconds["ours"]
    yield {
        "what": "memorization_epoch, once for a class and epoch",
        "ours": ours,
        "unit": "ms",
        "aim": "at most 50",
        "met": ours <= 50,
        "note": "50 epochs measured",
    }
