from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.compress import (
    GAQAT,
    GradientDisorder,
    ScaleFreezer,
    gradient_disorder,
    prepare_quantized,
    quantizer_scales,
    scale_param_groups,
)

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 3


def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    return prepare_quantized(net, X, 3)


def rule(threshold: float = 0.3, window: int = 3, **options: object) -> GAQAT:
    held = model()
    kinds = {name: options.pop(name) for name in ("rule", "freeze", "release") if name in options}
    freezer = ScaleFreezer([1] * 6, window, threshold, **kinds)  # type: ignore[arg-type]
    return GAQAT(held, torch.optim.SGD(held.parameters(), lr=0.05), freezer, **options)  # type: ignore[arg-type]


def column(*values: float) -> Tensor:
    return torch.tensor(values)[:, None]


def test_disorder() -> None:
    assert gradient_disorder(column(1, 2, 3)).item() == 0
    assert gradient_disorder(column(1, -2, 3, -4)).item() == 1
    assert gradient_disorder(column(1, 1, -1, -1, 1)).item() == 0.5
    assert gradient_disorder(column(1, 0, 1)).item() == 0
    assert gradient_disorder(column(1, 0, -1)).item() == 0.5
    draws = torch.randn(500, 40, generator=torch.Generator().manual_seed(1))
    assert gradient_disorder(draws).mean().item() == pytest.approx(0.5, abs=3 * 0.5 / (499 * 40) ** 0.5)
    torch.testing.assert_close(gradient_disorder(-1e-9 * draws), gradient_disorder(draws))
    with pytest.raises(ValueError, match="at least two"):
        gradient_disorder(draws[:1])


def test_a_window_begins_anew() -> None:
    disorder = GradientDisorder(2, 2)
    disorder.update(torch.tensor([1.0, 1.0]))
    with pytest.raises(ValueError, match="at least 2"):
        disorder.value()
    disorder.update(torch.tensor([-1.0, 1.0]))
    assert disorder.full
    assert disorder.value().tolist() == [1, 0]
    disorder.reset()
    assert not disorder.full
    with pytest.raises(ValueError, match="shape"):
        disorder.update(torch.zeros(3))
    assert disorder.steps == 0


def test_what_is_frozen_and_what_it_follows() -> None:
    calm, restless = [1.0, 2.0, 1.0], [1.0, -1.0, 1.0]
    expected = {
        ("below", "task"): [-0.5, 0.5],
        ("below", "smooth"): [1.0, 0.5],
        ("below", "both"): [0.0, 0.5],
        ("above", "task"): [0.5, -0.5],
    }
    for (which, freeze), values in expected.items():
        freezer = ScaleFreezer([1, 1], 3, 0.3, rule=which, freeze=freeze)  # type: ignore[arg-type]
        for pair in zip(calm, restless, strict=True):
            task = torch.tensor(pair)
            torch.testing.assert_close(freezer.combine(task, -0.5 * task), 0.5 * task)  # the first window is free
        assert freezer.disorder.tolist() == [0, 1]
        assert freezer.conflict.tolist() == [1, 1]
        found = freezer.combine(torch.tensor([1.0, 1.0]), torch.tensor([-0.5, -0.5]))
        assert found.tolist() == values


def test_a_step_of_many_numbers_is_judged_by_their_mean() -> None:
    freezer = ScaleFreezer([2, 1], 2, 0.6)
    freezer.combine(torch.tensor([1.0, 1.0, 1.0]), torch.zeros(3))
    freezer.combine(torch.tensor([1.0, -1.0, -1.0]), torch.zeros(3))
    assert freezer.disorder.tolist() == [0.5, 1.0]
    assert freezer.frozen.tolist() == [True, False]


def test_what_was_frozen_comes_free_unless_it_may_not() -> None:
    for release in (True, False):
        freezer = ScaleFreezer([1], 2, 0.5, release=release)
        for value in (1.0, 1.0):
            freezer.combine(torch.tensor([value]), torch.ones(1))
        assert freezer.frozen.item()
        for value in (1.0, -1.0):
            freezer.combine(torch.tensor([value]), torch.ones(1))
        assert freezer.frozen.item() is not release


def test_a_threshold_of_zero_is_sagm_bit_for_bit() -> None:
    held, other = rule(0.0), model()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.05)
    for _ in range(7):
        held.step(X, Y)
        other.train()
        params = list(other.parameters())
        first = torch.autograd.grad(F.cross_entropy(other(X), Y), params)
        length = torch.stack([g.norm() for g in first]).norm() + 1e-12
        home = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p, g in zip(params, first, strict=True):
                p.add_(0.05 * g / length - 1e-3 * g)
        stats = {n: b.clone() for n, b in other.named_buffers()}
        second = torch.autograd.grad(F.cross_entropy(other(X), Y), params)
        with torch.no_grad():
            for p, value in zip(params, home, strict=True):
                p.copy_(value)
            for n, b in other.named_buffers():
                b.copy_(stats[n])
        for p, a, b in zip(params, first, second, strict=True):
            p.grad = a + b
        optimizer.step()
    assert not held.freezer.frozen.any()
    for one, two in zip(held.model.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_frozen_steps_follow_flatness_alone_and_weights_do_not_notice() -> None:
    free, frozen = rule(0.0), rule(0.0)
    frozen.freezer.frozen.fill_(True)
    free.step(X, Y)
    frozen.step(X, Y)
    for one, other in zip(free.weights, frozen.weights, strict=True):
        assert torch.equal(one.grad, other.grad)
    twin = rule(0.0, rho=0.0, alpha=0.0)
    halved = rule(0.0, rho=0.0, alpha=0.0)
    halved.freezer.frozen.fill_(True)
    twin.step(X, Y)
    halved.step(X, Y)
    for one, other in zip(twin.scales, halved.scales, strict=True):
        torch.testing.assert_close(one.grad, 2 * other.grad)
        assert other.grad.abs().sum() > 0


def test_statistics_move_once_a_step_and_scales_stay_where_told() -> None:
    held = rule(perturb_scales=False)
    held.step(X, Y)
    norm = held.model[1]
    assert norm.num_batches_tracked == 1
    twin = rule(perturb_scales=True)
    twin.step(X, Y)
    assert any(not torch.equal(a.grad, b.grad) for a, b in zip(held.scales, twin.scales, strict=True))


def test_groups_hold_every_parameter_once() -> None:
    held = model()
    groups = scale_param_groups(held, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert len(quantizer_scales(held)) == len(groups[1]["params"]) == 6
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in held.parameters()}


def test_resumes_bit_exactly() -> None:
    held, again = rule(), rule()
    for _ in range(4):  # within a window
        held.step(X, Y)
    file = io.BytesIO()
    torch.save(held.state_dict(), file)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(4):
        one, two = held.step(X, Y), again.step(X, Y)
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(held.predict(X), again.predict(X))


def test_learns() -> None:
    held = rule(window=10)
    first = held.step(X, Y)["loss"]
    for _ in range(60):
        last = held.step(X, Y)["loss"]
    assert last < 0.8 * first


def test_bad_input_is_refused_by_name() -> None:
    for options, name in (({"threshold": 1.5}, "threshold"), ({"rule": "beside"}, "rule"), ({"window": 1}, "window")):
        with pytest.raises(ValueError, match=name):
            rule(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="LSQ"):
        GAQAT(nn.Linear(2, 2), torch.optim.SGD([torch.zeros(1)], lr=0.1))
    held = model()
    with pytest.raises(ValueError, match="freezer"):
        GAQAT(held, torch.optim.SGD(held.parameters(), lr=0.1), ScaleFreezer([2] * 3))
    freezer = ScaleFreezer([1, 1])
    before = copy.deepcopy(freezer.state_dict())
    with pytest.raises(ValueError, match="task and smooth"):
        freezer.combine(torch.zeros(2), torch.zeros(3))
    assert all(torch.equal(v, before[n]) or v.isnan().all() for n, v in freezer.state_dict().items())
