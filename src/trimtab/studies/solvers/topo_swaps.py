"""Topological swaps from random orders and after DAGMA, against DAGMA and against an order by variance.

Graphs of 20 nodes and about 80 edges, 1,000 samples. The score is half the mean squared residuals, relative to that of
the true order with weights refitted. DAGMA's own weights are shrunk by its penalty, so that any refit has a lower
score: the order's score refits them, on the order left when its weakest edges are cut until there is no cycle, and so
compares orders alone. Swaps from a random order minimise the bare score; after DAGMA, with its package's default
penalty, they have the default penalty of polishing. Where noise is unequal the least-squares score does not have its
minimum at the true graph. In simulated data even the order of the variances reveals much of the graph, as a reference
shows. Swaps were surely ahead of DAGMA until DAGMA's penalty could be as small as 0.003, which it chooses.
"""

from __future__ import annotations

from trimtab.solvers import TopoSwaps, polish_dag
from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.tasks.dag_recovery import GraphLearner, Matrix, Observations, dagma, equal, unequal


def from_random(seen: Observations) -> Matrix:
    """Swaps from one random order, for the bare least-squares score."""
    weights: Matrix = TopoSwaps(random_state=seen.seed).fit(seen.X).raw_weights_
    return weights


def polished(seen: Observations) -> Matrix:
    """What swaps make of DAGMA's graph, with the penalty that polishing has as it comes."""
    return polish_dag(dagma(seen), seen.X).weights


study = Study(
    paper="topo_swaps",
    entrants={
        "swaps": GraphLearner(learn=from_random),
        "DAGMA + swaps": GraphLearner(learn=polished, requires=("dagma",)),
    },
    on=[equal, unequal],
    headline=Claim("swaps", below="DAGMA", on="order_excess", at=equal),
    claims=[
        Claim("swaps", below="DAGMA", on="order_excess", at=unequal),
        Claim("DAGMA + swaps", below="DAGMA, default penalty", on="order_excess", at=equal),
        Claim("DAGMA + swaps", below="DAGMA, default penalty", on="shd", at=equal),
        Claim("swaps", below="DAGMA", on="shd", at=equal),
        Claim("swaps", below="DAGMA", on="shd", at=unequal),
        Claim("swaps", below="regressions by variance", on="shd", at=equal),
        Claim("swaps", below="DAGMA", on="seconds", times=10, at=equal),
    ],
)
