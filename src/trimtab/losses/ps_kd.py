r"""Progressive self-knowledge distillation: the network's own last predictions soften its labels, more and more.

It takes the place of label smoothing or of a teacher, for better calibrated and better ranked confidences, and
some protection against wrong labels, at the price of one stored prediction per sample and no second network.

$$
\alpha_t = \alpha_T \frac{t}{T}, \qquad
\mathcal{L} = -\frac{1}{n} \sum_{i} \bigl( (1 - \alpha_t)\, y_i + \alpha_t\, P^{t-1}_i \bigr)^{\!\top} \log P^{t}_i
$$

where $P^t_i$ is the softmax of sample $i$'s logits in epoch $t = 1, \dots, T$; the first epoch is plain cross-entropy.

Reference: Kim, Ji, Yoon, Hwang, "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV 2021,
arXiv 2006.12000.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.losses.checks import Reduction, check_reduction, checked_logits, reduce
from trimtab.ops.arguments import class_indices, floating_tensor, in_range, integer, looked_at
from trimtab.ops.sample_memory import Repeats, SampleMemory
from trimtab.ops.whole_state import WholeState


def pskd_targets(
    targets: Int[Tensor, " batch"], past: Float[Tensor, "batch classes"], alpha: float | Tensor
) -> Float[Tensor, "batch classes"]:
    """The label's one-hot vector mixed with past predictions, `(1 - alpha) onehot(targets) + alpha past`.

    Mass that a row of `past` lacks goes to the label, so that a sample without a past, a row of zeros, keeps its
    one-hot vector.

    Args:
        targets: labels.
        past: the samples' past predictions, rows that sum to one, or to zero where there are none.
        alpha: weight of the past, in [0, 1].

    Returns:
        Soft targets, rows that sum to one.

    Raises:
        ValueError: if the shapes do not fit, `alpha`, given as a number, is not in [0, 1] or, on the CPU, a label is
            out of range.

    Example:
        >>> pskd_targets(torch.tensor([0, 0]), torch.tensor([[0.6, 0.4], [0.0, 0.0]]), alpha=0.5)
        tensor([[0.8000, 0.2000],
                [1.0000, 0.0000]])
    """
    class_indices("targets", targets)
    past = floating_tensor("past", past)
    if past.ndim != 2 or targets.shape != past.shape[:1]:
        raise ValueError(
            "targets and past must be (batch,) and (batch, classes), "
            f"got {tuple(targets.shape)} and {tuple(past.shape)}"
        )
    if not isinstance(alpha, Tensor) and not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    if looked_at(targets) and not ((targets >= 0) & (targets < past.shape[1])).all():
        raise ValueError(f"targets must be in [0, {past.shape[1]}), got {targets}")
    kept = alpha * past.detach()
    return kept.scatter_add_(1, targets[:, None], 1 - kept.sum(1, keepdim=True))


class PSKD(WholeState, nn.Module):
    """Cross-entropy with progressively refined targets, called as `loss(logits, targets, index)`.

    Call `set_epoch(epoch)` before each epoch. In training mode a call stores the batch's predictions, which are read at
    the sample's next visit; as in the authors' code they are those of training (augmented view, no second forward
    pass).

    Args:
        num_samples: size of the training set.
        num_classes: number of classes.
        total_epochs: length of the training, T.
        alpha_final: weight of past predictions in the last epoch, in [0, 1].
        reduction: "none", "mean" or "sum" over the batch.
        repeats: what to do with a sample that comes more than once in a batch, see `SampleMemory`: "refuse", or "mean"
            for samplers with replacement and padded distributed batches.

    Attributes:
        memory: past predictions, `memory.rows` of shape `(num_samples, num_classes)`, zero before the first visit.
            It takes only finite rows: a prediction of NaN leaves a sample's past as it is.
        alpha: the present weight, a scalar buffer.

    Raises:
        ValueError: if a size is not positive, `alpha_final` is outside [0, 1], or `reduction` or `repeats` is unknown.

    Example:
        >>> loss = PSKD(num_samples=100, num_classes=10, total_epochs=5)
        >>> index, targets = torch.tensor([0, 42]), torch.tensor([3, 5])
        >>> for epoch in range(5):
        ...     loss.set_epoch(epoch)
        ...     value = loss(torch.zeros(2, 10, requires_grad=True), targets, index)
        >>> value.item()  # log(10), for uniform predictions cost the same against any target
        2.3025...
    """

    alpha: Tensor

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        total_epochs: int,
        *,
        alpha_final: float = 0.8,
        reduction: Reduction = "mean",
        repeats: Repeats = "refuse",
    ) -> None:
        super().__init__()
        if integer("num_classes", num_classes) < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.total_epochs = integer("total_epochs", total_epochs)
        self.alpha_final = in_range("alpha_final", alpha_final, 0, 1)
        check_reduction(reduction)
        self.memory = SampleMemory(num_samples, num_classes, repeats=repeats)
        # A tensor, not a float: a compiled loss must not be compiled anew in each epoch.
        self.register_buffer("alpha", torch.tensor(0.0))
        self.num_classes = num_classes
        self.reduction: Reduction = reduction
        self.epoch_known = False

    def set_epoch(self, epoch: int) -> None:
        """Sets the weight for this 0-based epoch, `alpha_final * (epoch + 1) / total_epochs`.

        Raises:
            ValueError: if `epoch` is outside [0, total_epochs).
        """
        integer("epoch", epoch, 0, self.total_epochs - 1)
        self.alpha.fill_(self.alpha_final * (epoch + 1) / self.total_epochs)
        self.epoch_known = True

    def forward(
        self, logits: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"], index: Int[Tensor, " batch"]
    ) -> Tensor:
        """The loss of a batch; in training mode its predictions are stored for the next visit.

        Args:
            logits: scores of the classes.
            targets: labels.
            index: the samples' positions in the training set.

        Raises:
            RuntimeError: if `set_epoch` has not been called.
            TypeError: if a dtype is wrong (`logits` floating point, `targets` and `index` int64).
            ValueError: if shapes do not fit, the batch is empty, a label or an index is out of range, or an index is
                repeated where that is refused.
        """
        if not self.epoch_known:
            raise RuntimeError("PSKD: call set_epoch(epoch) before each epoch; the weight of the past depends on it")
        logits = checked_logits(logits, targets, index=index, num_classes=self.num_classes)
        log_probs = logits.log_softmax(1)
        past = self.memory.replace(index, log_probs.detach().exp())
        soft = pskd_targets(targets, past, self.alpha)
        return reduce(-(soft * log_probs).sum(1), self.reduction)
