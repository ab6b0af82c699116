"""Exchanging parts of a copy of a model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class Skip(nn.Module):
    """Gives back its first argument, whatever else it is given: what stands where a layer was removed.

    Example:
        >>> import torch
        >>> Skip()(torch.ones(2), torch.zeros(3))
        tensor([1., 1.])
    """

    def forward(self, x: Tensor, *others: Any, **options: Any) -> Tensor:
        return x


def with_replaced(model: M, changes: Mapping[str, nn.Module]) -> M:
    """A copy of the model in which other modules stand at these names, also where a module is used twice.

    Args:
        model: stays as it is.
        changes: name of a submodule -> what takes its place; it is taken as it is.

    Raises:
        ValueError: there is no submodule of this name, or it is the model itself.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> with_replaced(model, {"1": nn.Tanh()})[1], model[1]
        (Tanh(), ReLU())
    """
    known = dict(model.named_modules(remove_duplicate=False))
    for name in changes:
        if not name or name not in known:
            raise ValueError(f"name must be that of a submodule, got {name!r}")
    copied = copy.deepcopy(model)
    new = {copied.get_submodule(name): module for name, module in changes.items()}
    for name, module in list(copied.named_modules(remove_duplicate=False)):
        if module in new:
            parent, _, last = name.rpartition(".")
            setattr(copied.get_submodule(parent), last, new[module])
    return copied
