"""UDC trained for the instances of a study, its networks together or apart, and those that solve beside it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.solvers import UDC, OpenPaths, two_opt
from trimtab.solvers.udc import Pieces, SubSolver, constructor_loss
from trimtab.studies.engine.study import Trial
from trimtab.studies.solvers.udc.routing import (
    SOLVE,
    TRAIN,
    Answer,
    Batch,
    Routing,
    Solver,
    or_tools_solutions,
    samples_of,
)
from trimtab.studies.tools.descent import descent_step
from trimtab.studies.tools.trained_once import trained_once

CANDIDATES = 8
TEN = (0.5, 1.0, 0.3, 0.8, 0.1, 0.6, 0.4, 0.9, 0.2, 0.7)


def udc(
    trial: Trial,
    task: Routing,
    *,
    shifts: Sequence[float] | None = None,
    apart: bool = False,
    sub_solver: SubSolver | None = None,
) -> Solver:
    """UDC, trained for the task's instances.

    Args:
        trial: the run.
        task: what to train for.
        shifts: how far each round moves the solution on before it is cut, as shares of a piece; by default what UDC
            does in two rounds, a half and a whole.
        apart: train both networks apart instead of together.
        sub_solver: what solves the pieces; by default the conqueror.
    """
    net = trained(trial, task, apart=apart).eval()
    fractions = (0.5, 1.0) if shifts is None else shifts

    def solve(problem: Batch) -> Answer:
        found = net.solve(
            problem,
            samples=samples_of(trial),
            shifts=[round(fraction * net.sub_len) for fraction in fractions],
            sub_solver=sub_solver,
            generator=trial.generator(SOLVE),
        )
        return Answer(found.solution, [task.mean_cost(problem, cost) for cost in found.history])

    return solve


def or_tools_in_udcs_time(trial: Trial, task: Routing) -> Solver:
    """OR-tools: guided local search, for as long an instance as UDC takes in ten rounds; the exact knapsack solver."""
    solve = udc(trial, task, shifts=TEN)

    def peer(problem: Batch) -> Answer:
        return Answer(or_tools_solutions(problem, allowed))

    problem = task.test_instances(trial)
    solve(problem)  # the first time is longer, for both
    or_tools_solutions(problem, 0.001)
    started = time.perf_counter()
    solve(problem)
    allowed = (time.perf_counter() - started) / trial.pick(smoke=2, laptop=16, paper=128)
    return peer


def two_opt_pieces(pieces: Pieces) -> Tensor:
    """2-opt as the solver of a tour's pieces.

    Raises:
        TypeError: the pieces are no open paths.
    """
    if not isinstance(pieces, OpenPaths):
        raise TypeError(f"2-opt solves open paths, got {type(pieces).__name__}")
    return two_opt(pieces.coords)


def trained(trial: Trial, task: Routing, *, apart: bool = False) -> UDC:
    """Both networks, trained together or apart on as many instances and pieces, kept for other arms."""
    net = _fresh(trial, task)
    scheme, train = ("apart", _train_apart) if apart else ("together", _train)
    return trained_once(trial, net, lambda: train(net, trial, task), key=f"routing {task} {scheme} seed {trial.seed}")


def _fresh(trial: Trial, task: Routing) -> UDC:
    with torch.random.fork_rng():
        torch.manual_seed(trial.seed)
        sizes = trial.pick(
            smoke=({"width": 16, "depth": 1}, {"width": 16, "depth": 1, "hidden": 32}),
            laptop=({"width": 32, "depth": 4}, {"width": 64, "depth": 2, "hidden": 128}),
            paper=({"width": 64, "depth": 12}, {"width": 128, "depth": 6, "hidden": 512}),
        )
        sub_len = trial.pick(smoke=10, laptop=20, paper=100)
        neighbours = trial.pick(smoke=8, laptop=50 if task.kind == "knapsack" else 20, paper=100)
        return UDC.for_problem(task.classes(), sub_len, neighbours, divider=sizes[0], conqueror=sizes[1]).to(
            trial.device
        )


def _plan(trial: Trial, task: Routing) -> tuple[int, int, int]:
    """Steps, instances a step, and proposals for each."""
    steps = {"tsp": 100, "cvrp": 60, "knapsack": 40}[task.kind]
    return trial.pick(smoke=(2, 2, 4), laptop=(steps, 4, 4), paper=(250_000, 1, 40))


def _optimizer(net: torch.nn.Module, trial: Trial) -> torch.optim.Optimizer:
    return torch.optim.Adam(net.parameters(), lr=trial.pick(smoke=1e-3, laptop=1e-3, paper=1e-4))


def _train(net: UDC, trial: Trial, task: Routing) -> None:
    steps, batch, samples = _plan(trial, task)
    generator, optimizer = trial.generator(TRAIN), _optimizer(net, trial)
    for step in range(steps):
        problem = task.instances(trial, batch, generator, device=trial.device)
        descent_step(optimizer, net.loss(problem, samples=samples, candidates=CANDIDATES, generator=generator).total)
        trial.report(0.8 * step / steps)


def _train_apart(net: UDC, trial: Trial, task: Routing) -> None:
    """The divider on the cost of its bare proposals, the conqueror on random paths, as many of each as together.

    Raises:
        ValueError: the instances are no tours.
    """
    if task.kind != "tsp":
        raise ValueError(f"kind must be 'tsp' to train both networks apart, got {task.kind!r}")
    steps, batch, samples = _plan(trial, task)
    generator, optimizer = trial.generator(TRAIN), _optimizer(net, trial)
    pieces = batch * samples * (task.size(trial) // net.sub_len)
    for step in range(steps):
        problem = task.instances(trial, batch, generator, device=trial.device)
        divider = net.loss(problem, samples=samples, rounds=0, candidates=CANDIDATES, generator=generator).divider
        conqueror = torch.zeros((), device=trial.device)
        for _ in range(2):
            paths = OpenPaths(torch.rand(pieces, net.sub_len, 2, generator=generator).to(trial.device))
            conqueror = conqueror + constructor_loss(net.conqueror, paths, CANDIDATES, generator=generator)[0]
        descent_step(optimizer, divider + conqueror)
        trial.report(0.8 * step / steps)
