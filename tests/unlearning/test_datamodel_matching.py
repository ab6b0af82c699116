from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trimtab.unlearning import (
    LinearDatamodel,
    datamodel_matching,
    match_outputs,
    matching_indices,
    oracle_matching,
    predict_without,
    ridge_influences,
    subset_masks,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def test_masks_keep_their_share() -> None:
    masks = subset_masks(500, 40, 0.7, generator=seeded())
    assert masks.shape == (40, 500)
    assert masks.double().mean().item() == pytest.approx(0.7, abs=0.01)
    assert masks.double().mean(1).std() > 0.005  # each sample on its own, not a fixed number


@pytest.mark.parametrize("alpha", [0.0, 1e-8])
def test_linear_outputs_are_recovered_and_predictions_exact(alpha: float) -> None:
    coef, intercept = drawn(6, 4, 3), drawn(4, 3, seed=1)
    masks = subset_masks(6, 40, generator=seeded())
    outputs = intercept + torch.einsum("mn,ntc->mtc", masks.double(), coef)
    datamodel = LinearDatamodel(alpha).fit(masks, outputs)
    torch.testing.assert_close(datamodel.coef_, coef, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(datamodel.intercept_, intercept, atol=1e-6, rtol=1e-6)
    everything = intercept + coef.sum(0)
    without = intercept + coef[[0, 2, 3, 5]].sum(0)
    torch.testing.assert_close(datamodel.predict_without(everything, [1, 4]), without, atol=1e-6, rtol=1e-6)


def test_few_models_and_many_give_the_same_ridge_solution() -> None:
    outputs = drawn(9, 2, 1)
    masks = subset_masks(9, 9, generator=seeded())
    fewer, padded = masks[:, :8], torch.cat([masks[:, :8], torch.zeros(9, 4)], 1)  # primal, and with columns of zeros
    one, other = (LinearDatamodel(0.5).fit(chosen, outputs) for chosen in (fewer, padded))
    torch.testing.assert_close(one.coef_, other.coef_[:8])
    assert other.coef_[8:].abs().max() < 1e-12


def test_a_constant_of_logits_is_taken_away_where_asked() -> None:
    masks, outputs = subset_masks(3, 30, generator=seeded()), drawn(30, 2, 4)
    drift = drawn(30, 2, 1, seed=3)
    one, other = (LinearDatamodel(centre=True).fit(masks, y) for y in (outputs, outputs + 5 * drift))
    torch.testing.assert_close(one.coef_, other.coef_)


def test_without_an_intercept() -> None:
    masks = subset_masks(2, 20, generator=seeded())
    fitted = LinearDatamodel(0.0, fit_intercept=False).fit(masks, masks.double() @ drawn(2, 3))
    torch.testing.assert_close(fitted.coef_, drawn(2, 3))
    assert fitted.intercept_.abs().max() == 0


def test_nothing_to_forget_and_scale_nought_change_nothing() -> None:
    base, coef = drawn(4, 3), drawn(6, 4, 3, seed=1)
    assert torch.equal(predict_without(base, coef, []), base)
    assert torch.equal(predict_without(base, coef, [0, 3], scale=0.0), base)


def ridge(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    return torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)


def test_influences_of_a_ridge_regression_leave_one_sample_out() -> None:
    x, y, at = drawn(12, 4), drawn(12, 2, seed=1), drawn(5, 4, seed=2)
    coef = ridge_influences(x, y, at, 0.3)
    base = at @ ridge(x, y, 0.3)
    for j in (0, 7):
        rest = torch.arange(12) != j
        torch.testing.assert_close(predict_without(base, coef, [j]), at @ ridge(x[rest], y[rest], 0.3))


def test_the_set_that_is_matched() -> None:
    rows = matching_indices([8, 1, 5, 3], 40, retain_multiplier=3, forget_multiplier=1.5, generator=seeded())
    assert rows[:6].tolist() == [8, 1, 5, 3, 8, 1]
    retained = rows[6:].tolist()
    assert len(set(retained)) == 12
    assert not {8, 1, 5, 3} & set(retained)
    assert len(matching_indices([], 40)) == 0
    assert len(matching_indices([0], 3, retain_multiplier=100, forget_multiplier=0)) == 2


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 2)).double()


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_targets_that_are_met_move_nothing() -> None:
    model, x = net(), drawn(6, 3)
    model[2] = nn.Identity()
    with torch.no_grad():
        matched = match_outputs(model, x, model(x), epochs=0)
    assert same(matched, model)
    linear = nn.Linear(3, 2).double()
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.fill_(1.0)
    assert same(match_outputs(linear, x, torch.ones(6, 2).double(), epochs=3, batch_size=2), linear)


def test_matching_minimises_the_mean_square_and_leaves_the_model() -> None:
    x, wanted = drawn(30, 3), drawn(30, 2, seed=1)
    model = nn.Linear(3, 2).double()
    before = [p.clone() for p in model.parameters()]
    matched = match_outputs(model, x, wanted, epochs=400, lr=0.05, decay=0.99)
    design = torch.cat([x, torch.ones(30, 1)], 1)
    best = design @ torch.linalg.lstsq(design, wanted).solution
    torch.testing.assert_close(matched(x), best, atol=1e-3, rtol=1e-3)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    near = match_outputs(model, x, wanted, epochs=400, lr=0.05, decay=0.99, proximity=10.0)
    moved, stayed = ((m.weight - model.weight).norm().item() for m in (matched, near))
    assert stayed < 0.3 * moved


def test_the_pull_to_where_it_began_is_a_ridge_around_it() -> None:
    x, wanted = drawn(30, 3), drawn(30, 2, seed=1)
    model = nn.Linear(3, 2, bias=False).double()
    matched = match_outputs(model, x, wanted, epochs=400, lr=0.05, decay=0.98, proximity=0.2)
    # The mean goes over samples and outputs, the pull is a sum over weights.
    start, shrink = model.weight.detach(), 0.2 * torch.eye(3, dtype=torch.float64)
    expected = torch.linalg.solve(x.T @ x / 60 + shrink, x.T @ wanted / 60 + shrink @ start.T).T
    torch.testing.assert_close(matched.weight.detach(), expected, rtol=1e-4, atol=1e-4)


def test_modes_are_restored_and_training_mode_is_used() -> None:
    model, x = net().eval(), drawn(40, 3)
    model[0].train()
    matched = match_outputs(model, x, drawn(40, 2), epochs=1)
    assert [m.training for m in matched.modules()] == [m.training for m in model.modules()]


def test_the_first_step_is_adams_on_the_mean_square() -> None:
    x, wanted = drawn(5, 3), drawn(5, 2, seed=1)
    model = nn.Linear(3, 2).double()
    matched = match_outputs(model, x, wanted, epochs=1, lr=1e-3)
    gradient = 2 * (model(x) - wanted).T @ x
    torch.testing.assert_close(matched.weight - model.weight, -1e-3 * gradient.sign(), atol=1e-6, rtol=1e-3)


def test_the_rate_decays_from_epoch_to_epoch() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    far = torch.full((4, 1), 1e6).double()  # the gradient keeps its sign: each of Adam's steps is its rate
    moved = match_outputs(model, torch.ones(4, 1).double(), far, epochs=3, lr=0.1, decay=0.5).weight - model.weight
    assert moved.item() == pytest.approx(0.1 + 0.05 + 0.025, rel=1e-4)


def test_datamodel_matching_arrives_where_the_datamodel_says() -> None:
    x, y = drawn(20, 3), drawn(20, 2, seed=1)
    model = nn.Linear(3, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(ridge(x, y, 1.0).T)
    coef = ridge_influences(x, y, x, 1.0)
    rest = torch.arange(20) != 4
    found = datamodel_matching(
        model, x, coef, [4], retain_multiplier=19, forget_multiplier=3, epochs=500, lr=0.02, decay=0.99
    )
    torch.testing.assert_close(found.weight, ridge(x[rest], y[rest], 1.0).T, atol=1e-3, rtol=1e-3)
    assert (found.weight - model.weight).abs().max().item() > 0.02
    assert same(datamodel_matching(model, x, coef, []), model)


def test_predictions_are_those_of_eval_mode() -> None:
    model, x = net().train(), drawn(10, 3)
    state = torch.get_rng_state()
    found = datamodel_matching(model, x, torch.zeros(10, 10, 2).double(), [1], epochs=0, generator=seeded())
    assert torch.equal(state, torch.get_rng_state())  # no dropout was drawn
    assert same(found, model)
    assert model.training


def test_many_models_at_once() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(drawn(4, 3, 2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bi,mio->bmo", x, self.weight)

    model, x = Stack(), drawn(9, 3)
    coef = drawn(9, 9, 1, 2, seed=1)
    found = datamodel_matching(model, x, coef, [0, 2], retain_multiplier=3, epochs=2, generator=seeded())
    assert found(x).shape == (9, 4, 2)
    with pytest.raises(ValueError, match="coef"):
        datamodel_matching(model, x, coef[:, :, 0], [0])


def test_oracle_matching_goes_to_the_oracles() -> None:
    x = drawn(12, 3)
    oracle, model = (nn.Linear(3, 2, bias=False).double() for _ in range(2))
    with torch.no_grad():
        wanted = oracle(x)
    found = oracle_matching(model, x, wanted, [0, 1, 2, 3], retain_multiplier=2, epochs=300, lr=0.05, decay=0.99)
    torch.testing.assert_close(found.weight, oracle.weight, atol=1e-2, rtol=1e-2)


def test_the_generator_decides() -> None:
    x, coef = drawn(30, 3), drawn(30, 30, 2, seed=1)
    model = nn.Linear(3, 2).double()
    one, again, other = (
        datamodel_matching(model, x, coef, [0, 1], batch_size=3, generator=seeded(s)) for s in (1, 1, 2)
    )
    assert same(one, again)
    assert not same(one, other)


def test_bad_input_is_named() -> None:
    masks, outputs = subset_masks(3, 5, generator=seeded()), drawn(5, 2, 1)
    with pytest.raises(ValueError, match="masks"):
        LinearDatamodel().fit(masks.double() * 2, outputs)
    with pytest.raises(ValueError, match="outputs"):
        LinearDatamodel().fit(masks, outputs[:4])
    with pytest.raises(ValueError, match="alpha"):
        LinearDatamodel(-1.0)
    coef = drawn(3, 2, 1)
    for forget in ([3], [-1], [0, 0]):
        with pytest.raises(ValueError, match="forget"):
            predict_without(drawn(2, 1), coef, forget)
    with pytest.raises(TypeError, match="forget"):
        predict_without(drawn(2, 1), coef, [0.5])
    with pytest.raises(ValueError, match="coef"):
        predict_without(drawn(3, 1), coef, [0])
    with pytest.raises(ValueError, match="keep"):
        subset_masks(3, 3, 1.0)
    with pytest.raises(ValueError, match="targets"):
        match_outputs(net(), drawn(4, 3), drawn(3, 2))
    with pytest.raises(ValueError, match="oracle_outputs"):
        oracle_matching(net(), drawn(4, 3), drawn(3, 2), [0])
    with pytest.raises(ValueError, match="penalty"):
        ridge_influences(drawn(3, 1), drawn(3, 1), drawn(3, 1), 0.0)


def test_a_last_batch_of_one_sample_makes_no_step() -> None:
    model, x = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), torch.randn(5, 2)
    matched = match_outputs(model, x, torch.zeros(5, 3), epochs=1, batch_size=4)
    assert matched[1].num_batches_tracked == 1
    plain, targets = nn.Linear(2, 1), torch.ones(3, 1)
    each = match_outputs(plain, x[:3], targets, epochs=1, batch_size=1, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(each.weight, plain.weight)
    assert not torch.equal(match_outputs(plain, x[:1], targets[:1], epochs=1).weight, plain.weight)


def test_samples_that_are_fitted_exactly_have_no_influences() -> None:
    with pytest.raises(ValueError, match="penalty must be large enough"):
        ridge_influences(torch.eye(3), torch.ones(3, 1), torch.eye(3), 1e-30)
