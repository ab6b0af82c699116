"""Federated rules across processes: a server and its clients, each a process of its own, on loopback.

Server and clients are what `to_strategy` and `to_client_app` give, and what they exchange are Flower's messages,
serialised by Flower. The transport is the smallest that can fail as a network does: a socket to each client, through
which the server's grid sends a message and waits for the reply. One run at the end, made where TRIMTAB_FLOWER is set,
goes through Flower's own SuperLink, SuperNodes and `flwr run` instead; these start a new interpreter for every message,
and notice a dead client only after a minute without heartbeats.

A client that a message reached and whose connection broke counts as Flower counts it: its reply is an error, and its
node is no longer listed. A client whose server is gone looks for it until it is there again.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import logging
import multiprocessing as mp
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path

import pytest
import torch
from torch import nn

from trimtab.federated import (
    CCVR,
    SCAFFOLD,
    Algorithm,
    FedAvg,
    FedSpeed,
    FlagAggregator,
    RobustFedAvg,
    ServerState,
    coordinate_median,
    krum,
    simulate,
    to_client_app,
    to_strategy,
)

pytest.importorskip("flwr")
if "forkserver" not in mp.get_all_start_methods():
    pytest.skip("processes are forked from a server that has imported torch once", allow_module_level=True)

NUM_CLIENTS = 5
ROUNDS = 4
LIMIT = 240.0  # seconds until a wait gives up, and in which a process ends even if nobody stops it
RULES: dict[str, Callable[[], Algorithm]] = {
    "fedavg": lambda: FedAvg(lr=0.1, local_epochs=2, batch_size=4, momentum=0.5),
    "scaffold": lambda: SCAFFOLD(lr=0.1, batch_size=4),  # server and clients remember
    "fedspeed": lambda: FedSpeed(lr=0.1, batch_size=4),  # the clients do
    "coordinate median": lambda: RobustFedAvg(coordinate_median, lr=0.1, batch_size=4),
    "krum": lambda: RobustFedAvg(functools.partial(krum, byzantine=1), lr=0.1, batch_size=4),
    "flag aggregator": lambda: RobustFedAvg(FlagAggregator(rescale="median_norm"), lr=0.1, batch_size=4),
}
PROCESSES = mp.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pytest", "torch", "trimtab.federated.flower_nodes"])


def network() -> nn.Module:
    """Dropout, so that there is a draw in every step that two runs could differ in."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))


def client_data(client: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes that a network can tell apart; clients differ in size and in the share of the classes."""
    draw = torch.Generator().manual_seed(client)
    y = (torch.rand(8 + 4 * client, generator=draw) < 0.3 + 0.1 * client).long()
    return torch.randn(len(y), 4, generator=draw) - 2 * y[:, None], y


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


# Both ends of the wire.


def begin_process() -> None:
    signal.alarm(int(LIMIT))
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    stamp_messages()


def stamp_messages() -> None:
    # Recent versions of Flower stamp messages with the task that sends them.
    if importlib.util.find_spec("flwr.supercore.task_identity"):
        identity = importlib.import_module("flwr.supercore.task_identity").TaskIdentity
        identity.task_id, identity.run_id, identity.node_id = 1, 1, 1


def to_bytes(message) -> bytes:
    from flwr.common.serde import message_to_proto

    return message_to_proto(message).SerializeToString()


def from_bytes(data: bytes):
    from flwr.common.serde import message_from_proto
    from flwr.proto.message_pb2 import Message

    return message_from_proto(Message.FromString(data))


class Loopback:
    """Flower's grid as a strategy uses it, over one socket to each node."""

    def __init__(self, port: int) -> None:
        self.listener = Listener(("127.0.0.1", port), backlog=2 * NUM_CLIENTS)
        self.port: int = self.listener.address[1]
        self.nodes: dict[int, Connection] = {}
        threading.Thread(target=self.admit, daemon=True).start()

    def admit(self) -> None:
        while True:
            connection = self.listener.accept()
            self.nodes[int.from_bytes(connection.recv_bytes())] = connection

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def send_and_receive(self, messages, *, timeout=None):
        from flwr.app import Error, Message

        waiting, replies = {}, []
        for message in messages:
            connection = self.nodes[message.metadata.dst_node_id]
            waiting[connection] = message
            with contextlib.suppress(OSError):  # reading will say the same
                connection.send_bytes(to_bytes(message))
        while waiting:
            for connection in wait(list(waiting)):  # in the order of arrival
                message = waiting.pop(connection)
                try:
                    replies.append(from_bytes(connection.recv_bytes()))
                except (EOFError, OSError):
                    del self.nodes[message.metadata.dst_node_id]
                    replies.append(Message(Error(0, "connection lost"), reply_to=message))
        return replies


def be_server(
    rule: str, fraction: float, saved: Path, port: int, stop: tuple[str, int] | None, test: Connection
) -> None:
    """Runs the strategy from where the saved state is, saves it after each round, and tells the test about it.

    At the place named by `stop` it waits, to be killed there: "saved" or "unsaved", and the round.
    """
    from flwr.app import ArrayRecord

    begin_process()
    grid = Loopback(port)
    test.send(grid.port)
    strategy = to_strategy(RULES[rule](), network(), num_clients=NUM_CLIENTS, fraction=fraction, generator=seeded())
    if saved.exists():
        strategy.load_state_dict(torch.load(saved, weights_only=True))
    done = 0 if strategy.server is None else strategy.server.round

    def after_round(number: int, _: ArrayRecord) -> None:
        if number:
            pause_at("unsaved", number + done)
            torch.save(strategy.state_dict(), saved.with_suffix(".part"))
            saved.with_suffix(".part").replace(saved)
            pause_at("saved", number + done)

    def pause_at(place: str, number: int) -> None:
        if stop == (place, number):
            test.send(stop)
            test.recv()

    initial = ArrayRecord(network().state_dict())
    strategy.start(grid, initial, num_rounds=ROUNDS - done, evaluate_fn=after_round)
    test.send("finished")


def be_client(client: int, rule: str, port: int, fault: tuple[str, int] | None, test: Connection) -> None:
    """Answers the server, and looks for it again where the connection is lost, for as long as the process lives.

    With the fault "holds" it keeps the training message of that round and never answers; with "byzantine" it sends huge
    parameters from that round on.
    """
    from flwr.app import ArrayRecord, Context, RecordDict

    begin_process()
    node = 1000 + 7 * ((client + 2) % NUM_CLIENTS)  # in another order than the clients
    app = to_client_app(RULES[rule](), network, client_data)
    context = Context(1, node, {"partition-id": client}, RecordDict(), {})
    while True:
        try:
            with Client(("127.0.0.1", port)) as server:
                server.send_bytes(node.to_bytes(8))
                while True:
                    message = from_bytes(server.recv_bytes())
                    reply = app(message, context)
                    if fault is not None and message.metadata.message_type == "train":
                        kind, first = fault
                        number = int(message.content["config"]["server-round"])
                        if kind == "holds" and number == first:
                            test.send(fault)
                            test.recv()
                        if kind == "byzantine" and number >= first:
                            sent = reply.content["arrays"].to_torch_state_dict()
                            wrong = {name: torch.full_like(value, 1e6) for name, value in sent.items()}
                            reply.content["arrays"] = ArrayRecord(wrong)
                    server.send_bytes(to_bytes(reply))
        except (EOFError, OSError):
            if test.poll(0.02):  # nobody says when there will be a server again, but the test may have ended
                return


# The test's side.


class Federation:
    """The processes of one run."""

    def __init__(self, saved: Path, rule: str, fraction: float = 1.0) -> None:
        self.saved, self.rule, self.fraction = saved, rule, fraction
        self.port = 0
        self.processes: list[Process] = []

    def server(self, stop: tuple[str, int] | None = None) -> Process:
        started = self.start(be_server, self.rule, self.fraction, self.saved, self.port, stop)
        self.port = started.next_word()
        return started

    def clients(self, **faults: tuple[str, int]) -> list[Process]:
        """All clients; `client_2=("holds", 1)` gives one a fault."""
        return [self.start(be_client, i, self.rule, self.port, faults.get(f"client_{i}")) for i in range(NUM_CLIENTS)]

    def start(self, work: Callable[..., None], *arguments: object) -> Process:
        here, there = PROCESSES.Pipe()
        process = PROCESSES.Process(target=work, args=(*arguments, there), daemon=True)
        process.start()
        there.close()
        self.processes.append(Process(process, here))
        return self.processes[-1]

    def state(self) -> ServerState:
        return ServerState.from_state_dict(torch.load(self.saved, weights_only=True)["server"])

    def end(self) -> None:
        for started in self.processes:
            started.process.kill()
        for started in self.processes:
            started.process.join(LIMIT)


class Process:
    """A process and the words that it sends to the test."""

    def __init__(self, process: mp.process.BaseProcess, words: Connection) -> None:
        self.process, self.words = process, words

    def next_word(self) -> object:
        """The next word; where the process has ended an EOFError."""
        assert self.words.poll(LIMIT), "the process said nothing"
        return self.words.recv()

    def kill(self) -> None:
        self.process.kill()
        self.process.join(LIMIT)
        assert self.process.exitcode == -signal.SIGKILL


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Callable[..., Federation]]:
    begun: list[Federation] = []

    def begin(rule: str, fraction: float = 1.0) -> Federation:
        begun.append(Federation(tmp_path / f"server{len(begun)}.pt", rule, fraction))
        return begun[-1]

    yield begin
    for each in begun:
        each.end()


def in_one_process(rule: str, fraction: float = 1.0, rounds: int = ROUNDS, clients: int = NUM_CLIENTS, state=None):
    data = [client_data(i) for i in range(clients)]
    return simulate(
        RULES[rule](), network(), data, rounds=rounds, fraction=fraction, generator=seeded(), state=state
    ).state


def assert_same(a: ServerState, b: ServerState) -> None:
    assert a.round == b.round
    for one, other in ((a.params, b.params), (a.memory, b.memory)):
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name], other[name]), name


def accuracy(params: dict[str, torch.Tensor]) -> float:
    model = network().eval()
    model.load_state_dict(params)
    x, y = map(torch.cat, zip(*[client_data(i) for i in range(NUM_CLIENTS)], strict=True))
    return (model(x).argmax(1) == y).float().mean().item()


@pytest.mark.parametrize(("fraction", "runs"), [(1.0, 1), (0.5, 2)])
@pytest.mark.parametrize("rule", ["fedavg", "scaffold"])
def test_processes_end_with_the_bits_of_one_process(federation, rule: str, fraction: float, runs: int) -> None:
    """In every run, whatever the order in which processes start, connect and answer."""
    expected = in_one_process(rule, fraction).server
    for _ in range(runs):
        run = federation(rule, fraction)
        server = run.server()
        run.clients()
        assert server.next_word() == "finished"
        assert_same(run.state(), expected)


@pytest.mark.parametrize("place", ["saved", "unsaved"])
@pytest.mark.parametrize("rule", ["fedavg", "scaffold", "fedspeed"])
def test_a_killed_server_goes_on_from_its_saved_state(federation, rule: str, place: str) -> None:
    """Killed before it saved a round, it asks the clients for that round again, though they remember having done it."""
    run = federation(rule, 0.5)
    server = run.server(stop=(place, 2))
    run.clients()
    assert server.next_word() == (place, 2)
    server.kill()
    assert run.state().round == (2 if place == "saved" else 1)
    assert run.server().next_word() == "finished"
    assert_same(run.state(), in_one_process(rule, 0.5).server)


@pytest.mark.parametrize("rule", ["fedavg", "scaffold"])
def test_the_round_goes_on_without_a_client_that_dies(federation, rule: str) -> None:
    run = federation(rule)
    server = run.server()
    lost = run.clients(client_4=("holds", 3))[4]
    assert lost.next_word() == ("holds", 3)
    lost.kill()
    assert server.next_word() == "finished"
    before = in_one_process(rule, rounds=2)
    assert_same(run.state(), in_one_process(rule, rounds=ROUNDS - 2, clients=4, state=before).server)


@pytest.mark.parametrize("rule", ["fedavg", "coordinate median", "krum", "flag aggregator"])
def test_a_byzantine_client_spoils_the_mean_alone(federation, rule: str) -> None:
    run = federation(rule)
    server = run.server()
    run.clients(client_1=("byzantine", 1))
    assert server.next_word() == "finished"
    params = run.state().params
    largest = max(value.abs().max().item() for value in params.values())
    if rule == "fedavg":
        assert largest > 1e4
    else:
        assert largest < 10
        assert accuracy(params) > accuracy(network().state_dict()) + 0.2


def test_every_exchange_keeps_to_the_time_limit() -> None:
    """Also the question for the clients' ids and the exchange after the last round."""
    from flwr.app import ArrayRecord, Context, RecordDict

    stamp_messages()
    algorithm = CCVR(FedAvg(lr=0.1, batch_size=4), per_class=8, epochs=1, head="3")
    app, limits = to_client_app(algorithm, network, client_data), []
    contexts = {7 + i: Context(1, 7 + i, {"partition-id": i}, RecordDict(), {}) for i in range(NUM_CLIENTS)}

    class Grid:
        def get_node_ids(self):
            return list(contexts)

        def send_and_receive(self, messages, *, timeout=None):
            limits.append(timeout)
            return [app(message, contexts[message.metadata.dst_node_id]) for message in messages]

    to_strategy(algorithm, network(), num_clients=NUM_CLIENTS, generator=seeded()).start(
        Grid(), ArrayRecord(network().state_dict()), num_rounds=1, timeout=9.0
    )
    assert limits == [9.0] * 4  # ids, training, evaluation by nobody, reports


# Through Flower's own processes.

PROJECT = """
[project]
name = "loopback"
version = "1.0.0"
description = "A federation on loopback"
license = "MIT"
dependencies = []

[tool.flwr.app]
publisher = "trimtab"

[tool.flwr.app.components]
serverapp = "loopback.apps:server"
clientapp = "loopback.apps:client"
"""
APPS = """
import importlib.util

import torch
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp

spec = importlib.util.spec_from_file_location("shared", {shared!r})
shared = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shared)
rule = shared.RULES["scaffold"]
client = shared.to_client_app(rule(), shared.network, shared.client_data)
server = ServerApp()


@server.main()
def main(grid, context):
    strategy = shared.to_strategy(rule(), shared.network(), num_clients=2, generator=shared.seeded())
    strategy.start(grid, ArrayRecord(shared.network().state_dict()), num_rounds=2)
    torch.save(strategy.state_dict(), {saved!r})
"""
CONNECTION = """
[superlink]
default = "loopback"

[superlink.loopback]
address = "127.0.0.1:{port}"
insecure = true
"""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a command of Flower's; in the end kills it and whatever processes it has started."""
    home = tmp_path / "flower"
    home.mkdir()
    commands = Path(sys.executable).parent
    environment = os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
    }
    started: list[subprocess.Popen[bytes]] = []

    def start(name: str, *arguments: object) -> subprocess.Popen[bytes]:
        command = [str(commands / name), *map(str, arguments)]
        with (home / f"{name}-{len(started)}.log").open("wb") as log:
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait(LIMIT)
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"FLWR_HOME={home}".encode() in entry.read_bytes().split(b"\0"):
                os.kill(int(entry.parent.name), signal.SIGKILL)


@pytest.mark.skipif("TRIMTAB_FLOWER" not in os.environ, reason="half a minute of CPU: set TRIMTAB_FLOWER=1 to run it")
@pytest.mark.timeout(4 * LIMIT)
def test_flowers_own_processes_end_with_the_bits_of_one_process(flower, tmp_path: Path) -> None:
    """Two rounds of a rule whose clients remember, each message in a new interpreter."""
    if tuple(map(int, importlib.metadata.version("flwr").split(".")[:2])) < (1, 41):
        pytest.skip("the commands of earlier versions of Flower take other options")
    link, *nodes = free_ports(3)
    saved, app = tmp_path / "server.pt", tmp_path / "app"
    (app / "loopback").mkdir(parents=True)
    (app / "pyproject.toml").write_text(PROJECT)
    (app / "loopback" / "__init__.py").touch()
    (app / "loopback" / "apps.py").write_text(APPS.format(shared=__file__, saved=str(saved)))
    (tmp_path / "flower" / "config.toml").write_text(CONNECTION.format(port=link))
    local = ("--insecure", "--host", "127.0.0.1", "--port")
    superlink = flower("flower-superlink", *local, link, "--disable-runtime-dependency-installation")
    for client, port in enumerate(nodes):
        own = ("--superlink", f"127.0.0.1:{link}", "--node-config", f"partition-id={client}")
        flower("flower-supernode", *local, port, *own)
    until = time.monotonic() + LIMIT
    while socket.socket().connect_ex(("127.0.0.1", link)):
        assert superlink.poll() is None, "the SuperLink has ended"
        assert time.monotonic() < until, "the SuperLink does not listen"
        time.sleep(0.1)
    flower("flwr", "run", app, "loopback", "--stream").wait(2 * LIMIT)
    logs = {path.name: path.read_text()[-2000:] for path in (tmp_path / "flower").glob("*.log")}
    assert saved.exists(), logs
    found = ServerState.from_state_dict(torch.load(saved, weights_only=True)["server"])
    assert_same(found, in_one_process("scaffold", rounds=2, clients=2).server)
