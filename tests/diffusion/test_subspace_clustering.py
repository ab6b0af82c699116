"""Low-rank mixtures: denoiser against the general mixture's, training against principal components, clustering."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from sklearn.decomposition import PCA, TruncatedSVD
from torch import Tensor

from trimtab.diffusion import EDM, AnalyticGMM, VPLinear, deis, grids
from trimtab.diffusion.jacobian import denoiser_jacobian, jacobian_svd, numerical_rank
from trimtab.diffusion.subspace_clustering import (
    KSubspaces,
    LowRankDenoiser,
    MoLRG,
    edit_along,
    fit_low_rank,
    low_rank_denoise,
    match_subspaces,
    subspace_distance,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bases(components: int, dim: int, rank: int, seed: int = 0) -> Tensor:
    drawn = torch.randn(components, dim, rank, dtype=torch.float64, generator=generator(seed))
    return torch.linalg.qr(drawn).Q


def samples(mixture: MoLRG, each: int, seed: int = 0) -> Tensor:
    draws = generator(seed)
    return torch.cat([mixture.sample(each, cond=k, generator=draws) for k in range(len(mixture.bases))])


# The mixture


@pytest.mark.parametrize("sigma", [0.05, 0.7, 5.0])
def test_posterior_mean_is_the_limit_of_the_general_mixtures(sigma: float) -> None:
    U, V = bases(1, 6, 2)[0], bases(1, 6, 3, seed=1)[0]
    mixture = MoLRG([U, V], torch.tensor([1.0, 3.0], dtype=torch.float64))
    covs = torch.stack([B @ B.T + 1e-8 * torch.eye(6) for B in (U, V)])
    general = AnalyticGMM(torch.tensor([1.0, 3.0]).double(), torch.zeros(2, 6).double(), covs)
    x = torch.randn(10, 6, dtype=torch.float64, generator=generator())
    for found, expected in (
        (mixture.posterior_mean(x, 0.8, sigma), general.posterior_mean(x, 0.8, sigma)),
        (mixture.log_prob(x, 0.8, sigma), general.log_prob(x, 0.8, sigma)),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_unequal_ranks_weigh_by_the_dimension_of_what_is_missing() -> None:
    """Equation of the module, written out, with the factor in the ranks."""
    U, V = bases(1, 5, 1)[0], bases(1, 5, 3, seed=1)[0]
    alpha, sigma = 0.6, 0.5
    x = torch.randn(7, 5, dtype=torch.float64, generator=generator())
    shrink = sigma**2 / (alpha**2 + sigma**2)
    gain = alpha**2 / (2 * sigma**2 * (alpha**2 + sigma**2))
    logits = torch.stack([B.shape[1] / 2 * math.log(shrink) + gain * (x @ B).square().sum(1) for B in (U, V)], dim=1)
    weights = logits.softmax(1)
    expected = (
        alpha / (alpha**2 + sigma**2) * sum(w[:, None] * (x @ B @ B.T) for w, B in zip(weights.T, (U, V), strict=True))
    )
    torch.testing.assert_close(MoLRG([U, V]).posterior_mean(x, alpha, sigma), expected)


def test_random_subspaces_are_orthogonal_to_each_other_where_wanted() -> None:
    apart = torch.cat(MoLRG.random(12, 3, 4, generator=generator()).bases, dim=1)
    torch.testing.assert_close(apart.T @ apart, torch.eye(12, dtype=torch.float64))
    free = MoLRG.random(12, 3, 4, orthogonal=False, generator=generator())
    assert (free.bases[0].T @ free.bases[1]).abs().max() > 0.05
    with pytest.raises(ValueError, match="dim must be at least 15"):
        MoLRG.random(12, 3, 5)


def test_samples_lie_on_the_subspaces() -> None:
    mixture = MoLRG.random(10, 2, 3, generator=generator())
    x = mixture.sample(300, cond=1, generator=generator())
    torch.testing.assert_close(x @ mixture.bases[1] @ mixture.bases[1].T, x)
    torch.testing.assert_close(torch.cov((x @ mixture.bases[1]).T), torch.eye(2).double(), atol=0.25, rtol=0)


def test_bases_must_be_orthonormal_and_of_one_space() -> None:
    with pytest.raises(ValueError, match="bases must have orthonormal columns"):
        MoLRG([2 * bases(1, 4, 2)[0]])
    with pytest.raises(ValueError, match="bases must have the same number of rows"):
        MoLRG([bases(1, 4, 2)[0], bases(1, 5, 2)[0]])
    with pytest.raises(ValueError, match="at least one"):
        MoLRG([])


# The denoiser


@pytest.mark.parametrize("gating", ["soft", "hard"])
def test_with_the_true_bases_it_is_the_exact_denoiser(gating) -> None:
    mixture = MoLRG.random(9, 2, 3, generator=generator())
    # For hard gating where the components are far apart for the noise.
    sigma = 0.5 if gating == "soft" else 0.01
    x0 = samples(mixture, 5)
    x = 0.9 * x0 + sigma * torch.randn(x0.shape, generator=generator(1), dtype=torch.float64)
    found = low_rank_denoise(x, torch.stack(mixture.bases), 0.9, sigma, gating=gating)
    torch.testing.assert_close(found, mixture.posterior_mean(x, 0.9, sigma), rtol=1e-6, atol=1e-6)


def test_it_does_not_depend_on_the_choice_of_bases_or_their_order() -> None:
    U = bases(3, 8, 2)
    turned = U @ torch.linalg.qr(torch.randn(3, 2, 2, dtype=torch.float64, generator=generator(5))).Q
    x = torch.randn(6, 8, dtype=torch.float64, generator=generator(1))
    expected = low_rank_denoise(x, U, 0.7, 0.4)
    torch.testing.assert_close(low_rank_denoise(x, turned, 0.7, 0.4), expected)
    torch.testing.assert_close(low_rank_denoise(x, U[[2, 0, 1]], 0.7, 0.4), expected)


def test_models_side_by_side_are_the_models() -> None:
    U, x = torch.stack([bases(2, 6, 2, seed) for seed in range(4)]), torch.randn(4, 5, 6, dtype=torch.float64)
    sigma = torch.linspace(0.1, 2, 5, dtype=torch.float64)
    stacked = low_rank_denoise(x, U, 1.0, sigma)
    for i in range(4):
        torch.testing.assert_close(stacked[i], low_rank_denoise(x[i], U[i], 1.0, sigma))


def test_extreme_levels_stay_finite() -> None:
    U = bases(2, 6, 2).float()
    x = 1e3 * torch.randn(5, 6, generator=generator())
    for sigma in (1e-4, 1e4):
        assert torch.isfinite(low_rank_denoise(x, U, 1.0, sigma)).all()


def test_a_gate_decides_in_place_of_the_sample() -> None:
    axes = torch.eye(2)[:, :, None]
    x, gate = torch.tensor([[2.0, 1.0]]), torch.tensor([[0.0, 1.0]])
    found = low_rank_denoise(x, axes, 1.0, 1.0, gating="hard", gate=gate)
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.5]]))


def test_the_jacobian_of_one_subspace_is_the_scaled_projection() -> None:
    """Its right singular vectors span the subspace, and its rank is the subspace's at every noise level."""
    mixture = MoLRG.random(8, 3, 1, generator=generator())
    U, x = mixture.bases[0], torch.randn(1, 8, dtype=torch.float64, generator=generator(1))
    for sigma in (0.1, 1.0, 10.0):
        found = denoiser_jacobian(lambda x, s=sigma: mixture.posterior_mean(x, 0.8, s), x)
        torch.testing.assert_close(found, 0.8 / (0.64 + sigma**2) * U @ U.T)
        values, _, right = jacobian_svd(lambda x, s=sigma: mixture.posterior_mean(x, 0.8, s), x)
        assert numerical_rank(values) == 3
        assert subspace_distance(right[:3].T, U) < 1e-6


def test_the_module_keeps_its_columns_orthonormal_and_goes_into_samplers() -> None:
    schedule = VPLinear()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = LowRankDenoiser(6, 2, 3, schedule)
    x0 = torch.randn(40, 6, generator=generator())
    optimizer = torch.optim.SGD(denoiser.parameters(), lr=0.5)
    for _ in range(3):
        t = torch.full((40,), 0.3)
        loss = (denoiser(schedule.add_noise(x0, torch.randn_like(x0), t), t) - x0).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(denoiser.bases.mT @ denoiser.bases, torch.eye(2).expand(3, 2, 2), atol=1e-5, rtol=0)
    x = deis(denoiser, schedule.prior(200, 6, generator=generator()), grids.power(schedule, 20))
    # Samples end near the subspaces.
    off = x - low_rank_denoise(x, denoiser.bases.detach(), 1.0, 1e-3)
    assert off.norm(dim=1).max() < 0.1
    copied = LowRankDenoiser(6, 2, 3, schedule)
    copied.load_state_dict(denoiser.state_dict())
    assert torch.equal(copied(x, torch.full((200,), 0.2)), denoiser(x, torch.full((200,), 0.2)))


# Training


def test_training_on_one_subspace_finds_the_principal_components() -> None:
    """Theorem 1: for any weights of the noise levels, the loss is a constant less the captured variance."""
    scales = torch.tensor([3.0, 2.5, 2.0, 0.3, 0.2, 0.1, 0.1], dtype=torch.float64)
    x0 = torch.randn(40, 7, dtype=torch.float64, generator=generator()) * scales
    found = fit_low_rank(x0, 3, 1, n_init=2, steps=800, lr=0.05, draws=8, generator=generator()).bases[0]
    components = TruncatedSVD(3, random_state=0).fit(x0.numpy()).components_
    assert subspace_angles(found.numpy(), components.T).max() < 0.05


def test_the_loss_of_one_subspace_falls_exactly_with_the_captured_variance() -> None:
    x0 = torch.randn(30, 5, dtype=torch.float64, generator=generator())
    alpha, sigma, losses, captured = 0.8, 0.6, [], []
    for seed in range(6):
        U = bases(1, 5, 2, seed)
        # The expectation over the noise in closed form: gain c, so |c a P x0 - x0|^2 + c^2 s^2 d.
        gain = alpha / (alpha**2 + sigma**2)
        clean = low_rank_denoise(alpha * x0, U, alpha, sigma)
        losses.append(float((clean - x0).square().sum(1).mean()) + gain**2 * sigma**2 * 2)
        captured.append(float((x0 @ U[0]).square().sum(1).mean()))
    slope, _ = np.polyfit(captured, losses, 1)
    assert np.corrcoef(captured, losses)[0, 1] < -1 + 1e-9
    np.testing.assert_allclose(slope, (alpha * gain) ** 2 - 2 * alpha * gain)


def test_two_subspaces_are_found_from_few_samples() -> None:
    mixture = MoLRG.random(24, 2, 2, generator=generator(), dtype=torch.float32)
    true = torch.stack(mixture.bases)
    found = fit_low_rank(samples(mixture, 12), 2, 2, n_init=8, steps=300, generator=generator())
    assert match_subspaces(found.bases, true)[1].max() < 0.3
    assert found.losses.shape == (8,)


def test_training_is_decided_by_the_generator_and_starts_count() -> None:
    x0 = torch.randn(10, 6, generator=generator())
    runs = [fit_low_rank(x0, 2, 2, n_init=3, steps=5, generator=generator(1)) for _ in range(2)]
    assert torch.equal(runs[0].bases, runs[1].bases)
    start = bases(2, 6, 2).float()[None]
    alone = fit_low_rank(x0, 2, 2, n_init=0, starts=start, steps=1, lr=1e-9, generator=generator())
    torch.testing.assert_close(alone.bases.abs(), start[0].abs(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rank": 7}, "rank must be in"),
        ({"components": 0}, "components must be at least 1"),
        ({"n_init": 0}, "n_init must be at least 1"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"starts": torch.zeros(1, 2, 5, 2)}, "starts must have shape"),
        ({"gating": "medium"}, "gating must be one of"),
    ],
)
def test_bad_arguments_of_training(kwargs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_low_rank(torch.randn(9, 6), **{"rank": 2, "components": 2, "steps": 1, **kwargs})
    with pytest.raises(ValueError, match="x0 must be finite"):
        fit_low_rank(torch.full((9, 6), torch.nan), 2, 2)


# Sample complexity of one subspace: what is a theorem is a test


@pytest.mark.parametrize("number", [2, 4])
def test_fewer_samples_than_dimensions_leave_columns_free(number: int) -> None:
    """An optimum is as far away as sqrt(2 (d - N)): complete the samples' span with columns orthogonal to the truth."""
    rank, U = 6, torch.linalg.qr(torch.randn(48, 48, dtype=torch.float64, generator=generator())).Q
    true, others = U[:, :rank], U[:, rank:]
    x = torch.randn(number, rank, dtype=torch.float64, generator=generator(1)) @ true.T
    span = torch.linalg.svd(x, full_matrices=False).Vh.T
    far = torch.cat([span, others[:, : rank - number]], dim=1)
    torch.testing.assert_close(x @ far @ far.T, x)  # nothing is lost: an optimum
    torch.testing.assert_close(subspace_distance(far, true), torch.tensor(math.sqrt(2 * (rank - number))).double())


def test_as_many_samples_as_dimensions_are_enough_without_noise() -> None:
    U = bases(1, 48, 6)[0]
    x = torch.randn(6, 6, dtype=torch.float64, generator=generator(1)) @ U.T
    found = torch.from_numpy(KSubspaces(1, dim=6).fit(x.numpy()).bases_[0])
    assert subspace_distance(found, U) < 1e-6


# K-subspaces


def test_one_cluster_is_uncentred_principal_components() -> None:
    X = np.random.default_rng(0).normal(size=(50, 6)) * [3, 2, 1, 0.5, 0.2, 0.1]
    X -= X.mean(0)
    model = KSubspaces(1, dim=2).fit(X)
    assert subspace_angles(model.bases_[0], PCA(2).fit(X).components_.T).max() < 1e-6
    np.testing.assert_allclose(model.inertia_, np.linalg.svd(X)[1][2:] @ np.linalg.svd(X)[1][2:])


def test_it_finds_subspaces_and_never_loses_ground() -> None:
    mixture = MoLRG.random(20, 3, 3, generator=generator())
    X = samples(mixture, 30) + 0.01 * torch.randn(90, 20, dtype=torch.float64, generator=generator(1))
    model = KSubspaces(3, dim=3, n_init=30, random_state=0).fit(X.numpy())
    assert (np.diff(model.history_) >= -1e-9).all()
    partners, distances = match_subspaces(torch.from_numpy(model.bases_), torch.stack(mixture.bases))
    assert distances.max() < 0.05
    np.testing.assert_array_equal(model.labels_, partners.repeat_interleave(30))
    np.testing.assert_allclose(np.square(model.transform(X.numpy()).min(1)).sum(), model.inertia_)
    np.testing.assert_allclose(model.score(X.numpy()), -model.inertia_ / 90)
    np.testing.assert_array_equal(model.fit_predict(X.numpy()), model.labels_)


def test_scale_and_order_of_samples_do_not_matter() -> None:
    X = samples(MoLRG.random(10, 2, 2, generator=generator()), 20).numpy()
    model = KSubspaces(2, dim=2, random_state=0).fit(X)
    large = KSubspaces(2, dim=2, random_state=0).fit(1e4 * X)
    np.testing.assert_array_equal(large.labels_, model.labels_)
    turned = KSubspaces(2, dim=2, random_state=0).fit(X[::-1])
    np.testing.assert_array_equal(turned.labels_[::-1], model.labels_)


def test_more_starts_never_lower_the_objective() -> None:
    X = np.random.default_rng(0).normal(size=(40, 8))
    found = [KSubspaces(3, dim=2, n_init=n, random_state=0).fit(X).history_[-1] for n in (1, 5, 20)]
    assert found == sorted(found)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dim": 4}, "dim must be at most the number of features, 3"),
        ({"n_clusters": 11}, "at least n_clusters=11 samples"),
        ({"n_init": 0}, "n_init must be at least 1"),
        ({"tol": -1.0}, "tol must be at least 0"),
    ],
)
def test_bad_arguments_of_the_estimator(kwargs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KSubspaces(**kwargs).fit(np.random.default_rng(0).normal(size=(10, 3)))


# Distances and edits


def test_distance_is_that_of_the_principal_angles() -> None:
    U, V = bases(1, 9, 3)[0], bases(1, 9, 3, seed=1)[0]
    angles = subspace_angles(U.numpy(), V.numpy())
    np.testing.assert_allclose(subspace_distance(U, V), math.sqrt(2 * (np.sin(angles) ** 2).sum()))
    assert subspace_distance(U, U @ torch.linalg.qr(torch.randn(3, 3).double()).Q) < 1e-6


def test_partners_have_the_least_sum_of_squares() -> None:
    """Two lines half-way off each are nearer in squares than one that fits and one far off."""

    def line(degrees: float) -> Tensor:
        angle = torch.tensor(degrees).deg2rad().double()
        return torch.stack([angle.cos(), angle.sin()])[:, None]

    partners, distances = match_subspaces(torch.stack([line(30), line(60)]), torch.stack([line(0), line(30)]))
    assert partners.tolist() == [0, 1]
    torch.testing.assert_close(distances, torch.full((2,), 0.5 * 2**0.5, dtype=torch.float64))


def test_an_edit_moves_the_denoised_sample_by_the_step() -> None:
    mixture = MoLRG.random(6, 2, 1, generator=generator())
    function = lambda x: mixture.posterior_mean(x, 1.0, 0.5)
    x = torch.randn(1, 6, dtype=torch.float64, generator=generator(1))
    direction = jacobian_svd(function, x).right[0]
    moved = edit_along(function, x, 7 * direction, step=-1.5)
    torch.testing.assert_close(moved - function(x), -1.5 * direction[None])
    # Along the Jacobian's directions an edit stays on the data's subspace.
    torch.testing.assert_close(moved @ mixture.bases[0] @ mixture.bases[0].T, moved)
    with pytest.raises(ValueError, match="direction must be finite and not zero"):
        edit_along(function, x, torch.zeros(6), step=1.0)
    with pytest.raises(ValueError, match="direction must have the shape of a sample"):
        edit_along(function, x, direction[None], step=1.0)


def test_the_schedules_levels_are_where_it_trains() -> None:
    """All noise far above the data's size: the best bases are the principal components still, of a shrunken loss."""
    x0 = torch.randn(20, 4, dtype=torch.float64, generator=generator()) * torch.tensor([3.0, 1.0, 0.1, 0.1])
    found = fit_low_rank(
        x0, 1, 1, n_init=1, schedule=EDM(t_min=1.0, t_max=1.5), steps=600, draws=16, generator=generator()
    )
    assert abs(float(found.bases[0, 0, 0])) > 0.98
