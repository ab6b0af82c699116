"""Compressing a classifier: what it may need, the data and steps that there are, fine-tuning, and pruning."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.compress.cost import ModelCost, model_cost
from trimtab.compress.fake_quant import recalibrate_bn
from trimtab.nets import Classifier
from trimtab.studies.engine.study import Trial
from trimtab.studies.tools.descent import descent_step
from trimtab.studies.tools.images import Images

Measure = Literal["size", "operations"]


@dataclass(frozen=True)
class Target:
    """What the compressed model may need, and no more: as much as a network of this many bits.

    Attributes:
        bits: of the quantised network's weights and inputs; its first and last layers have `ends` bits.
        ends: 8, or `bits` where that is more.
        of: whether the size or the operations are what may not be exceeded.
        size: bits of all weights, as `model_cost` counts them.
        operations: bit operations per sample, as `model_cost` counts them.
    """

    bits: int
    ends: int
    of: Measure
    size: float
    operations: float

    @property
    def limit(self) -> float:
        """The size, or the operations."""
        return self.size if self.of == "size" else self.operations

    def spent(self, cost: ModelCost) -> float:
        """What a model needs, as a part of what it may."""
        return (cost.size if self.of == "size" else cost.operations) / self.limit


@dataclass(frozen=True)
class CompressionData:
    """What a contestant may look at.

    Attributes:
        images: training and held-out images; of the test images nothing may be used.
        steps: how many steps of fine-tuning everyone may take, of `batch_size` images each.
        batch_size: of fine-tuning.
        key: names the images and the trained model, for parts of a run that are kept.
    """

    images: Images
    steps: int
    batch_size: int
    key: str = ""

    @property
    def sample(self) -> Tensor:
        """Training images to calibrate on, 256 at most."""
        return self.images.x[:256]


def fine_tune(
    model: nn.Module,
    data: CompressionData,
    trial: Trial,
    *,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    after_step: Callable[[int], None] | None = None,
    steps: int | None = None,
    stream: int = 11,
) -> None:
    """Train a compressed model in place by Adam, at the setting's rate, annealed to zero, and take statistics anew.

    Args:
        model: it is put into training mode.
        data: the images, and how many steps.
        trial: source of the order of images, of what layers draw, and of the setting's `lr`.
        loss: of logits, labels and images; cross-entropy if None.
        after_step: called with the 0-based step.
        steps: fewer than everyone may take, for methods that use the others in another way.
        stream: of the order of images.
    """
    images, total = data.images, data.steps if steps is None else min(steps, data.steps)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=float(trial.setting.get("lr", 1e-3)))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(total, 1))
    order = trial.generator(stream)

    def train() -> None:
        for step in range(total):
            index = torch.randint(len(images.y), (data.batch_size,), generator=order).to(images.y.device)
            x, y = images.x[index], images.y[index]
            logits = model(x)
            value = F.cross_entropy(logits, y) if loss is None else loss(logits, y, x)
            descent_step(optimizer, value)
            schedule.step()
            if after_step is not None:
                after_step(step)

    model.train()
    trial.seeded(train, stream=stream)
    recalibrate_bn(model, images.x[:1024].split(256))
    model.eval()


def masks_within(target: Target, model: Classifier, data: CompressionData, scores: Sequence[Tensor]) -> list[Tensor]:
    """Masks of weights that keep the highest scores of all layers together, as many as the target allows.

    Args:
        target: what may be needed.
        model: its weights are floats.
        data: for the shape of an image.
        scores: of the weights of each layer, in order.
    """
    layers = model_cost(model, data.sample[:1]).layers
    order = torch.cat([score.flatten() for score in scores]).argsort(descending=True, stable=True)
    if target.of == "size":
        total = sum(layer.weights for layer in layers)
        kept = int((target.size - total) // 32)
    else:
        each = [layer.dense_multiply_adds / layer.weights * 32 * 32 for layer in layers]
        spent = torch.cat([torch.full((s.numel(),), e, dtype=torch.float64) for s, e in zip(scores, each, strict=True)])
        kept = int((spent.to(order.device)[order].cumsum(0) <= target.operations).sum())
    flat = torch.zeros(len(order), device=order.device)
    flat[order[: max(kept, 1)]] = 1
    parts = flat.split([score.numel() for score in scores])
    return [part.view_as(score) for part, score in zip(parts, scores, strict=True)]


def convolutions(model: Classifier) -> list[nn.Conv2d]:
    """The convolutions of the task's network, in order."""
    return [layer for layer in cast(nn.Sequential, model.features) if isinstance(layer, nn.Conv2d)]


def filters_within(target: Target, model: Classifier, data: CompressionData, scores: Sequence[Tensor]) -> list[Tensor]:
    """Indices of the filters of the highest scores, as large a share in every layer as the target allows.

    Args:
        target: what may be needed.
        model: whose filters are chosen.
        data: for the shape of an image.
        scores: of the filters of each convolution, in order.
    """
    largest = max(len(score) for score in scores)
    for count in range(largest, 0, -1):
        kept = [score.topk(max(1, len(score) * count // largest)).indices.sort().values for score in scores]
        if target.spent(model_cost(thinner(model, kept), data.sample[:1])) <= 1:
            return kept
    raise ValueError("target must allow one filter a layer, got less")


def thinner(model: Classifier, kept: Sequence[Tensor]) -> Classifier:
    """A copy of the task's network that has only some of its filters, with their weights and statistics.

    Args:
        model: it is left as it is.
        kept: indices of filters of each convolution, in order.
    """
    rows = list(kept)
    columns: list[Tensor | None] = [None, *rows]
    layers: list[nn.Module] = []
    number = -1
    for layer in cast(nn.Sequential, model.features):
        made = copy.deepcopy(layer)
        if isinstance(made, nn.Conv2d):
            number += 1
            weight = made.weight.detach()[rows[number]]
            before = columns[number]
            weight = weight if before is None else weight[:, before]
            made.weight = nn.Parameter(weight.clone())
            made.out_channels, made.in_channels = weight.shape[:2]
        elif isinstance(made, nn.BatchNorm2d):
            held = rows[number]
            made.num_features = len(held)
            made.weight = nn.Parameter(made.weight.detach()[held].clone())
            made.bias = nn.Parameter(made.bias.detach()[held].clone())
            made.running_mean, made.running_var = (
                cast(Tensor, stat)[held].clone() for stat in (made.running_mean, made.running_var)
            )
        layers.append(made)
    small = Classifier(nn.Sequential(*layers), len(rows[-1]), model.head.out_features)
    with torch.no_grad():
        small.head.weight.copy_(model.head.weight[:, rows[-1]])
        small.head.bias.copy_(model.head.bias)
    return small.to(model.head.weight.device).eval()
