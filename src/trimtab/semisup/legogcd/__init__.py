r"""LegoGCD: keeps a network from forgetting known classes while it discovers new ones.

For generalised category discovery: some images are labelled, of known classes; the rest are of known and novel classes
mixed. SimGCD trains a classifier of cosines over all classes by self-distillation between two views, made even over the
classes by the entropy of the mean prediction, beside cross-entropy on the labelled images and two contrastive terms;
LegoGCD adds two terms, with $o$ the cosines and $p = \mathrm{softmax}(o / 0.1)$:

$$
\mathcal{L}_{\mathrm{LER}} = - \frac{1}{2B} \sum_{i \in M} \hat p_i^\top
\log \mathrm{softmax}\bigl(o_i / 0.05 + 0.4 \log \hat q\bigr), \quad \hat p_i = \mathrm{softmax}(o_i / 0.05),
$$

over the views $M$ of unlabelled images whose $p$ is at least $\delta$ for a known class (local entropy regularisation),
with $\hat q$ the running mean of $\mathrm{softmax}(o)$ as a margin, and

$$
\mathcal{L}_{\mathrm{DKL}} = \frac1B \sum_i \mathrm{KL}\bigl(p_i^{(1)} \,\|\, p_i^{(2)}\bigr)
$$

between the two views, through both of which the gradient flows; the authors' release takes the logarithms of a softmax
of $p$ in place of those of $p$, and its divergence is therefore weak (`softened_dkl`). In total
$(1 - \lambda)(\mathcal{L}_{\mathrm{distil}} + \mathcal{L}_{\mathrm{DKL}} + \varepsilon \mathcal{L}_{\mathrm{even}} +
\mathcal{L}_{\mathrm{con}}) + \lambda (\mathcal{L}_{\mathrm{ce}} + \mathcal{L}_{\mathrm{supcon}}) +
2 \mathcal{L}_{\mathrm{LER}}$.

Reference: Xinzi Cao, Xiawu Zheng, Guanhong Wang, Weijiang Yu, Yunhang Shen, Ke Li, Yutong Lu and Yonghong Tian,
"Solving the Catastrophic Forgetting Problem in Generalized Category Discovery", CVPR 2024, arXiv 2501.05272; the base
is Xin Wen, Bingchen Zhao and Xiaojuan Qi, "Parametric Classification for Generalized Category Discovery: A Baseline
Study", ICCV 2023, arXiv 2211.11727.
"""

from trimtab.semisup.legogcd.accuracy import GCDAccuracy, gcd_accuracy
from trimtab.semisup.legogcd.rule import LegoGCD
from trimtab.semisup.legogcd.terms import LocalEntropyRegularization, dual_view_kl, self_distillation

__all__ = ["GCDAccuracy", "LegoGCD", "LocalEntropyRegularization", "dual_view_kl", "gcd_accuracy", "self_distillation"]
