r"""USEFUL: train a little, repeat the examples that are learned slowly once, and train again from scratch.

Early in training, examples that hold an easily learned feature stand apart in a network's outputs. Repeating the others
makes gradient descent learn easy and hard features at more even speed, as SAM does. It changes the data alone, so it
goes with any optimizer, augmentation and architecture.

$$
(C_{c,1}, C_{c,2}) = \operatorname{2\text{-}means}\{f(x_i; \theta_t) : y_i = c\}, \qquad
S_c = \arg\max_{C \in \{C_{c,1}, C_{c,2}\}} \frac{1}{|C|} \sum_{i \in C} \ell_i(\theta_t), \qquad
D' = D \uplus \textstyle\biguplus_c S_c
$$

Reference: Dang Nguyen, Paymon Haddad, Eric Gan, Baharan Mirzasoleiman, "Changing the Training Data Distribution to
Reduce Simplicity Bias Improves In-distribution Generalization", NeurIPS 2024, arXiv 2404.17768.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Self, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from trimtab.ops.arguments import integer, tensor_problem

T = TypeVar("T")


class EarlyOutputs(NamedTuple):
    """What a network says of each training example, in the data's order: the arguments of `USEFUL.fit`."""

    outputs: Float[Tensor, "samples classes"]
    labels: Int[Tensor, " samples"]
    losses: Float[Tensor, " samples"]


@torch.no_grad()
def collect_outputs(model: nn.Module, loader: Iterable[Sequence[Any]]) -> EarlyOutputs:
    """Logits, labels and cross-entropies of all examples, in eval mode; the modules' modes are left as they were.

    Args:
        model: maps a batch to logits.
        loader: yields batches that end in inputs and labels, in the data's order and without augmentation.

    Returns:
        Tensors on the CPU, in the loader's order.

    Raises:
        ValueError: the loader shuffles, drops the last batch, or holds nothing.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.eye(3), torch.tensor([0, 1, 2]))
        >>> collect_outputs(nn.Identity(), DataLoader(data, batch_size=2)).losses
        tensor([0.5514, 0.5514, 0.5514])
    """
    if isinstance(loader, DataLoader):
        samplers = (loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
        if any(isinstance(sampler, _SHUFFLING) for sampler in samplers):
            raise ValueError("loader must keep the data's order (shuffle=False), got one that shuffles")
        if getattr(loader.batch_sampler, "drop_last", False):
            raise ValueError("loader must hold all examples (drop_last=False), got one that drops the last")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        batches = [(model(x.to(device)).float().cpu(), y.cpu()) for *_, x, y in loader]
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not batches:
        raise ValueError("loader must hold a batch, got none")
    outputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return EarlyOutputs(outputs, labels, F.cross_entropy(outputs, labels, reduction="none"))


def find_separating_epoch(train_errors: Sequence[float]) -> int:
    """How long to train before outputs are collected: until the training error stops falling steeply.

    This is the elbow of the curve, the point farthest below the line from the first error to the last, after which the
    error falls more slowly than it does on average. The paper comes to 5 to 10 % of the training.

    Args:
        train_errors: the error (or loss) before training and after each epoch, at least three in all.

    Returns:
        The number of epochs.

    Raises:
        ValueError: there are too few errors, one is not finite, or the curve has no elbow.

    Example:
        >>> find_separating_epoch([0.9, 0.5, 0.2, 0.18, 0.16, 0.14])
        2
    """
    errors = torch.as_tensor(train_errors, dtype=torch.float64)
    if errors.ndim != 1 or len(errors) < 3 or not errors.isfinite().all():
        raise ValueError(f"train_errors must be at least three finite numbers, got {train_errors}")
    depth = torch.lerp(errors[0], errors[-1], torch.linspace(0, 1, len(errors), dtype=torch.float64)) - errors
    # Rounding leaves a straight line a depth of its own.
    if depth.max() <= 1e-9 * errors.abs().max():
        raise ValueError(f"train_errors must fall steeply first and slowly later, got {train_errors}")
    return int(depth.argmax())


class UpsampledSampler(Sampler[int]):
    """Shuffled passes over indices that may repeat, for `DataLoader(dataset, sampler=...)`.

    After `set_epoch(epoch)` the next pass depends on the generator's seed and the epoch alone, so that a resumed
    training sees what it would have seen; without it, each pass draws from the generator.

    Args:
        indices: positions in the dataset.
        num_samples: length of a pass, taken from its shuffled beginning; all of the indices by default. The size of
            the dataset keeps the number of iterations that training had without repeated examples.
        generator: source of the order, on the CPU; torch's global one by default.

    Raises:
        TypeError: `indices` is not of integer type.
        ValueError: `indices` is empty or holds negative ones, or `num_samples` is not between 1 and the number of
            indices.

    Example:
        >>> sorted(UpsampledSampler(torch.tensor([0, 1, 1, 2])))
        [0, 1, 1, 2]
    """

    def __init__(
        self,
        indices: Int[Tensor, " n"],
        num_samples: int | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        if problem := tensor_problem(indices=indices):
            raise TypeError(problem)
        if indices.ndim != 1 or not len(indices):
            raise ValueError(f"indices must have shape (n,) and not be empty, got shape {tuple(indices.shape)}")
        if indices.is_floating_point() or indices.dtype == torch.bool:
            raise TypeError(f"indices must be integers, got {indices.dtype}")
        if int(indices.min()) < 0:
            raise ValueError(f"indices must be at least 0, got {int(indices.min())}")
        if num_samples is not None:
            integer("num_samples", num_samples, 1, len(indices))
        self.indices = indices
        self.num_samples = len(indices) if num_samples is None else num_samples
        self.generator = generator
        self._epoch: int | None = None

    def set_epoch(self, epoch: int) -> None:
        """Fix the order of the next pass by this epoch.

        Raises:
            TypeError: `epoch` is no integer.
            ValueError: `epoch` is negative.
        """
        self._epoch = integer("epoch", epoch, 0)

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        generator = self.generator
        if self._epoch is not None:
            seed = torch.initial_seed() if generator is None else generator.initial_seed()
            generator = torch.Generator().manual_seed((seed + self._epoch) % 2**63)
        order = torch.randperm(len(self.indices), generator=generator)[: self.num_samples]
        yield from self.indices[order].tolist()


_SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler, UpsampledSampler)


class USEFUL:
    """Finds the examples of each class that are learned slowly, and repeats them (Algorithm 1).

    A class's outputs are clustered; the cluster of the lowest mean loss is learned fast, the rest is repeated. Then
    train a new network on `sampler()` or `subset(dataset)`.

    Args:
        n_clusters: clusters of a class, at least 2.
        factor: how often a slowly learned example stands in the new data, at least 1; 1 changes nothing.
        n_init: restarts of k-means.
        random_state: seed of k-means.

    Attributes:
        slow_mask_: which examples are repeated, shape `(samples,)`.
        indices_: positions in the dataset of what to train on, ascending, those of slow examples `factor` times.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> outputs = torch.tensor([[3.0, 0.0], [3.1, 0.0], [0.1, 0.0], [0.0, 2.0], [0.0, 2.1], [0.0, 9.0]])
        >>> labels = torch.tensor([0, 0, 0, 1, 1, 1])
        >>> USEFUL().fit(outputs, labels, F.cross_entropy(outputs, labels, reduction="none")).indices_
        tensor([0, 1, 2, 2, 3, 3, 4, 4, 5])
    """

    slow_mask_: Bool[Tensor, " samples"]
    indices_: Int[Tensor, " upsampled"]

    def __init__(self, n_clusters: int = 2, factor: int = 2, *, n_init: int = 10, random_state: int = 0) -> None:
        integer("n_clusters", n_clusters, 2)
        integer("factor", factor)
        integer("n_init", n_init)
        self.n_clusters = n_clusters
        self.factor = factor
        self.n_init = n_init
        self.random_state = random_state

    def fit(
        self,
        outputs: Float[Tensor, "samples features"],
        labels: Int[Tensor, " samples"],
        losses: Float[Tensor, " samples"],
    ) -> Self:
        """Cluster the outputs of each class.

        A class whose outputs are all equal is left as it is, with a warning.

        Args:
            outputs: what the network says of each example early in training (`collect_outputs`): logits,
                probabilities or features.
            labels: classes of the examples.
            losses: training losses of the examples.

        Raises:
            TypeError: `labels` is not of integer type.
            ValueError: lengths differ, a value is not finite, or a class has fewer than `n_clusters` examples.
        """
        from sklearn.cluster import KMeans  # takes a second to import

        outputs, labels, losses = (torch.as_tensor(values).detach().cpu() for values in (outputs, labels, losses))
        self._check(outputs, labels, losses)
        rows = (outputs if outputs.dtype == torch.float64 else outputs.float()).numpy()
        slow = torch.zeros(len(labels), dtype=torch.bool)
        for label in labels.unique():
            members = torch.nonzero(labels == label).flatten()
            points = rows[members.numpy()]
            if (points == points[:1]).all():
                warnings.warn(f"USEFUL: class {label} is not repeated, its outputs are all equal", stacklevel=2)
                continue
            kmeans = KMeans(self.n_clusters, n_init=self.n_init, random_state=self.random_state)
            clusters = torch.from_numpy(kmeans.fit_predict(points)).long()
            sums = torch.zeros(self.n_clusters, dtype=torch.float64).index_add_(0, clusters, losses[members].double())
            # A cluster without members has a mean of 0 / 0 and must not be taken for the fastest.
            fast = (sums / clusters.bincount(minlength=self.n_clusters)).nan_to_num(torch.inf).argmin()
            slow[members] = clusters != fast
        self.slow_mask_ = slow
        self.indices_ = torch.arange(len(labels)).repeat_interleave(torch.where(slow, self.factor, 1))
        return self

    def _check(self, outputs: Tensor, labels: Tensor, losses: Tensor) -> None:
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"labels must be integers, got {labels.dtype}")
        if outputs.ndim != 2 or not outputs.numel():
            raise ValueError(f"outputs must have shape (samples, features) and entries, got {tuple(outputs.shape)}")
        for name, values in (("labels", labels), ("losses", losses)):
            if values.shape != outputs.shape[:1]:
                raise ValueError(
                    f"{name} must have shape ({len(outputs)},) as outputs has it, got {tuple(values.shape)}"
                )
        for name, values in (("outputs", outputs), ("losses", losses)):
            if values.is_complex():
                raise TypeError(f"{name} must be real, got {values.dtype}")
            if not values.isfinite().all():
                raise ValueError(f"{name} must be finite, got NaN or infinity")
        classes, counts = labels.unique(return_counts=True)
        if counts.min() < self.n_clusters:
            few = classes[counts.argmin()]
            raise ValueError(
                f"labels must have at least {self.n_clusters} examples of each class, got {counts.min()} of class {few}"
            )

    def sampler(self, num_samples: int | None = None, *, generator: torch.Generator | None = None) -> UpsampledSampler:
        """A sampler over the new data, for `DataLoader(dataset, sampler=...)`; see `UpsampledSampler`."""
        return UpsampledSampler(self._fitted(), num_samples, generator=generator)

    def subset(self, dataset: Dataset[T]) -> Subset[T]:
        """The new data as a dataset, also for `DistributedSampler`."""
        return Subset(dataset, self._fitted().tolist())

    def _fitted(self) -> Int[Tensor, " upsampled"]:
        if not hasattr(self, "indices_"):
            raise RuntimeError("call fit(outputs, labels, losses) first")
        return self.indices_
