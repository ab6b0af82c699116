r"""AAER: one-step adversarial training that does not collapse, by holding on to abnormal adversarial examples.

Adversarial training with a single attack step costs little more than plain training, until from one epoch to the next
the network learns to fool that one step and loses all robustness (catastrophic overfitting). It announces itself by
abnormal examples, whose loss *falls* under the attack. AAER penalises how many there are and how far their outputs
move, at no further pass through the network:

$$
L = \frac{1}{B} \sum_i \ell_i + \lambda_1 \frac{|A|}{B} \Bigl( \lambda_2 \frac{1}{|A|} \sum_{i \in A}
(\ell^0_i - \ell_i) + \lambda_3 \max(V_A - V_N, 0) \Bigr), \qquad
V_S = \frac{1}{|S|} \sum_{i \in S} \| f(x_i + \delta^0_i) - f(x_i + \delta_i) \|^2
$$

with $\ell^0, \ell$ the cross-entropy before and after the attack step, $A = \{\ell^0 > \ell\}$ the abnormal examples
and $N$ the others. What was before the step, and $V_N$, are constants. The penalty counts only where both sets have
members.

In the authors' code the losses' change carries no gradient, so that it moves nothing but the reported value; the paper
reads as if it did. `ce_grad=False` follows the code.

Reference: Runqi Lin, Chaojian Yu, Tongliang Liu, "Eliminating Catastrophic Overfitting Via Abnormal Adversarial
Examples Regularization", NeurIPS 2023, arXiv 2404.08154. The two kinds of start are those of RS-FGSM (arXiv 2001.03994)
and N-FGSM (arXiv 2202.01181).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.ops.arguments import (
    class_indices,
    floating_tensor,
    indices,
    non_negative,
    one_of,
    out_of_reach,
    positive,
    same_shape,
)
from trimtab.ops.attack import random_in_ball, rounded_towards
from trimtab.robust.bounds import in_order

Noise = Literal["rs", "n"]


class SingleStep(NamedTuple):
    """What one attack step leaves.

    Attributes:
        x_adv: the attacked inputs.
        logits_init: the network's outputs at the step's random start, a constant.
    """

    x_adv: Float[Tensor, "batch ..."]
    logits_init: Float[Tensor, "batch classes"]


def single_step_adversary(
    model: Callable[[Float[Tensor, "batch ..."]], Float[Tensor, "batch classes"]],
    x: Float[Tensor, "batch ..."],
    targets: Int[Tensor, " batch"],
    eps: float,
    *,
    alpha: float | None = None,
    noise: Noise = "rs",
    bounds: tuple[float, float] | None = (0.0, 1.0),
    start: Float[Tensor, "batch ..."] | None = None,
    generator: torch.Generator | None = None,
) -> SingleStep:
    """One step along the gradient's sign from a random start, and the outputs at that start.

    The model runs in the mode it is in, as in the authors' training, and no parameter gets a gradient.

    Args:
        model: maps inputs to logits.
        x: inputs.
        targets: labels.
        eps: radius of the ball in the largest change of an element.
        alpha: length of the step as a share of `eps`; the authors' values, 1.25 for "rs" and 1 for "n", where it is
            None.
        noise: "rs" starts uniformly in the ball and projects back to it (RS-FGSM); "n" starts in a ball twice as wide
            and projects to the bounds alone (N-FGSM), so that a change may reach `(2 + alpha) eps`.
        bounds: smallest and largest value of an input; None for any.
        start: the first offset; drawn where it is None.
        generator: source of the draw; torch's global one where it is None.

    Raises:
        TypeError: `x` is not floating point or `targets` not int64.
        ValueError: shapes do not fit, the batch is empty, `eps` or `alpha` is not positive, `noise` is unknown,
            `bounds` are not two numbers in order, or, on the CPU, an input is outside of them by more than `eps`.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> x_adv, _ = single_step_adversary(model, torch.full((1, 2), 0.5), torch.tensor([0]), eps=0.1)
        >>> bool((x_adv - 0.5).abs().max() <= 0.1 + 1e-6)
        True
    """
    positive("eps", eps)
    one_of("noise", noise, ("rs", "n"))
    if bounds is not None and not in_order(bounds):
        raise ValueError(f"bounds must be two finite numbers in order, got {bounds}")
    length = eps * ({"rs": 1.25, "n": 1.0}[noise] if alpha is None else positive("alpha", alpha))
    floating_tensor("x", x)
    if x.ndim == 0 or len(x) == 0:
        raise ValueError(f"x must hold at least one sample, got shape {tuple(x.shape)}")
    if out_of_reach(x, eps, bounds):
        raise ValueError(f"x must be within bounds {bounds}, got values from {x.min():g} to {x.max():g}")
    if start is None:
        start = random_in_ball(x, eps if noise == "rs" else 2 * eps, generator=generator)
    if not isinstance(start, Tensor) or not start.is_floating_point():
        raise TypeError(f"start must be a floating-point tensor, got {type(start).__name__}")
    same_shape("start", start, "x", x)
    given = x.detach()
    x = floating_tensor("x", given)
    began = _bounded(x + start.detach().to(x.dtype), bounds).to(given.dtype).requires_grad_()
    with torch.enable_grad():
        logits = model(began)
        loss = F.cross_entropy(_checked(logits, targets), targets, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, began)
    offset = began.detach() - x + length * gradient.sign()
    if noise == "rs":
        offset = offset.clamp(-eps, eps)
    return SingleStep(rounded_towards(given, _bounded(x + offset, bounds)), logits.detach())


class AbnormalExamples(NamedTuple):
    """What the penalty rests on, all scalars.

    Attributes:
        share: of the batch whose loss fell under the attack.
        loss_change: by how much it fell, on average over them.
        output_change: by how much more their outputs moved than those of the others, at least 0.
    """

    share: Float[Tensor, ""]
    loss_change: Float[Tensor, ""]
    output_change: Float[Tensor, ""]


def abnormal_examples(
    logits: Float[Tensor, "batch classes"],
    targets: Int[Tensor, " batch"],
    logits_init: Float[Tensor, "batch classes"],
    *,
    ce_grad: bool = False,
) -> AbnormalExamples:
    """The abnormal examples of a batch, in numbers; nothing is read back to the host.

    Args:
        logits: outputs at the attacked inputs.
        targets: labels.
        logits_init: outputs before the attack step; a constant.
        ce_grad: whether the fall of the losses carries a gradient.

    Returns:
        Where there is no abnormal example, or none but such, both changes are 0.

    Raises:
        TypeError: logits are not floating point or `targets` not int64.
        ValueError: shapes do not fit, the batch is empty or a label is out of range.

    Example:
        >>> before, after = torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> abnormal_examples(after, torch.tensor([0, 0]), before).share  # the first one's loss fell
        tensor(0.5000)
    """
    logits = _checked(logits, targets)
    logits_init = floating_tensor("logits_init", logits_init).detach()
    same_shape("logits_init", logits_init, "logits", logits)
    fall = F.cross_entropy(logits_init, targets, reduction="none") - F.cross_entropy(logits, targets, reduction="none")
    moved = (logits_init - logits).square().sum(1)
    abnormal = (fall > 0).to(logits.dtype).detach()
    count, others = abnormal.sum(), (1 - abnormal).sum()
    both = ((count > 0) & (others > 0)).to(logits.dtype)
    v_abnormal = (moved * abnormal).sum() / count.clamp_min(1)
    v_normal = (moved.detach() * (1 - abnormal)).sum() / others.clamp_min(1)
    loss_change = (fall * abnormal).sum() / count.clamp_min(1)
    return AbnormalExamples(
        count / len(abnormal),
        both * (loss_change if ce_grad else loss_change.detach()),
        both * (v_abnormal - v_normal).relu(),
    )


class AAERLoss(nn.Module):
    """Cross-entropy on attacked inputs and the penalty on abnormal ones, called `loss(logits, targets, logits_init)`.

    The authors' weights on CIFAR-10 are (1, 2.5, 1.5) with the start of RS-FGSM and (1, 1.5, 0.15) with that of N-FGSM
    at `eps` of 8/255, (1, 7, 3.25) and (1, 8.5, 1.5) at 16/255.

    Args:
        lam1: weight of the penalty, at least 0; 0 leaves the cross-entropy.
        lam2: weight of the fall of their losses in it; a constant to the gradient unless `ce_grad`.
        lam3: weight of the movement of their outputs in it.
        ce_grad: whether the fall of the losses carries a gradient.

    Raises:
        ValueError: a weight is negative.

    Example:
        >>> model, criterion = nn.Linear(4, 3), AAERLoss()
        >>> x, targets = torch.rand(8, 4), torch.arange(8) % 3
        >>> x_adv, logits_init = single_step_adversary(model, x, targets, eps=0.1)
        >>> criterion(model(x_adv), targets, logits_init).backward()
    """

    def __init__(self, lam1: float = 1.0, lam2: float = 2.5, lam3: float = 1.5, *, ce_grad: bool = False) -> None:
        super().__init__()
        self.lam1, self.lam2 = non_negative("lam1", lam1), non_negative("lam2", lam2)
        self.lam3, self.ce_grad = non_negative("lam3", lam3), ce_grad

    def forward(
        self,
        logits: Float[Tensor, "batch classes"],
        targets: Int[Tensor, " batch"],
        logits_init: Float[Tensor, "batch classes"],
    ) -> Float[Tensor, ""]:
        """The loss of a batch; arguments and errors are those of `abnormal_examples`."""
        share, loss_change, output_change = abnormal_examples(logits, targets, logits_init, ce_grad=self.ce_grad)
        penalty = share * (self.lam2 * loss_change + self.lam3 * output_change)
        return F.cross_entropy(floating_tensor("logits", logits), targets) + self.lam1 * penalty

    def extra_repr(self) -> str:
        return f"lam1={self.lam1:g}, lam2={self.lam2:g}, lam3={self.lam3:g}, ce_grad={self.ce_grad}"


def _checked(logits: Tensor, targets: Tensor) -> Tensor:
    """The logits, in float32 where they came in half precision, once they are known to suit the targets."""
    logits = floating_tensor("logits", logits)
    class_indices("targets", targets)
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        shapes = f"{tuple(logits.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"logits and targets must be (batch, classes) and (batch,), got {shapes}")
    if len(logits) == 0:
        raise ValueError("logits must hold at least one sample, got an empty batch")
    indices("targets", targets, logits.shape[1])
    return logits


def _bounded(x: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    return x if bounds is None else x.clamp(*bounds)
