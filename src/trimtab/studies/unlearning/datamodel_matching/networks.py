"""Small networks of digits, many at once; the set to forget, and the models trained on all samples and without it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.data import load
from trimtab.studies.engine.study import Trial
from trimtab.studies.tools.descent import descend
from trimtab.studies.tools.network_stack import BATCH, stacked_cross_entropy
from trimtab.studies.tools.trained_once import trained_once
from trimtab.unlearning import LinearDatamodel, subset_masks

CLASSES, _HIDDEN = 10, 16


class Stack(nn.Module):
    """Many networks of one hidden layer at once: (batch, 64), or (batch, models, 64), to (batch, models, classes)."""

    def __init__(self, models: int, generator: torch.Generator) -> None:
        super().__init__()

        def drawn(inputs: int, outputs: int) -> nn.Parameter:
            return nn.Parameter((torch.rand(models, inputs, outputs, generator=generator) * 2 - 1) / inputs**0.5)

        self.first, self.second = drawn(64, _HIDDEN), drawn(_HIDDEN, CLASSES)
        self.first_bias = nn.Parameter(torch.zeros(models, _HIDDEN))
        self.second_bias = nn.Parameter(torch.zeros(models, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("bi,mih->bmh" if x.ndim == 2 else "bmi,mih->bmh", x, self.first) + self.first_bias
        return torch.einsum("bmh,mhc->bmc", hidden.relu(), self.second) + self.second_bias


def train(masks: Tensor, x: Tensor, y: Tensor, steps: int, generator: torch.Generator) -> Stack:
    """One network for each row of masks, trained on the samples in it, all from their own starts and orders."""
    stack = Stack(len(masks), generator)
    optimizer = torch.optim.Adam(stack.parameters(), lr=0.01)
    drawn = torch.multinomial(masks.float(), steps * BATCH, replacement=True, generator=generator)
    descend(optimizer, lambda rows: stacked_cross_entropy(stack(x[rows]), y[rows]), drawn.T.split(BATCH))
    return stack


@dataclass(frozen=True)
class Work:
    """Samples, a set to forget, models trained on all, and models trained without it."""

    x: Tensor
    y: Tensor
    unseen: Tensor
    unseen_y: Tensor
    forget: Tensor
    trained: Stack
    retrained: Stack
    steps: int

    @property
    def retained(self) -> Tensor:
        left = torch.ones(len(self.x), dtype=torch.bool)
        left[self.forget] = False
        return left.nonzero()[:, 0]


def samples(trial: Trial) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same digits in every run: one datamodel serves all."""
    data = load("digits")
    seen, unseen = trial.pick(smoke=(80, 40), laptop=(300, 200), paper=(1000, 500))
    x, other = data.x_train.flatten(1), data.x_test.flatten(1)
    return x[:seen], data.y_train[:seen], other[:unseen], data.y_test[:unseen]


def work(trial: Trial, stream: int) -> Work:
    """A cluster of one class is to be forgotten; which one, the seed and the stream say."""
    x, y, unseen, unseen_y = samples(trial)
    draws = trial.generator(stream)
    members = (y == (trial.seed + stream) % CLASSES).nonzero()[:, 0]
    centre = x[members[torch.randint(len(members), (1,), generator=draws)]]
    count = trial.pick(smoke=3, laptop=15, paper=50)
    forget = members[torch.cdist(centre, x[members])[0].argsort()[:count]]
    models, steps = trial.pick(smoke=6, laptop=80, paper=200), trial.pick(smoke=10, laptop=150, paper=600)
    kept = torch.ones(models, len(x), dtype=torch.bool)
    trained, retrained = (Stack(models, trial.generator(99)) for _ in range(2))
    key, rest = f"stack of digit networks, seed {trial.seed}, trained on all", kept.index_fill(1, forget, False)
    trained_once(trial, trained, lambda: train(kept, x, y, steps, trial.generator(10)), key=key)
    partly = lambda: train(rest, x, y, steps, trial.generator(20 + stream))
    trained_once(trial, retrained, partly, key=f"{key} but what is to be forgotten, stream {stream}")
    unlearning_steps = trial.pick(smoke=4, laptop=60, paper=300)
    return Work(x, y, unseen, unseen_y, forget, trained, retrained, unlearning_steps)


def attribution(trial: Trial) -> Tensor:
    """What each training sample adds to the logits at all points, seen and unseen."""
    x, y, unseen, _ = samples(trial)

    def build() -> dict[str, Tensor]:
        draws = torch.Generator().manual_seed(0)
        masks = subset_masks(len(x), trial.pick(smoke=40, laptop=600, paper=4000), 0.7, generator=draws)
        stack = train(masks, x, y, trial.pick(smoke=10, laptop=150, paper=600), draws)
        with torch.no_grad():
            outputs = stack(torch.cat([x, unseen])).transpose(0, 1)
        return {"coef": LinearDatamodel(alpha=10.0).fit(masks, outputs).coef_.float()}

    return trial.cached(build, key="datamodel of digit networks")["coef"]
