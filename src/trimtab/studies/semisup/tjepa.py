"""Do codes of columns, told from one another without augmentations, help a linear classifier on a table?

The paper trains transformers of up to 16 layers for 300 epochs on six tables, Adult among them, and then deep
classifiers on the codes; here one layer of width 32 sees 6,000 of Adult's rows in 300 steps of 128, and a linear
classifier is fitted to the codes of all columns and to the raw columns alike. The codes, 32 numbers a column, are more
than the raw inputs, and the control of the same network untrained says what that alone does. The predictor has one
layer and tells two sets of targets, where the authors have four; that keeps a run short. SimCLR on a table is SCARF:
its views redraw three in ten entries. The learning rate and the averaging are chosen among six settings, as everyone's
are. After one run of T-JEPA alone the encoder was cut from two layers to one and the sets from four to two, for time,
and a claim on BYOL gave way to the one on 100 labels.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from trimtab.semisup import TJEPA
from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.tasks.representation_learning import Pretraining, incomes
from trimtab.studies.tools.pretraining import Lesson, PreTraining

_SEARCH = {"lr": (1e-3, 4e-3, 1.6e-2), "decay": (0.98, 0.996)}


class Columns(nn.Module):
    """T-JEPA on the rows of a lesson, numbers and codes told apart."""

    def __init__(self, lesson: Lesson, *, num_extra: int = 1, decay: float | None = None) -> None:
        super().__init__()
        sizes = lesson.cardinalities
        self.numbers = [j for j, count in enumerate(sizes) if not count]
        self.codes = [j for j, count in enumerate(sizes) if count]
        self.model = TJEPA(
            len(self.numbers),
            [sizes[j] for j in self.codes],
            dim=32,
            num_layers=1,
            num_heads=2,
            predictor_dim=16,
            predictor_layers=1,
            num_targets=2,
            num_extra=num_extra,
            decay=lesson.option("decay", 0.996) if decay is None else decay,
        )

    def loss(self, x: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
        return self.model.loss(*self._parts(x), generator=generator)["total"]

    def encode(self, x: Tensor) -> Tensor:
        return self.model.encode(*self._parts(x)).flatten(1)

    def update(self, share: float) -> None:
        self.model.update(share)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, self.numbers], x[:, self.codes].long()


class Untold(Columns):
    """The same network with the weights that it starts from."""

    def __init__(self, lesson: Lesson) -> None:
        super().__init__(lesson)
        self.requires_grad_(False)


def no_table(task: Pretraining) -> str:
    """Why it cannot enter a variant."""
    return "" if task.dataset == "adult" else "it hides columns of a table, and an image has none"


study = Study(
    paper="tjepa",
    entrants={"T-JEPA": PreTraining(learner=Columns, search=_SEARCH, unfit=no_table)},
    controls={
        "T-JEPA, no further token": PreTraining(learner=partial(Columns, num_extra=0), search=_SEARCH),
        "T-JEPA, untrained": PreTraining(learner=Untold, search={}),
    },
    on=[incomes],
    headline=Claim("T-JEPA", beats="raw inputs", on="probe", by=0.005, at=incomes),
    claims=[
        Claim("T-JEPA", beats="T-JEPA, untrained", on="probe", at=incomes),
        Claim("T-JEPA", beats="SimCLR", on="probe", at=incomes),
        Claim("T-JEPA", beats="masked autoencoder", on="probe", at=incomes),
        Claim("T-JEPA", beats="T-JEPA, no further token", on="rank", at=incomes),
        Claim("T-JEPA", beats="T-JEPA, no further token", on="probe", at=incomes),
        Claim("T-JEPA", beats="raw inputs", on="neighbours", at=incomes),
        Claim("T-JEPA", beats="raw inputs", on="few_labels", at=incomes),
    ],
)
