"""Bags of samples: how they weigh, and how large they are."""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float

Weighting = Literal["bag", "sample"]


def bag_sizes(bag_index: np.ndarray, num_samples: int) -> Float[np.ndarray, " bags"]:
    """Members of each bag, none of which may be empty.

    Raises:
        TypeError: if `bag_index` does not hold integers.
        ValueError: if it has another shape, is negative, or leaves a bag empty.
    """
    if bag_index.dtype.kind not in "iu":
        raise TypeError(f"bag_index must hold integers, got {bag_index.dtype}")
    if bag_index.shape != (num_samples,):
        raise ValueError(f"bag_index must be ({num_samples},), one entry per sample, got shape {bag_index.shape}")
    if bag_index.min() < 0:
        raise ValueError(f"bag_index must be at least 0, got {bag_index.min()}")
    sizes = np.bincount(bag_index).astype(np.float64)
    if not sizes.all():
        raise ValueError(f"bag_index must number bags without gaps, got none of bag {int(sizes.argmin())}")
    return sizes
