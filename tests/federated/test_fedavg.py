from __future__ import annotations

import pytest
import torch
from torch import nn

from trimtab.federated import FedAvg, FedSpeed, Update, simulate, to_client_app
from trimtab.federated.local_training import LocalSGD, batches


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def clients() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        (torch.randn(n, 4, generator=seeded(n)), torch.randint(3, (n,), generator=seeded(n))) for n in (5, 11, 2, 30)
    ]


def test_aggregation_equals_flowers_bit_for_bit(clients) -> None:
    flwr = pytest.importorskip("flwr.app")
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    algorithm, model = FedAvg(0.3, local_epochs=2, batch_size=4), nn.Linear(4, 3)
    server = algorithm.init_server(model, len(clients))
    updates = [
        algorithm.client_update(model, algorithm.configure(server), {}, data, generator=seeded(i))[0]
        for i, data in enumerate(clients)
    ]
    records = [
        flwr.RecordDict(
            {
                "arrays": flwr.ArrayRecord(update.params),
                "metrics": flwr.MetricRecord({"num-examples": update.num_examples}),
            }
        )
        for update in updates
    ]
    theirs = aggregate_arrayrecords(records, "num-examples").to_torch_state_dict()
    ours = algorithm.aggregate(server, updates).params
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_our_client_works_under_flowers_own_strategy(clients) -> None:
    flwr = pytest.importorskip("flwr.app")
    from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

    algorithm, model = FedAvg(0.3, batch_size=4), nn.Linear(4, 3)
    app = to_client_app(algorithm, lambda: nn.Linear(4, 3), lambda i: clients[i])
    strategy = FlowerFedAvg()
    server, replies = algorithm.init_server(model, len(clients)), []
    for i in range(len(clients)):
        content = flwr.RecordDict(
            {
                "arrays": flwr.ArrayRecord(server.params),
                "config": flwr.ConfigRecord({"server-round": 1, "seed": 5}),
            }
        )
        metadata = flwr.Metadata(1, f"{i}", 1, i, "", "", 0.0, 1e9, "train")
        message = flwr.Message(content=content, metadata=metadata)
        replies.append(app(message, flwr.Context(1, i, {"partition-id": i}, flwr.RecordDict(), {})))
    arrays, metrics = strategy.aggregate_train(1, replies)
    assert metrics["gradients"] > 0
    history = simulate(algorithm, model, clients, rounds=1, generator=seeded())
    state = history.state.server.params
    assert {k: v.shape for k, v in arrays.to_torch_state_dict().items()} == {k: v.shape for k, v in state.items()}


def test_one_epoch_of_one_batch_is_gradient_descent_on_the_pooled_data() -> None:
    x, y = torch.randn(24, 4, generator=seeded()), torch.randint(3, (24,), generator=seeded())
    model, pooled = nn.Linear(4, 3), nn.Linear(4, 3)
    pooled.load_state_dict(model.state_dict())
    parts = torch.arange(24).split([3, 9, 12])
    simulate(FedAvg(0.5, batch_size=24), model, [(x[p], y[p]) for p in parts], rounds=3, generator=seeded())
    optimizer = torch.optim.SGD(pooled.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(pooled(x), y).backward()
        optimizer.step()
    torch.testing.assert_close(model.weight, pooled.weight)


def test_weights() -> None:
    server = FedAvg(0.1).init_server(nn.Linear(1, 1), 2)
    updates = [
        Update({"weight": torch.tensor([[0.0]]), "bias": torch.zeros(1)}, 1),
        Update({"weight": torch.tensor([[4.0]]), "bias": torch.ones(1)}, 3),
    ]
    assert FedAvg(0.1).aggregate(server, updates).params["weight"].item() == 3.0
    assert FedAvg(0.1, weighted=False).aggregate(server, updates).params["weight"].item() == 2.0


def test_prox_is_the_gradient_of_the_proximal_term() -> None:
    x, y = torch.randn(10, 4, generator=seeded()), torch.randint(3, (10,), generator=seeded())
    model, reference = nn.Linear(4, 3), nn.Linear(4, 3)
    reference.load_state_dict(model.state_dict())
    anchor = [p.detach().clone() for p in reference.parameters()]
    local = LocalSGD(lr=0.2, epochs=7, batch_size=10, prox=0.8)
    local.train(model, (x, y), generator=seeded(), pull=[-p for p in anchor])
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.2)
    for _ in range(7):
        optimizer.zero_grad()
        away = sum((p - a).square().sum() for p, a in zip(reference.parameters(), anchor, strict=True))
        (nn.functional.cross_entropy(reference(x), y) + 0.4 * away).backward()
        optimizer.step()
    torch.testing.assert_close(model.weight, reference.weight)


def test_prox_keeps_clients_near_what_they_received(clients) -> None:
    def distance(prox: float) -> float:
        model = nn.Linear(4, 3)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        algorithm = FedAvg(0.1, local_epochs=10, batch_size=5, prox=prox)
        server = algorithm.init_server(model, 1)
        update, _ = algorithm.client_update(model, algorithm.configure(server), {}, clients[0], generator=seeded())
        return float(update.params["weight"].norm())

    assert distance(5.0) < 0.5 * distance(0.0)


def test_max_norm_bounds_a_step() -> None:
    x, y = 100 * torch.randn(4, 4, generator=seeded()), torch.tensor([0, 1, 2, 0])
    model = nn.Linear(4, 3)
    start = [p.detach().clone() for p in model.parameters()]
    LocalSGD(lr=1.0, batch_size=4, max_norm=0.25).train(model, (x, y), generator=seeded())
    moved = sum((p.detach() - s).square().sum() for p, s in zip(model.parameters(), start, strict=True))
    assert moved.sqrt().item() == pytest.approx(0.25, rel=1e-4)


@pytest.mark.parametrize(("n", "size", "lengths"), [(10, 4, [4, 4, 2]), (9, 4, [4, 4]), (1, 4, [1]), (3, 1, [1, 1, 1])])
def test_batches_cover_an_epoch(n: int, size: int, lengths: list[int]) -> None:
    epochs = list(batches(n, size, 2, seeded()))
    assert [len(b) for b in epochs] == lengths * 2
    first = torch.cat(epochs[: len(lengths)])
    assert len(first.unique()) == sum(lengths)
    if n > 4:
        assert not torch.equal(first, torch.cat(epochs[len(lengths) :]))


@pytest.mark.parametrize(
    ("options", "named"),
    [({"lr": float("inf")}, "lr"), ({"momentum": 1.0}, "momentum"), ({"local_epochs": 1.5}, "local_epochs"),
     ({"prox": float("nan")}, "prox"), ({"max_norm": float("inf")}, "max_norm"), ({"lr_decay": 0.0}, "lr_decay")],
)  # fmt: skip
@pytest.mark.parametrize("algorithm", [FedAvg, FedSpeed])
def test_bad_arguments_are_named(algorithm, options: dict[str, object], named: str) -> None:
    if algorithm is FedSpeed and named == "momentum":
        pytest.skip("has none")
    with pytest.raises((ValueError, TypeError), match=f"{named} must be"):
        algorithm(**{"lr": 0.1, **options})


@pytest.mark.parametrize("algorithm", [FedAvg(0.1, batch_size=4), FedSpeed(0.1, batch_size=4, local_epochs=2)])
def test_a_client_of_one_sample_normalises_by_what_it_received(algorithm) -> None:
    """As dirichlet_partition's default allows. The others' statistics move; its own model is trained."""
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    data = [(torch.randn(n, 4, generator=seeded(n)), torch.randint(3, (n,), generator=seeded(n))) for n in (1, 9, 20)]
    server = algorithm.init_server(model, 3)
    sent = algorithm.configure(server)
    update, _ = algorithm.client_update(model, sent, algorithm.init_client(model, data[0]), data[0], generator=seeded())
    assert torch.equal(update.params["1.running_mean"], sent.params["1.running_mean"])
    assert not torch.equal(update.params["0.weight"], sent.params["0.weight"])
    history = simulate(algorithm, model, data, rounds=2, generator=seeded())
    assert all(value.isfinite().all() for value in history.state.server.params.values())
    assert model[1].running_mean.abs().sum() > 0


def test_an_error_in_an_update_says_in_which_client() -> None:
    data = [(torch.randn(2, 4), torch.zeros(2, dtype=torch.long)), (torch.randn(0, 4), torch.zeros(0).long())]
    with pytest.raises(ValueError, match="data must hold") as caught:
        simulate(FedAvg(0.1), nn.Linear(4, 3), data, rounds=1)
    assert caught.value.__notes__ == ["in the update of client 1"]
