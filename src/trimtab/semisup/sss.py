r"""SSS: semi-supervised segmentation with a promptable model that prompts itself, from few masks.

A reconstruction: the paper's abstract and its program's description name the parts, and the formulas of two of them,
the feature enhancement and the prompt generator, are ours. Any network with features and a decoder can be trained; none
is imported.

An unlabelled image has a weak view and two strong ones. The weak view's confident pixels are labels of the strong ones,

$$
\mathcal{L} = \mathcal{L}_x + \frac{\lambda}{2} \sum_{k=1}^{2}
\operatorname{mean}\bigl( [\max_c p^w_c \ge \tau] \, \mathrm{CE}(\hat y, p^{s_k}) \bigr), \qquad
\hat y = \arg\max_c p^w_c .
$$

*Discriminative feature enhancement* sorts what two views' features have in common from what they have not, by their
cosine $s$ at each place,

$$
F_a' = F_a + \varphi\Bigl( \Bigl[ \tfrac{1 + s}{2} \cdot \tfrac{F_a + F_b}{2} \; ; \;
\tfrac{1 - s}{2} \, (F_a - F_b) \Bigr] \Bigr),
$$

with a linear map $\varphi$ that starts at zero. *PCSW prompts* are boxes and points for a pseudo-mask: components of a
class that are too small, too large or too many for an organ are left out (physical constraints), and each window of a
sliding grid that shows enough of a component proposes the box around what it sees; boxes that overlap are merged.

Reference: Hongjie Zhu, Xiwei Liu, Rundong Xue, Zeyu Zhang, Yong Xu, Daji Ergu, Ying Cai and Yang Zhao, "SSS:
Semi-Supervised SAM-2 with Efficient Prompting for Medical Imaging Segmentation", 2025, arXiv 2506.08949.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from trimtab.ops.arguments import floating_tensor, in_range, integer, non_negative, positive, tensor

Region = tuple[int, int, int, int]


class DiscriminativeFeatureEnhancement(nn.Module):
    """Adds to a view's features what it shares with another view, and what it does not; at first nothing.

    Args:
        dim: channels of the features.

    Raises:
        ValueError: if `dim` is not positive.

    Example:
        >>> enhance = DiscriminativeFeatureEnhancement(8)
        >>> first, second = torch.rand(2, 1, 8, 4, 4)
        >>> enhanced, _ = enhance(first, second)
        >>> torch.equal(enhanced, first)
        True
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(2 * integer("dim", dim), dim, 1)
        nn.init.zeros_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)  # type: ignore[arg-type]

    def forward(
        self, first: Float[Tensor, "batch dim height width"], second: Float[Tensor, "batch dim height width"]
    ) -> tuple[Float[Tensor, "batch dim height width"], Float[Tensor, "batch dim height width"]]:
        """Both views' features, enhanced by each other.

        Args:
            first, second: features of two views, in which a place is the same place of the image.

        Raises:
            TypeError: if a tensor is not floating point.
            ValueError: if shapes do not fit.
        """
        shared, apart = similar_and_apart(first, second)
        dim = self.mix.out_channels
        if first.shape[1] != dim:
            raise ValueError(f"first must have {dim} channels, got shape {tuple(first.shape)}")
        return first + self.mix(torch.cat([shared, apart], 1)), second + self.mix(torch.cat([shared, -apart], 1))


def similar_and_apart(
    first: Float[Tensor, "batch dim height width"], second: Float[Tensor, "batch dim height width"]
) -> tuple[Float[Tensor, "batch dim height width"], Float[Tensor, "batch dim height width"]]:
    """What two feature maps have in common, and in what they differ, weighed by their cosine at each place.

    Raises:
        TypeError: if a tensor is not floating point.
        ValueError: if the two are not feature maps of one shape.

    Example:
        >>> same = torch.ones(1, 2, 1, 1)
        >>> [part.flatten().tolist() for part in similar_and_apart(same, same)]
        [[1.0, 1.0], [0.0, 0.0]]
    """
    for name, value in (("first", first), ("second", second)):
        floating_tensor(name, value)
        if value.ndim != 4 or value.shape != first.shape:
            wanted = "(batch, dim, height, width), of one shape"
            raise ValueError(f"{name} must be {wanted}, got {tuple(value.shape)} beside {tuple(first.shape)}")
    cosine = F.cosine_similarity(first, second, dim=1)[:, None].clamp(-1, 1)
    return (1 + cosine) / 2 * (first + second) / 2, (1 - cosine) / 2 * (first - second)


def weak_to_strong_loss(
    weak: Float[Tensor, "batch classes height width"],
    strong: tuple[Float[Tensor, "batch classes height width"], ...],
    threshold: float = 0.95,
) -> Tensor:
    """Cross-entropy of strong views' pixels with the weak view's confident classes, which are constants.

    Args:
        weak: logits of weak views.
        strong: logits of one or more strong views of the same pixels; they are averaged.
        threshold: least probability of a class that counts, in [0, 1].

    Returns:
        The mean over all pixels, the others counted as zero.

    Raises:
        TypeError: if a tensor is not floating point.
        ValueError: if shapes do not fit, or `threshold` is out of range.

    Example:
        >>> weak = torch.tensor([9.0, 0.0]).view(1, 2, 1, 1)
        >>> round(weak_to_strong_loss(weak, (torch.zeros(1, 2, 1, 1),)).item(), 4)  # log(2)
        0.6931
    """
    in_range("threshold", threshold, 0, 1)
    weak = floating_tensor("weak", weak)
    if weak.ndim != 4 or weak.numel() == 0:
        wanted = "(batch, classes, height, width) with at least one image"
        raise ValueError(f"weak must be {wanted}, got shape {tuple(weak.shape)}")
    if not strong:
        raise ValueError("strong must be at least one view, got none")
    sure, guess = weak.detach().softmax(1).max(1)
    counts = (sure >= threshold).to(weak)
    total = weak.new_zeros(())
    for view in strong:
        if view.shape != weak.shape:
            raise ValueError(f"strong must be of shape {tuple(weak.shape)} as weak, got shape {tuple(view.shape)}")
        entropy = F.cross_entropy(floating_tensor("strong", view), guess, reduction="none")
        total = total + (counts * entropy).mean() / len(strong)
    return total


class SSSLoss(nn.Module):
    """Cross-entropy on labelled masks, and on confident pixels of the weak view for two strong ones.

    Args:
        threshold: least probability of a pixel's class that counts, in [0, 1].
        weight: of the unlabelled images.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> logits, masks = torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64)
        >>> found = SSSLoss()(logits, masks, logits, (logits, logits))
        >>> round(found.item(), 4)  # log(3): no pixel of the weak view is sure
        1.0986
    """

    def __init__(self, threshold: float = 0.95, weight: float = 1.0) -> None:
        super().__init__()
        self.threshold = in_range("threshold", threshold, 0, 1)
        self.weight = non_negative("weight", weight)

    def forward(
        self,
        logits: Float[Tensor, "labelled classes height width"],
        masks: Int[Tensor, "labelled height width"],
        weak: Float[Tensor, "batch classes height width"],
        strong: tuple[Float[Tensor, "batch classes height width"], ...],
    ) -> Tensor:
        """The loss.

        Args:
            logits: of labelled images.
            masks: their pixels' classes.
            weak: logits of weak views of unlabelled images.
            strong: logits of their strong views.

        Raises:
            TypeError: if `masks` is not int64, or logits are not floating point.
            ValueError: if shapes do not fit.
        """
        logits = floating_tensor("logits", logits)
        if masks.dtype != torch.int64:
            raise TypeError(f"masks must be int64, got {masks.dtype}")
        if logits.ndim != 4 or masks.shape != (logits.shape[0], *logits.shape[2:]) or masks.numel() == 0:
            wanted = f"{(logits.shape[0], *logits.shape[2:])}, a class for every pixel of logits"
            raise ValueError(f"masks must be {wanted}, got shape {tuple(masks.shape)}")
        return F.cross_entropy(logits, masks) + self.weight * weak_to_strong_loss(weak, strong, self.threshold)


@dataclass(frozen=True)
class Prompts:
    """Prompts for one image.

    Attributes:
        boxes: left, top, right and bottom in pixels, the last two exclusive.
        points: x and y of a pixel in each box.
        class_ids: the class that each is for.
    """

    boxes: Int[Tensor, "n 4"]
    points: Int[Tensor, "n 2"]
    class_ids: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.class_ids)


@dataclass(frozen=True)
class PCSWPromptGenerator:
    """Prompts from a pseudo-mask, by physical constraints and a sliding window.

    Runs on the CPU, by SciPy, and carries no gradient.

    Attributes:
        window: side of the windows, in pixels; larger than the image means one window.
        stride: distance between windows; None is half of the side.
        min_area: least share of the image that a component must have, in [0, 1].
        max_area: largest share, in [0, 1].
        max_components: components of a class that are kept, the largest; None keeps all.
        body: margin at the border of the image, as a share of its side, in which no organ's centre lies.
        min_share: least share of a window that a component must fill, in [0, 1].
        pad: of a box, as a share of its side.
        merge: boxes of a component with at least this overlap (intersection over union) become one, in (0, 1].

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> mask = torch.zeros(16, 16, dtype=torch.int64)
        >>> mask[4:8, 6:12] = 2
        >>> prompts = PCSWPromptGenerator(window=16, pad=0.0)(mask)
        >>> prompts.boxes, prompts.class_ids
        (tensor([[ 6,  4, 12,  8]]), tensor([2]))
    """

    window: int = 256
    stride: int | None = None
    min_area: float = 0.001
    max_area: float = 1.0
    max_components: int | None = 1
    body: float = 0.0
    min_share: float = 0.05
    pad: float = 0.05
    merge: float = 0.5

    def __post_init__(self) -> None:
        integer("window", self.window)
        for name in ("stride", "max_components"):
            if getattr(self, name) is not None:
                integer(name, getattr(self, name))
        for name in ("min_area", "max_area", "min_share"):
            in_range(name, getattr(self, name), 0, 1)
        in_range("body", self.body, 0, 0.5, "left")
        in_range("merge", positive("merge", self.merge), 0, 1)
        non_negative("pad", self.pad)

    def __call__(
        self, mask: Int[Tensor, "height width"], confidence: Float[Tensor, "height width"] | None = None
    ) -> Prompts:
        """The prompts of an image.

        Args:
            mask: a class for every pixel, 0 for the ground.
            confidence: of every pixel, at least 0; None for equal ones.

        Raises:
            TypeError: if `mask` is not made of integers.
            ValueError: if shapes do not fit.
        """
        found = tensor("mask", mask, ndim=2)
        if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
            raise TypeError(f"mask must be integers, got {found.dtype}")
        sure = torch.ones(found.shape) if confidence is None else tensor("confidence", confidence, floating=True)
        if sure.shape != found.shape:
            raise ValueError(f"confidence must be of shape {tuple(found.shape)} as mask, got {tuple(sure.shape)}")
        classes, weights = found.detach().cpu().numpy(), sure.detach().cpu().double().numpy()
        boxes: list[Region] = []
        points: list[tuple[int, int]] = []
        ids: list[int] = []
        for label in sorted(set(np.unique(classes).tolist()) - {0}):
            for component in self._components(classes == label):
                for box in self._boxes(component):
                    boxes.append(self._padded(box, classes.shape))
                    points.append(_point(component, weights, box))
                    ids.append(label)
        return Prompts(
            torch.tensor(boxes, dtype=torch.int64).view(-1, 4),
            torch.tensor(points, dtype=torch.int64).view(-1, 2),
            torch.tensor(ids, dtype=torch.int64),
        )

    def _components(self, there: Bool[np.ndarray, "height width"]) -> list[np.ndarray]:
        """The components that an organ could be, largest first."""
        from scipy import ndimage

        named, count = ndimage.label(there, structure=np.ones((3, 3)))
        sizes = np.bincount(named.ravel(), minlength=count + 1)[1:]
        kept = []
        for number in np.argsort(-sizes, kind="stable"):
            component = named == number + 1
            centre = np.array(ndimage.center_of_mass(component)) + 0.5
            inside = all(self.body <= c / side <= 1 - self.body for c, side in zip(centre, there.shape, strict=True))
            if self.min_area <= sizes[number] / there.size <= self.max_area and inside:
                kept.append(component)
        return kept[: self.max_components]

    def _boxes(self, component: np.ndarray) -> list[Region]:
        """The boxes that windows propose, merged."""
        tops, lefts = (self._starts(side) for side in component.shape)
        boxes = []
        for top in tops:
            for left in lefts:
                seen = component[top : top + self.window, left : left + self.window]
                if seen.any() and seen.mean() >= self.min_share:
                    rows, columns = (np.flatnonzero(seen.any(axis=axis)) for axis in (1, 0))
                    box = (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)
                    boxes.append(tuple(int(edge) for edge in box))
        return _merged(boxes, self.merge)  # type: ignore[arg-type]

    def _starts(self, side: int) -> list[int]:
        last = max(0, side - self.window)
        return sorted({*range(0, last, self.stride or max(1, self.window // 2)), last})

    def _padded(self, box: Region, shape: tuple[int, ...]) -> Region:
        left, top, right, bottom = box
        x, y = round(self.pad * (right - left)), round(self.pad * (bottom - top))
        return max(0, left - x), max(0, top - y), min(shape[1], right + x), min(shape[0], bottom + y)


def _point(component: np.ndarray, weights: np.ndarray, box: Region) -> tuple[int, int]:
    """The pixel of a component within a box that lies deepest in it, the more so the surer it is."""
    from scipy import ndimage

    left, top, right, bottom = box
    depth = ndimage.distance_transform_edt(np.pad(component, 1))[1:-1, 1:-1]
    score = np.where(component, depth * weights + 1e-12 * depth, -1.0)[top:bottom, left:right]
    row, column = np.unravel_index(int(score.argmax()), score.shape)
    return left + int(column), top + int(row)


def _merged(boxes: list[Region], overlap: float) -> list[Region]:
    """Boxes of which no two overlap that much, the ones that do replaced by their hull."""
    merged = sorted(set(boxes))
    changed = True
    while changed:
        changed = False
        for i, one in enumerate(merged):
            for other in merged[i + 1 :]:
                if _overlap(one, other) >= overlap:
                    hull = (*(min(a, b) for a, b in zip(one[:2], other[:2], strict=True)),)
                    hull += (*(max(a, b) for a, b in zip(one[2:], other[2:], strict=True)),)
                    merged = sorted({*(box for box in merged if box not in (one, other)), hull})  # type: ignore[arg-type]
                    changed = True
                    break
            if changed:
                break
    return merged


def _overlap(one: Region, other: Region) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(0, width) * max(0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return both / (sum(areas) - both)
