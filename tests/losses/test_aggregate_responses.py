"""Losses on bag means: their identity, their minimisers, their risk, and the privacy mechanism."""

from __future__ import annotations

import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.utils.estimator_checks import check_estimator

from trimtab.losses import (
    AggregateLoss,
    AggregateRidge,
    aggregate_risk,
    bag_level_loss,
    instance_level_loss,
    private_bag_means,
)

SIZES = (1, 2, 4, 5)


def bagged(seed: int = 0, sizes: tuple[int, ...] = SIZES) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Predictions, bag responses in [0, 1] and bags of unequal size, in random order."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    index = index[torch.randperm(len(index), generator=generator)]
    pred = torch.randn(len(index), generator=generator, dtype=torch.float64)
    return pred, torch.rand(len(sizes), generator=generator, dtype=torch.float64), index


def regression(seed: int = 0, d: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Samples, bag means and bags of unequal size, with an offset in both features and responses."""
    rng = np.random.default_rng(seed)
    index = rng.permutation(np.repeat(np.arange(20), rng.integers(1, 6, 20)))
    X = rng.normal(size=(len(index), d)) + 3
    y = X @ rng.normal(size=d) + 7 + rng.normal(size=len(index))
    return X, np.bincount(index, y) / np.bincount(index), index


@pytest.mark.parametrize("weighting", ["bag", "sample"])
def test_instance_level_is_bag_level_plus_the_variance_within_bags(weighting) -> None:
    pred, target, index = bagged()
    parts = [pred[index == a] for a in range(len(SIZES))]
    weights = torch.tensor(SIZES if weighting == "sample" else [1] * 4, dtype=torch.float64)
    weights /= weights.sum()
    bag = sum(w * (part.mean() - t) ** 2 for w, part, t in zip(weights, parts, target, strict=True))
    within = sum(w * part.var(correction=0) for w, part in zip(weights, parts, strict=True))
    options = {"weighting": weighting}
    torch.testing.assert_close(bag_level_loss(pred, target, index, **options), bag)
    torch.testing.assert_close(instance_level_loss(pred, target, index, **options), bag + within)
    torch.testing.assert_close(AggregateLoss(0.3, **options)(pred, target, index), bag + 0.3 * within)


def test_bag_level_cross_entropy_averages_probabilities() -> None:
    pred, target, index = bagged()
    means = torch.stack([pred[index == a].sigmoid().mean() for a in range(len(SIZES))])
    value = bag_level_loss(pred, target, index, loss="bce")
    torch.testing.assert_close(value, F.binary_cross_entropy(means, target))
    logits = torch.stack([pred[index == a].mean() for a in range(len(SIZES))])
    assert not torch.isclose(value, F.binary_cross_entropy_with_logits(logits, target), rtol=1e-3)


def test_instance_level_cross_entropy_is_torchs_where_samples_count_alike() -> None:
    pred, target, index = bagged()
    expected = F.binary_cross_entropy_with_logits(pred, target[index])
    torch.testing.assert_close(instance_level_loss(pred, target, index, loss="bce", weighting="sample"), expected)


def test_saturated_probabilities_keep_their_gradient() -> None:
    # The mean of probabilities underflows to 0 here; its logarithm and the pull on the nearest member do not.
    pred = torch.tensor([-200.0, -210.0], requires_grad=True)
    value = bag_level_loss(pred, torch.tensor([1.0]), torch.tensor([0, 0]), loss="bce")
    value.backward()
    assert value.item() == pytest.approx(200 + math.log(2), rel=1e-5)
    assert pred.grad.tolist() == pytest.approx([-1.0, -math.exp(-10)], rel=1e-3)


@pytest.mark.parametrize("loss", ["mse", "bce", partial(F.smooth_l1_loss, reduction="none")])
def test_bags_of_one_make_all_losses_the_plain_one(loss) -> None:
    pred, target, index = bagged(sizes=(1,) * 6)
    plain = {"mse": F.mse_loss, "bce": F.binary_cross_entropy_with_logits}.get(loss, F.smooth_l1_loss)
    for rho in (0.0, 0.4, 1.0):
        torch.testing.assert_close(AggregateLoss(rho, loss)(pred, target, index), plain(pred, target[index]))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(1, 5), min_size=1, max_size=6), st.sampled_from(["mse", "bce"]))
def test_order_of_samples_and_numbering_of_bags_do_not_matter(seed: int, sizes: list[int], loss: str) -> None:
    pred, target, index = bagged(seed, tuple(sizes))
    generator = torch.Generator().manual_seed(seed)
    order, renumbered = (torch.randperm(n, generator=generator) for n in (len(pred), len(target)))
    criterion = AggregateLoss(0.6, loss)
    value = criterion(pred, target, index)
    torch.testing.assert_close(criterion(pred[order], target, index[order]), value)
    torch.testing.assert_close(criterion(pred, target[renumbered], renumbered.argsort()[index]), value)
    ends = [AggregateLoss(rho, loss)(pred, target, index) for rho in (0.0, 1.0)]
    torch.testing.assert_close(value, 0.4 * ends[0] + 0.6 * ends[1])
    assert ends[0] <= ends[1] + 1e-12  # both losses are convex in the prediction that is averaged


@pytest.mark.parametrize("loss", ["mse", "bce"])
@pytest.mark.parametrize("weighting", ["bag", "sample"])
def test_bags_without_a_member_in_the_batch_do_not_count(loss, weighting) -> None:
    pred, target, index = bagged()
    pred.requires_grad_()
    criterion = AggregateLoss(0.5, loss, weighting)
    value = criterion(pred, target, index)
    more = criterion(pred, torch.cat([target[:2], torch.tensor([0.9]), target[2:]]), index + (index >= 2))
    torch.testing.assert_close(more, value)
    assert torch.autograd.grad(more, pred)[0].isfinite().all()


@pytest.mark.parametrize("loss", ["mse", "bce"])
@pytest.mark.parametrize("weighting", ["bag", "sample"])
def test_gradients_of_unequal_bags(loss, weighting) -> None:
    pred, target, index = bagged()
    assert torch.autograd.gradcheck(
        lambda z: AggregateLoss(0.3, loss, weighting)(z, target, index), pred.requires_grad_()
    )


def test_the_papers_formula() -> None:
    X, bag_means, index = regression()
    S = (index == np.arange(20)[:, None]) / np.sqrt(np.bincount(index))[:, None]
    np.testing.assert_allclose(S @ S.T, np.eye(20), atol=1e-12)
    Sy = bag_means * np.sqrt(np.bincount(index))
    for rho, alpha in ((0.0, 0.0), (0.3, 0.0), (0.3, 2.0), (1.0, 0.0)):
        gram = (1 - rho) * X.T @ S.T @ S @ X + rho * X.T @ X + alpha * np.eye(4)
        fitted = AggregateRidge(rho, alpha, fit_intercept=False).fit(X, bag_means, index)
        np.testing.assert_allclose(fitted.coef_, np.linalg.solve(gram, X.T @ S.T @ Sy), rtol=1e-8)
        assert fitted.intercept_ == 0


@pytest.mark.parametrize("weighting", ["bag", "sample"])
def test_the_estimate_minimises_the_loss(weighting) -> None:
    X, bag_means, index = (torch.from_numpy(part) for part in regression())
    fitted = AggregateRidge(0.3, weighting=weighting).fit(X.numpy(), bag_means.numpy(), index.numpy())
    parameters = torch.cat(
        [torch.from_numpy(fitted.coef_), torch.tensor([fitted.intercept_], dtype=torch.float64)]
    ).requires_grad_()
    value = AggregateLoss(0.3, weighting=weighting)(X @ parameters[:4] + parameters[4], bag_means, index)
    (gradient,) = torch.autograd.grad(value, parameters)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-9, rtol=0)


def test_ends_are_regressions_on_means_and_on_repeated_responses() -> None:
    X, bag_means, index = regression()
    sizes = np.bincount(index)
    means = np.stack([X[index == a].mean(0) for a in range(20)])
    peer = Ridge(alpha=3.0).fit(means, bag_means, sample_weight=sizes)
    ours = AggregateRidge(0.0, alpha=3.0).fit(X, bag_means, index)
    np.testing.assert_allclose([*ours.coef_, ours.intercept_], [*peer.coef_, peer.intercept_])
    peer = LinearRegression().fit(X, bag_means[index])
    ours = AggregateRidge(1.0).fit(X, bag_means, index)
    np.testing.assert_allclose([*ours.coef_, ours.intercept_], [*peer.coef_, peer.intercept_])
    peer = Ridge(alpha=3.0).fit(X[:20], bag_means)
    for rho in (0.0, 0.5, 1.0):
        np.testing.assert_allclose(AggregateRidge(rho, alpha=3.0).fit(X[:20], bag_means).coef_, peer.coef_)


def test_fewer_bags_than_features_give_the_smallest_interpolant() -> None:
    rng = np.random.default_rng(0)
    X, bag_means, index = rng.normal(size=(12, 9)), rng.normal(size=4), np.arange(12) % 4
    means = np.stack([X[index == a].mean(0) for a in range(4)])
    fitted = AggregateRidge(0.0, fit_intercept=False).fit(X, bag_means, index)
    np.testing.assert_allclose(fitted.coef_, np.linalg.pinv(means) @ bag_means)


def test_search_finds_the_weight_that_predicts_held_out_bags() -> None:
    rng = np.random.default_rng(0)
    X, index = rng.normal(size=(600, 20)), np.arange(600) // 5
    rhos = np.linspace(0, 1, 11)
    chosen = []
    for noise in (0.05, 20.0):
        y = X @ np.full(20, 20**-0.5) + noise * rng.normal(size=600)
        fitted = AggregateRidge(rhos, fit_intercept=False).fit(X, y.reshape(120, 5).mean(1), index)
        assert len(fitted.cv_errors_) == 11
        assert fitted.rho_ == rhos[fitted.cv_errors_.argmin()]
        one = AggregateRidge(fitted.rho_, fit_intercept=False).fit(X, y.reshape(120, 5).mean(1), index)
        np.testing.assert_array_equal(fitted.coef_, one.coef_)
        chosen.append(fitted.rho_)
    assert chosen[0] <= 0.1 < 0.9 <= chosen[1]


def simulated(rho: float, n: int, d: int, k: int, noise: float, repeats: int, alpha: float = 0.0) -> np.ndarray:
    """Squared errors of the estimate, of true weights of norm 1."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(repeats, n, d, generator=generator, dtype=torch.float64)
    theta = F.normalize(torch.randn(repeats, d, 1, generator=generator, dtype=torch.float64), dim=1)
    y = X @ theta + noise**0.5 * torch.randn(repeats, n, 1, generator=generator, dtype=torch.float64)
    A, Sy = (Z.view(repeats, n // k, k, -1).sum(2) / k**0.5 for Z in (X, y))
    gram = (1 - rho) * A.mT @ A + rho * X.mT @ X + alpha * torch.eye(d)
    return (torch.linalg.solve(gram, A.mT @ Sy) - theta).square().sum((1, 2)).numpy()


@pytest.mark.parametrize(
    ("rho", "k", "noise", "alpha"),
    [(0.05, 2, 1.0, 0.0), (0.3, 5, 1.0, 0.0), (0.3, 10, 4.0, 0.0), (1.0, 5, 0.25, 0.0), (0.0, 10, 1.0, 40.0),
     (0.2, 5, 1.0, 25.0)],
)  # fmt: skip
def test_risk_agrees_with_simulation(rho, k, noise, alpha) -> None:
    n, d = 400, 40  # ten samples a feature, as the formula asks; at k = 10 as many bags as features
    errors = simulated(rho, n, d, k, noise, repeats=60, alpha=alpha)
    expected = aggregate_risk(rho, num_samples=n, num_features=d, bag_size=k, noise=noise, alpha=alpha)
    # Sampling error and the formula's own, of the order of 1 / d.
    assert abs(errors.mean() - expected) < 3 * errors.std() / 60**0.5 + expected / d


def test_bag_level_risk_is_exactly_known() -> None:
    errors = simulated(0.0, 400, 10, 5, noise=2.0, repeats=300)
    assert abs(errors.mean() - 2.0 * 10 / (80 - 10 - 1)) < 3 * errors.std() / 300**0.5
    assert aggregate_risk(0.0, num_samples=400, num_features=10, bag_size=5, noise=2.0) == pytest.approx(20 / 69)


def test_risk_at_the_instance_end_and_for_bags_of_one() -> None:
    # Least squares on repeated responses: weights over k, and noise from the other members of the bag.
    n, d, k = 1000, 100, 5
    delta = d / (n - d)
    expected = (1 - 1 / k) ** 2 + delta / k * (1 - 1 / k + 0.5)
    assert aggregate_risk(1.0, num_samples=n, num_features=d, bag_size=k, noise=0.5) == pytest.approx(expected)
    for rho in (0.0, 0.5, 1.0):
        of_one = aggregate_risk(rho, num_samples=n, num_features=d, bag_size=1, noise=0.5)
        assert of_one == pytest.approx(0.5 * d / (n - d - 1))  # least squares, known exactly


@settings(max_examples=30, deadline=None)
@given(st.floats(0.05, 20), st.integers(2, 9), st.floats(0.01, 0.9))
def test_risk_weighs_signal_and_noise_and_never_prefers_the_bag_end(noise: float, k: int, share: float) -> None:
    risk = partial(aggregate_risk, num_samples=1000, num_features=max(1, int(share * 1000 / k)), bag_size=k)
    assert risk(0.4, signal=3.0, noise=noise) == pytest.approx(
        3 * risk(0.4, signal=1.0, noise=0.0) + noise * risk(0.4, signal=0.0, noise=1.0)
    )
    # At the bag end the bias is of second order and the variance falls at first order.
    assert min(risk(rho, noise=noise) for rho in (1e-4, 1e-3, 1e-2)) < risk(0.0, noise=noise)


def test_private_means_clip_and_scale_their_noise() -> None:
    y, index = torch.tensor([1.0, -9.0, 2.0, 4.0, 0.0], dtype=torch.float64), torch.tensor([0, 0, 1, 2, 2])
    noise = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    found = private_bag_means(y, index, bound=3.0, epsilon=0.5, noise=noise)
    # Means of the clipped responses, and scales 2 * 3 / (k * 0.5) = 6, 12, 6.
    assert found.tolist() == [-1.0 + 6.0, 2.0 - 24.0, 1.5 + 3.0]


def test_private_means_draw_laplace_noise_and_bound_the_privacy_loss() -> None:
    index = torch.arange(20_000).repeat_interleave(2)
    generator = torch.Generator().manual_seed(0)
    draw = private_bag_means(torch.zeros(40_000), index, bound=1.5, epsilon=2.0, generator=generator)
    scale = 2 * 1.5 / (2 * 2.0)
    assert draw.abs().mean().item() == pytest.approx(scale, rel=0.03)
    assert draw.square().mean().item() == pytest.approx(2 * scale**2, rel=0.06)
    assert abs(draw.median().item()) < 0.02
    # One response moved from one bound to the other moves the mean by epsilon scales: e^epsilon in density, no more.
    moved = torch.zeros(40_000).index_fill_(0, torch.tensor([0]), 99.0)
    other = moved.index_fill(0, torch.tensor([0]), -99.0)
    fixed = {"bound": 1.5, "epsilon": 2.0, "noise": torch.zeros(20_000)}
    shift = private_bag_means(moved, index, **fixed) - private_bag_means(other, index, **fixed)
    assert shift.abs().sum().item() == pytest.approx(2.0 * scale)
    again = private_bag_means(
        torch.zeros(40_000), index, bound=1.5, epsilon=2.0, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(draw, again)


@pytest.mark.parametrize("rho", [-0.1, 1.1, math.nan])
def test_weights_outside_their_range_are_refused(rho) -> None:
    with pytest.raises(ValueError, match="rho"):
        AggregateLoss(rho)
    with pytest.raises(ValueError, match="rho"):
        AggregateRidge(rho).fit(*regression())
    with pytest.raises(ValueError, match="rho"):
        aggregate_risk(rho, num_samples=10, num_features=2, bag_size=2)


def test_bad_arguments_of_the_losses_are_refused_by_name() -> None:
    pred, target, index = bagged()
    for name, options in (("loss", {"loss": "mae"}), ("weighting", {"weighting": "size"})):
        with pytest.raises(ValueError, match=name):
            AggregateLoss(0.5, **options)
        with pytest.raises(ValueError, match=name):
            bag_level_loss(pred, target, index, **options)
    for function in (bag_level_loss, instance_level_loss):
        for arguments, name in (
            ((pred[:, None], target, index), "pred"),
            ((pred, target[:, None], index), "bag_target"),
            ((pred, target[:0], index), "bag_target"),
            ((pred, target, index[:-1]), "bag_index"),
        ):
            with pytest.raises(ValueError, match=name):
                function(*arguments)
        for arguments, name in (
            ((pred.long(), target, index), "pred"),
            ((pred, target.long(), index), "bag_target"),
            ((pred, target, index.int()), "bag_index"),
        ):
            with pytest.raises(TypeError, match=name):
                function(*arguments)


@pytest.mark.parametrize(
    ("options", "name"),
    [({"alpha": -1.0}, "alpha"), ({"weighting": "size"}, "weighting"), ({"cv": 1}, "cv"), ({"rho": []}, "rho")],
)
def test_bad_parameters_of_the_estimator_are_refused_by_name(options, name) -> None:
    with pytest.raises(ValueError, match=name):
        AggregateRidge(**options).fit(*regression())


def test_bad_bags_are_refused_by_name() -> None:
    X, bag_means, index = regression()
    for spoilt, error in ((index.astype(float), TypeError), (index[:-1], ValueError), (index - 1, ValueError)):
        with pytest.raises(error, match="bag_index"):
            AggregateRidge().fit(X, bag_means, spoilt)
    with pytest.raises(ValueError, match="bags without gaps, got none of bag 3"):
        AggregateRidge().fit(X, bag_means, np.where(index == 3, 4, index))
    with pytest.raises(ValueError, match="y must be 20 responses, one a bag"):
        AggregateRidge().fit(X, bag_means[:-1], index)
    with pytest.raises(ValueError, match="y must be a vector"):
        AggregateRidge().fit(X, bag_means * np.nan, index)


def test_bad_arguments_of_the_mechanism_are_refused_by_name() -> None:
    y, index = torch.zeros(4), torch.tensor([0, 0, 1, 1])
    good = {"bound": 1.0, "epsilon": 1.0}
    for name, value in (("bound", 0.0), ("bound", math.inf), ("epsilon", -1.0), ("noise", torch.zeros(3))):
        with pytest.raises(ValueError, match=name):
            private_bag_means(y, index, **{**good, name: value})
    for values, bags, error, name in (
        (y.long(), index, TypeError, "y must"),
        (y[:, None], index, ValueError, "y must"),
        (y * math.nan, index, ValueError, "y must"),
        (y, index[:3], ValueError, "bag_index"),
        (y, 2 * index, ValueError, "bag_index"),
        (y, index.float(), TypeError, "bag_index"),
    ):
        with pytest.raises(error, match=name):
            private_bag_means(values, bags, **good)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_features": 200}, "num_features"),
        ({"rho": 0.5, "num_features": 1000}, "num_features"),
        ({"bag_size": 0.5}, "bag_size"),
        ({"noise": -1.0}, "noise"),
        ({"signal": math.inf}, "signal"),
        ({"num_samples": 0}, "num_samples"),
    ],
)
def test_bad_arguments_of_the_risk_are_refused_by_name(options, name) -> None:
    with pytest.raises(ValueError, match=name):
        aggregate_risk(**{"rho": 0.0, "num_samples": 1000, "num_features": 10, "bag_size": 5, **options})


@pytest.mark.parametrize("rho", [0.5, (0.0, 0.5, 1.0)])
def test_keeps_scikit_learns_conventions(rho) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_estimator(AggregateRidge(rho), on_skip=None)


@pytest.mark.parametrize("weighting", ["bag", "sample"])
def test_bags_without_members_do_not_count_whatever_they_hold(weighting: str) -> None:
    pred, index = torch.tensor([1.0, 2.0, 3.0], requires_grad=True), torch.tensor([0, 0, 2])
    target, other = torch.tensor([1.0, math.nan, 2.0]), torch.tensor([1.0, 5.0, 2.0])

    def poisson(mean: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:  # infinite at a mean of zero
        return mean - wanted * mean.log()

    for loss in ("mse", poisson):
        for part in (bag_level_loss, instance_level_loss):
            dense = part(pred, target[[0, 2]], torch.tensor([0, 0, 1]), loss=loss, weighting=weighting)
            for responses in (target, other):
                found = part(pred, responses, index, loss=loss, weighting=weighting)
                torch.testing.assert_close(found, dense)
                (slope,) = torch.autograd.grad(found, pred)
                torch.testing.assert_close(slope, torch.autograd.grad(dense, pred, retain_graph=True)[0])


def test_losses_keep_their_digits_under_autocast() -> None:
    pred, target, index = bagged()
    pred, target = pred.float(), target.float()
    for loss in (AggregateLoss(0.0), AggregateLoss(1.0), AggregateLoss(0.4)):
        expected = loss(pred, target, index)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(loss(pred, target, index), expected)


def test_errors_of_an_earlier_search_are_forgotten() -> None:
    rng = np.random.default_rng(0)
    X, y, index = rng.normal(size=(40, 2)), rng.normal(size=20), np.arange(40) // 2
    model = AggregateRidge(rho=[0.1, 0.5]).fit(X, y, index)
    assert len(model.cv_errors_) == 2
    assert not hasattr(model.set_params(rho=0.5).fit(X, y, index), "cv_errors_")
