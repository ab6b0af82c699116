r"""HIAST: self-training of a segmentation network with thresholds for each image, pasted hard classes, and two regions.

For adapting a network to an unlabelled domain in which some classes are rare or hard, so that one threshold would drop
them or let in the errors of others. Three parts follow each other in every round.

`InstanceAdaptiveSelector` turns predictions into pseudo-labels, image by image. The threshold of each class $c$ moves
towards a quantile of the image's confidences, and pixels below the threshold of their class are ignored:

$$
\theta_c \leftarrow \beta\, \theta_c + (1 - \beta)\, Q_c\bigl( 1 - \alpha\, \theta_c^{\gamma} \bigr)
$$

where $Q_c$ is the quantile function of the probabilities of the pixels predicted as $c$, with $\theta_c$ itself among
them. The lower a threshold is already, the smaller is the share of its class that is kept.

`HardClassPaste` copies the regions of hard classes, those of least confidence $v_c$, from other images with their
pseudo-labels; a class is chosen with probability proportional to $(1 - v_c)^2$.

`HIASTLoss` trains on what comes out. It smooths the predictions of the kept pixels $R$, and sharpens the others:

$$
\mathcal{L} = \mathrm{CE}_R
+ \lambda_1 \Bigl\langle -\frac{1}{C} \sum_c \log p_c \Bigr\rangle_{R}
+ \lambda_2 \Bigl\langle -\sum_c p_c \log p_c \Bigr\rangle_{\bar R}
+ \lambda_3 \Bigl\langle -\sum_c q_c \log p_c \Bigr\rangle_{\bar R}
$$

where $q$ is what an averaged teacher says of a weaker view, and $\langle \cdot \rangle$ the mean over the pixels of a
region, divided by the number of classes $C$.

Reference: Chuang Zhu, Kebin Liu, Wenqi Tang, Ke Mei, Jiaqi Zou and Tiejun Huang, "Hard-aware Instance Adaptive
Self-training for Unsupervised Cross-domain Semantic Segmentation", 2023, arXiv 2302.06992, which extends IAST (Mei et
al., ECCV 2020). The authors' code takes all hard classes for pasted after the first donor, and so never draws a second
one; here donors are drawn until half of the hard classes are really there.
"""

from trimtab.domain.hiast.losses import HIASTLoss, Region, RegionTerms, region_regularization, region_soft_cross_entropy
from trimtab.domain.hiast.selection import HardClassPaste, InstanceAdaptiveSelector, class_quantiles, hard_class_odds

__all__ = [
    "HIASTLoss",
    "HardClassPaste",
    "InstanceAdaptiveSelector",
    "Region",
    "RegionTerms",
    "class_quantiles",
    "hard_class_odds",
    "region_regularization",
    "region_soft_cross_entropy",
]
