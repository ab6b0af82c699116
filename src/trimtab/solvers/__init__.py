"""Solvers for optimal transport, low-rank models, causal graphs and discrete search."""

from trimtab.solvers.sinkhorn_newton_sparse import SinkhornNewtonSparseResult, sinkhorn_newton_sparse

__all__ = ["SinkhornNewtonSparseResult", "sinkhorn_newton_sparse"]
