r"""What a problem is to the divider and the conqueror, and what their pieces are.

A problem is a batch of instances. It knows its sparse graph (what a network reads), how a solution is built (`walk`),
what it costs, and how a solution is cut into pieces that can be solved apart and put back (`split`). What networks read
has neither unit nor origin. Costs are to be minimised; what is no solution has none, or an infinite one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from trimtab.ops.arguments import finite_tensor, tensor_problem
from trimtab.solvers.udc.construction import Trace, Walk
from trimtab.solvers.udc.routing import is_permutation

TINY = 1e-10  # keeps a ratio finite


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
        size: n, the places of a solution.
        scale: (batch,), the unit in which the networks read each instance: a cost divided by it has none.
    """

    drawn_steps: ClassVar[int]

    @property
    def size(self) -> int: ...
    @property
    def scale(self) -> Tensor: ...

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


def read_coords(name: str, coords: Tensor) -> Tensor:
    """Places in the plane, (batch, n, 2)."""
    found = finite_tensor(name, coords, ndim=3, floating=True)
    if found.shape[-1] != 2 or 0 in found.shape:
        raise ValueError(f"{name} must be of shape (batch, n, 2), got shape {tuple(found.shape)}")
    if found.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {found.dtype}")
    return found


def check_orders(order: Tensor, batch: int, n: int) -> None:
    """Refuses what is no permutation of n for every instance of the batch and every sample."""
    if problem := tensor_problem(solution=order):
        raise TypeError(problem)
    if order.is_floating_point() or order.dtype == torch.bool or 0 in order.shape:
        raise ValueError(f"solution must hold integers, got {order.dtype} of shape {tuple(order.shape)}")
    if order.ndim != 3 or len(order) != batch or order.shape[-1] != n:
        raise ValueError(f"solution must be permutations of {n} for {batch} instances, got shape {tuple(order.shape)}")
    if not is_permutation(order).all():
        raise ValueError(f"solution must be permutations of {n} for every sample, got one that is none")


def nearest(nodes: Tensor, edges: Tensor, k: int, score: Tensor | None = None) -> Graph:
    """The graph of the k largest scores (by default the edges' one feature) of every node, itself excepted."""
    n = nodes.shape[1]
    score = edges[..., 0] if score is None else score
    itself = torch.eye(n, dtype=torch.bool, device=nodes.device)
    neighbours = score.masked_fill(itself, -torch.inf).topk(min(k, n - 1), dim=-1).indices
    index = neighbours[..., None].expand(*neighbours.shape, edges.shape[-1])
    return Graph(nodes, neighbours, edges.gather(2, index))


def cut(values: Tensor, sub_len: int) -> tuple[Tensor, int]:
    """As many runs of the last dimension as fit, (..., runs, sub_len), and their number."""
    count = values.shape[-1] // sub_len
    return values[..., : count * sub_len].unflatten(-1, (count, sub_len)), count
