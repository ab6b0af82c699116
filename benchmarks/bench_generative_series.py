"""supnotMIWAE's step over the network calls it makes, and looking back along series over a loop of steps."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import compared, medians
from trimtab.generative import SupNotMIWAE, last_observed
from trimtab.nets import SeriesNet

FEATURES, STEPS, LATENTS = 12, 48, 10


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds of a training step on 32 series of 48 steps, and of finding the last values in 320 of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from _step(size=4 if quick else 32, repeats=2 if quick else 15)
        yield _last(size=8 if quick else 320, repeats=2 if quick else 30)
    finally:
        torch.set_num_threads(threads)


def _step(size: int, repeats: int) -> Iterator[dict[str, object]]:
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

    noise, wide = [torch.empty(LATENTS * size, STEPS, width) for width in (8, FEATURES)], mask.repeat(LATENTS, 1, 1)
    times = torch.arange(float(STEPS))

    def log_normal(value: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return -0.5 * ((value - mean) / std).square() - std.log()

    def needed() -> None:
        """The networks, the draws between them, and the four densities, for independent steps of the latents."""
        mean, std = (part.repeat(LATENTS, 1, 1) for part in encoder(torch.cat([x, x], -1)).chunk(2, -1))
        std = F.softplus(std)
        latent = mean + std * noise[0].normal_()
        centre, spread = decoder(latent).chunk(2, -1)
        spread = F.softplus(spread)
        visible = wide & (torch.rand(wide.shape) > 0.3)
        last, elapsed = last_observed(filled, visible, times)
        share = (-model.decay_weight * elapsed).exp()
        series = torch.where(visible, filled, torch.lerp(centre + spread * noise[1].normal_(), last, share))
        densities = (
            torch.where(wide, log_normal(filled, centre, spread), 0),
            log_normal(latent, mean, std),
            latent.square(),
            F.binary_cross_entropy_with_logits(missing(series), visible.float(), reduction="none"),
            F.log_softmax(classifier(series), -1),
        )
        torch.stack([part.sum() for part in densities]).sum().backward()

    seconds = medians({"ours": ours, "bare": bare, "needed": needed}, repeats, warmup=1)
    what = f"SupNotMIWAE, a step, {LATENTS} latents"
    yield compared(what, seconds, 1.3, "peer: forward and backward of its four networks alone", peer="bare")
    note = "peer: its networks, draws and densities by the shortest formulas, latents without a process in time"
    yield compared(f"{what}, against what it must compute", seconds, 1.2, note, peer="needed")


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
