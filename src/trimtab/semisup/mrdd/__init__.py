r"""MRDD: what several views of a sample share, learnt first and frozen, and what each adds, kept apart from it.

For samples that are seen in several ways (a photograph and its edges, two sensors), to be clustered or probed without
labels. First, a compact code $c$ of all views, each with most of its patches masked, reconstructs every view whole;
what helps there is what views share. Then $c$ is frozen, and every view $X_v$ gets a code $z_v$ of its own, which with
$c$ reconstructs the view and is to hold nothing of $c$, by an upper bound of their mutual information (CLUB):

$$
\mathcal{L}_1 = \sum_v \lVert X_v - D_v(c) \rVert^2
+ \beta\, \mathrm{KL}\bigl(q(c \mid \text{masked } X) \Vert N(0, I)\bigr),
\qquad
\mathcal{L}_2 = \sum_v \lVert X_v - D'_v(z_v, c) \rVert^2 + \beta'\, \mathrm{KL}_v + \hat I(z_v; c),
$$
$$
\hat I(z; c) = E_{p(z, c)} \log q(c \mid z) - E_{p(z) p(c)} \log q(c \mid z),
$$

where $q(c \mid z)$ is a Gaussian that is fitted to the pairs by turns. The representation is $[c, z_1, \dots, z_V]$.

The released training script minimises the fit of $q$ over the codes too, which would push information into them, and
leaves reconstruction out; the two turns above are the method as described (the paper's own text was not at hand).

Reference: Guanzhou Ke, Bo Wang, Xiaoli Wang and Shengfeng He, "Rethinking Multi-view Representation Learning via
Distilled Disentangling", CVPR 2024, arXiv 2403.10897; CLUB is of Cheng, Hao, Dai, Liu, Gan and Carin, ICML 2020, arXiv
2006.12013.
"""

from trimtab.semisup.mrdd.information import CLUB, gaussian_kl
from trimtab.semisup.mrdd.stages import MRDD, MaskedCrossViewVAE, Views, ViewSpecificVAE

__all__ = ["CLUB", "MRDD", "MaskedCrossViewVAE", "ViewSpecificVAE", "Views", "gaussian_kl"]
