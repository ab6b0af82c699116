r"""MaM: a network that gives the log-probability of any part of a discrete sequence in one evaluation.

For discrete data where marginals are wanted often: an any-order autoregressive model needs an evaluation for every
known position, this needs one. It is also a way to train any-order models on an energy instead of data. Beside the
conditionals $p_\phi(x_i \mid x_S)$ stands a second network for the log-marginals $\ell_\theta(x_S)$; what ties them is
that a marginal times a conditional is a marginal:

$$
\ell_\theta(x_{S \cup i}) = \ell_\theta(x_S) + \log p_\phi(x_i \mid x_S) \quad \text{for all } S,\ i \notin S,
\qquad \ell_\theta(\text{nothing known}) = 0 .
$$

`marginal_consistency_loss` is the squared error of that at a random S and i, times the length. Three rules train by it:
`MarginalLikelihood` on data (conditionals first, marginals after them), `MarginalKL` and `MarginalFM` on an energy.

The authors anchor $\ell_\theta$ of nothing at $L \log K$ when they train on an energy by KL; here it is at 0, so that
it is a log-probability: the objectives are the same up to that constant.

Reference: Sulin Liu, Peter J. Ramadge and Ryan P. Adams, "Generative Marginalization Models", ICML 2024, arXiv
2310.12920.
"""

from trimtab.generative.mam.marginals import Marginals, marginal_consistency_loss, reverse_kl_surrogate
from trimtab.generative.mam.rules import MarginalFM, MarginalKL, MarginalLikelihood

__all__ = [
    "MarginalFM",
    "MarginalKL",
    "MarginalLikelihood",
    "Marginals",
    "marginal_consistency_loss",
    "reverse_kl_surrogate",
]
