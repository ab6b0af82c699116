r"""FedLD: a penalty on confident outputs at the clients, and a server that averages along shared directions.

For clients whose data differ. The global loss is taken apart into what clients lose on their own data, what the shift
between their distributions adds, and what averaging adds. The penalty holds back the margins by which clients
over-fit to their own classes; the server writes each client's move in the principal directions of all moves and
weights a direction by how much of them lies in it, so that what only one client wants counts little.

$$
L = \operatorname{CE}(z, y) + \lambda \log\big(1 + \lVert P \rVert_F^2\big), \qquad P = \operatorname{softmax}(z) \in
\mathbb R^{B \times C}
$$

$$
\frac{1}{m} G G^\top = V \operatorname{diag}(s)\, V^\top, \qquad u_j = G^\top v_j, \qquad
\Delta = \frac{1}{m} \sum_{i=1}^{m} \lVert g_i \rVert \sum_{j=1}^{k} \frac{s_j}{\sum_l s_l}
  \operatorname{sign}\langle g_i, u_j \rangle\, \frac{u_j}{\lVert u_j \rVert}
$$

The rows of $G$ are the moves $g_i = w_i - w$ of one tensor; each tensor of the model is treated by itself. The result
is shorter than the mean, and the more so the more the clients disagree.

Reference:
    Shuang Zeng, Pengxin Guo, Shuai Wang, Jianbo Wang, Yuyin Zhou, Liangqiong Qu: Tackling Data Heterogeneity in
    Federated Learning via Loss Decomposition. MICCAI 2024, arXiv 2408.12300. As in the release the norm is that of a
    whole batch, and the first round takes the plain mean; its running statistics go through the rule of the server
    too, and are averaged here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.federated.fedavg import FedAvg
from trimtab.federated.local_training import Loss
from trimtab.federated.protocol import ServerState, Update
from trimtab.federated.robust_means import checked, gram, mark_trained, split_trained
from trimtab.federated.state_dicts import average_states, flatten, model_state, unflatten
from trimtab.ops.arguments import (
    assured,
    class_indices,
    floating_tensor,
    in_range,
    non_negative,
    one_of,
    positive,
    real_problem,
)


def confidence_penalty(
    logits: Float[Tensor, "batch classes"], reduction: Literal["batch", "sample"] = "batch"
) -> Float[Tensor, ""]:
    r"""How sure the outputs are: $\log(1 + \sum p^2)$ over all probabilities of the batch, or the mean over samples.

    Args:
        logits: outputs.
        reduction: "batch" takes the sum over the whole batch, so that the value grows with its size and a sample's
            gradient falls with it; "sample" takes the mean of the samples' own values.

    Raises:
        TypeError: `logits` is no floating-point tensor.
        ValueError: it is no matrix with at least one row, or `reduction` is unknown.

    Example:
        >>> confidence_penalty(torch.zeros(4, 10)).exp()
        tensor(1.4000)
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(
            f"logits must be a floating-point tensor, got {getattr(logits, 'dtype', type(logits).__name__)}"
        )
    if logits.ndim != 2 or not len(logits):
        raise ValueError(f"logits must have shape (batch, classes), with a row or more, got {tuple(logits.shape)}")
    if reduction not in ("batch", "sample"):
        raise ValueError(f"reduction must be one of 'batch', 'sample', got {reduction!r}")
    squares = logits.softmax(1).square().sum(1)
    return squares.sum().log1p() if reduction == "batch" else squares.log1p().mean()


class MarginControlLoss(nn.Module):
    """Cross-entropy with a penalty on confident outputs, the loss of FedLD's clients.

    Args:
        weight: of the penalty (lambda); the release has 0.03.
        reduction: of the penalty, see `confidence_penalty`.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> MarginControlLoss()(torch.zeros(4, 10), torch.arange(4))
        tensor(2.3127)
    """

    def __init__(self, weight: float = 0.03, reduction: Literal["batch", "sample"] = "batch") -> None:
        super().__init__()
        self.weight = non_negative("weight", weight)
        self.reduction: Literal["batch", "sample"] = one_of("reduction", reduction, ("batch", "sample"))

    def forward(self, logits: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
        """The loss of a batch.

        Raises:
            ValueError: the shapes do not fit, the batch is empty, or a label is out of range.
            TypeError: `logits` are no floating-point tensor, or `targets` no int64 one.
        """
        logits = floating_tensor("logits", logits)
        class_indices("targets", targets)
        if logits.ndim != 2 or len(logits) == 0:
            raise ValueError(f"logits must be a matrix with at least one row, got shape {tuple(logits.shape)}")
        if targets.shape != logits.shape[:1]:
            raise ValueError(f"targets must be {len(logits)} labels as logits, got shape {tuple(targets.shape)}")
        classes = logits.shape[1]
        assured((targets >= 0) & (targets < classes), f"targets must be in [0, {classes}), got others")
        loss = nn.functional.cross_entropy(logits, targets)
        return loss + self.weight * confidence_penalty(logits, self.reduction) if self.weight else loss


def principal_aggregate(updates: Float[Tensor, "workers size"], proportion: float = 0.8) -> Float[Tensor, " size"]:
    """The mean of the updates, each written in the leading principal directions of all of them.

    Directions of no length, and those that an update is orthogonal to, count nothing. The cost is that of the inner
    products of all pairs.

    Args:
        updates: one a row, of at least two workers.
        proportion: share of the directions that are kept, in (0, 1]; rounded down, but one at least.

    Raises:
        ValueError: `updates` is no matrix, has one row or is not finite, or `proportion` is out of range.

    Example:
        >>> principal_aggregate(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), proportion=0.5)
        tensor([0.8000, 0.0000])
    """
    if not isinstance(updates, Tensor):
        raise TypeError(f"updates must be a tensor, got {type(updates).__name__}")
    in_range("proportion", proportion, 0, 1, "right")
    workers = len(checked(updates, least=2))
    inner = gram(updates)
    values, vectors = torch.linalg.eigh(inner / workers)
    kept = max(1, int(workers * proportion))
    values, leading = values.clamp_min(0), vectors[:, -kept:]
    length = (workers * values[-kept:]).sqrt()  # of u_j
    norms = inner.diagonal().clamp_min(0).sqrt()
    along = leading * length  # <g_i, u_j> / |u_j|
    signs = torch.where(along.abs() > 1e-9 * norms[:, None], along.sign(), 0.0)
    shares = values[-kept:] / values.sum().clamp_min(torch.finfo(torch.float64).tiny)
    amount = shares * (norms[:, None] * signs).mean(0)
    weights = leading @ torch.where(length > 1e-9 * length[-1], amount / length, 0.0)
    wide = torch.float64 if updates.dtype == torch.float64 else torch.float32
    found: Tensor = (weights.to(wide) @ updates.to(wide)).to(updates)
    return found


class FedLD(FedAvg):
    """FedLD's clients and server; without penalty and rule it is FedAvg with equal weights.

    Running statistics, frozen parameters and tensors of one element take plain means, as does everything in the first
    round and where a single client takes part.

    Args:
        lr: learning rate of the clients.
        local_epochs: passes over a client's data in a round.
        batch_size: samples in a step.
        weight: of the clients' penalty; 0 switches it off.
        proportion: share of the directions that the server keeps; None takes the mean of the moves.
        server_lr: factor on the server's step; the rule's steps are short, and 1 is the paper's.
        momentum, weight_decay: of the clients' SGD, which starts anew each round.
        max_norm: bound on the global norm of a client's gradient; none by default.
        lr_decay: factor on the learning rate after each round.
        loss: maps (output, targets) to a scalar, in the place of `MarginControlLoss(weight)`.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from trimtab.federated import FedLD, simulate
        >>> clients = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(5)]
        >>> history = simulate(FedLD(lr=0.1), nn.Linear(4, 3), clients, rounds=2)
        >>> history.state.server.round
        2
    """

    def __init__(
        self,
        lr: float = 0.01,
        local_epochs: int = 5,
        batch_size: int = 50,
        *,
        weight: float = 0.03,
        proportion: float | None = 0.8,
        server_lr: float = 1.0,
        momentum: float = 0.5,
        weight_decay: float = 5e-4,
        max_norm: float | None = None,
        lr_decay: float = 1.0,
        loss: Loss | None = None,
    ) -> None:
        super().__init__(
            lr,
            local_epochs,
            batch_size,
            momentum=momentum,
            weight_decay=weight_decay,
            max_norm=max_norm,
            lr_decay=lr_decay,
            weighted=False,
            loss=MarginControlLoss(weight) if loss is None else loss,
        )
        self.proportion = None if proportion is None else in_range("proportion", proportion, 0, 1, "right")
        self.server_lr = positive("server_lr", server_lr)

    def init_server(self, model: nn.Module, num_clients: int) -> ServerState:
        return ServerState(model_state(model), mark_trained(model))

    def aggregate(self, server: ServerState, updates: Sequence[Update]) -> ServerState:
        params = average_states([update.params for update in updates])
        principal = self.proportion is not None and server.round > 0 and len(updates) > 1
        for name, start in split_trained(server, server.params)[0].items():
            if principal and start.numel() > 1:
                moves = torch.stack([flatten({name: update.params[name] - start}) for update in updates])
                params[name] = start + self.server_lr * unflatten(self.step(moves), {name: start})[name]
            elif self.server_lr != 1:
                params[name] = torch.lerp(start, params[name], self.server_lr)
        return replace(server, params=params, round=server.round + 1)

    def step(self, moves: Float[Tensor, "clients size"]) -> Float[Tensor, " size"]:
        """The server's move of one tensor, from those of the clients."""
        if problem := real_problem(moves=moves):
            raise TypeError(problem)
        return principal_aggregate(moves, self.proportion or 1.0)
