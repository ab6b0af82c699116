"""How many samples find the subspaces of data: low-rank denoiser, K-subspaces, a plain network; and edits of digits.

Data of the paper's kind: two orthogonal subspaces of 3 or 6 dimensions in 48, no noise, equal weights; once more in 96
dimensions. Numbers of samples go over 1, 4/3, 5/3, 2, 3 and 4 to a dimension; counted is the least from which on both
subspaces are within 0.3 of the truth (8 where even 4 are not enough). The theorem is about the minimiser of the loss,
which has many local minima: of seven random starts and one near the truth the one with the least training loss is kept;
the arm with random starts alone says so. K-subspaces has 100 random starts, which take less time. Gating is soft, as
the exact denoiser's; the theorem for several subspaces decides by the clean samples. The network is a small fully
connected one in place of the authors' U-Net.

Numbers of starts, steps and noisy copies were chosen after a look at two seeds. On digits the middle noise level is 1,
with pixels in [-1, 1]; the paper edits faces at 0.7 of its schedule, and shows them. Built from the released code and
summaries of the paper; its full text was not at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from trimtab.studies.diffusion.subspace_clustering.digit_edits import EDITED, RANKED, edit_digits, ranks
from trimtab.studies.diffusion.subspace_clustering.subspaces import (
    DENOISED,
    RECOVERED,
    by_k_subspaces,
    by_low_rank,
    by_network,
    by_samples,
    cluster,
    denoise,
    k_subspaces,
    low_rank,
    recover,
)
from trimtab.studies.engine.study import Budget, Claim, Experiment, Study
from trimtab.studies.tasks.clustering import Clustering, digits

SEEDS: Mapping[Budget, int] = {"smoke": 1, "laptop": 5, "paper": 20}

recovery = Experiment(
    "two subspaces",
    arms={
        "low-rank denoiser": partial(recover, find=low_rank),
        "low-rank denoiser, random starts": partial(recover, find=partial(low_rank, near=False)),
        "K-subspaces": partial(recover, find=k_subspaces),
    },
    metrics=RECOVERED,
    seeds=SEEDS,
    cost=9.0,
)

denoising = Experiment(
    "denoising unseen samples",
    arms={
        "low-rank denoiser": partial(denoise, learn=by_low_rank),
        "K-subspaces": partial(denoise, learn=by_k_subspaces),
        "network": partial(denoise, learn=by_network),
        "training samples": partial(denoise, learn=by_samples),
    },
    metrics=DENOISED,
    seeds=SEEDS,
    log="xy",
    cost=3.0,
)

rank = Experiment(
    "rank of the Jacobian on digits",
    arms={
        "network": partial(ranks, model="network"),
        "mixture fitted to digits": partial(ranks, model="mixture"),
        "one Gaussian": partial(ranks, model="gaussian"),
    },
    metrics=RANKED,
    seeds=SEEDS,
    reads=("digits",),
    log="x",
    cost=4.0,
)

edits = Experiment(
    "edits of digits",
    arms={
        "Jacobian's directions": partial(edit_digits, directions="jacobian"),
        "principal components": partial(edit_digits, directions="pca"),
        "random directions": partial(edit_digits, directions="random"),
    },
    metrics=EDITED,
    seeds=SEEDS,
    reads=("digits",),
    cost=2.0,
)

study = Study(
    paper="subspace_clustering",
    entrants={"K-subspaces": Clustering(fit=cluster)},
    on=[digits],
    experiments=[recovery, denoising, rank, edits],
    headline=Claim("low-rank denoiser", at_most=2.0, on="samples_per_rank", at=recovery),
    claims=[
        Claim("low-rank denoiser", at_most=1.5, on="growth", at=recovery),
        Claim("low-rank denoiser", at_most=1.5, on="ambient", at=recovery),
        Claim("low-rank denoiser", below="K-subspaces", on="samples_per_rank", by=-1 / 3, at=recovery),
        Claim("low-rank denoiser, random starts", below="K-subspaces", on="samples_per_rank", by=-1 / 3, at=recovery),
        Claim("low-rank denoiser", below="network", on="excess_2", times=2, at=denoising),
        Claim("network", at_most=0.25, on="excess_64", at=denoising),
        Claim("network", at_most=16, on="rank", at=rank),
        Claim("Jacobian's directions", below="principal components", on="distance", at=edits),
    ],
)
