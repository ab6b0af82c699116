"""Experts: networks that are trained on the real data, and smoothed while they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parameters_to_vector

from trimtab.ops.arguments import floating_tensor, integer, labels, non_negative, one_of, positive

Trajectory = Float[Tensor, "epochs params"]
"""An expert's weights as vectors: at the start, and after each epoch."""


def clip_weight(epoch: int) -> float:
    """What an expert's loss is multiplied by in a 0-based epoch: from a half to 1, within ten epochs.

    Example:
        >>> [clip_weight(epoch) for epoch in (0, 1, 9, 10, 30)]
        [0.5, 0.55, 0.95, 1.0, 1.0]
    """
    return min(50 + 5 * integer("epoch", epoch, 0), 100) / 100


def gradient_penalty(
    model: nn.Module, x: Float[Tensor, "batch ..."], *, per: Literal["pixel", "image"] = "pixel"
) -> Float[Tensor, ""]:
    """How far the length of the gradient of the summed outputs is from 1, squared, on average.

    Args:
        model: samples must not mix in it.
        x: inputs; the second dimension is that of the channels.
        per: `pixel` takes lengths over the channels at each place, as the authors' code does; `image` over all of a
            sample.

    Raises:
        TypeError: `x` is not floating point.
        ValueError: `x` holds no sample or has one dimension, or `per` is unknown.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[3.0, 4.0]]))
        >>> round(gradient_penalty(model, torch.ones(5, 2)).item(), 4)  # a length of 5
        16.0
    """
    one_of("per", per, ("pixel", "image"))
    x = floating_tensor("x", x)
    if x.ndim < 2 or not x.numel():
        raise ValueError(f"x must be (batch, channels, ...) with at least one sample, got shape {tuple(x.shape)}")
    with torch.enable_grad():
        given = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(model(given).sum(), given, create_graph=True)
    squares = (gradient if per == "pixel" else gradient.flatten(1)).square().sum(1)
    # The root has no second derivative at 0, where a network is at rest.
    length = (squares + torch.finfo(squares.dtype).tiny ** 0.5).sqrt()
    found: Tensor = (length - 1).square().mean()
    return found


@torch.enable_grad()
def train_expert(
    model: nn.Module,
    x: Float[Tensor, "n ..."],
    y: Int[Tensor, " n"],
    epochs: int,
    *,
    lr: float = 3e-3,
    momentum: float = 0.9,
    weight_decay: float = 1e-3,
    batch_size: int = 256,
    clip: bool = True,
    penalty: float = 2.0,
    per: Literal["pixel", "image"] = "pixel",
    augment: Callable[[Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Trajectory:
    """The path of an expert: SGD on the real data, smoothed.

    Args:
        model: where it starts; a copy of it is trained. It must not have batch normalisation.
        x, y: the training set.
        epochs: how many; the rate falls to 0.6 of itself after a half of them and one more.
        lr, momentum, weight_decay, batch_size: of SGD.
        clip: whether the loss is multiplied by `clip_weight`.
        penalty: weight of `gradient_penalty` on unaugmented inputs; 0 leaves it out.
        per: of the penalty.
        augment: of the inputs that the loss is taken on.
        generator: decides the batches; on the CPU.

    Raises:
        TypeError: `x` is not floating point, or `y` not integers.
        ValueError: a number is out of range, `y` has another length, or the model has batch normalisation.

    Example:
        >>> x, y = torch.randn(20, 2), torch.arange(20) % 2
        >>> train_expert(nn.Linear(2, 2), x, y, epochs=3).shape
        torch.Size([4, 6])
    """
    without_batch_norm(model)
    integer("epochs", epochs)
    batch_size = integer("batch_size", batch_size)
    non_negative("penalty", penalty)
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum!r}")
    if not 0 <= weight_decay < float("inf"):
        raise ValueError(f"weight_decay must be finite and not negative, got {weight_decay!r}")
    x, y = floating_tensor("x", x), labels("y", y, length=len(x))
    student = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(student.parameters(), positive("lr", lr), momentum, weight_decay=weight_decay)
    path = [_vector(student)]
    for epoch in range(epochs):
        weight = clip_weight(epoch) if clip else 1.0
        for index in torch.randperm(len(x), generator=generator).split(batch_size):
            batch = x[index]
            loss = weight * F.cross_entropy(student(augment(batch) if augment else batch), y[index])
            if penalty:
                loss = loss + penalty * gradient_penalty(student, batch, per=per)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch == epochs // 2 + 1:
            for group in optimizer.param_groups:
                group["lr"] *= 0.6
        path.append(_vector(student))
    return torch.stack(path)


def without_batch_norm(model: nn.Module) -> None:
    """Refuses a model whose outputs hang on the other samples."""
    if any(isinstance(part, _BatchNorm) for part in model.modules()):
        raise ValueError("model must not have batch normalisation (group or instance normalisation do), got it")


def _vector(model: nn.Module) -> Tensor:
    return parameters_to_vector(model.parameters()).detach().clone()
