r"""Optimal transport whose plan has at most k non-zero entries in every column.

Made for plans that are carried out entry by entry, where every column can take only so many: tokens sent to experts of
fixed capacity, say (`SparseRouter`). With k = 1 it is unregularised transport, with k as large as the number of rows
it is transport with a squared penalty; the larger k, the smoother and easier the problem.

With the columns $t_j$ of the plan and $c_j$ of the cost, and $\Delta^k_b$ the non-negative vectors of sum $b$ with at
most k non-zeros, the dual and the semi-dual are concave, and their terms need only the k largest entries of a column:

$$
\max_{\alpha, \beta}\ \alpha^\top a + \beta^\top b
- \frac{1}{2\gamma} \sum_j \sum_{i \in \mathrm{top}_k} [\alpha_i + \beta_j - C_{ij}]_+^2,
\qquad
\max_\alpha\ \alpha^\top a
- \sum_j \max_{t \in \Delta^k_{b_j}} (\alpha - c_j)^\top t - \frac{\gamma}{2} \lVert t \rVert^2
$$

Their optimum is that of the convex problem that replaces $\lVert t_j \rVert^2$ by the squared k-support norm, whose
value at a plan with the right marginals bounds it from above: the duality gap reported here.

Reference:
    Tianlin Liu, Joan Puigcerver and Mathieu Blondel, "Sparsity-Constrained Optimal Transport", ICLR 2023, arXiv
    2209.15466.

The paper maximises either dual by L-BFGS or Adam. Both have kinks where entries tie for the k-th place, and for small k
the optimum lies on kinks, where L-BFGS stops short. What is left is then closed by the proximal point method on the
convex problem: a few problems with $\frac{\delta}{2} \lVert T - T' \rVert^2$ added, for the last plan $T'$, whose duals
have no kinks.
"""

from trimtab.solvers.sparse_transport.differentiable import sparse_plan
from trimtab.solvers.sparse_transport.router import SparseRouter
from trimtab.solvers.sparse_transport.solver import SparseTransportResult, sparse_transport

__all__ = ["SparseRouter", "SparseTransportResult", "sparse_plan", "sparse_transport"]
