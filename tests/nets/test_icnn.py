import torch

from trimtab.nets.icnn import ConvexGradient, InputConvexNet


def test_convex_and_its_gradient_is_monotone():
    net = InputConvexNet(3, hidden=(16, 16)).double()
    for parameter in net.parameters():  # far from the start too
        parameter.data += torch.randn_like(parameter)
    x, y = torch.randn(2, 100, 3, dtype=torch.float64)
    assert (net((x + y) / 2) <= (net(x) + net(y)) / 2 + 1e-12).all()
    gradient = ConvexGradient(net)
    # Half the squared norm makes it strongly so.
    assert (((gradient(x) - gradient(y)) * (x - y)).sum(1) >= (x - y).square().sum(1) - 1e-9).all()


def test_gradient_trains():
    gradient = ConvexGradient(InputConvexNet(2))
    gradient(torch.randn(10, 2)).square().sum().backward()
    trained = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in gradient.potential.parameters()]
    assert sum(trained) >= len(trained) - 1  # the last bias does not move a gradient
