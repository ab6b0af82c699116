"""Choosing a model by its accuracy under crafted shifts, of kinds that it was not trained with."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Generic, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.ops.arguments import integer, real_problem
from trimtab.ops.arguments import labels as checked_labels

Augmentation = Callable[[Tensor, torch.Generator], Tensor]
"""`(x, generator) -> x`, on a batch of images."""

Categories = Mapping[str, Sequence[Augmentation]]
"""Kind of augmentation -> its members, each of which makes one copy of the validation images."""

Predict = Callable[[Float[Tensor, "batch ..."]], Float[Tensor, "batch classes"]]
C = TypeVar("C")


class ShiftValidator:
    """Accuracy on augmented copies of validation images, which are the same copies for everybody.

    Args:
        augmentations: kinds of augmentations and their members.
        seed: decides what the members draw.

    Raises:
        TypeError: `seed` is not an integer.
        ValueError: there is no kind, or one without members.

    Example:
        >>> validator = ShiftValidator({"arithmetic": [lambda x, generator: -x]})
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> validator.score(lambda x: x, x, torch.tensor([0, 1]))
        {'arithmetic': 0.0, 'mean': 0.0}
    """

    def __init__(self, augmentations: Categories, seed: int = 0) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int | Integral):
            raise TypeError(f"seed must be an integer, got {type(seed).__name__}")
        if not augmentations:
            raise ValueError("augmentations must be of at least one kind, got none")
        for name, members in augmentations.items():
            if not members:
                raise ValueError(f"augmentations[{name!r}] must have at least one member, got none")
        self.augmentations, self.seed = {name: list(held) for name, held in augmentations.items()}, seed

    def copies(
        self, x: Float[Tensor, "batch ..."], names: Sequence[str] | None = None
    ) -> dict[str, list[Float[Tensor, "batch ..."]]]:
        """The copies of some images, by kind; a member's do not depend on which other kinds are asked for.

        Raises:
            ValueError: a kind is unknown.
        """
        chosen = list(self.augmentations) if names is None else list(names)
        if unknown := [name for name in chosen if name not in self.augmentations]:
            raise ValueError(f"names must be among {', '.join(self.augmentations)}, got {unknown[0]!r}")
        return {
            name: [
                change(x, torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name} {number}".encode())))
                for number, change in enumerate(self.augmentations[name])
            ]
            for name in chosen
        }

    @torch.no_grad()
    def score(
        self,
        predict: Predict,
        x: Float[Tensor, "batch ..."],
        y: Int[Tensor, " batch"],
        names: Sequence[str] | None = None,
    ) -> dict[str, float]:
        """Accuracy under each kind, and `mean`: that of all copies, each counting once.

        Args:
            predict: gives scores of the classes.
            x, y: validation samples.
            names: which kinds; all of them where it is None.

        Raises:
            TypeError: labels are not integers.
            ValueError: a kind is unknown, or there are not as many labels as samples, at least one.
        """
        y = checked_labels("y", y, length=len(x))
        if len(y) == 0:
            raise ValueError("y must be at least one label, got none")
        found: dict[str, float] = {}
        everything: list[float] = []
        for name, copies in self.copies(x, names).items():
            right = [(predict(copy).argmax(1) == y).double().mean().item() for copy in copies]
            found[name] = sum(right) / len(right)
            everything += right
        return {**found, "mean": sum(everything) / len(everything)}


def category_folds(names: Sequence[str], k: int = 2) -> list[list[str]]:
    """Kinds of augmentations in `k` folds, in turn.

    Raises:
        ValueError: `k` is below 2, or there are fewer kinds.

    Example:
        >>> category_folds(["blur", "color", "edges"], 2)
        [['blur', 'edges'], ['color']]
    """
    integer("k", k, 2)
    if k > len(names):
        raise ValueError(f"k must be at most {len(names)}, the kinds of augmentations, got {k}")
    return [list(names[start::k]) for start in range(k)]


@dataclass(frozen=True)
class ShiftSelection(Generic[C]):
    """What `kfold_shift_selection` found.

    Attributes:
        best: the candidate of the largest score.
        scores: of each candidate, the mean over all copies of kinds that it was not trained with.
        by_category: of each candidate, the accuracy under each kind.
    """

    best: C
    scores: list[float]
    by_category: list[dict[str, float]] = field(repr=False)


def kfold_shift_selection(
    candidates: Sequence[C],
    fit: Callable[[C, Categories], Predict],
    augmentations: Categories,
    x: Float[Tensor, "batch ..."],
    y: Int[Tensor, " batch"],
    *,
    k: int = 2,
    seed: int = 0,
) -> ShiftSelection[C]:
    """Chooses a candidate by kinds of augmentations that it was not trained with.

    Every candidate is trained once a fold, with the augmentations of all other folds, and scored on the fold's own.
    The winner is then to be trained with all of them.

    Args:
        candidates: settings, or whatever `fit` takes.
        fit: `(candidate, training augmentations) -> predict`.
        augmentations: kinds of augmentations and their members.
        x, y: validation samples, which `fit` must not see.
        k: number of folds of kinds.
        seed: of the augmented copies.

    Raises:
        ValueError: there is no candidate, `k` does not fit, or samples and labels do not.

    Example:
        >>> kinds = {"negative": [lambda x, generator: -x], "double": [lambda x, generator: 2 * x]}
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
        >>> found = kfold_shift_selection([1.0, -1.0], lambda sign, kinds: lambda x: sign * x.abs(), kinds, x, y)
        >>> found.best, found.scores
        (1.0, [1.0, 0.0])
    """
    if problem := real_problem(x=x):
        raise TypeError(problem)
    if not candidates:
        raise ValueError("candidates must be at least one, got none")
    validator = ShiftValidator(augmentations, seed)
    folds = category_folds(list(augmentations), k)
    sizes = {name: len(held) for name, held in validator.augmentations.items()}
    results: list[dict[str, float]] = []
    for candidate in candidates:
        found: dict[str, float] = {}
        for fold in folds:
            seen = {name: held for name, held in validator.augmentations.items() if name not in fold}
            scored = validator.score(fit(candidate, seen), x, y, fold)
            found |= {name: scored[name] for name in fold}
        results.append(found)
    total = sum(sizes.values())
    scores = [sum(sizes[name] * value for name, value in found.items()) / total for found in results]
    return ShiftSelection(candidates[max(range(len(scores)), key=scores.__getitem__)], scores, results)
