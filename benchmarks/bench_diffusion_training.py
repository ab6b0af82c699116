"""Pairing of noise over a step of training and over POT's solver; losses over the passes they make; a norm."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from benchmarks.bench_diffusion import SmallUNet
from benchmarks.timing import compared, medians
from trimtab.diffusion import (
    ConsistencyPreconditioned,
    DDOLoss,
    EDMPreconditioned,
    ImprovedConsistencyTraining,
    NonScalingLayerNorm,
    assign_noise,
    denoising_loss,
    diffusion_log_ratio,
    lognormal_levels,
    nearest_noise,
    noise_assignment,
    pseudo_huber,
    soften_assignment,
)
from trimtab.nets import DenoisingMLP


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds for a batch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from _of_a_step(batch=16 if quick else 64, repeats=2 if quick else 10)
        yield from _against_pot(batch=64 if quick else 256, repeats=3 if quick else 30)
        yield from _consistency(hidden=256 if quick else 512, repeats=3 if quick else 30)
        yield from _self_play(hidden=256 if quick else 512, repeats=3 if quick else 30)
        yield from _norm(repeats=5 if quick else 100)
    finally:
        torch.set_num_threads(threads)


def _of_a_step(batch: int, repeats: int) -> Iterator[dict[str, object]]:
    denoiser = EDMPreconditioned(SmallUNet())
    optimizer = torch.optim.Adam(denoiser.parameters())
    x, noise = torch.randn(2, batch, 3, 32, 32)
    candidates = torch.randn(batch, 4, 3, 32, 32)

    def step() -> None:
        t = lognormal_levels(batch)
        loss = denoising_loss(denoiser, x, t, noise, weight=denoiser.weight(t))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    note = f"peer: a training step of a small U-Net, {batch} images of 32 x 32"
    yield compared(
        "assign_noise in a step",
        medians({"ours": lambda: assign_noise(x, noise), "peer": step}, repeats, warmup=1),
        0.02,
        note,
    )
    yield compared(
        "nearest_noise of 4 in a step",
        medians({"ours": lambda: nearest_noise(x, candidates), "peer": step}, repeats, warmup=1),
        0.02,
        note,
    )


def _against_pot(batch: int, repeats: int) -> Iterator[dict[str, object]]:
    try:
        import ot
    except ImportError:
        return
    x, noise = torch.randn(2, batch, 64)

    def theirs() -> object:
        weights = torch.full((batch,), 1 / batch)
        return ot.emd(weights, weights, torch.cdist(x, noise).square()).argmax(1)

    note = f"peer: ot.emd and its plan's largest entries, {batch} vectors of 64 numbers"
    ours = partial(noise_assignment, x, noise, metric="sqeuclidean", precision=torch.float32)
    yield compared("noise_assignment", medians({"ours": ours, "peer": theirs}, repeats, warmup=1), 1.0, note)

    def sinkhorn() -> object:
        weights = torch.full((batch,), 1 / batch, dtype=torch.float64)
        cost = torch.cdist(x.double(), noise.double()).square()
        plan = ot.sinkhorn(weights, weights, cost / cost.mean(), 0.05, method="sinkhorn_log", stopThr=1e-2)
        return torch.multinomial(plan, 1)

    note = f"peer: ot.sinkhorn in the log domain to the same tolerance, {batch} vectors of 64 numbers"
    yield compared(
        "soften_assignment",
        medians({"ours": lambda: soften_assignment(x, noise, 0.05), "peer": sinkhorn}, repeats, warmup=1),
        1.0,
        note,
    )


def _consistency(hidden: int, repeats: int) -> Iterator[dict[str, object]]:
    function = ConsistencyPreconditioned(DenoisingMLP(64, hidden=hidden))
    training = ImprovedConsistencyTraining(function, 1000)
    x, t = torch.randn(256, 64), torch.linspace(0.1, 10, 256)

    def passes() -> None:
        noisy = x + torch.randn_like(x)
        student = function(noisy, t)
        with torch.no_grad():
            target = function(noisy, t)
        pseudo_huber(student, target, 0.004).mean().backward()

    note = "peer: two forward passes, one backward, on one batch of 256 vectors of 64 numbers"
    yield compared(
        "iCT's loss and gradient",
        medians({"ours": lambda: training(x, 0).backward(), "peer": passes}, repeats, warmup=1),
        1.1,
        note,
    )


def _self_play(hidden: int, repeats: int) -> Iterator[dict[str, object]]:
    model, reference = (EDMPreconditioned(DenoisingMLP(64, hidden=hidden)) for _ in range(2))
    criterion, t = DDOLoss(beta=0.02), torch.linspace(0.1, 10, 256)
    data, fake, noise = torch.randn(3, 256, 64)

    def ours() -> None:
        ratios = (diffusion_log_ratio(model, reference, x, t, noise, weight=model.weight(t)) for x in (data, fake))
        criterion(*ratios).backward()

    def passes() -> None:
        outputs = []
        for x in (data, fake):
            with torch.no_grad():
                reference(x, t)
            outputs.append(model(x, t))
        torch.cat(outputs).sum().backward()

    note = "peer: two passes of the reference and of the model, one backward, on 256 vectors of 64 numbers each"
    yield compared("DDO's loss and gradient", medians({"ours": ours, "peer": passes}, repeats, warmup=1), 1.1, note)


def _norm(repeats: int) -> Iterator[dict[str, object]]:
    x, ours, theirs = torch.randn(4096, 256), NonScalingLayerNorm(256), nn.LayerNorm(256)
    note = "peer: torch.nn.LayerNorm, 4096 vectors of 256 features, with gradient"
    yield compared(
        "NonScalingLayerNorm",
        medians(
            {"ours": lambda: ours(x).sum().backward(), "peer": lambda: theirs(x).sum().backward()}, repeats, warmup=1
        ),
        1.05,
        note,
    )
