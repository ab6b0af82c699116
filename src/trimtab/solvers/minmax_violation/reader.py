"""What a user gives of a problem, read into float64 tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from trimtab.ops.arguments import finite_tensor

Array: TypeAlias = Tensor | NDArray[Any]


class MinMaxProblem(NamedTuple):
    """A problem that was read; all in float64 and on one device.

    Attributes:
        matrix: (m, n), weighted.
        target: (problems, m), weighted.
        grid: (problems, n, levels), increasing; a repeated last level stands for none.
        start: (problems, n), or None.
        several: whether the targets came as a matrix.
    """

    matrix: Tensor
    target: Tensor
    grid: Tensor
    start: Tensor | None
    several: bool


def read_problem(
    A: Float[Array, "m n"],
    b: Float[Array, "*problems m"],
    levels: Float[Array, "*grids levels"] | Sequence[Float[Array, " _"]],
    weights: Float[Array, " m"] | None,
    start: Float[Array, "*problems n"] | None,
) -> MinMaxProblem:
    """Reads the arguments of `minmax_violation`, which says what they are.

    Raises:
        TypeError: an argument is no tensor or array of floating point numbers.
        ValueError: a shape or value does not fit.
    """
    matrix, target = _doubles("A", A), _doubles("b", b)
    if matrix.ndim != 2 or not matrix.numel():
        raise ValueError(f"A must be a non-empty matrix, got shape {tuple(matrix.shape)}")
    (m, n), several = matrix.shape, target.ndim == 2
    if target.ndim not in (1, 2) or target.shape[-1] != m or not target.numel():
        raise ValueError(f"b must be of shape ({m},) or (problems, {m}), got shape {tuple(target.shape)}")
    if target.device != matrix.device:
        raise ValueError(f"b must be on the device of A, {matrix.device}, got {target.device}")
    target = target.reshape(-1, m)
    grid = _grid(levels, len(target), n, matrix.device)
    if weights is not None:
        scale = _doubles("weights", weights)
        if scale.shape != (m,):
            raise ValueError(f"weights must be of shape ({m},), got shape {tuple(scale.shape)}")
        if not bool((scale > 0).all()):
            raise ValueError(f"weights must be positive, got {scale.min():g}")
        matrix, target = scale[:, None] * matrix, scale * target
    centre = None if start is None else _doubles("start", start)
    if centre is not None:
        wanted = (*(target.shape[:1] if several else ()), n)
        if centre.shape != wanted:
            raise ValueError(f"start must be of shape {wanted}, got shape {tuple(centre.shape)}")
        centre = centre.reshape(-1, n)
    return MinMaxProblem(matrix, target, grid, centre, several)


def last_places(grid: Float[Tensor, "problems n levels"]) -> Int[Tensor, "problems n"]:
    """Where each variable's largest level stands first; what follows it only fills the grid."""
    return (grid.diff(dim=2) > 0).sum(2)


def _grid(
    levels: Array | Sequence[Array], problems: int, n: int, device: torch.device
) -> Float[Tensor, "problems n levels"]:
    if isinstance(levels, Tensor | np.ndarray):
        rows = _doubles("levels", levels)
        if rows.ndim not in (1, 2, 3) or not rows.numel():
            raise ValueError(f"levels must be of 1, 2 or 3 dimensions and not empty, got shape {tuple(rows.shape)}")
        wanted = (problems, n)[3 - rows.ndim :] if rows.ndim > 1 else ()
        if rows.shape[:-1] != wanted:
            raise ValueError(f"levels must be of shape {(*wanted, 'levels')}, got shape {tuple(rows.shape)}")
        sets = [rows]
    else:
        sets = [_doubles(f"levels[{j}]", one) for j, one in enumerate(levels)]
        if len(sets) != n or any(one.ndim != 1 or not len(one) for one in sets):
            raise ValueError(f"levels must be {n} non-empty vectors, got shapes {[tuple(one.shape) for one in sets]}")
    if any(bool((one.diff() <= 0).any()) for one in sets):
        raise ValueError("levels must be increasing, got some that are not")
    if len(sets) > 1:
        longest = max(map(len, sets))
        sets = [torch.stack([torch.cat([one, one[-1:].expand(longest - len(one))]) for one in sets])]
    return sets[0].to(device).expand(problems, n, -1)


def _doubles(name: str, value: Array) -> Tensor:
    return finite_tensor(name, value, floating=True).detach().double()
