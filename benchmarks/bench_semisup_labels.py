"""What semi-supervised methods add to a step, beside the plain way that repositories have it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import compared, medians
from trimtab.nets.unet import UNet
from trimtab.semisup import (
    DiscriminativeFeatureEnhancement,
    dual_view_kl,
    graph_propagate,
    shrink_loss,
    strong_view,
)


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds of a call."""
    repeats = 2 if quick else 20
    yield from _shrink(16 if quick else 448, 10 if quick else 100, repeats)
    yield from _propagate(4 if quick else 64, 8 if quick else 128, repeats)
    yield from _views(8 if quick else 128, repeats)
    yield from _divergence(16 if quick else 128, 200, repeats)
    yield from _enhanced(2 if quick else 16, 16 if quick else 64, repeats)


def _shrink(batch: int, classes: int, repeats: int) -> Iterator[dict[str, object]]:
    generator = torch.Generator().manual_seed(0)
    probs = (2 * torch.randn(batch, classes, generator=generator)).softmax(1)
    logits = torch.randn(batch, classes, generator=generator)

    def plain() -> Tensor:
        """ShrinkMatch's way: sample by sample, class by class."""
        total = torch.zeros(())
        ordered, places = probs.sort(1, descending=True)
        for p, s in zip(ordered, logits.gather(1, places), strict=True):
            if p[0] >= 0.95:
                continue
            for first in range(2, classes):
                sure = p[0] / (p[0] + p[first:].sum())
                if sure >= 0.95 or first == classes - 1:
                    left = torch.cat([s[:1], s[first:]])
                    total = total + F.cross_entropy(left[None], torch.tensor([0])) * p[0] * (sure >= 0.95)
                    break
        return total / batch

    torch.testing.assert_close(shrink_loss(probs, logits), plain())
    seconds = medians({"ours": lambda: shrink_loss(probs, logits), "plain": plain}, max(2, repeats // 4), 1)
    yield compared("shrink_loss against a loop", seconds, 0.1, f"{batch} samples, {classes} classes", peer="plain")


def _propagate(batch: int, nodes: int, repeats: int) -> Iterator[dict[str, object]]:
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(batch, nodes + 1, 128, generator=generator), dim=2)
    labels = torch.randn(batch, nodes + 1, 100, generator=generator).softmax(2)

    def plain() -> Tensor:
        """SimMatchV2's way: the whole inverse, of which a row is used."""
        unit = torch.eye(nodes + 1)
        edges = (features @ features.mT / 0.1 - 1e9 * unit).softmax(2)
        return (0.9 * torch.inverse(unit - 0.1 * edges) @ labels)[:, 0]

    torch.testing.assert_close(graph_propagate(features, labels), plain(), rtol=1e-3, atol=1e-4)
    seconds = medians({"ours": lambda: graph_propagate(features, labels), "plain": plain}, repeats)
    yield compared(
        "graph_propagate against the inverse", seconds, 1.0, f"{batch} graphs of {nodes + 1} nodes", peer="plain"
    )


def _views(batch: int, repeats: int) -> Iterator[dict[str, object]]:
    x, generator = torch.rand(batch, 1, 28, 28), torch.Generator().manual_seed(0)

    def plain() -> Tensor:
        """As data loaders do: image by image."""
        return torch.cat([strong_view(image[None], generator=generator) for image in x])

    seconds = medians({"ours": lambda: strong_view(x, generator=generator), "plain": plain}, max(2, repeats // 4), 1)
    yield compared("strong_view against image by image", seconds, 1.0, f"{batch} images of 28 x 28", peer="plain")


def _divergence(batch: int, classes: int, repeats: int) -> Iterator[dict[str, object]]:
    one, two = torch.rand(2, batch, classes, generator=torch.Generator().manual_seed(0))

    def plain() -> Tensor:
        return F.kl_div((two / 0.1).log_softmax(1), (one / 0.1).softmax(1), reduction="batchmean")

    seconds = medians({"ours": lambda: dual_view_kl(one, two), "plain": plain}, repeats)
    yield compared(
        "dual_view_kl against torch's kl_div", seconds, 2.0, f"{batch} images, {classes} classes", peer="plain"
    )


def _enhanced(batch: int, side: int, repeats: int) -> Iterator[dict[str, object]]:
    generator = torch.Generator().manual_seed(0)
    net, enhance = UNet(1, 4, depth=2), DiscriminativeFeatureEnhancement((8, 16, 32))
    weak, strong = (torch.rand(batch, 1, side, side, generator=generator) for _ in range(2))

    def encoded(x: Tensor) -> list[Tensor]:
        levels: list[Tensor] = []
        for block in net.encoder:
            levels.append(block(F.max_pool2d(levels[-1], 2) if levels else x))
        return levels

    def plain() -> None:
        """Both views through the encoder, which is what any consistency costs."""
        sum(level.square().mean() for level in encoded(torch.cat([weak, strong]))).backward()  # type: ignore[union-attr]

    def ours() -> None:
        levels = [level.chunk(2) for level in encoded(torch.cat([weak, strong]))]
        found = enhance([level[0] for level in levels], [level[1] for level in levels])
        sum(level.square().mean() for level in found).backward()  # type: ignore[union-attr]

    name = "encoder with SSS's enhancement at three scales, beside the encoder"
    seconds = medians({"ours": ours, "plain": plain}, max(2, repeats // 4), 1)
    yield compared(name, seconds, 3.0, f"{batch} images of {side} x {side}, with backward", peer="plain")
