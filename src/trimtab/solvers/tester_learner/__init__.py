r"""Tester-learner for halfspaces: a linear classifier under label noise that comes with a test of its own assumptions.

For binary labels where a fit that may have gone wrong must not go unnoticed. If the samples are standard Gaussian, it
accepts and its error is near the best of any halfspace through the origin; if it accepts, the properties that this
guarantee rests on were found in the data.

Projected stochastic gradient descent on the unit sphere minimises a smoothed error, whose gradient comes from the
samples in a band around the boundary alone:

$$
L_\sigma(w) = \mathbb{E}\left[ \ell_\sigma(-y \langle w, x \rangle) \right], \qquad
w \leftarrow \frac{w - \beta \nabla L_\sigma(w)}{\lVert w - \beta \nabla L_\sigma(w) \rVert}
$$

where $\ell_\sigma$ rises from 0 at $-\sigma/2$ to 1 at $\sigma/2$, with slope $1/\sigma$ up to $|t| = \sigma/6$ and
cubic joins beyond. Under Massart noise (each label is wrong with a probability of at most $\eta$) a stationary point w,
or -w, is within an angle $O(\sigma / (1 - 2\eta))$ of the best halfspace if the mass of two bands
$|\langle w, x \rangle| \le \sigma/6, \sigma/2$ is $\Theta(\sigma)$ and the moments on them, orthogonal to w, are a
Gaussian's. A small angle means a small error if no slab $i\sigma \le |\langle w, x \rangle| < (i+1)\sigma$ is too heavy
or too wide: with $\tau = \tan\theta$, for every w' within $\theta$ of w,

$$
P\left[\operatorname{sign}\langle w, x\rangle \ne \operatorname{sign}\langle w', x\rangle\right] \le
\sum_i P[\text{slab}_i] \min\left(1,
\frac{\tau^2}{i^2 \sigma^2} \lambda_{\max} \mathbb{E}[x_\perp x_\perp^\top \mid \text{slab}_i]\right) = O(\theta)
$$

Reference: Aravind Gollakota, Adam R. Klivans, Konstantinos Stavropoulos and Arsen Vasilyan, "An Efficient
Tester-Learner for Halfspaces", ICLR 2024, arXiv 2302.14853.

Built from the abstract and the published reviews: the tests' constants, and thresholds that follow the sample size, are
our own.
"""

from trimtab.solvers.tester_learner.certificate import (
    CertificateTest,
    HalfspaceCertificate,
    RejectedError,
    RejectionWarning,
)
from trimtab.solvers.tester_learner.descent import halfspace_iterates, smoothed_error
from trimtab.solvers.tester_learner.estimator import HalfspaceTesterLearner
from trimtab.solvers.tester_learner.slabs import disagreement_bound

__all__ = [
    "CertificateTest",
    "HalfspaceCertificate",
    "HalfspaceTesterLearner",
    "RejectedError",
    "RejectionWarning",
    "disagreement_bound",
    "halfspace_iterates",
    "smoothed_error",
]
