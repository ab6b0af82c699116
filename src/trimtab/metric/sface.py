r"""SFace: a face-recognition loss without softmax whose pull and push fade out at chosen angles.

For training an embedding on many classes when some labels or images are bad. A sample is pulled to the weight of its
class until it is within an angle a of it and pushed from the other weights until it is beyond an angle b, each with a
strength that is a sigmoid of the angle; there is no competition between classes that would pull ever harder at samples
that do not fit. With $\theta_j$ the angle between the embedding and the weight of class j and y the label,

$$
L = - [r(\theta_y)]_\perp \cos\theta_y + \sum_{j \ne y} [\bar r(\theta_j)]_\perp \cos\theta_j , \qquad
r(\theta) = \frac{s}{1 + e^{-k (\theta - a)}} , \quad \bar r(\theta) = \frac{s}{1 + e^{k (\theta - b)}}
$$

where $[\cdot]_\perp$ is a constant to the gradient, so that the strengths scale the gradient and are not trained.
The loss may be negative, and its value is no measure of progress.

Reference: Yaoyao Zhong, Weihong Deng, Jiani Hu, Dongyue Zhao, Xian Li, Dongchao Wen, "SFace: Sigmoid-Constrained
Hypersphere Loss for Robust Face Recognition", IEEE Transactions on Image Processing 2021, arXiv 2205.12010.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.metric.margin_softmax import CosineClassifier
from trimtab.metric.pairs import checked_embeddings, mined_weights
from trimtab.ops.arguments import in_range, indices, non_negative, positive, tensor, tensor_problem


def intra_strength(theta: Float[Tensor, "..."], k: float = 80.0, a: float = 0.8) -> Float[Tensor, "..."]:
    """Strength of the pull to the own class, in [0, 1]: one beyond angle `a`, fading below it with slope `k`.

    Raises:
        TypeError: an argument is no real tensor.

    Example:
        >>> intra_strength(torch.tensor([0.0, 0.8, 1.6]))
        tensor([1.6038e-28, 5.0000e-01, 1.0000e+00])
    """
    if problem := tensor_problem(theta=theta):
        raise TypeError(problem)
    if not (math.isfinite(k) and math.isfinite(a)):
        raise ValueError(f"k and a must be finite, got {k} and {a}")
    return torch.sigmoid(k * (theta - a))


def inter_strength(theta: Float[Tensor, "..."], k: float = 80.0, b: float = 1.23) -> Float[Tensor, "..."]:
    """Strength of the push from another class, in [0, 1]: one below angle `b`, fading beyond it with slope `k`.

    Raises:
        TypeError: an argument is no real tensor.

    Example:
        >>> inter_strength(torch.tensor([0.0, 1.23]))
        tensor([1.0000, 0.5000])
    """
    if problem := tensor_problem(theta=theta):
        raise TypeError(problem)
    if not (math.isfinite(k) and math.isfinite(b)):
        raise ValueError(f"k and b must be finite, got {k} and {b}")
    return torch.sigmoid(k * (b - theta))


def sface_loss(
    cosine: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"],
    *,
    scale: float = 64.0,
    k: float = 80.0,
    a: float = 0.8,
    b: float = 1.23,
) -> Float[Tensor, " batch"]:
    """The loss of every sample from its cosines with the class weights; arguments as in `SFaceLoss`.

    Raises:
        TypeError: if `cosine` is not floating point or `labels` not of integer type.
        ValueError: if the shapes do not fit, or a number is not finite or `scale` not positive.

    Example:
        >>> sface_loss(torch.tensor([[0.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]))
        tensor([ 0., 64.])
    """
    cosine, labels = tensor("cosine", cosine), tensor("labels", labels)
    if cosine.ndim != 2 or labels.shape != cosine.shape[:1]:
        raise ValueError(f"labels must be of shape {tuple(cosine.shape[:1])}, got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.dtype == torch.bool or not cosine.is_floating_point():
        raise TypeError(f"cosine and labels must be floating point and integers, got {cosine.dtype} and {labels.dtype}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}")
    right = labels.long()[:, None]
    theta = cosine.detach().clamp(-1, 1).acos()
    pull = intra_strength(theta.gather(1, right), k, a)
    strength = inter_strength(theta, k, b).scatter(1, right, -pull)
    return scale * (strength * cosine).sum(1)


class SFaceLoss(nn.Module):
    """The loss as a module that holds one direction per class (equation in the module's docstring).

    Give `loss.parameters()` to the optimizer along with the network's. The best angles depend on the data: the authors
    use a = 0.87 and b = 1.2 for CASIA-WebFace and the defaults for larger sets.

    Args:
        embedding_size: width of the embeddings.
        num_classes: number of classes.
        scale: factor of the loss, and so of its gradient; positive.
        k: slope of the sigmoids, at least 0; at 0 all strengths are 1/2.
        a: angle in radians, in [0, pi], below which the pull to the own class fades.
        b: angle in radians, in [0, pi], beyond which the push from the other classes fades.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> loss = SFaceLoss(embedding_size=16, num_classes=10)
        >>> value = loss(torch.randn(8, 16), torch.arange(8))
        >>> loss.logits(torch.randn(8, 16)).shape
        torch.Size([8, 10])
    """

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        *,
        scale: float = 64.0,
        k: float = 80.0,
        a: float = 0.8,
        b: float = 1.23,
    ) -> None:
        super().__init__()
        self.scale, self.k = positive("scale", scale), non_negative("k", k)
        self.a, self.b = in_range("a", a, 0, math.pi), in_range("b", b, 0, math.pi)
        self.classifier = CosineClassifier(embedding_size, num_classes)
        # As in the authors' code. The length is of no matter to the loss, yet sets how fast a direction can turn.
        nn.init.normal_(self.classifier.weight, std=2 * math.sqrt(2 / num_classes))

    def logits(self, embeddings: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch classes"]:
        """Scaled cosines with the class weights, to classify with."""
        cosine: Tensor = self.classifier(embeddings)
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
        indices("labels", labels, len(self.classifier.weight))
        cosine = self.classifier(embeddings)
        losses = sface_loss(cosine, labels, scale=self.scale, k=self.k, a=self.a, b=self.b)
        return (losses if weights is None else weights * losses).mean()

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}, k={self.k:g}, a={self.a:g}, b={self.b:g}"
