"""Synthetic tables that answer queries as a private one does, made from noisy answers alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from trimtab.data import load
from trimtab.data.adult import adult
from trimtab.ops.simplex import project_simplex
from trimtab.solvers.private_gsd import CellCounts, Domain, RowStatistic, Table, halfspaces, marginals, prefixes
from trimtab.solvers.private_gsd.accounting import rho_from_epsilon_delta
from trimtab.solvers.private_gsd.measurements import noisy_answers
from trimtab.studies.engine.study import Curve, Metric, Result, Trial
from trimtab.studies.tools.descent import descend

Queries = Literal["marginals", "prefixes", "halfspaces"]

EPSILONS = (0.1, 1.0)
METRICS = {
    "mean_error": Metric("mean error, geometric mean over epsilons", best="min"),
    **{
        f"{kind}_error_at_{epsilon:g}": Metric(f"{kind} error at epsilon {epsilon:g}", best="min")
        for kind in ("mean", "max")
        for epsilon in EPSILONS
    },
    "seconds": Metric("time for a table (s)", best="min"),
}
BOTH = {
    "mean_error": Metric("mean error, geometric mean over both kinds of queries and epsilons", best="min"),
    **{
        f"{queries}_{kind}_error": Metric(f"{kind} error of {queries}, geometric mean over epsilons", best="min")
        for queries in ("prefixes", "halfspaces")
        for kind in ("mean", "max")
    },
    "seconds": METRICS["seconds"],
}
# Public cuts of Adult's numbers, for marginals; the columns that double others are left out.
_CUTS = {
    "age": (25, 30, 35, 40, 45, 50, 55, 60, 65),
    "capital_gain": (1, 3000, 5000, 8000, 15000),
    "capital_loss": (1, 1500, 1800, 2000),
    "hours_per_week": (20, 30, 35, 40, 41, 50, 60),
}
_DOUBLES = ("fnlwgt", "education_num")
_NUMBERS = ("age", "education_num", "hours_per_week", "capital_gain", "capital_loss")
_WITHIN = ("marital_status", "race", "sex", "income")
_MEASUREMENTS, _RANGE, _PARTS = 8, 3.0, 8  # of breast_cancer: columns, bound in deviations, bins
_BINS = 32  # of real columns that are measured one by one
_DRAWN = 20_000  # rows of contestants that draw from a distribution


@dataclass(frozen=True)
class Conditions:
    """Prefixes or halfspaces of real columns scaled to between 0 and 1.

    Attributes:
        directions: (queries, real) normals, or for prefixes ones where a column counts.
        levels: (queries,) offsets of halfspaces, z @ direction > level, or for prefixes (queries, real) thresholds,
            z <= level.
    """

    directions: Float[Table, "queries real"]
    levels: Float[Table, "..."]

    def statistic(self, domain: Domain) -> CellCounts:
        """How many rows of a table fulfil each of them, within each value of each categorical column."""
        real = np.array([j for j, column in enumerate(domain) if isinstance(column, tuple)])
        within = [j for j, column in enumerate(domain) if isinstance(column, int)]
        if self.levels.ndim == 1:
            return halfspaces(domain, self.directions, self.levels, within=within)
        at = self._columns()
        low, high = np.array([domain[j] for j in real]).T
        thresholds = np.take_along_axis(low + self.levels * (high - low), at, 1)
        return prefixes(domain, real[at], thresholds, within=within)

    def softly(self, z: Float[Tensor, "n real"], sharpness: float) -> Float[Tensor, "n queries"]:
        """How much each holds, with sigmoids for steps."""
        directions, levels = (torch.from_numpy(part).to(z) for part in (self.directions, self.levels))
        if levels.ndim == 1:
            return torch.sigmoid(sharpness * (z @ directions.T - levels))
        at = torch.from_numpy(self._columns())
        below = sharpness * (levels.gather(1, at) - z[:, at])
        return torch.nn.functional.logsigmoid(below).sum(2).exp()

    def _columns(self) -> NDArray[np.int64]:
        """Those that count in each prefix; equally many in all."""
        return np.stack([row.nonzero()[0] for row in self.directions])


@dataclass
class PrivateTable:
    """What a contestant gets: public facts, and a table that it may only measure, within its budget.

    Attributes:
        domain: of the columns.
        statistic: the queries that count.
        conditions: those they are made from; None for marginals of pairs of columns.
        rho: the budget of zCDP.
        trial: says how long a contestant may take.
        generator: for a contestant's draws.
        spent: zCDP of the measurements so far.
    """

    domain: Domain
    statistic: RowStatistic
    conditions: Conditions | None
    rho: float
    trial: Trial
    generator: np.random.Generator
    spent: float = field(default=0.0, init=False)
    _table: Table = field(kw_only=True, repr=False)
    _noise: np.random.Generator = field(kw_only=True, repr=False)

    def measure(self, statistic: RowStatistic) -> Float[Table, " queries"]:
        """Noisy means over the private rows, each workload with an equal part of the whole budget.

        Raises:
            ValueError: it is spent.
        """
        if self.spent:
            raise ValueError(f"measure: the budget of {self.rho:.3g} is spent")
        self.spent = self.rho
        return noisy_answers(statistic, self._table, self.rho / len(statistic.sizes), self._noise)


# From the private table, as far as it may be seen, to a synthetic one.
Synthesise = Callable[[PrivateTable], Table]


def independent() -> Synthesise:
    """Columns one by one: noisy histograms, real columns in 32 equal bins, projected on the simplex."""

    def synthesise(private: PrivateTable) -> Table:
        edges = {
            j: np.linspace(*column, _BINS + 1)[1:-1].tolist()
            for j, column in enumerate(private.domain)
            if isinstance(column, tuple)
        }
        histograms = marginals(private.domain, 1, edges=edges, depth=1)
        shares = np.split(private.measure(histograms), np.cumsum(histograms.sizes)[:-1])
        rng, drawn = private.generator, []
        for column, share in zip(private.domain, shares, strict=True):
            codes = rng.choice(len(share), _DRAWN, p=_distribution(share)).astype(np.float64)
            if isinstance(column, tuple):
                codes = column[0] + (column[1] - column[0]) * (codes + rng.random(_DRAWN)) / len(share)
            drawn.append(codes)
        return np.stack(drawn, 1)

    return synthesise


def tree() -> Synthesise:
    """The tree of pairs with the most mutual information, from the same noisy pairs (marginals only).

    Chow and Liu's tree: what PrivBayes fits with one parent for each column, but its structure costs no budget.
    Noisy pairs are projected on the simplex.
    """

    def synthesise(private: PrivateTable) -> Table:
        if private.conditions is not None:
            raise ValueError("tree: it needs the marginals of all pairs of columns")
        sizes = [int(column) for column in private.domain if isinstance(column, int)]
        pairs = list(combinations(range(len(sizes)), 2))
        answers = np.split(private.measure(private.statistic), np.cumsum(private.statistic.sizes)[:-1])
        joint = {}
        for (a, b), flat in zip(pairs, answers, strict=True):
            joint[a, b] = _distribution(flat).reshape(sizes[a], sizes[b])
            joint[b, a] = joint[a, b].T
        information = {pair: _mutual_information(joint[pair]) for pair in joint}
        rng, columns = private.generator, np.zeros((_DRAWN, len(sizes)))
        columns[:, 0] = rng.choice(sizes[0], _DRAWN, p=joint[0, 1].sum(1))
        inside = [0]
        while len(inside) < len(sizes):
            outside = [j for j in range(len(sizes)) if j not in inside]
            parent, child = max(((i, j) for i in inside for j in outside), key=information.__getitem__)
            table = joint[parent, child] + 1e-12  # a value of the parent that the pair has not: any of the child's
            chances = np.cumsum(table / table.sum(1, keepdims=True), 1)[columns[:, parent].astype(np.int64)]
            columns[:, child] = (rng.random((_DRAWN, 1)) > chances[:, :-1]).sum(1)
            inside.append(child)
        return columns

    return synthesise


def relaxed_projection(rates: Sequence[float] = (0.1, 0.3, 1.0)) -> Synthesise:
    """Gradient descent on relaxed rows, from the same noisy answers: RAP, and RAP++ where there are conditions.

    Categories are softmaxes and numbers are kept between their bounds, all free for every row; steps of conditions are
    sigmoids that grow sharper. Adam at each of these learning rates, which fall to zero; categories are then drawn, and
    of the tables that come out the one nearest to the noisy answers is kept.

    References: Aydore et al., "Differentially Private Query Release Through Adaptive Projection", ICML 2021, arXiv
    2103.06641; Vietri et al., "Private Synthetic Data for Multitask Learning and Marginal Queries", NeurIPS 2022,
    arXiv 2209.07400.
    """

    def synthesise(private: PrivateTable) -> Table:
        rows = private.trial.pick(smoke=50, laptop=1000, paper=2000)
        answers = private.measure(private.statistic)
        found = [_relaxed(private, answers, rows, rate) for rate in rates]
        return min(found, key=lambda table: float(np.square(_means(private.statistic, table) - answers).sum()))

    return synthesise


@dataclass(frozen=True)
class PrivateTables:
    """A synthetic table of Adult's 48,842 rows for each of two privacy budgets, compared by the errors of all queries.

    At the smoke budget the table is breast_cancer's, 569 rows.

    Attributes:
        queries: "marginals" (of all pairs of columns, numbers in bins), "prefixes" (below two random thresholds) or
            "halfspaces" (of random directions, through random points), the last two within each value of each
            categorical column.
    """

    queries: Queries = "marginals"

    def __post_init__(self) -> None:
        if self.queries not in get_args(Queries):
            raise ValueError(f"queries must be one of {', '.join(get_args(Queries))}, got {self.queries!r}")

    def run(self, trial: Trial, synthesise: Synthesise) -> Result:
        """How far a contestant's tables are from the private one."""
        table, domain = self.private_table(trial)
        conditions, statistic = None, marginals(domain) if self.queries == "marginals" else None
        if statistic is None:
            conditions = self._conditions(trial, sum(isinstance(column, tuple) for column in domain))
            statistic = conditions.statistic(domain)
        truth = _means(statistic, table)
        errors, seconds = [], 0.0
        for done, epsilon in enumerate(EPSILONS, 1):
            private = PrivateTable(
                domain,
                statistic,
                conditions,
                rho_from_epsilon_delta(epsilon, 1 / len(table) ** 2),
                trial,
                np.random.default_rng([trial.seed, done]),
                _table=table,
                _noise=np.random.default_rng([trial.seed, done, 1]),
            )
            started = time.perf_counter()
            made = synthesise(private)
            seconds += time.perf_counter() - started
            errors.append(np.abs(_means(statistic, made) - truth))
            trial.report(done / len(EPSILONS))
        means = [float(error.mean()) for error in errors]
        metrics = {
            "mean_error": float(np.exp(np.log(means).mean())),
            **{
                f"{kind}_error_at_{epsilon:g}": float(of(error))
                for kind, of in (("mean", np.mean), ("max", np.max))
                for epsilon, error in zip(EPSILONS, errors, strict=True)
            },
            "seconds": seconds / len(EPSILONS),
        }
        return Result(metrics, {"mean_error": Curve(EPSILONS, means, x_label="epsilon")})

    def private_table(self, trial: Trial) -> tuple[Table, Domain]:
        """The rows, and what is public about their columns."""
        if trial.budget == "smoke":
            return self._breast_cancer()
        whole = adult()
        chosen = [name for name in whole.columns if name not in _DOUBLES]
        data = whole.select(chosen if self.queries == "marginals" else _NUMBERS + _WITHIN)
        table, domain = torch.cat([data.train, data.test]).numpy().copy(), list(data.domain)
        if self.queries == "marginals":
            for name, cuts in _CUTS.items():
                j = chosen.index(name)
                table[:, j], domain[j] = np.searchsorted(cuts, table[:, j], "right"), len(cuts) + 1
        return table, domain

    def _breast_cancer(self) -> tuple[Table, Domain]:
        data = load("breast_cancer")
        numbers = torch.cat([data.x_train, data.x_test])[:, :_MEASUREMENTS].double().clamp(-_RANGE, _RANGE).numpy()
        labels = torch.cat([data.y_train, data.y_test])[:, None].double().numpy()
        bins = np.linspace(-_RANGE, _RANGE, _PARTS + 1)[1:-1]
        if self.queries == "marginals":
            return np.hstack([np.searchsorted(bins, numbers, "right"), labels]), [_PARTS] * _MEASUREMENTS + [2]
        last = np.searchsorted(bins, numbers[:, -1:], "right")
        domain: list[int | tuple[float, float]] = [(-_RANGE, _RANGE)] * (_MEASUREMENTS - 1)
        return np.hstack([numbers[:, :-1], last, labels]), [*domain, _PARTS, 2]

    def _conditions(self, trial: Trial, real: int) -> Conditions:
        """Drawn by the seed, without a look at the table."""
        rng, num = np.random.default_rng([trial.seed, 0]), trial.pick(smoke=5, laptop=30, paper=200)
        if self.queries == "halfspaces":
            directions = rng.standard_normal((num, real))
            return Conditions(directions, (directions * rng.random((num, real))).sum(1))
        two = rng.permuted(np.tile(np.arange(real) < 2, (num, 1)), axis=1).astype(np.float64)
        return Conditions(two, rng.random((num, real)))


def prefixes_and_halfspaces(trial: Trial, synthesise: Synthesise) -> Result:
    """Both kinds of queries that have no gradient, each with tables of its own."""
    metrics, curves, seconds = {}, {}, 0.0
    for queries in ("prefixes", "halfspaces"):
        found = PrivateTables(queries).run(trial, synthesise)
        for kind in ("mean", "max"):
            logs = [math.log(found.metrics[f"{kind}_error_at_{epsilon:g}"]) for epsilon in EPSILONS]
            metrics[f"{queries}_{kind}_error"] = math.exp(sum(logs) / len(logs))
        seconds += found.metrics["seconds"] / 2
        curves[f"mean_error_of_{queries}"] = found.curves["mean_error"]
    metrics["mean_error"] = math.sqrt(metrics["prefixes_mean_error"] * metrics["halfspaces_mean_error"])
    return Result({**metrics, "seconds": seconds}, curves)


def _relaxed(private: PrivateTable, answers: Table, rows: int, lr: float) -> Table:
    """The table that one run of gradient descent leads to."""
    rng, domain, conditions = private.generator, private.domain, private.conditions
    # Steps with conditions need more of them, and are cheaper.
    steps = private.trial.pick(smoke=10, laptop=400 if conditions is None else 1200, paper=4000)
    sizes = [column for column in domain if isinstance(column, int)]
    real = [column for column in domain if isinstance(column, tuple)]
    logits = torch.from_numpy(rng.standard_normal((rows, sum(sizes)))).float().requires_grad_()
    numbers = torch.from_numpy(rng.random((rows, len(real)))).float().requires_grad_()
    optimizer = torch.optim.Adam([logits, numbers], lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    target, weight = _as_matrix(answers, sizes, conditions)

    def categories() -> Tensor:
        return torch.cat([part.softmax(1) for part in logits.split(sizes, 1)], 1)

    def loss(step: int) -> Tensor:
        shares = categories()
        left = shares if conditions is None else conditions.softly(numbers, 2.0 ** (1 + 9 * step / steps))
        return (weight * (left.T @ shares / rows - target).square()).sum()

    descend(optimizer, loss, range(steps), anneal=schedule, after=lambda step: numbers.data.clamp_(0, 1))
    many = max(1, _DRAWN // rows)
    with torch.no_grad():
        chances = [part.double().cumsum(1).numpy() for part in categories().split(sizes, 1)]
        z = numbers.double().numpy()
    codes = iter([(rng.random((many, rows, 1)) > chance[:, :-1]).sum(2).ravel() for chance in chances])
    values = iter([low + (high - low) * np.tile(z[:, j], many) for j, (low, high) in enumerate(real)])
    return np.stack([next(codes) if isinstance(column, int) else next(values) for column in domain], 1).astype(float)


def _as_matrix(
    answers: Table, sizes: Sequence[int], conditions: Conditions | None
) -> tuple[Float[Tensor, "left categories"], Float[Tensor, "left categories"]]:
    """Answers to pairs of (condition or category, category), and which pairs are asked for."""
    ends = np.cumsum(sizes)
    blocks = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    rows = ends[-1] if conditions is None else len(conditions.directions)
    target, weight = np.zeros((2, rows, ends[-1]))
    if conditions is None:
        pairs = list(combinations(blocks, 2))
    else:
        pairs = [(slice(q, q + 1), block) for block in blocks for q in range(rows)]
    at = 0
    for a, b in pairs:
        shape = target[a, b].shape
        target[a, b] = answers[at : at + shape[0] * shape[1]].reshape(shape)
        weight[a, b] = 1
        at += shape[0] * shape[1]
    return torch.from_numpy(target).float(), torch.from_numpy(weight).float()


def _means(statistic: RowStatistic, table: Table) -> Table:
    return statistic.counts(table) / len(table)


def _distribution(noisy: Table) -> Table:
    """The nearest distribution, without the rounding that a sampler would stumble over."""
    share = project_simplex(torch.from_numpy(noisy)).numpy()
    return np.asarray(share / share.sum())


def _mutual_information(joint: Table) -> float:
    product = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    there = joint > 0
    return float((joint[there] * np.log(joint[there] / product[there])).sum())
