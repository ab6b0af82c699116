"""Attacks on a classifier that answers queries only, or that is never asked: what others are measured against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.ops.attack import random_in_ball
from trimtab.robust.auto_attack.squares import halvings
from trimtab.studies.tools.oracle import Scene


def random_signs(scene: Scene) -> Tensor:
    """Noise of +-eps in every pixel, drawn anew until it fools or the queries are spent."""
    last, together = scene.x.clone(), 20
    for _ in range(scene.budget // together):
        rows = scene.oracle.open_rows()
        if not len(rows):
            break
        many = rows.repeat(together)
        noise = random_in_ball(scene.x[many], 1.0, generator=scene.generator).sign()
        asked = scene.inside(scene.x[many] + scene.eps * noise, many)
        scene.oracle(asked, many)
        last[rows] = asked[-len(rows) :]
    return last


def square_attack(scene: Scene) -> Tensor:
    """Random squares of +-eps that are kept where they lower the margin.

    Andriushchenko, Croce, Flammarion and Hein, "Square Attack: a query-efficient black-box adversarial attack via
    random search", ECCV 2020, arXiv 1912.00049. It begins with vertical stripes; the share of the pixels that a square
    covers begins at the setting's and is halved as the queries are spent, by the authors' schedule.
    """
    count, channels, height, width = scene.x.shape
    draw = scene.generator
    stripes = torch.randint(2, (count, channels, 1, width), generator=draw) * 2.0 - 1
    best = scene.inside(scene.x + scene.eps * stripes)
    margin = scene.margin(scene.oracle(best))
    for query in range(1, scene.budget):
        rows = scene.oracle.open_rows()
        if not len(rows):
            break
        share = scene.setting["share"] * halvings(query / scene.budget)
        side = max(1, min(round((share * height * width) ** 0.5), height - 1))
        top = torch.randint(height - side + 1, (len(rows), 1, 1, 1), generator=draw)
        left = torch.randint(width - side + 1, (len(rows), 1, 1, 1), generator=draw)
        sign = torch.randint(2, (len(rows), channels, 1, 1), generator=draw) * 2.0 - 1
        down, across = torch.arange(height).view(1, 1, -1, 1), torch.arange(width).view(1, 1, 1, -1)
        square = (down >= top) & (down < top + side) & (across >= left) & (across < left + side)
        moved = torch.where(square, scene.inside(scene.x[rows] + scene.eps * sign, rows), best[rows])
        found = scene.margin(scene.oracle(moved, rows), rows)
        better = found < margin[rows]
        kept = rows[better]
        best[kept], margin[kept] = moved[better], found[better]
    return best


def natural_evolution(scene: Scene) -> Tensor:
    """Signed descent along the margin's gradient, estimated from pairs of opposite Gaussian moves.

    Ilyas, Engstrom, Athalye and Lin, "Black-box Adversarial Attacks with Limited Queries and Information", ICML 2018,
    arXiv 1804.08598. The setting says how many pairs go into an estimate, and the step.
    """
    pairs, step, width = int(scene.setting["pairs"]), float(scene.setting["step"]) * scene.eps, 0.1
    moved = scene.x.clone()
    for _ in range(scene.budget // (2 * pairs + 1)):
        rows = scene.oracle.open_rows()
        if not len(rows):
            break
        here = moved[rows]
        direction = torch.randn(pairs, *here.shape, generator=scene.generator)
        asked = torch.cat([here + width * direction, here - width * direction]).flatten(0, 1)
        margins = scene.margin(scene.oracle(asked, rows.repeat(2 * pairs)), rows.repeat(2 * pairs))
        ahead, behind = margins.view(2, pairs, len(rows))
        slope = ((ahead - behind).view(pairs, -1, 1, 1, 1) * direction).mean(0)
        moved[rows] = scene.inside(here - step * slope.sign(), rows)
        scene.oracle(moved[rows], rows)
    return moved


def momentum_transfer(scene: Scene, *, momentum: float = 1.0, transformers: bool = False) -> Tensor:
    """Iterated signed steps on the cross-entropy of the attacker's own networks; no query is made.

    With momentum, Dong et al., "Boosting Adversarial Attacks with Momentum", CVPR 2018, arXiv 1710.06081, on the mean
    of the logits where there are several networks; without, the projected gradient of Madry et al. (ICLR 2018).
    """
    networks: Sequence[nn.Module] = scene.transformers if transformers else [scene.cnn]
    steps = int(scene.setting["steps"])
    moved, velocity = scene.x.clone(), torch.zeros_like(scene.x)
    if not momentum:
        start = random_in_ball(moved, scene.eps, generator=scene.generator)
        moved = scene.inside(moved + start)
    for _ in range(steps):
        moved.requires_grad_()
        logits = torch.stack([network(moved) for network in networks]).mean(0)
        loss = -F.cross_entropy(logits, scene.goals) if scene.targeted else F.cross_entropy(logits, scene.y)
        (slope,) = torch.autograd.grad(loss, moved)
        velocity = momentum * velocity + slope / slope.abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-30)
        moved = scene.inside(moved.detach() + 1.5 * scene.eps / steps * velocity.sign())
    return moved


def blended(scene: Scene) -> Float[Tensor, "n channels height width"]:
    """The image of the goal's class that each victim is given, as far as the ball allows; no network is used."""
    return scene.inside(scene.examples)
