"""Does a network of marginals give in one evaluation what an any-order model needs one a token for?

The paper trains on binary MNIST, text and molecules, and on an Ising model of 10 x 10 sites; here the images are digits
of 8 x 8 pixels, and the lattice has 4 x 4 sites, so that its marginals are exact by enumeration. Half of the training
steps go to the conditionals, half to the marginals, whose network starts from the conditionals' weights and is the sum
of a score for each known token. An any-order model has all steps for its conditionals on the shared task, and the same
conditionals as MaM where parts of sequences are compared, of half of the tokens. In a step of the second stage one
token of the model's own samples is drawn anew, to save passes; the authors draw four.

The likelihood on the task is that of the marginals of whole sequences, less the logarithm of their sum, which is
estimated by importance sampling from 1,000 of the model's own samples: marginals that are too large everywhere do not
pass for a gain. On digits nobody knows the true marginals; ranks are compared with the mean over 16 orders. That one
evaluation is faster than 32 is arithmetic, so that the headline asks whether it says the same; the time is a further
claim. On the lattice MaM's two rules and the any-order model, whose reverse divergence takes an evaluation a site, have
the same number of network passes; the weight of consistency, 4, is the authors'. An Ising model of twice the coupling
was tried before the study was set up: there reverse KL collapses to one sign of the magnetisation, as it is known to.
"""

from __future__ import annotations

from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.generative.mam.lattice import lattice
from trimtab.studies.generative.mam.parts import chain_parts, digit_parts, fit
from trimtab.studies.tasks.discrete_sequences import SequenceModel, binary_digits, markov_chain

study = Study(
    paper="mam",
    entrants={"MaM": SequenceModel(fit=fit)},
    on=[binary_digits, markov_chain],
    experiments=[digit_parts, chain_parts, lattice],
    headline=Claim(
        "MaM",
        at_least=0.9,
        on="rank_correlation",
        at=digit_parts,
        text="In one evaluation MaM's log-marginals of half an image have a rank correlation of at least 0.9 with the "
        "any-order model's, which takes an evaluation for each known pixel and order",
    ),
    claims=[
        Claim("MaM", below="any-order model", on="seconds", times=10, at=digit_parts),
        Claim("MaM", beats="independent tokens", on="rank_correlation", by=0.1, at=digit_parts),
        Claim("MaM", below="any-order model", on="error", by=-0.2, at=chain_parts),
        Claim("MaM", below="independent tokens", on="error", at=chain_parts),
        Claim("MaM", below="masked, ancestral", on="nll", by=-0.02, at=binary_digits),
        Claim("MaM", below="masked, ancestral", on="frechet", at=binary_digits),
        Claim("MaM, KL", below="any-order model, KL", on="divergence", at=lattice),
        Claim("MaM, KL", below="MaM, FM", on="divergence", at=lattice),
    ],
)
