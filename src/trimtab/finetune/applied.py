"""The adapters of one kind that a model has, found without the handle that put them there."""

from __future__ import annotations

from typing import NamedTuple, TypeVar, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

A = TypeVar("A", bound=nn.Module)


class Place(NamedTuple):
    """Where an adapter is: the weight's full name, its module, its name there, and the pre-trained weight itself."""

    name: str
    module: nn.Module
    parameter: str
    weight: Tensor


def applied(model: nn.Module, kind: type[A]) -> list[tuple[Place, A]]:
    """All adapters of a kind, in the model's order.

    Args:
        model: any module.
        kind: the parametrization's class.

    Raises:
        ValueError: there is none.

    Example:
        >>> from trimtab.finetune import SORSAConfig, SORSAWeight, apply_adapter
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> _ = apply_adapter(model, SORSAConfig(r=1, target_modules=["1"]))
        >>> [place.name for place, _ in applied(model, SORSAWeight)]
        ['1.weight']
    """
    found = []
    for name, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        for parameter, parts in cast(nn.ModuleDict, module.parametrizations).items():
            place = Place(f"{name}.{parameter}".removeprefix("."), module, parameter, cast(Tensor, parts.original))
            found += [(place, part) for part in cast(nn.ModuleList, parts) if isinstance(part, kind)]
    if not found:
        raise ValueError(f"model must have a {kind.__name__}, applied and not merged, got none")
    return found
