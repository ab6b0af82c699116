from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trimtab.finetune import AdaptedModel, AdapterConfig, LoRAConfig, SoMAConfig, SORSAConfig, apply_adapter


def mlp() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def named(targets: str | list[str], **options: object) -> set[str]:
    model = nn.ModuleDict({"block": nn.ModuleDict({"q": nn.Linear(4, 4), "mlp_q": nn.Linear(4, 4)}), "q": mlp()})
    adapters = apply_adapter(model, SORSAConfig(r=1, target_modules=targets, **options))
    return {name.rpartition(".")[0].removesuffix(".weight") for name in adapters.adapter_state_dict()["tensors"]}


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (["block.q"], {"block.q"}),
        (["q"], {"block.q"}),  # "q" itself is a container; "mlp_q" ends in q, but not in ".q"
        (["mlp_q", "q.0"], {"block.mlp_q", "q.0"}),
        (("q.0",), {"q.0"}),
        (r"q\.\d", {"q.0", "q.2", "q.4"}),
        (r".*_q|q\.4", {"block.mlp_q", "q.4"}),
        ("all-linear", {"block.q", "block.mlp_q", "q.0", "q.2", "q.4"}),
    ],
)
def test_targets(targets: str | list[str], found: set[str]) -> None:
    assert named(targets) == found


@pytest.mark.parametrize(
    ("targets", "listed"),
    [(["q", "k_proj", "v_proj"], r"\['k_proj', 'v_proj'\]"), ([], r"\[\]"), ("k_.*", r"\['k_\.\*'\]"), (["1"], "1")],
)
def test_unmatched_targets_are_named_with_what_there_is(targets: str | list[str], listed: str) -> None:
    with pytest.raises(ValueError, match=f"target_modules must be .*{listed}.*block.mlp_q"):
        named(targets)


def test_a_misfit_is_named_and_leaves_the_model_as_it_was() -> None:
    model = mlp()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"4\.weight: r must be in \[1, 3\], got 5"):
        apply_adapter(model, SORSAConfig(r=5, target_modules=["0", "4"]))
    assert model.state_dict().keys() == state.keys()
    assert all(p.requires_grad for p in model.parameters())
    norm = nn.Sequential(nn.LayerNorm(4))
    with pytest.raises(ValueError, match=r"0\.weight: weight must have at least 2"):
        apply_adapter(norm, SORSAConfig(r=1, target_modules=["0"]))


def test_a_bare_layer() -> None:
    layer = nn.Linear(4, 3)
    adapters = apply_adapter(layer, SORSAConfig(r=1, target_modules=""))
    assert set(adapters.adapter_state_dict()["tensors"]) >= {"weight.A", "weight.s", "weight.B"}
    assert "forward" not in vars(type(layer))  # a small weight is written out


def test_requires_grad_is_given_back() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    for keep in (True, False):
        adapters = apply_adapter(model, SORSAConfig(r=2, target_modules=["0", "2"]))
        model[4].requires_grad_(True)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == {
            f"{layer}.parametrizations.weight.0.{factor}" for layer in "02" for factor in "AsB"
        } | {"4.weight", "4.bias"}
        adapters.remove(keep_merged=keep)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("keep", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("merge_first", [False, True])
def test_two_adapters_live_and_leave_without_each_other(
    order: tuple[int, int], keep: tuple[bool, bool], merge_first: bool
) -> None:
    model = mlp()
    model[4].bias.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    handles = [apply_adapter(model, SORSAConfig(r=2, target_modules=["0"]))]
    model[4].weight.requires_grad_(True)  # by hand, and to stay so
    if merge_first:
        handles[0].merge()
    handles.append(apply_adapter(model, SORSAConfig(r=2, target_modules=["2"])))
    if merge_first:
        handles[0].unmerge()
    sizes = [handle.num_trainable() for handle in handles]
    assert sizes == [2 * (5 + 8 + 1), 2 * (8 + 8 + 1)]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(sizes) + model[4].weight.numel()
    first, last = order
    handles[first].remove(keep_merged=keep[first])
    assert handles[last].num_trainable() == sizes[last]
    assert {n for n, p in model.named_parameters() if p.requires_grad and "parametrizations" not in n} == {"4.weight"}
    handles[last].remove(keep_merged=keep[last])
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_an_adapter_on_a_merged_weight_has_to_leave_first() -> None:
    model, x = mlp(), torch.randn(3, 5)
    lower = apply_adapter(model, SORSAConfig(r=2, target_modules=["0"]))
    lower.merge()
    upper = apply_adapter(model, SORSAConfig(r=1, target_modules=["0"]))
    expected = model(x)
    for call in (lower.unmerge, lambda: lower.remove(keep_merged=False)):
        with pytest.raises(RuntimeError, match=r"0\.weight has a later adapter"):
            call()
    torch.testing.assert_close(model(x), expected)
    lower.remove()
    upper.remove()
    assert all(p.requires_grad for p in model.parameters())


def test_adapting_a_copy_leaves_what_its_adapters_train() -> None:
    model = mlp()
    apply_adapter(model, SORSAConfig(r=2, target_modules=["0"]))
    copied = copy.deepcopy(model)
    apply_adapter(copied, SORSAConfig(r=2, target_modules=["2"]))
    assert len([p for p in copied.parameters() if p.requires_grad]) == 6


class Shift(nn.Module):
    """A parametrization of another kind: it works on tensors of any shape and keeps a boolean buffer."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", weight.detach().abs() < 0.2)
        self.values = nn.Parameter(weight.detach()[self.mask])

    def forward(self, weight: Tensor) -> Tensor:
        return weight.masked_scatter(self.mask, self.values)


@dataclass(frozen=True, kw_only=True)
class ShiftConfig(AdapterConfig):
    parameters: tuple[str, ...] = ("weight", "bias")

    def build(self, weight: Tensor) -> nn.Module:
        return Shift(weight)


def test_any_parametrization_fits() -> None:
    model, x = mlp(), torch.randn(20, 5, generator=torch.Generator().manual_seed(1))
    before, state = model(x), copy.deepcopy(model.state_dict())
    adapters = apply_adapter(model, ShiftConfig(target_modules=r"\d"))
    assert torch.equal(model(x), before)
    assert adapters.num_trainable() == sum(int((v.abs() < 0.2).sum()) for v in state.values())
    model(x).square().sum().backward()
    torch.optim.SGD(adapters.trainable_parameters(), lr=0.5).step()
    other = mlp()
    apply_adapter(other, ShiftConfig(target_modules=r"\d")).load_adapter_state_dict(adapters.adapter_state_dict())
    assert torch.equal(other(x), model(x))
    with pytest.raises(TypeError, match="adapter must have a low-rank form, got Shift"):
        adapters.to_lora_delta()
    adapters.remove()
    for name, value in model.state_dict().items():
        kept = state[name].abs() >= 0.2
        assert torch.equal(value[kept], state[name][kept])
        assert not torch.equal(value, state[name]) or name.endswith("bias")  # a bias may have no small entry


def test_config_without_build() -> None:
    with pytest.raises(NotImplementedError, match="build"):
        apply_adapter(mlp(), AdapterConfig(target_modules=["0"]))


def test_loading_needs_the_same_settings_but_not_the_same_targets_spelling() -> None:
    x = torch.ones(2, 5)
    model = mlp()
    adapters = apply_adapter(model, SORSAConfig(r=2, target_modules=["0"]))
    with torch.no_grad():
        adapters.trainable_parameters()[1].mul_(1.5)
    state = adapters.adapter_state_dict()
    other = mlp()
    same = apply_adapter(other, SORSAConfig(r=2, target_modules="0"))
    same.load_adapter_state_dict(state)
    torch.testing.assert_close(other(x), model(x))
    for config, match in (
        (SORSAConfig(r=3, target_modules=["0"]), "r=3 as the model, got r=2"),
        (SORSAConfig(r=2, alpha=4.0, target_modules=["0"]), "alpha=4.0 as the model, got alpha=None"),
        (SORSAConfig(r=2, target_modules=["2"]), "missing.*2.weight.*unknown.*0.weight"),
    ):
        with pytest.raises(ValueError, match=match):
            apply_adapter(mlp(), config).load_adapter_state_dict(state)


def test_loading_not_strictly_takes_what_both_have() -> None:
    wide, narrow = mlp(), mlp()
    one = apply_adapter(wide, SORSAConfig(r=2, target_modules=["0"]))
    with torch.no_grad():
        one.trainable_parameters()[1].mul_(1.5)
    two = apply_adapter(narrow, SORSAConfig(r=2, target_modules=["0", "2"]))
    untouched = narrow[2].weight.clone()
    two.load_adapter_state_dict(one.adapter_state_dict(), strict=False)
    torch.testing.assert_close(narrow[0].weight, wide[0].weight)
    assert torch.equal(narrow[2].weight, untouched)


def test_tied_weights_warn_and_stay_apart() -> None:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    model[1].weight = model[0].weight
    before = model[0].weight.detach().clone()
    with pytest.warns(UserWarning, match=r"0\.weight shares"):
        adapters = apply_adapter(model, SORSAConfig(r=1, target_modules=["1"]))
    with torch.no_grad():
        adapters.trainable_parameters()[1].mul_(3.0)
    adapters.merge()
    assert torch.equal(model[0].weight, before)
    assert not torch.allclose(model[1].weight, before)
    adapters.remove(keep_merged=False)
    assert model[1].weight is model[0].weight


def test_a_module_under_two_names_is_adapted_once(recwarn: pytest.WarningsRecorder) -> None:
    layer = nn.Linear(4, 4)
    adapters = apply_adapter(nn.Sequential(layer, layer), SORSAConfig(r=1, target_modules=["0"]))
    assert adapters.num_trainable() == 9
    assert not recwarn.list


def shifted(adapters: AdaptedModel) -> AdaptedModel:
    with torch.no_grad():
        for parameter in adapters.trainable_parameters():
            parameter.add_(0.1)
    return adapters


def tied(bias: bool = False) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4, bias), nn.Tanh(), nn.Linear(4, 4, bias))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize("targets", [["0"], ["0", "2"]])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.filterwarnings("ignore:.*shares an adapted weight")
def test_tied_weights_merge_and_come_back(targets: list[str], keep: bool) -> None:
    model, x = tied(bias=True), torch.ones(2, 4)
    before = model(x)
    adapters = shifted(apply_adapter(model, LoRAConfig(r=2, target_modules=targets)))
    learned = model(x)
    adapters.merge()
    torch.testing.assert_close(model(x), learned)
    assert not any(p.requires_grad for p in model.parameters())
    adapters.unmerge()
    assert torch.equal(model(x), learned)
    adapters.merge()
    adapters.remove(keep_merged=keep)
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(x), learned if keep else before)
    assert keep or model[2].weight is model[0].weight


def test_a_second_adapter_keeps_tied_weights_frozen_until_it_leaves() -> None:
    model = nn.Sequential(tied(), nn.Linear(4, 4))
    first = apply_adapter(model, LoRAConfig(r=1, target_modules=["0.0", "0.2"]))
    first.merge()
    second = apply_adapter(model, LoRAConfig(r=1, target_modules=["1"]))
    first.remove(keep_merged=False)
    assert model[0][0].weight is model[0][2].weight
    assert not model[0][0].weight.requires_grad
    second.remove()
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("leave", ["merge and remove", "remove", "give back", "unmerge and give back"])
def test_parameters_keep_their_order(leave: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2), nn.Conv1d(4, 4, 1))
    names = [name for name, _ in model.named_parameters()]
    adapters = [
        apply_adapter(model, LoRAConfig(r=1, target_modules=targets)) for targets in (["0"], ["1", "out_proj"], ["2"])
    ]
    for adapter in adapters:
        if "merge" in leave:
            adapter.merge()
        if leave == "unmerge and give back":
            adapter.unmerge()
        adapter.remove(keep_merged="give back" not in leave)
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make", [LoRAConfig, SORSAConfig, SoMAConfig])
def test_another_type_while_merged(dtype: torch.dtype, make: type[AdapterConfig]) -> None:
    model, x = mlp(), torch.ones(2, 5)
    adapters = shifted(apply_adapter(model, make(r=2, target_modules=["0"])))
    expected = model(x)
    adapters.merge()
    model.to(dtype)
    adapters.unmerge()
    found = model(x.to(dtype))
    assert found.dtype == dtype
    assert all(p.dtype == (dtype if dtype == torch.float64 else torch.float32) for p in adapters.trainable_parameters())
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)
    adapters.merge()
    adapters.remove(keep_merged=False)
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_inference_mode_spoils_no_weight() -> None:
    model, x = mlp(), torch.ones(2, 5)
    with torch.inference_mode():
        adapters = apply_adapter(model, LoRAConfig(r=2, target_modules=["0"]))
    model(x).sum().backward()
    assert all(p.grad is not None for p in adapters.trainable_parameters())
    with torch.inference_mode():
        adapters.merge()
    adapters.remove()
    model(x).sum().backward()
    assert model[0].weight.grad is not None


def test_a_refused_adapter_draws_nothing_and_names_what_is_wrong() -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"2.weight: weight must be finite"):
        apply_adapter(model, LoRAConfig(r=2, target_modules=["0", "2"]))
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(TypeError, match="parameters must be a sequence of names, got the string 'weight'"):
        apply_adapter(model, LoRAConfig(target_modules=["0"], parameters="weight"))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: None,
        lambda state: list(state),
        lambda state: {**state, "config": None},
        lambda state: {**state, "tensors": None},
        lambda state: {**state, "tensors": dict.fromkeys(state["tensors"])},
    ],
)
def test_what_is_no_state_is_refused_by_name(spoil: Callable[[dict[str, object]], object]) -> None:
    adapters = apply_adapter(mlp(), LoRAConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="state must"):
        adapters.load_adapter_state_dict(spoil(adapters.adapter_state_dict()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_moving_while_merged() -> None:
    model, x = mlp(), torch.ones(2, 5)
    adapters = apply_adapter(model, SORSAConfig(r=2, target_modules=["0"]))
    expected = model(x)
    adapters.merge()
    model.cuda()
    adapters.unmerge()
    torch.testing.assert_close(model(x.cuda()).cpu(), expected)


# Large linear layers: computed from the adapter's factors, the weight not written out


LOW_RANK = {
    "SORSA": lambda: SORSAConfig(r=8, alpha=4.0, target_modules=["0", "2"]),
    "SoMA": lambda: SoMAConfig(r=8, alpha=4.0, target_modules=["0", "2"]),
    "LoRA": lambda: LoRAConfig(r=8, alpha=4.0, target_modules=["0", "2"]),
}


def large(bias: bool = True) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(520, 512, bias), nn.ReLU(), nn.Linear(512, 516, bias)).double()


def disturbed(adapters: AdaptedModel) -> AdaptedModel:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in adapters.trainable_parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.05)
    return adapters


def in_parts(layer: nn.Module) -> bool:
    return "forward" in vars(type(layer))


@pytest.mark.parametrize("make", LOW_RANK.values(), ids=LOW_RANK)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(), (0,), (3,), (2, 3)])
def test_large_layers_have_the_values_and_gradients_of_the_weight_written_out(
    make: Callable[[], AdapterConfig], bias: bool, batch: tuple[int, ...]
) -> None:
    model = large(bias)
    adapters = disturbed(apply_adapter(model, make()))
    assert in_parts(model[0])
    assert in_parts(model[2])
    x = torch.randn(*batch, 520, dtype=torch.double, generator=torch.Generator().manual_seed(1), requires_grad=True)

    def written_out(x: Tensor) -> Tensor:
        hidden = nn.functional.linear(x, model[0].weight, model[0].bias).relu()
        return nn.functional.linear(hidden, model[2].weight, model[2].bias)

    wanted, given = written_out(x), model(x)
    torch.testing.assert_close(given, wanted)
    for ours, theirs in zip(
        *(torch.autograd.grad(out.square().sum(), [x, *adapters.trainable_parameters()]) for out in (given, wanted)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("make", LOW_RANK.values(), ids=LOW_RANK)
def test_a_large_layer_starts_bit_for_bit_as_it_was_and_keeps_no_weight_for_backward(
    make: Callable[[], AdapterConfig],
) -> None:
    model, x = large().float(), torch.randn(4, 520, generator=torch.Generator().manual_seed(1))
    expected = model(x)
    adapters = apply_adapter(model, make())
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(0 if t.untyped_storage().data_ptr() in own else t.numel()) or t, lambda t: t
    ):
        assert torch.equal(model(x), expected)
    assert max(kept) < 2**17
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(x), large().float()(x))
    disturbed(adapters)
    exact = model(x)
    half = copy.deepcopy(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(half(x).float(), exact, atol=0.05, rtol=0.02)
    adapters.remove(keep_merged=False)
    assert torch.equal(model(x), expected)
    assert type(model[0]) is nn.Linear
    assert torch.equal(half(x), exact)  # a copy keeps its adapters, and its way


def test_a_small_change_survives_half_precision() -> None:
    """Under autocast, the change of the output is that of the weight to half precision's own relative error."""
    model, x = large().float(), torch.randn(32, 520, generator=torch.Generator().manual_seed(1))
    adapters = apply_adapter(model, SORSAConfig(r=8, target_modules=["0"]))
    layer = model[0]
    with torch.no_grad():
        adapters.trainable_parameters()[0].mul_(1 + 1e-4)
    change = x @ (layer.weight - layer.parametrizations.weight.original).detach().T
    A, B = layer.parametrizations.weight[0].to_lora_delta()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = nn.functional.linear(nn.functional.linear(x, A), B).float()
    assert (given - change).norm() < 0.02 * change.norm()


def test_a_large_layer_is_written_out_where_its_weight_has_company_or_a_forward_of_its_own() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    x = torch.randn(3, 520, generator=torch.Generator().manual_seed(1))
    layer = Doubled(520, 512)
    expected = layer(x)
    apply_adapter(layer, SORSAConfig(r=2, target_modules=""))
    assert not in_parts(layer)
    torch.testing.assert_close(layer(x), expected)
    layer = nn.Linear(520, 512, bias=False)
    expected = layer(x)
    apply_adapter(layer, SORSAConfig(r=2, target_modules=""))
    assert in_parts(layer)
    parametrize.register_parametrization(layer, "weight", Twice())
    torch.testing.assert_close(layer(x), 2 * expected)


def test_another_kind_of_adapter_after_one_in_parts() -> None:
    """The class stays as long as the bias has an adapter, and with it the forward pass."""
    layer, x = nn.Linear(520, 512), torch.randn(3, 520, generator=torch.Generator().manual_seed(1))
    expected = layer(x)
    apply_adapter(layer, ShiftConfig(target_modules="", parameters=("bias",)))
    first = disturbed(apply_adapter(layer, SORSAConfig(r=2, target_modules="")))
    assert in_parts(layer)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    first.remove(keep_merged=False)
    torch.testing.assert_close(layer(x), expected)
    apply_adapter(layer, ShiftConfig(target_modules="", parameters=("weight",)))
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("make", LOW_RANK.values(), ids=LOW_RANK)
def test_large_layers_under_function_transforms(make: Callable[[], AdapterConfig]) -> None:
    model = large().float()
    adapters = disturbed(apply_adapter(model, make()))
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == len(adapters.trainable_parameters())
    x = torch.randn(3, 520, generator=torch.Generator().manual_seed(1))

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (x,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained, x)
    together = torch.func.grad(loss)(trained, x)
    for name, gradients in each.items():
        torch.testing.assert_close(gradients.sum(0), together[name], atol=1e-3, rtol=1e-3)


def test_a_delta_stays_when_training_goes_on() -> None:
    model = mlp()
    adapters = apply_adapter(model, LoRAConfig(r=2, target_modules=["0"]))
    delta = adapters.to_lora_delta()["0.weight"]
    before = delta.A.clone()
    disturbed(adapters)
    assert torch.equal(delta.A, before)
    assert not delta.A.requires_grad


# Hugging Face models, built from their configs with random weights


def gpt2() -> tuple[nn.Module, list[str]]:
    transformers = pytest.importorskip("transformers")
    size = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 31, "n_positions": 12}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**size)), ["c_attn", "c_proj"]


def llama() -> tuple[nn.Module, list[str]]:
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=31, **size)), ["q_proj", "v_proj"]


def bert() -> tuple[nn.Module, list[str]]:
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=31, num_labels=3, **size)
    return transformers.BertForSequenceClassification(config), ["query", "value", "dense"]


TOKENS = torch.randint(0, 31, (3, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("build", [gpt2, llama, bert])
def test_hugging_face_models(build: object) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base, targets = build()  # type: ignore[operator]
    base.eval()
    model = copy.deepcopy(base)
    before = base(TOKENS).logits
    adapters = apply_adapter(model, SORSAConfig(r=3, target_modules=targets))
    torch.testing.assert_close(model(TOKENS).logits, before, atol=1e-5, rtol=0)
    optimizer = torch.optim.AdamW(adapters.trainable_parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(4):
        logits = model(TOKENS).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, -2), torch.zeros(logits[..., 0].numel(), dtype=torch.long))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = model(TOKENS).logits
    frozen = {name: value for name, value in model.state_dict().items() if ".parametrizations.weight.0." not in name}
    for name, value in frozen.items():
        assert torch.equal(value, base.state_dict()[name.replace("parametrizations.weight.original", "weight")])

    buffer = io.BytesIO()
    torch.save(adapters.adapter_state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    other = copy.deepcopy(base)
    apply_adapter(other, SORSAConfig(**state["config"])).load_adapter_state_dict(state)
    torch.testing.assert_close(other(TOKENS).logits, after, atol=1e-6, rtol=1e-5)

    adapters.merge()
    torch.testing.assert_close(model(TOKENS).logits, after, atol=1e-5, rtol=1e-5)
    base.load_state_dict(model.state_dict())
    torch.testing.assert_close(base(TOKENS).logits, after, atol=1e-5, rtol=1e-5)


def test_merged_hugging_face_model_is_saved_by_its_own_means(tmp_path: object) -> None:
    model, targets = llama()
    adapters = apply_adapter(model, SORSAConfig(r=2, target_modules=targets))
    with torch.no_grad():
        adapters.trainable_parameters()[1].mul_(1.5)
    adapters.remove()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits)


def test_saving_with_adapters_in_place_warns_by_name(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    safetensors_torch = pytest.importorskip("safetensors.torch")
    model, targets = llama()
    adapters = apply_adapter(model, SORSAConfig(r=2, target_modules=targets))
    copied = copy.deepcopy(model)
    with torch.no_grad():
        adapters.trainable_parameters()[1].mul_(1.5)
    for unmerged in (model, copied):
        with pytest.warns(UserWarning, match=r"self_attn\.q_proj\.weight.* anew: .*merge\(\) them before"):
            unmerged.save_pretrained(tmp_path / "adapted")
    saved = safetensors_torch.load_file(tmp_path / "adapted" / "model.safetensors")  # the copy's, not the original's
    name = "model.layers.0.self_attn.q_proj.parametrizations.weight.0.s"
    assert torch.equal(saved[name], copied.state_dict()[name])
    assert not torch.equal(saved[name], model.state_dict()[name])
    recwarn.clear()
    adapters.merge()
    model.save_pretrained(tmp_path / "merged")
    pickle.dumps(model)
    assert not recwarn.list
    adapters.unmerge()
    with pytest.warns(UserWarning, match="anew"):
        model.save_pretrained(tmp_path / "adapted")
    adapters.remove(keep_merged=False)
    recwarn.clear()
    model.save_pretrained(tmp_path / "plain")
    assert not recwarn.list


@pytest.mark.parametrize("build", [gpt2, llama, bert])
def test_all_linear_layers_are_those_of_peft(build: object) -> None:
    peft = pytest.importorskip("peft")
    model, _ = build()  # type: ignore[operator]
    task = peft.TaskType.SEQ_CLS if build is bert else peft.TaskType.CAUSAL_LM
    lora = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules="all-linear", task_type=task))
    theirs = {name.removeprefix("base_model.model.") for name in lora.targeted_module_names}
    adapters = apply_adapter(model, SORSAConfig(r=2, target_modules="all-linear"))
    ours = {name.removesuffix(".weight.A") for name in adapters.adapter_state_dict()["tensors"] if name.endswith(".A")}
    assert ours == theirs


@pytest.mark.parametrize("build", [gpt2, llama])
def test_lora_delta_loads_into_peft(build: object) -> None:
    peft = pytest.importorskip("peft")
    base, targets = build()  # type: ignore[operator]
    base.eval()
    model = copy.deepcopy(base)
    adapters = apply_adapter(model, SORSAConfig(r=2, alpha=3.0, target_modules=targets))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapters.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    assert not torch.allclose(model(TOKENS).logits, base(TOKENS).logits, atol=1e-3)
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets, fan_in_fan_out=build is gpt2)
    lora = peft.get_peft_model(copy.deepcopy(base), config)
    state = {}
    for name, delta in adapters.to_lora_delta().items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        state |= {f"{stem}.lora_A.weight": delta.A, f"{stem}.lora_B.weight": delta.B}
    peft.set_peft_model_state_dict(lora, state)
    torch.testing.assert_close(lora(TOKENS).logits, model(TOKENS).logits, atol=1e-5, rtol=1e-4)
