"""Do small codebooks for each latent dimension and strong weight decay disentangle?

The paper trains convolutional networks for 200,000 steps on Shapes3D, MPI3D, Falcor3D and Isaac3D; here small dense
networks see factor images of our own for 2,000 steps. The authors' decay of 0.1 acts by its product with rate and
steps, which is 20 there; the decay of 10 in the grid has the same product. A pilot on another seed with decays of 0.1
to 1 and 3,000 steps had chosen its largest; the grid was moved before any run that counts. Ten values for each of ten
latents, weights of 0.01 and the spared codebooks and biases are the authors'. Quantized InfoGAN, the paper's other
model, is not run: `ScalarQuantizer.sample` draws what its generator takes. Codes of 16 to 49 bits have 3, 10 and 30
values for each of ten latents, or vectors in the VQ-VAE's codebook, with the decays that the search chose at ten.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.generative.qlae import QuantizedAutoencoder, decay_groups
from trimtab.generative.quantize import ScalarQuantizer
from trimtab.studies.engine.study import Claim, Curve, Experiment, Metric, Result, Study, Trial
from trimtab.studies.tasks.representation import Lesson, Representation, measure, shape_images, train
from trimtab.studies.tools.autoencoders import VQVAE


class QLAE(QuantizedAutoencoder):
    """As the task asks for it."""

    discrete = True

    def loss(self, x: Tensor, generator: torch.Generator) -> Tensor:  # type: ignore[override]
        return super().loss(x)

    def code(self, x: Tensor) -> Tensor:
        return self.encode(x)

    def reconstruct(self, x: Tensor) -> Tensor:
        return self(x).logits.sigmoid()  # type: ignore[no-any-return]


def model(lesson: Lesson) -> QLAE:
    """Ten values for each latent."""
    return made(lesson, ScalarQuantizer(lesson.latents))


def fixed_values(lesson: Lesson) -> QLAE:
    """The values stay where they start."""
    return made(lesson, ScalarQuantizer(lesson.latents, learnable=False))


def one_codebook(lesson: Lesson) -> QLAE:
    """All latents share their values."""
    quantizer = ScalarQuantizer(lesson.latents)
    quantizer.values = nn.Parameter(quantizer.values[:1].detach().clone())
    return made(lesson, quantizer)


def made(lesson: Lesson, quantizer: ScalarQuantizer) -> QLAE:
    """The auto-encoder with a quantizer."""
    return QLAE(lesson.encoder(lesson.latents), lesson.decoder(lesson.latents), quantizer)


def optimizer(model: Any, lesson: Lesson) -> torch.optim.Optimizer:
    """AdamW at the setting's decay, which spares codebooks."""
    return torch.optim.AdamW(decay_groups(model, float(lesson.setting.get("weight_decay", 0.0))), lr=1e-3, fused=True)


decays = {"weight_decay": (1.0, 3.0, 10.0)}
VALUES = (3, 10, 30)
Make = Callable[[Lesson, int], Any]
"""Makes an auto-encoder whose latents take so many values each."""


def of_values(lesson: Lesson, values: int) -> QLAE:
    """So many values for each latent."""
    return made(lesson, ScalarQuantizer(lesson.latents, values))


def vector_codes(lesson: Lesson, values: int, dim: int = 16) -> VQVAE:
    """Latents that share a codebook of so many vectors: as many bits."""
    numbers = lesson.latents * dim
    return VQVAE(lesson.encoder(numbers), lesson.decoder(numbers), lesson.latents, dim, num_codes=values)


def by_length(trial: Trial, make: Make, weight_decay: float) -> Result:
    """A code's modularity, explicitness and error by the bits that it takes; metrics are means over the lengths."""
    images = shape_images.images(trial)
    seen, steps = len(images.x) * 9 // 10, trial.pick(smoke=20, laptop=2_000, paper=100_000)
    lesson = Lesson(2 * images.factors.shape[1], seen, steps, {"weight_decay": weight_decay})
    found = []
    for done, values in enumerate(VALUES):
        learner = trial.seeded(lambda values=values: make(lesson, values))  # type: ignore[misc]
        train(learner, images.x[:seen], optimizer(learner, lesson), lesson, Trial(seed=trial.seed, budget=trial.budget))
        found.append(measure(learner, images, seen))
        trial.report((done + 1) / len(VALUES))
    bits = [lesson.latents * math.log2(values) for values in VALUES]
    held = {name: [one[name] for one in found] for name in LENGTHS}
    return Result(
        {name: sum(values) / len(values) for name, values in held.items()},
        {name: Curve(bits, values, x_label="bits of a code") for name, values in held.items()},
    )


LENGTHS = {
    "modularity": Metric("modularity, InfoM"),
    "explicitness": Metric("explicitness, InfoE"),
    "error": Metric("reconstruction error on unseen images (nats a pixel)", best="min"),
}

lengths = Experiment(
    "codes of 16 to 49 bits",
    arms={
        "QLAE": partial(by_length, make=of_values, weight_decay=3.0),
        "QLAE without decay": partial(by_length, make=of_values, weight_decay=0.0),
        "VQ-VAE": partial(by_length, make=vector_codes, weight_decay=1.0),
    },
    metrics=LENGTHS,
    cost=8.0,
)

study = Study(
    paper="qlae",
    entrants={"QLAE": Representation(model=model, optimizer=optimizer, search=decays)},
    controls={
        "QLAE without decay": Representation(model=model, optimizer=optimizer, search={}),
        "QLAE, one codebook": Representation(model=one_codebook, optimizer=optimizer, search=decays),
        "QLAE, fixed values": Representation(model=fixed_values, optimizer=optimizer, search=decays),
    },
    on=[shape_images],
    experiments=[lengths],
    headline=Claim("QLAE", beats="beta-TCVAE", on="modularity", by=0.1, at=shape_images),
    claims=[
        Claim("QLAE", beats="beta-VAE", on="modularity", by=0.1, at=shape_images),
        Claim("QLAE", beats="VQ-VAE", on="modularity", by=0.1, at=shape_images),
        Claim("QLAE", beats="beta-TCVAE", on="explicitness", at=shape_images),
        Claim("QLAE", below="beta-TCVAE", on="error", at=shape_images),
        Claim("QLAE", beats="QLAE without decay", on="modularity", by=0.05, at=shape_images),
        Claim("QLAE", beats="QLAE, one codebook", on="modularity", by=0.05, at=shape_images),
        Claim("QLAE", beats="auto-encoder", on="modularity", by=0.1, at=shape_images),
        Claim("QLAE", beats="VQ-VAE", on="modularity", by=0.1, at=lengths),
    ],
)
