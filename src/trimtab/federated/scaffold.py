r"""SCAFFOLD: control variates take away the drift of clients whose data differ.

For federations in which clients train long on data of their own kind. Server and clients each remember a direction;
their difference is added to every gradient, so that a client moves as the mean client would. Twice FedAvg's traffic.

$$
\begin{aligned}
w &\leftarrow w - \eta\,\big[\nabla L_i(w) - c_i + c\big] \quad (K \text{ steps from } w_t), \qquad
  c_i^+ = c_i - c + \frac{w_t - w_{i,K}}{K \eta} \\
w_{t+1} &= w_t + \frac{\eta_g}{|S_t|} \sum_{i \in S_t} (w_{i,K} - w_t), \qquad
  c \leftarrow c + \frac{1}{N} \sum_{i \in S_t} (c_i^+ - c_i)
\end{aligned}
$$

Reference:
    Sai Praneeth Karimireddy, Satyen Kale, Mehryar Mohri, Sashank J. Reddi, Sebastian U. Stich, Ananda Theertha Suresh:
    SCAFFOLD: Stochastic Controlled Averaging for Federated Learning. ICML 2020, arXiv 1910.06378 (option II).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from trimtab.federated.fedavg import FedAvg
from trimtab.federated.fedspeed import trained
from trimtab.federated.local_training import Loss, loss_gradient
from trimtab.federated.protocol import Broadcast, ClientState, ServerState, Update
from trimtab.federated.state_dicts import average_states, model_state
from trimtab.ops.arguments import positive

_CONTROL = "control."


class SCAFFOLD(FedAvg):
    """SCAFFOLD's clients and server; without control variates FedAvg's. Clients count equally, as in the paper.

    Buffers (running statistics) take plain averages.

    Args:
        lr: learning rate of the clients, positive.
        local_epochs: passes over a client's data in a round.
        batch_size: samples in a step.
        server_lr: the step along the mean of the clients' moves (eta_g).
        weight_decay: of the clients' SGD.
        max_norm: bound on the global norm of a client's corrected gradient; none by default.
        lr_decay: factor on the learning rate after each round.
        loss: maps (output, targets) to a scalar; cross-entropy by default.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from trimtab.federated import SCAFFOLD, simulate
        >>> clients = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(5)]
        >>> history = simulate(SCAFFOLD(lr=0.1), nn.Linear(4, 3), clients, rounds=2, fraction=0.4)
        >>> sorted(history.state.server.memory)
        ['control.bias', 'control.weight', 'num_clients']
    """

    def __init__(
        self,
        lr: float,
        local_epochs: int = 1,
        batch_size: int = 50,
        *,
        server_lr: float = 1.0,
        weight_decay: float = 0.0,
        max_norm: float | None = None,
        lr_decay: float = 1.0,
        loss: Loss = nn.functional.cross_entropy,
    ) -> None:
        super().__init__(
            positive("lr", lr),
            local_epochs,
            batch_size,
            weight_decay=weight_decay,
            max_norm=max_norm,
            lr_decay=lr_decay,
            weighted=False,
            loss=loss,
        )
        self.server_lr = positive("server_lr", server_lr)

    def init_server(self, model: nn.Module, num_clients: int) -> ServerState:
        if num_clients < 1:
            raise ValueError(f"num_clients must be known and at least 1, got {num_clients}")
        controls = {f"{_CONTROL}{name}": zero for name, zero in _zeros(model).items()}
        return ServerState(model_state(model), controls | {"num_clients": torch.tensor(num_clients)})

    def init_client(self, model: nn.Module, data: tuple[Tensor, Tensor]) -> ClientState:
        return _zeros(model)

    def configure(self, server: ServerState) -> Broadcast:
        controls = {name: value for name, value in server.memory.items() if name.startswith(_CONTROL)}
        return Broadcast(server.params, controls, server.round)

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
        received = {name: p.detach().clone() for name, p in _by_every_name(model).items()}
        correction = {name: broadcast.extras[_CONTROL + name] - client[name] for name in received}

        def corrected(loss: Callable[[], Tensor], params: Sequence[Tensor]) -> Sequence[Tensor]:
            return torch._foreach_add(list(loss_gradient(loss, params)), [correction[name] for name in trained(model)])

        steps = self.local.train(model, data, generator=generator, round=broadcast.round, gradient=corrected)
        way = steps * self.local.lr * self.local.lr_decay**broadcast.round
        moved = {name: received[name] - p.detach() for name, p in _by_every_name(model).items()}
        # The mean gradient of the way, without the correction: c_i - c + (w_t - w_K) / (K lr).
        control = {name: moved[name] / way - correction[name] for name in received}
        change = {_CONTROL + name: control[name] - client[name] for name in received}
        return Update(model_state(model), len(data[0]), change, {"gradients": float(steps)}), control

    def aggregate(self, server: ServerState, updates: Sequence[Update]) -> ServerState:
        after = super().aggregate(server, updates)
        params, memory = dict(after.params), dict(server.memory)
        for name, change in average_states([update.extras for update in updates]).items():
            memory[name] = memory[name] + change * (len(updates) / int(memory["num_clients"]))
            entry = name.removeprefix(_CONTROL)
            if self.server_lr != 1:
                params[entry] = torch.lerp(server.params[entry], params[entry], self.server_lr)
        return replace(after, params=params, memory=memory)


def _by_every_name(model: nn.Module) -> dict[str, nn.Parameter]:
    # Tied parameters stand in a state dict under each of their names.
    return {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}


def _zeros(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p, requires_grad=False) for name, p in _by_every_name(model).items()}
