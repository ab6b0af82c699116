r"""GAQAT: quantisation-aware training for unseen domains, in which some quantisers stop following the task for a while.

For a low-bit network that must work in domains it was not trained on. Flatness helps there (SAGM), but on the steps of
the quantisers the gradient of the loss and that of flatness often pull against each other, and a step may hang in a
false balance between the two. The sign of a step's task gradient says which: over a window of $K$ training steps, its
disorder is the share of changes of sign,

$$
\delta_l = \frac{1}{K - 1} \sum_{k=1}^{K-1} \mathbb{1}\bigl[ \operatorname{sign} g^{k+1}_l \ne \operatorname{sign} g^k_l
\bigr] .
$$

Where it is below a threshold, the step follows the gradient of flatness alone in the next window; elsewhere, and in all
weights, both are added up. The gradient of flatness is taken at
$\theta + \rho\, g / \lVert g \rVert - \alpha\, g$, with $g$ the task gradient at $\theta$.

The paper's text was not at hand: this is built from its abstract and its public reviews, which say that the task
gradients of scales of low disorder are frozen, window by window. How disorder is written, the window's length and the
threshold are ours; quantisers are LSQ's and flatness is SAGM's, with a constant $\alpha$ of ours.

Reference: Jiacheng Jiang, Yuan Meng, Chen Tang, Han Yu, Qun Li, Zhi Wang, Wenwu Zhu, "GAQAT: gradient-adaptive
quantization-aware training for domain generalization", 2024, arXiv 2412.05551; SAGM: Pengfei Wang, Zhaoxiang Zhang,
Zhen Lei, Lei Zhang, "Sharpness-Aware Gradient Matching for Domain Generalization", CVPR 2023, arXiv 2303.10353.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from trimtab.compress.fake_quant import LSQActivation, LSQWeight
from trimtab.ops.arguments import class_indices, in_range, integer, non_negative, one_of
from trimtab.ops.states import fits

# The paper builds on the second pass of sharpness-aware training, which stands in `optim`.
from trimtab.optim.two_pass import ascent_direction, frozen_norm_stats

Rule = Literal["below", "above"]
Freeze = Literal["task", "smooth", "both"]


def gradient_disorder(gradients: Float[Tensor, "steps n"]) -> Float[Tensor, " n"]:
    """Share of successive steps at which a gradient's sign changes; a zero leaves the sign as it was.

    Args:
        gradients: of each step, at least two, in order.

    Raises:
        ValueError: there are fewer than two steps.

    Example:
        >>> gradient_disorder(torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, 1.0]]))
        tensor([0.5000, 1.0000])
    """
    if gradients.dim() != 2 or len(gradients) < 2:
        raise ValueError(f"gradients must be of at least two steps, got shape {tuple(gradients.shape)}")
    disorder = GradientDisorder(gradients.shape[1], len(gradients)).to(gradients.device)
    for gradient in gradients:
        disorder.update(gradient)
    return disorder.value()


class GradientDisorder(nn.Module):
    """Counts the changes of sign of some gradients over a window, see `gradient_disorder`; its state are buffers.

    Args:
        count: how many gradients there are, each a number.
        window: number of steps, at least 2.

    Attributes:
        steps: how many of the present window are done.

    Example:
        >>> disorder = GradientDisorder(1, window=3)
        >>> for gradient in (2.0, -1.0, -3.0):
        ...     disorder.update(torch.tensor([gradient]))
        >>> disorder.full, disorder.value()
        (True, tensor([0.5000]))
    """

    sign: Tensor
    flips: Tensor
    done: Tensor

    def __init__(self, count: int, window: int) -> None:
        super().__init__()
        self.window = integer("window", window, 2)
        self.register_buffer("sign", torch.zeros(integer("count", count)))
        self.register_buffer("flips", torch.zeros(count))
        self.register_buffer("done", torch.tensor(0))
        self.steps = 0

    def update(self, gradients: Float[Tensor, " count"]) -> None:
        """Takes the gradients of one step.

        Raises:
            ValueError: they are of another number.
        """
        if gradients.shape != self.sign.shape:
            raise ValueError(f"gradients must have shape {tuple(self.sign.shape)}, got {tuple(gradients.shape)}")
        new = gradients.detach().sign().to(self.sign)
        if self.steps:  # across the border of two windows no change is counted
            self.flips += (new * self.sign < 0).to(self.flips)
            self.sign.copy_(torch.where(new == 0, self.sign, new))
        else:
            self.sign.copy_(new)
        self.steps += 1
        self.done.fill_(self.steps)

    @property
    def full(self) -> bool:
        """Whether the window is complete."""
        return self.steps >= self.window

    def value(self) -> Float[Tensor, " count"]:
        """The disorder of the steps so far.

        Raises:
            ValueError: there were fewer than two.
        """
        if self.steps < 2:
            raise ValueError(f"steps must be at least 2 before there is a disorder, got {self.steps}")
        return self.flips / (self.steps - 1)

    def reset(self) -> None:
        """Begins a new window."""
        self.flips.zero_()
        self.sign.zero_()
        self.done.zero_()
        self.steps = 0

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As every module's, but a state that does not fit changes nothing.

        Raises:
            ValueError: the state is of another number of gradients.
        """
        if strict and not fits(state_dict, self.state_dict()):
            raise ValueError("state_dict must be of as many gradients, got other names or shapes")
        found = super().load_state_dict(state_dict, strict, assign)
        self.steps = int(self.done)
        return found


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


class GAQAT:
    """Trains a model with LSQ quantisers by SAGM, freezing steps as a `ScaleFreezer` says.

    Args:
        model: of `prepare_quantized`, with learned steps.
        optimizer: of its parameters; see `scale_param_groups`.
        freezer: of the model's steps, in the order of `quantizer_scales`; one with its defaults if None.
        rho: length of the ascent, over all parameters together.
        alpha: how far against the task gradient the second pass is shifted back.
        perturb_scales: whether the quantisers' steps are moved for the second pass too.

    Attributes:
        freezer: the decisions and the statistics.

    Raises:
        ValueError: the model has no learned steps, the freezer is for others, or a number is out of range.

    Example:
        >>> from trimtab.compress import prepare_quantized
        >>> model = prepare_quantized(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(16, 4), 4)
        >>> rule = GAQAT(model, torch.optim.Adam(scale_param_groups(model, 1e-4)))
        >>> sorted(rule.step(torch.randn(8, 4), torch.arange(8) % 2))
        ['frozen', 'loss', 'perturbed']
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        freezer: ScaleFreezer | None = None,
        *,
        rho: float = 0.05,
        alpha: float = 1e-3,
        perturb_scales: bool = True,
    ) -> None:
        self.rho, self.alpha = non_negative("rho", rho), non_negative("alpha", alpha)
        self.scales = [p for p in quantizer_scales(model).values() if p.requires_grad]
        sizes = [p.numel() for p in self.scales]
        if not sizes:
            raise ValueError("model must have LSQ quantisers with learned steps, got none")
        self.freezer = (ScaleFreezer(sizes) if freezer is None else freezer).to(self.scales[0].device)
        if torch.bincount(self.freezer.place).tolist() != sizes:
            raise ValueError(f"freezer must be of steps of sizes {sizes}, got others")
        known = {id(p) for p in self.scales}
        self.model, self.optimizer, self.perturb_scales = model, optimizer, perturb_scales
        self.weights = [p for p in model.parameters() if p.requires_grad and id(p) not in known]

    def step(self, x: Float[Tensor, "batch ..."], targets: Int[Tensor, " batch"]) -> dict[str, Tensor]:
        """One step.

        Args:
            x: inputs, of all domains together.
            targets: labels.

        Returns:
            The loss at the weights and at the perturbed ones, and the share of frozen steps, detached.

        Raises:
            TypeError: `targets` is not int64.
            ValueError: there is not one label a sample, or no sample.
        """
        class_indices("targets", targets)
        if targets.shape != x.shape[:1] or not len(targets):
            raise ValueError(f"targets must have shape ({len(x)},) and not be empty, got {tuple(targets.shape)}")
        self.model.train()
        params = [*self.weights, *self.scales]
        loss = F.cross_entropy(self.model(x), targets)
        task = torch.autograd.grad(loss, params, materialize_grads=True)
        moved = params if self.perturb_scales else self.weights
        slopes = list(task[: len(moved)])
        home = [p.detach().clone() for p in moved]
        with torch.no_grad():
            for p, up, slope in zip(moved, ascent_direction(slopes), slopes, strict=True):
                p.add_(self.rho * up - self.alpha * slope)
        try:
            with frozen_norm_stats(self.model):
                perturbed = F.cross_entropy(self.model(x), targets)
                smooth = torch.autograd.grad(perturbed, params, materialize_grads=True)
        finally:
            with torch.no_grad():
                for p, value in zip(moved, home, strict=True):
                    p.copy_(value)
        frozen = self.freezer.frozen.float().mean()
        count = len(self.weights)
        combined = self.freezer.combine(*(torch.cat([g.flatten() for g in held[count:]]) for held in (task, smooth)))
        for p, one, other in zip(self.weights, task[:count], smooth[:count], strict=True):
            p.grad = one + other
        for p, part in zip(self.scales, combined.split([p.numel() for p in self.scales]), strict=True):
            p.grad = part.view_as(p).clone()
        self.optimizer.step()
        return {"loss": loss.detach(), "perturbed": perturbed.detach(), "frozen": frozen}

    @torch.no_grad()
    def predict(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        """Logits in eval mode."""
        logits: Tensor = self.model.eval()(x)
        return logits

    def state_dict(self) -> dict[str, Any]:
        """Weights and steps, the optimizer's state, and the freezer's."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "freezer": self.freezer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state; one that does not fit changes nothing.

        Raises:
            ValueError: it is not the state of such a rule.
        """
        own = self.state_dict()
        known = isinstance(state, Mapping) and state.keys() == own.keys()
        if not known or not all(fits(state[name], own[name]) for name in ("model", "freezer")):
            raise ValueError("state must be one of GAQAT with a model of these shapes, got another")
        self.optimizer.load_state_dict(state["optimizer"])  # refuses what does not fit before it changes anything
        self.model.load_state_dict(state["model"])
        self.freezer.load_state_dict(state["freezer"])
