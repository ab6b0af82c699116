"""Does a generator get better as its own discriminator, where further likelihood training does not help it?

The paper tunes EDM, EDM2 and VAR on images, each round in less than a hundredth of the pretraining. Here a small
diffusion model has four fifths, and a small autoregressive one, whose samples take an evaluation a token, three fifths
of the allowance of the others for likelihood training, and rounds of DDO within the rest, which also pays for the
reference's samples and its evaluations: what they are compared with has had likelihood training throughout. The weight
of the reference's samples is 2 for diffusion and 1 for sequences; beta, which has to suit the size of log-likelihoods,
is chosen among four values, for images among two beside two rates of the likelihood training, the paper's being 0.01
to 0.1 for log-likelihoods that are fifty times as large.

Rounds are not ended early by a look at the Frechet distance, as the authors do. In a first result the likelihood
training of images had one rate, while its rivals chose, most of them a larger one. In a trial run, on a seed of its
own, the diffusion model had three fifths too, and a round of images 512 samples of the reference, and it fell behind;
to be nearer to the authors' set-up, rounds were made shorter and samples as many as the data before the study was run.
The equations are from third-party accounts of the paper; its training code is not public.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from trimtab.studies.diffusion.ddo.images import tuned_diffusion
from trimtab.studies.diffusion.ddo.sequences import tuned_autoregressive
from trimtab.studies.engine.study import Claim, Study, Task
from trimtab.studies.tasks.digits_generation import Generator, digits
from trimtab.studies.tasks.discrete_sequences import SequenceModel, binary_digits, markov_chain

BETAS = (0.05, 0.2, 1.0, 4.0)


def entered(rounds: int) -> dict[Task[Any], Any]:
    """DDO in so many rounds, where it can enter."""
    sequences = SequenceModel(fit=partial(tuned_autoregressive, rounds=rounds), search={"beta": BETAS})
    images = Generator(fit=partial(tuned_diffusion, rounds=rounds), search={"lr": (1.5e-3, 5e-3), "beta": BETAS[1:3]})
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
)
