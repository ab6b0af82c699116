r"""Regularized mask tuning (R-AMT): keep every pre-trained weight as it is, and learn which ones to switch off.

Behind each frozen weight stands a trained real number; the weight is on while that number is above a threshold. Mask
gradients that would lead away from the pre-trained model's predictions are dropped at random, more often the stronger
the conflict. The result is one bit a weight, and costs nothing at inference.

$$
W_{\text{eff}} = \mathbb{1}[R > \alpha] \odot W, \qquad
\frac{\partial L}{\partial R} := \frac{\partial L}{\partial W_{\text{eff}}} \odot W
$$
$$
P = \tfrac12 \Bigl(1 + \operatorname{sign}(a)\, \frac{a + b}{|a| + |b|}\Bigr), \qquad
\text{grad} = \bigl(1 - l + l\, \mathbb{1}[P > u]\bigr)\, a, \qquad u \sim \mathcal{U}(0, 1)
$$

with a the gradient of the task's loss and b that of the divergence from the pre-trained model, which only decides what
is dropped.

Kecheng Zheng, Wei Wu, Ruili Feng, Kai Zhu, Jiawei Liu, Deli Zhao, Zheng-Jun Zha, Wei Chen and Yujun Shen, "Regularized
Mask Tuning: Uncovering Hidden Knowledge in Pre-trained Vision-Language Models", ICCV 2023, arXiv 2307.15049. The
reference loss is `ops.tempered_kl` from the pre-trained logits, whose gradient is the paper's cross-entropy's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from trimtab.finetune.adapter import AdapterConfig
from trimtab.finetune.applied import applied
from trimtab.ops.arguments import finite_tensor, in_range, number, same_shape, tensor_problem
from trimtab.ops.states import fits


class BinaryMask(nn.Module):
    """Parametrization of a weight by a mask of ones and zeros, from a trained real one.

    Backward, the step from the real mask to the binary one is taken for the identity (straight through).

    Args:
        weight: the pre-trained weight.
        init: where the real mask starts, the same for every entry.
        threshold: a weight is on while its real mask is above this.

    Attributes:
        R: the real mask, in the weight's shape, in at least float32.

    Raises:
        TypeError: `weight` is not floating-point.
        ValueError: `weight` has NaN or infinite entries, or `init` is not above `threshold`.

    Example:
        >>> mask = BinaryMask(torch.tensor([[1.0, 2.0]]))
        >>> with torch.no_grad():
        ...     mask.R[0, 0] = 0.0
        >>> mask(torch.tensor([[1.0, 2.0]])).data
        tensor([[0., 2.]])
    """

    def __init__(self, weight: Float[Tensor, "..."], init: float = 1e-2, threshold: float = 5e-3) -> None:
        super().__init__()
        weight = finite_tensor("weight", weight, floating=True).detach()
        _above(init, threshold)
        self.init, self.threshold = init, threshold
        self.R = nn.Parameter(torch.full_like(weight, init, dtype=torch.promote_types(weight.dtype, torch.float32)))

    def forward(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The effective weight."""
        # R minus itself is zero forward, and hands the gradient on backward.
        return weight * (self.binary().to(self.R.dtype) + (self.R - self.R.detach())).to(weight.dtype)

    def binary(self) -> Bool[Tensor, "..."]:
        """Which weights are on."""
        return self.R.detach() > self.threshold

    def extra_repr(self) -> str:
        return f"init={self.init:g}, threshold={self.threshold:g}"


@dataclass(frozen=True, kw_only=True)
class MaskTuningConfig(AdapterConfig):
    """Which weights are masked; for `apply_adapter`.

    The authors mask the attention layers and the patch embedding of the image encoder, and no biases; of these, the
    layers with the largest gradients (`rank_by_gradient`).

    Attributes:
        init: where the real masks start; with Adam a weight can be off after `(init - threshold) / lr` steps.
        threshold: a weight is on while its real mask is above this.

    Raises:
        ValueError: `init` is not above `threshold`.

    Example:
        >>> from trimtab.finetune import apply_adapter
        >>> model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
        >>> adapters = apply_adapter(model, MaskTuningConfig(target_modules=["0"]))
        >>> x = torch.ones(4, 8)
        >>> before = model(x).detach()
        >>> tuner = MaskTuner(model, torch.optim.Adam(adapters.trainable_parameters(), lr=1e-2))
        >>> logits = model(x)
        >>> loss = nn.functional.cross_entropy(logits, torch.zeros(4, dtype=torch.int64))
        >>> _ = tuner.step(loss, (logits - before).square().sum())
        >>> 0 <= sparsity(model) < 1
        True
    """

    init: float = 1e-2
    threshold: float = 5e-3

    def __post_init__(self) -> None:
        _above(self.init, self.threshold)

    def build(self, weight: Float[Tensor, "..."]) -> BinaryMask:
        return BinaryMask(weight, self.init, self.threshold)


def _above(init: float, threshold: float) -> None:
    if number("init", init) <= number("threshold", threshold):
        raise ValueError(f"init must be above the threshold {threshold:g}, for all weights to be on, got {init}")


def rank_by_gradient(
    model: nn.Module, weights: Sequence[str], losses: Iterable[Float[Tensor, ""]]
) -> list[tuple[str, float]]:
    """Which weights matter most for a task, by the mean absolute gradient of its losses: those to mask.

    The paper masks only the layers whose gradients are largest; which mean it takes is not known from its text here.

    Args:
        model: the pre-trained model, before masks are applied.
        weights: names of parameters, such as "layers.0.attention.in_proj_weight".
        losses: one for each batch, a generator will do.

    Returns:
        Names and mean absolute gradients, the largest first.

    Raises:
        ValueError: a name is not one of a parameter that requires a gradient, or there is no loss.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1, bias=False))
        >>> for p in model.parameters():
        ...     _ = nn.init.ones_(p)
        >>> rank_by_gradient(model, ["0.weight", "1.weight"], [model(torch.ones(1, 2)).sum()])
        [('1.weight', 3.0), ('0.weight', 1.0)]
    """
    held = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if unknown := [name for name in weights if name not in held]:
        raise ValueError(f"weights must be names of parameters that require a gradient, got {unknown}")
    sizes, count = [0.0] * len(weights), 0
    for loss in losses:
        slopes = torch.autograd.grad(loss, [held[name] for name in weights], allow_unused=True)
        sizes = [s + (0.0 if g is None else g.abs().mean().item()) for s, g in zip(sizes, slopes, strict=True)]
        count += 1
    if not count:
        raise ValueError("losses must be at least one, got none")
    means = [(name, size / count) for name, size in zip(weights, sizes, strict=True)]
    return sorted(means, key=lambda found: -found[1])


def keep_probability(a: Float[Tensor, "..."], b: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """P, by which an entry of the gradient `a` is kept beside the reference gradient `b`: 1 where they agree in sign.

    Example:
        >>> keep_probability(torch.tensor([1.0, 1.0, 1.0, 2.0]), torch.tensor([5.0, -1.0, -3.0, 0.0]))
        tensor([1.0000, 0.5000, 0.2500, 1.0000])
    """
    if problem := tensor_problem(a=a, b=b):
        raise TypeError(problem)
    same_shape("b", b, "a", a)
    if not a.is_floating_point():
        raise TypeError(f"a must be floating point, got {a.dtype}")
    smallest = torch.finfo(a.dtype).tiny
    return (1 + a.sign() * (a + b) / (a.abs() + b.abs()).clamp(min=smallest)) / 2


def gradient_dropout(
    a: Float[Tensor, "..."],
    b: Float[Tensor, "..."],
    lam: float = 1.0,
    *,
    uniform: Float[Tensor, "..."] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "..."]:
    """The gradient of the task, without what is dropped for its conflict with the reference.

    The mean over the draws is `(1 - lam + lam * keep_probability(a, b)) * a`.

    Args:
        a: gradient of the task's loss.
        b: gradient of the reference loss.
        lam: share of an entry that is dropped, from 0 (nothing ever is) to 1.
        uniform: numbers from [0, 1) in the gradient's shape; drawn without it.
        generator: for that draw, on the CPU.

    Raises:
        ValueError: shapes differ, or `lam` is out of range.

    Example:
        >>> a, b = torch.tensor([1.0, 1.0]), torch.tensor([1.0, -3.0])
        >>> gradient_dropout(a, b, uniform=torch.tensor([0.9, 0.9]))
        tensor([1., 0.])
    """
    if problem := tensor_problem(a=a, b=b, uniform=uniform):
        raise TypeError(problem)
    in_range("lam", lam, 0, 1)
    kept = keep_probability(a, b)
    if uniform is None:
        uniform = torch.rand(a.shape, generator=generator, dtype=kept.dtype).to(a.device)
    same_shape("uniform", uniform, "a", a)
    return (1 - lam + lam * (kept > uniform).to(a.dtype)) * a


def mask_norm(model: nn.Module) -> Float[Tensor, ""]:
    """The sum over masked weights of the length of the real mask; the authors add 1e-4 times it to the task's loss."""
    return torch.stack([mask.R.norm() for _, mask in applied(model, BinaryMask)]).sum()


def sparsity(model: nn.Module) -> float:
    """Share of the masked weights that are off.

    Raises:
        ValueError: the model has no mask.
    """
    found = [mask.binary() for _, mask in applied(model, BinaryMask)]
    return 1 - sum(int(m.sum()) for m in found) / sum(m.numel() for m in found)


class MaskTuner:
    """The step of mask tuning: two backward passes over one graph, and a step along what dropout leaves.

    What else the optimizer holds (a head, say) goes along the gradient of the task alone.

    Args:
        model: a model with masks, not merged.
        optimizer: of the masks' parameters, and perhaps others (the authors: Adam without weight decay).
        lam: see `gradient_dropout`.
        generator: draws what is dropped, on the CPU, and is saved in the state dict; a new one without it.

    Raises:
        ValueError: the model has no mask, or `lam` is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        lam: float = 1.0,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        self.lam = in_range("lam", lam, 0, 1)
        self.masks = [mask.R for _, mask in applied(model, BinaryMask)]
        self.optimizer = optimizer
        self.generator = torch.Generator() if generator is None else generator

    def step(self, loss_main: Float[Tensor, ""], loss_ref: Float[Tensor, ""] | None = None) -> dict[str, Tensor]:
        """One step.

        Args:
            loss_main: of the task.
            loss_ref: how far the predictions are from the pre-trained model's; nothing is dropped without it.

        Returns:
            `main` and `reference`, detached.

        Raises:
            ValueError: a loss is not a scalar with a gradient.
        """
        losses = {"main": loss_main} if loss_ref is None else {"main": loss_main, "reference": loss_ref}
        for name, loss in losses.items():
            if loss.numel() != 1 or not loss.requires_grad:
                raise ValueError(f"the {name} loss must be a scalar with a gradient, got shape {tuple(loss.shape)}")
        reference: tuple[Tensor | None, ...] = (None,) * len(self.masks)
        if loss_ref is not None:
            reference = torch.autograd.grad(loss_ref, self.masks, retain_graph=True, allow_unused=True)
        self.optimizer.zero_grad()
        loss_main.backward()
        for mask, b in zip(self.masks, reference, strict=True):
            if mask.grad is not None and b is not None:
                mask.grad = gradient_dropout(mask.grad, b, self.lam, generator=self.generator)
        self.optimizer.step()
        return {name: loss.detach() for name, loss in losses.items()}

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state and the generator's."""
        return {"optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken.

        Raises:
            ValueError: it is no such state, or of other parameters.
        """
        own = self.generator.get_state()
        if state.keys() != {"optimizer", "generator"} or not fits(state["generator"], own):
            raise ValueError(f"state must be what state_dict() gave, got {sorted(state)}")
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())


def packed_masks(model: nn.Module) -> dict[str, UInt8[Tensor, " bytes"]]:
    """What was learned, at one bit a weight, by weight name.

    Raises:
        ValueError: the model has no mask.
    """
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    packed = {}
    for place, mask in applied(model, BinaryMask):
        bits = mask.binary().flatten().to("cpu", torch.uint8)
        bits = torch.cat([bits, bits.new_zeros(-len(bits) % 8)]).view(-1, 8)
        packed[place.name] = (bits * powers).sum(1, dtype=torch.uint8)
    return packed


@torch.no_grad()
def load_packed_masks(model: nn.Module, packed: Mapping[str, UInt8[Tensor, " bytes"]]) -> None:
    """Switch the same weights off in a model with the same masks; the real masks are set to `init` and 0.

    Raises:
        TypeError: what is held is no vector of bytes.
        ValueError: the names or lengths are of other masks.
    """
    found = {place.name: mask for place, mask in applied(model, BinaryMask)}
    wanted = {name: math.ceil(mask.R.numel() / 8) for name, mask in found.items()}
    if (got := {name: len(bits) for name, bits in packed.items()}) != wanted:
        raise ValueError(f"packed must have these bytes by name: {wanted}, got {got}")
    for name, bits in packed.items():
        if not isinstance(bits, Tensor) or bits.dtype != torch.uint8 or bits.ndim != 1:
            kind = (bits.dtype, tuple(bits.shape)) if isinstance(bits, Tensor) else type(bits).__name__
            raise TypeError(f"packed must hold uint8 vectors, got {kind} for {name}")
    for name, mask in found.items():
        bits = packed[name].cpu()[:, None] >> torch.arange(8, dtype=torch.uint8) & 1
        on = bits.flatten()[: mask.R.numel()].view(mask.R.shape).bool().to(mask.R.device)
        mask.R.copy_(torch.where(on, mask.init, min(0.0, mask.threshold)))
