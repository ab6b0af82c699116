r"""SSS: semi-supervised segmentation with a promptable model that prompts itself, from few masks.

Any network with features and a decoder can be trained; none is imported. An unlabelled image has a weak view and two
strong ones. The weak view's pixels are labels of the strong ones, where they are confident,

$$
\mathcal{L} = \mathcal{L}_x + \frac{\lambda}{2} \sum_{k=1}^{2}
\operatorname{mean}\bigl( [\max_c p^w_c \ge \tau] \, \mathrm{CE}(\hat y, p^{s_k}) \bigr), \qquad
\hat y = \arg\max_c p^w_c .
$$

*Discriminative feature enhancement* (DFE) decodes a strong view from features that the weak view has a share in, at
every scale of the encoder: with $F_w, F_s$ both views' features after a convolution, $s$ the cosine of their means over
the image and $m$ a small network at each place,

$$
F = \sigma(s)\, m(F_w) + (1 - \sigma(s))\, m(F_s) + (1 - s)\, (F_s - F_w) .
$$

*PCSW prompts* (physical constraints, sliding window) choose, for a volume of slices, the one to prompt in. An organ is
continuous: windows of a third to a half of the slices are searched for one in which the largest component of a class
holds most of its voxels, and the slice where that component is largest gives its box, and the box's middle as a point.

The enhancement, the prompts and the head of the coarse masks are those of the authors' program, as a commit of their
repository (a01f346) has it; the branch that is shown there has a description alone. In that program every pixel of the
weak view counts (`threshold=0`; the one here is UniMatch V2's, which the paper builds on), the labelled loss has a Dice
term besides, the head of the coarse masks gets no gradient, a class that is nowhere is prompted with the whole image,
and where no window will do the point is the mean of the pixels.

Reference: Hongjie Zhu, Xiwei Liu, Rundong Xue, Zeyu Zhang, Yong Xu, Daji Ergu, Ying Cai and Yang Zhao, "SSS:
Semi-Supervised SAM-2 with Efficient Prompting for Medical Imaging Segmentation", 2025, arXiv 2506.08949.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from trimtab.ops.arguments import floating_tensor, in_range, integer, looked_at, non_negative, one_of, tensor
from trimtab.ops.whole_state import WholeState

Connectivity = Literal["faces", "corners"]
Maps = Float[Tensor, "batch dim height width"]


def fuse_views(weak: Maps, strong: Maps, transform: Callable[[Maps], Maps]) -> Maps:
    """Two views' features in one: mixed by how alike the images are on the whole, and moved by how they differ.

    Args:
        weak, strong: features of two views, in which a place is the same place of the image.
        transform: of features, place by place.

    Raises:
        TypeError: if a tensor is not floating point.
        ValueError: if the two are not feature maps of one shape.

    Example:
        >>> same = torch.ones(1, 2, 1, 1)
        >>> fuse_views(same, same, lambda features: 3 * features).flatten().tolist()
        [3.0, 3.0]
        >>> fuse_views(same, -same, torch.zeros_like).flatten().tolist()  # what is left is the difference, twice
        [-4.0, -4.0]
    """
    for name, value in (("weak", weak), ("strong", strong)):
        floating_tensor(name, value)
        if value.ndim != 4 or value.shape != weak.shape:
            wanted = "(batch, dim, height, width), of one shape"
            raise ValueError(f"{name} must be {wanted}, got {tuple(value.shape)} beside {tuple(weak.shape)}")
    with torch.autocast(weak.device.type, enabled=False):
        weak_mean, strong_mean = (floating_tensor("features", value).mean((2, 3)) for value in (weak, strong))
        alike = F.cosine_similarity(weak_mean, strong_mean, dim=1).view(-1, 1, 1, 1)
    share = alike.sigmoid()
    return share * transform(weak) + (1 - share) * transform(strong) + (1 - alike) * (strong - weak)


class DiscriminativeFeatureEnhancement(WholeState, nn.Module):
    """Features to decode a strong view from, at every scale: its own and those of a weak view of the same image.

    Args:
        dims: channels of the features at each scale.
        out_dim: channels that all scales are brought to first; None leaves each its own. The authors take 256.
        hidden: width of the networks at each place; None for twice the channels, as with the authors.

    Raises:
        ValueError: if there is no scale, or a size is not positive.

    Example:
        >>> enhance = DiscriminativeFeatureEnhancement([4, 8])
        >>> weak, strong = ([torch.rand(2, 4, 6, 6), torch.rand(2, 8, 3, 3)] for _ in range(2))
        >>> [tuple(scale.shape) for scale in enhance(weak, strong)]
        [(2, 4, 6, 6), (2, 8, 3, 3)]
    """

    def __init__(self, dims: Sequence[int], *, out_dim: int | None = None, hidden: int | None = None) -> None:
        super().__init__()
        self.dims = tuple(integer("dims", dim) for dim in dims)
        if not self.dims:
            raise ValueError("dims must be of at least one scale, got none")
        if out_dim is not None:
            integer("out_dim", out_dim)
        if hidden is not None:
            integer("hidden", hidden)
        widths = [out_dim or dim for dim in self.dims]
        self.project = nn.ModuleList(
            nn.Identity() if width == dim else nn.Conv2d(dim, width, 1)
            for dim, width in zip(self.dims, widths, strict=True)
        )
        self.align = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for width in widths)
        self.place = nn.ModuleList(_AtEachPlace(width, hidden or 2 * width) for width in widths)

    def forward(self, weak: Sequence[Maps], strong: Sequence[Maps]) -> list[Maps]:
        """The features of each scale, in which a place is the same place of the image in both views.

        Raises:
            TypeError: if a tensor is not floating point.
            ValueError: if there are not as many scales as at the start, or shapes do not fit.
        """
        if not len(weak) == len(strong) == len(self.dims):
            raise ValueError(f"weak and strong must be of {len(self.dims)} scales, got {len(weak)} and {len(strong)}")
        for dim, one, other in zip(self.dims, weak, strong, strict=True):
            if one.ndim != 4 or one.shape[1] != dim or other.shape != one.shape:
                raise ValueError(
                    f"weak and strong must be (batch, {dim}, height, width) at this scale, "
                    f"got {tuple(one.shape)} and {tuple(other.shape)}"
                )
        return [
            fuse_views(align(project(one)), align(project(other)), place)
            for project, align, place, one, other in zip(
                self.project, self.align, self.place, weak, strong, strict=True
            )
        ]


class _AtEachPlace(nn.Module):
    """Four linear layers, the first three normalised and rectified, over the channels of each place."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((dim, hidden), (hidden, hidden), (hidden, dim)):
            layers += [nn.Linear(before, after), nn.LayerNorm(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(dim, dim))

    def forward(self, x: Maps) -> Maps:
        found: Tensor = self.layers(x.movedim(1, -1)).movedim(-1, 1)
        return found


class CoarseMaskHead(nn.Sequential):
    """Logits of coarse masks from an encoder's features, for `PCSWPromptGenerator`: two convolutions.

    Args:
        dim: channels of the features.
        num_classes: of the masks, the ground included.
        hidden: channels between the two.

    Raises:
        ValueError: if a size is not positive.

    Example:
        >>> CoarseMaskHead(16, 3).eval()(torch.zeros(5, 16, 8, 8)).argmax(1).shape
        torch.Size([5, 8, 8])
    """

    def __init__(self, dim: int, num_classes: int, hidden: int = 64) -> None:
        integer("num_classes", num_classes, 2)
        super().__init__(
            nn.Conv2d(integer("dim", dim), integer("hidden", hidden), 3, padding=1),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, num_classes, 1),
        )


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
            ValueError: if shapes do not fit, or a pixel's class is out of range.
        """
        logits = floating_tensor("logits", logits)
        if not isinstance(masks, Tensor) or masks.dtype != torch.int64:
            raise TypeError(f"masks must be an int64 tensor, got {type(masks).__name__}")
        if logits.ndim != 4 or masks.shape != (logits.shape[0], *logits.shape[2:]) or masks.numel() == 0:
            wanted = f"{(logits.shape[0], *logits.shape[2:])}, a class for every pixel of logits"
            raise ValueError(f"masks must be {wanted}, got shape {tuple(masks.shape)}")
        if looked_at(masks) and not ((masks >= 0) & (masks < logits.shape[1])).all():
            raise ValueError(f"masks must be in [0, {logits.shape[1]}), got others")
        return F.cross_entropy(logits, masks) + self.weight * weak_to_strong_loss(weak, strong, self.threshold)


@dataclass(frozen=True)
class Prompts:
    """Prompts for a volume, one for each class that is there.

    Attributes:
        class_ids: the class that each is for.
        slices: the slice to prompt in.
        boxes: left, top, right and bottom in pixels, the last two exclusive.
        points: x and y of the middle, in pixels.
        continuity: share of the class's voxels, in the window that was chosen, that its largest component holds; 0
            where there was no such window, and the slice is the one with most pixels.
    """

    class_ids: Int[Tensor, " n"]
    slices: Int[Tensor, " n"]
    boxes: Int[Tensor, "n 4"]
    points: Float[Tensor, "n 2"]
    continuity: Float[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.class_ids)


class SlicePrompt(NamedTuple):
    """A prompt in one slice of a volume; see `Prompts`."""

    slice: int
    box: tuple[int, int, int, int]
    point: tuple[float, float]
    continuity: float = 0.0


def prompt_in(volume: Bool[np.ndarray, "slices height width"], at: int, continuity: float = 0.0) -> SlicePrompt:
    """The box around what is there in a slice of a volume, and its middle.

    Example:
        >>> volume = np.zeros((1, 8, 8), dtype=bool)
        >>> volume[0, 2:5, 1:4] = True
        >>> prompt_in(volume, 0).box
        (1, 2, 4, 5)
    """
    rows, columns = (np.flatnonzero(volume[at].any(axis=axis)) for axis in (1, 0))
    left, top, right, bottom = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    return SlicePrompt(at, (left, top, right, bottom), ((left + right - 1) / 2, (top + bottom - 1) / 2), continuity)


@dataclass(frozen=True)
class PCSWPromptGenerator:
    """Prompts from the coarse masks of a volume, by physical constraints and a window that slides over its slices.

    Windows begin at half of the way from a third to a half of the slices in length, and grow; the first one is taken in
    which the largest component of a class holds `threshold` of its voxels. Where there is none, the slice with most
    pixels of the class is, with all of them. Runs on the CPU, by SciPy, and carries no gradient.

    Attributes:
        threshold: least share of the voxels, in (0, 1].
        connectivity: voxels that share a face are connected, as in the authors' program, or those that share a corner.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> masks = torch.zeros(6, 8, 8, dtype=torch.int64)
        >>> masks[0, ::2, ::2] = 2  # many single pixels in the first slice
        >>> masks[1:5, 2:5, 1:4] = 2  # a block in the next four
        >>> prompts = PCSWPromptGenerator()(masks)
        >>> prompts.class_ids, prompts.slices, prompts.boxes
        (tensor([2]), tensor([1]), tensor([[1, 2, 4, 5]]))
    """

    threshold: float = 0.8
    connectivity: Connectivity = "faces"

    def __post_init__(self) -> None:
        in_range("threshold", self.threshold, 0, 1, "right")
        one_of("connectivity", self.connectivity, get_args(Connectivity))

    def __call__(self, masks: Int[Tensor, "slices height width"]) -> Prompts:
        """The prompts of a volume.

        Args:
            masks: a class for every voxel, 0 for the ground.

        Raises:
            TypeError: if `masks` is not made of integers.
            ValueError: if it is no volume, or a class is negative.
        """
        found = tensor("masks", masks, ndim=3)
        if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
            raise TypeError(f"masks must be integers, got {found.dtype}")
        if found.numel() and int(found.min()) < 0:
            raise ValueError(f"masks must be at least 0, got {int(found.min())}")
        classes = found.detach().cpu().numpy()
        ids = [label for label in np.unique(classes).tolist() if label]
        chosen = [self._prompt(classes == label) for label in ids]
        return Prompts(
            torch.tensor(ids, dtype=torch.int64),
            torch.tensor([prompt.slice for prompt in chosen], dtype=torch.int64),
            torch.tensor([prompt.box for prompt in chosen], dtype=torch.int64).view(-1, 4),
            torch.tensor([prompt.point for prompt in chosen]).view(-1, 2),
            torch.tensor([prompt.continuity for prompt in chosen]),
        )

    def _prompt(self, there: Bool[np.ndarray, "slices height width"]) -> SlicePrompt:
        count = len(there)
        least, most = max(2, count // 3), max(3, count // 2)
        for length in range((least + most) // 2, most + 1):
            for first in range(count - length + 1):
                component, share = self._largest(there[first : first + length])
                if share >= self.threshold:
                    at = int(component.sum(axis=(1, 2)).argmax())
                    return prompt_in(component, at, share)._replace(slice=first + at)
        return prompt_in(there, int(there.sum(axis=(1, 2)).argmax()))

    def _largest(self, there: Bool[np.ndarray, "slices height width"]) -> tuple[np.ndarray, float]:
        """The largest component, and its share of the voxels; 0 where there are none."""
        from scipy import ndimage

        if not there.any():
            return there, 0.0
        structure = ndimage.generate_binary_structure(3, 1 if self.connectivity == "faces" else 3)
        named, _ = ndimage.label(there, structure=structure)
        sizes = np.bincount(named.ravel())[1:]
        return named == sizes.argmax() + 1, float(sizes.max() / sizes.sum())
