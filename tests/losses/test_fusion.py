from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from trimtab.losses import FiLMFusion, GatedFusion, SumFusion


def features() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, width, generator=generator) for width in (5, 3)]


@pytest.mark.parametrize("make", [SumFusion, FiLMFusion, GatedFusion])
def test_a_modality_alone_is_the_fusion_with_the_others_at_zero(make) -> None:
    fusion, (first, second) = make([5, 3], 4), features()
    logits, alone = fusion([first, second])
    torch.testing.assert_close(alone[:, 0], fusion([first, torch.zeros_like(second)])[0])
    torch.testing.assert_close(alone[:, 1], fusion([torch.zeros_like(first), second])[0])
    assert not torch.allclose(logits, alone[:, 0])


def test_each_is_its_formula() -> None:
    first, second = features()
    fusion = SumFusion([5, 3], 4)
    torch.testing.assert_close(fusion([first, second])[0], fusion.heads[0](first) + fusion.heads[1](second))
    fusion = FiLMFusion([5, 3], 4)
    film = F.linear(first, fusion.film.weight, fusion.film.bias)
    torch.testing.assert_close(fusion([first, second])[0], fusion.head(film[:, :3] * second + film[:, 3:]))
    fusion = GatedFusion([5, 3], 4, hidden=7)
    expected = fusion.head(fusion.gate(first).sigmoid() * fusion.value(second))
    torch.testing.assert_close(fusion([first, second])[0], expected)


def test_film_and_gate_take_two_modalities() -> None:
    for make in (FiLMFusion, GatedFusion):
        with pytest.raises(ValueError, match="dims must hold the widths of two"):
            make([3, 4, 5], 2)
    with pytest.raises(ValueError, match="dims"):
        SumFusion([3], 2)
