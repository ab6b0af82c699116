r"""GAQAT: quantisation-aware training for unseen domains, in which some quantisers stop following the task for a while.

For a low-bit network that must work in domains it was not trained on. Flatness helps there (SAGM), but on the steps of
the quantisers the gradient of the loss and that of flatness often pull against each other, and a step may hang in a
false balance between the two. The sign of a step's task gradient says which: over a window of $K$ training steps, its
disorder is the share of changes of sign,

$$
\delta_l = \frac{1}{K - 1} \sum_{k=1}^{K-1} \mathbb{1}\bigl[ \operatorname{sign} g^{k+1}_l \ne \operatorname{sign} g^k_l
\bigr] .
$$

Where it is below a threshold, the step follows the gradient of flatness alone in the next window; elsewhere, and in all
weights, both are added up. The gradient of flatness is taken at
$\theta + \rho\, g / \lVert g \rVert - \alpha\, g$, with $g$ the task gradient at $\theta$.

The paper's text was not at hand: this is built from its abstract and its public reviews, which say that the task
gradients of scales of low disorder are frozen, window by window. How disorder is written, the window's length and the
threshold are ours; quantisers are LSQ's and flatness is SAGM's, with a constant $\alpha$ of ours.

Reference: Jiacheng Jiang, Yuan Meng, Chen Tang, Han Yu, Qun Li, Zhi Wang, Wenwu Zhu, "GAQAT: gradient-adaptive
quantization-aware training for domain generalization", 2024, arXiv 2412.05551; SAGM: Pengfei Wang, Zhaoxiang Zhang,
Zhen Lei, Lei Zhang, "Sharpness-Aware Gradient Matching for Domain Generalization", CVPR 2023, arXiv 2303.10353.
"""

from trimtab.compress.gaqat.disorder import GradientDisorder, gradient_disorder
from trimtab.compress.gaqat.scales import Freeze, Rule, ScaleFreezer, quantizer_scales, scale_param_groups
from trimtab.compress.gaqat.training import GAQAT

__all__ = [
    "GAQAT",
    "Freeze",
    "GradientDisorder",
    "Rule",
    "ScaleFreezer",
    "gradient_disorder",
    "quantizer_scales",
    "scale_param_groups",
]
