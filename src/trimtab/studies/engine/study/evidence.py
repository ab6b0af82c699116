"""A paper's evidence: who meets where, the headline, and the further claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.studies.engine.study.claim import Claim
from trimtab.studies.engine.study.experiment import Arm, Experiment, Venue
from trimtab.studies.engine.study.task import Entrant, Task


@dataclass(frozen=True)
class Study:
    """A paper's evidence.

    Attributes:
        paper: the slug.
        headline: the paper's own main claim; its verdict is the paper's.
        entrants: name -> what enters tasks; where a setting of the authors' differs between variants or tasks, a
            mapping from the variant to the entrant.
        controls: likewise, what has only a side effect of the method, or a part of it. Claims face controls; on
            leaderboards they do not stand.
        on: the variants of tasks that the entrants enter.
        experiments: what only this paper needs.
        claims: what else is judged.
        notes: what a reader must know to read the verdict (departures from the paper's set-up, limits of scale); of a
            paper's own module, what its docstring says below the question that is its first line.
    """

    paper: str
    headline: Claim
    entrants: Mapping[str, Entrant | Mapping[Task[Any], Entrant]] = field(default_factory=dict)
    controls: Mapping[str, Entrant | Mapping[Task[Any], Entrant]] = field(default_factory=dict)
    on: Sequence[Task[Any]] = ()
    experiments: Sequence[Experiment] = ()
    claims: Sequence[Claim] = ()
    notes: str = ""

    def __post_init__(self) -> None:
        if bool(self.entrants) != bool(self.on):
            raise ValueError(f"on must name tasks where there are entrants, and only there, in the study {self.paper}")
        names = [experiment.name for experiment in self.experiments]
        if len(set(names)) < len(names):
            raise ValueError(f"experiments must have different names, got {names}")
        for task in self.on:
            for entrant in (*self.entrants_at(task).values(), *self.controls_at(task).values()):
                task.grid(entrant)
        for claim in (self.headline, *self.claims):
            venue = self.venue(claim)
            known = self.contestants(venue)
            for arm in (claim.arm, claim.other):
                if arm is not None and arm not in known:
                    raise ValueError(f"the claim's arm must be one of {', '.join(known)}, got {arm!r}")
            if claim.on not in venue.metrics:
                raise ValueError(f"on must be one of {', '.join(venue.metrics)}, got {claim.on!r}")

    @property
    def venues(self) -> list[Venue]:
        """Everywhere that contestants meet."""
        return [*self.on, *self.experiments]

    def venue(self, claim: Claim) -> Venue:
        """Where a claim is judged.

        Raises:
            ValueError: the claim does not say, and there are several; or the study is not there.
        """
        if claim.at is None:
            if len(self.venues) != 1:
                raise ValueError(f"at must name one of {len(self.venues)} venues of the study {self.paper}")
            return self.venues[0]
        for venue in self.venues:
            if venue == claim.at:
                return venue
        raise ValueError(f"at must be where the study {self.paper} is, got {claim.at!r}")

    def entrants_at(self, task: Task[Any]) -> dict[str, Entrant]:
        """Its entrants on a variant; of those that are given per variant, this one's, or the task's first."""
        return self._at(task, self.entrants)

    def controls_at(self, task: Task[Any]) -> dict[str, Entrant]:
        """Its controls on a variant, likewise."""
        return self._at(task, self.controls)

    def _at(self, task: Task[Any], held: Mapping[str, Entrant | Mapping[Task[Any], Entrant]]) -> dict[str, Entrant]:
        found: dict[str, Entrant] = {}
        for name, entrant in held.items():
            if isinstance(entrant, Entrant):
                if isinstance(entrant, task.accepts):
                    found[name] = entrant
            elif task in entrant:
                found[name] = entrant[task]
            elif task not in self.on and (same := [e for t, e in entrant.items() if type(t) is type(task)]):
                found[name] = same[0]
        return found

    def contestants(self, venue: Venue) -> dict[str, Entrant | Arm]:
        """Its own contestants, its controls, and the references of a venue."""
        if isinstance(venue, Experiment):
            return dict(venue.arms)
        return {**venue.references(), **self.controls_at(venue), **self.entrants_at(venue)}
