"""Linear layers computed from the low-rank parts of an adapted weight, where writing the weight out costs more.

A parametrization writes the effective weight out; the backward pass then takes the gradient of all of it, only to keep
what concerns the adapter. A linear layer whose weight changes by $BA$ needs neither:

$$
x W_{\\text{eff}}^\\top + b = (x W^\\top + b) + (x A^\\top) B^\\top
$$
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from trimtab.finetune.adapter.config import LoRADelta

# A weight of fewer entries is written out: the layer then gives the very bits that it gives when merged, and has little
# to win. On one core a training step of SORSA at rank 8 took, of the written-out one's time, 1.1 to 1.3 in a square
# layer of 64 or 128 features, 0.8 to 1.0 at 256, 0.5 to 0.9 at 512 and 0.1 to 0.6 at 1024 (batches of 16 to 1024).
_LARGE = 2**18


def compute_from_parts(module: nn.Module, parameter: str) -> None:
    """Have a linear layer add the products of the adapter just put on its weight, where that is less work.

    The forward pass is set on the class that the parametrization made for this layer: it leaves with that class, and
    copies of the layer have it too. `layer.weight` stays the effective weight.
    """
    if parameter != "weight" or cast(Any, type(module).__bases__[0]).forward is not nn.Linear.forward:
        return
    parts = cast(Any, module).parametrizations.weight
    if (factors := _factors(parts)) is not None and _is_less_work(parts.original, len(factors().A)):
        cast(Any, type(module)).forward = _forward


def _factors(parts: nn.ModuleList) -> Callable[[], LoRADelta] | None:
    """What gives the factors of the change, if the weight has one adapter, and that of low rank."""
    return getattr(parts[0], "to_lora_delta", None) if len(parts) == 1 else None


def _is_less_work(weight: Tensor, rank: int) -> bool:
    """Whether a step's products with the factors, three with each, are fewer than the gradient of the weight takes."""
    return weight.numel() >= _LARGE and 3 * rank * sum(weight.shape) < weight.numel()


def _forward(self: nn.Linear, input: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
    """In place of `nn.Linear.forward`, which it is where the adapter is gone or has company."""
    adapted = parametrize.is_parametrized(self, "weight")
    parts = cast(Any, self).parametrizations["weight"] if adapted else nn.ModuleList()
    if (factors := _factors(parts)) is None:
        return nn.Linear.forward(self, input)
    weight = cast(Tensor, parts.original)
    A, B = (factor.to(weight.dtype) for factor in factors())
    return F.linear(input, weight, self.bias) + F.linear(F.linear(input, A), B)
