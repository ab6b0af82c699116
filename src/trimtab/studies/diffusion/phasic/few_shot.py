"""A diffusion model of digits, adapted to ten of another style, and judged on translations of unseen digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.data import load
from trimtab.diffusion import Discrete, VPCosine
from trimtab.diffusion.phasic import ContentFused, ContentFusion, PhasicAdapter, fusion_loss, translate
from trimtab.diffusion.phasic.losses import Form
from trimtab.nets.denoising_mlp import TimeEmbedding
from trimtab.studies.engine.picture import Picture
from trimtab.studies.engine.study import Curve, Metric, Result, Trial
from trimtab.studies.tools.descent import descend, descent_step
from trimtab.studies.tools.sample_quality import frechet_distance
from trimtab.studies.tools.trained_once import trained_once

METRICS = {
    "agreement": Metric("translations of the source's class (%)", percent=True),
    "diversity": Metric("distance between translations nearest to the same shot"),
    "frechet": Metric("Frechet distance to unseen target images", best="min"),
}
STEPS, SHOWN = 25, (3, 6, 12, 25)
"""Of the translations that count, and of those that are shown over the evaluations they take."""


@dataclass(frozen=True)
class Recipe:
    """What of the method is used.

    Attributes:
        form: of the weights.
        transfer: whether content and style are transferred at all; plain fine-tuning otherwise.
        directional: weight of the directional loss.
        fuse: whether the source's features are shown.
        guide: whether translation holds the coarse structure.
    """

    form: Form = "paper"
    transfer: bool = True
    directional: float = 1.0
    fuse: bool = True
    guide: bool = True


class Network(nn.Module):
    """Two resolutions of convolutions, with the noise level at the bottleneck."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.enter = nn.Sequential(_conv(1, width), _conv(width, width))
        self.down = _conv(width, 2 * width)
        self.inner = nn.Sequential(_conv(2 * width, 2 * width), _conv(2 * width, 2 * width))
        self.time = TimeEmbedding(2 * width)
        self.middle = nn.Sequential(_conv(2 * width, 2 * width), nn.ConvTranspose2d(2 * width, width, 2, 2))
        self.leave = nn.Sequential(_conv(2 * width, width), nn.Conv2d(width, 1, 3, padding=1))

    def encode(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Features of 4 x 4, and those of 8 x 8."""
        outer = self.enter(x)
        inner = self.down(F.avg_pool2d(outer, 2)) + self.time(t / 1000)[:, :, None, None]
        return inner + self.inner(inner), outer

    def decode(self, features: Tensor, rest: Tensor, t: Tensor) -> Tensor:
        """The clean image."""
        predicted: Tensor = self.leave(torch.cat([self.middle(features), rest], dim=1))
        return predicted


def _conv(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(4, after), nn.SiLU())


class Classifier(nn.Module):
    """A classifier whose features and maps are looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = _conv(1, 16), _conv(16, 32)
        self.feature = nn.Sequential(nn.Flatten(), nn.Linear(32 * 16, 64), nn.SiLU())
        self.head = nn.Linear(64, 10)

    def maps(self, x: Tensor) -> list[Tensor]:
        """The maps of two layers."""
        first = self.first(x)
        return [first, self.second(F.avg_pool2d(first, 2))]

    def features(self, x: Tensor) -> Tensor:
        """What the classes are read from."""
        found: Tensor = self.feature(self.maps(x)[1])
        return found

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x))
        return logits


class Blind(ContentFused):
    """The same, never shown a source."""

    def forward(self, x: Tensor, t: Tensor, source: Tensor | None = None, **drawn: object) -> Tensor:
        return super().forward(x, t)


SCHEDULE = Discrete(VPCosine().alpha(torch.linspace(0.001, 0.99, 1000, dtype=torch.float64)) ** 2)


def style(x: Tensor) -> Tensor:
    """Thicker strokes of less contrast, on a ground that brightens to the right."""
    strokes = (F.max_pool2d(x, 3, stride=1, padding=1) + x) / 2
    return 0.6 * strokes + 0.4 * torch.linspace(-1, 1, x.shape[-1])


def _model(kind: type[ContentFused] = ContentFused) -> ContentFused:
    return kind(Network(), ContentFusion(32), SCHEDULE, prediction="x0")


def _fit(module: nn.Module, loss: Callable[[int], Tensor], steps: int) -> None:
    """Trains by Adam with a rate that falls to zero."""
    optimizer = torch.optim.Adam(module.parameters(), lr=2e-3)
    descend(optimizer, loss, range(steps), anneal=torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps))


def _classifier(
    trial: Trial, x: Tensor, y: Tensor, change: Callable[[Tensor, torch.Generator], Tensor], name: str
) -> Classifier:
    """Trained on images that are changed at random, once for all arms of a seed."""
    steps = trial.pick(smoke=2, laptop=400, paper=5000)
    model, draws = trial.seeded(Classifier, 5), trial.generator(5)

    def loss(step: int) -> Tensor:
        rows = torch.randint(len(x), (64,), generator=draws)
        return F.cross_entropy(model(change(x[rows], draws)), y[rows])

    key = f"classifier of {name} digits {steps} steps seed {trial.seed}"
    return trained_once(trial, model, lambda: _fit(model, loss, steps), key=key).eval().requires_grad_(False)


def _any_contrast(x: Tensor, draws: torch.Generator) -> Tensor:
    return x * (2 * torch.rand(len(x), 1, 1, 1, generator=draws) - 1) + 0.2 * torch.randn(
        len(x), 1, 1, 1, generator=draws
    )


def _of_the_target(x: Tensor, draws: torch.Generator) -> Tensor:
    return style(x) + 0.1 * torch.randn(x.shape, generator=draws)


def _source_model(trial: Trial, x: Tensor, fuse: bool) -> ContentFused:
    """The model of the source with its fusion trained, once for all arms of a seed."""
    steps = trial.pick(smoke=2, laptop=1500, paper=20_000)

    def build() -> ContentFused:
        model, draws = trial.seeded(_model), trial.generator(1)

        def plain(step: int) -> Tensor:
            x0 = x[torch.randint(len(x), (32,), generator=draws)]
            t = 999 * torch.rand(len(x0), generator=draws)
            noise = torch.randn(x0.shape, generator=draws)
            return (model(SCHEDULE.add_noise(x0, noise, t), t) - x0).abs().mean()  # type: ignore[no-any-return]

        def fused(step: int) -> Tensor:
            x0 = x[torch.randint(len(x), (32,), generator=draws)]
            return fusion_loss(model, x0, 999 * torch.rand(len(x0), generator=draws), generator=draws)

        _fit(model.network, plain, steps)
        _fit(model.fusion, fused, steps // 4)
        return model

    key = f"digits with content fusion {steps} steps seed {trial.seed}"
    return trained_once(trial, _model(ContentFused if fuse else Blind), build, key=key)


def adapt(trial: Trial, recipe: Recipe) -> Result:
    """Adapts the model of the source to ten target images and translates unseen digits."""
    data = load("digits")
    x, x_test = (part * 2 - 1 for part in (data.x_train, data.x_test))
    order = torch.randperm(len(x), generator=trial.generator(2))
    shots, source, labels = style(x[order[:10]]), x[order[10:]], data.y_train[order[10:]]
    model = _source_model(trial, source, recipe.fuse and recipe.transfer)
    trial.report(0.5)
    known = _classifier(trial, source, labels, _any_contrast, "any")
    steps = trial.pick(smoke=2, laptop=400, paper=2000)
    weight = 1.0 if recipe.transfer else 0.0
    rule = PhasicAdapter(
        model,
        torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.99)),
        features=known.features,
        maps=known.maps,
        shots=shots,
        source=source,
        form=recipe.form,
        transfer_weights=(weight * recipe.directional, weight),
    )
    draws = trial.generator(3)
    for _ in range(steps):
        rows = torch.randint(len(source), (16,), generator=draws)
        repeated = shots[torch.randint(len(shots), (16,), generator=draws)]
        if recipe.transfer:
            rule.step(source[rows], repeated, generator=draws)
        else:
            _fine_tune(model, rule.optimizer, repeated, draws)
    trial.report(0.8)
    count = trial.pick(smoke=4, laptop=200, paper=400)
    judge = _classifier(trial, x, data.y_train, _of_the_target, "target")
    wanted = judge.features(style(x_test[count:])).double()

    def translated(steps: int) -> tuple[Tensor, int]:
        """Translations in so many steps, and the evaluations of the network that one takes."""
        calls: list[None] = []
        counter = model.register_forward_hook(lambda *_: calls.append(None))
        made = translate(
            model.eval(),
            x_test[:count],
            torch.linspace(600, 0, steps + 1),
            t_guide=300.0 if recipe.guide else None,
            factor=2,
            generator=trial.generator(4),
        ).clamp(-1, 1)
        counter.remove()
        return made, len(calls)

    def judged(made: Tensor) -> dict[str, float]:
        found = judge.features(made)
        return {
            "agreement": float((judge(made).argmax(1) == data.y_test[:count]).double().mean()),
            "diversity": _diversity(found, judge.features(shots)),
            "frechet": frechet_distance(found.double(), wanted.mean(0), torch.cov(wanted.T)),
        }

    runs = {steps: translated(steps) for steps in SHOWN}
    made = runs[STEPS][0]
    spent, measured = [cost for _, cost in runs.values()], [judged(images) for images, _ in runs.values()]
    sheet = torch.cat([x_test[:10], made[:10], shots])[:, 0] / 2 + 0.5
    return Result(
        measured[SHOWN.index(STEPS)],
        {name: Curve(spent, [one[name] for one in measured], x_label="evaluations") for name in METRICS},
        pictures={"sources, translations, the ten shots": Picture.grid(sheet.clamp(0, 1))},
    )


def _fine_tune(model: ContentFused, optimizer: torch.optim.Optimizer, shots: Tensor, draws: torch.Generator) -> None:
    """A step of plain denoising of the target images, at all times alike."""
    t = 999 * torch.rand(len(shots), generator=draws)
    noise = torch.randn(shots.shape, generator=draws)
    descent_step(optimizer, (model(SCHEDULE.add_noise(shots, noise, t), t) - shots).abs().mean())


def _diversity(found: Tensor, shots: Tensor) -> float:
    """The mean distance between translations that are nearest to the same shot, over shots with two or more."""
    nearest = torch.cdist(found, shots).argmin(1)
    inner = [torch.pdist(found[nearest == k]).mean() for k in range(len(shots)) if (nearest == k).sum() > 1]
    return float(torch.stack(inner).mean()) if inner else 0.0
