from __future__ import annotations

import copy
import io
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trimtab.compress import (
    AdaDFQ,
    BNStatistics,
    ConditionalGenerator,
    MinMaxActivation,
    MinMaxWeight,
    boundary_loss,
    difference_entropy,
    prepare_quantized,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rule(seed: int = 0, **options: float) -> AdaDFQ:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        teacher = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64, 3),
        )
        teacher(torch.rand(32, 1, 8, 8))
        with torch.no_grad():
            teacher[6].weight.mul_(10)  # so that three bits show
        maker = ConditionalGenerator((1, 8, 8), 3, latent=6, width=4)
        student = prepare_quantized(
            teacher.eval(),
            torch.randn(8, 1, 8, 8),
            3,
            weight=partial(MinMaxWeight, pass_clipped=True),
            inputs=partial(MinMaxActivation, pass_clipped=True),
        )
    optimizers = (
        torch.optim.SGD(student.parameters(), lr=1e-4, momentum=0.9),
        torch.optim.Adam(maker.parameters(), lr=1e-3),
    )
    return AdaDFQ(teacher, student, maker, *optimizers, generator=seeded(seed), **options)


def test_the_student_is_asked_in_evaluation_mode_and_taught_as_it_is() -> None:
    held, modes = rule(warmup=1), []
    held.student.register_forward_pre_hook(lambda student, inputs: modes.append(student.training))
    for _ in range(2):
        held.student.train()
        held.step(4)
    assert not any(modes)


def test_entropy_is_largest_where_networks_agree() -> None:
    logits = torch.randn(6, 10, generator=seeded(), dtype=torch.float64)
    said = (logits + torch.arange(6.0)[:, None]).requires_grad_()
    found = difference_entropy(logits, said, 20.0)
    torch.testing.assert_close(found, torch.full((6,), math.log(10)))
    loss = -400 * found.mean()
    assert loss.item() == pytest.approx(-921.034, abs=1e-3)
    loss.backward()
    torch.testing.assert_close(said.grad, torch.zeros_like(said.grad), atol=1e-6, rtol=0)
    other = difference_entropy(logits, torch.randn(6, 10, generator=seeded(1)))
    assert (other < math.log(10)).all()


def test_entropy_of_a_known_difference() -> None:
    t, q = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    p = 1 / (1 + math.exp(-1))
    assert difference_entropy(t, q, 2.0).item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p))


def test_the_boundary_costs_nothing_between_the_margins_but_for_the_least_sample() -> None:
    entropy = torch.tensor([1.0, 1.4, 1.6, 1.9])  # of ten classes: 0, .31, .46, .69 of the way up
    assert boundary_loss(entropy, 10).item() == pytest.approx(0.1 / 4)
    assert boundary_loss(entropy, 10, lower=0.0, upper=1.0).item() == 0
    high = torch.tensor([0.0, 0.9 * math.log(10), 1.0])
    assert boundary_loss(high, 10).item() == pytest.approx((0.1 + 0.1) / 3, abs=1e-6)
    assert boundary_loss(torch.full((3,), math.log(10)), 10).isfinite()  # all agree: no spread to scale by
    with pytest.raises(ValueError, match="two samples"):
        boundary_loss(torch.zeros(1), 10)
    with pytest.raises(ValueError, match="upper"):
        boundary_loss(torch.zeros(3), 10, lower=0.5, upper=0.4)


def test_statistics_that_agree_cost_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, momentum=None), nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    x = torch.randn(5, 1, 4, 4, generator=seeded())
    with torch.no_grad():
        z = model[0](x)
        model[1].running_mean.copy_(z.mean((0, 2, 3)))
        model[1].running_var.copy_(z.var((0, 2, 3), unbiased=False))
        model.eval()
        z = model[2](model[1](z))
        model[3].running_mean.copy_(z.mean((0, 2, 3)))
        model[3].running_var.copy_(z.var((0, 2, 3), unbiased=False))
    with BNStatistics(model) as statistics:
        with pytest.raises(RuntimeError, match="first"):
            statistics.loss()
        model(x)
        assert statistics.loss().item() == pytest.approx(0, abs=1e-9)
        model[3].running_mean += 2.0
        assert statistics.loss().item() == pytest.approx(4 / 2)  # one of two layers
    assert not model[1]._forward_pre_hooks
    with pytest.raises(ValueError, match="batch normalisation"):
        BNStatistics(nn.Linear(2, 2))


def test_images_have_the_pixels_that_are_named() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        maker = ConditionalGenerator((2, 7, 9), 4, latent=5, width=4, mean=0.3, std=0.2)
    x = maker(torch.randn(64, 5, generator=seeded()), torch.arange(64) % 4)
    assert x.shape == (64, 2, 7, 9)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.full((2,), 0.3), atol=1e-3, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.full((2,), 0.2), atol=1e-2, rtol=0)


def test_a_step_is_its_two_losses() -> None:
    held = rule(beta=0.5, gamma=2.0)
    noise, labels = torch.randn(6, 6, generator=seeded(4)), torch.arange(6) % 3
    twin = copy.deepcopy(held)
    found = held.step(noise=noise, labels=labels)
    images = twin.maker.train()(noise, labels)
    with BNStatistics(twin.teacher) as statistics:
        t = twin.teacher(images)
        apart = statistics.loss()
    q = twin.student.eval()(images)
    terms = 0.2 * F.cross_entropy(t - q, labels) + 0.1 * F.cross_entropy(t + q, labels)
    total = boundary_loss(difference_entropy(t, q), 3) + 0.5 * terms + 2.0 * apart
    torch.testing.assert_close(found["maker"], total.detach())
    expected = torch.autograd.grad(total, list(twin.maker.parameters()))
    for mine, slope in zip(held.maker.parameters(), expected, strict=True):
        torch.testing.assert_close(mine.grad, slope)
    assert found["student"].item() == pytest.approx(
        -400 * difference_entropy(t, q, 20.0).mean().item(), abs=2.0
    )  # the ranges have moved in between
    assert all(p.grad is None for p in held.teacher.parameters())


def test_the_student_stands_still_in_the_warm_up() -> None:
    held = rule(warmup=2)
    before = copy.deepcopy(held.student.state_dict())
    for _ in range(2):
        held.step(8)
    assert all(torch.equal(value, before[name]) for name, value in held.student.state_dict().items())
    held.step(8)
    after = held.student.state_dict()
    assert not torch.equal(after["3.parametrizations.weight.original"], before["3.parametrizations.weight.original"])
    assert not torch.equal(after["3.input_quantizer.high"], before["3.input_quantizer.high"])
    assert not any(m.observing for m in held.student.modules() if isinstance(m, MinMaxActivation))


def test_the_students_loss_falls_on_images_that_stand_still() -> None:
    held = rule()
    held.maker_optimizer.param_groups[0]["lr"] = 0.0
    noise, labels = torch.randn(16, 6, generator=seeded(4)), torch.arange(16) % 3
    values = [held.step(noise=noise, labels=labels)["student"].item() for _ in range(40)]
    assert sum(values[-5:]) < sum(values[:5])


def test_resumes_bit_exactly_and_the_generator_decides() -> None:
    held, again, other = rule(), rule(), rule(1)
    first = [held.step(8) for _ in range(2)]
    assert all(
        torch.equal(a[n], b[n]) for a, b in zip(first, [again.step(8) for _ in range(2)], strict=True) for n in a
    )
    file = io.BytesIO()
    torch.save(held.state_dict(), file)
    file.seek(0)
    other.teacher = held.teacher
    other.statistics = held.statistics
    other.load_state_dict(torch.load(file, weights_only=True))
    one, two = held.step(8), other.step(8)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_bad_input_is_refused_by_name() -> None:
    held = rule()
    for options, name in (({"lower": 0.9}, "upper"), ({"gamma": -1.0}, "gamma"), ({"temperature": 0.0}, "temperature")):
        with pytest.raises(ValueError, match=name):
            rule(**options)
    with pytest.raises(ValueError, match="batch_size"):
        held.step(1)
    with pytest.raises(ValueError, match="together"):
        held.step(noise=torch.zeros(4, 6))
    with pytest.raises(ValueError, match="noise"):
        held.step(noise=torch.zeros(4, 5), labels=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="other"):
        difference_entropy(torch.zeros(2, 3), torch.zeros(2, 4))
