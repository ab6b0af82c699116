r"""Mean and scatter of every class, of which those of pooled data follow exactly from those of the parts.

What clients may share of their features instead of the features. With $n_k$ samples of a class on client $k$, their
mean $\mu_k$ and scatter $S_k = \sum_i (z_i - \mu_k)(z_i - \mu_k)^\top$, the pooled ones are

$$
n = \sum_k n_k, \qquad \mu = \frac{1}{n} \sum_k n_k\,\mu_k, \qquad
S = \sum_k \big[ S_k + n_k\,(\mu_k - \mu)(\mu_k - \mu)^\top \big]
$$

and the covariance is $S / (n - 1)$ or $S / n$. Nothing large is subtracted from anything large, so float32 will do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.ops.arguments import finite_tensor, integer, labels


@dataclass(frozen=True)
class ClassMoments:
    """Class sizes, means and scatters; means and scatters of a class without samples are zero.

    Attributes:
        counts: samples of each class.
        means: of each class.
        scatters: sum of the outer products of the deviations from the class mean.

    Example:
        >>> z, y = torch.randn(30, 4), torch.arange(30) % 3
        >>> parts = [ClassMoments.from_features(z[i::2], y[i::2], num_classes=3) for i in range(2)]
        >>> whole = ClassMoments.merge(parts)
        >>> torch.allclose(whole.covariances()[1], torch.cov(z[y == 1].T), atol=1e-6)
        True
    """

    counts: Int[Tensor, " classes"]
    means: Float[Tensor, "classes dim"]
    scatters: Float[Tensor, "classes dim dim"]

    @classmethod
    def from_features(
        cls, features: Float[Tensor, "n dim"], targets: Int[Tensor, " n"], num_classes: int
    ) -> ClassMoments:
        """Those of some data.

        Args:
            features: one row a sample; in half precision they are raised to float32.
            targets: their labels.
            num_classes: number of classes.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: there are not as many targets as features, or one is out of range, or a feature is not finite.
        """
        z = finite_tensor("features", features, ndim=2, floating=True)
        y = labels("targets", targets, integer("num_classes", num_classes), len(z)).to(z.device)
        z = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
        counts = torch.bincount(y, minlength=num_classes)
        sums = torch.zeros(num_classes, z.shape[1], dtype=z.dtype, device=z.device).index_add_(0, y, z)
        means = sums / counts.clamp_min(1)[:, None]
        own = z.index_select(0, y.argsort(stable=True)).split(counts.tolist())
        deviations = [rows - mean for rows, mean in zip(own, means, strict=True)]
        return cls(counts, means, torch.stack([rows.T @ rows for rows in deviations]))

    @classmethod
    def merge(cls, parts: Sequence[ClassMoments]) -> ClassMoments:
        """Those of the pooled data; in any order and in any grouping the same.

        Raises:
            ValueError: there are no parts, or they differ in classes or dimension.
        """
        if not parts:
            raise ValueError("parts must be at least one, got none")
        if len(shapes := {tuple(part.means.shape) for part in parts}) > 1:
            raise ValueError(f"parts must have the same (classes, dim), got {sorted(shapes)}")
        sizes = torch.stack([part.counts for part in parts])
        counts, means = sizes.sum(0), torch.stack([part.means for part in parts])
        weights = sizes.to(means.dtype)
        mean = (weights[..., None] * means).sum(0) / counts.clamp_min(1)[:, None]
        apart = weights.sqrt()[..., None] * (means - mean)
        between = torch.einsum("kcd,kce->cde", apart, apart)
        return cls(counts, mean, torch.stack([part.scatters for part in parts]).sum(0) + between)

    def covariances(self, *, unbiased: bool = True) -> Float[Tensor, "classes dim dim"]:
        """Of each class, divided by n - 1 or by n; zero where that is not positive."""
        divisor = (self.counts - int(unbiased)).clamp_min(1)
        return self.scatters / divisor[:, None, None]

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """As what travels in a message."""
        return {prefix + "counts": self.counts, prefix + "means": self.means, prefix + "scatters": self.scatters}

    @classmethod
    def from_tensors(cls, sent: Mapping[str, Tensor], prefix: str = "") -> ClassMoments:
        """The inverse of `tensors`.

        Raises:
            ValueError: something is missing.
        """
        names = [prefix + name for name in ("counts", "means", "scatters")]
        if missing := [name for name in names if name not in sent]:
            raise ValueError(f"sent must hold {', '.join(names)}, got none of {', '.join(missing)}")
        return cls(*(sent[name] for name in names))


def gaussian_factors(covariances: Float[Tensor, "... dim dim"]) -> Float[Tensor, "... dim dim"]:
    r"""Matrices $F$ with $F F^\top$ the covariance, whose negative eigenvalues (by rounding) are taken for zero.

    Unlike Cholesky's, they exist for singular matrices: directions without variance get none.

    Example:
        >>> gaussian_factors(torch.zeros(2, 2))
        tensor([[0., 0.],
                [0., 0.]])
    """
    if not isinstance(covariances, Tensor) or not covariances.is_floating_point():
        raise TypeError(
            "covariances must be a floating-point tensor, "
            f"got {getattr(covariances, 'dtype', type(covariances).__name__)}"
        )
    if covariances.ndim < 2 or covariances.shape[-1] != covariances.shape[-2]:
        raise ValueError(f"covariances must be square, got shape {tuple(covariances.shape)}")
    values, vectors = torch.linalg.eigh(covariances.double())
    # Row by row in memory, as what has travelled is: otherwise products differ in their last bits.
    found: Tensor = (vectors * values.clamp_min(0).sqrt()[..., None, :]).to(covariances.dtype).contiguous()
    return found


def sample_virtual(
    moments: ClassMoments,
    per_class: int,
    *,
    unbiased: bool = True,
    generator: torch.Generator | None = None,
    noise: Float[Tensor, "present per_class dim"] | None = None,
) -> tuple[Float[Tensor, "drawn dim"], Int[Tensor, " drawn"]]:
    """Features drawn from the Gaussian of each class that has samples.

    Args:
        moments: of the data.
        per_class: draws for each class.
        unbiased: which covariance.
        generator: decides the draws.
        noise: standard normal draws to be used instead, for each class that has samples.

    Returns:
        Features, class by class, and their labels.

    Raises:
        ValueError: `per_class` is not positive, or `noise` has another shape.
    """
    integer("per_class", per_class)
    present = moments.counts.nonzero().flatten()
    means = moments.means[present]
    shape = (len(present), per_class, means.shape[1])
    if noise is None:
        noise = torch.randn(shape, generator=generator, dtype=means.dtype)
    elif noise.shape != shape:
        raise ValueError(f"noise must have shape {shape}, got {tuple(noise.shape)}")
    factors = gaussian_factors(moments.covariances(unbiased=unbiased)[present])
    drawn = means[:, None] + noise.to(means) @ factors.mT
    return drawn.flatten(0, 1), present.repeat_interleave(per_class)
