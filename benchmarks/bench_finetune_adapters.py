"""Adapters and rules of fine-tuning beside peft's, beside plain training, and beside the formula in a loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.utils import prune

from benchmarks.timing import compared, medians
from trimtab.finetune import (
    AdapterConfig,
    DRTune,
    GradientRouting,
    GradientSteering,
    LoRAConfig,
    MaskTuner,
    MaskTuningConfig,
    SaRAConfig,
    SoMAConfig,
    apply_adapter,
    gate_parameters,
    insert_gates,
    semantic_calibration,
)
from trimtab.optim import SAM

LAYERS = ["0", "2"]


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds of a step of each method on an MLP, and of its parts."""
    width, repeats = (96, 2) if quick else (768, 15)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, width, generator=generator), torch.randint(10, (64,), generator=generator)
    full = _plain(copy.deepcopy(base), x, y)
    lora = _peft(base, x, y, True)
    share = 16 / width  # as many numbers as a LoRA of rank 8
    for name, config, peer, whose in (
        ("SaRA", SaRAConfig(quantile=share, target_modules=LAYERS), full, "AdamW on all weights"),
        ("SoMA", SoMAConfig(r=8, target_modules=LAYERS), lora, "peft's LoRA of the same rank"),
        ("LoRA", LoRAConfig(r=8, target_modules=LAYERS), lora, "peft's LoRA of the same rank"),
    ):
        yield compared(
            f"a step of {name}",
            medians({"ours": _adapted(base, config, x, y), "peer": peer}, repeats, warmup=1),
            1.25,
            f"peer: {whose}",
        )
    for name, config in (
        ("SoMA", SoMAConfig(r=8, target_modules=LAYERS)),
        ("LoRA", LoRAConfig(r=8, target_modules=LAYERS)),
    ):
        yield compared(
            f"a step of {name}",
            medians(
                {"ours": _adapted(base, config, x, y), "peer": _whole_weights(base, x, y, 1 + (name == "SoMA"))},
                repeats,
                warmup=1,
            ),
            1.1,
            "peer: effective weights written out by hand, with the gradient of all of each, as any function of a "
            "weight asks for; peft's LoRA reaches into the layer's product instead",
        )
    yield compared(
        "SoMA, set-up with its decomposition",
        medians(
            {
                "ours": lambda: apply_adapter(copy.deepcopy(base), SoMAConfig(r=8, target_modules=LAYERS)),
                "peer": lambda: _injected(base, "pissa"),
            },
            min(repeats, 3),
            warmup=1,
        ),
        1.25,
        "peer: peft's PiSSA",
    )
    yield compared(
        "a step of mask tuning",
        medians({"ours": _masking(base, x, y), "peer": _pruned(base, x, y)}, repeats, warmup=1),
        2.5,
        "peer: masks of torch.prune",
    )
    steering = _closed(base, x, y, lambda p: GradientSteering(torch.optim.AdamW(p, lr=1e-3)))
    sharp = _closed(base, x, y, lambda p: SAM(torch.optim.AdamW(p, lr=1e-3)))
    yield compared(
        "a step of gradient steering",
        medians({"ours": steering, "peer": sharp}, repeats, warmup=1),
        1.25,
        "peer: SAM, full fine-tuning",
    )
    yield compared(
        "a step with routed gates",
        medians({"ours": _routed(base, x, y), "peer": full}, repeats, warmup=1),
        2.25,
        "peer: AdamW without gates, one pass",
    )
    yield from _dr_tune(base, x, y, 64 if quick else 2048, repeats)


def _plain(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def _adapted(base: nn.Module, config: AdapterConfig, x: Tensor, y: Tensor) -> Callable[[], object]:
    model = copy.deepcopy(base)
    apply_adapter(model, config)
    return _plain(model, x, y)


def _whole_weights(base: nn.Module, x: Tensor, y: Tensor, products: int, r: int = 8) -> Callable[[], object]:
    """A step of low-rank changes added to weights, so many products of rank r for each, with nothing around it."""
    model = copy.deepcopy(base).requires_grad_(False)
    layers = [model.get_submodule(name) for name in LAYERS]
    frozen = [torch.randn(len(layer.weight), r) for layer in layers]
    factors = [
        (torch.zeros(len(layer.weight), r, requires_grad=True), torch.randn(r, layer.weight.shape[1]).requires_grad_())
        for layer in layers
    ]
    optimizer = torch.optim.AdamW([p for pair in factors for p in pair], lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        weights = {}
        for name, layer, held, (b, a) in zip(LAYERS, layers, frozen, factors, strict=True):
            weight = layer.weight
            if products == 2:
                weight = torch.addmm(weight, held, a.detach(), alpha=-1e-6)
            weights[f"{name}.weight"] = torch.addmm(weight, b, a)
        F.cross_entropy(torch.func.functional_call(model, weights, (x,)), y).backward()
        optimizer.step()

    return step


def _injected(base: nn.Module, init: bool | str) -> nn.Module:
    config = LoraConfig(r=8, lora_alpha=8, target_modules=LAYERS, init_lora_weights=init)
    model: nn.Module = inject_adapter_in_model(config, copy.deepcopy(base))
    return model


def _peft(base: nn.Module, x: Tensor, y: Tensor, init: bool | str) -> Callable[[], object]:
    return _plain(_injected(base, init), x, y)


def _masking(base: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    model = copy.deepcopy(base)
    adapters = apply_adapter(model, MaskTuningConfig(target_modules=LAYERS))
    optimizer = torch.optim.Adam(adapters.trainable_parameters(), lr=1e-5)
    tuner = MaskTuner(model, optimizer, generator=torch.Generator().manual_seed(0))
    before = base(x).detach()

    def step() -> None:
        logits = model(x)
        tuner.step(F.cross_entropy(logits, y), (logits - before).square().mean())

    return step


def _pruned(base: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    model = copy.deepcopy(base)
    for name in LAYERS:
        prune.l1_unstructured(model.get_submodule(name), "weight", amount=0.05)
    return _plain(model, x, y)


def _closed(
    base: nn.Module, x: Tensor, y: Tensor, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
) -> Callable[[], object]:
    model = copy.deepcopy(base)
    optimizer = make(list(model.parameters()))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return lambda: optimizer.step(closure)  # type: ignore[arg-type]


def _routed(base: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    model = copy.deepcopy(base)
    insert_gates(model, LAYERS, init=4.0)
    gates = gate_parameters(model)
    weights = [p for name, p in model.named_parameters() if name not in gates]
    routing = GradientRouting(torch.optim.Adam(gates.values(), lr=0.01), torch.optim.AdamW(weights, lr=1e-3))
    return lambda: routing.step(lambda: F.cross_entropy(model(x), y))


def _dr_tune(base: nn.Sequential, x: Tensor, y: Tensor, queue: int, repeats: int) -> Iterator[dict[str, object]]:
    model = copy.deepcopy(base)
    module = DRTune(model[:-1], model[-1], queue_size=queue)
    module.warmup([(x, y)] * (queue // len(x)))
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        module.loss(x, y)["total"].backward()
        optimizer.step()

    yield compared(
        "a step of DR-Tune",
        medians({"ours": step, "peer": _plain(copy.deepcopy(base), x, y)}, repeats, warmup=1),
        4.0,
        f"peer: AdamW; queue of {queue}",
    )
    generator = torch.Generator().manual_seed(1)
    stored, now = (torch.randn(queue, 64, generator=generator) for _ in range(2))
    labels = torch.randint(10, (queue,), generator=generator)
    weight = torch.randn(10, 64, generator=generator)
    ours = semantic_calibration(stored, now, labels, weight, rotate=False)
    torch.testing.assert_close(ours, _class_by_class(stored, now, labels, weight))
    yield compared(
        "semantic calibration, 10 classes",
        medians(
            {
                "ours": lambda: semantic_calibration(stored, now, labels, weight, rotate=False),
                "peer": lambda: _class_by_class(stored, now, labels, weight),
            },
            repeats,
            warmup=1,
        ),
        1.0,
        "peer: the formula, class by class",
    )


def _class_by_class(stored: Tensor, now: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    x, z, along = F.normalize(stored), F.normalize(now), F.normalize(weight)
    for c in labels.unique():
        own = labels == c
        share = (z[own] @ along[c]).softmax(0)
        x[own] += share @ z[own] - x[own].mean(0)
    return F.normalize(x)
