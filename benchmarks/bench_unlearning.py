"""Attribution, margins, gradient surgery, divergences of edges and distances of weights beside plain code."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from sklearn.linear_model import Ridge
from torch import Tensor, nn
from torch.distributions import Bernoulli, kl_divergence

from benchmarks.timing import compared, medians
from trimtab.unlearning import (
    LinearDatamodel,
    RepulsionLoss,
    bernoulli_kl,
    denoising_error,
    insert_tokens,
    klom,
    preserve_gradient,
    search_tokens,
    subset_masks,
)


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds of one call."""
    repeats = 2 if quick else 10
    samples, models, points = (30, 40, 10) if quick else (500, 400, 400)
    masks = subset_masks(samples, models, generator=torch.Generator().manual_seed(0))
    outputs = _random(models, points, 10).double()
    flat = outputs.flatten(1).numpy()
    fitting = {
        "ours": lambda: LinearDatamodel(1.0).fit(masks, outputs),
        "peer": lambda: Ridge(1.0).fit(masks.double().numpy(), flat),
    }
    ours, peer = LinearDatamodel(1.0).fit(masks, outputs), Ridge(1.0).fit(masks.double().numpy(), flat)
    np.testing.assert_allclose(ours.coef_.flatten(1).T.numpy(), peer.coef_, atol=1e-8)
    note = f"{models} models on subsets of {samples} samples, 10 logits at {points} points"
    yield compared("LinearDatamodel, against scikit-learn's Ridge", medians(fitting, repeats, warmup=1), 1.2, note)

    one, other = _random(50, points), _random(50, points + 1)[:, :points]
    torch.testing.assert_close(klom(one, other), point_by_point(one, other))
    counting = {"ours": lambda: klom(one, other), "peer": lambda: point_by_point(one, other)}
    note = f"50 models of each kind at {points} points"
    yield compared("klom, against NumPy's histograms point by point", medians(counting, repeats, warmup=1), 0.2, note)

    width = 64 if quick else 512
    a, b = ({str(k): _random(width, width + k + shift) for k in range(8)} for shift in (0, 10))
    b = {name: g[:, : a[name].shape[1]] for name, g in b.items()}
    surgery: dict[str, Callable[[], object]] = {
        "ours": lambda: preserve_gradient(a, b),
        "peer": lambda: released(a, b),
    }
    for name, found in released(a, b).items():
        torch.testing.assert_close(preserve_gradient(a, b, scale="unit")[name], found)
    note = f"8 matrices of {width} x {width}, for which the release makes two unit copies"
    yield compared("preserve_gradient, against the release's formula", medians(surgery, repeats), 1.2, note)

    p, q = _random(100_000), _random(100_001)[:100_000]
    divergence = {
        "ours": lambda: bernoulli_kl(p, q),
        "peer": lambda: kl_divergence(Bernoulli(logits=p), Bernoulli(logits=q)),
    }
    note = "100,000 pairs; ours keeps probabilities off 0 and 1"
    yield compared("bernoulli_kl, against torch.distributions", medians(divergence, repeats), 1.5, note)

    model, references = _network(width), [_network(width) for _ in range(3)]
    penalty = RepulsionLoss(references, "el2")
    away = {"ours": lambda: penalty(model), "peer": lambda: tensor_by_tensor(model, references)}
    torch.testing.assert_close(penalty(model), tensor_by_tensor(model, references))
    note = f"3 adapted networks of 3 layers of {width} units"
    yield compared("RepulsionLoss, against a loop over networks and tensors", medians(away, repeats), 1.2, note)

    vocabulary, length, image = _random(1000, 64), torch.arange(8), _random(1, 256)
    bars, weight = torch.linspace(0.99, 0.05, 10), _random(64, 256) / 8

    def denoiser(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return x + cond.mean(1) @ weight

    def audit() -> object:
        return search_tokens(denoiser, vocabulary, bars, image, length, timesteps=[5], iterations=5)

    searching = {"ours": audit, "peer": lambda: without_search(denoiser, vocabulary, bars, image, length)}
    note = "5 iterations over 1,000 tokens of a model that costs next to nothing: what the search itself takes"
    yield compared("search_tokens, against the model's passes alone", medians(searching, repeats), 10.0, note)


def point_by_point(unlearned: Tensor, oracle: Tensor, bins: int = 20, eps: float = 1e-5) -> Tensor:
    """The divergence of margins as it reads, for one point after the other."""
    found = []
    for p, q in zip(unlearned.T.double().numpy(), oracle.T.double().numpy(), strict=True):
        ends = min(p.min(), q.min()), max(p.max(), q.max())
        one, other = (np.histogram(x, bins, range=ends)[0] / len(x) for x in (p, q))
        seen = one > 0
        found.append(float((one[seen] * np.log(one[seen] / np.maximum(other[seen], eps))).sum()))
    return torch.tensor(found, dtype=torch.float64)


def released(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    """The surgery as the authors' code has it: both gradients are made units, and the cosine is taken away."""
    found = {}
    for name, gradient in a.items():
        one, other = (g / (g.norm() + 1e-8) for g in (gradient, b[name]))
        cosine = torch.dot(one.flatten(), other.flatten())
        found[name] = gradient - cosine * other if cosine < 0 else gradient
    return found


def tensor_by_tensor(model: nn.Module, references: list[nn.Module]) -> Tensor:
    """The distance as it reads, and the exponential."""
    terms = [
        (p - q.detach()).square().mean()
        for reference in references
        for p, q in zip(model.parameters(), reference.parameters(), strict=True)
    ]
    return 100 * (-torch.stack(terms).mean()).exp()


def without_search(
    denoiser: Callable[[Tensor, Tensor, Tensor], Tensor], table: Tensor, bars: Tensor, image: Tensor, prompt: Tensor
) -> None:
    """Five passes forward and backward with tokens that stay as they are."""
    t, noise = torch.tensor([5]), torch.randn(image.shape)
    for _ in range(5):
        tokens = table[:3].clone().requires_grad_()
        cond = insert_tokens(table[prompt], tokens)[None]
        denoising_error(denoiser, image, cond, t, noise, bars).mean().backward()


def _network(width: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(3)))


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
