"""Tokenizers of small garment images, the frozen encoder they may align with, and the probe that judges their codes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.data import load
from trimtab.generative import AutoregressiveProbe, Tokenizer1D, codebook_use
from trimtab.nets import Classifier, mlp
from trimtab.studies.engine.picture import Picture
from trimtab.studies.engine.study import Curve, Metric, Result, Trial
from trimtab.studies.tools.descent import descent_step
from trimtab.studies.tools.sample_quality import frechet_distance

SIDE, GRID, TOKENS, CODES, FEATURES = 16, 4, 8, 128, 32

metrics = {
    "ar_frechet": Metric("Frechet distance of the probe's samples", best="min"),
    "ar_loss": Metric("the probe's loss on unseen images (nats a token)", best="min"),
    "accuracy": Metric("linear probe accuracy (%)", percent=True),
    "error": Metric("reconstruction error (mean square, of the variance) (%)", best="min", percent=True),
    "reconstruction_frechet": Metric("Frechet distance of reconstructions", best="min"),
    "used": Metric("codes used (%)", percent=True),
}


@dataclass(frozen=True)
class Garments:
    """Images of 16 x 16 pixels with their classes: to learn from, others for the frozen encoder, and for testing."""

    x: Tensor
    y: Tensor
    x_frozen: Tensor
    x_test: Tensor
    y_test: Tensor

    @classmethod
    def of(cls, trial: Trial) -> Garments:
        """Those of a run; at the smoke budget digits."""
        data = load(trial.pick(smoke="digits", laptop="fashion_mnist", paper="fashion_mnist"))
        seen, test = trial.pick(smoke=(400, 200), laptop=(4_000, 1_000), paper=(30_000, 10_000))

        def small(x: Tensor) -> Tensor:
            halves = (
                F.pad(F.avg_pool2d(x, 2), (1, 1, 1, 1)) if x.shape[-1] == 28 else F.interpolate(x, size=(SIDE, SIDE))
            )
            return halves * 2 - 1

        order = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(0))
        first, second = order[:seen], order[seen : 2 * seen]
        return cls(
            small(data.x_train[first]),
            data.y_train[first],
            small(data.x_train[second]),
            small(data.x_test[:test]),
            data.y_test[:test],
        )


def batches(size: int, steps: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows of so many batches, drawn at random."""
    for _ in range(steps):
        yield torch.randint(size, (batch,), generator=generator)


def optimize(
    module: nn.Module, loss: Callable[[Tensor], Tensor], rows: Iterator[Tensor], steps: int, lr: float = 2e-3
) -> list[float]:
    """Train in place by AdamW with a cosine; gives the losses."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    values = []
    module.train()
    for taken in rows:
        values.append(descent_step(optimizer, loss(taken), clip=1.0))
        schedule.step()
    module.eval()
    return [float(value) for value in values]


def frozen_network(side: int = SIDE) -> nn.Sequential:
    """From images to a 4 x 4 grid of features."""
    halve, keep = {"kernel_size": 4, "stride": 2, "padding": 1}, {"kernel_size": 3, "padding": 1}
    return nn.Sequential(
        nn.Conv2d(1, 16, **keep),  # type: ignore[arg-type]
        nn.ReLU(),
        nn.Conv2d(16, FEATURES, **halve),  # type: ignore[arg-type]
        nn.ReLU(),
        nn.Conv2d(FEATURES, FEATURES, **(halve if side == SIDE else keep)),  # type: ignore[arg-type]
    )


def contrasted(x: Tensor, steps: int) -> dict[str, Tensor]:
    """The frozen encoder's weights: it learns without labels to tell which two views are of one image."""
    generator = torch.Generator().manual_seed(5)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        network = frozen_network(x.shape[-1])
        head = nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, FEATURES))

    def view(images: Tensor) -> Tensor:
        """Moved by up to two pixels, mirrored, and of another contrast."""
        moved = torch.roll(images, torch.randint(-2, 3, (2,), generator=generator).tolist(), (2, 3))
        flip = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
        contrast = 0.6 + 0.8 * torch.rand(len(images), 1, 1, 1, generator=generator)
        noise = 0.1 * torch.randn(images.shape, generator=generator)
        return torch.where(flip, moved.flip(3), moved) * contrast + noise

    def loss(rows: Tensor) -> Tensor:
        one, two = (F.normalize(head(network(view(x[rows])).mean((2, 3))), dim=1) for _ in range(2))
        scores = one @ two.T / 0.2
        match = torch.arange(len(rows))
        return F.cross_entropy(scores, match) + F.cross_entropy(scores.T, match)

    optimize(nn.ModuleList([network, head]), loss, batches(len(x), steps, 128, generator), steps)
    return network.state_dict()


@torch.no_grad()
def targets(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The frozen encoder's features, centred: directions are aligned, and most of them would be what all share."""
    frozen = frozen_network(x.shape[-1])
    frozen.load_state_dict(weights)
    features = frozen(x).flatten(2).transpose(1, 2)
    return features - features.mean((0, 1))  # type: ignore[no-any-return]


def judge_weights(x: Tensor, y: Tensor, steps: int) -> dict[str, Tensor]:
    """A classifier in whose features distances are measured."""
    generator = torch.Generator().manual_seed(6)
    with torch.random.fork_rng():
        torch.manual_seed(6)
        classifier = mlp(SIDE * SIDE, (128, 32), 10)
    optimize(
        classifier, lambda r: F.cross_entropy(classifier(x[r]), y[r]), batches(len(x), steps, 64, generator), steps
    )
    return classifier.state_dict()


def tokenizer(width: int, encoder_depth: int, decoder_depth: int, semantic: float, entropy: float) -> Tokenizer1D:
    """A tokenizer of some size; torch's global state decides its weights."""
    return Tokenizer1D(
        nn.Sequential(nn.Conv2d(1, 24, 3, padding=1), nn.SiLU(), nn.Conv2d(24, width, 4, stride=4)),
        nn.Sequential(nn.ConvTranspose2d(width, 24, 4, stride=4), nn.SiLU(), nn.Conv2d(24, 1, 3, padding=1)),
        side=GRID,
        width=width,
        num_tokens=TOKENS,
        num_codes=CODES,
        target_dim=FEATURES,
        encoder_depth=encoder_depth,
        decoder_depth=decoder_depth,
        align_depth=2,
        semantic_weight=semantic,
        entropy_weight=entropy,
    )


def run(
    trial: Trial, *, width: int, encoder_depth: int, decoder_depth: int, semantic: float = 0.0, entropy: float = 0.0
) -> Result:
    """Train a tokenizer, then a probe on its codes, and judge both."""
    data = Garments.of(trial)
    steps = trial.pick(smoke=4, laptop=400, paper=20_000)
    probe_steps = trial.pick(smoke=4, laptop=300, paper=20_000)
    shared = trial.pick(smoke=4, laptop=400, paper=5_000)
    weights = trial.cached(lambda: contrasted(data.x_frozen, shared), key=f"garments, {shared} contrasts")
    target = targets(data.x, weights)

    model = trial.seeded(lambda: tokenizer(width, encoder_depth, decoder_depth, semantic, entropy))
    losses = optimize(
        model,
        lambda r: model.loss(data.x[r], target[r] if semantic else None),
        batches(len(data.x), steps, 48, trial.generator(1)),
        steps,
    )
    trial.report(0.7)
    with torch.no_grad():
        codes, unseen = model.encode(data.x), model.encode(data.x_test)
        again = model.decode(unseen)

    probe = trial.seeded(lambda: AutoregressiveProbe(CODES, TOKENS, 10, dim=48), stream=2)
    noise = trial.generator(3)
    optimize(
        probe,
        lambda r: probe.loss(codes[r], data.y[r], generator=noise),
        batches(len(codes), probe_steps, 128, trial.generator(2)),
        probe_steps,
    )
    judge = mlp(SIDE * SIDE, (128, 32), 10)
    judge.load_state_dict(trial.cached(lambda: judge_weights(data.x, data.y, shared), key=f"garments, judge, {shared}"))
    with torch.no_grad():
        made = model.decode(probe.sample(data.y_test, generator=trial.generator(4)))
        measured = {
            "ar_frechet": distance(judge, made, data.x_test),
            "ar_loss": probe.loss(unseen, data.y_test).item(),
            "accuracy": linear_accuracy(probe.features(codes), data.y, probe.features(unseen), data.y_test),
            "error": float((again - data.x_test).square().mean() / data.x_test.var()),
            "reconstruction_frechet": distance(judge, again, data.x_test),
            "used": codebook_use(unseen, CODES).share,
        }
    chosen = [int((data.y_test == label).nonzero()[k]) for k in range(3) for label in range(10)]
    every = max(1, steps // 20)
    return Result(
        measured,
        {"loss": Curve([float(k + 1) for k in range(0, steps, every)], losses[::every], x_label="step")},
        pictures={"the probe's samples, by class": Picture.grid(made[chosen, 0] / 2 + 0.5)},
    )


@torch.no_grad()
def distance(judge: Classifier, images: Tensor, others: Tensor) -> float:
    """The Fréchet distance in the judge's features, scaled so that those of real images have variance one."""
    real = judge.eval().features(others)
    scale = real.var(0).mean().sqrt()
    own, real = (judge.features(images) / scale).double(), (real / scale).double()
    return frechet_distance(own, real.mean(0), torch.cov(real.T))


def linear_accuracy(features: Tensor, labels: Tensor, unseen: Tensor, their_labels: Tensor) -> float:
    """Of logistic regression on standardised features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    model.fit(features.numpy(), labels.numpy())
    return float(model.score(unseen.numpy(), their_labels.numpy()))
