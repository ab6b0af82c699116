"""Robust training, bounds and attacks beside the packages that do the same job, or beside what they cost more."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import compared, medians
from trimtab.ops.intervals import box_around, propagate
from trimtab.robust import AAERLoss, auto_attack, certify, feature_log_norm_loss, single_step_adversary, zo_gradient


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds of a step of training, of bounds and of gradients of a small CNN."""
    batch, repeats = (16, 3) if quick else (128, 20)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 49, 100),
            nn.ReLU(),
            nn.Linear(100, 10),
        )
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch, 1, 28, 28, generator=generator)
    y = torch.randint(10, (batch,), generator=generator)
    yield from _penalty(net, x, y, repeats)
    yield from _one_step(net, x, y, repeats)
    yield from _ensemble(net, x[: 4 if quick else 16], repeats)
    yield from _bounds(net, x, repeats)
    yield from _features(net, x, repeats)
    yield from _queries(net, x[: 4 if quick else 16], y, repeats)
    yield from _votes(net, x[:2], 200 if quick else 2000, repeats)


def _penalty(net: nn.Module, x: Tensor, y: Tensor, repeats: int) -> Iterator[dict[str, object]]:
    criterion = AAERLoss()

    def step(penalised: bool) -> None:
        moved, before = single_step_adversary(net, x, y, 0.1)
        logits = net(moved)
        loss = criterion(logits, y, before) if penalised else F.cross_entropy(logits, y)
        net.zero_grad()
        loss.backward()

    calls: dict[str, Callable[[], object]] = {"ours": lambda: step(True), "peer": lambda: step(False)}
    yield compared("a step of RS-AAER against RS-FGSM", medians(calls, repeats), 1.1, f"{len(x)} images of 28 x 28")


def _one_step(net: nn.Module, x: Tensor, y: Tensor, repeats: int) -> Iterator[dict[str, object]]:
    net.eval()
    torchattacks = _installed("torchattacks")

    def plainly() -> Tensor:
        moved = (x + torch.empty_like(x).uniform_(-0.1, 0.1)).clamp(0, 1).requires_grad_()
        slope = torch.autograd.grad(F.cross_entropy(net(moved), y), moved)[0]
        return (x + (moved.detach() + 0.125 * slope.sign() - x).clamp(-0.1, 0.1)).clamp(0, 1)

    peer: Callable[[], object] = plainly
    if torchattacks is not None:
        attack = torchattacks.FFGSM(net, eps=0.1, alpha=0.125)
        peer = lambda: attack(x, y)  # noqa: E731
    calls: dict[str, Callable[[], object]] = {"ours": lambda: single_step_adversary(net, x, y, 0.1), "peer": peer}
    name = "FFGSM written plainly" if torchattacks is None else "torchattacks.FFGSM"
    yield compared(f"single_step_adversary against {name}", medians(calls, repeats), 1.2, f"{len(x)} images of 28 x 28")


def _ensemble(net: nn.Module, x: Tensor, repeats: int) -> Iterator[dict[str, object]]:
    torchattacks = _installed("torchattacks")
    if torchattacks is None:
        return
    with torch.no_grad():
        y = net(x).argmax(1)
    peer = torchattacks.AutoAttack(net, norm="Linf", eps=0.01, version="standard", n_classes=10, seed=0)
    calls: dict[str, Callable[[], object]] = {
        # It makes ten steps, where the authors and our defaults make a hundred.
        "ours": lambda: auto_attack(net, x, y, 0.01, steps=10, generator=torch.Generator().manual_seed(0)),
        "peer": lambda: peer(x, y),
    }
    yield compared(
        "auto_attack against torchattacks.AutoAttack", medians(calls, min(repeats, 3), 1), 1.2, f"{len(x)} images"
    )


def _bounds(net: nn.Module, x: Tensor, repeats: int) -> Iterator[dict[str, object]]:
    lirpa = _installed("auto_LiRPA")

    def plainly() -> tuple[Tensor, Tensor]:
        centre, radius = (
            (x + 0.1).clamp(0, 1) / 2 + (x - 0.1).clamp(0, 1) / 2,
            (x + 0.1).clamp(0, 1) / 2 - (x - 0.1).clamp(0, 1) / 2,
        )
        for layer in net:  # type: ignore[attr-defined]
            if isinstance(layer, nn.Conv2d):
                widened = F.conv2d(radius, layer.weight.abs(), None, layer.stride, layer.padding)
                centre, radius = layer(centre), widened
            elif isinstance(layer, nn.Linear):
                centre, radius = layer(centre), radius @ layer.weight.abs().T
            elif isinstance(layer, nn.ReLU):
                lower, upper = (centre - radius).relu(), (centre + radius).relu()
                centre, radius = (lower + upper) / 2, (upper - lower) / 2
            else:
                centre, radius = centre.flatten(1), radius.flatten(1)
        return centre - radius, centre + radius

    peer: Callable[[], object] = plainly
    if lirpa is not None:
        bounded = lirpa.BoundedModule(net, x)
        inside = lirpa.BoundedTensor(x, lirpa.PerturbationLpNorm(norm=float("inf"), eps=0.1))
        peer = lambda: bounded.compute_bounds(x=(inside,), method="IBP")  # noqa: E731
    calls: dict[str, Callable[[], object]] = {"ours": lambda: propagate(net, box_around(x, 0.1)), "peer": peer}
    name = "a loop written for this network" if lirpa is None else "auto_LiRPA (IBP)"
    yield compared(f"interval bounds against {name}", medians(calls, repeats), 1.3, f"{len(x)} images of 28 x 28")


def _features(net: nn.Module, x: Tensor, repeats: int) -> Iterator[dict[str, object]]:
    point = x.clone().requires_grad_()
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: torch.autograd.grad(feature_log_norm_loss(net, point), point),
        "peer": lambda: torch.autograd.grad(net(point).sum(), point),
    }
    yield compared(
        "gradient of the GD-UAP loss against one of the logits", medians(calls, repeats), 1.3, f"{len(x)} images"
    )


def _queries(net: nn.Module, x: Tensor, y: Tensor, repeats: int) -> Iterator[dict[str, object]]:
    targets, q = y[: len(x)], 64

    def values(copies: Tensor) -> Tensor:
        losses = F.cross_entropy(net(copies.flatten(0, 1)), targets.repeat(len(copies)), reduction="none")
        return losses.view(copies.shape[:2])

    @torch.no_grad()
    def one_by_one() -> Tensor:
        total, here = torch.zeros_like(x), values(x[None])[0]
        for _ in range(q):
            move = F.normalize(torch.randn_like(x).flatten(1), dim=1).view_as(x)
            total += ((values((x + 0.005 * move)[None])[0] - here) / 0.005).view(-1, 1, 1, 1) * move
        return total * (x[0].numel() / q)

    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: zo_gradient(values, x, method="rge", q=q),
        "peer": one_by_one,
    }
    yield compared("zo_gradient against a loop over directions", medians(calls, repeats, 1), 1.0, f"{q} directions")


def _votes(net: nn.Module, x: Tensor, n: int, repeats: int) -> Iterator[dict[str, object]]:
    @torch.no_grad()
    def forward() -> None:
        for first in range(0, n + 100, 500):
            net((x[:, None] + 0.25 * torch.randn(len(x), min(500, n + 100 - first), *x.shape[1:])).flatten(0, 1))

    calls: dict[str, Callable[[], object]] = {"ours": lambda: certify(net, x, 0.25, n=n), "peer": forward}
    yield compared("certify against the network's forward passes alone", medians(calls, repeats, 1), 1.2, f"{n} votes")


def _installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
