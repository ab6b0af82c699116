"""SGD-SaI against its formula, its invariances, and the peer package."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trimtab.optim import SGDSaI, gradient_snr


def test_ratio_of_a_known_gradient():
    assert gradient_snr(torch.tensor([3.0, 4.0, 0.0, 0.0])).item() == pytest.approx(2.4253563, rel=1e-6)


@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_ratio_does_not_see_the_gradients_scale(scale, seed):
    gradient = torch.randn(7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(gradient_snr(scale * gradient, eps=0.0), gradient_snr(gradient, eps=0.0))


def test_ratio_grows_like_the_root_of_the_size():
    gradient = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    assert gradient_snr(gradient).item() == pytest.approx(100.0, rel=1e-3)


@pytest.mark.parametrize("gradient", [torch.tensor(5.0), torch.tensor([2.0]), torch.full((2, 2), 3.0), torch.zeros(4)])
def test_ratio_without_deviation_is_the_given_one(gradient, recwarn):
    assert gradient_snr(gradient).item() == 1.0
    assert gradient_snr(gradient, scalar_gsnr=0.3).item() == pytest.approx(0.3)
    assert not recwarn.list


def test_follows_the_published_rule():
    """The formula of Algorithm 1 with plain numbers, over 20 steps."""
    start = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3)
    weight = nn.Parameter(start.clone())
    optimizer = SGDSaI([weight], lr=0.05, momentum=0.8, eps=0.0, weight_decay=0.1)
    place, mean, ratio = start.clone(), None, None
    for step in range(20):
        gradient = torch.sin(torch.arange(6, dtype=torch.float64) * (step + 1)).view(2, 3) + 0.1
        weight.grad = gradient
        optimizer.step()
        if ratio is None:
            ratio = gradient.square().sum().sqrt() / ((gradient - gradient.mean()).square().sum() / 5).sqrt()
        mean = gradient if mean is None else 0.8 * mean + 0.2 * gradient
        place = place - 0.05 * 0.1 * place - 0.05 * ratio * mean
        torch.testing.assert_close(weight.detach(), place, rtol=1e-10, atol=1e-12)


def test_follows_pytorch_optimizer_given_the_same_start():
    """The peer's mean starts at zero, the authors' and ours at the first gradient."""
    peer = pytest.importorskip("pytorch_optimizer")
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3)) for _ in range(2))
    optimizer, reference = SGDSaI([ours], lr=0.05), peer.SGDSaI([theirs], lr=0.05)
    for step in range(20):
        ours.grad = torch.sin(torch.arange(6, dtype=torch.float64) * (step + 1)).view(2, 3)
        theirs.grad = ours.grad.clone()
        if step == 0:
            reference.state[theirs]["momentum_buffer"] = ours.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


def test_without_momentum_and_decay_it_is_sgd_with_scaled_rates():
    ours, plain = (nn.Parameter(torch.ones(4, dtype=torch.float64)) for _ in range(2))
    optimizer = SGDSaI([ours], lr=0.1, momentum=0.0, weight_decay=0.0)
    ours.grad = torch.tensor([3.0, 4.0, 0.0, 0.0], dtype=torch.float64)
    ratio = gradient_snr(ours.grad).item()
    reference = torch.optim.SGD([plain], lr=0.1 * ratio)
    for step in range(5):
        ours.grad = torch.tensor([3.0, 4.0, 0.0, 0.0], dtype=torch.float64).roll(step)
        plain.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, plain)


def test_ratio_is_measured_once_and_survives_saving():
    weight = nn.Parameter(torch.ones(4))
    optimizer = SGDSaI([weight])
    weight.grad = torch.tensor([3.0, 4.0, 0.0, 0.0])
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    again = SGDSaI([weight])
    again.load_state_dict(saved)
    weight.grad = torch.tensor([1.0, 1.0, 1.0, 1.5])
    for stepper in (optimizer, again):
        stepper.step()
        assert stepper.gsnr() == pytest.approx({0: 2.4253563})


def test_ratios_go_by_name_where_there_are_names():
    model = nn.Linear(3, 2)
    optimizer = SGDSaI(model.named_parameters())
    assert optimizer.gsnr() == {}
    model(torch.eye(3)).square().sum().backward()
    optimizer.step()
    assert list(optimizer.gsnr()) == ["weight", "bias"]


def test_state_is_half_of_adamws():
    def state_bytes(optimizer):
        return sum(v.numel() * v.element_size() for s in optimizer.state.values() for v in s.values())

    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model(torch.ones(1, 64)).sum().backward()
    ours, adamw = SGDSaI(model.parameters()), torch.optim.AdamW(model.parameters())
    for optimizer in (ours, adamw):
        optimizer.step()
    assert state_bytes(ours) <= 0.501 * state_bytes(adamw)


@pytest.mark.parametrize(("argument", "value"), [("momentum", 1.0), ("momentum", -0.1), ("scalar_gsnr", -1.0)])
def test_arguments_out_of_range_are_named(argument, value):
    with pytest.raises(ValueError, match=argument):
        SGDSaI([nn.Parameter(torch.zeros(1))], **{argument: value})


def test_asking_for_the_ratios_changes_no_state() -> None:
    seen, unseen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = SGDSaI([seen, unseen])
    seen.grad = torch.tensor([1.0, 2.0, 3.0])
    optimizer.step()
    before = list(optimizer.state_dict()["state"])
    assert list(optimizer.gsnr()) == [0]
    assert list(optimizer.state_dict()["state"]) == before == [0]
