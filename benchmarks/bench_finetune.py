"""Adapters beside peft's LoRA and PiSSA, on a small Llama with random weights, single-threaded.

SORSA keeps the pre-trained weight and takes its principal part away again in each pass, so that its change has twice
the rank: LoRA of rank 2 r makes as many products, and is what SORSA can come down to.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.finetune import SORSAConfig, apply_adapter, orthonormality_penalty

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """A training step, the memory it keeps for the backward pass, and the set-up, for SORSA and for peft."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from _rows(quick)
    finally:
        torch.set_num_threads(threads)


def _rows(quick: bool) -> Iterator[dict[str, object]]:
    repeats = 2 if quick else 5
    for width, layers, batch, r in [(32, 1, 1, 4)] if quick else [(256, 4, 8, 8), (256, 4, 8, 64), (1024, 1, 8, 8)]:
        size = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            base = LlamaForCausalLM(LlamaConfig(vocab_size=512, num_attention_heads=4, **size))
            tokens = torch.randint(0, 512, (batch, 128))
        config = SORSAConfig(r=r, target_modules=TARGETS)
        makers = {
            "SORSA": partial(_sorsa, base, config),
            "LoRA": partial(_peft, base, r, True),
            "PiSSA": partial(_peft, base, r, "pissa"),
            "LoRA of rank 2 r": partial(_peft, base, 2 * r, True),
        }
        models = {name: make() for name, make in makers.items()}
        row = partial(_row, f"SORSA, {layers} x {width}, r={r}")
        times = _interleaved({name: _stepper(m, tokens, name == "SORSA") for name, m in models.items()}, repeats)
        kept = {name: _kept_for_backward(model, tokens) for name, model in models.items()}
        setup = _interleaved({name: makers[name] for name in ("SORSA", "PiSSA")}, min(repeats, 3))
        yield row("step with regulariser", times["SORSA"], times["LoRA"], "ms", "LoRA")
        yield row("step with regulariser", times["SORSA"], times["PiSSA"], "ms", "PiSSA")
        limit = "LoRA of rank 2 r"
        yield row("step with regulariser (limit)", times["SORSA"], times[limit], "ms", limit)
        yield row("kept for backward", kept["SORSA"], kept["LoRA"], "MiB", "LoRA")
        yield row("set-up (SVD)", setup["SORSA"], setup["PiSSA"], "ms", "PiSSA")


def _sorsa(base: nn.Module, config: SORSAConfig) -> nn.Module:
    model = copy.deepcopy(base)
    apply_adapter(model, config)
    return model


def _peft(base: nn.Module, r: int, init: bool | str) -> nn.Module:
    config = LoraConfig(r=r, lora_alpha=r, target_modules=TARGETS, init_lora_weights=init)
    return get_peft_model(copy.deepcopy(base), config)


def _row(where: str, what: str, ours: float, peer: float, unit: str, name: str) -> dict[str, object]:
    ratio = ours / peer
    return {
        "what": f"{where}: {what}",
        "ours": ours,
        "peer": peer,
        "ratio": ratio,
        "unit": unit,
        "aim": "<= 1.25",
        "met": ratio <= 1.25,
        "note": f"peft {name}; 1024 tokens, one thread",
    }


def _stepper(model: nn.Module, tokens: Tensor, regularised: bool) -> Callable[[], object]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-5, weight_decay=0.0)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        if regularised:
            (4e-4 / 3e-5 * orthonormality_penalty(model)).backward()
        optimizer.step()

    return step


def _interleaved(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each call, taken in turn after one call to warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def _kept_for_backward(model: nn.Module, tokens: Tensor) -> float:
    """MiB of tensors that the forward pass keeps for the backward pass, parameters and buffers not counted."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(input_ids=tokens, labels=tokens).loss
    del loss
    return sum(kept.values()) / 2**20
