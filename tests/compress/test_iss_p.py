from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from trimtab.compress import KeepMask, SoftShrinkage, magnitude_mask, magnitude_masks, mask_overlap, soft_shrink_


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 3))


def test_worked_example() -> None:
    weight = torch.tensor([1.0, -2.0, 3.0, -4.0])
    soft_shrink_(weight, 0.5)
    torch.testing.assert_close(weight, torch.tensor([0.99, -1.98, 3.0, -4.0]))


def test_factor_one_is_the_identity() -> None:
    weight = drawn(30)
    soft_shrink_(weight, 0.7, 1.0)
    assert torch.equal(weight, drawn(30))


def test_factor_zero_is_torchs_pruning() -> None:
    layer = nn.Linear(8, 5)
    weight = layer.weight.detach().clone()
    prune.l1_unstructured(layer, "weight", amount=24)
    soft_shrink_(weight, 0.6, 0.0)
    assert torch.equal(weight, layer.weight)


def test_without_gradients_the_same_ones_shrink_on() -> None:
    model = network()
    before, rule = model[0].weight.detach().clone(), SoftShrinkage(model, 0.5, 0.9)
    selection = rule.selected()
    for _ in range(5):
        rule.post_step()
    assert all(torch.equal(mask, selection[name]) for name, mask in rule.selected().items())
    mask = selection["0.weight"]
    torch.testing.assert_close(model[0].weight, torch.where(mask, before, 0.9**5 * before))


@pytest.mark.parametrize(("count", "sparsity", "gone"), [(1000, 0.999, 995), (10, 0.25, 3), (10, 0.3, 3), (7, 0.0, 0)])
def test_counts_are_exact(count: int, sparsity: float, gone: int) -> None:
    for weight in (drawn(count), torch.ones(count), drawn(count).round(), drawn(count).bfloat16()):
        assert int((~magnitude_mask(weight, sparsity, 0.995)).sum()) == gone


def test_one_weight_in_two_hundred_always_stays() -> None:
    weight = torch.arange(1.0, 1001.0)
    assert soft_shrink_(weight, 0.9999, 0.0).sum() == 5
    assert weight.count_nonzero() == 5


def test_of_equal_weights_the_first_goes() -> None:
    weight = torch.tensor([2.0, 1.0, -1.0, 1.0, 0.5])
    assert torch.equal(magnitude_mask(weight, 0.6), torch.tensor([True, False, False, True, False]))
    pattern = magnitude_mask(torch.ones(2, 4), (1, 4))
    assert torch.equal(pattern, torch.tensor([[False, False, False, True]] * 2))


def test_patterns_hold_in_every_block() -> None:
    weight = drawn(6, 2, 4)
    mask = magnitude_mask(weight, (2, 4))
    assert (mask.view(-1, 4).sum(1) == 2).all()
    blocks, kept = weight.abs().view(-1, 4), mask.view(-1, 4)
    assert (blocks.where(kept, math.inf).amin(1) >= blocks.where(~kept, 0).amax(1)).all()


def test_one_selection_over_all_layers() -> None:
    weights = [drawn(3, 4), 10 * drawn(8, seed=1)]
    masks = magnitude_masks(weights, 0.5)
    assert sum(int(mask.sum()) for mask in masks) == 10
    edge = torch.cat([w.abs()[m] for w, m in zip(weights, masks, strict=True)]).min()
    assert all((w.abs()[~m] < edge).all() for w, m in zip(weights, masks, strict=True))


def trained(model: nn.Module, steps: int, rule: SoftShrinkage | None = None) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        model(drawn(8, 4, seed=step)).square().mean().backward()
        optimizer.step()
        if rule is not None:
            rule.post_step()


def test_what_was_cut_stays_zero() -> None:
    model = network()
    rule = SoftShrinkage(model, 0.75, 0.5)
    trained(model, 5, rule)
    masks = rule.finalize()
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"0.weight": 10, "3.weight": 7}
    trained(model, 10)
    assert torch.equal(model[0].weight != 0, masks["0.weight"])
    parametrize.remove_parametrizations(model[0], "weight")
    assert torch.equal(model[0].weight != 0, masks["0.weight"])
    assert (model[1].weight != 1).any()  # norms train on, unpruned


def test_the_optimizer_of_before_goes_on() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    SoftShrinkage(model, 0.5).finalize()
    before = model[0].weight.detach().clone()
    model[0].weight.sum().backward()
    optimizer.step()
    assert ((model[0].weight != before) == (before != 0)).all()


def test_a_phase_ends_by_itself() -> None:
    model = network()
    rule = SoftShrinkage(model, 0.5, 0.9, phase=3)
    trained(model, 3, rule)
    assert not rule.masks
    assert model[0].weight.all()
    trained(model, 1, rule)
    masks = copy.deepcopy(rule.masks)
    trained(model, 4, rule)
    assert int((model[0].weight == 0).sum()) == 20
    assert all(torch.equal(mask, masks[name]) for name, mask in rule.masks.items())
    other = SoftShrinkage(network(), 0.5, 0.9, phase=3)
    other.load_state_dict(rule.state_dict())
    assert other.steps == 8
    assert torch.equal(other.masks["0.weight"], masks["0.weight"])
    with pytest.raises(ValueError, match="state"):
        other.load_state_dict({"steps": 9, "masks": {"0.weight": torch.ones(2, 2, dtype=torch.bool)}})
    assert other.steps == 8


def test_layers_by_name() -> None:
    model = network()
    assert set(SoftShrinkage(model, 0.5, skip=["3"]).selected()) == {"0.weight"}
    assert set(SoftShrinkage(model, 0.5, skip=["0.weight"]).selected()) == {"3.weight"}
    own = SoftShrinkage(model, {"0.weight": 0.5, "3.weight": (1, 5)}).selected()
    assert [int(mask.sum()) for mask in own.values()] == [20, 6]
    for options in ({"skip": ["stray"]}, {"sparsity": {"stray": 0.5}}, {"skip": ["0", "3"]}):
        with pytest.raises(ValueError, match=r"skip|sparsity|model"):
            SoftShrinkage(model, **{"sparsity": 0.5, **options})


class Transformer(nn.Module):
    """Tied to its embedding, with a table of places."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 8)
        self.places = nn.Parameter(0.1 * torch.randn(1, 5, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(x) + self.places))


def test_a_transformer_keeps_its_embeddings_and_places_whole() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Transformer()
    rule = SoftShrinkage(model, 0.75, 0.5)
    kinds = {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"}
    assert set(rule.weights) == {f"encoder.layers.{n}.{kind}" for n in range(2) for kind in kinds}
    assert set(SoftShrinkage(model, {"places": 0.5}).weights) == {"places"}
    tokens = torch.randint(6, (4, 5), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def trained_on() -> None:
        optimizer.zero_grad()
        model(tokens).square().mean().backward()
        optimizer.step()

    for _ in range(3):
        trained_on()
        rule.post_step()
    masks = rule.finalize()
    for _ in range(3):
        trained_on()
    assert all(int(mask.sum()) == mask.numel() // 4 for mask in masks.values())
    layer = model.encoder.layers[0]
    assert torch.equal(layer.self_attn.in_proj_weight != 0, masks["encoder.layers.0.self_attn.in_proj_weight"])
    assert model.embedding.weight.all()
    trained_answer = model(tokens).detach()
    with torch.no_grad():  # the fast path of inference sees the masks too
        torch.testing.assert_close(model.eval()(tokens), trained_answer, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": -0.1}, "sparsity"),
        ({"sparsity": (3, 2)}, "sparsity"),
        ({"sparsity": (2, 3)}, "sparsity"),
        ({"shrink": 1.1}, "shrink"),
        ({"phase": -1}, "phase"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        SoftShrinkage(network(), **{"sparsity": 0.5, **options})
    weight = drawn(2, 4)
    if "phase" not in options and options.get("sparsity") != (2, 3):
        with pytest.raises(ValueError, match=name):
            soft_shrink_(weight, **{"sparsity": 0.5, **options})
        assert torch.equal(weight, drawn(2, 4))


def test_finalizing_twice_is_refused() -> None:
    rule = SoftShrinkage(network(), 0.5)
    rule.finalize()
    with pytest.raises(RuntimeError, match="once"):
        rule.finalize()


def test_overlap_of_masks() -> None:
    one = torch.tensor([True, False, False, False])
    assert mask_overlap(one, one) == 1
    assert mask_overlap(one, ~one) == 0
    assert mask_overlap(torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)) == 1
    with pytest.raises(ValueError, match="other"):
        mask_overlap(one, one[:2])
    with pytest.raises(TypeError, match="mask"):
        KeepMask(torch.ones(3))


def test_tied_layers_are_pruned_as_one_and_stay_so() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    rule = SoftShrinkage(model, 0.5)
    assert list(rule.weights) == ["0.weight"]
    masks = rule.finalize()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(drawn(4, 6)).square().sum().backward()
        optimizer.step()
    for layer in (model[0], model[2]):
        parametrize.remove_parametrizations(layer, "weight")
        assert torch.equal(layer.weight != 0, masks["0.weight"])
    assert torch.equal(model[0].weight, model[2].weight)


def test_a_pattern_belongs_to_one_layer() -> None:
    with pytest.raises(TypeError, match="sparsity must be a share"):
        magnitude_masks([drawn(3), drawn(5)], (1, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weights must be of at least one layer"):
        magnitude_masks([], 0.5)
