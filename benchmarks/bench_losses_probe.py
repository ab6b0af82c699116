"""Fitting a linear probe beside logistic regression, and losses on bags beside the plain ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import lapack
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.naive_bayes import GaussianNB

from benchmarks.timing import compared, medians
from trimtab import losses


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds of a fit at 512 features, and of a loss forward and backward on bags of 5."""
    yield from _probes(*(1000, 64, 3) if quick else (10_000, 512, 5))
    yield from _ridges(*(500, 20, 3) if quick else (10_000, 100, 10))
    yield from _losses(*(1000, 5) if quick else (100_000, 40))


def _probes(n: int, d: int, repeats: int) -> Iterator[dict[str, object]]:
    rng = np.random.default_rng(0)
    y = np.arange(n) % 10
    X = rng.normal(size=(n, d)) + 0.3 * rng.normal(size=(10, d))[y]
    for name, peer, aim in (
        ("LogisticRegression (lbfgs)", LogisticRegression(max_iter=1000), 0.01),
        ("GaussianNB", GaussianNB(), 1.0),
    ):
        calls: dict[str, Callable[[], object]] = {
            "ours": lambda: losses.NaiveBayesProbe().fit(X, y),
            "peer": lambda peer=peer: peer.fit(X, y),
        }
        yield compared(f"NaiveBayesProbe against {name}", medians(calls, repeats, 1), aim, f"{n} samples, {d} features")


def _ridges(n: int, d: int, repeats: int) -> Iterator[dict[str, object]]:
    """Both search a parameter without single responses: five folds of eleven weights, or a penalty by left-out bags."""
    rng = np.random.default_rng(0)
    X, bag_index = rng.normal(size=(n, d)), np.arange(n) // 5
    y = (X @ rng.normal(size=d) + rng.normal(size=n)).reshape(-1, 5).mean(1)
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: losses.AggregateRidge(np.linspace(0, 1, 11)).fit(X, y, bag_index),
        "peer": lambda: RidgeCV(np.logspace(-3, 3, 11)).fit(X.reshape(-1, 5, d).mean(1), y),
    }
    members, folds = np.random.default_rng(1).normal(size=(n, d)), np.arange(n) // 5 % 5

    def grams() -> None:
        """What single samples add to bag means: deviations, their products, and a system for each fold and weight."""
        apart = members - members.reshape(-1, 5, d).mean(1)[bag_index]
        for part in (*(apart[folds == fold] for fold in range(5)), apart):
            gram = part.T @ part
            for _ in range(11 if part is not apart else 1):
                lapack.dpotrs(lapack.dpotrf(gram)[0], gram[0])

    calls["limit"] = lambda: (calls["peer"](), grams())
    seconds = medians(calls, repeats, 1)
    yield compared("AggregateRidge against RidgeCV on bag means", seconds, 1.0, f"{n} samples")
    note = "peer: RidgeCV, the products of samples that the instances' loss asks for, 55 systems of its search and one"
    yield compared("AggregateRidge against what it must read and solve", seconds, 1.25, note, peer="limit")


def _losses(n: int, repeats: int) -> Iterator[dict[str, object]]:
    generator = torch.Generator().manual_seed(0)
    pred = torch.randn(n, generator=generator, requires_grad=True)
    target, bag_index = torch.rand(n // 5, generator=generator), torch.arange(n) // 5
    plain: dict[str, Callable[..., torch.Tensor]] = {"mse": F.mse_loss, "bce": F.binary_cross_entropy_with_logits}
    for kind, aim in (("mse", 10.0), ("bce", 10.0)):
        criterion = losses.AggregateLoss(0.5, kind)
        peer = plain[kind]
        calls: dict[str, Callable[[], object]] = {
            "ours": lambda criterion=criterion: criterion(pred, target, bag_index).backward(),
            "peer": lambda peer=peer: peer(pred, target[bag_index]).backward(),
        }
        yield compared(
            f"AggregateLoss({kind}) against {peer.__name__} to repeated responses",
            medians(calls, repeats),
            aim,
            f"{n} samples, bags of 5; both losses, of bags and of samples",
        )
