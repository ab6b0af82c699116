"""A loss that trains an encoder for the vote."""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.domain.adanpc.memory import neighbour_vote
from trimtab.ops.arguments import (
    class_indices,
    floating_tensor,
    indices,
    integer,
    positive,
)
from trimtab.ops.feature_bank import FeatureBank
from trimtab.ops.whole_state import WholeState


class NeighbourLoss(WholeState, nn.Module):
    """Trains an encoder for the vote: minus the logarithm of the score of the right class, over a queue of features.

    Call `loss(z, targets)`, step the optimizer, and call `update(z, targets)` with the features after it, or with
    those of the step. While the queue is empty the loss is zero, with a gradient of zero.

    Args:
        dim: width of the features.
        num_classes: number of classes.
        capacity: length of the queue; the authors take 1,000 for small images and 3,500 else.
        k: number of neighbours; the authors take 10 and 150.
        temperature: T at first and at the end.
        anneal_steps: calls of `update` over which T falls linearly.

    Attributes:
        queue: normalised features and labels, a `FeatureBank`.
        step: calls of `update` so far, a scalar buffer.

    Raises:
        TypeError: an argument is of another type.
        ValueError: a number is out of range, or `k` is more than `capacity`.

    Example:
        >>> loss = NeighbourLoss(dim=2, num_classes=2, capacity=8, k=1)
        >>> z, targets = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
        >>> loss.update(z, targets)
        >>> round(loss(z, targets).item(), 4), round(loss(z, 1 - targets).item(), 4)
        (0.0, 11.5129)
    """

    step: Tensor

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        capacity: int = 1000,
        k: int = 10,
        temperature: tuple[float, float] = (1.0, 0.1),
        anneal_steps: int = 5000,
    ) -> None:
        super().__init__()
        self.num_classes = integer("num_classes", num_classes, 2)
        self.k = integer("k", k, 1, integer("capacity", capacity))
        self.first, self.last = (positive("temperature", value) for value in temperature)
        self.anneal_steps = integer("anneal_steps", anneal_steps)
        self.queue = FeatureBank(capacity, dim, payload=(), payload_dtype=torch.int64)
        self.register_buffer("step", torch.zeros(()))

    def forward(self, z: Float[Tensor, "batch dim"], targets: Int[Tensor, " batch"]) -> Tensor:
        """The loss of a batch, whose features are not in the queue yet.

        Raises:
            TypeError: `z` is not floating point, or `targets` not int64.
            ValueError: the shapes do not fit, a label is out of range, or the batch is empty.
        """
        z = self._checked(z, targets)
        similarity, near = self.queue.nearest(z, self.k)
        temperature = self.last + (self.first - self.last) * (1 - self.step / self.anneal_steps).clamp(min=0)
        there = similarity.isfinite().any(1, keepdim=True)  # else a softmax of nothing would be NaN
        labels = cast(Tensor, self.queue.payload)[near]
        scores = neighbour_vote(similarity.where(there, 0.0), labels, self.num_classes, temperature)
        losses = -scores.gather(1, targets[:, None]).log()
        return (losses * there).mean()

    @torch.no_grad()
    def update(self, z: Float[Tensor, "batch dim"], targets: Int[Tensor, " batch"]) -> None:
        """Queues the features of a batch and counts a step.

        Raises:
            TypeError, ValueError: as the loss.
        """
        self.queue.add(self._checked(z, targets), targets)
        self.step += 1

    def _checked(self, z: Tensor, targets: Tensor) -> Tensor:
        z = floating_tensor("z", z)
        class_indices("targets", targets)
        if z.ndim != 2 or z.shape[1] != self.queue.dim or targets.shape != z.shape[:1] or len(z) == 0:
            wanted = f"(batch, {self.queue.dim}) and (batch,), at least one sample"
            raise ValueError(f"z and targets must be {wanted}, got {tuple(z.shape)} and {tuple(targets.shape)}")
        indices("targets", targets, self.num_classes)
        return z
