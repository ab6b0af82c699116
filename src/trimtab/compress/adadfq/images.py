"""Images in place of training data: a generator of them, and the statistics that they should have."""

from __future__ import annotations

import math
from types import TracebackType
from typing import Any, Self, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trimtab.ops.arguments import integer, positive


class BNStatistics:
    """Within a `with` block, how far the statistics of a network's inputs to batch normalisation are from its own.

    Args:
        model: with batch normalisation, in eval mode; the last forward pass counts.

    Raises:
        ValueError: the model has no batch normalisation with running statistics.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(2)).eval()
        >>> with BNStatistics(model) as statistics:
        ...     _ = model(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
        ...     statistics.loss().item()
        0.0
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        if not self.layers:
            raise ValueError("model must have batch normalisation with running statistics, got none")
        self._seen: dict[nn.Module, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        self._handles = [layer.register_forward_pre_hook(self._keep) for layer in self.layers]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._seen = {}

    def _keep(self, layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        given = cast(Tensor, arguments[0]).transpose(0, 1).flatten(1)
        self._seen[layer] = torch.stack([given.mean(1), given.var(1, unbiased=False)])

    def loss(self) -> Float[Tensor, ""]:
        """Mean over the layers of the mean squared errors of means and (biased) variances.

        Raises:
            RuntimeError: there was no forward pass.
        """
        if not self._seen:
            raise RuntimeError("BNStatistics: run the model within the block first")
        own = [torch.stack([cast(Tensor, m.running_mean), cast(Tensor, m.running_var)]) for m in self._seen]
        errors = [(seen - held).square().mean(1).sum() for seen, held in zip(self._seen.values(), own, strict=True)]
        return torch.stack(errors).mean()


class ConditionalGenerator(nn.Module):
    """Images from noise times a label's embedding, by two doublings of size.

    The last batch normalisation has no weights: images have the mean and the deviation that are named, those of the
    inputs that the networks were trained on.

    Args:
        shape: of an image (channels, height, width).
        num_classes: number of labels.
        latent: length of the noise.
        width: channels inside.
        mean, std: of pixels.

    Example:
        >>> maker = ConditionalGenerator((1, 14, 14), num_classes=10, width=8)
        >>> maker(torch.randn(3, 100), torch.tensor([0, 5, 9])).shape
        torch.Size([3, 1, 14, 14])
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        num_classes: int,
        *,
        latent: int = 100,
        width: int = 64,
        mean: float = 0.0,
        std: float = 1.0,
    ) -> None:
        super().__init__()
        channels, height, breadth = shape
        self.latent, self.num_classes = integer("latent", latent), integer("num_classes", num_classes, 2)
        self.mean, self.std = float(mean), positive("std", std)
        sizes = [(math.ceil(height / part), math.ceil(breadth / part)) for part in (4, 2, 1)]
        self.embed = nn.Embedding(num_classes, latent)
        first = 2 * integer("width", width)
        self.body = nn.Sequential(
            nn.Linear(latent, first * sizes[0][0] * sizes[0][1]),
            nn.Unflatten(1, (first, *sizes[0])),
            nn.BatchNorm2d(first),
            nn.Upsample(sizes[1]),
            nn.Conv2d(first, first, 3, padding=1),
            nn.BatchNorm2d(first),
            nn.LeakyReLU(0.2),
            nn.Upsample(sizes[2]),
            nn.Conv2d(first, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, channels, 3, padding=1),
            nn.Tanh(),
            nn.BatchNorm2d(channels, affine=False),
        )

    def forward(
        self, noise: Float[Tensor, "batch latent"], labels: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch channels height width"]:
        images: Tensor = self.body(noise * self.embed(labels))
        return self.mean + self.std * images
