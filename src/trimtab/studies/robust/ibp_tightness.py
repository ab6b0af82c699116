"""How tight are interval bounds: before training, after it, and what does it buy?

Fully connected networks of three layers, hidden layers of 100 units unless said otherwise, see 2,000 images of 14 x 14
pixels at a radius of 0.1; the paper has convolutional networks on MNIST and CIFAR-10. In the experiment all contestants
make equally many steps; on the shared task they make equally many passes, where a network twice as wide is counted
three times as dear and gets a third of the steps. Interval training is that of Gowal et al. without a share of plain
cross-entropy, the radius rising over the first half. SABR is written from its formula, with boxes of a fifth of the
radius and three attack steps. That linear Gaussian networks follow the formula is a theorem, and tested; here its slope
is asked of networks with ReLU, of whose hidden units half are active.
"""

from __future__ import annotations

import itertools
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from trimtab.nets import mlp
from trimtab.ops.intervals import box_around
from trimtab.robust import IBPLoss, expected_tightness, propagation_tightness, worst_case_logits
from trimtab.studies.engine.study import Claim, Curve, Experiment, Metric, Result, Study, Trial
from trimtab.studies.tasks.robust_accuracy import Defence, interval_training, written_digits
from trimtab.studies.tools.defences import Defended, Lesson, Objective, pgd_training, plain, withstood
from trimtab.studies.tools.images import some_images
from trimtab.studies.tools.training import Training, Workbench, accuracy, fit

_EPS = 0.1


def small_box(lesson: Lesson) -> Objective:
    """Interval training of the box of a fifth of the radius around an attacked image (SABR, arXiv 2210.04871)."""
    share = 0.2
    criterion = IBPLoss(share * lesson.eps, 0.0)

    def objective(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        criterion.set_progress(lesson.progress)
        inner = Lesson((1 - share) * lesson.radius, lesson.num_classes, lesson.generator, lesson.setting, 1.0)
        worst = inner.attack(model, x, lambda moved: F.cross_entropy(model(moved), y, reduction="none"), 3)
        loss: torch.Tensor = criterion(model, worst, y)
        return loss

    return objective


def train_and_measure(make: object, trial: Trial, *, width: int = 100, depth: int = 3) -> Result:
    """Train a fully connected network on 2,000 images, all contestants for as many steps; look at 150 unseen ones."""
    part = some_images(trial, "mnist", smoke=(200, 40), laptop=(2000, 500))
    x, x_test = part.x_train, part.x_test
    width = trial.pick(smoke=min(width, 32), laptop=width, paper=width)
    bench = Workbench(
        Training(),
        partial(mlp, x[0].numel(), (width,) * (depth - 1), part.num_classes),
        (x, part.y_train),
        (x[:0], part.y_train[:0]),
        num_classes=part.num_classes,
        epochs=trial.pick(smoke=2, laptop=12, paper=100),
        trial=Trial(trial.seed, trial.budget, trial.device, {"lr": 0.1}),
        batch_size=trial.pick(smoke=64, laptop=128, paper=128),
    )
    rule = Defended(bench, Lesson(_EPS, part.num_classes, trial.generator(2), {"kappa": 0.0}), make)  # type: ignore[arg-type]
    looked = slice(trial.pick(smoke=20, laptop=150, paper=500))

    def tightness() -> float:
        return float(propagation_tightness(rule.network, x_test[looked], _EPS, part.y_test[looked]).mean())

    seen = [tightness()]
    fit(bench, rule, after_epoch=lambda epoch: seen.append(tightness()) if epoch % 4 == 3 else None)
    seen = [*seen[:-1], tightness()] if len(seen) > 1 else [*seen, tightness()]
    network = rule.network.eval()
    with torch.no_grad():
        worst = worst_case_logits(network, box_around(x_test, _EPS), part.y_test, part.num_classes)
    certain = worst.scatter(1, part.y_test[:, None], -torch.inf).amax(1) < 0
    steps = trial.pick(smoke=3, laptop=20, paper=50)
    return Result(
        {
            "tightness": seen[-1],
            "tightness_before": seen[0],
            "certified_accuracy": certain.float().mean().item(),
            "test_accuracy": accuracy(network, x_test, part.y_test),
            "pgd_accuracy": withstood(network, x_test, part.y_test, _EPS, steps=steps).float().mean().item(),
        },
        {"tightness": Curve([4.0 * k for k in range(len(seen))], seen)},
    )


def at_initialisation(trial: Trial, *, depth: int = 2, relu: bool = False) -> Result:
    """The slope of the logarithm of the tightness over that of the width, of Gaussian networks, and how far it is off.

    Radii are averaged over networks before they are divided, as the formula has it.
    """
    widths, draws = (25, 50, 100, 200, 400), trial.pick(smoke=4, laptop=24, paper=400)
    found = []
    for number, width in enumerate(widths):
        generator, sizes = trial.generator(10 + number), [64, *[width] * (depth - 1), 10]
        exact = propagated = 0.0
        for _ in range(draws):
            x = torch.rand(8, 64, generator=generator)
            signed = unsigned = None
            mask = torch.ones(8, 64)
            for before, after in itertools.pairwise(sizes):
                w = torch.randn(after, before, generator=generator) / before**0.5
                signed = w.expand(8, -1, -1) if signed is None else w @ (mask[:, :, None] * signed)
                unsigned = w.abs().sum(1).expand(8, -1) if unsigned is None else (mask * unsigned) @ w.abs().T
                x = x @ w.T
                mask = (x >= 0).float() if relu else torch.ones_like(x)
                x = x * mask
            exact += float(signed.abs().sum(2).mean())  # type: ignore[union-attr]
            propagated += float(unsigned.mean())  # type: ignore[union-attr]
        found.append(exact / propagated)
        trial.report((number + 1) / len(widths))
    logs = [torch.tensor(values, dtype=torch.float64).log() for values in (widths, found)]
    centred = [values - values.mean() for values in logs]
    slope = float((centred[0] * centred[1]).sum() / centred[0].square().sum())
    off = max(abs(value / expected_tightness(width, depth) - 1) for value, width in zip(found, widths, strict=True))
    return Result(
        {"slope": slope, "off": off, "tightness": found[2]},
        {"tightness": Curve([float(w) for w in widths], found, "width of hidden layers")},
    )


trained = Experiment(
    "tightness after training",
    arms={
        "interval bounds": partial(train_and_measure, interval_training),
        "small boxes": partial(train_and_measure, small_box),
        "PGD training": partial(train_and_measure, partial(pgd_training, steps=5)),
        "plain training": partial(train_and_measure, plain),
        "interval bounds, 4 x narrower": partial(train_and_measure, interval_training, width=25),
        "interval bounds, 4 x wider": partial(train_and_measure, interval_training, width=400),
        "interval bounds, 5 layers": partial(train_and_measure, interval_training, depth=5),
    },
    metrics={
        "tightness": Metric("tightness"),
        "tightness_before": Metric("tightness before training"),
        "certified_accuracy": Metric("accuracy certified by interval bounds (%)", percent=True),
        "test_accuracy": Metric("clean test accuracy (%)", percent=True),
        "pgd_accuracy": Metric("accuracy under PGD-20 (%)", percent=True),
    },
    reads=("digits", "mnist"),
    cost=3.0,
)
untrained = Experiment(
    "tightness at initialisation",
    arms={
        "2 linear layers": at_initialisation,
        "2 layers, ReLU": partial(at_initialisation, relu=True),
        "3 layers, ReLU": partial(at_initialisation, depth=3, relu=True),
    },
    metrics={
        "slope": Metric("slope of log tightness over log width", best=None),
        "off": Metric("largest distance from the formula (%)", best="min", percent=True),
        "tightness": Metric("tightness at width 100"),
    },
    log="xy",
    cost=1.0,
)
wide = Defence(objective=interval_training, passes=9, width=2, search={"lr": (0.1, 0.3, 0.9), "kappa": (0.0, 0.5)})

study = Study(
    paper="ibp_tightness",
    entrants={
        "IBP, 2 x wider": wide,
        "SABR": Defence(objective=small_box, passes=6),
    },
    on=[written_digits],
    experiments=[trained, untrained],
    headline=Claim("interval bounds", beats="PGD training", on="tightness", times=5.0, at=trained),
    claims=[
        Claim("interval bounds", beats="plain training", on="tightness", times=5.0, at=trained),
        Claim("interval bounds", beats="small boxes", on="tightness", at=trained),
        Claim("interval bounds, 4 x wider", beats="interval bounds, 4 x narrower", on="certified_accuracy", at=trained),
        Claim("interval bounds, 4 x wider", beats="interval bounds", on="certified_accuracy", by=0.01, at=trained),
        Claim("small boxes", beats="interval bounds", on="test_accuracy", at=trained),
        Claim("plain training", beats="interval bounds", on="test_accuracy", at=trained),
        Claim("2 layers, ReLU", at_most=-0.45, on="slope", at=untrained),
        Claim("3 layers, ReLU", at_most=-0.9, on="slope", at=untrained),
        Claim("IBP, 2 x wider", beats="IBP", on="certified_accuracy", at=written_digits),
    ],
)
