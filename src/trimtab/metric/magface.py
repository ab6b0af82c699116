r"""MagFace: a face-recognition head whose margin grows with the length of the embedding.

The length then says how good an image is: easy samples can afford the larger margin and grow long, for length is
rewarded, and hard ones stay short and are pushed less. With $a$ the length, cut to $[l_a, u_a]$, and s the scale,

$$
L = -\log \frac{e^{s \cos(\theta_y + m(a))}}{e^{s \cos(\theta_y + m(a))} + \sum_{j \ne y} e^{s \cos\theta_j}}
+ \lambda \Bigl( \frac{a}{u_a^2} + \frac1a \Bigr), \qquad
m(a) = l_m + (u_m - l_m) \frac{a - l_a}{u_a - l_a}
$$

It is one of the three heads that `trimtab.metric.UNPGLoss` was built on.

Reference: Qiang Meng, Shichao Zhao, Zhida Huang, Feng Zhou, "MagFace: A Universal Representation for Face Recognition
and Quality Assessment", CVPR 2021, arXiv 2103.06627.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.metric.margin_softmax import CosineClassifier, arcface_margin
from trimtab.metric.pairs import checked_embeddings, mined_weights
from trimtab.ops.arguments import in_range, indices, non_negative, positive, real_problem


class MagFaceLoss(nn.Module):
    """The loss as a module that holds one direction per class (equation in the module's docstring).

    Give `loss.parameters()` to the optimizer along with the network's. Unlike other heads it reads the embeddings'
    lengths: do not normalise them before, and see that the network can reach the range.

    Args:
        embedding_size: width of the embeddings.
        num_classes: number of classes.
        lengths: the smallest and the largest length that count, positive.
        margins: the margins at those lengths, angles in radians in [0, pi]; by default those of the authors' code.
        scale: factor of the cosines before the softmax, positive.
        weight: of the reward of length, lambda, at least 0.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> loss = MagFaceLoss(embedding_size=16, num_classes=10)
        >>> value = loss(20 * torch.randn(8, 16), torch.arange(8))
        >>> loss.margin(torch.tensor([[10.0], [60.0], [500.0]]))
        tensor([0.4500, 0.6250, 0.8000])
    """

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        *,
        lengths: tuple[float, float] = (10.0, 110.0),
        margins: tuple[float, float] = (0.45, 0.8),
        scale: float = 64.0,
        weight: float = 35.0,
    ) -> None:
        super().__init__()
        shortest, longest = (positive("lengths", length) for length in lengths)
        if not shortest < longest:
            raise ValueError(f"lengths must be two numbers, the smaller first, got {lengths}")
        smallest, largest = (in_range("margins", margin, 0, math.pi) for margin in margins)
        if smallest > largest:
            raise ValueError(f"margins must be two angles, the smaller first, got {margins}")
        self.lengths, self.margins = (shortest, longest), (smallest, largest)
        self.scale, self.weight = positive("scale", scale), non_negative("weight", weight)
        self.classifier = CosineClassifier(embedding_size, num_classes)

    def margin(self, embeddings: Float[Tensor, "batch dim"]) -> Float[Tensor, " batch"]:
        """The margin of every sample, by its length."""
        if problem := real_problem(embeddings=embeddings):
            raise TypeError(problem)
        (shortest, longest), (smallest, largest) = self.lengths, self.margins
        return smallest + (largest - smallest) / (longest - shortest) * (self._length(embeddings) - shortest)

    def penalty(self, embeddings: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
        """The term that rewards length, with its weight: the mean of the batch. It is least at the largest length."""
        if problem := real_problem(embeddings=embeddings):
            raise TypeError(problem)
        length = self._length(embeddings)
        return self.weight * (length / self.lengths[1] ** 2 + 1 / length).mean()

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
            cosine = arcface_margin(cosine, labels, self.margin(embeddings))
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
            embeddings: one row per sample, at its own length.
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
            return F.cross_entropy(logits, labels.long()) + self.penalty(embeddings)
        return (weights * F.cross_entropy(logits, labels.long(), reduction="none")).mean() + self.penalty(embeddings)

    def _length(self, embeddings: Tensor) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(embeddings, dim=1)
        return length.clamp(*self.lengths)

    def extra_repr(self) -> str:
        return f"lengths={self.lengths}, margins={self.margins}, scale={self.scale:g}, weight={self.weight:g}"
