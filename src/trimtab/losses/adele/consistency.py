"""Agreement of a network's predictions between scales of an image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from trimtab.losses.segmentation import checked_maps, known_labels
from trimtab.ops.arguments import floating_tensor, in_range, non_negative, positive, tensor_problem

# Within these the release keeps the mean of the scales.
_LEAST, _MOST = 1e-3, 1 - 1e-3


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
        TypeError: if `images` is no real tensor.
        ValueError: if `images` is not four-dimensional, or `scales` is empty or not positive.

    Example:
        >>> multi_scale_logits(nn.Conv2d(1, 3, 1), torch.zeros(2, 1, 16, 16)).shape
        torch.Size([2, 3, 3, 16, 16])
    """
    if problem := tensor_problem(images=images):
        raise TypeError(problem)
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"images must be (batch, channels, height, width), got shape {tuple(images.shape)}")
    scales = [positive("scales", scale) for scale in scales]
    if not scales:
        raise ValueError("scales must be at least one, got none")
    height, width = images.shape[2:]
    views = []
    for scale in scales:
        x = _resized(images, (max(1, int(height * scale)), max(1, int(width * scale))))
        views.append(_resized(model(x), (height, width)))
        if flip:
            views.append(_resized(model(x.flip(-1)).flip(-1), (height, width)))
    return torch.stack(views, dim=1)


def multi_scale_consistency(
    logits: Float[Tensor, "batch scales classes *space"],
    rho: float = 0.8,
    *,
    counted: Bool[Tensor, "batch *space"] | None = None,
) -> Float[Tensor, " batch"]:
    r"""Disagreement of the scales, $\frac1S \sum_s \mathrm{KL}(p_s \| q)$, mean over an image's pixels.

    It is the Jensen-Shannon divergence of the scales, at most the logarithm of their number, but for this: as in the
    authors' release the mean q is cut to [0.001, 0.999], so that scales that agree on a class without doubt cost up to
    0.001, and many classes without a chance may make the value slightly negative. An image of which q is nowhere at
    `rho` or above counts zero; the choice is one for the whole image, as in the release.

    Args:
        logits: predictions at every scale, as `multi_scale_logits` gives them.
        rho: smallest probability, of any class at any pixel, that makes an image count, in [0, 1].
        counted: pixels whose probabilities may make it count; all of them where it is None. The divergence is that of
            all pixels in either case.

    Raises:
        TypeError: if `logits` is not floating point.
        ValueError: if it has fewer than four dimensions or is empty, `counted` has another shape, or `rho` is out of
            range.

    Example:
        >>> one = torch.tensor([50.0, 0.0])
        >>> multi_scale_consistency(torch.stack([one, one.flip(0)])[None, :, :, None], rho=0.5)  # log(2)
        tensor([0.6931])
    """
    logits = floating_tensor("logits", logits)
    if logits.ndim < 4 or logits.numel() == 0:
        raise ValueError(
            f"logits must be (batch, scales, classes, height, width), and not empty, got shape {tuple(logits.shape)}"
        )
    rho = in_range("rho", rho, 0, 1)
    if counted is not None and counted.shape != (logits.shape[0], *logits.shape[3:]):
        wanted = (logits.shape[0], *logits.shape[3:])
        raise ValueError(f"counted must be of shape {wanted}, one per pixel, got {tuple(counted.shape)}")
    log_probs = logits.log_softmax(2)
    log_mean = log_probs.logsumexp(1, keepdim=True) - math.log(logits.shape[1])
    log_mean = log_mean.clamp(math.log(_LEAST), math.log(_MOST))
    divergence = (log_probs.exp() * (log_probs - log_mean)).sum(2).flatten(1).mean(1)
    sure = log_mean.detach()[:, 0].amax(1).exp()
    if counted is not None:
        sure = torch.where(counted, sure, 0.0)
    return divergence * (sure.flatten(1).amax(1) >= min(rho, _MOST))


class MultiScaleConsistencyLoss(nn.Module):
    """Cross-entropy at every scale, and agreement between the scales, called as `loss(logits, targets)`.

    The logits are those of `multi_scale_logits(model, images)`.

    Args:
        lam: weight of the agreement, not negative.
        rho: smallest probability, of any class at any pixel of the scales' mean, that makes an image's agreement
            count, in [0, 1].
        ignore_index: label of pixels that have no part in the cross-entropy, nor in whether an image is confident;
            they count as zero in the mean, so that an image without labels costs nothing.

    Raises:
        ValueError: if `lam` or `rho` is out of range.

    Example:
        >>> images, labels = torch.rand(2, 1, 16, 16), torch.zeros(2, 16, 16, dtype=torch.int64)
        >>> model = nn.Conv2d(1, 3, 1)
        >>> MultiScaleConsistencyLoss()(multi_scale_logits(model, images), labels).backward()
    """

    def __init__(self, lam: float = 1.0, rho: float = 0.8, *, ignore_index: int = -100) -> None:
        super().__init__()
        self.lam = non_negative("lam", lam)
        self.rho = in_range("rho", rho, 0, 1)
        if not isinstance(ignore_index, int | Integral):
            raise TypeError(f"ignore_index must be an integer, got {ignore_index!r}")
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
            ValueError: if shapes do not fit, the batch is empty, or a label is neither a class nor `ignore_index`.
        """
        logits = floating_tensor("logits", logits)
        if logits.ndim < 4 or 0 in logits.shape:
            raise ValueError(
                "logits must be (batch, scales, classes, height, width), and not empty, "
                f"got shape {tuple(logits.shape)}"
            )
        checked_maps(logits[:, 0], targets)
        known = known_labels(targets, logits.shape[2], self.ignore_index)
        disagreement = multi_scale_consistency(logits, self.rho, counted=known)
        at_scales = targets[:, None].expand(-1, logits.shape[1], *targets.shape[1:])
        fit = F.cross_entropy(logits.movedim(2, 1), at_scales, ignore_index=self.ignore_index, reduction="none")
        return fit.mean() + self.lam * disagreement.mean()


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if maps.shape[2:] == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=True)
