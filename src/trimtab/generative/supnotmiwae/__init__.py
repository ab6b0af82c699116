r"""supnotMIWAE: classifies time series with holes by averaging over many ways to fill them.

For series of which much is missing, perhaps because of the very values that are (a test not ordered, a sensor out of
its range). A deep generative model fills the holes, a classifier reads the filled series, both are trained by one
bound, and the prediction carries the uncertainty about what is missing. Trained naively the classifier reads what is
observed alone and the fillings stay meaningless; *ObsDropout* hides observed values from it, so that the fillings must
help.

With what is observed $x^o$, its mask $s$, latents $z_k \sim q(z \mid x^o)$, a mask $m$ that keeps an observed value
with probability $1 - \rho$, $s' = s\,m$, and $\hat x_k$ the observed values that are kept, the rest drawn from
$p(x \mid z_k)$ and blended with the last value kept,

$$
\log p(y, x^o, s') \ge E\Bigl[\log \tfrac1K \sum_k p(y \mid \hat x_k)\, p(s' \mid \hat x_k)\, r_k\Bigr], \qquad
r_k = \frac{p(x^o \mid z_k)\, p(z_k)\, p(m)}{q(z_k \mid x^o)},
$$

$$
p(y \mid x^o, s) \approx \sum_k w_k\, p(y \mid \hat x_k), \qquad w_k \propto r_k\, p(s \mid \hat x_k),
$$

the latter without dropout. Without a model of $s$ it is supMIWAE, which takes values to be missing at random.

Reference: SeungHyun Kim, Hyunsu Kim, EungGu Yun, Hwangrae Lee, Jaehun Lee and Juho Lee, "Probabilistic Imputation for
Time-series Classification with Missing Data", ICML 2023, arXiv 2308.06738.
"""

from trimtab.generative.supnotmiwae.holes import decay_impute, last_observed, obs_dropout
from trimtab.generative.supnotmiwae.model import Fillings, Prediction, SupNotMIWAE
from trimtab.generative.supnotmiwae.prior import cauchy_kernel, latent_log_prob

__all__ = [
    "Fillings",
    "Prediction",
    "SupNotMIWAE",
    "cauchy_kernel",
    "decay_impute",
    "last_observed",
    "latent_log_prob",
    "obs_dropout",
]
