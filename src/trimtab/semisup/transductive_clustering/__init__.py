r"""Transductive few-shot classification as clustering: centres, a graph of neighbours, and the labels that are known.

Where a few labelled samples and all queries of a task are at hand together, K-means that starts from the labelled ones
is already strong; neighbours that prefer the same class make it stronger. With assignments $y_i$ in the simplex,

$$
\min_{Y, C}\ \sum_{i k} y_{i k}\, a_k(x_i) - \frac{\lambda}{2} \sum_{i j} w_{i j}\, y_i^\top y_j
+ \sum_{i k} y_{i k} \log y_{i k},
\qquad a_k(x) = \lVert x - c_k \rVert^2 \ \text{ or } \ -e^{-\lVert x - c_k \rVert^2 / 2 \sigma^2},
$$

and a concave-convex bound splits the work into one softmax per sample, all in parallel from the assignments before:

$$
y_i \propto \exp \Bigl( -a(x_i) + \lambda \sum_j w_{i j}\, y_j \Bigr) .
$$

Squared distances with means for centres are SLK-Means, kernels with modes SLK-MS, with the most certain sample SLK-BO;
without neighbours ($\lambda = 0$) they are K-means and K-modes. `slk` clusters, with or without labels;
`TransductiveClusterer` solves an episode of support and queries by it; `laplacian_shot` is the authors' earlier rule
with fixed prototypes. Features are best centred and normalised (`center_normalize`), as lambda has their unit.

The energy that falls for a semidefinite graph has half of lambda, as above; the authors print it with the whole. They
set the support's labels only at the start of each bound update, which is `clamp="init"` here.

Reference: Imtiaz Masud Ziko, Malik Boudiaf, Jose Dolz, Eric Granger and Ismail Ben Ayed, "Transductive Few-Shot
Learning: Clustering is All You Need?", 2021, arXiv 2106.09516; and "Laplacian Regularized Few-Shot Learning", ICML
2020, arXiv 2006.15486.
"""

from trimtab.semisup.transductive_clustering.clustering import BoundUpdate, SLKResult, laplacian_bound_update, slk
from trimtab.semisup.transductive_clustering.few_shot import (
    TransductiveClusterer,
    center_normalize,
    laplacian_shot,
    rectify_prototypes,
    shift_queries,
)

__all__ = [
    "BoundUpdate",
    "SLKResult",
    "TransductiveClusterer",
    "center_normalize",
    "laplacian_bound_update",
    "laplacian_shot",
    "rectify_prototypes",
    "shift_queries",
    "slk",
]
