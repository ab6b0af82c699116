"""Bias-free denoisers of small images: pairs trained on disjoint sets, and one for images of known regularity."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.data import load
from trimtab.diffusion import BiasFreeUNet, c_alpha_images, denoiser_eigenbasis, memory_or_knowledge, universal_sampler
from trimtab.studies.engine.picture import Picture
from trimtab.studies.engine.study import Curve, Metric, Result, Trial
from trimtab.studies.tools.descent import descend
from trimtab.studies.tools.sample_quality import frechet_distance

NOISE = 0.5
HELD = 20

TWINS = {
    "agreement": Metric("cosine between the outputs of two networks"),
    "psnr": Metric("signal-to-noise ratio of unseen denoised images (dB)"),
    "gap": Metric("signal-to-noise ratio, training images less unseen ones (dB)", best="min"),
    "novelty": Metric("cosine of samples with each other less that with the training set"),
    "energy": Metric("energy of an image in 20 directions (%)", percent=True),
    "asymmetry": Metric("asymmetry of the Jacobian (%)", best="min", percent=True),
}
REGULAR = {
    "slope": Metric("slope of output over input signal-to-noise ratio"),
    "off_slope": Metric("distance of the slope from alpha / (alpha + 1)", best="min"),
}
SAMPLED = {
    "frechet": Metric("Frechet distance to unseen images, in 20 directions, 100 steps", best="min"),
    "frechet_10": Metric("Frechet distance to unseen images, in 20 directions, 10 steps", best="min"),
}
STEPS = (10, 20, 50, 100)

Denoise = Callable[[Tensor], Tensor]


def train(trial: Trial, images: Tensor, stream: int) -> BiasFreeUNet:
    """A denoiser of images, for noise of 0 to 1 on each."""
    steps = trial.pick(smoke=2, laptop=250, paper=30_000)
    model = trial.seeded(lambda: BiasFreeUNet(base=16, depth=2), stream)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    draws = trial.generator(stream)

    def loss(step: int) -> Tensor:
        x = images[torch.randint(len(images), (32,), generator=draws)]
        sigma = torch.rand(len(x), 1, 1, 1, generator=draws)
        denoised: Tensor = model(x + sigma * torch.randn(x.shape, generator=draws))
        return (denoised - x).square().mean()

    descend(optimizer, loss, range(steps), anneal=decay)
    return model.eval().requires_grad_(False)


def _images(trial: Trial, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two disjoint training sets and unseen images, 16 x 16."""
    data = load("digits" if trial.budget == "smoke" else "mnist")
    order = torch.randperm(len(data.x_train), generator=trial.generator())[: 2 * size]
    unseen = torch.randperm(len(data.x_test), generator=trial.generator(1))[:200]
    x = torch.cat([data.x_train[order], data.x_test[unseen]])
    small = F.pad(F.avg_pool2d(x, 2), (1, 1, 1, 1)) if x.shape[-1] == 28 else F.interpolate(x, size=16)
    half = len(order) // 2
    return small[:half], small[half : 2 * half], small[len(order) :]


def _snr(found: Tensor, clean: Tensor) -> float:
    """Peak signal-to-noise ratio, in decibel."""
    return -10 * math.log10(float((found - clean).square().mean()))


def _compare(models: tuple[Denoise, Denoise], sets: tuple[Tensor, Tensor, Tensor], trial: Trial) -> dict[str, float]:
    """What two denoisers make of noisy images, those of the first's training set and unseen ones."""
    seen, _, unseen = sets
    draws = trial.generator(4)
    known = seen[: len(unseen)]
    y, y_known = (x + NOISE * torch.randn(x.shape, generator=draws) for x in (unseen, known))
    first, second = (model(y) for model in models)
    mean = torch.cat(sets[:2]).mean(0)
    cosine = F.cosine_similarity((first - mean).flatten(1), (second - mean).flatten(1))
    psnr = _snr(first, unseen)
    return {"agreement": float(cosine.mean()), "psnr": psnr, "gap": _snr(models[0](y_known), known) - psnr}


def twins(trial: Trial, size: int) -> Result:
    """Two networks trained on two sets of so many images."""
    sets = _images(trial, min(size, trial.pick(smoke=50, laptop=size, paper=size)))
    models = []
    for stream in (2, 3):
        models.append(train(trial, sets[stream - 2], stream))
        trial.report(0.4 * (stream - 1))
    first, second = models
    measured = _compare((first, second), sets, trial)
    start = torch.randn(trial.pick(smoke=2, laptop=20, paper=100), 1, 16, 16, generator=trial.generator(5))
    steps = trial.pick(smoke=3, laptop=100, paper=2000)
    made = [
        universal_sampler(model, start, step=0.05, max_steps=steps, generator=trial.generator(6)).images
        for model in models
    ]
    trial.report(0.9)
    compared = memory_or_knowledge((made[0], made[1]), sets[:2])
    energies, asymmetries = [], []
    for x in sets[2][: trial.pick(smoke=1, laptop=3, paper=50)]:
        y = x[None] + NOISE * torch.randn(1, *x.shape, generator=trial.generator(7))
        basis = denoiser_eigenbasis(first, y, HELD)
        energies.append(float((basis.vectors.flatten(1) @ x.flatten()).square().sum() / x.square().sum()))
        asymmetries.append(basis.asymmetry)
    shown = basis.vectors[:10, 0]
    return Result(
        {
            **measured,
            "novelty": compared.agreement - compared.memory,
            "energy": sum(energies) / len(energies),
            "asymmetry": sum(asymmetries) / len(asymmetries),
        },
        pictures={
            "samples of both networks": Picture.grid(torch.cat([part[:10, 0] for part in made]).clamp(0, 1)),
            "eigenvectors": Picture.grid(0.5 + shown / (2 * shown.abs().amax((1, 2), keepdim=True))),
        },
    )


def linear_twins(trial: Trial) -> Result:
    """Two Wiener filters, which know the noise and the means and covariances of their sets."""
    size = trial.pick(smoke=50, laptop=10_000, paper=10_000)
    sets = _images(trial, size)
    models, bases = [], []
    for part in sets[:2]:
        flat = part.flatten(1)
        mean, cov = flat.mean(0), torch.cov(flat.T)
        gain = torch.linalg.solve(cov + NOISE**2 * torch.eye(len(cov)), cov)
        models.append(lambda y, m=mean, g=gain: (m + (y.flatten(1) - m) @ g).reshape(y.shape))
        bases.append(torch.linalg.eigh(flat.T @ flat).eigenvectors[:, -HELD:])
    unseen = sets[2].flatten(1)
    energy = (unseen @ bases[0]).square().sum() / unseen.square().sum()
    return Result({**_compare((models[0], models[1]), sets, trial), "energy": float(energy)})


def regular(trial: Trial, alpha: float) -> Result:
    """The slope of a denoiser of images of regularity alpha, by noise from 0.3 to 0.03."""
    images = c_alpha_images(trial.pick(smoke=50, laptop=10_000, paper=100_000), 16, alpha, generator=trial.generator())
    model = train(trial, images, 2)
    unseen = c_alpha_images(300, 16, alpha, generator=trial.generator(1))
    levels = (0.03, 0.05, 0.1, 0.2, 0.3)
    draws = trial.generator(3)
    before = [-20 * math.log10(sigma) for sigma in levels]
    after = [_snr(model(unseen + sigma * torch.randn(unseen.shape, generator=draws)), unseen) for sigma in levels]
    centred = [value - sum(before) / len(before) for value in before]
    slope = sum(a * b for a, b in zip(centred, after, strict=True)) / sum(a * a for a in centred)
    return Result(
        {"slope": slope, "off_slope": abs(slope - alpha / (alpha + 1))},
        {"signal-to-noise ratio of the denoised image (dB)": Curve(levels, after, x_label="noise")},
    )


def sampled(trial: Trial, size: int) -> Result:
    """Samples of a network trained on so many images, against unseen images in their principal directions.

    The first of the steps is 5 over their number, which brings the noise down to that of a sample in each of them.
    """
    seen, _, unseen = _images(trial, min(size, trial.pick(smoke=50, laptop=size, paper=size)))
    model = train(trial, seen, 2)
    trial.report(0.5)
    real = unseen.flatten(1).double()
    directions = torch.linalg.eigh(torch.cov(real.T)).eigenvectors[:, -HELD:]
    real = real @ directions
    count = trial.pick(smoke=25, laptop=200, paper=2000)
    start = torch.randn(count, 1, 16, 16, generator=trial.generator(5))

    def distance(steps: int) -> float:
        made: Tensor = universal_sampler(
            model, start, step=5 / steps, max_steps=steps, generator=trial.generator(6)
        ).images
        return frechet_distance(made.flatten(1).double() @ directions, real.mean(0), torch.cov(real.T))

    found = [distance(steps) for steps in STEPS]
    return Result(
        {"frechet": found[-1], "frechet_10": found[0]},
        {"frechet": Curve([steps + 1 for steps in STEPS], found, x_label="evaluations")},
    )
