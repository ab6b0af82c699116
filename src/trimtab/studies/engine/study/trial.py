"""One run of a contestant: what may differ between two runs of the same one, and what a run returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

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
        taken into account without being named. It may train, also where the run itself has gradients turned off.
        """
        from trimtab.studies.engine.identity import code_hash, local_texts
        from trimtab.studies.engine.store import read_or_build

        with torch.enable_grad():
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
