"""Shrinking a language model as a task: what is given, what is counted, and what references leave."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from trimtab.compress import RF8, Transformer, compress_linear
from trimtab.studies.compress import gg_prior, iss_p
from trimtab.studies.engine.study import Trial
from trimtab.studies.tasks.compress_transformer import (
    Commission,
    CompressTransformer,
    Shrinking,
    block_layers,
    gptq,
    input_moments,
    loss_on,
    magnitude_pruning,
    matrix_bits,
    plain_svd,
    round_to_nearest,
    windows_of,
)

TOKENS = torch.randint(30, (5, 9), generator=torch.Generator().manual_seed(0))


def model() -> Transformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Transformer(30, 8, depth=2, hidden=24, heads=2, head_dim=12, mlp=96).eval()


def commission(share: float) -> Commission:
    return Commission(model(), (TOKENS[:, :-1], TOKENS[:, 1:]), share, Trial(seed=1))


@pytest.mark.parametrize("share", [0.25, 0.5])
@pytest.mark.parametrize("reference", [*CompressTransformer.references()])
def test_references_keep_the_share_and_little_less(share: float, reference: str) -> None:
    whole = model()
    small = CompressTransformer.references()[reference].compress(commission(share))
    size = matrix_bits(small, TOKENS[:1, :-1]) / matrix_bits(whole, TOKENS[:1, :-1])
    assert 0.85 * share <= size <= share
    assert torch.isfinite(small(TOKENS[:, :-1])).all()
    small.train()(TOKENS[:, :-1]).sum().backward()


def test_only_matrices_of_the_blocks_are_counted() -> None:
    whole = model()
    assert matrix_bits(whole, TOKENS[:1, :-1]) == 16 * 2 * (4 * 24 * 24 + 2 * 24 * 96)
    assert len(block_layers(whole)) == 12
    small, _ = compress_linear(whole, rank=1, layers=["head"])
    assert matrix_bits(small, TOKENS[:1, :-1]) == matrix_bits(whole, TOKENS[:1, :-1])


def test_the_largest_weights_stay_and_stay_alone() -> None:
    whole, small = model(), magnitude_pruning(commission(0.5))
    kept, gone = [], []
    for name in block_layers(whole):
        old, new = whole.get_submodule(name).weight, small.get_submodule(name).weight
        torch.testing.assert_close(new[new != 0], old[new != 0])
        kept.append(old[new != 0].abs())
        gone.append(old[new == 0].abs())
    assert torch.cat(kept).min() >= torch.cat(gone).max()
    optimizer = torch.optim.SGD(small.parameters(), 0.1)
    before = [small.get_submodule(name).weight == 0 for name in block_layers(whole)]
    small(TOKENS[:, :-1]).square().sum().backward()
    optimizer.step()
    assert all(
        torch.equal(small.get_submodule(name).weight == 0, mask)
        for name, mask in zip(block_layers(whole), before, strict=True)
    )


def test_rounded_weights_lie_on_as_many_values_as_the_bits_allow() -> None:
    small = round_to_nearest(commission(0.25))
    for name in block_layers(small):
        if parametrize.is_parametrized(small.get_submodule(name), "weight"):
            assert all(len(row.unique()) <= 16 for row in small.get_submodule(name).weight)


def test_gptq_changes_outputs_less_than_rounding_and_stays_on_its_grid() -> None:
    given, whole = commission(0.25), model()
    moments = input_moments(commission(0.25))
    held = {"GPTQ": gptq(given), "nearest": round_to_nearest(commission(0.25))}
    errors = {}
    for which, small in held.items():
        changes = {n: (small.get_submodule(n).weight - whole.get_submodule(n).weight).detach() for n in moments}
        errors[which] = sum((change @ moments[n] * change).sum().item() for n, change in changes.items())
    assert errors["GPTQ"] < 0.9 * errors["nearest"]
    for name in moments:
        assert all(len(row.unique()) <= 16 for row in held["GPTQ"].get_submodule(name).weight)


def test_svd_is_that_of_every_matrix() -> None:
    whole, small = model(), plain_svd(commission(0.5))
    pair, weight = small.layers[0].mlp.inner[0], whole.layers[0].mlp.inner[0].weight
    rank = pair[0].out_features
    lost = torch.linalg.svdvals(weight)[rank:].square().sum()
    torch.testing.assert_close((pair[1].weight @ pair[0].weight - weight).square().sum(), lost, rtol=1e-3, atol=1e-5)


def test_windows_are_followed_by_the_next_character() -> None:
    text = torch.arange(500)
    x, y = windows_of(text, 20, 7, Trial(seed=3))
    assert torch.equal(y, x + 1)
    assert torch.equal(x[:, 1:], y[:, :-1])
    again = windows_of(text, 20, 7, Trial(seed=3))
    assert torch.equal(x, again[0])
    assert not torch.equal(x, windows_of(text, 20, 7, Trial(seed=3), stream=1)[0])


def test_an_unchanged_model_is_too_large() -> None:
    task, lazy = CompressTransformer(), Shrinking(compress=lambda given: given.model)
    with pytest.raises(ValueError, match="at most 0.25 of the bits"):
        task.run(Trial(setting={"lr": 1e-3}), lazy)


def test_all_the_size_is_no_loss_at_once() -> None:
    def whole(given: Commission) -> nn.Module:
        assert not given.model.training
        return given.model

    trial = Trial(setting={"lr": 1e-3})
    found = CompressTransformer(share=1.0).run(trial, Shrinking(compress=whole)).metrics
    assert (found["size"], found["weight_error"]) == (1.0, pytest.approx(0, abs=1e-9))
    assert found["test_loss"] < found["one_shot_loss"]


def test_the_loss_is_that_of_a_character() -> None:
    small = copy.deepcopy(model())
    nn.init.zeros_(small.head.weight)
    nn.init.zeros_(small.head.bias)
    assert loss_on(small, (TOKENS[:, :-1], TOKENS[:, 1:])) == pytest.approx(torch.tensor(30.0).log().item(), rel=1e-5)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_soft_shrinkage_leaves_as_much_as_magnitude_pruning_and_keeps_it(share: float) -> None:
    given = Commission(model(), (TOKENS[:, :-1], TOKENS[:, 1:]), share, Trial(seed=1, setting={"shrink": 0.9}))
    small = iss_p.pruned_transformer(given)
    size = matrix_bits(small, TOKENS[:1, :-1]) / matrix_bits(model(), TOKENS[:1, :-1])
    assert 0.95 * share <= size <= share
    there = {name: small.get_submodule(name).weight != 0 for name in block_layers(model())}
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1, weight_decay=0.1)
    small.train()(TOKENS[:, :-1]).square().mean().backward()
    optimizer.step()
    for name, mask in there.items():
        assert torch.equal(small.get_submodule(name).weight != 0, mask), name


def test_residual_floats_are_what_the_blocks_compute_with_and_their_gradients_pass() -> None:
    small = gg_prior.in_eight_bits(commission(0.5))
    assert matrix_bits(small, TOKENS[:1, :-1]) == 0.5 * matrix_bits(model(), TOKENS[:1, :-1])
    small.train()(TOKENS[:, :-1]).square().mean().backward()
    for name in block_layers(model()):
        weight, whole = small.get_submodule(name).weight.detach(), model().get_submodule(name).weight
        torch.testing.assert_close(weight, RF8(8).quantize(weight))
        held = whole.abs() > whole.abs().max() / 1000
        assert ((weight - whole).abs()[held] <= 0.1083 * whole.abs()[held]).all()
        given = small.get_submodule(name).get_parameter("parametrizations.weight.original").grad
        assert given is not None
        assert given.abs().sum() > 0
    unfit = gg_prior.study.entrants["RF8"].unfit
    assert unfit(CompressTransformer(share=0.5)) == ""
    assert unfit(CompressTransformer()) == "its numbers have 8 bits, and no more than 4 are left"
