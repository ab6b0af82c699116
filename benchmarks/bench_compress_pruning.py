"""Pruning and shrinkage beside what PyTorch and SciPy have for it, or beside the step that they follow."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import numpy as np
import torch
from scipy.stats import gennorm
from torch import Tensor, nn
from torch.nn.utils import prune

from benchmarks.timing import compared, medians
from trimtab.compress import (
    BackSlash,
    GeneralizedGaussian,
    dynamic_layers,
    filter_groups,
    make_dynamic,
    prox_group_envelope,
    soft_shrink_,
    without_filters,
)
from trimtab.nets import plain_cnn


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds of one step or call."""
    count, repeats = (20_000, 2) if quick else (1_000_000, 15)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1000, count // 1000, generator=generator)
    yield from _envelope(weight.flatten()[:512].abs(), 1.0, 3 * repeats)
    yield from _envelope(weight.flatten().abs(), 1.0, repeats)
    yield from _soft_shrinkage(weight, repeats)
    yield from _back_slash(weight, repeats)
    yield from _sampling(count, repeats)
    yield from _skipping(16 if quick else 128, repeats)
    yield from _removing(8 if quick else 64, repeats)


def _envelope(norms: Tensor, aim: float, repeats: int) -> Iterator[dict[str, object]]:
    k, lam = len(norms) // 4, 0.1

    def bisection() -> Tensor:
        slope, low, high = lam**0.5 * norms.double(), 0.0, 1e6
        for _ in range(60):
            eta = (low + high) / 2
            low, high = (low, eta) if float((eta * slope - lam).clamp(0, 1).sum()) >= k else (eta, high)
        u = (high * slope - lam).clamp(0, 1)
        return u / (u + lam)

    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: prox_group_envelope(norms, k, lam),
        "peer": bisection,
    }
    seconds, note = medians(calls, repeats), f"{len(norms)} groups, 60 halvings"
    yield compared("prox_group_envelope against bisection", seconds, aim, note)


def _soft_shrinkage(weight: Tensor, repeats: int) -> Iterator[dict[str, object]]:
    ours, layer = weight.clone(), nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)

    def pruned() -> None:
        prune.l1_unstructured(layer, "weight", amount=0.9)
        prune.remove(layer, "weight")

    calls: dict[str, Callable[[], object]] = {"ours": lambda: soft_shrink_(ours, 0.9), "peer": pruned}
    note = f"{weight.numel()} weights"
    yield compared("soft_shrink_ against torch's l1_unstructured", medians(calls, repeats), 1.0, note)


def _back_slash(weight: Tensor, repeats: int) -> Iterator[dict[str, object]]:
    one, other = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    rule, adam = BackSlash([one], rdo=0.01), torch.optim.Adam([other])
    other.grad = torch.ones_like(other)
    calls: dict[str, Callable[[], object]] = {"ours": rule.post_step, "peer": adam.step}
    note = f"{weight.numel()} weights; the shape is estimated every 100 steps"
    yield compared("BackSlash beside the step of Adam before it", medians(calls, repeats), 3.0, note)


def _sampling(count: int, repeats: int) -> Iterator[dict[str, object]]:
    law, generator = GeneralizedGaussian(torch.tensor(0.8), torch.tensor(1.0)), torch.Generator().manual_seed(0)
    rng, power = np.random.default_rng(0), torch.full((count,), 1 + 1 / 0.8)
    # The law's numbers are powers of Gamma numbers with a random sign, which decide how fast both are.
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: law.sample((count,), generator),
        "peer": lambda: gennorm.rvs(0.8, size=count, random_state=rng),
        "limit": lambda: (torch._standard_gamma(power, generator=generator), torch.rand(count, generator=generator)),
    }
    seconds, note = medians(calls, repeats), f"{count} numbers"
    yield compared("GeneralizedGaussian against SciPy's gennorm", seconds, 1.0, note)
    yield compared("GeneralizedGaussian against PyTorch's draws from a Gamma law", seconds, 1.2, note, peer="limit")


def _skipping(width: int, repeats: int) -> Iterator[dict[str, object]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ).eval()
        skipping = make_dynamic(plain, 0.8)
        x = torch.randn(1, 3, 32, 32)
    for layer in dynamic_layers(skipping):
        layer.skipping = True
        nn.init.zeros_(layer.predictor.linear.weight)
        with torch.no_grad():
            layer.predictor.linear.bias.fill_(1.0)[layer.conv.out_channels // 2 :] = -1.0

    @torch.no_grad()
    def run(model: nn.Module) -> Tensor:
        out: Tensor = model(x)
        return out

    calls: dict[str, Callable[[], object]] = {"ours": lambda: run(skipping), "peer": lambda: run(plain)}
    note = f"one image, two convolutions of {width} filters"
    yield compared("half of the filters skipped, against none", medians(calls, repeats), 1.0, note)


def _removing(width: int, repeats: int) -> Iterator[dict[str, object]]:
    model, x = plain_cnn(widths=(width, 2 * width, 2 * width, 4 * width)).eval(), torch.randn(1, 1, 28, 28)
    gone = {name: list(range(1, len(groups), 2)) for name, groups in filter_groups(model).items()}
    kept = {name: torch.arange(0, len(groups), 2) for name, groups in filter_groups(model).items()}
    note = f"four convolutions of {width} to {4 * width} filters"
    if find_spec("torch_pruning"):
        import torch_pruning

        def graph(of: nn.Module) -> torch_pruning.DependencyGraph:
            return torch_pruning.DependencyGraph().build_dependency(of, example_inputs=x)

        def cut() -> None:
            small = copy.deepcopy(model)
            found = graph(small)
            for name, idxs in gone.items():
                conv = small.get_submodule(name)
                found.get_pruning_group(conv, torch_pruning.prune_conv_out_channels, idxs=idxs).prune()

        calls: dict[str, Callable[[], object]] = {"ours": lambda: filter_groups(model), "peer": lambda: graph(model)}
        seconds = medians(calls, repeats)
        yield compared("filter_groups against torch-pruning's graph", seconds, 1.0, note + "; theirs traces the model")
        calls = {"ours": lambda: without_filters(model, kept), "peer": cut}
        seconds = medians(calls, repeats)
        yield compared("without_filters against torch-pruning", seconds, 1.0, "half of " + note + ", on a copy")
    small, images = without_filters(model, kept), torch.randn(16, 1, 28, 28)

    @torch.no_grad()
    def run(held: nn.Module) -> Tensor:
        out: Tensor = held(images)
        return out

    calls = {"ours": lambda: run(small), "peer": lambda: run(model)}
    yield compared("half of the filters removed, against none", medians(calls, repeats), 0.5, note + ", 16 images")
    if find_spec("onnx") and find_spec("onnxruntime"):
        import onnxruntime

        def session(held: nn.Module) -> onnxruntime.InferenceSession:
            file, options = io.BytesIO(), onnxruntime.SessionOptions()
            torch.onnx.export(held, (images,), file, input_names=["x"], dynamo=False)
            options.intra_op_num_threads = torch.get_num_threads()
            return onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])

        one, other, given = session(small), session(model), {"x": images.numpy()}
        calls = {"ours": lambda: one.run(None, given), "peer": lambda: other.run(None, given)}
        yield compared("the same under onnxruntime", medians(calls, repeats), 0.5, note + ", 16 images")
