r"""A client's work on its own data: mini-batch SGD, optionally pulled towards a point.

$$
w \leftarrow w - \eta\,\big[\operatorname{clip}\big(g + \mu\,c\big) + (\lambda + \mu)\,w\big]
$$

With $c = -w_t$ the pull is FedProx's $\mu (w - w_t)$; FedSpeed corrects it with $c = h_i - w_t$; $\mu = 0$ is SGD.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor, nn

Gradient = Callable[[Callable[[], Tensor], Sequence[Tensor]], Sequence[Tensor]]
"""Maps (loss of the current batch as a function without arguments, parameters) to a direction of descent, negated."""


def loss_gradient(loss: Callable[[], Tensor], params: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradient of the loss; zero for parameters that it does not depend on."""
    return torch.autograd.grad(loss(), params, allow_unused=True, materialize_grads=True)


def local_sgd(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    *,
    lr: float,
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    max_norm: float | None = None,
    prox: float = 0.0,
    pull: Sequence[Tensor] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    gradient: Gradient = loss_gradient,
) -> int:
    """Train `model` in place and in train mode, and return the number of steps.

    Layers that draw from torch's global generator (dropout) are seeded by `generator`; the global one is left alone.

    Args:
        model: the parameters that require gradients are trained.
        data: inputs and targets, both on the model's device.
        lr: learning rate.
        epochs: passes over the data.
        batch_size: samples in a step.
        generator: decides the order of the samples.
        momentum, weight_decay: as in `torch.optim.SGD`.
        max_norm: bound on the global norm of the gradient, before weight decay is added.
        prox: strength of the pull (mu).
        pull: the constant part of the pull (c), one tensor per trained parameter.
        loss: maps (output, targets) to a scalar.
        gradient: what takes the place of the loss gradient.

    Raises:
        ValueError: there are no samples, or not as many targets as inputs.
    """
    x, y = data
    if len(x) == 0 or len(x) != len(y):
        raise ValueError(f"data must hold as many targets as inputs, and at least one; got {len(x)} and {len(y)}")
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, lr=lr, momentum=momentum, weight_decay=weight_decay + prox)
    model.train()
    steps = 0
    with torch.random.fork_rng(devices=sorted({p.device for p in params if p.is_cuda}, key=str)):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        for index in batches(len(x), batch_size, epochs, generator):
            inputs, targets = x[index], y[index]

            def batch_loss(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
                return loss(model(inputs), targets)

            direction = gradient(batch_loss, params)
            if prox and pull is not None:
                direction = torch._foreach_add(list(direction), list(pull), alpha=prox)
            for param, value in zip(params, direction, strict=True):
                param.grad = value
            if max_norm is not None:
                nn.utils.clip_grad_norm_(params, max_norm)
            optimizer.step()
            steps += 1
    optimizer.zero_grad()
    return steps


def batches(
    num_examples: int, batch_size: int, epochs: int, generator: torch.Generator
) -> Iterator[Int[Tensor, " batch"]]:
    """Indices of the mini-batches, in a new order each epoch.

    The last batch of an epoch may be short; a last batch of a single sample is left out, for batch normalisation.
    """
    for _ in range(epochs):
        parts = torch.randperm(num_examples, generator=generator).split(batch_size)
        yield from parts[:-1] if len(parts) > 1 and batch_size > 1 and len(parts[-1]) == 1 else parts
