"""What a study is: entrants on shared tasks, experiments of its own, one headline and further claims.

A `Task` is work that several papers meet on; an `Entrant` is what a contestant brings to it; an `Experiment` is what
only one paper needs. A `Study` is a paper's evidence:

    study = Study(
        paper="elr",
        entrants={"ELR": Training(loss=lambda plan: losses.ELR(len(plan), plan.num_classes))},
        on=[symmetric, pair_flip],
        headline=Claim("ELR", beats="cross-entropy", on="final_accuracy", by=0.05, at=symmetric),
    )
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar, get_args

import torch

from trimtab.studies.engine.picture import Picture

Budget = Literal["smoke", "laptop", "paper"]
BUDGETS: tuple[Budget, ...] = get_args(Budget)
Setting = Mapping[str, Any]
"""Name -> value of what an entrant may choose, such as the learning rate."""

SEARCH_SEED = 10_007
"""The seed on which settings are tried; no result is ever taken from it."""

T = TypeVar("T")


@dataclass(frozen=True)
class Trial:
    """One execution of a contestant: everything that may differ between two runs of the same one.

    Attributes:
        seed: decides every random draw of the run.
        budget: `smoke` (seconds), `laptop` (minutes on two cores) or `paper` (the authors' scale).
        device: a torch device string.
        setting: the values that the search chose, or tries.
        searching: whether settings are being tried: the task then scores on validation data and never sees the test.
        report: called with the fraction done, 0 to 1.
        artifacts: folder for trained parts that several runs share; None keeps nothing.
    """

    seed: int = 0
    budget: Budget = "smoke"
    device: str = "cpu"
    setting: Setting = field(default_factory=dict)
    searching: bool = False
    report: Callable[[float], None] = field(default=lambda fraction: None, repr=False)
    artifacts: Path | None = None

    def pick(self, *, smoke: T, laptop: T, paper: T) -> T:
        """The value that belongs to this trial's budget."""
        return {"smoke": smoke, "laptop": laptop, "paper": paper}[self.budget]

    def generator(self, stream: int = 0) -> torch.Generator:
        """A CPU generator fixed by the seed; different streams are independent."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + stream)

    def seeded(self, build: Callable[[], T], stream: int = 0) -> T:
        """What `build()` returns with torch's global state fixed by the seed, and left as it was afterwards."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed + 1000 * stream)
            return build()

    def cached(self, build: Callable[[], T], *, key: str) -> T:
        """What `build()` returns, made once per key and then read back (`torch.save` format, weights only).

        The key must name the values that `build` depends on, the seed included where it matters; its code is
        taken into account without being named.
        """
        from trimtab.studies.engine.identity import code_hash, local_texts
        from trimtab.studies.engine.store import read_or_build

        if self.artifacts is None:
            return build()
        return read_or_build(self.artifacts, f"{key} {self.budget} {code_hash(build)} {local_texts(build)}", build)


@dataclass(frozen=True)
class Curve:
    """A line of a figure: `y` over `x`, of equal length; `x_label` says what `x` counts."""

    x: Sequence[float]
    y: Sequence[float]
    x_label: str = "epoch"

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ValueError(f"y must be as long as x ({len(self.x)} points), got {len(self.y)}")


@dataclass(frozen=True)
class Result:
    """What a run returns: named numbers, and curves and pictures for the figure.

    Pictures are shown of the first seed alone. While settings are tried, only `score` is looked at, the larger the
    better.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, Curve] = field(default_factory=dict)
    score: float | None = None
    pictures: Mapping[str, Picture] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """How a number is read and shown.

    Attributes:
        label: words for tables and axes, with the unit.
        best: whether larger or smaller is better; None where it is neither.
        percent: show a fraction as per cent.
    """

    label: str
    best: Literal["max", "min"] | None = "max"
    percent: bool = False


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """What a contestant brings to a task. Each kind of task has its own subclass, a frozen dataclass.

    Attributes:
        search: name -> values to choose from; all combinations are tried, at most `Task.tries` of them. None takes
            the task's own grid, an empty mapping chooses nothing.
        requires: import names of packages it needs beside the base install; where one is missing it is skipped by
            name.
    """

    search: Mapping[str, Sequence[Any]] | None = field(default=None, compare=False)
    requires: tuple[str, ...] = field(default=(), compare=False)


E = TypeVar("E", bound=Entrant)


def settings_of(grid: Mapping[str, Sequence[Any]]) -> list[Setting]:
    """All combinations of a grid, in order; one empty setting for an empty grid.

    Example:
        >>> settings_of({"lr": (0.1, 0.01)})
        [{'lr': 0.1}, {'lr': 0.01}]
    """
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def at_edge(setting: Setting, grid: Mapping[str, Sequence[Any]]) -> list[str]:
    """The names whose chosen value is the smallest or the largest of three or more numbers.

    Example:
        >>> at_edge({"lr": 0.1}, {"lr": (0.001, 0.01, 0.1)})
        ['lr']
    """
    numbers = {name: v for name, v in grid.items() if len(v) > 2 and all(isinstance(x, int | float) for x in v)}
    return [name for name, values in numbers.items() if setting[name] in (min(values), max(values))]


@dataclass(frozen=True)
class Task(Generic[E]):
    """Shared work that two or more papers meet on.

    A subclass is a frozen dataclass whose fields make its variants (data set, noise rate …). It names what it accepts
    and measures, and says how one entrant runs.

    Class attributes:
        name: for the command line.
        metrics: the numbers of a run; the first one orders the leaderboard.
        accepts: the kind of entrant.
        tries: how many settings an entrant may try.
        search: the settings of entrants that bring none.
        seeds: how many seeds a run takes at each budget, fixed before looking.
        cost: seconds of one core that a run takes at the laptop budget, about.
    """

    name: ClassVar[str]
    metrics: ClassVar[Mapping[str, Metric]]
    accepts: ClassVar[type[Entrant]]
    tries: ClassVar[int] = 1
    search: ClassVar[Mapping[str, Sequence[Any]]] = {}
    seeds: ClassVar[Mapping[Budget, int]] = {"smoke": 1, "laptop": 5, "paper": 5}
    cost: ClassVar[float] = 20.0

    def run(self, trial: Trial, entrant: E) -> Result:
        """One run of an entrant, with `trial.setting`; while searching, only the score on validation data."""
        raise NotImplementedError(f"{type(self).__name__} must define run(trial, entrant)")

    @classmethod
    def variants(cls) -> Mapping[str, Task[Any]]:
        """Label -> the variants that have a leaderboard of their own."""
        return {}

    @classmethod
    def references(cls) -> Mapping[str, Entrant]:
        """What everyone would want to see beside a method."""
        return {}

    def datasets(self, budget: Budget) -> tuple[str, ...]:
        """The data sets that a run reads at a budget."""
        dataset = getattr(self, "dataset", None)
        if dataset is None:
            return ()
        return ("digits",) if budget == "smoke" and not str(dataset).endswith(".npz") else (dataset,)

    @property
    def label(self) -> str:
        """The variant in words: its name among `variants()`, or its fields that differ from the defaults."""
        for label, variant in self.variants().items():
            if variant == self:
                return label
        changed = (f"{f.name} {getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default)
        return ", ".join(changed) or "default"

    def grid(self, entrant: Entrant) -> Mapping[str, Sequence[Any]]:
        """What an entrant may choose from.

        Raises:
            ValueError: it is more than the task allows anyone.
        """
        grid = self.search if entrant.search is None else entrant.search
        if (count := len(settings_of(grid))) > self.tries:
            raise ValueError(f"search must be at most {self.tries} settings on {self.name}, got {count}")
        return grid


Arm = Callable[[Trial], Result]
"""A contestant of an experiment: a function of the trial alone."""


@dataclass(frozen=True)
class Experiment:
    """What only one paper needs: plain arms side by side.

    Attributes:
        name: for tables and figures, unique in its study.
        arms: contestants by name.
        metrics: the numbers of a run; the first one orders tables.
        seeds: how many seeds a run takes at each budget, fixed before looking.
        reads: names of the data sets that the arms read; beyond the smoke budget, which has digits at most.
        requires: arm -> import names of packages it needs beside the base install; where one is missing the arm is
            skipped by name.
        alone: measure one run at a time, as speeds want it.
        log: "x", "y", "xy" or "": logarithmic axes of the figure.
        cost: seconds of one core that a run takes at the laptop budget, about.
    """

    name: str
    arms: Mapping[str, Arm] = field(compare=False)
    metrics: Mapping[str, Metric] = field(compare=False)
    seeds: Mapping[Budget, int] = field(default_factory=lambda: {"smoke": 1, "laptop": 5, "paper": 5}, compare=False)
    reads: tuple[str, ...] = ()
    requires: Mapping[str, Sequence[str]] = field(default_factory=dict, compare=False)
    alone: bool = False
    log: str = ""
    cost: float = field(default=10.0, compare=False)

    def datasets(self, budget: Budget) -> tuple[str, ...]:
        """The data sets that its arms read at a budget."""
        return tuple(name for name in self.reads if budget != "smoke" or name == "digits")


Venue = Task[Any] | Experiment
"""Where contestants meet."""


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
        label, unit = metric.label, ""
        if label.endswith(")"):
            label, _, unit = label[:-1].rpartition(" (")
        scale = 100 if metric.percent else 1
        if self.other is None:
            bound = f"at least {scale * self.at_least:g}" if self.at_least is not None else None
            bound = bound or f"at most {scale * (self.at_most or 0.0):g}"
            return f"{self.arm} has {label} of {bound}{_unit(unit)}"
        direction = "higher" if self.beats else "lower"
        if self.times is not None:
            return f"{self.arm} has {label} {self.times:.3g} times {direction} than {self.other}"
        amount = f"{scale * abs(self.by):g}{' point' if unit == '%' and scale * abs(self.by) == 1 else _unit(unit)}"
        if self.by < 0:
            worse = "lower" if self.beats else "higher"
            return f"{self.arm} has {label} at most {amount} {worse} than {self.other}"
        margin = f" by {amount} or more" if self.by else ""
        return f"{self.arm} has {direction} {label} than {self.other}{margin}"


def _unit(unit: str) -> str:
    return " points" if unit == "%" else f" {unit}" if unit else ""


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
        notes: what a reader must know to read the verdict (departures from the paper's set-up, limits of scale).
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
