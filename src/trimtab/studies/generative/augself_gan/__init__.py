"""Does a discriminator that reads how images were augmented help where there are few of them?

The paper trains BigGAN and StyleGAN2 on a tenth and a fifth of CIFAR for days; here small networks see 120 digits of
8 x 8 pixels, at equal steps, so that AugSelf's cost twice the discriminator's passes. Weights are the authors' (1 and
1), and the layers that read are spectrally normalised like theirs; images of one channel are augmented in brightness
and contrast, translation and cutout, all of which are read. LeCam's weight is 0.1, and on the few digits the learning
rate is 0.001 for all; nobody tuned them. To save time the networks were narrowed from 32 channels to 24 and the steps
cut from 800 to 500 after a first trial. The gap is the share of real images that the discriminator believes, of those
it trains on less that of unseen ones. On the shared task contestants may make equally many passes through networks, of
which AugSelf-GAN makes 22 for an image in a step and DiffAugment 13; a GAN's images cost one evaluation and get no
better by more.
"""

from __future__ import annotations

from functools import partial

import torch

from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.generative.augself_gan.few_images import few_digits
from trimtab.studies.generative.augself_gan.training import RULES, Makings, start, train
from trimtab.studies.tasks.digits_generation import Generator, Sample, digits
from trimtab.studies.tools.digit_generation import Images, Labels, Lesson

_BATCH = 32
# Passes of an image in a step of both networks, forward and backward. In the discriminator's step a generated image is
# made, and both are seen augmented, by AugSelf also as they are; in the generator's one is made and seen likewise.
_PASSES = {"AugSelf": (8, 7), "DiffAugment": (5, 4)}


def adversarial(lesson: Lesson, *, rule: str) -> Sample:
    """A generative adversarial network, trained by one of the rules; more evaluations than one do it no good."""
    trial = lesson.trial
    makings = partial(Makings, lesson.images.shape[-1], lesson.num_classes, lesson.lr, trial.generator(11))
    trained = trial.seeded(lambda: start(RULES[rule](makings())))
    forward, backward = _PASSES[rule]
    steps = lesson.steps(forward=forward, backward=backward, batch=_BATCH)
    for images, labels in lesson.batches(steps, trial.generator(10), _BATCH):
        train(trained, images, labels)

    def sample(labels: Labels, evaluations: int, generator: torch.Generator) -> Images:
        return trained.sample(labels, generator)

    return sample


study = Study(
    paper="augself_gan",
    entrants={"AugSelf-GAN": Generator(fit=partial(adversarial, rule="AugSelf"))},
    controls={"GAN, DiffAugment": Generator(fit=partial(adversarial, rule="DiffAugment"))},
    on=[digits],
    experiments=[few_digits],
    headline=Claim("AugSelf", below="DiffAugment", on="frechet", at=few_digits),
    claims=[
        Claim("AugSelf", below="DiffAugment", on="gap", at=few_digits),
        Claim("AugSelf", below="DiffAugment, LeCam", on="frechet", at=few_digits),
        Claim("AugSelf", below="the same target for both", on="frechet", at=few_digits),
        Claim("AugSelf", beats="DiffAugment", on="recall", at=few_digits),
        Claim("DiffAugment", below="no augmentation", on="frechet", at=few_digits),
        Claim("AugSelf-GAN", below="GAN, DiffAugment", on="frechet", at=digits),
        Claim("AugSelf-GAN", below="flow matching", on="frechet_10", at=digits),
    ],
)
