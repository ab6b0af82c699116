"""Classification in domains that training has not seen, chosen on the domains that it has."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from trimtab.data import load
from trimtab.domain.environments import DomainBatch
from trimtab.nets import Classifier, mlp, small_cnn
from trimtab.studies.engine.study import Budget, Curve, Entrant, Metric, Result, Setting, Task, Trial
from trimtab.studies.tasks.fine_tuning import rotate
from trimtab.studies.tools import domain_baselines as baselines
from trimtab.studies.tools.domain_training import DomainBench as DomainBench
from trimtab.studies.tools.domain_training import DomainPlan as DomainPlan
from trimtab.studies.tools.domain_training import DomainTraining as DomainTraining
from trimtab.studies.tools.domain_training import (
    domain_accuracy,
    fit_domains,
    grid_without_weight,
    mean_accuracy,
    predictor_of,
)
from trimtab.studies.tools.shifted_images import PHOTO_STYLES, coloured, on_photos, resized

Shift = Literal["rotation", "colour", "digit set", "photo"]

_ANGLES = (0.0, 15.0, 30.0, 45.0, 60.0, 75.0)
_COLOURS = (0.2, 0.1, 0.9)
_SETS = {"MNIST": "mnist", "USPS": "usps", "digits": "digits"}


@dataclass(frozen=True)
class Domains:
    """Samples of every domain, no image in two of them.

    Attributes:
        sources: what is trained on, one `(x, y)` a domain.
        held: held-out samples of the same domains; settings are chosen on them.
        targets: unseen domains by name; never looked at while settings are tried.
        num_classes: number of classes.
    """

    sources: DomainBatch
    held: DomainBatch
    targets: dict[str, tuple[Tensor, Tensor]]
    num_classes: int


@dataclass(frozen=True)
class DomainGeneralisation(Task[DomainTraining]):
    """Train a small network on several domains and test it on one that it has not seen.

    At the laptop budget images have 14 x 14 pixels, domains 800 training samples, of each of which a step sees 32 (64
    where there is but one source), and training takes 200 steps. Coloured digits have 7 x 7 pixels in two channels,
    two domains of 5,000 for an MLP, 1,000 of each a step, and 250 steps, or penalties of their kind have nothing to
    act on. Each contestant chooses among four settings by its mean accuracy on held-out samples of the source domains
    (the first of DomainBed's three ways to choose). They are drawn at random, as DomainBed does: each number by its
    logarithm between the smallest and the largest of the contestant's grid. Where colour misleads, the choice would
    fall on whatever keeps the colour: there a penalty has the largest weight of its grid, and only the rest is chosen.

    Attributes:
        shift: "rotation" turns digits by 0 to 60 degrees and tests at 75; "colour" makes the colour agree with the
            label of source digits (80 and 90 %) and disagree with that of the target's (90 %), while a quarter of all
            labels are wrong; "digit set" trains on MNIST and USPS and tests on scikit-learn's digits; "photo" writes
            digits over regions of two photos and tests on a fourth region.
        single: train on one domain alone, 30 degrees, MNIST or the second photo region, and test on all others.
        dataset: of the digits that are turned, coloured or written over photos: "mnist", "digits", "fashion_mnist" or
            a file `.npz`; at the smoke budget digits.
        left_out: the domain to test at in place of the usual one, of rotations "0 degrees" to "75 degrees", of digit
            sets "MNIST", "USPS" or "digits"; all others are trained on.
    """

    shift: Shift = "rotation"
    single: bool = False
    dataset: str = "mnist"
    left_out: str = ""

    name: ClassVar[str] = "domain-generalisation"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "target_accuracy": Metric("accuracy on unseen domains (%)", percent=True),
        "worst_accuracy": Metric("accuracy on the hardest unseen domain (%)", percent=True),
        "source_accuracy": Metric("accuracy on source domains (%)", percent=True),
        "seconds": Metric("training time (s)", best="min"),
    }
    accepts: ClassVar[type[DomainTraining]] = DomainTraining
    needs_images: ClassVar[bool] = True
    tries: ClassVar[int] = 4
    search: ClassVar[Mapping[str, Sequence[Any]]] = {"lr": (1e-3, 3e-3), "weight_decay": (1e-3, 1e-1)}
    cost: ClassVar[float] = 2.0

    def __post_init__(self) -> None:
        if self.single and self.shift == "colour":
            raise ValueError("single must be False for the shift 'colour', whose penalties need two domains, got True")
        known = {"rotation": [_degrees(angle) for angle in _ANGLES], "digit set": [*_SETS]}.get(self.shift, [])
        if self.left_out and (self.single or self.left_out not in known):
            wanted = f"one of {', '.join(known)}" if known and not self.single else "empty"
            raise ValueError(f"left_out must be {wanted} here, got {self.left_out!r}")

    @classmethod
    def variants(cls) -> Mapping[str, Task[Any]]:
        return {
            "rotated digits": rotated,
            "coloured digits": coloured_digits,
            "another digit set": digit_sets,
            "upright digits left out": without_upright,
            "MNIST left out": without_mnist,
            "USPS left out": without_usps,
        }

    @classmethod
    def references(cls) -> Mapping[str, DomainTraining]:
        rates = {"lr": (1e-3, 3e-3)}
        return {
            "ERM": DomainTraining(),
            "IRM": DomainTraining(penalty=baselines.irm, search={**rates, "weight": (1e0, 1e4)}),
            "V-REx": DomainTraining(penalty=baselines.v_rex, search={**rates, "weight": (1e0, 1e4)}),
            "CORAL": DomainTraining(penalty=baselines.coral, search={**rates, "weight": (1e0, 1e2)}),
            "GroupDRO": DomainTraining(risk=baselines.group_dro, search={**rates, "eta": (1e-2, 1e-1)}),
            "SAM": DomainTraining(optimizer=baselines.sam, search={**rates, "rho": (0.05, 0.2)}),
            "mixup": DomainTraining(rule=baselines.MixedDomains, search={**rates, "alpha": (0.1, 0.5)}),
            "MixStyle": DomainTraining(prepare=baselines.mix_style, search={**rates, "alpha": (0.1, 0.5)}),
        }

    def datasets(self, budget: Budget) -> tuple[str, ...]:
        if budget == "smoke" and not self.dataset.endswith(".npz"):
            return ("digits",)
        return tuple(_SETS.values()) if self.shift == "digit set" else (self.dataset,)

    def grid(self, entrant: Entrant) -> Mapping[str, Sequence[Any]]:
        grid = super().grid(entrant)
        return drawn_settings(grid_without_weight(grid) if self.shift == "colour" else grid, self.tries)

    def domains(self, trial: Trial) -> Domains:
        """All samples of a run."""
        makers = {
            "rotation": self._rotated,
            "colour": self._coloured,
            "digit set": self._digit_sets,
            "photo": self._on_photos,
        }
        sources, targets, num_classes = makers[self.shift](trial)
        device = trial.device
        moved = [(x.to(device), y.to(device)) for x, y in sources]
        cuts = [len(y) // 5 for _, y in moved]
        return Domains(
            [(x[cut:], y[cut:]) for (x, y), cut in zip(moved, cuts, strict=True)],
            [(x[:cut], y[:cut]) for (x, y), cut in zip(moved, cuts, strict=True)],
            {name: (x.to(device), y.to(device)) for name, (x, y) in targets.items()},
            num_classes,
        )

    def bench(self, trial: Trial, entrant: DomainTraining, domains: Domains | None = None) -> DomainBench:
        """What a contestant works with."""
        trial = replace(trial, setting=one_by_one(trial.setting))
        domains = domains or self.domains(trial)
        shape, classes = tuple(domains.sources[0][0].shape[1:]), domains.num_classes
        of_colour = self.shift == "colour"
        steps = trial.pick(smoke=30, laptop=250 if of_colour else 200, paper=5000)
        plan = DomainPlan(len(domains.sources), classes, shape, steps, trial.setting, trial.seed)
        each = 1000 if of_colour else 64 if self.single else 32

        def network() -> Classifier:
            return _perceptron(shape, classes) if of_colour else small_cnn(shape, classes)

        return DomainBench(entrant, plan, domains.sources, domains.held, each, network, trial)

    def run(self, trial: Trial, entrant: DomainTraining) -> Result:
        domains = self.domains(trial)
        bench = self.bench(trial, entrant, domains)
        rule, stream = bench.rule(), entrant.predictor is not None
        if trial.searching:
            fit_domains(bench, rule)
            return Result(score=mean_accuracy(predictor_of(bench, rule), domains.held, stream=stream))
        shown = {round(part * bench.plan.steps / 5) for part in range(1, 6)}
        steps: list[float] = []
        seen: list[float] = []
        unseen: list[float] = []

        def measure(step: int) -> None:
            if step in shown:
                steps.append(float(step))
                seen.append(mean_accuracy(rule, domains.held, stream=False))
                unseen.append(mean_accuracy(rule, list(domains.targets.values()), stream=False))

        seconds = fit_domains(bench, rule, after_step=None if stream else measure)
        predictor = predictor_of(bench, rule)
        reached = [domain_accuracy(predictor, x, y, stream=stream) for x, y in domains.targets.values()]
        curves = {"source_accuracy": Curve(steps, seen, "step"), "target_accuracy": Curve(steps, unseen, "step")}
        return Result(
            {
                "target_accuracy": sum(reached) / len(reached),
                "worst_accuracy": min(reached),
                "source_accuracy": mean_accuracy(predictor, domains.held, stream=stream),
                "seconds": seconds,
            },
            {} if stream else curves,
        )

    def _rotated(self, trial: Trial) -> tuple[DomainBatch, dict[str, tuple[Tensor, Tensor]], int]:
        hardest = self.left_out or _degrees(_ANGLES[-1])
        chosen = (30.0,) if self.single else tuple(angle for angle in _ANGLES if _degrees(angle) != hardest)
        left = [angle for angle in _ANGLES if angle not in chosen]
        parts, test, classes = self._parts(trial, len(chosen))
        sources = [(_halved(rotate(x, angle)), y) for (x, y), angle in zip(parts, chosen, strict=True)]
        return sources, {_degrees(angle): (_halved(rotate(test[0], angle)), test[1]) for angle in left}, classes

    def _coloured(self, trial: Trial) -> tuple[DomainBatch, dict[str, tuple[Tensor, Tensor]], int]:
        parts, test, _ = self._parts(trial, 2, each=trial.pick(smoke=300, laptop=6250, paper=25_000))
        draws = trial.generator(2)
        *sources, target = (
            coloured(_pooled(x), y, disagree, generator=draws)
            for (x, y), disagree in zip([*parts, test], _COLOURS, strict=True)
        )
        return sources, {"the other colour": target}, 2

    def _digit_sets(self, trial: Trial) -> tuple[DomainBatch, dict[str, tuple[Tensor, Tensor]], int]:
        if trial.budget == "smoke":
            (plain, faint, dark), classes = self._parts(trial, 3)[0], 10
            sets = {"MNIST": plain, "USPS": (faint[0] / 2, faint[1]), "digits": (1 - dark[0], dark[1])}
        else:
            draws, each = trial.generator(), trial.pick(smoke=200, laptop=1000, paper=100_000)
            side, classes = 28 if trial.budget == "paper" else 14, 10
            loaded = {name: load(own).subset(each, each, generator=draws) for name, own in _SETS.items()}
            sets = {name: (resized(data.x_train, side), data.y_train) for name, data in loaded.items()}
        left = [name for name in sets if name != "MNIST"] if self.single else [self.left_out or "digits"]
        sources = [held for name, held in sets.items() if name not in left]
        return sources, {name: sets[name] for name in left}, classes

    def _on_photos(self, trial: Trial) -> tuple[DomainBatch, dict[str, tuple[Tensor, Tensor]], int]:
        chosen = ("temple",) if self.single else PHOTO_STYLES[:-1]
        left = [style for style in PHOTO_STYLES if style not in chosen]
        parts, (x_test, y_test), classes = self._parts(trial, len(chosen))
        draws = trial.generator(2)
        sources = [
            (on_photos(_halved(x), style, generator=draws), y) for (x, y), style in zip(parts, chosen, strict=True)
        ]
        targets = {style: (on_photos(_halved(x_test), style, generator=draws), y_test) for style in left}
        return sources, targets, classes

    def _parts(
        self, trial: Trial, count: int, each: int | None = None
    ) -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor], int]:
        """As many disjoint sets of training images as there are source domains, and test images."""
        each = each or trial.pick(smoke=200, laptop=1000, paper=10_000)
        data = load(self.datasets(trial.budget)[0])
        data = data.subset(each * count, trial.pick(smoke=200, laptop=1000, paper=10_000), generator=trial.generator())
        size = len(data.y_train) // count
        parts = list(zip(data.x_train.split(size), data.y_train.split(size), strict=True))[:count]
        return parts, (data.x_test, data.y_test), data.num_classes


def drawn_settings(grid: Mapping[str, Sequence[Any]], count: int) -> Mapping[str, Sequence[Any]]:
    """As many settings as anyone may try, drawn at random from the ranges of a grid; several names are given as one.

    Positive numbers are drawn by their logarithm, whole ones rounded; of anything else, one of the values is taken. The
    draws depend on the grid alone.

    Example:
        >>> found = drawn_settings({"lr": (1e-3, 1e-2), "k": (10, 100)}, 2)
        >>> [(name, len(values)) for name, values in found.items()]
        [('lr, k', 2)]
        >>> drawn_settings({}, 2)
        {}
    """
    if not grid:
        return {}
    draws = random.Random(repr(sorted((name, *values) for name, values in grid.items())))

    def one(values: Sequence[Any]) -> Any:
        numbers = all(isinstance(value, int | float) and value > 0 for value in values)
        if not numbers or len(set(values)) == 1:
            return draws.choice(list(values))
        found = math.exp(draws.uniform(math.log(min(values)), math.log(max(values))))
        return round(found) if all(isinstance(value, int) for value in values) else float(f"{found:.3g}")

    if len(grid) == 1:
        return {name: tuple(one(values) for _ in range(count)) for name, values in grid.items()}
    # Lists, as which they come back from a file.
    return {", ".join(grid): [[one(values) for values in grid.values()] for _ in range(count)]}


def one_by_one(setting: Setting) -> Setting:
    """A setting whose values were given under one name, name by name; any other as it is.

    Example:
        >>> one_by_one({"lr, k": (0.001, 20)}), one_by_one({"lr": 0.001})
        ({'lr': 0.001, 'k': 20}, {'lr': 0.001})
    """
    found: dict[str, Any] = {}
    for names, value in setting.items():
        found.update(zip(names.split(", "), value, strict=True) if ", " in names else {names: value})
    return found


def needs_pictures(task: DomainGeneralisation) -> str:
    """Why what works on pictures and convolutions cannot enter a variant."""
    return "the images are of two colour channels, for a perceptron" if task.shift == "colour" else ""


def _degrees(angle: float) -> str:
    return f"{angle:g} degrees"


def _halved(x: Tensor) -> Tensor:
    """At half of the resolution, where there are 28 pixels or more."""
    return F.avg_pool2d(x, 2) if x.shape[-1] >= 28 else x


def _pooled(x: Tensor) -> Tensor:
    """At a quarter of the resolution, where there are 28 pixels or more."""
    return F.avg_pool2d(x, 4) if x.shape[-1] >= 28 else x


def _perceptron(shape: tuple[int, ...], classes: int) -> Classifier:
    channels, height, width = shape
    return mlp(channels * height * width, (96, 96), classes)


rotated = DomainGeneralisation()
coloured_digits = DomainGeneralisation(shift="colour")
digit_sets = DomainGeneralisation(shift="digit set")
without_upright = DomainGeneralisation(left_out="0 degrees")
without_mnist = DomainGeneralisation(shift="digit set", left_out="MNIST")
without_usps = DomainGeneralisation(shift="digit set", left_out="USPS")
photos = DomainGeneralisation(shift="photo")
one_rotation = DomainGeneralisation(single=True)
one_photo = DomainGeneralisation(shift="photo", single=True)
