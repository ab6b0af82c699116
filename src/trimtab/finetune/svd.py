"""Singular value decomposition of weights: truncated factors, and how far training moved them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.ops.arguments import finite_tensor, integer, one_of, tensor_problem


class SVDFactors(NamedTuple):
    """`U @ diag(S) @ Vh`, singular values in descending order."""

    U: Float[Tensor, "out r"]
    S: Float[Tensor, " r"]
    Vh: Float[Tensor, "r in"]


@dataclass(frozen=True)
class SingularDrift:
    """How far a weight has moved from where it began.

    Attributes:
        values: mean |sigma_i - sigma_i^0|.
        vectors: 1 - mean (|<u_i, u_i^0>| + |<v_i, v_i^0>|) / 2, from 0 (same directions) to 1 (orthogonal).
    """

    values: float
    vectors: float


def as_matrix(weight: Float[Tensor, "out ..."]) -> Float[Tensor, "out in"]:
    """The weight as adapters see it: one row per output, in at least float32.

    Raises:
        TypeError: `weight` is not floating-point.
        ValueError: `weight` has fewer than two dimensions, or NaN or infinite entries.
    """
    weight = finite_tensor("weight", weight, floating=True)
    if weight.dim() < 2:
        raise ValueError(f"weight must have at least 2 dimensions, got shape {tuple(weight.shape)}")
    return weight.detach().flatten(1).to(torch.promote_types(weight.dtype, torch.float32))


def svd_factors(
    weight: Float[Tensor, "out ..."], r: int, which: Literal["principal", "minor"] = "principal"
) -> SVDFactors:
    """The r largest or smallest singular triplets of a weight.

    Convolution kernels count as (out, in * height * width) matrices. Signs are fixed so that the largest entry of
    every left vector is positive; half-precision weights are decomposed in float32.

    Args:
        weight: any floating-point weight of two or more dimensions.
        r: number of triplets, 1 to min(out, in).
        which: "principal" for the largest, "minor" for the smallest.

    Raises:
        TypeError: `weight` is not floating-point.
        ValueError: `weight` is not a finite matrix, or `r` or `which` is out of range.

    Example:
        >>> svd_factors(torch.diag(torch.tensor([1.0, 4.0, 2.0])), r=2).S
        tensor([4., 2.])
        >>> svd_factors(torch.diag(torch.tensor([1.0, 4.0, 2.0])), r=2, which="minor").S
        tensor([2., 1.])
    """
    one_of("which", which, ("principal", "minor"))
    matrix = as_matrix(weight)
    integer("r", r, 1, min(matrix.shape))
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    keep = slice(None, r) if which == "principal" else slice(-r, None)
    U, S, Vh = U[:, keep], S[keep], Vh[keep]
    sign = U.gather(0, U.abs().argmax(0, keepdim=True)).squeeze(0).sign()
    return SVDFactors((U * sign).contiguous(), S.contiguous(), (Vh * sign[:, None]).contiguous())


def singular_drift(
    before: Float[Tensor, "out ..."], after: Float[Tensor, "out ..."], r: int | None = None
) -> SingularDrift:
    """How far training moved the singular values and directions of a weight (SORSA, section on SVD analysis).

    Triplets are matched by their rank, so two that changed places count as drift.

    Args:
        before, after: the weight at two times.
        r: how many of the largest triplets to look at; all of them by default.

    Raises:
        ValueError: the shapes differ, or `r` is out of range.

    Example:
        >>> singular_drift(torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([3.5, 1.0])))
        SingularDrift(values=0.25, vectors=0.0)
    """
    if problem := tensor_problem(before=before, after=after):
        raise TypeError(problem)
    if before.shape != after.shape:
        raise ValueError(f"before and after must agree in shape, got {tuple(before.shape)} and {tuple(after.shape)}")
    r = min(as_matrix(before).shape) if r is None else r
    old, new = svd_factors(before, r), svd_factors(after, r)
    overlap = ((old.U * new.U).sum(0).abs() + (old.Vh * new.Vh).sum(1).abs()).mean() / 2
    return SingularDrift((new.S - old.S).abs().mean().item(), (1 - overlap).clamp(0, 1).item())
