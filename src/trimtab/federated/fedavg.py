r"""FedAvg and FedProx: clients train the global model on their own data, the server averages what they send.

The baseline of every federated method here. With `prox > 0` the client is FedProx's, pulled towards the model that it
received, which keeps clients with very different data together.

$$
w_{t+1} = \sum_{i \in S_t} \frac{n_i}{\sum_{j \in S_t} n_j}\, w_{i,K}, \qquad
w_{i,k+1} = w_{i,k} - \eta\,\big[\nabla L_i(w_{i,k}) + \mu\,(w_{i,k} - w_t)\big]
$$

References:
    H. Brendan McMahan, Eider Moore, Daniel Ramage, Seth Hampson, Blaise Agüera y Arcas: Communication-Efficient
    Learning of Deep Networks from Decentralized Data. AISTATS 2017, arXiv 1602.05629.
    Tian Li, Anit Kumar Sahu, Manzil Zaheer, Maziar Sanjabi, Ameet Talwalkar, Virginia Smith: Federated Optimization in
    Heterogeneous Networks. MLSys 2020, arXiv 1812.06127.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from trimtab.federated.local_training import local_sgd
from trimtab.federated.protocol import Algorithm, Broadcast, ClientState, ServerState, Update
from trimtab.federated.state_dicts import average_states, model_state


class FedAvg(Algorithm):
    """Federated averaging of models trained by SGD; FedProx with `prox`.

    Args:
        lr: learning rate of the clients.
        local_epochs: passes over a client's data in a round.
        batch_size: samples in a step.
        prox: strength of the pull towards the received model (FedProx's mu).
        momentum, weight_decay: of the clients' SGD, which starts anew each round.
        max_norm: bound on the global norm of a client's gradient; none by default.
        lr_decay: factor on the learning rate after each round.
        weighted: weight clients by their number of examples, or all equally.
        loss: maps (output, targets) to a scalar; cross-entropy by default.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from trimtab.federated import FedAvg, simulate
        >>> clients = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(5)]
        >>> history = simulate(FedAvg(lr=0.1), nn.Linear(4, 3), clients, rounds=2, fraction=0.4)
        >>> history.state.server.round
        2
    """

    def __init__(
        self,
        lr: float,
        local_epochs: int = 1,
        batch_size: int = 50,
        *,
        prox: float = 0.0,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        max_norm: float | None = None,
        lr_decay: float = 1.0,
        weighted: bool = True,
        loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    ) -> None:
        check_client_arguments(lr, local_epochs, batch_size, prox, momentum, weight_decay, max_norm, lr_decay)
        self.lr = lr
        self.local_epochs = local_epochs
        self.batch_size = batch_size
        self.prox = prox
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.max_norm = max_norm
        self.lr_decay = lr_decay
        self.weighted = weighted
        self.loss = loss

    def init_server(self, model: nn.Module, num_clients: int) -> ServerState:
        return ServerState(model_state(model))

    def client_update(
        self,
        model: nn.Module,
        broadcast: Broadcast,
        client: ClientState,
        data: tuple[Tensor, Tensor],
        *,
        generator: torch.Generator,
    ) -> tuple[Update, ClientState]:
        model.load_state_dict(broadcast.params)
        steps = local_sgd(
            model,
            data,
            lr=self.lr * self.lr_decay**broadcast.round,
            epochs=self.local_epochs,
            batch_size=self.batch_size,
            generator=generator,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            max_norm=self.max_norm,
            prox=self.prox,
            pull=[-p.detach() for p in model.parameters() if p.requires_grad] if self.prox else None,
            loss=self.loss,
        )
        return Update(model_state(model), len(data[0]), metrics={"gradients": float(steps)}), client

    def aggregate(self, server: ServerState, updates: Sequence[Update]) -> ServerState:
        weights = [float(update.num_examples) for update in updates] if self.weighted else None
        mean = average_states([update.params for update in updates], weights)
        return replace(server, params=mean, round=server.round + 1)


def check_client_arguments(
    lr: float,
    local_epochs: int,
    batch_size: int,
    prox: float,
    momentum: float,
    weight_decay: float,
    max_norm: float | None,
    lr_decay: float,
) -> None:
    """Refuse what no local SGD can use, naming the argument."""
    if not 0 <= lr < float("inf"):
        raise ValueError(f"lr must be finite and at least 0, got {lr}")
    for name, count in (("local_epochs", local_epochs), ("batch_size", batch_size)):
        if count < 1 or count != int(count):
            raise ValueError(f"{name} must be a whole number of at least 1, got {count}")
    for name, value in (("prox", prox), ("weight_decay", weight_decay)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be finite and at least 0, got {value}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm must be positive, got {max_norm}")
    if not 0 < lr_decay <= 1:
        raise ValueError(f"lr_decay must be in (0, 1], got {lr_decay}")
