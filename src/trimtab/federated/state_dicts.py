"""Arithmetic on state dicts: copies, weighted averages, and one long vector and back.

Real and complex entries, parameters and buffers alike, take part; integer and boolean ones (`num_batches_tracked`)
are copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """A detached copy of a model's state dict."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def average_states(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    r"""The mean of several state dicts, $\sum_k w_k s_k / \sum_k w_k$, summed in the order given.

    Args:
        states: at least one, all with the same names and shapes. Integer and boolean entries are those of the first.
        weights: finite and not negative, one per state, not all zero; equal by default.

    Raises:
        ValueError: `states` is empty or they do not fit each other, or `weights` do not fit them.

    Example:
        >>> average_states([{"w": torch.tensor(1.0)}, {"w": torch.tensor(4.0)}], weights=[2, 1])
        {'w': tensor(2.)}
    """
    weights = [1.0] * len(states) if weights is None else weights
    if not states:
        raise ValueError("states must be at least one, got none")
    if len(weights) != len(states) or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        raise ValueError(
            f"weights must be {len(states)} finite numbers of at least 0, not all zero, got {list(weights)}"
        )
    first, total = states[0], sum(weights)
    for state in states[1:]:
        check_alike(state, first, name="states")
    # In place, with multiplication and addition apart: the same roundings as Flower's aggregation.
    mean = {
        name: value * (weights[0] / total) if _takes_part(value) else value.clone() for name, value in first.items()
    }
    for state, weight in zip(states[1:], weights[1:], strict=True):
        for name, value in mean.items():
            if _takes_part(value):
                value += state[name] * (weight / total)
    return mean


def flatten(state: Mapping[str, Tensor]) -> Float[Tensor, " size"]:
    """The real and complex entries of a state dict as one vector, in the dict's order; complex ones as pairs.

    Example:
        >>> flatten({"w": torch.ones(2, 2), "steps": torch.tensor(3), "b": torch.zeros(1)})
        tensor([1., 1., 1., 1., 0.])
    """
    return torch.cat([_real(value).reshape(-1) for value in state.values() if _takes_part(value)])


def unflatten(vector: Float[Tensor, " size"], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `flatten`: names, shapes, dtypes and integer entries are those of `like`.

    Raises:
        ValueError: `vector` is not one-dimensional or has another length than `flatten(like)`.
    """
    sizes = [_real(value).numel() for value in like.values() if _takes_part(value)]
    if vector.shape != (sum(sizes),):
        raise ValueError(f"vector must have shape ({sum(sizes)},), got {tuple(vector.shape)}")
    parts = iter(vector.split(sizes))

    def back(value: Tensor) -> Tensor:
        real = next(parts).view(_real(value).shape).to(_real(value).dtype)
        return torch.view_as_complex(real) if value.is_complex() else real

    return {name: back(value) if _takes_part(value) else value.clone() for name, value in like.items()}


def _takes_part(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _real(value: Tensor) -> Tensor:
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value


def check_alike(state: Mapping[str, Tensor], like: Mapping[str, Tensor], *, name: str) -> None:
    """Refuse a state dict whose entries differ from another's in name or shape."""
    if state.keys() != like.keys():
        raise ValueError(
            f"{name} must have the same entries; these are not in both: {sorted(state.keys() ^ like.keys())}"
        )
    for entry, value in state.items():
        if value.shape != like[entry].shape:
            raise ValueError(
                f"{name} must have the same shapes; {entry} is {tuple(value.shape)} and {tuple(like[entry].shape)}"
            )
