"""A language model of half the depth learns from a whole one: which lesson serves it best in equally many steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.compress.distill import feature_distances, soft_target_loss
from trimtab.compress.laptop_diff import recorded_features, remove_layers
from trimtab.compress.transformer import Transformer
from trimtab.data.text import TextData, python_sources
from trimtab.studies.engine.study import Budget, Entrant, Metric, Result, Task, Trial
from trimtab.studies.tasks.compress_transformer import cross_entropy, tune, windows_of
from trimtab.studies.tools.descent import descent_step
from trimtab.studies.tools.trained_once import trained_once
from trimtab.studies.tools.training import Plan, Training, Workbench, fit, predict

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""What is minimised, of characters, those that follow and the windows' indices; may have a `set_epoch(epoch)`."""
Start = Literal["teacher", "new"]


@dataclass(frozen=True)
class Pupil:
    """Who is to learn from whom.

    Attributes:
        student: is trained; of every two blocks of the teacher's it has the second, in the same place.
        teacher: in eval mode and frozen.
        stages: names of the blocks that the student has, after which both models' features stand for the same stage.
        plan: windows, epochs, steps and setting; its classes are the characters.
    """

    student: nn.Module
    teacher: nn.Module
    stages: tuple[str, ...]
    plan: Plan

    @torch.no_grad()
    def taught(self, x: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length characters"]:
        """The teacher's scores."""
        scores: Tensor = self.teacher(x)
        return scores

    def with_features(self, x: Int[Tensor, "batch length"]) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
        """The student's scores and its features after each stage, and the teacher's."""
        with torch.no_grad(), recorded_features(self.teacher, self.stages) as theirs:
            wanted = self.teacher(x)
        with recorded_features(self.student, self.stages) as own:
            found = self.student(x)
        return found, own, wanted, theirs


@dataclass(frozen=True, kw_only=True)
class Distilling(Entrant):
    """What a way to distil brings.

    Attributes:
        objective: makes what the student minimises. None trains nobody: the teacher itself stands, as a bound.
    """

    objective: Callable[[Pupil], Objective] | None


@dataclass(frozen=True)
class Distillation(Task[Distilling]):
    """A character-level transformer of two blocks learns from one of four, on the sources of Python's standard library.

    The teacher was trained on six times as much text as the students are, and is the same in all runs. Everybody's
    student is the same: the second and the fourth of its blocks with what is around them, as the teacher has them or
    drawn anew. It is trained for two epochs of 4,000 windows in batches of 32, by AdamW at a rate that falls to zero;
    only the objective differs. Everybody chooses among four settings by the loss on held-out windows of the modules
    that are trained on.

    Attributes:
        start: where the student's weights come from.
        context: characters that the models see.
    """

    start: Start = "teacher"
    context: int = 32

    name: ClassVar[str] = "distillation"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "test_loss": Metric("test loss (nats per character)", best="min"),
        "agreement": Metric("share of characters for which student and teacher say the same (%)", percent=True),
        "divergence": Metric("divergence from the teacher (nats per character)", best="min"),
        "seconds": Metric("processor time of training (s)", best="min"),
    }
    accepts: ClassVar[type[Distilling]] = Distilling
    tries: ClassVar[int] = 4
    search: ClassVar[Mapping[str, Sequence[Any]]] = {"lr": (1e-3, 3e-3, 6e-3, 1.2e-2)}
    cost: ClassVar[float] = 6.0

    @classmethod
    def variants(cls) -> Mapping[str, Task[Any]]:
        return {"the teacher's own blocks": own_blocks, "new blocks": new_blocks}

    @classmethod
    def references(cls) -> Mapping[str, Distilling]:
        rates = {"lr": (3e-3, 6e-3)}
        return {
            "teacher": Distilling(objective=None, search={}),
            "hard labels": Distilling(objective=hard_labels),
            "soft targets": Distilling(objective=soft_targets, search={**rates, "temperature": (1.0, 4.0)}),
            "hidden states": Distilling(objective=hidden_states, search={**rates, "weight": (0.1, 1.0)}),
            "relational KD": Distilling(objective=relational, search={**rates, "weight": (1.0, 25.0)}),
        }

    def datasets(self, budget: Budget) -> tuple[str, ...]:
        return ("python_sources",)

    def run(self, trial: Trial, entrant: Distilling) -> Result:
        text = python_sources()
        x, y = windows_of(text.train, trial.pick(smoke=64, laptop=4_000, paper=40_000), self.context, trial)
        teacher = teacher_of(text, self.context, trial)
        seconds = 0.0
        student: nn.Module = teacher
        if entrant.objective is not None:
            student = student_of(teacher, self.start, trial)
            made = entrant.objective
            bench = Workbench(
                Training(rule=lambda bench: _Lessons(bench, student, teacher, made)),
                lambda: student,
                (x, y),
                (x[:0], y[:0]),
                num_classes=len(text.characters),
                epochs=trial.pick(smoke=1, laptop=2, paper=10),
                trial=trial,
                batch_size=32,
            )
            seconds = fit(bench, bench.rule()).seconds
        if trial.searching:
            count = trial.pick(smoke=16, laptop=500, paper=5_000)
            return Result(score=-told(student, teacher, windows_of(text.train, count, self.context, trial, 1))[0])
        count = trial.pick(smoke=16, laptop=1_000, paper=5_000)
        loss, agreement, divergence = told(student, teacher, windows_of(text.test, count, self.context, trial, 2))
        found = {"test_loss": loss}
        if entrant.objective is not None:
            found |= {"agreement": agreement, "divergence": divergence, "seconds": seconds}
        return Result(found)


def teacher_of(text: TextData, context: int, trial: Trial) -> Transformer:
    """The model that students learn from, trained once for all runs; frozen, in eval mode."""
    once = replace(trial, seed=0, setting={"lr": 3e-3}, report=lambda fraction: None)
    count, epochs = trial.pick(smoke=64, laptop=24_000, paper=200_000), trial.pick(smoke=2, laptop=3, paper=10)
    depth = trial.pick(smoke=2, laptop=4, paper=4)
    model = once.seeded(lambda: Transformer(len(text.characters), context, depth)).to(trial.device)

    def train() -> None:
        seen = windows_of(text.train, count, context, once)
        tune(model, partial(cross_entropy, model, model), seen, epochs, once)

    key = f"distillation teacher of {text.source}, {count} windows of {context}, {epochs} epochs, {depth} blocks"
    return trained_once(trial, model, train, key=key).eval().requires_grad_(False)


class _Lessons:
    """AdamW on an objective of the student and the teacher."""

    def __init__(
        self, bench: Workbench, student: nn.Module, teacher: nn.Module, make: Callable[[Pupil], Objective]
    ) -> None:
        self.student = student.train()
        self.objective = make(Pupil(student, teacher, stages_of(student), bench.plan))
        self.optimizers = [torch.optim.AdamW(student.parameters(), lr=bench.plan.lr)]

    def set_epoch(self, epoch: int) -> None:
        if callable(told := getattr(self.objective, "set_epoch", None)):
            told(epoch)

    def step(self, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        return descent_step(self.optimizers[0], self.objective(x, y, index))

    def predict(self, x: Tensor) -> Tensor:
        return predict(self.student, x, 200)


def student_of(teacher: Transformer, start: Start, trial: Trial) -> nn.Module:
    """The second of every two blocks and what is around them, as the teacher has them or drawn anew."""
    if start == "new":
        vocabulary, context, depth = teacher.head.out_features, len(teacher.positions), len(teacher.layers)
        teacher = trial.seeded(lambda: Transformer(vocabulary, context, depth), stream=11).to(trial.device)
    gone = [f"layers.{i}" for i in range(0, len(teacher.layers), 2)]
    return remove_layers(teacher, gone).requires_grad_(True)


def stages_of(student: nn.Module) -> tuple[str, ...]:
    """The blocks that are there."""
    layers = cast(nn.ModuleList, student.get_submodule("layers"))
    return tuple(f"layers.{i}" for i, layer in enumerate(layers) if any(True for _ in layer.parameters()))


@torch.no_grad()
def told(student: nn.Module, teacher: nn.Module, windows: tuple[Tensor, Tensor]) -> tuple[float, float, float]:
    """The student's loss, how often both models hold the same character the likeliest, and their divergence."""
    x, y = windows
    own, other = (predict(model, x, 200).flatten(0, 1) for model in (student, teacher))
    agreement = (own.argmax(1) == other.argmax(1)).double().mean().item()
    return F.cross_entropy(own, y.flatten()).item(), agreement, soft_target_loss(own, other).item()


def text_loss(scores: Float[Tensor, "batch length characters"], y: Int[Tensor, "batch length"]) -> Float[Tensor, ""]:
    """The cross-entropy of the characters that follow."""
    return F.cross_entropy(scores.flatten(0, 1), y.flatten())


def hard_labels(pupil: Pupil) -> Objective:
    """The text alone; the teacher is not asked."""
    return lambda x, y, index: text_loss(pupil.student(x), y)


def soft_targets(pupil: Pupil) -> Objective:
    """Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015: text and teacher, half each."""
    temperature = float(pupil.plan.setting["temperature"])

    def objective(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        scores = pupil.student(x)
        return (text_loss(scores, y) + soft_target_loss(scores, pupil.taught(x), temperature)) / 2

    return objective


def hidden_states(pupil: Pupil) -> Objective:
    """Features after each stage by squared error, as in FitNets and TinyBERT, beside the text and the soft targets."""
    weight = float(pupil.plan.setting["weight"])

    def objective(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        scores, own, wanted, theirs = pupil.with_features(x)
        answers = (text_loss(scores, y) + soft_target_loss(scores, wanted)) / 2
        return answers + weight * feature_distances(own, theirs)[0].sum()

    return objective


def relational(pupil: Pupil) -> Objective:
    """Park et al., "Relational Knowledge Distillation", CVPR 2019: distances between windows, divided by their mean."""
    weight = float(pupil.plan.setting["weight"])

    def objective(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        scores, own, _, theirs = pupil.with_features(x)
        here, there = (distances(features[-1][:, -1]) for features in (own, theirs))
        return text_loss(scores, y) + weight * F.smooth_l1_loss(here, there)

    return objective


def distances(x: Float[Tensor, "n width"]) -> Float[Tensor, " pairs"]:
    """Between all pairs of rows, divided by their mean."""
    found = F.pdist(x)
    return found / found.mean().clamp_min(torch.finfo(found.dtype).eps)


own_blocks = Distillation()
new_blocks = Distillation(start="new")
