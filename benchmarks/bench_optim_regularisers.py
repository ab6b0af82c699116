"""What regularisers of the weights cost in a training step, beside the plain one and weight_norm, on two threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from benchmarks.timing import medians
from trimtab import nets, optim

PLAIN, WEIGHT_NORM = "plain", "torch weight_norm"


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds of a training step of 128 images with SGD."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if quick else 2)
    try:
        repeats, batch = (5, 16) if quick else (60, 128)
        generator = torch.Generator().manual_seed(0)
        x, y = torch.rand(batch, 1, 28, 28, generator=generator), torch.arange(batch) % 10
        models: dict[str, Callable[[], nn.Module]] = {
            "CNN": lambda: nets.small_cnn(width=4 if quick else 32),
            "784-256-256-10 MLP": lambda: nets.mlp(784, (256, 256)),
        }
        for name, make in models.items():
            yield from _companders(name, make, x, y, repeats)
        yield from _self_tuning(x, y, repeats)
    finally:
        torch.set_num_threads(threads)


def _step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def _weight_norm(model: nn.Module) -> nn.Module:
    for layer in list(model.modules()):
        if isinstance(layer, nn.Linear | nn.Conv2d):
            parametrizations.weight_norm(layer)
    return model


def _companders(
    name: str, make: Callable[[], nn.Module], x: Tensor, y: Tensor, repeats: int
) -> Iterator[dict[str, object]]:
    ours = {
        "WeightCompander": optim.apply_weight_compander(make()),
        "WeightCompander, learned": optim.apply_weight_compander(make(), learnable=True),
    }
    contestants = {PLAIN: make(), WEIGHT_NORM: _weight_norm(make()), **ours}
    times = medians({label: _step(model, x, y) for label, model in contestants.items()}, repeats)
    for label in ours:
        for peer, aim in ((PLAIN, 1.10), (WEIGHT_NORM, None)):
            ratio = times[label] / times[peer]
            yield {
                "what": f"{label}, {name}: step",
                "ours": 1e3 * times[label],
                "peer": 1e3 * times[peer],
                "ratio": ratio,
                "unit": "ms",
                "aim": f"<= {aim:g}" if aim else "",
                "met": ratio <= aim if aim else None,
                "note": f"against {peer}",
            }


def _self_tuning(x: Tensor, y: Tensor, repeats: int) -> Iterator[dict[str, object]]:
    def network() -> nn.Sequential:
        return nn.Sequential(
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(784, 256),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(256, 256),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(256, 10),
        )

    def tuner(penalty: bool) -> optim.SelfTuner:
        hparams = optim.HyperParameters(
            {
                **{name: optim.HyperParameter(0.2, 0.0, 0.9) for name in ("input", "first", "second")},
                "decay": optim.HyperParameter(1e-4, 0.0),
            }
        )
        model = optim.convert_to_stn(network(), hparams, dropout={"1": "input", "4": "first", "7": "second"})
        return optim.SelfTuner(
            model,
            hparams,
            penalty=(lambda m, h, v: optim.per_example_weight_decay(m, h, v["decay"])) if penalty else None,
        )

    dropout_alone, decayed = tuner(False), tuner(True)
    times = medians(
        {
            PLAIN: _step(network(), x, y),
            "train": lambda: dropout_alone.train_step(x, y),
            "train, decayed": lambda: decayed.train_step(x, y),
            "valid": lambda: decayed.valid_step(x, y),
        },
        repeats,
    )
    for what, ours, aim in (
        ("training step", times["train"], 2.0),
        ("training step with per-example weight decay", times["train, decayed"], None),
        ("training step with its half of a validation step", times["train"] + 0.5 * times["valid"], None),
    ):
        ratio = ours / times[PLAIN]
        yield {
            "what": f"SelfTuner, 784-256-256-10 MLP: {what}",
            "ours": 1e3 * ours,
            "peer": 1e3 * times[PLAIN],
            "ratio": ratio,
            "unit": "ms",
            "aim": f"<= {aim:g}" if aim else "",
            "met": ratio <= aim if aim else None,
            "note": "against the plain step with dropout",
        }
