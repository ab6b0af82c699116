"""AdaBelief against closed forms and against the authors' package."""

import contextlib
import io
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trimtab.optim import AdaBelief


def walk(gradients, **kwargs):
    """Positions of one parameter from 0, and its optimizer."""
    weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = AdaBelief([weight], **kwargs)
    path = []
    for gradient in gradients:
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        path.append(weight.item())
    return path, optimizer.state[weight]


@pytest.mark.parametrize("eps", [1e-16, 1e-3])
@pytest.mark.parametrize(("rectify", "decoupled", "amsgrad"), itertools.product([False, True], repeat=3))
def test_follows_the_authors_package(rectify, decoupled, amsgrad, eps):
    peer = pytest.importorskip("adabelief_pytorch")
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3, 4), (5,), ())]
    ours, theirs = ([nn.Parameter(p.clone()) for p in start] for _ in range(2))
    common = {"lr": 0.01, "betas": (0.9, 0.99), "eps": eps, "weight_decay": 0.1, "amsgrad": amsgrad, "rectify": rectify}
    optimizer = AdaBelief(ours, decoupled_weight_decay=decoupled, **common)
    with contextlib.redirect_stdout(io.StringIO()):
        reference = peer.AdaBelief(theirs, weight_decouple=decoupled, print_change_log=False, **common)
    for _ in range(50):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64) + 0.3 * p.detach()
            q.grad = p.grad.clone()
        optimizer.step()
        reference.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("fixed_decay", "degenerate"), [(True, True), (False, False)])
def test_follows_the_authors_package_in_its_other_options(fixed_decay, degenerate):
    peer = pytest.importorskip("adabelief_pytorch")
    ours, theirs = (nn.Parameter(torch.linspace(1, 2, 6, dtype=torch.float64)) for _ in range(2))
    optimizer = AdaBelief([ours], weight_decay=0.01, fixed_decay=fixed_decay, degenerate_to_sgd=degenerate)
    with contextlib.redirect_stdout(io.StringIO()):
        reference = peer.AdaBelief(
            [theirs],
            weight_decay=0.01,
            fixed_decay=fixed_decay,
            degenerated_to_sgd=degenerate,
            print_change_log=False,
            eps=1e-16,
        )
    for step in range(20):
        ours.grad = torch.cos(torch.arange(6, dtype=torch.float64) * (step + 1))
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_follows_pytorch_optimizer():
    peer = pytest.importorskip("pytorch_optimizer")
    ours, theirs = (nn.Parameter(torch.linspace(1, 2, 6, dtype=torch.float64)) for _ in range(2))
    optimizer = AdaBelief([ours], lr=0.01, eps=1e-8, weight_decay=0.1, rectify=False)
    reference = peer.AdaBelief([theirs], lr=0.01, eps=1e-8, weight_decay=0.1, rectify=False)
    for step in range(30):
        ours.grad = torch.cos(torch.arange(6, dtype=torch.float64) * (step + 1))
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@given(gradient=st.floats(1e-2, 1e3).map(lambda x: x) | st.floats(-1e3, -1e-2))
@settings(max_examples=20, deadline=None)
def test_first_step_is_the_sign_over_beta1(gradient):
    (end,), _ = walk([gradient], lr=1e-3, rectify=False)
    assert end == pytest.approx(-1e-3 * math.copysign(1 / 0.9, gradient), rel=1e-6)


def test_a_constant_gradient_leaves_a_known_surprise_and_lengthens_the_steps():
    beta1, beta2, gradient = 0.9, 0.99, 3.0
    for steps in (1, 2, 10):
        _, state = walk([gradient] * steps, betas=(beta1, beta2), eps=0.0, rectify=False)
        surprise = (1 - beta2) * gradient**2 * sum(beta2 ** (steps - i) * beta1 ** (2 * i) for i in range(1, steps + 1))
        assert state["exp_avg_var"].item() == pytest.approx(surprise, rel=1e-9)
    path, _ = walk([gradient] * 30, lr=1e-3, rectify=False)
    lengths = -torch.tensor([0.0, *path]).diff()
    assert (lengths.diff() > 0).all()


def test_an_alternating_gradient_gives_about_the_step_of_adam():
    gradients = [(-1.0) ** i for i in range(400)]
    path, _ = walk(gradients, lr=1e-3, rectify=False)
    weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
    adam, steps = torch.optim.Adam([weight], lr=1e-3), []
    for gradient in gradients:
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        adam.step()
        steps.append(weight.item())
    ratio = torch.tensor(path).diff().abs()[-20:] / torch.tensor(steps).diff().abs()[-20:]
    assert ((ratio > 0.8) & (ratio < 1.2)).all()


def test_rectified_first_steps_are_momentum_sgd():
    gradients = [1.0, -2.0, 3.0, 0.5]
    path, _ = walk(gradients, lr=0.1)
    mean, place = 0.0, 0.0
    for step, gradient in enumerate(gradients, 1):
        mean = 0.9 * mean + 0.1 * gradient
        place -= 0.1 * mean / (1 - 0.9**step)
        assert path[step - 1] == pytest.approx(place, rel=1e-12)
    still, _ = walk(gradients, lr=0.1, degenerate_to_sgd=False)
    assert still == [0.0] * 4


def test_the_running_maximum_is_kept_only_where_it_is_used():
    assert "max_exp_avg_var" in walk([1.0], amsgrad=True, rectify=False)[1]
    assert "max_exp_avg_var" not in walk([1.0], amsgrad=True)[1]
    assert "max_exp_avg_var" not in walk([1.0])[1]


@pytest.mark.parametrize("betas", [(1.0, 0.9), (-0.1, 0.9), (0.9, 1.0)])
def test_betas_out_of_range_are_named(betas):
    with pytest.raises(ValueError, match="betas"):
        AdaBelief([nn.Parameter(torch.zeros(1))], betas=betas)
