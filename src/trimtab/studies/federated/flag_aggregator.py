"""Does a fitted subspace stand wrong workers better than rules that throw updates or coordinates away?

15 workers of 32 images each, 3 of them wrong, and 200 steps of a network with one hidden layer of 64; the paper trains
ResNet-18 on CIFAR-10 and larger data for thousands of steps, and loses whole packets of the messages. Its augmented
losses, in which every worker's images are drawn differently, are not shown. The result is multiplied by the median
length of the gradients, so that learning rates mean the same for all, and the weight of the differences between workers
is 0. Trimmed mean, Krum, Multi-Krum and Bulyan are told how many workers are wrong; the flag aggregator is not. One run
on a separate seed showed that directions alone already have a cosine of 0.96 with the honest mean, so the claims on
that cosine ask for more than that, and no longer for 0.05 more.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from trimtab.federated import FlagAggregator
from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.tasks.byzantine import Aggregation, WorkersPlan, little_is_enough, random_gradients, sign_flip


def flag(plan: WorkersPlan) -> FlagAggregator:
    """The aggregator, given the scale of the gradients."""
    return FlagAggregator(rescale="median_norm")


def one_step(plan: WorkersPlan) -> FlagAggregator:
    """A plain subspace: the first step, in which all workers weigh the same."""
    return FlagAggregator(n_iter=1, rescale="median_norm")


def unnormalised(plan: WorkersPlan) -> FlagAggregator:
    """The gradients themselves projected, long ones with their whole length."""
    return FlagAggregator(normalize=False)


def mean_direction(updates: Float[Tensor, "workers size"]) -> Float[Tensor, " size"]:
    """The mean of the directions without any subspace, with the same scale."""
    norms = updates.norm(dim=1, keepdim=True)
    found: Tensor = (updates / norms.clamp_min(1e-30)).mean(0) * norms.quantile(0.5)
    return found


study = Study(
    paper="flag_aggregator",
    entrants={"flag aggregator": Aggregation(mean=flag)},
    controls={
        "mean of directions": Aggregation(mean=lambda plan: mean_direction),
        "subspace without weights": Aggregation(mean=one_step),
        "subspace, gradients not normalised": Aggregation(mean=unnormalised),
    },
    on=[random_gradients, sign_flip, little_is_enough],
    headline=Claim("flag aggregator", beats="Multi-Krum", on="accuracy", at=random_gradients),
    claims=[
        Claim("flag aggregator", beats="Bulyan", on="accuracy", at=random_gradients),
        Claim("flag aggregator", beats="coordinate median", on="accuracy", at=random_gradients),
        Claim("flag aggregator", beats="mean", on="accuracy", by=0.2, at=random_gradients),
        Claim("flag aggregator", beats="trimmed mean", on="accuracy", by=-0.01, at=sign_flip),
        Claim("flag aggregator", beats="mean of directions", on="alignment", at=random_gradients),
        Claim("flag aggregator", beats="subspace without weights", on="alignment", at=random_gradients),
        Claim("flag aggregator", beats="subspace, gradients not normalised", on="accuracy", by=0.2, at=sign_flip),
        Claim("flag aggregator", beats="Multi-Krum", on="accuracy", by=-0.01, at=little_is_enough),
    ],
)
