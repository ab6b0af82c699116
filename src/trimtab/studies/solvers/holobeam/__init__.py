"""HoloBeam against fixed-budget bandits over all beams and along each axis.

There are 441 beams where the surface is 10 wavelengths long, 40,401 where it is 100. Halving and rejects are the
standard methods for a fixed budget; over all beams they know nothing of the two axes, so that the headline is against
halving along each axis, with the same half of the pilots for each. Every contestant judges a beam by all of its pilots
so far, and all that search along axes start from the same beam, the centre's. Where the pilots are too few for each
beam, halving and rejects take part with as many beams as the pilots allow, drawn at random. Gains are shares of the
best beam's on the grid, mean over 100 receivers a seed; all contestants meet the same receivers. With 20 pilots to
start, random beams decide where the second parameter stands first.
"""

from __future__ import annotations

from functools import partial

from trimtab.solvers.bandits import (
    line_search_elimination,
    sequential_halving,
    successive_rejects,
    unimodal_elimination,
)
from trimtab.studies.engine.study import Budget, Claim, Experiment, Study
from trimtab.studies.solvers.holobeam.alignment import FAILURES, GAINS, Surface, along_axes, over_all

PER_AXIS = {
    "halving, each axis": along_axes(sequential_halving),
    "rejects, each axis": along_axes(successive_rejects),
    "golden sections, each axis": along_axes(line_search_elimination),
    "HoloBeam": along_axes(unimodal_elimination),
}
ON_441_BEAMS = {
    "halving, all beams": over_all(sequential_halving),
    **PER_AXIS,
    "HoloBeam, 20 pilots to start": along_axes(unimodal_elimination, init_pilots=20),
    "halving, each axis, 20 pilots to start": along_axes(sequential_halving, init_pilots=20),
}
TEN_SEEDS: dict[Budget, int] = {"smoke": 1, "laptop": 10, "paper": 10}

few, many, large = (
    Experiment(
        name,
        arms={one: partial(surface.gains, align=align) for one, align in methods.items()},
        metrics=GAINS,
        seeds=TEN_SEEDS,
        cost=1.0,
    )
    for name, surface, methods in (
        ("441 beams, 100 pilots", Surface(pilots=100), ON_441_BEAMS),
        ("441 beams, 300 pilots", Surface(), ON_441_BEAMS),
        ("40,401 beams, 300 pilots", Surface(k=100), PER_AXIS),
    )
)
failures = Experiment(
    "failures",
    arms={
        name: partial(Surface(pilots=100).failures, align=PER_AXIS[name]) for name in ("HoloBeam", "halving, each axis")
    },
    metrics=FAILURES,
    log="y",
    cost=4.5,
)

study = Study(
    paper="holobeam",
    experiments=[many, few, large, failures],
    headline=Claim("HoloBeam", beats="halving, each axis", on="gain", at=many),
    claims=[
        Claim("HoloBeam", beats="halving, all beams", on="gain", at=many),
        Claim("HoloBeam", beats="rejects, each axis", on="gain", at=many),
        Claim("HoloBeam", beats="golden sections, each axis", on="gain", at=many),
        Claim("HoloBeam", beats="halving, each axis", on="gain", at=few),
        Claim("HoloBeam", beats="rejects, each axis", on="gain", at=few),
        Claim("HoloBeam", beats="halving, each axis", on="gain", at=large),
        Claim(
            "HoloBeam",
            at_least=0.75,
            on="log_slope_ratio",
            at=failures,
            text="HoloBeam's failure rate falls exponentially in the pilots: from 300 to 500 of them its logarithm "
            "keeps at least three quarters of the slope from 100 to 300, where a power law keeps 46 %",
        ),
    ],
)
