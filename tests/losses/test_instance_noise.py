from __future__ import annotations

import pytest
import torch

from trimtab.losses import instance_dependent_noise

CLEAN = torch.arange(10).repeat(2000)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_instance_dependent_mistakes_go_with_the_look_of_a_sample() -> None:
    x, clean = torch.randn(4, 16, generator=seeded(1)).repeat(3000, 1), torch.arange(12_000) % 4 % 2
    noisy, wrong = instance_dependent_noise(x, clean, 0.3, 6, generator=seeded(2))
    assert wrong.float().mean().item() == pytest.approx(0.3, abs=0.015)
    assert torch.equal(wrong, noisy != clean)
    # Samples that look the same are mistaken for the same classes; two looks of one class for different ones.
    shares = torch.stack([torch.bincount(noisy[i::4][wrong[i::4]], minlength=6) / wrong[i::4].sum() for i in range(4)])
    halves = torch.stack([torch.bincount(noisy[i::8][wrong[i::8]], minlength=6) / wrong[i::8].sum() for i in range(4)])
    assert (shares - halves).abs().max() < 0.06
    assert (shares[0] - shares[2]).abs().sum() > 0.3
    assert (shares[1] - shares[3]).abs().sum() > 0.3


def test_instance_dependent_noise_without_spread() -> None:
    x = torch.rand(len(CLEAN), 3, generator=seeded())
    before = torch.random.get_rng_state()
    assert not instance_dependent_noise(x, CLEAN, 0.0, 10, spread=0.0, generator=seeded()).is_noisy.any()
    assert instance_dependent_noise(x, CLEAN.to(torch.uint8), 1.0, 10, spread=0.0, generator=seeded()).is_noisy.all()
    assert torch.equal(torch.random.get_rng_state(), before)
    with pytest.raises(ValueError, match="inputs must be .* got 3"):
        instance_dependent_noise(x[:3], CLEAN, 0.1, 10)
    with pytest.raises(ValueError, match="spread"):
        instance_dependent_noise(x, CLEAN, 0.1, 10, spread=-1.0)
    with pytest.raises(ValueError, match="rate"):
        instance_dependent_noise(x, CLEAN, 1.5, 10)


def test_samples_without_features_are_refused() -> None:
    with pytest.raises(ValueError, match=r"inputs must be \(samples, ...\)"):
        instance_dependent_noise(torch.rand(10), torch.arange(10) % 3, 0.3, 3)
