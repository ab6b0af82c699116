r"""How well a clustering agrees with classes, however the clusters are named and however many there are.

$$
\mathrm{ACC} = \max_{\pi} \frac{1}{n} \sum_i [\,\pi(c_i) = y_i\,], \qquad
\mathrm{NMI} = \frac{2\, I(c; y)}{H(c) + H(y)}, \qquad
\mathrm{ARI} = \frac{\sum_{kl} \binom{n_{kl}}{2} - E}{\tfrac12 (A + B) - E}
$$

where $\pi$ gives every cluster a class of its own (the Hungarian method finds the best), $n_{kl}$ counts the samples of
cluster $k$ and class $l$, $A = \sum_k \binom{n_k}{2}$ and $B = \sum_l \binom{n_l}{2}$ count the pairs within clusters
and within classes, and $E = A B / \binom{n}{2}$ is what chance would bring.

Reference: H. W. Kuhn, "The Hungarian method for the assignment problem", 1955; Hubert and Arabie, "Comparing
partitions", Journal of Classification 1985.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from trimtab.ops.arguments import tensor


def matched_classes(classes: Int[Tensor, " n"], clusters: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The class that each sample's cluster stands for under the best one-to-one match, -1 where it stands for none.

    The match is the one that puts the most samples right. Where there are more clusters than classes, the rest of the
    clusters stand for none; where there are fewer, some classes are never named.

    Args:
        classes: true classes; any integers, in a tensor or an array.
        clusters: names of clusters; any integers.

    Raises:
        TypeError: an argument is not made of integers.
        ValueError: the two are not vectors of one length, or are empty.

    Example:
        >>> matched_classes(torch.tensor([4, 4, 4, 7, 7]), torch.tensor([1, 1, 0, 0, 2]))
        tensor([ 4,  4,  7,  7, -1])
    """
    from scipy.optimize import linear_sum_assignment

    counts, names, which = _contingency(classes, clusters)
    rows, columns = linear_sum_assignment(-counts.numpy())
    found = torch.full((len(counts),), -1)
    found[torch.from_numpy(rows)] = names[torch.from_numpy(columns)]
    return found[which]


def cluster_accuracy(classes: Int[Tensor, " n"], clusters: Int[Tensor, " n"], *, balanced: bool = False) -> float:
    """Share of samples whose cluster stands for their class, under the best one-to-one match.

    Args:
        classes: true classes; any integers, in a tensor or an array.
        clusters: names of clusters; any integers.
        balanced: the mean over the classes of the share in each, so that large classes do not outweigh small ones. The
            match stays the one that is best for all samples.

    Returns:
        The accuracy, in (0, 1].

    Raises:
        TypeError: an argument is not made of integers.
        ValueError: the two are not vectors of one length, or are empty.

    Example:
        >>> classes, clusters = torch.tensor([0, 0, 0, 1]), torch.tensor([5, 5, 3, 3])
        >>> cluster_accuracy(classes, clusters)
        0.75
        >>> round(cluster_accuracy(classes, clusters, balanced=True), 4)
        0.8333
    """
    found = matched_classes(classes, clusters)
    names, of = torch.as_tensor(classes).cpu().unique(return_inverse=True)
    right = (found == names[of]).double()
    if not balanced:
        return float(right.mean())
    return float((torch.bincount(of, right) / torch.bincount(of)).mean())


def nmi(classes: Int[Tensor, " n"], clusters: Int[Tensor, " n"]) -> float:
    """Mutual information of clusters and classes over the mean of their entropies; 1 where neither has more than one.

    Returns:
        The score, in [0, 1].

    Raises:
        TypeError: an argument is not made of integers.
        ValueError: the two are not vectors of one length, or are empty.

    Example:
        >>> nmi(torch.tensor([0, 0, 1, 1]), torch.tensor([7, 7, 2, 2]))
        1.0
    """
    joint = _contingency(classes, clusters)[0].double()
    joint = joint / joint.sum()
    rows, columns, both = (_entropy(share) for share in (joint.sum(1), joint.sum(0), joint))
    if float(rows + columns) == 0:
        return 1.0
    return float((2 * (rows + columns - both) / (rows + columns)).clamp(0, 1))


def ari(classes: Int[Tensor, " n"], clusters: Int[Tensor, " n"]) -> float:
    """The adjusted Rand index: pairs on which both agree, 0 on average for clusters drawn at random and at most 1.

    Raises:
        TypeError: an argument is not made of integers.
        ValueError: the two are not vectors of one length, or are empty.

    Example:
        >>> ari(torch.tensor([0, 0, 1, 1]), torch.tensor([7, 7, 2, 2]))
        1.0
        >>> round(ari(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])), 6)
        -0.5
    """
    counts = _contingency(classes, clusters)[0].double()
    together, rows, columns, everything = (_pairs(n) for n in (counts, counts.sum(1), counts.sum(0), counts.sum()))
    if float(rows) == float(columns) and float(rows) in (0.0, float(everything)):
        return 1.0  # one cluster and one class, or every sample by itself in both
    chance = rows * columns / everything
    return float((together - chance) / ((rows + columns) / 2 - chance))


def _contingency(classes: Tensor, clusters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Samples of each cluster (rows) and class (columns), the classes' names, and each sample's row."""
    read = []
    for name, value in (("classes", classes), ("clusters", clusters)):
        found = tensor(name, value, ndim=1).detach().cpu()
        if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
            raise TypeError(f"{name} must be integers, got {found.dtype}")
        read.append(found.long())
    if not 0 < len(read[0]) == len(read[1]):
        raise ValueError(
            f"classes and clusters must be as many, at least one, got {len(read[0])} classes and "
            f"{len(read[1])} clusters"
        )
    names, column = read[0].unique(return_inverse=True)
    others, row = read[1].unique(return_inverse=True)
    counts = torch.bincount(row * len(names) + column, minlength=len(others) * len(names))
    return counts.view(len(others), len(names)), names, row


def _entropy(shares: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(shares).sum()
    return entropy


def _pairs(counts: Tensor) -> Tensor:
    return (counts * (counts - 1) / 2).sum()
