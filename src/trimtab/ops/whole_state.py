"""Modules that take a saved state whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.ops.feature_bank import FeatureBank
from trimtab.ops.states import fits

if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object


class WholeState(_Base):
    """Stands before `nn.Module` among a class's bases, so that a state that does not fit changes nothing.

    Any other module keeps those parts of such a state that did fit, and then raises. A growing `FeatureBank` within
    takes any number of rows.

    Example:
        >>> import torch
        >>> class Scale(WholeState, nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.register_buffer("factor", torch.ones(()))
        ...         self.register_buffer("offset", torch.zeros(()))
        >>> scale = Scale()
        >>> try:
        ...     scale.load_state_dict({"factor": torch.tensor(3.0)})
        ... except ValueError:
        ...     scale.factor
        tensor(1.)
    """

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As every module's, but a state that does not fit changes nothing.

        Raises:
            ValueError: the state has other names or shapes.
        """
        own = self.state_dict()
        for name in self._growing() & state_dict.keys():
            own[name] = _as_long(own[name], state_dict[name])
        given = state_dict if strict else {name: state_dict.get(name, part) for name, part in own.items()}
        if not fits(given, own):
            kind = type(self).__name__
            raise ValueError(f"state_dict must be of a {kind} of the same sizes, got other names or shapes")
        return super().load_state_dict(state_dict, strict, assign)

    def _growing(self) -> set[str]:
        """The names of what may be of another length."""
        banks = {name for name, part in self.named_modules() if isinstance(part, FeatureBank) and not part.capacity}
        return {name for name, held in self.state_dict().items() if name.rpartition(".")[0] in banks and held.ndim}


def _as_long(held: Tensor, given: Any) -> Tensor:
    """A tensor of the form of one, of the length of another, without memory of its own."""
    rows = given.shape[:1] if isinstance(given, Tensor) else held.shape[:1]
    return torch.empty(*rows, *held.shape[1:], device="meta")
