"""Do positives from other images of a cluster help a contrastive loss, and which negatives and margin do they want?

A small CNN on 4,000 digits and 200 steps, five visits of each sample, instead of ResNet-50 and 200 epochs of ImageNet;
50 clusters instead of 10,000, initial labels by k-means on the untrained network. Weight 0.25, margin -0.5 and
overwriting of features are the authors'; the temperature, 0.2 of theirs, is searched as MoCo's is. Offline labels are
clustered anew after each epoch.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from trimtab.semisup import ClusterMemory, InterCLR
from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.tasks.representation_learning import incomes, numerals
from trimtab.studies.tools.pretraining import Lesson, PreTraining
from trimtab.studies.tools.self_supervised import MoCo


class InterImage(MoCo):
    """MoCo, with the inter-image loss on the same queries and keys.

    50 clusters for 4,000 samples; negatives are 2 % of all samples out of a pool of 10 %, near the paper's shares of
    ImageNet.
    """

    def __init__(
        self, lesson: Lesson, *, sampling: str = "semihard", margin: float = -0.5, offline: bool = False
    ) -> None:
        super().__init__(lesson)
        samples = len(lesson.x)
        memory = ClusterMemory(samples, 64, num_clusters=max(10, samples // 80), min_cluster=5)
        self.rule = InterCLR(
            memory,
            max(8, samples // 50),
            max(16, samples // 10),
            margin=margin,
            sampling=sampling,  # type: ignore[arg-type]
            temperature=lesson.option("temperature", 0.2),
        )
        with torch.no_grad():
            memory.start(self.project(lesson.x), generator=torch.Generator().manual_seed(lesson.seed))
        self.offline = offline
        self.epoch = 0
        self.seen: tuple[Tensor, Tensor] | None = None
        self.draws = torch.Generator().manual_seed(lesson.seed + 1)

    def compare(self, first: Tensor, second: Tensor, index: Tensor) -> Tensor:
        query, key = self.project(first), self.teacher(second)
        intra = self.contrast(query, key)
        self.seen = (index, key)
        return self.rule.loss(query, index, intra, generator=self.draws)["total"]

    def update(self, share: float) -> None:
        super().update(share)
        assert self.seen is not None
        memory = self.rule.memory
        if not self.offline:
            self.rule.update(*self.seen)
            return
        # Labels and centroids stay through an epoch, after which all is clustered anew.
        labels = memory.labels.clone()
        memory.write(*self.seen)
        memory.labels.copy_(labels)
        done = int(share * self.lesson.steps * self.lesson.batch_size / len(self.lesson.x))
        if done > self.epoch:
            self.epoch = done
            memory.start(memory.features.clone(), generator=self.draws)


search = {"lr": (1e-3, 4e-3, 1.6e-2), "temperature": (0.1, 0.2)}
study = Study(
    paper="interclr",
    entrants={"InterCLR": PreTraining(learner=InterImage, search=search)},
    controls={
        "hard negatives": {numerals: PreTraining(learner=partial(InterImage, sampling="hard"), search=search)},
        "margin 0.25": {numerals: PreTraining(learner=partial(InterImage, margin=0.25), search=search)},
        "offline labels": {numerals: PreTraining(learner=partial(InterImage, offline=True), search=search)},
    },
    on=[numerals, incomes],
    headline=Claim("InterCLR", beats="MoCo", on="probe", by=0.01, at=numerals),
    claims=[
        Claim("InterCLR", beats="MoCo", on="neighbours", by=0.01, at=numerals),
        Claim("InterCLR", beats="MoCo", on="few_labels", by=0.01, at=numerals),
        Claim("InterCLR", beats="hard negatives", on="probe", at=numerals),
        Claim("InterCLR", beats="margin 0.25", on="probe", at=numerals),
        Claim("InterCLR", beats="offline labels", on="probe", at=numerals),
        Claim("InterCLR", beats="SimCLR", on="probe", at=numerals),
        Claim("InterCLR", beats="MoCo", on="probe", by=0.005, at=incomes),
    ],
)
