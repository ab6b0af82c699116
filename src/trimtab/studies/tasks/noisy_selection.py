"""Image classification from wrong labels where every choice, too, is made on wrong labels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trimtab import nets
from trimtab.data import load
from trimtab.losses.calibration import expected_calibration_error
from trimtab.losses.label_noise import asymmetric_noise, symmetric_noise
from trimtab.studies.study import Arm, Curve, Metric, Result, Task, Trial
from trimtab.studies.training import Plan, fit

Setting = tuple[float, ...]
Part = tuple[Float[Tensor, "n channels height width"], Int[Tensor, " n"]]
Predictor = Callable[[Tensor], Tensor]
"""Maps images to logits, in eval mode."""

LR = 0.05
"""Learning rate at the start, of all networks that are trained alone."""

WEIGHT_DECAYS: tuple[Setting, ...] = ((0.0,), (5e-4,), (5e-3,), (2e-2,))


class Trained(NamedTuple):
    """What a contestant hands back.

    Attributes:
        predict: of one network, or of several together.
        seconds: of processor time in the training steps.
        features: how many of a network's features it uses, where it chooses.
    """

    predict: Predictor
    seconds: float
    features: float = float("nan")


class Found(NamedTuple):
    """What a search ends with."""

    setting: Setting
    trained: Trained
    watched: list[float]


class Method(Protocol):
    """A contestant: trains with one setting."""

    def __call__(self, bench: Bench, setting: Setting) -> Trained: ...


class Bench:
    """What a contestant works with.

    Attributes:
        key: names the work, for what is kept between runs.
        trial: source of random draws.
        x, y: training images and their labels, some of them wrong.
        x_held, y_held: held-out images, labelled as badly, for choices.
        x_shown, y_shown: test images for the figure alone.
        num_classes: number of classes.
        epochs: how long each network may train in all.
        watched: test accuracies after each epoch; None where nobody looks.
    """

    def __init__(
        self, key: str, trial: Trial, train: Part, held_out: Part, shown: Part, num_classes: int, epochs: int
    ) -> None:
        self.key, self.trial = key, trial
        self.x, self.y = train
        self.x_held, self.y_held = held_out
        self.x_shown, self.y_shown = shown
        self.num_classes, self.epochs = num_classes, epochs
        self.watched: list[float] | None = []

    def network(self, which: int = 0) -> nets.Classifier:
        """A new network, of an initialisation that the seed and its number decide."""
        with torch.random.fork_rng():
            torch.manual_seed(self.trial.seed + 1000 * which)
            return nets.small_cnn(tuple(self.x.shape[1:]), self.num_classes).to(self.trial.device)

    def watch(self, predict: Predictor) -> None:
        """To be called after each epoch."""
        if self.watched is not None:
            self.watched.append(accuracy(predict, self.x_shown, self.y_shown))

    def quiet(self) -> Bench:
        """The same, unwatched."""
        other = copy.copy(self)
        other.trial, other.watched = replace(self.trial, report=lambda fraction: None), None
        return other

    def cached(self, build: Callable[[], Any], key: str) -> Any:
        """What a function returns, made once for all arms that give the same key."""
        return self.trial.cached(build, key=f"{self.key} {key} seed {self.trial.seed}")

    def search(self, method: Method, settings: Sequence[Setting]) -> Found:
        """The setting of the best accuracy on held-out images, and what was trained with it."""
        setting, tried = self._choose(method, settings)
        if tried:
            return next(found for found in tried if found.setting == setting)
        # Another arm has searched: only the best is trained again.
        return Found(setting, method(self, setting), self.watched or [])

    def chosen(self, method: Method, settings: Sequence[Setting]) -> Setting:
        """The setting that a method chooses, searched once for all arms that ask."""
        return self.quiet()._choose(method, settings)[0]

    def _choose(self, method: Method, settings: Sequence[Setting]) -> tuple[Setting, list[Found]]:
        """The best setting, and what was tried, which is nothing where the answer was kept."""
        tried: list[Found] = []

        def best() -> Tensor:
            scores = []
            for setting in settings:
                bench = self.quiet()
                bench.watched = None if self.watched is None else []
                trained = method(bench, setting)
                scores.append(accuracy(trained.predict, self.x_held, self.y_held))
                tried.append(Found(setting, trained, bench.watched or []))
                self.trial.report(len(tried) / len(settings))
            return torch.tensor(settings[scores.index(max(scores))], dtype=torch.float64)

        name = getattr(method, "__qualname__", repr(method))
        return tuple(self.cached(best, f"{name} {list(settings)}").tolist()), tried


@dataclass(frozen=True)
class NoisySelection(Task):
    """Train small CNNs on wrong labels, choose settings on wrong labels, and test at the end of training.

    Each contestant chooses among as many settings of its own by the accuracy on held-out images whose labels are
    wrong as often; none stops early.

    Attributes:
        dataset: "fashion_mnist" or "mnist", at half of the resolution; at the smoke budget always digits.
        kind: "symmetric" draws the wrong label from all classes, "asymmetric" flips a class to the next one.
        rate: probability that a label is drawn anew (symmetric) or flipped (asymmetric).
    """

    dataset: str = "fashion_mnist"
    kind: Literal["symmetric", "asymmetric"] = "symmetric"
    rate: float = 0.4

    name: ClassVar[str] = "noisy-selection"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "final_accuracy": Metric("final test accuracy (%)", percent=True),
        "memorised": Metric("wrong labels memorised (%)", best="min", percent=True),
        "ece": Metric("calibration error (%)", best="min", percent=True),
        "features": Metric("features kept", best=None),
        "knob": Metric("chosen setting", best=None),
        "second_knob": Metric("second chosen setting", best=None),
        "seconds": Metric("training time (s)", best="min"),
    }

    def train(self, method: Method | None = None, settings: Sequence[Setting] | None = None) -> Arm:
        """A contestant and the settings it chooses from; without any, cross-entropy and its weight decay."""
        return self.arm(method=method, settings=settings)

    def run(self, trial: Trial, **options: Any) -> Result:
        method: Method = options.get("method", cross_entropy)
        settings: Sequence[Setting] = options.get("settings", WEIGHT_DECAYS)
        data = load("digits" if trial.budget == "smoke" else self.dataset)
        train, test = trial.pick(smoke=(320, 128), laptop=(4_000, 4_000), paper=(None, None))
        data = data.subset(train, test, generator=trial.generator())
        flip = symmetric_noise if self.kind == "symmetric" else asymmetric_noise
        noisy = flip(data.y_train, self.rate, data.num_classes, generator=trial.generator(2))
        x, x_test = (
            (images if images.shape[-1] < 28 else F.avg_pool2d(images, 2)).to(trial.device)
            for images in (data.x_train, data.x_test)
        )
        y, y_test = noisy.targets.to(trial.device), data.y_test.to(trial.device)
        fitted = len(y) - len(y) // 5
        wrong = noisy.is_noisy[:fitted].to(trial.device)
        bench = Bench(
            str(self),
            trial,
            (x[:fitted], y[:fitted]),
            (x[fitted:], y[fitted:]),
            (x_test[:1000], y_test[:1000]),
            data.num_classes,
            trial.pick(smoke=3, laptop=20, paper=120),
        )
        setting, trained, watched = bench.search(method, settings)
        logits = predicted(trained.predict, x_test)
        learned = predicted(trained.predict, bench.x[wrong]).argmax(1) == bench.y[wrong]
        return Result(
            {
                "final_accuracy": (logits.argmax(1) == y_test).float().mean().item(),
                "memorised": learned.float().mean().item() if len(learned) else 0.0,
                "ece": expected_calibration_error(logits.softmax(1), y_test),
                "features": trained.features,
                "knob": setting[0],
                "second_knob": setting[1] if len(setting) > 1 else float("nan"),
                "seconds": trained.seconds,
            },
            {"test_accuracy": Curve([float(epoch + 1) for epoch in range(len(watched))], watched)},
        )


def cross_entropy(bench: Bench, setting: Setting) -> Trained:
    """The baseline; its setting is the weight decay."""
    return trained_alone(bench, bench.network(), weight_decay=setting[0])


def chosen_weight_decay(bench: Bench) -> float:
    """What cross-entropy alone chooses, for all contestants that do not bring their own."""
    return bench.chosen(cross_entropy, WEIGHT_DECAYS)[0]


def trained_alone(
    bench: Bench,
    network: nets.Classifier,
    *,
    weight_decay: float,
    epochs: int | None = None,
    which: int = 0,
    after_epoch: Callable[[], float] = lambda: float("nan"),
) -> Trained:
    """Train one network by cross-entropy with SGD and cosine annealing, as every contestant's networks are.

    Args:
        bench: data, and how long.
        network: trained in place.
        weight_decay: of SGD.
        epochs: instead of the bench's.
        which: number of the network, which decides the order of the samples.
        after_epoch: may change what the network is in eval mode, and says how many features it uses.
    """

    def sgd(parameters: Any, plan: Plan) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=LR, momentum=0.9, weight_decay=weight_decay)

    features = float("nan")

    def finish_epoch(epoch: int) -> None:
        nonlocal features
        features = after_epoch()
        bench.watch(network)

    done = fit(
        network,
        bench.x,
        bench.y,
        num_classes=bench.num_classes,
        epochs=bench.epochs if epochs is None else epochs,
        trial=replace(bench.trial, seed=bench.trial.seed + 1000 * which),
        optimizer=sgd,
        after_epoch=finish_epoch,
    )
    return Trained(network, done.seconds, features)


@torch.no_grad()
def predicted(predict: Predictor, x: Tensor) -> Tensor:
    """Logits of all images, in batches."""
    return torch.cat([predict(part) for part in x.split(1024)])


def accuracy(predict: Predictor, x: Tensor, y: Tensor) -> float:
    """Share of the images whose label is predicted."""
    return (predicted(predict, x).argmax(1) == y).float().mean().item()
