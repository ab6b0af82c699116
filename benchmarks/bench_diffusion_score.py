"""Score analysis: the leading part of a Jacobian, K-subspaces' rounds, Stein's estimate, chains of an auto-encoder."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.timing import compared, medians
from trimtab.diffusion import (
    BiasFreeUNet,
    KSubspaces,
    ReconstructionContractiveLoss,
    denoiser_jacobian,
    jacobian_svd,
    sure,
)


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from _jacobian(side=8 if quick else 32, repeats=1 if quick else 5)
        yield from _estimate(count=4 if quick else 32, repeats=1 if quick else 9)
        yield from _clusters(size=60 if quick else 600, repeats=1 if quick else 5)
        yield from _penalty(dim=4 if quick else 64, repeats=2 if quick else 9)
    finally:
        torch.set_num_threads(threads)


def _network() -> BiasFreeUNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = BiasFreeUNet(base=8, depth=2)
        torch.nn.init.normal_(net.last.weight, std=0.1)
    return net.eval().requires_grad_(False)


def _jacobian(side: int, repeats: int) -> Iterator[dict[str, object]]:
    net, y = _network(), torch.rand(1, 1, side, side)

    def whole() -> object:
        matrix = torch.autograd.functional.jacobian(net, y).reshape(side**2, side**2)
        return torch.linalg.svd(matrix)

    seconds = medians({"ours": lambda: jacobian_svd(net, y, 5, iterations=5), "peer": whole}, repeats, warmup=1)
    yield compared(
        f"jacobian_svd, 5 of {side**2}", seconds, 0.5, "peer: torch.autograd.functional.jacobian and its svd"
    )
    seconds = medians(
        {
            "ours": lambda: denoiser_jacobian(net, y),
            "peer": lambda: torch.autograd.functional.jacobian(net, y),
        },
        repeats,
        warmup=1,
    )
    yield compared(f"denoiser_jacobian, {side**2} rows", seconds, 1.0, "peer: torch.autograd.functional.jacobian")


def _estimate(count: int, repeats: int) -> Iterator[dict[str, object]]:
    net, y = _network(), torch.rand(count, 1, 16, 16)

    def forward_and_back() -> object:
        at = y.clone().requires_grad_()
        return torch.autograd.grad(net(at).sum(), at)

    seconds = medians({"ours": lambda: sure(net, y, 0.1), "peer": forward_and_back}, repeats)
    yield compared(f"sure, {count} images", seconds, 1.1, "peer: one forward and one backward pass of the network")


def _clusters(size: int, repeats: int) -> Iterator[dict[str, object]]:
    from sklearn.cluster import KMeans

    draws = np.random.default_rng(0)
    bases = np.linalg.qr(draws.normal(size=(3, 48, 4)))[0]
    X = np.concatenate([draws.normal(size=(size // 3, 4)) @ basis.T for basis in bases])
    seconds = medians(
        {
            "ours": lambda: KSubspaces(3, dim=4, n_init=5, random_state=0).fit(X),
            "peer": lambda: KMeans(3, n_init=5, random_state=0).fit(X),
        },
        repeats,
        warmup=1,
    )
    yield compared(
        f"KSubspaces, {size} samples", seconds, None, "beside scikit-learn's KMeans, which does another thing"
    )


def _penalty(dim: int, repeats: int) -> Iterator[dict[str, object]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(dim, 128), torch.nn.Tanh(), torch.nn.Linear(128, dim))
    x = torch.randn(64, dim)
    losses = {kind: ReconstructionContractiveLoss(0.1, estimator=kind) for kind in ("exact", "hutchinson")}
    seconds = medians(
        {
            "ours": lambda: losses["hutchinson"](net, x).backward(),
            "peer": lambda: losses["exact"](net, x).backward(),
        },
        repeats,
    )
    yield compared(
        f"contractive loss by random signs, {dim} numbers", seconds, 0.5, "peer: the exact penalty, row by row"
    )
