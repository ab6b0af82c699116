"""Training on examples of which some are repeated, chosen by what a network says of them early in training."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab import optim
from trimtab.optim.useful import EarlyOutputs, UpsampledSampler, find_separating_epoch
from trimtab.studies.tools.training import Supervised, Training, Workbench, fit, predict

Selection = Callable[[EarlyOutputs, torch.Generator], Tensor]


def slowly_learned(early: EarlyOutputs, generator: torch.Generator) -> Tensor:
    """The slowly learned examples of each class, twice."""
    return optim.USEFUL().fit(*early).indices_


def random_examples(early: EarlyOutputs, generator: torch.Generator) -> Tensor:
    """As many examples as USEFUL repeats, drawn at random."""
    everything, count = torch.arange(len(early.labels)), len(slowly_learned(early, generator)) - len(early.labels)
    return torch.cat([everything, torch.randperm(len(everything), generator=generator)[:count]])


def high_losses(early: EarlyOutputs, generator: torch.Generator) -> Tensor:
    """As many examples as USEFUL repeats, those of the highest loss."""
    everything, count = torch.arange(len(early.labels)), len(slowly_learned(early, generator)) - len(early.labels)
    return torch.cat([everything, early.losses.topk(count).indices])


class Resampled(Supervised):
    """Plain training on what is chosen; an epoch draws as many examples as there are, without replacement.

    The choice rests on the outputs after the epoch at which the training error of a first training, plain SGD at a
    constant rate, stops falling steeply; where it never falls steeply, after the last.
    """

    def __init__(self, select: Selection, bench: Workbench) -> None:
        super().__init__(bench)
        self.bench = bench
        outputs = self._early_outputs(bench)
        losses = F.cross_entropy(outputs, bench.y.cpu(), reduction="none")
        indices = select(EarlyOutputs(outputs, bench.y.cpu(), losses), bench.trial.generator(2))
        self.sampler = UpsampledSampler(indices, num_samples=len(bench.y), generator=bench.trial.generator(3))
        self.drawn = torch.arange(len(bench.y), device=bench.x.device)

    @staticmethod
    def _early_outputs(bench: Workbench) -> Tensor:
        first = bench.with_plan()
        first.entrant = Training()
        rule = Supervised(first)
        outputs = [predict(rule, first.x).cpu()]
        fit(first, rule, anneal=False, after_epoch=lambda epoch: outputs.append(predict(rule, first.x).cpu()))
        errors = [(logits.argmax(1) != first.y.cpu()).float().mean().item() for logits in outputs]
        try:
            return outputs[find_separating_epoch(errors)]
        except ValueError:  # at a rate at which it hardly learns, the error falls late and has no elbow
            return outputs[-1]

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.drawn = torch.tensor(list(self.sampler), device=self.bench.x.device)

    def step(self, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        chosen = self.drawn[index]
        return super().step(self.bench.x[chosen], self.bench.y[chosen], chosen)
