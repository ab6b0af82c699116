r"""FedLoGe: one backbone under a fixed sparse head, a generic and many personal heads, for long-tailed federated data.

Where few classes make most of the data and clients differ in theirs. The backbone learns against class vectors that
never change and are far apart from each other, so that frequent classes cannot crowd out the rare ones; a global and a
local head learn from its features without moving it. At the end rows of the global head get equal norms, for a generic
model, or the norms of a client's local head, for a personal one.

With a simplex equiangular tight frame $M = \sqrt{C / (C - 1)}\, P (I - \mathbf 1 \mathbf 1^\top / C)$, of whose entries
a share $\beta$ is set to zero, the others are moved to minimise

$$
\sum_c \big( \lVert m_c \rVert - \gamma \big)^2 - \frac{1}{C} \sum_c \min_{c' \ne c} \angle (m_c, m_{c'})
$$

and a client's loss is, with $\operatorname{sg}$ for no gradient,

$$
\ell\big(M^\top f(x), y\big) + \ell\big(W \operatorname{sg} f(x), y\big) + \ell\big(W_i \operatorname{sg} f(x), y\big)
$$

Reference:
    Zikai Xiao, Zihan Chen, Liyinglan Liu, Yang Feng, Jian Wu, Wanlu Liu, Joey Tianyi Zhou, Howard Hao Yang, Zuozhu Liu:
    FedLoGe: Joint Local and Generic Federated Learning under Long-tailed Data. ICLR 2024, arXiv 2401.08977.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.federated.fedavg import FedAvg
from trimtab.federated.heads import features_seen, head_of
from trimtab.federated.local_training import Loss
from trimtab.federated.protocol import Broadcast, ClientState, ServerState, Tensors, Update
from trimtab.federated.state_dicts import model_state
from trimtab.ops.arguments import floating_tensor, in_range, integer, positive


def simplex_etf(
    dim: int, num_classes: int, *, generator: torch.Generator | None = None
) -> Float[Tensor, "classes dim"]:
    r"""Class vectors of unit length, any two at the cosine $-1 / (C - 1)$, in float64.

    Args:
        dim: of the features, at least `num_classes`.
        num_classes: number of vectors, at least 2.
        generator: decides the rotation.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> vectors = simplex_etf(8, 3)
        >>> torch.allclose(vectors @ vectors.T, 1.5 * torch.eye(3, dtype=torch.float64) - 0.5)
        True
    """
    integer("num_classes", num_classes, 2)
    if integer("dim", dim) < num_classes:
        raise ValueError(f"dim must be at least num_classes ({num_classes}), got {dim}")
    basis = torch.linalg.qr(torch.rand(dim, num_classes, dtype=torch.float64, generator=generator)).Q
    centred = torch.eye(num_classes, dtype=torch.float64) - 1 / num_classes
    found: Tensor = math.sqrt(num_classes / (num_classes - 1)) * (basis @ centred).T
    return found


@torch.enable_grad()
def sparse_etf(
    dim: int,
    num_classes: int,
    sparsity: float = 0.6,
    norm: float = 0.1,
    steps: int = 10_000,
    lr: float = 1e-4,
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "classes dim"]:
    """The fixed head (SSE-C): a simplex frame with zeros, moved to equal norms and the widest smallest angles.

    Args:
        dim: of the features, at least `num_classes`.
        num_classes: number of class vectors, at least 2.
        sparsity: share of all entries that are zero, in [0, 1).
        norm: of every class vector (gamma).
        steps: of Adam, over the entries that are left; with 0 they stay as they were.
        lr: of Adam. Vectors shrink from a norm of 1, so `steps * lr` should not be far below 1; at a large rate they
            end a little longer than `norm`.
        generator: decides the rotation and the zeros.

    Returns:
        Rows of the head, in float32.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> head = sparse_etf(16, 4, steps=300, lr=3e-3)
        >>> int((head == 0).sum()), bool((head.norm(dim=1) < 0.2).all())
        (38, True)
    """
    in_range("sparsity", sparsity, 0, 1, "left")
    positive("norm", norm)
    positive("lr", lr)
    integer("steps", steps, 0)
    vectors = simplex_etf(dim, num_classes, generator=generator)
    left = torch.ones(vectors.numel(), dtype=torch.float64)
    left[torch.randperm(len(left), generator=generator)[: int(sparsity * len(left))]] = 0
    left = left.view_as(vectors)
    vectors = (vectors * left).requires_grad_()
    optimizer = torch.optim.Adam([vectors], lr=lr)
    for _ in range(steps):
        vectors.grad = torch.autograd.grad(_apart(vectors, norm), vectors)[0] * left
        optimizer.step()
    return vectors.detach().float().contiguous()


def _apart(vectors: Float[Tensor, "classes dim"], norm: float) -> Tensor:
    cosines = F.normalize(vectors, dim=1) @ F.normalize(vectors, dim=1).T
    # A vector's own cosine must not be the largest.
    others = cosines - 3 * torch.eye(len(vectors), dtype=vectors.dtype)
    nearest = others.max(dim=1).values.clamp(-0.99999, 0.99999)
    found: Tensor = (vectors.norm(dim=1) - norm).square().sum() - nearest.arccos().mean()
    return found


def realign_global(weight: Float[Tensor, "classes dim"], scale: float = 1.7) -> Float[Tensor, "classes dim"]:
    r"""Rows of equal norm, $\gamma\, W_c / \lVert W_c \rVert$: norms that follow class sizes are taken away.

    Example:
        >>> realign_global(torch.tensor([[3.0, 4.0], [0.0, 0.1]]), scale=1.0)
        tensor([[0.6000, 0.8000],
                [0.0000, 1.0000]])
    """
    return positive("scale", scale) * F.normalize(floating_tensor("weight", weight), dim=1)


def realign_local(
    weight: Float[Tensor, "classes dim"], local: Float[Tensor, "classes dim"]
) -> Float[Tensor, "classes dim"]:
    r"""The global head in the proportions of a client's, $W_c\, \lVert L_c \rVert$.

    Raises:
        ValueError: the two heads differ in shape.

    Example:
        >>> realign_local(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[3.0, 4.0], [0.0, 0.1]]))
        tensor([[5.0000, 0.0000],
                [0.0000, 0.1000]])
    """
    if floating_tensor("weight", weight).shape != floating_tensor("local", local).shape:
        raise ValueError(f"local must have shape {tuple(weight.shape)} as weight, got {tuple(local.shape)}")
    found: Tensor = weight * local.norm(dim=1, keepdim=True)
    return found


def _of_three_heads(loss: Loss, logits: Float[Tensor, "three batch classes"], targets: Tensor) -> Tensor:
    return loss(logits[0], targets) + loss(logits[1], targets) + loss(logits[2], targets)


class FedLoGe(FedAvg):
    """FedLoGe's clients, with FedAvg's server; clients weigh by their number of examples.

    The model's own head is the global auxiliary one. The three losses have parameters of their own, so that one step on
    their sum is the authors' three steps. `finish` gives the global head equal norms; `personal` makes a client's
    model.

    Args:
        lr: learning rate of the clients.
        local_epochs: passes over a client's data in a round.
        batch_size: samples in a step.
        sparsity, norm, etf_steps, etf_lr: of the fixed head, as in `sparse_etf`.
        scale: norm of the global head's rows in the end.
        etf: the fixed head itself, in place of one made from these.
        momentum, weight_decay: of the clients' SGD, which starts anew each round.
        max_norm: bound on the global norm of a client's gradient over its three losses; none by default.
        lr_decay: factor on the learning rate after each round.
        head: name of the model's last layer, a linear one.
        loss: maps (output, targets) to a scalar; cross-entropy by default.
        generator: decides the fixed head; torch's global one by default.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from trimtab.federated import FedLoGe, finish, simulate
        >>> clients = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(5)]
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> algorithm = FedLoGe(lr=0.1, etf_steps=200, etf_lr=1e-3, head="2")
        >>> state = finish(algorithm, model, clients, simulate(algorithm, model, clients, rounds=2).state)
        >>> model[2].weight.detach().norm(dim=1)
        tensor([1.7000, 1.7000, 1.7000])
    """

    has_final_exchange: ClassVar[bool] = True

    def __init__(
        self,
        lr: float = 0.03,
        local_epochs: int = 5,
        batch_size: int = 8,
        *,
        sparsity: float = 0.6,
        norm: float = 0.1,
        etf_steps: int = 10_000,
        etf_lr: float = 1e-4,
        scale: float = 1.7,
        etf: Float[Tensor, "classes dim"] | None = None,
        momentum: float = 0.5,
        weight_decay: float = 0.0,
        max_norm: float | None = None,
        lr_decay: float = 1.0,
        head: str = "head",
        loss: Loss = nn.functional.cross_entropy,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            lr,
            local_epochs,
            batch_size,
            momentum=momentum,
            weight_decay=weight_decay,
            max_norm=max_norm,
            lr_decay=lr_decay,
            loss=partial(_of_three_heads, loss),
        )
        self.sparsity = in_range("sparsity", sparsity, 0, 1, "left")
        self.norm = positive("norm", norm)
        self.etf_steps = integer("etf_steps", etf_steps, 0)
        self.etf_lr = positive("etf_lr", etf_lr)
        self.scale = positive("scale", scale)
        self.etf = None if etf is None else floating_tensor("etf", etf).detach()
        self.head = head
        self.generator = generator

    def init_server(self, model: nn.Module, num_clients: int) -> ServerState:
        head = head_of(model, self.head)
        etf = self.etf
        if etf is None:
            etf = sparse_etf(
                head.in_features,
                head.out_features,
                self.sparsity,
                self.norm,
                self.etf_steps,
                self.etf_lr,
                generator=self.generator,
            )
        if etf.shape != head.weight.shape:
            raise ValueError(f"etf must have shape {tuple(head.weight.shape)} as the head, got {tuple(etf.shape)}")
        return ServerState(model_state(model), {"etf": etf.detach().to(head.weight, copy=True).contiguous()})

    def init_client(self, model: nn.Module, data: tuple[Tensor, Tensor]) -> ClientState:
        """The local head begins as the global one that the client first receives."""
        return model_state(head_of(model, self.head))

    def configure(self, server: ServerState) -> Broadcast:
        return Broadcast(server.params, dict(server.memory), server.round)

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
        heads = _ThreeHeads(model, head_of(model, self.head), broadcast.extras["etf"], client)
        steps = self.local.train(heads, data, generator=generator, round=broadcast.round)
        return Update(model_state(model), len(data[0]), metrics={"gradients": float(steps)}), model_state(heads.local)

    def client_report(
        self,
        model: nn.Module,
        broadcast: Broadcast,
        client: ClientState,
        data: tuple[Tensor, Tensor],
        *,
        generator: torch.Generator,
    ) -> Update:
        """Nothing: equal norms need no client."""
        return Update({}, len(data[0]))

    def finalize(
        self, model: nn.Module, server: ServerState, reports: Sequence[Update], *, generator: torch.Generator
    ) -> ServerState:
        """The server with a global head of equal norms; its bias is left as it is."""
        name = f"{self.head}.weight"
        return replace(server, params={**server.params, name: realign_global(server.params[name], self.scale)})

    def personal(self, server: ServerState, client: ClientState) -> Tensors:
        """State dict of a client's model: the global head, not yet realigned, in the local head's proportions.

        Args:
            server: before `finish`.
            client: the client's memory.
        """
        name = f"{self.head}.weight"
        return {**server.params, name: realign_local(server.params[name], client["weight"])}


class _ThreeHeads(nn.Module):
    """A model whose backbone sees the fixed head's loss alone."""

    def __init__(self, model: nn.Module, head: nn.Linear, etf: Float[Tensor, "classes dim"], local: Tensors) -> None:
        super().__init__()
        self.model, self.head, self.etf = model, head, etf
        self.local = copy.deepcopy(head)  # a new layer would draw from torch's global generator
        self.local.load_state_dict(local)

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "three batch classes"]:
        with features_seen(self.head, detach=True) as seen:
            generic = self.model(x)
        features = seen[-1]
        return torch.stack([features @ self.etf.T, generic, self.local(features.detach())])
