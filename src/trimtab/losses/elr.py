r"""Early-learning regularisation: keeps a network true to what it predicted before it memorised wrong labels.

For training labels that are noisy, where training long enough to fit them would hurt. It remembers a running average
of each sample's predictions and rewards agreement with it, which cancels the gradient of wrong labels.

$$
t_i \leftarrow \beta\, t_i + (1 - \beta)\, p_i, \qquad
\mathcal{L} = \frac{1}{n} \sum_{i} \Bigl( -\log p_{i, y_i} + \lambda \log\bigl(1 - \langle t_i, p_i \rangle\bigr) \Bigr)
$$

where $p_i$ is the softmax of sample $i$'s logits and $t_i$ is a constant for the gradient. The stronger form with two
networks is `trimtab.losses.ELRPlus`.

Reference: Liu, Niles-Weed, Razavian, Fernandez-Granda, "Early-Learning Regularization Prevents Memorization of Noisy
Labels", NeurIPS 2020, arXiv 2007.00151.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.losses.checks import Reduction, check_reduction, checked_logits, reduce
from trimtab.ops.arguments import floating_tensor, in_range, integer, non_negative
from trimtab.ops.sample_memory import Repeats, SampleMemory
from trimtab.ops.whole_state import WholeState

# Keeps the logarithm finite where past and present agree on one class.
_LARGEST_AGREEMENT = 1 - 1e-4


def elr_penalty(
    probs: Float[Tensor, "batch classes"], past: Float[Tensor, "batch classes"], reduction: Reduction = "mean"
) -> Tensor:
    r"""The regulariser, $\log(1 - \langle t, p \rangle)$: zero without agreement, negative and falling with it.

    Args:
        probs: predicted probabilities, which get the gradient.
        past: average of past predictions, a constant.
        reduction: "none", "mean" or "sum" over the batch.

    Returns:
        The penalty, at most 0, to be added to the loss with the weight `lam`. It stops falling at an agreement of
        0.9999; the authors' release bounds each probability by that value instead.

    Raises:
        ValueError: if the shapes differ, the batch is empty or `reduction` is unknown.

    Example:
        >>> import torch
        >>> uniform = torch.full((1, 10), 0.1)
        >>> elr_penalty(uniform, 0.3 * uniform)  # log(1 - 0.03)
        tensor(-0.0305)
    """
    probs, past = floating_tensor("probs", probs), floating_tensor("past", past)
    if probs.shape != past.shape or probs.ndim != 2:
        raise ValueError(
            "probs and past must be of the same shape (batch, classes), "
            f"got {tuple(probs.shape)} and {tuple(past.shape)}"
        )
    if probs.numel() == 0:
        raise ValueError(f"probs must hold at least one sample, got shape {tuple(probs.shape)}")
    agreement = (past.detach() * probs).sum(1).clamp_max(_LARGEST_AGREEMENT)
    return reduce((-agreement).log1p(), reduction)


class ELR(WholeState, nn.Module):
    """Cross-entropy with early-learning regularisation, called as `loss(logits, targets, index)`.

    The average is updated before it is used, once per visit of a sample, and only in training mode. The returned value
    may be negative.

    Args:
        num_samples: size of the training set.
        num_classes: number of classes.
        lam: weight of the regulariser. The authors use 3 on CIFAR-10 (1 for class-dependent noise), 7 on CIFAR-100.
        beta: momentum of the average, in [0, 1). The authors use 0.7 on CIFAR-10, 0.9 on CIFAR-100 and for
            class-dependent noise.
        reduction: "none", "mean" or "sum" over the batch.
        repeats: what to do with a sample that comes more than once in a batch, see `SampleMemory`: "refuse", or "mean"
            for samplers with replacement and padded distributed batches.

    Attributes:
        memory: the averages, `memory.rows` of shape `(num_samples, num_classes)`, zero before a sample's first visit.
            It takes only finite rows: a prediction of NaN leaves a sample's average as it is.

    Raises:
        ValueError: if a size is not positive, `lam` is negative or not finite, `beta` is outside [0, 1), or
            `reduction` or `repeats` is unknown.

    Example:
        >>> import torch
        >>> loss = ELR(num_samples=100, num_classes=10)
        >>> logits = torch.zeros(2, 10, requires_grad=True)
        >>> value = loss(logits, torch.tensor([3, 5]), index=torch.tensor([0, 42]))
        >>> value.backward()
        >>> value.item()  # log(10) + 3 log(1 - 0.03)
        2.2112...
    """

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        *,
        lam: float = 3.0,
        beta: float = 0.7,
        reduction: Reduction = "mean",
        repeats: Repeats = "refuse",
    ) -> None:
        super().__init__()
        if integer("num_classes", num_classes) < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.lam = non_negative("lam", lam)
        self.beta = in_range("beta", beta, 0, 1, "left")
        check_reduction(reduction)
        self.memory = SampleMemory(num_samples, num_classes, repeats=repeats)
        self.num_classes = num_classes
        self.reduction: Reduction = reduction

    def forward(
        self, logits: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"], index: Int[Tensor, " batch"]
    ) -> Tensor:
        """The loss of a batch; in training mode the samples' averages move.

        Args:
            logits: scores of the classes.
            targets: labels, wrong ones among them.
            index: the samples' positions in the training set.

        Raises:
            TypeError: if a dtype is wrong (`logits` floating point, `targets` and `index` int64).
            ValueError: if shapes do not fit, the batch is empty, a label or an index is out of range, or an index is
                repeated where that is refused.
        """
        logits = checked_logits(logits, targets, index=index, num_classes=self.num_classes)
        log_probs = logits.log_softmax(1)
        probs = log_probs.exp()
        past = self.memory.average(index, probs, self.beta)
        fit = F.nll_loss(log_probs, targets, reduction=self.reduction)
        return fit + self.lam * elr_penalty(probs, past, self.reduction)
