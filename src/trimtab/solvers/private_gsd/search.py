"""The genetic search: one table, edited where that brings its statistics nearer to those wanted."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from sklearn.exceptions import ConvergenceWarning

from trimtab.ops.arguments import in_range, integer
from trimtab.solvers.private_gsd.domain import Domain, Table, read_domain, read_table
from trimtab.solvers.private_gsd.operators import OPERATORS, Operator, proposals_of, random_rows
from trimtab.solvers.private_gsd.row_statistics import RowStatistic

_LEARNING_RATE = 0.1  # of the operators' weights
_EXPLORE = 0.05  # share of draws that do not look at the weights
_LEAST_BLOCK = 100  # generations between two looks at the weights and the error
_LEAST_GAIN = 1e-9  # in squared counts: less is rounding


@dataclass(frozen=True)
class GeneticSearchResult:
    """A table, and how it was found.

    Attributes:
        table: (n, d) rows.
        history: f at the start, then after each block of generations; it never rises.
        operators: share of the draws that each operator would have next.
        n_generations: in all.
        converged: whether the last block lowered f by no more than a share `tol`.
    """

    table: Float[Table, "n d"]
    history: tuple[float, ...]
    operators: dict[str, float]
    n_generations: int
    converged: bool


def genetic_search(
    statistics: Sequence[RowStatistic],
    answers: Sequence[Float[ArrayLike, " queries"]],
    domain: Domain,
    n_rows: int,
    *,
    operators: Sequence[Operator] = OPERATORS,
    population: int = 50,
    max_generations: int = 10_000_000,
    tol: float = 1e-4,
    start: Float[ArrayLike, "n d"] | None = None,
    generator: np.random.Generator | None = None,
) -> GeneticSearchResult:
    """Looks for a table whose statistics are these. It sees no private table: what it returns costs no privacy.

    Args:
        statistics: sums over rows; f sums over all of their queries.
        answers: means over rows to come near to, for each statistic.
        domain: of the columns.
        n_rows: of the table.
        operators: those to use; "continuous" needs a real and "crossover" a categorical column, else they are left out.
        population: candidates of a generation, at least 1.
        max_generations: most generations.
        tol: share of f that as many generations as there are rows (at least 100) must gain for the search to go on.
        start: a table to start from instead of uniformly random rows.
        generator: draws the rows, edits and operators; a fixed one by default.

    Raises:
        ValueError: an argument is out of its range, or answers do not fit their statistics.

    Warns:
        sklearn.exceptions.ConvergenceWarning: f still fell by more than `tol`.

    Example:
        >>> from trimtab.solvers import marginals
        >>> pairs = marginals([2, 2])
        >>> found = genetic_search([pairs], [[0.5, 0.0, 0.1, 0.4]], [2, 2], n_rows=100)
        >>> pairs.counts(found.table)
        array([50.,  0., 10., 40.])
    """
    domain, n_rows = read_domain(domain), integer("n_rows", n_rows)
    population, max_generations, tol = read_search(population, max_generations, tol)
    targets = _check_answers(statistics, answers)
    rng = np.random.default_rng(0) if generator is None else generator
    proposals = proposals_of(domain, operators, population)
    X = random_rows(domain, n_rows, rng) if start is None else read_table(start, domain, "start")
    if len(X) != n_rows:
        raise ValueError(f"start must be of n_rows = {n_rows} rows, got {len(X)}")

    trackers = [one.track(X, n_rows * target) for one, target in zip(statistics, targets, strict=True)]
    names = list(proposals)
    choice = ExponentialWeights(len(names))
    history = [sum(tracker.squared_error() for tracker in trackers) / n_rows**2]
    generations, converged = 0, False
    while not converged and generations < max_generations:
        block = min(max(_LEAST_BLOCK, n_rows), max_generations - generations)
        for arm in rng.choice(len(names), size=block, p=choice.probabilities()):
            rows, added = proposals[names[arm]](X, rng)
            removed = X[rows]
            gain = trackers[0].gains(removed, added)
            for tracker in trackers[1:]:
                gain = gain + tracker.gains(removed, added)
            best = gain.argmin()
            if gain[best] < -_LEAST_GAIN:
                for tracker in trackers:
                    tracker.accept(removed[best], added[best])
                X[rows[best]] = added[best]
                choice.reward(int(arm))
        generations += block
        history.append(sum(tracker.squared_error() for tracker in trackers) / n_rows**2)
        converged = history[-2] - history[-1] <= tol * history[-2] and generations > block
    converged = converged or history[-1] == 0  # nothing is left to gain
    if not converged:
        warnings.warn(
            f"genetic_search: the error still fell, to {history[-1]:.3g}, after {generations} generations; "
            "raise max_generations or tol",
            ConvergenceWarning,
            stacklevel=2,
        )
    shares = dict(zip(names, choice.probabilities().tolist(), strict=True))
    return GeneticSearchResult(X, tuple(history), shares, generations, converged)


def read_search(population: int, max_generations: int, tol: float) -> tuple[int, int, float]:
    """The numbers that say how long and how widely to search."""
    return (
        integer("population", population),
        integer("max_generations", max_generations),
        in_range("tol", tol, 0, 1, "left"),
    )


class ExponentialWeights:
    """Draws arms by their successes (EXP3): the more often an arm is a success when drawn, the likelier it gets.

    Args:
        num: number of arms.
    """

    def __init__(self, num: int) -> None:
        # Logarithms, so that an arm that has long been of no use can come back.
        self.log_weights = [0.0] * num

    def probabilities(self) -> Float[Table, " arms"]:
        """Of each arm to be drawn."""
        weights = np.exp(np.array(self.log_weights) - max(self.log_weights))
        p: Table = (1 - _EXPLORE) * weights / weights.sum() + _EXPLORE / len(weights)
        return p

    def reward(self, arm: int) -> None:
        """Tells of a success."""
        most = max(self.log_weights)
        weights = [math.exp(one - most) for one in self.log_weights]
        p = (1 - _EXPLORE) * weights[arm] / sum(weights) + _EXPLORE / len(weights)
        self.log_weights[arm] += _LEARNING_RATE / p


def _check_answers(
    statistics: Sequence[RowStatistic], answers: Sequence[Float[ArrayLike, " queries"]]
) -> list[Float[Table, " queries"]]:
    if not len(statistics) or len(statistics) != len(answers):
        raise ValueError(f"answers must be one vector for each of the {len(statistics)} statistics, got {len(answers)}")
    targets = [np.asarray(one, dtype=np.float64) for one in answers]
    for statistic, target in zip(statistics, targets, strict=True):
        if target.shape != (sum(statistic.sizes),):
            raise ValueError(
                f"answers must be of shape ({sum(statistic.sizes)},) for this statistic, got shape {target.shape}"
            )
        if not np.isfinite(target).all():
            raise ValueError("answers must be finite, got NaN or infinity")
    return targets
