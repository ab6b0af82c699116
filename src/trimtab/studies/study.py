"""What a study is: arms on tasks, and claims over arms.

A `Task` is shared work (data, model, budget, metrics). An `Arm` is one contestant on it. A `Study` is a paper's
claim over arms, judged by paired differences over seeds:

    noise = LabelNoise(dataset="fashion_mnist", rate=0.4)
    study = Study(
        paper="elr",
        arms={"cross-entropy": noise.train(), "ELR": noise.train(loss=lambda data: losses.ELR(...))},
        claims=[Claim("ELR", beats="cross-entropy", on="final_accuracy", by=0.05)],
    )
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch

Budget = Literal["smoke", "laptop", "paper"]
BUDGETS: tuple[Budget, ...] = get_args(Budget)
T = TypeVar("T")


@dataclass(frozen=True)
class Trial:
    """One execution of an arm: everything that may differ between two runs of the same arm.

    Attributes:
        seed: decides every random draw of the run.
        budget: `smoke` (seconds), `laptop` (minutes on two cores) or `paper` (the authors' scale).
        device: a torch device string.
        report: called with the fraction done, 0 to 1.
        artifacts: folder for trained parts that several runs share; None keeps nothing.
    """

    seed: int = 0
    budget: Budget = "smoke"
    device: str = "cpu"
    report: Callable[[float], None] = field(default=lambda fraction: None, repr=False)
    artifacts: Path | None = None

    def pick(self, *, smoke: T, laptop: T, paper: T) -> T:
        """The value that belongs to this trial's budget."""
        return {"smoke": smoke, "laptop": laptop, "paper": paper}[self.budget]

    def generator(self, stream: int = 0) -> torch.Generator:
        """A CPU generator fixed by the seed; different streams are independent."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + stream)

    def cached(self, build: Callable[[], T], *, key: str) -> T:
        """What `build()` returns, made once per key and then read back (`torch.save` format, weights only).

        The key must name the values that `build` depends on, the seed included where it matters; its code is
        taken into account without being named.
        """
        from trimtab.studies.identity import sources_hash
        from trimtab.studies.store import read_or_build

        if self.artifacts is None:
            return build()
        return read_or_build(self.artifacts, f"{key} {self.budget} {sources_hash(build)}", build)


@dataclass(frozen=True)
class Curve:
    """A line of a figure: `y` over `x`, of equal length."""

    x: Sequence[float]
    y: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ValueError(f"Curve: x has {len(self.x)} points and y has {len(self.y)}; they must agree")


@dataclass(frozen=True)
class Result:
    """What an arm returns: named numbers, and curves for the figure."""

    metrics: Mapping[str, float]
    curves: Mapping[str, Curve] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """How a task's number is read and shown.

    Attributes:
        label: words for tables and axes, with the unit.
        best: whether larger or smaller is better; None where it is neither.
        percent: show a fraction as per cent.
    """

    label: str
    best: Literal["max", "min"] | None = "max"
    percent: bool = False


@dataclass(frozen=True)
class Arm:
    """One contestant: `run(trial, **options)` returns a `Result`. Tasks make them; see `Task.arm`."""

    run: Callable[..., Result]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, trial: Trial) -> Result:
        return self.run(trial, **self.options)

    @property
    def task(self) -> Task | None:
        """The task the arm runs on; None for a plain function."""
        owner = getattr(self.run, "__self__", None)
        return owner if isinstance(owner, Task) else None

    def on(self, task: Task) -> Arm:
        """The same contestant on another variant of its task."""
        return replace(self, run=task.run)


@dataclass(frozen=True)
class Task:
    """Shared work that methods are compared on.

    A subclass is a frozen dataclass whose fields are the variants (data set, noise rate …), with a `name`, its
    `metrics` (the first one orders the leaderboard) and `run(trial, **options)`, where the options are what a
    contestant may bring. Give it one typed method that returns an arm (`train`, `solve`, `sample` …).
    """

    name: ClassVar[str]
    metrics: ClassVar[Mapping[str, Metric]]

    def run(self, trial: Trial, **options: Any) -> Result:
        raise NotImplementedError(f"{type(self).__name__} must define run(trial, **options)")

    def arm(self, **options: Any) -> Arm:
        """A contestant that brings these options; those left at None are the task's own."""
        return Arm(self.run, {name: value for name, value in options.items() if value is not None})


@dataclass(frozen=True)
class Claim:
    """A testable sentence about one arm, judged over seeds.

    Exactly one of the four comparisons:

    Attributes:
        arm: the contestant the claim is about.
        beats: the arm's number is larger than this arm's, by at least `by`.
        below: the arm's number is smaller than this arm's, by at least `by`.
        at_least: the arm's number is no smaller than this value.
        at_most: the arm's number is no larger than this value.
        on: the metric.
        by: the margin for `beats` and `below`, in the metric's unit; negative for "no worse than, within".
        times: instead of `by`, a ratio: `below="sinkhorn", times=10` claims a tenth.
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
    text: str = ""

    def __post_init__(self) -> None:
        given = [name for name in ("beats", "below", "at_least", "at_most") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"Claim: give exactly one of beats, below, at_least, at_most; got {given or 'none'}")
        if not self.on:
            raise ValueError("Claim: on must name the metric")
        if self.times is not None and (self.times <= 0 or self.by or not self.other):
            raise ValueError("Claim: times must be positive, and stands with beats or below, without by")

    @property
    def other(self) -> str | None:
        """The arm compared with, if any."""
        return self.beats or self.below

    def sentence(self) -> str:
        """The claim in words."""
        if self.text:
            return self.text
        metric = self.on.replace("_", " ")
        if self.other is None:
            bound = f"at least {self.at_least:g}" if self.at_least is not None else f"at most {self.at_most:g}"
            return f"{self.arm}: {metric} is {bound}"
        direction = "above" if self.beats else "below"
        if self.times is not None:
            return f"{self.arm}: {metric} is {direction} {self.other} by a factor of {self.times:g} or more"
        if self.by < 0:
            worse = "below" if self.beats else "above"
            return f"{self.arm}: {metric} is no more than {-self.by:g} {worse} {self.other}"
        margin = f" by {self.by:g} or more" if self.by else ""
        return f"{self.arm}: {metric} is {direction} {self.other}{margin}"


@dataclass(frozen=True)
class Study:
    """A paper's claim, over arms.

    Attributes:
        paper: the slug.
        arms: contestants by the name that tables and claims use.
        claims: what is judged.
        seeds: number of seeds per budget, where it differs from `DEFAULT_SEEDS`.
        plot: the curves to draw, in order; all of them by default.
        log: "x", "y", "xy" or "": logarithmic axes of the figure.
        leaderboard: arms that stand for the paper in `trimtab compare`; all of them by default.
        notes: what a reader must know to read the verdict (departures from the paper's set-up, limits of scale).
    """

    paper: str
    arms: Mapping[str, Arm]
    claims: Sequence[Claim]
    seeds: Mapping[Budget, int] = field(default_factory=dict)
    plot: Sequence[str] | None = None
    log: str = ""
    leaderboard: Sequence[str] | None = None
    notes: str = ""

    DEFAULT_SEEDS: ClassVar[Mapping[Budget, int]] = {"smoke": 1, "laptop": 3, "paper": 5}

    def __post_init__(self) -> None:
        named = {claim.arm for claim in self.claims} | {claim.other for claim in self.claims if claim.other}
        if missing := (named | set(self.leaderboard or ())) - set(self.arms):
            raise ValueError(f"study {self.paper}: no arm named {', '.join(sorted(missing))}; it has {list(self.arms)}")
        if not self.claims:
            raise ValueError(f"study {self.paper}: claims is empty; a study tests at least one")

    def num_seeds(self, budget: Budget) -> int:
        """How many seeds a run of this study takes at a budget."""
        return self.seeds.get(budget, self.DEFAULT_SEEDS[budget])
