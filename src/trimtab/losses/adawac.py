r"""AdaWAC: every sample divides its weight between its labels and agreement of two augmented views.

For data in which some images carry many labelled pixels and others few or none, as the slices of a body scan do:
samples with dense labels go to the supervised loss, the others teach the encoder consistency instead of being dropped
or weighted down. The division is found in training, by mirror ascent.

$$
\min_\theta \max_{\beta_i \in [0, 1]} \frac{1}{n} \sum_{i} \beta_i\, \ell^{\mathrm{CE}}_i(\theta)
+ (1 - \beta_i)\, \ell^{\mathrm{AC}}_i(\theta), \qquad
\log \frac{\beta_i}{1 - \beta_i} \leftarrow \log \frac{\beta_i}{1 - \beta_i}
+ \eta_\beta \bigl( \ell^{\mathrm{CE}}_i - \ell^{\mathrm{AC}}_i \bigr)
$$

where $\ell^{\mathrm{CE}}_i$ is the mean cross-entropy of both views' pixels and
$\ell^{\mathrm{AC}}_i = \lambda_{\mathrm{AC}} \operatorname{mean} (\phi(x_i^1) - \phi(x_i^2))^2$ compares the encoder's
feature maps. At the saddle point $\beta_i = 1$ where the labels cost more than the disagreement, else 0.

Reference: Dong, Xie, Ward, "Adaptively Weighted Data Augmentation Consistency Regularization for Robust Optimization
under Concept Shift", ICML 2023, arXiv 2210.01891.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.losses.segmentation import checked_maps, dice_loss
from trimtab.ops.arguments import floating_tensor, in_range, indices, non_negative, tensor
from trimtab.ops.sample_memory import Repeats, SampleMemory
from trimtab.ops.whole_state import WholeState


def augmentation_consistency(
    features_1: Float[Tensor, "batch *shape"], features_2: Float[Tensor, "batch *shape"]
) -> Float[Tensor, " batch"]:
    """Mean squared difference of the features of two views, for each sample.

    Args:
        features_1, features_2: feature maps of the two views, as the encoder gives them. As in the authors' release,
            maps of views that were moved differently are compared place by place, without moving them back.

    Raises:
        TypeError: if the features are not floating point.
        ValueError: if the shapes differ, or there is nothing beside the batch.

    Example:
        >>> augmentation_consistency(torch.zeros(2, 3), torch.tensor([[0.0, 0.0, 0.0], [2.0, 2.0, 2.0]]))
        tensor([0., 4.])
    """
    features_1, features_2 = floating_tensor("features_1", features_1), floating_tensor("features_2", features_2)
    if features_1.shape != features_2.shape or features_1.ndim < 2:
        raise ValueError(
            "features_1 and features_2 must be of the same shape (batch, ...), "
            f"got {tuple(features_1.shape)} and {tuple(features_2.shape)}"
        )
    return (features_1 - features_2).square().flatten(1).mean(1)


def mirror_ascent_log_odds(
    log_odds: Float[Tensor, " batch"], first: Float[Tensor, " batch"], second: Float[Tensor, " batch"], lr: float
) -> Float[Tensor, " batch"]:
    r"""One step of mirror ascent on $\beta\, \mathrm{first} + (1 - \beta)\, \mathrm{second}$, in log-odds of beta.

    The same as to multiply the pair of weights by `exp(lr * first)` and `exp(lr * second)` and to normalise it, but
    nothing overflows, and a weight that has come near zero can grow again.

    Args:
        log_odds: $\log (\beta / (1 - \beta))$.
        first, second: what the two weights multiply; constants to the gradient.
        lr: step size, not negative.

    Raises:
        ValueError: if the shapes differ or `lr` is negative.

    Example:
        >>> mirror_ascent_log_odds(torch.zeros(1), torch.tensor([1.0]), torch.tensor([0.5]), lr=2.0).sigmoid()
        tensor([0.7311])
    """
    log_odds, first, second = tensor("log_odds", log_odds), tensor("first", first), tensor("second", second)
    if not log_odds.shape == first.shape == second.shape:
        raise ValueError(
            "log_odds, first and second must be of the same shape, "
            f"got {tuple(log_odds.shape)}, {tuple(first.shape)} and {tuple(second.shape)}"
        )
    return log_odds + non_negative("lr", lr) * (first.detach() - second.detach())


class AdaWAC(WholeState, nn.Module):
    """Adaptively weighted augmentation consistency for segmentation, with the Dice loss that it is trained beside.

    Called with two augmented views of the same samples: logits, labels and features of each, and the samples' index.
    In training mode a call first moves the weights of its samples, then uses them; they are constants to the gradient.

    The size of the features decides, beside `dac_weight`, where the samples divide: look at `weights` in training, and
    if all go one way, change `dac_weight`.

    Args:
        num_samples: size of the training set.
        lr_weight: step size of the weights, not negative. The authors use 8 with a U-Net and 2 with TransUNet.
        dac_weight: scale of the consistency term, not negative. The authors use 2 with a U-Net.
        dice_weight: share of the Dice loss in the total, in [0, 1]; it takes no sample weights.
        repeats: what to do with a sample that comes more than once in a batch, see `SampleMemory`: "refuse", or "mean"
            for samplers with replacement and padded distributed batches.

    Attributes:
        memory: log-odds of the supervised weight, `memory.rows` of shape `(num_samples,)`, zero at first;
            it takes only finite ones.

    Raises:
        ValueError: if `num_samples` is not positive, or another argument out of its range.

    Example:
        >>> loss = AdaWAC(num_samples=100)
        >>> logits, features = torch.zeros(2, 3, 8, 8, requires_grad=True), torch.zeros(2, 16, 2, 2)
        >>> labels, index = torch.zeros(2, 8, 8, dtype=torch.int64), torch.tensor([0, 42])
        >>> loss(logits, logits.flip(3), labels, labels, features, features, index).backward()
        >>> loss.weights[index]  # the labels cost log(3), the views agree
        tensor([[9.9985e-01, 1.5239e-04],
                [9.9985e-01, 1.5239e-04]])
    """

    def __init__(
        self,
        num_samples: int,
        *,
        lr_weight: float = 8.0,
        dac_weight: float = 2.0,
        dice_weight: float = 0.5,
        repeats: Repeats = "refuse",
    ) -> None:
        super().__init__()
        self.lr_weight = non_negative("lr_weight", lr_weight)
        self.dac_weight = non_negative("dac_weight", dac_weight)
        self.dice_weight = in_range("dice_weight", dice_weight, 0, 1)
        self.memory = SampleMemory(num_samples, repeats=repeats)

    @property
    def weights(self) -> Float[Tensor, "samples 2"]:
        """Weights of the supervised and the consistency term of every sample, rows that sum to one."""
        log_odds = self.memory.rows
        return torch.stack([log_odds.sigmoid(), (-log_odds).sigmoid()], dim=1)

    def forward(
        self,
        logits_1: Float[Tensor, "batch classes *space"],
        logits_2: Float[Tensor, "batch classes *space"],
        targets_1: Int[Tensor, "batch *space"],
        targets_2: Int[Tensor, "batch *space"],
        features_1: Float[Tensor, "batch *shape"],
        features_2: Float[Tensor, "batch *shape"],
        index: Int[Tensor, " batch"],
    ) -> Tensor:
        """The loss of a batch; in training mode the samples' weights move.

        Args:
            logits_1, logits_2: scores of the classes for every pixel of the two views.
            targets_1, targets_2: the views' label maps, augmented as they are.
            features_1, features_2: the views' feature maps, of the encoder's lowest resolution.
            index: the samples' positions in the training set.

        Raises:
            TypeError: if a dtype is wrong (`targets` and `index` int64, the others floating point).
            ValueError: if shapes do not fit, the batch is empty, a label or an index is out of range, or an index is
                repeated where that is refused.
        """
        logits_1 = checked_maps(logits_1, targets_1, names=("logits_1", "targets_1"))
        logits_2 = checked_maps(logits_2, targets_2, names=("logits_2", "targets_2"))
        consistency = self.dac_weight * augmentation_consistency(features_1, features_2)
        batch = len(logits_1)
        if logits_2.shape[:2] != logits_1.shape[:2] or len(features_1) != batch or index.shape != (batch,):
            raise ValueError(
                "logits_1, logits_2, features_1 and index must hold the same samples and classes, got shapes "
                f"{tuple(logits_1.shape)}, {tuple(logits_2.shape)}, {tuple(features_1.shape)} and {tuple(index.shape)}"
            )
        for name, targets in (("targets_1", targets_1), ("targets_2", targets_2)):
            indices(name, targets, logits_1.shape[1])
        supervised = (_cross_entropy(logits_1, targets_1) + _cross_entropy(logits_2, targets_2)) / 2
        log_odds = self.memory.update(
            index, lambda before: mirror_ascent_log_odds(before, supervised, consistency, self.lr_weight)
        )
        weighted = log_odds.sigmoid() * supervised + (-log_odds).sigmoid() * consistency
        dice = (dice_loss(logits_1, targets_1) + dice_loss(logits_2, targets_2)) / 2
        return (1 - self.dice_weight) * weighted.mean() + self.dice_weight * dice


def _cross_entropy(
    logits: Float[Tensor, "batch classes *space"], targets: Int[Tensor, "batch *space"]
) -> Float[Tensor, " batch"]:
    return F.cross_entropy(logits, targets, reduction="none").flatten(1).mean(1)
