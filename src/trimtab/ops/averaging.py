"""Moving averages of a network's weights, and the teachers that they make."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal, Self, TypeVar, get_args

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from trimtab.ops.arguments import in_range, one_of
from trimtab.ops.states import fits

M = TypeVar("M", bound=nn.Module)
Buffers = Literal["copy", "average", "own"]


def frozen_copy(module: M) -> M:
    """A copy that takes no gradients, in eval mode: a teacher, or the start of a moving average.

    Example:
        >>> frozen_copy(nn.Linear(2, 2)).weight.requires_grad
        False
    """
    return copy.deepcopy(module).requires_grad_(False).eval()


@torch.no_grad()
def move_average(average: nn.Module, module: nn.Module, decay: float) -> None:
    """average <- decay average + (1 - decay) module, for every weight; buffers, such as statistics, are copied.

    Args:
        average: of the same structure as `module`, such as its `frozen_copy`.
        module: the network in training.
        decay: share of the average that stays, in [0, 1].

    Raises:
        ValueError: `decay` is out of range, or the two have other weights or buffers.

    Example:
        >>> average, module = nn.Linear(1, 1), nn.Linear(1, 1)
        >>> _ = [nn.init.constant_(m.weight, value) for m, value in ((average, 0.0), (module, 1.0))]
        >>> move_average(average, module, decay=0.9)
        >>> round(average.weight.item(), 6)
        0.1
    """
    in_range("decay", decay, 0, 1)
    ours, theirs = list(average.parameters()), list(module.parameters())
    if [p.shape for p in ours] != [p.shape for p in theirs]:
        raise ValueError("average must have the weights of module, got others")
    if [b.shape for b in average.buffers()] != [b.shape for b in module.buffers()]:
        raise ValueError("average must have the buffers of module, got others")
    if ours:
        torch._foreach_lerp_([p.detach() for p in ours], [p.detach() for p in theirs], 1 - decay)
    for mine, its in zip(average.buffers(), module.buffers(), strict=True):
        mine.copy_(its)


class Teacher(nn.Module):
    r"""A network that is the moving average of another one and takes no gradients: a mean teacher.

    It starts as a copy. After $t = 0, 1, \dots$ earlier updates, `update(module)` moves its weights by

    $$
    \theta' \leftarrow a_t \theta' + (1 - a_t)\, \theta, \qquad
    a_t = \min\Bigl(1 - \frac{1}{t + 1},\ \text{decay}\Bigr) \text{ with warm-up, otherwise } a_t = \text{decay}.
    $$

    It stays in eval mode, also where it is a part of a network that is put into training mode.

    Args:
        module: the network to follow; it is copied, and not held.
        decay: share of the average that stays, in [0, 1].
        warmup: start from an average of few updates, whose first is the network itself.
        buffers: what becomes of buffers such as the statistics of batch normalisation: "copy" them at each update,
            "average" the floating-point ones like weights (EMAN, Cai et al., CVPR 2021), or leave the teacher its
            "own", which it then takes from the batches that it sees: its batch normalisation stays in training mode.

    Attributes:
        model: the average.
        updates: how many there were.

    Raises:
        ValueError: `decay` is out of range, or `buffers` is unknown.

    Example:
        >>> module = nn.Linear(1, 1)
        >>> _ = nn.init.constant_(module.weight, 0.0)
        >>> teacher = Teacher(module, decay=0.9)
        >>> _ = nn.init.constant_(module.weight, 1.0)
        >>> teacher.update(module)
        >>> round(teacher.model.weight.item(), 6), teacher(torch.zeros(2, 1)).requires_grad
        (0.1, False)
    """

    def __init__(
        self, module: nn.Module, decay: float = 0.999, *, warmup: bool = False, buffers: Buffers = "copy"
    ) -> None:
        super().__init__()
        self.decay = in_range("decay", decay, 0, 1)
        self.warmup = warmup
        self.buffer_rule: Buffers = one_of("buffers", buffers, get_args(Buffers))
        self.model = frozen_copy(module)
        self.updates = 0
        self.train(module.training)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the average makes of an input, without gradient."""
        return self.model(*args, **kwargs)

    @property
    def next_decay(self) -> float:
        """The share of the average that stays at the next update."""
        return min(1 - 1 / (self.updates + 1), self.decay) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, module: nn.Module, decay: float | None = None) -> None:
        """Moves towards a network.

        Args:
            module: of the same structure as the one copied.
            decay: of this update alone, for schedules, in [0, 1]; by default `next_decay`.

        Raises:
            ValueError: `decay` is out of range, or the network has other weights or buffers.
        """
        keep = self.next_decay if decay is None else in_range("decay", decay, 0, 1)
        ours, theirs = ([p.detach() for p in held.parameters()] for held in (self.model, module))
        mine, its = list(self.model.buffers()), list(module.buffers())
        if [p.shape for p in (*ours, *mine)] != [p.shape for p in (*theirs, *its)]:
            raise ValueError("module must have the weights and buffers of the teacher, got others")
        if ours:
            torch._foreach_lerp_(ours, theirs, 1 - keep)
        if self.buffer_rule != "own":
            for old, new in zip(mine, its, strict=True):
                averaged = self.buffer_rule == "average" and old.is_floating_point()
                old.copy_(old.lerp(new.to(old), 1 - keep) if averaged else new)
        self.updates += 1

    def train(self, mode: bool = True) -> Self:
        """Leaves the average in eval mode, but for batch normalisation with statistics of its own."""
        super().train(mode)
        self.model.eval()
        if self.buffer_rule == "own":
            for layer in self.model.modules():
                if isinstance(layer, _BatchNorm):
                    layer.train()
        return self

    def get_extra_state(self) -> dict[str, int]:
        return {"updates": self.updates}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.updates = int(state["updates"])

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As every module's, but a state that does not fit changes nothing.

        Raises:
            ValueError: the state is of another network.
        """
        if strict and not fits(state_dict, self.state_dict()):
            raise ValueError("state_dict must be of a teacher of the same network, got other names or shapes")
        return super().load_state_dict(state_dict, strict, assign)
