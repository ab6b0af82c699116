r"""Consistency trajectory models: one network that jumps from any noise level to any lower one.

For sampling in one step or a few, with quality that grows with the steps: what it learns are the solutions of the
probability-flow ODE between any two times, and for $s \to t$ the denoiser itself. On the EDM schedule, where time is
the noise level,

$$
G_\theta(x_t, t, s) = \frac{s}{t}\, x_t + \Bigl(1 - \frac{s}{t}\Bigr)\, g_\theta(x_t, t, s), \qquad
g_\theta(x_t, t, t) = \mathbb{E}[x_0 \mid x_t].
$$

Soft consistency: from $x_t$ a teacher's solver goes to $x_u$, and both jump to one $s \leq u$, then to the end,

$$
L_{CTM} = d\Bigl(G_{\bar\theta}\bigl(G_\theta(x_t, t, s), s, t_{min}\bigr),\
G_{\bar\theta}\bigl(G_{\bar\theta}(x_u, u, s), s, t_{min}\bigr)\Bigr),
$$

where $\bar\theta$ is the moving average of $\theta$. It is joined by denoising score matching,
$w(t) \| g_\theta(x_t, t, t) - x_0 \|^2$, and where a discriminator is given by an adversarial loss of the first
argument; both are scaled so that their gradients at the last layer are as long as that of $L_{CTM}$.

Reference: Dongjun Kim et al., "Consistency Trajectory Models: Learning Probability Flow ODE Trajectory of Diffusion",
ICLR 2024, arXiv 2310.02279. The paper measures d in the features of an image network.
"""

from trimtab.diffusion.ctm.jumps import CTMPreconditioned, gamma_sampling
from trimtab.diffusion.ctm.rule import CTM, adaptive_weight, heun_path, soft_consistency

__all__ = [
    "CTM",
    "CTMPreconditioned",
    "adaptive_weight",
    "gamma_sampling",
    "heun_path",
    "soft_consistency",
]
