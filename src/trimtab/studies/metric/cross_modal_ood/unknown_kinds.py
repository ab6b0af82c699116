"""Telling images of unknown kinds with an image-text model that was fine-tuned on known ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.data import load
from trimtab.metric.cross_modal_ood import (
    cross_modal_alignment,
    mcm_score,
    mine_negative_labels,
    modality_gap,
    neglabel_log_odds,
)
from trimtab.metric.verification import auroc, tpr_at_far
from trimtab.studies.engine.study import Curve, Metric, Result, Trial
from trimtab.studies.metric.cross_modal_ood.captions import CLOTHES, DIGITS, PROMPTS, Names
from trimtab.studies.metric.cross_modal_ood.two_towers import TwoTowers
from trimtab.studies.tools.descent import descent_step
from trimtab.studies.tools.stopwatch import Stopwatch
from trimtab.studies.tools.trained_once import trained_once
from trimtab.studies.tools.training import predict

_MAX_SCALE = 100.0

# A contestant's loss, called (image embeddings, text embeddings, scale, labels).
AlignmentLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Images:
    """Images with the class of each."""

    x: Float[Tensor, "n channels height width"]
    y: Int[Tensor, " n"]

    def of(self, classes: Sequence[int]) -> _Images:
        """Those of some classes, renumbered from 0."""
        match = self.y[:, None] == torch.tensor(classes, device=self.y.device)
        kept = match.any(1)
        return _Images(self.x[kept], match[kept].int().argmax(1))

    def first(self, count: int) -> _Images:
        return _Images(self.x[:count], self.y[:count])

    def after(self, count: int) -> _Images:
        return _Images(self.x[count:], self.y[count:])

    def to(self, device: str) -> _Images:
        return _Images(self.x.to(device), self.y.to(device))


@dataclass(frozen=True)
class _World:
    """What there is to see and its names.

    Attributes:
        pretraining: images of all kinds; the second kind's classes are numbered after the first kind's.
        train, validation, test: of the known classes, numbered from 0.
        unknown: test images of two other classes, of the other kind, and noise.
        unknown_validation: images of two further classes.
        names: of all kinds, in the order of pre-training's classes.
        known: the known classes.
    """

    pretraining: _Images
    train: _Images
    validation: _Images
    test: _Images
    unknown: Mapping[str, Tensor]
    unknown_validation: Tensor
    names: Names
    known: list[int]

    @property
    def known_texts(self) -> list[str]:
        """What is written about the known classes in fine-tuning and after."""
        return [PROMPTS[0].format(self.names[label][0]) for label in self.known]

    @property
    def other_texts(self) -> list[str]:
        """Every name of another class."""
        others = [label for label in range(len(self.names)) if label not in self.known]
        return [PROMPTS[0].format(name) for label in others for name in self.names[label]]


METRICS: Mapping[str, Metric] = {
    "auroc": Metric("AUROC, mean over unknown sets (%)", percent=True),
    "fpr95": Metric("unknown accepted with 95 % of the known (%)", best="min", percent=True),
    "accuracy": Metric("accuracy on known classes (%)", percent=True),
    "modality_gap": Metric("modality gap", best="min"),
    "auroc_classes": Metric("AUROC against other classes (%)", percent=True),
    "auroc_kind": Metric("AUROC against the other kind (%)", percent=True),
    "auroc_noise": Metric("AUROC against noise (%)", percent=True),
    "mcm_auroc": Metric("AUROC by concept matching (%)", percent=True),
    "mcm_fpr95": Metric("unknown accepted, by concept matching (%)", best="min", percent=True),
    "scale": Metric("scale of the cosines", best=None),
    "learning_rate": Metric("learning rate chosen", best=None),
    "seconds": Metric("training time (s)", best="min"),
}
RATES = (1e-4, 3e-4, 1e-3)
WRONG_CAPTIONS = 0.4


def frozen(trial: Trial) -> Result:
    """The pre-trained model as it is."""
    world = _world(trial)
    return Result(_measured(_pretrained_towers(trial, world), world))


def tune(trial: Trial, *, loss: AlignmentLoss, centre: bool = False) -> Result:
    """Fine-tune a small image-text model on six classes, then tell images of these from all others.

    A CNN and a recurrent network over characters are trained together on clothes and digits with captions (a name or
    synonym within a prompt), of which some are of another image, as on the web. Then they are fine-tuned on six of the
    ten classes of clothes, which the seed chooses, with the class's name in a prompt as text. Unknown in the test are
    two more of its classes, the other kind, and noise; images are ranked by the negative-label score, with that half
    of the other classes' names as negatives that is least like the known ones, or by maximum concept matching. At the
    smoke budget the two kinds are digits and mirrored digits.

    The learning rate is the one of `RATES` with the largest sum, on held-out images, of the accuracy on the known
    classes and the AUROC against the kind's last two classes, which are in no test: accuracy alone would choose rates
    that make the model forget what it knew of other things.

    Args:
        trial: seed and budget.
        loss: called (image embeddings, text embeddings, scale, labels), where the text is the prompt with the name of
            the image's class.
        centre: afterwards take the mean of the known images' and of the known texts' embeddings away.
    """
    world = _world(trial)
    model = _pretrained_towers(trial, world)
    tried: list[tuple[float, _Tuned, float]] = []
    for rate in RATES:
        tuned = _tuned(trial, model, world, loss, rate)
        if centre:
            _centre(tuned.model, world)
        tried.append((_validated(tuned.model, world), tuned, rate))
        trial.report(len(tried) / len(RATES))
    _, chosen, rate = max(tried, key=lambda each: each[0])
    epochs = [float(epoch + 1) for epoch in range(len(chosen.gaps))]
    return Result(
        {**_measured(chosen.model, world), "learning_rate": rate, "seconds": chosen.seconds},
        {"modality_gap": Curve(epochs, chosen.gaps)},
    )


def _world(trial: Trial) -> _World:
    # Of both kinds the same number is seen in pre-training.
    seen, tuning, held, tested = trial.pick(
        smoke=(500, 400, 200, 400), laptop=(3_000, 6_000, 1_500, 4_000), paper=(20_000, 20_000, 5_000, 10_000)
    )
    if trial.budget == "smoke":
        upright = load("digits")
        mirrored = [("mirrored " + names[0], "reversed " + names[0]) for names in DIGITS]
        parts = [(upright, False, DIGITS), (upright, True, tuple(mirrored))]
    else:
        parts = [(load("fashion_mnist"), False, CLOTHES), (load("mnist"), False, DIGITS)]
    train, test = [], []
    for stream, (data, mirror, _) in enumerate(parts):
        some = data.subset(seen + tuning + held, tested, generator=trial.generator(10 + stream))
        x_train, x_test = (x.flip(3) if mirror else x for x in (some.x_train, some.x_test))
        train.append(_Images(x_train, some.y_train))
        test.append(_Images(x_test, some.y_test))
    pretraining = [images.first(seen) for images in train]
    held_out = train[0].after(seen + tuning)
    order = torch.randperm(10, generator=trial.generator(12)).tolist()
    known = sorted(order[:6])
    noise = torch.rand(test[0].x[: tested // 4].shape, generator=trial.generator(13))
    unknown = {"classes": test[0].of(order[6:8]).x, "kind": test[1].x[: tested // 4], "noise": noise}
    return _World(
        _Images(torch.cat([p.x for p in pretraining]), torch.cat([pretraining[0].y, pretraining[1].y + 10])).to(
            trial.device
        ),
        train[0].after(seen).first(tuning).of(known).to(trial.device),
        held_out.of(known).to(trial.device),
        test[0].of(known).to(trial.device),
        {name: x.to(trial.device) for name, x in unknown.items()},
        held_out.of(order[8:]).x.to(trial.device),
        parts[0][2] + parts[1][2],
        known,
    )


def _towers(trial: Trial, world: _World) -> TwoTowers:
    with torch.random.fork_rng():
        torch.manual_seed(trial.seed)
        return TwoTowers(tuple(world.train.x.shape[1:])).to(trial.device)


def _pretrained_towers(trial: Trial, world: _World) -> TwoTowers:
    model = _towers(trial, world)
    key = f"clothes and digits with captions, seed {trial.seed}"
    return trained_once(trial, model, lambda: _pretrain(trial, model, world), key=key)


@torch.no_grad()
def _centre(model: TwoTowers, world: _World) -> None:
    model.image.head.bias.sub_(predict(model.image, world.train.x).mean(0))
    model.text.head.bias.sub_(model.text(world.known_texts).mean(0))


def _pretrain(trial: Trial, model: TwoTowers, world: _World) -> None:
    """By CLIP's loss on images and captions, both towers."""
    generator = trial.generator(2)
    x, y = world.pretraining.x, world.pretraining.y.cpu()
    captions = [prompt.format(name) for names in world.names for name in names for prompt in PROMPTS]
    per_class = torch.tensor([len(names) * len(PROMPTS) for names in world.names])
    starts = per_class.cumsum(0) - per_class
    epochs, batch_size = trial.pick(smoke=4, laptop=5, paper=20), 128
    steps = epochs * (len(y) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1, cycle_momentum=False)
    for _ in range(epochs):
        for index in torch.randperm(len(y), generator=generator)[: steps // epochs * batch_size].view(-1, batch_size):
            # A wrong caption is that of some image of the set.
            strayed = y[torch.randint(len(y), (batch_size,), generator=generator)]
            wrong = torch.rand(batch_size, generator=generator) < WRONG_CAPTIONS
            about = torch.where(wrong, strayed, y[index])
            caption = starts[about] + (torch.rand(batch_size, generator=generator) * per_class[about]).long()
            written, place = caption.unique(return_inverse=True)
            texts = model.text([captions[number] for number in written.tolist()])[place.to(x.device)]
            _step(
                model, optimizer, cross_modal_alignment(model.image(x[index.to(x.device)]), texts, model.scale, lam=0)
            )
            schedule.step()


def _step(model: TwoTowers, optimizer: torch.optim.Optimizer, value: Tensor) -> None:
    descent_step(optimizer, value)
    with torch.no_grad():
        model.log_scale.clamp_(max=torch.tensor(_MAX_SCALE).log().item())


@dataclass(frozen=True)
class _Tuned:
    """A fine-tuned model, the seconds in its steps, and the modality gap of held-out images after each epoch."""

    model: TwoTowers
    seconds: float
    gaps: list[float]


def _tuned(trial: Trial, pretrained: TwoTowers, world: _World, loss: AlignmentLoss, rate: float) -> _Tuned:
    model, order = copy.deepcopy(pretrained), trial.generator(3)
    x, y = world.train.x, world.train.y
    epochs, batch_size = trial.pick(smoke=2, laptop=6, paper=10), min(128, len(y))
    steps = len(y) // batch_size
    # Weight decay and schedule are the authors'.
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs * steps, pct_start=0.1, cycle_momentum=False)
    watch, gaps = Stopwatch(trial.device), []
    for _ in range(epochs):
        with watch:
            model.train()
            for index in torch.randperm(len(y), generator=order)[: steps * batch_size].view(steps, -1).to(x.device):
                images, texts = model.image(x[index]), model.text(world.known_texts)[y[index]]
                _step(model, optimizer, loss(images, texts, model.scale, y[index]))
                schedule.step()
        gaps.append(_gap(model, world.validation, world.known_texts))
    return _Tuned(model, watch.seconds, gaps)


@torch.no_grad()
def _accuracy(model: TwoTowers, images: _Images, texts: Sequence[str]) -> float:
    cosines = predict(model.image, images.x) @ F.normalize(model.text(texts), dim=1).T
    return float((cosines.argmax(1) == images.y).double().mean())


@torch.no_grad()
def _gap(model: TwoTowers, images: _Images, texts: Sequence[str]) -> float:
    """Between images and the text of each one's class."""
    return float(modality_gap(predict(model.image, images.x), model.text(texts)[images.y]))


@torch.no_grad()
def _label_embeddings(model: TwoTowers, world: _World) -> tuple[Tensor, Tensor]:
    """Of the known classes, and of the half of the other names that is least like them."""
    known, others = model.text(world.known_texts), model.text(world.other_texts)
    return known, others[mine_negative_labels(others, known, len(others) // 2)]


@torch.no_grad()
def _validated(model: TwoTowers, world: _World) -> float:
    """What the learning rate is chosen by."""
    known, negatives = _label_embeddings(model, world)
    images = predict(model.image, torch.cat([world.validation.x, world.unknown_validation]))
    is_known = torch.arange(len(images), device=images.device) < len(world.validation.y)
    detected = auroc(neglabel_log_odds(images, known, negatives), is_known)
    return _accuracy(model, world.validation, world.known_texts) + detected


@torch.no_grad()
def _measured(model: TwoTowers, world: _World) -> dict[str, float]:
    known, negatives = _label_embeddings(model, world)

    def ranked(score: Callable[[Tensor], Tensor]) -> tuple[dict[str, float], float]:
        """AUROC against each unknown set, and the mean share of them that passes where 95 % of the known do."""
        known_scores = score(predict(model.image, world.test.x))
        aurocs, passed = {}, []
        for name, x in world.unknown.items():
            scores = torch.cat([known_scores, score(predict(model.image, x))])
            is_known = torch.arange(len(scores), device=scores.device) < len(known_scores)
            aurocs[name] = auroc(scores, is_known)
            # Found unknown where at most 5 % of the known are taken for unknown; the rest of them passes.
            passed.append(1 - tpr_at_far(-scores, ~is_known, far=0.05))
        return aurocs, sum(passed) / len(passed)

    by_negatives, passed = ranked(lambda images: neglabel_log_odds(images, known, negatives))
    by_matching, passed_matching = ranked(lambda images: mcm_score(images, known))
    return {
        "auroc": sum(by_negatives.values()) / len(by_negatives),
        "fpr95": passed,
        "accuracy": _accuracy(model, world.test, world.known_texts),
        "modality_gap": _gap(model, world.test, world.known_texts),
        **{f"auroc_{name}": value for name, value in by_negatives.items()},
        "mcm_auroc": sum(by_matching.values()) / len(by_matching),
        "mcm_fpr95": passed_matching,
        "scale": float(model.scale),
    }
