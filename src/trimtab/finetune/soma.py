r"""Singular value decomposed Minor components Adaptation (SoMA).

What a pre-trained network knows in general lies in the large singular directions of its weights. SoMA trains only the
smallest ones, leaves early blocks alone, and anneals the weight decay, so that a fine-tuned network still works on
domains it was not tuned on. Merged, it costs nothing at inference.

$$
W = U \Sigma V^\top, \qquad
W_{\text{eff}} = \underbrace{W - \tfrac{\alpha}{r} B_0 A_0}_{W_\text{res},\ \text{frozen}} + \tfrac{\alpha}{r} B A,
\qquad
B_0 = U_{-r} \sqrt{\tfrac{r}{\alpha} \Sigma_{-r}}, \quad A_0 = \sqrt{\tfrac{r}{\alpha} \Sigma_{-r}}\, V_{-r}^\top
$$
$$
\lambda_t = \lambda_{\min} + \tfrac12 (\lambda_0 - \lambda_{\min}) \bigl(1 + \cos(\pi t / T)\bigr)
$$

Seokju Yun, Seunghye Chae, Dongheon Lee and Youngmin Ro, "SoMA: Singular Value Decomposed Minor Components Adaptation
for Domain Generalizable Representation Learning", CVPR 2025, arXiv 2412.04077. The decay acts on A and B, and so draws
the weight towards the one without its minor components.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.finetune.adapter import AdapterConfig, LoRADelta
from trimtab.finetune.applied import applied
from trimtab.finetune.svd import svd_factors
from trimtab.ops.arguments import integer, non_negative, positive, real_problem
from trimtab.ops.states import fits


class SoMAWeight(nn.Module):
    """Parametrization of a weight by its trained minor components and its frozen rest.

    The initial factors are kept as buffers and the pre-trained weight is left as it is: the residual follows from
    both, so the base is restored exactly and an adapter's state dict is complete. A direction whose singular value is
    zero starts with both factors at zero and would never train; a warning says so.

    Args:
        weight: the pre-trained weight; kernels count as (out, in * height * width) matrices.
        r: number of minor components, 1 to min(out, in).
        alpha: the adapter is scaled by alpha / r; by 1 without it.

    Attributes:
        A: right factor (r, in), trained.
        B: left factor (out, r), trained.

    Raises:
        TypeError: `weight` is not floating-point.
        ValueError: `weight` is not a finite matrix, `r` is out of range, or `alpha` is not positive.

    Example:
        >>> weight = torch.tensor([[9.0, 0.0], [0.0, 4.0]])
        >>> soma = SoMAWeight(weight, r=1)
        >>> soma.A.data, soma.residual(weight)
        (tensor([[0., 2.]]), tensor([[9., 0.],
                [0., 0.]]))
    """

    A0: Tensor
    B0: Tensor

    def __init__(self, weight: Float[Tensor, "out ..."], r: int, alpha: float | None = None) -> None:
        super().__init__()
        if alpha is not None:
            positive("alpha", alpha)
        U, S, Vh = svd_factors(weight, r, "minor")
        self.scale = 1.0 if alpha is None else alpha / r
        dead = int((torch.finfo(S.dtype).eps * max(weight.shape) * weight.detach().to(S.dtype).norm() >= S).sum())
        if dead:
            warnings.warn(
                f"{dead} of the {r} smallest singular values are zero: these components start at zero and never train; "
                "take a larger r, or leave this weight out",
                stacklevel=2,
            )
        root = (S / self.scale).sqrt()
        A, B = root[:, None] * Vh, U * root
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.register_buffer("A0", A.clone())
        self.register_buffer("B0", B.clone())

    def forward(self, weight: Float[Tensor, "out ..."]) -> Float[Tensor, "out ..."]:
        """The effective weight, in the type of the pre-trained one."""
        # autocast would round the small learned change away before it is added
        with torch.autocast(weight.device.type, enabled=False):
            matrix = torch.addmm(self.residual(weight), self.B, self.A, alpha=self.scale)
        return matrix.to(weight.dtype).view_as(weight)

    def residual(self, weight: Float[Tensor, "out ..."]) -> Float[Tensor, "out in"]:
        """W_res: the pre-trained weight without its minor components."""
        if problem := real_problem(weight=weight):
            raise TypeError(problem)
        return torch.addmm(weight.flatten(1).to(self.A0.dtype), self.B0, self.A0, alpha=-self.scale)

    def to_lora_delta(self) -> LoRADelta:
        """The change from the pre-trained weight as factors of rank 2 r, which gradients reach.

        They are B - B0 with A, and B0 with A - A0: nothing large cancels in their product.
        """
        B = torch.cat([self.B - self.B0, self.B0], dim=1) * self.scale
        return LoRADelta(torch.cat([self.A, self.A - self.A0]), B)

    def extra_repr(self) -> str:
        return f"r={len(self.A)}, scale={self.scale:g}"


@dataclass(frozen=True, kw_only=True)
class SoMAConfig(AdapterConfig):
    """Where SoMA goes, and its rank; for `apply_adapter`.

    The authors adapt the attention and MLP layers of all but the early blocks (`modules_from_block`) and train the
    biases of these layers as well (`adapted_biases`).

    Attributes:
        r: number of trained minor components of each weight.
        alpha: the adapter is scaled by alpha / r; by 1 without it.

    Raises:
        ValueError: `r` or `alpha` is out of range.

    Example:
        >>> from trimtab.finetune import apply_adapter
        >>> model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
        >>> adapters = apply_adapter(model, SoMAConfig(r=2, target_modules=modules_from_block(model, ["0", "2"], 1)))
        >>> biases = adapted_biases(model, train=True)
        >>> groups = [{"params": adapters.trainable_parameters()}, {"params": biases, "weight_decay": 0.0}]
        >>> optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.05)
        >>> decay = WeightDecayAnnealing(optimizer, T_max=40_000)
        >>> model(torch.ones(4, 8)).square().mean().backward()
        >>> optimizer.step()
        >>> decay.step()
        >>> adapters.num_trainable(), len(biases)
        (24, 1)
    """

    r: int = 16
    alpha: float | None = None

    def __post_init__(self) -> None:
        integer("r", self.r)
        if self.alpha is not None:
            positive("alpha", self.alpha)

    def build(self, weight: Float[Tensor, "out ..."]) -> SoMAWeight:
        if problem := real_problem(weight=weight):
            raise TypeError(problem)
        return SoMAWeight(weight, self.r, self.alpha)


def modules_from_block(model: nn.Module, target_modules: Sequence[str], start_block: int) -> list[str]:
    """Full names of the target modules in the later blocks, a block's number being the first one in its name.

    Args:
        model: any module.
        target_modules: module names or their endings.
        start_block: the first block that is adapted (the authors: 8 of the 24 of a DINOv2-L).

    Raises:
        ValueError: no module is left, or `start_block` is negative.

    Example:
        >>> layer = lambda: nn.ModuleDict({"fc": nn.Linear(2, 2)})
        >>> modules_from_block(nn.ModuleDict({"blocks": nn.ModuleList(layer() for _ in range(3))}), ["fc"], 1)
        ['blocks.1.fc', 'blocks.2.fc']
    """
    integer("start_block", start_block, 0)
    found = []
    for name, _ in model.named_modules():
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
        late = number is not None and int(number.group(1)) >= start_block
        if late and any(name == target or name.endswith(f".{target}") for target in target_modules):
            found.append(name)
    if not found:
        raise ValueError(
            f"target_modules must be in blocks from {start_block} on, got {list(target_modules)}, of which none is"
        )
    return found


def adapted_biases(model: nn.Module, train: bool = False) -> list[nn.Parameter]:
    """The biases of the layers that have a SoMA adapter, in order.

    Args:
        model: a model with SoMA adapters, not merged.
        train: have them require gradients. They are no part of the adapters' state dict.

    Raises:
        ValueError: the model has no SoMA adapter.
    """
    found = [
        getattr(place.module, place.parameter.removesuffix("weight") + "bias", None)
        for place, _ in applied(model, SoMAWeight)
    ]
    biases = [bias for bias in found if isinstance(bias, nn.Parameter)]
    for bias in biases if train else ():
        bias.requires_grad_(True)
    return biases


def annealed_weight_decay(step: int, start: float, T_max: int, eta_min: float = 1e-5) -> float:
    """The weight decay after a number of steps, on a half cosine from `start` down to `eta_min`, and there for good.

    Example:
        >>> [round(annealed_weight_decay(step, 0.05, 100), 6) for step in (0, 50, 100)]
        [0.05, 0.025005, 1e-05]
    """
    if not 0 <= step < float("inf"):
        raise ValueError(f"step must be finite and not negative, got {step!r}")
    if not 0 < T_max < float("inf"):
        raise ValueError(f"T_max must be finite and positive, got {T_max!r}")
    if not 0 <= start < float("inf"):
        raise ValueError(f"start must be finite and not negative, got {start!r}")
    if not 0 <= eta_min < float("inf"):
        raise ValueError(f"eta_min must be finite and not negative, got {eta_min!r}")
    return eta_min + (float(start) - eta_min) * (1 + math.cos(math.pi * min(step, T_max) / T_max)) / 2


class WeightDecayAnnealing:
    """Cosine annealing of an optimizer's weight decay, used as a learning-rate scheduler is.

    Groups without weight decay (norms, biases) stay without.

    Args:
        optimizer: whose groups have a `weight_decay`.
        T_max: number of steps to the smallest decay.
        eta_min: the smallest decay.

    Raises:
        TypeError: `optimizer` has no groups with a weight decay.
        ValueError: `T_max` or `eta_min` is out of range, or a group's decay is below `eta_min`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, T_max: int, eta_min: float = 1e-5) -> None:
        self.T_max, self.eta_min = integer("T_max", T_max), non_negative("eta_min", eta_min)
        groups = getattr(optimizer, "param_groups", None)
        if groups is None or any("weight_decay" not in group for group in groups):
            raise TypeError(f"optimizer must be one with weight_decay in its groups, got {type(optimizer).__name__}")
        self.starts = [float(group["weight_decay"]) for group in groups]
        if low := [start for start in self.starts if 0 < start < self.eta_min]:
            raise ValueError(f"eta_min must be at most the weight decay of each group, got {eta_min} and {low[0]}")
        self.optimizer, self.steps = optimizer, 0

    def step(self) -> None:
        """One step on, after the optimizer's.

        Raises:
            ValueError: the optimizer has got another group since.
        """
        if len(self.optimizer.param_groups) != len(self.starts):
            raise ValueError(
                f"optimizer must have {len(self.starts)} groups as at the start, got {len(self.optimizer.param_groups)}"
            )
        self.steps += 1
        self._write()

    def get_last_weight_decay(self) -> list[float]:
        """The decay of each group now."""
        return [group["weight_decay"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The starts and the steps taken."""
        return {"steps": self.steps, "starts": list(self.starts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken.

        Raises:
            ValueError: it is of an optimizer with another number of groups, or no such state.
        """
        if not fits(state, self.state_dict()) or len(state["starts"]) != len(self.starts):
            raise ValueError(f"state must have steps and {len(self.starts)} starts, got {state}")
        steps, starts = (
            integer("steps", state["steps"], 0),
            [non_negative("starts", start) for start in state["starts"]],
        )
        self.steps, self.starts = steps, starts
        self._write()

    def _write(self) -> None:
        for group, start in zip(self.optimizer.param_groups, self.starts, strict=True):
            if start > 0:
                group["weight_decay"] = annealed_weight_decay(self.steps, start, self.T_max, self.eta_min)
