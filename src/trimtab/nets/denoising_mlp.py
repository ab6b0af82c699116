"""A small residual network for noisy vectors, and for images that are small enough to be vectors."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.ops.arguments import in_range, integer

_FREQUENCIES = 16


class TimeEmbedding(nn.Module):
    """Sinusoids of a number per sample, of frequencies from 1/2 to 16, and two layers over them.

    Args:
        width: of the embedding.

    Example:
        >>> TimeEmbedding(32)(torch.zeros(4)).shape
        torch.Size([4, 32])
    """

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        frequencies = torch.logspace(math.log2(0.5), math.log2(16.0), _FREQUENCIES, base=2.0)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.layers = nn.Sequential(nn.Linear(2 * _FREQUENCIES + 1, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, value: Float[Tensor, " batch"]) -> Float[Tensor, "batch width"]:
        angle = value[:, None] * self.frequencies
        features = torch.cat([value[:, None], angle.sin(), angle.cos()], dim=1)
        embedded: Tensor = self.layers(features)
        return embedded


class ResidualBlock(nn.Module):
    """`hidden + f(hidden, embedding)`: norm, layer, embedding added, layer; the identity before training.

    Args:
        hidden: width.
        dropout: share of the inner features left out in training.
        norm: makes the normalisation of so many features.
    """

    def __init__(self, hidden: int, dropout: float = 0.0, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm, self.first, self.second = norm(hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.embedding = nn.Linear(hidden, hidden)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(
        self, hidden: Float[Tensor, "batch width"], embedding: Float[Tensor, "batch width"]
    ) -> Float[Tensor, "batch width"]:
        inner = nn.functional.silu(self.first(self.norm(hidden)) + self.embedding(embedding))
        change: Tensor = self.second(self.dropout(inner))
        return hidden + change


class DenoisingMLP(nn.Module):
    """A residual network that knows the noise level, and if wanted a class and further numbers.

    It is a raw network, `net(x, c_noise, cond, extra)`: a preconditioning of `trimtab.diffusion` gives it the form of a
    denoiser. Its output is zero before training. What is to be hooked, skipped or adapted are `blocks`, called
    `block(hidden, embedding)`.

    Args:
        dim: numbers in a sample; samples of any shape with so many are flattened, and given back in their shape.
        num_classes: classes of the condition; 0 for none. The label `num_classes` is the null class, without condition.
        hidden: width of the network.
        blocks: number of residual blocks.
        conditions: numbers per sample beside the noise level, such as a target time or a guidance weight.
        dropout: share of the inner features of a block left out in training.
        norm: makes the normalisation of so many features.

    Raises:
        TypeError: a size is no integer.
        ValueError: a size is not positive (`num_classes`, `conditions`: negative), or `dropout` is outside [0, 1).

    Example:
        >>> net = DenoisingMLP(64, num_classes=10, hidden=32)
        >>> net(torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.tensor([3, 10])).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        dim: int,
        num_classes: int = 0,
        hidden: int = 256,
        blocks: int = 3,
        conditions: int = 0,
        *,
        dropout: float = 0.0,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        self.dim, self.num_classes = integer("dim", dim), integer("num_classes", num_classes, 0)
        hidden, self.conditions = integer("hidden", hidden), integer("conditions", conditions, 0)
        in_range("dropout", dropout, 0, 1, "left")
        self.inward = nn.Linear(dim, hidden)
        self.noise_level = TimeEmbedding(hidden)
        self.classes = nn.Embedding(num_classes + 1, hidden) if num_classes else None
        self.further = nn.ModuleList(TimeEmbedding(hidden) for _ in range(conditions))
        self.blocks = nn.ModuleList(ResidualBlock(hidden, dropout, norm) for _ in range(integer("blocks", blocks)))
        self.norm, self.outward = norm(hidden), nn.Linear(hidden, dim)
        nn.init.zeros_(self.outward.weight)
        nn.init.zeros_(self.outward.bias)

    def embed(
        self,
        c_noise: Float[Tensor, " batch"],
        cond: Int[Tensor, " batch"] | None = None,
        extra: Float[Tensor, "batch conditions"] | None = None,
    ) -> Float[Tensor, "batch width"]:
        """What the blocks are told of the noise level, the class and the further numbers.

        Raises:
            ValueError: `cond` is given to a network without classes, or `extra` has another shape than
                `(batch, conditions)`.
        """
        embedding: Tensor = self.noise_level(c_noise)
        if self.classes is not None:
            null = torch.full_like(c_noise, self.num_classes, dtype=torch.int64)
            embedding = embedding + self.classes(null if cond is None else cond)
        elif cond is not None:
            raise ValueError("cond must be None for a network without classes, got labels")
        wanted = (len(c_noise), self.conditions)
        came = (len(c_noise), 0) if extra is None else tuple(extra.shape)
        if came != wanted:
            raise ValueError(f"extra must have shape {wanted}, got {'None' if extra is None else came}")
        for layer, value in zip(self.further, () if extra is None else extra.unbind(1), strict=True):
            embedding = embedding + layer(value)
        return nn.functional.silu(embedding)

    def forward(
        self,
        x: Float[Tensor, "batch ..."],
        c_noise: Float[Tensor, " batch"],
        cond: Int[Tensor, " batch"] | None = None,
        extra: Float[Tensor, "batch conditions"] | None = None,
    ) -> Float[Tensor, "batch ..."]:
        """The network's output, of the shape of `x`.

        Args:
            x: scaled noisy samples.
            c_noise: the noise level as a number of order one, such as log(sigma) / 4 or a time in [0, 1].
            cond: int64 labels; None is the null class for all.
            extra: further numbers, of order one.

        Raises:
            ValueError: a sample has not `dim` numbers, or as `embed`.
        """
        flat = x.flatten(1)
        if flat.shape[1] != self.dim:
            raise ValueError(f"x must have {self.dim} numbers a sample, got shape {tuple(x.shape)}")
        embedding = self.embed(c_noise, cond, extra)
        hidden = self.inward(flat)
        for block in self.blocks:
            hidden = block(hidden, embedding)
        out: Tensor = self.outward(nn.functional.silu(self.norm(hidden)))
        return out.reshape(x.shape)
