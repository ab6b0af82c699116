r"""PoseDA: trains a lifter of 2-D to 3-D poses on poses moved to where a new camera's people stand, and made diverse.

For a lifter trained on one studio and used on another, whose people stand elsewhere in the image and move otherwise; of
the target only 2-D poses and the camera are needed. **Global position alignment** (`global_position_alignment`, without
parameters) puts each source pose $X$ where it projects like a target pose $U$ drawn at random: at depth
$z = (f_x d_x + f_y d_y) / 2s$, with $d$ the extents of $X$ and $s$ half the sum of width and height of $U$'s box, on
the ray through $U$'s root,

$$
X' = X - X_0 + z \cdot \Bigl( \frac{U_{0x} - c_x}{f_x},\ \frac{U_{0y} - c_y}{f_y},\ 1 \Bigr).
$$

**Local pose augmentation** (`PoseAugmenter`) bends bones, changes limbs' lengths and turns the pose, by networks that
learn what is hard for the lifter while a discriminator of body parts (`PartDiscriminator`) takes it for real:

$$
L_G = 6 \cdot \tfrac{1}{2} (D(X'') - 1)^2
+ 3 \bigl[ \rho(\bar\delta;\, 0.205, 0.165) + \gamma^2 1_{|\gamma| > 0.1} \bigr]
+ 0.1\, \rho\bigl(e'' / e;\, \beta, 2\bigr), \qquad \rho(a; m, s) = (a - m)^2\, 1_{|a - m| > s}
$$

with $\bar\delta$ the mean of 1 - cosine over the bones' turns, $\gamma$ the relative changes of length and $e'' / e$
the lifter's error on the augmented pose over that on the original.

Alignment was built from the authors' code. They released no local augmentation: the operators, the discriminator and
the weights here are those of PoseAug (arXiv 2105.02465), on which theirs is modelled, with its placement of the camera
replaced by the alignment; how the authors' anchor discriminator departs from it is not known to us.

Reference: Wenhao Chai, Zhongyu Jiang, Jenq-Neng Hwang and Gaoang Wang, "Global Adaptation meets Local Generalization:
Unsupervised Domain Adaptation for 3D Human Pose Estimation", ICCV 2023, arXiv 2303.16456.
"""

from trimtab.domain.poseda.alignment import global_position_alignment, mpjpe, project
from trimtab.domain.poseda.augmentation import AugmentedPose, PartDiscriminator, PoseAugmenter
from trimtab.domain.poseda.skeleton import HUMAN, Skeleton
from trimtab.domain.poseda.training import PoseDA

__all__ = [
    "HUMAN",
    "AugmentedPose",
    "PartDiscriminator",
    "PoseAugmenter",
    "PoseDA",
    "Skeleton",
    "global_position_alignment",
    "mpjpe",
    "project",
]
