r"""Completion of a low-rank matrix from a sample of its entries, in time nearly linear in the entries times the rank.

For tables and matrices of ratings that have missing entries and are close to low rank, above all for those too large
to build the normal equations of every row and column at every sweep.

With $P_\Omega$ the sampled entries, it alternates two sets of regressions, one for each column and one for each row,
on a factor that is made orthonormal before each (by QR, turned to the singular directions of the product),

$$
V_j = \argmin_v \sum_{i : (i, j) \in \Omega} (U_i v - M_{ij})^2, \qquad
U_i = \argmin_u \sum_{j : (i, j) \in \Omega} (u V_j - M_{ij})^2,
$$

from the leading singular vectors of $P_\Omega(M)$ whose entries above $2 \mu \sqrt{k / m}$ are set to zero.
Regressions need not be solved exactly. All of a side are solved together by conjugate gradients, each step in
$O(|\Omega| k)$, from what the last sweep left. Where designs are ill-conditioned it pays to precondition by sketches of
them, $(R_j^\top R_j)^{-1}$ with $S_j U_{\Omega_j} = Q_j R_j$.

Reference:
    Yuzhou Gu, Zhao Song, Junze Yin and Lichen Zhang, "Low Rank Matrix Completion via Robust Alternating Minimization in
    Nearly Linear Time", ICLR 2024, arXiv 2302.11068.

As is done in practice, every sweep uses all entries, where the paper's proof gives each a part of its own; sketches are
drawn once; and a start from the last sweep's factor stands in for the paper's start from the sketched solution, so that
a few steps suffice at any accuracy. Where a regression has no more rows than its sketch, it is preconditioned exactly.
A ridge is offered that the paper has not, $\lambda \sum_l v_l^2 / \sigma_l$ with the singular values $\sigma$ of the
product: at convergence it is a penalty $2 \lambda$ on the nuclear norm, and real tables want one.
"""

from trimtab.solvers.matrix_completion.imputer import MatrixCompletion
from trimtab.solvers.matrix_completion.solver import MatrixCompletionResult, complete_matrix

__all__ = ["MatrixCompletion", "MatrixCompletionResult", "complete_matrix"]
