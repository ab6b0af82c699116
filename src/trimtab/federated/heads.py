"""The linear layer at the end of a classifier, and the features that reach it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.ops.attack import eval_mode


def head_of(model: nn.Module, name: str) -> nn.Linear:
    """A model's head.

    Args:
        model: a classifier.
        name: of its last layer, as in `named_modules`.

    Raises:
        ValueError: there is no such layer.
        TypeError: it is not linear.

    Example:
        >>> head_of(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), "2")
        Linear(in_features=8, out_features=3, bias=True)
    """
    modules = dict(model.named_modules())
    if name not in modules:
        raise ValueError(f"head must be the name of a layer of the model, got {name!r}")
    if not isinstance(found := modules[name], nn.Linear):
        raise TypeError(f"head must name a linear layer, got {type(found).__name__}")
    return found


@contextmanager
def features_seen(head: nn.Linear, *, detach: bool = False) -> Iterator[list[Tensor]]:
    """The inputs of a head while the model around it is called.

    Args:
        head: of the model.
        detach: let the head itself see its input without gradient, so that its loss trains nothing before it.
    """
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        seen.append(inputs[0])
        return (inputs[0].detach(),) if detach else None

    handle = head.register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def features_of(
    model: nn.Module, x: Float[Tensor, "n ..."], head: str, batch_size: int = 1024
) -> Float[Tensor, "n dim"]:
    """What reaches the head for each sample, in eval mode; all parts of the model are then as before.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> features_of(model, torch.randn(5, 4), "2").shape
        torch.Size([5, 8])
    """
    with eval_mode(model), features_seen(head_of(model, head)) as seen:
        for part in x.split(batch_size):
            model(part)
    return torch.cat([part.flatten(1) for part in seen])
