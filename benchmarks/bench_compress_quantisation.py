"""Quantisation: a training step with our quantisers beside torch's and beside plain training, and each method's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import compared, medians
from trimtab.compress import (
    GAQAT,
    AdaDFQ,
    ConditionalGenerator,
    EQNet,
    LSQActivation,
    MinMaxActivation,
    MinMaxWeight,
    affine_qparams,
    fake_quantize,
    lsq_quantize,
    prepare_elastic,
    prepare_quantized,
    quantization_noise,
    searched_range,
)
from trimtab.nets import plain_cnn
from trimtab.optim import SAM


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds of a step, forward and backward."""
    batch, repeats = (8, 2) if quick else (64, 25)
    yield from _quantisers(batch, repeats)
    yield from _same_quantisers(batch, repeats)
    yield from _rules(batch, repeats)
    yield from _noise(batch, repeats)


def _data(batch: int) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    return torch.rand(batch, 1, 14, 14, generator=draws), torch.randint(10, (batch,), generator=draws)


def _step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    def call() -> None:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()

    return call


def _quantisers(batch: int, repeats: int) -> Iterator[dict[str, object]]:
    x, y = _data(batch)
    model = plain_cnn()
    steps = {"ours": _step(prepare_quantized(model, x, 4), x, y), "plain training": _step(model, x, y)}
    yield compared(
        "LSQ training against plain training",
        medians(steps, repeats),
        2.5,
        f"batch {batch}, four convolutions",
        peer="plain training",
    )

    maps = torch.rand(batch, 32, 14, 14, requires_grad=True)
    ours = LSQActivation(maps.detach(), 4)
    peer = torch.ao.quantization.FakeQuantize(
        torch.ao.quantization.MovingAverageMinMaxObserver, quant_min=0, quant_max=15, dtype=torch.quint8
    )

    def passed(quantizer: nn.Module) -> Callable[[], None]:
        def call() -> None:
            maps.grad = None
            quantizer(maps).sum().backward()

        return call

    seconds = medians({"ours": passed(ours), "torch.ao's FakeQuantize": passed(peer)}, repeats)
    yield compared(
        "LSQActivation against torch.ao's FakeQuantize",
        seconds,
        2.0,
        "its step is learned, torch's observed",
        peer="torch.ao's FakeQuantize",
    )
    weight = torch.randn(64, 576)
    scales = weight.abs().amax(1) / 7

    def loop() -> Tensor:
        """The search of ranges as it is usually written, row by row."""
        found = []
        for row, whole in zip(weight[:16], scales[:16], strict=True):
            errors = []
            for shrink in range(80):
                step = whole * (1 - 0.01 * shrink)
                errors.append((row - (row / step).clamp(-8, 7).round() * step).abs().pow(2.4).mean())
            found.append(torch.stack(errors).argmin())
        return torch.stack(found)

    calls = {"ours": lambda: searched_range(weight[:16], 4, symmetric=True), "a loop over rows": loop}
    yield compared(
        "searched_range against a loop over rows",
        medians(calls, max(2, repeats // 5)),
        0.5,
        "16 rows of 576",
        peer="a loop over rows",
    )


def _same_quantisers(batch: int, repeats: int) -> Iterator[dict[str, object]]:
    """Where the method is the same, forward and backward."""
    maps, weight = torch.randn(batch, 32, 14, 14), torch.randn(64, 576)

    def passed(quantizer: Callable[..., Tensor], *leaves: Tensor) -> Callable[[], None]:
        held = [leaf.clone().requires_grad_() for leaf in leaves]

        def call() -> None:
            for leaf in held:
                leaf.grad = None
            quantizer(*held).sum().backward()

        return call

    low, high = maps.aminmax()
    step, zero = affine_qparams(low, high, 4)
    theirs, whole = "torch's kernel", zero.int()
    seconds = medians(
        {
            "ours": passed(lambda x: fake_quantize(x, step, zero, 4), maps),
            theirs: passed(lambda x: torch.fake_quantize_per_tensor_affine(x, step, whole, -8, 7), maps),
        },
        repeats,
    )
    note = f"batch {batch}, 32 maps of 14 x 14, 4 bits"
    yield compared("fake_quantize against torch's kernel", seconds, 1.0, note, peer=theirs)

    none = torch.zeros(1)
    seconds = medians(
        {
            "ours": passed(lambda x, s: lsq_quantize(x, s, 4, scale=0.1), maps, step.view(1)),
            theirs: passed(
                lambda x, s: torch._fake_quantize_learnable_per_tensor_affine(x, s, none, -8, 7, 0.1),
                maps,
                step.view(1),
            ),
        },
        repeats,
    )
    yield compared("lsq_quantize against torch's learnable kernel", seconds, 1.0, note, peer=theirs)

    watching = MinMaxActivation(maps, 4)
    watching.observing = True
    theirs = "torch.ao's FakeQuantize"
    peer = torch.ao.quantization.FakeQuantize(
        torch.ao.quantization.MovingAverageMinMaxObserver, quant_min=-8, quant_max=7, dtype=torch.qint8
    )
    seconds = medians({"ours": passed(watching, maps), theirs: passed(peer, maps)}, repeats)
    yield compared(f"MinMaxActivation against {theirs}", seconds, 1.0, note + "; both watch the extremes", peer=theirs)

    peer = torch.ao.quantization.FakeQuantize(
        torch.ao.quantization.PerChannelMinMaxObserver,
        quant_min=-8,
        quant_max=7,
        dtype=torch.qint8,
        qscheme=torch.per_channel_affine,
        ch_axis=0,
    )
    seconds = medians({"ours": passed(MinMaxWeight(weight, 4), weight), theirs: passed(peer, weight)}, repeats)
    yield compared(f"MinMaxWeight against {theirs}", seconds, 1.0, "64 rows of 576, 4 bits, by channel", peer=theirs)

    if find_spec("torchao"):
        from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer

        theirs = "torchao's IntxFakeQuantizer"
        peer = IntxFakeQuantizer(IntxFakeQuantizeConfig(torch.int4, "per_channel", is_symmetric=False))
        seconds = medians({"ours": passed(MinMaxWeight(weight, 4), weight), theirs: passed(peer, weight)}, repeats)
        yield compared(
            f"MinMaxWeight against {theirs}",
            seconds,
            1.0,
            "64 rows of 576, 4 bits, by channel; its zero point stays near 0",
            peer=theirs,
        )


def _rules(batch: int, repeats: int) -> Iterator[dict[str, object]]:
    x, y = _data(batch)
    model = plain_cnn()
    lsq = prepare_quantized(model, x, 4)

    def sgd(held: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(held.parameters(), lr=1e-4)

    elastic = prepare_elastic(model, x, (2, 4, 8))
    rule = EQNet(elastic, sgd(elastic))
    seconds = medians({"ours": lambda: rule.step(x, y), "three steps of LSQ": _thrice(_step(lsq, x, y))}, repeats)
    yield compared(
        "a step of EQNet against three steps of LSQ",
        seconds,
        1.6,
        "three sub-networks each step",
        peer="three steps of LSQ",
    )

    held = prepare_quantized(model, x, 4)
    steered, sharp = GAQAT(held, sgd(held)), SAM(sgd(lsq), model=lsq)

    def closure() -> Tensor:
        sharp.zero_grad()
        loss = F.cross_entropy(lsq(x), y)
        loss.backward()
        return loss

    seconds = medians({"ours": lambda: steered.step(x, y), "SAM on LSQ": lambda: sharp.step(closure)}, repeats)
    yield compared("a step of GAQAT against SAM on LSQ", seconds, 1.2, "both take two passes", peer="SAM on LSQ")

    make = {
        "weight": partial(MinMaxWeight, pass_clipped=True),
        "inputs": partial(MinMaxActivation, pass_clipped=True),
    }
    student, maker = prepare_quantized(model, x, 3, **make), ConditionalGenerator((1, 14, 14), 10, width=16)
    free = AdaDFQ(model, student, maker, sgd(student), torch.optim.Adam(maker.parameters()))
    seconds = medians({"ours": lambda: free.step(batch), "a step of LSQ": _step(lsq, x, y)}, repeats)
    yield compared(
        "a step of AdaDFQ against a step of LSQ",
        seconds,
        5.0,
        "generator, teacher and two passes of the student",
        peer="a step of LSQ",
    )


def _thrice(call: Callable[[], None]) -> Callable[[], None]:
    def calls() -> None:
        for _ in range(3):
            call()

    return calls


def _noise(batch: int, repeats: int) -> Iterator[dict[str, object]]:
    maps = torch.rand(batch, 32, 14, 14, requires_grad=True)
    quantizer = LSQActivation(maps.detach(), 4)

    def learned() -> None:
        maps.grad = None
        quantizer(maps).sum().backward()

    seconds = medians({"ours": lambda: quantization_noise(maps, 4), "LSQ and its backward pass": learned}, repeats)
    yield compared(
        "quantization_noise against LSQ and its backward pass",
        seconds,
        1.0,
        "noise has no backward pass",
        peer="LSQ and its backward pass",
    )
