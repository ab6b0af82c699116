"""Whether a saved state belongs to what is asked to take it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def fits(state: Any, own: Any) -> bool:
    """Whether a state has the parts of another: the same names, and tensors of the same shapes.

    A rule with several parts asks this before it loads the first of them, so that a state that does not fit changes
    nothing. Other values (numbers, None) are not compared.

    Args:
        state: what is to be loaded.
        own: the state held now, of `state_dict`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> own = nn.Linear(2, 3).state_dict()
        >>> fits(nn.Linear(2, 3).state_dict(), own), fits(nn.Linear(3, 2).state_dict(), own), fits({}, own)
        (True, False, False)
    """
    if isinstance(own, Tensor):
        return isinstance(state, Tensor) and state.shape == own.shape
    if isinstance(own, Mapping):
        return isinstance(state, Mapping) and state.keys() == own.keys() and all(fits(state[k], own[k]) for k in own)
    return True
