"""One codebook of vectors, or a small one of numbers for each latent dimension."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.generative.quantize.nearest import (
    Quantized,
    entropy_loss,
    nearest_code,
    rotation_trick,
    squared_distances,
    straight_through,
)
from trimtab.ops.arguments import integer, non_negative, positive


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
        distances = squared_distances(z, codebook) if self.entropy_weight else None
        indices = nearest_code(z, codebook) if distances is None else distances.detach().argmin(-1)
        taken = F.embedding(indices, codebook)
        codebook_loss, commitment_loss = F.mse_loss(taken, z.detach()), F.mse_loss(z, taken.detach())
        loss, entropy = codebook_loss + self.beta * commitment_loss, z.new_zeros(())
        if distances is not None:
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


def _check_features(name: str, z: Tensor, dim: int) -> None:
    if not isinstance(z, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(z).__name__}")
    if not z.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {z.dtype}")
    if z.ndim == 0 or z.shape[-1] != dim:
        raise ValueError(f"{name} must be of shape (..., {dim}), got {tuple(z.shape)}")
    if not z.numel():
        raise ValueError(f"{name} must be at least one vector, got shape {tuple(z.shape)}")
