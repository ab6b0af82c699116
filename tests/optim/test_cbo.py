"""Consensus-based optimization against its limits, closed forms of consensus hopping, and the peer package."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trimtab.optim import CBO, ConsensusHopping, ParticleLoss, cbo_step, consensus_point, minimizing_movement_step


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rastrigin(x):
    return (x**2 + 2.5 * (1 - torch.cos(2 * torch.pi * x))).sum(-1)


# --- the consensus point ---


def test_small_alpha_gives_the_mean_and_large_alpha_the_best_particle():
    x, energies = draws(7, 3), draws(7, seed=1)
    torch.testing.assert_close(consensus_point(x, energies, 1e-12), x.mean(0))
    torch.testing.assert_close(consensus_point(x, energies, 1e12), x[energies.argmin()])


def test_weights_are_the_softmin_of_two_energies():
    point = consensus_point(torch.tensor([[0.0], [1.0]]), torch.tensor([0.0, 1.0]), alpha=2.0)
    assert point.item() == pytest.approx(0.1192029, rel=1e-6)  # 1 / (1 + e^2)


@given(shift=st.floats(-1e6, 1e6), alpha=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_consensus_lies_among_the_particles_and_does_not_see_a_constant(shift, alpha, seed):
    x, energies = draws(5, 2, seed=seed), draws(5, seed=seed + 100).round(decimals=3)
    point = consensus_point(x, energies, alpha)
    assert (point <= x.amax(0) + 1e-9).all()
    assert (point >= x.amin(0) - 1e-9).all()
    torch.testing.assert_close(consensus_point(x, energies + shift, alpha), point, atol=1e-6, rtol=1e-6)


def test_single_precision_energies_of_a_million_do_not_overflow():
    point = consensus_point(torch.tensor([[1.0], [2.0]]), torch.tensor([1e6, 1e6 + 1]), alpha=1e5)
    assert point.item() == 1.0


def test_runs_do_not_mix():
    x, energies = draws(4, 6, 2), draws(4, 6, seed=1)
    together = consensus_point(x, energies, 3.0)
    apart = torch.stack([consensus_point(a, e, 3.0) for a, e in zip(x, energies, strict=True)])
    torch.testing.assert_close(together, apart)


# --- the step ---


@pytest.mark.parametrize("noise", ["isotropic", "anisotropic"])
def test_step_is_the_published_one(noise):
    x, v, xi = draws(5, 3), draws(3, seed=1), draws(5, 3, seed=2)
    moved = cbo_step(x, v, xi, lam=0.7, sigma=1.3, dt=0.04, noise=noise)
    for i in range(5):
        off = [x[i, k].item() - v[k].item() for k in range(3)]
        norm = sum(o * o for o in off) ** 0.5
        for k in range(3):
            width = norm if noise == "isotropic" else off[k]
            expected = x[i, k].item() - 0.7 * 0.04 * off[k] + 1.3 * 0.2 * width * xi[i, k].item()
            assert moved[i, k].item() == pytest.approx(expected, rel=1e-12)


def test_without_noise_particles_contract_towards_their_mean():
    x = draws(8, 3)
    cbo = CBO(x, alpha=1e-12, lam=2.0, sigma=0.0, dt=0.1)
    mean = cbo.step(rastrigin)
    torch.testing.assert_close(mean, x.mean(0))
    torch.testing.assert_close(cbo.particles - mean, 0.8 * (x - mean))


@pytest.mark.parametrize("noise", ["isotropic", "anisotropic"])
def test_a_particle_at_the_consensus_point_stays(noise):
    x = draws(3, 2)
    moved = cbo_step(x, x[1], draws(3, 2, seed=1), sigma=5.0, noise=noise)
    assert torch.equal(moved[1], x[1])
    assert not torch.equal(moved[0], x[0])


def test_gradient_drift_is_added_and_scaled_by_the_time_step():
    x, xi = draws(6, 2), draws(6, 2, seed=1)
    plain, drifting = CBO(x, dt=0.05), CBO(x, dt=0.05, gradient_drift=3.0)
    for cbo in (plain, drifting):
        cbo.step(lambda z: 0.5 * z.square().sum(-1), xi)
    torch.testing.assert_close(plain.particles - drifting.particles, 3.0 * 0.05 * x)
    assert not drifting.particles.requires_grad


def test_consensus_is_that_of_the_particles_before_they_move():
    x = draws(6, 2)
    assert torch.equal(CBO(x, alpha=7.0).step(rastrigin), consensus_point(x, rastrigin(x), 7.0))


def test_given_noise_decides_and_the_callers_particles_stay():
    x, xi = draws(6, 2), draws(6, 2, seed=1)
    before = x.clone()
    ones = [CBO(x) for _ in range(2)]
    for cbo in ones:
        cbo.step(rastrigin, xi)
    assert torch.equal(ones[0].particles, ones[1].particles)
    assert torch.equal(x, before)


def test_many_runs_at_once_are_runs_apart():
    x, xi = draws(3, 6, 2), draws(3, 6, 2, seed=1)
    together = CBO(x, alpha=10.0)
    together.step(rastrigin, xi)
    for i in range(3):
        alone = CBO(x[i], alpha=10.0)
        alone.step(rastrigin, xi[i])
        torch.testing.assert_close(together.particles[i], alone.particles)


def test_minimize_reports_what_it_did():
    calls = []

    def f(x):
        calls.append(x.shape[-2])
        return rastrigin(x)

    cbo = CBO(draws(2, 20, 3), generator=torch.Generator().manual_seed(0))
    result = cbo.minimize(f, steps=5)
    assert result.path.shape == (6, 2, 3)
    assert result.n_evals == sum(calls) == 6 * 20 + 1
    assert torch.equal(result.x, result.path[-1])
    assert torch.equal(result.x, consensus_point(cbo.particles, rastrigin(cbo.particles), cbo.alpha))
    torch.testing.assert_close(result.fun, rastrigin(result.x))


def test_same_update_as_the_peer_package():
    """One step of `cbx` with its noise handed over."""
    dynamics = pytest.importorskip("cbx.dynamics")
    for noise in ("isotropic", "anisotropic"):
        x, xi = draws(2, 9, 3), draws(2, 9, 3, seed=1)
        peer = dynamics.CBO(
            lambda z: rastrigin(torch.from_numpy(z)).numpy(),
            f_dim="3D",
            check_f_dims=False,
            x=x.numpy(),
            noise=noise,
            sampler=lambda size, xi=xi: xi.numpy(),
            alpha=20.0,
            lamda=0.9,
            sigma=1.2,
            dt=0.03,
            verbosity=0,
        )
        peer.step()
        ours = CBO(x, alpha=20.0, lam=0.9, sigma=1.2, dt=0.03, noise=noise)
        ours.step(rastrigin, xi)
        torch.testing.assert_close(ours.particles, torch.from_numpy(peer.x))


def test_leaves_local_minima_behind():
    """From around (4, 4), where each unit cell has a minimum, to the one at zero; gradient descent stays."""
    start = 4 + draws(10, 200, 2)
    generator = torch.Generator().manual_seed(1)
    ends = CBO(start, alpha=1e3, generator=generator).minimize(rastrigin, steps=400).x
    assert (ends.abs().amax(-1) < 0.25).all()


# --- consensus hopping ---


def test_hopping_on_a_quadratic_is_the_proximal_step():
    """With infinitely many particles, x+ = (I + tau A)^-1 (x + tau A m), tau = alpha sigma^2; here within 4 s.e."""
    matrix, minimum = torch.tensor([[3.0, 1.0], [1.0, 2.0]]).double(), torch.tensor([1.0, -2.0]).double()
    start, alpha, sigma, n = torch.tensor([0.5, 0.3]).double(), 2.0, 0.5, 200_000

    def f(x):
        return 0.5 * ((x - minimum) @ matrix * (x - minimum)).sum(-1)

    tau = alpha * sigma**2
    exact = torch.linalg.solve(torch.eye(2).double() + tau * matrix, start + tau * matrix @ minimum)
    torch.testing.assert_close(minimizing_movement_step(f, start, tau), exact, rtol=1e-7, atol=1e-8)
    hopping = ConsensusHopping(
        start, n_particles=n, alpha=alpha, sigma=sigma, generator=torch.Generator().manual_seed(0)
    )
    # The weighted mean of n draws: its variance is that of the weights squared.
    xi = draws(n, 2, seed=1)
    x = start + sigma * xi
    weights = torch.softmax(-alpha * f(x), 0)
    error = (weights.square()[:, None] * (x - exact).square()).sum(0).sqrt()
    assert ((hopping.step(f, xi) - exact).abs() < 4 * error).all()
    assert (error < 0.01 * (exact - start).norm()).all()  # small enough to tell a wrong step


def test_hopping_on_a_line_is_a_gradient_step():
    slope = torch.tensor([1.0, -2.0]).double()
    generator = torch.Generator().manual_seed(0)
    hopping = ConsensusHopping(torch.zeros(2).double(), n_particles=200_000, alpha=1.5, sigma=0.3, generator=generator)
    step = hopping.step(lambda x: x @ slope)
    # The standard error is below 0.002: weights vary by exp((alpha sigma |slope|)^2) = 2.7 around their mean.
    torch.testing.assert_close(step, -1.5 * 0.3**2 * slope, atol=0.006, rtol=0)


def test_hopping_draws_around_the_last_consensus_point_with_the_scheduled_width():
    widths = []

    def f(x):
        widths.append(x.std(-2, correction=0).mean().item())
        return x.square().sum(-1)

    hopping = ConsensusHopping(
        torch.full((2,), 3.0),
        n_particles=4000,
        sigma=lambda step: 0.5 * 0.1**step,
        generator=torch.Generator().manual_seed(0),
    )
    result = hopping.minimize(f, steps=3)
    assert widths[:3] == pytest.approx([0.5, 0.05, 0.005], rel=0.05)
    assert result.n_evals == 3 * 4000 + 1
    assert torch.equal(result.path[0], torch.full((2,), 3.0))
    assert torch.equal(result.path[-1], hopping.center)


def test_proximal_step_of_a_nonsmooth_start_and_its_limits():
    def f(z):
        return 2 * (z - 1).square().sum()

    x = draws(3)
    torch.testing.assert_close(minimizing_movement_step(f, x, 1e-9), x, atol=1e-7, rtol=0)
    torch.testing.assert_close(minimizing_movement_step(f, x, 1e9), torch.ones(3).double(), atol=1e-6, rtol=0)


# --- models ---


def test_particle_loss_is_the_loss_of_each_model():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model[0].bias.requires_grad_(False)
    x, y = draws(5, 3), torch.tensor([0, 1, 1, 0, 1])
    loss = ParticleLoss(model, nn.functional.cross_entropy, chunk_size=2)
    particles = loss.start(3, spread=1.0, generator=torch.Generator().manual_seed(0))
    assert particles.dtype == torch.float64
    assert particles.shape == (3, 3 * 4 + 4 * 2 + 2)
    found = loss(particles, x, y)
    before = copy.deepcopy(model.state_dict())
    for vector, value in zip(particles, found, strict=True):
        loss.load(vector)
        torch.testing.assert_close(nn.functional.cross_entropy(model(x), y), value)
    assert torch.equal(model[0].bias, before["0.bias"])


def test_trains_a_classifier():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 2, generator=generator)
    y = (x @ torch.tensor([1.0, -2.0]) > 0.3).long()
    model = nn.Linear(2, 2)
    loss = ParticleLoss(model, nn.functional.cross_entropy)
    cbo = CBO(loss.start(100, spread=2.0, generator=generator), sigma=1.0, dt=0.1, generator=generator)
    for _ in range(100):
        batch = torch.randint(200, (64,), generator=generator)
        loss.load(cbo.step(lambda particles, batch=batch: loss(particles, x[batch], y[batch])))
    assert (model(x).argmax(1) == y).double().mean() > 0.9


# --- bad input ---


@pytest.mark.parametrize(
    ("argument", "value"),
    [("alpha", 0.0), ("alpha", -1.0), ("alpha", float("inf")), ("dt", 0.0), ("lam", -1.0), ("sigma", -0.1),
     ("gradient_drift", -1.0), ("noise", "brown")],
)  # fmt: skip
def test_arguments_out_of_range_are_named(argument, value):
    with pytest.raises(ValueError, match=argument):
        CBO(draws(4, 2), **{argument: value})


@pytest.mark.parametrize(("argument", "value"), [("alpha", 0.0), ("sigma", 0.0), ("n_particles", 0)])
def test_hopping_names_arguments_out_of_range(argument, value):
    with pytest.raises(ValueError, match=argument):
        ConsensusHopping(draws(2), **{argument: value})


@pytest.mark.parametrize("particles", [draws(0, 2), draws(3), draws(2, 0)])
def test_a_cloud_needs_particles(particles):
    with pytest.raises(ValueError, match="particles must have shape"):
        CBO(particles)


def test_particles_must_be_numbers():
    with pytest.raises(TypeError, match="particles must be of float32 or float64"):
        CBO(torch.ones(3, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="particles must be finite"):
        CBO(draws(3, 2).fill_(torch.nan))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_energies_that_are_no_numbers_are_refused_and_nothing_moves(bad):
    x = draws(4, 2)
    cbo = CBO(x)
    with pytest.raises(ValueError, match="f must be finite, got 1 of 4"):
        cbo.step(lambda z: rastrigin(z).index_fill(0, torch.tensor([2]), bad))
    assert torch.equal(cbo.particles, x)
    hopping = ConsensusHopping(x[0], n_particles=4)
    with pytest.raises(ValueError, match="f must be finite"):
        hopping.step(lambda z: rastrigin(z) * bad)
    assert torch.equal(hopping.center, x[0])


def test_energies_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"f must hold one energy for each particle, shape \(4,\), got \(\)"):
        CBO(draws(4, 2)).step(lambda z: rastrigin(z).sum())


def test_vectors_that_do_not_fit_the_model_are_refused():
    loss = ParticleLoss(nn.Linear(2, 1), nn.functional.mse_loss)
    with pytest.raises(ValueError, match="3 coordinates"):
        loss.load(torch.zeros(4))
    with pytest.raises(ValueError, match="model must have a trainable parameter"):
        ParticleLoss(nn.ReLU(), nn.functional.mse_loss)
