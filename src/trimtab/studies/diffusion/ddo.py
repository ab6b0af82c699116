"""Does a generator get better as its own discriminator, where further likelihood training does not help it?"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.diffusion import (
    EDMPreconditioned,
    SelfPlay,
    autoregressive_log_ratio,
    deis,
    diffusion_log_ratio,
    grids,
    lognormal_levels,
)
from trimtab.nets import MADE
from trimtab.studies.engine.study import Claim, Study, Task
from trimtab.studies.tasks.digits_generation import Generator, Sample, digits, guided
from trimtab.studies.tasks.discrete_sequences import (
    Fitted,
    SequenceModel,
    autoregressive_network,
    binary_digits,
    left_to_right,
    markov_chain,
    sequence_log_prob,
)
from trimtab.studies.tasks.discrete_sequences import Lesson as Sequences
from trimtab.studies.tools.digit_generation import BATCH, Images, Labels, Lesson, diffusion_model

IMAGES, SEQUENCES = 0.8, 0.6
"""Shares of the allowance for likelihood training; the rounds have the rest, which samples of sequences use up."""
POOL = 512
"""Sequences of the reference that a round draws beforehand; of images it draws as many as there are data."""
EVALUATIONS = 10


def denoise(model: EDMPreconditioned, labels: Labels, evaluations: int, generator: torch.Generator) -> Images:
    """DDIM without guidance."""
    x = model.schedule.prior(len(labels), 1, 8, 8, generator=generator)
    return deis(guided(model, labels, 1.0), x, grids.karras(model.schedule, evaluations), order=0)


def tuned_diffusion(lesson: Lesson, *, rounds: int = 2) -> Sample:
    """A diffusion model, tuned in rounds within the same allowance."""
    model = diffusion_model(lesson, share=IMAGES).requires_grad_(True)
    generator = lesson.trial.generator(40)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
    pool: list[tuple[Images, Labels]] = []

    def log_ratio(model: nn.Module, reference: nn.Module, batch: _Batch) -> Tensor:
        t = lognormal_levels(len(batch), generator=generator)
        noise = torch.randn(batch.images.shape, generator=generator)
        weight = model.weight(t)  # type: ignore[operator]
        return diffusion_log_ratio(model, reference, batch.images, t, noise, batch.labels, weight=weight)  # type: ignore[arg-type]

    def sample(reference: nn.Module, count: int) -> _Batch:
        images, labels = pool[-1]
        chosen = torch.randint(len(images), (count,), generator=generator)
        return _Batch(images[chosen], labels[chosen])

    beta = float(lesson.trial.setting.get("beta", 0.2))
    rule = SelfPlay(model, optimizer, log_ratio, sample, alpha=2.0, beta=beta)
    # Both groups forward and backward, and the reference on both; a round pays for its samples.
    left = int((1 - IMAGES) * lesson.allowance) // rounds - len(lesson.images) * EVALUATIONS
    steps = max(1, left // (8 * BATCH))
    for _ in range(rounds):
        rule.next_round()
        with torch.no_grad():
            drawn = denoise(rule.reference, lesson.labels, EVALUATIONS, generator)  # type: ignore[arg-type]
        pool.append((drawn, lesson.labels))
        for images, labels in lesson.batches(steps, generator):
            rule.step(_Batch(images, labels))
    return torch.no_grad()(partial(_from, model.eval()))


def _from(model: EDMPreconditioned, labels: Labels, evaluations: int, generator: torch.Generator) -> Images:
    return denoise(model, labels, evaluations, generator)


class _Batch:
    """Images and their classes."""

    def __init__(self, images: Images, labels: Labels) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)


def tuned_autoregressive(lesson: Sequences, *, rounds: int = 2) -> Fitted:
    """A model that goes from left to right, tuned in rounds within the same number of passes."""
    first = int(SEQUENCES * lesson.steps)
    model = autoregressive_network(lesson, first)
    generator = lesson.trial.generator(40)
    pool: list[Tensor] = []

    def log_ratio(model: nn.Module, reference: nn.Module, tokens: Tensor) -> Tensor:
        return autoregressive_log_ratio(model(tokens), reference(tokens), tokens)

    def sample(reference: nn.Module, count: int) -> Tensor:
        return pool[-1][torch.randint(POOL, (count,), generator=generator)]

    def tune() -> MADE:
        beta = float(lesson.trial.setting.get("beta", 0.3))
        rule = SelfPlay(model, lesson.optimizer(model.parameters(), 2e-4), log_ratio, sample, beta=beta)
        # A training step has three passes of a batch, a step of tuning eight, a sample one a token.
        left = 3 * lesson.batch_size * (lesson.steps - first) // rounds - POOL * lesson.length
        steps = max(1, left // (8 * lesson.batch_size))
        for turn in range(rounds):
            rule.next_round()
            pool.append(left_to_right(rule.reference, POOL, generator))  # type: ignore[arg-type]
            for batch in lesson.batches(steps, stream=turn + 1):
                rule.step(batch)
        return model.eval()

    tune()
    return Fitted(
        lambda count, evaluations, generator: left_to_right(model, count, generator),
        lambda tokens, generator: sequence_log_prob(model, tokens),
        [model],
        fewest=lesson.length,
    )


BETAS = (0.05, 0.2, 1.0)


def entered(rounds: int) -> dict[Task[Any], Any]:
    """DDO in so many rounds, where it can enter."""
    sequences = SequenceModel(fit=partial(tuned_autoregressive, rounds=rounds), search={"beta": BETAS})
    images = Generator(fit=partial(tuned_diffusion, rounds=rounds), search={"lr": (1.5e-3,), "beta": BETAS})
    return {digits: images, binary_digits: sequences, markov_chain: sequences}


study = Study(
    paper="ddo",
    entrants={"DDO": entered(2)},
    controls={"DDO, one round": entered(1)},
    on=[digits, binary_digits, markov_chain],
    headline=Claim("DDO", below="diffusion, DDIM", on="frechet_10", at=digits),
    claims=[
        Claim("DDO", below="diffusion, CFG", on="frechet_10", at=digits),
        Claim("DDO", beats="diffusion, DDIM", on="precision", at=digits),
        Claim("DDO", beats="diffusion, DDIM", on="recall", by=-0.02, at=digits),
        Claim("DDO", below="DDO, one round", on="frechet_10", at=digits),
        Claim("DDO", below="autoregressive", on="frechet", at=binary_digits),
        Claim("DDO", below="autoregressive", on="nll", at=binary_digits),
        Claim("DDO", below="autoregressive", on="frechet", at=markov_chain),
    ],
    notes="The paper tunes EDM, EDM2 and VAR on images, each round in less than a hundredth of the pretraining. Here a "
    "small diffusion model has four fifths, and a small autoregressive one, whose samples take an evaluation a token, "
    "three fifths of the allowance of the others for likelihood training, and rounds of DDO within the rest, which "
    "also pays for the reference's samples and its evaluations: what they are compared with has had likelihood "
    "training throughout. The weight of the reference's samples is 2 for diffusion and 1 for sequences; beta, which "
    "has to suit the size of log-likelihoods, is chosen among three values, the paper's being 0.01 to 0.1 for "
    "log-likelihoods that are fifty times as large. Rounds are not ended early by a look at the Frechet distance, as "
    "the authors do; the likelihood training of the diffusion model has the middle one of the three rates among which "
    "its rivals choose. In a trial run, on a seed of its own, the diffusion model had three fifths too, and a round of "
    "images 512 samples of the reference, and it fell behind; to be nearer to the authors' set-up, rounds were made "
    "shorter and samples as many as the data before the study was run. The equations are from third-party accounts of "
    "the paper; its training code is not public.",
)
