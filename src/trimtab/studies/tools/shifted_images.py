"""Images of the same classes in several domains: colours, photo backgrounds, sets of digits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.data import load
from trimtab.domain.environments import DomainBatch
from trimtab.studies.engine.study import Trial
from trimtab.studies.tools import shifts

PHOTO_STYLES = ("sky", "temple", "petals", "leaves")
"""Regions of scikit-learn's two photos, named for what they show."""


def coloured(
    x: Float[Tensor, "n 1 height width"],
    y: Int[Tensor, " n"],
    disagree: float,
    *,
    flip: float = 0.25,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "n 2 height width"], Int[Tensor, " n"]]:
    """Red or green digits, labelled by whether they are 5 or more; the colour says more than the shape.

    The construction of Arjovsky, Bottou, Gulrajani and Lopez-Paz, "Invariant Risk Minimization", 2019, arXiv
    1907.02893.

    Args:
        x: grey digits.
        y: which digits they are.
        disagree: probability that the colour is not the label's.
        flip: probability that the label is not the shape's.
        generator: decides the draws.

    Returns:
        Images whose ink is in one of two channels, and labels 0 and 1.
    """
    draws = torch.rand(2, len(y), generator=generator).to(x.device)
    label = (y >= 5) ^ (draws[0] < flip)
    colour = label ^ (draws[1] < disagree)
    return torch.cat([x * ~colour[:, None, None, None], x * colour[:, None, None, None]], 1), label.long()


def on_photos(
    x: Float[Tensor, "n 1 side side"], style: str, *, generator: torch.Generator
) -> Float[Tensor, "n 3 side side"]:
    """Digits that invert a random patch of a photo, as MNIST-M has them.

    Args:
        x: grey digits in [0, 1].
        style: one of `PHOTO_STYLES`.
        generator: decides the patches.
    """
    photo, side = _region(style), x.shape[-1]
    height, width = photo.shape[1] - side + 1, photo.shape[2] - side + 1
    corner = torch.randint(height * width, (len(x),), generator=generator)
    rows = (corner // width)[:, None] + torch.arange(side)
    columns = (corner % width)[:, None] + torch.arange(side)
    patches = photo[:, rows[:, :, None], columns[:, None, :]].transpose(0, 1).to(x.device)
    return (patches - x).abs()


@cache
def _region(style: str) -> Float[Tensor, "3 height width"]:
    """A region of a photo at a quarter of its resolution."""
    from sklearn.datasets import load_sample_image

    name, top, left, height, width = {
        "sky": ("china.jpg", 0, 0, 140, 640),
        "temple": ("china.jpg", 200, 120, 200, 400),
        "petals": ("flower.jpg", 120, 180, 220, 220),
        "leaves": ("flower.jpg", 0, 0, 427, 160),
    }[style]
    photo = torch.from_numpy(np.array(load_sample_image(name))).permute(2, 0, 1) / 255
    return F.avg_pool2d(photo[:, top : top + height, left : left + width], 4)


def turned_digits(
    trial: Trial, sources: Sequence[float], asked: Sequence[float], *, each: int, tested: int
) -> tuple[DomainBatch, DomainBatch]:
    """Digits that are turned, others at each angle, at half of their resolution where it is 28 pixels.

    Args:
        trial: the run, whose seed says which.
        sources: degrees to which training digits are turned, a domain each.
        asked: degrees to which test digits are turned.
        each: training digits of a domain.
        tested: test digits at an angle.

    Returns:
        Training digits and test digits, each with their classes.
    """
    data = load("digits" if trial.budget == "smoke" else "mnist")
    data = data.subset(each * len(sources), tested * len(asked), generator=trial.generator())
    width = 2 if data.in_shape[-1] >= 28 else 1

    def turned(x: Tensor, y: Tensor, angles: Sequence[float]) -> DomainBatch:
        size = len(y) // len(angles)
        parts = zip(x.split(size), y.split(size), angles, strict=False)  # digits may be left over
        return [
            (F.avg_pool2d(shifts.rotate(part, angle), width).to(trial.device), labels.to(trial.device))
            for part, labels, angle in parts
        ]

    return turned(data.x_train, data.y_train, sources), turned(data.x_test, data.y_test, asked)


def resized(x: Float[Tensor, "n channels height width"], side: int) -> Float[Tensor, "n channels side side"]:
    """Square images of this side, by averaging where they shrink and bilinearly where they grow."""
    return F.interpolate(x, size=(side, side), mode="bilinear", antialias=x.shape[-1] > side, align_corners=False)
