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

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from trimtab.federated.local_training import LocalSGD, Loss
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
        loss: Loss = nn.functional.cross_entropy,
    ) -> None:
        self.local = LocalSGD(
            lr=lr,
            epochs=local_epochs,
            batch_size=batch_size,
            momentum=momentum,
            weight_decay=weight_decay,
            max_norm=max_norm,
            lr_decay=lr_decay,
            prox=prox,
            loss=loss,
        )
        self.weighted = weighted

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
        received = [-p.detach().clone() for p in model.parameters() if p.requires_grad] if self.local.prox else None
        steps = self.local.train(model, data, generator=generator, round=broadcast.round, pull=received)
        return Update(model_state(model), len(data[0]), metrics={"gradients": float(steps)}), client

    def aggregate(self, server: ServerState, updates: Sequence[Update]) -> ServerState:
        weights = [float(update.num_examples) for update in updates] if self.weighted else None
        mean = average_states([update.params for update in updates], weights)
        return replace(server, params=mean, round=server.round + 1)
