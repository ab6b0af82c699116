r"""Mixtures of low-rank Gaussians: their exact denoiser, the low-rank network that learns it, and K-subspaces.

For asking how many samples a diffusion model needs. Where data lie on a few subspaces, $x_0 = U_k a$ with
$a \sim N(0, I)$, the best denoiser is a soft projection onto them,

$$
E[x_0 \mid x] = \frac{\alpha}{\alpha^2+\sigma^2} \sum_k w_k(x)\, U_k U_k^\top x, \qquad
w_k \propto \pi_k \left(\tfrac{\sigma^2}{\alpha^2+\sigma^2}\right)^{d_k/2}
\exp \frac{\alpha^2 \lVert U_k^\top x\rVert^2}{2\sigma^2(\alpha^2+\sigma^2)},
$$

and to train a denoiser of this form with free $U_k$ is to cluster the samples into subspaces (to find principal
components, if there is one): about as many samples as a subspace has dimensions are enough, whatever the dimension of
the space. On images the right singular vectors of a trained denoiser's Jacobian take the place of the bases, and are
directions to edit along.

Reference: Peng Wang, Huijie Zhang, Zekai Zhang, Siyi Chen, Yi Ma and Qing Qu, "Diffusion Models Learn Low-Dimensional
Distributions via Subspace Clustering", 2024, arXiv 2409.02426 (Lemma 1, Theorems 1 to 4, Section 5).
"""

from trimtab.diffusion.subspace_clustering.estimator import KSubspaces
from trimtab.diffusion.subspace_clustering.low_rank import (
    LowRankDenoiser,
    LowRankFit,
    fit_low_rank,
    low_rank_denoise,
)
from trimtab.diffusion.subspace_clustering.mixture import MoLRG
from trimtab.diffusion.subspace_clustering.subspaces import edit_along, match_subspaces, subspace_distance

__all__ = [
    "KSubspaces",
    "LowRankDenoiser",
    "LowRankFit",
    "MoLRG",
    "edit_along",
    "fit_low_rank",
    "low_rank_denoise",
    "match_subspaces",
    "subspace_distance",
]
