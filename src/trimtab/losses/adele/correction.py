"""Labels of memorised classes, replaced by confident predictions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.losses.adele.curve import checked_iou, memorization_epoch
from trimtab.losses.segmentation import checked_maps
from trimtab.ops.arguments import in_range, integer, same_shape, tensor
from trimtab.ops.arguments import labels as checked_labels


def class_iou(predicted: Int[Tensor, "..."], labels: Int[Tensor, "..."], num_classes: int) -> Float[Tensor, " classes"]:
    """Intersection over union of every class over all pixels; 0 for a class that is neither there nor predicted.

    Args:
        predicted: predicted classes, in `[0, num_classes)`; tensors or arrays.
        labels: labels of the same shape; pixels with a label outside `[0, num_classes)` do not count.
        num_classes: number of classes.

    Raises:
        TypeError: if a map holds no integers.
        ValueError: if the shapes differ, or a predicted class is out of range.

    Example:
        >>> class_iou(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 255]), 3)
        tensor([0.5000, 0.5000, 0.0000], dtype=torch.float64)
    """
    predicted, labels = tensor("predicted", predicted), tensor("labels", labels)
    num_classes = integer("num_classes", num_classes)
    same_shape("predicted", predicted, "labels", labels)
    if labels.is_floating_point():
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    checked_labels("predicted", predicted.flatten(), num_classes)
    known = (labels >= 0) & (labels < num_classes)
    # In int64, for in a narrow type, as masks come in, the product could overflow.
    pairs = torch.bincount(num_classes * labels[known].long() + predicted[known].long(), minlength=num_classes**2)
    table = pairs.view(num_classes, num_classes).double()
    both = table.diag()
    return both / (table.sum(0) + table.sum(1) - both).clamp(min=1)


def correct_labels(
    labels: Int[Tensor, "n *space"],
    probs: Float[Tensor, "n classes *space"],
    classes: Collection[int],
    *,
    tau_fg: float = 0.8,
    tau_bg: float = 0.8,
    class_constraint: bool = True,
    removed_index: int | None = None,
    ignore_index: int | None = 255,
) -> Int[Tensor, "n *space"]:
    """Replaces labels of these classes, and of the background, by confident predictions of the same.

    A pixel changes if the probability of the predicted class is above its threshold, and its old and its new label are
    each one of `classes` or the background, class 0. Images that have no pixel of `classes` stay as they are.

    Args:
        labels: label maps, int64.
        probs: predicted probabilities, in [0, 1].
        classes: foreground classes whose labels may change.
        tau_fg: threshold of the foreground classes. The authors use 0.8 on PASCAL VOC, 0.7 on SegTHOR.
        tau_bg: threshold of the background.
        class_constraint: let an image take no class that it had no label of.
        removed_index: the label of pixels of a foreground class that turn out to be background; the background where
            it is None. The release has an option to make them pixels to ignore, 255.
        ignore_index: label of pixels to ignore, which stay; negative labels, as torch's -100, stay too.

    Returns:
        The new label maps; `labels` is left as it is.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if shapes do not fit, a probability is none, or a label, class or threshold is out of range.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.9, 0.4], [0.0, 0.0, 0.5]])[None, :, None]
        >>> correct_labels(torch.tensor([[[1, 0, 1]]]), probs, classes=[1])
        tensor([[[0, 1, 1]]])
    """
    checked_maps(probs, labels, names=("probs", "labels"))
    if not all(index is None or isinstance(index, Integral) for index in (ignore_index, removed_index)):
        raise TypeError(f"ignore_index and removed_index must be integers, got {ignore_index!r} and {removed_index!r}")
    num_classes = probs.shape[1]
    if not all(0 < label < num_classes for label in classes):
        raise ValueError(f"classes must be foreground classes, in [1, {num_classes}), got {sorted(classes)}")
    tau_fg, tau_bg = in_range("tau_fg", tau_fg, 0, 1, "left"), in_range("tau_bg", tau_bg, 0, 1, "left")
    if not bool(((probs >= 0) & (probs <= 1 + 1e-3)).all()):
        raise ValueError("probs must be probabilities, in [0, 1], got others")
    if bool(((labels >= num_classes) & (labels != (num_classes if ignore_index is None else ignore_index))).any()):
        raise ValueError(f"labels must be in [0, {num_classes}), negative or ignore_index, got others")
    may_change = torch.zeros(num_classes, dtype=torch.bool, device=labels.device)
    may_change[list(classes)] = True
    known = (labels >= 0) & (labels < num_classes)
    if ignore_index is not None:
        known &= labels != ignore_index
    old = torch.where(known, labels, 0)
    sure, new = probs.max(1)
    in_image = torch.zeros(len(labels), num_classes, dtype=torch.bool, device=labels.device)
    in_image.scatter_(1, old.flatten(1), True)
    concerned = (in_image & may_change).any(1)
    may_change[0] = in_image[:, 0] = True
    confident = sure > torch.where(new == 0, tau_bg, tau_fg)
    change = known & confident & may_change[old] & may_change[new]
    change &= concerned.view(-1, *[1] * (labels.ndim - 1))
    if class_constraint:
        change &= in_image.gather(1, new.flatten(1)).view_as(new)
    if removed_index is not None:
        new = torch.where((new == 0) & (old > 0), removed_index, new)
    return torch.where(change, new, labels)


class ADELE:
    """Decides from the training IoU which classes to correct, and corrects them.

    After each epoch hand over every class's training IoU to `update`, then all or some of the label maps to `correct`:

        adele.update(class_iou(predicted, labels, num_classes))
        labels = adele.correct(labels, probs)

    Better predictions are those of `multi_scale_logits`, averaged after the softmax. A class that has once begun to be
    memorised stays marked. Class 0 is the background; its pixels are corrected with those of the marked classes.

    Args:
        num_classes: number of classes, the background among them.
        r: relative fall of the learning curve's slope that marks a class, in (0, 1).
        tau_fg: threshold of a foreground class's probability. The authors use 0.8 on PASCAL VOC, 0.7 on SegTHOR.
        tau_bg: threshold of the background's probability.
        class_constraint: let an image take no class that it had no label of.
        removed_index: see `correct_labels`.
        every: a marked class is corrected at once, and again after every epoch whose number this divides. The
            authors use 1 on PASCAL VOC, 10 on SegTHOR.

    Attributes:
        history: IoU of every class after each epoch.
        started: the epochs, counted from 1, after which the classes were marked.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> from trimtab.losses import LearningCurve
        >>> adele, fast, slow = ADELE(num_classes=3), LearningCurve(0.8, 0.9, 1.0), LearningCurve(0.7, 0.9, 3.0)
        >>> for epoch in range(1, 13):
        ...     marked = adele.update([0.9, fast.value(epoch), slow.value(epoch)])
        >>> adele.started
        {1: 4, 2: 10}
    """

    def __init__(
        self,
        num_classes: int,
        *,
        r: float = 0.9,
        tau_fg: float = 0.8,
        tau_bg: float = 0.8,
        class_constraint: bool = True,
        removed_index: int | None = None,
        every: int = 1,
    ) -> None:
        self.num_classes = integer("num_classes", num_classes, 2)
        self.r = in_range("r", r, 0, 1, "neither")
        self.tau_fg = in_range("tau_fg", tau_fg, 0, 1, "left")
        self.tau_bg = in_range("tau_bg", tau_bg, 0, 1, "left")
        self.class_constraint = class_constraint
        self.removed_index = removed_index
        self.every = integer("every", every)
        self.history: list[list[float]] = []
        self.started: dict[int, int] = {}

    @property
    def due(self) -> list[int]:
        """The classes that `correct` now corrects."""
        epoch = len(self.history)
        return [label for label, start in self.started.items() if start == epoch or epoch % self.every == 0]

    def update(self, iou: Sequence[float] | Float[Tensor, " classes"]) -> list[int]:
        """Takes note of an epoch.

        Args:
            iou: training IoU of every class, the background first, against the labels trained on.

        Returns:
            The classes that are marked from now on and were not before.

        Raises:
            ValueError: if there is not one value in [0, 1] for every class.
        """
        values = checked_iou(iou.tolist() if isinstance(iou, Tensor) else iou)
        if len(values) != self.num_classes:
            raise ValueError(f"iou must be {self.num_classes} values, one per class, got {len(values)}")
        self.history.append(values.tolist())
        curves = np.array(self.history).T
        marked = [
            label
            for label in range(1, self.num_classes)
            if label not in self.started and memorization_epoch(curves[label], self.r) is not None
        ]
        self.started |= dict.fromkeys(marked, len(self.history))
        return marked

    def correct(self, labels: Int[Tensor, "n *space"], probs: Float[Tensor, "n classes *space"]) -> Tensor:
        """The labels with the classes that are due corrected; see `correct_labels`.

        Raises:
            TypeError: if a dtype is wrong.
            ValueError: if shapes do not fit or `probs` has another number of classes.
        """
        if probs.ndim < 2 or probs.shape[1] != self.num_classes:
            raise ValueError(f"probs must be (n, {self.num_classes}, ...), got shape {tuple(probs.shape)}")
        return correct_labels(
            labels,
            probs,
            self.due,
            tau_fg=self.tau_fg,
            tau_bg=self.tau_bg,
            class_constraint=self.class_constraint,
            removed_index=self.removed_index,
        )

    def state_dict(self) -> dict[str, Any]:
        """What was measured and decided so far."""
        return {"history": [list(epoch) for epoch in self.history], "started": dict(self.started)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a `state_dict()`; a state that does not fit is refused and changes nothing.

        Raises:
            KeyError, ValueError: if the state is another method's or of another number of classes.
        """
        history = [checked_iou(epoch).tolist() for epoch in state["history"]]
        started = {int(label): int(epoch) for label, epoch in state["started"].items()}
        if any(len(epoch) != self.num_classes for epoch in history):
            raise ValueError(f"state must be of {self.num_classes} classes, got {[len(epoch) for epoch in history]}")
        if not all(0 < label < self.num_classes and 0 < epoch <= len(history) for label, epoch in started.items()):
            raise ValueError(f"state must start corrections of foreground classes in its past, got {started}")
        self.history, self.started = history, started
