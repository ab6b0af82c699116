"""The small vision transformer."""

import pytest
import torch

from trimtab.nets.vit import vit


def test_sees_every_patch_and_where_it_is():
    torch.manual_seed(0)
    model = vit((1, 8, 8)).eval()
    x = torch.zeros(1, 1, 8, 8)
    outputs = []
    for row, column in [(0, 0), (0, 6), (6, 6)]:
        lit = x.clone()
        lit[0, 0, row : row + 2, column : column + 2] = 1.0
        outputs.append(model(lit))
    outputs.append(model(x))
    for i in range(4):
        for j in range(i):
            assert not torch.allclose(outputs[i], outputs[j], atol=1e-5)


def test_has_the_size_of_a_laptops_transformer():
    assert 150_000 < sum(p.numel() for p in vit().parameters()) < 160_000
    assert vit()(torch.zeros(3, 1, 28, 28)).shape == (3, 10)
    assert vit().features(torch.zeros(3, 1, 28, 28)).shape == (3, 64)


@pytest.mark.parametrize("shape", [(1, 10, 10), (1, 8, 12), (64,)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="in_shape"):
        vit(shape)
