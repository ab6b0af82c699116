"""Travelling salesman problems: a tour is cut into open paths whose ends stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.solvers.udc.construction import TourWalk, Trace
from trimtab.solvers.udc.problems import Graph, Merge, check_orders, cut, nearest, read_coords
from trimtab.solvers.udc.routing import (
    distances,
    is_permutation,
    normalise_paths,
    normalise_points,
    path_length,
    take,
    tour_length,
)


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
        object.__setattr__(self, "coords", read_coords("coords", self.coords))

    @classmethod
    def random(cls, batch: int, n: int, *, generator: torch.Generator | None = None) -> TSP:
        """Cities uniform in the unit square."""
        return cls(torch.rand(batch, n, 2, generator=generator))

    @property
    def size(self) -> int:
        return self.coords.shape[1]

    @property
    def scale(self) -> Float[Tensor, " batch"]:
        return normalise_points(self.coords)[1]

    def graph(self, neighbours: int) -> Graph:
        unit, _ = normalise_points(self.coords)
        return nearest(unit, -distances(unit)[..., None], neighbours)

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
        """Lengths.

        Raises:
            ValueError: a solution is no permutation.
        """
        check_orders(solution, len(self.coords), self.size)
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
        check_orders(solution, len(self.coords), self.size)
        rolled = solution.roll(shift, -1)
        pieces, count = cut(rolled, sub_len)

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
        object.__setattr__(self, "coords", read_coords("coords", self.coords))

    @property
    def features(self) -> Float[Tensor, "pieces n 3"]:
        unit, _ = normalise_paths(self.coords)
        ends = torch.zeros_like(unit[..., :1])
        ends[:, [0, -1]] = 1
        return torch.cat([unit, ends], -1)

    @property
    def affinity(self) -> Float[Tensor, "pieces n n"]:
        unit, _ = normalise_paths(self.coords)
        return -distances(unit)

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
            wanted = "permutations of a path's points that leave the first and last in place"
            raise ValueError(f"candidates must be {wanted}, got one that is not")
        return path_length(self.coords, candidates)
