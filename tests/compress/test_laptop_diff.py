from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trimtab.compress import (
    Transformer,
    additivity,
    distillation_losses,
    normalized_feature_loss,
    recorded_features,
    removal_losses,
    remove_layers,
    select_layers,
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Branch(nn.Module):
    """x + x W."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + x @ self.weight


def chain(size: float = 0.02, width: int = 5) -> nn.Sequential:
    weights = (size * (i + 1) * drawn(width, width, seed=i) for i in range(6))
    return nn.Sequential(*(Branch(weight) for weight in weights))


LAYERS = [str(i) for i in range(6)]
X = drawn(40, 5, seed=99)


def outputs(model: nn.Module) -> Tensor:
    return model(X)


@pytest.mark.parametrize("seed", range(6))
def test_selection_is_as_good_as_the_best_of_all_sets(seed: int) -> None:
    count = 4 + seed
    losses, sizes = drawn(count, seed=seed).abs(), drawn(count, seed=seed + 50).abs().mul(100).round() + 1
    for share in (0.1, 0.35, 0.5, 0.8, 1.0):
        target = float(share * sizes.sum())
        found = select_layers(losses, sizes, target)
        assert sizes[found].sum() >= target
        sets = itertools.chain.from_iterable(itertools.combinations(range(count), n) for n in range(count + 1))
        best = min(float(losses[list(s)].sum()) for s in sets if float(sizes[list(s)].sum()) >= target)
        assert float(losses[found].sum()) == pytest.approx(best)


def test_selection_of_many_layers_stays_feasible_at_a_coarse_resolution() -> None:
    losses, sizes = drawn(40).abs(), drawn(40, seed=1).abs() + 0.1
    target = float(sizes.sum()) / 2
    coarse, fine = (select_layers(losses, sizes, target, resolution=n) for n in (20, 2000))
    assert sizes[coarse].sum() >= target
    assert losses[fine].sum() <= losses[coarse].sum() <= 1.5 * losses[fine].sum()
    assert select_layers(losses, sizes, float(sizes.sum()) - 1e-9, resolution=2) == list(range(40))


@pytest.mark.parametrize(
    ("losses", "sizes", "target", "message"),
    [
        ([1.0, 2.0], [1, 1], 3, "target must"),
        ([1.0, 2.0], [1, 1], -1, "target must"),
        ([1.0, 2.0], [1], 1, "sizes must"),
        ([1.0, -2.0], [1, 1], 1, "losses must"),
        ([1.0, 2.0], [1, -1], 0, "sizes must"),
        ([1.0, float("nan")], [1, 1], 1, "losses must"),
    ],
)
def test_bad_selections_are_refused(losses: list[float], sizes: list[int], target: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_layers(torch.tensor(losses), sizes, target)


def test_a_branch_that_does_nothing_costs_nothing_to_remove() -> None:
    model = chain()
    nn.init.zeros_(model[2].weight)
    before = copy.deepcopy(model.state_dict())
    losses = removal_losses(model, LAYERS, outputs)
    assert losses[2] == 0
    assert (losses[[0, 1, 3, 4, 5]] > 0).all()
    shorter = nn.Sequential(*(layer for i, layer in enumerate(model) if i != 4))
    torch.testing.assert_close(losses[4], (model(X) - shorter(X)).square().mean())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_losses_of_small_linear_branches_add_up() -> None:
    sets = [s for n in (1, 2, 3, 4) for s in itertools.combinations(range(6), n)]
    x = drawn(40, 40)
    # In many dimensions, what different branches add is nearly orthogonal.
    small = additivity(chain(0.001, 40), LAYERS, lambda model: model(x), sets)
    assert small.correlation > 0.99
    assert additivity(chain(0.3), LAYERS, outputs, sets).correlation < small.correlation
    ones = additivity(chain(), LAYERS, outputs, [[i] for i in range(6)])
    torch.testing.assert_close(ones.predicted, ones.measured)
    assert ones.correlation == pytest.approx(1)
    with pytest.raises(ValueError, match="sets must"):
        additivity(chain(), LAYERS, outputs, [[0]])


def test_the_correlation_is_numpys() -> None:
    sets = [[0], [1, 2], [3, 4, 5], [0, 5]]
    found = additivity(chain(0.6), LAYERS, outputs, sets)
    expected = np.corrcoef(found.predicted, found.measured)[0, 1]
    assert found.correlation == pytest.approx(expected)
    assert found.correlation < 0.9999


def test_outputs_that_differ_from_call_to_call_are_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="outputs must"):
        removal_losses(chain(), LAYERS, lambda model: model(X + torch.randn(40, 5, generator=generator)))
    with pytest.raises(ValueError, match="layers must"):
        removal_losses(chain(), [], outputs)
    with pytest.raises(ValueError, match="name must"):
        removal_losses(chain(), ["9"], outputs)


def test_removed_layers_are_gone_and_the_rest_trains() -> None:
    model = Transformer(7, 4, depth=2, hidden=8, heads=2, head_dim=4, mlp=16)
    names = ["layers.0.attention", "layers.1.mlp"]
    small = remove_layers(model, names)
    gone = sum(p.numel() for name in names for p in model.get_submodule(name).parameters())
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in model.parameters()) - gone
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    hidden = model.embed(tokens) + model.positions
    expected = model.head(model.norm(model.layers[1].attention(model.layers[0].mlp(hidden))))
    torch.testing.assert_close(small(tokens), expected)
    small(tokens).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    again = remove_layers(small, ["layers.1.attention"])
    assert again(tokens).shape == (2, 4, 7)


def test_the_feature_loss_is_its_formula() -> None:
    own, other = [drawn(3, 4), drawn(3, 2, 2, seed=1)], [drawn(3, 4, seed=2), 10 * drawn(3, 2, 2, seed=3)]
    distances = torch.stack([(a - b).square().mean() for a, b in zip(own, other, strict=True)])
    energies = torch.stack([b.square().mean() for b in other])
    for options, expected in (
        ({}, (distances / energies).sum()),
        ({"power": 1}, (distances / energies.sqrt()).sum()),
        ({"normalize": "max"}, (distances * energies.max() / energies).sum()),
        ({"normalize": None}, distances.sum()),
    ):
        torch.testing.assert_close(normalized_feature_loss(own, other, **options), expected)  # type: ignore[arg-type]
    assert normalized_feature_loss(other, other) == 0


def test_the_unit_of_a_stage_does_not_matter() -> None:
    own, other = [drawn(3, 4), drawn(3, 5, seed=1)], [drawn(3, 4, seed=2), drawn(3, 5, seed=3)]
    scaled = [own[0] * 1e4, own[1]], [other[0] * 1e4, other[1]]
    torch.testing.assert_close(normalized_feature_loss(*scaled), normalized_feature_loss(own, other))
    assert normalized_feature_loss(*scaled, normalize=None) > 1e6 * normalized_feature_loss(own, other, normalize=None)


def test_a_stage_at_rest_in_the_teacher_stays_finite() -> None:
    assert normalized_feature_loss([drawn(2, 3)], [torch.zeros(2, 3, dtype=torch.float64)]).isfinite()


def test_gradients_go_to_the_student_alone() -> None:
    own, teacher, target = (drawn(2, 3, seed=i).requires_grad_() for i in range(3))
    features, others = drawn(2, 4, seed=3).requires_grad_(), drawn(2, 4, seed=4).requires_grad_()

    def total(own: Tensor, features: Tensor) -> Tensor:
        return distillation_losses(own, teacher, target, [features], [others])["total"]

    assert torch.autograd.gradcheck(total, (own, features))
    total(own, features).backward()
    assert teacher.grad is None
    assert target.grad is None
    assert others.grad is None


def test_parts_of_the_loss_add_up() -> None:
    found = distillation_losses(drawn(2, 3), drawn(2, 3, seed=1), drawn(2, 3, seed=2), [drawn(2, 1)], [drawn(2, 1) + 1])
    torch.testing.assert_close(found["total"], found["task"] + found["output"] + found["feature"])
    torch.testing.assert_close(found["task"], (drawn(2, 3) - drawn(2, 3, seed=2)).square().mean())
    torch.testing.assert_close(found["output"], (drawn(2, 3) - drawn(2, 3, seed=1)).square().mean())


@pytest.mark.parametrize(
    ("own", "other", "options", "error", "message"),
    [
        ([], [], {}, ValueError, "teacher_features must"),
        ([X], [X, X], {}, ValueError, "teacher_features must"),
        ([X], [X[:1]], {}, ValueError, "teacher_features must"),
        ([X[:0]], [X[:0]], {}, ValueError, "features must"),
        ([X.long()], [X], {}, TypeError, "features must"),
        ([X], [X], {"normalize": "sum"}, ValueError, "normalize must"),
        ([X], [X], {"power": 3}, ValueError, "power must"),
    ],
)
def test_bad_features_are_refused(
    own: list[Tensor], other: list[Tensor], options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        normalized_feature_loss(own, other, **options)  # type: ignore[arg-type]


def test_features_are_recorded_in_the_order_of_their_names_and_hooks_leave() -> None:
    model = chain()
    with recorded_features(model, ["3", "0"]) as features:
        model(X)
    torch.testing.assert_close(features[0], model[:4](X))
    torch.testing.assert_close(features[1], model[:1](X))
    assert not any(layer._forward_hooks for layer in model)


def test_an_unknown_name_leaves_no_hook_behind() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(AttributeError), recorded_features(model, ["0", "nobody"]):
        pass
    assert not model[0]._forward_hooks
