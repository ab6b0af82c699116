"""How many predictions does one perturbation change that was crafted without any data?

The paper attacks ImageNet networks at 10/255 for up to 40,000 steps and checks on images of another set; here a CNN of
three convolutions has learnt 2,700 images of clothes of 14 x 14 pixels, the radius is 0.1, and everybody has 150 steps
of Adam at a fifteenth of the radius, seven times the authors' rate. The best of twelve checks on held-out images is
kept, for noise too. Prior images are not augmented. The data prior here is the training set itself. On the shared task
the perturbation is crafted on the attacker's CNN, and its random noise may be drawn anew until it fools. After one run
without data and one with images, steps were halved and the rate doubled, for time.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.ops.attack import random_in_ball
from trimtab.robust import GDUAP, fooling_rate
from trimtab.studies.engine.picture import Picture
from trimtab.studies.engine.study import Claim, Curve, Experiment, Metric, Result, Study, Trial
from trimtab.studies.tasks.black_box import Attack, any_class
from trimtab.studies.tools.images import some_images
from trimtab.studies.tools.oracle import Scene
from trimtab.studies.tools.surrogates import attackers_cnn, trained, victim

_XI = 0.1
_STEPS = {"smoke": 12, "laptop": 150, "paper": 10_000}
Prior = Literal["range", "images"] | None


def craft(model: nn.Module, images: Tensor, held: Tensor, trial: Trial, *, prior: Prior = None) -> Tensor:
    """GD-UAP; with prior "images" it sees the training images, without their labels."""
    attack = GDUAP(
        model,
        _XI,
        prior=images if prior == "images" else prior,
        mean=float(images.mean()),
        std=float(images.std()),
        lr=_XI / 15,
        steps=_STEPS[trial.budget],
        check_every=max(1, _STEPS[trial.budget] // 12),
    )
    return attack.craft(images.shape[1:], validation=held, generator=trial.generator(2)).delta


def noise(model: nn.Module, images: Tensor, held: Tensor, trial: Trial, *, signs: bool = True) -> Tensor:
    """The best, on held-out images, of as many random draws as crafting makes checks."""
    draws = [random_in_ball(held[:1], _XI, generator=trial.generator(20 + k)) for k in range(12)]
    draws = [_XI * draw.sign() for draw in draws] if signs else draws
    return max(draws, key=lambda delta: fooling_rate(model, delta, held))


def gradient_ascent(model: nn.Module, images: Tensor, held: Tensor, trial: Trial) -> Tensor:
    """A perturbation that needs data: Adam climbs the cross-entropy against the network's own predictions."""
    generator, steps = trial.generator(2), _STEPS[trial.budget]
    delta = random_in_ball(held[:1], _XI, generator=generator)
    optimizer = torch.optim.Adam([delta], lr=_XI / 15)
    for _ in range(steps):
        x = images[torch.randint(len(images), (25,), generator=generator)]
        delta.requires_grad_()
        loss = -F.cross_entropy(model((x + delta).clamp(0, 1)), model(x).argmax(1))
        (delta.grad,) = torch.autograd.grad(loss, delta)
        delta.requires_grad_(False)
        optimizer.step()
        delta.clamp_(-_XI, _XI)
    return delta


def fool(make: object, trial: Trial) -> Result:
    """Craft a perturbation of one network, try it on unseen images, and on another network."""
    data = some_images(trial, "fashion_mnist", smoke=(300, 60), laptop=(3000, 500))
    x, x_test = data.x_train, data.x_test
    count, epochs = len(x) // 10, trial.pick(smoke=2, laptop=5, paper=20)
    key = f"{data.name}, {len(x)} images of seed {trial.seed}"
    own, other = (
        trained(
            trial,
            partial(network, data.in_shape, data.num_classes),
            x[count:],
            data.y_train[count:],
            data.num_classes,
            epochs=epochs,
            lr=2e-3,
            stream=stream,
            key=key,
        )
        for stream, network in enumerate((attackers_cnn, victim))
    )
    delta = make(own, x[count:], x[:count], trial)  # type: ignore[operator]
    rates = [fooling_rate(network, share * delta, x_test) for network in (own, other) for share in (1.0, 0.5)]
    return Result(
        {
            "fooling": rates[0],
            "fooling_by_half": rates[1],
            "transfer": rates[2],
            "saturation": float((delta.abs() >= _XI * (1 - 1e-6)).float().mean()),
        },
        {"fooling": Curve([0.0, _XI / 2, _XI], [0.0, rates[1], rates[0]], "largest change of a pixel")},
        pictures={
            "perturbation, and images with it": Picture.grid(
                torch.cat([delta[:, 0] / (2 * _XI) + 0.5, (x_test[:9] + delta)[:, 0].clamp(0, 1)])
            )
        },
    )


def universal(scene: Scene, *, prior: Prior = None) -> Tensor:
    """One perturbation for all victims, crafted on the attacker's own CNN; no query is made."""
    attack = GDUAP(
        scene.cnn,
        scene.eps,
        prior=scene.own_x if prior == "images" else prior,
        lr=scene.eps / 15,
        steps=150 if scene.budget >= 1000 else 12,
        check_every=12,
    )
    found = attack.craft(scene.x.shape[1:], validation=scene.own_x[:200], generator=scene.generator)
    return scene.inside(scene.x + found.delta)


fooled = Experiment(
    "one perturbation for all images",
    arms={
        "GD-UAP, no data": partial(fool, craft),
        "GD-UAP, range prior": partial(fool, partial(craft, prior="range")),
        "GD-UAP, images": partial(fool, partial(craft, prior="images")),
        "gradient ascent, images": partial(fool, gradient_ascent),
        "random signs": partial(fool, noise),
        "uniform noise": partial(fool, partial(noise, signs=False)),
    },
    metrics={
        "fooling": Metric("predictions changed (%)", percent=True),
        "fooling_by_half": Metric("predictions changed by half of it (%)", percent=True),
        "transfer": Metric("predictions of another network changed (%)", percent=True),
        "saturation": Metric("pixels at the edge of the ball (%)", best=None, percent=True),
    },
    reads=("digits", "fashion_mnist"),
    cost=4.0,
)

study = Study(
    paper="gd_uap",
    entrants={
        "GD-UAP, no data": Attack(craft=universal, search={}),
        "GD-UAP, own images": Attack(craft=partial(universal, prior="images"), search={}),
    },
    on=[any_class],
    experiments=[fooled],
    headline=Claim("GD-UAP, no data", beats="random signs", on="fooling", by=0.10, at=fooled),
    claims=[
        Claim("GD-UAP, range prior", beats="GD-UAP, no data", on="fooling", at=fooled),
        Claim("GD-UAP, images", beats="GD-UAP, range prior", on="fooling", at=fooled),
        Claim("GD-UAP, no data", beats="random signs", on="transfer", by=0.05, at=fooled),
        Claim("gradient ascent, images", beats="GD-UAP, images", on="fooling", at=fooled),
        Claim("GD-UAP, images", beats="gradient ascent, images", on="transfer", at=fooled),
        Claim("random signs", beats="uniform noise", on="fooling", at=fooled),
        Claim("GD-UAP, own images", beats="example image", on="success", at=any_class),
        Claim("MI-FGSM, own CNN", beats="GD-UAP, own images", on="success", at=any_class),
    ],
)
