r"""Margin softmax: classification on the hypersphere with a margin on the label's own cosine (CosFace, ArcFace).

Train an embedding on many classes whose unseen kin are to be told apart later: the heads that face recognition rests
on, and the baselines of the methods that change them. With $c_j$ the cosine between the embedding and the weight of
class j, y the label and s the scale,

$$
L = -\log \frac{e^{s \, m(c_y)}}{e^{s \, m(c_y)} + \sum_{j \ne y} e^{s \, c_j}} , \qquad
m(c) = \begin{cases}
c & \text{normalised softmax} \\
c - m & \text{CosFace} \\
\cos(\arccos c + m) & \text{ArcFace}
\end{cases}
$$

References: Hao Wang, Yitong Wang, Zheng Zhou, Xing Ji, Dihong Gong, Jingchao Zhou, Zhifeng Li, Wei Liu, "CosFace: Large
Margin Cosine Loss for Deep Face Recognition", CVPR 2018, arXiv 1801.09414. Jiankang Deng, Jia Guo, Niannan Xue,
Stefanos Zafeiriou, "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019, arXiv 1801.07698.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.metric.pairs import checked_embeddings, mined_weights
from trimtab.ops.arguments import (
    in_range,
    indices,
    integer,
    non_negative,
    one_of,
    positive,
    real_problem,
    tensor,
    tensor_problem,
)
from trimtab.ops.pairwise import pairwise_cosine

Margin = Literal["softmax", "cosface", "arcface"]

# The margins of the papers: none, a cosine, an angle in radians.
_MARGINS: dict[Margin, float] = {"softmax": 0.0, "cosface": 0.35, "arcface": 0.5}


def cosface_margin(
    cosine: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"], margin: float
) -> Float[Tensor, "batch classes"]:
    """The cosines, those of the labels lowered by a margin.

    Args:
        cosine: of the angles between embeddings and class weights.
        labels: classes.
        margin: a cosine, at least 0.

    Raises:
        TypeError: if `cosine` is not floating point or `labels` not of integer type.
        ValueError: if the shapes do not fit or `margin` is out of range.

    Example:
        >>> cosface_margin(torch.tensor([[0.9, 0.1]]), torch.tensor([0]), 0.35)
        tensor([[0.5500, 0.1000]])
    """
    cosine, labels = tensor("cosine", cosine), tensor("labels", labels)
    if cosine.ndim != 2 or labels.shape != cosine.shape[:1]:
        raise ValueError(f"labels must be of shape {tuple(cosine.shape[:1])}, got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.dtype == torch.bool or not cosine.is_floating_point():
        raise TypeError(f"cosine and labels must be floating point and integers, got {cosine.dtype} and {labels.dtype}")
    if not 0 <= margin < math.inf:
        raise ValueError(f"margin must be at least 0 and finite, got {margin}")
    right = labels.long()[:, None]
    return cosine.scatter_add(1, right, torch.full_like(right, -margin, dtype=cosine.dtype))


def arcface_margin(
    cosine: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"], margin: float | Float[Tensor, " batch"]
) -> Float[Tensor, "batch classes"]:
    r"""The cosines, the angles of the labels widened by a margin.

    Past $\theta = \pi - m$, where $\cos(\theta + m)$ would rise again, it goes on as $\cos\theta - m \sin m$, as
    in the authors' code, so that it falls all the way.

    Args:
        cosine: of the angles between embeddings and class weights.
        labels: classes.
        margin: an angle in radians, in [0, pi]; one for all samples, or one for each.

    Raises:
        TypeError: if `cosine` is not floating point or `labels` not of integer type.
        ValueError: if the shapes do not fit or a single `margin` is out of range.

    Example:
        >>> arcface_margin(torch.tensor([[0.0, 0.1]]), torch.tensor([0]), math.pi / 6)
        tensor([[-0.5000,  0.1000]])
    """
    cosine, labels = tensor("cosine", cosine), tensor("labels", labels)
    if cosine.ndim != 2 or labels.shape != cosine.shape[:1]:
        raise ValueError(f"labels must be of shape {tuple(cosine.shape[:1])}, got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.dtype == torch.bool or not cosine.is_floating_point():
        raise TypeError(f"cosine and labels must be floating point and integers, got {cosine.dtype} and {labels.dtype}")
    if not isinstance(margin, Tensor) and not 0 <= margin <= math.pi:
        raise ValueError(f"margin must be an angle in [0, pi], got {margin}")
    if isinstance(margin, Tensor) and margin.shape != labels.shape:
        raise ValueError(f"margin must be one a sample, ({len(labels)},), got shape {tuple(margin.shape)}")
    right = labels.long()[:, None]
    own = cosine.gather(1, right)
    # Where rounding leaves no sine its root has no derivative; the clamp gives it none.
    sine = (1 - own.square()).clamp(min=torch.finfo(cosine.dtype).tiny).sqrt()
    angle: float | Tensor
    cos: float | Tensor
    sin: float | Tensor
    if isinstance(margin, Tensor):
        angle = margin[:, None]
        cos, sin = angle.cos(), angle.sin()
    else:
        angle, cos, sin = margin, math.cos(margin), math.sin(margin)
    widened = torch.where(own > -cos, own * cos - sine * sin, own - angle * sin)
    return cosine.scatter_add(1, right, widened - own)


class CosineClassifier(nn.Module):
    """Cosines between embeddings and one learned direction per class: the layer below every face-recognition loss.

    Args:
        embedding_size: width of the embeddings.
        num_classes: number of classes.

    Attributes:
        weight: the directions, of any length, `(num_classes, embedding_size)`; give them to the optimizer.

    Raises:
        ValueError: if an argument is below 1.

    Example:
        >>> CosineClassifier(2, 3)(torch.ones(5, 2)).shape
        torch.Size([5, 3])
    """

    def __init__(self, embedding_size: int, num_classes: int) -> None:
        super().__init__()
        size, count = integer("embedding_size", embedding_size), integer("num_classes", num_classes)
        self.weight = nn.Parameter(torch.empty(count, size))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, embeddings: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch classes"]:
        if problem := tensor_problem(embeddings=embeddings):
            raise TypeError(problem)
        if embeddings.shape[-1] != self.weight.shape[1]:
            raise ValueError(
                f"embeddings must have embedding_size={self.weight.shape[1]} columns, "
                f"got shape {tuple(embeddings.shape)}"
            )
        return pairwise_cosine(embeddings, self.weight.to(embeddings.dtype))

    def extra_repr(self) -> str:
        return f"embedding_size={self.weight.shape[1]}, num_classes={self.weight.shape[0]}"


class MarginSoftmaxLoss(nn.Module):
    """Cross-entropy over scaled cosines, with a margin on the label's (equation in the module's docstring).

    It holds one direction per class: give `loss.parameters()` to the optimizer along with the network's. The losses of
    pytorch-metric-learning have the same value; they take the two sizes in the other order and ArcFace's margin in
    degrees.

    Args:
        embedding_size: width of the embeddings.
        num_classes: number of classes.
        kind: "arcface", "cosface", or "softmax" for no margin at all.
        margin: an angle in radians in [0, pi] (ArcFace) or a cosine of at least 0 (CosFace); by default the paper's,
            0.5 and 0.35.
        scale: factor of the cosines before the softmax, positive.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> loss = MarginSoftmaxLoss(embedding_size=16, num_classes=10, kind="cosface")
        >>> value = loss(torch.randn(8, 16), torch.arange(8))
        >>> loss.logits(torch.randn(8, 16)).shape
        torch.Size([8, 10])
    """

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        *,
        kind: Margin = "arcface",
        margin: float | None = None,
        scale: float = 64.0,
    ) -> None:
        super().__init__()
        self.kind = one_of("kind", kind, get_args(Margin))
        self.margin = non_negative("margin", _MARGINS[kind] if margin is None else margin)
        if kind == "softmax" and self.margin != 0:
            raise ValueError(f"margin must be 0 for kind='softmax', got {margin}")
        if kind == "arcface":
            in_range("margin", self.margin, 0, math.pi)
        self.scale = positive("scale", scale)
        self.classifier = CosineClassifier(embedding_size, num_classes)

    def logits(
        self, embeddings: Float[Tensor, "batch dim"], labels: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch classes"]:
        """Scaled cosines; with labels, those of the labels carry the margin.

        Raises:
            ValueError: if a label is out of range.
        """
        if problem := real_problem(labels=labels):
            raise TypeError(problem)
        cosine: Tensor = self.classifier(embeddings)
        if labels is not None:
            indices("labels", labels, cosine.shape[1])
        if labels is not None and self.kind != "softmax":
            cosine = {"cosface": cosface_margin, "arcface": arcface_margin}[self.kind](cosine, labels, self.margin)
        return self.scale * cosine

    def forward(
        self,
        embeddings: Float[Tensor, "batch dim"],
        labels: Int[Tensor, " batch"],
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Float[Tensor, "refs dim"] | None = None,
        ref_labels: Int[Tensor, " refs"] | None = None,
    ) -> Float[Tensor, ""]:
        """The mean loss of a batch.

        Args:
            embeddings: one row per sample, of any length; they are normalised here.
            labels: classes.
            indices_tuple: the pairs or triplets of a miner of pytorch-metric-learning: a sample counts as often as it
                occurs in them, relative to the one that occurs most, as for the heads of that package.
            ref_emb, ref_labels: what that package's memories pass, refused: samples are compared with classes.

        Raises:
            TypeError: if `embeddings` is not floating point or `labels` not of integer type.
            ValueError: if shapes disagree, the batch is empty, a label is out of range or references are given.
        """
        embeddings = checked_embeddings(embeddings, labels)
        weights = mined_weights(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        logits = self.logits(embeddings, labels)
        if weights is None:
            return F.cross_entropy(logits, labels.long())
        return (weights * F.cross_entropy(logits, labels.long(), reduction="none")).mean()

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, margin={self.margin:g}, scale={self.scale:g}"
