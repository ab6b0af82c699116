"""Image classification from labels of which a known share is wrong, where every choice is made on wrong labels too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from trimtab.data import human_labels, load
from trimtab.losses.calibration import expected_calibration_error
from trimtab.losses.comp_sum import CompSumLoss
from trimtab.losses.instance_noise import instance_dependent_noise
from trimtab.losses.label_noise import asymmetric_noise, symmetric_noise
from trimtab.studies.engine.study import Curve, Metric, Result, Task, Trial
from trimtab.studies.tools import baselines
from trimtab.studies.tools.images import Images, shown_epochs, worth_halving
from trimtab.studies.tools.training import Training, accuracy, fit, predict


@dataclass(frozen=True)
class LabelNoise(Task[Training]):
    """Train a small CNN on wrong labels and test it on right ones, at the end of training.

    5,000 images at half of their resolution at the laptop budget, of which four fifths are trained on, for 20 epochs.
    A network first learns what most labels agree on and later memorises the wrong ones. Each contestant chooses among
    six settings at most by the accuracy on held-out images whose labels are wrong as often; the largest rate was added
    for everybody when most had chosen the larger of two. None stops early, and no clean label is seen before the test.

    Attributes:
        dataset: "fashion_mnist", "mnist", "cifar10", "digits", or a file `.npz` with `x_train`, `y_train`, `x_test`
            and `y_test`, of images or of rows of numbers, which an MLP takes; at the smoke budget digits.
        kind: "symmetric" draws the wrong label from all classes, "asymmetric" flips a class to the next one,
            "instance" draws it from what the image looks like, "human" takes the labels that people gave to CIFAR-10,
            wrong ones preferred (40 % are wrong, whatever the rate), and "given" leaves the labels as they come. At
            the smoke budget, which has no such labels, "human" is "instance".
        rate: probability that a label is drawn anew (symmetric), flipped (asymmetric) or wrong (instance).
    """

    dataset: str = "fashion_mnist"
    kind: Literal["symmetric", "asymmetric", "instance", "human", "given"] = "symmetric"
    rate: float = 0.4

    name: ClassVar[str] = "label-noise"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "final_accuracy": Metric("final test accuracy (%)", percent=True),
        "best_accuracy": Metric("best test accuracy (%)", percent=True),
        "memorised": Metric("wrong labels memorised (%)", best="min", percent=True),
        "ece": Metric("calibration error (%)", best="min", percent=True),
        "seconds": Metric("training time (s)", best="min"),
    }
    accepts: ClassVar[type[Training]] = Training
    tries: ClassVar[int] = 6
    search: ClassVar[Mapping[str, Sequence[Any]]] = {"lr": (0.01, 0.05, 0.2), "weight_decay": (5e-4, 5e-3)}
    cost: ClassVar[float] = 2.5

    def __post_init__(self) -> None:
        if self.kind == "human" and self.dataset != "cifar10":
            raise ValueError(f"dataset must be 'cifar10' for human labels, got {self.dataset!r}")
        if not 0 <= self.rate < 1:
            raise ValueError(f"rate must be in [0, 1), got {self.rate}")

    @classmethod
    def variants(cls) -> Mapping[str, Task[Any]]:
        return {"symmetric": symmetric, "pair flip": pair_flip, "instance": instance, "human": human}

    @classmethod
    def references(cls) -> Mapping[str, Training]:
        rates = {"lr": (0.01, 0.05, 0.2), "weight_decay": (5e-4,)}
        return {
            "cross-entropy": Training(),
            "label smoothing": Training(loss=baselines.label_smoothing),
            "GCE": Training(loss=lambda plan: CompSumLoss(tau=1.7)),
            "MAE": Training(loss=lambda plan: CompSumLoss(tau=2.0)),
            "dropout": Training(prepare=baselines.dropout, search={**rates, "rate": (0.5, 0.8)}),
            "MixUp": Training(rule=baselines.mixed_inputs, search={**rates, "alpha": (0.2, 1.0)}),
            "Co-teaching": Training(rule=baselines.co_teaching, search={**rates, "forget_rate": (0.2, 0.4)}),
            "SAM": Training(optimizer=baselines.sam, search={**rates, "rho": (0.05, 0.2)}),
        }

    def images(self, trial: Trial) -> Images:
        """The images with their labels, as they are drawn for a run."""
        whole = load(self.datasets(trial.budget)[0])
        train, test = trial.pick(smoke=(800, 200), laptop=(5_000, 4_000), paper=(None, None))
        data = whole.subset(train, test, generator=trial.generator())
        draws, classes = trial.generator(2), data.num_classes
        if self.kind == "given":
            targets = data.y_train
        elif self.kind == "human" and trial.budget != "smoke":
            given = replace(whole, y_train=human_labels("worse")).subset(train, generator=trial.generator())
            targets = given.y_train
        elif self.kind in ("instance", "human"):
            noisy = instance_dependent_noise(data.x_train, data.y_train, self.rate, classes, generator=draws)
            targets = noisy.targets
        else:
            flip = symmetric_noise if self.kind == "symmetric" else asymmetric_noise
            targets = flip(data.y_train, self.rate, classes, generator=draws).targets
        return Images.of(data, targets, trial.device, halve=worth_halving(data, trial))

    def run(self, trial: Trial, entrant: Training) -> Result:
        images = self.images(trial)
        epochs = trial.pick(smoke=4, laptop=20, paper=120)
        bench = images.bench(trial, entrant, "cnn", epochs)
        rule = bench.rule()
        if trial.searching:
            fit(bench, rule)
            return Result(score=accuracy(rule, images.x_held, images.y_held))
        shown = sorted(shown_epochs(epochs))
        reached: list[float] = []
        memorised: list[float] = []

        def measure(epoch: int) -> None:
            if epoch in shown:
                reached.append(accuracy(rule, images.x_test, images.y_test))
                wrong = images.wrong
                memorised.append(accuracy(rule, images.x[wrong], images.y[wrong]) if bool(wrong.any()) else 0.0)

        done = fit(bench, rule, after_epoch=measure)
        steps = [float(epoch + 1) for epoch in shown]
        return Result(
            {
                "final_accuracy": reached[-1],
                "best_accuracy": max(reached),
                "memorised": memorised[-1],
                "ece": float(expected_calibration_error(predict(rule, images.x_test).softmax(1), images.y_test)),
                "seconds": done.seconds,
            },
            {"test_accuracy": Curve(steps, reached), "memorised": Curve(steps, memorised)},
        )


symmetric = LabelNoise()
pair_flip = LabelNoise(kind="asymmetric", rate=0.3)
instance = LabelNoise(kind="instance")
human = LabelNoise(dataset="cifar10", kind="human")
