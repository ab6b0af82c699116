"""Steps and state of the projecting optimizers, beside torch's fused ones, the authors' and pytorch_optimizer's."""

from __future__ import annotations

from collections.abc import Iterator

import adamp
import pytorch_optimizer
import torch
from torch import nn

from benchmarks.bench_optim import (
    EAGER,
    FOREACH,
    FUSED,
    MEMORY,
    PEER,
    Make,
    against_memory,
    mlp,
    state_bytes,
    transformer,
)
from benchmarks.passes import Sweep, sweeps
from benchmarks.timing import compiling, medians
from trimtab import optim

AUTHORS = "authors' package"
SGD = {"lr": 1e-2, "momentum": 0.9}


def _adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-3)


# The first is ours; the others are what it is compared with, and what the ratio must come to.
CONTESTANTS: dict[str, dict[str, tuple[Make, float | None]]] = {
    "AdamP": {
        FUSED: (lambda params: optim.AdamP(params, fused=True), None),
        EAGER: (optim.AdamP, None),
        "torch AdamW, fused": (lambda params: torch.optim.AdamW(params, fused=True), 1.15),
        PEER: (pytorch_optimizer.AdamP, 0.25),
        FOREACH: (lambda params: pytorch_optimizer.AdamP(params, foreach=True), None),
        AUTHORS: (adamp.AdamP, 0.25),
    },
    "SGDP": {
        FUSED: (lambda params: optim.SGDP(params, **SGD, fused=True), None),
        EAGER: (lambda params: optim.SGDP(params, **SGD), None),
        "torch SGD, fused": (lambda params: torch.optim.SGD(params, **SGD, fused=True), 1.15),
        PEER: (lambda params: pytorch_optimizer.SGDP(params, **SGD), 0.25),
        AUTHORS: (lambda params: adamp.SGDP(params, **SGD), 0.25),
    },
    "PerpGrad(AdamW)": {
        "ours": (lambda params: optim.PerpGrad(_adamw(params), rescale=True), None),
        "torch AdamW": (_adamw, None),
        PEER: (lambda params: pytorch_optimizer.OrthoGrad(_adamw(params)), None),
        FOREACH: (lambda params: pytorch_optimizer.OrthoGrad(_adamw(params), foreach=True), None),
    },
}
# The cosine of the whole tensor must be known before the first weight moves: the arrays are gone through twice.
# Adam's direction is worked out in both passes, which costs less than to write it and read it again.
PASSES = {"AdamP": [Sweep(4, 2, roots=1), Sweep(3, 1, roots=1)], "SGDP": [Sweep(3, 1), Sweep(2, 1)]}
# Bytes of state over those of torch's AdamW, which has one number a tensor beside its two buffers.
STATE = {"AdamP": 1.0, "SGDP": 0.5, "PerpGrad(AdamW)": 1.0}


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds of a step (the compilation before them is left out) and bytes of state."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if quick else 2)
    try:
        models = {"1 x 16 MLP": mlp(16, 1)} if quick else {"8 x 512 MLP": mlp(), "30M transformer": transformer()}
        for model, shapes in models.items():
            for name in CONTESTANTS:
                yield from _compared(name, model, shapes, 5 if quick else 40)
    finally:
        torch.set_num_threads(threads)


def _compared(name: str, model: str, shapes: list[torch.Size], repeats: int) -> Iterator[dict[str, object]]:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    grads = [torch.randn(shape, generator=generator) for shape in shapes]

    def prepared(make: Make) -> torch.optim.Optimizer:
        params = [nn.Parameter(p.clone()) for p in start]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()  # pytorch_optimizer's OrthoGrad changes it
        return make(params)

    optimizers = {label: prepared(make) for label, (make, _) in CONTESTANTS[name].items()}
    calls = {label: optimizer.step for label, optimizer in optimizers.items()}
    passes = PASSES.get(name)  # of what has a compiled step
    compiled = f"; {compiling(calls[FUSED])}" if passes else ""
    times = medians({**calls, **({MEMORY: sweeps(shapes, passes)} if passes else {})}, repeats)
    if passes:
        yield against_memory(f"{name}, {model}: step", times, passes)
    ours, *others = CONTESTANTS[name]
    for label in others:
        aim = CONTESTANTS[name][label][1]
        ratio = times[ours] / times[label]
        yield {
            "what": f"{name}, {model}: step",
            "ours": 1e3 * times[ours],
            "peer": 1e3 * times[label],
            "ratio": ratio,
            "unit": "ms",
            "aim": f"<= {aim}" if aim else "",
            "met": ratio <= aim if aim else None,
            "note": f"against {label}{compiled}",
        }
    adamw = prepared(_adamw)
    adamw.step()
    held, peer = (state_bytes(optimizer) / 2**20 for optimizer in (optimizers[ours], adamw))
    yield {
        "what": f"{name}, {model}: state",
        "ours": held,
        "peer": peer,
        "ratio": held / peer,
        "unit": "MiB",
        "aim": f"<= {STATE[name]:g}",
        "met": held <= STATE[name] * peer + 4 * len(shapes) / 2**20,
        "note": "against torch AdamW; one number a tensor apart",
    }
