r"""HMAR: images generated scale by scale, with attention inside one scale and masked refinement within it.

A next-scale model (VAR) that is cheaper to train and to run, and whose number of passes may be chosen after training.
The input of scale $k$ is the feature map that all coarser scales make up, averaged over the places of scale $k$; so it
holds what attention to coarser tokens would find, and tokens attend to their own scale alone:

$$
p(x_1, \dots, x_K) = \prod_k p\bigl(x_k \mid \mathrm{down}_k(\hat f_{k-1})\bigr), \qquad
\mathcal{L} = -\sum_k \frac{w_k}{p_k^2} \sum_{i} \log p(x_{k,i})
$$

with weights $w_k$ that are largest at middle scales. A second head, trained on frozen layers, predicts masked tokens
of a scale from the others: the most confident tokens of a pass are kept and the rest predicted anew.

Reference: Hermann Kumbong, Xian Liu, Tsung-Yi Lin et al., "HMAR: Efficient Hierarchical Masked Auto-Regressive Image
Generation", CVPR 2025, arXiv 2506.04421.
"""

from trimtab.generative.hmar.model import Generated, HierarchicalMaskedAR
from trimtab.generative.hmar.pyramid import next_scale_mask, scale_loss_weights

__all__ = ["Generated", "HierarchicalMaskedAR", "next_scale_mask", "scale_loss_weights"]
