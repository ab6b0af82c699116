r"""Crafted shifts: models for unseen domains are chosen by what strong augmentations do to them, and learn from edges.

For when there is one training domain and nothing of those to come. `ShiftValidator` scores a model on copies of the
validation images, each changed by one kind of augmentation; `kfold_shift_selection` also lets training use
augmentations, but scores a candidate by kinds that it was not trained with. `EdgePairLoss` trains on each image and on
its edge map, by one network and in one batch,

$$
\mathcal{L} = \frac{1}{2B} \sum_i \bigl[ \ell(f(x_i), y_i) + w\, \ell(f(e(x_i)), y_i) \bigr], \qquad
p(c \mid x) \propto p_f(c \mid x)^{a}\, p_f(c \mid e(x))^{1 - a},
$$

where $e$ is an `EnhancedCanny`: a detector of edges whose thresholds follow each image, and vary in training.

Reference: Nikos Efthymiadis, Giorgos Tolias and Ondřej Chum, "Crafting Distribution Shifts for Validation and Training
in Single Source Domain Generalization", WACV 2025, arXiv 2409.19774.

Gradients at the frame are taken as if the image went on as it ends, where the authors' release sees black around it; of
two equal pixels across an edge one is kept.
"""

from trimtab.domain.crafting_shifts.edges import EdgeDraws, EnhancedCanny, adaptive_thresholds
from trimtab.domain.crafting_shifts.pairs import EdgePairLoss, mix_predictions
from trimtab.domain.crafting_shifts.selection import (
    ShiftSelection,
    ShiftValidator,
    category_folds,
    kfold_shift_selection,
)

__all__ = [
    "EdgeDraws",
    "EdgePairLoss",
    "EnhancedCanny",
    "ShiftSelection",
    "ShiftValidator",
    "adaptive_thresholds",
    "category_folds",
    "kfold_shift_selection",
    "mix_predictions",
]
