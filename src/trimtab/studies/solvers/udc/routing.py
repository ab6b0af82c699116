"""Tours, vehicle routes and knapsacks on instances drawn like those that networks are trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from trimtab.solvers import CVRP, TSP, Knapsack, nearest_neighbour, two_opt
from trimtab.solvers.udc.construction import Walk, rollout
from trimtab.studies.engine.study import Curve, Metric, Result, Trial
from trimtab.studies.tools.stopwatch import Stopwatch

Kind = Literal["tsp", "cvrp", "knapsack"]
Batch: TypeAlias = TSP | CVRP | Knapsack

TEST, TRAIN, START, SOLVE = range(4)  # streams of random numbers
UNIT = 1_000_000  # of OR-tools' integers in our lengths, weights and values


@dataclass(frozen=True)
class Answer:
    """What a contestant returns.

    Attributes:
        solution: (batch, n, ...), one for each instance.
        history: mean costs, of the first solutions and after each round; may be empty.
    """

    solution: Tensor
    history: Sequence[float] = ()


Solver: TypeAlias = Callable[[Batch], Answer]

LENGTH = {"cost": Metric("mean length", best="min"), "seconds": Metric("time for an instance (s)", best="min")}
VALUE = {**LENGTH, "cost": Metric("share of the bound on a knapsack's value not reached (%)", best="min", percent=True)}


@dataclass(frozen=True)
class Routing:
    """Solve instances of one kind and size; a seed is a set of instances, and of everything drawn in training.

    Attributes:
        kind: "tsp" (cities uniform in the unit square), "cvrp" (depot and customers too, demands 1 to 9) or "knapsack"
            (weights and values uniform in the unit interval).
        n: number of cities, customers or items; None is the budget's.
    """

    kind: Kind = "tsp"
    n: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        if self.n is not None and self.n < 20:
            raise ValueError(f"n must be at least 20, got {self.n}")

    def run(self, trial: Trial, prepare: Callable[[Trial, Routing], Solver]) -> Result:
        """What a contestant's solutions cost; it is made ready (trained) untimed and timed on the test instances."""
        solver = prepare(trial, self)
        trial.report(0.8)
        problem = self.test_instances(trial)
        with Stopwatch(trial.device) as watch:
            answer = solver(problem)
        cost = self.mean_cost(problem, problem.cost(answer.solution[:, None])[:, 0])
        if not math.isfinite(cost):
            raise ValueError("a contestant's solution exceeds a capacity")
        rounds = list(range(len(answer.history)))
        return Result(
            {"cost": cost, "seconds": watch.seconds / len(answer.solution)},
            {"cost": Curve(rounds, list(answer.history), x_label="round")} if rounds else {},
        )

    def test_instances(self, trial: Trial) -> Batch:
        """Those that all contestants solve."""
        size = trial.pick(smoke=2, laptop=16, paper=128)
        return self.instances(trial, size, trial.generator(TEST), device=trial.device)

    def size(self, trial: Trial) -> int:
        """The number of nodes."""
        laptop = 60 if self.kind == "cvrp" else 100
        return self.n or trial.pick(smoke=20, laptop=laptop, paper=500)

    def instances(self, trial: Trial, batch: int, generator: torch.Generator, *, device: str = "cpu") -> Batch:
        """Random instances of the trial's size."""
        n = self.size(trial)
        if self.kind == "tsp":
            return TSP(TSP.random(batch, n, generator=generator).coords.to(device))
        if self.kind == "cvrp":
            routes = CVRP.random(batch, n, capacity=40 if n < 100 else 50, generator=generator)
            return CVRP(routes.depot.to(device), routes.coords.to(device), routes.demand.to(device))
        items = Knapsack.random(batch, n, generator=generator)
        return Knapsack(items.weights.to(device), items.values.to(device), items.capacity.to(device))

    def mean_cost(self, problem: Batch, cost: Tensor) -> float:
        """Mean length, or for knapsacks the mean share of the fractional knapsack's value that is missed."""
        if isinstance(problem, Knapsack):
            return float((1 + cost / fractional_value(problem)).mean())
        return float(cost.mean())

    def classes(self) -> type[TSP] | type[CVRP] | type[Knapsack]:
        """The class of the instances."""
        kinds: dict[str, type[TSP] | type[CVRP] | type[Knapsack]] = {"tsp": TSP, "cvrp": CVRP, "knapsack": Knapsack}
        return kinds[self.kind]


def fractional_value(problem: Knapsack) -> Tensor:
    """What a knapsack could hold if items could be cut: no solution is worth more."""
    order = (problem.values / problem.weights).argsort(dim=-1, descending=True)
    weights, values = problem.weights.gather(1, order), problem.values.gather(1, order)
    room = problem.capacity[:, None] - (weights.cumsum(-1) - weights)
    return (values * (room / weights).clamp(0, 1)).sum(-1)


# --- heuristics and peers ------------------------------------------------------------------------------------------


def heuristic(trial: Trial, task: Routing) -> Solver:
    """Always the nearest next: the best tour of as many starts as UDC has; for knapsacks the best ratio that fits."""

    def solve(problem: Batch) -> Answer:
        if isinstance(problem, TSP):
            tours = nearest_neighbour(problem.coords, _starts(trial, problem))
            return Answer(tours[torch.arange(len(tours)), problem.cost(tours).argmin(1)])
        graph = problem.graph(task.size(trial))
        if isinstance(problem, Knapsack):
            ratio = torch.nn.functional.pad(problem.values / problem.weights, (1, 0))
            scores = ratio[:, None].expand(-1, ratio.shape[1], -1)
        else:
            near = graph.edges[..., 1]
            scores = torch.full((*near.shape[:2], near.shape[1]), -torch.inf, device=near.device)
            scores = scores.scatter(2, graph.neighbours, near)

        def best(walk: Walk, allowed: Tensor) -> Tensor:
            row = scores.gather(1, walk.current[..., None].expand(-1, -1, scores.shape[-1]))
            row = row.masked_fill(~allowed, -torch.inf)
            row[..., 0] = torch.where(allowed[..., 1:].any(-1), -torch.inf, 0.0)  # home only when nothing else fits
            return row

        return Answer(problem.read(rollout(problem.walk(1), best, draws=0))[:, 0])

    return solve


def two_opt_tours(trial: Trial, task: Routing) -> Solver:
    """2-opt from the nearest-neighbour tours of as many starts as UDC has; the best.

    Raises:
        TypeError: the instances are no tours.
    """

    def solve(problem: Batch) -> Answer:
        if not isinstance(problem, TSP):
            raise TypeError(f"2-opt solves tours, got {type(problem).__name__}")
        tours = nearest_neighbour(problem.coords, _starts(trial, problem))
        batch, samples, n = tours.shape
        coords = problem.coords[:, None].expand(-1, samples, -1, -1).flatten(0, 1)
        tours = two_opt(coords, tours.flatten(0, 1), closed=True).view(batch, samples, n)
        return Answer(tours[torch.arange(batch), problem.cost(tours).argmin(1)])

    return solve


def or_tools_solutions(problem: Batch, seconds: float) -> Tensor:
    """OR-tools' solutions, of shape (batch, n, ...).

    Args:
        problem: a batch of instances.
        seconds: of guided local search for each instance, or more where a first descent takes more; knapsacks are
            solved to optimality instead.

    Raises:
        ImportError: OR-tools is not installed.
    """
    try:
        from ortools.algorithms.python import knapsack_solver
    except ImportError as error:
        raise ImportError('OR-tools is needed here: pip install "trimtab[peers]"') from error
    if isinstance(problem, Knapsack):
        found = torch.zeros_like(problem.weights, dtype=torch.bool)
        for row, (weights, values, capacity) in enumerate(
            zip(problem.weights.tolist(), problem.values.tolist(), problem.capacity.tolist(), strict=True)
        ):
            solver = knapsack_solver.KnapsackSolver(
                knapsack_solver.SolverType.KNAPSACK_MULTIDIMENSION_BRANCH_AND_BOUND_SOLVER, "knapsack"
            )
            heavy = [[math.ceil(weight * UNIT) for weight in weights]]
            solver.init([int(value * UNIT) for value in values], heavy, [int(capacity * UNIT)])
            solver.solve()
            found[row] = torch.tensor([solver.best_solution_contains(item) for item in range(len(weights))])
        return found
    if isinstance(problem, TSP):
        return torch.stack([torch.tensor(_routes(points, None, 1, seconds)[0]) for points in problem.coords.cpu()]).to(
            problem.coords.device
        )
    rows = []
    for depot, coords, demand in zip(problem.depot.cpu(), problem.coords.cpu(), problem.demand.cpu(), strict=True):
        points, vehicles = torch.cat([depot[None], coords]), math.ceil(float(demand.sum())) + 3
        routes = [route[1:] for route in _routes(points, demand, vehicles, seconds) if len(route) > 1]
        rows.append([(node - 1, int(node == route[-1])) for route in routes for node in route])
    return torch.tensor(rows, device=problem.coords.device)


def _routes(points: Tensor, demand: Tensor | None, vehicles: int, seconds: float) -> list[list[int]]:
    """Routes from node 0, each with it at its head."""
    from ortools.constraint_solver import pywrapcp, routing_enums_pb2

    manager = pywrapcp.RoutingIndexManager(len(points), vehicles, 0)
    model = pywrapcp.RoutingModel(manager)
    lengths = (torch.cdist(points.double(), points.double()) * UNIT).round().long().tolist()
    model.SetArcCostEvaluatorOfAllVehicles(model.RegisterTransitMatrix(lengths))
    if demand is not None:
        loads = [0, *(math.ceil(share * UNIT - 0.5) for share in demand.tolist())]
        model.AddDimension(model.RegisterUnaryTransitVector(loads), 0, UNIT, True, "load")
    parameters = pywrapcp.DefaultRoutingSearchParameters()
    parameters.first_solution_strategy = routing_enums_pb2.FirstSolutionStrategy.PATH_CHEAPEST_ARC
    metaheuristics = routing_enums_pb2.LocalSearchMetaheuristic
    parameters.local_search_metaheuristic = metaheuristics.GUIDED_LOCAL_SEARCH
    parameters.time_limit.FromMilliseconds(max(1, round(1000 * seconds)))
    found = model.SolveWithParameters(parameters)
    if found is None:  # too little time even for a first solution
        parameters.local_search_metaheuristic = metaheuristics.GREEDY_DESCENT
        parameters.ClearField("time_limit")
        found = model.SolveWithParameters(parameters)
    routes = []
    for vehicle in range(vehicles):
        index, route = model.Start(vehicle), []
        while not model.IsEnd(index):
            route.append(manager.IndexToNode(index))
            index = found.Value(model.NextVar(index))
        routes.append(route)
    return routes


def samples_of(trial: Trial) -> int:
    """How many solutions of each instance a contestant may make, to keep the best: starts of a heuristic, say."""
    return trial.pick(smoke=4, laptop=16, paper=50)


def _starts(trial: Trial, problem: TSP) -> Tensor:
    batch, n, _ = problem.coords.shape
    return torch.randint(n, (batch, samples_of(trial)), generator=trial.generator(START)).to(problem.coords.device)
