r"""ShrinkMatch: an uncertain prediction becomes a certain one once the classes it confuses are taken away.

For semi-supervised training with few labels, in place of FixMatch's plain threshold, which leaves most unlabelled
images unused at first. With the classes of a weak view's prediction in falling order, $p_{(0)} \ge p_{(1)} \ge \dots$,
an image whose $p_{(0)}$ is below $\tau$ loses the classes of ranks $1, \dots, c - 1$, for the smallest $c \ge 2$ with

$$
q_c = \frac{p_{(0)}}{p_{(0)} + \sum_{k \ge c} p_{(k)}} \ge \tau ,
$$

and its strong view is trained, in the classes that are left and by a head of its own $a$, on the top class:

$$
\mathcal{L} = \mathcal{L}_x + \frac{1}{B} \sum_{p_{i(0)} \ge \tau} \mathrm{CE}(p_i, s_i)
- \frac{\rho}{B} \sum_{p_{i(0)} < \tau \le q_{i c}} p_{i(0)} \log \mathrm{softmax}_{\text{left}}(a_i)_{(0)} .
$$

The weights are the paper's two principles: a more reliable prediction counts more, and all of them count more the
larger the share $\rho$ of certain images, a running mean, has become. An image for which even $c = C - 1$ is not enough
stays out.

The authors' program starts $\rho$ anew in every epoch; here it runs on.

Reference: Lihe Yang, Zhen Zhao, Lei Qi, Yu Qiao, Yinghuan Shi and Hengshuang Zhao, "Shrinking Class Space for Enhanced
Certainty in Semi-Supervised Learning", ICCV 2023, arXiv 2308.06777.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from trimtab.ops.arguments import (
    class_indices,
    floating_tensor,
    in_range,
    integer,
    looked_at,
    non_negative,
    one_of,
    same_shape,
)
from trimtab.ops.whole_state import WholeState

Reduction = Literal["none", "mean", "sum"]


@torch.no_grad()
def shrink_class_space(
    probs: Float[Tensor, "batch classes"], threshold: float = 0.95
) -> tuple[Bool[Tensor, "batch classes"], Bool[Tensor, " batch"]]:
    """The classes that are left to each prediction, and whether its top class is certain among them.

    A prediction that is certain as it is keeps all classes. The top class and the least likely one always stay.

    Args:
        probs: predictions, each with sum 1.
        threshold: what the top class must reach, in (0, 1).

    Raises:
        TypeError: if `probs` is not floating point.
        ValueError: if `probs` is not `(batch, classes)` with at least three classes, or `threshold` is out of range.

    Example:
        >>> shrink_class_space(torch.tensor([[0.5, 0.4, 0.06, 0.04]]), threshold=0.8)
        (tensor([[ True, False,  True,  True]]), tensor([True]))
    """
    in_range("threshold", threshold, 0, 1, "neither")
    probs = _predictions("probs", probs)
    ordered, places = probs.sort(dim=1, descending=True, stable=True)
    # What is left from each rank on, summed from the smallest up; the confidence grows with the rank.
    left = ordered.flip(1).cumsum(1).flip(1)[:, 1:]
    top = ordered[:, :1]
    confidence = top / (top + left)
    classes = probs.shape[1]
    first = (1 + (confidence < threshold).sum(1, keepdim=True)).clamp_max(classes - 1)
    ranks = torch.arange(classes, device=probs.device)
    kept = (ranks == 0) | (ranks >= first)
    reached = confidence.gather(1, first - 1)[:, 0] >= threshold
    return torch.zeros_like(kept).scatter(1, places, kept), reached


def shrink_loss(
    probs: Float[Tensor, "batch classes"],
    logits: Float[Tensor, "batch classes"],
    threshold: float = 0.95,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropy of the top class in the classes that are left, for the uncertain predictions.

    Args:
        probs: predictions for weak views; a constant for the gradient.
        logits: of strong views of the same images, of the head that is for this alone.
        threshold: of certainty, in (0, 1).
        reduction: "none", "mean" over the whole batch, the certain ones included, or "sum".

    Raises:
        TypeError: if a tensor is not floating point.
        ValueError: if shapes do not fit, there are fewer than three classes, or an option is out of range.

    Example:
        >>> probs = torch.tensor([[0.5, 0.4, 0.06, 0.04]])
        >>> loss = shrink_loss(probs, torch.zeros(1, 4), threshold=0.8)  # log(3) for three equal classes, times 0.5
        >>> round(loss.item(), 4)
        0.5493
    """
    one_of("reduction", reduction, ("none", "mean", "sum"))
    kept, reached = shrink_class_space(probs, threshold)
    logits = _predictions("logits", logits)
    same_shape("logits", logits, "probs", probs)
    sure, top = probs.detach().to(logits).max(1)
    log_probs = logits.masked_fill(~kept, -torch.inf).log_softmax(1)
    weight = sure * (reached & (sure < threshold))
    value = -weight * log_probs.gather(1, top[:, None])[:, 0]
    return value if reduction == "none" else value.mean() if reduction == "mean" else value.sum()


class ShrinkMatchHead(nn.Sequential):
    """The head that sees strong views alone: three layers, the inner two a quarter as wide as the features.

    Args:
        feature_dim: width of the features.
        num_classes: number of logits.

    Raises:
        ValueError: if a size is not positive.

    Example:
        >>> ShrinkMatchHead(64, 10)(torch.zeros(2, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(self, feature_dim: int, num_classes: int) -> None:
        width = max(1, integer("feature_dim", feature_dim) // 4)
        layers: list[nn.Module] = []
        for before in (feature_dim, width):
            layers += [nn.Linear(before, width), nn.BatchNorm1d(width), nn.LeakyReLU(0.1)]
        super().__init__(*layers, nn.Linear(width, integer("num_classes", num_classes)))


class ShrinkMatch(WholeState, nn.Module):
    """Trains a classifier from labelled images and weak and strong views of others; gives losses for any optimizer.

    The strong views' extra head is dropped at prediction. Evaluate a moving average of the weights, as the authors do
    (`trimtab.ops.averaging.Teacher`).

    Args:
        features: from images to `(batch, feature_dim)`.
        head: from features to logits.
        threshold: of certainty, in (0, 1).
        momentum: of the running share of certain images, in [0, 1]; it starts at the first batch's.
        align: corrects the weak views' probabilities, such as `QueueDistributionAlignment(num_classes)`.
        shrink: weight of the term for uncertain images; 0 leaves FixMatch with soft labels.

    Raises:
        TypeError: if `head` is no `nn.Linear`.
        ValueError: if an option is out of range, or there are fewer than three classes.

    Example:
        >>> rule = ShrinkMatch(nn.Flatten(), nn.Linear(16, 10))
        >>> x, targets = torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 3])
        >>> weak, strong = torch.rand(2, 8, 1, 4, 4)
        >>> sorted(rule.loss(x, targets, weak, strong))
        ['certain', 'labelled', 'total', 'uncertain', 'used']
    """

    certain_ratio: Tensor
    started: Tensor

    def __init__(
        self,
        features: nn.Module,
        head: nn.Linear,
        *,
        threshold: float = 0.95,
        momentum: float = 0.999,
        align: nn.Module | None = None,
        shrink: float = 1.0,
    ) -> None:
        super().__init__()
        if not isinstance(head, nn.Linear):
            raise TypeError(f"head must be an nn.Linear, got {type(head).__name__}")
        self.threshold = in_range("threshold", threshold, 0, 1, "neither")
        self.momentum = in_range("momentum", momentum, 0, 1)
        self.shrink = non_negative("shrink", shrink)
        integer("head.out_features", head.out_features, 3)
        self.features, self.head, self.align = features, head, align
        self.extra_head = ShrinkMatchHead(head.in_features, head.out_features)
        self.register_buffer("certain_ratio", torch.zeros(()))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        logits: Tensor = self.head(self.features(x))
        return logits

    def loss(
        self,
        x: Float[Tensor, "batch ..."],
        targets: Int[Tensor, " batch"],
        x_weak: Float[Tensor, "unlabelled ..."],
        x_strong: Float[Tensor, "unlabelled ..."],
    ) -> dict[str, Tensor]:
        """The losses of a batch; everything goes through the network at once, as its batch statistics want.

        Args:
            x: labelled images, weakly augmented.
            targets: their classes.
            x_weak: weak views of unlabelled images.
            x_strong: strong views of the same.

        Returns:
            "total" to be minimised; its parts "labelled", "certain" and "uncertain" (weights included); "used", the
            share of unlabelled images in a term.

        Raises:
            TypeError: if `targets` is not int64, or images are not floating point.
            ValueError: if shapes do not fit, a batch is empty, or a label is out of range.
        """
        check_views(x, targets, x_weak, x_strong)
        if looked_at(targets) and not ((targets >= 0) & (targets < self.head.out_features)).all():
            raise ValueError(f"targets must be in [0, {self.head.out_features}), got others")
        count, unlabelled = len(x), len(x_weak)
        features = self.features(torch.cat([x, x_weak, x_strong]))
        logits = floating_tensor("logits", self.head(features))
        labelled = F.cross_entropy(logits[:count], targets)
        probs = logits[count:-unlabelled].detach().softmax(1)
        if self.align is not None:
            probs = self.align(probs)
        certain = (probs.amax(1) >= self.threshold).to(probs)
        strong = logits[-unlabelled:]
        sure_loss = (certain * -(probs * strong.log_softmax(1)).sum(1)).mean()
        ratio = self._certain_ratio(certain.mean())
        extra = self.extra_head(features[-unlabelled:])
        unsure_loss = self.shrink * ratio * shrink_loss(probs, extra, self.threshold)
        used = certain if self.shrink == 0 else shrink_class_space(probs, self.threshold)[1].to(probs)
        return {
            "total": labelled + sure_loss + unsure_loss,
            "labelled": labelled.detach(),
            "certain": sure_loss.detach(),
            "uncertain": unsure_loss.detach(),
            "used": used.mean(),
        }

    @torch.no_grad()
    def _certain_ratio(self, now: Tensor) -> Tensor:
        """The running share of certain images, with this batch's, which is also its start."""
        ratio = torch.where(self.started, self.certain_ratio.lerp(now.to(self.certain_ratio), 1 - self.momentum), now)
        if self.training:
            self.certain_ratio.copy_(ratio)
            self.started.fill_(True)
        return ratio


def check_views(x: Tensor, targets: Tensor, x_weak: Tensor, x_strong: Tensor) -> None:
    """Refuses a batch of labelled images and two views of others that do not fit together."""
    for name, value in (("x", x), ("x_weak", x_weak), ("x_strong", x_strong)):
        floating_tensor(name, value)
        if value.ndim < 2 or len(value) == 0 or value.shape[1:] != x.shape[1:]:
            wanted = f"samples of shape {tuple(x.shape[1:])} as x, at least one"
            raise ValueError(f"{name} must be {wanted}, got shape {tuple(value.shape)}")
    same_shape("x_strong", x_strong, "x_weak", x_weak)
    class_indices("targets", targets)
    if targets.shape != x.shape[:1]:
        raise ValueError(f"targets must be one a sample of x, ({len(x)},), got shape {tuple(targets.shape)}")


def _predictions(name: str, value: Tensor) -> Tensor:
    value = floating_tensor(name, value)
    if value.ndim != 2 or len(value) == 0 or value.shape[1] < 3:
        wanted = "(batch, classes) with at least one sample and three classes"
        raise ValueError(f"{name} must be {wanted}, got shape {tuple(value.shape)}")
    return value
