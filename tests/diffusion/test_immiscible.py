"""Noise assignment: the optimum itself, what it leaves as it was, and its cheaper kin."""

import itertools
import warnings

import pytest
import torch

from trimtab.diffusion import assign_noise, nearest_noise, noise_assignment, soften_assignment


def batch(count: int, *shape: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, count, *shape, dtype=torch.float64, generator=generator))


def total(x, noise, order, metric):
    distance = (x - noise[order]).flatten(1).norm(dim=1)
    return float((distance**2 if metric == "sqeuclidean" else distance).sum())


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean"])
@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_best_of_all_permutations(metric, seed):
    x, noise = batch(6, 1, 3, seed=seed)
    found = noise_assignment(x, noise, metric=metric, precision=torch.float64)
    best = min(total(x, noise, torch.tensor(order), metric) for order in itertools.permutations(range(6)))
    assert total(x, noise, found, metric) == pytest.approx(best)
    assert total(x, noise, found, metric) <= total(x, noise, torch.arange(6), metric)


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean"])
def test_the_batch_s_noise_stays_what_it_was(metric):
    x, noise = batch(32, 4)
    found = assign_noise(x, noise, metric=metric)
    assert found.dtype == noise.dtype
    assert sorted(found[:, 0].tolist()) == sorted(noise[:, 0].tolist())
    assert torch.equal(found, noise[noise_assignment(x, noise, metric=metric)])


def test_a_sample_alone_keeps_its_noise():
    x, noise = batch(1, 5)
    assert torch.equal(assign_noise(x, noise), noise)


def test_images_in_another_order_get_the_same_noise():
    x, noise = batch(16, 3)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(2))
    found = assign_noise(x, noise, precision=torch.float64)
    torch.testing.assert_close(assign_noise(x[order], noise, precision=torch.float64), found[order])


def test_only_squared_distances_do_not_care_for_a_shift():
    x, noise = batch(24, 3)
    squared, plain = (
        [noise_assignment(x + s, noise, metric=m, precision=torch.float64) for s in (0.0, 4.0)]
        for m in ("sqeuclidean", "euclidean")
    )
    assert torch.equal(*squared)
    assert not torch.equal(*plain)


def test_squared_distances_are_minibatch_optimal_transport():
    ot = pytest.importorskip("ot")
    x, noise = batch(12, 3)
    weights = [1 / 12] * 12
    plan = torch.from_numpy(ot.emd(weights, weights, torch.cdist(x, noise).square().numpy()))
    assert torch.equal(noise_assignment(x, noise, metric="sqeuclidean", precision=torch.float64), plan.argmax(1))


def test_half_precision_loses_next_to_nothing_even_for_large_images():
    x, noise = batch(16, 3, 64, 64)
    quantised = noise_assignment(100 * x, 100 * noise)
    exact = noise_assignment(100 * x, 100 * noise, precision=torch.float64)
    assert total(x, noise, quantised, "euclidean") <= (1 + 1e-4) * total(x, noise, exact, "euclidean")


def test_in_many_dimensions_it_brings_noise_a_little_nearer():
    x, noise = batch(128, 64)
    before, after = ((x - other).norm(dim=1).mean() for other in (noise, assign_noise(x, noise)))
    assert 0.8 * before < after < 0.97 * before


def test_nothing_of_it_is_differentiated():
    x, noise = batch(4, 2)
    assert not assign_noise(x.requires_grad_(), noise).requires_grad
    assert not nearest_noise(x, torch.randn(4, 3, 2)).requires_grad


def test_the_nearest_of_a_sample_s_own():
    x, _ = batch(8, 2, 3)
    candidates = torch.randn(8, 5, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = nearest_noise(x, candidates)
    for row, (image, own) in enumerate(zip(x, candidates, strict=True)):
        nearest = min(own, key=lambda noise, image=image: float((noise - image).norm()))
        assert torch.equal(found[row], nearest)
    assert torch.equal(nearest_noise(x, candidates[:, :1]), candidates[:, 0])


def test_the_nearest_leans_towards_the_images_and_an_assignment_does_not():
    generator = torch.Generator().manual_seed(0)
    x = torch.full((4000, 1), 2.0)
    near = nearest_noise(x, torch.randn(4000, 4, 1, generator=generator))
    assert near.mean() > 0.9  # the largest of four normal numbers is 1.03 on average
    noise = torch.randn(200, 1, generator=generator)
    assert assign_noise(x[:200], noise).mean().item() == pytest.approx(noise.mean().item(), abs=1e-6)


def test_an_entropic_plan_lies_between_chance_and_assignment():
    x, noise = batch(64, 2)
    generator = torch.Generator().manual_seed(0)
    distances = [
        float((x - soften_assignment(x, noise, reg, generator=generator)).norm(dim=1).mean())
        for reg in (0.01, 0.3, 100)
    ]
    assert distances == sorted(distances)
    best = float((x - assign_noise(x, noise)).norm(dim=1).mean())
    assert best - 0.02 < distances[0] < 1.2 * best
    assert distances[2] == pytest.approx(float(torch.cdist(x, noise).mean()), rel=0.15)
    # Every noise vector is drawn once on average.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index = torch.arange(64.0).double()[:, None].expand(64, 2) / 64
        drawn = torch.stack([soften_assignment(x, index, 0.1, generator=generator)[:, 0] * 64 for _ in range(300)])
    counts = torch.bincount(drawn.round().long().flatten(), minlength=64) / 300
    torch.testing.assert_close(counts, torch.ones(64), atol=0.25, rtol=0)


@pytest.mark.parametrize("unit", [1e-3, 1e3])
def test_the_softness_of_a_plan_has_no_unit(unit):
    x, noise = batch(64, 3)
    plain, scaled = (
        soften_assignment(u * x, u * noise, 0.2, generator=torch.Generator().manual_seed(0)) for u in (1.0, unit)
    )
    torch.testing.assert_close(scaled, unit * plain)


def test_the_generator_decides():
    x, noise = batch(16, 2)
    one, other, third = (
        soften_assignment(x, noise, 0.5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(one, other)
    assert not torch.equal(one, third)


@pytest.mark.parametrize("pair", [assign_noise, soften_assignment])
def test_bad_input(pair):
    x, noise = batch(4, 2)
    with pytest.raises(ValueError, match="noise must be of shape"):
        pair(x, noise[:3])
    with pytest.raises(TypeError, match="x must be floating point"):
        pair(torch.zeros(4, 2, dtype=torch.int64), noise)
    with pytest.raises(ValueError, match="x must be finite"):
        pair(x / 0, noise)
    with pytest.raises(ValueError, match="x must have shape"):
        pair(x[:0], noise[:0])


def test_bad_arguments():
    x, noise = batch(4, 2)
    with pytest.raises(ValueError, match="metric must be one of"):
        assign_noise(x, noise, metric="manhattan")
    with pytest.raises(ValueError, match="reg must be positive"):
        soften_assignment(x, noise, 0.0)
    for candidates in (noise, noise[:, None, :1], noise[:3, None], noise[:, None][:, :0]):
        with pytest.raises(ValueError, match=r"candidates must have shape \(4, k, 2\)"):
            nearest_noise(x, candidates)
    with pytest.raises(TypeError, match="candidates must be floating point"):
        nearest_noise(x, torch.zeros(4, 2, 2, dtype=torch.int64))
