r"""Asymmetric multimodal learning: leads a network to rely on each modality in inverse proportion to its variance.

Reach for it when a network with one encoder per modality hardly beats its best modality, because the one that is
learned fastest takes over. It scales the gradient of each encoder by how much that modality is under-used for its
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

Reference: Wei, Luo, Luo, "Improving Multimodal Learning via Imbalanced Learning", ICCV 2025, arXiv 2507.10203.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.losses.checks import Reduction, check_reduction, checked_logits, reduce

Fusion = Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]]


class _ScaleGradient(torch.autograd.Function):
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
    if isinstance(factor, Tensor) and factor.ndim:
        raise ValueError(f"factor: shape {tuple(factor.shape)}; it must be a scalar")
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
        ValueError: if the shape is wrong or the batch is empty.

    Example:
        >>> unsure, sure = torch.tensor([1.0, 0.0]), torch.tensor([4.0, 0.0])
        >>> asymmetric_coefficients(torch.stack([unsure, sure])[None]).round(decimals=3)  # 0.257 * 0.8 and 0.743 * 0.2
        tensor([0.6130, 0.3870])
    """
    logits = _checked_unimodal(unimodal_logits)
    floor = 2 * clamp / logits.shape[1]
    entropy = torch.special.entr(logits.softmax(2)).sum(2).mean(0)
    trust = _share(1 / _share(entropy).clamp_min(floor))
    dependence = _share(logits.abs().sum(2).mean(0))
    return (temperature * trust * _share(1 / dependence)).softmax(0)


class SharedHeadFusion(nn.Module):
    """Fusion by concatenation with one head, which also judges each modality alone, at no extra parameters.

    A modality's own logits are those of the head with the features of all others at zero; the bias is part of each.

    Args:
        head: maps the concatenated features, shape `(..., sum(dims))`, to logits, shape `(..., classes)`, such as
            `nn.Linear`. It must treat rows independently: no batch normalisation.
        dims: width of each modality's features, of at least two modalities.

    Raises:
        ValueError: if there are fewer than two modalities, a width is not positive, or a linear head's width is not
            their sum.

    Example:
        >>> fusion = SharedHeadFusion(nn.Linear(24, 10), dims=[16, 8])
        >>> logits, unimodal_logits = fusion([torch.randn(4, 16), torch.randn(4, 8)])
        >>> logits.shape, unimodal_logits.shape
        (torch.Size([4, 10]), torch.Size([4, 2, 10]))
    """

    masks: Tensor

    def __init__(self, head: nn.Module, dims: Sequence[int]) -> None:
        super().__init__()
        if len(dims) < 2 or min(dims) < 1:
            raise ValueError(f"dims: {list(dims)}; it must hold a positive width for each of at least two modalities")
        if isinstance(head, nn.Linear) and head.in_features != sum(dims):
            raise ValueError(f"dims: {list(dims)} add up to {sum(dims)}; head takes {head.in_features} features")
        self.head = head
        self.dims = tuple(dims)
        own = torch.eye(len(dims)).repeat_interleave(torch.tensor(self.dims), dim=1)
        self.register_buffer("masks", torch.cat([torch.ones_like(own[:1]), own]), persistent=False)

    def forward(
        self, features: Sequence[Float[Tensor, "batch _"]]
    ) -> tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch modalities classes"]]:
        """The logits of all modalities together, and of each alone.

        Args:
            features: one tensor per modality, shape `(batch, dims[m])`.

        Raises:
            ValueError: if number or shapes of the tensors do not fit.
        """
        shapes = [tuple(part.shape) for part in features]
        if len({shape[:1] for shape in shapes}) != 1 or [shape[1:] for shape in shapes] != [(d,) for d in self.dims]:
            raise ValueError(f"features: shapes {shapes}; they must be (batch, width) with widths {list(self.dims)}")
        together = torch.cat(list(features), dim=1)
        logits: Tensor = self.head(together[:, None] * self.masks.to(together.dtype))
        return logits[:, 0], logits[:, 1:]


class AsymmetricLearning(nn.Module):
    """The loss with its unimodal terms, and the modulation of the encoders' gradients.

    Call `set_epoch(epoch)` before each epoch; in the first `warmup_epochs` there is no modulation and unimodal losses
    have the weight 1. The coefficients are those of the very batch whose gradient they scale; the authors' code takes
    the batch before. To have that, for a head that is too costly to run twice, keep `coefficients(unimodal_logits)`
    from step to step and apply `scale_gradient(part, 1 + k)` yourself.

    Args:
        temperature: sharpness of the coefficients, T: 8 for CREMA-D, 4 for Kinetics-Sounds and AVE.
        gamma: weight of the unimodal losses: 4 for CREMA-D, 3 for Kinetics-Sounds, 5 for AVE.
        clamp: lower bound of a modality's share of the entropy, in [0, 0.5); see `asymmetric_coefficients`.
        warmup_epochs: how many epochs come before the modulation.
        reduction: "none", "mean" or "sum" over the batch.

    Raises:
        ValueError: if an option is out of range or unknown.

    Example:
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
        for name, value in (("temperature", temperature), ("gamma", gamma), ("warmup_epochs", warmup_epochs)):
            if not value >= 0:
                raise ValueError(f"{name}: {value}; it must not be negative")
        if not 0 <= clamp < 0.5:
            raise ValueError(f"clamp: {clamp}; it must lie in [0, 0.5)")
        check_reduction(reduction)
        self.temperature = temperature
        self.gamma = gamma
        self.clamp = clamp
        self.warmup_epochs = warmup_epochs
        self.reduction: Reduction = reduction
        self.epoch: int | None = None if warmup_epochs else 0

    def set_epoch(self, epoch: int) -> None:
        """Says which 0-based epoch it is.

        Raises:
            ValueError: if `epoch` is negative.
        """
        if epoch < 0:
            raise ValueError(f"epoch: {epoch}; it must not be negative")
        self.epoch = epoch

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
            ValueError: if shapes do not fit or the batch is empty.
        """
        logits = checked_logits(logits, targets)
        alone = _checked_unimodal(unimodal_logits)
        if (alone.shape[0], alone.shape[2]) != logits.shape:
            raise ValueError(
                f"unimodal_logits: shape {tuple(alone.shape)}; it must be ({logits.shape[0]}, modalities, "
                f"{logits.shape[1]}) beside the logits"
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
    if not logits.is_floating_point():
        raise TypeError(f"unimodal_logits: dtype {logits.dtype}; it must be a floating-point type")
    if logits.ndim != 3 or logits.shape[1] < 2:
        raise ValueError(
            f"unimodal_logits: shape {tuple(logits.shape)}; it must be (batch, modalities, classes), with two "
            "modalities or more"
        )
    if len(logits) == 0:
        raise ValueError("unimodal_logits: the batch is empty; a loss needs at least one sample")
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
