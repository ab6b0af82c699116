"""Factorised, sliced and shortened transformers beside what they come from; losses beside plain formulas."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, vmap

from benchmarks.timing import compared, medians
from trimtab.compress import (
    ElasticTransformer,
    Subnet,
    SubspaceSpec,
    Transformer,
    attention_relation_loss,
    compress_linear,
    fisher_information,
    select_layers,
    trajectory_loss,
    weighted_low_rank,
)


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Factorisation and Fisher information, a slice of a shared network, the relation loss, the knapsack, an update."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        repeats = 2 if quick else 15
        yield _factors(64 if quick else 512, repeats)
        yield _fisher(quick, repeats)
        yield _smaller(quick, repeats)
        yield _slice(quick, repeats)
        yield _relations(quick, repeats)
        yield _knapsack(8 if quick else 14, repeats)
        yield _trajectory(repeats)
    finally:
        torch.set_num_threads(threads)


def _factors(size: int, repeats: int) -> dict[str, object]:
    matrix, weights = torch.randn(size, size), torch.rand(size) + 0.1

    def peer() -> None:
        left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        _ = left[:, :16] * values[:16], right[:16]

    seconds = medians({"ours": lambda: weighted_low_rank(matrix, 16, weights), "peer": peer}, repeats, 1)
    return compared(f"weighted factors of a {size} x {size} matrix against torch's SVD", seconds, aim=1.25)


def _losses(model: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).mT, batch[1], reduction="none").sum(1)


def _fisher(quick: bool, repeats: int) -> dict[str, object]:
    model = Transformer(50, 16, depth=1 if quick else 2)
    tokens = torch.randint(50, (4 if quick else 32, 17))
    x, y = tokens[:, :-1], tokens[:, 1:]
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def of_one(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, weights, (x[None],))[0], y, reduction="sum")

    def peer() -> dict[str, Tensor]:
        found = vmap(grad(of_one), (None, 0, 0))(weights, x, y)
        return {name: value.square().mean(0) for name, value in found.items()}

    ours = fisher_information(model, _losses, [(x, y)])
    same = all(torch.allclose(v, peer()[f"{n}.weight"], atol=1e-4, rtol=1e-3) for n, v in list(ours.items())[:1])
    calls = {"ours": lambda: fisher_information(model, _losses, [(x, y)]), "peer": peer}
    seconds = medians(calls, repeats, 1)
    return compared("Fisher information of a transformer against vmap of grad", seconds, aim=1.0, met=same)


def _smaller(quick: bool, repeats: int) -> dict[str, object]:
    width = 32 if quick else 256
    model = Transformer(50, 32, 2, width, 4, width // 4, 4 * width).eval()
    names = [name for name, layer in model.named_modules() if type(layer) is torch.nn.Linear and "layers" in name]
    small, _ = compress_linear(model, ratio=0.25, layers=names)
    tokens = torch.randint(50, (8, 32))
    with torch.no_grad():
        seconds = medians({"ours": lambda: small(tokens), "peer": lambda: model(tokens)}, repeats, 1)
    return compared("a transformer of a quarter of its matrices against the whole", seconds, aim=0.8)


def _slice(quick: bool, repeats: int) -> dict[str, object]:
    spec = SubspaceSpec((2, 4), (32, 64), (2, 4), (2.0, 4.0))
    student = ElasticTransformer(spec, 50, 32, head_dim=16)
    subnet = Subnet(2, 32, 2, 2.0) if quick else Subnet(4, 64, 4, 2.0)
    student.set_subnet(subnet)
    plain, tokens = student.extract(subnet), torch.randint(50, (8, 32))

    def step(model: torch.nn.Module) -> None:
        model(tokens).sum().backward()

    seconds = medians({"ours": lambda: step(student), "peer": lambda: step(plain)}, repeats, 1)
    return compared("a student inside the shared network against the same one cut out", seconds, aim=1.5)


def _relations(quick: bool, repeats: int) -> dict[str, object]:
    batch, length = (2, 8) if quick else (16, 64)
    own, other = torch.randn(3, batch, length, 48, requires_grad=True), torch.randn(3, batch, length, 96)

    def peer() -> None:
        total = torch.zeros(())
        for x, y in zip(own, other, strict=True):
            a, b = (v.view(batch, length, 4, -1).transpose(1, 2) for v in (x, y))
            log_a, log_b = ((v @ v.mT / v.shape[-1] ** 0.5).log_softmax(-1) for v in (a, b))
            total = total + F.kl_div(log_a, log_b, reduction="sum", log_target=True) / (batch * 4 * length)
        total.backward()

    calls = {"ours": lambda: attention_relation_loss(own, other, 4).backward(), "peer": peer}
    return compared("attention relations against a loop with kl_div", medians(calls, repeats, 1), aim=1.25)


def _knapsack(count: int, repeats: int) -> dict[str, object]:
    losses, sizes = torch.rand(count), torch.randint(1, 100, (count,)).float()
    target = float(sizes.sum()) / 2

    def peer() -> float:
        weighed = ((losses * torch.tensor(r)).sum() for r in _sets(sizes, target))
        return min(float(value) for value in weighed)

    found = float(losses[select_layers(losses, sizes, target)].sum())
    met = abs(found - peer()) < 1e-4
    calls = {"ours": lambda: select_layers(losses, sizes, target), "peer": peer}
    note = "the same total loss" if met else "another total loss"
    seconds = medians(calls, min(repeats, 3), 0)
    return compared(f"the choice among {count} layers against trying all sets", seconds, aim=0.5, met=met, note=note)


def _sets(sizes: Tensor, target: float) -> Iterator[tuple[int, ...]]:
    held = sizes.tolist()
    for taken in itertools.product((0, 1), repeat=len(held)):
        if sum(size for size, used in zip(held, taken, strict=True) if used) >= target:
            yield taken


def _trajectory(repeats: int) -> dict[str, object]:
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    count = sum(p.numel() for p in model.parameters())
    images, targets, lr = torch.randn(10, 64, requires_grad=True), torch.arange(10), torch.tensor(0.01)
    segment = torch.randn(3, count) * 0.1

    def ours() -> None:
        found = trajectory_loss(model, images, targets, segment, lr, steps=6, momentum=0.0, intermediate=None)
        found["total"].backward()

    def peer() -> None:
        weights = segment[0].clone().requires_grad_()
        for _ in range(6):
            first, bias, second, last = weights.split([2048, 32, 320, 10])
            hidden = F.relu(F.linear(images, first.view(32, 64), bias))
            loss = F.cross_entropy(F.linear(hidden, second.view(10, 32), last), targets)
            (gradient,) = torch.autograd.grad(loss, weights, create_graph=True)
            weights = weights - lr * gradient
        ratio = (weights - segment[2]).square().sum() / (segment[0] - segment[2]).square().sum()
        ratio.backward()

    seconds = medians({"ours": ours, "peer": peer}, repeats, 1)
    return compared("an update of matched trajectories against the loop written out", seconds, aim=1.5)
