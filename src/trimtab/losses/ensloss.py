r"""EnsLoss: binary classification with a fresh random loss at every step, given by its derivatives alone.

For a network large enough to fit every training label, which over-fits under a fixed binary loss. In place of a loss,
each step draws derivatives that some convex, calibrated loss of the margin could have, and hands the most negative ones
to the samples with the smallest margins.

$$
s_i = (2 y_i - 1) f_i, \qquad
g_{(i)} = \frac{\max\bigl(-(1 + \lambda z)_+^{1/\lambda}, -1\bigr)_{(i)}}{\max(s_{(i)}, 1)}, \qquad
\frac{\partial L}{\partial f_i} = \frac{(2 y_i - 1)\, g_i}{B}
$$

where `z` is standard normal, `(i)` means the i-th smallest (of the draws and of the margins), and the Box-Cox parameter
$\lambda$ is redrawn from U(-1, 1) every few epochs.

Reference: Ben Dai, "EnsLoss: Stochastic Calibrated Loss Ensembles for Preventing Overfitting in Classification", 2024,
arXiv 2409.00908.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.ops.arguments import assured, floating_tensor, in_range, integer, looked_at, tensor, tensor_problem
from trimtab.ops.whole_state import WholeState

# Keeps every derivative below zero, as calibration asks of the one at margin zero.
_SLACK = 1e-6


def calibrated_derivatives(
    margins: Float[Tensor, " batch"],
    lam: Float[Tensor, ""] | float = 0.0,
    *,
    noise: Float[Tensor, " batch"] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " batch"]:
    r"""Random derivatives, at these margins, of a loss that is convex, calibrated and bounded below.

    They do not decrease with the margin (convexity), are negative everywhere (calibration), and beyond margin 1 fall
    off as $1/s$ (a superlinear raising tail).

    Args:
        margins: $s_i = (2 y_i - 1) f_i$; no gradient flows through them.
        lam: parameter of the inverse Box-Cox transform of the noise, in [-1, 1]; 0 is the exponential.
        noise: standard normal draws, in any order; drawn where it is None.
        generator: source of the draw; torch's global one on the margins' device where it is None.

    Returns:
        Derivatives in [-1 - 1e-6, -1e-6], detached.

    Raises:
        TypeError: if `margins` is not floating point.
        ValueError: if `margins` is not one-dimensional or empty, `noise` has another shape, or `lam` is out of range.

    Example:
        >>> calibrated_derivatives(torch.tensor([0.5, -1.0, 2.0]), noise=torch.tensor([-1.0, 0.0, -2.0]))
        tensor([-0.3679, -1.0000, -0.0677])
    """
    margins = tensor("margins", margins, floating=True).detach()
    if margins.ndim != 1 or len(margins) == 0:
        raise ValueError(f"margins must be (batch,), with at least one sample, got shape {tuple(margins.shape)}")
    if not isinstance(lam, Tensor):
        in_range("lam", lam, -1, 1)
    if noise is None:
        device = margins.device if generator is None else generator.device
        noise = torch.randn(margins.shape, generator=generator, device=device, dtype=margins.dtype)
    noise = floating_tensor("noise", noise)
    if noise.shape != margins.shape:
        raise ValueError(f"noise must be of shape {tuple(margins.shape)} as margins, got {tuple(noise.shape)}")
    lam = torch.as_tensor(lam, dtype=margins.dtype, device=margins.device)
    drawn = (-_inverse_box_cox(noise.to(margins), lam)).clamp(min=-1.0).sort().values
    derivatives = torch.empty_like(drawn).scatter_(0, margins.argsort(), drawn)
    return derivatives / margins.clamp(min=1.0) - _SLACK


class EnsLoss(WholeState, nn.Module):
    r"""A random calibrated loss, drawn anew at every call.

    The number it returns has the right gradient, and is **not** a loss value: log `monitor_loss` instead. Binary
    only, as in the paper.

    Args:
        lam: starting value of the Box-Cox parameter, in [-1, 1].
        period: epochs between two draws of the Box-Cox parameter by `set_epoch`; None keeps `lam`.
        generator: source of all draws; torch's global one where it is None.

    Raises:
        ValueError: if `lam` or `period` is out of range.

    Example:
        >>> criterion = EnsLoss(generator=torch.Generator().manual_seed(0))
        >>> logits = torch.tensor([2.0, -1.0], requires_grad=True)
        >>> criterion(logits, torch.tensor([1.0, 1.0])).backward()
        >>> bool((logits.grad < 0).all())
        True
    """

    lam: Tensor

    def __init__(self, lam: float = 0.0, period: int | None = 10, generator: torch.Generator | None = None) -> None:
        super().__init__()
        lam = in_range("lam", lam, -1, 1)
        self.period = None if period is None else integer("period", period)
        self.generator = generator
        # A buffer, so that a new value neither is lost in a checkpoint nor makes torch.compile start over.
        self.register_buffer("lam", torch.tensor(lam))

    def resample_lambda(self) -> None:
        """Draws the Box-Cox parameter from U(-1, 1)."""
        device = self.lam.device if self.generator is None else self.generator.device
        self.lam.copy_(2 * torch.rand((), generator=self.generator, device=device) - 1)

    def set_epoch(self, epoch: int) -> None:
        """Call at the start of each epoch (0-based): redraws the Box-Cox parameter before every `period`-th.

        Raises:
            ValueError: if `epoch` is negative.
        """
        integer("epoch", epoch, 0)
        if self.period is not None and (epoch + 1) % self.period == 0:
            self.resample_lambda()

    def forward(
        self,
        logits: Float[Tensor, "batch"] | Float[Tensor, "batch 1"],
        targets: Tensor,
        noise: Float[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, ""]:
        """A scalar whose gradient is that of the drawn loss.

        Args:
            logits: one score per sample.
            targets: labels 0 and 1, of floating, integer or boolean type, as many as `logits`.
            noise: standard normal draws in place of the loss's own.

        Raises:
            TypeError: if `logits` is not floating point.
            ValueError: if shapes disagree, the batch is empty, or a label is neither 0 nor 1.
        """
        margins = signed_margins(logits, targets)
        return (calibrated_derivatives(margins, self.lam, noise=noise, generator=self.generator) * margins).mean()

    @staticmethod
    def monitor_loss(logits: Float[Tensor, "batch"] | Float[Tensor, "batch 1"], targets: Tensor) -> Float[Tensor, ""]:
        """The logistic loss, for curves."""
        return F.softplus(-signed_margins(logits, targets)).mean()

    def extra_repr(self) -> str:
        return f"period={self.period}"


def signed_margins(
    logits: Float[Tensor, "batch"] | Float[Tensor, "batch 1"], targets: Tensor
) -> Float[Tensor, " batch"]:
    """Scores signed so that positive means correct, in float32 where they came in half precision.

    Args:
        logits: one score per sample.
        targets: labels 0 and 1, as many as `logits`.

    Raises:
        TypeError: if `logits` is not floating point.
        ValueError: if shapes disagree, the batch is empty, or a label is neither 0 nor 1.
    """
    logits = floating_tensor("logits", logits)
    if problem := tensor_problem(targets=targets):
        raise TypeError(problem)
    if logits.ndim not in (1, 2) or logits.shape[1:] not in ((), (1,)):
        raise ValueError(f"logits must be (batch,) or (batch, 1), got shape {tuple(logits.shape)}")
    if targets.shape not in (logits.shape, logits.shape[:1]):
        raise ValueError(f"targets must be of shape {tuple(logits.shape)} as logits, got {tuple(targets.shape)}")
    if len(logits) == 0:
        raise ValueError("logits must hold at least one sample, got an empty batch")
    assured((targets == 0) | (targets == 1), "targets must be 0 or 1, got another label")
    return (2 * targets.flatten().to(logits) - 1) * logits.flatten()


def _inverse_box_cox(z: Tensor, lam: Tensor) -> Tensor:
    """`max(1 + lam z, 0) ** (1 / lam)` with the limit `exp(z)` at 0; infinite where a negative power meets zero."""
    if looked_at(lam):
        return (torch.log1p((lam * z).clamp(min=-1.0)) / lam if lam else z).exp()
    divisor = torch.where(lam == 0, 1.0, lam)
    return torch.where(lam == 0, z, torch.log1p((lam * z).clamp(min=-1.0)) / divisor).exp()
