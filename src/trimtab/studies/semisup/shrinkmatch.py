"""Are uncertain predictions worth learning from, once the classes they confuse are taken away?

The paper trains wide residual networks on CIFAR for a million steps; here a small network has 320 steps on images of 14
by 14 pixels. All contestants choose between thresholds of 0.8 and 0.95. ShrinkMatch has the alignment of its authors
(the mean of the last 32 batches), which plain FixMatch has not: the control without shrinking, and aligned FixMatch
with hard labels, tell the two apart. The share of certain images, which weighs the new term, is a running mean over the
whole training, where the authors' program starts it anew in every epoch. Before the result, labelled training and
FixMatch were tried on seed 3 to choose between SGD and Adam, and single runs on the seed of searches led to shorter
training and smaller batches for all. In adaptation, which the paper does not speak of, the labelled images are the
source's and the others the target's.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from trimtab import semisup
from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.tasks.domain_adaptation import from_few_labels, needs_both, with_source
from trimtab.studies.tasks.few_labels import SemiSupervised, Start, fashion_40, mnist_40
from trimtab.studies.tools.adapting import Adaptation


def made(start: Start, *, shrink: float = 1.0) -> nn.Module:
    """ShrinkMatch with its alignment, at the setting's threshold; without `shrink` what is left is its base."""
    network = start.network
    return semisup.ShrinkMatch(
        network.features,
        network.head,
        threshold=float(start.setting["threshold"]),
        align=semisup.QueueDistributionAlignment(start.num_classes),
        shrink=shrink,
    )


def shrunk(start: Start) -> nn.Module:
    """ShrinkMatch."""
    return made(start)


def without(start: Start) -> nn.Module:
    """The same without the term for uncertain images: FixMatch with soft, aligned labels."""
    return made(start, shrink=0.0)


_few = SemiSupervised(rule=shrunk)
_adapted = Adaptation(
    adapt=partial(from_few_labels, entrant=_few),
    search={"lr": (3e-4, 1e-3), "threshold": (0.8, 0.95)},
    unfit=needs_both,
)

study = Study(
    paper="shrinkmatch",
    entrants={"ShrinkMatch": {fashion_40: _few, mnist_40: _few, with_source: _adapted}},
    controls={"without shrinking": SemiSupervised(rule=without)},
    on=[fashion_40, mnist_40, with_source],
    headline=Claim("ShrinkMatch", beats="FixMatch", on="accuracy", by=0.005, at=fashion_40),
    claims=[
        Claim("ShrinkMatch", beats="without shrinking", on="accuracy", at=fashion_40),
        Claim("ShrinkMatch", beats="without shrinking", on="used", by=0.10, at=fashion_40),
        Claim("ShrinkMatch", beats="FixMatch, aligned", on="accuracy", at=fashion_40),
        Claim("ShrinkMatch", beats="FixMatch", on="accuracy", by=0.005, at=mnist_40),
        Claim("ShrinkMatch", beats="without shrinking", on="accuracy", at=mnist_40),
        Claim("ShrinkMatch", beats="labelled only", on="accuracy", by=0.05, at=mnist_40),
        Claim("ShrinkMatch", beats="FixMatch", on="unlabelled", at=fashion_40),
    ],
)
