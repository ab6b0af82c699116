r"""FOA-Attack: a targeted attack on unseen models that matches an image's features with those of a target image.

For images that a model nobody can look into should take for another given one. No query is made and no label is used:
the features of a few open vision transformers (the surrogates) are brought near the target's, coarsely by the class
token, finely by the patch tokens. These are first summed up by $k$ cluster centres, so that a few frequent patches do
not decide alone, and then matched by entropic optimal transport:

$$
s_i = \cos(g_i, g_i^t) + \eta \sum_{ab} T_{ab} \cos(c_{i,a}^t, c_{i,b}), \qquad
T = \operatorname{Sinkhorn}\bigl(1 - \cos(c_i^t, c_i);\ \tfrac{1}{k}, \tfrac{1}{k}\bigr)
$$

$$
w_i = K\,\operatorname{softmax}_i\!\Bigl(\frac{1}{\tau}\,\frac{s_i^{(j)}}{s_i^{(j-1)}}\Bigr), \qquad
\delta \leftarrow \Pi_{\|\delta\|_\infty \le \epsilon}
\Bigl(\delta + \alpha\,\mathrm{sign}\,\nabla_\delta \textstyle\sum_i w_i s_i\Bigr)
$$

over surrogates $i = 1 \dots K$ and steps $j$, each on a fresh random crop of the image and of the target. Neither the
assignment to clusters nor the plan $T$ nor the weights carry gradients. The surrogate whose features have come nearer
since the last step weighs a little more.

The authors' code differs from this: it scales patch tokens along the wrong axis, its k-means starts from random tokens
(here from tokens far from one another), its Sinkhorn sweeps stop early, and its ratio compares a crop with the whole
image of the same step, and the first step of a pair of images with the last of another. Here a ratio is that of two
steps, of a pair of its own, cut off at 10, and is one where the last score was not positive. Pixels are kept within
their range after each step, where theirs are cut off once, at the end; k-means makes 10 rounds, theirs up to 100.

Reference: Jia, Gao, Qin, Pang, Du, Huang, Li, Li, Li and Liu, "Adversarial Attacks against Closed-Source MLLMs via
Feature Optimal Alignment", NeurIPS 2025, arXiv 2505.21494.
"""

from trimtab.robust.foa_attack.alignment import cluster_tokens, local_alignment
from trimtab.robust.foa_attack.attack import Features, FOAAttack, Surrogate, ensemble_weights
from trimtab.robust.foa_attack.crops import crop_resized, random_boxes

__all__ = [
    "FOAAttack",
    "Features",
    "Surrogate",
    "cluster_tokens",
    "crop_resized",
    "ensemble_weights",
    "local_alignment",
    "random_boxes",
]
