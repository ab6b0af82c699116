"""Augmentation, contrastive learning, reweighting and clustering on graphs."""
