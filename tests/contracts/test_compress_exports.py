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
    AdaDFQ,
    AdaptiveDeviation,
    ConditionalGenerator,
    ElasticTransformer,
    GroupEnvelope,
    LowRank,
    LSQWeight,
    MinMaxActivation,
    MinMaxWeight,
    MixedOp,
    PackedLayer,
    PackedWeight,
    QuantNoiseConv2d,
    SoftShrinkage,
    Subnet,
    SubspaceSpec,
    compress_linear,
    filter_groups,
    make_dynamic,
    model_cost,
    pack_quantized,
    prepare_elastic,
    prepare_quantized,
    remove_layers,
    scale_param_groups,
    set_config,
    uniform_config,
    without_filters,
)
from trimtab.compress.replacing import Skip
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


def by_learned_steps(bits: int = 4, **form: object) -> nn.Module:
    return prepare_quantized(whole(), images(), bits, weight=partial(LSQWeight, **form), ends=None).eval()


def by_extremes(bits: int = 4, **form: object) -> nn.Module:
    inputs = partial(MinMaxActivation, pass_clipped=bool(form.get("pass_clipped")))
    return prepare_quantized(
        whole(), images(), bits, weight=partial(MinMaxWeight, **form), inputs=inputs, ends=None
    ).eval()


def by_gaqat() -> nn.Module:
    model = prepare_quantized(whole(), images(), 4)
    rule = GAQAT(model, torch.optim.SGD(scale_param_groups(model, 1e-4), lr=0.01))
    for _ in range(3):
        rule.step(images(), torch.arange(3))
    return model.eval()


def by_adadfq() -> nn.Module:
    quantisers = {"weight": partial(MinMaxWeight, pass_clipped=True), "inputs": MinMaxActivation}
    teacher = whole()
    student = prepare_quantized(teacher, images(), 3, **quantisers)
    maker = ConditionalGenerator((1, 14, 14), 10, width=4)
    optimizers = torch.optim.SGD(student.parameters(), lr=1e-2), torch.optim.Adam(maker.parameters(), lr=1e-3)
    rule = AdaDFQ(teacher, student, maker, *optimizers, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        rule.step(batch_size=8)
    return student.eval()


def by_eqnet(**form: bool) -> nn.Module:
    model = prepare_elastic(whole(), images(), (2, 4, 8))
    set_config(model, uniform_config(model, 4, **form))
    return model.eval()


QUANTISED: dict[str, Callable[[], nn.Module]] = {
    **{f"LSQ, {bits} bits": partial(by_learned_steps, bits) for bits in (2, 3, 4, 5, 8)},
    "LSQ, a step a row": partial(by_learned_steps, per_channel=True),
    "extremes, 4 bits": by_extremes,
    "extremes, 8 bits": partial(by_extremes, 8),
    "extremes, symmetric": partial(by_extremes, symmetric=True),
    "extremes of all": partial(by_extremes, per_channel=False),
    "extremes, gradients beyond": partial(by_extremes, pass_clipped=True),
    "GAQAT": by_gaqat,
    "AdaDFQ": by_adadfq,
    "EQNet": by_eqnet,
    "EQNet, asymmetric": partial(by_eqnet, per_channel=True, weight_symmetric=False, input_symmetric=False),
    "EQNet, asymmetric of all": partial(by_eqnet, per_channel=False, weight_symmetric=False),
}


def packed(way: str) -> Made:
    return pack_quantized(QUANTISED[way]()), images()


WAYS: dict[str, Callable[[], Made]] = {
    **{f"packed {way}": partial(packed, way) for way in QUANTISED},
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


def large_transformer() -> nn.Module:
    spec = SubspaceSpec((2, 4), (32, 64), (2, 4), (2.0, 4.0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ElasticTransformer(spec, 30, 16, head_dim=16).extract(Subnet(4, 64, 4, 4.0)).eval()


def small_transformer() -> nn.Module:
    spec = SubspaceSpec((2, 4), (32, 64), (2, 4), (2.0, 4.0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ElasticTransformer(spec, 30, 16, head_dim=16).extract(Subnet(2, 32, 2, 2.0)).eval()


def every_second_layer() -> nn.Module:
    return remove_layers(large_transformer(), ["layers.0", "layers.2"])


@pytest.mark.parametrize(("way", "most"), [(small_transformer, 0.3), (every_second_layer, 0.6)])
def test_a_shallower_transformer_is_smaller_and_does_less(way: Callable[[], nn.Module], most: float) -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    large, small = large_transformer(), way()
    x = torch.arange(32).view(2, 16) % 30
    assert {type(layer) for layer in small.modules()} <= {type(layer) for layer in large.modules()} | {Skip}
    assert model_cost(small, x).multiply_adds < most * model_cost(large, x).multiply_adds
    assert sum(p.numel() for p in small.parameters()) < most * sum(p.numel() for p in large.parameters())
    file = exported(small, x)
    assert len(file) < (most + 0.1) * len(exported(large, x))
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    torch.testing.assert_close(found, small(x).detach(), atol=1e-4, rtol=1e-4)


def test_what_keeps_its_shape_loads_into_the_plain_model() -> None:
    for way in ("weights pruned, masks baked in", "two digits"):
        model, x = WAYS[way]()
        other = whole()
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("way", QUANTISED)
def test_packed_codes_make_the_very_weights(way: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = QUANTISED[way]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, small = images(), pack_quantized(model)
    layers = {name: layer for name, layer in small.named_modules() if isinstance(layer, PackedLayer)}
    assert len(layers) == 5
    for name, layer in layers.items():
        assert torch.equal(layer.weight(), model.get_submodule(name).weight)
    assert torch.equal(small(x), model(x))
    assert not any(p.requires_grad for p in small.parameters())
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = pack_quantized(model)
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(x), small(x))


def wide() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = plain_cnn(widths=(32, 64, 64, 64))
    model(images())
    return model.eval()


@pytest.mark.parametrize(("bits", "share"), [(8, 0.30), (4, 0.17), (2, 0.11)])
def test_what_is_packed_is_as_small_as_its_bits_say(bits: int, share: float) -> None:
    pytest.importorskip("onnx")
    model, x = wide(), images()
    small = pack_quantized(prepare_quantized(model, x, bits, ends=None))

    def stored(held: nn.Module) -> int:
        file = io.BytesIO()
        torch.save(held.state_dict(), file)
        return len(file.getvalue())

    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    codes = sum(layer.weight.packed.nbytes for layer in small.modules() if isinstance(layer, PackedLayer))
    assert weights * bits / 8 <= codes <= weights * bits / 8 + 5
    numbers = sum(value.nbytes for value in model.state_dict().values())
    assert sum(value.nbytes for value in small.state_dict().values()) < share * numbers
    assert stored(small) < (share + 0.05) * stored(model)
    assert len(exported(small, x)) < (share + 0.10) * len(exported(model, x))


def test_packing_refuses_by_name_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="quantised weights, got none"):
        pack_quantized(whole())
    with pytest.raises(ValueError, match="at most 8 bits to be packed, got 9"):
        pack_quantized(prepare_quantized(whole(), images(), 9))
    masked = by_learned_steps()
    parametrize.register_parametrization(masked.head, "weight", nn.Identity())
    with pytest.raises(ValueError, match="weight of head once and last"):
        pack_quantized(masked)
    codes, step = torch.tensor([[-2, 1]]), torch.tensor(0.5)
    for given, name in (
        ({"codes": torch.tensor([[2]])}, "codes"),
        ({"codes": torch.tensor([[0.5]])}, "codes"),
        ({"codes": torch.zeros(0, 2)}, "codes"),
        ({"step": torch.tensor(0.0)}, "step"),
        ({"step": torch.ones(3)}, "step"),
        ({"step": torch.tensor(torch.nan)}, "step"),
        ({"zero_point": torch.tensor(2.0)}, "zero_point"),
        ({"offset": torch.zeros(1)}, "offset"),
        ({"bits": 9}, "bits"),
        ({"bits": 1}, "bits"),
    ):
        with pytest.raises(ValueError, match=f"^{name} must"):
            PackedWeight(**{"codes": codes, "step": step, "bits": 2} | given)
    with pytest.raises(TypeError, match="layer must be a convolution or linear"):
        PackedLayer(nn.ReLU(), PackedWeight(codes, step, 2))
    with pytest.raises(ValueError, match="weight must be of shape"):
        PackedLayer(nn.Linear(3, 1), PackedWeight(codes, step, 2))
