r"""How disentangled a representation is, where the true factors are known: InfoMEC, and MIG and DCI beside it.

With $\mathrm{NMI}_{ij} = I(s_i; z_j) / H(s_i)$ for sources $s$ and those latents $z$ that vary at all:

- modularity (InfoM): a latent tells of one source. The mean over latents of $\max_i / \sum_i$ of its column;
- compactness (InfoC): a source is told by one latent. The mean over sources of $\max_j / \sum_j$ of its row;
- explicitness (InfoE): a linear model reads the source off. The mean over sources of
  $(H_0 - H) / H_0$, the cross-entropies of logistic regression without the latents and with them.

The first two are rescaled so that what is spread evenly gives 0; all are 1 at best.

Reference: Hsu, Dorrell, Whittington, Wu and Finn, "Disentanglement via Latent Quantization", NeurIPS 2023,
arXiv 2305.18378, Section 4.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from numbers import Integral

import numpy as np
from jaxtyping import Bool, Float, Num
from numpy.typing import NDArray
from torch import Tensor

from trimtab.ops.arguments import finite_tensor, integer

_NEIGHBOURS = 10


@dataclass(frozen=True)
class InfoMEC:
    """What `infomec` finds.

    Attributes:
        modularity: InfoM.
        explicitness: InfoE; negative where a fit is worse than guessing.
        compactness: InfoC.
        nmi: normalised mutual information, of shape (sources, latents).
        active: the latents that count, of shape (latents,).
    """

    modularity: float
    explicitness: float
    compactness: float
    nmi: Float[NDArray[np.float64], "sources latents"]
    active: Bool[NDArray[np.bool_], " latents"]


def infomec(
    sources: Num[Tensor, "samples sources"],
    latents: Num[Tensor, "samples latents"],
    *,
    discrete: bool,
    random_state: int = 0,
) -> InfoMEC:
    """Modularity, explicitness and compactness of latents.

    Mutual information is counted for discrete latents, which on few samples is biased upwards, and estimated from 10
    nearest neighbours for continuous ones. A latent is active if it varies: a continuous one if its range is more than
    a twentieth of the largest. A latent that tells nothing of any source counts as spread evenly, and so does a source
    that no latent tells of; without active latents everything is 0.

    Args:
        sources: the true factors, each of several values.
        latents: the representation.
        discrete: whether the latents take few values, such as indices of a codebook.
        random_state: of the noise by which the neighbour estimate breaks ties.

    Raises:
        TypeError: if sources or latents are neither a tensor nor an array, or `random_state` is no integer.
        ValueError: if they are not matrices of as many rows, of at least two sources; a source is constant; a number
            is not finite; or there are no more than 10 samples for continuous latents.

    Example:
        >>> import torch
        >>> grid = torch.cartesian_prod(torch.arange(3), torch.arange(4))
        >>> found = infomec(grid, grid, discrete=True)
        >>> round(found.modularity, 4), round(found.compactness, 4), round(found.explicitness, 2)
        (1.0, 1.0, 1.0)
    """
    if not isinstance(random_state, int | Integral):
        raise TypeError(f"random_state must be an integer, got {random_state!r}")
    s, z = _matrices(sources, latents)
    if s.shape[1] < 2:
        raise ValueError(f"sources must be at least two, got {s.shape[1]}")
    if not discrete and len(s) <= _NEIGHBOURS:
        raise ValueError(f"sources must be more than {_NEIGHBOURS} samples for continuous latents, got {len(s)}")
    nmi = _mutual_information(s, z, discrete, random_state) / _entropies(s)[:, None]
    ranges = np.ptp(z, axis=0)
    active = ranges > (0.0 if discrete else ranges.max(initial=0.0) / 20)
    kept = nmi[:, active]
    if not active.any():
        return InfoMEC(0.0, 0.0, 0.0, nmi, active)
    return InfoMEC(_concentration(kept.T), _explicitness(s, z, discrete), _concentration(kept), nmi, active)


def mutual_information_gap(nmi: Float[NDArray[np.float64], "sources latents"]) -> float:
    """MIG: by how much the best latent of a source tells more of it than the second best, on average.

    Chen et al., "Isolating Sources of Disentanglement in Variational Autoencoders", NeurIPS 2018, arXiv 1802.04942.

    Args:
        nmi: what `infomec` returns.

    Raises:
        ValueError: if it is no matrix with at least two latents.

    Example:
        >>> round(mutual_information_gap(np.array([[0.9, 0.2, 0.0], [0.1, 0.1, 0.6]])), 4)
        0.6
    """
    found = finite_tensor("nmi", nmi, ndim=2).numpy()
    if found.shape[1] < 2:
        raise ValueError(f"nmi must be of at least two latents, got {found.shape[1]}")
    top = np.sort(found, axis=1)
    return float((top[:, -1] - top[:, -2]).mean())


@dataclass(frozen=True)
class DCI:
    """Disentanglement, completeness and informativeness (accuracy of the forests), each 1 at best."""

    disentanglement: float
    completeness: float
    informativeness: float


def dci(
    sources: Num[Tensor, "samples sources"],
    latents: Num[Tensor, "samples latents"],
    *,
    trees: int = 20,
    random_state: int = 0,
) -> DCI:
    """DCI, from the importances of latents in random forests that predict each source.

    Every split may choose among all latents, so that no tree is left with those that tell nothing. Informativeness is
    measured on the last quarter of the samples, which the forests do not see: shuffle before.
    Eastwood and Williams, "A Framework for the Quantitative Evaluation of Disentangled Representations", ICLR 2018.

    Args:
        sources: the true factors.
        latents: the representation.
        trees: in each forest.
        random_state: of the forests.

    Raises:
        TypeError: if an argument is neither a tensor nor an array.
        ValueError: if they are not matrices of as many rows, or a number is not finite.

    Example:
        >>> import torch
        >>> grid = torch.cartesian_prod(torch.arange(3), torch.arange(4)).repeat(8, 1)
        >>> found = dci(grid, grid)
        >>> round(found.disentanglement, 2), found.informativeness
        (1.0, 1.0)
    """
    from sklearn.ensemble import RandomForestClassifier

    s, z = _matrices(sources, latents)
    integer("trees", trees)
    cut = max(1, 3 * len(s) // 4)
    importance, right = np.empty((s.shape[1], z.shape[1])), []
    for i, source in enumerate(s.T):
        forest = RandomForestClassifier(trees, max_features=None, random_state=random_state)
        forest.fit(z[:cut], source[:cut])
        importance[i] = forest.feature_importances_
        right.append(float(np.mean(forest.predict(z[cut:]) == source[cut:])))
    weights = importance.sum(0) / max(importance.sum(), np.finfo(float).tiny)
    disentanglement = float((weights * _certainty(importance.T)).sum())
    return DCI(disentanglement, float(_certainty(importance).mean()), float(np.mean(right)))


def _matrices(sources: object, latents: object) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Sources as indices of their values, and latents as numbers."""
    s, z = finite_tensor("sources", sources, ndim=2), finite_tensor("latents", latents, ndim=2)
    if len(s) != len(z) or len(s) == 0:
        raise ValueError(f"latents must be as many samples as sources, at least 1, got {len(z)} and {len(s)}")
    if s.shape[1] == 0 or z.shape[1] == 0:
        raise ValueError(f"latents and sources must be at least one, got {z.shape[1]} and {s.shape[1]}")
    values = [np.unique(column, return_inverse=True)[1] for column in s.detach().cpu().numpy().T]
    for i, column in enumerate(values):
        if column.max() == 0:
            raise ValueError(f"sources must be of at least two values each, got a constant one at {i}")
    return np.stack(values, 1), z.detach().cpu().double().numpy()


def _entropies(s: NDArray[np.int64]) -> NDArray[np.float64]:
    shares = [np.bincount(column) / len(column) for column in s.T]
    return np.array([-(p[p > 0] * np.log(p[p > 0])).sum() for p in shares])


def _mutual_information(
    s: NDArray[np.int64], z: NDArray[np.float64], discrete: bool, random_state: int
) -> NDArray[np.float64]:
    from sklearn.feature_selection import mutual_info_classif
    from sklearn.metrics import mutual_info_score

    if discrete:
        return np.array([[mutual_info_score(source, latent) for latent in z.T] for source in s.T])
    spread = z.std(0)
    scaled = (z - z.mean(0)) / np.where(spread > 0, spread, 1.0)
    options = {"discrete_features": False, "n_neighbors": _NEIGHBOURS, "random_state": random_state}
    return np.stack([mutual_info_classif(scaled, source, **options) for source in s.T])


def _concentration(rows: NDArray[np.float64]) -> float:
    """Mean over rows of the largest share, rescaled from [1/n, 1] to [0, 1]."""
    count, total = rows.shape[1], rows.sum(1)
    if count == 1:
        return 1.0
    share = np.where(total > 0, rows.max(1) / np.where(total > 0, total, 1.0), 1 / count)
    return float((share.mean() - 1 / count) / (1 - 1 / count))


def _certainty(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 less the entropy of each row's shares, in units of the largest; 0 for a row of zeros."""
    count, total = rows.shape[1], rows.sum(1, keepdims=True)
    if count == 1:
        return np.ones(len(rows))
    shares = np.where(total > 0, rows / np.where(total > 0, total, 1.0), 1 / count)
    logs = np.log(np.where(shares > 0, shares, 1.0))
    return 1 + (shares * logs).sum(1) / np.log(count)  # type: ignore[no-any-return]


def _explicitness(s: NDArray[np.int64], z: NDArray[np.float64], discrete: bool) -> float:
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    inputs = OneHotEncoder().fit_transform(z) if discrete else StandardScaler().fit_transform(z)
    # A balanced logistic regression of nothing gives every class the same probability.
    without = np.log(s.max(0) + 1)
    given = np.array([_cross_entropy(inputs, source) for source in s.T])
    return float(((without - given) / without).mean())


def _cross_entropy(inputs: object, source: NDArray[np.int64]) -> float:
    """Of the classes given the inputs, by balanced logistic regression without a penalty."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    model = LogisticRegression(C=np.inf, class_weight="balanced", max_iter=100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # as many iterations as the authors give it
        model.fit(inputs, source)
    return float(log_loss(source, model.predict_proba(inputs)))
