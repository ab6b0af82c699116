"""A small language model on real text: how low an optimizer brings the loss, in steps and in seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.data.text import python_sources
from trimtab.nets.decoder import Decoder
from trimtab.studies.lr_search import best_learning_rate
from trimtab.studies.study import Arm, Curve, Metric, Result, Task, Trial
from trimtab.studies.training import Plan, fit

OptimizerWithRate = Callable[[Iterable[nn.Parameter], Plan, float], torch.optim.Optimizer]


class _NextCharacter(nn.Module):
    """Mean cross-entropy of every position's successor."""

    def forward(self, scores: Float[Tensor, "batch length characters"], after: Int[Tensor, "batch length"]) -> Tensor:
        return F.cross_entropy(scores.flatten(0, 1), after.flatten())


@dataclass(frozen=True)
class SmallLanguageModel(Task):
    """Train a character-level transformer on the sources of Python's standard library.

    Attributes:
        context: characters that the model sees.
        depth: blocks of the transformer, of width 64.

    The model sees the same 3,200 windows of the text in each of 4 epochs at the laptop budget, in batches of 32. Its
    loss, in nats a character, is that on modules that were not trained on.
    """

    context: int = 64
    depth: int = 2

    name: ClassVar[str] = "small-language-model"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "test_loss": Metric("test loss (nats per character)", best="min"),
        "first_epoch_loss": Metric("test loss after one epoch (nats per character)", best="min"),
        "seconds_per_step": Metric("time per step (s)", best="min"),
        "optimizer_state_bytes": Metric("optimizer state (bytes)", best="min"),
        "learning_rate": Metric("learning rate", best=None),
    }

    def train(self, optimizer: OptimizerWithRate, lr: Sequence[float]) -> Arm:
        """A contestant: an optimizer, at the best of these rates.

        The rate is chosen by trainings of a quarter of the length on four fifths of the windows, by the loss on the
        other fifth.
        """
        return self.arm(optimizer=optimizer, lr=lr)

    def run(self, trial: Trial, **options: Any) -> Result:
        make: OptimizerWithRate = options["optimizer"]
        text = python_sources()
        x, y = _windows(text.train, trial.pick(smoke=64, laptop=3200, paper=32_000), self.context, trial)
        test = _windows(text.test, trial.pick(smoke=32, laptop=1000, paper=5000), self.context, trial, stream=2)
        epochs, held_out = trial.pick(smoke=2, laptop=4, paper=20), len(x) // 5

        def network() -> Decoder:
            with torch.random.fork_rng():
                torch.manual_seed(trial.seed)
                return Decoder(len(text.characters), self.context, depth=self.depth).to(trial.device)

        train = partial(fit, num_classes=len(text.characters), batch_size=32, loss=lambda plan: _NextCharacter())

        def score(rate: float) -> float:
            model = network()
            train(
                model,
                x[held_out:],
                y[held_out:],
                epochs=max(1, epochs // 4),
                optimizer=lambda params, plan: make(params, plan, rate),
                trial=replace(trial, report=lambda fraction: None),
            )
            return -_loss(model.eval(), x[:held_out], y[:held_out])

        best = best_learning_rate(options["lr"], score)
        model, losses = network(), list[float]()
        done = train(
            model,
            x,
            y,
            epochs=epochs,
            optimizer=lambda params, plan: make(params, plan, best),
            trial=trial,
            after_epoch=lambda epoch: losses.append(_loss(model, *test)),
        )
        state = (value for held in done.optimizer.state.values() for value in held.values())
        per_epoch = range(1, epochs + 1)
        return Result(
            {
                "test_loss": losses[-1],
                "first_epoch_loss": losses[0],
                "seconds_per_step": done.seconds / done.steps,
                "optimizer_state_bytes": float(
                    sum(t.numel() * t.element_size() for t in state if isinstance(t, Tensor) and t.dim())
                ),
                "learning_rate": best,
            },
            {
                "test_loss by steps": Curve([float(done.steps / epochs * e) for e in per_epoch], losses),
                "test_loss by seconds": Curve([done.seconds / epochs * e for e in per_epoch], losses),
            },
        )


def _windows(text: Tensor, count: int, length: int, trial: Trial, stream: int = 0) -> tuple[Tensor, Tensor]:
    """Random windows of the text, and the same windows one character on."""
    start = torch.randint(len(text) - length, (count, 1), generator=trial.generator(stream))
    window = text[start + torch.arange(length + 1)].to(trial.device)
    return window[:, :-1].contiguous(), window[:, 1:].contiguous()


@torch.no_grad()
def _loss(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Mean loss, in batches."""
    criterion = _NextCharacter()
    total = sum(float(criterion(model(a), b)) * len(a) for a, b in zip(x.split(200), y.split(200), strict=True))
    return total / len(x)
