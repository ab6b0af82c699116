"""The estimator: measures a private table once, and searches for a synthetic one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from trimtab.ops.arguments import integer
from trimtab.solvers.private_gsd.accounting import rho_from_epsilon_delta
from trimtab.solvers.private_gsd.domain import Domain, Table, read_domain, read_table
from trimtab.solvers.private_gsd.measurements import noisy_answers, private_quantiles
from trimtab.solvers.private_gsd.operators import OPERATORS, Operator, proposals_of
from trimtab.solvers.private_gsd.row_statistics import RowStatistic, marginals
from trimtab.solvers.private_gsd.search import genetic_search, read_search


class PrivateGSD(BaseEstimator):  # type: ignore[misc]
    """Makes a synthetic table with the statistics of a private one, under (epsilon, delta)-differential privacy.

    Tables that differ in one row are neighbours; their number of rows, `domain` and `statistics` are public. Without
    `statistics`, all k-way marginals are measured, real columns cut at private quantiles, for which a part of the
    budget is set aside: one share for each real column, one for each marginal. Noise needs a seed that nobody knows:
    give `random_state` in experiments only.

    Args:
        domain: one entry for each column: the number of categories, coded from 0, or the bounds low, high; as read from
            JSON or counted by NumPy, too.
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
        domain = read_domain(self.domain)
        table = read_table(X, domain)
        n_synthetic = len(table) if self.n_synthetic is None else integer("n_synthetic", self.n_synthetic)
        # A budget once spent is spent: all that can be refused is refused before anything is measured.
        read_search(self.population, self.max_generations, self.tol)
        proposals_of(domain, self.operators, self.population)
        integer("num_intervals", self.num_intervals, 2)
        rho = rho_from_epsilon_delta(self.epsilon, self.delta)
        rng = np.random.default_rng(self.random_state)
        statistics, quantiles = self._statistics(table, domain, rho, rng)
        workloads = sum(len(one.sizes) for one in statistics)
        each = (rho - quantiles.sum()) / workloads
        answers = [noisy_answers(one, table, each, rng) for one in statistics]
        found = genetic_search(
            statistics,
            answers,
            domain,
            n_synthetic,
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
        n = integer("n", n)
        rows = len(self.synthetic_)
        drawn: Table = self.synthetic_[np.random.default_rng(random_state).choice(rows, n, replace=n > rows)]
        return drawn

    def _statistics(
        self, table: Float[Table, "n d"], domain: Domain, rho: float, generator: np.random.Generator
    ) -> tuple[list[RowStatistic], Float[Table, " real"]]:
        """What to measure, and what finding the edges of real columns has cost for each."""
        if self.statistics is not None:
            given = list(self.statistics) if isinstance(self.statistics, Sequence) else [self.statistics]
            if not given:
                raise ValueError("statistics must be one or more, got none")
            return given, np.zeros(0)
        real = {j: column for j, column in enumerate(domain) if isinstance(column, tuple)}
        marginals(domain, self.k, depth=self.depth)
        groups = math.comb(len(domain), self.k)
        spent = np.full(len(real), rho / (len(real) + groups))
        edges = {
            j: private_quantiles(table[:, j], *bounds, self.num_intervals, share, generator).tolist()
            for (j, bounds), share in zip(real.items(), spent, strict=True)
        }
        return [marginals(domain, self.k, edges=edges, depth=self.depth)], spent
