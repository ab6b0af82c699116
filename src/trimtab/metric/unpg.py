r"""UNPG: the negative pairs of the batch join the negative classes in a margin softmax.

Wrap it around a face-recognition head: class weights gather at the centre of their classes and so make few hard
negatives, while pairs of samples make hard ones, at the cost of a batch's similarities. With $z$ the scaled logits of
the head, margin included, s its scale, and $S'$ the cosines of the batch's negative pairs, each counted once,

$$
L_i = -\log \frac{e^{z_{i y_i}}}{\sum_j e^{z_{i j}} + \sum_{c \in S'} e^{s c}} , \qquad
S' = \{ c : Q_1 - r \, (Q_3 - Q_1) \le c \le Q_3 + r \, (Q_3 - Q_1) \}
$$

All samples share the pairs in $S'$, which a box-and-whisker rule with quartiles $Q_1, Q_3$ cleans of outliers. The
gradient reaches both samples of a pair that is kept; which ones are kept is a constant to it. The pairs' sum is taken
once and added to each sample's own, in memory of the batch's similarities alone.

Reference: Junuk Jung, Seonhoon Lee, Heung-Seon Oh, Yongjun Park, Joochan Park, Sungbin Son, "Unified Negative Pair
Generation toward Well-discriminative Feature Space for Face Recognition", BMVC 2022, arXiv 2203.11593.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from trimtab.metric.pairs import checked_embeddings, compared
from trimtab.ops.arguments import indices, non_negative, real_problem, tensor
from trimtab.ops.pairwise import pairwise_cosine


class Head(Protocol):
    """What `UNPGLoss` asks of a head such as `MarginSoftmaxLoss`: scaled logits with the margin, and their scale."""

    scale: float

    def logits(
        self, embeddings: Float[Tensor, "batch dim"], labels: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch classes"]: ...


def whisker_filter(values: Float[Tensor, " n"], among: Bool[Tensor, " n"], whisker: float = 1.5) -> Bool[Tensor, " n"]:
    """Which of the values are no outliers of a box plot: within `whisker` box lengths of the quartiles.

    The quartiles of P values are those at positions `P // 4` and `3 * P // 4` of their order, not interpolated, as in
    the authors' code.

    Args:
        values: any numbers.
        among: the values that count; the others are not kept. A mask, so that shapes do not depend on it.
        whisker: reach in interquartile ranges, at least 0; infinity keeps all.

    Raises:
        ValueError: if shapes disagree or `whisker` is below 0.

    Example:
        >>> whisker_filter(torch.tensor([0.1, 0.9, 0.2, 0.3, 0.2]), torch.tensor([True] * 5))
        tensor([ True, False,  True,  True,  True])
    """
    values, among = tensor("values", values), tensor("among", among)
    if values.ndim != 1 or among.shape != values.shape or among.dtype != torch.bool:
        raise ValueError(
            f"among must be {tuple(values.shape)} booleans as values, got {tuple(among.shape)} {among.dtype}"
        )
    if not whisker >= 0:
        raise ValueError(f"whisker must be at least 0, got {whisker}")
    if whisker == math.inf or values.numel() == 0:
        return among
    ordered = torch.where(among, values.detach(), math.inf).sort().values
    count = among.sum()
    first, third = ordered.gather(0, torch.stack([count // 4, 3 * count // 4])).unbind()
    reach = whisker * (third - first)
    return among & (values >= first - reach) & (values <= third + reach)


def unpg_loss(
    logits: Float[Tensor, "batch classes"],
    embeddings: Float[Tensor, "batch dim"],
    labels: Int[Tensor, " batch"],
    *,
    scale: float = 64.0,
    whisker: float = 1.5,
    pairs: Bool[Tensor, "batch batch"] | None = None,
) -> Float[Tensor, " batch"]:
    """The loss of every sample of a batch (equation in the module's docstring).

    Args:
        logits: scaled cosines with the class weights, margin included.
        embeddings: one row per sample, of any length; they are normalised here.
        labels: classes.
        scale: that of the logits.
        whisker: reach of the filter, in interquartile ranges; infinity keeps all pairs.
        pairs: which pairs of samples count, where their labels differ; all without it. Either order will do.

    Raises:
        TypeError: if `logits` or `embeddings` is not floating point, or `labels` not of integer type.
        ValueError: if shapes disagree, or `scale` or `whisker` is out of range.

    Example:
        >>> logits, embeddings = torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> unpg_loss(logits, embeddings, torch.tensor([0, 1])).exp()  # one more negative, of cosine 0
        tensor([3., 3.])
    """
    logits, embeddings, labels = tensor("logits", logits), tensor("embeddings", embeddings), tensor("labels", labels)
    if logits.ndim != 2 or len(checked_embeddings(embeddings, labels)) != len(logits):
        raise ValueError(f"logits must be ({len(labels)}, classes), got shape {tuple(logits.shape)}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}")
    return _joined(logits, labels, *_pairs(embeddings, labels, pairs), scale, whisker)


def _joined(
    logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"],
    similarity: Float[Tensor, " pairs"],
    different: Bool[Tensor, " pairs"],
    scale: float,
    whisker: float,
) -> Float[Tensor, " batch"]:
    """The loss with pairs of these cosines, where they count."""
    kept = whisker_filter(similarity, different, whisker)
    pooled = torch.where(kept, scale * similarity, -math.inf).logsumexp(0)
    right = labels.long()
    # log(e^head + e^(pooled - own)): the head's loss is already over its own negatives.
    head = F.cross_entropy(logits, right, reduction="none")
    return torch.logaddexp(head, pooled - logits.gather(1, right[:, None])[:, 0])


def _pairs(
    embeddings: Float[Tensor, "batch dim"], labels: Int[Tensor, " batch"], among: Bool[Tensor, "batch batch"] | None
) -> tuple[Float[Tensor, " pairs"], Bool[Tensor, " pairs"]]:
    """Cosines of all pairs, each once, and whether they count and their labels differ.

    Every sample with the one 1, 2, ... places on, around the batch: by arithmetic alone, so that a compiled loss serves
    batches of every size.
    """
    batch = len(labels)
    pair = torch.arange(batch * (batch - 1) // 2, device=labels.device)
    first = pair % batch
    second = (first + 1 + pair // batch) % batch
    different = labels[first] != labels[second]
    if among is not None:
        different = different & (among | among.T)[first, second]
    return pairwise_cosine(embeddings)[first, second], different


class MetricLearningHead(nn.Module):
    """ArcFace or CosFace of pytorch-metric-learning as a head of `UNPGLoss`, which makes it where it is given one.

    Args:
        loss: its `ArcFaceLoss`, `SubCenterArcFaceLoss` or `CosFaceLoss`; its reducer is not used.

    Raises:
        TypeError: if `loss` is another.
        ValueError: if it has a regulariser, which would be left out.

    Example:
        >>> from pytorch_metric_learning.losses import ArcFaceLoss
        >>> head = MetricLearningHead(ArcFaceLoss(num_classes=10, embedding_size=16))
        >>> head.logits(torch.randn(8, 16), torch.arange(8)).shape
        torch.Size([8, 10])
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        from pytorch_metric_learning.losses import ArcFaceLoss, CosFaceLoss

        # Other heads of that package scale each sample's logits by its own length: pairs would have no scale.
        if not isinstance(loss, ArcFaceLoss | CosFaceLoss):
            raise TypeError(f"loss must be an ArcFaceLoss or a CosFaceLoss, got {type(loss).__name__}")
        for name in ("weight_regularizer", "embedding_regularizer"):
            if getattr(loss, name) is not None:
                raise ValueError(f"loss must be without {name}, got {type(getattr(loss, name)).__name__}")
        self.loss = loss
        self.scale = float(loss.scale)

    def logits(
        self, embeddings: Float[Tensor, "batch dim"], labels: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch classes"]:
        """Scaled cosines; with labels, those of the labels carry the margin.

        Raises:
            ValueError: if a label is out of range.
        """
        if problem := real_problem(embeddings=embeddings, labels=labels):
            raise TypeError(problem)
        loss: Any = self.loss
        cosine: Tensor = loss.get_cosine(embeddings.to(loss.W.dtype))
        if labels is not None:
            indices("labels", labels, cosine.shape[1])
            right = labels.long()[:, None]
            own = loss.modify_cosine_of_target_classes(cosine.gather(1, right))
            cosine = cosine.scatter(1, right, own)
        return self.scale * cosine


class UNPGLoss(nn.Module):
    """A face-recognition head whose softmax also runs over the batch's negative pairs.

    A batch without negative pairs has the head's own loss. On several processes each takes the pairs of its own batch.

    Args:
        head: a module with an attribute `scale` and a method `logits(embeddings, labels)`, such as `MarginSoftmaxLoss`,
            or the ArcFace or CosFace loss of pytorch-metric-learning.
            Its parameters are this module's: give `loss.parameters()` to the optimizer. One that has a method
            `penalty(embeddings)`, as `MagFaceLoss`, has it added.
        whisker: reach of the filter in interquartile ranges, at least 0; infinity keeps all pairs. The authors use 1.5,
            or 1.

    Raises:
        TypeError: if `head` is no such module.
        ValueError: if `whisker` is negative.

    Example:
        >>> from trimtab.metric import MarginSoftmaxLoss
        >>> loss = UNPGLoss(MarginSoftmaxLoss(embedding_size=16, num_classes=10, kind="cosface"))
        >>> value = loss(torch.randn(8, 16), torch.arange(8))
    """

    def __init__(self, head: nn.Module, whisker: float = 1.5) -> None:
        super().__init__()
        if isinstance(head, nn.Module) and hasattr(head, "modify_cosine_of_target_classes"):
            head = MetricLearningHead(head)
        if not isinstance(head, nn.Module) or not hasattr(head, "scale") or not hasattr(head, "logits"):
            raise TypeError(f"head must be a module with `scale` and `logits`, got {type(head).__name__}")
        if whisker != math.inf:
            non_negative("whisker", whisker)
        self.head = head
        self.whisker = whisker

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
            indices_tuple: the pairs or triplets of a miner of pytorch-metric-learning: the negative ones among them
                are those that may join; all of the batch without it. Every sample is classified.
            ref_emb, ref_labels: what the batch makes its pairs with in place of itself, such as the embeddings that
                CrossBatchMemory of that package keeps.

        Raises:
            TypeError: if `embeddings` is not floating point or `labels` not of integer type.
            ValueError: if shapes disagree, the batch is empty, a label is out of range, or only one of the references
                is given.
        """
        embeddings = checked_embeddings(embeddings, labels)
        head = cast(Head, self.head)
        logits = head.logits(embeddings, labels)
        indices("labels", labels, logits.shape[1])
        if ref_emb is not None or ref_labels is not None:
            similarity, masks = compared(embeddings, labels, indices_tuple, ref_emb, ref_labels)
            pairs = similarity.flatten(), masks.negative.flatten()
            loss = _joined(logits, labels, *pairs, head.scale, self.whisker).mean()
        else:
            mined = None if indices_tuple is None else compared(embeddings, labels, indices_tuple)[1].negative
            loss = unpg_loss(logits, embeddings, labels, scale=head.scale, whisker=self.whisker, pairs=mined).mean()
        return loss + head.penalty(embeddings) if hasattr(head, "penalty") else loss

    def extra_repr(self) -> str:
        return f"whisker={self.whisker:g}"
