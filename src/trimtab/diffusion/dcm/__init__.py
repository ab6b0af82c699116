r"""Dual-expert consistency distillation: one network for layout and motion, a small addition to it for detail.

For distilling video (or any) flow-matching models to about four steps. A consistency student has to learn at high noise
what the scene is and how it moves, at low noise its texture, and the gradients of the two disagree; so the trajectory
is split. The semantic expert jumps from high noise to the split, the detail expert from there to clean data. The second
is the first one, frozen, with low-rank adapters and a time embedding and output layers of its own.

On straight paths $x_s = s\,\varepsilon + (1 - s)\, x_0$ with the velocity $v = \varepsilon - x_0$ predicted, an Euler
step of a teacher from $s_i$ to $s_{i-1}$ gives $x_{i-1}$, and both ends of it jump to the end $e$ of their phase:

$$
L = d\bigl(x_i + (e - s_i)\, v_\theta(x_i, s_i),\ x_{i-1} + (e - s_{i-1})\, v_{\bar\theta}(x_{i-1}, s_{i-1})\bigr).
$$

The semantic expert has a temporal coherence loss beside it, on differences between frames; the detail expert a hinge
GAN and feature matching in the features of the frozen teacher, for which both ends get noise again.

Reference: Zhengyao Lv et al., "DCM: Dual-Expert Consistency Model for Efficient and High-Quality Video Generation",
ICCV 2025, arXiv 2506.03123. Defaults are those of the authors' release: 50 Euler steps, shift 17, the split at step 38,
and a pseudo-Huber distance with c = 0.001, where the paper writes a squared one. The release decides by the first
sample which expert a batch goes to; here each sample goes to its own.
"""

from trimtab.diffusion.dcm.experts import DualExpert, LoRALinear, flow_sample
from trimtab.diffusion.dcm.objectives import (
    consistency_pair,
    phase_jump,
    renoise,
    shifted_levels,
    temporal_coherence_loss,
)
from trimtab.diffusion.dcm.rule import DCM

__all__ = [
    "DCM",
    "DualExpert",
    "LoRALinear",
    "consistency_pair",
    "flow_sample",
    "phase_jump",
    "renoise",
    "shifted_levels",
    "temporal_coherence_loss",
]
