r"""Discrete values for many variables that make the worst of many linear constraints as little violated as can be.

For variables that may only take listed values (codes of a quantiser, grey levels, fixed-point coefficients) where the
largest error counts, not the mean: a mixed-integer solver proves the optimum of small problems, and for larger ones
this search finds good values in a fraction of the time.

$$
\min_{x \in D_1 \times \dots \times D_n}\ \max_{i \le m}\ w_i\,\bigl|(A x - b)_i\bigr|
$$

Along one variable the objective is convex, so that the step to the level above and the step to the level below decide
whether any level of that variable is better: $2n$ moves stand for all $\sum_j |D_j|$. A move's effect on the few worst
rows bounds its effect on all rows from below, so that the best move is found, exactly, by looking at all rows for the
few moves with the smallest bounds. Many searches run at once, for one problem or several with the same $A$: from
several roundings of the relaxation's optimum, each takes the best move whose variable was not changed lately, and after
a while without gain the best pair of moves from its best point, or a random kick.

Reference:
    Cheikh Ahmed, Mahdi Mostajabdaveh, Samin Aref and Zirui Zhou, "Discrete Optimization of Min-Max Violation and its
    Applications Across Computational Sciences", 2025, arXiv 2508.13437.

The problem, its uses and the claims are the abstract's, which is all that was to be had; the search and its schedule
(moves, tenure, kicks, starts) are our own.
"""

from trimtab.solvers.minmax_violation.designs import (
    FixedPointFilter,
    QuantizedLayer,
    discrete_tomography,
    filter_rows,
    fixed_point_filter,
    parallel_projections,
    quantization_grid,
    quantize_layer,
)
from trimtab.solvers.minmax_violation.relaxation import relaxation
from trimtab.solvers.minmax_violation.rounding import compensated_rounding
from trimtab.solvers.minmax_violation.search import Searches, best_move, best_pair, bounds, least
from trimtab.solvers.minmax_violation.solver import MinMaxViolationResult, minmax_violation

__all__ = [
    "FixedPointFilter",
    "MinMaxViolationResult",
    "QuantizedLayer",
    "Searches",
    "best_move",
    "best_pair",
    "bounds",
    "compensated_rounding",
    "discrete_tomography",
    "filter_rows",
    "fixed_point_filter",
    "least",
    "minmax_violation",
    "parallel_projections",
    "quantization_grid",
    "quantize_layer",
    "relaxation",
]
