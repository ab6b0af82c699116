"""The method itself: dividing, conquering and reuniting, and the losses that train both networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.ops.arguments import integer, one_of, tensor_problem
from trimtab.ops.attack import eval_mode
from trimtab.ops.whole_state import WholeState
from trimtab.solvers.udc.construction import rollout
from trimtab.solvers.udc.cvrp import CVRP
from trimtab.solvers.udc.heatmap_gnn import HeatmapGNN
from trimtab.solvers.udc.knapsack import Knapsack
from trimtab.solvers.udc.path_constructor import PathConstructor
from trimtab.solvers.udc.problems import Pieces, Problem
from trimtab.solvers.udc.tsp import TSP

SubSolver: TypeAlias = Callable[[Pieces], Tensor]

# Numbers of features of a kind of problem: of its nodes and edges, of its pieces' nodes, and of a step's context.
_FEATURES: dict[type, tuple[int, int, int, int]] = {TSP: (2, 1, 3, 0), CVRP: (3, 2, 6, 2), Knapsack: (2, 1, 3, 1)}


def policy_gradient_loss(
    cost: Float[Tensor, "batch samples"], log_prob: Float[Tensor, "batch samples"]
) -> Float[Tensor, ""]:
    """A scalar whose gradient is REINFORCE's, with the mean over an instance's samples as the baseline.

    In expectation it is the gradient of the mean cost times 1 - 1/samples, as each sample is part of its own baseline.

    Example:
        >>> log_prob = torch.zeros(1, 2, requires_grad=True)
        >>> policy_gradient_loss(torch.tensor([[1.0, 3.0]]), log_prob).backward()
        >>> log_prob.grad
        tensor([[-0.5000,  0.5000]])
    """
    return ((cost - cost.mean(1, keepdim=True)).detach() * log_prob).mean()


@torch.no_grad()
def keep_better(pieces: Pieces, candidates: Tensor) -> Tensor:
    """For each piece its cheapest candidate, if that is cheaper than the solution it has, and else that solution.

    Args:
        pieces: what is to be improved.
        candidates: (pieces, candidates, n, ...), or (pieces, n, ...) for one each.

    Raises:
        ValueError: the shape is another.
    """
    current = pieces.current
    if candidates.shape == current.shape:
        candidates = candidates[:, None]
    if candidates.shape[:1] + candidates.shape[2:] != current.shape or candidates.shape[1] == 0:
        wanted = ("pieces", "candidates", *current.shape[1:])
        raise ValueError(
            f"candidates must be of shape {wanted} for {len(current)} pieces, got shape {tuple(candidates.shape)}"
        )
    cost, best = pieces.cost(candidates).min(1)
    chosen = candidates[torch.arange(len(best), device=best.device), best]
    better = cost < pieces.cost(current[:, None])[:, 0]
    return torch.where(better.view(-1, *(1 for _ in current.shape[1:])), chosen, current)


def dcr_round(
    problem: Problem,
    solution: Tensor,
    sub_solver: SubSolver,
    sub_len: int,
    *,
    shift: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Cuts solutions into pieces, solves the pieces, and puts back what is better.

    Args:
        problem: whose solutions they are.
        solution: (batch, samples, n, ...).
        sub_solver: given the pieces, returns candidates for each. Those of a tour are open paths `pieces.coords`
            (pieces, sub_len, 2), and candidates are orders of their points.
        sub_len: nodes of a piece.
        shift: how far the solution is moved on before it is cut.
        generator: source of the random groups of a knapsack's items.

    Returns:
        Solutions of the same shape, none of them costlier.

    Raises:
        TypeError: `solution` is no tensor.
        ValueError: `sub_len` is not in 3 .. n, or solutions or candidates are none.

    Example:
        >>> from trimtab.solvers import two_opt
        >>> problem = TSP.random(2, 50, generator=torch.Generator().manual_seed(0))
        >>> tour = torch.arange(50).expand(2, 1, 50)
        >>> better = dcr_round(problem, tour, lambda paths: two_opt(paths.coords), sub_len=10, shift=5)
        >>> bool((problem.cost(better) < problem.cost(tour)).all())
        True
    """
    if problem_of := tensor_problem(solution=solution):
        raise TypeError(problem_of)
    if solution.ndim < 3:
        raise ValueError(f"solution must be of shape (batch, samples, n, ...), got shape {tuple(solution.shape)}")
    sub_len, shift = integer("sub_len", sub_len, 3, solution.shape[2]), integer("shift", shift, None)
    pieces, merge = problem.split(solution, sub_len, shift=shift, generator=generator)
    return merge(keep_better(pieces, sub_solver(pieces)))


@dataclass(frozen=True)
class UDCResult:
    """Solutions of a batch of problems.

    Attributes:
        solution: (batch, n, ...), the best of each instance.
        cost: (batch,).
        history: (rounds + 1, batch), the best cost proposed, and after each round.
    """

    solution: Tensor
    cost: Tensor
    history: Tensor


@dataclass(frozen=True)
class UDCLoss:
    """What to minimise, and how it went.

    Attributes:
        divider: scalar, whose gradient reaches the divider only.
        conqueror: scalar, summed over rounds, whose gradient reaches the conqueror only.
        history: (rounds + 1,), the mean cost of the proposals, and after each round.
    """

    divider: Tensor
    conqueror: Tensor
    history: Tensor

    @property
    def total(self) -> Tensor:
        """Both: one backward pass trains both networks."""
        return self.divider + self.conqueror


class UDC(WholeState, nn.Module):
    """A divider and a conqueror, to be trained together on problems of one kind.

    Args:
        divider: proposes solutions.
        conqueror: improves pieces of them.
        sub_len: nodes of a piece, and steps between heat maps.
        neighbours: of each node in the divider's sparse graph.

    Raises:
        ValueError: `sub_len` is less than 3, or `neighbours` less than 1.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> udc = UDC.for_problem(TSP, sub_len=10, divider={"depth": 2}, conqueror={"width": 16, "depth": 1})
        >>> optimizer = torch.optim.Adam(udc.parameters(), lr=1e-4)
        >>> for _ in range(2):
        ...     problem = TSP.random(4, 30, generator=generator)
        ...     loss = udc.loss(problem, samples=4, candidates=6, generator=generator)
        ...     optimizer.zero_grad()
        ...     loss.total.backward()
        ...     optimizer.step()
        >>> result = udc.solve(problem, samples=8, generator=generator)
        >>> result.solution.shape, bool((result.history[-1] <= result.history[0]).all())
        (torch.Size([4, 30]), True)
    """

    def __init__(
        self, divider: HeatmapGNN, conqueror: PathConstructor, sub_len: int = 100, neighbours: int = 100
    ) -> None:
        super().__init__()
        self.sub_len, self.neighbours = integer("sub_len", sub_len, 3), integer("neighbours", neighbours)
        self.divider = divider
        self.conqueror = conqueror

    @classmethod
    def for_problem(
        cls,
        problem: type[TSP] | type[CVRP] | type[Knapsack],
        sub_len: int = 100,
        neighbours: int = 100,
        *,
        divider: dict[str, int] | None = None,
        conqueror: dict[str, int] | None = None,
    ) -> UDC:
        """Both networks for a kind of problem, with what is given of their sizes (`width`, `depth`, `hidden`).

        Raises:
            ValueError: the kind of problem is unknown.
        """
        nodes, edges, piece_nodes, context = _FEATURES[one_of("problem", problem, _FEATURES)]
        return cls(
            HeatmapGNN(nodes, edges, **(divider or {})),
            PathConstructor(piece_nodes, context, **(conqueror or {})),
            sub_len,
            neighbours,
        )

    def loss(
        self,
        problem: Problem,
        *,
        samples: int = 40,
        candidates: int = 50,
        rounds: int = 2,
        generator: torch.Generator | None = None,
    ) -> UDCLoss:
        """Proposes, conquers and reunites by sampling, and returns the policy-gradient losses.

        Args:
            problem: a batch to train on.
            samples: proposals for each instance, at least 2.
            candidates: solutions of each piece, at least 2.
            rounds: of conquering; with 0 the divider learns from the cost of its bare proposals.
            generator: source of all draws.

        Raises:
            ValueError: an argument is out of range, or the problem smaller than a piece; nothing has changed then.
        """
        samples, candidates = integer("samples", samples, 2), integer("candidates", candidates, 2)
        rounds = integer("rounds", rounds, 0)
        self._check_size(problem)
        policy = self.divider.policy(problem.graph(self.neighbours), self.sub_len)
        trace = rollout(problem.walk(samples, generator=generator), policy, generator=generator)
        solution = problem.read(trace)
        history = [problem.cost(solution)]
        conqueror = torch.zeros((), device=history[0].device)
        for number in range(rounds):
            shift = self._shift(number, generator)
            pieces, merge = problem.split(solution, self.sub_len, shift=shift, generator=generator)
            loss, found = constructor_loss(self.conqueror, pieces, candidates, generator=generator)
            conqueror = conqueror + loss
            solution = merge(keep_better(pieces, found))
            history.append(problem.cost(solution))
        divider = policy_gradient_loss(history[-1] / problem.scale[:, None], policy.log_prob(trace))
        return UDCLoss(divider, conqueror, torch.stack([cost.mean() for cost in history]))

    @torch.no_grad()
    def solve(
        self,
        problem: Problem,
        *,
        samples: int = 50,
        rounds: int = 2,
        shifts: Sequence[int] | None = None,
        greedy: bool = True,
        sub_solver: SubSolver | None = None,
        generator: torch.Generator | None = None,
    ) -> UDCResult:
        """Solves a batch of problems with the networks as they are, in evaluation mode.

        Args:
            problem: the batch.
            samples: proposals for each instance, of which the best is returned in the end.
            rounds: of conquering. The first two cut half a piece apart, later ones at random.
            shifts: how far each round moves solutions on before it cuts them, instead of `rounds`.
            greedy: follow the likeliest nodes, from random starts or after a few steps that are drawn
                (`problem.drawn_steps`); otherwise whole proposals are drawn.
            sub_solver: what solves the pieces; by default the conqueror, greedily, from both ends of open paths.
            generator: source of all draws.

        Raises:
            ValueError: an argument is out of range.
        """
        samples, rounds = integer("samples", samples), integer("rounds", rounds, 0)
        self._check_size(problem)
        with eval_mode(self):
            policy = self.divider.policy(problem.graph(self.neighbours), self.sub_len)
            walk = problem.walk(samples, generator=generator)
            draws = problem.drawn_steps if greedy else None
            solution = problem.read(rollout(walk, policy, draws=draws, generator=generator))
            history = [problem.cost(solution)]
            for shift in (self._shift(number, generator) for number in range(rounds)) if shifts is None else shifts:
                solve = self.conqueror if sub_solver is None else sub_solver
                solution = dcr_round(problem, solution, solve, self.sub_len, shift=shift, generator=generator)
                history.append(problem.cost(solution))
        cost, best = history[-1].min(1)
        chosen = solution[torch.arange(len(best), device=best.device), best]
        return UDCResult(chosen, cost, torch.stack([costs.amin(1) for costs in history]))

    def _shift(self, number: int, generator: torch.Generator | None) -> int:
        if number < 2:
            return (number + 1) * self.sub_len // 2
        device = None if generator is None else generator.device
        return int(torch.randint(1, self.sub_len + 1, (), generator=generator, device=device))

    def _check_size(self, problem: Problem) -> None:
        if self.sub_len > problem.size:
            raise ValueError(f"problem must be of at least sub_len = {self.sub_len} nodes, got {problem.size}")


def constructor_loss(
    conqueror: PathConstructor, pieces: Pieces, candidates: int, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draws candidates for pieces, and returns the policy-gradient loss of their normalised costs, and them."""
    policy = conqueror.policy(pieces)
    trace = rollout(pieces.walk(candidates), policy, generator=generator)
    found = pieces.read(trace)
    return policy_gradient_loss(pieces.cost(found) / pieces.scale[:, None], policy.log_prob(trace)), found
