"""Optimizers, sharpness-aware training, and the dynamics of learning."""
