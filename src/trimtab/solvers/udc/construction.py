"""Solutions built step by step: the state of a tour, of vehicle routes or of a knapsack, and how a policy walks it.

One state serves the whole problem and its pieces: a piece only starts and ends elsewhere. All are batched over problems
and over several samples of each. Node 0 of routes is the depot, and node 0 of a knapsack is "stop"; a sample that has
finished before others stays there, which it does with probability one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

ROUNDING = 1e-12
"""By what share of a capacity sums in float64, as all of loads are, may exceed it."""

_VEHICLES_ROOM = 1e-5  # by which what remains may exceed what the vehicles to come can carry


def room(dtype: torch.dtype) -> float:
    """By what share of a capacity a solution may exceed it: what rounding demands to their type may have added.

    Example:
        >>> room(torch.float64)
        1e-09
    """
    return max(8 * torch.finfo(dtype).eps, 1e-9)


class Walk(Protocol):
    """The state of solutions under construction.

    Attributes:
        first: (batch, samples), the node each began at.
        current: (batch, samples), the node visited last.
        goal: (batch, samples), the node to end at, where there is one.
        visited: (batch, samples, nodes).
    """

    first: Tensor
    current: Tensor
    goal: Tensor
    visited: Tensor

    @property
    def finished(self) -> bool:
        """Whether all solutions are complete."""
        ...

    def allowed(self) -> Bool[Tensor, "batch samples nodes"]:
        """Which nodes may come next; one or more for each sample."""
        ...

    def context(self) -> Float[Tensor, "batch samples features"]:
        """What else a policy must know: the capacity left, for instance."""
        ...

    def visit(self, node: Int[Tensor, "batch samples"]) -> None:
        """Goes on to a node."""
        ...


class TourWalk:
    """Visits every node once.

    Args:
        first: (batch, samples), where to begin.
        nodes: how many there are.
        goal: (batch, samples), the node to leave for the end; None for tours, which may end anywhere.
    """

    def __init__(
        self, first: Int[Tensor, "batch samples"], nodes: int, goal: Int[Tensor, "batch samples"] | None = None
    ) -> None:
        self.first = self.current = first
        self.goal = first if goal is None else goal
        self._fixed_end = goal is not None
        self.visited = torch.zeros(*first.shape, nodes, dtype=torch.bool, device=first.device)
        self.visited.scatter_(-1, first[..., None], True)
        self._left = nodes - 1

    @property
    def finished(self) -> bool:
        return self._left == 0

    def allowed(self) -> Bool[Tensor, "batch samples nodes"]:
        free = ~self.visited
        if self._fixed_end and self._left > 1:
            free.scatter_(-1, self.goal[..., None], False)
        return free

    def context(self) -> Float[Tensor, "batch samples 0"]:
        return torch.empty(*self.current.shape, 0, device=self.current.device)

    def visit(self, node: Int[Tensor, "batch samples"]) -> None:
        self.visited = self.visited.scatter(-1, node[..., None], True)
        self.current = node
        self._left -= 1


class RouteWalk:
    """Visits every customer once, with returns to the depot, node 0, where the vehicle is emptied.

    Args:
        demand: (batch, nodes), as shares of a vehicle's capacity; the depot's is 0.
        samples: how many solutions of each problem.
        used: (batch,), what the vehicle has on board at the start of a piece, from customers before it; None for a
            whole problem, which starts at the depot. A piece starts at its first customer, node 1.
        limit: (batch,), what it may have on board at the end of a piece that goes on to other customers.
        closes: (batch,), whether a piece ends at the depot; if not, it ends at its last customer.
        vehicles: (batch,), how many more may set out: a return to the depot that is not needed is not allowed while
            they could not carry what remains.
    """

    def __init__(
        self,
        demand: Float[Tensor, "batch nodes"],
        samples: int,
        *,
        used: Float[Tensor, " batch"] | None = None,
        limit: Float[Tensor, " batch"] | None = None,
        closes: Bool[Tensor, " batch"] | None = None,
        vehicles: Float[Tensor, " batch"] | None = None,
    ) -> None:
        batch, nodes = demand.shape
        none = demand.new_zeros(batch)
        self._dtype, self._slack = demand.dtype, room(demand.dtype) / 4
        demand, none = demand.double(), none.double()
        self._demand = demand[:, None].expand(-1, samples, -1)
        self._limit = (none + 1 if limit is None else limit.double())[:, None].expand(-1, samples)
        self._closes = (torch.ones_like(none, dtype=torch.bool) if closes is None else closes)[:, None].expand(
            -1, samples
        )
        self._vehicles = None if vehicles is None else vehicles[:, None].expand(-1, samples).clone()
        self._last = nodes - 1
        self.goal = torch.where(self._closes, 0, self._last)
        self.visited = torch.zeros(batch, samples, nodes, dtype=torch.bool, device=demand.device)
        self.first = self.current = torch.zeros(batch, samples, dtype=torch.long, device=demand.device)
        self._load = (none if used is None else used.double())[:, None].expand(-1, samples)
        if used is not None:
            self.visit(self.current + 1)
            self.first = self.current

    @property
    def _done(self) -> Bool[Tensor, "batch samples"]:
        return self.visited[..., 1:].all(-1) & (~self._closes | (self.current == 0))

    @property
    def finished(self) -> bool:
        return bool(self._done.all())

    def allowed(self) -> Bool[Tensor, "batch samples nodes"]:
        fits = self._demand <= (1 + self._slack - self._load)[..., None]
        free = ~self.visited & fits
        others_left = ~self.visited[..., 1:-1].all(-1)
        too_full = self._load + self._demand[..., -1] > self._limit + ROUNDING / 2
        free[..., -1] &= self._closes | ~(others_left | (too_full & (self._load > 0)))
        away = self.current != 0
        if self._vehicles is not None:
            remaining = (self._demand * ~self.visited).sum(-1)
            away &= remaining <= self._vehicles + _VEHICLES_ROOM
        free[..., 0] = away | ~free[..., 1:].any(-1)
        return free

    def context(self) -> Float[Tensor, "batch samples 2"]:
        return torch.stack([1 - self._load, self._limit], -1).to(self._dtype)

    def visit(self, node: Int[Tensor, "batch samples"]) -> None:
        at_depot = node == 0
        if self._vehicles is not None:
            self._vehicles = self._vehicles - (at_depot & (self.current != 0)).to(self._vehicles)
        taken = self._load + self._demand.gather(-1, node[..., None])[..., 0]
        self._load = torch.where(at_depot, 0.0, taken)
        self.visited = self.visited.scatter(-1, node[..., None], ~at_depot[..., None])
        self.current = node


class PackWalk:
    """Takes items into a knapsack until none fits. Node 0 is "stop", and item j is node j + 1.

    Args:
        weights: (batch, items).
        capacity: (batch,).
        samples: how many solutions of each problem.
        room: by what share of its capacity a knapsack may be too full; half of `room` by default.
    """

    def __init__(
        self,
        weights: Float[Tensor, "batch items"],
        capacity: Float[Tensor, " batch"],
        samples: int,
        *,
        room: float | None = None,
    ) -> None:
        batch, items = weights.shape
        share = max(4 * torch.finfo(weights.dtype).eps, 5e-10) if room is None else room
        self._dtype = weights.dtype
        self._weights = torch.nn.functional.pad(weights.double(), (1, 0))[:, None].expand(-1, samples, -1)
        self._room = capacity.double()[:, None].expand(-1, samples)
        self._slack = share * capacity.double()[:, None, None]
        self.first = self.current = self.goal = torch.zeros(batch, samples, dtype=torch.long, device=weights.device)
        self.visited = torch.zeros(batch, samples, items + 1, dtype=torch.bool, device=weights.device)
        self.visited[..., 0] = True

    def _fits(self) -> Bool[Tensor, "batch samples nodes"]:
        return ~self.visited & (self._weights <= self._room[..., None] + self._slack)

    @property
    def finished(self) -> bool:
        return not self._fits().any()

    def allowed(self) -> Bool[Tensor, "batch samples nodes"]:
        free = self._fits()
        free[..., 0] = ~free.any(-1)
        return free

    def context(self) -> Float[Tensor, "batch samples 1"]:
        return (self._room[..., None] / (self.visited.shape[-1] - 1)).to(self._dtype)

    def visit(self, node: Int[Tensor, "batch samples"]) -> None:
        self.visited = self.visited.scatter(-1, node[..., None], True)
        self._room = self._room - self._weights.gather(-1, node[..., None])[..., 0]
        self.current = node


class Policy(Protocol):
    """What decides on the next node: log-probabilities of all nodes, minus infinity where not allowed."""

    def __call__(self, walk: Walk, allowed: Bool[Tensor, "batch samples nodes"]) -> Tensor: ...


@dataclass(frozen=True)
class Trace:
    """What happened in a walk.

    Attributes:
        first: (batch, samples).
        goal: (batch, samples).
        actions: (batch, samples, steps), the nodes gone to.
        current: (batch, samples, steps), the nodes they were gone to from.
        allowed: (batch, samples, steps, nodes), what the choice was among.
        context: (batch, samples, steps, features).
    """

    first: Tensor
    goal: Tensor
    actions: Tensor
    current: Tensor
    allowed: Tensor
    context: Tensor


@torch.no_grad()
def rollout(walk: Walk, policy: Policy, *, draws: int | None = None, generator: torch.Generator | None = None) -> Trace:
    """Walks to the end.

    Args:
        walk: the state to start from; it is moved on.
        policy: what decides.
        draws: how many steps are drawn before the likeliest nodes are taken; all by default, and none with 0.
        generator: source of the draws; it may be a CPU generator whatever the device.
    """
    steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    first, goal = walk.first, walk.goal
    while not walk.finished:
        allowed = walk.allowed()
        scores = policy(walk, allowed)
        if draws is None or len(steps) < draws:
            scores = scores + gumbel(scores, generator)
        node = scores.argmax(-1)
        steps.append((node, walk.current, allowed, walk.context()))
        walk.visit(node)
    if not steps:  # nothing to decide, as in a knapsack into which no item fits
        nothing = (walk.current, walk.current, walk.allowed(), walk.context())
        stacked = [part.unsqueeze(2)[:, :, :0] for part in nothing]
    else:
        stacked = [torch.stack(parts, 2) for parts in zip(*steps, strict=True)]
    return Trace(first, goal, *stacked)


def gumbel(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard Gumbel noise: the argmax of log-probabilities plus this is a draw."""
    device = like.device if generator is None else generator.device
    uniform = torch.rand(like.shape, generator=generator, device=device, dtype=like.dtype).to(like.device)
    return -(-uniform.clamp_min(torch.finfo(like.dtype).tiny).log()).log()
