"""A pyramid of residuals over one codebook, from coarse to fine."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.generative.quantize.nearest import Quantized, squared_distances, straight_through
from trimtab.ops.arguments import in_range, integer, non_negative, real_problem, tensor
from trimtab.ops.arguments import indices as check_indices


class MultiScaleQuantizer(nn.Module):
    r"""A feature map as a pyramid of residuals: each scale writes down what the coarser ones left.

    $\hat f_k = \hat f_{k-1} + \phi_k(\mathrm{up}(z_k))$, where $z_k$ are the codes nearest to the residual
    $f - \hat f_{k-1}$ at $p_k \times p_k$ places, and $\phi_k$ a convolution that mends the upsampling.

    Tian et al., "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction", NeurIPS 2024,
    arXiv 2404.02905, Algorithms 1 and 2.

    Args:
        scales: sides of the grids, rising; the last is the side of the feature map.
        num_codes: size of the codebook, which all scales share.
        dim: channels.
        beta: weight of the commitment loss.
        residual_ratio: share of the convolution in $\phi_k(h) = (1 - r) h + r\,\mathrm{conv}(h)$.
        num_convolutions: convolutions, which neighbouring scales share.

    Example:
        >>> quantizer = MultiScaleQuantizer((1, 2, 4), num_codes=16, dim=3)
        >>> found = quantizer(torch.randn(2, 3, 4, 4))
        >>> found.values.shape, found.indices.shape  # 1 + 4 + 16 tokens
        (torch.Size([2, 3, 4, 4]), torch.Size([2, 21]))
    """

    def __init__(
        self,
        scales: Sequence[int],
        num_codes: int,
        dim: int,
        *,
        beta: float = 0.25,
        residual_ratio: float = 0.5,
        num_convolutions: int = 4,
    ) -> None:
        super().__init__()
        self.scales = check_scales(scales)
        self.num_codes, self.dim = integer("num_codes", num_codes, 2), integer("dim", dim)
        self.beta = non_negative("beta", beta)
        self.residual_ratio = in_range("residual_ratio", residual_ratio, 0, 1)
        count = min(integer("num_convolutions", num_convolutions), len(self.scales))
        self.codes = nn.Parameter(torch.randn(num_codes, dim) / dim**0.5)
        self.convolutions = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in range(count))

    @property
    def num_tokens(self) -> int:
        """Tokens of an image, over all scales."""
        return sum(side**2 for side in self.scales)

    def split(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Tokens of shape (batch, num_tokens, ...) by scale."""
        return tokens.split([side**2 for side in self.scales], dim=1)  # type: ignore[no-any-return]

    def lookup(self, indices: Int[Tensor, "..."]) -> Float[Tensor, "... dim"]:
        """The vectors of some indices."""
        return F.embedding(indices, self.codes)

    def contribution(self, scale: int, indices: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch dim side side"]:
        """What the tokens of one scale add to the feature map, at its full side."""
        side, full = self.scales[scale], self.scales[-1]
        h = self.lookup(indices).transpose(1, 2).unflatten(2, (side, side))
        if side != full:
            h = F.interpolate(h, size=(full, full), mode="bicubic")
        place = scale * len(self.convolutions) // len(self.scales)
        return (1 - self.residual_ratio) * h + self.residual_ratio * self.convolutions[place](h)  # type: ignore[no-any-return]

    def shrink(self, f: Float[Tensor, "batch dim side side"], scale: int) -> Float[Tensor, "batch tokens dim"]:
        """A feature map averaged over the places of a scale, as tokens."""
        if problem := real_problem(f=f):
            raise TypeError(problem)
        side = self.scales[scale]
        return F.interpolate(f, size=(side, side), mode="area").flatten(2).transpose(1, 2)

    def decode(self, indices: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch dim side side"]:
        """The feature map that the tokens of all scales make up.

        Raises:
            ValueError: if there are not `num_tokens` of them, or one is out of range.
        """
        parts = self._checked(indices)
        return sum((self.contribution(k, part) for k, part in enumerate(parts)), start=torch.zeros(()))

    def inputs(self, indices: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch later dim"]:
        """What a next-scale model sees before each scale but the first: all coarser scales, at that scale's places.

        Returns:
            Shape (batch, num_tokens - scales[0]**2, dim).
        """
        parts, f, seen = self._checked(indices), torch.zeros(()), []
        for k, part in enumerate(parts[:-1]):
            f = f + self.contribution(k, part)
            seen.append(self.shrink(f, k + 1))
        return torch.cat(seen, 1)

    def forward(self, f: Float[Tensor, "batch dim side side"]) -> Quantized:
        """Quantize feature maps, the coarsest scale first.

        Raises:
            TypeError: if `f` is no floating-point tensor.
            ValueError: if it is not of shape (batch, dim, side, side) with the last scale as side, or empty.
        """
        full = self.scales[-1]
        if not isinstance(f, Tensor):
            raise TypeError(f"f must be a tensor, got {type(f).__name__}")
        if tensor("f", f, ndim=4, floating=True).shape[1:] != (self.dim, full, full) or not len(f):
            raise ValueError(f"f must be of shape (batch, {self.dim}, {full}, {full}), got {tuple(f.shape)}")
        fixed, so_far = f.detach(), torch.zeros_like(f)
        indices: list[Tensor] = []
        codebook_loss = commitment_loss = f.new_zeros(())
        for k in range(len(self.scales)):
            residual = self.shrink(fixed - so_far.detach(), k)
            indices.append(squared_distances(residual, self.codes.detach()).argmin(-1))
            so_far = so_far + self.contribution(k, indices[-1])
            codebook_loss = codebook_loss + F.mse_loss(so_far, fixed) / len(self.scales)
            commitment_loss = commitment_loss + F.mse_loss(f, so_far.detach()) / len(self.scales)
        loss = codebook_loss + self.beta * commitment_loss
        passed = straight_through(f, so_far)
        return Quantized(passed, torch.cat(indices, 1), loss, codebook_loss, commitment_loss, f.new_zeros(()))

    def _checked(self, indices: Tensor) -> tuple[Tensor, ...]:
        if not isinstance(indices, Tensor):
            raise TypeError(f"indices must be a tensor, got {type(indices).__name__}")
        if indices.is_floating_point():
            raise TypeError(f"indices must be integers, got {indices.dtype}")
        if indices.ndim != 2 or indices.shape[1] != self.num_tokens or not indices.numel():
            raise ValueError(f"indices must be of shape (batch, {self.num_tokens}), got {tuple(indices.shape)}")
        check_indices("indices", indices, self.num_codes)
        return self.split(indices)

    def extra_repr(self) -> str:
        return f"{self.scales}, {self.num_codes} x {self.dim}"


def check_scales(scales: Sequence[int]) -> tuple[int, ...]:
    """The sides of a pyramid's grids, which must rise.

    Raises:
        ValueError: if there are none, or they do not.
    """
    sides = tuple(integer("scales", side) for side in scales)
    if not sides or any(b <= a for a, b in itertools.pairwise(sides)):
        raise ValueError(f"scales must be at least one side, each larger than the one before, got {sides}")
    return sides
