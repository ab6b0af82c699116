"""Topological swaps after DAGMA and from random orders, against DAGMA alone, on small and larger graphs."""

from __future__ import annotations

from trimtab.solvers import TopoSwaps, polish_dag
from trimtab.studies.study import Claim, Study
from trimtab.studies.tasks.dag_recovery import DagRecovery, Matrix, Method, Observations, dagma

SIZES = {"10 nodes": DagRecovery(nodes=10), "30 nodes": DagRecovery(nodes=30)}


def default_dagma(seen: Observations) -> Matrix:
    """DAGMA with its package's defaults, iterations and stages included (fewer iterations at the smoke budget)."""
    if seen.warm_iter < 1000:
        return dagma()(seen)
    return dagma(warm_iter=30_000, max_iter=60_000, stages=5)(seen)


def polished(method: Method) -> Method:
    """What swaps make of a method's graph."""
    return lambda seen: polish_dag(method(seen), seen.X).weights


def from_random(seen: Observations) -> Matrix:
    """Swaps from one random order."""
    return TopoSwaps(random_state=seen.seed).fit(seen.X).raw_weights_


study = Study(
    paper="topo_swaps",
    arms={
        f"{name}, {size}": arm
        for size, task in SIZES.items()
        for name, arm in {
            "DAGMA": task.solve(default_dagma),
            "DAGMA, searched": task.solve(search=lambda lambda1: dagma(lambda1)),
            "DAGMA + swaps": task.solve(polished(default_dagma)),
            "swaps": task.solve(from_random),
        }.items()
    },
    claims=[
        *(Claim(f"DAGMA + swaps, {size}", below=f"DAGMA, {size}", on="order_excess") for size in SIZES),
        *(Claim(f"swaps, {size}", below=f"DAGMA, {size}", on="order_excess") for size in SIZES),
        *(Claim(f"swaps, {size}", below=f"DAGMA, {size}", on="score_excess") for size in SIZES),
        *(Claim(f"DAGMA + swaps, {size}", below=f"DAGMA, {size}", on="shd") for size in SIZES),
        *(Claim(f"swaps, {size}", below=f"DAGMA, searched, {size}", on="shd") for size in SIZES),
        *(Claim(f"swaps, {size}", below=f"DAGMA, {size}", on="seconds", times=10) for size in SIZES),
    ],
    seeds={"laptop": 5},
    leaderboard=["DAGMA, searched, 30 nodes", "DAGMA + swaps, 30 nodes", "swaps, 30 nodes"],
    notes="Erdős-Rényi graphs with four edges per node expected (nearly complete at 10 nodes), equal noise of variance "
    "1, 1,000 samples. The score is half the mean squared residuals, relative to that of the true order with weights "
    "refitted. DAGMA's own weights are shrunk by its penalty, so that any refit has a lower score: the order's excess "
    "refits them, on the order left when its weakest edges are cut until there is no cycle, and so compares orders "
    "alone. DAGMA has its package's defaults, or a sparsity weight searched among 0.01, 0.03, 0.1 and 0.3 by the "
    "mean SHD on two other graphs. Weights below 0.3 are no edges.",
)
