r"""SAF: sharpness-aware training at the cost of plain training.

A sharp drop of the loss along the training trajectory is discouraged by holding the predictions on a sample to those
the network made a few epochs ago. It suits trainings that SAM helps but whose cost it must not double. MESA does the
same with the predictions of a weight average: no memory of samples, one more forward pass.

$$
L = \mathrm{CE}(z, y) + \lambda\, \frac{T^2}{|B|} \sum_{i \in B}
    \mathrm{KL}\Bigl( \operatorname{softmax}\bigl(z_i^{(e - \tilde E)} / T\bigr) \,\Big\|\,
    \operatorname{softmax}(z_i / T) \Bigr), \qquad E_{\mathrm{start}} < e
$$

Reference: Jiawei Du, Daquan Zhou, Jiashi Feng, Vincent Y. F. Tan, Joey Tianyi Zhou, "Sharpness-Aware Training for
Free", NeurIPS 2022, arXiv 2205.14083.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trimtab.ops.arguments import (
    class_indices,
    floating_tensor,
    in_range,
    indices,
    integer,
    non_negative,
    positive,
    real_problem,
)
from trimtab.ops.sample_memory import Repeats, SampleMemory
from trimtab.ops.tempered_kl import tempered_kl
from trimtab.ops.whole_state import WholeState


def _averaged(decay: float, averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor) -> None:
    """PyTorch's exponential average, in a form that can be pickled."""
    get_ema_multi_avg_fn(decay)(averaged, current, num_averaged)


def _check(lam: float, temperature: float, start_epoch: int, end_epoch: int | None) -> None:
    non_negative("lam", lam)
    positive("temperature", temperature)
    integer("start_epoch", start_epoch, 0)
    if end_epoch is not None:
        integer("end_epoch", end_epoch, start_epoch + 1)


class TrajectoryLoss(WholeState, nn.Module):
    """Cross-entropy plus SAF's trajectory term, called as `loss(logits, targets, index)` (Eq. 7, Algorithm 1).

    Call `set_epoch(epoch)` before each epoch. In training mode the batch's logits are remembered, those of the forward
    pass that was made anyway; in eval mode the loss is plain cross-entropy. A sample that was left out `lag` epochs ago
    (by `drop_last`, say) adds nothing to the term. The memory takes `num_samples * (lag + 1) * num_classes` numbers,
    on the CPU unless the loss is moved.

    Args:
        num_samples: size of the training set.
        num_classes: number of classes.
        lam: weight of the term, at least 0; the authors take 0.3 on ImageNet, and 0.8.
        temperature: softens both predictions, positive.
        start_epoch: the term acts in the epochs after this one (0-based); at least `lag`.
        lag: how many epochs ago the predictions were made, at least 1; the authors take 2 or 3.
        end_epoch: the term acts in the epochs before this one; always, if None.
        dtype: precision of the memory.
        repeats: what to do with a sample that comes more than once in a batch, see `SampleMemory`: "refuse", or "mean"
            for samplers with replacement and padded batches.

    Attributes:
        memory: logits of the last `lag + 1` epochs less their largest, `memory.rows` of shape
            `(num_samples, lag + 1, num_classes)`, infinite where there are none.

    Raises:
        ValueError: an argument is out of its range, or `repeats` is unknown.

    Example:
        >>> loss = TrajectoryLoss(num_samples=100, num_classes=10, start_epoch=1, lag=1)
        >>> index, targets = torch.tensor([0, 42]), torch.tensor([3, 5])
        >>> for epoch in range(3):
        ...     loss.set_epoch(epoch)
        ...     value = loss(torch.eye(10)[[epoch, epoch]], targets, index)
        >>> round((value - F.cross_entropy(torch.eye(10)[[2, 2]], targets)).item(), 4)
        0.0325
    """

    acts: Tensor
    slot: Tensor
    past_slot: Tensor

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        lam: float = 0.3,
        temperature: float = 5.0,
        start_epoch: int = 5,
        lag: int = 3,
        end_epoch: int | None = None,
        *,
        dtype: torch.dtype = torch.float16,
        repeats: Repeats = "refuse",
    ) -> None:
        super().__init__()
        if integer("num_classes", num_classes) < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        _check(lam, temperature, start_epoch, end_epoch)
        integer("lag", lag, 1, start_epoch)
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be floating point, got {dtype}")
        self.memory = SampleMemory(num_samples, lag + 1, num_classes, init=float("inf"), repeats=repeats).to(dtype)
        # Tensors, not numbers: a compiled loss must not be compiled anew in each epoch. Whether the term acts, and not
        # its weight, which would be rounded to the precision that the module is put in.
        self.register_buffer("acts", torch.tensor(False))
        self.register_buffer("slot", torch.tensor([-1]))
        self.register_buffer("past_slot", torch.tensor([0]))
        self.num_classes, self.lag = num_classes, lag
        self.lam, self.temperature = lam, temperature
        self.start_epoch, self.end_epoch = start_epoch, end_epoch
        self._begun = False

    def set_epoch(self, epoch: int) -> None:
        """Begin this 0-based epoch: choose the slot to write, and the one written `lag` epochs ago to read.

        Raises:
            ValueError: `epoch` is negative.
        """
        integer("epoch", epoch, 0)
        slot = epoch % (self.lag + 1)
        if slot != int(self.slot):  # resumed within an epoch, what it wrote so far stays
            self.memory.rows[:, slot] = float("inf")
        self.slot.fill_(slot)
        self.past_slot.fill_((epoch - self.lag) % (self.lag + 1))
        self.acts.fill_(self.start_epoch < epoch and (self.end_epoch is None or epoch < self.end_epoch))
        self._begun = True

    def forward(
        self, logits: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"], index: Int[Tensor, " batch"]
    ) -> Float[Tensor, ""]:
        """The loss of a batch; in training mode its logits are remembered.

        Args:
            logits: scores of the classes.
            targets: labels.
            index: the samples' positions in the training set.

        Raises:
            RuntimeError: `set_epoch` has not been called.
            TypeError: a dtype is wrong (`logits` floating point, `targets` and `index` int64).
            ValueError: shapes do not fit, the batch is empty, or an index is out of range or, where repeats are
                refused, repeated.
        """
        logits = floating_tensor("logits", logits)
        class_indices("targets", targets)
        class_indices("index", index)
        if logits.ndim != 2 or logits.shape[1] != self.num_classes or not len(logits):
            raise ValueError(
                f"logits must have shape (batch, {self.num_classes}) with at least one sample, got "
                f"{tuple(logits.shape)}"
            )
        for name, argument in (("targets", targets), ("index", index)):
            if argument.shape != logits.shape[:1]:
                raise ValueError(f"{name} must have shape ({len(logits)},), got {tuple(argument.shape)}")
        indices("targets", targets, self.num_classes)
        loss = F.cross_entropy(logits, targets)
        return loss + self.penalty(logits, index) if self.training else loss

    def penalty(self, logits: Float[Tensor, "batch classes"], index: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
        """The trajectory term alone, weighted, to be added to another loss; the logits are remembered.

        Raises:
            RuntimeError: `set_epoch` has not been called.
            TypeError: `index` is not int64.
            ValueError: an index is out of range or, where repeats are refused, repeated.
        """
        if problem := real_problem(logits=logits):
            raise TypeError(problem)
        if not self._begun:
            raise RuntimeError("call set_epoch(epoch) before each epoch")
        # Softmax does not see a shift; without one, large logits would overflow in half precision.
        centred = (logits - logits.amax(1, keepdim=True)).detach()
        kept = centred.clamp(min=torch.finfo(self.memory.rows.dtype).min).unsqueeze(1)
        rows = self.memory.update(index, lambda rows: rows.index_copy(1, self.slot.to(rows.device), kept.to(rows)))
        past = rows.index_select(1, self.past_slot.to(rows.device)).squeeze(1).to(logits)
        # Against itself a sample has divergence and gradient zero.
        past = torch.where(past.isposinf(), centred, past)
        return self.acts.to(logits) * self.lam * tempered_kl(logits, past, self.temperature).mean()


class MESA(WholeState, nn.Module):
    """Memory-efficient SAF: the predictions to hold to come from an average of the weights (Section 4.2).

    A term to be added to the loss: `loss + mesa(logits, x)`, with `mesa.update()` after each optimizer step and
    `mesa.set_epoch(epoch)` before each epoch.

    Args:
        model: the network that is trained; its average starts as a copy, with the same buffers, in eval mode.
        lam: weight of the term, at least 0.
        temperature: softens both predictions, positive.
        decay: decay rate of the weight average, in [0, 1).
        start_epoch: the term acts in the epochs after this one (0-based).
        end_epoch: the term acts in the epochs before this one; always, if None.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> mesa, x = MESA(model, start_epoch=0), torch.ones(2, 4)
        >>> mesa.set_epoch(1)
        >>> mesa(model(x), x).item()
        0.0
        >>> with torch.no_grad():
        ...     _ = model.weight[0].add_(1.0)
        >>> mesa.update()
        >>> mesa(model(x), x).item() > 0
        True
    """

    def __init__(
        self,
        model: nn.Module,
        lam: float = 0.3,
        temperature: float = 5.0,
        decay: float = 0.9995,
        start_epoch: int = 5,
        end_epoch: int | None = None,
    ) -> None:
        super().__init__()
        _check(lam, temperature, start_epoch, end_epoch)
        in_range("decay", decay, 0, 1, "left")
        self.average = AveragedModel(model, multi_avg_fn=partial(_averaged, decay), use_buffers=True)
        self.average.n_averaged.fill_(1)  # the average starts at the present weights, not at the first update's
        self.average.requires_grad_(False)
        self._model = (model,)  # in a tuple, so that it is not taken for a part of this module
        self.lam, self.temperature = lam, temperature
        self.start_epoch, self.end_epoch = start_epoch, end_epoch
        self.acts = False

    def set_epoch(self, epoch: int) -> None:
        """Begin this 0-based epoch.

        Raises:
            ValueError: `epoch` is negative.
        """
        integer("epoch", epoch, 0)
        self.acts = self.start_epoch < epoch and (self.end_epoch is None or epoch < self.end_epoch)

    def update(self) -> None:
        """Move the average towards the present weights, after an optimizer step."""
        self.average.update_parameters(self._model[0])

    def forward(
        self, logits: Float[Tensor, "batch classes"], x: Float[Tensor, "batch ..."], index: Tensor | None = None
    ) -> Float[Tensor, ""]:
        """The term of a batch.

        Args:
            logits: the network's scores.
            x: the inputs they were computed from.
            index: not used; taken so that the term is called like others that are given it.
        """
        if not self.acts:
            return logits.new_zeros(())
        self.average.eval()
        with torch.no_grad():
            teacher = cast(Tensor, self.average(x))
        return self.lam * tempered_kl(logits, teacher, self.temperature).mean()
