r"""SP²OT: clusters of unequal size from pseudo-labels that move the confident samples first, as one transport plan.

For deep clustering of long-tailed data, where pseudo-labels of equal size split the large classes. A plan moves the
share $\rho$ of the samples, the cheapest ones, to clusters whose sizes only lean towards equal ones, and likes to send
neighbours the same way; $\rho$ grows until everyone takes part:

$$
\min_{Q}\ \langle Q, -\log P \rangle - \lambda \langle S, Q Q^\top \rangle
+ \gamma\, \mathrm{KL}\bigl(Q^\top 1 \,\big\|\, \tfrac{\rho}{K} 1\bigr)
\quad\text{subject to}\quad Q \ge 0,\ Q 1 \le \tfrac1N 1,\ 1^\top Q 1 = \rho,
\qquad \rho_t = \rho_0 + (1 - \rho_0)\, e^{-5 (1 - t / T)^2}
$$

where $P$ are the network's predictions and $S$ are similarities of frozen features. The term in $S$ is replaced by its
tangent, $C \leftarrow -\log P - \lambda (S + S^\top) Q$, and what is left is the partial transport of
`trimtab.ops.partial_transport`; repeated, this is majorisation and minimisation where $S$ is positive semidefinite.
For other $S$ a step that would raise the objective is halved until it does not. The pseudo-labels are $N Q$, whose rows
sum to at most one: what a sample lacks is how little it counts.

The authors take similarities of the whole data set's features as they are, and of these the part between the samples of
a plan. `SP2OTClustering` does so too, with all samples in the plan; `SP2OT` knows its batch and its memory alone, seeks
neighbours among them, and its memory holds features of length one.

The plain parts are `sp2ot` and `progressive_mass`; `SP2OT` gives the loss of a batch and its memory for a training loop
of your own, and `SP2OTClustering` is an estimator that plans over all samples once an epoch.

Reference: Chuyu Zhang, Hui Ren and Xuming He, "SP²OT: Semantic-Regularized Progressive Partial Optimal Transport for
Imbalanced Clustering", 2024, arXiv 2404.03446.
"""

from trimtab.semisup.sp2ot.estimator import SP2OTClustering
from trimtab.semisup.sp2ot.plan import SemanticPlan, knn_gaussian_affinity, progressive_mass, sp2ot
from trimtab.semisup.sp2ot.rule import SP2OT, partial_cross_entropy

__all__ = [
    "SP2OT",
    "SP2OTClustering",
    "SemanticPlan",
    "knn_gaussian_affinity",
    "partial_cross_entropy",
    "progressive_mass",
    "sp2ot",
]
