"""Domain generalisation: a step of each method beside plain training, and beside its authors' way of computing it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import compared, medians
from trimtab.domain import (
    UDIM,
    AdvStyle,
    HGPPenalty,
    HutchinsonPenalty,
    batch_style_standardize,
    head_gradients,
    same_style_nt_xent,
)
from trimtab.nets import small_cnn
from trimtab.ops.info_nce import nt_xent
from trimtab.optim import SAM


def plain_hgp(losses: list[Tensor], params: list[nn.Parameter]) -> Tensor:
    """The penalty as its repository has it: the gradient's norm times the norm's gradient, parameter by parameter."""

    def parts(loss: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        slope = torch.autograd.grad(loss, params, create_graph=True)
        norm = torch.sqrt(sum(g.square().sum() for g in slope))
        return list(slope), [norm * g for g in torch.autograd.grad(norm, params, create_graph=True)]

    mean_slope, mean_product = parts(sum(losses) / len(losses))
    value = losses[0].new_zeros(())
    for loss in losses:
        slope, product = parts(loss)
        for g, m, h, k in zip(slope, mean_slope, product, mean_product, strict=True):
            value = value + (g - m.detach()).square().sum() + (h - k.detach()).square().sum()
    return value / len(losses)


def plain_dsu(x: Tensor) -> Tensor:
    """DSU's layer as its repository has it."""
    mean, std = x.mean([2, 3]), (x.var([2, 3]) + 1e-6).sqrt()
    spread_mean = (mean.var(0, keepdim=True) + 1e-6).sqrt().repeat(len(x), 1)
    spread_std = (std.var(0, keepdim=True) + 1e-6).sqrt().repeat(len(x), 1)
    beta, gamma = mean + torch.randn_like(spread_mean) * spread_mean, std + torch.randn_like(spread_std) * spread_std
    rest = (x - mean[:, :, None, None]) / std[:, :, None, None]
    return rest * gamma[:, :, None, None] + beta[:, :, None, None]


def plain_fourier(x: Tensor, area: float, index: int) -> Tensor:
    """The operator as the paper's algorithm reads: whole transforms, shifted, amplitude and phase taken apart."""
    spectrum = torch.fft.fftshift(torch.fft.fft2(x), dim=(2, 3))
    amplitude, phase = spectrum.abs(), spectrum.angle()
    height, width = x.shape[2:]
    h, w = round(height * area**0.5), round(width * area**0.5)
    top, left = (height - h) // 2, (width - w) // 2
    amplitude = amplitude.clone()
    amplitude[:, :, top : top + h, left : left + w] = amplitude[index, :, top : top + h, left : left + w]
    return torch.fft.ifft2(torch.fft.ifftshift(torch.polar(amplitude, phase), dim=(2, 3))).real


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds of a step, forward and backward."""
    batch, repeats = (8, 2) if quick else (32, 25)
    yield from _penalties(batch, repeats)
    yield from _udim(batch, repeats)
    yield from _styles(batch, repeats)


def _model() -> tuple[nn.Module, nn.Linear, list[nn.Parameter]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = small_cnn((3, 14, 14))
    return network.features, network.head, list(network.parameters())


def _domains(batch: int, count: int = 3) -> list[tuple[Tensor, Tensor]]:
    draws = torch.Generator().manual_seed(0)
    return [
        (torch.rand(batch, 3, 14, 14, generator=draws), torch.randint(10, (batch,), generator=draws))
        for _ in range(count)
    ]


def _penalties(batch: int, repeats: int) -> Iterator[dict[str, object]]:
    features, head, params = _model()
    domains, head_params = _domains(batch), list(head.parameters())

    def step(penalty: Callable[[list[Tensor]], Tensor] | None) -> Callable[[], None]:
        def call() -> None:
            for p in params:
                p.grad = None
            losses = [F.cross_entropy(head(features(x)), y) for x, y in domains]
            value = torch.stack(losses).mean()
            (value if penalty is None else value + penalty(losses)).backward()

        return call

    hgp, hutchinson = HGPPenalty(1.0, 1.0), HutchinsonPenalty(1.0, 1.0, probes=50)
    note = f"three domains of {batch}, small CNN"
    seconds = medians(
        {
            "ours": step(lambda losses: hgp(losses, head)),
            "its repository's formula": step(lambda losses: plain_hgp(losses, head_params)),
            "plain training": step(None),
        },
        repeats,
    )
    yield compared("HGPPenalty against its repository's formula", seconds, 1.0, note, peer="its repository's formula")
    yield compared("HGPPenalty against plain training", seconds, 2.0, note, peer="plain training")
    seconds = medians(
        {"ours": step(lambda losses: hutchinson(losses, head)), "plain training": step(None)}, max(2, repeats // 3)
    )
    yield compared("HutchinsonPenalty of 50 probes against plain training", seconds, 10.0, note, peer="plain training")


def _udim(batch: int, repeats: int) -> Iterator[dict[str, object]]:
    features, head, params = _model()
    (x, y), *_ = _domains(3 * batch, 1)
    rule = UDIM(features, head, torch.optim.SGD(params, lr=1e-3), 100, warmup=0.0)
    sharp = SAM(torch.optim.SGD(params, lr=1e-3), model=features)

    def closure() -> Tensor:
        sharp.zero_grad()
        loss = F.cross_entropy(head(features(x)), y)
        loss.backward()
        return loss

    def passes() -> None:
        sharp.step(closure)
        # The step of the inputs is a gradient of a gradient's length, and the new inputs are compared with the old.
        moved = x.clone().requires_grad_()
        slopes = torch.autograd.grad(F.cross_entropy(head(features(moved)), y), params, create_graph=True)
        moved = x + torch.autograd.grad(torch.stack([g.square().sum() for g in slopes]).sum(), moved)[0]
        (head(features(x)) - head(features(moved))).square().sum().backward()

    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: rule.step(x, y),
        "SAM": lambda: sharp.step(closure),
        "passes": passes,
    }
    seconds = medians(calls, repeats)
    note = f"batch {3 * batch}, small CNN, style mode"
    yield compared("a step of UDIM against SAM", seconds, 4.0, note, peer="SAM")
    yield compared("a step of UDIM against its passes", seconds, 1.2, note, peer="passes")

    def each() -> list[Tensor]:
        z = features(x).detach()
        slopes = torch.func.vmap(
            torch.func.grad(lambda w, b, z, y: F.cross_entropy(F.linear(z, w, b), y), (0, 1)), (None, None, 0, 0)
        )(head.weight, head.bias, z[:, None], y[:, None])
        return list(slopes)

    def closed() -> list[Tensor]:
        z = features(x).detach()
        return list(head_gradients(z, head(z), y))

    seconds = medians({"ours": closed, "torch.func": each}, repeats)
    yield compared(
        "per-sample gradients of the head against torch.func",
        seconds,
        1.0,
        f"batch {3 * batch}, with the features",
        peer="torch.func",
    )


def _styles(batch: int, repeats: int) -> Iterator[dict[str, object]]:
    draws = torch.Generator().manual_seed(0)
    maps = torch.rand(2 * batch, 64, 28, 28, generator=draws, requires_grad=True)
    layer = AdvStyle(64)
    noise = tuple(torch.randn(2 * batch, 64, 1, 1, generator=draws) for _ in range(2))

    def stepped(make: Callable[[], Tensor]) -> Callable[[], None]:
        def call() -> None:
            maps.grad = None
            make().sum().backward()

        return call

    seconds = medians(
        {
            "ours": stepped(lambda: layer(maps, branch="adversarial", noise=noise)),
            "DSU of its repository": stepped(lambda: plain_dsu(maps)),
        },
        repeats,
    )
    yield compared(
        "AdvStyle's adversarial branch against DSU of its repository",
        seconds,
        1.1,
        f"{2 * batch} x 64 x 28 x 28",
        peer="DSU of its repository",
    )
    images = torch.rand(2 * batch, 3, 32, 32, generator=draws)
    seconds = medians(
        {
            "ours": lambda: batch_style_standardize(images, 0.25, index=0),
            "the paper's algorithm as it reads": lambda: plain_fourier(images, 0.25, 0),
        },
        repeats,
    )
    note = f"{2 * batch} images of 3 x 32 x 32"
    yield compared(
        "batch_style_standardize against the paper's algorithm as it reads",
        seconds,
        1.0,
        note,
        peer="the paper's algorithm as it reads",
    )
    z = torch.randn(8 * batch, 64, generator=draws)
    seconds = medians({"ours": lambda: same_style_nt_xent(z), "nt_xent": lambda: nt_xent(z)}, repeats)
    yield compared(
        "same_style_nt_xent against nt_xent", seconds, 1.0, f"{4 * batch} samples, two views", peer="nt_xent"
    )
