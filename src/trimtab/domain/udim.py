r"""UDIM: flat minima that stay flat in domains nobody has seen, by aligning the loss landscape with a crafted domain's.

For domain generalisation, above all from a single source. Sharpness-aware minimisation (SAM) flattens the loss of the
source; UDIM adds a term by which a worst-case copy of each batch, perturbed in its style or its pixels, has the same
landscape. A step costs three to four times what SAM's does, for the perturbation differentiates a gradient.

$$
x' = x + \zeta\, \nabla_x \bigl( \ell(x) + \rho\, \| \nabla_\theta \ell(x) \|_2 \bigr), \qquad
\theta \leftarrow \theta - \eta \bigl( \nabla \ell(x; \theta + \epsilon) + \lambda\, \nabla \mathcal{I}(x, x'; \theta)
\bigr)
$$

The inconsistency reads the landscape off per-sample gradients $G_i$ of the head on $x$ and $G'_i$ on $x'$: with
$V = \operatorname{mean}_i (G_i - \bar G)^2$ and $V' = \operatorname{mean}_i (G'_i - \bar G)^2$, both about the
source's mean,

$$
\mathcal{I} = \tfrac12 \Bigl( \operatorname{mean} (V - \bar V)^2 + \operatorname{mean} (V' - \bar V)^2 \Bigr)
+ \sum_{\text{weight, bias}} \frac{1}{\dim} \operatorname{mean}_i \|G'_i\|^2, \qquad \bar V = \tfrac12 (V + V') .
$$

In style mode the means and deviations of the channels are moved and the image is put together anew; the released code
leaves the last step out, so that its copy is the original. In pixel mode each sample moves by a step of length
$\zeta$; the released code normalises over the batch.

Reference: Seungjae Shin, HeeSun Bae, Byeonghu Na, Yoon-Yeong Kim and Il-Chul Moon, "Unknown Domain Inconsistency
Minimization for Domain Generalization", ICLR 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.domain.head_gradients import head_gradients
from trimtab.domain.styles import restyle, standardize
from trimtab.ops.arguments import (
    class_indices,
    in_range,
    integer,
    looked_at,
    non_negative,
    one_of,
    real_problem,
)
from trimtab.ops.attack import eval_mode
from trimtab.ops.states import fits

# The paper builds on sharpness-aware minimisation, whose two passes stand in `optim`.
from trimtab.optim.two_pass import SAM, frozen_norm_stats

Mode = Literal["style", "pixel"]
_TINY = 1e-12


def inconsistency(
    features: Float[Tensor, "batch dim"],
    moved_features: Float[Tensor, "batch dim"],
    targets: Int[Tensor, " batch"],
    head: nn.Linear,
) -> Float[Tensor, ""]:
    """How differently the head's loss lies over a batch and over its perturbed copy; differentiable.

    Args:
        features: of the batch.
        moved_features: of the copy, sample by sample.
        targets: labels of both.
        head: the linear layer that follows.

    Raises:
        TypeError: `head` is not linear, or a dtype is wrong.
        ValueError: the shapes do not fit.

    Example:
        >>> z, y, head = torch.randn(6, 4), torch.arange(6) % 3, nn.Linear(4, 3)
        >>> same, other = inconsistency(z, z, y, head), inconsistency(z, 2 * z, y, head)
        >>> bool(same < other)
        True
    """
    if problem := real_problem(features=features, moved_features=moved_features):
        raise TypeError(problem)
    _check_head(head)
    if features.shape != moved_features.shape:
        raise ValueError(
            f"moved_features must be of shape {tuple(features.shape)} as features, got {tuple(moved_features.shape)}"
        )
    here = head_gradients(features, head(features), targets)
    there = head_gradients(moved_features, head(moved_features), targets)
    spreads, others, size = [], [], features.new_zeros(())
    for one, other in zip(here, there, strict=True):
        centre = one.mean(0)
        spreads.append((one - centre).square().mean(0).flatten())
        others.append((other - centre).square().mean(0).flatten())
        size = size + other.flatten(1).square().sum(1).mean() / centre.numel()
    # Both lie half of their difference from their mean.
    return (torch.cat(spreads) - torch.cat(others)).square().mean() / 4 + size


def perturb_domain(
    loss: Callable[[Tensor], Tensor],
    params: Sequence[Tensor],
    x: Float[Tensor, "batch ..."],
    rho: float = 0.05,
    zeta: float = 10.0,
    mode: Mode = "style",
) -> Float[Tensor, "batch ..."]:
    r"""A copy of a batch from a harder domain: one ascent step on $\ell + \rho \| \nabla_\theta \ell \|$.

    Args:
        loss: the mean loss of inputs.
        params: the weights in which its slope is taken.
        x: inputs; in style mode (batch, channels, height, width).
        rho: radius of the region of weights whose worst loss is ascended.
        zeta: length of the step: times the gradient of means and deviations (style), or the distance that each sample
            moves (pixel).
        mode: what moves.

    Returns:
        The copy, detached.

    Raises:
        ValueError: `rho` or `zeta` is negative, the mode is unknown, or `x` does not fit it.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> x = torch.zeros(3, 2)
        >>> moved = perturb_domain(lambda x: model(x).mean(), list(model.parameters()), x, zeta=0.5, mode="pixel")
        >>> moved.norm(dim=1)
        tensor([0.5000, 0.5000, 0.5000])
    """
    if problem := real_problem(x=x):
        raise TypeError(problem)
    one_of("mode", mode, ("style", "pixel"))
    non_negative("rho", rho), non_negative("zeta", zeta)
    x = x.detach()
    if mode == "style":
        content, *style = standardize(x, eps=1e-5)
    else:
        content, style = x, [torch.zeros_like(x)]
    moved = [part.requires_grad_() for part in style]

    def rebuilt(parts: Sequence[Tensor]) -> Tensor:
        return restyle(content, *parts) if mode == "style" else content + parts[0]

    with torch.enable_grad():
        value = loss(rebuilt(moved))
        slope = torch.autograd.grad(value, params, create_graph=True, materialize_grads=True)
        length = (torch.stack([g.float().square().sum() for g in slope]).sum() + _TINY).sqrt()
        ascent = torch.autograd.grad(value + rho * length, moved)
    if mode == "pixel":
        lengths = ascent[0].flatten(1).norm(dim=1).clamp(min=torch.finfo(x.dtype).tiny)
        ascent = (ascent[0] / lengths.view(-1, *[1] * (x.ndim - 1)),)
    return rebuilt([part.detach() + zeta * step for part, step in zip(moved, ascent, strict=True)])


class UDIM:
    """Trains a feature extractor and a linear head by SAM with the inconsistency as a further term.

    Args:
        features: maps inputs to (batch, dim).
        head: the linear layer that follows.
        base: the optimizer of both networks' weights.
        total_steps: length of the training; its first part is SAM alone.
        rho: radius of SAM, and of the region of weights that the perturbation looks at.
        zeta: length of the perturbation, see `perturb_domain`; to be tuned between 0.01 and 10.
        lam: weight of the inconsistency.
        mode: what is perturbed; "style" for images.
        warmup: share of the steps that are SAM alone.

    Raises:
        TypeError: `head` is not linear, or `base` no optimizer.
        ValueError: a number is out of range, or the mode is unknown.

    Example:
        >>> features, head = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten()), nn.Linear(16, 2)
        >>> base = torch.optim.Adam([*features.parameters(), *head.parameters()])
        >>> rule = UDIM(features, head, base, total_steps=10, warmup=0.0)
        >>> found = rule.step(torch.rand(5, 1, 4, 4), torch.arange(5) % 2)
        >>> sorted(found)
        ['inconsistency', 'loss', 'total']
    """

    def __init__(
        self,
        features: nn.Module,
        head: nn.Linear,
        base: torch.optim.Optimizer,
        total_steps: int,
        *,
        rho: float = 0.05,
        zeta: float = 10.0,
        lam: float = 1.0,
        mode: Mode = "style",
        warmup: float = 0.2,
    ) -> None:
        _check_head(head)
        self.total_steps = integer("total_steps", total_steps)
        self.rho, self.zeta = non_negative("rho", rho), non_negative("zeta", zeta)
        self.lam, self.warmup = non_negative("lam", lam), in_range("warmup", warmup, 0, 1)
        self.mode: Mode = one_of("mode", mode, ("style", "pixel"))
        self.features, self.head, self.steps_done = features, head, 0
        self.optimizer = SAM(base, rho=self.rho)

    def step(
        self,
        x: Float[Tensor, "batch ..."],
        targets: Int[Tensor, " batch"],
        *,
        sizes: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """One step.

        Args:
            x: inputs; in style mode (batch, channels, height, width).
            targets: labels.
            sizes: how many samples of the batch each domain has, one after the other; the inconsistency is then the
                sum of the domains'.

        Returns:
            The loss of the first pass, the inconsistency (0 in the warm-up) and `total`, detached.

        Raises:
            TypeError: `targets` is not int64.
            ValueError: the shapes do not fit, or a label is out of range.
        """
        if problem := real_problem(x=x):
            raise TypeError(problem)
        class_indices("targets", targets)
        if targets.shape != x.shape[:1] or len(targets) == 0:
            raise ValueError(f"targets must have shape ({len(x)},) and not be empty, got {tuple(targets.shape)}")
        if looked_at(targets) and not ((targets >= 0) & (targets < self.head.out_features)).all():
            raise ValueError(f"targets must be in [0, {self.head.out_features}), got others")
        if self.mode == "style" and x.ndim != 4:
            raise ValueError(f"x must have shape (batch, channels, height, width), got {tuple(x.shape)}")
        parts = [len(targets)] if sizes is None else list(sizes)
        if sum(parts) != len(targets) or min(parts) < 1:
            raise ValueError(f"sizes must be positive and sum to {len(targets)}, got {parts}")
        model = nn.ModuleList([self.features, self.head])
        model.train()
        aligned = self.lam > 0 and self.steps_done >= self.warmup * self.total_steps

        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.head(self.features(x)), targets)
        loss.backward()
        with frozen_norm_stats(model):
            moved = self._perturbed(x, targets) if aligned else x
            self.optimizer.perturb()
            try:
                self.optimizer.zero_grad()
                F.cross_entropy(self.head(self.features(x)), targets).backward()
            finally:
                self.optimizer.restore()
            apart = torch.zeros_like(loss)
            if aligned:
                pairs = zip(self.features(x).split(parts), self.features(moved).split(parts), strict=True)
                labels = targets.split(parts)
                found = [inconsistency(z, z2, y, self.head) for (z, z2), y in zip(pairs, labels, strict=True)]
                apart = torch.stack(found).sum()
                (self.lam * apart).backward()
        self.optimizer.base.step()
        self.steps_done += 1
        return {
            "loss": loss.detach(),
            "inconsistency": apart.detach(),
            "total": (loss + self.lam * apart).detach(),
        }

    def _perturbed(self, x: Tensor, targets: Tensor) -> Tensor:
        params = [p for part in (self.features, self.head) for p in part.parameters() if p.requires_grad]
        return perturb_domain(
            lambda held: F.cross_entropy(self.head(self.features(held)), targets),
            params,
            x,
            self.rho,
            self.zeta,
            self.mode,
        )

    @torch.no_grad()
    def predict(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        """Logits in eval mode."""
        with eval_mode(self.features), eval_mode(self.head):
            logits: Tensor = self.head(self.features(x))
        return logits

    def state_dict(self) -> dict[str, Any]:
        """Weights, the optimizer's state and the number of steps done."""
        return {
            "features": self.features.state_dict(),
            "head": self.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps_done": self.steps_done,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state; one that does not fit changes nothing.

        Raises:
            ValueError: it is not the state of such a rule.
        """
        own = {"features": self.features.state_dict(), "head": self.head.state_dict()}
        known = isinstance(state, Mapping) and state.keys() == self.state_dict().keys()
        if not known or not fits({name: state[name] for name in own}, own):
            raise ValueError("state must be one of UDIM with networks of these shapes, got another")
        steps = integer("steps_done", state["steps_done"], 0)
        self.optimizer.load_state_dict(state["optimizer"])  # refuses what does not fit before it changes anything
        self.features.load_state_dict(state["features"])
        self.head.load_state_dict(state["head"])
        self.steps_done = steps


def _check_head(head: nn.Module) -> None:
    if not isinstance(head, nn.Linear):
        raise TypeError(f"head must be an nn.Linear, got {type(head).__name__}")
