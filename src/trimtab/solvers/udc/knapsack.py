"""Knapsack problems: items are grouped at random, and each group gets its weight and a share of the free capacity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from trimtab.ops.arguments import finite_tensor, tensor_problem
from trimtab.solvers.udc.construction import ROUNDING, PackWalk, Trace, room
from trimtab.solvers.udc.problems import TINY, Graph, Merge, cut, nearest


@dataclass(frozen=True)
class Knapsack:
    """Knapsack problems. A solution (batch, samples, n) says of each item whether it is taken.

    Attributes:
        weights: (batch, n), positive.
        values: (batch, n), not negative.
        capacity: (batch,), not negative.

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
        weights = finite_tensor("weights", self.weights, ndim=2, floating=True)
        shape = weights.shape
        if 0 in shape:
            raise ValueError(f"weights must be of shape (batch, n), got shape {tuple(shape)}")
        if not (weights > 0).all():
            raise ValueError(f"weights must be positive, got {float(weights.min()):g}")
        object.__setattr__(self, "weights", weights)
        for name, wanted in {"values": shape, "capacity": shape[:1]}.items():
            found = finite_tensor(name, getattr(self, name), floating=True)
            if found.shape != wanted:
                raise ValueError(f"{name} must be of shape {tuple(wanted)}, got shape {tuple(found.shape)}")
            if not (found >= 0).all():
                raise ValueError(f"{name} must be at least 0, got {float(found.min()):g}")
            object.__setattr__(self, name, found)

    @classmethod
    def random(
        cls, batch: int, n: int, *, capacity: float | None = None, generator: torch.Generator | None = None
    ) -> Knapsack:
        """Weights and values uniform in (0, 1]; the capacity is a tenth of the number of items by default."""
        weights, values = 1 - torch.rand(2, batch, n, generator=generator)
        return cls(weights, values, torch.full((batch,), n / 10 if capacity is None else capacity))

    @property
    def size(self) -> int:
        return self.weights.shape[1]

    @property
    def scale(self) -> Float[Tensor, " batch"]:
        """The largest value."""
        return self.values.amax(1).clamp_min(torch.finfo(self.values.dtype).tiny)

    def graph(self, neighbours: int) -> Graph:
        """Nodes by weight and value, node 0 without either; neighbours are those of the best joint ratio."""
        nodes = pad(torch.stack([self._unit_weights, self._unit_values], -1), (0, 0, 1, 0))
        return nearest(nodes, self.affinity[..., None], neighbours)

    @property
    def affinity(self) -> Float[Tensor, "batch nodes nodes"]:
        """How the joint ratio of value to weight falls short of the best one with an item, from -1 to 0."""
        weights, values = pad(self._unit_weights, (1, 0)), pad(self._unit_values, (1, 0))
        ratio = (values[:, :, None] + values[:, None]) / (weights[:, :, None] + weights[:, None] + TINY)
        return ratio / ratio.amax(-1, keepdim=True).clamp_min(TINY) - 1

    @property
    def _unit_weights(self) -> Float[Tensor, "batch n"]:
        return self.weights / self.weights.amax(1, keepdim=True)

    @property
    def _unit_values(self) -> Float[Tensor, "batch n"]:
        return self.values / self.scale[:, None]

    @property
    def _room(self) -> float:
        """By what share of the capacity a solution may exceed it."""
        return room(self.weights.dtype)

    def walk(self, samples: int, *, generator: torch.Generator | None = None) -> PackWalk:
        """Empty knapsacks."""
        unit = self.weights.amax(1, keepdim=True).double()
        return PackWalk(self.weights / unit, self.capacity / unit[:, 0], samples, room=self._room / 2)

    def read(self, trace: Trace) -> Bool[Tensor, "batch samples n"]:
        taken = torch.zeros(*trace.first.shape, self.weights.shape[1] + 1, dtype=torch.bool, device=trace.first.device)
        return taken.scatter(-1, trace.actions, True)[..., 1:]

    def cost(self, solution: Bool[Tensor, "batch samples n"]) -> Float[Tensor, "batch samples"]:
        """The value, negated; infinite where the capacity is exceeded.

        Raises:
            TypeError: the solution is no tensor.
            ValueError: it is not booleans for each item.
        """
        if problem := tensor_problem(solution=solution):
            raise TypeError(problem)
        if solution.dtype != torch.bool or solution.ndim != 3 or solution.shape[::2] != self.weights.shape:
            batch, n = self.weights.shape
            raise ValueError(
                f"solution must be booleans of shape ({batch}, samples, {n}), "
                f"got {solution.dtype} of shape {tuple(solution.shape)}"
            )
        fits = self._weight(solution) <= self.capacity[:, None].double() * (1 + self._room)
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
        batch, n = self.weights.shape
        if solution.dtype != torch.bool or solution.ndim != 3 or solution.shape[::2] != (batch, n):
            got = f"{solution.dtype} of shape {tuple(solution.shape)}"
            raise ValueError(f"solution must be booleans of shape ({batch}, samples, {n}), got {got}")
        if permutation is None:
            device = None if generator is None else generator.device
            permutation = torch.randperm(n, generator=generator, device=device).to(solution.device)
        chosen, count = cut(solution[..., permutation], sub_len)
        weights, values = (
            cut(held[:, None, permutation].expand_as(solution), sub_len)[0] for held in (self.weights, self.values)
        )
        # A group keeps the weight it has even where the whole is too heavy by rounding.
        spare = (self.capacity[:, None] - self._weight(solution)).clamp_min(0) / count
        capacity = (weights.double() * chosen).sum(-1) + spare[..., None]
        pieces = SubKnapsacks(
            weights.flatten(0, 2), values.flatten(0, 2), capacity.flatten(), current=chosen.flatten(0, 2)
        )

        def merge(better: Tensor) -> Tensor:
            merged = solution.clone()
            merged[..., permutation[: count * sub_len]] = better.reshape(chosen.shape).flatten(-2)
            return merged

        return pieces, merge

    def _weight(self, solution: Bool[Tensor, "batch samples n"]) -> Float[Tensor, "batch samples"]:
        return (solution * self.weights[:, None].double()).sum(-1)


@dataclass(frozen=True, kw_only=True)
class SubKnapsacks(Knapsack):
    """Groups of items with what they may weigh together. A candidate (pieces, candidates, n) says what is taken.

    Attributes:
        current: (pieces, n), what is taken now.
    """

    current: Bool[Tensor, "pieces n"]

    @property
    def features(self) -> Float[Tensor, "pieces nodes 3"]:
        unit = [self._unit_weights, self._unit_values, torch.zeros_like(self.weights)]
        items = pad(torch.stack(unit, -1), (0, 0, 1, 0))
        items[:, 0, 2] = 1
        return items

    @property
    def _room(self) -> float:
        return ROUNDING  # the groups' excesses would add up
