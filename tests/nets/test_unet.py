"""The small U-Net."""

import pytest
import torch

from trimtab.nets.unet import UNet


@pytest.mark.parametrize("size", [(32, 32), (23, 34), (8, 9)])
def test_gives_every_pixel_its_logits(size):
    logits, features = UNet(2, 5, width=4).with_features(torch.zeros(2, 2, *size))
    assert logits.shape == (2, 5, *size)
    assert features.shape == (2, 32, size[0] // 8, size[1] // 8)


def test_a_pixel_is_seen_at_its_place_and_from_afar():
    torch.manual_seed(0)
    net = UNet(1, 2).eval()
    x = torch.rand(1, 1, 32, 32, requires_grad=True)
    net(x)[0, 0, 5, 20].backward()
    seen = x.grad[0, 0].abs()
    assert seen[3:8, 18:23].mean() > 5 * seen.mean()
    assert seen[20:, :8].sum() > 0


def test_features_are_those_the_logits_come_from():
    torch.manual_seed(0)
    net = UNet(1, 2).eval()
    x = torch.rand(1, 1, 16, 16)
    torch.testing.assert_close(net.with_features(x)[0], net(x))
    assert sum(p.numel() for p in net.parameters()) < 150_000
