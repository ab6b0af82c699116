from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.semisup import MSBReg, brownian_loss, multiview_centroid_loss, singular_value_loss

DOUBLE = torch.float64


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def test_centroid_loss_of_two_views_is_its_formula() -> None:
    z, target = draws(5, 2, 3), draws(5, 2, 3, seed=1)
    expected = []
    for views, its in zip(z, target, strict=True):
        centre = sum(v / v.norm() for v in its)
        expected.append(sum(2 - 2 * (v @ centre) / v.norm() / centre.norm() for v in views) / 2)
    torch.testing.assert_close(multiview_centroid_loss(z, target), torch.stack(expected).mean())
    torch.testing.assert_close(multiview_centroid_loss(3 * z, target / 7), torch.stack(expected).mean())


def test_centroid_loss_is_zero_where_all_views_agree_and_four_where_they_oppose() -> None:
    z = draws(5, 3, 4)
    one = F.normalize(z, dim=2).sum(1, keepdim=True)
    assert multiview_centroid_loss(one, z).abs() < 1e-12  # views may be of another number
    assert multiview_centroid_loss(one.expand(-1, 2, -1), z).abs() < 1e-12
    assert abs(multiview_centroid_loss(-one, z) - 4) < 1e-12
    torch.testing.assert_close(multiview_centroid_loss(z, z.flip(1)), multiview_centroid_loss(z, z))


def test_a_network_that_agrees_with_its_average_is_still_asked_to_bring_views_together() -> None:
    z = draws(5, 2, 4).requires_grad_()
    value = multiview_centroid_loss(z, z)
    assert value > 0.1
    moved = (z - 0.1 * torch.autograd.grad(value, z)[0]).detach()
    before, after = (F.cosine_similarity(part[:, 0], part[:, 1], dim=1) for part in (z, moved))
    assert bool((after > before).all())


def test_the_target_takes_no_gradient() -> None:
    z, target = draws(5, 2, 3).requires_grad_(), draws(5, 2, 3, seed=1).requires_grad_()
    MSBReg()(z, target).backward()
    assert z.grad is not None
    assert target.grad is None


def test_kicks_push_every_view_of_a_sample_against_the_same_direction() -> None:
    z, kicks = F.normalize(draws(4, 3, 5), dim=2), draws(4, 5, seed=1)
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(brownian_loss(z, kicks=kicks), z)
    along = F.normalize(kicks, dim=1)[:, None].expand(4, 3, 5)
    tangent = along - (along * z).sum(2, keepdim=True) * z  # z is normalised inside
    torch.testing.assert_close(gradient, tangent.detach() / (4 * 3))
    raw = (7 * z.detach()).requires_grad_()
    (gradient,) = torch.autograd.grad(brownian_loss(raw, kicks=100 * kicks), raw)
    torch.testing.assert_close(gradient, tangent.detach() / (4 * 3 * 7))


def test_kicks_are_of_no_direction_on_average() -> None:
    z = draws(20_000, 1, 3)
    generator = torch.Generator().manual_seed(11)
    assert brownian_loss(z, generator=generator).abs() < 0.02
    one, other = (brownian_loss(z, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert one == other


def test_kicks_take_no_gradient() -> None:
    kicks = draws(4, 5).requires_grad_()
    assert not brownian_loss(draws(4, 2, 5), kicks=kicks).requires_grad


def test_spectrum_of_uncorrelated_and_of_equal_dimensions() -> None:
    orthogonal = torch.linalg.qr(draws(12, 5) - draws(12, 5).mean(0)).Q
    assert singular_value_loss(orthogonal * torch.tensor([1.0, 2, 3, 4, 5], dtype=DOUBLE)) < 1e-6
    column = draws(12, 1)
    rank_one = column * torch.tensor([1.0, -2, 3, 4, 5, -6], dtype=DOUBLE) + 9
    assert singular_value_loss(rank_one).item() == pytest.approx(5, rel=1e-4)


def test_spectrum_is_that_of_the_singular_values() -> None:
    z = draws(12, 5)
    values = torch.linalg.svdvals(z.T @ z / 12)
    torch.testing.assert_close(singular_value_loss(z, standardize=False), (values - 1).square().sum() / 5)
    rotation = torch.linalg.qr(draws(5, 5, seed=2)).Q
    torch.testing.assert_close(
        singular_value_loss(z @ rotation, standardize=False), singular_value_loss(z, standardize=False)
    )


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_spectrum_knows_no_units_and_no_origin(scale: float) -> None:
    z = draws(12, 5)
    torch.testing.assert_close(singular_value_loss(scale * z + 3 * scale), singular_value_loss(z))


def test_a_collapsed_batch_has_a_finite_gradient() -> None:
    z = torch.ones(6, 4, dtype=DOUBLE).requires_grad_()
    (gradient,) = torch.autograd.grad(singular_value_loss(z), z)
    assert gradient.isfinite().all()


def test_gradients_agree_with_finite_differences() -> None:
    z, target, kicks = draws(5, 2, 3).requires_grad_(), draws(5, 2, 3, seed=1), draws(5, 3, seed=2)
    # The largest variance, which sets how small a variance counts as none, is a constant of size 1e-6.
    assert torch.autograd.gradcheck(lambda x: MSBReg(0.3, 0.2)(x, target, kicks=kicks), z, atol=1e-4)


def test_the_whole_is_the_sum_of_its_terms() -> None:
    z, target, kicks = draws(5, 2, 3), draws(5, 2, 3, seed=1), draws(5, 3, seed=2)
    unit = F.normalize(z, dim=2)
    spectrum = (singular_value_loss(unit[:, 0]) + singular_value_loss(unit[:, 1])) / 2
    expected = multiview_centroid_loss(z, target) + 0.3 * brownian_loss(z, kicks=kicks) + 0.2 * spectrum
    torch.testing.assert_close(MSBReg(0.3, 0.2)(z, target, kicks=kicks), expected)
    torch.testing.assert_close(MSBReg(0.0, 0.0)(z, target), multiview_centroid_loss(z, target))
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(MSBReg(0.3, 0.2)(z[order], target[order], kicks=kicks[order]), expected)
    assert MSBReg(0.0, 0.0)(z[:1], target[:1]).isfinite()


def test_half_precision_is_raised() -> None:
    z, target = draws(5, 2, 3).bfloat16(), draws(5, 2, 3, seed=1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = MSBReg(0.0)(z, target)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, MSBReg(0.0)(z.float(), target.float()))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda z: multiview_centroid_loss(z[:, 0], z), "z"),
        (lambda z: multiview_centroid_loss(z, z[:3]), "z_target"),
        (lambda z: multiview_centroid_loss(z, z[..., :2]), "z_target"),
        (lambda z: multiview_centroid_loss(z[:, :0], z), "z"),
        (lambda z: multiview_centroid_loss(z[:0], z[:0]), "z"),
        (lambda z: brownian_loss(z, kicks=z[:, 0, :2]), "kicks"),
        (lambda z: singular_value_loss(z[:1, 0]), "z"),
        (lambda z: singular_value_loss(z), "z"),
        (lambda z: MSBReg(-0.1), "lambda_b"),
        (lambda z: MSBReg(0.1, math.inf), "lambda_s"),
    ],
)
def test_bad_input_is_refused_by_name(call: Callable[[Tensor], object], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must"):
        call(draws(5, 2, 3))


def test_integers_and_arrays_are_refused() -> None:
    z = draws(5, 2, 3)
    with pytest.raises(TypeError, match="z must"):
        multiview_centroid_loss(z.long(), z)
    with pytest.raises(TypeError, match="z_target must"):
        multiview_centroid_loss(z, z.numpy())  # type: ignore[arg-type]


def test_one_view_is_the_negative_cosine_of_lightly() -> None:
    theirs = pytest.importorskip("lightly.loss").NegativeCosineSimilarity()
    z, target = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    found = multiview_centroid_loss(z[:, None], target[:, None])
    torch.testing.assert_close(found, 2 + 2 * theirs(z, target))


@pytest.mark.parametrize("scale", [1e-25, 1e-18, 1e18, 1e25])
def test_a_spectrum_of_very_long_or_short_embeddings_is_that_of_others(scale: float) -> None:
    z = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(singular_value_loss(scale * z), singular_value_loss(z))
