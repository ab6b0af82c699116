"""Mixtures of low-rank Gaussians."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.diffusion.mixtures import AnalyticGMM
from trimtab.ops.arguments import integer, tensor

_ORTHONORMAL = 1e-4


class MoLRG(AnalyticGMM):
    """A mixture of low-rank Gaussians, with mean zero and covariances $U_k U_k^\\top$.

    Denoiser, score and class posterior are exact at every noise level above zero, where the density exists. The
    component is the class.

    Args:
        bases: orthonormal columns of each component, shape (dim, rank); ranks may differ.
        weights: positive, of any sum; equal ones by default.

    Raises:
        ValueError: columns are not orthonormal, or shapes do not agree.

    Example:
        >>> mixture = MoLRG([torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])])
        >>> mixture.posterior_mean(torch.tensor([[2.0, 0.1]]), alpha=1.0, sigma=0.1).round(decimals=2)
        tensor([[1.9800, 0.0000]])
    """

    def __init__(
        self, bases: Sequence[Float[Tensor, "dim rank"]], weights: Float[Tensor, " components"] | None = None
    ) -> None:
        if not len(bases):
            raise ValueError("bases must hold at least one matrix, got none")
        for basis in bases:
            tensor("bases", basis, ndim=2, floating=True)
            if len(basis) != len(bases[0]):
                raise ValueError(f"bases must have the same number of rows, got {len(bases[0])} and {len(basis)}")
            _check_orthonormal("bases", basis)
        self.bases = [basis.detach() for basis in bases]
        covs = torch.stack([basis @ basis.T for basis in self.bases])
        weights = covs.new_ones(len(bases)) if weights is None else weights
        super().__init__(weights, covs.new_zeros(covs.shape[:2]), covs, torch.arange(len(bases)))

    @classmethod
    def random(
        cls,
        dim: int,
        rank: int,
        components: int = 2,
        *,
        orthogonal: bool = True,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> MoLRG:
        """Random subspaces of one rank.

        Args:
            dim: of the space.
            rank: of every component.
            components: their number.
            orthogonal: to each other, being blocks of the columns of one random orthogonal matrix, as the authors draw
                them; otherwise independent.
            generator: decides them.
            dtype: of the bases.

        Raises:
            ValueError: a subspace, or all of them where they are orthogonal, would not fit into the space.
        """
        integer("components", components)
        integer("rank", rank)
        integer("dim", dim, rank * components if orthogonal else rank)
        draws = 1 if orthogonal else components
        columns = rank * components if orthogonal else rank
        drawn = torch.randn(draws, dim, columns, generator=generator, dtype=dtype)
        bases = torch.linalg.qr(drawn).Q
        return cls(list(bases[0].split(rank, dim=1)) if orthogonal else list(bases))


def _check_orthonormal(name: str, basis: Tensor) -> None:
    gram = basis.T @ basis
    if not torch.allclose(gram, torch.eye(len(gram), dtype=gram.dtype, device=gram.device), atol=_ORTHONORMAL):
        raise ValueError(f"{name} must have orthonormal columns, got others")
