"""A claim: one testable sentence about a contestant, in fields or in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from trimtab.studies.engine.study.experiment import Venue
from trimtab.studies.engine.study.task import Metric
from trimtab.studies.engine.wording import claim_sentence


@dataclass(frozen=True)
class Claim:
    """A testable sentence about one contestant, judged over seeds.

    Exactly one of the four comparisons:

    Attributes:
        arm: the contestant the claim is about.
        beats: its number is larger than this contestant's, by at least `by`.
        below: its number is smaller than this contestant's, by at least `by`.
        at_least: its number is no smaller than this value.
        at_most: its number is no larger than this value.
        on: the metric.
        by: the margin for `beats` and `below`, in the metric's unit; negative for "no worse than, within".
        times: instead of `by`, a ratio: `below="sinkhorn", times=10` claims a tenth.
        at: the task's variant or the experiment; may be left out where the study has only one.
        text: the sentence in words; made from the fields where it is not given.
    """

    arm: str
    beats: str | None = None
    below: str | None = None
    at_least: float | None = None
    at_most: float | None = None
    on: str = ""
    by: float = 0.0
    times: float | None = None
    at: Venue | None = None
    text: str = ""

    def __post_init__(self) -> None:
        given = [name for name in ("beats", "below", "at_least", "at_most") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a claim must be one of beats, below, at_least, at_most, got {given or 'none'}")
        if not self.on:
            raise ValueError("on must be the name of a metric, got nothing")
        if self.times is not None and (self.times <= 0 or self.by or not self.other):
            raise ValueError(f"times must be positive, with beats or below and without by, got {self.times}")

    @property
    def other(self) -> str | None:
        """The contestant compared with, if any."""
        return self.beats or self.below

    def sentence(self, metrics: Mapping[str, Metric]) -> str:
        """The claim in words."""
        if self.text:
            return self.text
        metric = metrics[self.on]
        bounds = {"at_least": self.at_least, "at_most": self.at_most}
        relation, margin = next(
            ((name, value) for name, value in bounds.items() if value is not None),
            ("beats" if self.beats else "below", self.times or self.by),
        )
        held = {"arm": self.arm, "other": self.other, "relation": relation, "margin": margin}
        return claim_sentence(held | {"ratio": self.times is not None}, asdict(metric))
