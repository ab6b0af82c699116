r"""Discrete values for many variables that make the worst of many linear constraints as little violated as can be.

Reach for it where variables may only take listed values (codes of a quantiser, grey levels, fixed-point coefficients)
and the largest error counts, not the mean: a mixed-integer solver proves the optimum of small problems, and for larger
ones this search finds good values in a fraction of the time.

$$
\min_{x \in D_1 \times \dots \times D_n}\ \max_{i \le m}\ w_i\,\bigl|(A x - b)_i\bigr|
$$

Along one variable the objective is convex, so that the step to the level above and the step to the level below decide
whether any level of that variable is better: $2n$ moves stand for all $\sum_j |D_j|$. A move's effect on the few worst
rows bounds its effect on all rows from below, so that the best move is found, exactly, by looking at all rows for the
few moves with the smallest bounds. Many searches run at once, for one problem or several with the same $A$: from
several roundings of the relaxation's optimum, each takes the best move whose variable was not changed lately, and after
a while without gain the best pair of moves from its best point, or a random kick.

Reference:
    Cheikh Ahmed, Mahdi Mostajabdaveh, Samin Aref and Zirui Zhou, "Discrete Optimization of Min-Max Violation and its
    Applications Across Computational Sciences", 2025, arXiv 2508.13437.

The problem and its uses are the paper's; no release was found, and the search's schedule (tenure, kicks, starts) is our
own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

Array: TypeAlias = Tensor | NDArray[Any]

_ROWS = 16  # worst rows that bound a move's effect
_SHORTLIST = 8  # moves that are looked at on all rows at first
_WIDER = 4  # times as many, where that does not settle it
_PAIR_FIRSTS = 8  # most moves that pairs begin with
_ORDERS = 8  # of compensated roundings among the starts, at most
_GAIN = 1e-12  # relative; less is rounding


@dataclass(frozen=True)
class MinMaxViolationResult:
    """The best values found. Arrays are of the kind, dtype and device of `A`; `problems` is absent where `b` is (m,).

    Attributes:
        x: (problems, n).
        index: (problems, n), the place of each value among its levels.
        value: (problems,), the worst weighted violation of `x`.
        bound: (problems,), the optimum of the relaxation, below which no values can get; minus infinity where a start
            was given.
        history: (steps + 1, problems), the best value after each step.
        n_steps: moves that each search made.
    """

    x: Array
    index: Array
    value: Array
    bound: Array
    history: Array
    n_steps: int


@torch.no_grad()
def minmax_violation(
    A: Float[Array, "m n"],
    b: Float[Array, "*problems m"],
    levels: Float[Array, "*grids levels"] | Sequence[Float[Array, " _"]],
    *,
    weights: Float[Array, " m"] | None = None,
    start: Float[Array, "*problems n"] | None = None,
    restarts: int = 32,
    max_steps: int = 150,
    time_limit: float | None = None,
    tenure: int | None = None,
    patience: int = 30,
    kick: int = 3,
    pairs: bool = True,
    generator: torch.Generator | None = None,
) -> MinMaxViolationResult:
    """Minimises the worst violation over the given levels by a batch of tabu searches.

    Computed in float64 whatever the input's dtype. Problems that share `A` are solved together.

    Args:
        A: (m, n), finite.
        b: (m,), or (problems, m) for several problems.
        levels: values that a variable may take, increasing: one tensor for all variables, a matrix with a row for each
            variable, a tensor (problems, n, levels), or a sequence of n tensors of any lengths.
        weights: (m,) positive weights of the constraints; one each by default.
        start: continuous values to round, such as the weights of a layer. By default the optimum of the relaxation,
            a linear programme: it is the best start and bounds the result, and takes a while for thousands of
            variables.
        restarts: searches for each problem. One starts at the nearest levels, up to eight at compensated roundings in
            as many orders, and the others at random roundings.
        max_steps: moves of each search; none are made once the relaxation's bound is reached.
        time_limit: seconds after which to stop all the same; results then depend on the machine.
        tenure: a changed variable is left alone for this many steps up to twice as many; by default a quarter of the
            number of variables, between 1 and 5.
        patience: steps without gain after which a search goes back to its best point, or the best of all.
        kick: variables to change at random there, on average.
        pairs: whether to look for a pair of moves before a kick.
        generator: of the random draws; seed 0 by default.

    Raises:
        TypeError: an argument is no tensor or array of floating point numbers.
        ValueError: a shape or value does not fit.

    Example:
        >>> A = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
        >>> result = minmax_violation(A, torch.tensor([1.2, 0.7]), torch.tensor([0.0, 0.5, 1.0]))
        >>> result.x, round(float(result.value), 3)
        (tensor([1.0000, 0.5000]), 0.3)
    """
    for name, count, least in (
        ("restarts", restarts, 1),
        ("max_steps", max_steps, 0),
        ("patience", patience, 1),
        ("kick", kick, 1),
        ("tenure", 1 if tenure is None else tenure, 0),
    ):
        if count < least:
            raise ValueError(f"{name} must be at least {least}, got {count}")
    if time_limit is not None and not time_limit > 0:
        raise ValueError(f"time_limit must be positive, got {time_limit}")
    deadline = math.inf if time_limit is None else time.perf_counter() + time_limit
    matrix, target = _checked("A", A), _checked("b", b)
    if matrix.ndim != 2 or not matrix.numel():
        raise ValueError(f"A must be a non-empty matrix, got shape {tuple(matrix.shape)}")
    (m, n), several = matrix.shape, target.ndim == 2
    if target.ndim not in (1, 2) or target.shape[-1] != m or not target.numel():
        raise ValueError(f"b must have shape ({m},) or (problems, {m}), got {tuple(target.shape)}")
    if target.device != matrix.device:
        raise ValueError(f"b must be on the device of A, {matrix.device}, got {target.device}")
    target = target.reshape(-1, m)
    grid = _grid(levels, len(target), n, matrix.device)
    scale = (
        torch.ones(m, dtype=torch.float64, device=matrix.device) if weights is None else _checked("weights", weights)
    )
    if scale.shape != (m,) or not bool((scale > 0).all()):
        raise ValueError(f"weights must be {m} positive numbers, got shape {tuple(scale.shape)}, least {scale.min():g}")
    matrix, target = scale[:, None] * matrix, scale * target

    bound = torch.full((len(target),), -math.inf, dtype=torch.float64, device=matrix.device)
    if start is None:
        centre, bound = relaxation(matrix, target, grid[..., 0], grid[..., -1])
    else:
        centre = _checked("start", start)
        if centre.shape != (*(target.shape[:1] if several else ()), n):
            raise ValueError(f"start must have shape {(*target.shape[:several], n)}, got {tuple(centre.shape)}")
        centre = centre.reshape(-1, n)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    search = Searches(matrix, target, grid, _starts(matrix, centre, grid, restarts, generator))
    if tenure is None:
        tenure = min(max(n // 4, 1), 5)
    history = [search.best_value.view(-1, restarts).amin(1)]
    steps = 0
    proven = bound * (1 + _GAIN)
    while steps < max_steps and time.perf_counter() < deadline and bool((history[-1] > proven).any()):
        steps += 1
        search.step(tenure, generator)
        search.go_back(patience, kick, pairs, restarts, generator)
        history.append(search.best_value.view(-1, restarts).amin(1))

    best = search.best_value.view(-1, restarts).argmin(1)
    index = search.best.view(-1, restarts, n)[torch.arange(len(best), device=best.device), best]
    x = grid.gather(2, index[..., None])[..., 0]
    value = (x @ matrix.T - target).abs().amax(1)

    def given(found: Tensor, like_a: bool = True) -> Array:
        found = found.to(torch.as_tensor(A).dtype) if like_a else found
        return found if isinstance(A, Tensor) else found.numpy()

    first = slice(None) if several else 0
    return MinMaxViolationResult(
        x=given(x[first]),
        index=given(index[first], like_a=False),
        value=given(value[first]),
        bound=given(bound[first]),
        history=given(torch.stack(history)[:, first]),
        n_steps=steps,
    )


def relaxation(
    A: Float[Tensor, "m n"],
    b: Float[Tensor, "problems m"],
    low: Float[Tensor, "problems n"],
    high: Float[Tensor, "problems n"],
) -> tuple[Float[Tensor, "problems n"], Float[Tensor, " problems"]]:
    """The best continuous values between `low` and `high`, and their worst violation, by linear programming (HiGHS).

    Raises:
        RuntimeError: the linear programme could not be solved.
    """
    from scipy.optimize import linprog

    m, n = A.shape
    rows, ones = A.cpu().numpy(), np.ones((m, 1))
    both = np.block([[rows, -ones], [-rows, -ones]])
    values = []
    for target, below, above in zip(b.cpu().numpy(), low.cpu().numpy(), high.cpu().numpy(), strict=True):
        limits = [*zip(below, above, strict=True), (0, None)]
        found = linprog(np.append(np.zeros(n), 1.0), A_ub=both, b_ub=np.append(target, -target), bounds=limits)
        if found.x is None:
            raise RuntimeError(f"the relaxation could not be solved: {found.message}")
        values.append(found.x)
    solved = torch.from_numpy(np.stack(values)).to(A)
    return solved[:, :n], solved[:, n]


class Searches:
    """A batch of tabu searches on problems that share their matrix; `batch` is problems times restarts.

    Args:
        A: (m, n), weighted.
        b: (problems, m), weighted.
        grid: (problems, n, levels), increasing; a repeated last level stands for none.
        index: (batch, n) places among the levels to start from, those of a problem side by side.
    """

    def __init__(
        self,
        A: Float[Tensor, "m n"],
        b: Float[Tensor, "problems m"],
        grid: Float[Tensor, "problems n levels"],
        index: Int[Tensor, "batch n"],
    ) -> None:
        self.columns = A.T.contiguous()
        restarts = len(index) // len(b)
        self.b = b.repeat_interleave(restarts, 0)
        self.grid = grid
        self.top = last_places(grid).repeat_interleave(restarts, 0)
        self.restarts = restarts
        self.index = index
        self.residual = self.residual_of(index, slice(None))
        self.best = index.clone()
        self.best_value = self.residual.abs().amax(1)
        self.free_at = torch.zeros_like(index)
        self.since = torch.zeros_like(index[:, 0])
        self.now = 0

    def values(self, index: Int[Tensor, "some n"], who: Any) -> Float[Tensor, "some n"]:
        """What stands at these places, for the searches `who`."""
        problem = torch.arange(len(self.b), device=index.device)[who] // self.restarts
        return self.grid[problem[:, None], torch.arange(index.shape[1], device=index.device), index]

    def residual_of(self, index: Int[Tensor, "some n"], who: Any) -> Float[Tensor, "some m"]:
        """A x - b, from scratch."""
        return self.values(index, who) @ self.columns - self.b[who]

    def moves(self, index: Int[Tensor, "some n"], who: Any) -> Float[Tensor, "some 2n"]:
        """Changes of value by a step up, then those by a step down; zero where there is none."""
        here = self.values(index, who)
        up = self.values((index + 1).minimum(self.top[who]), who) - here
        return torch.cat([up, self.values((index - 1).clamp(min=0), who) - here], 1)

    def step(self, tenure: int, generator: torch.Generator) -> None:
        """Every search makes its best move that is not tabu, or is better than all it has seen."""
        self.now += 1
        batch, n = self.index.shape
        moves = self.moves(self.index, slice(None))
        bound = bounds(self.residual, self.columns, moves)
        # A tabu move counts only below the best value so far.
        tabu = (self.free_at > self.now).repeat(1, 2)
        limit = self.best_value[:, None].where(tabu, math.inf)
        value, chosen = best_move(self.residual, self.columns, moves, bound, limit)
        variable, everyone = chosen % n, torch.arange(batch, device=chosen.device)
        can = value.isfinite()
        change = moves[everyone, chosen].where(can, 0.0)
        self.index[everyone, variable] += (1 - 2 * (chosen // n)).where(can, 0)
        self.residual.addcmul_(change[:, None], self.columns[variable])
        wait = torch.randint(tenure, 2 * tenure + 1, (batch,), generator=generator).to(chosen.device)
        self.free_at[everyone, variable] = self.now + 1 + wait
        self._keep(value, self.index, everyone)

    def go_back(self, patience: int, kick: int, pairs: bool, restarts: int, generator: torch.Generator) -> None:
        """Searches that gained nothing for a while go on from a good point, after a pair of moves or a kick there.

        That point is their own best for half of them, and the best of all searches of the problem for the others.
        """
        who = (self.now - self.since >= patience).nonzero()[:, 0]
        if not len(who):
            return
        n = self.index.shape[1]
        leader = self.best_value.view(-1, restarts).argmin(1) + torch.arange(0, len(self.b), restarts).to(who.device)
        source = torch.where(who % 2 == 0, leader[who // restarts], who)
        index = self.best[source].clone()
        left = torch.ones(len(who), dtype=torch.bool, device=who.device)
        if pairs:
            moves = self.moves(index, who)
            value, chosen = best_pair(self.residual_of(index, who), self.columns, moves)
            left = value >= self.best_value[source] * (1 - _GAIN)
            for one in chosen.unbind(1):
                index[torch.arange(len(who)), one % n] += (1 - 2 * (one // n)).where(~left, 0)
        draws = torch.rand(2, *index.shape, generator=generator).to(who.device)
        kicked = (draws[0] < kick / n) & left[:, None]
        index += torch.where(draws[1] < 0.5, -1, 1).where(kicked, 0)
        index = index.clamp(min=0).minimum(self.top[who])
        self.index[who], self.residual[who] = index, self.residual_of(index, who)
        self.free_at[who], self.since[who] = 0, self.now
        self._keep(self.residual[who].abs().amax(1), index, who)

    def _keep(self, value: Float[Tensor, " some"], index: Int[Tensor, "some n"], who: Int[Tensor, " some"]) -> None:
        better = value < self.best_value[who] * (1 - _GAIN)
        who = who[better]
        self.best_value[who], self.best[who], self.since[who] = value[better], index[better], self.now


def bounds(
    residual: Float[Tensor, "batch m"], columns: Float[Tensor, "n m"], moves: Float[Tensor, "batch 2n"]
) -> Float[Tensor, "batch 2n"]:
    """The worst violation after each move, over the rows that are worst now; infinity where there is no move."""
    rows = residual.abs().topk(min(_ROWS, residual.shape[1]), 1).indices
    now, slopes = residual.gather(1, rows), columns.T[rows]
    up, down = (slopes * step[:, None] for step in moves.chunk(2, 1))
    found = torch.cat([(now[:, :, None] + change).abs_().amax(1) for change in (up, down)], 1)
    return found.masked_fill_(moves == 0, math.inf)


def best_move(
    residual: Float[Tensor, "batch m"],
    columns: Float[Tensor, "n m"],
    moves: Float[Tensor, "batch 2n"],
    bound: Float[Tensor, "batch 2n"],
    limit: Float[Tensor, "batch 2n"] | None = None,
) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"]]:
    """The least worst violation over all rows that a move leads to, and the move; exact, however weak the bounds are.

    Moves that do not get below their `limit`, where there is one, are not made.
    """

    def after(who: Int[Tensor, " part"], chosen: Int[Tensor, "part some"]) -> Float[Tensor, "part some m"]:
        change = moves[who[:, None], chosen][..., None] * columns[chosen % len(columns)]
        return change.add_(residual[who][:, None])

    return least(bound, after, limit)


def best_pair(
    residual: Float[Tensor, "batch m"], columns: Float[Tensor, "n m"], moves: Float[Tensor, "batch 2n"]
) -> tuple[Float[Tensor, " batch"], Int[Tensor, "batch 2"]]:
    """The best pair of moves of two variables, one of them among the few that lower the worst row most.

    A pair that lowers the worst violation has a move that lowers the worst row, so that nothing is missed where no more
    moves than that lower it.
    """
    batch, n = len(residual), len(columns)
    rows = residual.abs().topk(min(_ROWS, residual.shape[1]), 1).indices
    now = residual.gather(1, rows)
    change = torch.cat([columns.T[rows] * step[:, None] for step in moves.chunk(2, 1)], 2)  # (batch, rows, 2n)
    worst_row = (now[:, :1] + change[:, 0]).abs_().masked_fill_(moves == 0, math.inf)
    first = worst_row.topk(min(_PAIR_FIRSTS, 2 * n), 1, largest=False).indices
    begun = now[..., None] + change.gather(2, first[:, None].expand(-1, len(rows[0]), -1))
    bound = (begun[..., None] + change[:, :, None]).abs_().amax(1)  # (batch, firsts, 2n)
    every = torch.arange(2 * n, device=moves.device)
    impossible = (moves == 0)[:, None] | (moves.gather(1, first) == 0)[..., None] | (first[..., None] % n == every % n)
    bound = bound.masked_fill_(impossible, math.inf).view(batch, -1)

    def members(who: Int[Tensor, " part"], chosen: Int[Tensor, "part some"]) -> tuple[Tensor, Tensor]:
        return first[who[:, None], chosen // (2 * n)], chosen % (2 * n)

    def after(who: Int[Tensor, " part"], chosen: Int[Tensor, "part some"]) -> Float[Tensor, "part some m"]:
        changes = [moves[who[:, None], one][..., None] * columns[one % n] for one in members(who, chosen)]
        return changes[0].add_(changes[1]).add_(residual[who][:, None])

    value, chosen = least(bound, after)
    return value, torch.cat(members(torch.arange(batch, device=chosen.device), chosen[:, None]), 1)


def least(
    bound: Float[Tensor, "batch moves"],
    after: Callable[[Tensor, Tensor], Tensor],
    limit: Float[Tensor, "batch moves"] | None = None,
) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"]]:
    """The move with the least worst violation, looking at all rows only for moves whose bounds do not rule them out.

    Args:
        bound: lower bounds of the moves' worst violations; infinity for those that are not to be made.
        after: residuals (part, some, m) of the searches (part,) after their moves (part, some).
        limit: what moves must get below to count.

    Returns:
        The worst violation, infinity where no move is left, and the move. Equal ones are told apart by the sum of
        squares among those looked at.
    """
    batch, number = bound.shape
    values, moves = bound.new_empty(batch), torch.empty(batch, dtype=torch.long, device=bound.device)
    who, count = torch.arange(batch, device=bound.device), _SHORTLIST
    while len(who):
        count = min(count, number)
        low, chosen = bound[who].topk(min(count + 1, number), 1, largest=False)
        residual = after(who, chosen[:, :count])
        value = residual.abs().amax(2)
        beyond = low[:, :count].isinf()
        if limit is not None:
            beyond |= value >= limit[who[:, None], chosen[:, :count]]
        value.masked_fill_(beyond, math.inf)
        lowest = value.amin(1)
        tied = value <= lowest[:, None] * (1 + _GAIN)
        place = residual.square_().sum(2).masked_fill_(~tied, math.inf).argmin(1, keepdim=True)
        values[who], moves[who] = lowest, chosen.gather(1, place)[:, 0]
        # All others are at least as bad as the first that was not looked at may be.
        who = who[lowest > low[:, -1]] if count < number else who[:0]
        count *= _WIDER
    return values, moves


def compensated_rounding(
    A: Float[Tensor, "m n"],
    centre: Float[Tensor, "problems n"],
    grid: Float[Tensor, "problems n levels"],
    order: Int[Tensor, "orders n"],
    damping: float = 0.01,
) -> Int[Tensor, "problems orders n"]:
    """Rounds variables in turn, those to come taking up what that did to A x in least squares; places in the grid.

    This is GPTQ (Frantar et al., ICLR 2023), here with several orders at once.

    Args:
        A: (m, n).
        centre: (problems, n) continuous values.
        grid: (problems, n, levels), increasing.
        order: (orders, n) permutations of the variables.
        damping: added to the diagonal of A^T A, as a share of its mean.
    """
    gram = A.T @ A
    gram.diagonal().add_(damping * gram.diagonal().mean().clamp(min=torch.finfo(A.dtype).tiny))
    ordered = gram[order[:, :, None], order[:, None, :]]
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(ordered))).mT
    values, last = centre[:, order], last_places(grid)
    index = torch.empty(values.shape, dtype=torch.long, device=A.device)
    for place, variable in enumerate(order.T):
        levels, here = grid[:, variable], values[:, :, place, None]
        index[:, :, place] = (levels - here).abs().argmin(2).minimum(last[:, variable])
        rounded = levels.gather(2, index[:, :, place, None])
        error = (here - rounded) / factor[:, place, place, None]
        values[:, :, place + 1 :] -= error * factor[:, place, place + 1 :]
    return index.gather(2, order.argsort(1).expand_as(index))


def _starts(
    A: Float[Tensor, "m n"],
    centre: Float[Tensor, "problems n"],
    grid: Float[Tensor, "problems n levels"],
    restarts: int,
    generator: torch.Generator,
) -> Int[Tensor, "batch n"]:
    """Nearest levels, compensated roundings in some orders, and random roundings to one of the two levels around."""
    n = centre.shape[1]
    orders = [torch.randperm(n, generator=generator).to(A.device) for _ in range(min(restarts - 2, _ORDERS - 1))]
    if restarts > 1:
        orders.insert(0, A.square().sum(0).argsort(descending=True, stable=True))
    last = last_places(grid)[..., None]
    above = torch.searchsorted(grid.contiguous(), centre[..., None].contiguous()).clamp(min=1).minimum(last)
    below = (above - 1).clamp(min=0)
    low, high = grid.gather(2, below)[..., 0], grid.gather(2, above)[..., 0]
    share = ((centre - low) / (high - low)).nan_to_num(0.0)
    draws = torch.rand(len(centre), restarts - len(orders), n, generator=generator, dtype=torch.float64)
    draws[:, 0] = 0.5
    index = torch.where(draws.to(share.device) < share[:, None], above[:, None, :, 0], below[:, None, :, 0])
    if orders:
        index = torch.cat([index, compensated_rounding(A, centre, grid, torch.stack(orders))], 1)
    return index.flatten(0, 1)


def last_places(grid: Float[Tensor, "problems n levels"]) -> Int[Tensor, "problems n"]:
    """Where each variable's largest level stands first; what follows it only fills the grid."""
    return (grid.diff(dim=2) > 0).sum(2)


def _grid(
    levels: Array | Sequence[Array], problems: int, n: int, device: torch.device
) -> Float[Tensor, "problems n levels"]:
    if isinstance(levels, Tensor | np.ndarray):
        rows = _checked("levels", levels)
        if rows.ndim not in (1, 2, 3) or not rows.numel():
            raise ValueError(f"levels must have 1, 2 or 3 dimensions and not be empty, got shape {tuple(rows.shape)}")
        wanted = (problems, n)[3 - rows.ndim :] if rows.ndim > 1 else ()
        if rows.shape[:-1] != wanted:
            raise ValueError(f"levels must have shape {(*wanted, 'levels')}, got {tuple(rows.shape)}")
        sets = [rows]
    else:
        sets = [_checked(f"levels[{j}]", one) for j, one in enumerate(levels)]
        if len(sets) != n or any(one.ndim != 1 or not len(one) for one in sets):
            raise ValueError(f"levels must be {n} non-empty vectors, got shapes {[tuple(one.shape) for one in sets]}")
    if any(bool((one.diff() <= 0).any()) for one in sets):
        raise ValueError("levels must be increasing")
    if len(sets) > 1:
        longest = max(map(len, sets))
        sets = [torch.stack([torch.cat([one, one[-1:].expand(longest - len(one))]) for one in sets])]
    return sets[0].to(device).expand(problems, n, -1)


def _checked(name: str, value: Array) -> Tensor:
    if not isinstance(value, Tensor | np.ndarray):
        raise TypeError(f"{name} must be a torch tensor or a NumPy array, got {type(value).__name__}")
    found = torch.as_tensor(value)
    if not found.is_floating_point():
        raise TypeError(f"{name} must hold floating point numbers, got {found.dtype}")
    if not bool(found.isfinite().all()):
        raise ValueError(f"{name} must be finite")
    return found.detach().double()
