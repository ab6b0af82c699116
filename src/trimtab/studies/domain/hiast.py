"""Do thresholds for each image, pasted hard classes and two regions adapt segmentation better than fixed thresholds?

The paper adapts DeepLab on street scenes of 19 classes after an adversarial warm-up, and its self-training sees the
target alone; here a small U-Net names six digits, starts from statistics of the target in place of the warm-up, and
every contestant keeps the source's labels beside the target's pseudo-labels. The thresholds' settings (alpha 0.5, beta
0.9, gamma 8, two images at once) and the weights of the regularisers (0.1, 1 and 0.5) are the authors'; five of seven
classes count as hard, as 14 of 19 do in the paper, and the teacher averages with 0.99 in place of 0.999, since there
are 90 steps and not 24,000. Class-balanced self-training keeps the surest half of each class, the share of the authors'
alpha. With a fixed threshold the three parts are the same but for the thresholds, which stay at 0.9.

The shift, the rarity and the weighting of classes were set on first trials of the references alone on the seed on which
settings are searched, in which class-balanced self-training was already below a fixed threshold and below the start;
the margins were written down after these. To save time the steps were then cut from 120 to 90 and the target's canvases
from 800 to 400, and the weight of the entropy reference, which did harm at 0.1, was set to 0.01. The claim on all
classes against a fixed threshold, the stronger opponent in those trials, was added after the result.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from trimtab.domain import HardClassPaste, HIASTLoss, InstanceAdaptiveSelector
from trimtab.ops.averaging import Teacher
from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.tasks.cross_domain_segmentation import rare_digits
from trimtab.studies.tools.scene_adapting import IGNORED, Labels, Lesson, SceneAdaptation, Term, self_train
from trimtab.studies.tools.scenes import NUM_CLASSES

# The authors paste 14 of 19 classes.
_HARD = 5
_AT_ONCE = 2


def adapt(lesson: Lesson, *, adaptive: bool = True, pasting: bool = True, regions: bool = True) -> nn.Module:
    """Rounds of self-training with the three parts, or without some of them."""
    draws = lesson.trial.generator(60)
    network = lesson.network
    teacher = Teacher(network, 0.99)
    weights = {} if regions else {"kld_weight": 0.0, "entropy_weight": 0.0, "consistency_weight": 0.0}
    criterion = HIASTLoss(**weights, ignore_index=IGNORED)
    selectors: list[InstanceAdaptiveSelector] = []

    def select(probs: Tensor) -> Tensor:
        # At a quantile of everything nothing moves: the threshold of 0.9 stays for all classes and images.
        selector = InstanceAdaptiveSelector(NUM_CLASSES, beta=0.9 if adaptive else 1.0)
        selectors.append(selector)
        order = torch.randperm(len(probs), generator=draws)
        found = torch.cat([selector(probs[part]) for part in order.split(_AT_ONCE)])
        return found[order.argsort()]

    def term(labels: Labels) -> Term:
        paste = HardClassPaste(lesson.target.x, labels, selectors[-1].confidence.clamp(max=1.0), _HARD)

        def value(x: Tensor, y: Tensor, places: Tensor) -> Tensor:
            if pasting:
                x, y = paste(x, y, generator=draws)
            told = teacher(x).softmax(1) if regions else None
            loss: Tensor = criterion(network(relit(x, draws) if regions else x), y, told)
            return loss

        return value

    return self_train(lesson, select, term=term, after=lambda: teacher.update(network))


def relit(x: Tensor, generator: torch.Generator) -> Tensor:
    """The stronger view: another contrast and brightness, and grain."""
    shape = (len(x), 1, 1, 1)
    contrast = 0.7 + 0.6 * torch.rand(shape, generator=generator)
    light = 0.2 * torch.rand(shape, generator=generator) - 0.1
    return contrast * x + light + 0.05 * torch.randn(x.shape, generator=generator)


study = Study(
    paper="hiast",
    entrants={"HIAST": SceneAdaptation(adapt=adapt)},
    controls={
        "adaptive thresholds alone": SceneAdaptation(adapt=partial(adapt, pasting=False, regions=False)),
        "HIAST, fixed threshold": SceneAdaptation(adapt=partial(adapt, adaptive=False)),
        "HIAST, nothing pasted": SceneAdaptation(adapt=partial(adapt, pasting=False)),
        "HIAST, cross-entropy alone": SceneAdaptation(adapt=partial(adapt, regions=False)),
    },
    on=[rare_digits],
    headline=Claim("HIAST", beats="class-balanced self-training", on="miou", by=0.02, at=rare_digits),
    claims=[
        Claim("HIAST", beats="fixed threshold", on="rare", by=0.03, at=rare_digits),
        Claim("HIAST", beats="fixed threshold", on="miou", at=rare_digits),
        Claim("HIAST", beats="adaptive thresholds alone", on="miou", by=0.01, at=rare_digits),
        Claim("adaptive thresholds alone", beats="class-balanced self-training", on="miou", at=rare_digits),
        Claim("adaptive thresholds alone", beats="fixed threshold", on="rare", at=rare_digits),
        Claim("HIAST", beats="HIAST, fixed threshold", on="rare", at=rare_digits),
        Claim("HIAST", beats="HIAST, nothing pasted", on="rare", at=rare_digits),
        Claim("HIAST", beats="HIAST, cross-entropy alone", on="miou", at=rare_digits),
        Claim("HIAST", beats="batch statistics", on="miou", by=0.05, at=rare_digits),
    ],
)
