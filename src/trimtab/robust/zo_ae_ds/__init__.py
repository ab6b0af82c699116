r"""ZO-AE-DS: defends a classifier that answers queries only, by a denoiser trained without its gradients.

A denoiser in front of a classifier, and Gaussian noise in front of the denoiser, make a classifier that is certifiably
robust (denoised smoothing). Where the classifier is a black box, gradients are estimated from its answers, and an
auto-encoder between the two makes them few enough: they are estimated in its code $z$ of $d$ numbers.

$$
z = E_\psi(D_\theta(x + \sigma n)), \qquad \ell(z) = \mathrm{CE}\bigl(h(G(z)), \arg\max h(x)\bigr), \qquad
L = \tfrac1B \sum_b \langle z_b, \mathrm{sg}(\hat\nabla \ell(z_b)) \rangle
$$

with $h$ the black box, $G$ the frozen decoder, and the gradient estimated coordinate by coordinate (CGE, $2d$ queries)
or along $q$ random directions (RGE, $q + 1$ queries):

$$
\hat g_k = \frac{\ell(z + \mu e_k) - \ell(z - \mu e_k)}{2 \mu}, \qquad
\hat g = \frac{d}{q} \sum_{j=1}^{q} \frac{\ell(z + \mu u_j) - \ell(z)}{\mu}\, u_j, \quad \|u_j\| = 1 .
$$

The auto-encoder is trained first, by the squared error of clean images. One of the two batched estimators in the
authors' code divides the coordinate-wise estimate by $q$; the sum above is the paper's.

Reference: Yimeng Zhang, Yuguang Yao, Jinghan Jia, Jinfeng Yi, Mingyi Hong, Shiyu Chang, Sijia Liu, "How to Robustify
Black-Box ML Models? A Zeroth-Order Optimization Perspective", ICLR 2022, arXiv 2203.14195. Certification is that of
Cohen, Rosenfeld and Kolter, arXiv 1902.02918.
"""

from trimtab.robust.zo_ae_ds.defense import BlackBoxDefense
from trimtab.robust.zo_ae_ds.estimates import Method, Values, num_queries, zo_gradient, zo_surrogate
from trimtab.robust.zo_ae_ds.smoothing import Certificate, Logits, certify

__all__ = [
    "BlackBoxDefense",
    "Certificate",
    "Logits",
    "Method",
    "Values",
    "certify",
    "num_queries",
    "zo_gradient",
    "zo_surrogate",
]
