"""LAPTOP-Diff: does the output loss find the layers a denoiser can spare, and do weighed features teach it better?

The paper halves the U-Nets of SDXL and Stable Diffusion 1.5 and scores images by PickScore; here a residual MLP of
twelve blocks denoises digits of 8 by 8 pixels and loses half of its blocks, and the branches of a character transformer
enter the task. BK-SDM, the strongest rival the paper names, is a rule by hand, every second block here, and the same
three losses with plain features; every other choice of blocks is trained as LAPTOP-Diff's is. All blocks are of one
size, so that the knapsack there is a choice of the smallest six losses; in the transformer sizes differ. What kind of
norm the features are divided by, and the weights of the three terms (1 each), are reconstructed: neither the code nor
the full text was available. Features are those after every third block, or after each block of the transformer. A trial
of BK-SDM alone, on a seed of its own, ended within 0.002 of the whole model's loss after 150 further steps, which
leaves little to tell apart: the denoiser is trained further for 50.

On the shared task of distillation no layer is chosen: the student has the second of every two blocks, and the three
losses teach it, with features after each of its two blocks. Hidden states, their rival there, are the plain squared
error of the same features, beside the text and soft targets, at the better of two weights. The claim was written before
any run of it; what was looked at on seed 10007 the notes of `autodistil` say.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.compress.laptop_diff import (
    Normalize,
    additivity,
    distillation_losses,
    normalized_feature_loss,
    recorded_features,
    removal_losses,
    remove_layers,
    select_layers,
)
from trimtab.compress.transformer import Transformer
from trimtab.data import load
from trimtab.nets import DenoisingMLP
from trimtab.studies.engine.study import Claim, Experiment, Metric, Result, Study, Trial
from trimtab.studies.tasks.compress_transformer import Commission, Shrinking, to_a_half, to_a_quarter
from trimtab.studies.tasks.distillation import Distilling, Objective, Pupil, new_blocks, own_blocks, text_loss
from trimtab.studies.tools.descent import descend
from trimtab.studies.tools.trained_once import trained_once

BLOCKS = [f"blocks.{i}" for i in range(12)]
STAGES = BLOCKS[2::3]
Choice = Literal["output loss", "magnitude", "random", "every second"]
Draw = tuple[Tensor, Tensor, Tensor]
"""Noisy digits, their times, and the noise."""


# --- a denoiser of digits ---------------------------------------------------------------------------------------------


def digits() -> tuple[Tensor, Tensor]:
    """Of training and of test, as vectors in [-1, 1]."""
    data = load("digits")
    train, test = (x.flatten(1) / x.max() * 2 - 1 for x in (data.x_train, data.x_test))
    return train, test


def noisy(x: Tensor, generator: torch.Generator) -> Draw:
    """At times between 0 and 1, as much noise as the sine of a quarter turn."""
    t = torch.rand(len(x), generator=generator)
    noise = torch.randn(x.shape, generator=generator)
    angle = t[:, None] * math.pi / 2
    return angle.cos() * x + angle.sin() * noise, t, noise


def train(model: nn.Module, x: Tensor, steps: int, generator: torch.Generator, loss: Callable[[Draw], Tensor]) -> None:
    """In place, at a rate that falls to zero."""
    drawn = (noisy(x[torch.randint(len(x), (128,), generator=generator)], generator) for _ in range(steps))
    descend(torch.optim.AdamW(model.parameters(), lr=2e-3), loss, drawn, anneal=steps)


def denoiser(trial: Trial) -> DenoisingMLP:
    """Twelve blocks, trained once for each seed."""
    steps = trial.pick(smoke=5, laptop=700, paper=20_000)
    model = trial.seeded(lambda: DenoisingMLP(64, hidden=64, blocks=len(BLOCKS)))
    loss = lambda draw: (model(*draw[:2]) - draw[2]).square().mean()
    build = lambda: train(model, digits()[0], steps, trial.generator(1), loss)
    return trained_once(trial, model, build, key=f"laptop_diff denoiser {steps} steps seed {trial.seed}").eval()


def fixed(trial: Trial, stream: int, test: bool = False) -> Draw:
    """Digits with one draw of times and noise."""
    x = digits()[1 if test else 0]
    generator = trial.generator(stream)
    count = trial.pick(smoke=32, laptop=512, paper=1_000)
    return noisy(x[torch.randint(len(x), (count,), generator=generator)], generator)


def chosen(model: DenoisingMLP, by: Choice, trial: Trial) -> list[str]:
    """Six of the twelve blocks, or as many as half of the parameters in them takes."""
    blocks = [model.get_submodule(name) for name in BLOCKS]
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    if by == "every second":
        return BLOCKS[1::2]
    if by == "output loss":
        noised, t, _ = fixed(trial, 2)
        losses = removal_losses(model, BLOCKS, lambda model: model(noised, t))
    elif by == "magnitude":
        losses = torch.stack(
            [sum((p.detach().square().sum() for p in b.parameters()), torch.zeros(())) for b in blocks]
        )
    else:
        losses = torch.rand(len(BLOCKS), generator=trial.generator(3))
    return [BLOCKS[i] for i in select_layers(losses, sizes, sum(sizes) / 2)]


def shortened(by: Choice, normalize: Normalize | None, trial: Trial) -> Result:
    """What half of the blocks costs at once, and after training with the whole model as the teacher."""
    teacher = denoiser(trial)
    student = remove_layers(teacher, chosen(teacher, by, trial))
    noised, t, noise = fixed(trial, 4, test=True)

    @torch.no_grad()
    def error(model: nn.Module, wanted: Tensor) -> float:
        return float((model(noised, t) - wanted).square().mean())

    with torch.no_grad():
        whole = teacher(noised, t)
    at_once = error(student, whole)

    def loss(draw: Draw) -> Tensor:
        with torch.no_grad(), recorded_features(teacher, STAGES) as theirs:
            wanted = teacher(*draw[:2])
        with recorded_features(student, STAGES) as own:
            found = student(*draw[:2])
        return distillation_losses(found, wanted, draw[2], own, theirs, normalize=normalize)["total"]

    train(student.train(), digits()[0], trial.pick(smoke=4, laptop=50, paper=5_000), trial.generator(5), loss)
    student.eval()
    return Result(
        {
            "loss_gap": error(student, noise) - error(teacher, noise),
            "output_error": error(student, whole),
            "one_shot_error": at_once,
        }
    )


def added_up(trial: Trial) -> Result:
    """Losses of random sets of two to six blocks beside the sums of single ones."""
    model, (noised, t, _), generator = denoiser(trial), fixed(trial, 2), trial.generator(6)
    sets = [
        torch.randperm(len(BLOCKS), generator=generator)[: 2 + i % 5].tolist()
        for i in range(trial.pick(smoke=5, laptop=40, paper=100))
    ]
    return Result({"correlation": additivity(model, BLOCKS, lambda model: model(noised, t), sets).correlation})


halves = Experiment(
    name="half of a denoiser",
    arms={
        "LAPTOP-Diff": partial(shortened, "output loss", "teacher_norm"),
        "output loss, plain features": partial(shortened, "output loss", None),
        "random": partial(shortened, "random", "teacher_norm"),
        "magnitude": partial(shortened, "magnitude", "teacher_norm"),
        "every second": partial(shortened, "every second", "teacher_norm"),
        "BK-SDM": partial(shortened, "every second", None),
    },
    metrics={
        "loss_gap": Metric("noise loss beyond the whole model's, after training", best="min"),
        "output_error": Metric("squared difference from the whole model, after training", best="min"),
        "one_shot_error": Metric("squared difference from the whole model, at once", best="min"),
    },
    reads=("digits",),
    cost=3.0,
)
sums = Experiment(
    name="do losses add up",
    arms={"output losses": added_up},
    metrics={"correlation": Metric("correlation of summed and joint losses")},
    reads=("digits",),
    cost=1.0,
)


# --- branches of a transformer ----------------------------------------------------------------------------------------


def branches(model: Transformer) -> list[str]:
    """Attention and the other branch of each block, apart."""
    return [f"layers.{i}.{part}" for i in range(len(model.layers)) for part in ("attention", "mlp")]


def without(commission: Commission, losses: Tensor) -> nn.Module:
    """The model without the branches of the smallest total loss, as many as the size takes."""
    model, names = commission.model, branches(commission.model)
    sizes = [sum(p.numel() for p in model.get_submodule(name).parameters() if p.ndim == 2) for name in names]
    gone = select_layers(losses, sizes, (1 - commission.share) * sum(sizes))
    return remove_layers(model, [names[i] for i in gone])


def laptop(commission: Commission) -> nn.Module:
    """By the change of the scores on 64 windows."""
    x, _ = commission.calibration(commission.trial.pick(smoke=4, laptop=64, paper=1_000))
    return without(commission, removal_losses(commission.model, branches(commission.model), lambda model: model(x)))


def at_random(commission: Commission) -> nn.Module:
    """By lot."""
    return without(commission, torch.rand(len(branches(commission.model)), generator=commission.trial.generator(4)))


def distilled(normalize: Normalize | None, student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy, the whole model's scores, and its features after each block."""
    names = [name for name, _ in teacher.named_modules() if name.startswith("layers.") and name.count(".") == 1]
    with torch.no_grad(), recorded_features(teacher, names) as theirs:
        wanted = teacher(x)
    with recorded_features(student, names) as own:
        found = student(x)
    features = normalized_feature_loss(own, theirs, normalize=normalize)
    value: Tensor = F.cross_entropy(found.flatten(0, 1), y.flatten()) + (found - wanted).square().mean() + features
    return value


def three_losses(pupil: Pupil) -> Objective:
    """The text, the teacher's scores, and its features at the ends of the stages, each of the weight that it has."""

    def objective(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        found, own, wanted, theirs = pupil.with_features(x)
        return text_loss(found, y) + (found - wanted).square().mean() + normalized_feature_loss(own, theirs)

    return objective


study = Study(
    paper="laptop_diff",
    entrants={
        "LAPTOP-Diff": Shrinking(compress=laptop, objective=partial(distilled, "teacher_norm")),
        "LAPTOP-Diff's distillation": Distilling(objective=three_losses),
    },
    controls={
        "LAPTOP-Diff, plain features": Shrinking(compress=laptop, objective=partial(distilled, None)),
        "LAPTOP-Diff, not distilled": Shrinking(compress=laptop),
        "random branches": Shrinking(compress=at_random, objective=partial(distilled, "teacher_norm")),
    },
    on=[to_a_half, to_a_quarter, own_blocks, new_blocks],
    experiments=[halves, sums],
    headline=Claim("LAPTOP-Diff", below="BK-SDM", on="loss_gap", at=halves),
    claims=[
        Claim("LAPTOP-Diff", below="every second", on="loss_gap", at=halves),
        Claim("LAPTOP-Diff", below="every second", on="one_shot_error", times=1.5, at=halves),
        Claim("LAPTOP-Diff", below="random", on="one_shot_error", times=2, at=halves),
        Claim("LAPTOP-Diff", below="magnitude", on="one_shot_error", at=halves),
        Claim("LAPTOP-Diff", below="output loss, plain features", on="loss_gap", at=halves),
        Claim("output losses", at_least=0.8, on="correlation", at=sums),
        Claim("LAPTOP-Diff", below="random branches", on="test_loss", by=0.02, at=to_a_half),
        Claim("LAPTOP-Diff", below="LAPTOP-Diff, not distilled", on="test_loss", at=to_a_half),
        Claim("LAPTOP-Diff", below="plain SVD", on="test_loss", at=to_a_half),
        Claim("LAPTOP-Diff's distillation", below="hidden states", on="test_loss", at=own_blocks),
    ],
)
