"""Per-sample gradients against one backward pass a sample."""

import pytest
import torch
from torch import nn

from trimtab.ops.per_sample_gradients import per_sample_gradients


def network(outputs=1):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        features = [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Dropout(), nn.Flatten()]
        model = nn.Sequential(*features, nn.Linear(8, outputs)).double()
        model(torch.randn(5, 1, 4, 4).double())
    return model.eval()


def images(count=3):
    return torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_equal_to_a_loop(outputs, chunk_size):
    model, x = network(outputs), images()
    model[1].weight.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    found = per_sample_gradients(model, x, chunk_size)
    for i in range(len(x)):
        for k in range(outputs):
            gradient = torch.autograd.grad(model(x[i : i + 1])[0, k], trained)
            row = found[i] if outputs == 1 else found[i, k]
            torch.testing.assert_close(row, torch.cat([g.flatten() for g in gradient]))
    assert all(p.grad is None for p in model.parameters())


def test_outputs_without_a_column():
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))

        def forward(self, x):
            return (x * self.weight).square().sum(1)

    found = per_sample_gradients(Norm(), torch.tensor([[1.0, 1.0], [0.0, 3.0]]))
    assert found.tolist() == [[2.0, 4.0], [0.0, 36.0]]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"model.*eval"):
        per_sample_gradients(network().train(), images())
    with pytest.raises(ValueError, match="x"):
        per_sample_gradients(network(), images(0))
    with pytest.raises(ValueError, match="model.*gradient"):
        per_sample_gradients(network().requires_grad_(False), images())
    with pytest.raises(ValueError, match="model.*shape"):
        per_sample_gradients(nn.Conv2d(1, 1, 1).double(), images())
