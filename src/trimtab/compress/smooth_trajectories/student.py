"""The student: where it starts, on which images at first, and how far it comes from the expert."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from trimtab.ops.arguments import (
    class_indices,
    floating_tensor,
    integer,
    labels,
    non_negative,
    one_of,
    tensor_problem,
)

Weigh = Literal["all", "adaptive"]


def balance_factor(start: int, max_start: int) -> float:
    """What the student's loss is multiplied by: above 1 for late starts, where experts move little, below 1 for early.

    Args:
        start: epoch of the expert at which the student starts.
        max_start: starts are drawn below it.

    Example:
        >>> [round(balance_factor(start, 20), 4) for start in (0, 9, 10, 19)]
        [0.5568, 0.7325, 1.292, 1.7604]
    """
    half = integer("max_start", max_start) // 2
    distance = integer("start", start, 0) - half
    if distance >= 0:
        return math.log(distance + 8, 5)
    return 1 / math.log(8 - distance, 5)


def perturb(
    weights: Float[Tensor, " params"],
    model: nn.Module,
    alpha: float = 1.0,
    *,
    least_dims: int = 3,
    noise: Float[Tensor, " params"] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " params"]:
    """Multiplies kernels by one plus a random direction of length alpha, for each kernel tensor.

    Args:
        weights: of the model, as a vector.
        model: tells which of them are which.
        alpha: length of the direction, at least 0.
        least_dims: tensors of fewer dimensions stay as they are: 3 moves convolutions alone, as the authors do.
        noise: the directions, before they are scaled.
        generator: decides them otherwise; on the CPU.

    Raises:
        ValueError: `weights` or `noise` has not as many numbers as the model, or `alpha` is negative.

    Example:
        >>> model = nn.Linear(1, 2)
        >>> noise = torch.tensor([3.0, 4.0, 1.0, 1.0])
        >>> perturb(torch.tensor([1.0, 10.0, 5.0, 5.0]), model, least_dims=2, noise=noise)
        tensor([ 1.6000, 18.0000,  5.0000,  5.0000])
    """
    if problem := tensor_problem(weights=weights, noise=noise):
        raise TypeError(problem)
    if isinstance(least_dims, float):
        raise TypeError(f"least_dims must be an integer, got float {least_dims!r}")
    alpha = non_negative("alpha", alpha)
    count = sum(p.numel() for p in model.parameters())
    if noise is None:
        noise = torch.randn(count, generator=generator, dtype=weights.dtype).to(weights.device)
    for name, value in (("weights", weights), ("noise", noise)):
        if value.shape != (count,):
            raise ValueError(f"{name} must be {count} numbers, as the model has, got shape {tuple(value.shape)}")
    moved = []
    shapes = [p.shape for p in model.parameters()]
    sizes = [shape.numel() for shape in shapes]
    for part, direction, shape in zip(weights.split(sizes), noise.split(sizes), shapes, strict=True):
        moved.append(part if len(shape) < least_dims else part * (1 + alpha * direction / direction.norm()))
    return torch.cat(moved)


def representative_init(
    features: Float[Tensor, "n width"],
    images: Float[Tensor, "n ..."],
    targets: Int[Tensor, " n"],
    ipc: int,
    *,
    random_state: int | None = None,
) -> tuple[Float[Tensor, "synthetic ..."], Int[Tensor, " synthetic"]]:
    """First synthetic images: for each class the real ones nearest to the centres of k-means.

    Args:
        features: of the images, such as a trained network's logits.
        images, targets: the real data; classes are those that occur.
        ipc: images a class.
        random_state: of k-means.

    Returns:
        Images and labels, in the order of the classes. An image is taken once.

    Raises:
        ValueError: lengths differ, or a class has fewer than `ipc` images.

    Example:
        >>> x, y = torch.tensor([[0.0], [0.1], [5.0], [5.2], [9.0], [9.3]]), torch.tensor([0, 0, 0, 0, 1, 1])
        >>> images, targets = representative_init(x, x, y, ipc=1, random_state=0)
        >>> len(images), targets
        (2, tensor([0, 1]))
    """
    if problem := tensor_problem(features=features, images=images, targets=targets):
        raise TypeError(problem)
    from sklearn.cluster import KMeans

    integer("ipc", ipc)
    targets = labels("targets", targets, length=len(images))
    if features.ndim != 2 or len(features) != len(images):
        raise ValueError(f"features must be ({len(images)}, width), got shape {tuple(features.shape)}")
    classes, counts = targets.unique(return_counts=True)
    if not len(classes) or int(counts.min()) < ipc:
        raise ValueError(f"targets must hold at least {ipc} of each class, got {counts.tolist()}")
    chosen = []
    for label in classes:
        members = (targets == label).nonzero()[:, 0]
        points = features[members].detach().double().cpu()
        found = KMeans(ipc, n_init=4, random_state=random_state).fit(points.numpy())
        distance = torch.cdist(torch.as_tensor(found.cluster_centers_, dtype=points.dtype), points)
        for row in distance:
            nearest = row.argmin()
            chosen.append(members[nearest])
            distance[:, nearest] = torch.inf
    index = torch.stack(chosen)
    return images[index].clone(), targets[index]


def trajectory_loss(
    model: nn.Module,
    images: Float[Tensor, "synthetic ..."],
    targets: Int[Tensor, " synthetic"],
    segment: Float[Tensor, "epochs params"],
    lr: Float[Tensor, ""],
    *,
    steps: int = 20,
    momentum: float = 0.9,
    scale: float = 1.0,
    start: Float[Tensor, " params"] | None = None,
    intermediate: Weigh | None = "all",
    augment: Callable[[Tensor], Tensor] | None = None,
    batches: Sequence[Int[Tensor, " batch"]] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """How far a student that is trained on the synthetic images comes from the expert; differentiable in the images.

    Args:
        model: used by its form alone, with other weights; it must not have batch normalisation.
        images, targets: the synthetic set.
        segment: the expert's weights at the start and after each of the M following epochs.
        lr: the student's learning rate.
        steps: of the student, at least M.
        momentum: of its SGD.
        scale: of its loss, such as `balance_factor`.
        start: where it starts, if not where the expert does.
        intermediate: weight of the targets on the way: `all` 1, `adaptive` m / M, None 0.
        augment: of the images, at every step.
        batches: indices of the images of each step; all images, if None.

    Returns:
        `final`, the last ratio, `intermediate`, the weighted sum of the others, and `total`.

    Raises:
        TypeError: images are not floating point, or targets not int64.
        ValueError: shapes do not fit, `steps` is below M, or `intermediate` is unknown.

    Example:
        >>> model, images = nn.Linear(2, 2), torch.randn(2, 2)
        >>> segment = torch.randn(3, 6)
        >>> losses = trajectory_loss(model, images, torch.arange(2), segment, torch.tensor(0.0), steps=4)
        >>> {name: round(value.item(), 4) for name, value in losses.items()}  # nothing moves
        {'final': 1.0, 'intermediate': 1.0, 'total': 2.0}
    """
    if problem := tensor_problem(images=images, targets=targets, segment=segment, lr=lr, start=start):
        raise TypeError(problem)
    floating_tensor("images", images)
    class_indices("targets", targets)
    if targets.shape != images.shape[:1] or not len(images):
        raise ValueError(f"targets must be {max(len(images), 1)} labels, as images, got shape {tuple(targets.shape)}")
    count = sum(p.numel() for p in model.parameters())
    if segment.ndim != 2 or len(segment) < 2 or segment.shape[1] != count:
        raise ValueError(f"segment must be (at least 2, {count}), got shape {tuple(segment.shape)}")
    length = len(segment) - 1
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum!r}")
    if not -float("inf") < scale < float("inf"):
        raise ValueError(f"scale must be finite, got {scale!r}")
    integer("steps", steps, length)
    if intermediate is not None:
        one_of("intermediate", intermediate, ("all", "adaptive"))
    if batches is not None and len(batches) != steps:
        raise ValueError(f"batches must be {steps}, one a step, got {len(batches)}")
    segment = segment.detach()
    begin = segment[0] if start is None else start.detach()
    if begin.shape != (count,):
        raise ValueError(f"start must be {count} numbers, got shape {tuple(begin.shape)}")

    def ratio(weights: Tensor, epoch: int) -> Tensor:
        return (weights - segment[epoch]).square().sum() / (begin - segment[epoch]).square().sum()

    on_the_way, stride = torch.zeros_like(begin[0]), steps // length
    shapes = {name: p.shape for name, p in model.named_parameters()}
    sizes = [shape.numel() for shape in shapes.values()]
    with torch.enable_grad():
        weights = begin.clone().requires_grad_()
        velocity = torch.zeros_like(weights)
        for step in range(steps):
            index: Tensor | slice = slice(None) if batches is None else batches[step]
            x = images[index] if augment is None else augment(images[index])
            parts = zip(shapes.items(), weights.split(sizes), strict=True)
            logits = functional_call(model, {name: part.view(shape) for (name, shape), part in parts}, (x,))
            loss = F.cross_entropy(logits, targets[index])
            (gradient,) = torch.autograd.grad(loss if scale == 1 else scale * loss, weights, create_graph=True)
            velocity = momentum * velocity + gradient if momentum and step else gradient
            weights = weights - lr * velocity
            passed, left = divmod(step + 1, stride)
            if intermediate is not None and left == 0 and passed < length:
                on_the_way = on_the_way + (1.0 if intermediate == "all" else passed / length) * ratio(weights, passed)
        final = ratio(weights, length)
    return {"final": final, "intermediate": on_the_way, "total": final + on_the_way}
