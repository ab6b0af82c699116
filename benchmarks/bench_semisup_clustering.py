"""Clustering: plans, episodes and epochs beside what a user would take today."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import numpy as np
import ot
import torch
import torch.nn.functional as F
from sklearn.semi_supervised import LabelSpreading
from torch import nn

from benchmarks.timing import compared, medians
from trimtab.ops.partial_transport import partial_sinkhorn
from trimtab.semisup import DEPICT, MRDD, MaskedCrossViewVAE, TransductiveClusterer, ViewSpecificVAE, mlp_autoencoder


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds, contestants taking turns."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if quick else 2)
    try:
        yield _plan(100 if quick else 5000, 10 if quick else 50, repeats=1 if quick else 5)
        yield _episode(repeats=2 if quick else 30)
        yield _epoch(128 if quick else 2000, repeats=1 if quick else 5)
        yield _views(repeats=2 if quick else 30)
    finally:
        torch.set_num_threads(threads)


def _plan(n: int, k: int, repeats: int) -> dict[str, object]:
    """Unbalanced transport, which POT has too, to the same error of the objective's optimality."""
    cost = torch.rand(n, k, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    rows_, columns = np.full(n, 1 / n), np.full(k, 1 / k)

    def ours(tol: float = 1e-6) -> torch.Tensor:
        return torch.as_tensor(partial_sinkhorn(cost, 1.0, tol=tol).plan)

    def peer() -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ot.unbalanced.sinkhorn_unbalanced(
                rows_, columns, cost.numpy(), 0.1, reg_m=(math.inf, 1.0), reg_type="entropy", stopThr=1e-6
            )

    exact = ours(1e-12)
    off = [float(abs(plan - exact.numpy()).sum()) for plan in (ours().numpy(), peer())]
    seconds = medians({"ours": ours, "peer": peer}, repeats, 1)
    return compared(
        f"partial transport of all mass against POT sinkhorn_unbalanced, {n} x {k}",
        seconds,
        aim=1.0,
        met=off[0] <= max(off[1], 1e-5),
        note=f"distance from the optimum: {off[0]:.0e} and {off[1]:.0e} of the mass",
    )


def _episode(repeats: int) -> dict[str, object]:
    """Five classes, one shot, fifteen queries a class."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(5, 64, generator=generator)
    y, target = torch.arange(5), torch.arange(5).repeat_interleave(15)
    support, query = (centers[of] + torch.randn(len(of), 64, generator=generator) for of in (y, target))
    rule = TransductiveClusterer(5, lam=0.5)
    x, known = torch.cat([support, query]).numpy(), np.concatenate([y, np.full(len(query), -1)])

    def peer() -> object:
        return LabelSpreading(gamma=0.01, max_iter=100).fit(x, known).transduction_

    seconds = medians({"ours": lambda: rule.fit_predict(support, y, query), "peer": peer}, repeats, 2)
    return compared("an episode by SLK-Means against scikit-learn LabelSpreading", seconds, aim=2.0)


def _epoch(n: int, repeats: int) -> dict[str, object]:
    """An epoch of DEPICT, its targets among it, against one of the same autoencoder trained plainly."""
    x = torch.rand(n, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    network = mlp_autoencoder(64, 10)
    plain = mlp_autoencoder(64, 10)
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3)
    whole = {"pretrain_epochs": 0, "init_epochs": 0, "batch_size": 128, "tol": 0.0, "random_state": 0}

    def ours(epochs: int) -> object:
        return DEPICT(10, autoencoder=network, epochs=epochs, **whole).fit(x.numpy())

    def peer() -> None:
        for index in torch.randperm(n).split(128):
            loss = F.mse_loss(plain(x[index]).reconstructions[0], x[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    seconds = medians({"start": lambda: ours(0), "ours": lambda: ours(5), "peer": peer}, repeats, 1)
    seconds["ours"] = (seconds["ours"] - seconds["start"]) / 5
    return compared(f"an epoch of DEPICT over {n} samples against a plain autoencoder's", seconds, aim=4.0)


def _views(repeats: int) -> dict[str, object]:
    """A step of the second stage against one of two plain variational autoencoders of the same size."""

    def image(inputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 196), nn.Unflatten(1, (1, 14, 14)))

    def features(outputs: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(196, 256), nn.ReLU(), nn.Linear(256, outputs))

    def own() -> list[ViewSpecificVAE]:
        return [ViewSpecificVAE(features(20), image(20), 10) for _ in range(2)]

    rule = MRDD(MaskedCrossViewVAE(features(64), [image(64), image(64)], 64, 10, patch=2), own())
    views = [torch.rand(128, 1, 14, 14) for _ in range(2)]
    plain = nn.ModuleList(own())
    optimizer = torch.optim.AdamW(plain.parameters(), lr=5e-4)
    padding = torch.zeros(128, 10)

    def peer() -> None:
        loss = torch.zeros(())
        for part, view in zip(plain, views, strict=True):
            mean, log_var = part.posterior(view)
            z = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
            loss = loss + (part.decoder(torch.cat([z, padding], 1)) - view).square().sum() / 128
            loss = loss + 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    seconds = medians({"ours": lambda: rule.step_specific(views), "peer": peer}, repeats, 2)
    return compared("a step of MRDD's second stage against two plain VAEs", seconds, aim=2.5)
