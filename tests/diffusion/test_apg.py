"""APG: the projection, the rule step by step, and parity with diffusers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.diffusion import (
    AdaptiveProjectedGuidance,
    AnalyticGMM,
    ClassifierFreeGuidance,
    Denoiser,
    VPLinear,
    adaptive_projected_guidance,
    classifier_free_guidance,
    convert,
    deis,
    grids,
    project,
)

SCHEDULE = VPLinear()


def pair(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.integers(0, 100))
def test_projection(shape: list[int], seed: int) -> None:
    v, onto = pair(*shape, seed=seed)
    parallel, orthogonal = project(v, onto)
    torch.testing.assert_close(parallel + orthogonal, v)
    torch.testing.assert_close(dot(orthogonal, onto), torch.zeros(shape[0], dtype=v.dtype), atol=1e-9, rtol=0)
    # Parallel: the same direction as onto, up to a factor per sample.
    torch.testing.assert_close(dot(parallel, onto).square(), dot(parallel, parallel) * dot(onto, onto))


def test_projection_onto_nothing_and_in_half_precision() -> None:
    v = torch.ones(2, 3)
    parallel, orthogonal = project(v, torch.zeros(2, 3))
    assert torch.equal(parallel, torch.zeros(2, 3))
    assert torch.equal(orthogonal, v)
    # The squared norm of this vector overflows in float16.
    large = torch.full((1, 100), 300.0, dtype=torch.float16)
    parallel, orthogonal = project(large, large)
    assert parallel.dtype == torch.float16
    torch.testing.assert_close(parallel, large)
    assert bool(torch.isfinite(orthogonal).all())


def test_without_its_three_parts_it_is_classifier_free_guidance() -> None:
    cond, uncond = pair(3, 4)
    for off in (None, 0.0, float("inf")):
        guided, _ = adaptive_projected_guidance(cond, uncond, 7.0, eta=1.0, norm_threshold=off)
        assert torch.equal(guided, classifier_free_guidance(cond, uncond, 7.0))
    guided, _ = adaptive_projected_guidance(cond, uncond, 7.0, eta=1.0, norm_threshold=None, base="uncond")
    torch.testing.assert_close(guided, classifier_free_guidance(cond, uncond, 7.0))


def test_update_is_orthogonal_and_bounded() -> None:
    cond, uncond = pair(5, 3, 2, 2)
    guided, _ = adaptive_projected_guidance(cond, uncond, 4.0, norm_threshold=0.7)
    update = (guided - cond) / 3.0
    torch.testing.assert_close(dot(update, cond), torch.zeros(5, dtype=cond.dtype), atol=1e-9, rtol=0)
    whole, _ = adaptive_projected_guidance(cond, uncond, 4.0, eta=1.0, norm_threshold=0.7)
    lengths = ((whole - cond) / 3.0).flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full((5,), 0.7, dtype=cond.dtype))
    loose, _ = adaptive_projected_guidance(cond, uncond, 4.0, eta=1.0, norm_threshold=1e3)
    torch.testing.assert_close(loose, classifier_free_guidance(cond, uncond, 4.0))


def test_eta_scales_the_parallel_part_only() -> None:
    cond, uncond = pair(3, 4)
    parallel, orthogonal = project(cond - uncond, cond)
    for eta in (0.0, 0.3, 1.0):
        guided, _ = adaptive_projected_guidance(cond, uncond, 3.0, eta=eta, norm_threshold=None)
        torch.testing.assert_close(guided, cond + 2.0 * (orthogonal + eta * parallel))


def test_momentum_over_two_steps() -> None:
    """m = D2 - 0.75 D1, and the threshold acts on what is used, not on what is remembered."""
    (c1, u1), (c2, u2) = pair(3, 4, seed=1), pair(3, 4, seed=2)
    kwargs = {"eta": 1.0, "norm_threshold": 0.1, "momentum": -0.75}
    _, running = adaptive_projected_guidance(c1, u1, 2.0, **kwargs)
    torch.testing.assert_close(running, c1 - u1)
    guided, running = adaptive_projected_guidance(c2, u2, 2.0, previous=running, **kwargs)
    expected = (c2 - u2) - 0.75 * (c1 - u1)
    torch.testing.assert_close(running, expected)
    torch.testing.assert_close(guided, c2 + 0.1 * expected / expected.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("base", ["cond", "uncond"])
@pytest.mark.parametrize("momentum", [0.0, -0.5])
def test_parity_with_diffusers(base, momentum: float) -> None:
    """diffusers counts the scale of its `original` form from 0."""
    module = pytest.importorskip("diffusers.guiders.adaptive_projected_guidance")
    buffer, running = module.MomentumBuffer(momentum), None
    for step in range(3):
        cond, uncond = pair(2, 3, 4, 4, seed=step)
        original = base == "cond"
        theirs = module.normalized_guidance(cond, uncond, 5.0, buffer, 0.2, 4.0, original)
        ours, running = adaptive_projected_guidance(
            cond,
            uncond,
            6.0 if original else 5.0,
            eta=0.2,
            norm_threshold=4.0,
            momentum=momentum,
            previous=running,
            base=base,
        )
        torch.testing.assert_close(ours, theirs)


def test_samples_and_channel_layout_do_not_matter() -> None:
    cond, uncond = pair(3, 2, 5, 4)
    guided, _ = adaptive_projected_guidance(cond, uncond, 6.0)
    last, _ = adaptive_projected_guidance(cond.movedim(1, -1), uncond.movedim(1, -1), 6.0)
    torch.testing.assert_close(last.movedim(-1, 1), guided)
    alone, _ = adaptive_projected_guidance(cond[1:2], uncond[1:2], 6.0)
    torch.testing.assert_close(alone, guided[1:2])


RING = AnalyticGMM.ring(dtype=torch.float64)
LABELS = torch.arange(6)
X, T = pair(6, 2)[0], torch.linspace(0.1, 0.9, 6, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["eps", "v", "score", "flow"])
def test_the_rule_acts_on_clean_predictions_whatever_the_model_says(kind) -> None:
    clean = AdaptiveProjectedGuidance(RING.denoiser(SCHEDULE), LABELS, scale=6.0)(X, T)
    other = AdaptiveProjectedGuidance(RING.denoiser(SCHEDULE, kind), LABELS, scale=6.0)(X, T)
    torch.testing.assert_close(convert(other, X, SCHEDULE.alpha(T), SCHEDULE.sigma(T), kind, "x0"), clean)
    cond, uncond = RING.denoiser(SCHEDULE)(X, T, LABELS), RING.denoiser(SCHEDULE)(X, T)
    torch.testing.assert_close(clean, adaptive_projected_guidance(cond, uncond, 6.0)[0])


@pytest.mark.parametrize("kind", ["x0", "eps"])
def test_switched_off_it_is_cfg_bit_for_bit(kind) -> None:
    denoiser = RING.denoiser(SCHEDULE, kind)
    off = AdaptiveProjectedGuidance(denoiser, LABELS, scale=6.0, eta=1.0, momentum=0.0, norm_threshold=None)
    assert torch.equal(off(X, T), ClassifierFreeGuidance(denoiser, LABELS, scale=6.0)(X, T))


def test_the_running_update_is_a_sum_of_powers_of_the_momentum() -> None:
    """Where both predictions stay as they are, the n-th update is theirs times 1 + b + ... + b^(n - 1)."""
    cond, uncond = pair(2, 5)
    denoiser = Denoiser(lambda x, t, c: cond if c == "a" else uncond, SCHEDULE, "x0")
    rule = AdaptiveProjectedGuidance(denoiser, "a", "b", scale=3.0, eta=1.0, momentum=-0.5, norm_threshold=None)
    x, t = torch.zeros_like(cond), torch.full((2,), 0.5, dtype=torch.float64)
    for step in range(4):
        grown = sum((-0.5) ** k for k in range(step + 1))
        torch.testing.assert_close(rule(x, t), cond + 2.0 * grown * (cond - uncond))


def test_momentum_lives_for_one_run() -> None:
    guided = AdaptiveProjectedGuidance(RING.denoiser(SCHEDULE), LABELS, scale=6.0)
    first = guided(X, T)
    second = guided(X, T)
    assert not torch.equal(first, second)
    guided.reset()
    assert torch.equal(guided(X, T), first)
    noise = SCHEDULE.prior(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    runs = [deis(guided, noise, grids.power(SCHEDULE, 5)) for _ in range(2)]
    assert torch.equal(*runs)


def test_negative_condition_is_what_is_guided_away_from() -> None:
    asked: list[object] = []

    def model(x: Tensor, t: Tensor, cond: object) -> Tensor:
        asked.append(cond)
        return x

    AdaptiveProjectedGuidance(Denoiser(model, SCHEDULE), "cat", "dog")(X, T)
    assert asked == ["cat", "dog"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"scale": float("inf")}, "scale must be finite"),
        ({"eta": float("nan")}, "eta must be finite"),
        ({"momentum": -1.0}, "momentum must be"),
        ({"norm_threshold": -2.0}, "norm_threshold"),
        ({"base": "both"}, "base must be"),
    ],
)
def test_bad_arguments(kwargs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveProjectedGuidance(RING.denoiser(SCHEDULE), LABELS, **kwargs)


def test_bad_shapes() -> None:
    with pytest.raises(ValueError, match="v and onto must have one shape"):
        project(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="cond and uncond must have one shape"):
        adaptive_projected_guidance(torch.zeros(2, 3), torch.zeros(1, 3), 2.0)
    guided = AdaptiveProjectedGuidance(RING.denoiser(SCHEDULE), 0, scale=3.0)
    guided(X, T)
    with pytest.raises(ValueError, match=r"call reset\(\) before a new run"):
        guided(X[:2], T[:2])


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
def test_very_long_and_very_short_predictions(size: float) -> None:
    """Squares of these lie outside of float32."""
    v, onto = torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0]])
    parallel, orthogonal = project(v, size * onto)
    torch.testing.assert_close((parallel, orthogonal), (torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])))
    # The rule has no unit but the threshold's.
    cond, uncond = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 4.5]])
    expected, _ = adaptive_projected_guidance(cond, uncond, 3.0, norm_threshold=1.0)
    guided, _ = adaptive_projected_guidance(size * cond, size * uncond, 3.0, norm_threshold=size)
    torch.testing.assert_close(guided / size, expected)
