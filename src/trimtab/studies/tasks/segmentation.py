"""Segmentation of clothes on textured ground, with masks that may be coarse, of doubtful borders, or nearly empty."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.data import load
from trimtab.losses.calibration import expected_calibration_error
from trimtab.losses.classwise_calibration import classwise_calibration_error
from trimtab.losses.nacl import SVLSLoss
from trimtab.nets.unet import UNet
from trimtab.studies.engine.study import Budget, Curve, Entrant, Metric, Result, Task, Trial
from trimtab.studies.tools.descent import descent_step
from trimtab.studies.tools.images import shown_epochs
from trimtab.studies.tools.masks import boundary, random_view
from trimtab.studies.tools.segmentation_losses import DiceAndCrossEntropy, FocalLoss, MarginLabelSmoothing
from trimtab.studies.tools.training import LossFactory, Plan, Training, Workbench, fit, predict

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

    `measure(masks)` is called after training if it exists, of a corrector too: it returns numbers under names of the
    task's metrics from the masks given at first.
    """

    def __call__(self, net: UNet, batch: Batch) -> Tensor: ...


# Called after each epoch with (epoch, the masks trained on, a function that predicts the training images' classes).
Corrector = Callable[[int, Tensor, Callable[[], Tensor]], Tensor]


@dataclass(frozen=True, kw_only=True)
class Segmenter(Entrant):
    """What a contestant brings; what it leaves out is cross-entropy on the masks as they are.

    Attributes:
        loss: makes a loss of logits (batch, classes, height, width) and masks.
        objective: makes, in place of a loss, what a step minimises from the network and a batch.
        corrector: makes what changes the training masks after each epoch.
    """

    loss: LossFactory | None = None
    objective: Callable[[Plan], nn.Module] | None = None
    corrector: Callable[[Plan], Corrector] | None = None

    def __post_init__(self) -> None:
        if self.loss and self.objective:
            raise ValueError("objective must stand without a loss, which it is in place of")


class Pixelwise(nn.Module):
    """A plain loss of logits and masks as an objective.

    Args:
        loss: called as `loss(logits, masks)`.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, net: UNet, batch: Batch) -> Tensor:
        value: Tensor = self.loss(net(batch.x), batch.y)
        return value


@dataclass(frozen=True)
class Scenes:
    """Images and masks; `y` is what an annotator drew and `y_clean` what is there."""

    x: Float[Tensor, "n 1 side side"]
    y: Int[Tensor, "n side side"]
    y_clean: Int[Tensor, "n side side"]


class Segmenting:
    """Trains a U-Net by an entrant's objective, as the training loop asks for."""

    def __init__(self, bench: Workbench, entrant: Segmenter) -> None:
        plan = bench.plan
        self.bench = bench
        self.network: UNet = bench.network()  # type: ignore[assignment]
        loss = entrant.loss(plan) if entrant.loss else nn.CrossEntropyLoss()
        self.objective = (entrant.objective(plan) if entrant.objective else Pixelwise(loss)).to(bench.device)
        self.corrector = entrant.corrector(plan) if entrant.corrector else None
        self.optimizers = [torch.optim.Adam(self.network.parameters(), lr=1e-2)]
        self.views = bench.trial.generator(4)
        self.epoch = 0

    def step(self, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        self.network.train()
        value: Tensor = self.objective(self.network, Batch(x, y, index, partial(random_view, x, y, self.views)))
        return descent_step(self.optimizers[0], value)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network.eval()(x)
        return logits

    def after_epoch(self) -> None:
        if self.corrector is not None:
            bench = self.bench
            bench.y.copy_(self.corrector(self.epoch, bench.y, lambda: predict(self, bench.x, 100).softmax(1)))
        self.epoch += 1


@dataclass(frozen=True)
class Segmentation(Task[Segmenter]):
    """Train a small U-Net to find and name clothes that were pasted, one to three of them, onto textured ground.

    Dice and intersection over union are means over classes of all test pixels, Dice without the ground, and for coarse
    masks they are measured against the clean ones. Boundary pixels have another class within two pixels. All train by
    Adam with a learning rate of 0.01, for 20 epochs at the laptop budget. A contestant with a strength of its own
    chooses among four at most, by the cross-entropy on held-out images that are annotated as the training images are;
    most had chosen the weakest of three, and a weaker one was added.

    Attributes:
        dataset: "fashion_mnist" or "mnist"; at the smoke budget always digits.
        masks: "clean"; "coarse": in training, every garment's mask is grown, shrunk or shifted by one or two pixels;
            "ambiguous": the images are blurred, and an annotator, of the test masks too, draws the border anywhere
            between the garment's first and last trace.
        sparse: share of training images with one garment of half the size or, every third of them, none.
        images: size of the training set at the laptop budget.
    """

    dataset: str = "fashion_mnist"
    masks: Masks = "clean"
    sparse: float = 0.0
    images: int = 240

    name: ClassVar[str] = "segmentation"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "dice": Metric("Dice score (%)", percent=True),
        "miou": Metric("mean intersection over union (%)", percent=True),
        "ece": Metric("calibration error of pixels (%)", best="min", percent=True),
        "classwise_ece": Metric("classwise calibration error (%)", best="min", percent=True),
        "boundary_ece": Metric("calibration error at boundaries (%)", best="min", percent=True),
        "labels_right": Metric("training pixels with the right label (%)", percent=True),
        "weight_rank": Metric("rank correlation of a sample's weight with its labelled share"),
        "correction_spread": Metric("epochs from the first class corrected to the last", best=None),
        "seconds": Metric("training time (s)", best="min"),
    }
    accepts: ClassVar[type[Segmenter]] = Segmenter
    tries: ClassVar[int] = 4
    seeds: ClassVar[Mapping[Budget, int]] = {"smoke": 1, "laptop": 5, "paper": 5}
    cost: ClassVar[float] = 8.0

    def __post_init__(self) -> None:
        if self.masks not in get_args(Masks):
            raise ValueError(f"masks must be one of {', '.join(get_args(Masks))}, got {self.masks!r}")
        if not 0 <= self.sparse <= 1:
            raise ValueError(f"sparse must be in [0, 1], got {self.sparse}")

    @classmethod
    def variants(cls) -> Mapping[str, Task[Any]]:
        return {
            "coarse masks": coarse,
            "ambiguous masks": ambiguous,
            "sparse images": sparse,
            "half of the sparse images": half_sparse,
        }

    @classmethod
    def references(cls) -> Mapping[str, Segmenter]:
        return {
            "cross-entropy": Segmenter(),
            "Dice and cross-entropy": Segmenter(loss=lambda plan: DiceAndCrossEntropy()),
            "label smoothing": Segmenter(
                loss=lambda plan: nn.CrossEntropyLoss(label_smoothing=plan.setting["mass"]),
                search={"mass": (0.01, 0.03, 0.1, 0.3)},
            ),
            "focal loss": Segmenter(
                loss=lambda plan: FocalLoss(plan.setting["gamma"]), search={"gamma": (0.5, 1.0, 2.0, 3.0)}
            ),
            "MbLS": Segmenter(
                loss=lambda plan: MarginLabelSmoothing(plan.setting["margin"]),
                search={"margin": (3.0, 5.0, 10.0, 20.0)},
            ),
            "SVLS": Segmenter(
                loss=lambda plan: SVLSLoss(plan.num_classes, sigma=plan.setting["sigma"]),
                search={"sigma": (0.3, 0.5, 1.0, 2.0)},
            ),
        }

    def run(self, trial: Trial, entrant: Segmenter) -> Result:
        train, held_out, test = self.scenes(trial)
        device, epochs = trial.device, trial.pick(smoke=3, laptop=20, paper=100)
        bench = Workbench(
            Training(),
            lambda: UNet(1, NUM_CLASSES, depth=2),
            (train.x.to(device), train.y.clone().to(device)),
            (held_out.x.to(device), held_out.y.to(device)),
            num_classes=NUM_CLASSES,
            epochs=epochs,
            trial=trial,
            batch_size=8,
        )
        rule = Segmenting(bench, entrant)
        if trial.searching:
            fit(bench, rule)
            return Result(score=-F.cross_entropy(predict(rule, bench.x_held, 100), bench.y_held).item())
        truth = (test.y if self.masks == "ambiguous" else test.y_clean).to(device)
        x_test = test.x.to(device)
        shown = sorted(shown_epochs(epochs))
        scores: list[float] = []

        def measure(epoch: int) -> None:
            if epoch in shown:
                scores.append(overlaps(predict(rule, x_test, 100).argmax(1), truth)[1])

        done = fit(bench, rule, after_epoch=measure)
        own: dict[str, float] = {}
        for part in (rule.objective, rule.corrector):
            if callable(found := getattr(part, "measure", None)):
                own |= found(train.y)
        probs = predict(rule, x_test, 100).softmax(1)
        dice, miou = overlaps(probs.argmax(1), truth)
        pixels, labels, border = probs.movedim(1, -1).reshape(-1, NUM_CLASSES), truth.flatten(), boundary(truth)
        return Result(
            {
                "dice": dice,
                "miou": miou,
                "ece": float(expected_calibration_error(pixels, labels)),
                "classwise_ece": float(classwise_calibration_error(pixels, labels)),
                "boundary_ece": float(expected_calibration_error(pixels[border.flatten()], labels[border.flatten()])),
                "labels_right": (bench.y.cpu() == train.y_clean).float().mean().item(),
                **own,
                "seconds": done.seconds,
            },
            {"miou": Curve([float(epoch + 1) for epoch in shown], scores)},
        )

    def scenes(self, trial: Trial) -> tuple[Scenes, Scenes, Scenes]:
        """The trial's images to train on, to choose by, and to test on."""
        data = load(self.datasets(trial.budget)[0])
        count = trial.pick(smoke=24, laptop=self.images, paper=10 * self.images)
        tested = trial.pick(smoke=16, laptop=300, paper=1000)
        draws = trial.generator()
        train = self._draw(data.x_train, GROUP[data.y_train], count, draws, sparse=self.sparse)
        held_out = self._draw(data.x_train, GROUP[data.y_train], max(8, count // 3), draws, sparse=self.sparse)
        return train, held_out, self._draw(data.x_test, GROUP[data.y_test], tested, draws, sparse=0.0)

    def _draw(
        self, garments: Tensor, groups: Tensor, count: int, generator: torch.Generator, *, sparse: float
    ) -> Scenes:
        garments = F.avg_pool2d(garments, garments.shape[-1] // 14 or 1)
        side = 2 * garments.shape[-1]
        x, y, amount = compose(garments, groups, count, side, sparse, generator)
        if self.masks == "ambiguous":
            return Scenes(blur(x, 1.0), ambiguous_masks(amount, y, generator), y)
        return Scenes(x, coarse_masks(y, generator) if self.masks == "coarse" else y, y)


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


def overlaps(predicted: Int[Tensor, "n h w"], truth: Int[Tensor, "n h w"]) -> tuple[float, float]:
    """Dice, mean over the classes but the ground, and intersection over union, mean over all classes."""
    pairs = torch.bincount((NUM_CLASSES * truth + predicted).flatten(), minlength=NUM_CLASSES**2)
    table = pairs.view(NUM_CLASSES, NUM_CLASSES).double()
    both, either = table.diag(), table.sum(0) + table.sum(1)
    dice, iou = 2 * both / either.clamp(min=1), both / (either - both).clamp(min=1)
    there = either > 0
    return float(dice[1:][there[1:]].mean()), float(iou[there].mean())


coarse = Segmentation(masks="coarse")
ambiguous = Segmentation(masks="ambiguous")
sparse = Segmentation(sparse=0.6)
half_sparse = replace(sparse, images=120)
