r"""AutoDiffusion: a search for the time steps of a short sampling run, and for the layers to run at each of them.

For a trained diffusion model that has to sample in so few steps that their choice matters. No weight changes: some
hundred short runs of the sampler are scored by the Frechet distance of their samples to the data. `sampling_search` is
an evolutionary search over candidates

$$
\{t_1 > \dots > t_S\},\ \{L_1, \dots, L_S\}, \qquad \sum_i (B - |L_i|) \le B\,S_0,
$$

where $L_i$ are the blocks skipped at step i, of B. First the times alone are searched, with the whole network; once the
best candidate stays the same (or after five generations) blocks are skipped, too, in a share that grows over five
generations, and what they save pays for further steps. `LayerSkipping` is the denoiser that runs such a candidate.

The release draws candidates unsorted and lets a time repeat after crossover; here times are sorted and distinct.

Reference: Lijiang Li et al., "AutoDiffusion: Training-Free Optimization of Time Steps and Architectures for Automated
Diffusion Model Acceleration", ICCV 2023, arXiv 2309.10438.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.diffusion.denoiser import DenoiserLike, Split, form_problem, reset
from trimtab.diffusion.prediction import Prediction
from trimtab.diffusion.schedules import NoiseSchedule
from trimtab.ops.arguments import in_range, integer, real_problem

# Shares and counts of the authors' two stages.
_GROWTH, _PATIENCE, _FIRST_RATE = 5, 5, 0.1


@dataclass(frozen=True)
class Candidate:
    """A way to sample.

    Attributes:
        steps: the time steps taken, as indices into a ladder of falling times, rising.
        skips: per step the blocks that are not run.
    """

    steps: tuple[int, ...]
    skips: tuple[frozenset[int], ...]

    def times(self, ladder: Float[Tensor, " times+1"]) -> Float[Tensor, " steps+1"]:
        """The times to sample at: those of the ladder, and its end.

        Example:
            >>> Candidate((0, 2), (frozenset(), frozenset())).times(torch.tensor([1.0, 0.8, 0.5, 0.3, 0.0]))
            tensor([1.0000, 0.5000, 0.0000])
        """
        return ladder[[*self.steps, len(ladder) - 1]]

    def cost(self, blocks: int) -> int:
        """How many blocks are run in all, of so many a step."""
        return sum(blocks - len(skip) for skip in self.skips)


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        best: the candidate with the lowest score.
        score: its score.
        history: the lowest score after each generation.
        evaluations: how many candidates were scored.
    """

    best: Candidate
    score: float
    history: tuple[float, ...]
    evaluations: int


def sampling_search(
    evaluate: Callable[[Candidate], float],
    times: int,
    steps: int,
    *,
    blocks: int = 1,
    max_skip: float = 0.0,
    min_skip: float = 0.0,
    generations: int = 10,
    population: int = 50,
    top_k: int = 10,
    mutations: int = 25,
    crossovers: int = 15,
    rate: float = 0.25,
    generator: torch.Generator | None = None,
) -> SearchResult:
    """Search time steps, and layers, by evolution.

    Args:
        evaluate: the score of a candidate, the lower the better; not finite counts as the worst. It should give every
            candidate the same noise, and as many samples. Called once per candidate.
        times: of the ladder that steps are chosen from.
        steps: how many, with the whole network; the cost of a candidate is limited to theirs.
        blocks: of the network that may be skipped.
        max_skip: the largest share of them that a step may skip, in [0, 1); 0 searches the time steps alone.
        min_skip: the smallest share that a random candidate's step skips, from the seventh generation on.
        generations: how many.
        population: new candidates in each; what mutation and crossover do not give is drawn at random.
        top_k: parents that are kept.
        mutations: children of one parent, whose steps (and skipped blocks) are redrawn, each with probability `rate`.
        crossovers: children of two parents, each step from one of them.
        rate: of mutation.
        generator: decides all draws; on the CPU.

    Returns:
        The best candidate; evenly spaced steps and the whole network are among those compared.

    Raises:
        ValueError: for arguments out of range: more steps than times, more children than the population.

    Example:
        >>> wanted = (1, 4, 15)
        >>> found = sampling_search(
        ...     lambda candidate: sum((a - b) ** 2 for a, b in zip(candidate.steps, wanted)),
        ...     times=20,
        ...     steps=3,
        ...     generator=torch.Generator().manual_seed(0),
        ... )
        >>> found.best.steps, found.score
        ((1, 4, 15), 0.0)
    """
    integer("times", times)
    integer("steps", steps, 1, times)
    integer("generations", generations)
    integer("population", population)
    integer("top_k", top_k)
    integer("mutations", mutations, 0)
    integer("crossovers", crossovers, 0, population - mutations)
    in_range("rate", rate, 0, 1)
    in_range("max_skip", max_skip, 0, 1, "left")
    in_range("min_skip", min_skip, 0, max_skip)
    draw = _Draw(times, integer("blocks", blocks), steps * blocks, generator or torch.Generator().manual_seed(0))
    scores: dict[Candidate, float] = {}

    def score(proposals: Callable[[], Candidate | None], wanted: int) -> None:
        """Score new candidates, up to so many, in at most ten times as many tries."""
        tries, target = 10 * wanted, len(scores) + wanted
        while len(scores) < target and tries:
            tries -= 1
            candidate = proposals()
            if candidate is not None and candidate not in scores:
                value = float(evaluate(candidate))
                scores[candidate] = value if math.isfinite(value) else math.inf

    uniform = draw.uniform(steps)
    score(lambda: uniform, 1)
    score(draw.random, population // 2)
    score(lambda: draw.mutated(uniform, _FIRST_RATE), population - len(scores))
    history: list[float] = []
    last: Candidate | None = None
    for generation in range(generations):
        parents = sorted(scores, key=scores.__getitem__)[:top_k]
        history.append(scores[parents[0]])
        if generation + 1 == generations:
            break
        if draw.high or parents[0] == last or generation >= _PATIENCE:
            draw.high = min(max_skip, draw.high + max_skip / _GROWTH)
        if generation > _PATIENCE:
            draw.low = min(min_skip, draw.high)
        last, before = parents[0], len(scores)
        score(lambda: draw.mutated(draw.one_of(parents), rate), mutations)  # noqa: B023
        score(lambda: draw.crossed(draw.one_of(parents), draw.one_of(parents)), crossovers)  # noqa: B023
        score(draw.random, population - (len(scores) - before))
    return SearchResult(parents[0], scores[parents[0]], tuple(history), len(scores))


@dataclass
class _Draw:
    """Random candidates within the budget, which is so many blocks in all."""

    times: int
    blocks: int
    budget: int
    generator: torch.Generator
    low: float = 0.0
    high: float = 0.0

    def uniform(self, steps: int) -> Candidate:
        """Evenly spaced steps and the whole network."""
        return Candidate(tuple(i * self.times // steps for i in range(steps)), (frozenset(),) * steps)

    def random(self) -> Candidate:
        """Steps at random, each with blocks skipped at random, until the budget is spent."""
        most = int(self.high * self.blocks)
        order, left = torch.randperm(self.times, generator=self.generator).tolist(), self.budget
        skips: list[frozenset[int]] = []
        while left >= self.blocks - most and len(skips) < self.times:
            # The fewest that the budget leaves room for, if the draw is too few.
            count = max(self._count(), self.blocks - left)
            skips.append(self._skip(count))
            left -= self.blocks - count
        return _sorted(order[: len(skips)], skips)

    def mutated(self, parent: Candidate, rate: float) -> Candidate:
        """Each step, and each of its skipped blocks, replaced by another with a probability."""
        unused = [t for t in range(self.times) if t not in parent.steps]
        steps, skips = list(parent.steps), list(parent.skips)
        for i in range(len(steps)):
            if unused and self._chance(rate):
                steps[i] = unused.pop(self._below(len(unused)))
            if not self.high:
                continue
            if skips[i]:
                kept = [block for block in sorted(skips[i]) if not self._chance(rate)]
                others = [block for block in range(self.blocks) if block not in kept]
                picked = torch.randperm(len(others), generator=self.generator)[: len(skips[i]) - len(kept)]
                skips[i] = frozenset(kept + [others[j] for j in picked.tolist()])
            elif self._chance(rate):
                skips[i] = self._skip(self._count())
        return _sorted(steps, skips)

    def crossed(self, one: Candidate, other: Candidate) -> Candidate | None:
        """Each step from one of two parents, what is beyond the shorter from the longer; None if they do not fit."""
        pairs = [list(zip(parent.steps, parent.skips, strict=True)) for parent in (one, other)]
        shorter, longer = sorted(pairs, key=len)
        child = [pair[self._below(2)] for pair in zip(shorter, longer, strict=False)] + longer[len(shorter) :]
        found = _sorted([step for step, _ in child], [skip for _, skip in child])
        fits = len(set(found.steps)) == len(found.steps) and found.cost(self.blocks) <= self.budget
        return found if fits else None

    def one_of(self, parents: Sequence[Candidate]) -> Candidate:
        return parents[self._below(len(parents))]

    def _count(self) -> int:
        share = self.low + (self.high - self.low) * torch.rand((), generator=self.generator).item()
        return int(share * self.blocks)

    def _skip(self, count: int) -> frozenset[int]:
        return frozenset(torch.randperm(self.blocks, generator=self.generator)[:count].tolist())

    def _below(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self.generator))

    def _chance(self, rate: float) -> bool:
        return torch.rand((), generator=self.generator).item() < rate


def _sorted(steps: Sequence[int], skips: Sequence[frozenset[int]]) -> Candidate:
    pairs = sorted(zip(steps, skips, strict=True), key=lambda pair: pair[0])
    return Candidate(tuple(step for step, _ in pairs), tuple(skip for _, skip in pairs))


class LayerSkipping:
    """A denoiser that leaves out blocks of its network, other ones at each evaluation of a run.

    Args:
        denoiser: the model with its schedule.
        blocks: its blocks that may be skipped: each must give its first argument's shape back, as residual blocks do;
            a skipped one gives back the argument itself, and costs nothing.
        skips: for each evaluation of a run the blocks left out, such as `candidate.skips`.

    Raises:
        TypeError: if `denoiser` lacks the form of a denoiser.
        ValueError: if a block does not exist, or a run makes more evaluations than `skips` has.

    Example:
        >>> from trimtab.diffusion import EDMPreconditioned, ddim, grids
        >>> from trimtab.nets import DenoisingMLP
        >>> model = EDMPreconditioned(DenoisingMLP(2, hidden=16, blocks=3))
        >>> fast = LayerSkipping(model, model.net.blocks, [{0, 2}, {1}, set()])
        >>> ddim(fast, model.schedule.prior(4, 2), grids.karras(model.schedule, 3)).shape
        torch.Size([4, 2])
    """

    def __init__(
        self, denoiser: DenoiserLike, blocks: Sequence[nn.Module] | nn.ModuleList, skips: Sequence[Collection[int]]
    ) -> None:
        if problem := form_problem(denoiser=denoiser):
            raise TypeError(problem)
        if wrong := sorted({block for skip in skips for block in skip if not 0 <= block < len(blocks)}):
            raise ValueError(f"skips must be of the {len(blocks)} blocks, got {wrong[0]}")
        self.denoiser, self.blocks = denoiser, blocks
        self.skips = [tuple(skip) for skip in skips]
        self._done = 0

    @property
    def schedule(self) -> NoiseSchedule:
        """The schedule of the wrapped denoiser."""
        return self.denoiser.schedule

    @property
    def prediction(self) -> Prediction:
        """The kind of the wrapped denoiser's prediction."""
        return self.denoiser.prediction

    def reset(self) -> None:
        """Start again with the first evaluation; samplers call it before each run."""
        self._done = 0
        reset(self.denoiser)

    def __call__(self, x: Tensor, t: Tensor, /, *args: Any, **kwargs: Any) -> Tensor | Split:
        if problem := real_problem(t=t):
            raise TypeError(problem)
        if self._done == len(self.skips):
            raise ValueError(f"skips must have an entry for every evaluation of a run, got {len(self.skips)}")
        with skipped([self.blocks[block] for block in self.skips[self._done]]):
            value = self.denoiser(x, t, *args, **kwargs)
        self._done += 1
        return value


@contextmanager
def skipped(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Within it these blocks are not run: each gives back its first argument.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> with skipped([net[0]]):
        ...     same = torch.equal(net(torch.ones(1, 2)), net[1](torch.ones(1, 2)))
        >>> same
        True
    """
    kept = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = _first_argument
    try:
        yield
    finally:
        for block, forward in zip(blocks, kept, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _first_argument(x: Any, *args: Any, **kwargs: Any) -> Any:
    return x
