r"""Masked image consistency: from an image with hidden blocks, say what an averaged teacher says of the whole image.

For unsupervised domain adaptation, where classes look alike on the target domain and no label teaches their details:
a network that must name what it cannot see learns to use its surroundings. It is one more term of the loss, on
unlabelled target images, beside the source's cross-entropy and whatever else aligns the domains; classification and
segmentation alike.

$$
\mathcal{L} = \frac{1}{n} \sum_i q_i\, \mathrm{CE}\bigl( f_\theta(x_i \odot M_i),\ \hat y_i \bigr), \qquad
\hat y_i = \arg\max_c g(x_i)_c, \qquad
M_i = \bigl[ u > r \bigr]\ \text{for each block},\ u \sim U(0, 1)
$$

where the teacher $g$ is the moving average of the network's weights and sees all of the image, and the weight $q_i$ is
its confidence: for an image class its largest probability, in segmentation the share of pixels in which that passes a
threshold.

Reference: Lukas Hoyer, Dengxin Dai, Haoran Wang and Luc Van Gool, "MIC: Masked Image Consistency for Context-Enhanced
Domain Adaptation", CVPR 2023, arXiv 2212.01322. As in the authors' code the weights are averaged and the statistics of
the teacher's batch normalisation are its own; their segmentation code shares one weight among the images of a batch,
where the paper gives each image its own, as here. They may also change the colours of an image before it is masked;
here the student sees the image as it is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from trimtab.ops.arguments import floating_tensor, in_range, integer, non_negative, one_of, same_shape
from trimtab.ops.averaging import Buffers, Teacher
from trimtab.ops.patch_masks import patch_grid, random_patch_mask
from trimtab.ops.states import fits

Weighting = Literal["probability", "share", "none"]


def pseudo_label_weight(
    logits: Float[Tensor, "batch classes *space"], weighting: Weighting = "probability", threshold: float = 0.968
) -> Float[Tensor, " batch"]:
    """How far a teacher's predictions are to be trusted, a number in [0, 1] for each image.

    Args:
        logits: the teacher's, of images or of their pixels.
        weighting: "probability" of the class predicted, the mean over pixels; the "share" of pixels in which it is
            above `threshold`; or "none", always 1.
        threshold: of "share", in [0, 1].

    Raises:
        TypeError: `logits` is not floating point.
        ValueError: there are no classes, `weighting` is unknown or `threshold` out of range.

    Example:
        >>> logits = torch.tensor([[[0.0, 9.0]], [[0.0, 0.0]]]).movedim(2, 1)  # two images of one pixel
        >>> pseudo_label_weight(logits), pseudo_label_weight(logits, "share")
        (tensor([0.9999, 0.5000]), tensor([1., 0.]))
    """
    one_of("weighting", weighting, get_args(Weighting))
    in_range("threshold", threshold, 0, 1)
    logits = floating_tensor("logits", logits)
    if logits.ndim < 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be of shape (batch, classes, ...), got {tuple(logits.shape)}")
    largest = logits.softmax(1).amax(1).flatten(1) if logits.ndim > 2 else logits.softmax(1).amax(1, keepdim=True)
    if weighting == "none":
        return largest.new_ones(len(logits))
    return (largest if weighting == "probability" else (largest > threshold).to(largest)).mean(1)


def masked_consistency(
    logits: Float[Tensor, "batch classes *space"],
    teacher_logits: Float[Tensor, "batch classes *space"],
    *,
    weighting: Weighting = "probability",
    threshold: float = 0.968,
) -> Tensor:
    """Weighted cross-entropy of what was made of masked images, against the teacher's classes for the whole ones.

    Args:
        logits: the student's, of masked images or of their pixels.
        teacher_logits: of the whole images; a constant for the gradient.
        weighting, threshold: see `pseudo_label_weight`.

    Returns:
        The mean over images and pixels.

    Raises:
        TypeError: logits are not floating point.
        ValueError: shapes differ, the batch is empty, or an option is out of range.

    Example:
        >>> sure, unsure = torch.tensor([[0.0, 20.0]]), torch.tensor([[0.0, 0.1]])
        >>> student = torch.zeros(1, 2)
        >>> round(masked_consistency(student, sure).item(), 3), round(masked_consistency(student, unsure).item(), 3)
        (0.693, 0.364)
    """
    logits, teacher_logits = floating_tensor("logits", logits), floating_tensor("teacher_logits", teacher_logits)
    same_shape("logits", logits, "teacher_logits", teacher_logits)
    if logits.numel() == 0:
        raise ValueError(f"logits must hold at least one sample and class, got shape {tuple(logits.shape)}")
    teacher_logits = teacher_logits.detach()
    weight = pseudo_label_weight(teacher_logits, weighting, threshold)
    loss = F.cross_entropy(logits, teacher_logits.argmax(1), reduction="none")
    return (weight.to(loss) * (loss.flatten(1).mean(1) if loss.ndim > 1 else loss)).mean()


class MaskedImageConsistency(nn.Module):
    """The masked consistency term, with its teacher; add it to the loss of the host, and call `update` in each step.

    The authors' settings: blocks of 64 pixels and a ratio of 0.7 for images of 224 pixels and more; a decay of 0.9 for
    image classes, weighted by probability, and of 0.999 for segmentation, weighted by share.

    Args:
        student: the network in training; the teacher starts as its copy. It is not held.
        patch: side of a block, in pixels.
        ratio: probability that a block is hidden, in [0, 1).
        decay: of the teacher, reached by a warm-up: 0, 1/2, 2/3, ...
        weighting, threshold: see `pseudo_label_weight`.
        weight: of the term, the paper's lambda.
        fill: value of hidden pixels. Zero means the mean where images are normalised.
        buffers: of the teacher, see `trimtab.ops.averaging.Teacher`.

    Attributes:
        teacher: the averaged network; `teacher.model` is often the better one to predict with.

    Raises:
        TypeError: `fill` is no number.
        ValueError: an option is out of range or unknown.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        >>> mic = MaskedImageConsistency(net, patch=2, decay=0.9)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> target = torch.rand(4, 1, 8, 8)
        >>> loss = mic.loss(net, target, generator=torch.Generator().manual_seed(0))["total"]  # + the host's own loss
        >>> loss.backward(); optimizer.step(); mic.update(net)
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        patch: int = 64,
        ratio: float = 0.7,
        decay: float = 0.999,
        weighting: Weighting = "probability",
        threshold: float = 0.968,
        weight: float = 1.0,
        fill: float = 0.0,
        buffers: Buffers = "own",
    ) -> None:
        super().__init__()
        self.patch = integer("patch", patch)
        self.ratio = in_range("ratio", ratio, 0, 1, "left")
        self.weighting: Weighting = one_of("weighting", weighting, get_args(Weighting))
        self.threshold = in_range("threshold", threshold, 0, 1)
        self.weight = non_negative("weight", weight)
        if isinstance(fill, bool) or not isinstance(fill, float | Real):
            raise TypeError(f"fill must be a number, got {type(fill).__name__}")
        if not -torch.inf < fill < torch.inf:
            raise ValueError(f"fill must be finite, got {fill}")
        self.fill = float(fill)
        self.teacher = Teacher(student, decay, warmup=True, buffers=buffers)
        self.teacher.update(student)  # the copy is the average's first

    def loss(
        self,
        student: nn.Module,
        x: Float[Tensor, "batch channels height width"],
        *,
        generator: torch.Generator | None = None,
        mask: Bool[Tensor, "batch 1 height width"] | None = None,
    ) -> dict[str, Tensor]:
        """The term for a batch of target images.

        Args:
            student: the network in training, in training mode.
            x: target images, normalised as the networks want them.
            generator: decides which blocks are hidden.
            mask: which pixels are hidden, instead of drawing them.

        Returns:
            `total`, for the gradient; `consistency`, the same without `weight`, and `confidence`, the mean weight of
            an image, both detached.

        Raises:
            TypeError: `x` is not floating point, or `mask` is not of booleans.
            ValueError: `x` is no batch of images or smaller than a block, or `mask` does not fit it.
        """
        floating_tensor("x", x)
        if x.ndim != 4 or len(x) == 0:
            raise ValueError(f"x must be (batch, channels, height, width) with an image at least, got {tuple(x.shape)}")
        height, width = x.shape[2:]
        if mask is None:
            patch_grid(height, width, self.patch)
            mask = random_patch_mask(
                (len(x), height, width), self.patch, self.ratio, generator=generator, device=x.device
            )
        elif mask.dtype != torch.bool:
            raise TypeError(f"mask must be of booleans, True where hidden, got {mask.dtype}")
        elif mask.shape != (len(x), 1, height, width):
            raise ValueError(f"mask must be of shape {(len(x), 1, height, width)}, got {tuple(mask.shape)}")
        told = self.teacher(x)
        seen = student(x.masked_fill(mask, self.fill))
        value = masked_consistency(seen, told, weighting=self.weighting, threshold=self.threshold)
        return {
            "total": self.weight * value,
            "consistency": value.detach(),
            "confidence": pseudo_label_weight(told, self.weighting, self.threshold).mean(),
        }

    def update(self, student: nn.Module) -> None:
        """Moves the teacher towards the student; after each optimizer step.

        Raises:
            ValueError: the student has other weights than the teacher.
        """
        self.teacher.update(student)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As every module's, but a state that does not fit changes nothing.

        Raises:
            ValueError: the state is of another network.
        """
        if strict and not fits(state_dict, self.state_dict()):
            raise ValueError("state_dict must be of the consistency of the same network, got other names or shapes")
        return super().load_state_dict(state_dict, strict, assign)
