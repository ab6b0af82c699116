"""supnotMIWAE's step over the network calls it makes, and looking back along series over a loop of steps."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.timing import medians
from trimtab.generative import SupNotMIWAE, last_observed
from trimtab.nets import SeriesNet

FEATURES, STEPS, LATENTS = 12, 48, 10


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds of a training step on 32 series of 48 steps, and of finding the last values in 320 of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield _step(size=4 if quick else 32, repeats=2 if quick else 15)
        yield _last(size=8 if quick else 320, repeats=2 if quick else 30)
    finally:
        torch.set_num_threads(threads)


def _step(size: int, repeats: int) -> dict[str, object]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder, decoder = SeriesNet(2 * FEATURES, 16), SeriesNet(8, 2 * FEATURES)
        classifier, missing = SeriesNet(FEATURES, 5, pooled=True), nn.Linear(FEATURES, FEATURES)
        x, z = torch.randn(size, STEPS, FEATURES), torch.randn(LATENTS * size, STEPS, 8)
    model = SupNotMIWAE(encoder, decoder, classifier, FEATURES, missingness=missing, num_latents=LATENTS)
    mask, y = x > 0, torch.arange(size) % 5
    filled = x.repeat(LATENTS, 1, 1)

    def ours() -> None:
        model.loss(x, mask, y)["total"].backward()

    def bare() -> None:
        outputs = encoder(torch.cat([x, x], -1)), decoder(z), classifier(filled), missing(filled)
        torch.stack([out.sum() for out in outputs]).sum().backward()

    seconds = medians({"ours": ours, "bare": bare}, repeats, warmup=1)
    ratio = seconds["ours"] / seconds["bare"]
    return {
        "what": f"SupNotMIWAE, a step, {LATENTS} latents",
        "ours": 1e3 * seconds["ours"],
        "peer": 1e3 * seconds["bare"],
        "ratio": ratio,
        "unit": "ms",
        "aim": 1.3,
        "met": ratio <= 1.3,
        "note": "peer: forward and backward of its four networks alone",
    }


def _last(size: int, repeats: int) -> dict[str, object]:
    x, times = torch.randn(size, STEPS, FEATURES), torch.arange(float(STEPS))
    mask = x > 0

    def loop() -> Tensor:
        last, found = x.new_zeros(size, FEATURES), []
        when = torch.zeros_like(last)
        for step in range(STEPS):
            last = torch.where(mask[:, step], x[:, step], last)
            when = torch.where(mask[:, step], times[step], when)
            found.append(torch.cat([last, times[step] - when], -1))
        return torch.stack(found, 1)

    seconds = medians({"ours": lambda: last_observed(x, mask, times), "loop": loop}, repeats, warmup=1)
    ratio = seconds["ours"] / seconds["loop"]
    return {
        "what": f"last_observed, {size} series of {STEPS} steps",
        "ours": 1e3 * seconds["ours"],
        "peer": 1e3 * seconds["loop"],
        "ratio": ratio,
        "unit": "ms",
        "aim": 1.0,
        "met": ratio <= 1.0,
        "note": "peer: a loop over the steps, as recurrent imputers have it",
    }
