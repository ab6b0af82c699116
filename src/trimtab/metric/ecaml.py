r"""Energy confusion: a small term that draws classes together, so that a metric loss finds more than the easiest cue.

Add it to a metric loss (triplet, N-pair, binomial deviance) when the embedding will retrieve or cluster classes that
training has not seen. The metric loss pushes classes apart, the confusion pulls every pair of classes together, and
the two are minimised at once: adversarial without a discriminator.

$$
L = L_{\mathrm{metric}} + \lambda \, \frac{2}{C (C - 1)} \sum_{I < J}
\mathbb{E}_{x \in I, \, x' \in J} \, \lVert f(x) - f(x') \rVert^2, \qquad
\mathbb{E} \, \lVert f(x) - f(x') \rVert^2 = \lVert \mu_I - \mu_J \rVert^2 + \operatorname{tr} \Sigma_I
+ \operatorname{tr} \Sigma_J
$$

with $\mu, \Sigma$ the means and population covariances of the classes in a batch of C classes. The second form makes
the term linear in the batch.

Reference: Binghui Chen, Weihong Deng, "Energy Confused Adversarial Metric Learning for Zero-Shot Image Retrieval and
Clustering", AAAI 2019, arXiv 1901.07169. The defaults here are the paper's formula, on all layers. The release
(chenbinghui1/ECAML) differs: it minimises the logarithm of the mean (`log=True`) over ten random partners per sample,
with a weight of 0.13 on Cars196, and lets it change the embedding layer alone, not the layers below (see `ECAMLLoss`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.metric.pairs import checked_embeddings
from trimtab.ops.arguments import assured, integer, looked_at, non_negative, tensor

# Sums over a batch of squares of this stay far from the largest float32.
_LARGEST = 1e15


def energy_confusion(
    embeddings: Float[Tensor, "batch dim"],
    labels: Int[Tensor, " batch"],
    *,
    squared: bool = True,
    normalize: bool = False,
    log: bool = False,
    class_pairs: Int[Tensor, "pairs 2"] | None = None,
) -> Float[Tensor, ""]:
    """The confusion of a batch (equation in the module's docstring), other arguments as in `EnergyConfusion`.

    Args:
        embeddings: one row per sample.
        labels: classes. With a single class in the batch the result is 0, and has a (zero) gradient.
        class_pairs: the pairs to average over, as from `random_class_pairs`: positions in the ascending order of the
            batch's classes. All pairs, each once, without it.

    Raises:
        TypeError: if `embeddings` is not floating point or `labels` not of integer type.
        ValueError: if shapes disagree, the batch is empty, a position is out of range, or the embeddings are so large
            that their squared distances overflow; with `log=True` any finite ones will do.

    Example:
        >>> points = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 3.0]])
        >>> energy_confusion(points, torch.tensor([0, 0, 1]))  # both squared distances are 1 + 9
        tensor(10.)
    """
    embeddings = checked_embeddings(embeddings, labels)
    if class_pairs is not None and (class_pairs.ndim != 2 or class_pairs.shape[1] != 2 or len(class_pairs) == 0):
        raise ValueError(f"class_pairs must be (pairs, 2), and not empty, got shape {tuple(class_pairs.shape)}")
    if normalize:
        embeddings = F.normalize(embeddings, dim=1)
    position, num_classes = _class_positions(labels)
    if class_pairs is not None:
        assured(
            (class_pairs >= 0) & (class_pairs < num_classes),
            "class_pairs must be positions of the batch's classes in ascending order, got others",
        )
    size = torch.zeros_like(embeddings[:, 0]).index_add(0, position, torch.ones_like(embeddings[:, 0]))
    largest = embeddings.detach().abs().amax()
    unit = torch.where(largest > _LARGEST, largest, 1.0)  # larger embeddings would overflow on the way
    if not looked_at(unit) or unit != 1:
        embeddings = embeddings / unit
    energy = (_mean_squared_distance if squared else _mean_distance)(embeddings, position, size, class_pairs)
    degree = 2 if squared else 1
    if log:
        value = energy.clamp(min=torch.finfo(energy.dtype).tiny).log() + degree * unit.log()
    else:
        value = energy * unit**degree
        assured(
            value.isfinite() | ~largest.isfinite(),
            f"embeddings must have {'squared ' if squared else ''}distances that fit {value.dtype}, got larger ones",
        )
    return torch.where(num_classes > 1, value, 0.0 * energy)


def random_class_pairs(
    labels: Int[Tensor, " batch"], num_pairs: int, *, generator: torch.Generator | None = None
) -> Int[Tensor, "pairs 2"]:
    """Pairs of different classes, drawn uniformly and independently.

    Args:
        labels: the batch's classes.
        num_pairs: number of pairs.
        generator: source of the draws, on the labels' device; torch's global one where it is None.

    Returns:
        Classes as positions in the ascending order of the batch's classes.

    Raises:
        TypeError: if `labels` is not of integer type.
        ValueError: if `num_pairs` is below 1, or `labels` is no vector, or empty.

    Example:
        >>> random_class_pairs(torch.tensor([3, 3, 7]), 2, generator=torch.Generator().manual_seed(0)).sort().values
        tensor([[0, 1],
                [0, 1]])
    """
    labels, num_pairs = tensor("labels", labels), integer("num_pairs", num_pairs)
    if labels.ndim != 1 or len(labels) == 0:
        raise ValueError(f"labels must be (batch,), not empty, got shape {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    _, num_classes = _class_positions(labels)
    draw = torch.rand(2, num_pairs, generator=generator, device=labels.device, dtype=torch.float64)
    first = (draw[0] * num_classes).long()
    step = 1 + (draw[1] * (num_classes - 1)).long()
    return torch.stack([first, (first + step) % num_classes], dim=1)


class EnergyConfusion(nn.Module):
    """The confusion as a module, called `confusion(embeddings, labels)`.

    Args:
        num_pairs: average over so many random pairs of classes instead of all; all cost no more.
        squared: squared distances, in time linear in the batch. Plain ones, whose mean is at least half the energy
            distance between two classes, take time and memory quadratic in the batch.
        normalize: distances between normalised embeddings, which suits a metric loss that normalises: without it, the
            embeddings may shrink at no cost to that loss.
        log: the logarithm of the mean, as the authors' release has it and the paper's formula does not. The gradient
            then follows the embeddings' scale as that of a metric loss that normalises does.
        generator: source of the random pairs, on the labels' device.

    Raises:
        ValueError: if `num_pairs` is below 1.

    Example:
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.0, 4.0]], requires_grad=True)
        >>> EnergyConfusion(normalize=True)(embeddings, torch.tensor([0, 1])).item()
        2.0
    """

    def __init__(
        self,
        num_pairs: int | None = None,
        squared: bool = True,
        normalize: bool = False,
        *,
        log: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.num_pairs = None if num_pairs is None else integer("num_pairs", num_pairs)
        self.squared, self.normalize, self.log = squared, normalize, log
        self.generator = generator

    def forward(
        self,
        embeddings: Float[Tensor, "batch dim"],
        labels: Int[Tensor, " batch"],
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Float[Tensor, "refs dim"] | None = None,
        ref_labels: Int[Tensor, " refs"] | None = None,
    ) -> Float[Tensor, ""]:
        """The confusion of a batch.

        Args:
            embeddings: one row per sample.
            labels: classes.
            indices_tuple, ref_emb, ref_labels: what pytorch-metric-learning passes, taken so that the term is called
                like others. It is an expectation over whole classes of the batch: mined pairs would bias it.
        """
        pairs = None
        if self.num_pairs is not None:
            checked_embeddings(embeddings, labels)
            pairs = random_class_pairs(labels, self.num_pairs, generator=self.generator)
        return energy_confusion(
            embeddings, labels, squared=self.squared, normalize=self.normalize, log=self.log, class_pairs=pairs
        )

    def extra_repr(self) -> str:
        return f"num_pairs={self.num_pairs}, squared={self.squared}, normalize={self.normalize}, log={self.log}"


class ECAMLLoss(nn.Module):
    """A metric loss together with the energy confusion: `base + weight * confusion`.

    By default both change all parameters, and the confusion is the paper's formula. In the authors' release it changes
    the embedding layer alone, and is the logarithm, with a weight of 0.13 on Cars196; for that, pass embeddings that
    the layer makes from detached features, as in the example, and `confusion=EnergyConfusion(log=True)`.

    Args:
        base: the metric loss, called `base(embeddings, labels)`, for instance one of pytorch-metric-learning; what its
            miners and memories pass goes to the base.
        weight: lambda, at least 0; of the order of 0.01 to 0.1, to be chosen on classes held out of training.
        confusion: the term; `EnergyConfusion()` by default.

    Raises:
        ValueError: if `weight` is negative or not finite.

    Example:
        >>> from trimtab.metric import BinomialDevianceLoss
        >>> loss = ECAMLLoss(BinomialDevianceLoss(), weight=0.05)
        >>> features, layer, labels = torch.randn(8, 5, requires_grad=True), nn.Linear(5, 3), torch.arange(8) % 4
        >>> value = loss(layer(features), labels)  # the confusion changes everything
        >>> value = loss(layer(features), labels, confused=layer(features.detach()))  # the embedding layer alone
        >>> value.backward()
    """

    def __init__(self, base: nn.Module, weight: float = 0.05, confusion: nn.Module | None = None) -> None:
        super().__init__()
        self.base = base
        self.weight = non_negative("weight", weight)
        self.confusion = EnergyConfusion() if confusion is None else confusion

    def forward(
        self,
        embeddings: Float[Tensor, "batch dim"],
        labels: Int[Tensor, " batch"],
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Float[Tensor, "refs dim"] | None = None,
        ref_labels: Int[Tensor, " refs"] | None = None,
        *,
        confused: Float[Tensor, "batch dim"] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss of a batch.

        Args:
            embeddings: one row per sample.
            labels: classes.
            indices_tuple, ref_emb, ref_labels: what the miners, CrossBatchMemory and trainers of
                pytorch-metric-learning pass, for the base; the confusion is that of the whole batch.
            confused: the embeddings that the confusion acts on; `embeddings` by default.

        Raises:
            ValueError: if `confused` has another shape than `embeddings`.
        """
        checked_embeddings(embeddings, labels)
        if confused is not None and confused.shape != embeddings.shape:
            raise ValueError(f"confused must be of shape {tuple(embeddings.shape)}, got {tuple(confused.shape)}")
        given = {"indices_tuple": indices_tuple, "ref_emb": ref_emb, "ref_labels": ref_labels}
        passed = {name: part for name, part in given.items() if part is not None}
        value: Tensor = self.base(embeddings, labels, **passed)
        if self.weight:
            value = value + self.weight * self.confusion(embeddings if confused is None else confused, labels)
        return value

    def extra_repr(self) -> str:
        return f"weight={self.weight:g}"


def _class_positions(labels: Int[Tensor, " batch"]) -> tuple[Int[Tensor, " batch"], Int[Tensor, ""]]:
    """Each sample's class as a position among the batch's classes in ascending order, and their number.

    As `torch.unique` with its inverse, but without a size that depends on values, for which a device would wait.
    """
    ordered, order = labels.sort()
    rank = F.pad((ordered[1:] != ordered[:-1]).cumsum(0), (1, 0))
    return torch.empty_like(rank).scatter(0, order, rank), rank[-1] + 1


def _mean_squared_distance(x: Tensor, position: Tensor, size: Tensor, pairs: Tensor | None) -> Tensor:
    """By the classes' means and variances; rows of `size` beyond the last class are empty and weigh nothing."""
    mean = torch.zeros_like(x).index_add_(0, position, x) / size.clamp(min=1)[:, None]
    spread = (x - mean.index_select(0, position)).square().sum(1)
    variance = torch.zeros_like(size).index_add(0, position, spread) / size.clamp(min=1)
    if pairs is not None:
        first, second = pairs.T
        return ((mean[first] - mean[second]).square().sum(1) + variance[first] + variance[second]).mean()
    present = (size > 0).to(x)
    num_classes = present.sum()
    centre = mean.sum(0) / num_classes
    # The squared distances between C points sum to C times those from their mean, each pair once.
    between = (present * (mean - centre).square().sum(1)).sum() * 2 / (num_classes - 1).clamp(min=1)
    return between + variance.sum() * 2 / num_classes


def _mean_distance(x: Tensor, position: Tensor, size: Tensor, pairs: Tensor | None) -> Tensor:
    # Differences and not products of vectors, whose rounding a square root would magnify near zero.
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    summed = torch.zeros_like(distance).index_add(0, position, distance)
    summed = torch.zeros_like(distance).index_add(1, position, summed)
    mean = summed / (size[:, None] * size).clamp(min=1)
    if pairs is not None:
        first, second = pairs.T
        return mean[first, second].mean()
    num_classes = (size > 0).sum()
    return mean.triu(1).sum() * 2 / (num_classes * (num_classes - 1)).clamp(min=1)
