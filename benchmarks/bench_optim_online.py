"""Optimistic steps and learners beside torch's and a plain NumPy loop; separating classifiers beside scikit-learn's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, Perceptron
from torch import nn

from benchmarks.bench_optim import FUSED, MEMORY, against_memory, mlp, state_bytes, transformer
from benchmarks.passes import Sweep, sweeps
from benchmarks.timing import compiling, medians
from trimtab import optim


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds and bytes of `OptimisticGD`'s step, microseconds of a learner's round, time to separate classes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if quick else 2)
    try:
        models = {"1 x 16 MLP": mlp(16, 1)} if quick else {"8 x 512 MLP": mlp(), "30M transformer": transformer()}
        for model, shapes in models.items():
            yield from _steps(model, shapes, 5 if quick else 40)
        torch.set_num_threads(1)
        for streams in (2,) if quick else (1, 64, 512):
            yield _rounds(streams, rounds=10 if quick else 200, repeats=3 if quick else 15)
        for hard in (True, False):
            yield from _separation(hard, many=50 if quick else 2_000, repeats=2 if quick else 10)
    finally:
        torch.set_num_threads(threads)


def _steps(model: str, shapes: list[torch.Size], repeats: int) -> Iterator[dict[str, object]]:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    grads = [torch.randn(shape, generator=generator) for shape in shapes]

    def prepared(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> torch.optim.Optimizer:
        params = [nn.Parameter(p.clone()) for p in start]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        return make(params)

    ours = prepared(lambda params: optim.OptimisticGD(params, lr=1e-3, fused=True))
    eager = prepared(lambda params: optim.OptimisticGD(params, lr=1e-3))
    sgd = prepared(lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, fused=True))
    compiled = compiling(ours.step)
    passes = [Sweep(3, 2)]
    calls = {FUSED: ours.step, "eager": eager.step, "sgd": sgd.step, MEMORY: sweeps(shapes, passes)}
    times = medians(calls, repeats)
    yield against_memory(f"OptimisticGD, {model}: step", times, passes)
    yield {
        "what": f"OptimisticGD, {model}: step",
        "ours": 1e3 * times[FUSED],
        "peer": 1e3 * times["sgd"],
        "ratio": times[FUSED] / times["sgd"],
        "unit": "ms",
        "aim": "<= 1.15",
        "met": times[FUSED] <= 1.15 * times["sgd"],
        "note": f"against torch SGD with momentum, fused; {compiled}; uncompiled {1e3 * times['eager']:.3g} ms",
    }
    held, peer = state_bytes(ours) / 2**20, state_bytes(sgd) / 2**20
    yield {
        "what": f"OptimisticGD, {model}: state",
        "ours": held,
        "peer": peer,
        "ratio": held / peer,
        "unit": "MiB",
        "aim": "<= 1",
        "met": held <= peer,
        "note": "against torch SGD with momentum",
    }


def _rounds(streams: int, rounds: int, repeats: int) -> dict[str, object]:
    """Convex step sizes in a ball, in 20 dimensions, against a loop over streams such as one would write first."""
    centers = np.random.default_rng(0).standard_normal((rounds, streams, 20))
    as_tensor = torch.from_numpy(centers)

    def ours() -> torch.Tensor:
        x0 = torch.zeros(streams, 20, dtype=torch.float64)
        learner = optim.OptimisticOMD(x0, optim.Ball(1.0), optim.ConvexRate(2.0, 4.0, 1.0))
        for center in as_tensor:
            learner.update(learner.predict() - center)
        return learner.predict()

    def project(x: np.ndarray) -> np.ndarray:
        return x / max(1.0, float(np.linalg.norm(x)))

    def plain() -> np.ndarray:
        plays = []
        for stream in range(streams):
            anchor, hint, variation = np.zeros(20), np.zeros(20), 0.0
            x = anchor
            rate = 2.0 / np.sqrt(40 + 64)
            for t in range(rounds):
                gradient = x - centers[t, stream]
                anchor = project(anchor - rate * gradient)
                variation += float(np.sum((gradient - hint) ** 2))
                rate, hint = 2.0 / np.sqrt(40 + 64 + variation), gradient
                x = project(anchor - rate * hint)
            plays.append(x)
        return np.stack(plays)

    np.testing.assert_allclose(ours().numpy(), plain(), atol=1e-10)
    times = medians({"ours": ours, "plain": plain}, repeats, warmup=1)
    return {
        "what": f"OptimisticOMD, {streams} streams: round",
        "ours": 1e6 * times["ours"] / rounds,
        "peer": 1e6 * times["plain"] / rounds,
        "ratio": times["ours"] / times["plain"],
        "unit": "us",
        "note": f"against a NumPy loop over streams, to the same plays; {rounds / times['ours']:.3g} rounds a second",
    }


def _separation(hard: bool, many: int, repeats: int) -> Iterator[dict[str, object]]:
    generator = np.random.default_rng(0)
    few = 2 if hard else many
    X = 0.02 * generator.standard_normal((few + many, 20))
    X[:, 0] += 0.3
    X[:few, 1] -= 1
    X[few:, 1] += 1
    y = np.arange(len(X)) % 2
    X = X * (2 * y - 1)[:, None]
    contestants = {
        "NormalizedLogisticGD": optim.NormalizedLogisticGD(gamma=100.0),
        "LogisticGD": optim.LogisticGD(gamma=100.0),
        "sklearn Perceptron": Perceptron(fit_intercept=False, tol=None, max_iter=20, random_state=0),
        "sklearn LogisticRegression": LogisticRegression(fit_intercept=False, C=1e4),
    }
    times = medians({name: lambda e=e: e.fit(X, y) for name, e in contestants.items()}, repeats, warmup=1)
    wrong = {name: int((estimator.predict(X) != y).sum()) for name, estimator in contestants.items()}
    ours = times["NormalizedLogisticGD"]
    for name in list(contestants)[1:]:
        yield {
            "what": f"NormalizedLogisticGD, {few} hard of {few + many}: fit"
            if hard
            else f"NormalizedLogisticGD, balanced {few + many}: fit",
            "ours": 1e3 * ours,
            "peer": 1e3 * times[name],
            "ratio": ours / times[name],
            "unit": "ms",
            "note": f"against {name}; mistakes left: {wrong['NormalizedLogisticGD']} and {wrong[name]}",
        }
