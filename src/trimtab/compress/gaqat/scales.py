"""The steps of a model's quantisers: found, grouped for an optimizer, and frozen window by window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from trimtab.compress.fake_quant import LSQActivation, LSQWeight
from trimtab.compress.gaqat.disorder import GradientDisorder
from trimtab.ops.arguments import in_range, integer, non_negative, one_of, real_problem
from trimtab.ops.states import fits

Rule = Literal["below", "above"]
Freeze = Literal["task", "smooth", "both"]


def quantizer_scales(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> the learned steps of a model's LSQ quantisers.

    Example:
        >>> from trimtab.compress import prepare_quantized
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> list(quantizer_scales(prepare_quantized(model, torch.randn(4, 2), 4)))[:2]
        ['0.parametrizations.weight.0', '0.input_quantizer']
    """
    held = {name: m for name, m in model.named_modules() if isinstance(m, LSQWeight | LSQActivation)}
    return {name: quantizer.step for name, quantizer in held.items()}


def scale_param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimizer: all other parameters with a weight decay, the quantisers' steps without.

    Args:
        model: with LSQ quantisers.
        weight_decay: of the first group.
    """
    scales = list(quantizer_scales(model).values())
    known = {id(p) for p in scales}
    others = [p for p in model.parameters() if id(p) not in known]
    return [
        {"params": others, "weight_decay": non_negative("weight_decay", weight_decay)},
        {"params": scales, "weight_decay": 0.0},
    ]


class ScaleFreezer(nn.Module):
    """Decides, window by window, which quantisers' steps follow which of two gradients; its state are buffers.

    In the first window nothing is frozen. Statistics are collected of frozen ones too, so that they come free again
    once their disorder has risen.

    Args:
        sizes: how many numbers each step has (one, or one a channel); disorder is averaged over them.
        window: number of training steps between decisions.
        threshold: of the disorder, in [0, 1].
        rule: whether those "below" or those "above" the threshold are frozen.
        freeze: which gradient a frozen one does not follow: "task", "smooth" or "both".
        release: whether what was frozen may come free again.

    Attributes:
        frozen: which steps are, a buffer.
        disorder, conflict: of the last window; conflict is the share of training steps at which the two gradients had
            opposite signs. NaN before there is one.

    Example:
        >>> freezer = ScaleFreezer([1], window=2)
        >>> for _ in range(3):
        ...     found = freezer.combine(torch.tensor([1.0]), torch.tensor([-0.5]))
        >>> found  # from the third step on, for the task gradient has kept its sign
        tensor([-0.5000])
    """

    frozen: Tensor
    place: Tensor
    opposed: Tensor
    last_disorder: Tensor
    last_conflict: Tensor

    def __init__(
        self,
        sizes: Sequence[int],
        window: int = 100,
        threshold: float = 0.3,
        *,
        rule: Rule = "below",
        freeze: Freeze = "task",
        release: bool = True,
    ) -> None:
        super().__init__()
        counts = torch.tensor([integer("sizes", size) for size in sizes])
        if not len(counts):
            raise ValueError("sizes must name at least one step, got none")
        self.threshold = in_range("threshold", threshold, 0, 1)
        self.rule: Rule = one_of("rule", rule, get_args(Rule))
        self.freeze: Freeze = one_of("freeze", freeze, get_args(Freeze))
        self.release = release
        self.signs = GradientDisorder(int(counts.sum()), window)
        place = torch.repeat_interleave(torch.arange(len(counts)), counts)
        self.register_buffer("place", place, persistent=False)
        self.register_buffer("frozen", torch.zeros(len(counts), dtype=torch.bool))
        self.register_buffer("opposed", torch.zeros(int(counts.sum())))
        for name in ("last_disorder", "last_conflict"):
            self.register_buffer(name, torch.full((len(counts),), float("nan")))

    @property
    def disorder(self) -> Float[Tensor, " scales"]:
        return self.last_disorder

    @property
    def conflict(self) -> Float[Tensor, " scales"]:
        return self.last_conflict

    def decide(self, disorder: Float[Tensor, " scales"]) -> Bool[Tensor, " scales"]:
        """Which steps the rule freezes, by their disorder."""
        return disorder < self.threshold if self.rule == "below" else disorder > self.threshold

    @torch.no_grad()
    def combine(self, task: Float[Tensor, " n"], smooth: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The gradient that the steps follow.

        Args:
            task: gradients of the loss, of all steps one after the other.
            smooth: gradients of flatness.

        Raises:
            ValueError: they are of another number.
        """
        if problem := real_problem(task=task):
            raise TypeError(problem)
        if task.shape != self.opposed.shape or smooth.shape != self.opposed.shape:
            wanted = tuple(self.opposed.shape)
            raise ValueError(
                f"task and smooth must have shape {wanted}, got {tuple(task.shape)}, {tuple(smooth.shape)}"
            )
        held = self.frozen[self.place]
        first = task.masked_fill(held, 0.0) if self.freeze in ("task", "both") else task
        second = smooth.masked_fill(held, 0.0) if self.freeze in ("smooth", "both") else smooth
        self.signs.update(task)
        self.opposed += (task * smooth < 0).to(self.opposed)
        if self.signs.full:
            self.last_disorder.copy_(self._averaged(self.signs.value()))
            self.last_conflict.copy_(self._averaged(self.opposed / self.signs.steps))
            chosen = self.decide(self.last_disorder)
            self.frozen.copy_(chosen if self.release else chosen | self.frozen)
            self.signs.reset()
            self.opposed.zero_()
        return first + second

    def _averaged(self, values: Tensor) -> Tensor:
        """Over the numbers of each step."""
        total = torch.zeros(len(self.frozen), device=values.device).index_add_(0, self.place, values)
        return total / torch.bincount(self.place, minlength=len(total))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As every module's, but a state that does not fit changes nothing.

        Raises:
            ValueError: the state is of other steps.
        """
        if strict and not fits(state_dict, self.state_dict()):
            raise ValueError("state_dict must be of the same steps, got other names or shapes")
        found = super().load_state_dict(state_dict, strict, assign)
        self.signs.steps = int(self.signs.done)
        return found
