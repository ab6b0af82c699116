"""A federation in one process: the rounds of an algorithm over clients that are only data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from trimtab.federated.protocol import (
    Algorithm,
    Broadcast,
    ClientState,
    ServerState,
    Tensors,
    Update,
    check_fraction,
    draw_seed,
    sample_clients,
    stream,
)
from trimtab.ops.arguments import integer

Evaluate = Callable[[nn.Module, "SimulationState"], Mapping[str, float]]
"""Numbers of the global model, which is loaded and in eval mode; the state has the clients' memories too."""


@dataclass(frozen=True)
class SimulationState:
    """A federation between two rounds; all that a run needs to go on.

    Attributes:
        server: the server's state.
        clients: memory of each client that has taken part, by id.
        seed: decides every draw of the run, together with the round.
    """

    server: ServerState
    clients: dict[int, ClientState]
    seed: int

    def state_dict(self) -> dict[str, Any]:
        """As nested dicts of tensors and integers; fit for `torch.save` and `torch.load(weights_only=True)`."""
        return {"server": self.server.state_dict(), "clients": dict(self.clients), "seed": self.seed}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> SimulationState:
        """The inverse of `state_dict`."""
        if missing := {"server", "clients", "seed"} - set(state):
            raise ValueError(f"state must be what SimulationState.state_dict() gave, got none of {sorted(missing)}")
        return cls(ServerState.from_state_dict(state["server"]), dict(state["clients"]), state["seed"])


@dataclass(frozen=True)
class Round:
    """What happened in one round.

    Attributes:
        participants: client ids, ascending.
        metrics: what each participant reported, in the same order.
        bytes_down, bytes_up: size of all tensors sent to and by the participants.
        evaluation: what `evaluate` returned.
    """

    participants: list[int]
    metrics: list[Mapping[str, float]]
    bytes_down: int
    bytes_up: int
    evaluation: Mapping[str, float]


@dataclass(frozen=True)
class History:
    """A finished simulation.

    Attributes:
        state: from which `simulate` may go on.
        rounds: one entry per round of this call.
    """

    state: SimulationState
    rounds: list[Round] = field(default_factory=list)

    def curve(self, name: str) -> list[float]:
        """An evaluation's number over the rounds."""
        return [entry.evaluation[name] for entry in self.rounds]


def simulate(
    algorithm: Algorithm,
    model: nn.Module,
    clients: Sequence[Any],
    *,
    rounds: int,
    fraction: float = 1.0,
    generator: torch.Generator | None = None,
    evaluate: Evaluate | None = None,
    state: SimulationState | None = None,
) -> History:
    """Run a federated algorithm in this process.

    The same generator gives the same numbers, whether the run is done in one call or in several.

    Args:
        algorithm: what server and clients do.
        model: holds the initial parameters, serves as every client's model, and on return holds the global model. Its
            parts are then in the modes that they came in, after an error too.
        clients: the data of each client, in the form that the algorithm takes; ids are positions.
        rounds: rounds to run in this call.
        fraction: share of the clients that take part in a round, drawn anew each time.
        generator: seeds the run; torch's global one by default. Not used when going on from a `state`.
        evaluate: called after each round.
        state: of an earlier run to go on from.

    Returns:
        The final state and a record of each round.

    Raises:
        ValueError: `clients` is empty, or `rounds` or `fraction` is out of range.

    Example:
        >>> from trimtab.federated import FedAvg, simulate
        >>> clients = [(torch.randn(20, 4), torch.randint(3, (20,))) for _ in range(10)]
        >>> model = nn.Linear(4, 3)
        >>> history = simulate(FedAvg(lr=0.1), model, clients, rounds=3, fraction=0.5, generator=torch.Generator())
        >>> [len(entry.participants) for entry in history.rounds]
        [5, 5, 5]
    """
    if not clients:
        raise ValueError("clients must be at least one, got none")
    integer("rounds", rounds, 0)
    check_fraction(fraction)
    if state is None:
        state = SimulationState(algorithm.init_server(model, len(clients)), {}, draw_seed(generator))
    server, memories, seed = state.server, dict(state.clients), state.seed
    records: list[Round] = []
    with modes_kept(model):
        for _ in range(rounds):
            participants = sample_clients(len(clients), fraction, stream(seed, server.round))
            broadcast = algorithm.configure(server)
            updates = []
            for i in participants:
                memory = recall(algorithm, model, broadcast, memories.get(i), clients[i])
                draws = stream(seed, broadcast.round, i)
                try:
                    update, memories[i] = algorithm.client_update(model, broadcast, memory, clients[i], generator=draws)
                except Exception as error:
                    error.add_note(f"in the update of client {i}")
                    raise
                updates.append(update)
            server = algorithm.aggregate(server, updates)
            load_params(model, server.params)
            evaluation: Mapping[str, float] = {}
            if evaluate is not None:
                evaluation = evaluate(model.eval(), SimulationState(server, dict(memories), seed))
            records.append(
                Round(
                    participants,
                    [update.metrics for update in updates],
                    num_bytes(broadcast) * len(participants),
                    sum(map(num_bytes, updates)),
                    evaluation,
                )
            )
    return History(SimulationState(server, memories, seed), records)


def finish(algorithm: Algorithm, model: nn.Module, clients: Sequence[Any], state: SimulationState) -> SimulationState:
    """The exchange after the last round, for algorithms that have one; the others return `state` as it is.

    Args:
        algorithm: of the run.
        model: serves as every client's model, and on return holds the finished global model.
        clients: as given to `simulate`; all of them take part.
        state: of the finished run.
    """
    if not algorithm.has_final_exchange:
        return state
    server, broadcast = state.server, algorithm.configure(state.server)
    reports = [
        algorithm.client_report(
            model,
            broadcast,
            recall(algorithm, model, broadcast, state.clients.get(i), data),
            data,
            generator=stream(state.seed, server.round, i),
        )
        for i, data in enumerate(clients)
    ]
    server = algorithm.finalize(model, server, reports, generator=stream(state.seed, server.round, -1))
    load_params(model, server.params)
    return SimulationState(server, state.clients, state.seed)


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Puts every part of a model back into the mode it was in, after an error too."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def num_bytes(sent: Broadcast | Update) -> int:
    """Size of the tensors in a message."""
    parts: tuple[Tensors, ...] = (sent.params, sent.extras)
    return sum(value.numel() * value.element_size() for part in parts for value in part.values())


def recall(
    algorithm: Algorithm, model: nn.Module, broadcast: Broadcast, memory: ClientState | None, data: Any
) -> ClientState:
    """A client's memory, made on its first call."""
    if memory is not None:
        return memory
    load_params(model, broadcast.params)
    return algorithm.init_client(model, data)


def load_params(model: nn.Module, params: Tensors) -> None:
    """Load a state dict, if there is one: some algorithms share no parameters."""
    if params:
        model.load_state_dict(params)
