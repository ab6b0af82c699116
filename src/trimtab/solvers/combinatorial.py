r"""Travelling salesman, capacitated vehicle routing and knapsack problems, and how each is cut into pieces.

A problem is a batch of instances. It knows its sparse graph (what a network reads), how a solution is built (`walk`),
what it costs, and how a solution is cut into pieces that can be solved apart and put back (`split`):

- a tour is cut into open paths whose ends stay;
- vehicle routes, sorted by their angle around the depot, are cut into runs of customers. Where a cut falls inside a
  route, what the vehicle may have on board there is fixed at $u / D$ of its capacity, for a load of $u$ so far in a
  route of demand $D$: each piece gets its share of the capacity that the route leaves free, and pieces that keep to it
  fit together whatever each of them does;
- items are grouped at random, and each group gets the weight it has now and an equal share of the free capacity.

Costs are to be minimised; a knapsack's is its value, negated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import one_hot, pad

from trimtab.solvers.construction import PackWalk, RouteWalk, TourWalk, Trace, Walk
from trimtab.solvers.routing import is_permutation, normalise_paths, path_length, take, tour_length

_ROOM = 1e-4  # by which a capacity may be exceeded in floating point
_TINY = 1e-10


class Graph(NamedTuple):
    """What a network reads of a batch of problems.

    Attributes:
        nodes: (batch, nodes, features).
        neighbours: (batch, nodes, k), without the node itself.
        edges: (batch, nodes, k, features).
    """

    nodes: Tensor
    neighbours: Tensor
    edges: Tensor


class Pieces(Protocol):
    """Sub-problems of equal size, cut from solutions, each with the solution it has now.

    Attributes:
        features: (pieces, nodes, features), normalised.
        affinity: (pieces, nodes, nodes), larger for nodes more likely to follow each other, at most 0.
        scale: (pieces,), the unit of `features`: a cost divided by it is one in them.
        current: (pieces, n, ...), the solution it was cut with, as a candidate.
    """

    @property
    def features(self) -> Tensor: ...
    @property
    def affinity(self) -> Tensor: ...
    @property
    def scale(self) -> Tensor: ...
    @property
    def current(self) -> Tensor: ...

    def walk(self, candidates: int) -> Walk:
        """The start of building that many candidates for each piece."""
        ...

    def read(self, trace: Trace) -> Tensor:
        """The candidates that were built, of shape (pieces, candidates, n, ...)."""
        ...

    def cost(self, candidates: Tensor) -> Tensor:
        """Costs (pieces, candidates); infinite for a candidate that exceeds a capacity."""
        ...


Merge: TypeAlias = Callable[[Tensor], Tensor]


class Problem(Protocol):
    """A batch of instances of one kind and size.

    Attributes:
        drawn_steps: how many steps of greedy solutions are drawn so that they differ; 0 where their starts do.
    """

    drawn_steps: ClassVar[int]

    def graph(self, neighbours: int) -> Graph:
        """Nodes, each with that many neighbours, or all others if there are fewer."""
        ...

    def walk(self, samples: int, *, generator: torch.Generator | None = None) -> Walk:
        """The start of building that many solutions of each instance."""
        ...

    def read(self, trace: Trace) -> Tensor:
        """The solutions that were built, of shape (batch, samples, n, ...)."""
        ...

    def cost(self, solution: Tensor) -> Tensor:
        """Costs (batch, samples)."""
        ...

    def split(
        self, solution: Tensor, sub_len: int, *, shift: int, generator: torch.Generator | None = None
    ) -> tuple[Pieces, Merge]:
        """The pieces of a solution, and what puts candidates for all of them (pieces, n, ...) back into one."""
        ...


# --- travelling salesman -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TSP:
    """Travelling salesman problems. A solution is the order of the cities, (batch, samples, n).

    Attributes:
        coords: (batch, n, 2).

    Raises:
        ValueError: the shape is another, or a value is not finite.

    Example:
        >>> problem = TSP(torch.tensor([[[0.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]]))
        >>> problem.cost(torch.tensor([[[0, 2, 1, 3]]]))
        tensor([[4.]])
    """

    coords: Float[Tensor, "batch n 2"]

    drawn_steps: ClassVar[int] = 0

    def __post_init__(self) -> None:
        _check_coords("coords", self.coords)

    @classmethod
    def random(cls, batch: int, n: int, *, generator: torch.Generator | None = None) -> TSP:
        """Cities uniform in the unit square."""
        return cls(torch.rand(batch, n, 2, generator=generator))

    def graph(self, neighbours: int) -> Graph:
        return _nearest(self.coords, -torch.cdist(self.coords, self.coords)[..., None], neighbours)

    def walk(
        self,
        samples: int,
        *,
        generator: torch.Generator | None = None,
        starts: Int[Tensor, "batch samples"] | None = None,
    ) -> TourWalk:
        """Tours from random cities, or from those given."""
        batch, n, _ = self.coords.shape
        if starts is None:
            device = None if generator is None else generator.device
            starts = torch.randint(n, (batch, samples), generator=generator, device=device).to(self.coords.device)
        return TourWalk(starts, n)

    def read(self, trace: Trace) -> Int[Tensor, "batch samples n"]:
        return torch.cat([trace.first[..., None], trace.actions], -1)

    def cost(self, solution: Int[Tensor, "batch samples n"]) -> Float[Tensor, "batch samples"]:
        return tour_length(self.coords, solution)

    def split(
        self,
        solution: Int[Tensor, "batch samples n"],
        sub_len: int,
        *,
        shift: int,
        generator: torch.Generator | None = None,
    ) -> tuple[OpenPaths, Merge]:
        """Open paths of `sub_len` cities of the tour moved on by `shift`; the cities left over stay as they are.

        Raises:
            ValueError: a solution is no permutation.
        """
        _check_orders(solution, self.coords.shape[1])
        rolled = solution.roll(shift, -1)
        pieces, count = _cut(rolled, sub_len)

        def merge(chosen: Tensor) -> Tensor:
            kept = pieces.gather(-1, chosen.reshape(pieces.shape)).flatten(-2)
            return torch.cat([kept, rolled[..., count * sub_len :]], -1).roll(-shift, -1)

        return OpenPaths(take(self.coords, pieces).flatten(0, 2)), merge


@dataclass(frozen=True)
class OpenPaths:
    """Paths whose first and last point stay. A candidate is an order, (pieces, candidates, n).

    Half of the candidates are built from one end and half from the other, since both are as good a place to begin.

    Attributes:
        coords: (pieces, n, 2), in the order of the path as it is.
    """

    coords: Float[Tensor, "pieces n 2"]

    def __post_init__(self) -> None:
        _check_coords("coords", self.coords)

    @property
    def features(self) -> Float[Tensor, "pieces n 3"]:
        unit, _ = normalise_paths(self.coords)
        ends = torch.zeros_like(unit[..., :1])
        ends[:, [0, -1]] = 1
        return torch.cat([unit, ends], -1)

    @property
    def affinity(self) -> Float[Tensor, "pieces n n"]:
        unit, _ = normalise_paths(self.coords)
        return -torch.cdist(unit, unit)

    @property
    def scale(self) -> Float[Tensor, " pieces"]:
        return normalise_paths(self.coords)[1]

    @property
    def current(self) -> Int[Tensor, "pieces n"]:
        pieces, n, _ = self.coords.shape
        return torch.arange(n, device=self.coords.device).expand(pieces, n)

    def walk(self, candidates: int) -> TourWalk:
        pieces, n, _ = self.coords.shape
        first = torch.zeros(pieces, candidates, dtype=torch.long, device=self.coords.device)
        first[:, (candidates + 1) // 2 :] = n - 1
        return TourWalk(first, n, goal=n - 1 - first)

    def read(self, trace: Trace) -> Int[Tensor, "pieces candidates n"]:
        order = torch.cat([trace.first[..., None], trace.actions], -1)
        return torch.where(trace.first[..., None] == 0, order, order.flip(-1))

    def cost(self, candidates: Int[Tensor, "pieces candidates n"]) -> Float[Tensor, "pieces candidates"]:
        """Lengths.

        Raises:
            ValueError: a candidate is no permutation, or does not begin and end where the path does.
        """
        last = self.coords.shape[1] - 1
        if not (is_permutation(candidates) & (candidates[..., 0] == 0) & (candidates[..., -1] == last)).all():
            raise ValueError(
                "candidates must be permutations of a path's points that leave the first and last in place"
            )
        return path_length(self.coords, candidates)


# --- vehicle routing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CVRP:
    """Vehicle routing problems with one depot and one capacity.

    A solution (batch, samples, n, 2) holds the customers, route after route, and beside each whether its vehicle
    returns to the depot after it (1) or goes on to the next (0). It is circular: after the last comes the first.

    Attributes:
        depot: (batch, 2).
        coords: (batch, n, 2), of the customers.
        demand: (batch, n), as shares of a vehicle's capacity, in (0, 1].

    Raises:
        ValueError: a shape does not fit, a value is not finite, or a demand is outside (0, 1].

    Example:
        >>> problem = CVRP(torch.zeros(1, 2), torch.tensor([[[1.0, 0.0], [2.0, 0.0]]]), torch.tensor([[0.6, 0.6]]))
        >>> problem.cost(torch.tensor([[[[0, 1], [1, 1]]]]))
        tensor([[6.]])
    """

    depot: Float[Tensor, "batch 2"]
    coords: Float[Tensor, "batch n 2"]
    demand: Float[Tensor, "batch n"]

    drawn_steps: ClassVar[int] = 2

    def __post_init__(self) -> None:
        _check_coords("coords", self.coords)
        batch, n, _ = self.coords.shape
        if self.depot.shape != (batch, 2) or not self.depot.isfinite().all():
            raise ValueError(f"depot must be finite and of shape {(batch, 2)}, got shape {tuple(self.depot.shape)}")
        if self.demand.shape != (batch, n) or not ((self.demand > 0) & (self.demand <= 1)).all():
            raise ValueError(f"demand must be of shape {(batch, n)} with values in (0, 1], as shares of the capacity")

    @classmethod
    def random(cls, batch: int, n: int, *, capacity: int = 50, generator: torch.Generator | None = None) -> CVRP:
        """Depot and customers uniform in the unit square, demands uniform from 1 to 9."""
        points = torch.rand(batch, n + 1, 2, generator=generator)
        return cls(points[:, 0], points[:, 1:], torch.randint(1, 10, (batch, n), generator=generator) / capacity)

    def graph(self, neighbours: int) -> Graph:
        """Nodes by demand, distance and angle from the depot; neighbours are near, or lie in the same direction."""
        points = self._points
        away = points - points[:, :1]
        distance = vector_norm(away, dim=-1)
        nodes = torch.stack([pad(self.demand, (1, 0)), distance, torch.atan2(away[..., 1], away[..., 0])], -1)
        direction = away / distance[..., None].clamp_min(_TINY)
        edges = torch.stack([direction @ direction.mT, -torch.cdist(points, points)], -1)
        score = edges.sum(-1)
        score[:, :, 0] = torch.inf  # every customer can go to the depot
        return _nearest(nodes, edges, neighbours, score)

    def walk(self, samples: int, *, generator: torch.Generator | None = None) -> RouteWalk:
        """Routes from the depot, of few more vehicles than the demand needs."""
        return RouteWalk(pad(self.demand, (1, 0)), samples, vehicles=self.demand.sum(1).ceil() + 1)

    def read(self, trace: Trace) -> Int[Tensor, "batch samples n 2"]:
        return _read_routes(trace.actions, self.demand.shape[1], torch.ones_like(trace.first, dtype=torch.bool))

    def cost(self, solution: Int[Tensor, "batch samples n 2"]) -> Float[Tensor, "batch samples"]:
        customer, ends = solution[..., 0], solution[..., 1] == 1
        following = customer.roll(-1, -1)
        return _leg_lengths(self._points, customer + 1, following + 1, ends).sum(-1)

    @staticmethod
    def routes(solution: Int[Tensor, "n 2"]) -> list[list[int]]:
        """One solution as lists of customers, one for each vehicle.

        Example:
            >>> CVRP.routes(torch.tensor([[2, 1], [0, 0], [1, 1], [3, 0]]))
            [[3, 2], [0, 1]]
        """
        stops = solution.tolist()
        last_end = max(place for place, (_, ends) in enumerate(stops) if ends)
        routes: list[list[int]] = [[]]
        for customer, ends in stops[last_end + 1 :] + stops[: last_end + 1]:
            routes[-1].append(customer)
            if ends:
                routes.append([])
        return routes[:-1]

    def split(
        self,
        solution: Int[Tensor, "batch samples n 2"],
        sub_len: int,
        *,
        shift: int,
        generator: torch.Generator | None = None,
    ) -> tuple[OpenRoutes, Merge]:
        """Runs of `sub_len` customers of the routes in the order of their angle, moved on by `shift`.

        Raises:
            ValueError: a solution is no permutation, or has no route that ends.
        """
        _check_orders(solution[..., 0], self.demand.shape[1])
        if not (solution[..., 1] == 1).any(-1).all():
            raise ValueError("solution must have a vehicle return to the depot somewhere")
        solution = self._by_angle(solution)
        level = self._levels(solution).roll(shift, -1)
        rolled = solution.roll(shift, -2)
        customers, count = _cut(rolled[..., 0], sub_len)
        ends = _cut(rolled[..., 1], sub_len)[0]
        after = _cut(level, sub_len)[0][..., -1]
        before = torch.cat([level[..., -1:], after[..., :-1]], -1)
        depot = self.depot[:, None, None, None].expand(*customers.shape[:3], 1, 2)
        pieces = OpenRoutes(
            torch.cat([depot, take(self.coords, customers)], -2).flatten(0, 2),
            self._demands(customers).flatten(0, 2),
            before.flatten(),
            after.flatten(),
            ends.flatten(0, 2),
        )

        def merge(chosen: Tensor) -> Tensor:
            chosen = chosen.reshape(*customers.shape, 2)
            kept = torch.stack([customers.gather(-1, chosen[..., 0]), chosen[..., 1]], -1).flatten(-3, -2)
            return torch.cat([kept, rolled[..., count * sub_len :, :]], -2)

        return pieces, merge

    @property
    def _points(self) -> Float[Tensor, "batch nodes 2"]:
        return torch.cat([self.depot[:, None], self.coords], 1)

    def _demands(self, customers: Int[Tensor, "batch *samples m"]) -> Tensor:
        return take(self.demand[..., None], customers)[..., 0]

    def _by_angle(self, solution: Int[Tensor, "batch samples n 2"]) -> Int[Tensor, "batch samples n 2"]:
        """The same routes, whole and in the order of the direction in which their customers lie."""
        n = solution.shape[-2]
        position = torch.arange(n, device=solution.device)
        last_end = (solution[..., 1] * (position + 1)).amax(-1, keepdim=True)
        solution = _reorder(solution, (position + last_end) % n)
        route = (solution[..., 1].cumsum(-1) - solution[..., 1])[..., None].expand(*solution.shape[:-1], 2)
        away = take(self.coords - self.depot[:, None], solution[..., 0])
        sums = torch.zeros_like(away).scatter_add(-2, route, away).gather(-2, route)
        return _reorder(solution, torch.atan2(sums[..., 1], sums[..., 0]).argsort(dim=-1, stable=True))

    def _levels(self, solution: Int[Tensor, "batch samples n 2"]) -> Float[Tensor, "batch samples n"]:
        """The share of its route's demand that is on board after each customer, and 0 after the last of a route."""
        ends = solution[..., 1] == 1
        route = solution[..., 1].cumsum(-1) - solution[..., 1]
        demand = self._demands(solution[..., 0])
        total = torch.zeros_like(demand).scatter_add(-1, route, demand).gather(-1, route)
        return (_loads(demand, ends) / total).masked_fill(ends, 0.0)


@dataclass(frozen=True)
class OpenRoutes:
    """Runs of customers cut from vehicle routes. The first customer stays, and so does the last if its route goes on.

    A candidate (pieces, candidates, n, 2) is like a solution of `CVRP`.

    Attributes:
        coords: (pieces, n + 1, 2), the depot first, the customers in the order of the run as it is.
        demand: (pieces, n).
        used: (pieces,), what is on board before the first customer.
        limit: (pieces,), what may be on board after the last, if its route goes on.
        ends: (pieces, n), where the vehicle returns to the depot now.
    """

    coords: Float[Tensor, "pieces nodes 2"]
    demand: Float[Tensor, "pieces n"]
    used: Float[Tensor, " pieces"]
    limit: Float[Tensor, " pieces"]
    ends: Int[Tensor, "pieces n"]

    @property
    def closes(self) -> Bool[Tensor, " pieces"]:
        """Whether the run ends at the depot."""
        return self.ends[:, -1] == 1

    @property
    def features(self) -> Float[Tensor, "pieces nodes 6"]:
        unit, _ = normalise_paths(self.coords)
        nodes = unit.shape[1]
        depot, first, last = (
            one_hot(node, nodes).to(unit)
            for node in (torch.zeros_like(self._goal), torch.ones_like(self._goal), self._goal)
        )
        return torch.cat([unit, torch.stack([pad(self.demand, (1, 0)), depot, first, last], -1)], -1)

    @property
    def affinity(self) -> Float[Tensor, "pieces nodes nodes"]:
        unit, _ = normalise_paths(self.coords)
        return -torch.cdist(unit, unit)

    @property
    def scale(self) -> Float[Tensor, " pieces"]:
        return normalise_paths(self.coords)[1]

    @property
    def current(self) -> Int[Tensor, "pieces n 2"]:
        order = torch.arange(self.demand.shape[1], device=self.demand.device)
        return torch.stack([order.expand_as(self.ends), self.ends], -1)

    @property
    def _goal(self) -> Int[Tensor, " pieces"]:
        return torch.where(self.closes, 0, self.coords.shape[1] - 1)

    def walk(self, candidates: int) -> RouteWalk:
        demand = pad(self.demand, (1, 0))
        return RouteWalk(demand, candidates, used=self.used, limit=self.limit, closes=self.closes)

    def read(self, trace: Trace) -> Int[Tensor, "pieces candidates n 2"]:
        visits = torch.cat([trace.first[..., None], trace.actions], -1)
        return _read_routes(visits, self.demand.shape[1], self.closes[:, None].expand_as(trace.first))

    def cost(self, candidates: Int[Tensor, "pieces candidates n 2"]) -> Float[Tensor, "pieces candidates"]:
        """Lengths from the first customer to the last, or to the depot.

        Raises:
            ValueError: a candidate is no permutation, or moves an end that stays.
        """
        order, ends = candidates[..., 0], candidates[..., 1] == 1
        closes = self.closes[:, None]
        last = self.demand.shape[1] - 1
        kept = (order[..., 0] == 0) & (ends[..., -1] == closes) & (closes | (order[..., -1] == last))
        if not (is_permutation(order) & kept).all():
            raise ValueError("candidates must be permutations of a run's customers that leave its ends in place")
        inner = _leg_lengths(self.coords, order[..., :-1] + 1, order[..., 1:] + 1, ends[..., :-1]).sum(-1)
        back: Tensor = vector_norm(take(self.coords, order[..., -1] + 1) - self.coords[:, :1], dim=-1)
        demand = take(self.demand[..., None], order)[..., 0]
        load = _loads(demand, ends, self.used[:, None, None])
        fits = (load <= 1 + _ROOM).all(-1) & (closes | (load[..., -1] <= self.limit[:, None] + _ROOM))
        return (inner + back * closes).masked_fill(~fits, torch.inf)


# --- knapsack ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Knapsack:
    """Knapsack problems. A solution (batch, samples, n) says of each item whether it is taken.

    Attributes:
        weights: (batch, n), positive.
        values: (batch, n), not negative.
        capacity: (batch,), positive.

    Raises:
        ValueError: a shape does not fit, or a value is out of range or not finite.

    Example:
        >>> problem = Knapsack(torch.tensor([[2.0, 1.0]]), torch.tensor([[3.0, 2.0]]), torch.tensor([2.5]))
        >>> problem.cost(torch.tensor([[[True, False], [True, True]]]))
        tensor([[-3., inf]])
    """

    weights: Float[Tensor, "batch n"]
    values: Float[Tensor, "batch n"]
    capacity: Float[Tensor, " batch"]

    drawn_steps: ClassVar[int] = 4

    def __post_init__(self) -> None:
        shape = self.weights.shape
        if len(shape) != 2 or 0 in shape or not (self.weights.isfinite() & (self.weights > 0)).all():
            raise ValueError(f"weights must be positive and of shape (batch, n), got shape {tuple(shape)}")
        if self.values.shape != shape or not (self.values.isfinite() & (self.values >= 0)).all():
            raise ValueError(f"values must not be negative, and of shape {tuple(shape)}")
        if self.capacity.shape != shape[:1] or not (self.capacity.isfinite() & (self.capacity >= 0)).all():
            raise ValueError(f"capacity must not be negative, and of shape {tuple(shape[:1])}")

    @classmethod
    def random(
        cls, batch: int, n: int, *, capacity: float | None = None, generator: torch.Generator | None = None
    ) -> Knapsack:
        """Weights and values uniform in (0, 1]; the capacity is a tenth of the number of items by default."""
        weights, values = 1 - torch.rand(2, batch, n, generator=generator)
        return cls(weights, values, torch.full((batch,), n / 10 if capacity is None else capacity))

    def graph(self, neighbours: int) -> Graph:
        """Nodes by weight and value, node 0 without either; neighbours are those of the best joint ratio."""
        nodes = pad(torch.stack([self.weights, self.values], -1), (0, 0, 1, 0))
        return _nearest(nodes, self.affinity[..., None], neighbours)

    @property
    def affinity(self) -> Float[Tensor, "batch nodes nodes"]:
        """How the joint ratio of value to weight falls short of the best one with an item, from -1 to 0."""
        weights, values = pad(self.weights, (1, 0)), pad(self.values, (1, 0))
        ratio = (values[:, :, None] + values[:, None]) / (weights[:, :, None] + weights[:, None] + _TINY)
        return ratio / ratio.amax(-1, keepdim=True).clamp_min(_TINY) - 1

    def walk(self, samples: int, *, generator: torch.Generator | None = None) -> PackWalk:
        """Empty knapsacks."""
        return PackWalk(self.weights, self.capacity, samples)

    def read(self, trace: Trace) -> Bool[Tensor, "batch samples n"]:
        taken = torch.zeros(*trace.first.shape, self.weights.shape[1] + 1, dtype=torch.bool, device=trace.first.device)
        return taken.scatter(-1, trace.actions, True)[..., 1:]

    def cost(self, solution: Bool[Tensor, "batch samples n"]) -> Float[Tensor, "batch samples"]:
        """The value, negated; infinite where the capacity is exceeded."""
        fits = self._weight(solution) <= self.capacity[:, None] * (1 + _ROOM)
        return (solution * -self.values[:, None]).sum(-1).masked_fill(~fits, torch.inf)

    def split(
        self,
        solution: Bool[Tensor, "batch samples n"],
        sub_len: int,
        *,
        shift: int,
        generator: torch.Generator | None = None,
        permutation: Int[Tensor, " n"] | None = None,
    ) -> tuple[SubKnapsacks, Merge]:
        """Random groups of `sub_len` items, or those of the permutation given; items left over stay as they are.

        Raises:
            ValueError: a solution is not booleans for each item.
        """
        n = self.weights.shape[1]
        if solution.dtype != torch.bool or solution.ndim != 3 or solution.shape[-1] != n:
            got = f"{solution.dtype} of shape {tuple(solution.shape)}"
            raise ValueError(f"solution must be booleans of shape (batch, samples, {n}), got {got}")
        if permutation is None:
            device = None if generator is None else generator.device
            permutation = torch.randperm(n, generator=generator, device=device).to(solution.device)
        chosen, count = _cut(solution[..., permutation], sub_len)
        weights, values = (
            _cut(held[:, None, permutation].expand_as(solution), sub_len)[0] for held in (self.weights, self.values)
        )
        spare = (self.capacity[:, None] - self._weight(solution)) / count
        capacity = ((weights * chosen).sum(-1) + spare[..., None]).clamp_min(0)
        pieces = SubKnapsacks(
            weights.flatten(0, 2), values.flatten(0, 2), capacity.flatten(), current=chosen.flatten(0, 2)
        )

        def merge(better: Tensor) -> Tensor:
            merged = solution.clone()
            merged[..., permutation[: count * sub_len]] = better.reshape(chosen.shape).flatten(-2)
            return merged

        return pieces, merge

    def _weight(self, solution: Bool[Tensor, "batch samples n"]) -> Float[Tensor, "batch samples"]:
        return (solution * self.weights[:, None]).sum(-1)


@dataclass(frozen=True, kw_only=True)
class SubKnapsacks(Knapsack):
    """Groups of items with what they may weigh together. A candidate (pieces, candidates, n) says what is taken.

    Attributes:
        current: (pieces, n), what is taken now.
    """

    current: Bool[Tensor, "pieces n"]

    @property
    def features(self) -> Float[Tensor, "pieces nodes 3"]:
        items = pad(torch.stack([self.weights, self.values, torch.zeros_like(self.weights)], -1), (0, 0, 1, 0))
        items[:, 0, 2] = 1
        return items

    @property
    def scale(self) -> Float[Tensor, " pieces"]:
        return torch.ones_like(self.capacity)


# --- shared --------------------------------------------------------------------------------------------------------


def _check_coords(name: str, coords: Tensor) -> None:
    if coords.ndim != 3 or coords.shape[-1] != 2 or 0 in coords.shape or not coords.is_floating_point():
        raise ValueError(f"{name} must be floating point numbers of shape (batch, n, 2), got {tuple(coords.shape)}")
    if not coords.isfinite().all():
        raise ValueError(f"{name} must be finite")


def _check_orders(order: Tensor, n: int) -> None:
    if order.ndim != 3 or order.shape[-1] != n or not is_permutation(order).all():
        raise ValueError(f"solution must hold permutations of {n} for every batch and sample, got {tuple(order.shape)}")


def _nearest(nodes: Tensor, edges: Tensor, k: int, score: Tensor | None = None) -> Graph:
    """The graph of the k largest scores (by default the edges' one feature) of every node, itself excepted."""
    n = nodes.shape[1]
    score = edges[..., 0] if score is None else score
    itself = torch.eye(n, dtype=torch.bool, device=nodes.device)
    neighbours = score.masked_fill(itself, -torch.inf).topk(min(k, n - 1), dim=-1).indices
    index = neighbours[..., None].expand(*neighbours.shape, edges.shape[-1])
    return Graph(nodes, neighbours, edges.gather(2, index))


def _cut(values: Tensor, sub_len: int) -> tuple[Tensor, int]:
    """As many runs of the last dimension as fit, (..., runs, sub_len), and their number."""
    count = values.shape[-1] // sub_len
    return values[..., : count * sub_len].unflatten(-1, (count, sub_len)), count


def _reorder(solution: Tensor, index: Tensor) -> Tensor:
    return solution.gather(-2, index[..., None].expand_as(solution))


def _leg_lengths(points: Tensor, node: Tensor, following: Tensor, through_depot: Tensor) -> Tensor:
    """Distances from nodes to those that follow, by way of point 0 where asked."""
    here, there, depot = take(points, node), take(points, following), points[:, None, :1]
    detour = torch.linalg.vector_norm(here - depot, dim=-1) + torch.linalg.vector_norm(there - depot, dim=-1)
    return torch.where(through_depot, detour, torch.linalg.vector_norm(here - there, dim=-1))


def _loads(demand: Tensor, ends: Tensor, used: Tensor | float = 0.0) -> Tensor:
    """What is on board after each customer, starting with `used`, for a vehicle that is emptied after each end."""
    total = demand.cumsum(-1) + used
    emptied = (total * ends).cummax(-1).values
    return total - torch.cat([torch.zeros_like(emptied[..., :1]), emptied[..., :-1]], -1)


def _read_routes(visits: Tensor, n: int, closes: Tensor) -> Tensor:
    """Customers and route ends from the sequence of visited nodes, in which 0 is the depot."""
    customer = visits > 0
    at = (~customer).to(torch.int8).argsort(dim=-1, stable=True)[..., :n]
    home = pad(~customer, (0, 1))[..., 1:].gather(-1, at)
    home[..., -1] = closes
    return torch.stack([visits.gather(-1, at) - 1, home.long()], -1)
