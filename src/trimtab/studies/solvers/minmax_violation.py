"""The search for discrete values of least worst error against rounding, GPTQ and a mixed-integer solver."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.solvers.minmax_violation import minmax_violation
from trimtab.studies.study import Claim, Study
from trimtab.studies.tasks.discrete_minmax import (
    DiscreteMinmax,
    Instance,
    branch_and_bound,
    gptq,
    least_squares,
    rounding,
)


def search(instance: Instance) -> Tensor:
    """`minmax_violation` as it comes; with 4 searches for each output of a layer, as in `quantize_layer`."""
    restarts = 32 if instance.weights is None else 4
    found = minmax_violation(instance.A, instance.b, instance.levels, start=instance.weights, restarts=restarts)
    return torch.as_tensor(found.x)


PROVEN = {f"{taps} taps": DiscreteMinmax(taps=taps, known=True) for taps in (25, 33)}
LONG = {"41 taps": DiscreteMinmax(taps=41)}
LAYERS = {f"{bits} bits": DiscreteMinmax("network", bits=bits) for bits in (3, 4)}
PICTURES = {"pictures": DiscreteMinmax("tomography")}

SOLVERS = {
    "rounding": (rounding, PROVEN | LONG | LAYERS | PICTURES),
    "least squares": (least_squares, PICTURES),
    "GPTQ": (gptq, PROVEN | LONG | LAYERS),
    "HiGHS to the proof": (branch_and_bound(120.0), PROVEN),
    "HiGHS for 5 s": (branch_and_bound(5.0), LONG | PICTURES),
    "DMMV": (search, PROVEN | LONG | LAYERS | PICTURES),
}

study = Study(
    paper="minmax_violation",
    arms={
        f"{name}, {where}": task.solve(solver)
        for name, (solver, tasks) in SOLVERS.items()
        for where, task in tasks.items()
    },
    claims=[
        *(
            Claim(
                f"DMMV, {where}",
                at_most=0.7,
                on="violation",
                text=f"{where}: the search's worst error is at least 30 % below rounding's",
            )
            for where in PROVEN | LONG | LAYERS
        ),
        *(Claim(f"DMMV, {where}", at_most=0.05, on="gap") for where in PROVEN),
        *(Claim(f"DMMV, {where}", below=f"HiGHS to the proof, {where}", on="seconds", times=10) for where in PROVEN),
        Claim("DMMV, 41 taps", below="HiGHS for 5 s, 41 taps", on="worst_error"),
        Claim(
            "DMMV, pictures",
            below="HiGHS for 5 s, pictures",
            on="worst_error",
            by=-0.025,
            text="pictures: the search's worst error is no more than 0.025, 5 % of the largest error there is, above "
            "that of HiGHS in 5 s",
        ),
        *(Claim(f"DMMV, {where}", below=f"GPTQ, {where}", on="violation", times=1.16) for where in LAYERS),
        *(Claim(f"DMMV, {where}", beats=f"GPTQ, {where}", on="accuracy") for where in LAYERS),
        Claim(
            "DMMV, pictures",
            below="least squares, pictures",
            on="wrong_pixels",
            by=0.01,
            text="The search's pictures have fewer wrong pixels than rounded least squares, by 1 % of all or more",
        ),
    ],
    leaderboard=["rounding, 25 taps", "GPTQ, 25 taps", "HiGHS to the proof, 25 taps", "DMMV, 25 taps"],
    seeds={"laptop": 5},
    notes="A seed is an instance: the edges of a filter's bands, a picture and its errors, or a network's training. "
    "Rounding starts from the best continuous values (for a layer, its weights). GPTQ's rounding is one of the "
    "search's starts, so that the search cannot be worse than it on the inputs of the first layer, while the accuracy "
    "on other images can. All quantise a layer on the same grid (an output's smallest to largest weight) from the same "
    "512 images, for the inputs that the layers quantised before it give. Seconds are processor time of one thread, "
    "the relaxation's included where it is solved; HiGHS stops at its proof of optimality. The paper's networks are "
    "language models, its solver Gurobi.",
)
