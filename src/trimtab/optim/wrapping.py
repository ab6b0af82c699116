"""What optimizers around another optimizer share: its parameter groups and its state are theirs."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class OptimizerWrapper(Optimizer):
    """An optimizer around a base optimizer, to whom groups, state and `state_dict` belong.

    So a learning-rate scheduler works on either, a run of the base goes on under the wrapper and the other way round,
    and hooks may be registered on both: each optimizer's own fire. `torch.distributed.checkpoint` takes either.

    Args:
        base: the optimizer that makes the step.
        options: hyper-parameters, added to the groups that do not have their own. Those that an earlier wrapper of the
            same base added are not the groups' own, and give way.
        attributes: what else the wrapper holds, by name; copied and pickled with it.

    Raises:
        TypeError: `base` is not an optimizer.
        ValueError: `base` has a hyper-parameter of the name of an option, or an option is out of its range in a group.
    """

    base: Optimizer

    def __init__(self, base: Optimizer, options: dict[str, Any] | None = None, **attributes: Any) -> None:
        if not isinstance(base, Optimizer):
            raise TypeError(f"base must be an Optimizer, got {type(base).__name__}")
        options = options or {}
        if taken := sorted(set(options) & _own_hyper_parameters(base)):
            raise ValueError(
                f"base must have no hyper-parameter {taken[0]!r} of its own, which means another thing to "
                f"{type(self).__name__}, got {type(base).__name__}"
            )
        for group in base.param_groups:
            self._check({**options, **group})
        for name, value in options.items():
            for group in base.param_groups:
                if name not in group or (name in base.defaults and group[name] == base.defaults[name]):
                    group[name] = value
            base.defaults[name] = value
        self._attributes = tuple(attributes)
        # Optimizer.__init__ would make groups of its own; its hooks are all that is needed beside the base's.
        self.__setstate__({"base": base, "defaults": base.defaults, **attributes})

    def __getstate__(self) -> dict[str, Any]:
        held = {name: getattr(self, name) for name in self._attributes}
        return {"base": self.base, "defaults": self.base.defaults, "_attributes": self._attributes, **held}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's own list."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base.param_groups = value

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The base optimizer's own state."""
        return self.base.state

    @state.setter
    def state(self, value: defaultdict[Tensor, Any]) -> None:
        self.base.state = value

    def _check(self, group: Mapping[str, Any]) -> None:
        """Refuse a group's options that are out of their range."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the base optimizer; the wrapper's options in it are checked first."""
        self._check({**self.defaults, **param_group})
        self.base.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state; the wrapper has none of its own."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state_dict = self.base.state_dict()
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the base optimizer's state, which may come from a run without the wrapper."""
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        for group in state_dict.get("param_groups", ()):
            self._check({**self.defaults, **group})
        self.base.load_state_dict(state_dict)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)


def _own_hyper_parameters(base: Optimizer) -> set[str]:
    """What the constructor of an optimizer takes, or of the one that it is around."""
    while isinstance(base, OptimizerWrapper):
        base = base.base
    return set(inspect.signature(type(base)).parameters)
