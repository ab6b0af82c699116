"""Sparse autoencoders, attributions, part prototypes and tests of shape sensitivity."""
