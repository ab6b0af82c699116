r"""How a denoiser generalises: its bias-free network, the basis in which it shrinks, and its own error estimate.

For asking whether a denoiser has learnt a density or its training set, and what it does to an image. A network without
additive constants is linear around every image, $f(y) = J_y\, y$, so that it shrinks in the basis of its Jacobian's
eigenvectors, which oscillate along the contours of that image:

$$
f(y) = \sum_k \lambda_k \langle y, e_k\rangle\, e_k, \qquad
\mathrm{MSE} = \mathbb{E}\left[2\sigma^2 \operatorname{tr} J_y + \lVert f(y)-y\rVert^2 - n\sigma^2\right],
\qquad \lambda_k^* = \frac{\langle x, e_k\rangle^2}{\langle x, e_k\rangle^2+\sigma^2}.
$$

Two denoisers trained on disjoint sets tell memory from knowledge: while they remember, their samples from the same
noise are near their own training images; when they know the density, they are near each other.

Reference: Zahra Kadkhodaie, Florentin Guth, Eero P. Simoncelli and Stéphane Mallat, "Generalization in diffusion models
arises from geometry-adaptive harmonic representations", ICLR 2024, arXiv 2310.02557. The sampler is that of Kadkhodaie
and Simoncelli, "Stochastic Solutions for Linear Inverse Problems using the Prior Implicit in a Denoiser", NeurIPS 2021,
arXiv 2007.13640.
"""

from trimtab.diffusion.harmonic_bases.basis import Eigenbasis, best_shrinkage, denoiser_eigenbasis, sure
from trimtab.diffusion.harmonic_bases.images import c_alpha_images
from trimtab.diffusion.harmonic_bases.network import BiasFreeNorm, BiasFreeUNet
from trimtab.diffusion.harmonic_bases.sampling import Samples, Transition, memory_or_knowledge, universal_sampler

__all__ = [
    "BiasFreeNorm",
    "BiasFreeUNet",
    "Eigenbasis",
    "Samples",
    "Transition",
    "best_shrinkage",
    "c_alpha_images",
    "denoiser_eigenbasis",
    "memory_or_knowledge",
    "sure",
    "universal_sampler",
]
