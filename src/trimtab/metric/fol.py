r"""Focus on Local: losses that make a descriptor's pooling and an attention agree on the regions that tell a place.

For image retrieval with any backbone that gives a feature map and an attention over it. With a
`trimtab.metric.SinkhornAggregator`, whose dustbin attention keeps patches out of, spatial alignment (SAL) teaches
attention and pooling from each other, and foreground-background contrast (CEL) asks their region to show, and to hide,
the same in all images of a place. `pseudo_correspondences` and `local_triplet_loss` train local features, and `rerank`
compares the `discriminative_patches` alone.

$$
L_{\mathrm{SAL}} = \mathrm{KL}(\bar m \,\Vert\, c) + \mathrm{KL}(\bar c \,\Vert\, m), \qquad
L_{\mathrm{CEL}} = w \, (1 - \cos(F, F')) + (1 - w) \, (1 - \cos(B, B'))
$$

with m the attention and c the assigned mass, each as a softmax over patches after its peaks are cut, the bar a constant
for the gradient; $F = \sum_n M_n l_n$ and $B = \sum_n (1 - M_n) l_n$ the foreground and background of two images of
one place, M the sum of c and m, l constant local features of length 1.

Reference: Changwei Wang, Shunpeng Chen, Yukun Song, Rongtao Xu, Zherui Zhang, Jiguang Zhang, Haoran Yang, Yu Zhang,
Kexue Fu, Shide Du, Zhiwei Xu, Longxiang Gao, Li Guo, Shibiao Xu, "Focus on Local: Finding Reliable Discriminative
Regions for Visual Place Recognition", AAAI 2025, arXiv 2504.09881. The authors train with the sum of a multi-similarity
loss, `local_triplet_loss`, 0.005 SAL, CEL and 0.01 times `correspondence_loss`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.metric.pairs import pair_masks
from trimtab.ops.arguments import floating_tensor, in_range, integer, positive, same_shape, tensor, tensor_problem


def suppress_peaks(
    weights: Float[Tensor, "batch patches"], num_peaks: int = 3, quantile: float = 0.05
) -> Float[Tensor, "batch patches"]:
    """Replaces each image's largest weights by its weight at a rank, lest a few patches take all of a softmax.

    Args:
        weights: of the patches.
        num_peaks: how many are replaced.
        quantile: the replacing rank as a share of the patches, from the largest on.

    Raises:
        ValueError: if `weights` is no matrix, or an argument is out of range.

    Example:
        >>> suppress_peaks(torch.tensor([[5.0, 1.0, 9.0, 3.0, 2.0]]), num_peaks=2, quantile=0.4)
        tensor([[3., 1., 3., 3., 2.]])
    """
    weights = floating_tensor("weights", weights)
    if weights.ndim != 2:
        raise ValueError(f"weights must be (batch, patches), got shape {tuple(weights.shape)}")
    patches = weights.shape[1]
    integer("num_peaks", num_peaks, 0, patches)
    in_range("quantile", quantile, 0, 1, "left")
    rank = int(quantile * patches)
    top = weights.topk(max(num_peaks, rank + 1), dim=1)
    return weights.scatter(1, top.indices[:, :num_peaks], top.values[:, rank, None].expand(-1, num_peaks))


def region_mask(
    confidence: Float[Tensor, "batch patches"],
    importance: Float[Tensor, "batch patches"],
    *,
    num_peaks: int = 3,
    temperature: float = 1.0,
) -> Float[Tensor, "batch patches"]:
    """Where aggregation and attention look: the sum of their softmaxes, M in the module's docstring.

    Arguments as in `spatial_alignment_loss`. For re-ranking the authors use the confidence alone.

    Example:
        >>> region_mask(torch.zeros(1, 4), torch.zeros(1, 4))
        tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """
    of_confidence, of_importance = _log_regions(confidence, importance, num_peaks, temperature)
    return of_confidence.exp() + of_importance.exp()


def spatial_alignment_loss(
    confidence: Float[Tensor, "batch patches"],
    importance: Float[Tensor, "batch patches"],
    *,
    num_peaks: int = 3,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """SAL: the two divergences between where a descriptor's mass is and where attention is, each one's teacher held.

    Args:
        confidence: of the aggregation, `Aggregation.confidence`.
        importance: the attention.
        num_peaks: see `suppress_peaks`.
        temperature: of the two softmaxes, positive. At the authors' 1 both are nearly flat, as the weights are (a
            confidence is at most 1 / clusters); less sharpens them.

    Returns:
        Mean over images; the authors' weight is 0.005.

    Raises:
        ValueError: if shapes disagree or an argument is out of range.

    Example:
        >>> spatial_alignment_loss(torch.tensor([[0.1, 0.2]]), torch.tensor([[0.3, 0.4]]), num_peaks=0)
        tensor(0.)
    """
    of_confidence, of_importance = _log_regions(confidence, importance, num_peaks, temperature)
    return _divergence(of_importance.detach(), of_confidence) + _divergence(of_confidence.detach(), of_importance)


def foreground_background_loss(
    local: Float[Tensor, "batch dim height width"],
    mask: Float[Tensor, "batch h w"],
    other_local: Float[Tensor, "batch dim other_height other_width"],
    other_mask: Float[Tensor, "batch other_h other_w"],
    foreground_weight: float = 0.7,
) -> Float[Tensor, ""]:
    """CEL: asks what the mask shows, and what it hides, to be the same in two images of one place.

    The local features are constants: the gradient goes to the masks.

    Args:
        local: local features of the first images.
        mask: how much each patch is foreground, in [0, 1]; resized to the features' map where that is finer.
        other_local: local features of the second images, each of the same place as its counterpart.
        other_mask: their masks.
        foreground_weight: w, in [0, 1].

    Returns:
        Mean over pairs, in [0, 2].

    Raises:
        ValueError: if shapes disagree or `foreground_weight` is out of range.

    Example:
        >>> local, mask = torch.randn(2, 8, 4, 6), torch.rand(2, 4, 6)
        >>> foreground_background_loss(local, mask, local, mask) < 1e-6
        tensor(True)
    """
    in_range("foreground_weight", foreground_weight, 0, 1)
    local, other_local = floating_tensor("local", local), floating_tensor("other_local", other_local)
    if other_local.shape[:2] != local.shape[:2]:
        raise ValueError(
            "local and other_local must agree in the first two dimensions, "
            f"got shapes {tuple(local.shape)} and {tuple(other_local.shape)}"
        )
    foreground, background = _prototypes("local", local, mask)
    other_foreground, other_background = _prototypes("other_local", other_local, other_mask)
    same_foreground = F.cosine_similarity(foreground, other_foreground)
    same_background = F.cosine_similarity(background, other_background)
    return (foreground_weight * (1 - same_foreground) + (1 - foreground_weight) * (1 - same_background)).mean()


def same_place_pairs(
    labels: Int[Tensor, " batch"], *, generator: torch.Generator | None = None
) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """Each image with a random other one of its place, images that are alone left out.

    Args:
        labels: places.
        generator: source of the draws, on the labels' device; torch's global one where it is None.

    Returns:
        Positions of the images, and of their partners.

    Raises:
        TypeError: if `labels` is not of integer type.
        ValueError: if it is no vector, or empty.

    Example:
        >>> same_place_pairs(torch.tensor([4, 7, 4]))
        (tensor([0, 2]), tensor([2, 0]))
    """
    labels = tensor("labels", labels)
    if labels.numel() == 0:
        raise ValueError("labels must hold at least one sample, got an empty batch")
    same = pair_masks(labels).positive
    draws = torch.rand(same.shape, generator=generator, device=labels.device)
    images = same.any(1).nonzero().flatten()
    return images, draws.masked_fill(~same, -1.0).argmax(1)[images]


def _log_regions(
    confidence: Tensor, importance: Tensor, num_peaks: int, temperature: float
) -> tuple[Float[Tensor, "batch patches"], Float[Tensor, "batch patches"]]:
    positive("temperature", temperature)
    confidence, importance = floating_tensor("confidence", confidence), floating_tensor("importance", importance)
    same_shape("importance", importance, "confidence", confidence)
    if confidence.numel() == 0:
        raise ValueError(f"confidence must hold a sample and a patch, got shape {tuple(confidence.shape)}")
    first, second = ((suppress_peaks(w, num_peaks) / temperature).log_softmax(1) for w in (confidence, importance))
    return first, second


def _divergence(log_target: Tensor, log_probs: Tensor) -> Tensor:
    return F.kl_div(log_probs, log_target, log_target=True, reduction="batchmean")


def _prototypes(
    name: str, local: Tensor, mask: Tensor
) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch dim"]]:
    if problem := tensor_problem(**{name.replace("local", "mask"): mask}):
        raise TypeError(problem)
    if 0 in local.shape:
        raise ValueError(f"{name} must hold a sample and a patch, got shape {tuple(local.shape)}")
    if local.ndim != 4 or mask.ndim != 3 or len(mask) != len(local):
        raise ValueError(
            f"{name} and its mask must be (batch, dim, height, width) and (batch, height, width), "
            f"got shapes {tuple(local.shape)} and {tuple(mask.shape)}"
        )
    local = F.normalize(local.detach(), dim=1)
    if mask.shape[1:] != local.shape[2:]:
        size = (local.shape[2], local.shape[3])
        mask = F.interpolate(mask[:, None], size=size, mode="bilinear", align_corners=True)[:, 0]
    foreground = torch.einsum("bdhw,bhw->bd", local, mask.to(local.dtype))
    return foreground, local.sum((2, 3)) - foreground
