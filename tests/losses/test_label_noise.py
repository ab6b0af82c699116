from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.losses import asymmetric_noise, symmetric_noise

CLEAN = torch.arange(10).repeat(2000)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("exclude_true", "share"), [(False, 0.36), (True, 0.4)])
def test_share_of_wrong_labels(exclude_true: bool, share: float) -> None:
    noisy, wrong = symmetric_noise(CLEAN, 0.4, 10, generator=seeded(), exclude_true=exclude_true)
    assert wrong.float().mean().item() == pytest.approx(share, abs=0.015)
    # Wrong labels are uniform over the nine other classes.
    shift = (noisy - CLEAN)[wrong] % 10
    assert (torch.bincount(shift, minlength=10)[1:].float() / wrong.sum() - 1 / 9).abs().max() < 0.015


def test_pair_flip_goes_to_the_next_class() -> None:
    noisy, wrong = asymmetric_noise(CLEAN, 0.3, 10, generator=seeded())
    assert wrong.float().mean().item() == pytest.approx(0.3, abs=0.015)
    assert torch.equal(noisy[wrong], (CLEAN[wrong] + 1) % 10)


def test_mapping_decides_and_may_spare_classes() -> None:
    mapping = torch.arange(10)
    mapping[9] = 1  # trucks become automobiles, and nothing else changes
    noisy, wrong = asymmetric_noise(CLEAN, 1.0, 10, generator=seeded(), mapping=mapping)
    assert torch.equal(wrong, CLEAN == 9)
    assert (noisy[wrong] == 1).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0, 1), st.integers(2, 200), st.sampled_from([torch.int64, torch.uint8]))
def test_labels_stay_labels_and_the_mask_tells_the_truth(
    seed: int, rate: float, classes: int, dtype: torch.dtype
) -> None:
    clean = torch.randint(classes, (50,), generator=seeded(seed)).to(dtype)
    for flip in (symmetric_noise, asymmetric_noise):
        noisy, wrong = flip(clean, rate, classes, generator=seeded(seed))
        again = flip(clean, rate, classes, generator=seeded(seed))
        assert noisy.dtype == dtype
        assert ((noisy >= 0) & (noisy < classes)).all()
        assert torch.equal(wrong, noisy != clean)
        assert torch.equal(again.targets, noisy)


def test_only_the_given_generator_is_used() -> None:
    before = torch.random.get_rng_state()
    symmetric_noise(CLEAN, 0.4, 10, generator=seeded())
    asymmetric_noise(CLEAN, 0.4, 10, generator=seeded())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_ends_of_the_range() -> None:
    for flip in (symmetric_noise, asymmetric_noise):
        assert not flip(CLEAN, 0.0, 10, generator=seeded()).is_noisy.any()
    assert symmetric_noise(CLEAN, 1.0, 10, generator=seeded(), exclude_true=True).is_noisy.all()
    assert symmetric_noise(CLEAN[:0], 0.5, 10, generator=seeded()).targets.shape == (0,)


@pytest.mark.parametrize("flip", [symmetric_noise, asymmetric_noise])
@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ((CLEAN, 1.1, 10), ValueError, "rate"),
        ((CLEAN, float("nan"), 10), ValueError, "rate"),
        ((CLEAN, 0.1, 1), ValueError, "num_classes"),
        ((CLEAN, 0.1, 9), ValueError, "targets"),
        ((CLEAN - 1, 0.1, 10), ValueError, "targets"),
        ((CLEAN[None], 0.1, 10), ValueError, "targets"),
        ((CLEAN.float(), 0.1, 10), TypeError, "targets"),
    ],
)
def test_bad_arguments_are_refused_by_name(flip, arguments, error, name) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=name):
        flip(*arguments)


@pytest.mark.parametrize("mapping", [torch.arange(9), torch.arange(10) + 1])
def test_bad_mapping_is_refused(mapping: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="mapping"):
        asymmetric_noise(CLEAN, 0.1, 10, mapping=mapping)
