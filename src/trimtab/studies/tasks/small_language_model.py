"""A small language model on real text: how low an optimizer brings the loss, and what a step of it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.data.text import python_sources
from trimtab.nets.decoder import Decoder
from trimtab.studies.engine.study import Budget, Curve, Metric, Result, Task, Trial
from trimtab.studies.tools import baselines
from trimtab.studies.tools.images import tensor_bytes
from trimtab.studies.tools.training import LossFactory, Plan, Training, Workbench, fit, predict, sgd


class _EveryPosition(nn.Module):
    """A loss of (batch, classes) scores, on all positions of all windows."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, scores: Float[Tensor, "batch length characters"], after: Int[Tensor, "batch length"]) -> Tensor:
        value: Tensor = self.loss(scores.flatten(0, 1), after.flatten())
        return value


def _at_every_position(make: LossFactory | None) -> LossFactory:
    def loss(plan: Plan) -> nn.Module:
        return _EveryPosition(make(plan) if make else nn.CrossEntropyLoss())

    return loss


@dataclass(frozen=True)
class SmallLanguageModel(Task[Training]):
    """Train a character-level transformer on the sources of Python's standard library.

    At the laptop budget a run takes 500 steps on batches of 32 windows, 4 times over the same 4,000. Each contestant
    chooses among five settings by the loss on held-out windows of the modules that it trains on; the test loss, in
    nats a character, is that on other modules.

    Attributes:
        context: characters that the model sees.
        depth: blocks of the transformer, of width 64.
    """

    context: int = 32
    depth: int = 2

    name: ClassVar[str] = "small-language-model"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "test_loss": Metric("test loss (nats per character)", best="min"),
        "first_epoch_loss": Metric("test loss after a quarter of the training (nats per character)", best="min"),
        "seconds_per_step": Metric("time per step (s)", best="min"),
        "optimizer_state_bytes": Metric("optimizer state (bytes)", best="min"),
    }
    accepts: ClassVar[type[Training]] = Training
    tries: ClassVar[int] = 5
    search: ClassVar[Mapping[str, Sequence[Any]]] = {"lr": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)}
    cost: ClassVar[float] = 8.0

    @classmethod
    def variants(cls) -> Mapping[str, Task[Any]]:
        return {"Python sources": python_text}

    @classmethod
    def references(cls) -> Mapping[str, Training]:
        return {
            "SGD": Training(optimizer=sgd, search={"lr": (0.01, 0.03, 0.1, 0.3, 1.0)}),
            "AdamW": Training(optimizer=baselines.adamw),
            "Adam": Training(optimizer=baselines.adam),
        }

    def datasets(self, budget: Budget) -> tuple[str, ...]:
        return ("python_sources",)

    def run(self, trial: Trial, entrant: Training) -> Result:
        text = python_sources()
        count = trial.pick(smoke=64, laptop=4_000, paper=40_000)
        train = _windows(text.train, count, self.context, trial)
        held_out = _windows(text.train, trial.pick(smoke=32, laptop=1_000, paper=5_000), self.context, trial, stream=1)
        epochs, characters = trial.pick(smoke=4, laptop=4, paper=20), len(text.characters)
        bench = Workbench(
            entrant if entrant.rule else replace(entrant, loss=_at_every_position(entrant.loss)),
            lambda: Decoder(characters, self.context, depth=self.depth),
            train,
            held_out,
            num_classes=characters,
            epochs=epochs,
            trial=trial,
            batch_size=32,
        )
        rule = bench.rule()

        def loss(x: Tensor, y: Tensor) -> float:
            return F.cross_entropy(predict(rule, x, batch_size=200).flatten(0, 1), y.flatten()).item()

        if trial.searching:
            fit(bench, rule)
            return Result(score=-loss(*held_out))
        test = _windows(text.test, trial.pick(smoke=32, laptop=2_000, paper=5_000), self.context, trial, stream=2)
        losses: list[float] = []
        done = fit(bench, rule, after_epoch=lambda epoch: losses.append(loss(*test)))
        steps = [done.steps / epochs * (epoch + 1) for epoch in range(epochs)]
        return Result(
            {
                "test_loss": losses[-1],
                "first_epoch_loss": losses[epochs // 4 - 1],
                "seconds_per_step": done.seconds / done.steps,
                "optimizer_state_bytes": tensor_bytes(rule.optimizers),
            },
            {"test_loss": Curve(steps, losses, x_label="step")},
        )


def _windows(text: Tensor, count: int, length: int, trial: Trial, stream: int = 0) -> tuple[Tensor, Tensor]:
    """Random windows of the text, and the same windows one character on."""
    start = torch.randint(len(text) - length, (count, 1), generator=trial.generator(stream))
    window = text[start + torch.arange(length + 1)].to(trial.device)
    return window[:, :-1].contiguous(), window[:, 1:].contiguous()


python_text = SmallLanguageModel()
