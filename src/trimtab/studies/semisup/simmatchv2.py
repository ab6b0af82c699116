"""Does agreement of nodes and edges between views make more of a few labels than pseudo-labels do?

The paper trains ResNet-50 on 1 or 10 % of ImageNet's labels for 300 epochs; here a small network has 320 steps on
images of 14 by 14 pixels, so that the memory holds 512 nodes, a graph has 16 labelled ones, the embedding has 32
dimensions and the average of weights moves by 0.02 a step. Weights, temperatures and the share that is propagated are
the authors'; the threshold is chosen between theirs, 0.7, and 0.95. The control without edges has node-node consistency
alone, with a label of its own, the same average of weights and normalised features. Before the result, labelled
training and FixMatch were tried on seed 3 to choose between SGD and Adam, and single runs on the seed of searches led
to shorter training and smaller batches for all. In adaptation, which the paper does not speak of, the labelled images
are the source's and the others the target's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from trimtab import semisup
from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.tasks.domain_adaptation import from_few_labels, needs_both, with_source
from trimtab.studies.tasks.few_labels import Batch, SemiSupervised, Start, fashion_40, mnist_40
from trimtab.studies.tools.adapting import Adaptation


def made(start: Start, **options: Any) -> nn.Module:
    """SimMatchV2 at the setting's threshold, with sizes that suit the small network and the short training."""
    network, labelled = start.network, len(start.labels)
    return semisup.SimMatchV2(
        network.features,
        network.head,
        start.labels,
        threshold=float(start.setting["threshold"]),
        queue_size=512,
        top_n=min(16, labelled),
        dim=32,
        momentum=0.98 if start.steps < 10_000 else 0.999,
        **options,
    )


def of_graph(rule: semisup.SimMatchV2, batch: Batch) -> dict[str, Tensor]:
    """Its loss, which takes the places of the labelled images too."""
    return rule.loss(batch.x, batch.targets, batch.index, batch.weak, batch.strong)


def entrant(**options: Any) -> SemiSupervised:
    """SimMatchV2 with some of its parts changed."""
    return SemiSupervised(rule=partial(made, **options), loss=of_graph, search={"threshold": (0.7, 0.95)})


_few = entrant()
_adapted = Adaptation(
    adapt=partial(from_few_labels, entrant=_few),
    search={"lr": (3e-4, 1e-3), "threshold": (0.7, 0.95)},
    unfit=needs_both,
)

study = Study(
    paper="simmatchv2",
    entrants={"SimMatchV2": {fashion_40: _few, mnist_40: _few, with_source: _adapted}},
    controls={
        "without normalised features": entrant(normalize=False),
        "without edges": entrant(weights=(10.0, 0.0, 0.0), alpha=0.0),
    },
    on=[fashion_40, mnist_40, with_source],
    headline=Claim("SimMatchV2", beats="FixMatch", on="accuracy", by=0.01, at=fashion_40),
    claims=[
        Claim("SimMatchV2", beats="FixMatch, aligned", on="accuracy", at=fashion_40),
        Claim("SimMatchV2", beats="without edges", on="accuracy", at=fashion_40),
        Claim("SimMatchV2", beats="without normalised features", on="accuracy", at=fashion_40),
        Claim("SimMatchV2", beats="FixMatch", on="accuracy", by=0.01, at=mnist_40),
        Claim("SimMatchV2", beats="without edges", on="accuracy", at=mnist_40),
        Claim("SimMatchV2", beats="MixMatch", on="accuracy", at=fashion_40),
        Claim("SimMatchV2", beats="labelled only", on="accuracy", by=0.05, at=fashion_40),
    ],
)
