"""Many clients at once beside a loop over them, as the released codes have it: a gradient audit, and weights."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import medians
from trimtab.federated import GradientInversionAudit, client_gradients, contrastive_weights


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """One row for each paper."""
    yield from gradient_audit(quick)
    yield from client_weights(quick)


def gradient_audit(quick: bool) -> Iterator[dict[str, object]]:
    """Milliseconds for steps on the pixels of all clients, each with one image of 14 x 14."""
    clients, steps = (4, 5) if quick else (16, 50)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    draws = torch.Generator().manual_seed(0)
    images, start = (torch.rand(clients, 1, 1, 14, 14, generator=draws) for _ in range(2))
    labels = torch.arange(clients)[:, None] % 10
    shared = client_gradients(model, images, labels)
    audit = GradientInversionAudit([nn.Identity()], model, (1, 14, 14), steps=[steps], lrs=[0.1], radii=[None])
    taken = medians(
        {
            "ours": partial(audit.run, shared, labels, start=start),
            "one by one": partial(one_by_one, model, shared, labels, start, steps),
        },
        1 if quick else 5,
    )
    ratio = taken["ours"] / taken["one by one"]
    yield {
        "what": f"gradient inversion, {clients} clients, {steps} steps",
        "ours": 1e3 * taken["ours"],
        "unit": "ms",
        "peer": 1e3 * taken["one by one"],
        "ratio": ratio,
        "aim": "0.5",
        "met": ratio <= 0.5,
        "note": "against a loop over clients, as in the released code",
    }


def client_weights(quick: bool) -> Iterator[dict[str, object]]:
    """Milliseconds to weight clients by the contrast of their representations."""
    clients, pairs, dim = (3, 200, 32) if quick else (10, 5000, 256)
    Z = F.normalize(torch.randn(clients, pairs, dim, generator=torch.Generator().manual_seed(0)), dim=2)
    G = Z.mean(0)

    def whole() -> Tensor:
        return torch.stack([(part @ G.T).log_softmax(1).diagonal() for part in Z]).softmax(0)

    taken = medians({"ours": partial(contrastive_weights, Z, G, 1024), "whole": whole}, 1 if quick else 3, 1)
    ratio = taken["ours"] / taken["whole"]
    yield {
        "what": f"contrastive weights of {clients} clients on {pairs:,} pairs",
        "ours": 1e3 * taken["ours"],
        "unit": "ms",
        "peer": 1e3 * taken["whole"],
        "ratio": ratio,
        "aim": "1.1",
        "met": ratio <= 1.1,
        "note": "against whole matrices of logits of one client after the other",
    }


def one_by_one(model: nn.Module, shared: tuple[Tensor, ...], labels: Tensor, start: Tensor, steps: int) -> None:
    """The same search with a loop over clients and double back-propagation."""
    weights = list(model.parameters())
    for k in range(len(labels)):
        x = start[k].clone().requires_grad_()
        optimizer, target = torch.optim.Adam([x], lr=0.1), torch.cat([part[k].flatten() for part in shared])
        for _ in range(steps):
            found = torch.autograd.grad(F.cross_entropy(model(x), labels[k]), weights, create_graph=True)
            distance = 1 - F.cosine_similarity(torch.cat([part.flatten() for part in found]), target, dim=0)
            (x.grad,) = torch.autograd.grad(distance, x)
            optimizer.step()
