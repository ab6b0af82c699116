r"""Tours and open paths in the plane, many at a time: their lengths, nearest neighbours, 2-opt and the exact shortest.

An open path has a fixed first and last point and is solved by the order of those between. A tour is the open path that
returns to its first point, so both share one 2-opt:

$$
\Delta_{ij} = |x_i - x_j| + |x_{i+1} - x_{j+1}| - |x_i - x_{i+1}| - |x_j - x_{j+1}|
$$

is what reversing the points $i + 1, \dots, j$ adds to the length.

References:
    G. A. Croes, "A Method for Solving Traveling-Salesman Problems", Operations Research 1958: 2-opt.
    Michael Held and Richard M. Karp, "A Dynamic Programming Approach to Sequencing Problems", Journal of SIAM 1962.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.linalg import vector_norm

from trimtab.ops.arguments import finite_tensor, integer, tensor

_MOST_INNER_POINTS = 12  # whose subsets are few enough to enumerate
_LEAST_GAIN = 8  # of a 2-opt move, in units in the last place of the points' extent: below it is rounding


def take(points: Float[Tensor, "batch n features"], order: Int[Tensor, "batch *samples m"]) -> Tensor:
    """Rows of `points` (batch, n, features) in the order asked for, of shape (batch, *samples, m, features)."""
    flat = order.reshape(len(order), -1)
    return points.gather(1, flat[..., None].expand(-1, -1, points.shape[-1])).reshape(*order.shape, points.shape[-1])


def legs(coords: Float[Tensor, "batch n 2"], order: Int[Tensor, "batch *samples m"]) -> Tensor:
    """The distances from each point to the next, of shape (batch, *samples, m - 1)."""
    lengths: Tensor = vector_norm(take(coords, order).diff(dim=-2), dim=-1)
    return lengths


def distances(coords: Float[Tensor, "batch n 2"]) -> Float[Tensor, "batch n n"]:
    """Between all points, by differences: the matrix product that is faster loses what far points have in common."""
    apart: Tensor = torch.cdist(coords, coords, compute_mode="donot_use_mm_for_euclid_dist")
    return apart


def path_length(coords: Float[Tensor, "batch n 2"], order: Int[Tensor, "batch *samples m"]) -> Tensor:
    """Length of open paths, of shape (batch, *samples).

    Raises:
        TypeError: coords are no floating-point tensor, or order no integers.
        ValueError: coords are not finite, a shape does not fit, or order names a point that there is not.

    Example:
        >>> square = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]])
        >>> path_length(square, torch.tensor([[0, 1, 2, 3]]))
        tensor([3.])
    """
    return legs(*_read_paths(coords, order)).sum(-1)


def tour_length(coords: Float[Tensor, "batch n 2"], order: Int[Tensor, "batch *samples m"]) -> Tensor:
    """Length of closed tours, of shape (batch, *samples).

    Raises:
        TypeError: coords are no floating-point tensor, or order no integers.
        ValueError: coords are not finite, a shape does not fit, or order names a point that there is not.

    Example:
        >>> square = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]])
        >>> tour_length(square, torch.tensor([[[0, 1, 2, 3], [1, 2, 3, 0]]]))
        tensor([[4., 4.]])
    """
    coords, order = _read_paths(coords, order)
    return legs(coords, torch.cat([order, order[..., :1]], -1)).sum(-1)


def normalise_points(coords: Float[Tensor, "batch n 2"]) -> tuple[Float[Tensor, "batch n 2"], Float[Tensor, " batch"]]:
    """Moves and scales each set of points so that it fills the unit square's wider side.

    Returns:
        The normalised points, and what they were divided by: a length in them times this is the true length.
    """
    low = coords.amin(1, keepdim=True)
    moved = coords - low
    scale = moved.amax((1, 2)).clamp_min(torch.finfo(coords.dtype).tiny)
    return moved / scale[:, None, None], scale


def normalise_paths(coords: Float[Tensor, "batch n 2"]) -> tuple[Float[Tensor, "batch n 2"], Float[Tensor, " batch"]]:
    """Like `normalise_points`, with the axes swapped where points are taller than wide: they lie rather than stand."""
    unit, scale = normalise_points(coords)
    extent = unit.amax(1, keepdim=True)
    return torch.where(extent[..., 1:] > extent[..., :1], unit.flip(-1), unit), scale


def is_permutation(order: Int[Tensor, "*batch n"]) -> Bool[Tensor, "*batch"]:
    """Whether each row holds every number from 0 to n - 1 once."""
    return (order.sort(-1).values == torch.arange(order.shape[-1], device=order.device)).all(-1)


@torch.no_grad()
def nearest_neighbour(
    coords: Float[Tensor, "batch n 2"], starts: Int[Tensor, "batch samples"] | None = None
) -> Int[Tensor, "batch samples n"]:
    """Tours that always go on to the nearest point not yet visited.

    Args:
        coords: (batch, n, 2).
        starts: (batch, samples), where to begin; every point by default.

    Raises:
        TypeError: coords are no floating-point tensor, or starts no integers.
        ValueError: coords are not finite, a shape does not fit, or a start is no point.
    """
    coords = _read_points(coords)
    batch, n, _ = coords.shape
    if starts is None:
        starts = torch.arange(n, device=coords.device).expand(batch, n)
    starts = _read_order("starts", starts, batch, n)
    if starts.ndim != 2:
        raise ValueError(f"starts must be of shape (batch, samples), got shape {tuple(starts.shape)}")
    apart = distances(coords)
    current = starts
    visited = torch.zeros(*starts.shape, n, dtype=torch.bool, device=coords.device).scatter(
        -1, current[..., None], True
    )
    order = [current]
    for _ in range(n - 1):
        row = apart.gather(1, current[..., None].expand(-1, -1, n))
        current = row.masked_fill(visited, torch.inf).argmin(-1)
        visited.scatter_(-1, current[..., None], True)
        order.append(current)
    return torch.stack(order, -1)


@torch.no_grad()
def two_opt(
    coords: Float[Tensor, "batch n 2"],
    order: Int[Tensor, "batch n"] | None = None,
    *,
    closed: bool = False,
    max_moves: int | None = None,
) -> Int[Tensor, "batch n"]:
    """2-opt with the best move of all, until no reversal shortens any path.

    Args:
        coords: (batch, n, 2).
        order: (batch, n), where to start from; the order of the points by default.
        closed: whether to improve tours; otherwise open paths, whose first and last point stay.
        max_moves: most moves of each path.

    Raises:
        ValueError: a shape does not fit, or a row of `order` is no permutation.

    Example:
        >>> crossed = torch.tensor([[[0.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]])
        >>> two_opt(crossed, closed=True)
        tensor([[0, 2, 1, 3]])
    """
    coords = _read_points(coords)
    batch, n, _ = coords.shape
    if order is None:
        order = torch.arange(n, device=coords.device).expand(batch, n)
    order = _read_order("order", order, batch, n)
    if order.shape != (batch, n):
        raise ValueError(f"order must be permutations of shape {(batch, n)}, got shape {tuple(order.shape)}")
    if not is_permutation(order).all():
        raise ValueError(f"order must be permutations of shape {(batch, n)}, got one that is none")
    if max_moves is not None:
        max_moves = integer("max_moves", max_moves, least=0)
    path = torch.cat([order, order[:, :1]], 1) if closed else order.clone()
    position = torch.arange(path.shape[1], device=coords.device)
    later = position[1:-1, None] < position[None, 1:-1]  # i + 1 < j: a segment of two points or more
    # Differences of coordinates are as exact far from the origin as near it, so that no more is asked of a gain there.
    low, high = coords.amin(1), coords.amax(1)
    threshold = _LEAST_GAIN * torch.finfo(coords.dtype).eps * (high - low).amax(1)
    active = torch.arange(batch, device=coords.device)  # whose last move still helped
    moves = 0
    while later.any() and len(active) and (max_moves is None or moves < max_moves):
        here = path[active]
        points = take(coords[active], here)
        apart = distances(points)
        step = apart.diagonal(1, 1, 2)
        # Entry (i, j) reverses i + 1 ... j + 1, so that the legs before i + 1 and after j + 1 change.
        change = apart[:, :-2, 1:-1] + apart[:, 1:-1, 2:] - step[:, :-1, None] - step[:, None, 1:]
        gain, best = (-change).masked_fill(~later, -torch.inf).flatten(1).max(1)
        helps = gain > threshold[active]
        active, here, best = active[helps], here[helps], best[helps]
        first = best // later.shape[1] + 1
        last = best % later.shape[1] + 1
        inside = (position >= first[:, None]) & (position <= last[:, None])
        path[active] = here.gather(1, torch.where(inside, (first + last)[:, None] - position, position))
        moves += 1
    return path[:, :n]


@torch.no_grad()
def shortest_paths(coords: Float[Tensor, "batch n 2"]) -> Int[Tensor, "batch n"]:
    """The shortest open paths from the first point to the last through all others, by dynamic programming.

    Time and memory grow as n^2 2^n; at most 14 points.

    Raises:
        ValueError: there are fewer than 2 points, or more than 14.

    Example:
        >>> shortest_paths(torch.tensor([[[0.0, 0.0], [2.0, 0.0], [1.0, 0.0], [3.0, 0.0]]]))
        tensor([[0, 2, 1, 3]])
    """
    coords = _read_points(coords)
    batch, n, _ = coords.shape
    inner = n - 2
    if not 0 <= inner <= _MOST_INNER_POINTS:
        raise ValueError(f"coords must be 2 to {_MOST_INNER_POINTS + 2} points a path, got {n}")
    apart = distances(coords)
    if inner < 2:
        return torch.arange(n, device=coords.device).expand(batch, n).clone()
    between = apart[:, 1:-1, 1:-1]
    # best[s, :, j]: the shortest way from the first point through the set s that ends in j.
    best = apart.new_full((2**inner, batch, inner), torch.inf)
    previous = torch.zeros(2**inner, batch, inner, dtype=torch.long, device=coords.device)
    for j in range(inner):
        best[1 << j, :, j] = apart[:, 0, j + 1]
    for subset in range(1, 2**inner - 1):
        length, came_from = (best[subset][:, :, None] + between).min(1)
        for j in range(inner):
            if not subset >> j & 1:
                best[subset | 1 << j, :, j] = length[:, j]
                previous[subset | 1 << j, :, j] = came_from[:, j]
    point = (best[-1] + apart[:, 1:-1, -1]).argmin(1)
    visited = torch.full_like(point, 2**inner - 1)
    rows = torch.arange(batch, device=coords.device)
    backwards = [torch.full_like(point, n - 1)]
    for _ in range(inner):
        backwards.append(point + 1)
        point, visited = previous[visited, rows, point], visited - (1 << point)
    return torch.stack([*backwards, torch.zeros_like(point)], 1).flip(1)


def _read_points(coords: Tensor) -> Tensor:
    found = finite_tensor("coords", coords, ndim=3, floating=True)
    if found.shape[-1] != 2 or 0 in found.shape:
        raise ValueError(f"coords must be of shape (batch, n, 2), got shape {tuple(found.shape)}")
    if found.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"coords must be float32 or float64, got {found.dtype}")
    if not (found.amax(1) - found.amin(1)).square().sum(-1).isfinite().all():
        raise ValueError(f"coords must have distances that fit {found.dtype}, got larger ones")
    return found


def _read_order(name: str, order: Tensor, batch: int, n: int) -> Tensor:
    found = tensor(name, order)
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {found.dtype}")
    if found.ndim < 2 or len(found) != batch or not found.numel():
        raise ValueError(f"{name} must be of shape ({batch}, ..., points), got shape {tuple(found.shape)}")
    low, high = int(found.min()), int(found.max())
    if low < 0 or high >= n:
        raise ValueError(f"{name} must be in [0, {n}), got {low if low < 0 else high}")
    return found.long()


def _read_paths(coords: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    points = _read_points(coords)
    return points, _read_order("order", order, *points.shape[:2])
