"""Does repairing what a divider proposes, and training it for being repaired, give shorter tours?

Tours of 100 cities in pieces of 20, vehicle routes of 60 customers in runs of 20, and knapsacks of 100 items in groups
of 20; 16 instances a seed. The divider has 4 layers of width 32 and the conqueror 2 of width 64, trained for 100 steps
(tours), 60 or 40 of 4 instances with 4 proposals each, less than half a minute of one core, with Adam at 1e-3, where
the authors train for days on a GPU at 1e-4 and on instances of 500 and 1,000 nodes. Neither the sizes nor the rate were
searched; in a first look at one seed, runs had 10 of 50 customers, and they have had 20 since, like the other pieces;
an earlier study trained about three times as long.

UDC, nearest neighbour and 2-opt start 16 times and keep the best; UDC's time is that of solving, in ten rounds where it
meets OR-tools, which runs guided local search for equally long on each instance, or for a first descent where that
takes longer. Without reunion there are two rounds too, with the same cut. Trained apart, the divider learns from the
length of its bare tours and the conqueror from as many random paths as it would have seen together. A knapsack's cost
is the share of the fractional knapsack's value that is missed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from trimtab.studies.engine.study import Claim, Experiment, Metric, Study, Trial
from trimtab.studies.solvers.udc.routing import LENGTH, VALUE, Routing, Solver, heuristic, two_opt_tours
from trimtab.studies.solvers.udc.training import TEN, or_tools_in_udcs_time, two_opt_pieces, udc

Prepare = Callable[[Trial, Routing], Solver]


def experiment(
    name: str, task: Routing, prepare: Mapping[str, Prepare], metrics: Mapping[str, Metric], cost: float
) -> Experiment:
    """Contestants on instances of one kind; those that train do it once for all of them."""
    return Experiment(
        name,
        arms={arm: partial(task.run, prepare=one) for arm, one in prepare.items()},
        metrics=metrics,
        requires={"OR-tools, equal seconds": ("ortools",)},
        cost=cost,
    )


UDC: dict[str, Prepare] = {
    "UDC": udc,
    "UDC, 10 rounds": partial(udc, shifts=TEN),
    "divider alone": partial(udc, shifts=()),
    "no reunion": partial(udc, shifts=(0.5, 0.5)),
    "OR-tools, equal seconds": or_tools_in_udcs_time,
}
ON_TOURS: dict[str, Prepare] = {
    "nearest neighbour": heuristic,
    "2-opt": two_opt_tours,
    "trained apart": partial(udc, apart=True),
    "2-opt conquers": partial(udc, sub_solver=two_opt_pieces),
}

tours = experiment("tours of 100 cities", Routing("tsp"), {**UDC, **ON_TOURS}, LENGTH, cost=5.0)
routes = experiment(
    "routes of 60 customers", Routing("cvrp"), {**UDC, "nearest neighbour": heuristic}, LENGTH, cost=2.8
)
knapsacks = experiment(
    "knapsacks of 100 items",
    Routing("knapsack"),
    {"UDC": udc, "divider alone": UDC["divider alone"], "best ratio": heuristic},
    VALUE,
    cost=2.8,
)

study = Study(
    paper="udc",
    experiments=[tours, routes, knapsacks],
    headline=Claim(
        "UDC, 10 rounds",
        below="OR-tools, equal seconds",
        on="cost",
        at=tours,
        text="In equal seconds UDC's tours are shorter than OR-tools'",
    ),
    claims=[
        Claim("UDC, 10 rounds", below="OR-tools, equal seconds", on="cost", at=routes),
        Claim("UDC, 10 rounds", below="2-opt", on="cost", at=tours),
        Claim(
            "UDC",
            below="trained apart",
            on="cost",
            at=tours,
            text="Training together gives shorter tours than training apart",
        ),
        Claim(
            "UDC",
            below="no reunion",
            on="cost",
            at=tours,
            text="A second cut at shifted places shortens tours more than one at the same places",
        ),
        Claim("UDC", below="2-opt conquers", on="cost", at=tours),
        Claim("UDC", below="nearest neighbour", on="cost", at=routes),
        Claim("UDC", below="best ratio", on="cost", at=knapsacks),
    ],
)
