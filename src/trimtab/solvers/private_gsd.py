r"""Private-GSD: synthetic tables under differential privacy, by a genetic search for rows that fit noisy statistics.

Reach for it where a table may not leave the house but its statistics may, above all where these are no smooth functions
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

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted

from trimtab.solvers.privacy_accounting import rho_from_epsilon_delta
from trimtab.solvers.private_measurements import noisy_answers, private_quantiles
from trimtab.solvers.row_statistics import Domain, RowStatistic, Table, check_domain, check_table, marginals

Operator = Literal["mutate", "continuous", "swap", "crossover"]
OPERATORS: tuple[Operator, ...] = get_args(Operator)
RowIndex = NDArray[np.int64]
# From a table and a generator to the rows to edit (population, r), and what they become (population, r, d).
Propose = Callable[[Table, np.random.Generator], tuple[RowIndex, Table]]

_LEARNING_RATE = 0.1  # of the operators' weights
_EXPLORE = 0.05  # share of draws that do not look at the weights
_QUANTILES = 32
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
        >>> pairs = marginals([2, 2])
        >>> found = genetic_search([pairs], [[0.5, 0.0, 0.1, 0.4]], [2, 2], n_rows=100)
        >>> pairs.counts(found.table)
        array([50.,  0., 10., 40.])
    """
    check_domain(domain)
    for name, value, least in (
        ("n_rows", n_rows, 1),
        ("population", population, 1),
        ("max_generations", max_generations, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not 0 <= tol < 1:
        raise ValueError(f"tol must lie in [0, 1), got {tol}")
    targets = _check_answers(statistics, answers)
    rng = np.random.default_rng(0) if generator is None else generator
    proposals = _proposals(domain, operators, population)
    X = random_rows(domain, n_rows, rng) if start is None else check_table(start, domain)
    if len(X) != n_rows:
        raise ValueError(f"start must have n_rows={n_rows} rows, got {len(X)}")

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
    if not converged:
        warnings.warn(
            f"genetic_search: the error still fell, to {history[-1]:.3g}, after {generations} generations; "
            "raise max_generations or tol",
            ConvergenceWarning,
            stacklevel=2,
        )
    shares = dict(zip(names, choice.probabilities().tolist(), strict=True))
    return GeneticSearchResult(X, tuple(history), shares, generations, converged)


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


def random_rows(domain: Domain, n: int, generator: np.random.Generator) -> Float[Table, "n d"]:
    """Rows with independent, uniformly distributed columns."""
    return np.stack([_uniform(column, n, generator) for column in domain], 1)


def mutate(
    X: Float[Table, "n d"], rows: Int[RowIndex, " p"], column: int, values: Float[Table, " p"]
) -> Float[Table, "p 1 d"]:
    """Each row with a value put into the column.

    Example:
        >>> mutate(np.zeros((3, 2)), np.array([0, 2]), 1, np.array([5.0, 7.0]))[:, 0]
        array([[0., 5.], [0., 7.]])
    """
    added = X[rows]
    added[:, column] = values
    return added[:, None]


def swap(X: Float[Table, "n d"], rows: Int[RowIndex, "p 2"], column: int) -> Float[Table, "p 2 d"]:
    """Pairs of rows with their values of the column exchanged.

    Example:
        >>> swap(np.array([[0.0, 1.0], [2.0, 3.0]]), np.array([[0, 1]]), 0)[0]
        array([[2., 1.], [0., 3.]])
    """
    added = X[rows]
    added[:, :, column] = X[rows[:, ::-1], column]
    return added


def crossover(
    X: Float[Table, "n d"], rows: Int[RowIndex, " p"], donors: Int[RowIndex, " p"], columns: Int[RowIndex, "p c"]
) -> Float[Table, "p 1 d"]:
    """Each row with some columns copied from its donor.

    Example:
        >>> crossover(np.arange(6.0).reshape(2, 3), np.array([0]), np.array([1]), np.array([[1]]))[0]
        array([[0., 4., 2.]])
    """
    added = X[rows]
    added[np.arange(len(rows))[:, None], columns] = X[donors[:, None], columns]
    return added[:, None]


def between_quantiles(
    values: Float[Table, " n"], low: float, high: float, draws: Float[Table, "2 p"]
) -> Float[Table, " p"]:
    """Numbers between neighbours among 32 quantiles of the values and the bounds of their domain.

    Args:
        values: of the column as it is.
        low: bound of the domain.
        high: bound of the domain.
        draws: between 0 and 1, which two neighbours, and where between them.

    Example:
        >>> between_quantiles(np.array([0.25, 0.5]), 0.0, 1.0, np.array([[0.0, 0.99], [0.5, 0.5]]))
        array([0.125, 0.75 ])
    """
    ranks = np.linspace(0, len(values) - 1, _QUANTILES).round().astype(np.int64)
    edges = np.concatenate([[low], np.sort(values)[ranks], [high]])
    below = (draws[0] * (len(edges) - 1)).astype(np.int64)
    here: Table = edges[below] + draws[1] * (edges[below + 1] - edges[below])
    return here


class PrivateGSD(BaseEstimator):  # type: ignore[misc]
    """Makes a synthetic table with the statistics of a private one, under (epsilon, delta)-differential privacy.

    Tables that differ in one row are neighbours; their number of rows, `domain` and `statistics` are public. Without
    `statistics`, all k-way marginals are measured, real columns cut at private quantiles, for which a part of the
    budget is set aside: one share for each real column, one for each marginal. Noise needs a seed that nobody knows:
    give `random_state` in experiments only.

    Args:
        domain: one entry for each column: the number of categories, coded from 0, or the bounds (low, high).
        epsilon: positive.
        delta: between 0 and 1; well below one over the number of rows.
        k: columns of a marginal.
        statistics: what to measure instead of marginals: one row-additive statistic or several.
        n_synthetic: rows of the synthetic table; those of the private one by default. Time grows with it.
        operators: see `genetic_search`.
        population: candidates of a generation.
        max_generations: most generations.
        tol: see `genetic_search`.
        num_intervals: parts that private quantiles cut a real column into, at least 2.
        depth: levels at which marginals with real columns are measured.
        random_state: seeds noise and search.

    Attributes:
        synthetic_: (n_synthetic, d) the table.
        rho_: zCDP of the whole.
        budget_: zCDP of each look at the private table: `quantiles`, of each real column, and `statistics`, of each
            workload; together `rho_`.
        statistics_: those measured.
        answers_: noisy answers of each statistic.
        errors_: of each statistic, absolute differences of the table's answers from the noisy ones.
        history_, operators_, n_generations_, converged_: of the search.
        n_features_in_: d.

    Raises:
        ValueError: a value is not of its column's domain, or an argument is out of its range.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> first = rng.integers(2, size=2000)
        >>> private = np.stack([first, first ^ (rng.random(2000) < 0.1), rng.integers(3, size=2000)], 1)
        >>> model = PrivateGSD([2, 2, 3], epsilon=2.0, delta=1e-6, n_synthetic=500, random_state=0).fit(private)
        >>> agree = model.sample()[:, 0] == model.sample()[:, 1]
        >>> bool(0.8 < agree.mean() < 1)
        True
    """

    def __init__(
        self,
        domain: Domain,
        epsilon: float = 1.0,
        delta: float = 1e-9,
        *,
        k: int = 2,
        statistics: RowStatistic | Sequence[RowStatistic] | None = None,
        n_synthetic: int | None = None,
        operators: Sequence[Operator] = OPERATORS,
        population: int = 50,
        max_generations: int = 10_000_000,
        tol: float = 1e-4,
        num_intervals: int = 64,
        depth: int = 3,
        random_state: int | np.random.Generator | None = None,
    ) -> None:
        self.domain = domain
        self.epsilon = epsilon
        self.delta = delta
        self.k = k
        self.statistics = statistics
        self.n_synthetic = n_synthetic
        self.operators = operators
        self.population = population
        self.max_generations = max_generations
        self.tol = tol
        self.num_intervals = num_intervals
        self.depth = depth
        self.random_state = random_state

    def fit(self, X: Float[ArrayLike, "n d"], y: Any = None) -> Self:
        """Measures the private table X and makes the synthetic one; `y` is ignored."""
        check_domain(self.domain)
        table = check_table(X, self.domain)
        rho = rho_from_epsilon_delta(self.epsilon, self.delta)
        rng = np.random.default_rng(self.random_state)
        statistics, quantiles = self._statistics(table, rho, rng)
        workloads = sum(len(one.sizes) for one in statistics)
        each = (rho - quantiles.sum()) / workloads
        answers = [noisy_answers(one, table, each, rng) for one in statistics]
        found = genetic_search(
            statistics,
            answers,
            self.domain,
            len(table) if self.n_synthetic is None else self.n_synthetic,
            operators=self.operators,
            population=self.population,
            max_generations=self.max_generations,
            tol=self.tol,
            generator=rng,
        )
        self.synthetic_, self.n_features_in_ = found.table, table.shape[1]
        self.rho_, self.budget_ = rho, {"quantiles": quantiles, "statistics": np.full(workloads, each)}
        self.statistics_, self.answers_ = statistics, answers
        self.errors_ = [
            np.abs(one.counts(found.table) / len(found.table) - answer)
            for one, answer in zip(statistics, answers, strict=True)
        ]
        self.history_, self.operators_ = found.history, found.operators
        self.n_generations_, self.converged_ = found.n_generations, found.converged
        return self

    def sample(
        self, n: int | None = None, random_state: int | np.random.Generator | None = None
    ) -> Float[Table, "n d"]:
        """Rows of the synthetic table: all of them, or n drawn without replacement, or with it where n is larger."""
        check_is_fitted(self)
        if n is None:
            return self.synthetic_.copy()
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        rows = len(self.synthetic_)
        drawn: Table = self.synthetic_[np.random.default_rng(random_state).choice(rows, n, replace=n > rows)]
        return drawn

    def _statistics(
        self, table: Float[Table, "n d"], rho: float, generator: np.random.Generator
    ) -> tuple[list[RowStatistic], Float[Table, " real"]]:
        """What to measure, and what finding the edges of real columns has cost for each."""
        if self.statistics is not None:
            given = list(self.statistics) if isinstance(self.statistics, Sequence) else [self.statistics]
            if not given:
                raise ValueError("statistics must not be empty")
            return given, np.zeros(0)
        real = {j: column for j, column in enumerate(self.domain) if isinstance(column, tuple)}
        # Refuses what it must before anything is measured.
        marginals(self.domain, self.k, depth=self.depth)
        groups = math.comb(len(self.domain), self.k)
        spent = np.full(len(real), rho / (len(real) + groups))
        edges = {
            j: private_quantiles(table[:, j], *bounds, self.num_intervals, share, generator).tolist()
            for (j, bounds), share in zip(real.items(), spent, strict=True)
        }
        return [marginals(self.domain, self.k, edges=edges, depth=self.depth)], spent


def _proposals(domain: Domain, operators: Sequence[Operator], population: int) -> dict[str, Propose]:
    """What each operator proposes; those that share a turn of columns each keep their own."""
    if not operators or set(operators) - set(OPERATORS):
        raise ValueError(f"operators must be some of {', '.join(OPERATORS)}, got {tuple(operators)}")
    d = len(domain)
    real = {j: column for j, column in enumerate(domain) if isinstance(column, tuple)}
    categorical = np.array([j for j in range(d) if j not in real], dtype=np.int64)

    def rows_of(X: Table, rng: np.random.Generator) -> RowIndex:
        return rng.integers(len(X), size=population)

    turns = [math.ceil(math.log2(column if isinstance(column, int) else _QUANTILES)) for column in domain]
    mutated = itertools.cycle([j for turn in range(max(turns) or 1) for j in range(d) if turn < max(turns[j], 1)])
    redrawn, swapped = itertools.cycle(real), itertools.cycle(range(d))

    def propose_mutate(X: Table, rng: np.random.Generator) -> tuple[RowIndex, Table]:
        rows, column = rows_of(X, rng), next(mutated)
        return rows[:, None], mutate(X, rows, column, _uniform(domain[column], population, rng))

    def propose_continuous(X: Table, rng: np.random.Generator) -> tuple[RowIndex, Table]:
        rows, column = rows_of(X, rng), next(redrawn)
        values = between_quantiles(X[:, column], *real[column], rng.random((2, population)))
        return rows[:, None], mutate(X, rows, column, values)

    def propose_swap(X: Table, rng: np.random.Generator) -> tuple[RowIndex, Table]:
        rows = rng.integers(len(X), size=(population, 2))
        return rows, swap(X, rows, next(swapped))

    def propose_crossover(num: int) -> Propose:
        def propose(X: Table, rng: np.random.Generator) -> tuple[RowIndex, Table]:
            rows, donors = rows_of(X, rng), rows_of(X, rng)
            columns = categorical[rng.integers(len(categorical), size=(population, num))]
            return rows[:, None], crossover(X, rows, donors, columns)

        return propose

    found: dict[str, Propose] = {}
    if "mutate" in operators:
        found["mutate"] = propose_mutate
    if "continuous" in operators and real:
        found["continuous"] = propose_continuous
    if "swap" in operators:
        found["swap"] = propose_swap
    if "crossover" in operators and len(categorical):
        found["crossover"] = propose_crossover(1)
        if len(categorical) > 1:
            found["crossover of two"] = propose_crossover(2)
    if not found:
        raise ValueError(f"operators: none of {tuple(operators)} suits the columns of this domain")
    return found


def _uniform(column: int | tuple[float, float], n: int, generator: np.random.Generator) -> Float[Table, " n"]:
    if isinstance(column, tuple):
        return generator.uniform(*column, size=n)
    return generator.integers(column, size=n).astype(np.float64)


def _check_answers(
    statistics: Sequence[RowStatistic], answers: Sequence[Float[ArrayLike, " queries"]]
) -> list[Float[Table, " queries"]]:
    if not len(statistics) or len(statistics) != len(answers):
        raise ValueError(f"answers must be one vector for each of the {len(statistics)} statistics, got {len(answers)}")
    targets = [np.asarray(one, dtype=np.float64) for one in answers]
    for statistic, target in zip(statistics, targets, strict=True):
        if target.shape != (sum(statistic.sizes),) or not np.isfinite(target).all():
            raise ValueError(
                f"answers must be finite, of shape ({sum(statistic.sizes)},) for this statistic, got {target.shape}"
            )
    return targets
