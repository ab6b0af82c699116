"""How far an estimated directed graph is from the true one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Shaped
from numpy.typing import ArrayLike

from trimtab.solvers.acyclicity import check_weights


@dataclass(frozen=True)
class GraphDistance:
    """Counts and rates of one comparison.

    Attributes:
        shd: structural Hamming distance: pairs of nodes joined in one graph only, or in opposite directions. An
            estimate with edges in both directions where the truth has one counts once.
        tpr: share of the true edges found in the right direction; 1 where there are none.
        fdr: share of the estimated edges that are not true, reversed ones included; 0 where there are none.
        num_edges: of the estimate.
    """

    shd: int
    tpr: float
    fdr: float
    num_edges: int


def graph_distance(estimate: Shaped[ArrayLike, "d d"], truth: Shaped[ArrayLike, "d d"]) -> GraphDistance:
    """Compares the non-zero entries of two matrices, where entry (i, j) is the edge from i to j.

    Raises:
        ValueError: an argument is no finite square matrix, or their shapes differ.

    Example:
        >>> graph_distance([[0, 1, 1], [0, 0, 0], [0, 0, 0]], [[0, 1, 0], [0, 0, 1], [1, 0, 0]])
        GraphDistance(shd=2, tpr=0.3333333333333333, fdr=0.5, num_edges=2)
    """
    guessed, true = check_weights(estimate, "estimate") != 0, check_weights(truth, "truth") != 0
    if guessed.shape != true.shape:
        raise ValueError(f"truth must be of shape {guessed.shape} as estimate, got shape {true.shape}")
    differs = guessed != true
    hits, num_edges, num_true = int((guessed & true).sum()), int(guessed.sum()), int(true.sum())
    return GraphDistance(
        shd=int(np.triu(differs | differs.T).sum()),
        tpr=hits / num_true if num_true else 1.0,
        fdr=1 - hits / num_edges if num_edges else 0.0,
        num_edges=num_edges,
    )
