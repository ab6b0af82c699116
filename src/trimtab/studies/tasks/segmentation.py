"""Segmentation of clothes on textured ground, with masks that may be coarse or of doubtful borders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, Protocol, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.data import load
from trimtab.losses.calibration import expected_calibration_error
from trimtab.losses.classwise_calibration import classwise_calibration_error
from trimtab.nets.unet import UNet
from trimtab.studies.lr_search import best_learning_rate
from trimtab.studies.study import Arm, Curve, Metric, Result, Task, Trial
from trimtab.studies.training import Fit, Plan, fit, predict

Masks = Literal["clean", "coarse", "ambiguous"]
# Tops, trousers, shoes, and 0 for what is left out; the digits of the smoke budget fall into as many groups.
GROUP = torch.tensor([1, 2, 1, 0, 1, 3, 1, 3, 0, 3])
NUM_CLASSES = 4


@dataclass(frozen=True)
class Batch:
    """Some images and the masks to train on.

    Attributes:
        x: images.
        y: masks, a class for every pixel.
        index: where the images stand in the training set.
        view: draws a copy of the images, mirrored, shifted, lit anew and with noise at random, and its masks.
    """

    x: Float[Tensor, "batch channels height width"]
    y: Int[Tensor, "batch height width"]
    index: Int[Tensor, " batch"]
    view: Callable[[], tuple[Tensor, Tensor]]


class Objective(Protocol):
    """What a step minimises, an `nn.Module`.

    `set_epoch(epoch)` is called where it exists, and so is, after training and of a corrector too,
    `measure(masks)`, which returns numbers under names of the task's metrics from the masks given at first.
    """

    def __call__(self, net: UNet, batch: Batch) -> Tensor: ...


# Called after each epoch with (epoch, the masks trained on, a function that predicts the training images' classes).
Corrector = Callable[[int, Tensor, Callable[[], Tensor]], Tensor]
ObjectiveFactory = Callable[[Plan], nn.Module] | Callable[[Plan, float], nn.Module]
CorrectorFactory = Callable[[Plan], Corrector]


class Pixelwise(nn.Module):
    """A plain loss of logits (batch, classes, height, width) and masks as an objective.

    Args:
        loss: called as `loss(logits, masks)`.
        augment: train on random views instead of the images as they are.
    """

    def __init__(self, loss: nn.Module, augment: bool = False) -> None:
        super().__init__()
        self.loss, self.augment = loss, augment

    def forward(self, net: UNet, batch: Batch) -> Tensor:
        x, y = batch.view() if self.augment else (batch.x, batch.y)
        value: Tensor = self.loss(net(x), y)
        return value


@dataclass(frozen=True)
class Scenes:
    """Images and masks; `y` is what an annotator drew and `y_clean` what is there."""

    x: Float[Tensor, "n 1 side side"]
    y: Int[Tensor, "n side side"]
    y_clean: Int[Tensor, "n side side"]


@dataclass(frozen=True)
class Segmentation(Task):
    """Train a small U-Net to find and name clothes that were pasted, one to three of them, onto textured ground.

    Attributes:
        dataset: "fashion_mnist" or "mnist"; at the smoke budget always digits.
        masks: "clean"; "coarse": in training, every garment's mask is grown, shrunk or shifted by one or two pixels;
            "ambiguous": the images are blurred, and an annotator, of the test masks too, draws the border anywhere
            between the garment's first and last trace.
        sparse: share of training images with one garment of half the size or, every third of them, none.
        images: size of the training set at the laptop budget.

    Dice and intersection over union are means over classes of all test pixels, Dice without the ground, and for coarse
    masks they are measured against the clean ones. Boundary pixels have another class within two pixels. All train by
    Adam with a learning rate of 0.01, the best of 0.003, 0.01 and 0.03 for cross-entropy on ambiguous masks.
    """

    dataset: str = "fashion_mnist"
    masks: Masks = "clean"
    sparse: float = 0.0
    images: int = 400

    name: ClassVar[str] = "segmentation"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "dice": Metric("Dice (%)", percent=True),
        "miou": Metric("mean intersection over union (%)", percent=True),
        "ece": Metric("calibration error of pixels (%)", best="min", percent=True),
        "classwise_ece": Metric("classwise calibration error (%)", best="min", percent=True),
        "boundary_ece": Metric("calibration error at boundaries (%)", best="min", percent=True),
        "labels_right": Metric("training pixels with the right label (%)", percent=True),
        "knob": Metric("chosen setting", best=None),
        "weight_rank": Metric("rank correlation of a sample's weight with its labelled share"),
        "correction_spread": Metric("epochs from the first class corrected to the last", best=None),
        "seconds": Metric("training time (s)", best="min"),
    }

    def train(
        self,
        objective: ObjectiveFactory | None = None,
        corrector: CorrectorFactory | None = None,
        knobs: Sequence[float] | None = None,
    ) -> Arm:
        """A contestant that brings its objective, or corrects the masks after each epoch; else cross-entropy.

        With `knobs`, the objective is called with one of them too: the one of the lowest cross-entropy on validation
        images, annotated as the training images are, in trainings of a third of the length.
        """
        return self.arm(objective=objective, corrector=corrector, knobs=knobs)

    def run(
        self,
        trial: Trial,
        objective: ObjectiveFactory | None = None,
        corrector: CorrectorFactory | None = None,
        knobs: Sequence[float] | None = None,
        **options: Any,
    ) -> Result:
        data = load("digits" if trial.budget == "smoke" else self.dataset)
        garments, groups = data.x_train, GROUP[data.y_train]
        count = trial.pick(smoke=24, laptop=self.images, paper=10 * self.images)
        draws = trial.generator()
        train = self._draw(garments, groups, count, draws, sparse=self.sparse)
        held_out = self._draw(garments, groups, max(8, count // 3), draws, sparse=self.sparse)
        tested = trial.pick(smoke=16, laptop=300, paper=1000)
        test = self._draw(data.x_test, GROUP[data.y_test], tested, draws, sparse=0.0)
        truth = test.y if self.masks == "ambiguous" else test.y_clean
        x, y = train.x.to(trial.device), train.y.to(trial.device)
        x_test, truth = test.x.to(trial.device), truth.to(trial.device)
        epochs = trial.pick(smoke=3, laptop=30, paper=100)

        def fitted(
            epochs: int, make: Callable[[Plan], nn.Module], after_epoch: Callable[[UNet, int], None], trial: Trial
        ) -> tuple[UNet, Fit]:
            with torch.random.fork_rng():
                torch.manual_seed(trial.seed)
                net = UNet(1, NUM_CLASSES).to(trial.device)
            done = fit(
                _Deferred(net),
                x,
                y,
                num_classes=NUM_CLASSES,
                epochs=epochs,
                trial=trial,
                batch_size=8,
                loss=lambda plan: _Criterion(net, make(plan), partial(random_view, generator=trial.generator(4))),
                optimizer=lambda parameters, plan: torch.optim.Adam(parameters, lr=1e-2),
                after_epoch=lambda epoch: after_epoch(net, epoch),
            )
            return net, done

        make = cast(Callable[..., nn.Module], objective or _cross_entropy)
        knob = float("nan")
        if knobs is not None:

            def score(knob: float) -> float:
                quiet = replace(trial, report=lambda fraction: None)
                net, _ = fitted(max(1, epochs // 3), lambda plan: make(plan, knob), lambda net, epoch: None, quiet)
                logits = predict(net, held_out.x.to(trial.device), 100)
                return -F.cross_entropy(logits, held_out.y.to(trial.device)).item()

            knob = best_learning_rate(knobs, score)
            make = partial(_with_knob, make, knob)

        steps_per_epoch = count // min(8, count)
        correct = corrector(Plan(count, NUM_CLASSES, epochs, steps_per_epoch)) if corrector else None
        scores: list[float] = []

        def after_epoch(net: UNet, epoch: int) -> None:
            scores.append(overlaps(predict(net, x_test, 100).argmax(1), truth)[1])
            if correct is not None:
                y.copy_(correct(epoch, y, lambda: predict(net, x, 100).softmax(1)))

        contestants: list[object] = [correct]

        def kept(plan: Plan) -> nn.Module:
            contestants.append(objective := make(plan))
            return objective

        net, done = fitted(epochs, kept, after_epoch, trial)
        own = {"weight_rank": float("nan"), "correction_spread": float("nan")}
        for contestant in contestants:
            if callable(measure := getattr(contestant, "measure", None)):
                own |= measure(train.y)
        probs = predict(net, x_test, 100).softmax(1)
        dice, miou = overlaps(probs.argmax(1), truth)
        pixels, labels, border = probs.movedim(1, -1).reshape(-1, NUM_CLASSES), truth.flatten(), boundary(truth)
        return Result(
            {
                "dice": dice,
                "miou": miou,
                "ece": expected_calibration_error(pixels, labels),
                "classwise_ece": classwise_calibration_error(pixels, labels),
                "boundary_ece": expected_calibration_error(pixels[border.flatten()], labels[border.flatten()]),
                "labels_right": (y.cpu() == train.y_clean).float().mean().item(),
                "knob": knob,
                **own,
                "seconds": done.seconds,
            },
            {"miou": Curve([float(epoch + 1) for epoch in range(epochs)], scores)},
        )

    def _draw(
        self, garments: Tensor, groups: Tensor, count: int, generator: torch.Generator, *, sparse: float
    ) -> Scenes:
        garments = F.avg_pool2d(garments, garments.shape[-1] // 14 or 1)
        side = 2 * garments.shape[-1]
        x, y, amount = compose(garments, groups, count, side, sparse, generator)
        if self.masks == "ambiguous":
            return Scenes(blur(x, 1.0), ambiguous_masks(amount, y, generator), y)
        return Scenes(x, coarse_masks(y, generator) if self.masks == "coarse" else y, y)


def _cross_entropy(plan: Plan) -> nn.Module:
    return Pixelwise(nn.CrossEntropyLoss())


def _with_knob(make: Callable[[Plan, float], nn.Module], knob: float, plan: Plan) -> nn.Module:
    return make(plan, knob)


class _Deferred(nn.Module):
    """Hands the images on to the objective, which calls the network as often as it likes."""

    def __init__(self, net: UNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return x


class _Criterion(nn.Module):
    """The objective in the form that the training loop calls."""

    def __init__(
        self, net: UNet, objective: nn.Module, view: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    ) -> None:
        super().__init__()
        self.objective, self.view = objective, view
        self._net = [net]  # not a submodule: the loop has its parameters already

    def set_epoch(self, epoch: int) -> None:
        if callable(found := getattr(self.objective, "set_epoch", None)):
            found(epoch)

    def forward(self, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        value: Tensor = self.objective(self._net[0], Batch(x, y, index, lambda: self.view(x, y)))
        return value


def compose(
    garments: Float[Tensor, "m 1 h w"],
    groups: Int[Tensor, " m"],
    count: int,
    side: int,
    sparse: float,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "n 1 side side"], Int[Tensor, "n side side"], Float[Tensor, "n 1 side side"]]:
    """Paste garments of classes drawn evenly onto textured ground; later ones cover earlier ones.

    Returns:
        Images, masks (0 for the ground), and how much of each pixel is garment, before the mask's threshold.
    """
    coarse = F.interpolate(
        torch.rand(count, 1, side // 4, side // 4, generator=generator), size=(side, side), mode="bicubic"
    )
    x = (0.3 * coarse + 0.05 * torch.randn(count, 1, side, side, generator=generator)).clamp(0, 1)
    y = torch.zeros(count, side, side, dtype=torch.int64)
    amount = torch.zeros(count, 1, side, side)
    members = [(groups == label).nonzero().flatten() for label in range(1, NUM_CLASSES)]
    is_sparse = torch.rand(count, generator=generator) < sparse
    for image in range(count):
        pasted = int(torch.randint(1, 4, (), generator=generator))
        if is_sparse[image]:
            pasted = int(torch.randint(3, (), generator=generator) > 0)
        for _ in range(pasted):
            label = int(torch.randint(1, NUM_CLASSES, (), generator=generator))
            candidates = members[label - 1]
            garment = garments[candidates[torch.randint(len(candidates), (), generator=generator)]]
            if is_sparse[image]:
                garment = F.avg_pool2d(garment, 2)
            size = garment.shape[-1]
            top, left = torch.randint(side - size + 1, (2,), generator=generator).tolist()
            window = (slice(top, top + size), slice(left, left + size))
            seen = garment[0] > 0.2
            x[image, 0][window][seen] = garment[0][seen]
            y[image][window][seen] = label
            amount[image, 0][window] = torch.maximum(amount[image, 0][window], seen.float())
    return x, y, amount


def blur(x: Float[Tensor, "n 1 h w"], sigma: float = 1.5) -> Float[Tensor, "n 1 h w"]:
    """Gaussian blur, with the borders repeated outwards."""
    radius = int(3 * sigma)
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    taps = taps / taps.sum()
    padded = F.pad(x, (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, taps.view(1, 1, 1, -1)), taps.view(1, 1, -1, 1))


def coarse_masks(y: Int[Tensor, "n h w"], generator: torch.Generator) -> Int[Tensor, "n h w"]:
    """Masks of which every class was grown (2 of 5), shrunk (2 of 5) or shifted (1 of 5) by 1 or 2 pixels."""
    coarse = torch.zeros_like(y)
    for image in range(len(y)):
        for label in y[image].unique().tolist():
            if label == 0:
                continue
            mask = (y[image] == label).float()[None, None]
            kind = int(torch.randint(5, (), generator=generator))
            reach = int(torch.randint(1, 3, (), generator=generator))
            if kind < 2:
                mask = F.max_pool2d(mask, 2 * reach + 1, 1, reach)
            elif kind < 4:
                mask = 1 - F.max_pool2d(1 - mask, 2 * reach + 1, 1, reach)
            else:
                padded = F.pad(mask, (reach,) * 4)
                top, left = (2 * reach * torch.randint(2, (2,), generator=generator)).tolist()
                mask = padded[:, :, top : top + mask.shape[2], left : left + mask.shape[3]]
            coarse[image][mask[0, 0] > 0] = label
    return coarse


def ambiguous_masks(
    amount: Float[Tensor, "n 1 h w"], y: Int[Tensor, "n h w"], generator: torch.Generator
) -> Int[Tensor, "n h w"]:
    """Masks with the border where the blurred garment passes a level of the annotator's, between 0.15 and 0.85."""
    level = 0.15 + 0.7 * torch.rand(len(y), 1, 1, generator=generator)
    # A pixel outside its garment takes the class of the nearest one, found by growing the classes step by step.
    nearest = y.clone()
    for _ in range(4):
        grown = F.max_pool2d(nearest.float()[:, None], 3, 1, 1)[:, 0].long()
        nearest = torch.where(nearest == 0, grown, nearest)
    return torch.where(blur(amount)[:, 0] > level, nearest, 0)


def random_view(
    x: Float[Tensor, "n 1 h w"], y: Int[Tensor, "n h w"], generator: torch.Generator, reach: int = 4
) -> tuple[Tensor, Tensor]:
    """Every image mirrored or not, shifted by up to `reach` pixels, lit anew and with noise, and its mask likewise."""
    count, side = len(y), y.shape[-1]
    flip = torch.rand(count, generator=generator).to(x.device) < 0.5
    x = torch.where(flip.view(-1, 1, 1, 1), x.flip(-1), x)
    y = torch.where(flip.view(-1, 1, 1), y.flip(-1), y)
    places = torch.arange(side, device=x.device)
    offsets = torch.randint(-reach, reach + 1, (2, count, 1), generator=generator).to(x.device)
    rows, columns = (places + offsets).clamp(0, side - 1)
    image = torch.arange(count, device=x.device)[:, None, None]
    x, y = x[image, 0, rows[:, :, None], columns[:, None]][:, None], y[image, rows[:, :, None], columns[:, None]]
    light = (0.8 + 0.4 * torch.rand(count, 1, 1, 1, generator=generator)).to(x)
    noise = 0.05 * torch.randn(x.shape, generator=generator)
    return x * light + noise.to(x), y


def overlaps(predicted: Int[Tensor, "n h w"], truth: Int[Tensor, "n h w"]) -> tuple[float, float]:
    """Dice, mean over the classes but the ground, and intersection over union, mean over all classes."""
    pairs = torch.bincount((NUM_CLASSES * truth + predicted).flatten(), minlength=NUM_CLASSES**2)
    table = pairs.view(NUM_CLASSES, NUM_CLASSES).double()
    both, either = table.diag(), table.sum(0) + table.sum(1)
    dice, iou = 2 * both / either.clamp(min=1), both / (either - both).clamp(min=1)
    there = either > 0
    return float(dice[1:][there[1:]].mean()), float(iou[there].mean())


def boundary(truth: Int[Tensor, "n h w"], reach: int = 2) -> Tensor:
    """Which pixels have another class within `reach` pixels."""
    labels = truth.float()[:, None]
    highest = F.max_pool2d(labels, 2 * reach + 1, 1, reach)
    lowest = -F.max_pool2d(-labels, 2 * reach + 1, 1, reach)
    return (highest != lowest)[:, 0]
