from __future__ import annotations

import pytest
import torch
from torch import nn

from trimtab.federated import SCAFFOLD, FedAvg, FedDyn, FedSpeed, simulate


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Point(nn.Module):
    """A model that is one number; its output ignores the input."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w.expand(len(x), -1)


def quadratic(w: torch.Tensor, ab: torch.Tensor) -> torch.Tensor:
    """a / 2 (w - b)^2, with (a, b) in the place of the targets."""
    return (ab[:, :1] / 2 * (w - ab[:, 1:]) ** 2).mean()


A, B = torch.linspace(0.5, 2, 5, dtype=torch.float64), torch.linspace(-1, 3, 5, dtype=torch.float64) ** 2
MINIMUM = ((A * B).sum() / A.sum()).item()
COMMON = {"local_epochs": 1, "batch_size": 1, "loss": quadratic}


def quadratic_clients(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.zeros(steps, 1), torch.stack([a, b]).expand(steps, 2)) for a, b in zip(A, B, strict=True)]


@pytest.mark.parametrize("make", [lambda: SCAFFOLD(0.1, **COMMON), lambda: FedDyn(0.1, alpha=1.0, **COMMON)])
def test_reaches_the_minimum_of_the_mean_where_fedavg_does_not(make) -> None:
    point, drifting = Point(), Point()
    simulate(make(), point, quadratic_clients(5), rounds=30, generator=seeded())
    simulate(FedAvg(0.1, **COMMON), drifting, quadratic_clients(5), rounds=15, generator=seeded())
    assert point.w.item() == pytest.approx(MINIMUM, abs=5e-3)
    assert abs(drifting.w.item() - MINIMUM) > 0.02


@pytest.mark.parametrize("make", [lambda: SCAFFOLD(0.05, **COMMON), lambda: FedDyn(0.1, alpha=1.0, **COMMON)])
def test_the_minimum_is_a_fixed_point_with_few_participants(make) -> None:
    point = Point()
    simulate(make(), point, quadratic_clients(5), rounds=50, fraction=0.4, generator=seeded())
    assert point.w.item() == pytest.approx(MINIMUM, abs=0.1)


def test_a_scaffold_round_by_hand() -> None:
    """One client of curvature 2 around 1, two steps at rate 0.1 from 0, with controls c_i = 0.5 and c = 0.2."""
    algorithm = SCAFFOLD(0.1, **COMMON)
    data = (torch.zeros(2, 1), torch.tensor([[2.0, 1.0]], dtype=torch.float64).expand(2, 2))
    server = algorithm.init_server(Point(), 4)
    server.memory["control.w"] += 0.2
    client = {"w": torch.full((1,), 0.5, dtype=torch.float64)}
    update, after = algorithm.client_update(Point(), algorithm.configure(server), client, data, generator=seeded())
    w1 = 0 - 0.1 * (2 * (0 - 1) - 0.5 + 0.2)
    w2 = w1 - 0.1 * (2 * (w1 - 1) - 0.5 + 0.2)
    control = 0.5 - 0.2 + (0 - w2) / (2 * 0.1)
    assert update.params["w"].item() == pytest.approx(w2)
    assert after["w"].item() == pytest.approx(control)
    assert update.extras["control.w"].item() == pytest.approx(control - 0.5)
    moved = algorithm.aggregate(server, [update])
    assert moved.memory["control.w"].item() == pytest.approx(0.2 + (control - 0.5) / 4)
    assert moved.params["w"].item() == pytest.approx(w2)


def test_controls_are_gradients_in_later_rounds_of_a_smaller_rate_too() -> None:
    """Where the gradient is the same everywhere, it is what a client's control becomes, whatever the rate."""
    algorithm = SCAFFOLD(0.1, lr_decay=0.5, local_epochs=3, batch_size=1, loss=lambda w, g: (g * w).mean())
    slopes = [-1.0, 2.0]
    data = [(torch.zeros(2, 1), torch.full((2, 1), slope, dtype=torch.float64)) for slope in slopes]
    state = simulate(algorithm, Point(), data, rounds=4, generator=seeded()).state
    assert [state.clients[k]["w"].item() for k in range(2)] == pytest.approx(slopes)
    assert state.server.memory["control.w"].item() == pytest.approx(0.5)


def test_the_servers_control_is_the_mean_of_the_clients() -> None:
    clients = [(torch.randn(6, 3, generator=seeded(i)), torch.arange(6) % 2) for i in range(4)]
    state = simulate(SCAFFOLD(0.1), nn.Linear(3, 2), clients, rounds=5, fraction=0.5, generator=seeded()).state
    zero = torch.zeros(2, 3)
    mean = sum(state.clients[i]["weight"] if i in state.clients else zero for i in range(4)) / 4
    torch.testing.assert_close(state.server.memory["control.weight"], mean)


def test_the_first_round_is_fedavg_with_equal_weights_and_the_server_step_scales() -> None:
    clients = [(torch.randn(6 + i, 3, generator=seeded(i)), torch.arange(6 + i) % 2) for i in range(3)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = nn.Linear(3, 2)
    first = {name: value.clone() for name, value in start.state_dict().items()}
    ends = []
    for algorithm in (FedAvg(0.1, weighted=False), SCAFFOLD(0.1), SCAFFOLD(0.1, server_lr=0.5)):
        model = nn.Linear(3, 2)
        model.load_state_dict(first)
        ends.append(simulate(algorithm, model, clients, rounds=1, generator=seeded()).state.server.params)
    torch.testing.assert_close(ends[1], ends[0])
    torch.testing.assert_close(ends[2]["weight"], (first["weight"] + ends[0]["weight"]) / 2)


def test_tied_parameters_move_together() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    clients = [(torch.randn(6, 3, generator=seeded(i)), torch.arange(6) % 3) for i in range(2)]
    params = simulate(SCAFFOLD(0.1, server_lr=0.7), Tied(), clients, rounds=2, generator=seeded()).state.server.params
    assert torch.equal(params["a.weight"], params["b.weight"])


def test_feddyn_by_its_papers_formulas() -> None:
    """Gradient descent on L_i - <g_i, w> + alpha/2 |w - w_t|^2, and the server's h, written out."""
    alpha, lr, steps, rounds = 0.4, 0.1, 3, 4
    point = Point()
    simulate(FedDyn(lr, alpha=alpha, **COMMON), point, quadratic_clients(steps), rounds=rounds, generator=seeded())
    w, h, g = 0.0, 0.0, [0.0] * 5
    for _ in range(rounds):
        ends = []
        for i, (a, b) in enumerate(zip(A.tolist(), B.tolist(), strict=True)):
            theta = w
            for _ in range(steps):
                theta -= lr * (a * (theta - b) - g[i] + alpha * (theta - w))
            g[i] -= alpha * (theta - w)
            ends.append(theta)
        h -= alpha * sum(end - w for end in ends) / 5
        w = sum(ends) / 5 - h / alpha
    assert point.w.item() == pytest.approx(w, abs=1e-12)


def test_feddyn_is_fedspeed_without_the_step_uphill() -> None:
    clients = [(torch.randn(6, 3, generator=seeded(i)), torch.arange(6) % 2) for i in range(3)]
    ends = []
    for algorithm in (
        FedDyn(0.1, alpha=0.2),
        FedSpeed(0.1, 0.2, rho=0.0, weight_decay=0.0, max_norm=None, lr_decay=1.0, local_epochs=1),
    ):
        model = nn.Linear(3, 2)
        nn.init.constant_(model.weight, 0.1)
        nn.init.zeros_(model.bias)
        ends.append(simulate(algorithm, model, clients, rounds=2, generator=seeded()).state.server.params)
    assert torch.equal(ends[0]["weight"], ends[1]["weight"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SCAFFOLD(0.0), "lr must be positive"),
        (lambda: SCAFFOLD(0.1, server_lr=0.0), "server_lr must be positive"),
        (lambda: FedDyn(0.1, alpha=0.0), "alpha must be positive"),
        (lambda: SCAFFOLD(0.1).init_server(Point(), 0), "num_clients must be known"),
    ],
)
def test_refusals(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
