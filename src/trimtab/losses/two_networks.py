"""Two networks that are trained side by side, each from what the other one says: what Co-teaching and ELR+ share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class TwoNetworks:
    """Two networks with an optimizer each.

    Args:
        networks: two networks of independent initialisation, on their device.
        optimizers: one for each network's parameters; their schedules are the caller's.

    Raises:
        ValueError: if there are not two different ones of each.
    """

    def __init__(self, networks: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer]) -> None:
        for name, given in (("networks", networks), ("optimizers", optimizers)):
            if len(given) != 2:
                raise ValueError(f"{name} must be two, got {len(given)}")
            if given[0] is given[1]:
                raise ValueError(f"{name} must be two different ones, got one twice")
        self.networks = list(networks)
        self.optimizers = list(optimizers)

    def descend(self, objective: Callable[[int, nn.Module], Tensor]) -> dict[str, Tensor]:
        """One step of each network, in training mode, on `objective(number, network)`.

        Returns:
            The values of the objectives, `loss_0` and `loss_1`, detached.
        """
        result = {}
        for number, (network, optimizer) in enumerate(zip(self.networks, self.optimizers, strict=True)):
            loss = objective(number, network.train())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            result[f"loss_{number}"] = loss.detach()
        return result

    @torch.no_grad()
    def predict(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        """Mean of the two networks' logits, in eval mode."""
        logits: list[Tensor] = [network.eval()(x) for network in self.networks]
        return (logits[0] + logits[1]) / 2

    def state_dict(self) -> dict[str, Any]:
        """All that training needs to go on exactly where it stopped."""
        return {part: [holder.state_dict() for holder in getattr(self, part)] for part in ("networks", "optimizers")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; a state that does not fit is refused and changes nothing.

        Raises:
            KeyError, RuntimeError, ValueError: if the state is another method's or of other networks.
        """
        before = copy.deepcopy(self.state_dict())
        try:
            self._restore(state)
        except Exception:
            self._restore(before)
            raise

    def _restore(self, state: dict[str, Any]) -> None:
        self._restore_parts(state, "networks", "optimizers")

    def _restore_parts(self, state: dict[str, Any], *parts: str) -> None:
        for part in parts:
            for holder, held in zip(getattr(self, part), state[part], strict=True):
                holder.load_state_dict(held)
