r"""Distilling guided diffusion in two stages: first the guidance, at any scale, then the number of steps.

For a classifier-free guided model that has to sample in a few evaluations. Stage one trains one student, which is told
the scale, to say in one evaluation what the teacher says in two; stage two halves its sampling steps again and again
(progressive distillation), each student the teacher of the next. With $z_t = \alpha_t x_0 + \sigma_t\varepsilon$:

$$
L_1 = \mathbb{E}_{t, w}\, \omega_t \left\| \hat x_S(z_t, w) - \left(\hat x_u + w(\hat x_c - \hat x_u)\right) \right\|^2,
\qquad \omega_t = \max\left(\frac{\alpha_t^2}{\sigma_t^2}, 1\right),
$$

and $L_2$ has as its target the clean sample that brings one DDIM step to where two of the teacher's end, over $t'$ at
$t''$:

$$
\tilde x = \frac{z_{t''} - (\sigma_{t''}/\sigma_t)\, z_t}{\alpha_{t''} - (\sigma_{t''}/\sigma_t)\, \alpha_t}.
$$

The scale w is this library's, 1 for the conditional model; the paper's is less by one.

Reference: Chenlin Meng et al., "On Distillation of Guided Diffusion Models", CVPR 2023, arXiv 2210.03142. The halving
is from Tim Salimans and Jonathan Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", ICLR 2022, arXiv
2202.00512.
"""

from trimtab.diffusion.guided_distillation.objectives import (
    guidance_matching_loss,
    guided_clean_sample,
    progressive_loss,
    progressive_target,
    truncated_snr,
)
from trimtab.diffusion.guided_distillation.rule import GuidedDistillation
from trimtab.diffusion.guided_distillation.sampler import stochastic_ddim

__all__ = [
    "GuidedDistillation",
    "guidance_matching_loss",
    "guided_clean_sample",
    "progressive_loss",
    "progressive_target",
    "stochastic_ddim",
    "truncated_snr",
]
