r"""Hard patches mining (HPM): a masked autoencoder that learns where reconstruction is hard, and hides those patches.

For pre-training any model that reconstructs hidden patches. A second output for each patch learns to rank the patches
of an image by their reconstruction loss; an averaged copy of the model ranks the patches of the whole image, and the
mask takes more and more of the hardest, the rest at random.

$$
\mathcal{L} = \frac1K \sum_{i \in \text{hidden}} \ell_i
- \frac{1}{|P|} \sum_{(i, j) \in P} \log \sigma(\hat\ell_j - \hat\ell_i), \qquad
P = \{(i, j) \text{ hidden in one image}: \ell_j > \ell_i\}
$$

with the losses $\ell$ as constants in the second term. Of the $K$ hidden patches of epoch $e$ (from 0) of $E$, the
share $\beta\,(e+1)/E$ is the hardest ones.

The authors' code adds 1e-6 inside the logarithm; here it is exact.

Reference: Haochen Wang, Junsong Fan, Yuxi Wang, Kaiyou Song, Tiancai Wang, Xiangyu Zhang and Zhaoxiang Zhang,
"Bootstrap Masked Visual Modeling via Hard Patches Mining", CVPR 2023, arXiv 2312.13714.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from trimtab.ops.arguments import (
    floating_tensor,
    in_range,
    integer,
    looked_at,
    non_negative,
    one_of,
    real_problem,
    same_shape,
)
from trimtab.ops.averaging import Teacher
from trimtab.ops.states import fits
from trimtab.ops.units import power_of_two_unit

Objective = Literal["relative", "absolute"]


class MaskedModel(Protocol):
    """What HPM trains: a module that reconstructs patches and predicts how badly each will turn out."""

    def __call__(
        self, x: Float[Tensor, "batch channels height width"], mask: Bool[Tensor, "batch patches"]
    ) -> tuple[Float[Tensor, "batch patches pixels"], Float[Tensor, "batch patches"]]:
        """Patches as `patchify` has them, and a number for each that ranks their losses, of images whose patches are
        hidden where `mask` is true."""


def patchify(x: Float[Tensor, "batch channels height width"], patch: int) -> Float[Tensor, "batch patches pixels"]:
    """Images as rows of square patches.

    Args:
        x: images.
        patch: side of a patch in pixels, a divisor of both sides.

    Raises:
        TypeError: `x` is not floating point.
        ValueError: the patch does not divide the image's sides, or `x` is not a batch of images.

    Example:
        >>> patchify(torch.arange(8.0).view(1, 1, 2, 4), 2)
        tensor([[[0., 1., 4., 5.],
                 [2., 3., 6., 7.]]])
    """
    integer("patch", patch)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {type(x).__name__}")
    if x.ndim != 4:
        raise ValueError(f"x must be (batch, channels, height, width), got shape {tuple(x.shape)}")
    if x.shape[2] % patch or x.shape[3] % patch:
        raise ValueError(f"patch must divide the image's sides {x.shape[2]} and {x.shape[3]}, got {patch}")
    return F.unfold(x, patch, stride=patch).mT


@torch.no_grad()
def hard_patch_mask(
    predicted: Float[Tensor, "batch patches"],
    mask_ratio: float = 0.75,
    hard: float = 0.5,
    *,
    noise: Float[Tensor, "batch patches"] | None = None,
    generator: torch.Generator | None = None,
) -> Bool[Tensor, "batch patches"]:
    """A mask that hides the patches of the largest predicted loss, and others at random.

    Args:
        predicted: losses, of which only the order counts.
        mask_ratio: share of the patches that is hidden, in (0, 1); what is seen is rounded down.
        hard: share of the hidden ones that are the hardest, in [0, 1], rounded down.
        noise: a number in [0, 1) for each patch, of which the largest are hidden beside the hardest; drawn by default.
        generator: decides what is drawn.

    Returns:
        True where a patch is hidden, as often in every row.

    Raises:
        TypeError: `predicted` is no floating-point tensor.
        ValueError: shapes do not fit, or a share is out of range.

    Example:
        >>> predicted = torch.tensor([[0.1, 0.9, 0.5, 0.2]])
        >>> hard_patch_mask(predicted, 0.5, 0.5, noise=torch.tensor([[0.9, 0.8, 0.1, 0.2]]))
        tensor([[ True,  True, False, False]])
    """
    if problem := real_problem(noise=noise):
        raise TypeError(problem)
    in_range("mask_ratio", mask_ratio, 0, 1, "neither")
    in_range("hard", hard, 0, 1)
    predicted = _rows("predicted", predicted)
    patches = predicted.shape[1]
    hidden = patches - _whole(patches * (1 - mask_ratio))
    if noise is None:
        at = predicted.device if generator is None else generator.device
        noise = torch.rand(predicted.shape, generator=generator, device=at)
    same_shape("noise", noise, "predicted", predicted)
    guided = predicted.argsort(dim=1, descending=True, stable=True)[:, : _whole(hard * hidden)]
    keys = noise.to(predicted).scatter(1, guided, 2.0)  # above all that is drawn
    chosen = keys.argsort(dim=1, descending=True, stable=True)[:, :hidden]
    return torch.zeros_like(predicted, dtype=torch.bool).scatter_(1, chosen, True)


def relative_loss_prediction(
    predicted: Float[Tensor, "batch patches"], target: Float[Tensor, "batch patches"]
) -> Tensor:
    """How badly predictions rank the losses of an image's patches: cross-entropy over all pairs that differ.

    Args:
        predicted: a number for each patch.
        target: the losses, constants.

    Returns:
        The mean over the pairs of all images; log 2 where nothing is told apart, zero where no two losses differ.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: shapes do not fit, or there is no patch.

    Example:
        >>> round(relative_loss_prediction(torch.zeros(1, 3), torch.tensor([[0.1, 0.3, 0.2]])).item(), 4)
        0.6931
    """
    predicted, target = _rows("predicted", predicted), _rows("target", target).detach()
    same_shape("target", target, "predicted", predicted)
    harder = target[:, None] > target[:, :, None]  # [b, i, j]: j is harder than i
    cost = F.softplus(predicted[:, :, None] - predicted[:, None])
    return torch.where(harder, cost, 0).sum() / harder.sum().clamp(min=1)


def absolute_loss_prediction(
    predicted: Float[Tensor, "batch patches"], target: Float[Tensor, "batch patches"]
) -> Tensor:
    """The authors' alternative: squared error against each image's standardised losses; arguments as in
    `relative_loss_prediction`. The variance is the mean of squares over all patches, where theirs divides by one less.

    Example:
        >>> absolute_loss_prediction(torch.tensor([[-1.0, 1.0]]), torch.tensor([[3.0, 7.0]])) < 1e-6
        tensor(True)
    """
    predicted, target = _rows("predicted", predicted), _rows("target", target).detach()
    same_shape("target", target, "predicted", predicted)
    tiny = torch.finfo(target.dtype).tiny
    target = target / power_of_two_unit(target)
    mean, variance = target.mean(1, keepdim=True), target.var(1, unbiased=False, keepdim=True)
    # Relative to the mean, so that the unit of the losses does not count; where all are the same nothing is divided.
    return F.mse_loss(predicted, (target - mean) / (variance + 1e-6 * mean.square() + tiny).sqrt())


class HPM(nn.Module):
    """Masked image modelling whose masks come from predicted losses; `loss(x)` for the user's loop.

    Call `set_epoch(epoch)` before each epoch and `update()` after each step of the optimizer. The model's parameters
    are those to train; the teacher's take no gradient. With `max_hard=0` masks are random, and with
    `prediction_weight=0` too it is a plain masked autoencoder.

    Args:
        model: a `MaskedModel`.
        patch: side of the patches in pixels.
        epochs: length of the training.
        mask_ratio: share of the patches that is hidden, in (0, 1).
        max_hard: share of the hidden ones that are the hardest in the last epoch, in [0, 1].
        prediction_weight: of the second term.
        objective: "relative" as above, or "absolute".
        normalize: standardise the pixels of each patch that is to be reconstructed, as masked autoencoders may.
        decay: of the teacher in the first epoch and after `decay_epochs`, between which it changes linearly.
        decay_epochs: see `decay`.

    Attributes:
        model, teacher: the model and its average.
        epoch: the present one.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> class Mean(nn.Module):  # fills the image with a grey that it learns
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.grey = nn.Parameter(torch.zeros(()))
        ...     def forward(self, x, mask):
        ...         return self.grey.expand(*mask.shape, 4), self.grey.expand(mask.shape)
        >>> hpm = HPM(Mean(), patch=2, epochs=10)
        >>> hpm.set_epoch(0)
        >>> found = hpm.loss(torch.ones(1, 1, 4, 4))
        >>> found["reconstruction"], round(found["prediction"].item(), 4)
        (tensor(1., grad_fn=<MeanBackward0>), 0.0)
    """

    def __init__(
        self,
        model: nn.Module,
        patch: int,
        epochs: int,
        *,
        mask_ratio: float = 0.75,
        max_hard: float = 0.5,
        prediction_weight: float = 1.0,
        objective: Objective = "relative",
        normalize: bool = False,
        decay: tuple[float, float] = (0.999, 0.9999),
        decay_epochs: int = 100,
    ) -> None:
        super().__init__()
        self.patch = integer("patch", patch)
        self.epochs = integer("epochs", epochs)
        self.mask_ratio = in_range("mask_ratio", mask_ratio, 0, 1, "neither")
        self.max_hard = in_range("max_hard", max_hard, 0, 1)
        self.prediction_weight = non_negative("prediction_weight", prediction_weight)
        self.objective: Objective = one_of("objective", objective, ("relative", "absolute"))
        self.normalize = normalize
        self.decay = (in_range("decay", decay[0], 0, 1), in_range("decay", decay[1], 0, 1))
        self.decay_epochs = integer("decay_epochs", decay_epochs)
        self.model = model
        self.teacher = Teacher(model, self.decay[0])
        self.epoch = 0

    @property
    def hard(self) -> float:
        """The share of hidden patches that are the hardest in the present epoch."""
        return self.max_hard * (self.epoch + 1) / self.epochs

    def set_epoch(self, epoch: int) -> None:
        """Sets the 0-based epoch.

        Raises:
            ValueError: if it is outside [0, epochs).
        """
        self.epoch = integer("epoch", epoch, 0, self.epochs - 1)

    def patch_losses(
        self, x: Float[Tensor, "batch channels height width"], patches: Float[Tensor, "batch patches pixels"]
    ) -> Float[Tensor, "batch patches"]:
        """Mean squared error of each reconstructed patch.

        Raises:
            ValueError: `patches` are not those of `x`.
        """
        target = patchify(x, self.patch)
        same_shape("patches", patches, "the patches of x", target)
        if self.normalize:
            target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()
        return floating_tensor("patches", patches).sub(target).square().mean(2)

    def mask(
        self, x: Float[Tensor, "batch channels height width"], *, generator: torch.Generator | None = None
    ) -> Bool[Tensor, "batch patches"]:
        """The mask of the present epoch, from what the teacher predicts of whole images.

        Raises:
            ValueError: `x` is not a batch of images of whole patches, or it is empty.
        """
        patches = patchify(x, self.patch)
        if len(x) == 0:
            raise ValueError("x must have at least one image, got none")
        nothing = torch.zeros(patches.shape[:2], dtype=torch.bool, device=x.device)
        predicted = self.teacher(x, nothing)[1] if self.hard else torch.zeros_like(nothing, dtype=torch.float32)
        return hard_patch_mask(predicted, self.mask_ratio, self.hard, generator=generator)

    def loss(
        self,
        x: Float[Tensor, "batch channels height width"],
        *,
        mask: Bool[Tensor, "batch patches"] | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """What a batch costs: "total", "reconstruction" and "prediction".

        Args:
            x: images.
            mask: true where a patch is hidden, as often in every row; by default `mask(x)`.
            generator: decides what is drawn.

        Raises:
            TypeError: `mask` is not boolean.
            ValueError: `x` is not a batch of images of whole patches, it is empty, shapes do not fit, or `mask` hides
                no patch, or not as many in every row.
        """
        if mask is None:
            mask = self.mask(x, generator=generator)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask must be boolean, got {getattr(mask, 'dtype', type(mask).__name__)}")
        wanted = patchify(x, self.patch).shape[:2]
        if mask.shape != wanted:
            raise ValueError(f"mask must be {tuple(wanted)}, got shape {tuple(mask.shape)}")
        if looked_at(mask) and len(mask) and not 0 < mask.sum(1).min() == mask.sum(1).max():
            raise ValueError("mask must hide as many patches in every row, at least one, got others")
        patches, predicted = cast(MaskedModel, self.model)(x, mask)
        losses = self.patch_losses(x, patches)
        same_shape("mask", mask, "the patches' losses", losses)
        hidden = [part[mask].view(len(x), -1) for part in (losses, predicted)]
        of = relative_loss_prediction if self.objective == "relative" else absolute_loss_prediction
        prediction = of(hidden[1], hidden[0].detach())
        reconstruction = hidden[0].mean()
        total = reconstruction + self.prediction_weight * prediction
        return {"total": total, "reconstruction": reconstruction, "prediction": prediction.detach()}

    def update(self) -> None:
        """Moves the teacher; call it after the optimizer's step."""
        share = min(1.0, self.epoch / self.decay_epochs)
        self.teacher.update(self.model, self.decay[0] + share * (self.decay[1] - self.decay[0]))

    def get_extra_state(self) -> dict[str, int]:
        return {"epoch": self.epoch}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.epoch = int(state["epoch"])

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As every module's, but a state that does not fit changes nothing.

        Raises:
            ValueError: the state is of another model, or of a longer training.
        """
        epoch = state_dict.get("_extra_state", {}).get("epoch", 0)
        if not 0 <= epoch < self.epochs:
            raise ValueError(f"state_dict must be of an epoch in [0, {self.epochs}), got {epoch}")
        if strict and not fits(state_dict, self.state_dict()):
            raise ValueError("state_dict must be of the same model, got other names or shapes")
        return super().load_state_dict(state_dict, strict, assign)


def _whole(number: float) -> int:
    """Rounded down, but for what rounding took: a tenth of 100 is 10, also where it is 9.999999999999998."""
    return int(number + 1e-9)


def _rows(name: str, value: Tensor) -> Tensor:
    value = floating_tensor(name, value)
    if value.ndim != 2 or 0 in value.shape:
        wanted = "(batch, patches) with at least one of each"
        raise ValueError(f"{name} must be {wanted}, got shape {tuple(value.shape)}")
    return value
