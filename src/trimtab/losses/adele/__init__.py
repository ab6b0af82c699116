r"""ADELE: corrects a class's noisy masks from the moment at which the network starts to memorise them.

For segmentation from coarse or wrong masks. A network first learns what the masks of a class have in common, and its
training IoU rises fast; once the rise slows it begins to fit the errors, at another time for every class. ADELE fits a
curve to each class's training IoU, and from that time on replaces the class's labels by confident predictions. A
penalty on disagreement between image scales keeps the predictions worth trusting.

$$
\mathrm{IoU}_c(t) \approx f(t) = a \bigl( 1 - e^{-t^b / c} \bigr), \qquad
\text{correct class } c \text{ once } \frac{f'(1) - f'(t)}{f'(1)} > r
$$

$$
\mathcal{L} = \frac{1}{S} \sum_{s} \Bigl( \mathrm{CE}(p_s, y)
+ \lambda\, [\max q \geq \rho]\, \mathrm{KL}(p_s \,\|\, q) \Bigr), \qquad q = \frac{1}{S} \sum_s p_s
$$

where $t$ counts epochs and $p_s$ is the prediction at scale $s$, brought back to the image's size. As in the authors'
release, $q$ is cut to [0.001, 0.999] and pixels to ignore have no say in whether an image is confident.

Reference: Liu, Liu, Zhu, Shen, Fernandez-Granda, "Adaptive Early-Learning Correction for Segmentation from Noisy
Annotations", CVPR 2022, arXiv 2110.03740.
"""

from trimtab.losses.adele.consistency import MultiScaleConsistencyLoss, multi_scale_consistency, multi_scale_logits
from trimtab.losses.adele.correction import ADELE, class_iou, correct_labels
from trimtab.losses.adele.curve import LearningCurve, fit_learning_curve, memorization_epoch

__all__ = [
    "ADELE",
    "LearningCurve",
    "MultiScaleConsistencyLoss",
    "class_iou",
    "correct_labels",
    "fit_learning_curve",
    "memorization_epoch",
    "multi_scale_consistency",
    "multi_scale_logits",
]
