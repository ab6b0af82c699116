from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trimtab.federated import FedAvg, FedSpeed, quasi_gradient, simulate
from trimtab.federated.protocol import stream


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Point(nn.Module):
    """A model that is one parameter vector; its output ignores the input."""

    def __init__(self, start: list[float]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w.expand(len(x), -1)


def quadratic(w: torch.Tensor, ab: torch.Tensor) -> torch.Tensor:
    """a / 2 (w - b)^2, with (a, b) in the place of the targets."""
    return (ab[:, :1] / 2 * (w - ab[:, 1:]) ** 2).mean()


def quadratic_clients(a: torch.Tensor, b: torch.Tensor, steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """With batches of one sample, `steps` equal samples are that many steps of gradient descent in an epoch."""
    return [(torch.zeros(steps, 1), torch.stack([ai, bi]).expand(steps, 2)) for ai, bi in zip(a, b, strict=True)]


class TestQuasiGradient:
    def test_closed_form(self) -> None:
        w = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
        scale = torch.tensor([1.0, 2.0], dtype=torch.float64)
        g1 = scale * w.detach()  # (3, 8), norm sqrt(73)
        uphill = w.detach() + 0.5 * g1 / 73**0.5
        (got,) = quasi_gradient(lambda: (scale * w * w).sum() / 2, [w], rho=0.5, alpha=0.25)
        torch.testing.assert_close(got, 0.75 * g1 + 0.25 * scale * uphill, rtol=0, atol=1e-7)

    def test_the_norm_is_global(self) -> None:
        params = [torch.tensor([3.0], requires_grad=True), torch.tensor([4.0], requires_grad=True)]
        one, two = quasi_gradient(lambda: sum(p.square().sum() / 2 for p in params), params, rho=5.0)
        assert one.item() == pytest.approx(6.0)
        assert two.item() == pytest.approx(8.0)

    def test_restores_parameters_and_buffers_exactly(self) -> None:
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
        x = torch.randn(10, 4, generator=seeded())
        params, start = list(model.parameters()), [p.detach().clone() for p in model.parameters()]
        quasi_gradient(lambda: model(x).square().mean(), params, rho=0.3, buffers=list(model.buffers()))
        assert all(torch.equal(p, s) for p, s in zip(params, start, strict=True))
        assert model[1].num_batches_tracked == 1
        torch.testing.assert_close(model[1].running_mean, 0.1 * model[0](x).mean(0).detach())

    @pytest.mark.parametrize(("rho", "alpha"), [(0.0, 1.0), (0.1, 0.0)])
    def test_switched_off_it_is_one_plain_gradient(self, rho: float, alpha: float) -> None:
        calls = []
        w = torch.tensor([1.0, 2.0], requires_grad=True)

        def loss() -> torch.Tensor:
            calls.append(1)
            return w.pow(3).sum()

        (got,) = quasi_gradient(loss, [w], rho=rho, alpha=alpha)
        assert torch.equal(got, 3 * w.detach() ** 2)
        assert len(calls) == 1

    def test_at_a_stationary_point_it_is_finite(self) -> None:
        w = torch.zeros(3, requires_grad=True)
        (got,) = quasi_gradient(lambda: w.square().sum(), [w], rho=0.1)
        assert torch.equal(got, torch.zeros(3))


@pytest.mark.parametrize(("prox", "steps", "rounds"), [(0.1, 1, 250), (1.0, 1, 150), (1.0, 5, 50), (1.0, 20, 40)])
def test_reaches_the_minimum_of_the_mean_where_fedprox_does_not(prox: float, steps: int, rounds: int) -> None:
    a, b = torch.linspace(0.5, 2, 5, dtype=torch.float64), torch.linspace(-1, 3, 5, dtype=torch.float64) ** 2
    minimum = ((a * b).sum() / a.sum()).item()
    common = {"local_epochs": 1, "batch_size": 1, "loss": quadratic}
    clients = quadratic_clients(a, b, steps)
    speed, proximal = Point([0.0]), Point([0.0])
    simulate(
        FedSpeed(0.1, prox, rho=0.0, weight_decay=0.0, max_norm=None, lr_decay=1.0, **common),
        speed, clients, rounds=rounds, generator=seeded(),
    )  # fmt: skip
    assert speed.w.item() == pytest.approx(minimum, abs=1e-6)
    if steps > 1:
        simulate(FedAvg(0.1, prox=prox, **common), proximal, clients, rounds=15, generator=seeded())
        assert abs(proximal.w.item() - minimum) > 0.02


def test_partial_participation_has_the_minimum_as_fixed_point_only_with_the_mean_over_all() -> None:
    a, b = torch.linspace(0.5, 2, 5, dtype=torch.float64), torch.linspace(-1, 3, 5, dtype=torch.float64)
    minimum = ((a * b).sum() / a.sum()).item()
    ends = {}
    for mean in ("all", "active"):
        model = Point([0.0])
        algorithm = FedSpeed(
            0.1, 1.0, rho=0.0, weight_decay=0.0, max_norm=None, lr_decay=1.0, local_epochs=1, batch_size=1,
            dual_mean=mean, loss=quadratic,
        )  # fmt: skip
        simulate(algorithm, model, quadratic_clients(a, b, 5), rounds=100, fraction=0.4, generator=seeded())
        ends[mean] = abs(model.w.item() - minimum)
    assert ends["all"] < 1e-4
    assert ends["active"] > 1e-2


class TestOneStepByHand:
    """The update of one client with one sample, worked out with the release's order: pull, clip, then decay."""

    start: ClassVar[list[float]] = [1.0, -2.0]
    target = torch.tensor([[0.5, 3.0, 1.0]], dtype=torch.float64)  # a, b_1, b_2 of a/2 |w - b|^2, summed

    @staticmethod
    def loss(w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (t[:, :1] / 2 * (w - t[:, 1:]) ** 2).sum()

    def run(self, **options):
        algorithm = FedSpeed(local_epochs=1, batch_size=1, loss=self.loss, **options)
        model = Point(self.start)
        server = algorithm.init_server(model, 1)
        data = (torch.zeros(1, 1), self.target)
        dual = {"w": torch.tensor([0.3, 0.1], dtype=torch.float64)}
        return algorithm.client_update(model, algorithm.configure(server), dual, data, generator=seeded())

    def test_with_clipping(self) -> None:
        lr, prox, rho, alpha, decay = 0.1, 0.5, 0.2, 0.7, 0.01
        w, dual = torch.tensor(self.start, dtype=torch.float64), torch.tensor([0.3, 0.1], dtype=torch.float64)
        g1 = 0.5 * (w - self.target[0, 1:])
        g2 = 0.5 * (w + rho * g1 / g1.norm() - self.target[0, 1:])
        g = (1 - alpha) * g1 + alpha * g2 + prox * (dual - w)
        clipped = g * min(1.0, 0.9 / g.norm().item())
        assert g.norm() > 0.9
        expected = w - lr * (clipped + (decay + prox) * w)
        update, memory = self.run(
            lr=lr, prox=prox, rho=rho, alpha=alpha, weight_decay=decay, max_norm=0.9, lr_decay=0.5
        )
        torch.testing.assert_close(update.params["w"], expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(memory["w"], dual + update.params["w"] - w, rtol=0, atol=1e-15)
        assert update.metrics["gradients"] == 2

    def test_a_positive_dual_pushes_down(self) -> None:
        options = {"lr": 0.1, "prox": 0.5, "rho": 0.0, "weight_decay": 0.0, "max_norm": None}
        update, _ = self.run(**options)
        w, dual = torch.tensor(self.start, dtype=torch.float64), torch.tensor([0.3, 0.1], dtype=torch.float64)
        plain = w - 0.1 * 0.5 * (w - self.target[0, 1:])
        torch.testing.assert_close(update.params["w"], plain - 0.1 * 0.5 * dual)
        assert update.metrics["gradients"] == 1

    def test_the_participants_form_uploads_model_plus_dual(self) -> None:
        everything, memory = self.run(lr=0.1, prox=0.5)
        active, same = self.run(lr=0.1, prox=0.5, dual_mean="active")
        assert torch.equal(memory["w"], same["w"])
        torch.testing.assert_close(active.params["w"], everything.params["w"] + memory["w"])


def test_learning_rate_decays_by_round() -> None:
    data = (torch.zeros(1, 1), torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    algorithm = FedSpeed(
        0.1, prox=0.0, rho=0.0, weight_decay=0.0, lr_decay=0.5, local_epochs=1, batch_size=1, loss=quadratic
    )
    model = Point([1.0])
    simulate(algorithm, model, [data], rounds=2, generator=seeded())
    assert model.w.item() == pytest.approx(0.9 * 0.95)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.2, 0.4, 1.0]))
def test_servers_running_mean_is_the_mean_of_all_duals(seed: int, fraction: float) -> None:
    draw = seeded(seed)
    clients = [(torch.randn(7, 3, generator=draw), torch.randint(2, (7,), generator=draw)) for _ in range(5)]
    model = nn.Linear(3, 2)
    history = simulate(
        FedSpeed(0.2, local_epochs=1, batch_size=3), model, clients, rounds=5, fraction=fraction, generator=draw
    )
    server, held = history.state.server, history.state.clients
    for name in ("weight", "bias"):
        mean = sum(memory[name] for memory in held.values()) / len(clients)
        torch.testing.assert_close(server.memory[f"dual.{name}"], mean, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("mean", ["all", "active"])
def test_one_client_adds_its_own_updated_dual(mean: str) -> None:
    clients = [(torch.randn(6, 3, generator=seeded()), torch.randint(2, (6,), generator=seeded()))]
    algorithm, model = FedSpeed(0.2, local_epochs=2, batch_size=3, dual_mean=mean), nn.Linear(3, 2)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    history = simulate(algorithm, model, clients, rounds=1, generator=seeded())
    dual, params = history.state.clients[0], history.state.server.params
    for name in dual:  # w_1 = w_K + h and h = w_K - w_0
        torch.testing.assert_close(params[name], start[name] + 2 * dual[name])
        assert dual[name].abs().max() > 0


def test_the_two_servers_agree_under_full_participation() -> None:
    clients = [(torch.randn(6, 3, generator=seeded(i)), torch.full((6,), i % 2)) for i in range(3)]
    start = nn.Linear(3, 2).state_dict()
    ends = []
    for mean in ("all", "active"):
        model = nn.Linear(3, 2)
        model.load_state_dict(start)
        simulate(FedSpeed(0.1, dual_mean=mean, local_epochs=1), model, clients, rounds=4, generator=seeded())
        ends.append(model.weight.detach())
    torch.testing.assert_close(ends[0], ends[1], atol=1e-5, rtol=1e-4)


def test_no_more_traffic_than_fedavg() -> None:
    clients = [(torch.randn(6, 3), torch.randint(2, (6,))) for _ in range(3)]
    sent = {
        type(a): simulate(a, nn.Linear(3, 2), clients, rounds=1).rounds[0]
        for a in (FedAvg(0.1), FedSpeed(0.1, local_epochs=1))
    }
    assert sent[FedAvg].bytes_up == sent[FedSpeed].bytes_up == 3 * 8 * 4
    assert sent[FedAvg].bytes_down == sent[FedSpeed].bytes_down


def test_tied_parameters_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(3, 3, bias=False)
            self.two = nn.Linear(3, 3, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x))

    clients = [(torch.randn(6, 3, generator=seeded(i)), torch.full((6,), i)) for i in range(3)]
    history = simulate(FedSpeed(0.1, local_epochs=1), Tied(), clients, rounds=3, generator=seeded())
    params = history.state.server.params
    assert torch.equal(params["one.weight"], params["two.weight"])
    mean = sum(memory["one.weight"] for memory in history.state.clients.values()) / 3
    torch.testing.assert_close(history.state.server.memory["dual.two.weight"], mean, atol=1e-6, rtol=1e-4)


def test_buffers_are_averaged_without_duals() -> None:
    clients = [(torch.randn(8, 3, generator=seeded(i)) + i, torch.full((8,), i % 2)) for i in range(3)]
    algorithm = FedSpeed(0.1, local_epochs=1, batch_size=8)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    simulate(algorithm, model, clients, rounds=1, generator=seeded())
    means = torch.stack([0.1 * x.mean(0) for x, _ in clients])
    torch.testing.assert_close(model[0].running_mean, means.mean(0))
    assert not any("running" in name for name in algorithm.init_server(model, 3).memory)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lr": -0.1}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"prox": -1.0}, "prox"),
        ({"rho": -0.1}, "rho"),
        ({"rho": float("inf")}, "rho"),
        ({"alpha": 1.5}, "alpha"),
        ({"weight_decay": -1e-3}, "weight_decay"),
        ({"max_norm": 0.0}, "max_norm"),
        ({"lr_decay": 0.0}, "lr_decay"),
        ({"local_epochs": 0}, "local_epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"dual_mean": "some"}, "dual_mean"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        FedSpeed(**{"lr": 0.1, **options})


def test_the_number_of_clients_must_be_known() -> None:
    with pytest.raises(ValueError, match="num_clients"):
        FedSpeed(0.1).init_server(nn.Linear(2, 2), 0)


def test_streams_differ_by_place() -> None:
    draws = {stream(s, r, c).initial_seed() for s in range(5) for r in range(5) for c in range(5)}
    assert len(draws) == 125


def test_an_interrupted_step_uphill_leaves_the_weights() -> None:
    w, statistics, calls = torch.tensor([3.0, 4.0], requires_grad=True), torch.zeros(1), []

    def loss() -> torch.Tensor:
        calls.append(w.tolist())
        statistics.add_(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return w.square().sum() / 2

    with pytest.raises(KeyboardInterrupt):
        quasi_gradient(loss, [w], rho=5.0, buffers=[statistics])
    assert calls == [[3.0, 4.0], [pytest.approx(6.0), pytest.approx(8.0)]]
    assert w.tolist() == [3.0, 4.0]
    assert statistics.item() == 1
