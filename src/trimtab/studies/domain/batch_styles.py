"""Does contrastive learning forget the domain where all images of a view have one style?

The paper pre-trains on PACS, DomainNet and Camelyon17; here a small CNN sees 2,400 digits unlabelled for 300 steps of
64, over the smooth colours of three photo regions, and a linear probe on 240 of their labels is tested on digits over a
fourth region. All arms shift and turn each image for itself, jitter colours as SimCLR does (BSS alike for all images of
a view, the others each for itself), and have the same steps, learning rate and temperature (0.2), which nobody tuned.
Two views are compared. The paper's exact losses, range of areas and temperature were not at hand: negatives of the
anchor's own view are how the abstract and public summaries describe the coupling.

First trials on the seed of searches, with textured backgrounds, windows of up to the whole amplitude, the region of
leaves unseen and no jitter, left all arms at chance; textures were smoothed, windows made small, another region left
out and the jitter added, for all. Even so, one run each was below an encoder without any training, which is an arm for
that reason: at this length nobody has learnt much, and the order of the others says little about long training.

On the shared task, whose digits are of one domain, nothing is to be gained from one style a view, and no claim rests on
it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from trimtab import domain
from trimtab.data import load
from trimtab.domain.environments import DomainBatch
from trimtab.nets import small_cnn
from trimtab.ops.info_nce import nt_xent
from trimtab.semisup.views import weak_view
from trimtab.studies.engine.study import Claim, Experiment, Metric, Result, Study, Trial
from trimtab.studies.tasks.representation_learning import Pretraining, numerals
from trimtab.studies.tools.descent import descend, reported
from trimtab.studies.tools.pretraining import PreTraining
from trimtab.studies.tools.self_supervised import TwoViews
from trimtab.studies.tools.shifted_images import on_photos, resized

_TEMPERATURE = 0.2
_BATCH = 64
_NEIGHBOURS = 10
_AREA = (0.005, 0.1)
_STYLES = ("sky", "petals", "leaves", "temple")
"""Three that are trained on, among them dark ink and bright, and the unseen one."""


@dataclass(frozen=True)
class Recipe:
    """How views are made and compared.

    Attributes:
        style: makes one view of a batch from its shifted and turned images; None leaves styles alone.
        loss: compares embeddings of two views, one view after the other.
        alike: whether all images of a view have their colours jittered alike, or each for itself.
        trained: whether the encoder is trained at all.
    """

    style: Callable[[Tensor, torch.Generator], Tensor] | None
    loss: Callable[[Tensor], Tensor]
    alike: bool = False
    trained: bool = True


def own_styles(x: Tensor, generator: torch.Generator) -> Tensor:
    """The low amplitude of another image for each image."""
    return domain.fourier_augment(x, _AREA, bounds=(0.0, 1.0), generator=generator)


def one_style(x: Tensor, generator: torch.Generator) -> Tensor:
    """The low amplitude of one image for all."""
    return domain.batch_style_standardize(x, _AREA, bounds=(0.0, 1.0), generator=generator)


def jittered(x: Tensor, generator: torch.Generator, *, alike: bool) -> Tensor:
    """Another strength and offset of each channel, and a fifth of the images grey: SimCLR's jitter of colours."""
    rows = 1 if alike else len(x)
    gain, offset = (torch.rand(rows, x.shape[1], 1, 1, generator=generator) for _ in range(2))
    found = (0.4 + 1.2 * gain) * x + 0.4 * (offset - 0.5)
    grey = torch.rand(rows, 1, 1, 1, generator=generator) < 0.2
    return torch.where(grey, found.mean(1, keepdim=True), found).clamp(0, 1)


def of_all_views(z: Tensor) -> Tensor:
    """SimCLR's loss."""
    return nt_xent(z, 2, _TEMPERATURE)


def of_one_view(z: Tensor) -> Tensor:
    """SimCLR's loss with negatives of the anchor's view alone."""
    return domain.same_style_nt_xent(z, 2, _TEMPERATURE)


def styled(x: Tensor, style: str, generator: torch.Generator) -> Tensor:
    """Digits that invert the colours, without the texture, of random patches of a photo."""
    patches = on_photos(torch.zeros_like(x), style, generator=generator)
    return (resized(resized(patches, 2), x.shape[-1]) - x).abs()


def digits_in_styles(trial: Trial) -> DomainBatch:
    """Three sets of training digits and one of test digits, each in the style of another photo region."""
    data = load("digits" if trial.budget == "smoke" else "mnist")
    each = trial.pick(smoke=150, laptop=1000, paper=10_000)
    data = data.subset(3 * each, each, generator=trial.generator())
    x, x_test = (resized(part, 14) if part.shape[-1] > 14 else part for part in (data.x_train, data.x_test))
    parts = [*zip(x.split(each), data.y_train.split(each), strict=True), (x_test, data.y_test)]
    draws = trial.generator(2)
    return [(styled(x, style, draws), y) for (x, y), style in zip(parts, _STYLES, strict=True)]


def pretrain(recipe: Recipe, trial: Trial) -> Result:
    """Contrastive training without labels on three photo styles; a linear probe, tested on a fourth."""
    domains = digits_in_styles(trial)
    x = torch.cat([x[len(x) // 5 :] for x, _ in domains[:3]])
    encoder, projection = trial.seeded(lambda: start(tuple(x.shape[1:])))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *projection.parameters()], lr=2e-3, weight_decay=1e-3)
    order, draws = trial.generator(3), trial.generator(4)
    steps = trial.pick(smoke=20, laptop=300, paper=5000) if recipe.trained else 0

    def loss(step: int) -> Tensor:
        batch = x[torch.randint(len(x), (_BATCH,), generator=order)]
        views = [weak_view(batch, shift=0.15, degrees=15.0, generator=draws) for _ in range(2)]
        if recipe.style is not None:
            views = [recipe.style(view, draws) for view in views]
        views = [jittered(view, draws, alike=recipe.alike) for view in views]
        return recipe.loss(projection(encoder(torch.cat(views))))

    descend(optimizer, loss, reported(steps, trial.report))
    return judged(encoder.eval(), domains)


def start(shape: tuple[int, ...]) -> tuple[nn.Module, nn.Module]:
    """A new encoder and a new projection."""
    network = small_cnn(shape)
    width = network.feature_dim
    return network.features, nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 64))


@torch.no_grad()
def judged(encoder: nn.Module, domains: DomainBatch) -> Result:
    """A linear probe on a tenth of the labels, and how often nearest neighbours are of the same domain."""
    from sklearn.linear_model import LogisticRegression

    held = [(x[: len(x) // 5], y[: len(y) // 5]) for x, y in domains[:3]]
    tenths = [(x[len(x) // 5 :: 10], y[len(y) // 5 :: 10]) for x, y in domains[:3]]
    x, y = (torch.cat(parts) for parts in zip(*tenths, strict=True))
    features = encoder(x)
    mean, std = features.mean(0), features.std(0) + 1e-6
    probe = LogisticRegression(C=0.1, max_iter=300).fit(((features - mean) / std).numpy(), y.numpy())

    def accuracy(x: Tensor, y: Tensor) -> float:
        return float((probe.predict(((encoder(x) - mean) / std).numpy()) == y.numpy()).mean())

    return Result(
        {
            "accuracy": accuracy(*domains[3]),
            "source_accuracy": sum(accuracy(x, y) for x, y in held) / 3,
            "purity": purity([encoder(x) for x, _ in held]),
        }
    )


def purity(features: list[Tensor]) -> float:
    """Share of the nearest neighbours, by cosine, that are of the same domain."""
    z = nn.functional.normalize(torch.cat(features), dim=1)
    of = torch.cat([torch.full((len(part),), d) for d, part in enumerate(features)])
    similarity = (z @ z.T).fill_diagonal_(-2.0)
    nearest = similarity.topk(_NEIGHBOURS, dim=1).indices
    return float((of[nearest] == of[:, None]).float().mean())


unseen_style = Experiment(
    "an unseen photo style",
    {
        name: partial(pretrain, recipe)
        for name, recipe in {
            "BSS": Recipe(one_style, of_one_view, alike=True),
            "SimCLR": Recipe(None, of_all_views),
            "Fourier augmentation": Recipe(own_styles, of_all_views),
            "BSS, negatives of all views": Recipe(one_style, of_all_views),
            "negatives of one view alone": Recipe(None, of_one_view),
            "no training": Recipe(None, of_all_views, trained=False),
        }.items()
    },
    {
        "accuracy": Metric("accuracy on the unseen style (%)", percent=True),
        "source_accuracy": Metric("accuracy on source styles (%)", percent=True),
        "purity": Metric("neighbours of the same domain (%)", best="min", percent=True),
    },
    reads=("mnist",),
    cost=3.0,
)


class OneStyleViews(TwoViews):
    """SimCLR whose views have one style each, and whose negatives are of the anchor's view."""

    def loss(self, x: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
        views = [one_style(self.lesson.view(x, generator), generator) for _ in range(2)]
        z = torch.cat([self.project(view) for view in views])
        return domain.same_style_nt_xent(z, 2, self.lesson.option("temperature", 0.5))


def no_style(task: Pretraining) -> str:
    """Why it cannot enter a variant."""
    return "a table has no Fourier amplitude" if task.dataset == "adult" else ""


study = Study(
    paper="batch_styles",
    entrants={
        "SimCLR + BSS": PreTraining(
            learner=OneStyleViews, search={"lr": (1e-3, 4e-3, 1.6e-2), "temperature": (0.2, 0.5)}, unfit=no_style
        )
    },
    on=[numerals],
    experiments=[unseen_style],
    headline=Claim("BSS", beats="Fourier augmentation", on="accuracy", at=unseen_style),
    claims=[
        Claim("BSS", beats="SimCLR", on="accuracy", by=0.02, at=unseen_style),
        Claim("BSS", below="SimCLR", on="purity", by=0.05, at=unseen_style),
        Claim("BSS", below="Fourier augmentation", on="purity", at=unseen_style),
        Claim("BSS", beats="BSS, negatives of all views", on="accuracy", at=unseen_style),
        Claim("BSS", beats="negatives of one view alone", on="accuracy", at=unseen_style),
        Claim("BSS", beats="SimCLR", on="source_accuracy", by=-0.02, at=unseen_style),
        Claim("BSS", beats="no training", on="accuracy", at=unseen_style),
    ],
)
