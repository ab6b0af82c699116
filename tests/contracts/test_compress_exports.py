"""What each way to shrink a model leaves behind: a model that goes to ONNX, and where it says so a smaller one."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trimtab.compress import (
    GAQAT,
    RF8,
    AdaptiveDeviation,
    ElasticTransformer,
    GroupEnvelope,
    LowRank,
    MinMaxActivation,
    MinMaxWeight,
    MixedOp,
    QuantNoiseConv2d,
    SoftShrinkage,
    Subnet,
    SubspaceSpec,
    compress_linear,
    filter_groups,
    make_dynamic,
    model_cost,
    prepare_elastic,
    prepare_quantized,
    remove_layers,
    scale_param_groups,
    set_config,
    uniform_config,
    without_filters,
)
from trimtab.nets import mlp, plain_cnn

Made = tuple[nn.Module, Tensor]


def images() -> Tensor:
    return torch.randn(3, 1, 14, 14, generator=torch.Generator().manual_seed(1))


def whole() -> nn.Module:
    """A network whose norms have seen something."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = plain_cnn(widths=(6, 8, 8, 12))
    model(images())
    return model.eval()


def baked(model: nn.Module) -> nn.Module:
    """The same with plain weights."""
    for layer in list(model.modules()):
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight")
    return model.eval()


def filters_removed() -> Made:
    model = whole()
    kept = {
        name: GroupEnvelope(groups, len(groups) // 2, lam=0.1).cut() for name, groups in filter_groups(model).items()
    }
    return without_filters(model, kept), images()


def weights_pruned(bake: bool) -> Made:
    model = whole()
    SoftShrinkage(model, 0.8).finalize()
    return baked(model) if bake else model, images()


def filters_predicted() -> Made:
    return make_dynamic(whole(), 0.8).eval(), images()


def factorised() -> Made:
    small, _ = compress_linear(mlp(196, (64, 32)).eval(), rank=4)
    return small, images()


def factors_multiplied() -> Made:
    model = mlp(196, (64, 32)).eval()
    parametrize.register_parametrization(model.features[1], "weight", LowRank(4))
    return baked(model), images()


def steps_learned() -> Made:
    return baked(prepare_quantized(whole(), images(), 4)), images()


def extremes() -> Made:
    make = {"weight": partial(MinMaxWeight, pass_clipped=True), "inputs": partial(MinMaxActivation, pass_clipped=True)}
    return baked(prepare_quantized(whole(), images(), 4, **make)), images()


def steps_frozen_in_turn() -> Made:
    model = prepare_quantized(whole(), images(), 4)
    rule = GAQAT(model, torch.optim.SGD(scale_param_groups(model, 1e-4), lr=0.01))
    rule.step(images(), torch.arange(3))
    return baked(model), images()


def sub_network(**form: bool) -> Made:
    model = prepare_elastic(whole(), images(), (2, 4, 8))
    set_config(model, uniform_config(model, 4, **form))
    return baked(model), images()


class Block(nn.Module):
    """A residual branch of a searched network, with one operation."""

    def __init__(self, mixture: MixedOp) -> None:
        super().__init__()
        name, self.bits = mixture.choice()
        size = int(name[0])
        self.around = AdaptiveDeviation(4)
        self.branch = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, size, padding=size // 2, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.around(x, self.branch, x)


def searched() -> Made:
    mixture = MixedOp({"3 x 3": QuantNoiseConv2d(4, 4, 3), "1 x 1": QuantNoiseConv2d(4, 4, 1)})
    block = Block(mixture)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), block, nn.Conv2d(4, 1, 3)).eval()
    return baked(prepare_quantized(model, images(), {"0": 8, "1.branch.1": block.bits, "2": 8})), images()


def two_digits() -> Made:
    model = whole()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(RF8().quantize(weight))
    return model, images()


def student() -> Made:
    spec = SubspaceSpec((2, 4), (8, 16), (1, 2), (2.0, 4.0))
    model = ElasticTransformer(spec, 10, 6, head_dim=4).extract(Subnet(4, 8, 1, 2.0))
    return remove_layers(model.eval(), ["layers.2"]), torch.arange(12).view(2, 6) % 10


WAYS: dict[str, Callable[[], Made]] = {
    "filters removed": filters_removed,
    "weights pruned, masks baked in": partial(weights_pruned, True),
    "weights pruned, under masks": partial(weights_pruned, False),
    "filters predicted": filters_predicted,
    "factorised": factorised,
    "factors multiplied": factors_multiplied,
    "learned steps": steps_learned,
    "extremes": extremes,
    "steps frozen in turn": steps_frozen_in_turn,
    "sub-network": sub_network,
    "sub-network, asymmetric": partial(sub_network, per_channel=False, weight_symmetric=False, input_symmetric=False),
    "searched": searched,
    "two digits": two_digits,
    "student": student,
}


def exported(model: nn.Module, x: Tensor) -> bytes:
    file = io.BytesIO()
    torch.onnx.export(model, (x,), file, input_names=["x"], dynamo=False)
    return file.getvalue()


@pytest.mark.parametrize("way", WAYS)
def test_runs_under_onnxruntime(way: str) -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = WAYS[way]()
    session = runtime.InferenceSession(exported(model, x), providers=["CPUExecutionProvider"])
    expected = model(x).detach()
    assert expected.std() > 1e-3
    torch.testing.assert_close(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("way", "before"), [("filters removed", whole), ("factorised", lambda: mlp(196, (64, 32)))])
def test_what_is_smaller_is_plain_and_does_less(way: str, before: Callable[[], nn.Module]) -> None:
    pytest.importorskip("onnx")
    large, (small, x) = before().eval(), WAYS[way]()
    assert {type(layer) for layer in small.modules()} == {type(layer) for layer in large.modules()}
    assert not any(parametrize.is_parametrized(layer) for layer in small.modules())
    assert model_cost(small, x).dense_multiply_adds < 0.5 * model_cost(large, x).multiply_adds
    assert sum(p.numel() for p in small.parameters()) < 0.5 * sum(p.numel() for p in large.parameters())
    assert len(exported(small, x)) < 0.75 * len(exported(large, x))


def test_what_keeps_its_shape_loads_into_the_plain_model() -> None:
    for way in ("weights pruned, masks baked in", "two digits"):
        model, x = WAYS[way]()
        other = whole()
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), model(x))
