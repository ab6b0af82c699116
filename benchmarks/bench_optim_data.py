"""Methods that change the training data: a step of AdaMixUp beside plain ones, and USEFUL beside its k-means."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from benchmarks.timing import medians
from trimtab import nets, optim


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds of a training step with its optimizer, and seconds of choosing examples, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from _steps(batch=16 if quick else 128, repeats=3 if quick else 40)
        with threadpool_limits(1):  # k-means has threads of its own
            yield from _choices(samples=2000 if quick else 50_000, repeats=1 if quick else 5)
    finally:
        torch.set_num_threads(threads)


def _steps(batch: int, repeats: int) -> Iterator[dict[str, object]]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(batch, 1, 28, 28, generator=generator), torch.randint(0, 10, (batch,), generator=generator)
    plain, mixed = nets.small_cnn(), nets.small_cnn()
    ada = optim.AdaMixUp(nets.small_cnn().features, 128, 10, optim.MixPolicy(nets.small_cnn().features, 128))

    def mixup_loss() -> Tensor:
        inputs, soft = optim.mixup(x, F.one_hot(y, 10).float(), 1.0, generator=generator)
        return F.cross_entropy(mixed(inputs), soft)

    def stepping(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

        def step() -> None:
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

        return step

    times = medians(
        {
            "plain": stepping(plain, lambda: F.cross_entropy(plain(x), y)),
            "MixUp": stepping(mixed, mixup_loss),
            "AdaMixUp": stepping(ada, lambda: ada.loss(x, y, generator=generator)["total"]),
        },
        repeats,
    )
    for ours, peer, aim in (("MixUp", "plain", 1.2), ("AdaMixUp", "plain", 3.0), ("AdaMixUp", "MixUp", None)):
        ratio = times[ours] / times[peer]
        yield {
            "what": f"{ours}, CNN, batch of {batch}: step",
            "ours": 1e3 * times[ours],
            "peer": 1e3 * times[peer],
            "ratio": ratio,
            "unit": "ms",
            "aim": f"<= {aim}" if aim else "",
            "met": ratio <= aim if aim else None,
            "note": f"against {peer}",
        }


def _choices(samples: int, repeats: int) -> Iterator[dict[str, object]]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (samples,), generator=generator)
    height = torch.where(torch.rand(samples, generator=generator) < 0.3, 1.0, 5.0)
    outputs = torch.randn(samples, 10, generator=generator) + height[:, None] * F.one_hot(labels, 10)
    losses = F.cross_entropy(outputs, labels, reduction="none")
    points = [outputs[labels == label].numpy() for label in range(10)]

    def cluster(**options: str) -> None:
        for rows_of_class in points:
            KMeans(2, n_init=10, random_state=0, **options).fit(rows_of_class)

    peers = {
        "scikit-learn KMeans for each class": cluster,
        "the same with Elkan's algorithm": lambda: cluster(algorithm="elkan"),
    }
    times = medians({"ours": lambda: optim.USEFUL().fit(outputs, labels, losses), **peers}, repeats, warmup=1)
    for peer in peers:
        aim = 1.25 if peer.startswith("scikit") else None
        ratio = times["ours"] / times[peer]
        yield {
            "what": f"USEFUL, {samples:,} outputs of 10 classes: fit",
            "ours": times["ours"],
            "peer": times[peer],
            "ratio": ratio,
            "unit": "s",
            "aim": f"<= {aim}" if aim else "",
            "met": ratio <= aim if aim else None,
            "note": f"against {peer}",
        }
