"""AdamP and SGDP against closed forms, the geometry they promise, and two packages."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trimtab.optim import SGDP, AdamP, radial_coefficient

ALWAYS = 1e9
"""A delta at which everything looks scale invariant."""


def network(memory_format=torch.contiguous_format):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64, 8),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Linear(8, 3),
        )
    return model.double().to(memory_format=memory_format)


def train(model, optimizer, steps=30):
    generator = torch.Generator().manual_seed(1)
    weight = next(model.parameters())
    for _ in range(steps):
        x = torch.randn(16, 2, 6, 6, generator=generator).double()
        if not weight.is_contiguous():
            x = x.to(memory_format=torch.channels_last)
        y = torch.randint(3, (16,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def assert_follow(ours, theirs, **tolerance):
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, **tolerance)


# `delta` at which some of the weights are projected by channel, some by layer, and some not at all.
COMMON = {"weight_decay": 0.1, "eps": 1e-6}
ADAMP = [
    {"lr": 0.01, "betas": (0.8, 0.99), "delta": delta, "wd_ratio": 0.3, "nesterov": nesterov, **COMMON}
    for delta, nesterov in itertools.product((0.0, 0.1, 0.5, 3.0), (False, True))
]
SGD = [
    {"lr": 0.05, "momentum": 0.9, "dampening": 0.2, "delta": delta, "wd_ratio": 0.3, "nesterov": nesterov, **COMMON}
    for delta, nesterov in itertools.product((0.0, 0.1, 0.5, 3.0), (False, True))
]


@pytest.mark.parametrize("kwargs", ADAMP)
def test_adamp_follows_the_authors_package(kwargs):
    peer = pytest.importorskip("adamp")
    ours, theirs = network(), network()
    train(ours, AdamP(ours.parameters(), **kwargs))
    train(theirs, peer.AdamP(theirs.parameters(), **kwargs))
    assert_follow(ours, theirs, atol=1e-7, rtol=0)


@pytest.mark.parametrize("kwargs", [kwargs for kwargs in SGD if kwargs["nesterov"]])
def test_sgdp_follows_the_authors_package(kwargs):
    peer = pytest.importorskip("adamp")
    ours, theirs = network(), network()
    train(ours, SGDP(ours.parameters(), **kwargs))
    train(theirs, peer.SGDP(theirs.parameters(), **kwargs))
    assert_follow(ours, theirs, atol=1e-7, rtol=0)


@pytest.mark.parametrize("kwargs", SGD)
def test_sgdp_follows_pytorch_optimizer(kwargs):
    """Also without nesterov, where the authors' package projects the momentum buffer in place, against the paper."""
    peer = pytest.importorskip("pytorch_optimizer")
    ours, theirs = network(), network()
    train(ours, SGDP(ours.parameters(), **kwargs))
    train(theirs, peer.SGDP(theirs.parameters(), **kwargs))
    assert_follow(ours, theirs, atol=1e-7, rtol=0)


@pytest.mark.parametrize("cls", [AdamP, SGDP])
def test_the_memory_format_of_a_weight_does_not_matter(cls):
    contiguous, last = network(), network(memory_format=torch.channels_last)
    assert not last[0].weight.is_contiguous()
    for model in (contiguous, last):
        train(model, cls(model.parameters(), lr=0.01, weight_decay=0.1, delta=0.5), steps=10)
    assert not last[0].weight.is_contiguous()
    assert_follow(contiguous, last, atol=1e-9, rtol=0)


def test_delta_zero_is_adamw_and_sgd():
    for make, plain in (
        (
            lambda p: AdamP(p, lr=0.01, weight_decay=0.1, delta=0.0),
            lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
        ),
        (
            lambda p: SGDP(p, lr=0.05, momentum=0.9, nesterov=True, delta=0.0),
            lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
        ),
    ):
        one, other = network(), network()
        train(one, make(one.parameters()))
        train(other, plain(other.parameters()))
        assert_follow(one, other, atol=1e-9, rtol=0)


def test_vectors_are_never_projected():
    bias, twin = (nn.Parameter(torch.tensor([3.0, 4.0])) for _ in range(2))
    for p, optimizer in (
        (bias, AdamP([bias], lr=0.1, delta=ALWAYS, weight_decay=0.5)),
        (twin, torch.optim.AdamW([twin], lr=0.1, weight_decay=0.5)),
    ):
        for gradient in ([1.0, 2.0], [3.0, 1.0]):
            p.grad = torch.tensor(gradient)
            optimizer.step()
    torch.testing.assert_close(bias, twin, atol=1e-7, rtol=0)


def scale_invariant(weight, target):
    """A loss of each row's direction alone."""
    return -(nn.functional.normalize(weight, dim=1) * target).sum()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: AdamP(p, lr=0.03),
        lambda p: AdamP(p, lr=0.03, nesterov=True),
        lambda p: SGDP(p, lr=0.3, momentum=0.9),
        lambda p: SGDP(p, lr=0.3, momentum=0.9, nesterov=True),
    ],
)
def test_steps_of_scale_invariant_weights_are_orthogonal_to_them(make):
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(5, 7, generator=generator, dtype=torch.float64))
    target = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    optimizer = make([weight])
    for _ in range(20):
        optimizer.zero_grad()
        scale_invariant(weight, target).backward()
        before = weight.detach().clone()
        optimizer.step()
        move = weight.detach() - before
        assert move.norm() > 1e-3
        assert (move * before).sum(1).abs().max() < 1e-7
        torch.testing.assert_close(weight.detach().square().sum(1), (before.square() + move.square()).sum(1))


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_norm_growth_of_momentum_and_of_its_projection(momentum):
    """Lemma 2.1 and its projected form, as exact sums over the updates."""
    lr, steps = 0.3, 25
    start = torch.randn(1, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = torch.randn(1, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for cls in (torch.optim.SGD, SGDP):
        weight = nn.Parameter(start.clone())
        optimizer = cls([weight], lr=lr, momentum=momentum)
        if cls is SGDP:
            optimizer.param_groups[0]["eps"] = 1e-15
        lengths = []
        for _ in range(steps):
            optimizer.zero_grad()
            scale_invariant(weight, target).backward()
            before = weight.detach().clone()
            optimizer.step()
            lengths.append(((weight.detach() - before) / lr).square().sum().item())
        grown = sum(lengths)
        if cls is torch.optim.SGD:
            grown += 2 * sum(momentum ** (t - k) * lengths[k] for t in range(steps) for k in range(t))
        expected = start.square().sum().item() + lr**2 * grown
        assert weight.square().sum().item() == pytest.approx(expected, rel=1e-9)


def test_the_buffer_itself_is_not_projected():
    weight = nn.Parameter(torch.tensor([[1.0, 0.0]]))
    optimizer = SGDP([weight], lr=0.1, momentum=0.5, delta=ALWAYS)
    weight.grad = torch.tensor([[3.0, 4.0]])
    optimizer.step()
    assert optimizer.state[weight]["momentum_buffer"].tolist() == [[3.0, 4.0]]
    torch.testing.assert_close(weight.detach(), torch.tensor([[1.0, -0.4]]))


@pytest.mark.parametrize("cls", [AdamP, SGDP])
def test_weight_decay_is_spared_where_the_projection_acts(cls):
    for delta, factor in ((ALWAYS, 1 - 0.1 * 0.5 * 0.2), (0.0, 1 - 0.1 * 0.5)):
        weight = nn.Parameter(torch.tensor([[1.0, 0.0]], dtype=torch.float64))
        weight.grad = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
        cls([weight], lr=0.1, weight_decay=0.5, wd_ratio=0.2, delta=delta).step()
        assert weight[0, 0].item() == pytest.approx(factor, rel=1e-12)


def test_decay_of_sgdp_is_divided_by_one_less_momentum():
    weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
    weight.grad = torch.zeros_like(weight)
    SGDP([weight], lr=0.1, momentum=0.9, weight_decay=0.01).step()
    torch.testing.assert_close(weight.detach(), torch.full((3,), 1 - 0.1 * 0.01 / 0.1, dtype=torch.float64))


def orthogonal_rows(*angles):
    """Unit rows of weights, and gradients at these cosines to them."""
    p = torch.zeros(len(angles), 4)
    p[:, 0] = 1.0
    grad = torch.zeros_like(p)
    grad[:, 0] = torch.tensor(angles)
    grad[:, 1] = (1 - grad[:, 0].square()).sqrt()
    return p, grad


def test_channels_are_tried_first_and_one_that_is_not_orthogonal_vetoes_them():
    update = torch.tensor([[1.0, 9.0, 0.0, 0.0], [3.0, 9.0, 0.0, 0.0]])
    p, grad = orthogonal_rows(0.02, -0.04)  # the threshold is 0.1 / sqrt(4) = 0.05
    coefficient, fires = radial_coefficient(p, grad, update)
    assert fires
    torch.testing.assert_close(coefficient, torch.tensor([[1.0], [3.0]]))
    # One row is not orthogonal, the whole is: its cosine 0.01 / 2 is below 0.1 / sqrt(8).
    p, grad = orthogonal_rows(0.06, -0.05)
    coefficient, fires = radial_coefficient(p, grad, update)
    assert fires
    torch.testing.assert_close(coefficient, torch.tensor([[2.0], [2.0]]))
    p, grad = orthogonal_rows(0.06, 0.06)  # nor is the whole: 0.12 / 2
    coefficient, fires = radial_coefficient(p, grad, update)
    assert not fires
    assert coefficient.tolist() == [[0.0], [0.0]]


def test_the_sign_of_the_cosine_does_not_matter():
    p, grad = orthogonal_rows(-0.06)
    assert not radial_coefficient(p, grad, p)[1]
    assert radial_coefficient(p, grad, p, delta=0.13)[1]


@pytest.mark.parametrize("spoil", ["weight", "gradient"])
def test_rows_of_zeros_count_as_orthogonal_and_stay_finite(spoil):
    p, grad = orthogonal_rows(0.02, 0.03)
    (p if spoil == "weight" else grad)[1] = 0.0
    coefficient, fires = radial_coefficient(p, grad, torch.ones(2, 4))
    assert fires
    assert coefficient.isfinite().all()


def test_a_gradient_that_is_not_a_number_projects_nothing():
    p, grad = orthogonal_rows(0.02, 0.03)
    grad[0, 0] = float("nan")
    coefficient, fires = radial_coefficient(p, grad, torch.ones(2, 4))
    assert not fires
    assert coefficient.tolist() == [[0.0], [0.0]]


@given(
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_what_is_left_is_orthogonal_and_scaling_the_weight_changes_nothing(shape, scale, seed):
    p, grad, update = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    coefficient, fires = radial_coefficient(p, grad, update, delta=ALWAYS, eps=0.0)
    assert fires
    rest = update - coefficient * p
    along = (rest * p).flatten(1).sum(1)
    assert along.abs().max() < 1e-9
    scaled, _ = radial_coefficient(p * scale, grad, update, delta=ALWAYS, eps=0.0)
    torch.testing.assert_close(scaled * scale * p, coefficient * p)
    assert radial_coefficient(p * scale, grad, update)[1] == radial_coefficient(p, grad, update)[1]


def test_empty_weights_pass():
    weight = nn.Parameter(torch.zeros(0, 3))
    weight.grad = torch.zeros(0, 3)
    AdamP([weight]).step()


@pytest.mark.parametrize(
    ("cls", "argument", "value"),
    [
        (AdamP, "betas", (0.9, 1.0)),
        (AdamP, "delta", -0.1),
        (AdamP, "wd_ratio", -1.0),
        (SGDP, "momentum", 1.0),
        (SGDP, "dampening", 1.0),
        (SGDP, "delta", float("nan")),
    ],
)
def test_hyper_parameters_out_of_range_are_named(cls, argument, value):
    with pytest.raises(ValueError, match=argument):
        cls([nn.Parameter(torch.zeros(1))], **{"lr": 0.1, argument: value})


def test_shapes_that_do_not_fit_are_named():
    p = torch.ones(2, 3)
    for arguments, name in (((p[0], p[0], p[0]), "p"), ((p, p.T, p), "grad"), ((p, p, p[:1]), "update")):
        with pytest.raises(ValueError, match=f"^{name} must have"):
            radial_coefficient(*arguments)
