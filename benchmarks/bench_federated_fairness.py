"""The decomposition of disparities beside dit, the usual package for partial information decomposition."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from benchmarks.timing import medians
from trimtab.federated import disparities_from_table


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds for a table of two groups, two predictions and a few clients."""
    for clients in (2,) if quick else (2, 5):
        p = np.random.default_rng(0).dirichlet(np.ones(4 * clients)).reshape(2, 2, clients)
        ours = partial(disparities_from_table, p)
        calls: dict[str, Callable[[], object]] = {"ours": ours}
        if importlib.util.find_spec("dit") is not None:
            calls["dit"] = partial(_unique_of_dit, p)
        taken = medians(calls, 1 if quick else 5)
        row = {"what": f"disparities of 2 groups and {clients} clients", "ours": 1e3 * taken["ours"], "unit": "ms"}
        if "dit" not in taken:
            yield {**row, "note": "dit is not installed"}
            continue
        apart, ratio = abs(ours().unique - _unique_of_dit(p)), taken["ours"] / taken["dit"]
        note = f"against dit, from which unique disparity differs by {apart:.1e} bits"
        yield {**row, "peer": 1e3 * taken["dit"], "ratio": ratio, "aim": "0.02", "met": ratio <= 0.02, "note": note}


def _unique_of_dit(p: np.ndarray) -> float:
    import dit

    names = [f"{y}{chr(97 + s)}{z}" for z, y, s in np.ndindex(p.shape)]
    joint = dit.Distribution(names, p.reshape(-1))
    return float(dit.pid.PID_BROJA(joint, [[0], [1]], [2]).get_pi(((0,),)))
