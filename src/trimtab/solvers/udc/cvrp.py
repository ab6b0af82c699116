r"""Capacitated vehicle routing: routes, sorted by their angle around the depot, are cut into runs of customers.

Where a cut falls inside a route, what the vehicle may have on board there is fixed at $u / D$ of its capacity, for a
load of $u$ so far in a route of demand $D$: each piece gets its share of the capacity that the route leaves free, and
pieces that keep to it fit together whatever each of them does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import one_hot, pad

from trimtab.ops.arguments import finite_tensor, tensor_problem
from trimtab.solvers.udc.construction import ROUNDING, RouteWalk, Trace, room
from trimtab.solvers.udc.problems import TINY, Graph, Merge, check_orders, cut, nearest, read_coords
from trimtab.solvers.udc.routing import distances, is_permutation, normalise_paths, normalise_points, take


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
        coords = read_coords("coords", self.coords)
        batch, n, _ = coords.shape
        depot = finite_tensor("depot", self.depot, floating=True)
        if depot.shape != (batch, 2):
            raise ValueError(f"depot must be of shape {(batch, 2)}, got shape {tuple(depot.shape)}")
        demand = finite_tensor("demand", self.demand, floating=True)
        if demand.shape != (batch, n):
            raise ValueError(f"demand must be of shape {(batch, n)}, got shape {tuple(demand.shape)}")
        if not ((demand > 0) & (demand <= 1)).all():
            low, high = float(demand.min()), float(demand.max())
            raise ValueError(f"demand must be in (0, 1], as shares of the capacity, got {low:g} to {high:g}")
        for name, value in {"depot": depot, "coords": coords, "demand": demand}.items():
            object.__setattr__(self, name, value)

    @classmethod
    def random(cls, batch: int, n: int, *, capacity: int = 50, generator: torch.Generator | None = None) -> CVRP:
        """Depot and customers uniform in the unit square, demands uniform from 1 to 9."""
        points = torch.rand(batch, n + 1, 2, generator=generator)
        return cls(points[:, 0], points[:, 1:], torch.randint(1, 10, (batch, n), generator=generator) / capacity)

    @property
    def size(self) -> int:
        return self.coords.shape[1]

    @property
    def scale(self) -> Float[Tensor, " batch"]:
        return normalise_points(self._points)[1]

    def graph(self, neighbours: int) -> Graph:
        """Nodes by demand, distance and angle from the depot; neighbours are near, or lie in the same direction."""
        points, _ = normalise_points(self._points)
        away = points - points[:, :1]
        distance = vector_norm(away, dim=-1)
        nodes = torch.stack([pad(self.demand, (1, 0)), distance, torch.atan2(away[..., 1], away[..., 0])], -1)
        direction = away / distance[..., None].clamp_min(TINY)
        edges = torch.stack([direction @ direction.mT, -distances(points)], -1)
        score = edges.sum(-1)
        score[:, :, 0] = torch.inf  # every customer can go to the depot
        return nearest(nodes, edges, neighbours, score)

    def walk(self, samples: int, *, generator: torch.Generator | None = None) -> RouteWalk:
        """Routes from the depot, of few more vehicles than the demand needs."""
        return RouteWalk(pad(self.demand, (1, 0)), samples, vehicles=self.demand.sum(1).ceil() + 1)

    def read(self, trace: Trace) -> Int[Tensor, "batch samples n 2"]:
        return _read_routes(trace.actions, self.demand.shape[1], torch.ones_like(trace.first, dtype=torch.bool))

    def cost(self, solution: Int[Tensor, "batch samples n 2"]) -> Float[Tensor, "batch samples"]:
        """Lengths; infinite where a vehicle carries more than its capacity.

        Raises:
            ValueError: a solution is no permutation, has no route that ends, or other numbers than 0 and 1 for ends.
        """
        self._check(solution)
        customer, ends = solution[..., 0], solution[..., 1] == 1
        following = customer.roll(-1, -1)
        length = _leg_lengths(self._points, customer + 1, following + 1, ends).sum(-1)
        opened = _opened(solution)
        load = _loads(self._demands(opened[..., 0]), opened[..., 1] == 1)
        return length.masked_fill((load > 1 + room(self.demand.dtype)).any(-1), torch.inf)

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
        self._check(solution)
        solution = self._by_angle(solution)
        level = self._levels(solution).roll(shift, -1)
        rolled = solution.roll(shift, -2)
        customers, count = cut(rolled[..., 0], sub_len)
        ends = cut(rolled[..., 1], sub_len)[0]
        after = cut(level, sub_len)[0][..., -1]
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

    def _check(self, solution: Tensor) -> None:
        n = self.size
        if problem := tensor_problem(solution=solution):
            raise TypeError(problem)
        if solution.is_floating_point() or solution.dtype == torch.bool or 0 in solution.shape:
            raise ValueError(f"solution must hold integers, got {solution.dtype} of shape {tuple(solution.shape)}")
        if solution.ndim != 4 or solution.shape[-1] != 2:
            raise ValueError(f"solution must be of shape (batch, samples, {n}, 2), got {tuple(solution.shape)}")
        check_orders(solution[..., 0], len(self.coords), n)
        if not ((solution[..., 1] == 0) | (solution[..., 1] == 1)).all():
            raise ValueError("solution must say with 0 or 1 whether a vehicle returns, got other numbers")
        if not (solution[..., 1] == 1).any(-1).all():
            raise ValueError("solution must have a vehicle return to the depot somewhere, got one that never does")

    @property
    def _points(self) -> Float[Tensor, "batch nodes 2"]:
        return torch.cat([self.depot[:, None], self.coords], 1)

    def _demands(self, customers: Int[Tensor, "batch *samples m"]) -> Tensor:
        return take(self.demand[..., None], customers)[..., 0]

    def _by_angle(self, solution: Int[Tensor, "batch samples n 2"]) -> Int[Tensor, "batch samples n 2"]:
        """The same routes, whole and in the order of the direction in which their customers lie."""
        solution = _opened(solution)
        route = (solution[..., 1].cumsum(-1) - solution[..., 1])[..., None].expand(*solution.shape[:-1], 2)
        away = take(self.coords - self.depot[:, None], solution[..., 0])
        sums = torch.zeros_like(away).scatter_add(-2, route, away).gather(-2, route)
        return _reorder(solution, torch.atan2(sums[..., 1], sums[..., 0]).argsort(dim=-1, stable=True))

    def _levels(self, solution: Int[Tensor, "batch samples n 2"]) -> Float[Tensor, "batch samples n"]:
        """The share of its route's demand that is on board after each customer, and 0 after the last of a route."""
        ends = solution[..., 1] == 1
        route = solution[..., 1].cumsum(-1) - solution[..., 1]
        demand = self._demands(solution[..., 0]).double()
        total = torch.zeros_like(demand).scatter_add(-1, route, demand).gather(-1, route)
        # What a route has above its capacity, which is rounding, is nobody's share.
        return (_loads(demand, ends) / total.clamp(max=1)).masked_fill(ends, 0.0)


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
        return -distances(unit)

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
            wanted = "permutations of a run's customers that leave its ends in place"
            raise ValueError(f"candidates must be {wanted}, got one that is not")
        inner = _leg_lengths(self.coords, order[..., :-1] + 1, order[..., 1:] + 1, ends[..., :-1]).sum(-1)
        back: Tensor = vector_norm(take(self.coords, order[..., -1] + 1) - self.coords[:, :1], dim=-1)
        demand = take(self.demand[..., None], order)[..., 0]
        load = _loads(demand, ends, self.used[:, None, None])
        # Only half of the whole solution's room, and none at the limit: pieces of one route would add theirs up.
        fits = (load <= 1 + room(self.demand.dtype) / 2).all(-1)
        fits &= closes | (load[..., -1] <= self.limit[:, None] + ROUNDING)
        return (inner + back * closes).masked_fill(~fits, torch.inf)


def _reorder(solution: Tensor, index: Tensor) -> Tensor:
    return solution.gather(-2, index[..., None].expand_as(solution))


def _opened(solution: Tensor) -> Tensor:
    """The same circular solution, beginning after the last end of a route in it."""
    n = solution.shape[-2]
    position = torch.arange(n, device=solution.device)
    last_end = (solution[..., 1] * (position + 1)).amax(-1, keepdim=True)
    return _reorder(solution, (position + last_end) % n)


def _leg_lengths(points: Tensor, node: Tensor, following: Tensor, through_depot: Tensor) -> Tensor:
    """Distances from nodes to those that follow, by way of point 0 where asked."""
    here, there, depot = take(points, node), take(points, following), points[:, None, :1]
    detour = vector_norm(here - depot, dim=-1) + vector_norm(there - depot, dim=-1)
    return torch.where(through_depot, detour, vector_norm(here - there, dim=-1))


def _loads(demand: Tensor, ends: Tensor, used: Tensor | float = 0.0) -> Tensor:
    """What is on board after each customer, starting with `used`, for a vehicle that is emptied after each end."""
    total = demand.double().cumsum(-1) + used
    emptied = (total * ends).cummax(-1).values
    return total - torch.cat([torch.zeros_like(emptied[..., :1]), emptied[..., :-1]], -1)


def _read_routes(visits: Tensor, n: int, closes: Tensor) -> Tensor:
    """Customers and route ends from the sequence of visited nodes, in which 0 is the depot."""
    customer = visits > 0
    at = (~customer).to(torch.int8).argsort(dim=-1, stable=True)[..., :n]
    home = pad(~customer, (0, 1))[..., 1:].gather(-1, at)
    home[..., -1] = closes
    return torch.stack([visits.gather(-1, at) - 1, home.long()], -1)
