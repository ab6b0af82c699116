r"""AutoAttack: four attacks without settings to tune, and who withstands all of them, for testing a defence.

Each sample meets a gradient attack on the cross-entropy whose step adapts (`auto_pgd`), the same on a difference of
logits that no scale of the network can flatten, towards each of the likeliest wrong classes, a walk to the nearest
decision boundary (`boundary_attack`), and random squares that need no gradient (`square_attack`). In the largest
change of an entry; what an earlier attack has beaten is not attacked again.

Reference: Francesco Croce, Matthias Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse
Parameter-free Attacks", ICML 2020, arXiv 2003.01690; the boundary attack is that of "Minimally Distorted Adversarial
Examples with a Fast Adaptive Boundary Attack", ICML 2020, arXiv 1907.02044, the squares those of arXiv 1912.00049.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from trimtab.ops.arguments import finite_tensor, integer, labels, out_of_reach, positive
from trimtab.ops.attack import eval_mode, random_in_ball
from trimtab.robust.auto_attack.boundary import boundary_attack as boundary_attack
from trimtab.robust.auto_attack.gradient import auto_pgd as auto_pgd
from trimtab.robust.auto_attack.gradient import logit_difference_ratio as logit_difference_ratio
from trimtab.robust.auto_attack.squares import square_attack as square_attack
from trimtab.robust.bounds import in_order

Attack = Callable[[Float[Tensor, "some ..."], Int[Tensor, " some"]], Float[Tensor, "some ..."]]


@dataclass(frozen=True)
class AutoAttackResult:
    """What the ensemble found.

    Attributes:
        adversarial: the last thing that each sample was turned into; the sample itself where it was wrong from the
            start.
        robust: which samples are rightly classified, and withstand all attacks.
        accuracy: share of right samples before any attack ("clean") and after each one.
    """

    adversarial: Float[Tensor, "batch ..."]
    robust: Bool[Tensor, " batch"]
    accuracy: Mapping[str, float]


def auto_attack(
    model: nn.Module,
    x: Float[Tensor, "batch channels height width"],
    y: Int[Tensor, " batch"],
    eps: float,
    *,
    steps: int = 100,
    num_targets: int = 9,
    num_queries: int = 5000,
    bounds: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> AutoAttackResult:
    """Attacks a classifier by the four of AutoAttack's standard form, one after the other.

    Args:
        model: takes images to logits; it is run in eval mode and left in the mode it was in.
        x: images within `bounds`.
        y: their classes.
        eps: largest change of an entry.
        steps: of each gradient attack and of each walk to the boundary.
        num_targets: how many wrong classes, the likeliest first, are aimed at.
        num_queries: forward passes of the random squares.
        bounds: smallest and largest value of an image.
        generator: source of all draws, on the CPU; torch's global one where it is None.

    Raises:
        ValueError: `eps`, `steps`, `num_targets` or `num_queries` is not positive, `bounds` are not two numbers in
            order, an image is not finite or outside of them by more than `eps`, a label is no class, or the model
            answers with NaN.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(2, 3, bias=False))
        >>> _ = net[1].weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-9.0, -9.0]]))
        >>> x = torch.tensor([[0.9, 0.1], [0.6, 0.5]]).view(2, 1, 1, 2)
        >>> found = auto_attack(net, x, torch.tensor([0, 0]), 0.1, steps=5, num_queries=5)
        >>> found.robust
        tensor([ True, False])
    """
    eps, steps = positive("eps", eps), integer("steps", steps)
    num_targets, num_queries = integer("num_targets", num_targets), integer("num_queries", num_queries)
    if not in_order(bounds):
        raise ValueError(f"bounds must be two finite numbers in order, got {bounds}")
    x = finite_tensor("x", x, floating=True).detach()
    if out_of_reach(x, eps, bounds):
        raise ValueError(f"x must be within bounds {bounds}, got values from {x.min():g} to {x.max():g}")
    with torch.no_grad(), eval_mode(model):
        logits = model(x)
    if logits.isnan().any():
        raise ValueError("model must give logits, got NaN")
    y = labels("y", y, logits.shape[1], len(x)).to(x.device)
    num_targets = min(num_targets, logits.shape[1] - 1)
    robust: Tensor = logits.argmax(1) == y
    adversarial, accuracy = x.clone(), {"clean": float(robust.float().mean())}

    def start(part: Tensor) -> Tensor:
        offset = random_in_ball(part, 1.0, generator=generator).flatten(1)
        return (eps * offset / offset.abs().amax(1, keepdim=True)).view_as(part)

    def on_entropy(part: Tensor, own: Tensor) -> Tensor:
        def height(moved: Tensor) -> tuple[Tensor, Tensor]:
            said = model(moved)
            return F.cross_entropy(said, own, reduction="none"), said.argmax(1) != own

        return auto_pgd(height, part, eps, steps=steps, start=start(part), bounds=bounds)

    def towards(rank: int, *, walk: bool) -> Attack:
        def attack(part: Tensor, own: Tensor) -> Tensor:
            with torch.no_grad():
                target = model(part).scatter(1, own[:, None], -torch.inf).topk(rank).indices[:, -1]
            if walk:
                return boundary_attack(model, part, own, target, eps, steps=steps, bounds=bounds)

            def height(moved: Tensor) -> tuple[Tensor, Tensor]:
                said = model(moved)
                return logit_difference_ratio(said, own, target), said.argmax(1) != own

            return auto_pgd(height, part, eps, steps=steps, start=start(part), bounds=bounds)

        return attack

    def by_squares(part: Tensor, own: Tensor) -> Tensor:
        return square_attack(model, part, own, eps, num_queries=num_queries, bounds=bounds, generator=generator)

    ranks = range(1, num_targets + 1)
    attacks: dict[str, list[Attack]] = {
        "adaptive steps on the cross-entropy": [on_entropy],
        "adaptive steps towards classes": [towards(rank, walk=False) for rank in ranks],
        "nearest boundary": [towards(rank, walk=True) for rank in ranks],
        "squares": [by_squares],
    }
    with eval_mode(model):
        for name, tries in attacks.items():
            for attack in tries:
                rows = robust.nonzero().flatten()
                if not len(rows):
                    break
                moved = attack(x[rows], y[rows])
                with torch.no_grad():
                    after = model(moved)
                if after.isnan().any():
                    raise ValueError("model must give logits, got NaN on attacked images")
                stands = after.argmax(1) == y[rows]
                adversarial[rows] = moved
                robust[rows] = stands
            accuracy[name] = float(robust.float().mean())
    return AutoAttackResult(adversarial, robust, accuracy)
