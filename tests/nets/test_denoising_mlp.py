"""What the denoising network promises its users: shapes, conditions, blocks that can be left out."""

import pytest
import torch
from torch import nn

from trimtab.nets import DenoisingMLP


def moved(**options) -> DenoisingMLP:
    """A network with weights that say something, as after training."""
    torch.manual_seed(0)
    net = DenoisingMLP(6, hidden=16, **options).double().eval()
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net


X, LEVEL = (
    torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
    torch.linspace(-1, 1, 4).double(),
)


def test_starts_at_zero():
    net = DenoisingMLP(6, num_classes=3, hidden=16)
    assert torch.equal(net(X.float(), LEVEL.float(), torch.zeros(4, dtype=torch.int64)), torch.zeros(4, 6))


def test_samples_do_not_see_each_other_and_keep_their_shape():
    net = moved()
    whole = net(X, LEVEL)
    torch.testing.assert_close(net(X[1:2], LEVEL[1:2]), whole[1:2])
    torch.testing.assert_close(net(X.reshape(4, 1, 2, 3), LEVEL).flatten(1), whole)


def test_no_condition_is_the_null_class_and_classes_differ():
    net = moved(num_classes=3)
    null = torch.full((4,), 3)
    assert torch.equal(net(X, LEVEL), net(X, LEVEL, null))
    assert not torch.allclose(net(X, LEVEL, null - 1), net(X, LEVEL, null))


def test_every_further_number_matters():
    net = moved(conditions=2)
    extra = torch.zeros(4, 2, dtype=torch.float64)
    at_zero = net(X, LEVEL, None, extra)
    for place in range(2):
        changed = extra.clone()
        changed[:, place] = 0.7
        assert not torch.allclose(net(X, LEVEL, None, changed), at_zero)


def test_a_block_with_no_change_can_be_skipped():
    net = moved(blocks=2)
    hidden, embedding = torch.randn(2, 4, 16, dtype=torch.float64)
    nn.init.zeros_(net.blocks[0].second.weight)
    nn.init.zeros_(net.blocks[0].second.bias)
    assert torch.equal(net.blocks[0](hidden, embedding), hidden)


def test_dropout_is_for_training_alone():
    net = moved(dropout=0.5)
    assert torch.equal(net(X, LEVEL), net(X, LEVEL))
    net.train()
    assert not torch.equal(net(X, LEVEL), net(X, LEVEL))


def test_the_norm_can_be_chosen():
    net = DenoisingMLP(6, hidden=16, norm=lambda width: nn.RMSNorm(width))
    assert not any(isinstance(part, nn.LayerNorm) for part in net.modules())


def test_bad_input():
    with pytest.raises(ValueError, match="dim must be at least 1"):
        DenoisingMLP(0)
    with pytest.raises(ValueError, match="dropout must be in"):
        DenoisingMLP(2, dropout=1.0)
    with pytest.raises(ValueError, match="x must have 6 numbers a sample"):
        moved()(X[:, :5], LEVEL)
    with pytest.raises(ValueError, match="cond must be None"):
        moved()(X, LEVEL, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="extra must have shape"):
        moved(conditions=2)(X, LEVEL)
    with pytest.raises(ValueError, match="extra must have shape"):
        moved()(X, LEVEL, None, torch.zeros(4, 1))
