"""Pseudo-labels by thresholds that follow each class from image to image, and pasted regions of hard classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from trimtab.ops.arguments import (
    class_indices,
    finite_tensor,
    floating_tensor,
    in_range,
    indices,
    integer,
    looked_at,
    non_negative,
)
from trimtab.ops.states import fits


@torch.no_grad()
def class_quantiles(
    confidence: Float[Tensor, " pixels"],
    labels: Int[Tensor, " pixels"],
    quantile: Float[Tensor, " classes"],
    extra: Float[Tensor, " classes"],
) -> Float[Tensor, " classes"]:
    """A quantile of the confidences of each class, with one more value in each, so that no class is empty.

    Linear between neighbours, as NumPy's default, and in float64; all classes at once.

    Args:
        confidence: numbers of any range.
        labels: their classes, in `[0, classes)`.
        quantile: the one wanted of each class, in [0, 1].
        extra: the further value of each class.

    Example:
        >>> confidence, labels = torch.tensor([0.2, 0.4, 0.9]), torch.tensor([0, 0, 0])
        >>> class_quantiles(confidence, labels, torch.tensor([0.5, 0.5]), torch.tensor([0.6, 0.7]))
        tensor([0.5000, 0.7000], dtype=torch.float64)
    """
    values = torch.cat([confidence.double(), extra.double()])
    classes = torch.cat([labels, torch.arange(len(extra), device=labels.device)])
    order = values.argsort()
    values = values[order[classes[order].argsort(stable=True)]]
    counts = classes.bincount(minlength=len(extra))
    place = (counts - 1) * quantile.double()
    start, below = counts.cumsum(0) - counts, place.floor().long()
    low, high = values[start + below], values[start + torch.minimum(below + 1, counts - 1)]
    return low + (high - low) * (place - below)


class InstanceAdaptiveSelector(nn.Module):
    """Pseudo-labels from predictions, by thresholds that follow each class from image to image.

    The thresholds depend on the order of the images: shuffle them by a generator. The statistics start anew in each
    round of self-training, with a new selector.

    Args:
        num_classes: number of classes.
        alpha: share of a class's pixels that is kept at a threshold of 1, in [0, 1]; 0.5 in the authors' scripts.
        beta: share of the old threshold that stays, in [0, 1].
        gamma: how much fewer are kept of a class with a low threshold, at least 0.
        init: the thresholds at first, in (0, 1).
        momentum: of `confidence`, in [0, 1].
        ignore_index: label of pixels that are not kept.

    Attributes:
        thresholds: of each class, float64.
        confidence: running mean probability of each class's kept pixels; 0 before there were any.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> selector = InstanceAdaptiveSelector(2)
        >>> probs = torch.tensor([[[[0.99, 0.40]], [[0.01, 0.60]]]])  # two pixels
        >>> selector(probs)
        tensor([[[  0, 255]]])
    """

    thresholds: Tensor
    confidence: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        alpha: float = 0.5,
        beta: float = 0.9,
        gamma: float = 8.0,
        init: float = 0.9,
        momentum: float = 0.99,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        integer("num_classes", num_classes)
        self.alpha, self.beta = in_range("alpha", alpha, 0, 1), in_range("beta", beta, 0, 1)
        self.gamma = non_negative("gamma", gamma)
        self.momentum = in_range("momentum", momentum, 0, 1)
        self.ignore_index = _void(ignore_index, num_classes)
        init = in_range("init", init, 0, 1, "neither")
        self.register_buffer("thresholds", torch.full((num_classes,), init, dtype=torch.float64))
        self.register_buffer("confidence", torch.zeros(num_classes, dtype=torch.float64))

    @torch.no_grad()
    def forward(self, probs: Float[Tensor, "batch classes height width"]) -> Int[Tensor, "batch height width"]:
        """The pseudo-labels of an image, after its thresholds have been moved; a batch is taken as one image.

        Args:
            probs: the network's probabilities.

        Returns:
            Classes, or `ignore_index` where the probability is below the class's threshold.

        Raises:
            TypeError: `probs` is not floating point.
            ValueError: it has another number of classes, no pixel, or a value that is no probability.
        """
        probs = finite_tensor("probs", probs, ndim=4, floating=True)
        if probs.shape[1] != len(self.thresholds) or probs.numel() == 0:
            wanted = f"(batch, {len(self.thresholds)}, height, width) with a pixel at least"
            raise ValueError(f"probs must be {wanted}, got shape {tuple(probs.shape)}")
        low, high = probs.aminmax()
        if low < 0 or high > 1 + 1e-3:
            raise ValueError(f"probs must be in [0, 1], got {float(low if low < 0 else high):g}")
        found, labels = probs.double().max(1)
        wanted_quantile = 1 - self.alpha * self.thresholds**self.gamma
        of_image = class_quantiles(found.flatten(), labels.flatten(), wanted_quantile, self.thresholds)
        moved = self.thresholds.lerp(of_image, 1 - self.beta)
        self.thresholds.copy_(torch.where(moved >= 1, 0.999, moved))
        kept = found >= self.thresholds[labels]
        self._remember(found[kept], labels[kept])
        return torch.where(kept, labels, self.ignore_index)

    def _remember(self, probability: Tensor, labels: Tensor) -> None:
        counts = labels.bincount(minlength=len(self.thresholds))
        mean = torch.zeros_like(self.confidence).index_add_(0, labels, probability) / counts.clamp(min=1)
        followed = torch.where(self.confidence == 0, mean, self.confidence.lerp(mean, 1 - self.momentum))
        self.confidence.copy_(torch.where(counts > 0, followed, self.confidence))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As every module's, but a state that does not fit changes nothing.

        Raises:
            ValueError: the state is of another number of classes.
        """
        if strict and not fits(state_dict, self.state_dict()):
            raise ValueError(f"state_dict must be of {len(self.thresholds)} classes, got other names or shapes")
        return super().load_state_dict(state_dict, strict, assign)


def hard_class_odds(
    confidence: Float[Tensor, " classes"], num_hard: int
) -> tuple[Bool[Tensor, " classes"], Float[Tensor, " classes"]]:
    """The classes of least confidence, and the odds with which one of them is drawn.

    Args:
        confidence: of each class, in [0, 1].
        num_hard: how many are hard.

    Returns:
        Which are hard, and odds proportional to (1 - confidence)^2 that sum to 1, 0 for the others.

    Raises:
        ValueError: `num_hard` is more than there are classes, or a confidence is out of range.

    Example:
        >>> hard_class_odds(torch.tensor([0.9, 0.7, 0.8, 1.0]), 2)
        (tensor([False,  True,  True, False]), tensor([0.0000, 0.6923, 0.3077, 0.0000]))
    """
    confidence = finite_tensor("confidence", confidence, ndim=1, floating=True)
    integer("num_hard", num_hard, 1, len(confidence))
    if bool(((confidence < 0) | (confidence > 1)).any()):
        raise ValueError("confidence must be in [0, 1], got others")
    hard = torch.zeros_like(confidence, dtype=torch.bool)
    hard[confidence.argsort(stable=True)[:num_hard]] = True
    # Classes of full confidence keep a chance too small to matter, but not none, where all are such.
    odds = torch.where(hard, (1 - confidence).square().clamp(min=1e-12), 0.0)
    return hard, odds / odds.sum()


class HardClassPaste:
    """Pastes regions of hard classes, with their pseudo-labels, from other images of the target domain.

    A class is drawn by its odds, then one of the images that hold it, the smallest tenth of them left out; all pixels
    of hard classes are copied from there. It is repeated with the classes that are still missing until half of the hard
    ones were pasted, or `max_donors` images were drawn.

    Args:
        x: the images to paste from; held, not copied.
        labels: their pseudo-labels.
        confidence: of each class, as `InstanceAdaptiveSelector.confidence`.
        num_hard: how many classes are hard; 14 of 19 in the paper.
        max_donors: images to paste from, at most.
        drop: share of a class's images, those with the fewest pixels of it, that are not drawn, in [0, 1).
        ignore_index: label of pixels that were not kept.

    Attributes:
        hard: which classes are.
        odds: with which each is drawn.

    Raises:
        TypeError: `x` is not floating point or `labels` not int64.
        ValueError: shapes do not fit, a label or an argument is out of range.

    Example:
        >>> x, labels = torch.tensor([[[[1.0, 2.0]]], [[[3.0, 4.0]]]]), torch.tensor([[[0, 255]], [[1, 0]]])
        >>> paste = HardClassPaste(x, labels, torch.tensor([0.9, 0.4]), num_hard=1)
        >>> paste(x[:1], labels[:1], generator=torch.Generator().manual_seed(0))
        (tensor([[[[3., 2.]]]]), tensor([[[  1, 255]]]))
    """

    def __init__(
        self,
        x: Float[Tensor, "images channels height width"],
        labels: Int[Tensor, "images height width"],
        confidence: Float[Tensor, " classes"],
        num_hard: int,
        *,
        max_donors: int = 3,
        drop: float = 0.1,
        ignore_index: int = 255,
    ) -> None:
        _check_pair(x, labels)
        self.hard, self.odds = hard_class_odds(confidence.to(labels.device), num_hard)
        self.max_donors = integer("max_donors", max_donors)
        in_range("drop", drop, 0, 1, "left")
        self.ignore_index = _void(ignore_index, len(confidence))
        kept_pixels(labels, len(confidence), self.ignore_index)
        self.x, self.labels = x, labels
        codes = torch.where(labels == self.ignore_index, len(confidence), labels).flatten(1)
        area = torch.zeros(len(labels), len(confidence) + 1, dtype=torch.int64, device=labels.device)
        area = area.scatter_add_(1, codes, torch.ones_like(codes))[:, :-1]
        self.holds = area > 0
        rank = torch.where(self.holds, area, area.amax() + 1).argsort(dim=0, stable=True).argsort(0)
        dropped = (drop * self.holds.sum(0)).round().minimum(self.holds.sum(0) - 1)
        self.candidates = self.holds & (rank >= dropped)

    def draw(self, batch: int, *, generator: torch.Generator | None = None) -> Int[Tensor, "batch donors"]:
        """The images to paste from, for each image of a batch; -1 for none.

        Args:
            batch: number of images.
            generator: decides the draws; on the device of the labels.
        """
        if batch == 0:
            return self.labels.new_empty(0, self.max_donors)
        drawable = self.hard & self.candidates.any(0)
        missing = drawable.expand(batch, -1).clone()
        half = 0.5 * self.hard.sum()
        donors: list[Tensor] = []
        for _ in range(self.max_donors):
            active = missing.any(1) & ((self.hard & ~missing & drawable).sum(1) < half)
            odds = torch.where(active[:, None] & missing, self.odds, 0.0)
            # A row without a chance draws class 0 and image 0, and is left out afterwards.
            odds[:, 0] += (~active).to(odds)
            chosen = torch.multinomial(odds, 1, generator=generator)[:, 0]
            pool = self.candidates.T[chosen].to(odds)
            pool[:, 0] += (~active).to(odds)
            image = torch.multinomial(pool, 1, generator=generator)[:, 0]
            donors.append(torch.where(active, image, -1))
            missing &= ~(self.holds[image] & active[:, None])
        return torch.stack(donors, 1)

    @torch.no_grad()
    def __call__(
        self,
        x: Float[Tensor, "batch channels height width"],
        labels: Int[Tensor, "batch height width"],
        *,
        donors: Int[Tensor, "batch donors"] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, "batch channels height width"], Int[Tensor, "batch height width"]]:
        """Images and pseudo-labels with what was pasted; those that came stay as they are.

        Args:
            x, labels: of the size of the images to paste from.
            donors: numbers of these images, -1 for none, instead of drawing them; the last one is on top.
            generator: decides the draws.

        Raises:
            TypeError: `x` is not floating point or `labels` not int64.
            ValueError: shapes do not fit, or a label or a donor is out of range.
        """
        _check_pair(x, labels)
        if looked_at(labels) and not _known(labels, len(self.hard), self.ignore_index):
            raise ValueError(f"labels must be in [0, {len(self.hard)}) or {self.ignore_index}, got others")
        if x.shape[1:] != self.x.shape[1:]:
            raise ValueError(f"x must be images of shape {tuple(self.x.shape[1:])}, got {tuple(x.shape[1:])}")
        if donors is None:
            donors = self.draw(len(x), generator=generator)
        elif donors.ndim != 2 or len(donors) != len(x):
            raise ValueError(f"donors must be of shape ({len(x)}, donors), got {tuple(donors.shape)}")
        if donors.dtype != torch.int64:
            raise TypeError(f"donors must be int64, got {donors.dtype}")
        if looked_at(donors) and not ((donors >= -1) & (donors < len(self.x))).all():
            raise ValueError(f"donors must be in [-1, {len(self.x)}), got others")
        hard = torch.cat([self.hard, self.hard.new_zeros(1)])
        for donor in donors.unbind(1):
            theirs = self.labels[donor]
            code = torch.where(theirs == self.ignore_index, len(self.hard), theirs)
            pasted = hard[code] & (donor >= 0)[:, None, None]
            x = torch.where(pasted[:, None], self.x[donor], x)
            labels = torch.where(pasted, theirs, labels)
        return x, labels


def kept_pixels(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Which pixels are not ignored; their labels must be classes.

    Raises:
        ValueError: one is not.
    """
    kept = labels != ignore_index
    indices("labels", torch.where(kept, labels, 0), num_classes)
    return kept


def _known(labels: Tensor, num_classes: int, ignore_index: int) -> bool:
    return bool(((labels == ignore_index) | ((labels >= 0) & (labels < num_classes))).all())


def _void(ignore_index: int, num_classes: int) -> int:
    integer("ignore_index", ignore_index, None)
    if 0 <= ignore_index < num_classes:
        raise ValueError(f"ignore_index must be none of the {num_classes} classes, got {ignore_index}")
    return ignore_index


def _check_pair(x: Tensor, labels: Tensor) -> None:
    floating_tensor("x", x)
    class_indices("labels", labels)
    if x.ndim != 4 or labels.shape != (x.shape[0], *x.shape[2:]):
        raise ValueError(
            "x and labels must be (batch, channels, height, width) and (batch, height, width), "
            f"got {tuple(x.shape)} and {tuple(labels.shape)}"
        )
