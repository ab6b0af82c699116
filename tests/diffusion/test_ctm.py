"""CTM: jumps in closed form, the solver, soft consistency and its gradients, balance, sampling."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trimtab.diffusion import (
    CTM,
    EDM,
    AnalyticGMM,
    CTMPreconditioned,
    VPLinear,
    adaptive_weight,
    consistency_sample,
    deis_rk,
    gamma_sampling,
    grids,
    heun_path,
    soft_consistency,
)
from trimtab.diffusion.adversarial import generator_score, hinge_discriminator_loss, hinge_generator_loss
from trimtab.nets import DenoisingMLP

STD = 0.5
GAUSSIAN = AnalyticGMM.isotropic(torch.zeros(1, 2, dtype=torch.float64), STD)
RING = AnalyticGMM.ring(4, dtype=torch.float64)


def model(seed: int = 0, classes: int = 0, **options: Any) -> CTMPreconditioned:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = CTMPreconditioned(DenoisingMLP(2, classes, hidden=16, blocks=1, conditions=1), **options)
        for layer in (made.net.outward, made.net.blocks[0].second):
            nn.init.normal_(layer.weight, std=0.3)
    return made.double()


def column(value: float, count: int = 6) -> Tensor:
    return torch.full((count,), value, dtype=torch.float64)


def normal(count: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class ExactJumps:
    """Gaussian data of standard deviation 0.5: trajectories keep their number of standard deviations."""

    schedule, prediction = EDM(), "x0"

    def __call__(self, x: Tensor, t: Tensor, cond: object = None) -> Tensor:
        return x * (STD**2 / (STD**2 + t**2))[:, None]

    def jump(self, x: Tensor, t: Tensor, s: Tensor, cond: object = None) -> Tensor:
        return x * ((s**2 + STD**2) / (t**2 + STD**2)).sqrt()[:, None]


def test_a_jump_by_numbers() -> None:
    """Standard deviation 0.5, from 5 to 1: G = 2 sqrt(1.25 / 25.25) = 0.4450, whose g is 0.0562."""
    x = torch.tensor([[2.0, 2.0]], dtype=torch.float64)
    reached = ExactJumps().jump(x, column(5, 1), column(1, 1))
    assert abs(float(reached[0, 0]) - 0.4450) < 5e-5
    assert abs(float((reached[0, 0] - 2 / 5) / (1 - 1 / 5)) - 0.0562) < 5e-5


def test_the_form_of_a_jump() -> None:
    student, x = model(), 3 * normal()
    t, s = column(5.0), column(1.0)
    assert torch.equal(student.jump(x, t, t), x)
    torch.testing.assert_close(student.jump(x, t, s), x / 5 + 0.8 * student.towards(x, t, s))
    torch.testing.assert_close(student.jump(x, t, column(0.0)), student.towards(x, t, column(0.0)))
    torch.testing.assert_close(student(x, t), student.towards(x, t, t))
    assert not torch.allclose(student.towards(x, t, s), student(x, t))
    # What is asked of the network, written out.
    raw = student.net(x / math.sqrt(25.25), t.log() / 4, None, (s.log() / 4)[:, None])
    torch.testing.assert_close(student.towards(x, t, s), 0.25 / 25.25 * x + 5 * 0.5 / math.sqrt(25.25) * raw)


def test_both_noise_levels_reach_the_network_as_quarters_of_their_logarithms() -> None:
    class Recorded(nn.Module):
        def forward(self, x: Tensor, *seen: Tensor) -> Tensor:
            self.seen = seen
            return x

    net = Recorded()
    CTMPreconditioned(net, schedule=EDM(t_min=0.1)).jump(normal(), column(5.0), column(0.0))
    start, _, aim = net.seen
    torch.testing.assert_close(start, column(math.log(5.0) / 4))
    torch.testing.assert_close(aim, column(math.log(0.1) / 4)[:, None])  # nothing is less noisy than the schedule


def test_small_jumps_follow_the_score() -> None:
    """For s near t the jump is an Euler step along (x - D) / t."""
    student, x, t = model(), normal(), column(2.0)
    tiny = 1e-6
    slope = (x - student.jump(x, t, t - tiny)) / tiny
    torch.testing.assert_close(slope, (x - student(x, t)) / 2, atol=1e-4, rtol=1e-4)


def test_exact_jumps_compose_and_are_a_fixed_point() -> None:
    exact, x = ExactJumps(), 80 * normal()
    t, u, s = column(80.0), column(7.0), column(0.4)
    x_u = exact.jump(x, t, u)
    torch.testing.assert_close(exact.jump(x_u, u, s), exact.jump(x, t, s))
    estimate, wanted = soft_consistency(exact, exact, x, x_u, t, u, s, 0.002)
    torch.testing.assert_close(estimate, wanted)
    torch.testing.assert_close(estimate, exact.jump(x, t, column(0.002)))


def test_heun_is_the_samplers_and_of_second_order() -> None:
    schedule, x = EDM(), 80 * normal()
    times = grids.karras(schedule, 12)
    path = times[:, None].expand(-1, 6)
    torch.testing.assert_close(
        heun_path(RING.denoiser(schedule), x, path), deis_rk(RING.denoiser(schedule), x, times, method="heun")
    )
    errors = []
    for steps in (20, 40):
        found = heun_path(GAUSSIAN.denoiser(schedule), x, grids.karras(schedule, steps)[:, None].expand(-1, 6))
        errors.append(float((found - ExactJumps().jump(x, column(80.0), column(0.002))).norm()))
    assert 1.7 < math.log2(errors[0] / errors[1]) < 2.8
    # Each sample goes its own way.
    mixed = torch.stack([torch.linspace(5, 1, 5).double(), torch.linspace(2, 0.5, 5).double()], dim=1)
    both = heun_path(RING.denoiser(schedule), x[:2], mixed)
    for k in range(2):
        torch.testing.assert_close(
            both[k : k + 1], heun_path(RING.denoiser(schedule), x[k : k + 1], mixed[:, k : k + 1])
        )


def test_gradients_go_through_the_frozen_second_jump() -> None:
    student, target = model(), model(1).requires_grad_(False)
    x, t, u, s = 5 * normal(), column(5.0), column(3.0), column(1.0)
    estimate, wanted = soft_consistency(student, target, x, x * 0.7, t, u, s, 0.002)
    assert not wanted.requires_grad
    assert not soft_consistency(student, student, x, x * 0.7, t, u, s, 0.002)[1].requires_grad
    (estimate - wanted).square().mean().backward()
    assert all(p.grad is None for p in target.parameters())
    # By the chain rule: the gradient is that of the first jump, with the second one's Jacobian as its weight.
    start = student.jump(x, t, s).detach().requires_grad_()
    end = target.jump(start, s, column(0.002))
    weight = torch.autograd.grad((end - wanted).square().mean(), start)[0]
    expected = torch.autograd.grad(
        (student.jump(x, t, s) * weight).sum(), list(student.parameters()), allow_unused=True
    )
    for p, wanted_gradient in zip(student.parameters(), expected, strict=True):
        if wanted_gradient is not None:
            torch.testing.assert_close(p.grad, wanted_gradient)


def test_adaptive_weight_makes_gradients_equally_long() -> None:
    layer = nn.Linear(3, 2, bias=False).double()
    x = normal(4)[:, :1].expand(-1, 3) + torch.arange(3)
    loss, other = layer(x).square().mean(), 0.01 * layer(x).abs().mean()
    weight = adaptive_weight(loss, other, layer.weight)
    lengths = [torch.autograd.grad(v, layer.weight, retain_graph=True)[0].norm() for v in (loss, weight * other)]
    torch.testing.assert_close(lengths[0], lengths[1], rtol=0.05, atol=0)
    assert not weight.requires_grad
    assert adaptive_weight(loss, other, layer.weight, 0.01, 2.0) == 2.0
    assert adaptive_weight(1e-9 * loss, other, layer.weight, 0.01, 2.0) == 0.01
    assert adaptive_weight(loss, other, layer.weight, np.float64(0), np.int64(2)) == 2.0
    assert adaptive_weight(loss, other, layer.weight, high=math.inf) == weight
    with pytest.raises(ValueError, match="low must be finite, got nan"):
        adaptive_weight(loss, other, layer.weight, math.nan)
    for high in (math.nan, -1.0):
        with pytest.raises(ValueError, match="high must be at least low"):
            adaptive_weight(loss, other, layer.weight, high=high)


def rule(seed: int = 0, **options: Any) -> CTM:
    student = model(classes=4)
    options = {"teacher": RING.denoiser(EDM()), "levels": 8, **options}
    options.setdefault("last_layer", student.net.outward.weight)
    return CTM(student, generator=torch.Generator().manual_seed(seed), **options)


def data() -> tuple[Tensor, Tensor]:
    return RING.sample(16, generator=torch.Generator().manual_seed(3)), torch.arange(16) % 4


def test_levels_that_are_drawn() -> None:
    found = rule(levels=6, max_steps=3)
    times = found.times
    torch.testing.assert_close(times[[0, -1]], torch.tensor([80.0, 0.002], dtype=torch.float64))
    lengths, ends = set(), set()
    for _ in range(200):
        draw = found._draw(torch.zeros(32, 2, dtype=torch.float64))
        lengths.add(len(draw.path) - 1)
        where = torch.stack([(times[:, None] == row).long().argmax(0) for row in draw.path])
        assert (where.diff(dim=0) == 1).all()
        assert (draw.s <= draw.path[-1]).all()
        ends |= {(int(u), int((times == s).nonzero())) for u, s in zip(where[-1], draw.s, strict=True)}
    assert lengths == {1, 2, 3}
    assert ends == {(u, s) for u in range(1, 6) for s in range(u, 6)}
    only = rule(levels=6, to_end_only=True)._draw(torch.zeros(32, 2, dtype=torch.float64))
    assert (only.s == times[-1]).all()


def test_losses_and_their_balance() -> None:
    found = rule()
    losses = found.losses(*data())
    last = found.last_layer
    weight = adaptive_weight(losses["consistency"], losses["denoising"], last)
    torch.testing.assert_close(losses["total"], losses["consistency"] + weight * losses["denoising"])
    plain = rule(last_layer=None).losses(*data())
    torch.testing.assert_close(plain["total"], plain["consistency"] + plain["denoising"])
    assert torch.equal(plain["denoising"], losses["denoising"])


def test_a_discriminator_takes_part_from_its_step_on() -> None:
    critic = nn.Linear(2, 1).double()
    found = rule(discriminator=lambda x: [critic(x), critic(2 * x)], adversarial_from=1)
    assert "adversarial" not in found.losses(*data())
    found.update_target()
    losses = found.losses(*data())
    ratios = [
        adaptive_weight(losses["consistency"], losses[name], found.last_layer, *bounds)
        for name, bounds in (("denoising", (0.0, 1e4)), ("adversarial", (0.01, 10.0)))
    ]
    expected = losses["consistency"] + ratios[0] * losses["denoising"] + ratios[1] * losses["adversarial"]
    torch.testing.assert_close(losses["total"], expected)
    found.discriminator_loss(*data()).backward()
    assert all(p.grad is None for p in found.student.parameters())
    assert critic.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="discriminator must be given"):
        rule().discriminator_loss(*data())


def test_the_adversarial_loss_is_minus_the_score_and_its_weight_stays_between_a_hundredth_and_ten() -> None:
    x0, cond = data()
    for size, weight in ((1e-4, 10.0), (1e4, 0.01)):
        found = rule(discriminator=lambda x, size=size: 7.0 + size * x.sum(1))
        losses = found.losses(x0, cond)
        assert losses["adversarial"].item() < -6.9 or size > 1
        denoising = adaptive_weight(losses["consistency"], losses["denoising"], found.last_layer)
        expected = losses["consistency"] + denoising * losses["denoising"] + weight * losses["adversarial"]
        torch.testing.assert_close(losses["total"], expected)


def test_the_denoising_loss_weighs_all_levels_alike() -> None:
    """A network of zeros errs by one at every level where the data are as wide as they are said to be."""
    found = CTM(model(), GAUSSIAN.denoiser(EDM()), levels=8, generator=torch.Generator().manual_seed(0))
    for p in found.student.net.parameters():
        p.data.zero_()
    assert found.losses(STD * normal(20_000))["denoising"].item() == pytest.approx(1.0, rel=0.02)


def test_hinge_losses() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 1.0])
    torch.testing.assert_close(hinge_discriminator_loss(real, fake), torch.tensor(0.25 + 1.0))
    torch.testing.assert_close(hinge_discriminator_loss([real, real], [fake, fake + 1]), torch.tensor(0.25 + 1.25))
    torch.testing.assert_close(generator_score([fake, fake + 2]), torch.tensor(-0.5))
    torch.testing.assert_close(hinge_generator_loss(fake), torch.tensor(1.5))
    # What already passes for real by more than the margin is worth no more.
    torch.testing.assert_close(hinge_generator_loss([fake, fake + 3]), torch.tensor((1.5 + 0.0) / 2))


def test_the_target_is_a_moving_average() -> None:
    found = rule(decay=0.9)
    before = found.target.net.outward.weight.clone()
    with torch.no_grad():
        found.student.net.outward.weight.add_(1.0)
    found.update_target()
    torch.testing.assert_close(found.target.net.outward.weight, before + 0.1)
    assert all(not p.requires_grad for p in found.target.parameters())


def test_without_a_teacher_the_target_makes_the_first_jump() -> None:
    found = rule(teacher=None)
    with torch.no_grad():
        for p in found.student.parameters():  # so that the two are not the same
            p.add_(0.05)
    x0 = data()[0]
    draw = rule(teacher=None)._draw(x0)
    x_t = x0 + draw.path[0][:, None] * draw.noise
    x_u = found.target.jump(x_t, draw.path[0], draw.path[-1])
    expected = soft_consistency(
        found.student, found.target, x_t, x_u, draw.path[0], draw.path[-1], draw.s, float(found.times[-1])
    )
    for ours, theirs in zip(found._pair(x0, None), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_learns_the_jumps_of_gaussian_data() -> None:
    found = CTM(model(), GAUSSIAN.denoiser(EDM()), levels=8, decay=0.9, generator=torch.Generator().manual_seed(0))
    x = 80 * normal(64, seed=5)
    wanted = ExactJumps().jump(x, column(80.0, 64), column(0.002, 64))

    def error() -> float:
        return float((found.target.jump(x, column(80.0, 64), column(0.002, 64)) - wanted).square().mean())

    before = error()
    optimizer = torch.optim.Adam(found.student.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(60):
        losses = found.losses(GAUSSIAN.sample(64, generator=generator))
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
        found.update_target()
    assert error() < 0.2 * before


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_gamma_sampling_of_gaussian_data(gamma: float) -> None:
    """With exact jumps any gamma keeps the marginals, but for the least noise that noise is counted from."""
    schedule = EDM()
    x = torch.randn(20_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x * math.sqrt(80**2 + STD**2)
    times, seen = grids.karras(schedule, 4), {}
    found = gamma_sampling(ExactJumps(), x, times, gamma=gamma, generator=torch.Generator().manual_seed(1),
                           callback=lambda step, time, x: seen.update({time: float(x.std())}))  # fmt: skip
    for time, spread in seen.items():
        assert abs(spread / math.sqrt(time**2 + STD**2) - 1) < 0.02
    if gamma == 0:
        torch.testing.assert_close(found, ExactJumps().jump(x, column(80.0, len(x)), column(0.002, len(x))))


@pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0])
def test_a_jump_goes_below_by_the_noise_that_is_put_back(gamma: float) -> None:
    """Variances add up: sqrt(1 - g^2) s of the way, and g s of fresh noise, both above the end."""

    class Watched(ExactJumps):
        aims: list[float]

        def jump(self, x: Tensor, t: Tensor, s: Tensor, cond: object = None) -> Tensor:
            self.aims.append(float(s[0]))
            return super().jump(x, t, s, cond)

    watched = Watched()
    watched.aims = []
    times = torch.tensor([8.0, 2.0, 0.5, 0.1], dtype=torch.float64)
    gamma_sampling(watched, normal(), times, gamma=gamma)
    assert watched.aims == pytest.approx([math.sqrt(1 - gamma**2) * (s - 0.1) + 0.1 for s in (2.0, 0.5, 0.1)])


def test_gamma_one_is_the_sampling_of_consistency_models() -> None:
    student, times = model(), torch.tensor([80.0, 5.0, 0.6, 0.002], dtype=torch.float64)

    class ToEnd:
        schedule, prediction = student.schedule, "x0"

        def __call__(self, x: Tensor, t: Tensor) -> Tensor:
            return student.jump(x, t, torch.full_like(t, 0.002))

    x = 80 * normal()
    ours = gamma_sampling(student, x, times, gamma=1.0, generator=torch.Generator().manual_seed(2))
    theirs = consistency_sample(ToEnd(), x, times, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(ours, theirs)


def test_conditions_reach_the_network() -> None:
    student, x = model(classes=4), 80 * normal()
    times = grids.karras(EDM(), 2)
    runs = [gamma_sampling(student, x, times, torch.full((6,), k)) for k in (0, 1)]
    assert not torch.allclose(*runs)
    null = gamma_sampling(student, x, times)
    torch.testing.assert_close(null, gamma_sampling(student, x, times, torch.full((6,), 4)))


def test_refused() -> None:
    with pytest.raises(TypeError, match="student must be a CTMPreconditioned"):
        CTM(nn.Linear(2, 2))
    for options, message in (({"levels": 1}, "levels"), ({"max_steps": 9}, "max_steps"), ({"decay": 1.5}, "decay"),
                             ({"adversarial_from": -1}, "adversarial_from")):  # fmt: skip
        with pytest.raises(ValueError, match=f"{message} must be"):
            rule(**options)
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\]"):
        gamma_sampling(model(), normal(), grids.karras(EDM(), 2), gamma=1.1)
    wrong = model()
    wrong.schedule = VPLinear()
    with pytest.raises(TypeError, match="model must be on the EDM schedule"):
        gamma_sampling(wrong, normal(), grids.karras(EDM(), 2))
