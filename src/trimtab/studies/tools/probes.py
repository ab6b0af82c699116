"""How good features are, by a linear classifier, by a vote of neighbours and by how many of them there really are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.ops.pairwise import pairwise_cosine


def linear_accuracy(
    x: Float[Tensor, "n dim"],
    y: Int[Tensor, " n"],
    x_test: Float[Tensor, "test dim"],
    y_test: Int[Tensor, " test"],
    ridge: float = 1e-2,
) -> float:
    """Share of the test samples that a multinomial classifier, fitted to standardised features, gets right."""
    mean, deviation = x.mean(0), x.std(0)
    deviation = torch.where(deviation > 1e-6 * deviation.max().clamp(min=1e-12), deviation, 1.0)
    x, x_test = ((part - mean) / deviation for part in (x, x_test))
    classes = 1 + int(torch.cat([y, y_test]).max())
    weight = torch.zeros(classes, x.shape[1] + 1, device=x.device, requires_grad=True)
    ones = [torch.cat([part, torch.ones_like(part[:, :1])], 1) for part in (x, x_test)]
    optimizer = torch.optim.LBFGS([weight], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(ones[0] @ weight.T, y) + ridge / 2 * weight[:, :-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return ((ones[1] @ weight.detach().T).argmax(1) == y_test).float().mean().item()


def neighbours_accuracy(
    x: Float[Tensor, "n dim"],
    y: Int[Tensor, " n"],
    x_test: Float[Tensor, "test dim"],
    y_test: Int[Tensor, " test"],
    k: int = 20,
) -> float:
    """Share of the test samples that a vote of the nearest by cosine of centred features gets right."""
    mean = x.mean(0)
    near = pairwise_cosine(x_test - mean, x - mean).topk(min(k, len(x)), 1)
    votes = F.one_hot(y[near.indices]).float() * (near.values / 0.1).exp()[:, :, None]
    return (votes.sum(1).argmax(1) == y_test).float().mean().item()


def effective_rank(x: Float[Tensor, "n dim"]) -> float:
    """Exponential of the entropy of the centred features' singular values, each as a share of their sum."""
    values = torch.linalg.svdvals((x - x.mean(0)).double())
    if not float(values.sum()) > 0:
        return 1.0
    share = values / values.sum()
    return float(torch.special.entr(share).sum().exp())
