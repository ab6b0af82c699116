"""Private-GSD against relaxed projection, a tree and independent columns, on queries with and without a gradient."""

from __future__ import annotations

import warnings

from sklearn.exceptions import ConvergenceWarning

from trimtab.solvers.private_gsd import Table, genetic_search
from trimtab.studies.study import Claim, Study
from trimtab.studies.tasks.private_tables import (
    EPSILONS,
    PrivateTable,
    PrivateTables,
    independent,
    relaxed_projection,
    tree,
)


def private_gsd(private: PrivateTable) -> Table:
    """The genetic search with the authors' settings, cut off after a number of generations."""
    answers = private.measure(private.statistic)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return genetic_search(
            [private.statistic],
            [answers],
            private.domain,
            private.trial.pick(smoke=100, laptop=1000, paper=2000),
            max_generations=private.trial.pick(smoke=500, laptop=30_000, paper=2_000_000),
            generator=private.generator,
        ).table


QUERIES = {kind: PrivateTables(queries=kind) for kind in ("marginals", "prefixes", "halfspaces")}
METHODS = {
    "Private-GSD": lambda private: private_gsd(private),
    "RAP": relaxed_projection(),
    "independent": independent(),
}

study = Study(
    paper="private_gsd",
    arms={
        **{f"{name}, {kind}": task.synthesise(one) for kind, task in QUERIES.items() for name, one in METHODS.items()},
        "tree, marginals": QUERIES["marginals"].synthesise(tree()),
    },
    claims=[
        *[
            Claim(
                "Private-GSD, marginals",
                below="RAP, marginals",
                on=f"mean_error_at_{epsilon:g}",
                times=1 / 1.1,
                text=f"Private-GSD, marginals: mean error at {epsilon:g} is at most a tenth above RAP's",
            )
            for epsilon in EPSILONS
        ],
        *[
            Claim(f"Private-GSD, {kind}", below=f"RAP, {kind}", on=f"{what}_error_at_{epsilon:g}")
            for kind in ("prefixes", "halfspaces")
            for what, chosen in (("mean", EPSILONS), ("max", (1.0,)))
            for epsilon in chosen
        ],
        Claim("Private-GSD, marginals", below="tree, marginals", on="mean_error_at_1"),
        Claim("Private-GSD, marginals", below="independent, marginals", on="mean_error_at_1"),
    ],
    leaderboard=["Private-GSD, marginals", "RAP, marginals", "tree, marginals", "independent, marginals"],
    log="xy",
    notes="The 48,842 people of the Adult table; delta is one over the square of their number. Marginals are those of "
    "all 78 pairs of 13 columns, numbers in public bins. Prefixes and halfspaces are 50 conditions each on 5 columns "
    "of numbers, drawn by the seed without a look at the table, within each value of 4 categorical columns: prefixes "
    "have two uniform thresholds; halfspaces have normal directions and go through uniform points, where the authors "
    "draw offsets. Private-GSD, RAP and the tree of a seed see the same noisy answers, with the budget in equal "
    "parts for each pair or condition and column; independent columns spend all of it on one histogram for each "
    "column. Private-GSD has the authors' settings with 1,000 rows and stops after 30,000 generations at the latest, "
    "where they let it run. RAP has 1,000 relaxed rows, 400 steps of Adam for marginals and 1,200 for others, where "
    "the steps of conditions become sigmoids of sharpness 2 to 1,024; of the learning rates 0.1, 0.3 and 1, which fall "
    "to zero, every table takes the one that comes nearest to the noisy answers (0.03 was worse for all three kinds of "
    "queries on another seed). RAP, the tree and independent columns are drawn "
    "at 20,000 rows. Errors are absolute, against the true answers. Queries, noise and draws change with the seed.",
)
