"""HoloBeam against fixed-budget bandits over all beams and along each axis."""

from __future__ import annotations

from trimtab.solvers.bandits import (
    line_search_elimination,
    sequential_halving,
    successive_rejects,
    unimodal_elimination,
)
from trimtab.studies.study import Claim, Study
from trimtab.studies.tasks.beam_alignment import SNRS, BeamAlignment, along_axes, over_all

METHODS = {
    "halving, all beams": over_all(sequential_halving),
    "rejects, all beams": over_all(successive_rejects),
    "halving, each axis": along_axes(sequential_halving),
    "rejects, each axis": along_axes(successive_rejects),
    "golden sections, each axis": along_axes(line_search_elimination),
    "HoloBeam": along_axes(unimodal_elimination),
    "HoloBeam, 20 pilots to start": along_axes(unimodal_elimination, init_pilots=20),
    "halving, each axis, 20 pilots to start": along_axes(sequential_halving, init_pilots=20),
}

TASKS = {
    "100 pilots": BeamAlignment(pilots=100),
    "300 pilots": BeamAlignment(pilots=300),
    "201 x 201 beams": BeamAlignment(k=100, pilots=300),
}

failures = BeamAlignment(pilots=100, follow="failures")

study = Study(
    paper="holobeam",
    arms={
        **{f"{name}, {where}": task.align(align) for where, task in TASKS.items() for name, align in METHODS.items()},
        "HoloBeam, failures": failures.align(METHODS["HoloBeam"]),
        "halving, each axis, failures": failures.align(METHODS["halving, each axis"]),
    },
    claims=[
        *(
            Claim(f"HoloBeam, {where}", beats=f"{other}, {where}", on=f"gain_at_{snr}_db")
            for where in TASKS
            for other in ("halving, all beams", "halving, each axis")
            for snr in SNRS
        ),
        Claim(
            "HoloBeam, failures",
            at_least=0.75,
            on="log_slope_ratio",
            text="HoloBeam's failure rate falls exponentially in the pilots: the slope of its logarithm keeps at least "
            "three quarters from 300 to 500 of them that it has from 100 to 300, where a power law keeps 46 %",
        ),
    ],
    seeds={"laptop": 5},
    plot=[f"{name}, 300 pilots" for name in METHODS],
    leaderboard=[f"{name}, 300 pilots" for name in METHODS],
    notes="There are 441 beams where the surface is 10 wavelengths long, 40,401 where it is 100. Every contestant "
    "judges a beam by all of its pilots so far, and all that search along axes start from the same beam, the centre's. "
    "Where the pilots are too few for each beam, halving and rejects take part with as many beams as the pilots allow, "
    "drawn at random. Gains are shares of the best beam's on the grid, mean over 150 receivers a seed; all contestants "
    "meet the same receivers. With 20 pilots to start, random beams decide where the second parameter stands first.",
)
