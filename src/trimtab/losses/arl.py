r"""Asymmetric multimodal learning: leads a network to rely on each modality in inverse proportion to its variance.

For a network with one encoder per modality that hardly beats its best modality, because the one that is learned
fastest takes over. It scales the gradient of each encoder by how much that modality is under-used for its
uncertainty, and trains every modality on its own through the shared head, at no extra parameters.

$$
\mathcal{L} = \mathrm{CE}(z, y) + \gamma \sum_m \mathrm{CE}(z_m, y), \qquad
\frac{\partial \mathcal{L}}{\partial f_m} \leftarrow (1 + k_m) \frac{\partial \mathcal{L}}{\partial f_m}, \qquad
k = \mathrm{softmax}_m \Bigl( T\, w_m \frac{1 / d_m}{\sum_j 1 / d_j} \Bigr)
$$

where $z_m$ are the shared head's logits with all features but modality $m$'s at zero, $w_m \propto 1 / h_m$ sums to one
for the share $h_m$ of the batch's mean entropy (the proxy of the variance), and $d_m$ is the share of
$\lVert z_m \rVert_1$ (the dependence). All $k_m$ are equal where $d_m \propto 1 / h_m$. For two modalities the second
factor is the other one's dependence, as the authors have it; for more it keeps that point of rest.

Reference: Wei, Luo, Luo, "Improving Multimodal Learning via Imbalanced Learning", ICCV 2025, arXiv 2507.10203. In the
authors' release the softmax above is computed but not used: both coefficients stay at 1/2, and every encoder's gradient
is multiplied by 1.5. Here they are the paper's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.losses.checks import Reduction, check_reduction, checked_logits, reduce
from trimtab.ops.arguments import floating_tensor, in_range, integer, non_negative, number, tensor

Fusion = Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]]


class _ScaleGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, factor: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return gradients[0] * factor.to(gradients[0].dtype), None


def scale_gradient(x: Float[Tensor, "..."], factor: float | Float[Tensor, ""]) -> Float[Tensor, "..."]:
    """The identity, whose gradient is multiplied by a factor.

    Args:
        x: any tensor.
        factor: a number or a scalar tensor, a constant.

    Raises:
        ValueError: if `factor` is a tensor of more than one value.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> scale_gradient(3 * x, 1.5).sum().backward()
        >>> x.grad
        tensor([4.5000, 4.5000])
    """
    x = tensor("x", x)
    if isinstance(factor, Tensor) and factor.ndim:
        raise ValueError(f"factor must be a single number, got shape {tuple(factor.shape)}")
    if not isinstance(factor, Tensor):
        number("factor", factor)
    scale = factor.detach() if isinstance(factor, Tensor) else torch.tensor(factor, device=x.device)
    return cast(Tensor, _ScaleGradient.apply(x, scale))  # type: ignore[no-untyped-call]


@torch.no_grad()
def asymmetric_coefficients(
    unimodal_logits: Float[Tensor, "batch modalities classes"], *, temperature: float = 8.0, clamp: float = 0.3
) -> Float[Tensor, " modalities"]:
    r"""The coefficients $k_m$ of a batch, which sum to one; larger for a modality that is under-used.

    Args:
        unimodal_logits: each modality's logits through the shared head, of at least two modalities.
        temperature: sharpness of the softmax, T.
        clamp: lower bound of a modality's share of the entropy where there are two; for M modalities it is
            `clamp * 2 / M`, so that equal shares lie above it however many there are.

    Raises:
        TypeError: if `unimodal_logits` is not floating point.
        ValueError: if the shape is wrong, the batch is empty or an option is out of range.

    Example:
        >>> unsure, sure = torch.tensor([1.0, 0.0]), torch.tensor([4.0, 0.0])
        >>> asymmetric_coefficients(torch.stack([unsure, sure])[None]).round(decimals=3)  # 0.257 * 0.8 and 0.743 * 0.2
        tensor([0.6130, 0.3870])
    """
    non_negative("temperature", temperature)
    in_range("clamp", clamp, 0, 0.5, "left")
    logits = _checked_unimodal(unimodal_logits)
    floor = 2 * clamp / logits.shape[1]
    entropy = torch.special.entr(logits.softmax(2)).sum(2).mean(0)
    trust = _share(1 / _share(entropy).clamp_min(floor))
    dependence = _share(logits.abs().sum(2).mean(0))
    return (temperature * trust * _share(1 / dependence)).softmax(0)


class AsymmetricLearning(nn.Module):
    """The loss with its unimodal terms, and the modulation of the encoders' gradients.

    Call `set_epoch(epoch)` before each epoch; in the first `warmup_epochs` there is no modulation and unimodal losses
    have the weight 1. The coefficients are those of the very batch whose gradient they scale. For a head that is too
    costly to run twice, keep `coefficients(unimodal_logits)` from the batch before and apply
    `scale_gradient(part, 1 + k)` yourself. (The authors' release has the factor 1.5 for all, see the module's
    docstring: `scale_gradient(part, 1.5)`.)

    Args:
        temperature: sharpness of the coefficients, T: 8 for CREMA-D, 4 for Kinetics-Sounds and AVE.
        gamma: weight of the unimodal losses: 4 for CREMA-D, 3 for Kinetics-Sounds, 5 for AVE.
        clamp: lower bound of a modality's share of the entropy, in [0, 0.5); see `asymmetric_coefficients`.
        warmup_epochs: how many epochs come before the modulation.
        reduction: "none", "mean" or "sum" over the batch.

    Raises:
        ValueError: if an option is out of range or unknown.

    Example:
        >>> from trimtab.losses import SharedHeadFusion
        >>> encoders = [nn.Linear(5, 16), nn.Linear(3, 8)]
        >>> fusion = SharedHeadFusion(nn.Linear(24, 10), dims=[16, 8])
        >>> criterion = AsymmetricLearning()
        >>> views, targets = [torch.randn(4, 5), torch.randn(4, 3)], torch.tensor([0, 3, 1, 9])
        >>> criterion.set_epoch(5)
        >>> features = [encoder(view) for encoder, view in zip(encoders, views)]
        >>> logits, unimodal_logits = fusion(criterion.modulate(features, fusion))
        >>> criterion(logits, unimodal_logits, targets).backward()
    """

    def __init__(
        self,
        *,
        temperature: float = 8.0,
        gamma: float = 4.0,
        clamp: float = 0.3,
        warmup_epochs: int = 5,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.temperature = non_negative("temperature", temperature)
        self.gamma = non_negative("gamma", gamma)
        self.clamp = in_range("clamp", clamp, 0, 0.5, "left")
        self.warmup_epochs = integer("warmup_epochs", warmup_epochs, 0)
        check_reduction(reduction)
        self.reduction: Reduction = reduction
        self.epoch: int | None = None if warmup_epochs else 0

    def set_epoch(self, epoch: int) -> None:
        """Says which 0-based epoch it is.

        Raises:
            ValueError: if `epoch` is negative.
        """
        self.epoch = integer("epoch", epoch, 0)

    @property
    def modulates(self) -> bool:
        """Whether the warm-up is over.

        Raises:
            RuntimeError: if there is a warm-up and `set_epoch` has not been called.
        """
        if self.epoch is None:
            raise RuntimeError("AsymmetricLearning: call set_epoch(epoch) before each epoch; it starts with a warm-up")
        return self.epoch >= self.warmup_epochs

    def coefficients(self, unimodal_logits: Float[Tensor, "batch modalities classes"]) -> Float[Tensor, " modalities"]:
        """The coefficients of a batch; see `asymmetric_coefficients`."""
        return asymmetric_coefficients(unimodal_logits, temperature=self.temperature, clamp=self.clamp)

    def modulate(self, features: Sequence[Float[Tensor, "batch ..."]], fusion: Fusion) -> list[Tensor]:
        """The features as they are, with a gradient that reaches the encoders as `1 + k` times itself.

        Args:
            features: the encoders' outputs, one per modality.
            fusion: gives the joint and the unimodal logits of features, as `SharedHeadFusion` does; it is called
                once more without gradient. During the warm-up it is not called and nothing is scaled.

        Raises:
            RuntimeError: if `set_epoch` has not been called.
        """
        if not self.modulates:
            return list(features)
        with torch.no_grad():
            _, unimodal_logits = fusion(features)
        factors = 1 + self.coefficients(unimodal_logits)
        return [scale_gradient(part, factor) for part, factor in zip(features, factors.unbind(), strict=True)]

    def forward(
        self,
        logits: Float[Tensor, "batch classes"],
        unimodal_logits: Float[Tensor, "batch modalities classes"],
        targets: Int[Tensor, " batch"],
    ) -> Tensor:
        """The loss of a batch, also under the name `loss`.

        Args:
            logits: of all modalities together.
            unimodal_logits: of each modality alone.
            targets: labels.

        Raises:
            RuntimeError: if `set_epoch` has not been called.
            TypeError: if a dtype is wrong (logits floating point, `targets` int64).
            ValueError: if shapes do not fit, the batch is empty or a label is out of range.
        """
        logits = checked_logits(logits, targets)
        alone = _checked_unimodal(unimodal_logits)
        if (alone.shape[0], alone.shape[2]) != logits.shape:
            raise ValueError(
                f"unimodal_logits must be ({logits.shape[0]}, modalities, {logits.shape[1]}) beside the logits, "
                f"got shape {tuple(alone.shape)}"
            )
        own = F.cross_entropy(alone.mT, targets[:, None].expand(-1, alone.shape[1]), reduction="none").sum(1)
        joint = F.cross_entropy(logits, targets, reduction="none")
        return reduce(joint + (self.gamma if self.modulates else 1.0) * own, self.reduction)

    loss = forward


def _share(amounts: Float[Tensor, " modalities"]) -> Float[Tensor, " modalities"]:
    """Amounts as fractions of their sum; equal ones where all are zero."""
    amounts = amounts.clamp_min(torch.finfo(amounts.dtype).eps)
    return amounts / amounts.sum()


def _checked_unimodal(logits: Tensor) -> Tensor:
    logits = floating_tensor("unimodal_logits", logits)
    if logits.ndim != 3 or logits.shape[1] < 2:
        raise ValueError(
            "unimodal_logits must be (batch, modalities, classes), with two modalities or more, "
            f"got shape {tuple(logits.shape)}"
        )
    if len(logits) == 0:
        raise ValueError("unimodal_logits must hold at least one sample, got an empty batch")
    return logits
