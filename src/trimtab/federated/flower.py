"""Run a federated algorithm under Flower (`pip install "trimtab[federated]"`), on real or simulated nodes.

    strategy = to_strategy(FedSpeed(lr=0.1), model, num_clients=100, fraction=0.1)
    app = to_client_app(FedSpeed(lr=0.1), make_model, load_client)

The messages carry the records that Flower's own strategies use ("arrays", "config", "metrics" with "num-examples"), so
a client whose algorithm needs no extras (FedAvg, FedProx) also works under Flower's own, such as `Krum`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.federated.protocol import (
    Algorithm,
    Broadcast,
    ServerState,
    Tensors,
    Update,
    check_fraction,
    draw_seed,
    sample_clients,
    stream,
)
from trimtab.federated.simulation import load_params

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import Strategy

REPORT = "query.trimtab_report"
"""Type of the messages of the exchange after the last round."""


def to_strategy(
    algorithm: Algorithm,
    model: nn.Module,
    *,
    num_clients: int | None = None,
    fraction: float = 1.0,
    fraction_evaluate: float = 0.0,
    generator: torch.Generator | None = None,
) -> Strategy:
    """The server half of an algorithm as a Flower strategy (message API).

    Participants are drawn as in `simulate`, from the node ids in ascending order. Updates are summed in the order of
    client ids, never of arrival. A participant that fails is left out of its round. The strategy has `state_dict()` and
    `load_state_dict()`, by which a run may go on; `start` begins with `initial_arrays` where nothing was loaded.

    Args:
        algorithm: what the server does.
        model: gives the form of the parameters; serves as scratch space.
        num_clients: clients to wait for before a round; those connected at the first round by default.
        fraction: share of the clients that take part in a round.
        fraction_evaluate: share of the clients that evaluate the model after a round.
        generator: seeds the run; torch's global one by default.

    Raises:
        ImportError: Flower is not installed.
        ValueError: `num_clients` or a fraction is out of range.
    """
    check_fraction(fraction)
    if fraction_evaluate:
        check_fraction(fraction_evaluate)
    if num_clients is not None and num_clients < 1:
        raise ValueError(f"num_clients must be at least 1, got {num_clients}")
    flwr = _flower()
    return _strategy_class()(algorithm, model, num_clients, fraction, fraction_evaluate, draw_seed(generator), flwr)
