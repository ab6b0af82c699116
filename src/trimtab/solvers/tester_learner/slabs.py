"""Slabs of samples by their distance to a boundary, which bound how much halfspaces at a small angle differ."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from trimtab.ops.arguments import in_range, positive
from trimtab.solvers.tester_learner.directions import Matrix, orthogonal, read_samples, unit

_FAR = 3.0  # the last slab is all beyond it
_MOST_SLABS = 1000


def disagreement_bound(w: Float[Matrix, " d"], X: Float[Matrix, "n d"], angle: float, width: float) -> float:
    """A bound on the share of X on which the halfspace of w differs from any other within an angle of it.

    Args:
        w: (d,) weights, not zero.
        X: (n, d) samples.
        angle: in radians, between 0 and pi / 2.
        width: of the slabs; the bound is sharpest where it is small against the angle.

    Raises:
        TypeError: an argument is no array of numbers.
        ValueError: an argument is out of its range or not finite, or shapes do not fit.

    Example:
        >>> X = np.random.default_rng(0).normal(size=(10_000, 3))
        >>> bound = disagreement_bound(np.array([1.0, 0.0, 0.0]), X, angle=0.2, width=0.05)
        >>> 0.2 / np.pi < bound < 0.4
        True
    """
    read_samples(w, X)
    angle, width = in_range("angle", angle, 0, math.pi / 2, "left"), positive("width", width)
    return Slabs.of(unit(w), X, width).disagreement(angle)


@dataclass(frozen=True)
class Slabs:
    """Of samples by their distance to a boundary: how many are in each slab, and how wide they are along it.

    Attributes:
        width: of a slab.
        counts: samples in each.
        spreads: largest eigenvalue of the second moments orthogonal to w; 0 in an empty slab.
    """

    width: float
    counts: Matrix
    spreads: Matrix

    @classmethod
    def of(cls, w: Matrix, X: Matrix, width: float) -> Slabs:
        """The slabs of samples (n, d) along the boundary of a unit vector."""
        last = num_slabs(width) - 1
        index = np.minimum(np.abs(X @ w) / width, last).astype(np.int64)
        along = X[np.argsort(index, kind="stable")] @ orthogonal(w)
        counts = np.bincount(index, minlength=last + 1)
        parts = np.split(along, np.cumsum(counts)[:-1])
        second = np.stack([part.T @ part / max(len(part), 1) for part in parts])
        spreads = np.asarray(np.linalg.eigvalsh(second)[:, -1]) if along.shape[1] else np.zeros(last + 1)
        return cls(width, counts.astype(np.float64), spreads)

    def disagreement(self, angle: float) -> float:
        """The bound of `disagreement_bound`."""
        # Within the angle, only points with <v, x> tan(angle) >= |<w, x>| can change sides, for a unit v orthogonal
        # to w.
        far = np.arange(1, len(self.counts)) * self.width
        shares = np.append(1, np.minimum(1, self.spreads[1:] * (math.tan(angle) / far) ** 2))
        return float(self.counts @ shares / self.counts.sum())


def num_slabs(width: float) -> int:
    """How many slabs of a width there are."""
    return min(math.ceil(_FAR / width), _MOST_SLABS) + 1
