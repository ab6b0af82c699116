"""Quantizers: nearest entries, where gradients go, residual pyramids, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.generative import (
    MultiScaleQuantizer,
    ScalarQuantizer,
    VectorQuantizer,
    codebook_use,
    entropy_loss,
    rotation_trick,
    straight_through,
)
from trimtab.generative.quantize import squared_distances


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def seeded(build, seed: int = 0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().double()


def test_distances_are_squared_and_euclidean() -> None:
    z, codes = drawn(4, 5, 3), drawn(7, 3, seed=1)
    torch.testing.assert_close(squared_distances(z, codes), torch.cdist(z, codes.expand(4, -1, -1)).square())


def test_straight_through_is_the_entry_forward_and_the_identity_backward() -> None:
    z, entry, weight = drawn(5, 3).requires_grad_(), drawn(5, 3, seed=1).requires_grad_(), drawn(5, 3, seed=2)
    out = straight_through(z, entry)
    torch.testing.assert_close(out, entry)
    (weight * out).sum().backward()
    assert torch.equal(z.grad, weight)
    assert entry.grad is None


def test_the_rotation_takes_the_gradient_along() -> None:
    """The Jacobian is the rotation from input to entry times the ratio of their lengths."""
    z, entry = drawn(3), drawn(3, seed=1)
    jacobian = torch.autograd.functional.jacobian(lambda v: rotation_trick(v, entry), z)
    torch.testing.assert_close(rotation_trick(z, entry), entry)
    torch.testing.assert_close(jacobian @ z, entry)
    scale = entry.norm() / z.norm()
    torch.testing.assert_close(jacobian.T @ jacobian, scale**2 * torch.eye(3, dtype=z.dtype))
    assert torch.linalg.det(jacobian) > 0
    # What is orthogonal to both stays where it is.
    across = torch.linalg.cross(z, entry)
    torch.testing.assert_close(jacobian @ across, scale * across)


def test_entropy_loss_at_its_ends_and_by_its_definition() -> None:
    assert entropy_loss(50 * (1 - torch.eye(8))).item() == pytest.approx(-math.log(8), abs=1e-6)
    assert entropy_loss(drawn(1, 6).expand(9, -1), 1.0).item() == pytest.approx(0.0, abs=1e-12)
    distances = drawn(2, 5, 6).square()
    p = (-distances / 0.5).softmax(-1).flatten(0, 1)
    single = -(p * p.log()).sum(1).mean()
    together = -(p.mean(0) * p.mean(0).log()).sum()
    torch.testing.assert_close(entropy_loss(distances, 0.5), single - together)


def test_entropy_loss_has_a_gradient_where_codes_are_far_from_everyone() -> None:
    distances = torch.tensor([[0.0, 50.0], [0.1, 60.0]], requires_grad=True)
    entropy_loss(distances).backward()
    assert bool(torch.isfinite(distances.grad).all())


def test_codebook_use() -> None:
    found = codebook_use(torch.tensor([[0, 0], [1, 2]]), 6)
    assert found.share == 0.5
    assert found.perplexity == pytest.approx(2**0.5 * 4**0.5)
    with pytest.raises(ValueError, match=r"indices must be in \[0, 2\), got 2"):
        codebook_use(torch.tensor([0, 2]), 2)
    with pytest.raises(ValueError, match="indices must be at least one, got none"):
        codebook_use(torch.zeros(0, dtype=torch.int64), 2)


@pytest.mark.parametrize("normalize", [False, True])
def test_vectors_go_to_the_nearest_code(normalize: bool) -> None:
    quantizer = seeded(lambda: VectorQuantizer(12, 4, normalize=normalize))
    quantizer.codes.data = drawn(12, 4, seed=3)
    z = drawn(2, 7, 4)
    found = quantizer(z)
    if normalize:
        cosine = F.normalize(z, dim=-1) @ F.normalize(quantizer.codes, dim=-1).T
        assert torch.equal(found.indices, cosine.argmax(-1))
        # Lengths do not matter.
        torch.testing.assert_close(quantizer(1e4 * z).values, found.values)
    else:
        assert torch.equal(found.indices, torch.cdist(z, quantizer.codes.expand(2, -1, -1)).argmin(-1))
    torch.testing.assert_close(found.values, quantizer.lookup(found.indices))


def test_the_losses_of_vectors_reach_whom_they_should() -> None:
    quantizer = seeded(lambda: VectorQuantizer(5, 3, normalize=False, beta=0.4))
    z = drawn(6, 3).requires_grad_()
    found = quantizer(z)
    torch.testing.assert_close(found.loss, found.codebook_loss + 0.4 * found.commitment_loss)
    torch.testing.assert_close(found.codebook_loss, (quantizer.lookup(found.indices) - z).square().mean())
    assert torch.autograd.grad(found.codebook_loss, z, retain_graph=True, allow_unused=True)[0] is None
    assert torch.autograd.grad(found.commitment_loss, quantizer.codes, retain_graph=True, allow_unused=True)[0] is None
    # One step along the gradients brings both together.
    codes = torch.autograd.grad(found.codebook_loss, quantizer.codes, retain_graph=True)[0]
    inputs = torch.autograd.grad(found.commitment_loss, z)[0]
    gap = (z - quantizer.lookup(found.indices)).detach()
    torch.testing.assert_close(inputs, 2 * gap / z.numel())
    assert float((codes[found.indices] * gap).sum()) < 0


def test_codes_move_at_full_weight_and_features_at_beta() -> None:
    made = seeded(lambda: VectorQuantizer(4, 3, beta=0.25, normalize=False))
    z = drawn(6, 3).requires_grad_()
    found = made(z)
    towards, codes = torch.autograd.grad(found.loss, [z, made.codes])
    apart = (z - made.lookup(found.indices)).detach()
    torch.testing.assert_close(towards, 0.25 * 2 * apart / z.numel())
    expected = torch.zeros_like(codes).index_add(0, found.indices, -2 * apart / z.numel())
    torch.testing.assert_close(codes, expected)


def test_without_weight_there_is_no_entropy_and_with_it_codes_spread() -> None:
    z = drawn(64, 3)
    plain, other = (seeded(lambda w=w: VectorQuantizer(8, 3, entropy_weight=w)) for w in (0.0, 0.3))
    assert plain(z).entropy_loss.item() == 0
    found = other(z)
    torch.testing.assert_close(found.loss - plain(z).loss, 0.3 * found.entropy_loss)
    distances = squared_distances(F.normalize(z, dim=-1), other.codebook)
    torch.testing.assert_close(found.entropy_loss, entropy_loss(distances, 0.01))


def test_scalars_go_to_the_nearest_value_of_their_dimension() -> None:
    quantizer = ScalarQuantizer(2, 3).double()
    quantizer.values.data = torch.tensor([[-1.0, 0.0, 4.0], [2.0, 0.5, -0.5]], dtype=torch.float64)
    # Boundaries are half way between neighbours: at -0.5 and 2 in the first, at 0 and 1.25 in the second.
    z = torch.tensor([[-0.51, -0.01], [-0.49, 0.01], [1.99, 1.24], [2.01, 1.26]], dtype=torch.float64)
    found = quantizer(z)
    assert found.indices.tolist() == [[0, 2], [1, 1], [1, 1], [2, 0]]
    assert torch.allclose(found.values, quantizer.lookup(found.indices))
    assert found.values[:, 0].tolist() == [-1.0, 0.0, 0.0, 4.0]


def test_the_losses_of_scalars() -> None:
    quantizer = ScalarQuantizer(4, 5, codebook_weight=0.3, commitment_weight=0.7).double()
    z = drawn(6, 4).requires_grad_()
    found = quantizer(z)
    torch.testing.assert_close(found.loss, found.codebook_loss, rtol=0, atol=1e-12)  # 0.3 + 0.7 of equal numbers
    assert torch.autograd.grad(found.codebook_loss, z, retain_graph=True, allow_unused=True)[0] is None
    assert torch.autograd.grad(found.commitment_loss, quantizer.values, retain_graph=True, allow_unused=True)[0] is None
    gradient = torch.autograd.grad(found.values.sum(), z)[0]
    assert torch.equal(gradient, torch.ones_like(z))
    fixed = ScalarQuantizer(4, 5, learnable=False)
    assert not any(p.requires_grad for p in fixed.parameters())


def test_sampled_codes_are_even_and_reproducible() -> None:
    quantizer = ScalarQuantizer(3, 4)
    draws = quantizer.sample(4000, torch.Generator().manual_seed(0))
    assert torch.equal(draws, quantizer.sample(4000, torch.Generator().manual_seed(0)))
    counts = torch.stack([(draws[:, j, None] == quantizer.values[j]).sum(0) for j in range(3)])
    assert counts.sum() == 12_000
    assert counts.sub(1000).abs().max() < 120


SCALES = (1, 2, 4)


def pyramid(**options) -> MultiScaleQuantizer:
    return seeded(lambda: MultiScaleQuantizer(SCALES, 32, 3, **options))


def test_a_pyramid_is_the_sum_of_its_scales() -> None:
    quantizer, f = pyramid(), drawn(5, 3, 4, 4)
    found = quantizer(f)
    assert found.indices.shape == (5, 21)
    torch.testing.assert_close(quantizer.decode(found.indices), found.values)
    parts = quantizer.split(found.indices)
    assert [part.shape[1] for part in parts] == [1, 4, 16]
    # Each scale takes the codes nearest to the residual that is left, averaged over its places.
    so_far = torch.zeros_like(f)
    for k, (side, part) in enumerate(zip(SCALES, parts, strict=True)):
        places = F.adaptive_avg_pool2d(f - so_far, side).flatten(2).transpose(1, 2)
        nearest = torch.cdist(places, quantizer.codes.expand(5, -1, -1)).argmin(-1)
        assert torch.equal(part, nearest)
        so_far = so_far + quantizer.contribution(k, part)


def test_the_inputs_of_a_scale_are_all_coarser_ones_and_no_finer() -> None:
    quantizer = pyramid()
    indices = torch.randint(32, (2, 21), generator=torch.Generator().manual_seed(0))
    seen = quantizer.inputs(indices)
    assert seen.shape == (2, 20, 3)
    first, second, _ = quantizer.split(indices)
    coarse = quantizer.contribution(0, first)
    torch.testing.assert_close(seen[:, :4], quantizer.shrink(coarse, 1))
    torch.testing.assert_close(seen[:, 4:], quantizer.shrink(coarse + quantizer.contribution(1, second), 2))
    changed = indices.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 32
    assert torch.equal(quantizer.inputs(changed), seen)
    changed[:, 2] = (changed[:, 2] + 1) % 32
    assert torch.equal(quantizer.inputs(changed)[:, :4], seen[:, :4])
    assert not torch.equal(quantizer.inputs(changed)[:, 4:], seen[:, 4:])


def test_one_scale_without_convolution_is_vector_quantization() -> None:
    quantizer = seeded(lambda: MultiScaleQuantizer((4,), 16, 3, residual_ratio=0.0))
    plain = VectorQuantizer(16, 3, normalize=False).double()
    plain.codes.data = quantizer.codes.data
    f = drawn(2, 3, 4, 4)
    ours, theirs = quantizer(f), plain(f.flatten(2).transpose(1, 2))
    assert torch.equal(ours.indices, theirs.indices)
    torch.testing.assert_close(ours.loss, theirs.loss)


def test_a_scale_adds_shares_of_its_upsampled_codes_and_of_their_convolution() -> None:
    def contribution(ratio: float, convolved: bool) -> Tensor:
        made = seeded(lambda: MultiScaleQuantizer((1, 2, 4), 3, 2, residual_ratio=ratio))
        if not convolved:
            for p in made.convolutions.parameters():
                p.data.zero_()
        return made.contribution(1, torch.tensor([[0, 1, 2, 0]]))

    plain, whole = contribution(0.0, False), contribution(1.0, True)
    torch.testing.assert_close(contribution(0.3, False), 0.7 * plain)
    torch.testing.assert_close(contribution(0.3, True), 0.7 * plain + 0.3 * whole)


def test_upsampling_is_cubic() -> None:
    made = seeded(lambda: MultiScaleQuantizer((2, 8), 2, 1, residual_ratio=0.0))
    made.codes.data.copy_(torch.tensor([[0.0], [1.0]]))
    one = made.contribution(0, torch.tensor([[1, 0, 0, 0]]))
    assert one.min() < -0.01  # lines never go below what they join
    torch.testing.assert_close(made.contribution(0, torch.tensor([[1, 1, 1, 1]])), torch.ones(1, 1, 8, 8).double())


def test_the_losses_of_a_pyramid_are_means_over_its_partial_sums() -> None:
    made = seeded(lambda: MultiScaleQuantizer((1, 2, 4), 6, 3))
    f = drawn(2, 3, 4, 4).requires_grad_()
    found = made(f)
    parts = made.split(found.indices)
    sums = [sum(made.contribution(j, parts[j]) for j in range(k + 1)) for k in range(3)]
    expected = torch.stack([(s - f).square().mean() for s in sums]).mean()
    torch.testing.assert_close(found.codebook_loss, expected)
    torch.testing.assert_close(found.commitment_loss, expected)
    torch.testing.assert_close(found.loss, 1.25 * expected)
    ours = torch.autograd.grad(found.commitment_loss, [f, made.codes], retain_graph=True, allow_unused=True)
    (towards,) = torch.autograd.grad(expected, f, retain_graph=True)
    torch.testing.assert_close(ours[0], towards)
    assert ours[1] is None  # commitment moves no code
    ours = torch.autograd.grad(found.codebook_loss, [f, made.codes], allow_unused=True)
    (codes,) = torch.autograd.grad(expected, made.codes)
    assert ours[0] is None
    torch.testing.assert_close(ours[1], codes)


def test_gradients_of_a_pyramid() -> None:
    quantizer, f = pyramid(), drawn(2, 3, 4, 4).requires_grad_()
    found = quantizer(f)
    assert torch.autograd.grad(found.codebook_loss, f, retain_graph=True, allow_unused=True)[0] is None
    weight = drawn(2, 3, 4, 4, seed=4)
    assert torch.equal(torch.autograd.grad((weight * found.values).sum(), f, retain_graph=True)[0], weight)
    used = torch.autograd.grad(found.loss, list(quantizer.parameters()))
    assert all(bool(g.abs().sum() > 0) for g in used)


def test_a_pyramid_fits_better_with_every_scale() -> None:
    """Trained, the residual that is left falls from scale to scale."""
    quantizer = pyramid()
    f = drawn(64, 3, 4, 4)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        quantizer(f).loss.backward()
        optimizer.step()
    with torch.no_grad():
        parts, so_far, left = quantizer.split(quantizer(f).indices), torch.zeros_like(f), [float(f.square().mean())]
        for k, part in enumerate(parts):
            so_far = so_far + quantizer.contribution(k, part)
            left.append(float((f - so_far).square().mean()))
    assert left == sorted(left, reverse=True)
    assert left[-1] < 0.5 * left[0]


@pytest.mark.parametrize("make", [lambda: VectorQuantizer(6, 4), lambda: ScalarQuantizer(4), pyramid])
def test_state_round_trip(make) -> None:
    first, second = make().double(), seeded(make, 5).double()
    second.load_state_dict(first.state_dict())
    z = drawn(2, 3, 4, 4)
    assert torch.equal(first(z).values, second(z).values)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: VectorQuantizer(1, 2), "num_codes must be at least 2, got 1"),
        (lambda: VectorQuantizer(4, 2, beta=-1.0), "beta must be at least 0"),
        (lambda: VectorQuantizer(4, 2, entropy_temperature=0.0), "entropy_temperature must be positive"),
        (lambda: VectorQuantizer(4, 2)(torch.zeros(3, 5)), r"z must be of shape \(..., 2\), got \(3, 5\)"),
        (lambda: ScalarQuantizer(3, 1), "num_values must be at least 2, got 1"),
        (lambda: ScalarQuantizer(3)(torch.zeros(2, 4)), r"z must be of shape \(..., 3\), got \(2, 4\)"),
        (lambda: MultiScaleQuantizer((1, 1), 4, 2), "scales must be at least one side, each larger"),
        (lambda: MultiScaleQuantizer((), 4, 2), "scales must be at least one side"),
        (lambda: MultiScaleQuantizer((1, 2), 4, 2)(torch.zeros(1, 2, 4, 4)), r"f must be of shape \(batch, 2, 2, 2\)"),
        (
            lambda: MultiScaleQuantizer((1, 2), 4, 2).decode(torch.zeros(1, 4, dtype=torch.int64)),
            r"indices must be of shape \(batch, 5\), got \(1, 4\)",
        ),
        (
            lambda: MultiScaleQuantizer((1, 2), 4, 2).inputs(torch.full((1, 5), 4)),
            r"indices must be in \[0, 4\), got 4",
        ),
    ],
)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_integers_are_refused() -> None:
    with pytest.raises(TypeError, match="z must be floating point"):
        ScalarQuantizer(2)(torch.zeros(3, 2, dtype=torch.int64))


@pytest.mark.parametrize("quantizer", [VectorQuantizer(4, 3), ScalarQuantizer(3)], ids=["vectors", "numbers"])
def test_nothing_and_arrays_are_refused(quantizer) -> None:
    """The loss of nothing is NaN."""
    with pytest.raises(ValueError, match="z must be at least one vector"):
        quantizer(torch.zeros(0, 3))
    with pytest.raises(TypeError, match="z must be a tensor, got ndarray"):
        quantizer(torch.zeros(2, 3).numpy())


def test_indices_and_distances_that_do_not_fit_are_refused() -> None:
    pyramid = MultiScaleQuantizer((1, 2), 4, 3)
    with pytest.raises(ValueError, match=r"f must be of shape \(batch, 3, 2, 2\)"):
        pyramid(torch.zeros(0, 3, 2, 2))
    with pytest.raises(ValueError, match=r"indices must be of shape \(batch, 5\)"):
        pyramid.decode(torch.zeros(0, 5, dtype=torch.int64))
    with pytest.raises(TypeError, match="indices must be integers"):
        pyramid.decode(torch.zeros(2, 5))
    with pytest.raises(TypeError, match="indices must be a tensor, got ndarray"):
        codebook_use(torch.arange(3).numpy(), 4)  # type: ignore[arg-type]
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature must be positive"):
            entropy_loss(torch.ones(2, 3), temperature)
    with pytest.raises(ValueError, match="distances must have shape"):
        entropy_loss(torch.ones(0, 3))
    with pytest.raises(ValueError, match="quantized must have the shape of z"):
        straight_through(torch.ones(2, 3), torch.ones(3))
