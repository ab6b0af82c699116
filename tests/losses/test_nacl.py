from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.losses import NACLLoss, SVLSLoss, neighborhood_proportions

SHAPES = {"2-D": (2, 6, 7), "3-D": (2, 4, 5, 6)}
KERNELS = ("mean", "gaussian", "min", "max", "median", "mode")
PADDINGS = ("background", "ignore", "replicate")


def labels(shape: tuple[int, ...], classes: int = 3, seed: int = 0) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def scores(targets: Tensor, classes: int = 3, seed: int = 1) -> Tensor:
    shape = (targets.shape[0], classes, *targets.shape[1:])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def windows(targets: Tensor, size: int, padding: str) -> list[tuple[tuple[int, ...], list[int], list[float]]]:
    """Per pixel: its place, the labels in its window, and their squared distances, one by one."""
    radius = size // 2
    found = []
    for place in itertools.product(*map(range, targets.shape)):
        held, far = [], []
        for offset in itertools.product(range(-radius, radius + 1), repeat=targets.ndim - 1):
            there = [p + o for p, o in zip(place[1:], offset, strict=True)]
            inside = all(0 <= t < n for t, n in zip(there, targets.shape[1:], strict=True))
            if padding == "replicate":
                there, inside = [min(max(t, 0), n - 1) for t, n in zip(there, targets.shape[1:], strict=True)], True
            if inside or padding == "background":
                held.append(int(targets[(place[0], *there)]) if inside else 0)
                far.append(float(sum(o * o for o in offset)))
        found.append((place, held, far))
    return found


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("shape", [(2, 5, 6), (1, 3, 4, 5)])
def test_proportions_count_the_window(shape: tuple[int, ...], size: int, padding: str) -> None:
    targets = labels(shape)
    found = neighborhood_proportions(targets, 3, kernel_size=size, padding=padding)
    for (image, *place), held, _ in windows(targets, size, padding):
        expected = [held.count(k) / len(held) for k in range(3)]
        assert found[(image, slice(None), *place)].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("kernel", ["min", "max", "median", "mode"])
def test_hard_kernels_take_the_windows_statistic(kernel: str, padding: str) -> None:
    statistic = getattr(torch, kernel)
    targets = labels((2, 5, 6), classes=5)
    found = neighborhood_proportions(targets, 5, kernel=kernel, padding=padding)
    for (image, *place), held, _ in windows(targets, 3, padding):
        expected = F.one_hot(statistic(torch.tensor(held), dim=0).values, 5)
        assert found[(image, slice(None), *place)].tolist() == expected.tolist()


@pytest.mark.parametrize("shape", [(2, 5, 6), (1, 3, 4, 5)])
def test_gaussian_is_the_filter_of_svls(shape: tuple[int, ...]) -> None:
    # Islam and Glocker: the Gaussian's centre is replaced by the sum of the others, and the whole normalised.
    targets, sigma = labels(shape), 0.8
    found = neighborhood_proportions(targets, 3, kernel="gaussian", sigma=sigma, padding="replicate")
    for (image, *place), held, far in windows(targets, 3, "replicate"):
        weights = [math.exp(-d / (2 * sigma**2)) for d in far]
        weights = [w / sum(weights) for w in weights]
        centre = far.index(0.0)
        weights[centre] = 1 - weights[centre]
        expected = [sum(w for w, k in zip(weights, held, strict=True) if k == c) / sum(weights) for c in range(3)]
        assert found[(image, slice(None), *place)].tolist() == pytest.approx(expected, abs=1e-6)


def test_corner_of_a_constant_image() -> None:
    ones = torch.ones(1, 4, 4, dtype=torch.int64)
    corner = {padding: neighborhood_proportions(ones, 2, padding=padding)[0, :, 0, 0] for padding in PADDINGS}
    torch.testing.assert_close(corner["background"], torch.tensor([5 / 9, 4 / 9]))
    torch.testing.assert_close(corner["ignore"], torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(corner["replicate"], torch.tensor([0.0, 1.0]))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 1000),
    st.sampled_from([(1, 1, 1), (2, 3, 5), (1, 2, 3, 2)]),
    st.integers(1, 5),
    st.sampled_from([1, 3, 5, 7]),
    st.sampled_from(KERNELS),
    st.sampled_from(PADDINGS),
)
def test_proportions_sum_to_one(
    seed: int, shape: tuple[int, ...], classes: int, size: int, kernel: str, padding: str
) -> None:
    targets = labels(shape, classes, seed)
    found = neighborhood_proportions(targets, classes, kernel_size=size, kernel=kernel, padding=padding)
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(1), torch.ones(shape))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("padding", PADDINGS)
def test_turned_labels_give_turned_proportions(kernel: str, padding: str) -> None:
    targets = labels((2, 5, 6))
    found = neighborhood_proportions(targets, 3, kernel=kernel, padding=padding)
    for turn in (lambda x: x.flip(-1), lambda x: x.flip(-2), lambda x: x.rot90(1, (-2, -1))):
        torch.testing.assert_close(
            neighborhood_proportions(turn(targets), 3, kernel=kernel, padding=padding), turn(found)
        )


@pytest.mark.parametrize("ignored", [-100, 255, 0])
def test_ignored_pixels_count_in_no_neighbourhood(ignored: int) -> None:
    targets = torch.tensor([[[1, 2, 1], [2, ignored, 1], [1, 1, 1]]])
    found = neighborhood_proportions(targets, 3, ignore_index=ignored)
    torch.testing.assert_close(found[0, :, 1, 1], torch.tensor([0.0, 6 / 8, 2 / 8]))
    nothing = torch.full((1, 3, 3), ignored)
    for kernel in KERNELS:
        assert not neighborhood_proportions(nothing, 3, kernel=kernel, ignore_index=ignored)[0, :, 1, 1].any()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_equals_monai_inside(shape: tuple[int, ...], distance: str) -> None:
    peer = pytest.importorskip("monai.losses").NACLLoss(
        classes=3, dim=len(shape) - 1, distance_type=distance, alpha=0.3, kernel_size=3
    )
    targets = labels(shape)
    # Background on the outermost pixels and their neighbours, where MONAI's zero padding would lose mass, and logits
    # there that equal what ours wants, so that only the inside is compared.
    inside = (slice(None), slice(None), *[slice(1, -1)] * (len(shape) - 1))
    wanted = neighborhood_proportions(targets, 3)
    torch.testing.assert_close(peer.get_constr_target(targets)[inside], wanted[inside])
    logits = scores(targets).float()
    border = torch.ones_like(logits)
    border[inside] = 0
    theirs = peer.get_constr_target(targets)
    gap = {"l1": torch.abs, "l2": torch.square}[distance]
    at_border = 0.3 * ((gap(wanted - logits) - gap(theirs - logits)) * border).mean()
    value = NACLLoss(3, alpha=0.3, distance=distance)(logits, targets)
    torch.testing.assert_close(value, peer(logits, targets) + at_border)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_weight_it_is_cross_entropy(shape: tuple[int, ...], reduction: str) -> None:
    targets = labels(shape)
    targets[0, 0, 0] = -100
    logits = scores(targets)
    expected = F.cross_entropy(logits, targets, reduction=reduction)
    torch.testing.assert_close(NACLLoss(3, alpha=0.0, reduction=reduction)(logits, targets), expected)


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_logits_that_equal_the_proportions_pay_cross_entropy_alone(distance: str) -> None:
    targets = labels((2, 5, 6))
    logits = neighborhood_proportions(targets, 3)
    value = NACLLoss(3, alpha=7.0, distance=distance)(logits, targets)
    torch.testing.assert_close(value, F.cross_entropy(logits, targets))


@pytest.mark.parametrize("on", ["logits", "softmax"])
@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_penalty_in_full(distance: str, on: str) -> None:
    targets = labels((2, 5, 6))
    logits, wanted = scores(targets), neighborhood_proportions(targets, 3)
    gap = (logits if on == "logits" else logits.softmax(1)) - wanted
    penalty = (gap.abs() if distance == "l1" else gap**2).sum() / gap.numel()
    value = NACLLoss(3, alpha=0.4, distance=distance, on=on)(logits, targets)
    torch.testing.assert_close(value, F.cross_entropy(logits, targets) + 0.4 * penalty)


def test_gradient_of_the_penalty_is_a_sign() -> None:
    targets = labels((2, 5, 6))
    logits = scores(targets).requires_grad_()
    full, plain = NACLLoss(3, alpha=0.4)(logits, targets), F.cross_entropy(logits, targets)
    (gradient,) = torch.autograd.grad(full - plain, logits)
    expected = 0.4 * (logits.detach() - neighborhood_proportions(targets, 3)).sign() / logits.numel()
    torch.testing.assert_close(gradient, expected)


def test_ignored_pixels_have_no_loss_and_no_gradient() -> None:
    targets = labels((2, 5, 6))
    targets[0, 2, 3] = targets[1, 0, 0] = 9
    logits = scores(targets).requires_grad_()
    for loss in (NACLLoss(3, ignore_index=9, reduction="none"), SVLSLoss(3, ignore_index=9, reduction="none")):
        each = loss(logits, targets)
        assert each.shape == targets.shape
        assert each[targets == 9].tolist() == [0.0, 0.0]
        (gradient,) = torch.autograd.grad(each.sum(), logits)
        assert not gradient.movedim(1, -1)[targets == 9].any()
        loss.reduction = "mean"
        torch.testing.assert_close(loss(logits, targets), each[targets != 9].mean())
        loss.reduction = "sum"
        torch.testing.assert_close(loss(logits, targets), each.sum())


@pytest.mark.parametrize("loss", [NACLLoss(3), SVLSLoss(3)])
def test_nothing_but_ignored_pixels_is_a_loss_of_zero(loss: torch.nn.Module) -> None:
    targets = torch.full((1, 4, 4), -100)
    logits = scores(targets).requires_grad_()
    value = loss(logits, targets)
    value.backward()
    assert value == 0
    assert not logits.grad.any()


def test_svls_is_soft_cross_entropy_and_on_constant_labels_plain() -> None:
    targets = labels((2, 5, 6))
    logits = scores(targets)
    soft = neighborhood_proportions(targets, 3, kernel="gaussian", padding="replicate").double()
    torch.testing.assert_close(SVLSLoss(3)(logits, targets), F.cross_entropy(logits, soft))
    constant = torch.full_like(targets, 2)
    torch.testing.assert_close(SVLSLoss(3)(logits, constant), F.cross_entropy(logits, constant))


def test_penalty_bounds_the_logits() -> None:
    # Cross-entropy alone drives logits without end; with the penalty they stay where its pull equals the push.
    targets = labels((1, 8, 8))
    free, bound = (torch.zeros(1, 3, 8, 8, requires_grad=True) for _ in range(2))
    for logits, loss in ((free, NACLLoss(3, alpha=0.0)), (bound, NACLLoss(3, alpha=0.5))):
        optimizer = torch.optim.Adam([logits], lr=0.1)
        for _ in range(300):
            optimizer.zero_grad()
            loss(logits, targets).backward()
            optimizer.step()
    # For one pixel the push is 1 - p and the pull alpha / K, so that p stays at 1 - alpha / K.
    assert free.softmax(1).amax(1).mean() > 0.99
    torch.testing.assert_close(bound.softmax(1).amax(1).mean(), torch.tensor(1 - 0.5 / 3), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_classes": 0}, "num_classes"),
        ({"kernel_size": 2}, "kernel_size"),
        ({"kernel_size": -1}, "kernel_size"),
        ({"kernel": "bilateral"}, "kernel"),
        ({"distance": "l3"}, "distance"),
        ({"alpha": -0.1}, "alpha"),
        ({"alpha": math.nan}, "alpha"),
        ({"on": "probs"}, "on"),
        ({"sigma": 0.1}, "sigma"),
        ({"padding": "zeros"}, "padding"),
        ({"reduction": "max"}, "reduction"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        NACLLoss(**{"num_classes": 3, **options})
    if name not in ("kernel", "distance", "alpha", "on"):
        with pytest.raises(ValueError, match=name):
            SVLSLoss(**{"num_classes": 3, **options})


def test_bad_arguments_are_refused_by_name() -> None:
    targets = labels((2, 5, 6))
    with pytest.raises(ValueError, match="num_classes=4"):
        NACLLoss(4)(scores(targets), targets)
    with pytest.raises(ValueError, match="targets"):
        NACLLoss(3)(scores(targets), targets[:, :4])
    with pytest.raises(TypeError, match="targets"):
        neighborhood_proportions(targets.float(), 3)
    with pytest.raises(ValueError, match="targets"):
        neighborhood_proportions(targets[0], 3)
    with pytest.raises(ValueError, match="targets"):
        neighborhood_proportions(targets[:0], 3)
