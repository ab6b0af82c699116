"""Quantisation, pruning, low-rank factorisation and distillation of models and data."""
