"""Studies of optimizers, sharpness-aware training, and the dynamics of learning."""
