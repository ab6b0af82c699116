"""Can a classifier that only answers queries be defended, and does an auto-encoder make the gradients good enough?

The paper defends CIFAR-10 and STL-10 networks with a DnCNN of 17 layers and an auto-encoder of 192 numbers for 200
epochs. Here the black box is fully connected, images are MNIST at 14 x 14 pixels, the code has 20 numbers, and 100
steps of 32 images start from a denoiser that does nothing; the auto-encoder was trained on clean images before. All
zeroth-order contestants ask 40 queries for each image in a step, but the coordinates of pixels take 392, for which it
has a tenth of the steps. Moves are 0.05 long, ten times the authors'. Certificates rest on 200 votes at a confidence of
99 %, on 60 images. As an attack, the estimator has queries for two steps. After one run of the headline's two
contestants, steps, votes and images were cut, for time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.nets import mlp
from trimtab.robust import BlackBoxDefense, certify, num_queries, zo_gradient
from trimtab.studies.engine.study import Claim, Curve, Experiment, Metric, Result, Study, Trial
from trimtab.studies.tasks.black_box import Attack, any_class
from trimtab.studies.tools.descent import descend, descent_step
from trimtab.studies.tools.images import some_images
from trimtab.studies.tools.oracle import Scene
from trimtab.studies.tools.surrogates import trained
from trimtab.studies.tools.trained_once import trained_once

_SIGMA = 0.5
_CODE = 20
_BATCH = 32
_RATE = 2e-3


class Denoiser(nn.Module):
    """The image and what three convolutions add to it; nothing at first."""

    def __init__(self, channels: int = 1, width: int = 8) -> None:
        super().__init__()
        last = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(last.weight)
        self.net = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            last,
        )

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.net(x)
        return x + added


def coder(shape: tuple[int, ...]) -> nn.ModuleList:
    """Encoder and decoder, fully connected."""
    size = torch.Size(shape).numel()
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(size, 128), nn.ReLU(), nn.Linear(128, _CODE))
    decoder = nn.Sequential(
        nn.Linear(_CODE, 128), nn.ReLU(), nn.Linear(128, size), nn.Sigmoid(), nn.Unflatten(1, shape)
    )
    return nn.ModuleList([encoder, decoder])


@dataclass(frozen=True)
class World:
    """The black box, images, and an auto-encoder trained on clean ones."""

    query: nn.Module
    coder: nn.ModuleList
    x: Tensor
    x_test: Tensor
    y_test: Tensor


def world(trial: Trial) -> World:
    """As the seed decides it; the black box and the auto-encoder are trained once for all contestants."""
    data = some_images(trial, "mnist", smoke=(300, 20), laptop=(4000, 60), paper=(None, 1000))
    x, key = data.x_train, f"{data.name}, {len(data.x_train)} images of seed {trial.seed}"
    make = partial(mlp, x[0].numel(), (128, 64), data.num_classes)
    epochs = trial.pick(smoke=2, laptop=8, paper=30)
    box = trained(trial, make, x, data.y_train, data.num_classes, epochs=epochs, lr=2e-3, stream=0, key=key)
    held = trial.seeded(partial(coder, data.in_shape), 1)

    def build() -> None:
        optimizer, order = torch.optim.Adam(held.parameters(), lr=3e-3), trial.generator(11)
        steps = trial.pick(smoke=20, laptop=400, paper=20_000)
        batches = (x[torch.randint(len(x), (64,), generator=order)] for _ in range(steps))
        descend(optimizer, lambda images: F.mse_loss(held[1](held[0](images)), images), batches)

    trained_once(trial, held, build, key=f"auto-encoder of {key}")
    return World(box, held, x, data.x_test, data.y_test)


def defend(trial: Trial, *, coded: bool, method: str = "cge", exact: bool = False, steps: float = 1.0) -> Result:
    """Train a denoiser (and the encoder) and certify test images.

    Args:
        trial: the run.
        coded: whether the auto-encoder stands between denoiser and black box.
        method: how gradients are estimated; as many queries for each image in a step, whatever it is.
        exact: with the black box's true gradients instead.
        steps: share of the task's steps; 0 trains nothing, and then only the auto-encoder stands there, if it does.
    """
    held = world(trial)
    q = num_queries("cge", _CODE) - 1
    denoiser = trial.seeded(Denoiser, 3)
    parts: Any = tuple(held.coder) if coded else ()
    options: dict[str, Any] = {"sigma": _SIGMA, "method": method, "q": q if method == "rge" else None, "mu": 0.05}
    defense = BlackBoxDefense(held.query, denoiser, *parts, **options)
    optimizer = torch.optim.Adam([p for p in defense.parameters() if p.requires_grad], lr=_RATE)
    order, noise = trial.generator(4), trial.generator(5)
    total = round(steps * trial.pick(smoke=3, laptop=100, paper=20_000))
    reached: list[float] = []
    votes = partial(torch.randn, held.x_test.shape, generator=trial.generator(7))

    def under_noise() -> float:
        with torch.no_grad():
            right: Tensor = defense(held.x_test + _SIGMA * votes()).argmax(1) == held.y_test
        return right.float().mean().item()

    for step in range(total):
        x = held.x[torch.randint(len(held.x), (_BATCH,), generator=order)]
        if exact:
            moved = x + _SIGMA * torch.randn(x.shape, generator=noise)
            loss = F.cross_entropy(defense(moved), held.query(x).argmax(1))
        else:
            loss = defense.loss(x, generator=noise)["total"]
        descent_step(optimizer, loss)
        if (step + 1) % max(1, total // 6) == 0:
            reached.append(under_noise())
            trial.report((step + 1) / total)
    n0, n = trial.pick(smoke=(10, 40), laptop=(20, 200), paper=(100, 10_000))
    found = certify(defense, held.x_test, _SIGMA, n0=n0, n=n, alpha=0.01, generator=trial.generator(6))
    clean = (defense(held.x_test).argmax(1) == held.y_test).float().mean().item()
    each = max(1, total // 6)
    return Result(
        {
            "certified": found.accuracy(held.y_test, 0.25),
            "certified_far": found.accuracy(held.y_test, 0.5),
            "smoothed_accuracy": found.accuracy(held.y_test),
            "test_accuracy": clean,
            "queries": float(defense.queries) / 1e3,
        },
        {
            "smoothed_accuracy": Curve(
                [float(each * (k + 1)) for k in range(len(reached))] or [0.0], reached or [under_noise()], "step"
            )
        },
    )


def directions(trial: Trial, *, method: str = "cge", coded: bool = True) -> Result:
    """How well estimated gradients of noisy images point the way of the true ones."""
    held = world(trial)
    targets = held.query(held.x_test).argmax(1)
    z = held.x_test + _SIGMA * torch.randn(held.x_test.shape, generator=trial.generator(1))
    decoder = held.coder[1] if coded else nn.Identity()
    z = held.coder[0](z).detach() if coded else z

    def values(copies: Tensor) -> Tensor:
        logits = held.query(decoder(copies.flatten(0, 1)))
        found: Tensor = F.cross_entropy(logits, targets.repeat(len(copies)), reduction="none")
        return found.view(copies.shape[:2])

    q = num_queries("cge", _CODE) - 1
    guess = zo_gradient(values, z, mu=0.05, method=method, q=q, generator=trial.generator(2))  # type: ignore[arg-type]
    z.requires_grad_()
    (true,) = torch.autograd.grad(values(z[None]).sum(), z)
    cosine = F.cosine_similarity(guess.flatten(1), true.flatten(1), dim=1)
    return Result({"cosine": cosine.mean().item()})


def coordinates(scene: Scene) -> Tensor:
    """Signed steps along the margin's gradient, estimated coordinate by coordinate until the queries are spent."""
    moved, each = scene.x.clone(), num_queries("cge", scene.x[0].numel()) + 1
    step = float(scene.setting["step"]) * scene.eps
    for _ in range(scene.budget // each):
        rows = scene.oracle.open_rows()
        if not len(rows):
            break

        def values(copies: Tensor, rows: Tensor = rows) -> Tensor:
            many = rows.repeat(len(copies))
            return scene.margin(scene.oracle(copies.flatten(0, 1), many), many).view(copies.shape[:2])

        slope = zo_gradient(values, moved[rows], mu=float(scene.setting["mu"]))
        moved[rows] = scene.inside(moved[rows] - step * slope.sign(), rows)
        scene.oracle(moved[rows], rows)
    return moved


defended = Experiment(
    "defence of a black box",
    arms={
        "ZO-AE-DS": partial(defend, coded=True),
        "ZO-AE-DS, random directions": partial(defend, coded=True, method="rge"),
        "ZO-DS": partial(defend, coded=False, method="rge"),
        "ZO-DS, coordinates": partial(defend, coded=False, steps=0.1),
        "FO-AE-DS": partial(defend, coded=True, exact=True),
        "FO-DS": partial(defend, coded=False, exact=True),
        "auto-encoder alone": partial(defend, coded=True, steps=0.0),
        "no defence": partial(defend, coded=False, steps=0.0),
    },
    metrics={
        "certified": Metric("accuracy certified at a radius of 0.25 (%)", percent=True),
        "certified_far": Metric("accuracy certified at a radius of 0.5 (%)", percent=True),
        "smoothed_accuracy": Metric("accuracy of the smoothed classifier (%)", percent=True),
        "test_accuracy": Metric("accuracy without noise (%)", percent=True),
        "queries": Metric("queries in training (thousands)", best="min"),
    },
    reads=("digits", "mnist"),
    cost=5.0,
)
pointing = Experiment(
    "direction of estimated gradients",
    arms={
        "coordinates, in the code": directions,
        "random directions, in the code": partial(directions, method="rge"),
        "random directions, in pixels": partial(directions, method="rge", coded=False),
    },
    metrics={"cosine": Metric("cosine with the true gradient")},
    reads=("digits", "mnist"),
    cost=1.0,
)

study = Study(
    paper="zo_ae_ds",
    entrants={"CGE attack": Attack(craft=coordinates, search={"mu": (0.01, 0.1), "step": (0.5, 1.0)})},
    on=[any_class],
    experiments=[defended, pointing],
    headline=Claim("ZO-AE-DS", beats="ZO-DS", on="certified", by=0.10, at=defended),
    claims=[
        Claim("ZO-AE-DS", beats="FO-AE-DS", on="certified", by=-0.05, at=defended),
        Claim("ZO-AE-DS", beats="ZO-AE-DS, random directions", on="certified", at=defended),
        Claim("ZO-AE-DS", beats="auto-encoder alone", on="certified", by=0.10, at=defended),
        Claim("ZO-AE-DS", beats="ZO-DS, coordinates", on="certified", by=0.10, at=defended),
        Claim("ZO-AE-DS", beats="FO-DS", on="certified", at=defended),
        Claim("ZO-AE-DS", beats="no defence", on="test_accuracy", by=-0.02, at=defended),
        Claim("coordinates, in the code", beats="random directions, in pixels", on="cosine", by=0.3, at=pointing),
        Claim("NES", beats="CGE attack", on="success_at_100", at=any_class),
    ],
)
