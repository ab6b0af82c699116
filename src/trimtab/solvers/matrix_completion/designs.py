"""Gram matrices of many designs at once, exact ones and those of sketches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.solvers.matrix_completion.regressions import BLOCK, Regressions, ascending, csr

_PRODUCTS = 2**22  # products of two columns of a design that are held at once
_NEAR = 0.9  # cosine of the largest angle between two spaces for which one sketch serves
_FLOOR = 1e-5  # added to a sketched Gram matrix, as a share of its mean diagonal


class Designs:
    """The Gram matrices of all designs, exactly or from sketches, block by block of regressions.

    Each entry of a regression goes to a row of its compressed design: to one of its own if there are enough, else to
    one drawn at random, with a random sign (CountSketch). So sketching costs one product of a sparse matrix, with as
    many non-zeros as there are entries, and short designs are kept exactly.

    Args:
        regressions: whose designs.
        rank: columns of a design.
        rows: most rows of a compressed design; None compresses none.
        dtype: in which to compute.
        generator: draws the sketch.
    """

    def __init__(
        self, regressions: Regressions, rank: int, rows: int | None, dtype: torch.dtype, generator: torch.Generator
    ) -> None:
        of, counts = regressions.of, regressions.counts
        bucket = torch.arange(len(of), device=of.device) - regressions.starts[of]
        signs = torch.ones(len(of), dtype=dtype, device=of.device)
        if rows is not None:
            hashed = counts[of] > rows
            drawn = torch.randint(2 * rows, (int(hashed.sum()),), generator=generator).to(of.device)
            bucket[hashed], signs[hashed] = drawn % rows, (drawn // rows * 2 - 1).to(dtype)
        # Regressions of similar widths stand together, so that the padding of a block to its widest is small.
        widths, self._order = counts.clamp(1, rows).sort()
        ends = _block_ends(widths.tolist(), rank)
        padded, begin = torch.empty_like(widths), 0
        for end in ends:
            padded[begin:end] = widths[end - 1]
            begin = end
        first = torch.empty_like(widths)
        first[self._order] = padded.cumsum(0) - padded
        at = first[of] + bucket
        order = ascending(at * regressions.shape[1] + regressions.row)
        crow = torch.cat([at.new_zeros(1), torch.bincount(at, minlength=int(padded.sum())).cumsum(0)])
        columns, signs = regressions.row[order], signs[order]
        self.dtype, self._rank = dtype, rank
        self._blocks: list[tuple[Tensor, Tensor]] = []
        begin = top = 0
        for end in ends:
            height = (end - begin) * int(padded[begin])
            part = crow[top : top + height + 1]
            low, high = int(part[0]), int(part[-1])
            shape = (height, regressions.shape[1])
            compress = csr(part - low, columns[low:high], signs[low:high], shape)
            self._blocks.append((self._order[begin:end], compress))
            begin, top = end, top + height

    def grams(self, design: Float[Tensor, "m k"]) -> Float[Tensor, "n k k"]:
        """The Gram matrix of each regression's compressed design."""
        design = design.to(self.dtype)
        found = design.new_empty(len(self._order), self._rank, self._rank)
        for which, compress in self._blocks:
            compressed = (compress @ design).view(len(which), -1, self._rank)
            found[which] = compressed.mT @ compressed
        return found


def exact_grams(regressions: Regressions, rank: int) -> Callable[[Tensor], Tensor]:
    """A function of a design that returns the exact Gram matrices (n, k, k), in O(|Omega| k^2)."""
    if regressions.mask is None:
        return Designs(regressions, rank, None, regressions.values.dtype, torch.Generator()).grams
    # Of a dense sample, one large product with the columns' products is faster than many small ones.
    mask = regressions.mask
    first, second = torch.triu_indices(rank, rank, device=mask.device)
    place = torch.empty(rank, rank, dtype=torch.int64, device=mask.device)
    place[first, second] = place[second, first] = torch.arange(len(first), device=mask.device)
    step = max(1, _PRODUCTS // mask.shape[1])

    def grams(design: Tensor) -> Tensor:
        pairs = zip(first.split(step), second.split(step), strict=True)
        triangle = torch.cat([mask @ (design[:, i] * design[:, j]) for i, j in pairs], dim=1)
        return triangle[:, place.flatten()].view(-1, rank, rank)

    return grams


class SketchedPreconditioner:
    """The inverse Gram matrices of sketched designs, for as long as the design spans about the same space.

    Designs are orthonormal. One that has been turned within its space since it was sketched, `design = sketched @ O`,
    has the Gram matrices `O.T @ G @ O`, so that turning the gradients is enough.
    """

    def __init__(self, designs: Designs) -> None:
        self._designs = designs
        self._sketched: Tensor | None = None

    def _serves(self, design: Tensor, ridge: Tensor) -> bool:
        if self._sketched is None or torch.linalg.svdvals(self._sketched.T @ design)[-1] < _NEAR:
            return False
        return bool(((ridge.sort().values - self._ridge).abs() <= 0.5 * self._ridge).all())

    def __call__(self, design: Float[Tensor, "m k"], ridge: Float[Tensor, " k"]) -> Callable[[Tensor], Tensor]:
        """A function that applies the inverses to gradients (n, k)."""
        if self._sketched is None or not self._serves(design, ridge):
            self._sketched, self._ridge = design, ridge.sort().values
            grams = self._designs.grams(design)
            # A sketch may be singular where the design is not; the preconditioner must not be.
            floor = _FLOOR * grams.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(grams.dtype).tiny
            grams.diagonal(dim1=1, dim2=2).add_(ridge.to(floor) + floor[:, None])
            self._inverses = torch.cholesky_inverse(torch.linalg.cholesky(grams))
        turn = self._sketched.T @ design

        def apply(gradients: Tensor) -> Tensor:
            turned = (gradients @ turn.T).to(self._inverses.dtype)[:, :, None]
            return (self._inverses @ turned)[:, :, 0].to(gradients.dtype) @ turn

        return apply


def _block_ends(widths: list[int], rank: int) -> list[int]:
    """Where blocks of regressions, sorted by width, end so that each one's designs stay within `BLOCK` numbers."""
    ends, begin = [], 0
    for end in range(1, len(widths) + 1):
        if end == len(widths) or (end + 1 - begin) * widths[end] * rank > BLOCK:
            ends.append(end)
            begin = end
    return ends
