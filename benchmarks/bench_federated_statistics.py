"""Class moments, draws from them and realigned heads, beside plain loops over classes and what a user has at hand."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.timing import compared, medians
from trimtab.federated import SCAFFOLD, ClassMoments, FedAvg, FedDyn, FedLoGe, GaussianExpander, sample_virtual
from trimtab.nets import mlp


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds for features of 64 numbers in 10 classes, and for one client's round."""
    size, repeats = (500, 3) if quick else (5000, 20)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(size, 64, generator=generator)
    y = torch.arange(size) % 10
    yield from _moments(z, y, repeats)
    yield from _draws(z, y, repeats)
    yield from _expansion(z[: size // 10], y[: size // 10], repeats)
    yield from _clients(200 if quick else 500, repeats)


def _moments(z: Tensor, y: Tensor, repeats: int) -> Iterator[dict[str, object]]:
    plain, labels = z.numpy(), y.numpy()
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: ClassMoments.from_features(z, y, 10),
        "peer": lambda: [np.cov(plain[labels == label], rowvar=False) for label in range(10)],
    }
    yield compared("ClassMoments.from_features against numpy.cov", medians(calls, repeats), 1.0, f"{len(z)} features")


def _draws(z: Tensor, y: Tensor, repeats: int) -> Iterator[dict[str, object]]:
    moments = ClassMoments.from_features(z, y, 10)

    def by_class() -> list[Tensor]:
        ridge = 1e-6 * torch.eye(z.shape[1])
        return [
            torch.distributions.MultivariateNormal(mean, cov + ridge).sample((500,))
            for mean, cov in zip(moments.means, moments.covariances(), strict=True)
        ]

    calls: dict[str, Callable[[], object]] = {"ours": lambda: sample_virtual(moments, 500), "peer": by_class}
    note = "500 draws a class; eigenvalues, which singular covariances ask for, cost more than Cholesky"
    yield compared("sample_virtual against MultivariateNormal", medians(calls, repeats), 2.0, note)


def _expansion(x: Tensor, y: Tensor, repeats: int) -> Iterator[dict[str, object]]:
    present = torch.cat([y, torch.zeros(len(y), dtype=torch.long)])  # a class that is larger than the others
    data = torch.cat([x, x])
    most = int(torch.bincount(present).max())
    expander = GaussianExpander(ClassMoments.from_features(data, present, 10).covariances())

    def plainly() -> Tensor:
        drawn = [data]
        for label in range(10):
            own = data[present == label]
            count = most - len(own)
            drawn.append(own[torch.randint(len(own), (count,))] + torch.randn(count, 64) @ expander.factors[label].T)
        return torch.cat(drawn)

    peer: Callable[[], object] = plainly
    imblearn = _installed("imblearn.over_sampling")
    if imblearn is not None:
        smote, plain, labels = imblearn.SMOTE(k_neighbors=3, random_state=0), data.numpy(), present.numpy()
        peer = lambda: smote.fit_resample(plain, labels)  # noqa: E731
    calls: dict[str, Callable[[], object]] = {"ours": lambda: expander.expand(data, present, most), "peer": peer}
    name = "a loop over classes" if imblearn is None else "imblearn's SMOTE"
    yield compared(
        f"GaussianExpander.expand against {name}", medians(calls, repeats), 1.5, f"{len(data)} samples to {most}"
    )


def _clients(samples: int, repeats: int) -> Iterator[dict[str, object]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = mlp(784, (128, 64))
        data = (torch.randn(samples, 784), torch.randint(10, (samples,)))

        def one_round(algorithm: Any) -> Callable[[], object]:
            server = algorithm.init_server(model, 10)
            sent = algorithm.configure(server)
            client = algorithm.init_client(model, data)
            draws = torch.Generator().manual_seed(0)
            return lambda: algorithm.client_update(model, sent, client, data, generator=draws)

        plain = one_round(FedAvg(0.1))
        for name, algorithm, aim in (
            ("SCAFFOLD", SCAFFOLD(0.1), 1.3),
            ("FedDyn", FedDyn(0.1), 1.3),
            ("FedLoGe", FedLoGe(0.1, 1, 50, etf_steps=10), 1.6),
        ):
            seconds = medians({"ours": one_round(algorithm), "peer": plain}, repeats)
            yield compared(
                f"a client's round of {name} against FedAvg's", seconds, aim, f"{samples} images, batches of 50"
            )
    finally:
        torch.set_num_threads(threads)


def _installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
