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

When they train on an energy, the authors' release has the constant of the target, $\log Z$, in the condition on nothing
known: there $\ell_\theta$ of nothing is held to $\log Z$, which is fixed at $L \log 2$ for KL and learned for matching,
where $\ell_\theta(x)$ is fitted to the target f(x) as it is. Here nothing known is always held to 0, so that
$\ell_\theta$ is a log-probability, and `MarginalFM` learns $\log Z$ in the term that matches, $\ell_\theta(x)$ to
$f(x) - \log Z$. The release's $\ell_\theta$ is the one here plus $\log Z$: with that, every term has the same value and
the same optimum. The path there is another, since $\log Z$ starts at $L \log K$ here and its gradient comes from the
samples of the matching term in place of the one number of nothing known.

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
