"""A batch of tabu searches, and the best of all moves by looking at all rows for only a few of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.solvers.minmax_violation.reader import last_places

GAIN = 1e-12
"""By what share a violation must fall to count as lower: less is rounding."""

_ROWS = 16  # worst rows that bound a move's effect
_SHORTLIST = 8  # moves that are looked at on all rows at first
_WIDER = 4  # times as many, where that does not settle it
_PAIR_FIRSTS = 8  # most moves that pairs begin with


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
            left = value >= self.best_value[source] * (1 - GAIN)
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
        better = value < self.best_value[who] * (1 - GAIN)
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
        tied = value <= lowest[:, None] * (1 + GAIN)
        place = residual.square_().sum(2).masked_fill_(~tied, math.inf).argmin(1, keepdim=True)
        values[who], moves[who] = lowest, chosen.gather(1, place)[:, 0]
        # All others are at least as bad as the first that was not looked at may be.
        who = who[lowest > low[:, -1]] if count < number else who[:0]
        count *= _WIDER
    return values, moves
