"""Optimizer steps and state, beside torch's fused optimizers and pytorch_optimizer, on two threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import pytorch_optimizer
import torch
from torch import nn

from benchmarks.passes import Sweep, sweeps
from benchmarks.timing import compared, compiling, medians
from trimtab import optim

Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
FUSED, EAGER, PEER, FOREACH = "fused", "uncompiled", "pytorch_optimizer", "pytorch_optimizer, foreach"

ADABELIEF: dict[str, Make] = {
    FUSED: lambda params: optim.AdaBelief(params, rectify=False, fused=True),
    EAGER: lambda params: optim.AdaBelief(params, rectify=False),
    "torch AdamW, fused": lambda params: torch.optim.AdamW(params, fused=True),
    PEER: pytorch_optimizer.AdaBelief,
    FOREACH: lambda params: pytorch_optimizer.AdaBelief(params, foreach=True),
}
SGD_SAI: dict[str, Make] = {
    FUSED: lambda params: optim.SGDSaI(params, fused=True),
    EAGER: optim.SGDSaI,
    "torch SGD, fused": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, weight_decay=1e-2, fused=True),
    PEER: pytorch_optimizer.SGDSaI,
    FOREACH: lambda params: pytorch_optimizer.SGDSaI(params, foreach=True),
}
# What each comparison must come to: the fused step over torch's, over the peer's.
AIMS = {"torch AdamW, fused": 1.15, "torch SGD, fused": 1.15, "AdaBelief": 0.25}
# Arrays that a step must read and write: weights, gradients and buffers.
PASSES = {"AdaBelief": [Sweep(4, 3, roots=1)], "SGDSaI": [Sweep(3, 2)]}
MEMORY = "its passes over memory"
FIXED = "the fixed cost of a step"


def mlp(width: int = 512, depth: int = 8) -> list[torch.Size]:
    """Shapes of the parameters of a multilayer perceptron."""
    return [shape for _ in range(depth) for shape in (torch.Size([width, width]), torch.Size([width]))]


def transformer() -> list[torch.Size]:
    """Shapes of the parameters of an encoder of eight blocks with an embedding: 30 million numbers."""
    with torch.device("meta"):
        layer = nn.TransformerEncoderLayer(512, 8, 2048)
        model = nn.ModuleList([nn.Embedding(10_000, 512), nn.TransformerEncoder(layer, 8, enable_nested_tensor=False)])
    return [p.shape for p in model.parameters()]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the state."""
    held = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.numel() * value.element_size() for value in held if isinstance(value, torch.Tensor))


def against_memory(what: str, times: Mapping[str, float], passes: Sequence[Sweep]) -> dict[str, object]:
    """The row of a fused step beside a program that only reads and writes what the step must."""
    note = f"against {MEMORY}: {'; '.join(map(str, passes))}"
    return compared(what, times, 1.2, note, ours=FUSED, peer=MEMORY)


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds of a step (the compilation before them is left out) and bytes of state."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if quick else 2)
    try:
        models = {"1 x 16 MLP": mlp(16, 1)} if quick else {"8 x 512 MLP": mlp(), "30M transformer": transformer()}
        for model, shapes in models.items():
            for name, contestants in {"AdaBelief": ADABELIEF, "SGDSaI": SGD_SAI}.items():
                yield from _compared(f"{name}, {model}", name, contestants, shapes, 5 if quick else 40)
        for name, contestants in {"AdaBelief": ADABELIEF, "SGDSaI": SGD_SAI}.items():
            yield _fixed_cost(name, contestants, 2 if quick else 16, 5 if quick else 200)
    finally:
        torch.set_num_threads(threads)


def _prepared(make: Make, start: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> torch.optim.Optimizer:
    params = [nn.Parameter(p.clone()) for p in start]
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    return make(params)


def _fixed_cost(name: str, contestants: dict[str, Make], tensors: int, repeats: int) -> dict[str, object]:
    """What a step takes however small the tensors are: the call of a compiled function, its guards, the bookkeeping."""
    tiny = [torch.ones(4) for _ in range(tensors)]
    theirs = next(label for label in contestants if label.startswith("torch"))
    calls = {label: _prepared(contestants[label], tiny, tiny).step for label in (FUSED, theirs)}
    note = f"against {theirs}; {tensors} tensors of four numbers"
    return compared(f"{name}: {FIXED}", medians(calls, repeats), None, note, ours=FUSED, peer=theirs, unit="us")


def _compared(
    what: str, name: str, contestants: dict[str, Make], shapes: list[torch.Size], repeats: int
) -> Iterator[dict[str, object]]:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    grads = [torch.randn(shape, generator=generator) for shape in shapes]

    optimizers = {label: _prepared(make, start, grads) for label, make in contestants.items()}
    calls = {label: optimizer.step for label, optimizer in optimizers.items()}
    compiled = compiling(calls[FUSED])
    times = medians({**calls, MEMORY: sweeps(shapes, PASSES[name])}, repeats)
    yield against_memory(f"{what}: step", times, PASSES[name])
    for label in list(contestants)[2:]:
        aim = AIMS.get(label) or (AIMS.get(name) if label == PEER else None)
        ratio = times[FUSED] / times[label]
        yield {
            "what": f"{what}: step",
            "ours": 1e3 * times[FUSED],
            "peer": 1e3 * times[label],
            "ratio": ratio,
            "unit": "ms",
            "aim": f"<= {aim}" if aim else "",
            "met": ratio <= aim if aim else None,
            "note": f"against {label}; {compiled}; uncompiled {1e3 * times[EAGER]:.3g} ms",
        }
    adamw = _prepared(lambda params: torch.optim.AdamW(params), start, grads)
    adamw.step()
    ours, peer = state_bytes(optimizers[FUSED]) / 2**20, state_bytes(adamw) / 2**20
    # Half but for the one number a tensor that AdamW has as well.
    share = {"AdaBelief": 1.0, "SGDSaI": 0.5}[name]
    tolerance = 4 * len(shapes) / 2**20
    yield {
        "what": f"{what}: state",
        "ours": ours,
        "peer": peer,
        "ratio": ours / peer,
        "unit": "MiB",
        "aim": f"<= {share:g}",
        "met": ours <= share * peer + tolerance,
        "note": "against torch AdamW; one number a tensor apart",
    }
