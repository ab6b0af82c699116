"""A denoiser of digits: the rank of its Jacobian by the noise level, and edits along its singular vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from trimtab.data import load
from trimtab.diffusion import EDM, EDMPreconditioned, denoising_loss, lognormal_levels
from trimtab.diffusion.jacobian import denoiser_jacobian, jacobian_svd, numerical_rank
from trimtab.diffusion.subspace_clustering import edit_along
from trimtab.nets import DenoisingMLP
from trimtab.studies.engine.picture import Picture
from trimtab.studies.engine.study import Curve, Metric, Result, Trial
from trimtab.studies.tools.descent import descend
from trimtab.studies.tools.mixtures import mixture
from trimtab.studies.tools.trained_once import trained_once

MIDDLE = 1.0
STEP = 2.0
DIRECTIONS = 5

RANKED = {"rank": Metric("numerical rank at the middle noise level, of 64", best="min")}
EDITED = {"distance": Metric("distance of an edit to the nearest real digit", best="min")}


def _digits() -> tuple[Tensor, Tensor]:
    """Training and test digits as vectors in [-1, 1]."""
    data = load("digits")
    return data.x_train.flatten(1) * 2 - 1, data.x_test.flatten(1) * 2 - 1


def _network(trial: Trial) -> EDMPreconditioned:
    """A denoiser trained on the digits, once for all arms of a seed."""
    x_train, _ = _digits()
    steps, draws = trial.pick(smoke=20, laptop=3000, paper=30_000), trial.generator(1)
    model = EDMPreconditioned(trial.seeded(lambda: DenoisingMLP(64)), float(x_train.std()), EDM())

    def loss(step: int) -> Tensor:
        x0 = x_train[torch.randint(len(x_train), (128,), generator=draws)]
        t = lognormal_levels(128, generator=draws)
        return denoising_loss(model, x0, t, torch.randn(x0.shape, generator=draws), weight=model.weight(t))

    def train() -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        descend(optimizer, loss, range(steps), anneal=torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps))

    return trained_once(trial, model, train, key=f"digits denoiser {steps} steps seed {trial.seed}").eval()


def _at(model: Callable[..., Tensor], sigma: float) -> Callable[[Tensor], Tensor]:
    return lambda x: model(x, torch.full((len(x),), sigma, dtype=x.dtype))


def ranks(trial: Trial, model: Literal["network", "mixture", "gaussian"]) -> Result:
    """The numerical rank of the Jacobian at noisy test digits, by the noise level."""
    x_train, x_test = _digits()
    count = trial.pick(smoke=2, laptop=20, paper=200)
    x0 = x_test[torch.randperm(len(x_test), generator=trial.generator())[:count]]
    if model == "network":
        denoiser = _network(trial)
    elif model == "mixture":
        denoiser = mixture("digits").to(torch.float32).denoiser(EDM())  # type: ignore[assignment]
    else:
        mean, cov = x_train.mean(0), torch.cov(x_train.T)
        eye = torch.eye(64)

        def denoiser(x: Tensor, t: Tensor) -> Tensor:  # type: ignore[misc]
            return mean + (x - mean) @ torch.linalg.solve(cov + float(t[0]) ** 2 * eye, cov)  # type: ignore[no-any-return]

    levels = (0.1, 0.2, 0.5, MIDDLE, 2.0, 5.0, 10.0)
    found = []
    for done, sigma in enumerate(levels):
        noise = torch.randn(x0.shape, generator=trial.generator(2))
        function = _at(denoiser, sigma)
        values = [torch.linalg.svdvals(denoiser_jacobian(function, x[None])) for x in x0 + sigma * noise]
        found.append(sum(map(numerical_rank, values)) / count)
        trial.report((done + 1) / len(levels))
    return Result({"rank": found[levels.index(MIDDLE)]}, {"rank": Curve(levels, found, x_label="noise level")})


def edit_digits(trial: Trial, directions: Literal["jacobian", "pca", "random"]) -> Result:
    """Denoised test digits moved to both sides along five directions: how far the result is from any real digit.

    Real digits are the test images, the edited one excepted.
    """
    x_train, x_test = _digits()
    function = _at(_network(trial), MIDDLE)
    draws = trial.generator(3)
    count = trial.pick(smoke=2, laptop=50, paper=500)
    chosen = torch.randperm(len(x_test), generator=trial.generator())[:count]
    components = torch.linalg.eigh(torch.cov(x_train.T)).eigenvectors.flip(1).T[:DIRECTIONS]
    distances, shown = [], []  # type: ignore[var-annotated]
    for done, index in enumerate(chosen.tolist()):
        x = x_test[index : index + 1] + MIDDLE * torch.randn(1, 64, generator=trial.generator(index + 100))
        if directions == "jacobian":
            moves = jacobian_svd(function, x).right[:DIRECTIONS]
        else:
            moves = components if directions == "pca" else torch.randn(DIRECTIONS, 64, generator=draws)
        edited = torch.cat([edit_along(function, x, move, sign * STEP) for move in moves for sign in (-1, 1)])
        others = torch.cat([x_test[:index], x_test[index + 1 :]])
        distances.append(float(torch.cdist(edited, others).min(1).values.mean()))
        if len(shown) < 3:
            with torch.no_grad():
                shown.append(torch.cat([function(x), edited]))
        trial.report((done + 1) / count)
    sheet = (torch.cat(shown).reshape(-1, 8, 8) / 2 + 0.5).clamp(0, 1)
    return Result(
        {"distance": sum(distances) / len(distances)},
        pictures={"denoised digits and their edits": Picture.grid(sheet, columns=2 * DIRECTIONS + 1)},
    )
