"""Smooth experts: do a few synthetic images train better when the paths that they are to follow were smoothed?

The paper distils CIFAR, Tiny-ImageNet and parts of ImageNet with convolutional networks, 100 experts and 5,000 updates;
here Fashion-MNIST at 14 by 14 pixels with a network of one hidden layer, eight experts of fifteen epochs on 2,000
images, and 300 updates of students of twenty steps for three epochs. As there are no convolutions, the matrices are
perturbed, and as there is one channel, the gradient penalty is on the whole gradient of an image. Images and the rate
are updated by Adam, since the authors' rates for SGD are those of CIFAR's size; nothing is augmented. Students start in
the first two epochs with one image a class, as in plain trajectory matching, and in the first eight with ten. Networks
are trained on real images at the rate that the others start from, on distilled ones at the rate that was learned.

Trials on a seed that is in no result, with shorter experts and later starts, left plain trajectory matching with one
image a class below real images, and AST above it; of three settings of starts and steps, the one at which plain
matching did best was taken, and AST, whose numbers of the earlier trials had been seen, was not tried in that choice.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

from trimtab.compress.smooth_trajectories import TrajectoryMatcher, representative_init, train_expert
from trimtab.data import load
from trimtab.nets import mlp
from trimtab.studies.engine.study import Arm, Claim, Curve, Experiment, Metric, Result, Study, Trial
from trimtab.studies.tools.descent import descent_step
from trimtab.studies.tools.training import accuracy, predict

_RATE = 0.02
"""Of experts, of students at first, and of networks that are trained on real images."""


@dataclass(frozen=True)
class Recipe:
    """What distillation consists of; the defaults are plain trajectory matching.

    Attributes:
        smooth: experts are trained with the growing loss and the gradient penalty.
        perturbed: students start beside the experts.
        on_the_way: there are targets before the last one.
        balanced: the student's loss depends on the start.
        representative: the first images are near the centres of k-means, not random ones.
    """

    smooth: bool = False
    perturbed: bool = False
    on_the_way: bool = False
    balanced: bool = False
    representative: bool = False


@dataclass(frozen=True)
class Pictures:
    """Standardised, at 14 by 14 pixels or what digits have."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    num_classes: int

    def network(self) -> nn.Module:
        """Of one hidden layer, so that twenty steps can be unrolled in no time."""
        return mlp(self.train[0][0].numel(), hidden=(48,), num_classes=self.num_classes)


def pictures(trial: Trial) -> Pictures:
    """Fashion-MNIST at half of its resolution; digits at the smoke budget."""
    data = load(trial.pick(smoke="digits", laptop="fashion_mnist", paper="fashion_mnist"))
    train, test = trial.pick(smoke=(200, 100), laptop=(2_000, 2_000), paper=(50_000, 10_000))
    order = torch.randperm(len(data.x_train), generator=trial.generator())[:train]
    x, held = data.x_train[order], data.x_test[:test]
    if trial.budget == "laptop":
        x, held = F.avg_pool2d(x, 2), F.avg_pool2d(held, 2)
    mean, std = x.mean(), x.std()
    return Pictures(
        ((x - mean) / std, data.y_train[order]), ((held - mean) / std, data.y_test[:test]), data.num_classes
    )


def experts(held: Pictures, smooth: bool, trial: Trial) -> Tensor:
    """Paths of several networks, trained once for each seed."""
    x, y = held.train
    count, epochs = trial.pick(smoke=(2, 3), laptop=(8, 15), paper=(100, 50))

    def build() -> dict[str, Tensor]:
        paths = [
            train_expert(
                trial.seeded(held.network, stream=10 + i),
                x,
                y,
                epochs,
                lr=_RATE,
                batch_size=100,
                clip=smooth,
                penalty=2.0 if smooth else 0.0,
                per="image",
                generator=trial.generator(10 + i),
            )
            for i in range(count)
        ]
        return {"paths": torch.stack(paths)}

    name = "smooth" if smooth else "plain"
    return trial.cached(build, key=f"smooth_trajectories {count} {name} experts {epochs} epochs seed {trial.seed}")[
        "paths"
    ]


def random_images(held: Pictures, ipc: int, trial: Trial) -> tuple[Tensor, Tensor]:
    """Real ones, as many of each class."""
    x, y = held.train
    order = torch.randperm(len(y), generator=trial.generator(3))
    index = torch.cat([order[y[order] == label][:ipc] for label in range(held.num_classes)])
    return x[index], y[index]


def central_images(held: Pictures, ipc: int, trial: Trial) -> tuple[Tensor, Tensor]:
    """Real ones near the centres of k-means over the logits of an expert at its end."""
    model = held.network()
    vector_to_parameters(experts(held, False, trial)[0, -1], model.parameters())
    x, y = held.train
    return representative_init(predict(model, x), x, y, ipc, random_state=trial.seed)


def trained_on(images: Tensor, targets: Tensor, lr: float, held: Pictures, trial: Trial) -> float:
    """Mean accuracy of new networks after full-batch steps on these images, at a rate that falls to zero."""
    found = []
    steps = trial.pick(smoke=10, laptop=300, paper=1_000)
    for i in range(trial.pick(smoke=1, laptop=3, paper=5)):
        model = trial.seeded(held.network, stream=30 + i)
        optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            descent_step(optimizer, F.cross_entropy(model(images), targets))
            schedule.step()
        found.append(accuracy(model, *held.test))
    return statistics.mean(found)


def real(central: bool, ipc: int, trial: Trial) -> Result:
    """Real images as they are."""
    held = pictures(trial)
    images, targets = (central_images if central else random_images)(held, ipc, trial)
    return Result({"accuracy": trained_on(images, targets, _RATE, held, trial)})


def distilled(recipe: Recipe, ipc: int, trial: Trial) -> Result:
    """Images after as many updates, whatever the recipe."""
    held = pictures(trial)
    images, targets = (central_images if recipe.representative else random_images)(held, ipc, trial)
    paths = experts(held, recipe.smooth, trial)

    def rates(images: Tensor, lr: Tensor) -> torch.optim.Optimizer:
        return torch.optim.Adam([{"params": [images], "lr": 0.05}, {"params": [lr], "lr": 5e-4}], betas=(0.5, 0.999))

    matcher = TrajectoryMatcher(
        held.network(),
        paths,
        images,
        targets,
        lr=_RATE,
        steps=trial.pick(smoke=4, laptop=20, paper=20),
        length=trial.pick(smoke=2, laptop=3, paper=3),
        # With one image a class trajectory matching follows the first epochs alone.
        max_start=2 if ipc == 1 else trial.pick(smoke=2, laptop=8, paper=20),
        alpha=1.0 if recipe.perturbed else 0.0,
        least_dims=2,
        intermediate="all" if recipe.on_the_way else None,
        balance=recipe.balanced,
        optimizer=rates,
        generator=trial.generator(4),
    )
    updates = trial.pick(smoke=4, laptop=300, paper=5_000)
    finals = [float(matcher.step()["final"]) for _ in range(updates)]
    part = max(updates // 4, 1)
    blocks = [statistics.mean(finals[i : i + part]) for i in range(0, updates, part)]
    return Result(
        {
            "accuracy": trained_on(matcher.images.detach(), targets, float(matcher.lr.detach()), held, trial),
            "matching_loss": blocks[-1],
        },
        {"matching_loss": Curve([float((i + 1) * part) for i in range(len(blocks))], blocks, x_label="update")},
    )


AST = Recipe(smooth=True, perturbed=True, on_the_way=True, balanced=True, representative=True)


def arms(ipc: int, recipes: Mapping[str, Recipe]) -> dict[str, Arm]:
    """Real images, and what is made of them."""
    return {
        "random real images": partial(real, False, ipc),
        "central real images": partial(real, True, ipc),
        **{name: partial(distilled, recipe, ipc) for name, recipe in recipes.items()},
    }


METRICS = {
    "accuracy": Metric("accuracy on real images (%)", percent=True),
    "matching_loss": Metric("last ratio of distances, in the last quarter", best="min"),
}
one = Experiment(
    name="one image a class",
    arms=arms(
        1,
        {
            "AST": AST,
            "MTT": Recipe(),
            "MTT, central images": Recipe(representative=True),
            "MTT, smooth experts": Recipe(smooth=True),
            "AST, plain experts": Recipe(perturbed=True, on_the_way=True, balanced=True, representative=True),
            "AST, no perturbation": Recipe(smooth=True, on_the_way=True, balanced=True, representative=True),
            "AST, one target": Recipe(smooth=True, perturbed=True, balanced=True, representative=True),
        },
    ),
    metrics=METRICS,
    reads=("digits", "fashion_mnist"),
    cost=7.0,
)
ten = Experiment(
    name="ten images a class",
    arms=arms(10, {"AST": AST, "MTT": Recipe()}),
    metrics=METRICS,
    reads=("digits", "fashion_mnist"),
    cost=6.0,
)

study = Study(
    paper="smooth_trajectories",
    experiments=[one, ten],
    headline=Claim("AST", beats="MTT", on="accuracy", by=0.005, at=one),
    claims=[
        Claim("AST", beats="MTT", on="accuracy", by=0.005, at=ten),
        Claim("AST", beats="AST, plain experts", on="accuracy", at=one),
        Claim("MTT, smooth experts", below="MTT", on="matching_loss", at=one),
        Claim("AST", beats="MTT, central images", on="accuracy", at=one),
        Claim("AST", beats="AST, no perturbation", on="accuracy", at=one),
        Claim("AST", beats="AST, one target", on="accuracy", at=one),
        Claim("MTT", beats="random real images", on="accuracy", by=0.05, at=one),
        Claim("AST", beats="central real images", on="accuracy", by=0.03, at=one),
    ],
)
