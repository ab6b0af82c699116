"""Samples of a masked model by the first-hitting sampler, over the same by the ancestral sampler in many steps."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.timing import medians
from trimtab.diffusion import ancestral, first_hitting
from trimtab.nets import MaskedMLP

LENGTH, VALUES, STEPS_PER_TOKEN = 64, 512, 16


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds for a batch; the ancestral sampler is the library's own, which skips calls that change nothing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from _samplers(values=16 if quick else VALUES, repeats=1 if quick else 5, length=8 if quick else LENGTH)
    finally:
        torch.set_num_threads(threads)


def _samplers(values: int, repeats: int, length: int) -> Iterator[dict[str, object]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MaskedMLP(length, values, hidden=128).eval()
    mask = model.mask_id
    for batch, aim in ((16, 0.1), (1, 1.0)):
        start, steps = torch.full((batch, length), mask), STEPS_PER_TOKEN * length
        # As wrong by simultaneous draws as a sixteenth of a token a step: as good as the first-hitting sampler.
        seconds = medians(
            {
                "ours": lambda start=start: first_hitting(model, start, mask),
                "theirs": lambda start=start, steps=steps: ancestral(model, start, mask, steps=steps),
            },
            repeats,
            warmup=1,
        )
        ratio = seconds["ours"] / seconds["theirs"]
        yield {
            "what": f"first_hitting, {batch} sequence{'s' * (batch > 1)} of {length} tokens, {values} values",
            "ours": 1e3 * seconds["ours"],
            "peer": 1e3 * seconds["theirs"],
            "ratio": ratio,
            "unit": "ms",
            "aim": aim,
            "met": ratio <= aim,
            "note": f"peer: ancestral in {steps} steps",
        }
