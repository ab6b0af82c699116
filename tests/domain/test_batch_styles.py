from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.domain import (
    BatchStyleViews,
    batch_color_jitter,
    batch_style_standardize,
    fourier_augment,
    same_style_nt_xent,
    same_style_swav,
    swap_low_amplitude,
)

SIZES = [(8, 8), (7, 7), (8, 5), (5, 8)]


def images(count: int = 4, height: int = 8, width: int = 8) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("area", [0.01, 0.3, 1.0])
def test_the_style_image_stays_and_twice_is_once(size: tuple[int, int], area: float) -> None:
    x = images(4, *size)
    styled = batch_style_standardize(x, area, index=2)
    close(styled[2], x[2])
    close(batch_style_standardize(styled, area, index=2), styled)
    close(batch_style_standardize(x[:1], area), x[:1])


@pytest.mark.parametrize("size", SIZES)
def test_the_whole_window_gives_the_amplitude_and_keeps_the_phase(size: tuple[int, int]) -> None:
    x = images(4, *size)
    found, own = (torch.fft.fft2(held) for held in (batch_style_standardize(x, 1.0, index=1), x))
    close(found.abs(), own[1].abs().expand_as(found.abs()))
    close(found / found.abs(), own / own.abs())


@pytest.mark.parametrize("size", SIZES)
def test_outside_the_window_nothing_changes(size: tuple[int, int]) -> None:
    height, width = size
    x = images(4, *size)
    found, own = (torch.fft.fft2(held) for held in (batch_style_standardize(x, 0.2, index=1), x))
    rows = torch.fft.fftfreq(height, 1 / height).abs() <= round(height * 0.2**0.5) / 2
    columns = torch.fft.fftfreq(width, 1 / width).abs() <= round(width * 0.2**0.5) / 2
    inside = rows[:, None] & columns
    assert inside.sum() < inside.numel()
    close(found[..., ~inside], own[..., ~inside])
    close(found[..., inside].abs(), own[1][..., inside].abs().expand(4, -1, -1))


def test_the_smallest_window_gives_the_mean_colour_alone() -> None:
    x = images()
    styled = batch_style_standardize(x, 1e-3, index=3)
    close(styled.mean((2, 3)), x[3].mean((1, 2)).expand(4, 3))
    close(styled - styled.mean((2, 3), keepdim=True), x - x.mean((2, 3), keepdim=True))


def test_every_image_has_its_own_donor_in_fourier_augmentation() -> None:
    x, donors = images(), torch.tensor([3, 0, 1, 2])
    found = fourier_augment(x, 0.3, index=donors)
    for i, donor in enumerate(donors.tolist()):
        close(found[i : i + 1], swap_low_amplitude(x[i : i + 1], x[donor : donor + 1], 0.3))
    close(fourier_augment(x, 0.3, index=torch.full((4,), 2)), batch_style_standardize(x, 0.3, index=2))


def test_flat_and_black_images_are_finite_and_the_gradient_flows() -> None:
    x = images()
    x[0], x[1] = 0.0, 0.5
    x.requires_grad_()
    styled = batch_style_standardize(x, 0.5, index=3)
    assert styled.isfinite().all()
    styled.square().sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad[2].abs().sum() > 0
    assert x.grad[3].abs().sum() > 0


def test_the_gradient_is_right() -> None:
    x = images(3, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: batch_style_standardize(x, 0.4, index=1), (x,))


def test_bounds_and_half_precision() -> None:
    styled = batch_style_standardize(images().bfloat16(), 0.5, index=0, bounds=(0.2, 0.6))
    assert styled.dtype == torch.bfloat16
    assert styled.min() >= 0.199
    assert styled.max() <= 0.601


def test_draws_come_from_the_generator() -> None:
    x = images()
    state = torch.get_rng_state()
    for make in (batch_style_standardize, fourier_augment, batch_color_jitter):
        one, same, other = (make(x, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 3))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_jitter_is_the_same_for_all_images() -> None:
    x = images() * 0.5
    jittered = batch_color_jitter(x, factors=(1.5, 1.0, 1.0))
    close(jittered, 1.5 * x)
    grey = batch_color_jitter(x, factors=(1.0, 1.0, 0.0))
    close(grey, x.mean(1, keepdim=True).expand_as(x))
    close(batch_color_jitter(x, 0.0), x)


def test_each_view_has_one_style_and_no_two_views_the_same() -> None:
    x = images()
    views = BatchStyleViews(3, area=1.0, bounds=None, generator=torch.Generator().manual_seed(0))(x)
    amplitudes = torch.fft.fft2(views).abs().view(3, 4, 3, 8, 8)
    for view in amplitudes:
        close(view, view[:1].expand_as(view))
    assert not torch.allclose(amplitudes[0, 0], amplitudes[1, 0])
    given = BatchStyleViews(2, area=0.5, bounds=None)(x, index=torch.tensor([3, 1]))
    close(given, torch.cat([batch_style_standardize(x, 0.5, index=i) for i in (3, 1)]))


def test_views_are_transformed_before_they_are_styled() -> None:
    x = images()
    made = BatchStyleViews(2, lambda x: x.flip(3), area=0.5, bounds=None)(x, index=torch.tensor([0, 1]))
    close(made, torch.cat([batch_style_standardize(x.flip(3), 0.5, index=i) for i in (0, 1)]))


def test_nt_xent_is_the_formula() -> None:
    z = torch.randn(9, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    unit = F.normalize(z, dim=1).view(3, 3, 5)
    terms = []
    for v in range(3):
        for u in range(3):
            for i in range(3):
                if u != v:
                    own = math.exp(float(unit[v, i] @ unit[u, i]) / 0.3)
                    others = sum(math.exp(float(unit[v, i] @ unit[v, j]) / 0.3) for j in range(3) if j != i)
                    terms.append(-math.log(own / (own + others)))
    assert same_style_nt_xent(z, 3, 0.3).item() == pytest.approx(sum(terms) / len(terms))


def test_nt_xent_does_not_compare_across_views() -> None:
    """What makes all embeddings of a view alike is no use to it, unlike to SimCLR's loss."""
    z = torch.randn(8, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    gradient = torch.autograd.grad(same_style_nt_xent(z[[0, 1, 4, 5]], 2), z)[0]
    assert gradient[[2, 3, 6, 7]].abs().max() == 0
    alone = same_style_nt_xent(torch.randn(2, 6), 2)
    assert alone.item() == pytest.approx(0, abs=1e-6)  # one sample has nothing to be told from


def test_losses_do_not_depend_on_the_order_of_samples_or_views() -> None:
    z = torch.randn(12, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    for moved in (z.view(2, 6, 5)[:, order].flatten(0, 1), z.view(2, 6, 5).flip(0).flatten(0, 1)):
        close(same_style_nt_xent(moved), same_style_nt_xent(z))
        torch.testing.assert_close(same_style_swav(moved), same_style_swav(z), rtol=1e-3, atol=1e-5)


def test_swav_swaps_balanced_assignments() -> None:
    scores = torch.eye(4, dtype=torch.float64).repeat(2, 1).requires_grad_()
    swapped = torch.cat([torch.eye(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64).roll(1, 1)])
    agree, differ = same_style_swav(scores), same_style_swav(swapped)
    assert agree < 1e-2 < 5 < differ
    (gradient,) = torch.autograd.grad(agree, scores)
    said = (scores / 0.1).softmax(1).detach()
    # Assignments are constants: the gradient is that of a cross-entropy, (said - assigned) / temperature.
    torch.testing.assert_close(gradient, (said - torch.eye(4).repeat(2, 1)) / 0.1 / 8, rtol=1e-2, atol=1e-4)


def test_bad_input_is_refused_by_name() -> None:
    x = images()
    for call, error, words in (
        (lambda: batch_style_standardize(x[0]), ValueError, "x must have shape"),
        (lambda: batch_style_standardize(x[:0]), ValueError, "x must have shape"),
        (lambda: batch_style_standardize(torch.fft.fft2(x)), TypeError, "floating point"),
        (lambda: batch_style_standardize(x, 0.0), ValueError, "area"),
        (lambda: batch_style_standardize(x, 1.5), ValueError, "area"),
        (lambda: batch_style_standardize(x, (0.5, 0.2)), ValueError, "area"),
        (lambda: batch_style_standardize(x, index=4), ValueError, "index"),
        (lambda: swap_low_amplitude(x, x[:2], 0.5), ValueError, "donors"),
        (lambda: batch_color_jitter(x, 1.5), ValueError, "strength"),
        (lambda: BatchStyleViews(0), ValueError, "n_views"),
        (lambda: BatchStyleViews(2)(x, index=torch.tensor([0])), ValueError, "index"),
        (lambda: same_style_nt_xent(torch.zeros(5, 3), 2), ValueError, "z must be 2 views"),
        (lambda: same_style_nt_xent(torch.zeros(4, 3), 1), ValueError, "n_views"),
        (lambda: same_style_nt_xent(torch.zeros(4, 3), 2, 0.0), ValueError, "temperature"),
        (lambda: same_style_swav(torch.zeros(4, 3), 2, reg=0.0), ValueError, "reg"),
    ):
        with pytest.raises(error, match=words):
            call()


def test_swav_agrees_with_lightly() -> None:
    theirs = pytest.importorskip("lightly.loss").SwaVLoss(0.1, sinkhorn_iterations=200, sinkhorn_epsilon=0.05)
    scores = torch.randn(16, 5, generator=torch.Generator().manual_seed(0)).tanh()
    found = same_style_swav(scores, 2, temperature=0.1, reg=0.05)
    torch.testing.assert_close(found, theirs([scores[:8], scores[8:]], []).squeeze(), atol=0, rtol=1e-3)


@pytest.mark.parametrize("bounds", [(1.0, 0.0), (0.0,), (float("nan"), 1.0)])
def test_bounds_out_of_order_are_refused(bounds: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="^bounds"):
        swap_low_amplitude(torch.rand(2, 1, 4, 4), torch.rand(2, 1, 4, 4), 0.5, bounds=bounds)
    with pytest.raises(ValueError, match="^bounds"):
        BatchStyleViews(2, bounds=bounds)


def test_a_mask_is_no_index_and_one_number_no_range() -> None:
    with pytest.raises(TypeError, match="^index must be a tensor of integers, got torch.bool"):
        BatchStyleViews(2)(torch.rand(2, 1, 4, 4), index=torch.tensor([True, False]))
    with pytest.raises(ValueError, match="^area"):
        BatchStyleViews(2, area=(0.1,))  # type: ignore[arg-type]
