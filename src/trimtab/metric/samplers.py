"""Batches of P classes with K samples each, so that every batch holds positive pairs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Sampler

from trimtab.ops.arguments import integer, tensor


class PKSampler(Sampler[list[int]]):
    """A `batch_sampler` for `DataLoader` that draws P classes, and K samples of each.

    Classes differ within a batch. A class's samples are dealt from a shuffled deck that is shuffled anew when it runs
    short, so that samples within a batch differ and all are used equally often.

    Args:
        labels: the training labels, a tensor or an array.
        classes_per_batch: P, at least 1 and at most the number of classes.
        samples_per_class: K, at least 1 and at most the size of the smallest class.
        generator: source of the draws, on the CPU; torch's global one where it is None.

    Raises:
        TypeError: if `labels` is not of integer type.
        ValueError: if `labels` is not one-dimensional or an argument is out of range.

    Example:
        >>> labels = torch.arange(40) % 4
        >>> sampler = PKSampler(labels, classes_per_batch=2, samples_per_class=5)
        >>> [labels[batch].unique().numel() for batch in sampler]
        [2, 2, 2, 2]
    """

    def __init__(
        self,
        labels: Int[Tensor, " samples"],
        classes_per_batch: int,
        samples_per_class: int,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        labels = tensor("labels", labels, ndim=1).cpu()
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"labels must be integers, got {labels.dtype}")
        if len(labels) == 0:
            raise ValueError("labels must hold at least one sample, got none")
        self.members = [torch.nonzero(labels == label).flatten() for label in labels.unique()]
        self.classes_per_batch = integer("classes_per_batch", classes_per_batch, 1, len(self.members))
        self.samples_per_class = integer("samples_per_class", samples_per_class, 1, min(map(len, self.members)))
        self.generator = generator
        self._num_batches = max(1, len(labels) // (classes_per_batch * samples_per_class))

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[list[int]]:
        decks: list[Tensor] = [members[:0] for members in self.members]
        for _ in range(len(self)):
            batch: list[int] = []
            for label in torch.randperm(len(decks), generator=self.generator)[: self.classes_per_batch].tolist():
                if len(decks[label]) < self.samples_per_class:
                    members = self.members[label]
                    decks[label] = members[torch.randperm(len(members), generator=self.generator)]
                batch += decks[label][: self.samples_per_class].tolist()
                decks[label] = decks[label][self.samples_per_class :]
            yield batch
