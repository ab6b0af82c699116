r"""A client's work on its own data: mini-batch SGD, optionally pulled towards a point.

$$
w \leftarrow w - \eta\,\big[\operatorname{clip}\big(g + \mu\,c\big) + (\lambda + \mu)\,w\big]
$$

With $c = -w_t$ the pull is FedProx's $\mu (w - w_t)$; FedSpeed corrects it with $c = h_i - w_t$; $\mu = 0$ is SGD.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from trimtab.ops.arguments import in_range, integer, non_negative, positive

Loss = Callable[[Tensor, Tensor], Tensor]
Gradient = Callable[[Callable[[], Tensor], Sequence[Tensor]], Sequence[Tensor]]
"""Maps (loss of the current batch as a function without arguments, parameters) to a direction of descent, negated."""


def loss_gradient(loss: Callable[[], Tensor], params: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradient of the loss; zero for parameters that it does not depend on."""
    return torch.autograd.grad(loss(), params, allow_unused=True, materialize_grads=True)


@dataclass(frozen=True, kw_only=True)
class LocalSGD:
    """How a client trains: the settings that federated algorithms share.

    Attributes:
        lr: learning rate of the first round.
        epochs: passes over a client's data in a round.
        batch_size: samples in a step.
        momentum, weight_decay: as in `torch.optim.SGD`, which starts anew each round.
        max_norm: bound on the global norm of the gradient, before weight decay is added; None for none.
        lr_decay: factor on the learning rate after each round.
        prox: strength of the pull (mu).
        loss: maps (output, targets) to a scalar.

    Raises:
        ValueError: a setting is out of its range.
    """

    lr: float
    epochs: int = 1
    batch_size: int = 50
    momentum: float = 0.0
    weight_decay: float = 0.0
    max_norm: float | None = None
    lr_decay: float = 1.0
    prox: float = 0.0
    loss: Loss = nn.functional.cross_entropy

    def __post_init__(self) -> None:
        non_negative("lr", self.lr)
        integer("local_epochs", self.epochs)
        integer("batch_size", self.batch_size)
        in_range("momentum", self.momentum, 0, 1, "left")
        non_negative("weight_decay", self.weight_decay)
        if self.max_norm is not None:
            positive("max_norm", self.max_norm)
        in_range("lr_decay", self.lr_decay, 0, 1, "right")
        non_negative("prox", self.prox)

    def train(
        self,
        model: nn.Module,
        data: tuple[Tensor, Tensor],
        *,
        generator: torch.Generator,
        round: int = 0,
        pull: Sequence[Tensor] | None = None,
        gradient: Gradient = loss_gradient,
    ) -> int:
        """Train `model` in place and in train mode, and return the number of steps.

        Layers that draw from torch's global generator (dropout) are seeded by `generator`; the global one is left
        alone. Of a single sample no statistics of a batch can be taken: for a client that has no more, batch
        normalisation uses the received running ones.

        Args:
            model: the parameters that require gradients are trained.
            data: inputs and targets, both on the model's device.
            generator: decides the order of the samples.
            round: rounds finished so far.
            pull: the constant part of the pull (c), one tensor per trained parameter.
            gradient: what takes the place of the loss gradient.

        Raises:
            ValueError: there are no samples, or not as many targets as inputs.
        """
        x, y = data
        if len(x) == 0 or len(x) != len(y):
            raise ValueError(f"data must hold as many targets as inputs, and at least one; got {len(x)} and {len(y)}")
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(
            params,
            lr=self.lr * self.lr_decay**round,
            momentum=self.momentum,
            weight_decay=self.weight_decay + self.prox,
        )
        model.train()
        if len(x) == 1:
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                    module.eval()
        steps = 0
        with seeded_draws(params, generator):
            for index in batches(len(x), self.batch_size, self.epochs, generator):
                inputs, targets = x[index], y[index]

                def batch_loss(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
                    return self.loss(model(inputs), targets)

                direction = gradient(batch_loss, params)
                if self.prox and pull is not None:
                    direction = torch._foreach_add(list(direction), list(pull), alpha=self.prox)
                for param, value in zip(params, direction, strict=True):
                    param.grad = value
                if self.max_norm is not None:
                    nn.utils.clip_grad_norm_(params, self.max_norm)
                optimizer.step()
                steps += 1
        optimizer.zero_grad()
        return steps


@contextmanager
def seeded_draws(params: Sequence[Tensor], generator: torch.Generator) -> Iterator[None]:
    """For a while, layers that draw from torch's global generators draw as this one says; then those are as before.

    Args:
        params: of the model; only the global generators of the CPU and of their devices are touched.
        generator: gives the seed.
    """
    devices = sorted({p.device for p in params if p.is_cuda}, key=str)
    with torch.random.fork_rng(devices=devices):
        seed = int(torch.randint(2**62, (), generator=generator))
        # `torch.manual_seed` would seed accelerators too on which nothing of this runs.
        torch.default_generator.manual_seed(seed)
        for device in devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def batches(
    num_examples: int, batch_size: int, epochs: int, generator: torch.Generator
) -> Iterator[Int[Tensor, " batch"]]:
    """Indices of the mini-batches, in a new order each epoch.

    The last batch of an epoch may be short; a last batch of a single sample is left out, for batch normalisation.
    """
    for _ in range(epochs):
        parts = torch.randperm(num_examples, generator=generator).split(batch_size)
        yield from parts[:-1] if len(parts) > 1 and batch_size > 1 and len(parts[-1]) == 1 else parts
