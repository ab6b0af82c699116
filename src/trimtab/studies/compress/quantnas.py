"""QuantNAS: is noise as good a stand-in for quantisation as quantisers are, when a network is searched for?

The paper searches for 20 epochs on DIV2K and trains what it finds at the size of published networks; here three blocks
of 12 channels choose among four operations and 4 or 8 bits in 48 steps of 16 grey patches of 24 pixels, cut from the
left and the middle third of one photo, and are trained anew for 120 steps with learned quantisers of weights and inputs
(the paper has fixed quantisers of inputs, as here in the search that noise is compared with). PSNR is that of patches
of the right third. The rate of the mixtures is a hundred times the paper's, for the search is that much shorter. Times
are processor times of a step of both kinds; the draw of noise is a good part of it on a processor. One trial run of
QuantNAS, of a seed outside of the study, looked at its time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from trimtab import compress
from trimtab.compress.cost import model_cost
from trimtab.studies.engine.study import Claim, Experiment, Metric, Result, Study, Trial
from trimtab.studies.tools.descent import descend

BITS = (4, 8)
BLOCKS, CHANNELS = 3, 12
STEPS = {4: 0.2130561, 8: 0.0203006}
"""Of half-wave Gaussian quantisation, for inputs in the search, as in the authors' baseline."""
Genotype = Sequence[tuple[str, int]]


class HalfWave(nn.Module):
    """Quantises what ReLU leaves of standard normal numbers, with the step of the least squared error."""

    zero: Tensor
    step: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("step", torch.tensor(STEPS[bits]))
        self.register_buffer("zero", torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        return compress.fake_quantize(x, self.step, self.zero, self.bits, signed=False)


class LearnedConv2d(compress.QuantNoiseConv2d):
    """The same with quantisers for each number of bits: of weights with learned steps, of inputs with fixed ones."""

    def __init__(self, inputs: int, outputs: int, size: int, bits: Sequence[int] = BITS, *, groups: int = 1) -> None:
        super().__init__(inputs, outputs, size, bits, groups=groups)
        self.of_weights = nn.ModuleList(compress.LSQWeight(self.weight, width, per_channel=True) for width in self.bits)
        self.of_inputs = nn.ModuleList(HalfWave(width) for width in self.bits)

    def forward(self, x: Tensor, shares: Tensor) -> Tensor:  # type: ignore[override]
        parts = shares / shares.sum().clamp(min=1e-6)
        given = x.relu()
        weight, taken = (
            torch.stack([part * quantizer(held) for part, quantizer in zip(parts, quantizers, strict=True)]).sum(0)
            for held, quantizers in ((self.weight, self.of_weights), (given, self.of_inputs))
        )
        out = self._conv_forward(taken, weight, None)
        self.macs = out[0].numel() * self.weight[0].numel()
        found: Tensor = out
        return found


class Separable(nn.Module):
    """A convolution of each channel and one across them."""

    def __init__(self, conv: Callable[..., nn.Module], channels: int) -> None:
        super().__init__()
        self.depthwise = conv(channels, channels, 3, BITS, groups=channels)
        self.pointwise = conv(channels, channels, 1, BITS)

    def forward(self, x: Tensor, shares: Tensor) -> Tensor:
        out: Tensor = self.pointwise(self.depthwise(x, shares), shares)
        return out


def choices(conv: Callable[..., nn.Module]) -> dict[str, nn.Module]:
    """The four operations of a block."""
    return {
        "3 x 3": conv(CHANNELS, CHANNELS, 3, BITS),
        "5 x 5": conv(CHANNELS, CHANNELS, 5, BITS),
        "1 x 1": conv(CHANNELS, CHANNELS, 1, BITS),
        "separable": Separable(conv, CHANNELS),
    }


class Upscaler(nn.Module):
    """Doubles the size of images: residual blocks around what is searched, and the nearest pixels as a start.

    Args:
        blocks: the branch of each block.
        adq: scale branches by the deviation of their skip connection; otherwise batch normalisation alone.
    """

    def __init__(self, blocks: Sequence[nn.Module], adq: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, CHANNELS, 3, padding=1)
        self.blocks = nn.ModuleList(blocks)
        self.rescale = nn.ModuleList(compress.AdaptiveDeviation(CHANNELS) for _ in blocks)
        self.last = nn.Conv2d(CHANNELS, 4, 3, padding=1)
        self.adq = adq

    def forward(self, x: Float[Tensor, "batch 1 height width"]) -> Tensor:
        held = self.first(x)
        for block, around in zip(self.blocks, self.rescale, strict=True):
            residual = cast(compress.AdaptiveDeviation, around)
            held = residual(held, block, held) if self.adq else block(residual.norm(held)) + held
        return F.pixel_shuffle(self.last(held), 2) + F.interpolate(x, scale_factor=2, mode="nearest")


def plain(operation: str) -> nn.Module:
    """An operation without a choice of bits, for training anew."""
    if operation == "separable":
        return nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS, bias=False),
            nn.ReLU(),
            nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False),
        )
    size = int(operation[0])
    return nn.Sequential(nn.ReLU(), nn.Conv2d(CHANNELS, CHANNELS, size, padding=size // 2, bias=False))


class Patches:
    """Pairs of a patch at half of its size and the patch, from one part of an image, without end."""

    def __init__(self, image: Float[Tensor, "height width"], side: int, generator: torch.Generator) -> None:
        self.image, self.side, self.generator = image, side, generator

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        height, width = self.image.shape
        rows = torch.randint(height - self.side, (count,), generator=self.generator)
        columns = torch.randint(width - self.side, (count,), generator=self.generator)
        span = torch.arange(self.side)
        sharp = self.image[(rows[:, None] + span)[:, :, None], (columns[:, None] + span)[:, None, :]][:, None]
        return F.avg_pool2d(sharp, 2), sharp


def picture(trial: Trial) -> Float[Tensor, "height width"]:
    """Scikit-learn's photo of a temple in grey; at the smoke budget waves."""
    if trial.budget == "smoke":
        span = torch.linspace(0, 30, 120)
        return 0.5 + 0.25 * (span.sin()[:, None] + (1.7 * span).cos() * span[:, None].cos())
    from sklearn.datasets import load_sample_image

    photo = torch.tensor(load_sample_image("china.jpg"), dtype=torch.float32) / 255
    return photo @ torch.tensor([0.299, 0.587, 0.114])


def searched(trial: Trial, conv: Callable[..., nn.Module], entropy: float, adq: bool) -> tuple[Genotype, float, float]:
    """The choice of every block, the milliseconds of a step, and the largest weight of a mixture, on average."""
    image = picture(trial)
    third = image.shape[1] // 3
    side = trial.pick(smoke=8, laptop=24, paper=64)
    train = Patches(image[:, :third], side, trial.generator(1))
    held = Patches(image[:, third : 2 * third], side, trial.generator(2))
    model = trial.seeded(lambda: Upscaler([compress.MixedOp(choices(conv), BITS) for _ in range(BLOCKS)], adq))
    epochs, steps = trial.pick(smoke=(2, 2), laptop=(8, 6), paper=(20, 500))
    rule = compress.QuantNAS(
        model,
        torch.optim.Adam(compress.weight_parameters(model), lr=3e-3),
        torch.optim.Adam([op.logits for op in compress.mixed_ops(model)], lr=3e-2, betas=(0.5, 0.999)),
        epochs,
        entropy=entropy,
        cost=1e-3,
        generator=trial.generator(3),
    )
    taken = []
    for epoch in range(epochs):
        rule.set_epoch(epoch)
        for _ in range(steps):
            pairs = train.draw(16), held.draw(16)
            started = time.process_time()
            rule.step(*pairs)
            taken.append(time.process_time() - started)
    largest = [float(block.alphas.detach().max()) for block in rule.blocks]
    return rule.genotype(), 1e3 * sorted(taken)[len(taken) // 2], sum(largest) / len(largest)


def retrained(trial: Trial, genotype: Genotype, adq: bool) -> tuple[float, float]:
    """The PSNR of a network of these choices, trained from scratch with learned quantisers, and its operations."""
    image = picture(trial)
    third = image.shape[1] // 3
    side = trial.pick(smoke=8, laptop=24, paper=64)
    train = Patches(image[:, : 2 * third], side, trial.generator(4))
    model = trial.seeded(lambda: Upscaler([plain(operation) for operation, _ in genotype], adq), stream=1)
    bits = {"first": 8, "last": 8}
    for name in compress.quantizable_layers(model):
        if name.startswith("blocks."):
            bits[name] = genotype[int(name.split(".")[1])][1]
    model = compress.prepare_quantized(model, train.draw(32)[0], bits)
    steps = trial.pick(smoke=4, laptop=120, paper=20_000)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    loss = lambda pair: F.l1_loss(model.train()(pair[0]), pair[1])
    descend(optimizer, loss, (train.draw(16) for _ in range(steps)), anneal=steps)
    x, y = Patches(image[:, 2 * third :], side, torch.Generator().manual_seed(0)).draw(256)
    with torch.no_grad():
        error = F.mse_loss(model.eval()(x).clamp(0, 1), y)
    return -10 * math.log10(float(error)), model_cost(model, x[:1]).operations / 1e6


def search_and_train(
    trial: Trial,
    *,
    conv: Callable[..., nn.Module] = compress.QuantNoiseConv2d,
    entropy: float = 1e-3,
    adq: bool = True,
) -> Result:
    """Search, and train what was found."""
    genotype, ms, largest = searched(trial, conv, entropy, adq)
    psnr, operations = retrained(trial, genotype, adq)
    return Result({"psnr": psnr, "ms": ms, "operations": operations, "decided": largest})


def fixed(trial: Trial, *, bits: int, operation: str = "3 x 3") -> Result:
    """The same operation and number of bits in all blocks, without a search."""
    psnr, operations = retrained(trial, [(operation, bits)] * BLOCKS, True)
    return Result({"psnr": psnr, "ms": float("nan"), "operations": operations, "decided": float("nan")})


upscaling = Experiment(
    "photo patches at twice their size",
    {
        "QuantNAS": search_and_train,
        "learned quantisers in the search": partial(search_and_train, conv=LearnedConv2d),
        "QuantNAS without entropy": partial(search_and_train, entropy=0.0),
        "QuantNAS without ADQ": partial(search_and_train, adq=False),
        "3 x 3 of 4 bits": partial(fixed, bits=4),
        "3 x 3 of 8 bits": partial(fixed, bits=8),
    },
    {
        "psnr": Metric("PSNR (dB)"),
        "ms": Metric("time of a search step (ms)", best="min"),
        "operations": Metric("bit operations (millions)", best="min"),
        "decided": Metric("largest share of a mixture (%)", percent=True),
    },
    alone=True,
    cost=4.0,
)

study = Study(
    paper="quantnas",
    experiments=[upscaling],
    headline=Claim("QuantNAS", below="learned quantisers in the search", on="ms", times=1.25),
    claims=[
        Claim("QuantNAS", beats="learned quantisers in the search", on="psnr", by=-0.1),
        Claim("QuantNAS", beats="QuantNAS without ADQ", on="psnr"),
        Claim("QuantNAS", beats="QuantNAS without entropy", on="decided", by=0.02),
        Claim("QuantNAS", beats="3 x 3 of 4 bits", on="psnr"),
        Claim("QuantNAS", below="3 x 3 of 8 bits", on="operations"),
        Claim("QuantNAS", beats="3 x 3 of 8 bits", on="psnr", by=-0.1),
    ],
)
