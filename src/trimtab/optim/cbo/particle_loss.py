"""The loss of a network as a function of particles, so that consensus can train it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.ops.arguments import integer, non_negative, real_problem
from trimtab.optim.cbo.particles import normal


class ParticleLoss:
    """The loss of a model as a function of particles, each of which is a vector of all its trainable parameters.

    The model runs on all particles at once (`torch.func.functional_call` under `vmap`) and is itself left as it is.
    Layers that change their buffers in training, such as batch normalisation, must be in evaluation mode.

    Args:
        model: the model; parameters that need no gradient stay fixed.
        criterion: maps the model's output and the target to a scalar.
        chunk_size: number of particles to run at once; None for all of them.

    Raises:
        ValueError: the model has no trainable parameter.

    Example:
        >>> from trimtab.optim import CBO
        >>> model = torch.nn.Linear(2, 1)
        >>> loss = ParticleLoss(model, torch.nn.functional.mse_loss)
        >>> cbo = CBO(loss.start(50, spread=1.0, generator=torch.Generator().manual_seed(0)), alpha=50.0)
        >>> x, y = torch.randn(32, 2), torch.randn(32, 1)
        >>> consensus = cbo.step(lambda particles: loss(particles, x, y))
        >>> loss.load(consensus)
        >>> bool(torch.nn.utils.parameters_to_vector(model.parameters()).equal(consensus))
        True
    """

    def __init__(
        self, model: nn.Module, criterion: Callable[[Any, Any], Tensor], *, chunk_size: int | None = None
    ) -> None:
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.params:
            raise ValueError("model must have a trainable parameter, got none")
        self.model, self.criterion, self.chunk_size = model, criterion, chunk_size

    def start(
        self, n_particles: int, *, spread: float, generator: torch.Generator | None = None
    ) -> Float[Tensor, "n d"]:
        """Particles drawn around the model's parameters, each coordinate with standard deviation `spread`."""
        integer("n_particles", n_particles)
        non_negative("spread", spread)
        center = nn.utils.parameters_to_vector(self.params.values()).detach().expand(n_particles, -1)
        return torch.add(center, normal(center, generator), alpha=spread)

    def __call__(self, particles: Float[Tensor, "n d"], x: Any, target: Any) -> Float[Tensor, " n"]:
        """The loss of each particle on the same batch."""
        if problem := real_problem(particles=particles, x=x, target=target):
            raise TypeError(problem)

        def loss(vector: Tensor) -> Tensor:
            return self.criterion(torch.func.functional_call(self.model, self._split(vector), (x,)), target)

        losses: Tensor = torch.vmap(loss, chunk_size=self.chunk_size)(particles)
        return losses

    def load(self, vector: Float[Tensor, " d"]) -> None:
        """Writes a vector, such as the consensus point, into the model's trainable parameters."""
        if problem := real_problem(vector=vector):
            raise TypeError(problem)
        with torch.no_grad():
            for p, value in zip(self.params.values(), self._split(vector).values(), strict=True):
                p.copy_(value)

    def _split(self, vector: Tensor) -> dict[str, Tensor]:
        sizes = [p.numel() for p in self.params.values()]
        if vector.shape != (sum(sizes),):
            raise ValueError(f"particles must have {sum(sizes)} coordinates, got shape {tuple(vector.shape)}")
        parts = vector.split(sizes)
        return {name: part.view_as(p) for (name, p), part in zip(self.params.items(), parts, strict=True)}
