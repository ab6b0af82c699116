r"""FedSpeed: long local training without client drift, by a corrected proximal term and a sharpness-aware step.

For clients whose data differ much and who should do many steps between rounds. FedProx's pull towards the received
model also biases where each client settles; a dual variable per client learns that bias and takes it away. A gradient
taken a small step uphill keeps the longer training from over-fitting. FedAvg's traffic; two gradients a step.

$$
\begin{aligned}
g_1 &= \nabla L_i(w), \quad g_2 = \nabla L_i\big(w + \rho\, g_1 / \lVert g_1 \rVert\big), \quad
  g = (1 - \alpha)\, g_1 + \alpha\, g_2 \\
w &\leftarrow w - \eta\,\big[g + \mu\,(w - w_t + h_i)\big] \quad (K \text{ steps from } w_t), \qquad
  h_i \leftarrow h_i + w_{i,K} - w_t \\
w_{t+1} &= \frac{1}{|S_t|} \sum_{i \in S_t} w_{i,K} + \frac{1}{N} \sum_{i=1}^{N} h_i
\end{aligned}
$$

In the paper's symbols $\mu = 1/\lambda$ and $h_i = -\lambda\,\hat g_i$.

Reference:
    Yan Sun, Li Shen, Tiansheng Huang, Liang Ding, Dacheng Tao: FedSpeed: Larger Local Interval, Less Communication
    Round, and Higher Generalization Accuracy. ICLR 2023, arXiv 2302.10429.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from trimtab.federated.local_training import LocalSGD, Loss, loss_gradient
from trimtab.federated.protocol import Algorithm, Broadcast, ClientState, ServerState, Update
from trimtab.federated.state_dicts import average_states, model_state
from trimtab.ops.arguments import in_range, non_negative, one_of


def quasi_gradient(
    loss: Callable[[], Tensor],
    params: Sequence[Tensor],
    *,
    rho: float,
    alpha: float = 1.0,
    buffers: Sequence[Tensor] = (),
) -> Sequence[Tensor]:
    r"""The gradient mixed with the one a step of length `rho` uphill: $(1 - \alpha)\, g_1 + \alpha\, g_2$.

    The step is normalised over all parameters together. One evaluation of `loss` if `rho` or `alpha` is 0, else two.

    Args:
        loss: the loss of one batch as a function of the current values of `params`.
        params: left as they were, after an error in `loss` too.
        rho: length of the step uphill.
        alpha: weight of the gradient found there.
        buffers: running statistics that the second evaluation must not change.

    Example:
        >>> w = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> quasi_gradient(lambda: w.square().sum() / 2, [w], rho=5.0)  # the gradient at (6, 8)
        (tensor([6., 8.]),)
    """
    if not 0 <= rho < float("inf"):
        raise ValueError(f"rho must be finite and not negative, got {rho!r}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha!r}")
    here = loss_gradient(loss, params)
    if rho == 0 or alpha == 0:
        return here
    with torch.no_grad():
        start, statistics = [p.clone() for p in params], [b.clone() for b in buffers]
        length = nn.utils.get_total_norm(here)
        torch._foreach_add_(list(params), torch._foreach_mul(list(here), rho / (length + 1e-7)))
    try:
        uphill = loss_gradient(loss, params)
    finally:
        with torch.no_grad():
            for tensor, value in zip([*params, *buffers], [*start, *statistics], strict=True):
                tensor.copy_(value)
    return uphill if alpha == 1 else torch._foreach_lerp(list(here), list(uphill), alpha)


class FedSpeed(Algorithm):
    r"""FedSpeed's clients and server; with `prox=0` it is FedSAM, and with `rho=0` too it is FedAvg with equal weights.

    The paper's algorithm box, as others reproduce it, averages $w_{i,K} + h_i$ over the participants alone. The
    authors' release adds the mean of $h_i$ over all clients instead, which is the default here:
    with few participants only that leaves the minimum of the mean loss a fixed point. With full participation the
    two are the same. As in the release the step uphill is normalised, and `max_norm` bounds $g + \mu\,(h_i - w_t)$
    before the decay $\mu\,w$ is added.

    Args:
        lr: learning rate of the clients.
        prox: strength of the proximal term (mu = 1 / lambda). 0 switches off the pull and the dual variables.
        rho: length of the step uphill; 0 switches it off and halves the cost.
        alpha: weight of the gradient found uphill, in [0, 1].
        weight_decay: of the clients' SGD.
        max_norm: bound on the global norm of a client's gradient; None for none.
        lr_decay: factor on the learning rate after each round.
        local_epochs: passes over a client's data in a round.
        batch_size: samples in a step.
        dual_mean: over "all" clients, or over the "active" ones of the round.
        loss: maps (output, targets) to a scalar; cross-entropy by default.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from trimtab.federated import FedSpeed, simulate
        >>> clients = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(5)]
        >>> history = simulate(FedSpeed(lr=0.1, local_epochs=2), nn.Linear(4, 3), clients, rounds=2, fraction=0.4)
        >>> history.state.server.round
        2
    """

    def __init__(
        self,
        lr: float = 0.1,
        prox: float = 0.1,
        rho: float = 0.1,
        alpha: float = 1.0,
        weight_decay: float = 1e-3,
        max_norm: float | None = 10.0,
        lr_decay: float = 0.998,
        local_epochs: int = 5,
        batch_size: int = 50,
        *,
        dual_mean: Literal["all", "active"] = "all",
        loss: Loss = nn.functional.cross_entropy,
    ) -> None:
        self.local = LocalSGD(
            lr=lr,
            epochs=local_epochs,
            batch_size=batch_size,
            weight_decay=weight_decay,
            max_norm=max_norm,
            lr_decay=lr_decay,
            prox=prox,
            loss=loss,
        )
        self.rho = non_negative("rho", rho)
        self.alpha = in_range("alpha", alpha, 0, 1)
        self.dual_mean = one_of("dual_mean", dual_mean, ("all", "active"))

    def init_server(self, model: nn.Module, num_clients: int) -> ServerState:
        if num_clients < 1:
            raise ValueError(f"num_clients must be known and at least 1, got {num_clients}")
        if not self.local.prox or self.dual_mean == "active":
            return ServerState(model_state(model))
        # Tied parameters stand in a state dict under each of their names.
        named = model.named_parameters(remove_duplicate=False)
        duals = {f"dual.{name}": torch.zeros_like(p, requires_grad=False) for name, p in named if p.requires_grad}
        return ServerState(model_state(model), duals | {"num_clients": torch.tensor(num_clients)})

    def init_client(self, model: nn.Module, data: tuple[Tensor, Tensor]) -> ClientState:
        if not self.local.prox:
            return {}
        return {name: torch.zeros_like(p, requires_grad=False) for name, p in trained(model).items()}

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
        received = {name: p.detach().clone() for name, p in trained(model).items()} if self.local.prox else {}
        steps = self.local.train(
            model,
            data,
            generator=generator,
            round=broadcast.round,
            pull=[client[name] - start for name, start in received.items()],
            gradient=partial(quasi_gradient, rho=self.rho, alpha=self.alpha, buffers=list(model.buffers())),
        )
        evaluations = steps * (2 if self.rho and self.alpha else 1)
        local = trained(model)
        duals = {name: client[name] + (local[name].detach() - start) for name, start in received.items()}
        if self.dual_mean == "active":
            with torch.no_grad():
                for name, dual in duals.items():
                    local[name].add_(dual)
        return Update(model_state(model), len(data[0]), metrics={"gradients": float(evaluations)}), duals

    def aggregate(self, server: ServerState, updates: Sequence[Update]) -> ServerState:
        params, memory = average_states([update.params for update in updates]), dict(server.memory)
        for name in [name for name in memory if name.startswith("dual.")]:
            entry = name.removeprefix("dual.")
            # The participants' duals moved by w_K - w_t, so their mean over all clients is known without them.
            moved = (params[entry] - server.params[entry]) * (len(updates) / int(memory["num_clients"]))
            memory[name] = memory[name] + moved
            params[entry] = params[entry] + memory[name]
        return replace(server, params=params, memory=memory, round=server.round + 1)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, each once, in the order of `model.parameters()`."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
