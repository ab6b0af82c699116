"""The form in which every labelled data set is handed out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class ClassificationData:
    """A labelled data set with its own train and test part.

    Attributes:
        name: what `trimtab.data.load` was asked for.
        x_train, x_test: float32; images (n, channels, height, width) in [0, 1], tables (n, features) standardised
            by the training part's mean and deviation.
        y_train, y_test: int64 class labels in [0, num_classes).
        num_classes: number of classes.
        source: where the data came from, for the record.
    """

    name: str
    x_train: Float[Tensor, "train ..."]
    y_train: Int[Tensor, " train"]
    x_test: Float[Tensor, "test ..."]
    y_test: Int[Tensor, " test"]
    num_classes: int
    source: str = ""

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.x_train.shape[1:])

    def subset(
        self, train: int | None = None, test: int | None = None, *, generator: torch.Generator | None = None
    ) -> ClassificationData:
        """A random part of the data; None keeps a part whole, and more than there is means all of it.

        Args:
            train: number of training samples.
            test: number of test samples.
            generator: decides which; without one, the first ones are taken.

        Raises:
            ValueError: `train` or `test` is not positive.
        """
        for name, count in (("train", train), ("test", test)):
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        rows = _rows(len(self.y_train), train, generator)
        columns = _rows(len(self.y_test), test, generator)
        return replace(
            self,
            x_train=self.x_train[rows],
            y_train=self.y_train[rows],
            x_test=self.x_test[columns],
            y_test=self.y_test[columns],
        )

    def classes(self, keep: list[int]) -> ClassificationData:
        """Only the samples of some classes, relabelled 0 … len(keep) - 1 in the order given.

        Raises:
            ValueError: a class is unknown or named twice.
        """
        if len(set(keep)) != len(keep) or not set(keep) <= set(range(self.num_classes)):
            raise ValueError(f"keep must name distinct classes in [0, {self.num_classes}), got {keep}")
        new = torch.full((self.num_classes,), -1)
        new[torch.tensor(keep)] = torch.arange(len(keep))
        train, test = new[self.y_train] >= 0, new[self.y_test] >= 0
        return replace(
            self,
            x_train=self.x_train[train],
            y_train=new[self.y_train[train]],
            x_test=self.x_test[test],
            y_test=new[self.y_test[test]],
            num_classes=len(keep),
        )


def _rows(available: int, wanted: int | None, generator: torch.Generator | None) -> Int[Tensor, " rows"]:
    order = torch.arange(available) if generator is None else torch.randperm(available, generator=generator)
    return order if wanted is None else order[:wanted]
