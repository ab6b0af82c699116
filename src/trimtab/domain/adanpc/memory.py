"""The vote of a memory's nearest entries, and the classifier that goes on learning as it predicts."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.ops.arguments import (
    class_indices,
    floating_tensor,
    in_range,
    indices,
    integer,
    looked_at,
    non_negative,
    one_of,
    positive,
    tensor_problem,
)
from trimtab.ops.attack import eval_mode
from trimtab.ops.feature_bank import FeatureBank
from trimtab.ops.whole_state import WholeState


def neighbour_vote(
    similarity: Float[Tensor, "batch k"],
    labels: Int[Tensor, "batch k"],
    num_classes: int,
    temperature: float | Tensor,
    floor: float = 1e-5,
) -> Float[Tensor, "batch classes"]:
    """The share of the votes that each class gets, the similar ones counting more.

    Args:
        similarity: of each query with its neighbours; minus infinity has no vote.
        labels: the neighbours' classes.
        num_classes: number of classes.
        temperature: T; small lets the nearest decide alone, large counts all neighbours alike.
        floor: added to every class, so that a logarithm is finite; what then exceeds 1 is cut off.

    Returns:
        Rows that sum to one, or a few floors more.

    Raises:
        TypeError: `similarity` is not floating point, `labels` not int64, or `num_classes` no integer.
        ValueError: the shapes differ, a label is out of range, `temperature` is not positive and finite, or
            `floor` negative or not finite.

    Example:
        >>> similarity, labels = torch.tensor([[0.9, 0.9, 0.9]]), torch.tensor([[1, 0, 1]])
        >>> neighbour_vote(similarity, labels, 2, temperature=0.1)
        tensor([[0.3333, 0.6667]])
    """
    similarity = floating_tensor("similarity", similarity)
    class_indices("labels", labels)
    if similarity.ndim != 2 or labels.shape != similarity.shape:
        raise ValueError(
            "similarity and labels must be of one shape (batch, k), "
            f"got {tuple(similarity.shape)} and {tuple(labels.shape)}"
        )
    if not isinstance(temperature, Tensor) and not (
        isinstance(temperature, float | Real) and 0 < temperature < torch.inf
    ):
        raise ValueError(f"temperature must be positive and finite, got {temperature!r}")
    if not (isinstance(floor, float | Real) and 0 <= floor < torch.inf):
        raise ValueError(f"floor must be at least 0 and finite, got {floor!r}")
    if not isinstance(num_classes, int | Integral):
        raise TypeError(f"num_classes must be an integer, got {num_classes!r}")
    if looked_at(labels) and not ((labels >= 0) & (labels < num_classes)).all():
        raise ValueError(f"labels must be in [0, {num_classes}), got others")
    weight = (similarity / temperature).softmax(1)
    scores = weight.new_zeros(len(weight), integer("num_classes", num_classes)).scatter_add(1, labels, weight)
    return (scores + floor).clamp(max=1)


class AdaNPC(WholeState, nn.Module):
    """A classifier by memory, around a trained encoder, that goes on learning as it predicts.

    `remember` the source data once; then `predict` batches as they arrive. The encoder is run in eval mode.

    Args:
        features: the trained encoder, x -> (batch, dim).
        dim: width of its features.
        num_classes: number of classes.
        k: number of neighbours that vote; all of them while the memory holds fewer.
        temperature: T, of the votes.
        threshold: a sample is remembered where its confidence is at least this; above 1 nothing ever is.
        confidence: "softmax", as in the authors' code, is the largest softmax of the scores, which lies between 1/C and
            e/(e + C - 1); "score" is the largest score itself, which lies between 1/C and 1.
        radius: where it is given, all entries of at least this cosine vote in place of the k nearest, for samples
            that have any. The authors ask it of the whole batch.

    Attributes:
        memory: normalised features and labels, a growing `FeatureBank`.
        num_source: how many of them are of the source, a scalar buffer; they come first.

    Raises:
        TypeError: an argument is of another type.
        ValueError: a number is out of range, or `confidence` is unknown.

    Example:
        >>> model = AdaNPC(nn.Identity(), dim=2, num_classes=2, k=1, threshold=0.0)
        >>> model.remember(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
        >>> model.predict(torch.tensor([[0.9, 0.5]])).argmax(1), len(model.memory)
        (tensor([0]), 3)
    """

    num_source: Tensor

    def __init__(
        self,
        features: nn.Module,
        dim: int,
        num_classes: int,
        *,
        k: int = 100,
        temperature: float = 0.1,
        threshold: float = 0.1,
        confidence: Literal["softmax", "score"] = "softmax",
        radius: float | None = None,
    ) -> None:
        super().__init__()
        self.features = features
        self.num_classes = integer("num_classes", num_classes, 2)
        self.k, self.temperature = integer("k", k), positive("temperature", temperature)
        self.threshold = non_negative("threshold", threshold)
        self.confidence = one_of("confidence", confidence, ("softmax", "score"))
        self.radius = None if radius is None else in_range("radius", radius, -1, 1)
        self.memory = FeatureBank(None, dim, payload=(), payload_dtype=torch.int64)
        self.register_buffer("num_source", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def remember(self, x: Float[Tensor, "batch ..."], y: Int[Tensor, " batch"]) -> None:
        """Adds labelled source samples; before any are predicted.

        Raises:
            TypeError: `y` is not int64.
            ValueError: it does not fit `x`, or a label is out of range.
            RuntimeError: samples have been learned from already.
        """
        class_indices("y", y)
        if y.shape != x.shape[:1]:
            raise ValueError(f"y must be of shape {tuple(x.shape[:1])}, one label a sample, got {tuple(y.shape)}")
        if len(y) == 0:
            return
        indices("y", y, self.num_classes)
        if len(self.memory.filled) != int(self.num_source):
            raise RuntimeError("AdaNPC: call reset() before more source samples are remembered")
        self.memory.add(self.encoded(x), y)
        self.num_source.fill_(len(self.memory.filled))

    @torch.no_grad()
    def predict(self, x: Float[Tensor, "batch ..."], adapt: bool = True) -> Float[Tensor, "batch classes"]:
        """Scores of a batch by the memory as it was before; then what is confident joins it.

        Args:
            x: inputs.
            adapt: whether the memory learns.

        Raises:
            RuntimeError: nothing has been remembered.
        """
        if len(self.memory.filled) == 0:
            raise RuntimeError("AdaNPC: remember(x, y) source samples before anything is predicted")
        z = self.encoded(x)
        scores = self.scores(z)
        if adapt:
            self.learn(z, scores)
        return scores

    def scores(self, z: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch classes"]:
        """The votes on features."""
        held = cast(Tensor, self.memory.payload)
        similarity, near = self.memory.nearest(z, min(self.k, len(held)))
        votes = neighbour_vote(similarity, held[near], self.num_classes, self.temperature)
        if self.radius is None:
            return votes
        cosines = self.memory.cosines(z)
        within = cosines >= self.radius
        everyone = cosines.masked_fill(~within, -torch.inf).masked_fill(~within.any(1, keepdim=True), 0.0)
        wide = neighbour_vote(everyone, held.expand_as(cosines), self.num_classes, self.temperature)
        return torch.where(within.any(1, keepdim=True), wide, votes)

    def learn(self, z: Float[Tensor, "batch dim"], scores: Float[Tensor, "batch classes"]) -> None:
        """Remembers the features whose scores are confident, with the class of the largest.

        Raises:
            TypeError: an argument is no real tensor.
        """
        if problem := tensor_problem(z=z, scores=scores):
            raise TypeError(problem)
        best, label = (scores.softmax(1) if self.confidence == "softmax" else scores).max(1)
        kept = best >= self.threshold
        self.memory.add(z[kept], label[kept])

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        """Scores, without learning."""
        return self.predict(x, adapt=False)

    def reset(self) -> None:
        """Forgets all but the source samples."""
        self.memory.reset(keep=int(self.num_source))

    def encoded(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch dim"]:
        """Features of inputs, by the encoder in eval mode."""
        with eval_mode(self.features):
            return floating_tensor("features(x)", self.features(x))
