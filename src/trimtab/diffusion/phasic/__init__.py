r"""Phasic content fusion: adapts a diffusion model to the style of a few images, and keeps the source's content.

For translating images into a domain of which there are some ten examples, where plain fine-tuning copies them. At high
noise, t above $T_s$, the model gets the source image's own features at its bottleneck and learns style; at low noise it
learns details from the few targets:

$$
m(t) = \frac{1}{1+e^{-(t-T_s)}}, \quad w(t) = 1 - (t/T)^\alpha, \quad
L = m(t)\,(1-w(t))\,(\lambda_1 L_{DDC} + \lambda_2 L_{style}) + w(t)\, L_{dif}.
$$

The bottleneck sees $m E(x_{src}) + (1-m)\, n$ with fresh noise n. The directional distribution consistency loss moves
all images' features in the one direction from the source's mean to the target's, which keeps their arrangement:

$$
L_{DDC} = \lVert f(\hat x_0) - f(x_{src}) - (\bar f_{target} - \bar f_{source})\rVert^2 .
$$

Translation starts at a noised source, and while t is above a bound the coarse part of the sample is replaced by that of
a fresh one made from the source.

The authors' release weighs otherwise (`form="code"`), and shows the encoder the source noised to t, where the paper and
this module show it clean. The paper gives $\alpha$ and both $\lambda$ in its appendix, which was not at hand: here they
are 1.

Reference: Teng Hu, Jiangning Zhang, Liang Liu, Ran Yi, Siqi Kou, Haokun Zhu, Xu Chen, Yabiao Wang, Chengjie Wang and
Lizhuang Ma, "Phasic Content Fusing Diffusion Model with Directional Distribution Consistency for Few-Shot Model
Adaption", ICCV 2023, arXiv 2309.03729 (Section 3, Equations 3 to 8).
"""

from trimtab.diffusion.phasic.adapter import PhasicAdapter, fusion_loss
from trimtab.diffusion.phasic.content import ContentFused, ContentFusion, phase_gate
from trimtab.diffusion.phasic.losses import (
    DirectionalDistributionLoss,
    PhasicWeights,
    gram_style_loss,
    phasic_weights,
)
from trimtab.diffusion.phasic.translation import guide_structure, low_pass, translate

__all__ = [
    "ContentFused",
    "ContentFusion",
    "DirectionalDistributionLoss",
    "PhasicAdapter",
    "PhasicWeights",
    "fusion_loss",
    "gram_style_loss",
    "guide_structure",
    "low_pass",
    "phase_gate",
    "phasic_weights",
    "translate",
]
