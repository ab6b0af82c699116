"""Evolutionary search over tuples of choices under a constraint: which bits, widths or depths a network should have.

Each round keeps the best candidates as parents; mutants of them and crosses between them make the rest of the next
population. Only candidates that fit the constraint ever live, and every candidate is scored once.

Reference: as in Zichao Guo, Xiangyu Zhang, Haoyuan Mu, Wen Heng, Zechun Liu, Yichen Wei, Jian Sun, "Single Path
One-Shot Neural Architecture Search with Uniform Sampling", ECCV 2020, arXiv 1904.00420.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trimtab.ops.arguments import in_range, integer

Candidate = tuple[Any, ...]
"""One value for each place."""

_ATTEMPTS = 1000


@dataclass(frozen=True)
class Evolution:
    """What a search has found.

    Attributes:
        best: the candidate of the highest score.
        score: its score.
        history: the best score after each round.
        scored: how many different candidates were scored.
    """

    best: Candidate
    score: float
    history: tuple[float, ...]
    scored: int


def evolve(
    score: Callable[[list[Candidate]], Sequence[float]],
    choices: Sequence[Sequence[Any]],
    *,
    feasible: Callable[[Candidate], bool] = lambda candidate: True,
    population: int = 100,
    rounds: int = 500,
    parents: float = 0.25,
    mutants: float = 0.5,
    mutation: float = 0.1,
    start: Sequence[Candidate] = (),
    generator: torch.Generator | None = None,
) -> Evolution:
    """The best candidate that an evolution finds.

    Args:
        score: of some candidates, one number each, the larger the better.
        choices: the values of each place.
        feasible: whether a candidate fits the constraint.
        population: number of candidates that live at a time.
        rounds: number of generations after the first.
        parents: share of the population that is kept.
        mutants: share of the next population that are mutants; crosses make up the rest.
        mutation: probability with which a mutant's place is drawn anew.
        start: candidates of the first population; the rest of it is drawn.
        generator: for all that is drawn.

    Raises:
        ValueError: a place has no choices, a number is out of range, a candidate of `start` does not fit, a score is
            not finite, or nothing that fits is found in 1,000 draws.

    Example:
        >>> found = evolve(
        ...     lambda held: [sum(c) for c in held], [range(9)] * 4, feasible=lambda c: sum(c) <= 10, population=20,
        ...     rounds=20, generator=torch.Generator().manual_seed(0))
        >>> found.score
        10.0
    """
    integer("population", population, 2), integer("rounds", rounds, 0)
    in_range("parents", parents, 0, 1, "right"), in_range("mutants", mutants, 0, 1)
    in_range("mutation", mutation, 0, 1)
    places = [list(values) for values in choices]
    if not places or not all(places):
        raise ValueError("choices must hold at least one value for each place, got none")
    for candidate in start:
        if len(candidate) != len(places) or not feasible(tuple(candidate)):
            raise ValueError(f"start must hold feasible candidates of {len(places)} values, got {candidate}")
    known: dict[Candidate, float] = {}

    def draw(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    def fresh() -> Candidate:
        return tuple(values[draw(len(values))] for values in places)

    def first(make: Callable[[], Candidate]) -> Candidate | None:
        """The first that fits and is new, otherwise the last that fits, otherwise nothing."""
        fitting = None
        for _ in range(_ATTEMPTS):
            candidate = make()
            if feasible(candidate):
                if candidate not in known and candidate not in living:
                    return candidate
                fitting = candidate
                if _ >= 20:
                    return fitting
        return fitting

    def judge() -> None:
        unknown = [candidate for candidate in dict.fromkeys(living) if candidate not in known]
        if unknown:
            values = [float(value) for value in score(unknown)]
            if len(values) != len(unknown) or not all(value == value and abs(value) < float("inf") for value in values):
                raise ValueError(f"score must give {len(unknown)} finite numbers, got {values[:5]}")
            known.update(zip(unknown, values, strict=True))

    living: list[Candidate] = [tuple(candidate) for candidate in start][:population]
    while len(living) < population:
        drawn = first(fresh)
        if drawn is None:
            raise ValueError(f"feasible must hold for some candidate, got none in {_ATTEMPTS} draws")
        living.append(drawn)
    judge()
    history: list[float] = []
    kept = max(1, round(parents * population))
    for _ in range(rounds):
        elite = sorted(dict.fromkeys(living), key=lambda c: known[c], reverse=True)[:kept]

        def mutant(elite: list[Candidate] = elite) -> Candidate:
            parent = elite[draw(len(elite))]
            drawn = torch.rand(len(places), generator=generator) < mutation
            return tuple(
                values[draw(len(values))] if new else old
                for values, old, new in zip(places, parent, drawn.tolist(), strict=True)
            )

        def cross(elite: list[Candidate] = elite) -> Candidate:
            one, other = elite[draw(len(elite))], elite[draw(len(elite))]
            taken = (torch.rand(len(places), generator=generator) < 0.5).tolist()
            return tuple(a if first_one else b for a, b, first_one in zip(one, other, taken, strict=True))

        living = list(elite)
        wanted = min(round(mutants * population), population - len(elite))
        while len(living) < population:
            make = mutant if len(living) < len(elite) + wanted else cross
            child = first(make)
            living.append(elite[0] if child is None else child)
        judge()
        history.append(max(known.values()))
    best = max(known, key=lambda c: known[c])
    return Evolution(best, known[best], tuple(history), len(known))
