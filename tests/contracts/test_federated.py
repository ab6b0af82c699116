"""What every federated algorithm must keep, in this process and under Flower. A new one joins by a line in MEMBERS."""

from __future__ import annotations

import copy
import importlib.util
import io
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from trimtab.federated import (
    CCVR,
    GGEUR,
    SCAFFOLD,
    Algorithm,
    FedAvg,
    FedDyn,
    FedLabel,
    FedLD,
    FedLoGe,
    FedSpeed,
    FlagAggregator,
    HideNseek,
    RobustFedAvg,
    SimulationState,
    coordinate_median,
    finish,
    simulate,
    to_client_app,
    to_strategy,
)

NUM_CLIENTS = 6


@dataclass
class Member:
    make: Callable[[], Algorithm]
    off: Callable[[], Algorithm] | None = None  # the same, switched off,
    baseline: Callable[[], Algorithm] | None = None  # must give this one's parameters exactly


fedspeed_client = {"weight_decay": 1e-3, "max_norm": 10.0, "lr_decay": 0.998, "weighted": False}
sparse_head = {"etf_steps": 20, "etf_lr": 1e-2, "head": "1"}


def plain() -> FedAvg:
    return FedAvg(lr=0.1, batch_size=4)


fedld_client = {"momentum": 0.5, "weight_decay": 5e-4, "weighted": False}
scaled_flag = FlagAggregator(rescale="median_norm")
MEMBERS = {
    "fedavg": Member(lambda: FedAvg(lr=0.1, local_epochs=2, batch_size=4, momentum=0.5)),
    "fedprox": Member(
        lambda: FedAvg(lr=0.1, batch_size=4, prox=0.5),
        off=lambda: FedAvg(lr=0.1, batch_size=4, prox=0.0),
        baseline=lambda: FedAvg(lr=0.1, batch_size=4),
    ),
    "fedspeed": Member(
        lambda: FedSpeed(lr=0.1, local_epochs=2, batch_size=4),
        off=lambda: FedSpeed(lr=0.1, prox=0.0, rho=0.0, local_epochs=2, batch_size=4),
        baseline=lambda: FedAvg(lr=0.1, local_epochs=2, batch_size=4, **fedspeed_client),
    ),
    "fedspeed, paper's server": Member(lambda: FedSpeed(lr=0.1, local_epochs=1, batch_size=4, dual_mean="active")),
    "scaffold": Member(lambda: SCAFFOLD(lr=0.1, local_epochs=2, batch_size=4)),
    "scaffold, long server step": Member(lambda: SCAFFOLD(lr=0.1, batch_size=4, server_lr=1.5, lr_decay=0.9)),
    "feddyn": Member(lambda: FedDyn(lr=0.1, batch_size=4, alpha=0.1)),
    "ccvr": Member(lambda: CCVR(plain(), per_class=20, epochs=1, head="1")),
    "ggeur": Member(
        lambda: GGEUR(plain(), 3, per_class=12), off=lambda: GGEUR(plain(), 3, per_class=0), baseline=plain
    ),
    "ggeur, several domains": Member(lambda: GGEUR(SCAFFOLD(lr=0.1, batch_size=4), 3, per_class=12, prototypes=True)),
    "fedloge": Member(lambda: FedLoGe(lr=0.1, local_epochs=2, generator=seeded(), **sparse_head)),
    "fedld": Member(
        lambda: FedLD(lr=0.1, local_epochs=2, batch_size=4),
        off=lambda: FedLD(lr=0.1, local_epochs=2, batch_size=4, weight=0.0, proportion=None),
        baseline=lambda: FedAvg(lr=0.1, local_epochs=2, batch_size=4, **fedld_client),
    ),
    "fedlabel": Member(lambda: FedLabel(lr=0.1, local_epochs=2, batch_size=4)),
    "hidenseek": Member(lambda: HideNseek(30.0, (5,), density=0.9, local_epochs=2, batch_size=4)),
    "hidenseek, in bits": Member(lambda: HideNseek(30.0, (5,), 0.9, batch_size=4, broadcast="sign", values="binary")),
    "coordinate median": Member(lambda: RobustFedAvg(coordinate_median, lr=0.1, batch_size=4)),
    "flag aggregator": Member(lambda: RobustFedAvg(scaled_flag, lr=0.1, batch_size=4)),
    "fedsam": Member(lambda: FedSpeed(lr=0.1, prox=0.0, local_epochs=1, batch_size=4)),
}


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small only lose by more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=MEMBERS, ids=str)
def member(request: pytest.FixtureRequest) -> Member:
    return MEMBERS[request.param]


def network() -> nn.Module:
    """Batch normalisation for buffers, dropout for draws from torch's global generator, a named feature layer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        features = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2))
        return nn.Sequential(features, nn.Linear(8, 3))


@pytest.fixture
def clients() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of different sizes, and each with a class that it sees most."""
    draw = torch.Generator().manual_seed(1)
    sizes = [8, 12, 5, 9, 6, 16]
    return [
        (
            torch.randn(n, 5, generator=draw) + i,
            torch.where(torch.rand(n, generator=draw) < 0.7, i % 3, torch.randint(3, (n,), generator=draw)),
        )
        for i, n in enumerate(sizes)
    ]


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


class LocalGrid:
    """Flower's grid without a network: messages go straight to the client apps, replies come back in any order."""

    def __init__(self, app, num_clients: int) -> None:
        from flwr.app import Context, RecordDict

        # Recent versions of Flower stamp messages with the task that sends them.
        if importlib.util.find_spec("flwr.supercore.task_identity"):
            identity = importlib.import_module("flwr.supercore.task_identity").TaskIdentity
            identity.task_id, identity.run_id, identity.node_id = 1, 1, 1
        self.app = app
        # Node ids as Flower draws them: large, and not the client ids.
        self.contexts = {
            1000 + 7 * i: Context(1, 1000 + 7 * i, {"partition-id": i}, RecordDict(), {}) for i in range(num_clients)
        }
        self.order = random.Random(0)
        self.failing: set[int] = set()

    def get_node_ids(self) -> list[int]:
        return list(reversed(self.contexts))

    def send_and_receive(self, messages, *, timeout=None):
        from flwr.app import Error, Message

        replies = [
            Message(Error(0, "gone"), reply_to=m)
            if (node := m.metadata.dst_node_id) in self.failing
            else self.app(m, self.contexts[node])
            for m in messages
        ]
        self.order.shuffle(replies)
        return replies


def under_flower(
    member: Member, clients, *, fraction: float, grid: LocalGrid | None = None, rounds: int = 2, state=None
):
    pytest.importorskip("flwr")
    from flwr.app import ArrayRecord

    algorithm = member.make()
    strategy = to_strategy(algorithm, network(), num_clients=len(clients), fraction=fraction, generator=seeded())
    if state is not None:
        strategy.load_state_dict(state)
    grid = grid or LocalGrid(to_client_app(member.make(), network, lambda i: clients[i]), len(clients))
    result = strategy.start(grid, ArrayRecord(network().state_dict()), num_rounds=rounds)
    return strategy, grid, dict(result.arrays.to_torch_state_dict())


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_flower_and_simulation_give_the_same_bits(member: Member, clients, fraction: float) -> None:
    model = network()
    history = simulate(member.make(), model, clients, rounds=2, fraction=fraction, generator=seeded())
    state = finish(member.make(), model, clients, history.state)
    strategy, grid, params = under_flower(member, clients, fraction=fraction)
    assert_same(params, state.server.params)
    assert_same(strategy.server.state_dict(), state.server.state_dict())
    assert_same(dict(model.state_dict()), state.server.params)
    for i, context in enumerate(grid.contexts.values()):
        kept = dict(context.state["trimtab.client"].to_torch_state_dict()) if "trimtab.client" in context.state else {}
        assert_same(kept, history.state.clients.get(i, {}))


def test_flower_draws_clients_whatever_ids_their_nodes_have(member: Member, clients) -> None:
    """Flower draws the node ids anew in every run."""
    pytest.importorskip("flwr")
    runs = []
    for order in ([0, 1, 2, 3, 4, 5], [3, 1, 5, 0, 2, 4]):
        grid = LocalGrid(to_client_app(member.make(), network, lambda i: clients[i]), len(clients))
        nodes = list(grid.contexts)
        for place, client in enumerate(order):
            grid.contexts[nodes[place]].node_config["partition-id"] = client
        runs.append(under_flower(member, clients, fraction=0.5, grid=grid)[2])
    assert_same(*runs)


def test_a_refused_state_leaves_the_strategy_as_it_was(member: Member, clients) -> None:
    strategy, _, _ = under_flower(member, clients, fraction=0.5, rounds=1)
    before = copy.deepcopy(strategy.state_dict())
    for wrong in ({"server": {"params.w": torch.ones(1)}, "seed": 1}, {"seed": 1}, {}):
        with pytest.raises(ValueError, match="state must be what"):
            strategy.load_state_dict(wrong)
        assert strategy.seed == before["seed"]
        assert_same(strategy.server.state_dict(), before["server"])


def test_flower_goes_on_from_a_state_dict(member: Member, clients) -> None:
    if member.make().has_final_exchange:
        pytest.skip("the exchange at the end of the first run has changed the model")
    first, grid, _ = under_flower(member, clients, fraction=0.5, rounds=1)
    _, _, params = under_flower(member, clients, fraction=0.5, rounds=1, grid=grid, state=first.state_dict())
    assert_same(params, under_flower(member, clients, fraction=0.5)[2])


def test_a_failing_node_is_left_out(member: Member, clients) -> None:
    app = to_client_app(member.make(), network, lambda i: clients[i])
    grid = LocalGrid(app, len(clients))
    grid.failing = {node for node, context in grid.contexts.items() if context.node_config["partition-id"] == 2}
    strategy, _, params = under_flower(member, clients, fraction=1.0, grid=grid)
    assert strategy.server.round == 2
    assert all(value.isfinite().all() for value in params.values())


def test_simulation_resumes_bit_exactly(member: Member, clients) -> None:
    whole = simulate(member.make(), network(), clients, rounds=4, fraction=0.5, generator=seeded())
    half = simulate(member.make(), network(), clients, rounds=2, fraction=0.5, generator=seeded())
    file = io.BytesIO()
    torch.save(half.state.state_dict(), file)
    file.seek(0)
    state = SimulationState.from_state_dict(torch.load(file, weights_only=True))
    rest = simulate(member.make(), network(), clients, rounds=2, fraction=0.5, state=state)
    assert_same(rest.state.server.state_dict(), whole.state.server.state_dict())
    assert rest.state.clients.keys() == whole.state.clients.keys()
    for i, memory in rest.state.clients.items():
        assert_same(memory, whole.state.clients[i])
    assert [r.participants for r in half.rounds + rest.rounds] == [r.participants for r in whole.rounds]


def test_the_generator_decides_everything(member: Member, clients) -> None:
    torch.manual_seed(0)
    one = simulate(member.make(), network(), clients, rounds=2, fraction=0.5, generator=seeded())
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    two = simulate(member.make(), network(), clients, rounds=2, fraction=0.5, generator=seeded())
    assert torch.equal(torch.random.get_rng_state(), before), "torch's global generator was drawn from"
    other = simulate(member.make(), network(), clients, rounds=2, fraction=0.5, generator=seeded(4))
    assert_same(one.state.server.state_dict(), two.state.server.state_dict())
    assert any(not torch.equal(v, other.state.server.params[k]) for k, v in one.state.server.params.items())


def test_reduces_to_its_baseline_when_switched_off(member: Member, clients) -> None:
    if member.off is None or member.baseline is None:
        pytest.skip("has no switch")
    off = simulate(member.off(), network(), clients, rounds=3, fraction=0.5, generator=seeded())
    base = simulate(member.baseline(), network(), clients, rounds=3, fraction=0.5, generator=seeded())
    assert_same(off.state.server.params, base.state.server.params)
    on = simulate(member.make(), network(), clients, rounds=3, fraction=0.5, generator=seeded())
    assert any(not torch.equal(v, base.state.server.params[k]) for k, v in on.state.server.params.items())


def test_states_and_messages_are_not_modified(member: Member, clients) -> None:
    algorithm, model = member.make(), network()
    server = algorithm.init_server(model, NUM_CLIENTS)
    server_before = copy.deepcopy(server.state_dict())
    updates = []
    for i, data in enumerate(clients):
        broadcast = algorithm.configure(server)
        client = algorithm.init_client(model, data)
        client_before, sent_before = copy.deepcopy(client), copy.deepcopy(broadcast.params)
        update, _ = algorithm.client_update(model, broadcast, client, data, generator=seeded(i))
        assert_same(client, client_before)
        assert_same(broadcast.params, sent_before)
        updates.append(update)
    updates_before = copy.deepcopy([update.params for update in updates])
    after = algorithm.aggregate(server, updates)
    assert after.round == server.round + 1
    assert_same(server.state_dict(), server_before)
    for update, before in zip(updates, updates_before, strict=True):
        assert_same(update.params, before)


def test_messages_hold_detached_tensors(member: Member, clients) -> None:
    algorithm, model = member.make(), network()
    broadcast = algorithm.configure(algorithm.init_server(model, NUM_CLIENTS))
    client = algorithm.init_client(model, clients[0])
    update, client = algorithm.client_update(model, broadcast, client, clients[0], generator=seeded())
    for tensors in (broadcast.params, broadcast.extras, update.params, update.extras, client):
        for value in tensors.values():
            assert isinstance(value, torch.Tensor)
            assert not value.requires_grad
            assert value.is_contiguous()
    kept = {name: value.clone() for name, value in update.params.items()}
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert_same(update.params, kept)


def test_batch_normalisation_buffers(member: Member, clients) -> None:
    algorithm, model = member.make(), network()
    server = algorithm.init_server(model, NUM_CLIENTS)
    updates = [
        algorithm.client_update(
            model, algorithm.configure(server), algorithm.init_client(model, data), data, generator=seeded(i)
        )[0]
        for i, data in enumerate(clients)
    ]
    params = algorithm.aggregate(server, updates).params
    assert params["0.1.num_batches_tracked"].dtype == torch.int64
    assert torch.equal(params["0.1.num_batches_tracked"], updates[0].params["0.1.num_batches_tracked"])
    sent = torch.stack([update.params["0.1.running_mean"] for update in updates])
    assert (sent.std(0) > 0).all()
    assert ((params["0.1.running_mean"] >= sent.amin(0)) & (params["0.1.running_mean"] <= sent.amax(0))).all()


def test_float64_and_frozen_parameters(member: Member, clients) -> None:
    model = network().double()
    frozen = model[0][0].requires_grad_(False).weight.detach().clone()
    data = [(x.double(), y) for x, y in clients]
    params = simulate(member.make(), model, data, rounds=2, generator=seeded()).state.server.params
    torch.testing.assert_close(params["0.0.weight"], frozen, rtol=1e-14, atol=0)  # averaging rounds
    assert params["1.weight"].dtype == torch.float64
    assert not torch.equal(params["1.weight"], network().double().state_dict()["1.weight"])


def test_a_client_without_samples_is_refused(member: Member) -> None:
    with pytest.raises(ValueError, match="data"):
        simulate(member.make(), network(), [(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long))], rounds=1)
