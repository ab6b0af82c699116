r"""The form of a federated algorithm: pure halves for server and client, and the tensors that travel between them.

An algorithm never loops over rounds or clients. `simulate` drives the same object in one process and
`trimtab.federated.flower` drives it under Flower, with the same numbers.

One round:

    broadcast = algorithm.configure(server)                                                  # server
    update, client = algorithm.client_update(model, broadcast, client, data, generator=...)  # each participant
    server = algorithm.aggregate(server, updates)                                            # server
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from trimtab.ops.arguments import in_range

Tensors = dict[str, Tensor]
"""Named tensors, as in a module's `state_dict`."""

ClientState = Tensors
"""What one client remembers between its rounds."""


@dataclass(frozen=True)
class Broadcast:
    """What the server sends to every participant of a round.

    Attributes:
        params: state dict of the global model.
        extras: whatever else the algorithm shares.
        round: rounds finished so far; 0 in the first.
    """

    params: Tensors
    extras: Tensors = field(default_factory=dict)
    round: int = 0


@dataclass(frozen=True)
class Update:
    """What a participant sends back.

    Attributes:
        params: state dict of the local model; empty for algorithms that share something else.
        num_examples: size of the client's data, the usual weight in an average.
        extras: whatever else the algorithm shares.
        metrics: numbers for the log; `gradients` counts evaluated mini-batch gradients.
    """

    params: Tensors
    num_examples: int
    extras: Tensors = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ServerState:
    """What the server remembers between rounds.

    Attributes:
        params: state dict of the global model.
        memory: whatever else the algorithm keeps.
        round: rounds finished so far.

    Example:
        >>> state = ServerState({"w": torch.ones(2)}, {"mean": torch.zeros(2)}, round=3)
        >>> sorted(state.state_dict())
        ['memory.mean', 'params.w', 'round']
        >>> ServerState.from_state_dict(state.state_dict()).round
        3
    """

    params: Tensors
    memory: Tensors = field(default_factory=dict)
    round: int = 0

    def state_dict(self) -> Tensors:
        """All of it as one flat dict of tensors."""
        parts = {"params": self.params, "memory": self.memory}
        flat = {f"{part}.{name}": value for part, tensors in parts.items() for name, value in tensors.items()}
        return flat | {"round": torch.tensor(self.round)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> ServerState:
        """The inverse of `state_dict`."""

        def part(prefix: str) -> Tensors:
            return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

        if "round" not in state:
            raise ValueError(f"state must be what ServerState.state_dict() gave, got the names {sorted(state)}")
        return cls(part("params."), part("memory."), int(state["round"]))


class Algorithm(Protocol):
    """A federated algorithm. Its attributes are constants; everything that changes is in the states.

    `init_server`, `client_update` and `aggregate` make an algorithm; the rest has a usual answer. `data` is whatever
    a client holds: the algorithms here take a pair (x, y) of tensors.

    Attributes:
        has_final_exchange: whether `client_report` and `finalize` run after the last round.
    """

    has_final_exchange: ClassVar[bool] = False

    def init_server(self, model: nn.Module, num_clients: int) -> ServerState:
        """The server before the first round.

        Args:
            model: holds the initial parameters.
            num_clients: all clients of the federation, participating or not.
        """
        ...

    def init_client(self, model: nn.Module, data: Any) -> ClientState:
        """A client before its first round, with what it received loaded in `model`; no memory by default."""
        return {}

    def configure(self, server: ServerState) -> Broadcast:
        """What the participants of the next round receive."""
        return Broadcast(server.params, round=server.round)

    def client_update(
        self, model: nn.Module, broadcast: Broadcast, client: ClientState, data: Any, *, generator: torch.Generator
    ) -> tuple[Update, ClientState]:
        """One participant's work.

        Args:
            model: an instance to work in; whatever it holds is overwritten.
            broadcast: what the server sent; not to be modified.
            client: the client's memory; not to be modified.
            data: the client's data.
            generator: decides every random draw; differs by round and client.

        Returns:
            What goes to the server, and the client's new memory.
        """
        ...

    def aggregate(self, server: ServerState, updates: Sequence[Update]) -> ServerState:
        """The server after a round, with `round` one higher.

        Args:
            server: the state before.
            updates: one per participant in the order of client ids, so that sums do not depend on who came first.
        """
        ...

    def client_report(
        self, model: nn.Module, broadcast: Broadcast, client: ClientState, data: Any, *, generator: torch.Generator
    ) -> Update:
        """What every client sends after the last round, if `has_final_exchange`."""
        wanted = f"{type(self).__name__} has a final exchange and must define client_report"
        raise NotImplementedError(wanted)

    def finalize(
        self, model: nn.Module, server: ServerState, reports: Sequence[Update], *, generator: torch.Generator
    ) -> ServerState:
        """The server after the reports of all clients, if `has_final_exchange`."""
        wanted = f"{type(self).__name__} has a final exchange and must define finalize"
        raise NotImplementedError(wanted)


def stream(seed: int, *place: int) -> torch.Generator:
    """A CPU generator fixed by a run's seed and a place in it, such as (round, client id).

    Draws depend on where they are made and not on what ran before, so that clients may run in any order, anywhere,
    and a run may be resumed.

    Example:
        >>> stream(0, 1, 2).initial_seed() == stream(0, 1, 2).initial_seed() != stream(0, 2, 1).initial_seed()
        True
    """
    digest = hashlib.blake2b(repr((seed, *place)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def draw_seed(generator: torch.Generator | None) -> int:
    """The seed of a run, from the user's generator; torch's global one without it."""
    return int(torch.randint(2**62, (), generator=generator))


def sample_clients(num_clients: int, fraction: float, generator: torch.Generator) -> list[int]:
    """Participants of a round: `max(1, round(fraction * num_clients))` ids without replacement, in ascending order."""
    count = max(1, round(fraction * num_clients))
    return sorted(torch.randperm(num_clients, generator=generator)[:count].tolist())


def check_fraction(fraction: float, name: str = "fraction") -> None:
    """Refuse a share of the clients outside (0, 1]."""
    in_range(name, fraction, 0, 1, "right")
