r"""Means of workers' updates that a few wrong ones cannot spoil, and federated averaging with any of them.

Every rule here takes the updates of $p$ workers as rows and gives one update back. A plain mean follows a single worker
anywhere; these follow none as long as at most $f$ of them send something wrong.

$$
\operatorname{score}(i) = \sum_{j \in N_i} \lVert g_i - g_j \rVert^2, \qquad
N_i = \text{the } p - f - 2 \text{ updates nearest to } g_i
$$

Krum takes the update of the lowest score, Multi-Krum the mean of the lowest ones. Bulyan picks $p - 2f$ updates by
Krum, one after the other, and then averages in each coordinate the values nearest to their median.

References:
    Dong Yin, Yudong Chen, Kannan Ramchandran, Peter Bartlett: Byzantine-Robust Distributed Learning: Towards Optimal
    Statistical Rates. ICML 2018, arXiv 1803.01498.
    Peva Blanchard, El Mahdi El Mhamdi, Rachid Guerraoui, Julien Stainer: Machine Learning with Adversaries: Byzantine
    Tolerant Gradient Descent. NeurIPS 2017, arXiv 1703.02757.
    El Mahdi El Mhamdi, Rachid Guerraoui, Sébastien Rouault: The Hidden Vulnerability of Distributed Learning in
    Byzantium. ICML 2018, arXiv 1802.07927.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.federated.fedavg import FedAvg
from trimtab.federated.local_training import Loss
from trimtab.federated.protocol import ServerState, Tensors, Update
from trimtab.federated.state_dicts import flatten, model_state, unflatten
from trimtab.ops.arguments import finite_tensor, integer

RobustMean = Callable[[Float[Tensor, "workers size"]], Float[Tensor, " size"]]
"""Maps the updates of all workers, one a row, to the update that is made."""

_TRAINED = "trained."
_PIECE = 2**14  # numbers of each update that are worked on at a time
_LEAST = 1e-30  # a squared distance below it has lost digits in single precision
_MOST_SORTED = 64  # workers, beyond which a sort is faster than comparing whole rows


def plain_mean(updates: Float[Tensor, "workers size"]) -> Float[Tensor, " size"]:
    """The mean, for comparison: a single worker moves it anywhere.

    Raises:
        ValueError: `updates` is no matrix, has no rows or is not finite.
    """
    return checked(updates).mean(0)


def coordinate_median(updates: Float[Tensor, "workers size"]) -> Float[Tensor, " size"]:
    """The median in each coordinate; of an even number of workers the mean of the two in the middle.

    Raises:
        ValueError: `updates` is no matrix, has no rows or is not finite.

    Example:
        >>> coordinate_median(torch.tensor([[1.0, 5.0], [2.0, 6.0], [900.0, -900.0]]))
        tensor([2., 5.])
    """
    workers = len(checked(updates))
    return _trimmed_mean(updates, (workers - 1) // 2)


def trimmed_mean(updates: Float[Tensor, "workers size"], trim: int) -> Float[Tensor, " size"]:
    """The mean in each coordinate without its `trim` largest and `trim` smallest values.

    Args:
        updates: one a row.
        trim: as many as may be wrong; less than half of the workers.

    Raises:
        ValueError: `updates` is no matrix, has no rows or is not finite, or `trim` leaves nothing.

    Example:
        >>> trimmed_mean(torch.tensor([[1.0], [2.0], [4.0], [900.0]]), trim=1)
        tensor([3.])
    """
    workers = len(checked(updates))
    integer("trim", trim, 0, (workers - 1) // 2)
    return _trimmed_mean(updates, trim)


def krum_scores(updates: Float[Tensor, "workers size"], byzantine: int) -> Float[Tensor, " workers"]:
    """The sum of squared distances of every update to its nearest ones, of which there are workers - byzantine - 2.

    Args:
        updates: one a row.
        byzantine: how many may be wrong; workers must be more than 2 byzantine + 2.

    Raises:
        ValueError: `updates` is no matrix or not finite, or there are too few workers.

    Example:
        >>> krum_scores(torch.tensor([[0.0], [1.0], [3.0], [90.0], [2.0]]), byzantine=1)
        tensor([5.0000e+00, 2.0000e+00, 5.0000e+00, 1.5313e+04, 2.0000e+00])
    """
    return _krum_scores(updates, byzantine).to(torch.promote_types(updates.dtype, torch.float32))


def krum(updates: Float[Tensor, "workers size"], byzantine: int) -> Float[Tensor, " size"]:
    """The update in the densest place: Krum.

    Args:
        updates: one a row.
        byzantine: how many may be wrong.

    Raises:
        ValueError: as `krum_scores`.
    """
    return multi_krum(updates, byzantine, keep=1)


def multi_krum(
    updates: Float[Tensor, "workers size"], byzantine: int, keep: int | None = None
) -> Float[Tensor, " size"]:
    """The mean of the updates in the densest places: Multi-Krum.

    Args:
        updates: one a row.
        byzantine: how many may be wrong.
        keep: how many are averaged; all but `byzantine` by default.

    Raises:
        ValueError: as `krum_scores`, or `keep` is more than there are.

    Example:
        >>> multi_krum(torch.tensor([[0.0], [1.0], [3.0], [90.0], [2.0]]), byzantine=1)
        tensor([1.5000])
    """
    scores = _krum_scores(updates, byzantine)
    keep = len(updates) - byzantine if keep is None else integer("keep", keep, 1, len(updates))
    return updates[scores.argsort(stable=True)[:keep]].mean(0)


def bulyan(updates: Float[Tensor, "workers size"], byzantine: int) -> Float[Tensor, " size"]:
    """Updates chosen by Krum one after the other, and in each coordinate the mean of those nearest to their median.

    Args:
        updates: one a row.
        byzantine: how many may be wrong; workers must be at least 4 byzantine + 3.

    Raises:
        ValueError: `updates` is no matrix or not finite, or there are too few workers.

    Example:
        >>> bulyan(torch.tensor([[1.0], [2.0], [3.0], [90.0], [2.0], [2.0], [2.0]]), byzantine=1)
        tensor([2.])
    """
    workers = len(checked(updates))
    integer("byzantine", byzantine, 0)
    if workers < 4 * byzantine + 3:
        raise ValueError(f"updates must be at least {4 * byzantine + 3} for byzantine={byzantine}, got {workers}")
    distances, left, chosen = _squared_distances(updates), list(range(workers)), []
    for _ in range(workers - 2 * byzantine):
        among = distances[left][:, left]
        scores = _scores(among, byzantine)
        # Of two that are each other's nearest, the one that is nearer to the others, whatever their order; distances to
        # the farthest would hide the rest.
        others = among.sort(1).values[:, : len(left) - byzantine].sum(1)
        best = int(torch.where(scores == scores.min(), others, torch.inf).argmin())
        chosen.append(left.pop(best))
    kept = updates[chosen]
    away = (kept - coordinate_median(kept)).abs()
    nearest = away.topk(len(chosen) - 2 * byzantine, dim=0, largest=False).indices
    return kept.gather(0, nearest).mean(0)


def checked(updates: Tensor, least: int = 1) -> Tensor:
    """The updates, if they are a finite matrix of floating-point numbers with so many rows."""
    if not isinstance(updates, Tensor):
        raise TypeError(f"updates must be a tensor, got {type(updates).__name__}")
    found = finite_tensor("updates", updates, ndim=2, floating=True)
    if len(found) < least:
        raise ValueError(f"updates must be of at least {least} workers, got {len(found)}")
    return found


def gram(updates: Float[Tensor, "workers size"], chunk: int = 2**16) -> Float[Tensor, "workers workers"]:
    """The inner products of all pairs of updates in float64, without a copy of all of them in it.

    Example:
        >>> gram(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
        tensor([[25.,  3.],
                [ 3.,  1.]], dtype=torch.float64)
    """
    total = torch.zeros(len(updates), len(updates), dtype=torch.float64, device=updates.device)
    for part in updates.split(chunk, dim=1):
        wide = part.double()
        total += wide @ wide.T
    return total


def _trimmed_mean(updates: Tensor, trim: int) -> Tensor:
    workers = len(updates)
    if workers > _MOST_SORTED or updates.requires_grad or updates.device.type != "cpu":
        return updates.sort(0).values[trim : workers - trim].mean(0)
    # Whole rows are compared, a piece that stays in the cache at a time: many times faster than sorting each column.
    steps = _sorting_steps(workers)
    kept = updates.new_empty(workers - 2 * trim, updates.shape[1])
    for part, into in zip(updates.split(_PIECE, dim=1), kept.split(_PIECE, dim=1), strict=True):
        rows = list(part)
        for i, j in steps:
            rows[i], rows[j] = torch.minimum(rows[i], rows[j]), torch.maximum(rows[i], rows[j])
        for k, row in enumerate(into):
            row.copy_(rows[trim + k])
    return kept.mean(0)


@cache
def _sorting_steps(size: int) -> tuple[tuple[int, int], ...]:
    """Pairs to be put in order, one after the other, which sort whatever stands there: Batcher's odd-even merge sort.

    Kenneth Batcher: Sorting Networks and Their Applications. AFIPS Spring Joint Computer Conference 1968.
    """
    steps, run = [], 1
    while run < size:
        apart = run
        while apart:
            for start in range(apart % run, size - apart, 2 * apart):
                for i in range(start, min(start + apart, size - apart)):
                    if i // (2 * run) == (i + apart) // (2 * run):
                        steps.append((i, i + apart))
            apart //= 2
        run *= 2
    return tuple(steps)


def _squared_distances(updates: Tensor) -> Tensor:
    single = torch.promote_types(updates.dtype, torch.float32)
    found = _summed_squares(updates, single).to(single)
    apart = found[~torch.eye(len(found), dtype=torch.bool, device=found.device)]
    # Where squares leave the range of single precision all is done in double: the order of workers must not decide.
    if bool(((apart < _LEAST) | apart.isinf()).any()):
        found = _summed_squares(updates, torch.float64)
    return found


def _summed_squares(updates: Tensor, dtype: torch.dtype) -> Tensor:
    # Of differences: next to a huge wrong update, inner products would lose the distances of all the others.
    total = torch.zeros(len(updates), len(updates), dtype=torch.float64, device=updates.device)
    for piece in updates.split(_PIECE, dim=1):
        part = piece.to(dtype)
        for i in range(len(part) - 1):
            total[i, i + 1 :] += (part[i + 1 :] - part[i]).square().sum(1)
    return total + total.T


def _krum_scores(updates: Tensor, byzantine: int) -> Tensor:
    workers = len(checked(updates))
    integer("byzantine", byzantine, 0)
    if workers < 2 * byzantine + 3:
        raise ValueError(f"updates must be at least {2 * byzantine + 3} for byzantine={byzantine}, got {workers}")
    return _scores(_squared_distances(updates), byzantine)


def _scores(distances: Tensor, byzantine: int) -> Tensor:
    near = max(1, len(distances) - byzantine - 2)
    return distances.sort(1).values[:, 1 : near + 1].sum(1)


class RobustFedAvg(FedAvg):
    """Federated averaging in which a rule of this kind takes the place of the mean of the clients' moves.

    Clients count equally. Running statistics and frozen parameters take their coordinate median; whole numbers, such as
    counters, and booleans the lower one of the two in the middle.

    Args:
        mean: the rule, such as `coordinate_median` or `FlagAggregator(rescale="median_norm")`.
        lr: learning rate of the clients.
        local_epochs: passes over a client's data in a round.
        batch_size: samples in a step.
        momentum, weight_decay: of the clients' SGD, which starts anew each round.
        max_norm: bound on the global norm of a client's gradient; none by default.
        lr_decay: factor on the learning rate after each round.
        loss: maps (output, targets) to a scalar; cross-entropy by default.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from trimtab.federated import RobustFedAvg, coordinate_median, simulate
        >>> clients = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(5)]
        >>> history = simulate(RobustFedAvg(coordinate_median, lr=0.1), nn.Linear(4, 3), clients, rounds=2)
        >>> history.state.server.round
        2
    """

    def __init__(
        self,
        mean: RobustMean,
        lr: float,
        local_epochs: int = 1,
        batch_size: int = 50,
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        max_norm: float | None = None,
        lr_decay: float = 1.0,
        loss: Loss = nn.functional.cross_entropy,
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
            loss=loss,
        )
        self.mean = mean

    def init_server(self, model: nn.Module, num_clients: int) -> ServerState:
        return ServerState(model_state(model), mark_trained(model))

    def aggregate(self, server: ServerState, updates: Sequence[Update]) -> ServerState:
        if not updates:
            raise ValueError("updates must be at least one, got none")
        start, rest = split_trained(server, server.params)
        sent = [split_trained(server, update.params) for update in updates]
        origin = flatten(start)
        step = self.mean(torch.stack([flatten(own) - origin for own, _ in sent]))
        params = unflatten(origin + step, start)
        numbers = {name for name, value in rest.items() if value.is_floating_point() or value.is_complex()}
        if numbers:
            others = coordinate_median(torch.stack([flatten(other) for _, other in sent]))
            params |= unflatten(others, sent[0][1])
        for name in rest.keys() - numbers:  # the first client alone must not decide
            votes = torch.stack([other[name] for _, other in sent])
            params[name] = votes.long().median(0).values.to(rest[name].dtype)
        ordered = {name: params[name] for name in server.params}
        return replace(server, params=ordered, round=server.round + 1)


def mark_trained(model: nn.Module) -> Tensors:
    """For a server's memory: which entries of the state dict are trained. Tied ones stand there by all names."""
    named = model.named_parameters(remove_duplicate=False)
    return {f"{_TRAINED}{name}": torch.tensor(True) for name, p in named if p.requires_grad}


def split_trained(server: ServerState, params: Tensors) -> tuple[Tensors, Tensors]:
    """The entries of a state dict that are trained, as `mark_trained` noted, and the others."""
    own = {name: value for name, value in params.items() if f"{_TRAINED}{name}" in server.memory}
    return own, {name: value for name, value in params.items() if name not in own}
