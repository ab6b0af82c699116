"""Attention inside scales over a dense mask, and quantizers over plain PyTorch and vector-quantize-pytorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import compared, medians
from trimtab.generative import ScalarQuantizer, VectorQuantizer, next_scale_mask
from trimtab.generative.blocks import in_groups

SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds of a forward and a backward pass on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        repeats = 2 if quick else 20
        yield _attention(SCALES[:4] if quick else SCALES, repeats)
        yield from _vectors(200 if quick else 8192, 32 if quick else 1024, repeats)
        yield _scalars(64 if quick else 4096, repeats)
    finally:
        torch.set_num_threads(threads)


def _attention(scales: tuple[int, ...], repeats: int) -> dict[str, object]:
    sizes = [side**2 for side in scales]
    mask = next_scale_mask(scales, "coarser scales")
    q, k, v = torch.randn(3, 2, 4, sum(sizes), 64).requires_grad_().unbind()
    seconds = medians(
        {
            "ours": lambda: in_groups(q, k, v, sizes).sum().backward(retain_graph=True),
            "peer": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward(retain_graph=True),
        },
        repeats,
    )
    return compared(f"HMAR's attention, {sum(sizes)} tokens", seconds, 0.4, "peer: VAR's dense mask")


def _vectors(count: int, codes: int, repeats: int) -> Iterator[dict[str, object]]:
    z = torch.randn(1, count, 8, requires_grad=True)
    ours = VectorQuantizer(codes, 8)

    def plain() -> None:
        unit, book = F.normalize(z, dim=-1), F.normalize(ours.codes, dim=-1)
        taken = book[torch.cdist(unit, book[None]).argmin(-1)]
        loss = F.mse_loss(taken, unit.detach()) + 0.25 * F.mse_loss(unit, taken.detach())
        ((unit + (taken - unit).detach()).sum() + loss).backward()

    calls: dict[str, Callable[[], object]] = {"ours": lambda: _backward(ours(z)), "peer": plain}
    seconds = medians(calls, repeats)
    yield compared(f"VectorQuantizer, {count} vectors, {codes} codes", seconds, 1.0, "peer: torch.cdist and argmin")
    try:
        from vector_quantize_pytorch import VectorQuantize  # type: ignore[import-not-found]
    except ImportError:
        return
    theirs = VectorQuantize(8, codes, use_cosine_sim=True, learnable_codebook=True, ema_update=False)

    def peer() -> None:
        values, _, loss = theirs(z)
        (values.sum() + loss.sum()).backward()

    seconds = medians({"ours": calls["ours"], "peer": peer}, repeats)
    yield compared(f"VectorQuantizer, {count} vectors, {codes} codes", seconds, 1.0, "peer: vector-quantize-pytorch")


def _scalars(count: int, repeats: int) -> dict[str, object]:
    z = torch.randn(count, 10, requires_grad=True)
    ours = ScalarQuantizer(10)

    def one_by_one() -> None:
        columns = []
        for j in range(10):
            values = ours.values[j]
            columns.append(values[(z[:, j, None] - values).abs().argmin(1)])
        taken = torch.stack(columns, 1)
        loss = 0.01 * F.mse_loss(taken, z.detach()) + 0.01 * F.mse_loss(z, taken.detach())
        ((z + (taken - z).detach()).sum() + loss).backward()

    seconds = medians({"ours": lambda: _backward(ours(z)), "peer": one_by_one}, repeats)
    return compared(f"ScalarQuantizer, {count} codes", seconds, 1.0, "peer: a loop over dimensions, as the authors'")


def _backward(found: object) -> None:
    values: Tensor = found.values  # type: ignore[attr-defined]
    (values.sum() + found.loss).backward()  # type: ignore[attr-defined]
