r"""Quantizers: continuous features to the nearest entries of learned codebooks, with gradients that pass through.

`VectorQuantizer` has one codebook of vectors, `ScalarQuantizer` a small codebook of numbers for each latent dimension,
`MultiScaleQuantizer` writes a feature map as a pyramid of residuals, coarse to fine. Each returns a `Quantized`, whose
`loss` is to be added to the loss of what uses it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.ops.arguments import in_range, integer, non_negative, positive, tensor
from trimtab.ops.arguments import indices as check_indices


@dataclass(frozen=True)
class Quantized:
    """What a quantizer makes of a batch.

    Attributes:
        values: the entries taken, of the shape of the input; their gradient goes to the input.
        indices: which entries, int64.
        loss: the codebook's loss and the commitment's, and the entropy's where there is one, weighted.
        codebook_loss: mean squared distance that moves the entries to the input; none of its gradient reaches it.
        commitment_loss: the same number, which moves the input to its entries alone.
        entropy_loss: confidence and diversity of the assignments, see `entropy_loss`; zero where it has no weight.
    """

    values: Tensor
    indices: Tensor
    loss: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor
    entropy_loss: Tensor


def straight_through(z: Float[Tensor, "..."], quantized: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """`quantized` going forward, the identity on `z` going backward.

    Example:
        >>> z = torch.tensor([0.3], requires_grad=True)
        >>> value = straight_through(z, torch.tensor([1.0]))
        >>> (3 * value).backward()
        >>> value.item(), z.grad.item()
        (1.0, 3.0)
    """
    return z + (quantized - z).detach()


def rotation_trick(z: Float[Tensor, "... dim"], quantized: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
    """`quantized` going forward; going backward the rotation and scaling that take `z` there, as constants.

    The gradient's angle to the input is the one it has to the entry, which straight-through forgets. Fifty et al.,
    "Restructuring Vector Quantization with the Rotation Trick", ICLR 2025, arXiv 2410.06424.

    Example:
        >>> z = torch.tensor([[1.0, 0.0]], requires_grad=True)
        >>> value = rotation_trick(z, torch.tensor([[0.0, 2.0]]))
        >>> value[0, 1].backward()  # along the entry, so along the input, and twice as long
        >>> z.grad.round().tolist()
        [[2.0, 0.0]]
    """
    from_norm, to_norm = z.detach().norm(dim=-1, keepdim=True), quantized.detach().norm(dim=-1, keepdim=True)
    tiny = torch.finfo(z.dtype).tiny
    start, end = z.detach() / from_norm.clamp_min(tiny), quantized.detach() / to_norm.clamp_min(tiny)
    middle = F.normalize(start + end, dim=-1)
    along = (z * middle).sum(-1, keepdim=True)
    rotated = z - 2 * along * middle + 2 * (z * start).sum(-1, keepdim=True) * end
    return straight_through(rotated * (to_norm / from_norm.clamp_min(tiny)), quantized)


def entropy_loss(distances: Float[Tensor, "... codes"], temperature: float = 0.01) -> Float[Tensor, ""]:
    r"""How unsure single assignments are, less how varied they are together.

    $\frac1N\sum_n H(p_n) - H\bigl(\frac1N\sum_n p_n\bigr)$ with $p_n = \mathrm{softmax}(-d_n / \tau)$: from
    $-\log K$ for confident assignments spread evenly over K codes to 0 where all inputs are assigned alike.

    Args:
        distances: squared distances to all codes.
        temperature: tau.

    Example:
        >>> entropy_loss(1 - torch.eye(4)).item()  # -log 4
        -1.386...
    """
    log_probs = (-distances.flatten(0, -2) / temperature).log_softmax(-1)
    probs = log_probs.exp()
    unsure = -(probs * log_probs).sum(-1).mean()
    mean = probs.mean(0)
    # Codes that no one is near have a mean of zero, where the logarithm has no gradient.
    return unsure + (mean * mean.clamp_min(torch.finfo(mean.dtype).tiny).log()).sum()


@dataclass(frozen=True)
class CodebookUse:
    """How much of a codebook is used.

    Attributes:
        share: of the codes that occur.
        perplexity: exp of the entropy of their frequencies, the number of codes that evenly used ones would be.
    """

    share: float
    perplexity: float


def codebook_use(indices: Int[Tensor, "..."], num_codes: int) -> CodebookUse:
    """How much of a codebook these indices use.

    Raises:
        ValueError: if there are none, or one is out of range.

    Example:
        >>> codebook_use(torch.tensor([0, 1, 1, 0]), 8)
        CodebookUse(share=0.25, perplexity=2.0)
    """
    if tensor("indices", indices).numel() == 0:
        raise ValueError("indices must be at least one, got none")
    check_indices("indices", indices, integer("num_codes", num_codes))
    freq = torch.bincount(indices.flatten(), minlength=num_codes).double() / indices.numel()
    return CodebookUse(float((freq > 0).double().mean()), round(float(torch.exp(-torch.xlogy(freq, freq).sum())), 10))


class VectorQuantizer(nn.Module):
    """One codebook of vectors, as in VQ-VAE; with normalised vectors, as in image tokenizers.

    van den Oord et al., "Neural Discrete Representation Learning", NeurIPS 2017, arXiv 1711.00937.

    Args:
        num_codes: size of the codebook.
        dim: length of its vectors.
        beta: weight of the commitment loss.
        normalize: quantize directions: inputs and codes are scaled to length one.
        entropy_weight: weight of `entropy_loss`.
        entropy_temperature: its temperature.
        rotation: pass gradients by `rotation_trick` in place of straight through.

    Example:
        >>> quantizer = VectorQuantizer(16, 4)
        >>> found = quantizer(torch.randn(2, 5, 4))
        >>> found.values.shape, found.indices.shape
        (torch.Size([2, 5, 4]), torch.Size([2, 5]))
        >>> torch.allclose(quantizer.lookup(found.indices), found.values, atol=1e-6)
        True
    """

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        beta: float = 0.25,
        normalize: bool = True,
        entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01,
        rotation: bool = False,
    ) -> None:
        super().__init__()
        self.num_codes, self.dim = integer("num_codes", num_codes, 2), integer("dim", dim)
        self.beta = non_negative("beta", beta)
        self.normalize, self.rotation = normalize, rotation
        self.entropy_weight = non_negative("entropy_weight", entropy_weight)
        self.entropy_temperature = positive("entropy_temperature", entropy_temperature)
        codes = torch.empty(num_codes, dim).uniform_(-1 / num_codes, 1 / num_codes)
        self.codes = nn.Parameter(F.normalize(codes, dim=-1) if normalize else codes)

    @property
    def codebook(self) -> Float[Tensor, "codes dim"]:
        """The vectors as they are used."""
        return F.normalize(self.codes, dim=-1) if self.normalize else self.codes

    def lookup(self, indices: Int[Tensor, "..."]) -> Float[Tensor, "... dim"]:
        """The vectors of some indices."""
        return F.embedding(indices, self.codebook)

    def forward(self, z: Float[Tensor, "... dim"]) -> Quantized:
        """Quantize vectors.

        Raises:
            TypeError: if `z` is not floating point.
            ValueError: if its last dimension is not `dim`.
        """
        _check_features("z", z, self.dim)
        z = F.normalize(z, dim=-1) if self.normalize else z
        codebook = self.codebook
        distances = squared_distances(z, codebook)
        indices = distances.detach().argmin(-1)
        taken = F.embedding(indices, codebook)
        codebook_loss, commitment_loss = F.mse_loss(taken, z.detach()), F.mse_loss(z, taken.detach())
        loss, entropy = codebook_loss + self.beta * commitment_loss, z.new_zeros(())
        if self.entropy_weight:
            entropy = entropy_loss(distances, self.entropy_temperature)
            loss = loss + self.entropy_weight * entropy
        passed = (rotation_trick if self.rotation else straight_through)(z, taken)
        return Quantized(passed, indices, loss, codebook_loss, commitment_loss, entropy)

    def extra_repr(self) -> str:
        return f"{self.num_codes} x {self.dim}, normalize={self.normalize}"


class ScalarQuantizer(nn.Module):
    """A codebook of numbers for each latent dimension.

    Args:
        num_latents: number of dimensions.
        num_values: numbers in each codebook; they start evenly spread over [-0.5, 0.5].
        learnable: whether they move.
        codebook_weight, commitment_weight: weights of the two losses.

    Attributes:
        values: the numbers, of shape (num_latents, num_values).

    Example:
        >>> quantizer = ScalarQuantizer(2, 3)
        >>> found = quantizer(torch.tensor([[0.1, -2.0]]))
        >>> found.values.tolist(), found.indices.tolist()
        ([[0.0, -0.5]], [[1, 0]])
    """

    def __init__(
        self,
        num_latents: int,
        num_values: int = 10,
        *,
        learnable: bool = True,
        codebook_weight: float = 0.01,
        commitment_weight: float = 0.01,
    ) -> None:
        super().__init__()
        self.num_latents, self.num_values = integer("num_latents", num_latents), integer("num_values", num_values, 2)
        self.codebook_weight = non_negative("codebook_weight", codebook_weight)
        self.commitment_weight = non_negative("commitment_weight", commitment_weight)
        values = torch.linspace(-0.5, 0.5, num_values).repeat(num_latents, 1)
        self.values = nn.Parameter(values, requires_grad=learnable)

    def lookup(self, indices: Int[Tensor, "... latents"]) -> Float[Tensor, "... latents"]:
        """The numbers of some indices, one a dimension."""
        values = self.values.expand(self.num_latents, -1)
        return values[torch.arange(self.num_latents, device=indices.device), indices]

    def forward(self, z: Float[Tensor, "... latents"]) -> Quantized:
        """Quantize each dimension.

        Raises:
            TypeError: if `z` is not floating point.
            ValueError: if its last dimension is not `num_latents`.
        """
        _check_features("z", z, self.num_latents)
        indices = (z.detach()[..., None] - self.values.detach()).abs().argmin(-1)
        taken = self.lookup(indices)
        codebook_loss, commitment_loss = F.mse_loss(taken, z.detach()), F.mse_loss(z, taken.detach())
        loss = self.codebook_weight * codebook_loss + self.commitment_weight * commitment_loss
        return Quantized(straight_through(z, taken), indices, loss, codebook_loss, commitment_loss, z.new_zeros(()))

    def sample(self, size: int, generator: torch.Generator | None = None) -> Float[Tensor, "size latents"]:
        """Codes with every dimension drawn evenly from its codebook, as a generator of a GAN takes them."""
        shape = (integer("size", size), self.num_latents)
        return self.lookup(torch.randint(self.num_values, shape, generator=generator).to(self.values.device))

    def extra_repr(self) -> str:
        return f"{self.num_latents} x {self.num_values}, learnable={self.values.requires_grad}"


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
            TypeError: if `f` is not floating point.
            ValueError: if it is not of shape (batch, dim, side, side) with the last scale as side.
        """
        full = self.scales[-1]
        if tensor("f", f, ndim=4, floating=True).shape[1:] != (self.dim, full, full):
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
        if tensor("indices", indices, ndim=2).shape[1] != self.num_tokens:
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


def squared_distances(z: Float[Tensor, "... dim"], codes: Float[Tensor, "codes dim"]) -> Float[Tensor, "... codes"]:
    """Squared Euclidean distances of vectors to all codes, by one matrix product."""
    return z.square().sum(-1, keepdim=True) - 2 * z @ codes.T + codes.square().sum(-1)


def _check_features(name: str, z: Tensor, dim: int) -> None:
    if tensor(name, z, floating=True).ndim == 0 or z.shape[-1] != dim:
        raise ValueError(f"{name} must be of shape (..., {dim}), got {tuple(z.shape)}")
