"""Solvers for optimal transport, low-rank models, causal graphs and discrete search."""
