"""One least squares problem for each row or column of a sampled matrix, and how to solve them all together."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

_DENSE = 0.2  # share of sampled entries from which dense products are faster
BLOCK = 2**18  # numbers in the designs that are held at once, so that they stay in the cache
_MAX_INNER = 100


class Regressions:
    """One least squares problem for each row (or column) of a sampled matrix, on the factor of the other side.

    Regression j explains `values[entries of j]` by the rows of the design that those entries name. Residuals are a
    (n, m) matrix that is zero off the sample: sparse, or dense where that makes faster products.

    Args:
        of: to which regression each entry belongs.
        row: which row of the design it uses.
        values: the entries.
        shape: (n, m), the numbers of regressions and of rows of the design.
        name: what a regression stands for, "row" or "column", for messages.
    """

    def __init__(self, of: Tensor, row: Tensor, values: Tensor, shape: tuple[int, ...], name: str) -> None:
        order = ascending(of * shape[1] + row)
        self.of, self.row, self.shape, self.name = of[order], row[order], shape, name
        self.counts = torch.bincount(of, minlength=shape[0])
        self.starts = torch.cat([self.counts.new_zeros(1), self.counts.cumsum(0)])
        values = values[order]
        self.mask: Tensor | None = None
        if len(values) > _DENSE * shape[0] * shape[1]:
            self.values = values.new_zeros(shape).index_put_((self.of, self.row), values)
            self.mask = torch.zeros_like(self.values).index_put_((self.of, self.row), values.new_ones(()))
        else:
            self.values = csr(self.starts, self.row, values, shape)

    def check_counts(self, rank: int) -> None:
        """Refuses regressions with fewer entries than unknowns."""
        if (few := self.counts < rank).any():
            where = int(few.nonzero()[0])
            raise ValueError(
                f"rank must be at most the number of entries in every row and column, got {rank}, and {self.name} "
                f"{where} has {int(self.counts[where])}; give a reg above zero, or a lower rank"
            )

    def products(self, x: Float[Tensor, "n k"], design: Float[Tensor, "m k"]) -> Tensor:
        """What the coefficients x predict, on the sample."""
        return self._sampled(x, design, 0.0, 1.0)

    def residual(self, x: Float[Tensor, "n k"], design: Float[Tensor, "m k"]) -> Tensor:
        """Values less what the coefficients x predict, on the sample."""
        return self._sampled(x, design, 1.0, -1.0)

    def _sampled(self, x: Tensor, design: Tensor, beta: float, alpha: float) -> Tensor:
        if self.mask is not None:
            return torch.addmm(self.values, x, design.T, beta=beta, alpha=alpha).mul_(self.mask)
        if x.is_cuda or torch.backends.mkl.is_available():
            return cast(Tensor, torch.sparse.sampled_addmm(self.values, x, design.T, beta=beta, alpha=alpha))
        predicted = torch.cat([(x[of] * design[row]).sum(1) for of, row in zip(*self._pieces(x.shape[1]), strict=True)])
        return csr(self.starts, self.row, beta * self.values.values() + alpha * predicted, self.shape)

    def _pieces(self, rank: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        size = max(1, BLOCK // rank)
        return self.of.split(size), self.row.split(size)


def conjugate_gradients(
    regressions: Regressions,
    design: Float[Tensor, "m k"],
    start: Float[Tensor, "n k"],
    precondition: Callable[[Tensor], Tensor],
    *,
    tol: float,
    ridge: Tensor | float = 0.0,
    max_iter: int = _MAX_INNER,
) -> tuple[Float[Tensor, "n k"], int]:
    """Solves all regressions together to a share `tol` of the error that they start with.

    The error is measured by the preconditioner, and summed over the regressions. Where that is (nearly) the Gram
    matrix, it is the excess of the residual's norm over the least one.

    Returns:
        The coefficients, and the number of products with the normal equations.
    """
    x = start.clone()
    rest = regressions.residual(x, design) @ design - ridge * x
    scaled = precondition(rest)
    size = (rest * scaled).sum(1)
    goal = tol**2 * float(size.sum())
    search = scaled
    steps = 0
    while steps < max_iter and float(size.sum()) > goal:
        image = regressions.products(search, design) @ design + ridge * search
        steps += 1
        curvature = (search * image).sum(1)
        length = torch.where(curvature > 0, size / curvature, 0.0)[:, None]
        x.add_(length * search)
        rest.sub_(length * image)
        scaled = precondition(rest)
        previous, size = size, (rest * scaled).sum(1)
        search = scaled + torch.where(previous > 0, size / previous, 0.0)[:, None] * search
    return x, steps


def normal_equations(
    regressions: Regressions,
    grams: Callable[[Tensor], Tensor],
    design: Float[Tensor, "m k"],
    ridge: Float[Tensor, " k"],
) -> Float[Tensor, "n k"]:
    """Solves all regressions exactly, by the Gram matrices (n, k, k) that `grams` makes of the design.

    Raises:
        ValueError: the entries of a regression do not determine its coefficients.
    """
    matrices = grams(design)
    matrices.diagonal(dim1=1, dim2=2).add_(ridge)
    triangles, failed = torch.linalg.cholesky_ex(matrices)
    if failed.any():
        where = int(failed.nonzero()[0])
        raise ValueError(
            f"rank must be as low as the entries of every row and column determine, got {design.shape[1]}, more than "
            f"the entries of {regressions.name} {where} determine; give a reg above zero, or a lower rank"
        )
    right = regressions.values @ design
    return torch.cholesky_solve(right[:, :, None], triangles)[:, :, 0]


def ascending(keys: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The order in which different keys rise; on a CPU by NumPy, which is several times faster at it."""
    return torch.from_numpy(np.argsort(keys.numpy())) if keys.device.type == "cpu" else keys.argsort()


def csr(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A sparse matrix from where its rows start, and its entries in their order."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR|invariant).*")  # that they are in beta
        return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)
