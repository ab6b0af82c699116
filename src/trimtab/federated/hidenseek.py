r"""HideNseek: the server prunes a random network once without data, and the clients learn one sign per weight.

For federations whose traffic must be small. Weights are never trained: all sides draw the same random ones from a seed
and keep those of the largest synaptic saliency, for which no data are needed. Clients then learn only whether a weight
is to be turned round, by a score whose sign counts, and send one bit for each weight that is kept.

$$
R = \mathbf 1^\top \Big( \prod_l |\theta_l| \Big) \mathbf 1, \qquad
S = \Big| \theta \odot \frac{\partial R}{\partial \theta} \Big|, \qquad
M = \mathbf 1[S \text{ among the largest } \rho]
$$

$$
w = M \odot \theta \odot \operatorname{sgn}(s), \qquad
\frac{\partial L}{\partial s} := M \odot \theta \odot \frac{\partial L}{\partial w}, \qquad
\bar s = \frac{\sum_k n_k \operatorname{sgn}(s_k)}{\sum_k n_k}
$$

Clients start a round from the scores $\epsilon\,\bar s$; the global network has the signs of $\bar s$.

Reference:
    Anish K. Vallapuram, Pengyuan Zhou, Young D. Kwon, Lik Hang Lee, Hengwei Xu, Pan Hui: HideNseek: Federated Lottery
    Ticket via Server-side Pruning and Sign Supermask. 2022, arXiv 2206.04385. No code was found; from the abstract are
    the single pruning on the server, the saliency and the signs, while the random weights, the estimator, the scores'
    start and the average of signs are reconstructed. The saliency is SynFlow's (Tanaka et al., NeurIPS 2020, arXiv
    2006.05467).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trimtab.federated.local_training import LocalSGD, Loss
from trimtab.federated.protocol import Algorithm, Broadcast, ClientState, ServerState, Tensors, Update
from trimtab.federated.state_dicts import average_states, model_state
from trimtab.federated.synflow import prunable, prune_at_init
from trimtab.ops.arguments import in_range, integer, one_of, positive, real_problem, tensor

Values = Literal["sign", "binary"]
Ticket = Mapping[str, tuple[Tensor, Tensor]]
"""Fixed weights and a mask by the name of the weight."""

_MEAN, _SIGNS, _REST = "mean", "signs", "rest."


class SignSupermask(nn.Module):
    """A parametrization under which a weight is fixed but for its signs, and the parameter is their score.

    Args:
        theta: the fixed weights.
        mask: which of them are kept.
        values: "sign" multiplies a weight by the sign of its score, 0 counting as positive; "binary" drops weights of
            negative score instead, for comparison.

    Raises:
        ValueError: `mask` has not the shape of `theta`, or `values` is none of these.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> supermask = SignSupermask(torch.tensor([[3.0, 5.0]]), torch.tensor([[True, True]]))
        >>> _ = parametrize.register_parametrization(layer, "weight", supermask, unsafe=True)
        >>> layer.weight = torch.tensor([[0.1, -0.1]])
        >>> layer.weight.detach()
        tensor([[ 3., -5.]])
    """

    theta: Tensor
    mask: Tensor

    def __init__(self, theta: Tensor, mask: Tensor, values: Values = "sign") -> None:
        if not all(isinstance(part, Tensor) for part in (theta, mask)):
            raise TypeError(f"theta and mask must be tensors, got {[type(part).__name__ for part in (theta, mask)]}")
        super().__init__()
        if theta.shape != mask.shape:
            raise ValueError(f"mask must be of shape {tuple(theta.shape)} as theta, got {tuple(mask.shape)}")
        self.values: Values = one_of("values", values, ("sign", "binary"))
        self.register_buffer("theta", theta)
        self.register_buffer("mask", mask)

    def forward(self, score: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The weights of these scores; the gradient passes the sign as if it were not there."""
        if problem := real_problem(score=score):
            raise TypeError(problem)
        held = score.detach()
        hard = (held >= 0).to(held)
        hard = hard.mul_(2).sub_(1) if self.values == "sign" else hard
        return self.mask * self.theta * (score - held).add_(hard)

    def right_inverse(self, score: Tensor) -> Tensor:
        """What is assigned to the weight is a score."""
        return score


def signed_weights(ticket: Ticket, positive: Tensor, values: Values = "sign") -> Tensors:
    """The weights that the signs of all kept ones, in their order, stand for.

    Args:
        ticket: fixed weights and masks.
        positive: whether the score of each kept weight is at least 0.
        values: as in `SignSupermask`.

    Example:
        >>> ticket = {"w": (torch.tensor([3.0, 5.0, 7.0]), torch.tensor([True, False, True]))}
        >>> signed_weights(ticket, torch.tensor([True, False]))
        {'w': tensor([ 3.,  0., -7.])}
    """
    if not isinstance(positive, Tensor):
        raise TypeError(f"positive must be a tensor, got {type(positive).__name__}")
    found = {}
    parts = positive.split([int(mask.sum()) for _, mask in ticket.values()])
    for (name, (theta, mask)), part in zip(ticket.items(), parts, strict=True):
        factor = torch.zeros_like(theta)
        factor[mask] = 2 * part.to(theta) - 1 if values == "sign" else part.to(theta)
        found[name] = theta * factor
    return found


def pack_signs(positive: Tensor) -> UInt8[Tensor, " bytes"]:
    """A vector of booleans in bytes, the first in the lowest bit; the last byte is filled up with zeros.

    Raises:
        TypeError: `positive` is not boolean.
        ValueError: it is no vector.

    Example:
        >>> pack_signs(torch.tensor([True, False, True] + [False] * 6))
        tensor([5, 0], dtype=torch.uint8)
    """
    bits = tensor("positive", positive, ndim=1)
    if bits.dtype != torch.bool:
        raise TypeError(f"positive must be boolean, got {bits.dtype}")
    rows = nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    return (rows * _powers(bits.device)).sum(1, dtype=torch.uint8)


def unpack_signs(packed: UInt8[Tensor, " bytes"], count: int) -> Tensor:
    """The inverse of `pack_signs`.

    Raises:
        ValueError: there are not as many bytes as so many bits take.

    Example:
        >>> unpack_signs(torch.tensor([5], dtype=torch.uint8), 3)
        tensor([ True, False,  True])
    """
    found = tensor("packed", packed, ndim=1)
    if found.dtype != torch.uint8 or len(found) != (integer("count", count, 0) + 7) // 8:
        raise ValueError(f"packed must be {(count + 7) // 8} bytes for {count} bits, got {len(found)} {found.dtype}")
    return (found[:, None] & _powers(found.device)).bool().flatten()[:count]


class HideNseek(Algorithm):
    """HideNseek's clients and server.

    Which weights there are and which are kept follows from the network's form and `seed`, so that nobody sends it;
    values that a model comes with play no part. Biases are 0 and the scales of normalisation 1. Running statistics are
    averaged, frozen parameters are sent as they are. A client remembers its own signs (packed, "signs") for a network
    of its own, see `personal`.

    Args:
        lr: learning rate of the clients, on scores.
        in_shape: of one sample.
        density: share of the weights that is kept.
        local_epochs: passes over a client's data in a round.
        batch_size: samples in a step.
        start: size of the scores that a client starts from (epsilon); at 1 a weight on which all agree hardly turns.
        broadcast: what the server sends: the "mean" of the signs, or their "sign", in one bit.
        values: "sign", or "binary" for masks of zeros and ones on the same weights.
        weights: "kaiming_normal" as they are drawn, or "signed_constant", all of one size in a layer once those are
            pruned; scaled up by what pruning takes.
        iterations: of the pruning, see `prune_at_init`.
        seed: decides the weights.
        momentum: of the clients' SGD.
        max_norm: bound on the global norm of a client's gradient; none by default.
        loss: maps (output, targets) to a scalar; cross-entropy by default.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from trimtab.federated import HideNseek, simulate
        >>> clients = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(5)]
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> history = simulate(HideNseek(3.0, (4,), density=0.5), model, clients, rounds=2)
        >>> history.rounds[0].bytes_up // 5  # 56 of 112 weights, a bit each
        7
    """

    def __init__(
        self,
        lr: float,
        in_shape: Sequence[int],
        density: float = 0.2,
        local_epochs: int = 1,
        batch_size: int = 50,
        *,
        start: float = 0.1,
        broadcast: Literal["mean", "sign"] = "mean",
        values: Values = "sign",
        weights: Literal["signed_constant", "kaiming_normal"] = "signed_constant",
        iterations: int = 1,
        seed: int = 0,
        momentum: float = 0.0,
        max_norm: float | None = None,
        loss: Loss = nn.functional.cross_entropy,
    ) -> None:
        self.local = LocalSGD(
            lr=lr, epochs=local_epochs, batch_size=batch_size, momentum=momentum, max_norm=max_norm, loss=loss
        )
        self.in_shape = tuple(integer("in_shape", size) for size in in_shape)
        self.density = in_range("density", density, 0, 1, "right")
        self.start = positive("start", start)
        self.broadcast: Literal["mean", "sign"] = one_of("broadcast", broadcast, ("mean", "sign"))
        self.values: Values = one_of("values", values, ("sign", "binary"))
        self.weights = one_of("weights", weights, ("signed_constant", "kaiming_normal"))
        self.iterations = integer("iterations", iterations)
        self.seed = integer("seed", seed, None)

    def ticket(self, model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
        """The fixed weights and the mask of each layer, from the model's form alone; its values do not change."""
        drawn = copy.deepcopy(model)
        draw = torch.Generator().manual_seed(self.seed)
        named = {name: p for name, p in drawn.named_parameters() if prunable(p)}
        if not named:
            raise ValueError("model must have a weight that is trained and is a matrix or a kernel, got none")
        if len(list(drawn.named_parameters(remove_duplicate=False))) > len(list(drawn.named_parameters())):
            raise ValueError("model must have no tied parameters, got some")
        if any(p.is_complex() for p in named.values()):
            raise TypeError("model must have real weights, got complex ones")
        sizes = {name: math.sqrt(2 / p[0].numel()) for name, p in named.items()}
        with torch.no_grad():
            for name, p in named.items():
                p.copy_(sizes[name] * torch.randn(p.shape, generator=draw))
        masks = prune_at_init(drawn, self.density, self.in_shape, self.iterations)
        ticket = {}
        for name, mask in masks.items():
            theta, scale = named[name].detach(), mask.float().mean().rsqrt().to(named[name])
            if self.weights == "signed_constant":
                theta = torch.where(theta >= 0, sizes[name], -sizes[name]).to(theta)
            ticket[name] = (theta * scale, mask)
        return ticket

    def personal(self, model: nn.Module, client: ClientState) -> Tensors:
        """The weights of a client's own network, from what it remembers."""
        ticket = self.ticket(model)
        return signed_weights(ticket, unpack_signs(client[_SIGNS], _count(ticket)), self.values)

    def init_server(self, model: nn.Module, num_clients: int) -> ServerState:
        ticket = self.ticket(model)
        mean = torch.ones(_count(ticket), device=next(iter(ticket.values()))[0].device)
        _neutralise(model)
        state = model_state(model) | signed_weights(ticket, mean >= 0, self.values)
        memory = {_MEAN: mean}
        # The ticket too, so that the server makes networks of signs without a model.
        for name, (theta, mask) in ticket.items():
            memory |= {f"theta.{name}": theta, f"mask.{name}": mask}
        memory |= {f"{_REST}{name}": torch.tensor(True) for name in _sent(model)}
        return ServerState(state, memory)

    def configure(self, server: ServerState) -> Broadcast:
        rest = {name: server.params[name.removeprefix(_REST)] for name in server.memory if name.startswith(_REST)}
        mean = server.memory[_MEAN]
        return Broadcast({}, rest | {_MEAN: mean if self.broadcast == "mean" else pack_signs(mean >= 0)}, server.round)

    def client_update(
        self,
        model: nn.Module,
        broadcast: Broadcast,
        client: ClientState,
        data: tuple[Tensor, Tensor],
        *,
        generator: torch.Generator,
    ) -> tuple[Update, ClientState]:
        rest = {name.removeprefix(_REST): v for name, v in broadcast.extras.items() if name.startswith(_REST)}
        model.load_state_dict(rest, strict=False)
        _neutralise(model)
        ticket = self.ticket(model)
        sizes = [int(mask.sum()) for _, mask in ticket.values()]
        mean = broadcast.extras[_MEAN]
        if self.broadcast == "sign":
            mean = 2 * unpack_signs(mean, sum(sizes)).float() - 1
        trained = [p for p in model.parameters() if p.requires_grad]
        for p in trained:
            p.requires_grad_(False)
        try:
            scores = self._hide(model, ticket, mean.split(sizes))
            steps = self.local.train(model, data, generator=generator, round=broadcast.round)
            positive = torch.cat([scores[name].detach()[mask] >= 0 for name, (_, mask) in ticket.items()])
        finally:
            for name in ticket:
                owner, _, attribute = name.rpartition(".")
                if parametrize.is_parametrized(module := model.get_submodule(owner), attribute):
                    parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
            for p in trained:
                p.requires_grad_(True)
        packed = pack_signs(positive)
        sent = {name: value for name, value in model_state(model).items() if name in rest}
        return Update(sent, len(data[0]), {_SIGNS: packed}, {"gradients": float(steps)}), {_SIGNS: packed.clone()}

    def _hide(self, model: nn.Module, ticket: Ticket, means: Sequence[Tensor]) -> dict[str, Tensor]:
        """Put scores in the place of the weights; the scores by the weights' names."""
        scores = {}
        for (name, (theta, mask)), mean in zip(ticket.items(), means, strict=True):
            owner, _, attribute = name.rpartition(".")
            module = model.get_submodule(owner)
            score = torch.zeros_like(theta)
            score[mask] = self.start * mean.to(theta)
            supermask = SignSupermask(theta, mask, self.values)
            parametrize.register_parametrization(module, attribute, supermask, unsafe=True)
            held = module.get_parameter(f"parametrizations.{attribute}.original")
            with torch.no_grad():
                held.copy_(score)
            scores[name] = held.requires_grad_(True)
        return scores

    def aggregate(self, server: ServerState, updates: Sequence[Update]) -> ServerState:
        memory = dict(server.memory)
        count, sizes = len(memory[_MEAN]), [float(update.num_examples) for update in updates]
        signs = [{_MEAN: 2 * unpack_signs(update.extras[_SIGNS], count).float() - 1} for update in updates]
        memory |= average_states(signs, sizes)
        params = dict(server.params)
        if updates[0].params:
            params |= average_states([update.params for update in updates], sizes)
        names = [name.removeprefix("mask.") for name in memory if name.startswith("mask.")]
        ticket = {name: (memory[f"theta.{name}"], memory[f"mask.{name}"]) for name in names}
        params |= signed_weights(ticket, memory[_MEAN] >= 0, self.values)
        return replace(server, params=params, memory=memory, round=server.round + 1)


def _count(ticket: Ticket) -> int:
    return sum(int(mask.sum()) for _, mask in ticket.values())


def _sent(model: nn.Module) -> list[str]:
    """Entries that travel as they are: buffers, and parameters that are frozen."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    return [name for name in model.state_dict() if name not in trained]


@torch.no_grad()
def _neutralise(model: nn.Module) -> None:
    """Biases of 0 and scales of 1, where they would be trained."""
    for name, p in model.named_parameters():
        if p.requires_grad and p.ndim < 2:
            p.fill_(0.0 if name.rpartition(".")[2].endswith("bias") else 1.0)


def _powers(device: torch.device) -> Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)
