"""A layer that routes tokens to experts of limited capacity."""

from __future__ import annotations

import math
import warnings

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.ops.arguments import in_range, integer, positive, tensor, tensor_problem
from trimtab.solvers.sparse_transport.differentiable import sparse_plan

_MOST_ERROR = 0.2  # of the tokens' mass


class SparseRouter(nn.Module):
    """Routes the tokens of a batch to experts of limited capacity by sparsity-constrained transport (Section 6).

    Every expert takes the same mass in at most k tokens, so that none overflows. Every token has the same mass to give,
    up to the row error of a small k. Where scores are spread over thousands of `reg`, `max_iter` iterations do not
    balance the loads, and tokens are left without an expert; a warning says so.

    Args:
        reg: weight of the squared penalty on the routing weights, positive, in the unit of the scores: a token is
            divided between experts whose scores (with the potentials that balance the loads) differ by less.
        k: most tokens an expert takes; None takes `capacity_factor` times its share of the batch, rounded up.
        capacity_factor: used where `k` is None; at least 1, so that all tokens fit.
        tol, max_iter, max_proximal: see `sparse_transport`.

    Raises:
        TypeError: a number is not of its type.
        ValueError: an argument is out of its range.

    Example:
        >>> import torch
        >>> scores = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        >>> weights = SparseRouter(reg=0.5)(scores)
        >>> weights.shape, int((weights > 0).sum(0).max())
        (torch.Size([64, 4]), 16)
    """

    def __init__(
        self,
        reg: float = 1.0,
        *,
        k: int | None = None,
        capacity_factor: float = 1.0,
        tol: float = 1e-3,
        max_iter: int = 100,
        max_proximal: int = 0,
    ) -> None:
        super().__init__()
        self.reg = positive("reg", reg)
        self.k = None if k is None else integer("k", k)
        self.capacity_factor = in_range("capacity_factor", capacity_factor, 1, math.inf)
        if (
            positive("tol", tol) < 0
            or integer("max_iter", max_iter) < 1
            or integer("max_proximal", max_proximal, 0) < 0
        ):
            raise ValueError(f"tol and max_iter must be positive, got {tol} and {max_iter}")
        self.tol, self.max_iter, self.max_proximal = tol, max_iter, max_proximal

    def capacity(self, tokens: int, experts: int) -> int:
        """Most tokens that an expert takes of a batch."""
        return min(tokens, self.k or math.ceil(self.capacity_factor * tokens / experts))

    def forward(self, scores: Float[Tensor, "tokens experts"]) -> Float[Tensor, "tokens experts"]:
        """Routing weights: rows sum to about 1, columns to tokens / experts, at most k non-zeros in a column.

        Gradients flow to the scores where tokens are divided. Where each token has one expert its weight is 1 and has
        no gradient; multiply by gates, such as a softmax of the scores, as mixtures with hard routing do.

        Raises:
            TypeError: `scores` is no floating-point tensor.
            ValueError: `scores` is not a finite, non-empty matrix.

        Warns:
            sklearn.exceptions.ConvergenceWarning: more than a fifth of the tokens' mass is not where it should be.
        """
        if problem := tensor_problem(scores=scores):
            raise TypeError(problem)
        if not scores.isfinite().all():
            raise ValueError("scores must be finite, got NaN or infinity")
        if tensor("scores", scores, floating=True).ndim != 2 or 0 in scores.shape:
            raise ValueError(f"scores must be a non-empty matrix (tokens, experts), got shape {tuple(scores.shape)}")
        tokens, experts = scores.shape
        precision = torch.promote_types(scores.dtype, torch.float32)  # half precision would not sum to one
        a, b = (scores.new_full((n,), 1 / n, dtype=precision) for n in (tokens, experts))
        plan = sparse_plan(
            -scores,
            a,
            b,
            self.reg * tokens,
            self.capacity(tokens, experts),
            tol=self.tol,
            max_iter=self.max_iter,
            max_proximal=self.max_proximal,
        )
        row_error = float((tokens * plan.detach().sum(1) - 1).abs().mean())
        if row_error > _MOST_ERROR:
            from sklearn.exceptions import ConvergenceWarning

            warnings.warn(
                f"SparseRouter left tokens without an expert: their weights sum to one but for {row_error:.2g} on "
                f"average; allow more iterations than max_iter = {self.max_iter}, or a larger reg than {self.reg:g}",
                ConvergenceWarning,
                stacklevel=2,
            )
        return tokens * plan

    def extra_repr(self) -> str:
        return f"reg={self.reg}, k={self.k}, capacity_factor={self.capacity_factor}"
