"""Run a federated algorithm under Flower (`pip install "trimtab[federated]"`), on real or simulated nodes.

    strategy = to_strategy(FedSpeed(lr=0.1), model, num_clients=100, fraction=0.1)      # in the server app
    app = to_client_app(FedSpeed(lr=0.1), make_model, load_client)                      # the client app

The messages carry the records that Flower's own strategies use, so a client whose algorithm shares parameters alone
(FedAvg, FedProx) also works under those, such as `Krum`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trimtab.federated.protocol import Algorithm, check_fraction, draw_seed
from trimtab.ops.arguments import integer

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp

    from trimtab.federated.flower_nodes import AlgorithmStrategy


def to_strategy(
    algorithm: Algorithm,
    model: nn.Module,
    *,
    num_clients: int | None = None,
    fraction: float = 1.0,
    fraction_evaluate: float = 0.0,
    generator: torch.Generator | None = None,
) -> AlgorithmStrategy:
    """The server half of an algorithm as a Flower strategy (message API).

    Participants are drawn as in `simulate`, from the clients in the order of their ids, which their nodes are asked for
    once: Flower draws the nodes' own ids anew in each run, and would make it irreproducible. Updates are summed in that
    order too, never in that of arrival; a participant that fails is left out of its round. `state_dict()` and
    `load_state_dict()` let a run go on; without that `start` begins with its `initial_arrays`.

    Args:
        algorithm: what the server does.
        model: gives the form of the parameters; a scratch space.
        num_clients: all clients of the federation, awaited before the first round; those connected by then if not
            given, so that a run that goes on from a state need not wait for clients that are lost.
        fraction: share of the clients that take part in a round.
        fraction_evaluate: share of the clients that evaluate the model after a round.
        generator: seeds the run; torch's global one by default.

    Raises:
        ImportError: Flower is not installed.
        ValueError: `num_clients` or a fraction is out of range.
    """
    check_fraction(fraction)
    if fraction_evaluate:
        check_fraction(fraction_evaluate, name="fraction_evaluate")
    if num_clients is not None:
        integer("num_clients", num_clients)
    try:
        from trimtab.federated.flower_nodes import AlgorithmStrategy
    except ModuleNotFoundError as error:
        raise ImportError('to_strategy needs Flower: pip install "trimtab[federated]"') from error
    return AlgorithmStrategy(algorithm, model, num_clients, fraction, fraction_evaluate, draw_seed(generator))


def to_client_app(
    algorithm: Algorithm,
    model_fn: Callable[[], nn.Module],
    data_fn: Callable[[int], Any],
    *,
    evaluate_fn: Callable[[nn.Module, Any], Mapping[str, float]] | None = None,
) -> ClientApp:
    """The client half of an algorithm as a Flower client app.

    The client id is the node's `partition-id`, which Flower's simulation sets, or else its node id. What a client
    remembers between rounds is kept in the node's `context.state` and never leaves it, together with what it remembered
    a round earlier: a server that stopped before it had saved a round asks for that round again and gets the same
    replies. A new `flwr run` finds these memories gone, as Flower keeps them for a run.

    Args:
        algorithm: what the clients do; the same as the server's.
        model_fn: makes a model of the right form; its values do not matter.
        data_fn: the data of a client, from its id.
        evaluate_fn: numbers of the global model on a client's data, for strategies that ask; may name "num-examples",
            by which they are weighted.

    Raises:
        ImportError: Flower is not installed.
    """
    try:
        from trimtab.federated.flower_nodes import client_app
    except ModuleNotFoundError as error:
        raise ImportError('to_client_app needs Flower: pip install "trimtab[federated]"') from error
    return client_app(algorithm, model_fn, data_fn, evaluate_fn)
