"""Does repeating slowly learned examples make training generalise better, and learn features more evenly?"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from trimtab import optim
from trimtab.optim.useful import EarlyOutputs
from trimtab.studies.study import Claim, Study
from trimtab.studies.tasks.patch_features import PatchFeatures
from trimtab.studies.tasks.resampled_images import ResampledImages
from trimtab.studies.training import Plan

images = ResampledImages()
patches = PatchFeatures()


def sam(params: Iterable[nn.Parameter], plan: Plan) -> torch.optim.Optimizer:
    """SAM with its authors' radius, on the SGD of the other arms."""
    return optim.SAM(torch.optim.SGD(params, lr=0.05, momentum=0.9), rho=0.05)


def sam_descent(params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """SAM with its authors' radius, on gradient descent."""
    return optim.SAM(torch.optim.SGD(params, lr=lr), rho=0.05)


def useful(early: EarlyOutputs, generator: torch.Generator) -> Tensor:
    """The slowly learned examples of each class, twice."""
    return optim.USEFUL().fit(*early).indices_


def random_examples(early: EarlyOutputs, generator: torch.Generator) -> Tensor:
    """As many examples as USEFUL repeats, drawn at random."""
    everything, count = torch.arange(len(early.labels)), len(useful(early, generator)) - len(early.labels)
    return torch.cat([everything, torch.randperm(len(everything), generator=generator)[:count]])


def high_losses(early: EarlyOutputs, generator: torch.Generator) -> Tensor:
    """As many examples as USEFUL repeats, those of the highest loss."""
    everything, count = torch.arange(len(early.labels)), len(useful(early, generator)) - len(early.labels)
    return torch.cat([everything, early.losses.topk(count).indices])


study = Study(
    paper="useful",
    arms={
        "SGD": images.train(),
        "SGD, USEFUL": images.train(select=useful),
        "SGD, random examples": images.train(select=random_examples),
        "SGD, high losses": images.train(select=high_losses),
        "SAM": images.train(optimizer=sam),
        "SAM, USEFUL": images.train(select=useful, optimizer=sam),
        "GD, patches": patches.train(),
        "SAM, patches": patches.train(optimizer=sam_descent),
        "USEFUL, patches": patches.train(select=useful),
    },
    claims=[
        Claim("SGD, USEFUL", beats="SGD", on="test_accuracy", by=0.002),
        Claim("SAM, USEFUL", beats="SAM", on="test_accuracy", by=0.002),
        Claim("SGD, USEFUL", beats="SGD, random examples", on="test_accuracy"),
        Claim("SAM, patches", below="GD, patches", on="early_ratio"),
        Claim("USEFUL, patches", below="GD, patches", on="early_ratio"),
        Claim("USEFUL, patches", below="GD, patches", on="ratio_at_loss"),
        Claim("USEFUL, patches", at_least=0.9, on="found"),
    ],
    seeds={"laptop": 5},
    plot=["test_accuracy", "ratio"],
    notes=(
        "A small CNN on ten thousand images for 10 epochs; every arm makes the same number of steps, at the same "
        "learning rate. Examples are chosen by a first training with SGD, also for SAM. The patches are the data of "
        "the paper's theory: every example has a hard feature of strength 0.7, four in five an easy one of strength 1."
    ),
)
