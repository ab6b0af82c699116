"""The min-max violation search beside SciPy's HiGHS, and bandits by the pilots that they need."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.timing import medians
from trimtab.solvers import FarFieldChannel, holobeam, sequential_halving, unimodal_elimination
from trimtab.solvers.minmax_violation import minmax_violation
from trimtab.studies.engine.study import Trial
from trimtab.studies.solvers.minmax_violation.instances import Filter, Instance, highs, tomography

TIME_AIM, GAP_AIM = 10, 0.05
EQUAL_SECONDS = 5.0


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Seconds to HiGHS's proof and the gap to it, values at equal seconds, and the cost of a beam search."""
    trial = Trial(budget="smoke" if quick else "laptop")
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if quick else 2)
    try:
        for taps in (13,) if quick else (25, 33, 37):
            yield from _against_proof(f"{taps} taps of 8 bits", Filter(taps=taps).instance(trial))
        limit = 0.5 if quick else EQUAL_SECONDS
        yield _at_equal_seconds("picture, 4 projections", tomography(trial)[0], limit)
        size = (20, 8) if quick else (150, 60)
        generator = torch.Generator().manual_seed(0)
        A = torch.randn(*size, generator=generator, dtype=torch.float64)
        b = math.sqrt(size[1]) * torch.randn(1, size[0], generator=generator, dtype=torch.float64)
        levels = torch.arange(-2, 3).double().expand(1, size[1], -1)
        yield _at_equal_seconds(
            f"random, {size[0]} rows, {size[1]} variables of 5 levels", Instance(A, b, levels), limit
        )
        yield _beams(3 if quick else 30)
    finally:
        torch.set_num_threads(threads)


def _against_proof(where: str, instance: Instance) -> Iterator[dict[str, object]]:
    best, proven = highs(instance, 300.0)
    found = minmax_violation(instance.A, instance.b, instance.levels)
    optimum, ours = float(instance.violation(best)), float(found.value)
    seconds = medians(
        {
            "ours": lambda: minmax_violation(instance.A, instance.b, instance.levels),
            "peer": lambda: highs(instance, 300.0),
        },
        repeats=3,
        warmup=0,
    )
    ratio, gap = seconds["ours"] / seconds["peer"], ours / optimum - 1
    yield {
        "what": f"DMMV against HiGHS to its proof, {where}",
        "ours": 1e3 * seconds["ours"],
        "peer": 1e3 * seconds["peer"],
        "ratio": ratio,
        "unit": "ms",
        "aim": f"at most 1/{TIME_AIM}",
        "met": TIME_AIM * ratio <= 1,
        "note": f"{len(instance.A)} rows, {found.n_steps} steps of 32 searches" + ("" if proven else "; no proof"),
    }
    yield {
        "what": f"DMMV against the optimum, {where}",
        "ours": ours,
        "peer": optimum,
        "ratio": ours / optimum,
        "unit": "worst error",
        "aim": f"at most {1 + GAP_AIM:g}",
        "met": gap <= GAP_AIM if proven else None,
    }


def _at_equal_seconds(where: str, instance: Instance, seconds: float) -> dict[str, object]:
    found = minmax_violation(instance.A, instance.b, instance.levels, max_steps=10**6, time_limit=seconds)
    best, proven = highs(replace(instance), seconds)
    ours, peer = float(found.value), float(instance.violation(best))
    return {
        "what": f"DMMV against HiGHS in {seconds:g} s, {where}",
        "ours": ours,
        "peer": peer,
        "ratio": ours / peer,
        "unit": "worst error",
        "aim": "at most 1",
        "met": ours <= peer * (1 + 1e-9),
        "note": f"relaxation {float(found.bound):.4g}" + ("; HiGHS proved its optimum" if proven else ""),
    }


def _beams(repeats: int) -> dict[str, object]:
    """Time of the algorithms themselves, at equal pilots."""
    generator = torch.Generator().manual_seed(0)
    measure = FarFieldChannel(10, 10, 0.32, -0.17, snr_db=45).pilots(generator)
    seconds = medians(
        {
            "ours": lambda: holobeam(measure, 10, 10, 300, identify=unimodal_elimination),
            "peer": lambda: holobeam(measure, 10, 10, 300, identify=sequential_halving),
        },
        repeats=repeats,
    )
    return {
        "what": "HoloBeam against sequential halving on each axis, 300 pilots of 441 beams",
        "ours": 1e3 * seconds["ours"],
        "peer": 1e3 * seconds["peer"],
        "ratio": seconds["ours"] / seconds["peer"],
        "unit": "ms",
        "note": "the simulated pilots included",
    }
