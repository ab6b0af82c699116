r"""Entropic optimal transport by a few Sinkhorn sweeps followed by Newton steps with a sparse Hessian.

It pays where Sinkhorn needs hundreds or thousands of sweeps: with weak regularisation, or where the marginal error must
be small. With strong regularisation Sinkhorn is done before the first Newton step would help.

With $P_{ij} = \exp((f_i + g_j - C_{ij}) / \varepsilon)$, Sinkhorn and Newton maximise the same concave potential, whose
negative Hessian is the plan beside its row and column sums. Most entries of the plan are nearly zero, so the
off-diagonal blocks are replaced by the few that matter, $S$, while the diagonal keeps the sums of all entries:

$$
\max_{f, g}\ a^\top f + b^\top g - \varepsilon \sum_{ij} P_{ij}, \qquad
\frac{1}{\varepsilon}
\begin{pmatrix} \mathrm{diag}(P 1) & S \\ S^\top & \mathrm{diag}(P^\top 1) \end{pmatrix}
\begin{pmatrix} \Delta f \\ \Delta g \end{pmatrix}
= \begin{pmatrix} a - P 1 \\ b - P^\top 1 \end{pmatrix}
$$

Reference:
    Xun Tang, Michael Shavlovsky, Holakou Rahmanian, Elisa Tardini, Kiran Koshy Thekumparampil, Tesi Xiao and Lexing
    Ying, "Accelerating Sinkhorn Algorithm with Sparse Newton Iterations", ICLR 2024, arXiv 2401.12253.

Where this differs from the paper's algorithm, to the same solution: every step ends with the `g` that is best for its
`f`, so that the system reduces to one for $\Delta f$ alone, without the null direction $(1, -1)$'s growth and with half
the conjugate gradient steps; the warm-up lowers the regularisation in stages; systems are solved only as accurately as
the error is small; and the number of kept entries follows the plan instead of being fixed.

A stage of the warm-up starts where the last two, continued in a straight line, point to: as the regularisation falls,
the potentials become linear in it. It is left when the marginal error is small and every row, however little mass it
has, holds about what it should: rows that have lost their mass, which the marginal error does not show, would stall the
next stage's Newton steps. Where a stage cannot be solved in a few steps, one nearer to the last is put in between.
"""

from trimtab.solvers.sinkhorn_newton_sparse.entries import largest_entries, mass_entries
from trimtab.solvers.sinkhorn_newton_sparse.solver import (
    SinkhornNewtonSparseResult,
    SparsePlan,
    newton_direction,
    sinkhorn_newton_sparse,
)
from trimtab.solvers.sinkhorn_newton_sparse.stages import warm_up

__all__ = [
    "SinkhornNewtonSparseResult",
    "SparsePlan",
    "largest_entries",
    "mass_entries",
    "newton_direction",
    "sinkhorn_newton_sparse",
    "warm_up",
]
