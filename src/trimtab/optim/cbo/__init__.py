r"""Consensus-based optimization: particles that move towards their softmin-weighted mean, from function values alone.

For functions with many local minima or without a gradient, in up to some hundred dimensions, where hundreds of values
at once are cheap. On average the consensus point follows a noisy gradient step, at a distance at which small barriers
no longer show.

Particles $x^1, \dots, x^N$ contract towards the consensus point $v$, with noise as wide as their distance from it
(isotropic: its norm in every direction; anisotropic: each coordinate its own):

$$
v_\alpha = \frac{\sum_i e^{-\alpha f(x^i)}\, x^i}{\sum_i e^{-\alpha f(x^i)}}, \qquad
x^i \leftarrow x^i - \lambda\, \Delta t\, (x^i - v_\alpha) - \gamma\, \Delta t\, \nabla f(x^i)
+ \sigma \sqrt{\Delta t}\; \lVert x^i - v_\alpha \rVert\, \xi^i
$$

Consensus hopping draws all particles anew around the consensus point, $x^i = v_\alpha + \sigma \xi^i$. With infinitely
many of them its step is $-\alpha \sigma^2$ times an average of $\nabla f$, and on a quadratic exactly the minimizing
movement (proximal) step $\arg\min_z f(z) + \lVert z - v \rVert^2 / (2 \alpha \sigma^2)$.

Reference: Konstantin Riedl, Timo Klock, Carina Geldhauser, Massimo Fornasier, "Gradient is All You Need?", 2023,
arXiv 2306.09778.
"""

from trimtab.optim.cbo.descent import CBO, Noise, cbo_step
from trimtab.optim.cbo.hopping import ConsensusHopping, minimizing_movement_step
from trimtab.optim.cbo.particle_loss import ParticleLoss
from trimtab.optim.cbo.particles import ConsensusResult, consensus_point

__all__ = [
    "CBO",
    "ConsensusHopping",
    "ConsensusResult",
    "Noise",
    "ParticleLoss",
    "cbo_step",
    "consensus_point",
    "minimizing_movement_step",
]
