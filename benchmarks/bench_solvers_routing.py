"""UDC, trained for a minute as in its study, against OR-tools at equal seconds, and what cutting into pieces saves.

OR-tools runs guided local search from the cheapest arcs. It gets, for each instance, the seconds that UDC takes when it
solves a batch of them (UDC's training is not counted), and then ever more until its solutions are as short as UDC's.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from benchmarks.timing import medians
from trimtab.solvers import TSP, UDCResult, dcr_round, nearest_neighbour, two_opt
from trimtab.studies.engine.study import Trial
from trimtab.studies.solvers.udc.routing import TEST, Routing, or_tools_solutions
from trimtab.studies.solvers.udc.training import trained

LIMITS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Lengths at equal seconds, seconds to equal lengths, and 2-opt on pieces against 2-opt on the whole."""
    trial = Trial(budget="smoke" if quick else "laptop")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for task, what in ((Routing("tsp"), "tours"), (Routing("cvrp"), "routes")):
            yield from _against_or_tools(task, what, trial, quick)
        yield from _pieces(quick)
    finally:
        torch.set_num_threads(threads)


def _against_or_tools(task: Routing, what: str, trial: Trial, quick: bool) -> Iterator[dict[str, object]]:
    net = trained(trial, task)
    problem = task.instances(trial, 2 if quick else 16, trial.generator(TEST))
    batch, what = len(problem.coords), f"{what} of {task.size(trial)}"

    @functools.cache
    def peer_length(seconds: float) -> float:
        return float(problem.cost(or_tools_solutions(problem, seconds)[:, None]).mean())

    for rounds in (2,) if quick else (2, 10):

        def ours(rounds: int = rounds) -> UDCResult:
            return net.solve(problem, samples=16, rounds=rounds, generator=trial.generator(1))

        seconds = medians({"ours": ours}, repeats=1 if quick else 5, warmup=1)["ours"] / batch
        length, peer = float(ours().cost.mean()), peer_length(seconds)
        yield {
            "what": f"UDC, {rounds} rounds, against OR-tools at equal seconds, {what}",
            "ours": length,
            "peer": peer,
            "ratio": length / peer,
            "unit": "length",
            "aim": "at most 1",
            "met": length <= peer,
            "note": f"{1e3 * seconds:.3g} ms an instance, in a batch of {batch}",
        }
        limits = LIMITS[: 2 if quick else None]
        needed = next((limit for limit in limits if peer_length(limit) <= length), None)
        yield {
            "what": f"UDC, {rounds} rounds, against OR-tools to the same length, {what}",
            "ours": 1e3 * seconds,
            "peer": None if needed is None else 1e3 * needed,
            "ratio": None if needed is None else seconds / needed,
            "unit": "ms an instance",
            "note": f"OR-tools takes more than {limits[-1]} s" if needed is None else "OR-tools' time limit",
        }
        if not quick:
            yield {
                "what": f"gap of UDC, {rounds} rounds, to OR-tools in {LIMITS[-1]:g} s, {what}",
                "ours": 100 * (length / peer_length(LIMITS[-1]) - 1),
                "unit": "%",
            }


def _pieces(quick: bool) -> Iterator[dict[str, object]]:
    """One long tour: 2-opt on all of it, against 2-opt on its pieces with the cut moved on until nothing changes."""
    n = 200 if quick else 2000
    problem = TSP.random(1, n, generator=torch.Generator().manual_seed(0))
    tour = nearest_neighbour(problem.coords, torch.zeros(1, 1, dtype=torch.long))

    def in_pieces() -> torch.Tensor:
        found = tour
        for number in range(10):
            found = dcr_round(problem, found, lambda paths: two_opt(paths.coords), 100, shift=37 * number)
        return found

    def whole() -> torch.Tensor:
        return two_opt(problem.coords, tour[:, 0], closed=True)[:, None]

    seconds = medians({"ours": in_pieces, "peer": whole}, repeats=1, warmup=0)
    lengths = [float(problem.cost(found)) for found in (in_pieces(), whole())]
    yield {
        "what": f"2-opt on pieces of 100, 10 rounds, against 2-opt on all {n} cities",
        "ours": 1e3 * seconds["ours"],
        "peer": 1e3 * seconds["peer"],
        "ratio": seconds["ours"] / seconds["peer"],
        "unit": "ms",
        "aim": "at most 1/3",
        "met": 3 * seconds["ours"] <= seconds["peer"],
        "note": f"lengths {lengths[0]:.2f} and {lengths[1]:.2f}, from {float(problem.cost(tour)):.2f}",
    }
