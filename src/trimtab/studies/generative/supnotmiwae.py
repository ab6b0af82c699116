"""Does a classifier trained with the model that fills the holes classify better, and what does hiding values add?

The paper classifies clinical records and activities by transformers and reports areas under curves; here speakers are
told apart by utterances, and digits by their rows, with small convolutional networks, after 60 % of the values were
taken away, large ones the likelier: the odds of being missing grow e-fold with a deviation (at first twice as steeply
in the exponent; it was halved after a smoke run). GRU-D and the classifier with the mask shown may also read from the
mask alone, which is telling here. Dropout (30 %), the latent process and the blending with the last value are the
authors'; 5 latents in training (10 there), 10 with 5 fillings each in testing (20 with 30 there). All learn by the same
number of steps at the same rate, which nobody tuned; after one run on another seed the steps on digits were doubled,
for all. For not-MIWAE, and for all that fill first, the same classifier is trained on the mean filling. Of the paper's
rivals GRU-D and not-MIWAE are re-run; SAITS, which fills by attention, is not.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.tasks.imputation import Imputer, rows, voices
from trimtab.studies.tools.series import Fitted, Holed, Lesson
from trimtab.studies.tools.series_imputers import deep_imputer, filler


def joint(lesson: Lesson, *, rate: float = 0.3, missingness: bool = True) -> Fitted:
    """supnotMIWAE with its authors' rate of dropout and their latent process, or without a part of it."""
    series, draws = lesson.series, lesson.trial.generator(7)
    net = deep_imputer(lesson, missingness=missingness, rate=rate)

    def loss(index: Tensor) -> Tensor:
        part = series[index]
        return net.loss(part.x, part.mask, lesson.y[index], valid=part.valid, generator=draws)["total"]

    def probs(part: Holed) -> Tensor:
        net.num_latents = 10
        generator = lesson.trial.generator(8)
        return net.predict(part.x, part.mask, valid=part.valid, num_imputations=5, generator=generator).probs

    lesson.train(net, loss)
    return Fitted(filler(net, lesson), torch.no_grad()(probs))


study = Study(
    paper="supnotmiwae",
    entrants={"supnotMIWAE": Imputer(fit=joint)},
    controls={
        "without ObsDropout": Imputer(fit=partial(joint, rate=0.0)),
        "without a model of what is missing": Imputer(fit=partial(joint, missingness=False)),
    },
    on=[voices, rows],
    headline=Claim("supnotMIWAE", beats="GRU-D", on="accuracy", at=voices),
    claims=[
        Claim("supnotMIWAE", below="without ObsDropout", on="rmse", at=voices),
        Claim("supnotMIWAE", beats="without ObsDropout", on="accuracy", at=voices),
        Claim("supnotMIWAE", below="without a model of what is missing", on="rmse", at=voices),
        Claim("supnotMIWAE", below="GRU-D", on="ece", at=voices),
        Claim("supnotMIWAE", beats="not-MIWAE", on="accuracy", at=voices),
        Claim("supnotMIWAE", beats="mean, mask shown", on="accuracy", at=rows),
        Claim("supnotMIWAE", below="interpolation", on="rmse", at=voices),
    ],
)
