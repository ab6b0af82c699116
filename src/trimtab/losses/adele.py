r"""ADELE: corrects a class's noisy masks from the moment at which the network starts to memorise them.

Reach for it in segmentation from coarse or wrong masks. A network first learns what the masks of a class have in
common, and its training IoU rises fast; once the rise slows it begins to fit the errors, at another time for every
class. ADELE fits a curve to each class's training IoU, and from that time on replaces the class's labels by confident
predictions. A penalty on disagreement between image scales keeps the predictions worth trusting.

$$
\mathrm{IoU}_c(t) \approx f(t) = a \bigl( 1 - e^{-t^b / c} \bigr), \qquad
\text{correct class } c \text{ once } \frac{f'(1) - f'(t)}{f'(1)} > r
$$

$$
\mathcal{L} = \frac{1}{S} \sum_{s} \Bigl( \mathrm{CE}(p_s, y)
+ \lambda\, [\max q \geq \rho]\, \mathrm{KL}(p_s \,\|\, q) \Bigr), \qquad q = \frac{1}{S} \sum_s p_s
$$

where $t$ counts epochs and $p_s$ is the prediction at scale $s$, brought back to the image's size.

Reference: Liu, Liu, Zhu, Shen, Fernandez-Granda, "Adaptive Early-Learning Correction for Segmentation from Noisy
Annotations", CVPR 2022, arXiv 2110.03740.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import curve_fit
from torch import Tensor, nn

from trimtab.losses.segmentation import checked_maps

# With fewer, three parameters follow the noise.
_FEWEST_POINTS = 4
# A smaller gain of IoU in an epoch, before any larger one, is not yet learning.
_SMALLEST_RISE = 0.1


class LearningCurve(NamedTuple):
    r"""The curve \(f(t) = a (1 - \exp(-t^b / c))\) of a training IoU over epochs.

    Attributes:
        a: the level that it tends to, in [0, 1].
        b: exponent of time, in [0, 1]; the slope never rises.
        c: slowness, positive.
    """

    a: float
    b: float
    c: float

    def value(self, t: ArrayLike) -> NDArray[np.float64]:
        """The IoU at time `t`, 0 at 0."""
        return _curve(np.asarray(t, dtype=np.float64), *self)

    def slope(self, t: ArrayLike) -> NDArray[np.float64]:
        """Its derivative at time `t`, positive."""
        time = np.asarray(t, dtype=np.float64)
        slope: NDArray[np.float64] = self.a * self.b / self.c * time ** (self.b - 1) * np.exp(-(time**self.b) / self.c)
        return slope

    def deceleration(self, t: ArrayLike) -> NDArray[np.float64]:
        """By which share the slope at `t` lies below that at 1; it does not depend on the level `a`."""
        time = np.asarray(t, dtype=np.float64)
        kept: NDArray[np.float64] = time ** (self.b - 1) * np.exp((1 - time**self.b) / self.c)
        return 1 - kept


def fit_learning_curve(iou: ArrayLike, epochs: ArrayLike | None = None) -> LearningCurve:
    """The learning curve nearest to a training IoU, by weighted least squares; later points weigh more.

    Args:
        iou: measurements in [0, 1], at least 4.
        epochs: when they were made, positive; 1, 2, ... where it is None. The authors' release takes equal steps
            from 0 to the number of measurements.

    Raises:
        ValueError: if there are fewer than 4 points, they do not lie in [0, 1], or `epochs` does not fit.
        RuntimeError: if the fit does not converge.

    Example:
        >>> curve = LearningCurve(a=0.8, b=0.9, c=3.0)
        >>> tuple(round(value, 3) for value in fit_learning_curve(curve.value(range(1, 21))))
        (0.8, 0.9, 3.0)
    """
    y = _checked_iou(iou)
    t = np.arange(1, len(y) + 1, dtype=np.float64) if epochs is None else np.asarray(epochs, dtype=np.float64)
    if t.shape != y.shape or not (t >= 0).all():
        raise ValueError(f"epochs: shape {t.shape}; it must be {y.shape}, one time, not negative, per measurement")
    if len(y) < _FEWEST_POINTS:
        raise ValueError(f"iou: {len(y)} measurements; a curve needs at least {_FEWEST_POINTS}")
    found, _ = curve_fit(
        _curve,
        t,
        y,
        p0=(1.0, 1.0, 1.0),
        sigma=np.geomspace(1.0, 0.1, len(y)),
        bounds=([0.0, 0.0, 0.0], [1.0, 1.0, np.inf]),
        method="trf",
    )
    return LearningCurve(*map(float, found))


def memorization_epoch(iou: ArrayLike, r: float = 0.9, total_epochs: int | None = None) -> int | None:
    """The epoch at which a class's masks begin to be memorised: where its learning has slowed down by more than `r`.

    Epochs before the first rise of at least 0.1 (from 0 before training) are not yet learning, and left out of the fit.

    Args:
        iou: the class's training IoU after each epoch, against the labels trained on.
        r: relative fall of the learning curve's slope, in (0, 1).
        total_epochs: how far ahead the curve is followed; None asks only about the epochs measured.

    Returns:
        The number of epochs done when memorisation begins; None where that is later, or fewer than 4 epochs of
        learning have been measured, or no curve fits.

    Raises:
        ValueError: if `iou` does not lie in [0, 1], `r` is out of range, or `total_epochs` is less than what was
            measured.

    Example:
        >>> late = [0.0, 0.01, 0.02, *LearningCurve(a=0.8, b=0.9, c=2.0).value(range(1, 10))]
        >>> memorization_epoch(late), memorization_epoch(late[:8]), memorization_epoch(late[:8], total_epochs=20)
        (10, None, 10)
    """
    y = _checked_iou(iou)
    if not 0 < r < 1:
        raise ValueError(f"r: {r}; it must lie in (0, 1)")
    horizon = len(y) if total_epochs is None else total_epochs
    if horizon < len(y):
        raise ValueError(f"total_epochs: {total_epochs}; {len(y)} epochs have been measured already")
    rises = np.flatnonzero(np.diff(y, prepend=0.0) >= _SMALLEST_RISE)
    if not len(rises) or len(y) - rises[0] < _FEWEST_POINTS:
        return None
    start = int(rises[0])
    try:
        curve = fit_learning_curve(y[start:])
    except RuntimeError:
        return None
    slowed = np.flatnonzero(curve.deceleration(np.arange(1, horizon - start + 1)) > r)
    return start + int(slowed[0]) + 1 if len(slowed) else None


def class_iou(predicted: Int[Tensor, "..."], labels: Int[Tensor, "..."], num_classes: int) -> Float[Tensor, " classes"]:
    """Intersection over union of every class over all pixels; 0 for a class that is neither there nor predicted.

    Args:
        predicted: predicted classes, in `[0, num_classes)`.
        labels: labels of the same shape; pixels with a label outside `[0, num_classes)` do not count.
        num_classes: number of classes.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> class_iou(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 255]), 3)
        tensor([0.5000, 0.5000, 0.0000], dtype=torch.float64)
    """
    if predicted.shape != labels.shape:
        raise ValueError(f"predicted: shape {tuple(predicted.shape)}; it must be {tuple(labels.shape)}, as labels")
    known = (labels >= 0) & (labels < num_classes)
    pairs = torch.bincount(num_classes * labels[known] + predicted[known], minlength=num_classes**2)
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
) -> Int[Tensor, "n *space"]:
    """Replaces labels of these classes, and of the background, by confident predictions of the same.

    A pixel changes if the probability of the predicted class is above its threshold, and its old and its new label are
    each one of `classes` or the background, class 0. Images that have no pixel of `classes` stay as they are.

    Args:
        labels: label maps, int64; pixels with a label outside `[0, classes)`, as those to ignore, stay.
        probs: predicted probabilities.
        classes: foreground classes whose labels may change.
        tau_fg: threshold of the foreground classes. The authors use 0.8 on PASCAL VOC, 0.7 on SegTHOR.
        tau_bg: threshold of the background.
        class_constraint: let an image take no class that it had no label of.

    Returns:
        The new label maps; `labels` is left as it is.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if shapes do not fit, or a class or a threshold is out of range.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.9, 0.4], [0.0, 0.0, 0.5]])[None, :, None]
        >>> correct_labels(torch.tensor([[[1, 0, 1]]]), probs, classes=[1])
        tensor([[[0, 1, 1]]])
    """
    checked_maps(probs, labels, names=("probs", "labels"))
    num_classes = probs.shape[1]
    if not all(0 < label < num_classes for label in classes):
        raise ValueError(f"classes: {sorted(classes)}; they must be foreground classes, in [1, {num_classes})")
    for name, tau in (("tau_fg", tau_fg), ("tau_bg", tau_bg)):
        if not 0 <= tau < 1:
            raise ValueError(f"{name}: {tau}; it must lie in [0, 1)")
    may_change = torch.zeros(num_classes, dtype=torch.bool, device=labels.device)
    may_change[list(classes)] = True
    known = (labels >= 0) & (labels < num_classes)
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
        every: a marked class is corrected at once, and again after every epoch whose number this divides. The
            authors use 1 on PASCAL VOC, 10 on SegTHOR.

    Attributes:
        history: IoU of every class after each epoch.
        started: the epochs, counted from 1, after which the classes were marked.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
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
        every: int = 1,
    ) -> None:
        if num_classes < 2:
            raise ValueError(f"num_classes: {num_classes}; it must be at least 2")
        if not 0 < r < 1:
            raise ValueError(f"r: {r}; it must lie in (0, 1)")
        for name, tau in (("tau_fg", tau_fg), ("tau_bg", tau_bg)):
            if not 0 <= tau < 1:
                raise ValueError(f"{name}: {tau}; it must lie in [0, 1)")
        if every < 1:
            raise ValueError(f"every: {every}; it must be at least 1")
        self.num_classes = num_classes
        self.r = r
        self.tau_fg = tau_fg
        self.tau_bg = tau_bg
        self.class_constraint = class_constraint
        self.every = every
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
        values = _checked_iou(iou.tolist() if isinstance(iou, Tensor) else iou)
        if len(values) != self.num_classes:
            raise ValueError(f"iou: {len(values)} values; it must have {self.num_classes}, one per class")
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
            raise ValueError(f"probs: shape {tuple(probs.shape)}; it must be (n, {self.num_classes}, ...)")
        return correct_labels(
            labels,
            probs,
            self.due,
            tau_fg=self.tau_fg,
            tau_bg=self.tau_bg,
            class_constraint=self.class_constraint,
        )

    def state_dict(self) -> dict[str, Any]:
        """What was measured and decided so far."""
        return {"history": [list(epoch) for epoch in self.history], "started": dict(self.started)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a `state_dict()`."""
        self.history = [list(epoch) for epoch in state["history"]]
        self.started = dict(state["started"])


def multi_scale_logits(
    model: Callable[[Tensor], Tensor],
    images: Float[Tensor, "batch channels height width"],
    scales: Sequence[float] = (0.7, 1.0, 1.5),
    *,
    flip: bool = False,
) -> Float[Tensor, "batch views classes height width"]:
    """The model's logits at several scales of the images, each brought back to the images' size.

    Args:
        model: maps images to logits.
        images: the images.
        scales: factors of their height and width, positive.
        flip: predict mirrored copies as well, each of which follows its own.

    Returns:
        As many predictions per image as there are scales, or twice as many; `.softmax(2).mean(1)` of it is the
        prediction to correct labels by.

    Raises:
        ValueError: if `images` is not four-dimensional, or `scales` is empty or not positive.

    Example:
        >>> multi_scale_logits(nn.Conv2d(1, 3, 1), torch.zeros(2, 1, 16, 16)).shape
        torch.Size([2, 3, 3, 16, 16])
    """
    if images.ndim != 4:
        raise ValueError(f"images: shape {tuple(images.shape)}; it must be (batch, channels, height, width)")
    if not scales or not all(0 < scale < math.inf for scale in scales):
        raise ValueError(f"scales: {tuple(scales)}; there must be at least one, all positive")
    height, width = images.shape[2:]
    views = []
    for scale in scales:
        x = _resized(images, (max(1, int(height * scale)), max(1, int(width * scale))))
        views.append(_resized(model(x), (height, width)))
        if flip:
            views.append(_resized(model(x.flip(-1)).flip(-1), (height, width)))
    return torch.stack(views, dim=1)


def multi_scale_consistency(
    logits: Float[Tensor, "batch scales classes *space"], rho: float = 0.8
) -> Float[Tensor, " batch"]:
    r"""Disagreement of the scales, \(\frac1S \sum_s \mathrm{KL}(p_s \| q)\), mean over an image's pixels.

    It is the Jensen-Shannon divergence of the scales, at most the logarithm of their number. Whether their mean q is a
    constant to the gradient makes no difference, for it is the minimiser. An image of which q is nowhere above `rho`
    counts zero; the choice is one for the whole image, as in the authors' release.

    Args:
        logits: predictions at every scale, as `multi_scale_logits` gives them.
        rho: smallest probability, of any class at any pixel, that makes an image count, in [0, 1].

    Raises:
        TypeError: if `logits` is not floating point.
        ValueError: if it has fewer than three dimensions or is empty, or `rho` is out of range.

    Example:
        >>> one = torch.tensor([50.0, 0.0])
        >>> multi_scale_consistency(torch.stack([one, one.flip(0)])[None, :, :, None], rho=0.5)  # log(2)
        tensor([0.6931])
    """
    if not logits.is_floating_point():
        raise TypeError(f"logits: dtype {logits.dtype}; it must be a floating-point type")
    if logits.ndim < 4 or logits.numel() == 0:
        raise ValueError(
            f"logits: shape {tuple(logits.shape)}; it must be (batch, scales, classes, height, width), and not empty"
        )
    if not 0 <= rho <= 1:
        raise ValueError(f"rho: {rho}; it must lie in [0, 1]")
    log_probs = (logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits).log_softmax(2)
    log_mean = log_probs.logsumexp(1, keepdim=True) - math.log(logits.shape[1])
    divergence = (log_probs.exp() * (log_probs - log_mean)).sum(2).flatten(1).mean(1)
    return divergence * (log_mean.detach().flatten(1).amax(1).exp() >= rho)


class MultiScaleConsistencyLoss(nn.Module):
    """Cross-entropy at every scale, and agreement between the scales, called as `loss(logits, targets)`.

    The logits are those of `multi_scale_logits(model, images)`.

    Args:
        lam: weight of the agreement, not negative.
        rho: smallest probability, of any class at any pixel of the scales' mean, that makes an image's agreement
            count, in [0, 1].
        ignore_index: label of pixels that have no part in the cross-entropy; they count as zero in its mean, so that
            an image without labels costs nothing.

    Raises:
        ValueError: if `lam` or `rho` is out of range.

    Example:
        >>> images, labels = torch.rand(2, 1, 16, 16), torch.zeros(2, 16, 16, dtype=torch.int64)
        >>> model = nn.Conv2d(1, 3, 1)
        >>> MultiScaleConsistencyLoss()(multi_scale_logits(model, images), labels).backward()
    """

    def __init__(self, lam: float = 1.0, rho: float = 0.8, *, ignore_index: int = -100) -> None:
        super().__init__()
        if not lam >= 0:
            raise ValueError(f"lam: {lam}; it must not be negative")
        if not 0 <= rho <= 1:
            raise ValueError(f"rho: {rho}; it must lie in [0, 1]")
        self.lam = lam
        self.rho = rho
        self.ignore_index = ignore_index

    def forward(
        self, logits: Float[Tensor, "batch scales classes *space"], targets: Int[Tensor, "batch *space"]
    ) -> Tensor:
        """The loss of a batch.

        Args:
            logits: predictions at every scale, of the images' size.
            targets: label maps.

        Raises:
            TypeError: if a dtype is wrong (`logits` floating point, `targets` int64).
            ValueError: if shapes do not fit or the batch is empty.
        """
        disagreement = multi_scale_consistency(logits, self.rho)
        logits = logits.to(checked_maps(logits[:, 0], targets).dtype)
        at_scales = targets[:, None].expand(-1, logits.shape[1], *targets.shape[1:])
        fit = F.cross_entropy(logits.movedim(2, 1), at_scales, ignore_index=self.ignore_index, reduction="none")
        return fit.mean() + self.lam * disagreement.mean()


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if maps.shape[2:] == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=True)


def _curve(t: NDArray[np.float64], a: float, b: float, c: float) -> NDArray[np.float64]:
    value: NDArray[np.float64] = -a * np.expm1(-(t**b) / c)
    return value


def _checked_iou(iou: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(iou, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"iou: shape {values.shape}; it must be a sequence of values in [0, 1], and not empty")
    return values
