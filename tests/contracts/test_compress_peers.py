"""The same as torch-pruning and torch.ao or torchao, where the method is the same."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver, PerChannelMinMaxObserver
from torch.nn.utils import parametrize

from trimtab.compress import (
    LSQWeight,
    MinMaxActivation,
    MinMaxWeight,
    affine_qparams,
    fake_quantize,
    filter_groups,
    lsq_quantize,
    model_cost,
    without_filters,
)
from trimtab.nets import plain_cnn


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Residual(nn.Module):
    """What a branch adds; a shortcut where channels change."""

    def __init__(self, before: int, inner: int, after: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(before, inner, 3, padding=1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, after, 3, padding=1),
            nn.BatchNorm2d(after),
        )
        self.shortcut = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.branch(x) + self.shortcut(x)).relu()


def chain() -> nn.Module:
    """Flattened maps, so that a filter is several inputs of what reads it."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 25, 5),
    )


def residual() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        Residual(6, 10, 6),
        Residual(6, 8, 12),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, list[int]]]] = {
    "chain": (chain, {"0": [0, 2, 5], "4": [1, 2, 3, 6]}),
    "plain CNN": (plain_cnn, {"features.3": [*range(0, 24, 3)], "features.9": [*range(5, 20)]}),
    "residual": (residual, {"3.branch.0": [1, 4, 7, 9], "4.branch.0": [0, 1, 6]}),
}
"""How to make one, and the filters that stay."""


def network(name: str) -> nn.Module:
    """In eval mode, with norms that have seen something."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = NETWORKS[name][0]()
    model(normal(4, 1, 14, 14, seed=3))
    return model.eval()


def cut_by_peer(model: nn.Module, kept: Mapping[str, list[int]], x: Tensor) -> nn.Module:
    tp = pytest.importorskip("torch_pruning")
    small = copy.deepcopy(model)
    graph = tp.DependencyGraph().build_dependency(small, example_inputs=x)
    for name, stays in kept.items():
        conv = small.get_submodule(name)
        gone = sorted(set(range(conv.out_channels)) - set(stays))
        graph.get_pruning_group(conv, tp.prune_conv_out_channels, idxs=gone).prune()
    return small


@pytest.mark.parametrize("name", NETWORKS)
def test_removes_the_filters_that_torch_pruning_removes(name: str) -> None:
    model, kept, x = network(name), NETWORKS[name][1], normal(4, 1, 14, 14)
    theirs = cut_by_peer(model, kept, x[:1])
    ours = without_filters(model, {name: torch.tensor(stays) for name, stays in kept.items()})
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    assert model_cost(ours, x).multiply_adds == model_cost(theirs, x).multiply_adds < model_cost(model, x).multiply_adds


@pytest.mark.parametrize("name", NETWORKS)
def test_counts_the_multiply_adds_that_torch_pruning_counts(name: str) -> None:
    tp = pytest.importorskip("torch_pruning")
    model, x = network(name), normal(1, 1, 14, 14)
    cost = model_cost(model, x)
    total, parameters, theirs, _ = tp.utils.count_ops_and_params(model, x, layer_wise=True)
    assert cost.parameters == parameters
    extra = {}  # they also count the additions of biases

    def outputs(layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        extra[layer] = output.numel() if layer.bias is not None else 0

    layers = {layer.name: model.get_submodule(layer.name) for layer in cost.layers}
    handles = [layer.register_forward_hook(outputs) for layer in layers.values()]
    model(x)
    for handle in handles:
        handle.remove()
    for layer in cost.layers:
        module = layers[layer.name]
        assert layer.dense_multiply_adds == theirs[module] - extra[module], layer.name
    assert cost.multiply_adds < total  # and what norms, activations and pooling do


def test_groups_hold_what_torch_pruning_cuts_along_outputs() -> None:
    tp = pytest.importorskip("torch_pruning")
    model, kept = network("residual"), NETWORKS["residual"][1]
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=normal(1, 1, 14, 14))
    for name in kept:
        conv = model.get_submodule(name)
        group = graph.get_pruning_group(conv, tp.prune_conv_out_channels, idxs=[0])
        cut = {id(item.dep.target.module) for item in group if "out_channels" in item.dep.handler.__name__}
        held = {id(parameter) for parameter in filter_groups(model)[name].parameters}
        theirs = {id(p) for m in model.modules() if id(m) in cut for p in m.parameters(recurse=False)}
        assert held == theirs


FORMATS = list(itertools.product((2, 4, 8), (False, True)))
"""Bits, and whether ranges are symmetric about zero."""


def ends(bits: int, symmetric: bool) -> tuple[int, int]:
    """Of the peer's format: our symmetric step is the largest magnitude over the largest number, which theirs is where
    the format has as many negative numbers as positive ones."""
    largest = 2 ** (bits - 1) - 1
    return (-largest if symmetric else -largest - 1), largest


def same(ours: Tensor, theirs: Tensor, x: Tensor) -> None:
    """Bit for bit, but where a value lies halfway between two numbers: there both are as near."""
    differ = ours != theirs
    assert differ.float().mean() < 0.005
    torch.testing.assert_close((ours - x)[differ].abs(), (theirs - x)[differ].abs(), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounds_as_torch_does(bits: int, signed: bool) -> None:
    x = normal(4000) + 0.3
    smallest, largest = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    step, zero = affine_qparams(x.quantile(0.05), x.quantile(0.95), bits, signed=signed)
    theirs = torch.fake_quantize_per_tensor_affine(x, step.item(), int(zero), smallest, largest)
    for pass_clipped in (False, True):
        same(fake_quantize(x, step, zero, bits, signed=signed, pass_clipped=pass_clipped), theirs, x)


def test_halfway_both_are_as_near() -> None:
    x = (torch.arange(-6.0, 5.0) + 0.5) / 4
    ours = fake_quantize(x, torch.tensor(0.25), torch.tensor(1.0), 4)
    theirs = torch.fake_quantize_per_tensor_affine(x, 0.25, 1, -8, 7)
    assert torch.equal((ours - x).abs(), (theirs - x).abs())
    assert torch.equal(fake_quantize(x, torch.tensor(0.25), torch.tensor(1.0), 4, pass_clipped=True), theirs)


@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
def test_weights_by_channel_are_those_of_torch_ao(bits: int, symmetric: bool) -> None:
    weight = normal(6, 5, 3, 3) * torch.logspace(-2, 1, 6)[:, None, None, None] + 0.02
    smallest, largest = ends(bits, symmetric)
    scheme = torch.per_channel_symmetric if symmetric else torch.per_channel_affine
    observer = PerChannelMinMaxObserver(dtype=torch.qint8, qscheme=scheme, quant_min=smallest, quant_max=largest)
    observer(weight)
    step, zero = observer.calculate_qparams()
    low, high = weight.flatten(1).aminmax(dim=1)
    ours = affine_qparams(low, high, bits, symmetric=symmetric)
    assert torch.equal(ours[0], step)
    assert torch.equal(ours[1].int(), zero.int())
    theirs = torch.fake_quantize_per_channel_affine(weight, step, zero.int(), 0, smallest, largest)
    same(MinMaxWeight(weight, bits, symmetric=symmetric)(weight), theirs, weight)


def test_watched_inputs_are_those_of_torch_ao() -> None:
    first, second = normal(500), 2 * normal(500, seed=1) + 1
    theirs = FakeQuantize(MovingAverageMinMaxObserver, -8, 7, dtype=torch.qint8, averaging_constant=0.1)
    theirs(first)
    ours = MinMaxActivation(first, 4, momentum=0.1)
    ours.observing = True
    torch.testing.assert_close(ours(second), theirs(second), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_learned_steps_are_those_of_torch(bits: int) -> None:
    smallest, largest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    start = torch.tensor([0.7 / 2 ** (bits - 2)])
    x, slopes = normal(300), normal(300, seed=2)
    # torch takes what rounds into the range as inside, LSQ's paper what lies in it: next to its ends they differ
    near = ((x / start - smallest).abs() < 0.51) | ((x / start - largest).abs() < 0.51)
    x, slopes = x[~near], slopes[~near]
    assert ((x < smallest * start) | (x > largest * start)).any()
    zero = torch.zeros(1)
    found = []
    for quantize in (
        lambda x, step: lsq_quantize(x, step, bits, scale=0.3),
        lambda x, step: torch._fake_quantize_learnable_per_tensor_affine(x, step, zero, smallest, largest, 0.3),
    ):
        given, step = x.clone().requires_grad_(), start.clone().requires_grad_()
        out = quantize(given, step)
        (out * slopes).sum().backward()
        found.append((out.detach(), given.grad, step.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
def test_quantises_as_torchao_does(bits: int, symmetric: bool, per_channel: bool) -> None:
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    weight = normal(8, 40) * torch.logspace(-2, 1, 8)[:, None] + 0.02
    smallest, largest = ends(bits, symmetric)
    kind = primitives.MappingType.SYMMETRIC if symmetric else primitives.MappingType.ASYMMETRIC
    block = (1, 40) if per_channel else (8, 40)
    step, zero = primitives.choose_qparams_affine(weight, kind, block, torch.int8, smallest, largest)
    low, high = weight.aminmax(dim=1) if per_channel else weight.aminmax()
    ours = affine_qparams(low, high, bits, symmetric=symmetric)
    assert torch.equal(ours[0].flatten(), step.flatten())
    assert torch.equal(ours[1].flatten().int(), zero.flatten())
    whole = primitives.quantize_affine(weight, block, step, zero, torch.int8, smallest, largest)
    theirs = primitives.dequantize_affine(whole, block, step, zero, torch.int8, smallest, largest)
    same(MinMaxWeight(weight, bits, symmetric=symmetric, per_channel=per_channel)(weight), theirs, weight)


def test_finished_weights_are_whole_numbers_that_torchao_holds() -> None:
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    layer = nn.Linear(40, 8)
    parametrize.register_parametrization(layer, "weight", LSQWeight(layer.weight, 4, per_channel=True))
    step = layer.parametrizations.weight[0].step.detach().flatten()
    parametrize.remove_parametrizations(layer, "weight")
    zero = torch.zeros(8, dtype=torch.int32)
    small = primitives.quantize_affine(layer.weight, (1, 40), step, zero, torch.int8, -8, 7)
    assert small.element_size() == 1
    back = primitives.dequantize_affine(small, (1, 40), step, zero, torch.int8, -8, 7)
    torch.testing.assert_close(back, layer.weight.detach(), rtol=1e-5, atol=1e-7)
