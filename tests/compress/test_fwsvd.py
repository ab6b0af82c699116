from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.utils import parametrize

from trimtab.compress import LowRank, compress_linear, fisher_information, row_importance, weighted_low_rank
from trimtab.compress.transformer import Transformer


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


W, WEIGHTS = drawn(7, 5), drawn(7, seed=1).abs() + 0.1


def error(matrix: Tensor, weights: Tensor, factors: tuple[Tensor, Tensor]) -> Tensor:
    return (weights[:, None] * (matrix - factors[0] @ factors[1])).square().sum()


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_constant_weights_are_a_plain_svd(rank: int) -> None:
    left, values, right = torch.linalg.svd(W, full_matrices=False)
    plain = (left[:, :rank] * values[:rank]) @ right[:rank]
    for weights in (None, torch.full((7,), 3.0, dtype=torch.float64)):
        first, second = weighted_low_rank(W, rank, weights)
        torch.testing.assert_close(first @ second, plain)
        torch.testing.assert_close(second @ second.mT, torch.eye(rank, dtype=torch.float64))


def test_full_rank_gives_the_matrix_back() -> None:
    first, second = weighted_low_rank(W, 5, WEIGHTS)
    torch.testing.assert_close(first @ second, W)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_weighted_error_is_the_tail_and_each_svd_wins_by_its_own_measure(rank: int) -> None:
    mine, plain = weighted_low_rank(W, rank, WEIGHTS), weighted_low_rank(W, rank)
    tail = torch.linalg.svdvals(WEIGHTS[:, None] * W)[rank:].square().sum()
    torch.testing.assert_close(error(W, WEIGHTS, mine), tail)
    ones = torch.ones_like(WEIGHTS)
    assert error(W, WEIGHTS, mine) < error(W, WEIGHTS, plain)
    assert error(W, ones, plain) < error(W, ones, mine)


def test_no_other_factors_do_better() -> None:
    first, second = weighted_low_rank(W, 2, WEIGHTS)
    best = error(W, WEIGHTS, (first, second))
    for seed in range(20):
        moved = first + 1e-3 * drawn(7, 2, seed=seed), second + 1e-3 * drawn(2, 5, seed=seed + 100)
        assert error(W, WEIGHTS, moved) > best


def test_the_scale_of_the_weights_does_not_matter() -> None:
    first, second = weighted_low_rank(W, 2, WEIGHTS)
    other, another = weighted_low_rank(W, 2, 1e-8 * WEIGHTS)
    torch.testing.assert_close(first @ second, other @ another)


def test_a_row_without_importance_stays_finite_and_comes_last() -> None:
    weights = WEIGHTS.clone()
    weights[2] = 0
    first, second = weighted_low_rank(W, 3, weights)
    assert (first @ second).isfinite().all()
    kept = torch.arange(7) != 2
    best = torch.linalg.svdvals((weights[:, None] * W)[kept])[3:].square().sum()
    torch.testing.assert_close(error(W[kept], weights[kept], (first[kept], second)), best, rtol=1e-3, atol=1e-6)


def test_half_precision_is_given_back() -> None:
    first, second = weighted_low_rank(W.bfloat16(), 2, WEIGHTS.bfloat16())
    assert first.dtype == second.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 6}, "rank"),
        ({"row_weights": WEIGHTS[:-1]}, "row_weights"),
        ({"row_weights": -WEIGHTS}, "row_weights"),
        ({"row_weights": 0 * WEIGHTS}, "row_weights"),
        ({"row_weights": WEIGHTS / 0}, "row_weights"),
        ({"matrix": W[0]}, "matrix"),
        ({"matrix": W * torch.nan}, "matrix"),
        ({"eps": 0.0}, "eps"),
    ],
)
def test_bad_factorisations_are_refused(change: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must"):
        weighted_low_rank(**{"matrix": W, "rank": 2, "row_weights": WEIGHTS, **change})  # type: ignore[arg-type]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)).double()


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


X, Y = drawn(9, 4), torch.arange(9) % 3


def test_fisher_information_is_the_mean_square_of_single_gradients() -> None:
    model = network()
    expected = {"0": torch.zeros(6, 4).double(), "2": torch.zeros(3, 6).double()}
    for x, y in zip(X, Y, strict=True):
        found = torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), [model[0].weight, model[2].weight])
        for name, gradient in zip(expected, found, strict=True):
            expected[name] += gradient.square() / 9
    batches = [(X[:5], Y[:5]), (X[5:], Y[5:])]
    torch.testing.assert_close(fisher_information(model, losses, batches), expected)
    assert all(p.grad is None for p in model.parameters())
    whole = fisher_information(model, losses, [(X, Y)], ["0"], per_sample=False)["0"]
    mean = torch.autograd.grad(losses(model, (X, Y)).mean(), model[0].weight)[0]
    torch.testing.assert_close(whole, mean.square())


def test_fisher_information_of_sequences_sums_tokens_before_it_squares() -> None:
    torch.manual_seed(0)
    model = Transformer(11, 6, depth=1, hidden=8, heads=2, head_dim=3, mlp=10).double()
    tokens = torch.randint(11, (4, 7))
    name = "layers.0.attention.inner.key"

    def loss(weights: dict[str, Tensor], window: Tensor) -> Tensor:
        scores = functional_call(model, weights, (window[None, :-1],))
        return F.cross_entropy(scores[0], window[1:], reduction="sum")

    def of_samples(model: nn.Module, batch: Tensor) -> Tensor:
        return F.cross_entropy(model(batch[:, :-1]).mT, batch[:, 1:], reduction="none").sum(1)

    whole = {n: p.detach() for n, p in model.named_parameters()}
    single = torch.stack([grad(loss)(whole, window)[f"{name}.weight"] for window in tokens])
    torch.testing.assert_close(fisher_information(model, of_samples, [tokens])[name], single.square().mean(0))


def test_a_layer_used_twice_has_one_gradient() -> None:
    layer = nn.Linear(3, 3, bias=False).double()
    model = nn.Sequential(layer, nn.Tanh(), layer)
    x = drawn(5, 3)
    rows = torch.stack([torch.autograd.grad(model(row[None]).sum(), layer.weight)[0] for row in x])
    found = fisher_information(model, lambda model, x: model(x).sum(1), [x])
    torch.testing.assert_close(found, {"0": rows.square().mean(0)})


def test_bad_fisher_passes_are_refused_and_leave_no_hooks() -> None:
    model = network()
    for arguments, message in (
        ((losses, []), "batches must"),
        ((lambda model, batch: losses(model, batch).mean(), [(X, Y)]), "losses must"),
        ((lambda model, batch: losses(model, batch)[1:], [(X, Y)]), "losses must"),
        ((losses, [(X, Y)], ["1"]), "layers must"),
    ):
        with pytest.raises(ValueError, match=message):
            fisher_information(model, *arguments)  # type: ignore[arg-type]
    assert not any(part._forward_hooks for part in model.modules())
    with pytest.raises(ValueError, match="require a gradient"):
        fisher_information(network().requires_grad_(False), losses, [(X, Y)])


@pytest.mark.parametrize("rows", ["input", "output"])
def test_layers_are_replaced_in_a_copy(rows: str) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    importance = {n: row_importance(f, rows) for n, f in fisher_information(model, losses, [(X, Y)]).items()}  # type: ignore[arg-type]
    whole, _ = compress_linear(model, importance, rank=3, rows=rows)  # type: ignore[arg-type]
    torch.testing.assert_close(whole[2](drawn(2, 6)), model[2](drawn(2, 6)))
    small, report = compress_linear(model, importance, rank=1, rows=rows)  # type: ignore[arg-type]
    product = small[0][1].weight @ small[0][0].weight
    matrix = model[0].weight.detach() if rows == "output" else model[0].weight.detach().mT
    first, second = weighted_low_rank(matrix, 1, importance["0"])
    torch.testing.assert_close(product, first @ second if rows == "output" else (first @ second).mT)
    torch.testing.assert_close(report.errors["0"], (product - model[0].weight).square().sum().item())
    assert report.parameters_before - report.parameters_after == 24 - 10 + 18 - 9
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    small(X).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


@pytest.mark.parametrize("rows", ["input", "output"])
def test_a_parametrized_layer_is_the_exported_pair(rows: str) -> None:
    model = network()
    importance = {n: row_importance(f, rows) for n, f in fisher_information(model, losses, [(X, Y)]).items()}  # type: ignore[arg-type]
    pair, _ = compress_linear(model, importance, rank=2, rows=rows)  # type: ignore[arg-type]
    for name, weights in importance.items():
        layer = model.get_submodule(name)
        parametrize.register_parametrization(layer, "weight", LowRank(2, weights, rows))  # type: ignore[arg-type]
    torch.testing.assert_close(model(X), pair(X))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in pair.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses(model, (X, Y)).mean().backward()
    optimizer.step()
    trained, state = model(X).detach(), copy.deepcopy(model.state_dict())
    assert not torch.allclose(trained, pair(X))
    model[0].weight = torch.zeros_like(model[0].weight)
    model.load_state_dict(state)
    torch.testing.assert_close(model(X), trained)
    for layer in (model[0], model[2]):
        parametrize.remove_parametrizations(layer, "weight")
        assert torch.linalg.matrix_rank(layer.weight) == 2
    torch.testing.assert_close(model(X), trained)


def test_a_parametrization_of_full_rank_changes_nothing_and_a_higher_one_is_refused() -> None:
    layer = network()[0]
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match="rank must"):
        parametrize.register_parametrization(layer, "weight", LowRank(5))
    assert not parametrize.is_parametrized(layer)
    parametrize.register_parametrization(layer, "weight", LowRank(4, before.abs().sum(0)))
    torch.testing.assert_close(layer.weight.detach(), before)
    for wrong, name in (({"rank": 0}, "rank"), ({"rank": 1, "rows": "both"}, "rows")):
        with pytest.raises(ValueError, match=f"{name} must"):
            LowRank(**wrong)  # type: ignore[arg-type]


def test_the_ratio_bounds_what_remains() -> None:
    model = nn.Sequential(nn.Linear(40, 60, bias=False))
    for ratio in (0.1, 0.25, 0.5, 1.0):
        small, report = compress_linear(model, ratio=ratio)
        assert report.parameters_after <= ratio * report.parameters_before
        assert report.parameters_after + 100 > ratio * report.parameters_before
        assert sum(p.numel() for p in small.parameters()) == report.parameters_after


def test_shared_layers_stay_shared() -> None:
    layer = nn.Linear(6, 6)
    small, _ = compress_linear(nn.Sequential(layer, nn.ReLU(), layer), rank=1)
    assert small[0] is small[2]
    assert isinstance(small[0], nn.Sequential)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "ratio must be given"),
        ({"ratio": 0.5, "rank": 1}, "ratio must be given"),
        ({"ratio": 0.0}, "ratio must"),
        ({"rank": 4}, "rank must"),
        ({"rank": 1, "layers": ["1"]}, "layers must"),
        ({"rank": 1, "importance": {"0": torch.ones(4)}}, "importance must"),
        ({"rank": 1, "importance": {"0": torch.ones(3), "2": torch.ones(6)}}, "row_weights must"),
        ({"rank": 1, "rows": "both"}, "rows must"),
    ],
)
def test_bad_compressions_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compress_linear(network(), **options)  # type: ignore[arg-type]


def test_factors_train_where_the_layer_did() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.requires_grad_(False)
    small, _ = compress_linear(model, rank=2)
    assert [p.requires_grad for p in small.parameters()] == [False, False, True, True, True, True]
