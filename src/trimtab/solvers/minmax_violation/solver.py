"""The solver: a batch of tabu searches from roundings of the relaxation's optimum."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.ops.arguments import integer, positive
from trimtab.solvers.minmax_violation.reader import Array, read_problem
from trimtab.solvers.minmax_violation.relaxation import relaxation
from trimtab.solvers.minmax_violation.rounding import rounded_starts
from trimtab.solvers.minmax_violation.search import GAIN, Searches


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
    restarts, max_steps = integer("restarts", restarts), integer("max_steps", max_steps, 0)
    patience, kick = integer("patience", patience), integer("kick", kick)
    if tenure is not None:
        tenure = integer("tenure", tenure, 0)
    deadline = math.inf
    if time_limit is not None:
        deadline = time.perf_counter() + positive("time_limit", time_limit)
    problem = read_problem(A, b, levels, weights, start)
    matrix, target, grid = problem.matrix, problem.target, problem.grid
    n, several = matrix.shape[1], problem.several

    bound = torch.full((len(target),), -math.inf, dtype=torch.float64, device=matrix.device)
    if problem.start is None:
        centre, bound = relaxation(matrix, target, grid[..., 0], grid[..., -1])
    else:
        centre = problem.start
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    search = Searches(matrix, target, grid, rounded_starts(matrix, centre, grid, restarts, generator))
    if tenure is None:
        tenure = min(max(n // 4, 1), 5)
    history = [search.best_value.view(-1, restarts).amin(1)]
    steps = 0
    proven = bound * (1 + GAIN)
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
