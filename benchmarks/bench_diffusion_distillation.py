"""What distilled models cost to sample with, over what they replace, and the moving average of their training."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.timing import compared, medians
from trimtab.diffusion import (
    ClassifierFreeGuidance,
    CTMPreconditioned,
    Denoiser,
    DistilledGuidance,
    DualExpert,
    EDMPreconditioned,
    ScaleConditioned,
    ScaleEmbedding,
    adapt_to_guidance,
    ddim,
    flow_sample,
    gamma_sampling,
    grids,
    shifted_levels,
)
from trimtab.nets import DenoisingMLP
from trimtab.ops.averaging import frozen_copy, move_average

DIM, CLASSES = 256, 10


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds of sampling a batch, and microseconds of a moving average."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield from _guidance(hidden=64 if quick else 512, repeats=2 if quick else 15)
            yield from _few_steps(hidden=64 if quick else 512, repeats=2 if quick else 15)
        yield from _averages(hidden=64 if quick else 512, repeats=3 if quick else 40)
    finally:
        torch.set_num_threads(threads)


def _guidance(hidden: int, repeats: int) -> Iterator[dict[str, object]]:
    net = DenoisingMLP(DIM, CLASSES, hidden, blocks=4)
    base, labels = EDMPreconditioned(net), torch.arange(64) % CLASSES
    times, noise = grids.karras(base.schedule, 10), base.schedule.prior(64, DIM)
    widths = {f"blocks.{k}": hidden for k in range(4)}
    told = ScaleConditioned(copy.deepcopy(net), {"noise_level": ScaleEmbedding(hidden)})
    offset = adapt_to_guidance(copy.deepcopy(net), widths, hidden=32, num_classes=CLASSES)
    attention = adapt_to_guidance(copy.deepcopy(net), widths, "cross_attention", hidden=32, num_classes=CLASSES)

    def guided() -> object:
        return ddim(ClassifierFreeGuidance(base, labels, scale=3.0), noise, times)

    for name, student, aim in (
        ("student told the scale", told, 0.6),
        ("AGD, offset", offset, 0.75),
        ("AGD, cross-attention", attention, 0.85),
    ):
        distilled = DistilledGuidance(EDMPreconditioned(student), labels, 3.0)
        yield compared(
            f"{name}, 10 steps",
            medians({"ours": lambda d=distilled: ddim(d, noise, times), "peer": guided}, repeats, warmup=1),
            aim,
            "peer: classifier-free guidance, two evaluations a step",
        )


def _few_steps(hidden: int, repeats: int) -> Iterator[dict[str, object]]:
    net = DenoisingMLP(DIM, 0, hidden, blocks=4, conditions=1)
    model = CTMPreconditioned(net)
    times, noise = grids.karras(model.schedule, 4), model.schedule.prior(64, DIM)
    plain = EDMPreconditioned(DenoisingMLP(DIM, 0, hidden, blocks=4))
    yield compared(
        "CTM, gamma-sampling, 4 steps",
        medians(
            {
                "ours": lambda: gamma_sampling(model, noise, times),
                "peer": lambda: ddim(Denoiser(plain, plain.schedule, "x0"), noise, times),
            },
            repeats,
            warmup=1,
        ),
        1.15,
        "peer: DDIM with a network that is not told where it goes",
    )
    flow = DenoisingMLP(DIM, 0, hidden, blocks=4)
    levels = shifted_levels(4)
    both = DualExpert(copy.deepcopy(flow), float(shifted_levels()[38]), [r"blocks.*(first|second)"], ["outward"])
    yield compared(
        "DCM, two experts, 4 steps",
        medians(
            {"ours": lambda: flow_sample(both, noise, levels), "peer": lambda: flow_sample(flow, noise, levels)},
            repeats,
            warmup=1,
        ),
        1.3,
        "peer: one network without adapters",
    )


def _averages(hidden: int, repeats: int) -> Iterator[dict[str, object]]:
    net = DenoisingMLP(DIM, CLASSES, hidden, blocks=4)
    ours, theirs = frozen_copy(net), AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)
    yield compared(
        "moving average of weights, a step",
        medians(
            {"ours": lambda: move_average(ours, net, 0.99), "peer": lambda: theirs.update_parameters(net)},
            repeats,
            warmup=1,
        ),
        1.0,
        "peer: torch.optim.swa_utils",
        unit="us",
    )
