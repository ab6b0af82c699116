"""The two experts as one network, and sampling with it."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.diffusion.dcm.objectives import Velocity, phase_jump
from trimtab.diffusion.denoiser import StepCallback, after_step
from trimtab.ops.arguments import in_range, integer, positive


class LoRALinear(nn.Module):
    """A frozen linear layer with a low-rank addition, W x + b + (alpha / r) B A x; B is zero before training.

    Args:
        base: the layer; it is used, not copied.
        rank: r.
        alpha: scale of the addition; None is the rank.

    Raises:
        TypeError: `base` is no linear layer.
        ValueError: `rank` or `alpha` is not positive.

    Example:
        >>> base, x = nn.Linear(4, 3), torch.randn(2, 4)
        >>> torch.equal(LoRALinear(base, rank=2)(x), base(x))
        True
    """

    def __init__(self, base: nn.Linear, rank: int = 8, alpha: float | None = None) -> None:
        super().__init__()
        if not isinstance(base, nn.Linear):
            raise TypeError(f"base must be a linear layer, got {type(base).__name__}")
        self.scale = 1.0 if alpha is None else positive("alpha", alpha) / integer("rank", rank)
        self.base = base
        self.A = nn.Parameter(torch.empty(integer("rank", rank), base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        low = nn.functional.linear(nn.functional.linear(x, self.A), self.B)
        out: Tensor = self.base(x) + self.scale * low
        return out


class DualExpert(nn.Module):
    """A semantic expert above a noise level, and its adapted form below and at it, called `(x, t, cond)`.

    The semantic expert is frozen, and its weights are shared: the detail expert adds low-rank layers and copies of a
    few modules, and it is those that train. Before that, both say the same.

    Args:
        semantic: the trained expert for high noise, called `semantic(x, t, cond)`.
        split: the level up to which, itself included, samples go to the detail expert.
        lora: regular expressions for names of linear layers to adapt; in the paper those of attention.
        own: names of modules that the detail expert has for itself, such as the time embedding and the output layers.
        rank: of the adapters.

    Raises:
        TypeError: `semantic` is no module.
        ValueError: `split` is not between 0 and 1, an expression meets no linear layer, or a name no module.

    Example:
        >>> from trimtab.nets import DenoisingMLP
        >>> net = DenoisingMLP(6, hidden=16)
        >>> model = DualExpert(net, 0.9, lora=[r"blocks.*(first|second)"], own=["noise_level", "outward"], rank=2)
        >>> x, t = torch.randn(3, 6), torch.tensor([0.2, 0.9, 0.99])
        >>> torch.allclose(model(x, t), net(x, t), atol=1e-6)
        True
    """

    def __init__(
        self, semantic: nn.Module, split: float, lora: Sequence[str], own: Sequence[str] = (), rank: int = 8
    ) -> None:
        super().__init__()
        if not isinstance(semantic, nn.Module):
            raise TypeError(f"semantic must be a torch.nn.Module, got {type(semantic).__name__}")
        self.split = in_range("split", split, 0, 1, "neither")
        names = dict(semantic.named_modules())
        adapted = [n for n, m in names.items() if isinstance(m, nn.Linear) and any(re.fullmatch(p, n) for p in lora)]
        idle = [p for p in lora if not any(re.fullmatch(p, n) for n in adapted)]
        if idle or not lora:
            raise ValueError(f"lora must be regular expressions for linear layers, got {idle or 'none'}")
        if missing := [name for name in own if name not in names or not name]:
            raise ValueError(f"own must be names of modules, got {missing}")
        integer("rank", rank)
        self.semantic = semantic.requires_grad_(False)
        # Parameters and buffers are shared, structure is not.
        shared = {id(held): held for held in (*semantic.parameters(), *semantic.buffers())}
        self.detail = copy.deepcopy(semantic, dict(shared))
        for name in own:
            _put(self.detail, name, copy.deepcopy(names[name]).requires_grad_(True))
        for name in adapted:
            if not any(name == other or name.startswith(f"{other}.") for other in own):
                _put(self.detail, name, LoRALinear(self.detail.get_submodule(name), rank))  # type: ignore[arg-type]

    def forward(self, x: Float[Tensor, "batch ..."], t: Float[Tensor, " batch"], cond: Any = None) -> Tensor:
        """The velocity, by the expert of each sample's noise level; one evaluation a sample."""
        # Both as float32: a level that was rounded on its way to the network is still the split.
        low = t.float() <= torch.tensor(self.split, dtype=torch.float32, device=t.device)
        if low.all() or not low.any():
            out: Tensor = (self.detail if low.any() else self.semantic)(x, t, cond)
            return out
        parts = [
            (rows, expert(x[rows], t[rows], cond[rows] if isinstance(cond, Tensor) else cond))
            for expert, rows in ((self.detail, low), (self.semantic, ~low))
        ]
        found = torch.empty_like(x, dtype=parts[0][1].dtype)  # which under autocast is not that of x
        for rows, value in parts:
            found[rows] = value
        return found

    def detail_parameters(self) -> Iterator[nn.Parameter]:
        """What the detail expert has for itself, which is what trains."""
        return (p for p in self.detail.parameters() if p.requires_grad)

    def detail_share(self) -> float:
        """The size of these parameters, as a share of the semantic expert's."""
        return sum(p.numel() for p in self.detail_parameters()) / sum(p.numel() for p in self.semantic.parameters())


@torch.no_grad()
def flow_sample(
    model: Velocity,
    x: Float[Tensor, "batch ..."],
    levels: Float[Tensor, " steps+1"],
    cond: Any = None,
    *,
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch ..."]:
    """Sample by Euler steps along the velocity, from noise at the last of rising levels down to the first.

    Args:
        model: a flow model, an expert or both.
        x: standard normal noise.
        levels: rising, such as `shifted_levels(4)`; one evaluation a step.
        cond: the condition.
        callback: called after every step as `callback(step, level, x)`; a tensor that it returns replaces x.

    Raises:
        TypeError: `model` cannot be called, `x` is no floating-point tensor, or `levels` are complex.
        ValueError: `levels` do not rise from at least 0 to at most 1, or `x` holds no samples.

    Example:
        >>> flow_sample(lambda x, t, cond: x, torch.ones(1, 2), torch.tensor([0.0, 0.5, 1.0]))
        tensor([[0.2500, 0.2500]])
    """
    if not callable(model):
        raise TypeError(f"model must be callable as model(x, t, cond), got {type(model).__name__}")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    if x.ndim < 2 or len(x) == 0:
        raise ValueError(f"x must have shape (batch, ...) with at least one sample, got {tuple(x.shape)}")
    if torch.as_tensor(levels).is_complex():
        raise TypeError(f"levels must be real, got {torch.as_tensor(levels).dtype}")
    levels = torch.as_tensor(levels).detach().to("cpu", torch.float64)
    if (
        levels.ndim != 1
        or len(levels) < 2
        or not bool((levels.diff() > 0).all() & (levels[0] >= 0) & (levels[-1] <= 1))
    ):
        raise ValueError("levels must rise from at least 0 to at most 1, two of them or more, got others")
    falling = levels.flip(0).tolist()
    for step, (level, below) in enumerate(itertools.pairwise(falling)):
        t = torch.full((len(x),), level, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        x = after_step(callback, step, below, phase_jump(x, model(x, t, cond), t, below))
    return x


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
