r"""Private-GSD: synthetic tables under differential privacy, by a genetic search for rows that fit noisy statistics.

For a table that must stay private while its statistics may be published, above all where these are no smooth functions
of the rows (prefix, range and halfspace queries, any of your own), so that no gradient leads to a table that has them.

The statistics of the private table are measured once, with Gaussian noise: for $m$ workloads and a budget of $\rho$,

$$
\hat q = q(D) + \mathcal{N}\left(0, \frac{\Delta_q^2}{2 \rho / m}\right), \qquad
\min_{D'}\ f(D') = \sum_q \left(\hat q - q(D')\right)^2
$$

The search keeps one table $D'$. In every generation an operator proposes a population of edits of one or two rows, each
scored by what it changes (`row_statistics`), and the best is made if it lowers $f$:

* mutate: a random value in one column of a row; columns take turns, those with many values oftener;
* continuous: a value between two neighbouring quantiles of the column instead;
* swap: two rows exchange their values of a column, which leaves the column's own distribution as it is;
* crossover: one or two categorical columns of a row are copied from another.

Which operator is next is drawn with $p = 0.95\, w + 0.05 / K$; an operator's success multiplies its weight $w_i$ by
$\exp(0.1 / p_i)$. The search stops where $f$ falls by less than a share `tol` in as many generations as there are rows.

Reference: Terrance Liu, Jingwu Tang, Giuseppe Vietri and Steven Wu, "Generating Private Synthetic Data with Genetic
Algorithms", ICML 2023, arXiv 2306.03257.

The continuous and swap operators, the choice among operators and the cut of real columns at private quantiles are those
of the authors' release, which leaves out queries with low noisy counts; here every query counts.
"""

from trimtab.solvers.private_gsd.accounting import delta_from_rho, gaussian_sigma, rho_from_epsilon_delta
from trimtab.solvers.private_gsd.domain import Domain, Table
from trimtab.solvers.private_gsd.estimator import PrivateGSD
from trimtab.solvers.private_gsd.measurements import noisy_answers, private_quantiles
from trimtab.solvers.private_gsd.operators import between_quantiles, crossover, mutate, random_rows, swap
from trimtab.solvers.private_gsd.row_statistics import (
    CellCounts,
    RowStatistic,
    RowSums,
    halfspaces,
    marginals,
    prefixes,
)
from trimtab.solvers.private_gsd.search import ExponentialWeights, GeneticSearchResult, genetic_search

__all__ = [
    "CellCounts",
    "Domain",
    "ExponentialWeights",
    "GeneticSearchResult",
    "PrivateGSD",
    "RowStatistic",
    "RowSums",
    "Table",
    "between_quantiles",
    "crossover",
    "delta_from_rho",
    "gaussian_sigma",
    "genetic_search",
    "halfspaces",
    "marginals",
    "mutate",
    "noisy_answers",
    "prefixes",
    "private_quantiles",
    "random_rows",
    "rho_from_epsilon_delta",
    "swap",
]
