"""What a kind of adapter brings: its settings, and its change of a weight as LoRA factors where it has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Which weights are adapted, and by what: a subclass adds its settings and defines `build`.

    Attributes:
        target_modules: module names or their endings (`["q_proj", "v_proj"]`), or one regular expression that has
            to match the whole name, or "all-linear": every linear layer, Hugging Face's `Conv1D` among them, but not
            the output layer of a Hugging Face model, which is most often new and to be trained whole.
        parameters: which tensors of these modules are adapted, where a module has them.
    """

    target_modules: str | Sequence[str]
    parameters: Sequence[str] = ("weight", "in_proj_weight")

    def build(self, weight: Float[Tensor, "..."]) -> nn.Module:
        """The parametrization for one pre-trained weight: a module whose `forward(weight)` is the effective weight."""
        raise NotImplementedError(f"{type(self).__name__} must define build(weight)")


class LoRADelta(NamedTuple):
    """A change of weight as plain LoRA factors with scaling 1: `weight.flatten(1) + B @ A`."""

    A: Float[Tensor, "r in"]
    B: Float[Tensor, "out r"]
