"""A study together with its finished runs, and the files that are committed and shown."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console

from trimtab.catalog import Catalog
from trimtab.studies.engine.contestants import Contestant
from trimtab.studies.engine.picture import SHOWN
from trimtab.studies.engine.plan import Plan
from trimtab.studies.engine.ran import short
from trimtab.studies.engine.recorded import NOTHING, Held, Records
from trimtab.studies.engine.runner import run_contestants, stored
from trimtab.studies.engine.standing import standings
from trimtab.studies.engine.store import Store
from trimtab.studies.engine.study import Budget, Claim, Experiment, Study, Task, Venue
from trimtab.studies.engine.verdict import Verdict, judge


def contestants(study: Study) -> list[Contestant]:
    """Everybody that a study runs: its own and its controls at every venue, and the references its claims name."""
    claims = [study.headline, *study.claims]
    found = []
    for venue in study.venues:
        named = {name for claim in claims if study.venue(claim) is venue for name in (claim.arm, claim.other)}
        own = study.entrants_at(venue) if isinstance(venue, Task) else venue.arms
        controls = study.controls_at(venue) if isinstance(venue, Task) else {}
        for name, body in study.contestants(venue).items():
            if name in own or name in controls or name in named:
                found.append(Contestant(name, study.paper if name in own else "", venue, body))
    return found


def split(study: Study, budget: Budget) -> tuple[list[Contestant], list[tuple[Contestant, str]]]:
    """Those who can run on this machine, and those who cannot, with the reason."""
    everybody = [(who, who.obstacle(budget)) for who in contestants(study)]
    return [who for who, obstacle in everybody if not obstacle], [
        (w, obstacle) for w, obstacle in everybody if obstacle
    ]


def run_study(
    study: Study, store: Store, plan: Plan, console: Console | None = None, records: Records = NOTHING
) -> Outcome:
    """Run what is missing of a study, neither stored nor on record; who cannot run on this machine is skipped.

    Raises:
        RunError: some runs failed. The others were done and stored first.
    """
    able, skipped = split(study, plan.budget)
    return Outcome(study, plan.budget, run_contestants(able, store, plan, console, study.paper, records), skipped)


def stored_outcome(study: Study, store: Store, plan: Plan, records: Records = NOTHING) -> Outcome:
    """What is held of a study, in the store or on record, with the code and data as they stand."""
    able, skipped = split(study, plan.budget)
    ran = [found for who in able if (found := stored(who, store, plan, records)) is not None]
    return Outcome(study, plan.budget, ran, skipped)


@dataclass(frozen=True)
class Outcome:
    """What a study found.

    Attributes:
        study: the study.
        budget: the budget of all its runs.
        ran: everybody with their runs.
        skipped: those who did not run, and why.
    """

    study: Study
    budget: Budget
    ran: Sequence[Held]
    skipped: Sequence[tuple[Contestant, str]] = ()

    def at(self, venue: Venue) -> dict[str, Held]:
        """Those who ran at a venue, by name."""
        return {ran.who.name: ran for ran in self.ran if ran.who.venue is venue}

    def judge(self, claim: Claim) -> Verdict:
        """The verdict on a claim."""
        venue = self.study.venue(claim)
        there = self.at(venue)
        for name in (claim.arm, claim.other):
            if name and name not in there:
                why = [why for who, why in self.skipped if who.name == name and who.venue is venue]
                return Verdict(claim, "not shown", None, None, 0, f"{name}: {(why or ['it has not run'])[0]}")
        seeds = min(there[name].seeds for name in (claim.arm, claim.other) if name)
        return judge(claim, {name: ran.values(claim.on)[:seeds] for name, ran in there.items()})

    @property
    def headline(self) -> Verdict:
        """The paper's verdict."""
        return self.judge(self.study.headline)

    def verdicts(self) -> list[Verdict]:
        """Those on the further claims."""
        return [self.judge(claim) for claim in self.study.claims]

    def as_json(self) -> dict[str, Any]:
        """The outcome as plain data."""
        paper = Catalog()[self.study.paper]
        claimed = [self.study.venue(claim) for claim in (self.study.headline, *self.study.claims)]
        # The figure shows those of the first venue that has any, and some of the first experiment.
        made = [v for v in self.study.venues if any(ran.pictured for ran in self.at(v).values())]
        pictured = [*made[:1], *[v for v in made[1:] if isinstance(v, Experiment)][:1]]
        shown = {id(venue): self._pictured(venue, most) for venue, most in zip(pictured, SHOWN, strict=False)}
        return {
            "paper": paper.slug,
            "area": paper.area,
            "budget": self.budget,
            "verdict": self.headline.word,
            "headline": self._claim_json(self.headline),
            "claims": [self._claim_json(verdict) for verdict in self.verdicts()],
            "notes": self.study.notes,
            "venues": [
                venue_json(
                    venue,
                    list(self.at(venue).values()),
                    self.budget,
                    {who.name: why for who, why in self.skipped if who.venue is venue},
                    # Curves of variants without a claim are on the task's leaderboards, for all contestants.
                    curves=isinstance(venue, Experiment) or venue in claimed,
                    pictures=shown.get(id(venue), ()),
                )
                for venue in self.study.venues
            ],
            "test": f"tests/{paper.area}/test_{paper.slug}.py",
            **_made(self.ran),
        }

    def _pictured(self, venue: Venue, most: int) -> list[str]:
        """Whose pictures of a venue are kept: those that claims name first."""
        claims = [self.study.headline, *self.study.claims]
        named = [name for claim in claims for name in (claim.arm, claim.other)]
        ran = self.at(venue)
        return [name for name in dict.fromkeys([*named, *ran]) if name in ran and ran[name].pictured][:most]

    def _claim_json(self, verdict: Verdict) -> dict[str, Any]:
        claim, venue = verdict.claim, self.study.venue(verdict.claim)
        return {
            "text": claim.sentence(venue.metrics),
            "venue": title(venue),
            "arm": claim.arm,
            "other": claim.other,
            "on": claim.on,
            "relation": next(k for k in ("beats", "below", "at_least", "at_most") if getattr(claim, k) is not None),
            "margin": _margin(claim),
            "ratio": claim.times is not None,
            "verdict": verdict.word,
            "effect": short(verdict.effect),
            "interval": None if verdict.interval is None else [short(end) for end in verdict.interval],
            "seeds": verdict.seeds,
            "reason": verdict.reason,
        }


def _margin(claim: Claim) -> float:
    """What the effect is held against."""
    for bound in (claim.times, claim.at_least, claim.at_most):
        if bound is not None:
            return bound
    return claim.by


def title(venue: Venue) -> str:
    """A venue in words."""
    return f"{venue.name}: {venue.label}" if isinstance(venue, Task) else venue.name


def venue_json(
    venue: Venue,
    ran: Sequence[Held],
    budget: Budget,
    skipped: Mapping[str, str],
    *,
    curves: bool = True,
    pictures: Collection[str] = (),
) -> dict[str, Any]:
    """A venue with those who ran there, as plain data, with their curves or without, and the pictures of some."""
    task = venue if isinstance(venue, Task) else None
    return {
        "title": title(venue),
        "task": task.name if task else None,
        "variant": task.label if task else None,
        "data": list(venue.datasets(budget)),
        "seeds": max((held.seeds for held in ran), default=0),
        "log": venue.log if isinstance(venue, Experiment) else "",
        "metrics": {name: asdict(metric) for name, metric in venue.metrics.items()},
        "arms": {
            held.who.name: held.row(venue.metrics, curves=curves, pictures=held.who.name in pictures) for held in ran
        },
        "skipped": dict(skipped),
    }


def board_json(task: Task[Any], ran: Sequence[Held], budget: Budget, skipped: Mapping[str, str]) -> dict[str, Any]:
    """The leaderboard of a task's variant, the best first by the task's first metric."""
    first, metric = next((n, m) for n, m in task.metrics.items() if m.best)
    seeds = min((held.seeds for held in ran), default=0)
    table = standings({held.who.name: held.values(first)[:seeds] for held in ran}, metric.best or "max")
    by_name = {held.who.name: held for held in ran}
    return {
        **venue_json(task, [by_name[name] for name in table], budget, skipped),
        "settings": {f.name: getattr(task, f.name) for f in fields(task)},
        "budget": budget,
        "standing": {name: asdict(standing) for name, standing in table.items()},
        **_made(ran),
    }


def board_path(task: Task[Any], results: Path) -> Path:
    """Where the leaderboard of a variant is kept."""
    return results / "tasks" / task.name / f"{re.sub(r'[^a-z0-9.]+', '-', task.label.lower()).strip('-')}.json"


def _made(ran: Sequence[Held]) -> dict[str, Any]:
    """How the newest of the runs was made."""
    made = [held.made for held in ran]
    return dict(max(made, key=lambda one: str(one["created"]), default={"versions": {}, "machine": "", "created": ""}))


def write_json(data: Mapping[str, Any], path: Path) -> None:
    """Write whole or not at all; lists of numbers stand on one line.

    Raises:
        OSError: the folder cannot be written, or the disk is full; no part of the file is left.
    """
    text = _lists_on_one_line(json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False)) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8")  # noqa: SIM115
    try:
        with part:
            part.write(text)
        Path(part.name).chmod(0o644)
        Path(part.name).replace(path)
    except OSError as error:
        Path(part.name).unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def _lists_on_one_line(text: str) -> str:
    flat = re.compile(r"\[\n\s+([^\[\]{}]*?)\n\s+\]")
    return flat.sub(lambda match: "[" + re.sub(r"\n\s+", " ", match.group(1)) + "]", text)
