"""The training step: two gradients for the weights, and for each quantiser's step those that are not frozen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.compress.gaqat.scales import ScaleFreezer, quantizer_scales
from trimtab.ops.arguments import class_indices, non_negative, real_problem
from trimtab.ops.states import fits

# The paper builds on the second pass of sharpness-aware training, which stands in `optim`.
from trimtab.optim.two_pass import ascent_direction, frozen_norm_stats


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
        >>> from trimtab.compress import prepare_quantized, scale_param_groups
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
        if problem := real_problem(x=x):
            raise TypeError(problem)
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
