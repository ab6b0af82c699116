"""Flower's side of `trimtab.federated.flower`: the strategy, the client app, and the records between them.

The one module of the area that imports Flower; use it through `to_strategy` and `to_client_app`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
from torch import nn

from trimtab.federated.protocol import Algorithm, Broadcast, ServerState, Tensors, Update, sample_clients, stream
from trimtab.federated.simulation import load_params, recall

REPORT = "trimtab_report"
IDENTITY = "trimtab_identity"
MEMORY = "trimtab.client"
BEFORE = "trimtab.client.before"
ROUND = "trimtab.client.round"


class AlgorithmStrategy(Strategy):  # type: ignore[misc]
    """See `trimtab.federated.flower.to_strategy`."""

    def __init__(
        self,
        algorithm: Algorithm,
        model: nn.Module,
        num_clients: int | None,
        fraction: float,
        fraction_evaluate: float,
        seed: int,
    ) -> None:
        self.algorithm = algorithm
        self.model = model
        self.num_clients = num_clients
        self.fraction = fraction
        self.fraction_evaluate = fraction_evaluate
        self.seed = seed
        self.server: ServerState | None = None
        self._wait_for = num_clients or 1
        self._timeout: float | None = None
        self._clients: dict[int, int] = {}

    def state_dict(self) -> dict[str, Any]:
        """The server's state and the seed; fit for `torch.save` and `torch.load(weights_only=True)`."""
        return {"server": None if self.server is None else self.server.state_dict(), "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            ValueError: it is something else; the strategy is then as it was.
        """
        if missing := {"server", "seed"} - set(state):
            raise ValueError(f"state must be what state_dict() gave, got none of {sorted(missing)}")
        self.server = None if state["server"] is None else ServerState.from_state_dict(state["server"])
        self.seed = state["seed"]

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        nodes = self._nodes(grid)
        if self.server is None:
            load_params(self.model, tensors(arrays, self.model))
            self.server = self.algorithm.init_server(self.model, self.num_clients or len(nodes))
        chosen = sample_clients(len(nodes), self.fraction, stream(self.seed, self.server.round))
        return self._messages([nodes[i] for i in chosen], MessageType.TRAIN, config)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        contents = arrived(replies)
        if not contents or self.server is None:
            return None, None
        self.server = self.algorithm.aggregate(self.server, [to_update(content, self.model) for content in contents])
        weights = [RecordDict({"metrics": MetricRecord(shared_metrics(content))}) for content in contents]
        return ArrayRecord(self.server.params), aggregate_metricrecords(weights, "num-examples")

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        if not self.fraction_evaluate:
            return []
        nodes = self._nodes(grid)
        # Flower counts the rounds of this call of `start`; a run that goes on draws by those of the whole run.
        done = server_round if self.server is None else self.server.round
        chosen = sample_clients(len(nodes), self.fraction_evaluate, stream(self.seed, done, -2))
        return self._messages([nodes[i] for i in chosen], MessageType.EVALUATE, config)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        contents = arrived(replies)
        weights = [RecordDict({"metrics": MetricRecord(shared_metrics(content))}) for content in contents]
        return aggregate_metricrecords(weights, "num-examples") if contents else None

    def summary(self) -> None:
        """Nothing to add to what Flower logs."""

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        *args: Any,
        **kwargs: Any,
    ) -> Result:
        """Flower's rounds, and the algorithm's final exchange with all clients if it has one.

        No exchange waits longer than `timeout` seconds for replies, that about the clients' ids neither.
        """
        self._timeout = timeout
        result = super().start(grid, initial_arrays, num_rounds, timeout, *args, **kwargs)
        if self.server is not None and self.algorithm.has_final_exchange:
            asked = self._messages(self._nodes(grid), f"{MessageType.QUERY}.{REPORT}", ConfigRecord())
            replies = grid.send_and_receive(asked, timeout=self._timeout)
            reports = [to_update(content, self.model) for content in arrived(replies)]
            draws = stream(self.seed, self.server.round, -1)
            self.server = self.algorithm.finalize(self.model, self.server, reports, generator=draws)
            result.arrays = ArrayRecord(self.server.params)
        return result

    def _nodes(self, grid: Grid) -> list[int]:
        """The connected nodes in the order of their clients' ids; at the end those that do not tell theirs."""
        while len(nodes := list(grid.get_node_ids())) < self._wait_for:
            time.sleep(0.5)
        self._wait_for = 1  # a node that is lost later does not stop the run
        if strangers := [node for node in nodes if node not in self._clients]:
            kind, empty = f"{MessageType.QUERY}.{IDENTITY}", RecordDict()
            asked = [Message(empty, dst_node_id=node, message_type=kind) for node in strangers]
            for reply in grid.send_and_receive(asked, timeout=self._timeout):
                if reply.has_content():
                    self._clients[reply.metadata.src_node_id] = int(reply.content["metrics"]["client-id"])
        return sorted(nodes, key=lambda node: (node not in self._clients, self._clients.get(node, node), node))

    def _messages(self, nodes: Sequence[int], message_type: str, config: ConfigRecord) -> list[Message]:
        if self.server is None:
            raise RuntimeError("the strategy has no server state yet; it begins with configure_train")
        sent = self.algorithm.configure(self.server)
        settings = ConfigRecord({**config, "server-round": sent.round + 1, "seed": self.seed})
        content = RecordDict({"arrays": ArrayRecord(sent.params), "config": settings})
        if sent.extras:
            content["extras"] = ArrayRecord(sent.extras)
        return [Message(content, dst_node_id=node, message_type=message_type) for node in nodes]


def client_app(
    algorithm: Algorithm,
    model_fn: Callable[[], nn.Module],
    data_fn: Callable[[int], Any],
    evaluate_fn: Callable[[nn.Module, Any], Mapping[str, float]] | None,
) -> ClientApp:
    """See `trimtab.federated.flower.to_client_app`."""
    app = ClientApp()

    def respond(message: Message, context: Context, *, report: bool) -> Message:
        model, client_id = model_fn(), identity(context)
        broadcast, data = to_broadcast(message.content, model), data_fn(client_id)
        seed = int(message.content["config"].get("seed", 0))
        place = {"seed": seed, "round": broadcast.round}
        # A server that was stopped before it saved a round asks for it again: that begins with the memory of then.
        again = not report and dict(context.state.get(ROUND, {})) == place
        held = context.state.get(BEFORE if again else MEMORY)
        memory = recall(algorithm, model, broadcast, None if held is None else tensors(held, model), data)
        draws = stream(seed, broadcast.round, client_id)
        if report:
            update = algorithm.client_report(model, broadcast, memory, data, generator=draws)
        else:
            update, after = algorithm.client_update(model, broadcast, memory, data, generator=draws)
            context.state[BEFORE], context.state[MEMORY] = ArrayRecord(memory), ArrayRecord(after)
            context.state[ROUND] = ConfigRecord(place)
        metrics = {"num-examples": update.num_examples, "client-id": client_id, **update.metrics}
        content = RecordDict({"arrays": ArrayRecord(update.params), "metrics": MetricRecord(metrics)})
        if update.extras:
            content["extras"] = ArrayRecord(update.extras)
        return Message(content, reply_to=message)

    def train(message: Message, context: Context) -> Message:
        return respond(message, context, report=False)

    app.train()(train)

    def report(message: Message, context: Context) -> Message:
        return respond(message, context, report=True)

    app.query(REPORT)(report)

    def identify(message: Message, context: Context) -> Message:
        record = MetricRecord({"client-id": identity(context)})
        return Message(RecordDict({"metrics": record}), reply_to=message)

    app.query(IDENTITY)(identify)

    if evaluate_fn is not None:

        def evaluate(message: Message, context: Context) -> Message:
            model, client_id = model_fn(), identity(context)
            load_params(model, to_broadcast(message.content, model).params)
            measured = evaluate_fn(model.eval(), data_fn(client_id))
            metrics = MetricRecord({"num-examples": 1, "client-id": client_id, **measured})
            return Message(RecordDict({"metrics": metrics}), reply_to=message)

        app.evaluate()(evaluate)

    return app


def identity(context: Context) -> int:
    """The id of the client behind a node."""
    return int(context.node_config.get("partition-id", context.node_id))


def tensors(record: ArrayRecord, model: nn.Module) -> Tensors:
    """A record of arrays as tensors, on the model's device."""
    device = next((value.device for value in model.state_dict().values()), None)
    return {name: value.to(device) for name, value in record.to_torch_state_dict().items()}


def to_broadcast(content: RecordDict, model: nn.Module) -> Broadcast:
    """What a client reads from a message."""
    extras = tensors(content["extras"], model) if "extras" in content else {}
    return Broadcast(tensors(content["arrays"], model), extras, int(content["config"]["server-round"]) - 1)


def to_update(content: RecordDict, model: nn.Module) -> Update:
    """What the server reads from a reply."""
    extras = tensors(content["extras"], model) if "extras" in content else {}
    metrics = {name: float(value) for name, value in shared_metrics(content).items() if name != "num-examples"}
    return Update(tensors(content["arrays"], model), int(content["metrics"]["num-examples"]), extras, metrics)


def shared_metrics(content: RecordDict) -> dict[str, Any]:
    """A reply's metrics without the client's id."""
    return {name: value for name, value in content["metrics"].items() if name != "client-id"}


def arrived(replies: Iterable[Message]) -> list[RecordDict]:
    """Contents of the replies that are no errors, in the order of client ids."""
    contents = [reply.content for reply in replies if reply.has_content()]
    return sorted(contents, key=lambda content: int(content["metrics"]["client-id"]))
