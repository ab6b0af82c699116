from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from trimtab.domain import AdvStyle, insert_advstyle, instance_statistics, standardize, style_spread

X = torch.rand(5, 3, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
NOISE = tuple(torch.randn(5, 3, 1, 1, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (1, 2))


def layer(**options: object) -> AdvStyle:
    return AdvStyle(3, **options).double()  # type: ignore[arg-type]


def started(**options: object) -> AdvStyle:
    held = layer(**options)
    held(X, branch="clean")
    return held


def test_eval_mode_is_the_identity() -> None:
    assert layer().eval()(X) is X


def test_the_first_batch_gives_the_strengths_their_start() -> None:
    for branch in ("clean", "adversarial", "batch"):
        held = layer()
        held(X, branch=branch)
        mean, std = instance_statistics(X, 1e-6)
        assert torch.equal(held.mean_strength, style_spread(mean))
        assert torch.equal(held.std_strength, style_spread(std))
        held(10 * X, branch=branch)
        assert torch.equal(held.mean_strength, style_spread(mean))


def test_a_loaded_layer_keeps_its_strengths() -> None:
    held = started()
    with torch.no_grad():
        held.mean_strength.mul_(3)
    other = layer()
    other.load_state_dict(held.state_dict())
    other(5 * X, branch="adversarial")
    assert torch.equal(other.mean_strength, held.mean_strength)
    fresh = layer()
    fresh.load_state_dict(layer().state_dict())
    fresh(X, branch="clean")
    assert bool(fresh.started)
    assert torch.equal(fresh.mean_strength, started().mean_strength)


def test_both_branches_are_the_formula() -> None:
    held = started()
    with torch.no_grad():
        held.mean_strength.fill_(0.7)
        held.std_strength.fill_(0.2)
    content, mean, std = standardize(X, 1e-6)
    wanted = content * (std + 0.2 * NOISE[1]) + mean + 0.7 * NOISE[0]
    torch.testing.assert_close(held(X, branch="adversarial", noise=NOISE), wanted)
    wanted = content * (std + NOISE[1] * style_spread(std)) + mean + NOISE[0] * style_spread(mean)
    torch.testing.assert_close(held(X, branch="batch", noise=NOISE), wanted)
    assert held(X, branch="clean") is X


def test_without_strength_nothing_changes() -> None:
    held = started()
    with torch.no_grad():
        held.mean_strength.zero_()
        held.std_strength.zero_()
    torch.testing.assert_close(held(X, branch="adversarial"), X)


def test_content_stays_up_to_its_sign() -> None:
    found = standardize(started()(X, branch="adversarial", noise=NOISE), 0.0)[0]
    wanted = standardize(X, 0.0)[0]
    turned = torch.minimum((found - wanted).abs().amax((2, 3)), (found + wanted).abs().amax((2, 3)))
    assert turned.max() < 1e-4


def test_a_deviation_may_be_kept_from_turning() -> None:
    noise = (torch.zeros_like(NOISE[0]), torch.full_like(NOISE[1], -1e3))
    turned = started()(X, branch="adversarial", noise=noise)
    flat = started(positive_std=True)(X, branch="adversarial", noise=noise)
    assert turned.std() > 1
    torch.testing.assert_close(flat, instance_statistics(X)[0].expand_as(X))


def gradients(held: AdvStyle, x: Tensor, branch: str) -> tuple[Tensor | None, Tensor | None, Tensor]:
    x = x.clone().requires_grad_()
    held(x, branch=branch, noise=NOISE).pow(3).sum().backward()
    return held.mean_strength.grad, held.std_strength.grad, x.grad


@pytest.mark.parametrize("weight", [1.0, 10.0])
def test_strengths_get_the_reversed_gradient(weight: float) -> None:
    found = gradients(started(adv_weight=weight), X, "adversarial")
    strengths = [p.detach().clone().requires_grad_() for p in (started().mean_strength, started().std_strength)]
    x = X.clone().requires_grad_()
    content, mean, std = standardize(x, 1e-6)
    out = content * (std + NOISE[1] * strengths[1]) + mean + NOISE[0] * strengths[0]
    plain = torch.autograd.grad(out.pow(3).sum(), [*strengths, x])
    torch.testing.assert_close(found[0], -weight * plain[0])
    torch.testing.assert_close(found[1], -weight * plain[1])
    torch.testing.assert_close(found[2], plain[2])  # statistics are no constants, and nothing of them is reversed


def test_the_batchs_own_spread_keeps_its_gradient() -> None:
    found = gradients(started(), X, "batch")
    x = X.clone().requires_grad_()
    content, mean, std = standardize(x, 1e-6)
    out = content * (std + NOISE[1] * style_spread(std)) + mean + NOISE[0] * style_spread(mean)
    torch.testing.assert_close(found[2], torch.autograd.grad(out.pow(3).sum(), x)[0])
    assert found[0] is None


def test_descent_on_the_loss_raises_the_strengths() -> None:
    held = started()
    optimizer = torch.optim.SGD(held.parameters(), lr=1e-3)
    before = held.mean_strength.detach().clone()
    draws = torch.Generator().manual_seed(0)
    for _ in range(20):
        noise = tuple(torch.randn(5, 3, 1, 1, generator=draws, dtype=torch.float64) for _ in range(2))
        optimizer.zero_grad()
        (held(X, branch="adversarial", noise=noise) - X).square().mean().backward()
        optimizer.step()
    assert (held.mean_strength > before).all()


def test_branches_come_as_often_as_asked() -> None:
    held = started(p_clean=0.2, p_adv=0.5, generator=torch.Generator().manual_seed(0))
    drawn = [held._drawn_branch() for _ in range(2000)]
    for branch, share in (("clean", 0.2), ("adversarial", 0.5), ("batch", 0.3)):
        assert drawn.count(branch) / 2000 == pytest.approx(share, abs=0.04)


def test_the_generator_decides_and_the_global_one_is_left_alone() -> None:
    state = torch.get_rng_state()
    first, again = (layer(p_clean=0, generator=torch.Generator().manual_seed(4))(X) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)


def test_half_precision_comes_back_as_it_was() -> None:
    held = AdvStyle(3)
    out = held(X.bfloat16(), branch="adversarial")
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


def test_layers_are_put_after_blocks_and_train() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)).double()
    plain = copy.deepcopy(model)
    (held,) = insert_advstyle(model, {"1": 4})
    model.double()
    assert isinstance(model[1][1], AdvStyle)
    assert held.mean_strength in set(model.parameters())
    assert torch.equal(model.eval()(X), plain(X))
    model.train()(X).sum().backward()
    with pytest.raises(ValueError, match="after"):
        insert_advstyle(plain, {"7": 4})


def test_bad_input_is_refused_by_name() -> None:
    held = layer()
    for wrong in (X[:, :2], X[0], X[:1]):
        with pytest.raises(ValueError, match="x must"):
            held(wrong)
    with pytest.raises(ValueError, match="branch"):
        held(X, branch="noise")
    with pytest.raises(ValueError, match="noise"):
        held(X, noise=(NOISE[0][:2], NOISE[1]))
    assert not held.started
    with pytest.raises(ValueError, match="p_clean and p_adv"):
        AdvStyle(3, p_clean=0.7, p_adv=0.7)
    with pytest.raises(ValueError, match="num_channels"):
        AdvStyle(0)
    with pytest.raises(ValueError, match="two samples"):
        style_spread(torch.zeros(1, 2, 1, 1))


def test_the_study_lets_all_that_the_layer_is_compared_with_choose_from_the_same_settings() -> None:
    from trimtab.studies.domain.advstyle import advstyle, dsu, held, one_photo

    assert advstyle.search == dsu.search == held.search == one_photo.references()["ERM"].search


def test_a_first_batch_that_diverged_starts_nothing() -> None:
    layer, x = AdvStyle(2), torch.rand(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    layer(x.masked_fill(x > 0.5, torch.inf), branch="adversarial")
    assert not layer.started
    assert torch.equal(layer.mean_strength, torch.full((1, 2, 1, 1), 0.1))
    layer(x, branch="adversarial")
    assert layer.started
    assert layer.mean_strength.isfinite().all()


def test_layers_take_the_mode_of_the_network_and_leave_that_of_its_parts() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)))
    model[0][1].eval()
    (layer,) = insert_advstyle(model, {"0": 2}, p_clean=0.0)
    assert layer.training
    assert model[0].training
    assert not model[0][0][1].training
    model = nn.Sequential(nn.Conv2d(1, 2, 1)).eval()
    x = torch.rand(4, 1, 3, 3)
    before = model(x)
    insert_advstyle(model, {"0": 2}, p_clean=0.0)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("x", "noise", "name"),
    [
        ([1.0], None, "x"),
        (torch.ones(4, 2, 3, 3, dtype=torch.int64), None, "x"),
        (torch.ones(4, 2, 1, 1), None, "x"),
        (torch.ones(4, 2, 3, 3), (torch.zeros(4, 2, 1, 1),), "noise"),
        (torch.ones(4, 2, 3, 3), 2 * (torch.zeros(4, 2, 1, 1, dtype=torch.complex64),), "noise"),
    ],
)
def test_a_refused_batch_draws_nothing(x: object, noise: object, name: str) -> None:
    layer = AdvStyle(2, generator=torch.Generator().manual_seed(0))
    layer(torch.rand(4, 2, 3, 3))
    before = layer.generator.get_state()  # type: ignore[union-attr]
    with pytest.raises((TypeError, ValueError), match=f"^{name}"):
        layer(x, noise=noise)  # type: ignore[arg-type]
    assert torch.equal(layer.generator.get_state(), before)  # type: ignore[union-attr]
