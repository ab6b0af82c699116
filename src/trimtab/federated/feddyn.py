r"""FedDyn: each client's loss gets a linear and a quadratic term that make all agree on one minimum.

For long local training on differing data, with FedAvg's traffic. What a client's gradient was at its last solution is
taken off its next ones, so that where no client wants to move the sum of the losses is at its minimum.

$$
\begin{aligned}
w_{i} &\approx \arg\min_w\; L_i(w) - \langle g_i, w \rangle + \frac{\alpha}{2} \lVert w - w_t \rVert^2, \qquad
  g_i \leftarrow g_i - \alpha\,(w_i - w_t) \\
h &\leftarrow h - \frac{\alpha}{N} \sum_{i \in S_t} (w_i - w_t), \qquad
  w_{t+1} = \frac{1}{|S_t|} \sum_{i \in S_t} w_i - \frac{h}{\alpha}
\end{aligned}
$$

With $h_i = -g_i / \alpha$ these are FedSpeed's updates without its step uphill, and that is how they are run.

Reference:
    Durmus Alp Emre Acar, Yue Zhao, Ramon Matas Navarro, Matthew Mattina, Paul N. Whatmough, Venkatesh Saligrama:
    Federated Learning Based on Dynamic Regularization. ICLR 2021, arXiv 2111.04263.
"""

from __future__ import annotations

from torch import nn

from trimtab.federated.fedspeed import FedSpeed
from trimtab.federated.local_training import Loss
from trimtab.ops.arguments import positive


class FedDyn(FedSpeed):
    """FedDyn's clients and server; clients count equally.

    Args:
        lr: learning rate of the clients.
        local_epochs: passes over a client's data in a round.
        batch_size: samples in a step.
        alpha: strength of the two terms, positive; the paper tries 0.001 to 0.1.
        weight_decay: of the clients' SGD.
        max_norm: bound on the global norm of a client's gradient; none by default.
        lr_decay: factor on the learning rate after each round.
        loss: maps (output, targets) to a scalar; cross-entropy by default.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import torch
        >>> from trimtab.federated import FedDyn, simulate
        >>> clients = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(5)]
        >>> history = simulate(FedDyn(lr=0.1), nn.Linear(4, 3), clients, rounds=2, fraction=0.4)
        >>> history.state.server.round
        2
    """

    def __init__(
        self,
        lr: float,
        local_epochs: int = 1,
        batch_size: int = 50,
        *,
        alpha: float = 0.01,
        weight_decay: float = 0.0,
        max_norm: float | None = None,
        lr_decay: float = 1.0,
        loss: Loss = nn.functional.cross_entropy,
    ) -> None:
        super().__init__(
            lr,
            positive("alpha", alpha),
            rho=0.0,
            weight_decay=weight_decay,
            max_norm=max_norm,
            lr_decay=lr_decay,
            local_epochs=local_epochs,
            batch_size=batch_size,
            loss=loss,
        )
