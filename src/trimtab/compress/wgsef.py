r"""Group envelope: the tightest convex penalty for "at most k groups of weights", and its proximal step.

For training networks to a chosen number of live filters, rows or blocks, where group lasso wants a strength to be
found for every number. With group weights $d_j > 0$, which may be 1, sizes or costs, and a budget of $k$ groups,

$$
GS_k(w) = \min_{u \in [0, 1]^m,\ \sum_j u_j \le k}\ \tfrac12 \sum_j \frac{d_j \|w_j\|^2}{u_j}
$$

is the convex envelope of the energy $\tfrac12 \sum_j d_j \|w_j\|^2$ of vectors of at most $k$ live groups. Sorted
$a_j = \sqrt{d_j}\,\|w_j\|$ give its value, and the proximal step has, for a number $\eta$ that makes $\sum_j u_j = k$,

$$
w_j = \frac{u_j}{u_j + \lambda d_j}\, v_j, \qquad
u_j = \operatorname{clip}\bigl( \eta \sqrt{\lambda d_j}\, \|v_j\| - \lambda d_j,\ 0,\ 1 \bigr) .
$$

In training the step follows the optimizer's, with the learning rate in $\lambda$; `GroupEnvelope` can add the
half-space rule, which zeroes a group that a step turned against itself. At the end the $k$ largest groups are kept.

No text of the method was at hand beyond its abstract and its public reviews: the value and the step follow from the
definition, and the half-space rule is that of HSPG.

Reference: Yehonathan Refael, Iftach Arbel and Wasim Huleihel, "Learning k-Level Structured Sparse Neural Networks
Using Group Envelope Regularization", 2022, arXiv 2212.12921.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trimtab.compress.groups import ParameterGroups
from trimtab.ops.arguments import integer, non_negative, number, tensor
from trimtab.ops.states import fits


def group_envelope(
    norms: Float[Tensor, " groups"], k: int, weights: Float[Tensor, " groups"] | None = None
) -> Float[Tensor, ""]:
    """The penalty, from the norms of the groups; convex in them, with a gradient.

    Args:
        norms: of the groups.
        k: how many may live.
        weights: of the groups, positive; ones if None.

    Raises:
        TypeError: `norms` are not floating point.
        ValueError: `norms` is no vector, `k` is not in [1, groups] or `weights` has another shape.

    Example:
        >>> group_envelope(torch.tensor([4.0, 2.0, 1.0]), k=2)  # (16 + (2 + 1)^2) / 2
        tensor(12.5000)
    """
    if not isinstance(norms, Tensor):
        raise TypeError(f"norms must be a tensor, got {type(norms).__name__}")
    d = _weights(norms, k, weights)
    a = (d.sqrt() * norms).sort(descending=True).values
    places = torch.arange(k, device=a.device)  # r: the last r + 1 of k places are shared by all groups from there on
    heads = torch.cat([a.new_zeros(1), a.detach().cumsum(0)])
    average = (heads[-1] - heads[k - 1 - places]) / (places + 1)
    before = torch.cat([a.new_full((1,), torch.inf), a.detach()])[k - 1 - places]
    r = (before > average).to(torch.uint8).argmax()  # the first, which also is no less than what follows it
    alone = torch.arange(len(a), device=a.device) < k - 1 - r
    shared = torch.where(alone, 0, a).sum()
    return (torch.where(alone, a, 0).square().sum() + shared.square() / (r + 1)) / 2


@torch.no_grad()
def prox_group_envelope(
    norms: Float[Tensor, " groups"], k: int, lam: float, weights: Float[Tensor, " groups"] | None = None
) -> Float[Tensor, " groups"]:
    """The factors by which the proximal step multiplies the groups; a dead group's is 0 unless `lam` is.

    Args:
        norms: of the groups.
        k: how many may live.
        lam: of the penalty, with the learning rate in it.
        weights: of the groups, positive; ones if None.

    Raises:
        TypeError: `norms` are not floating point.
        ValueError: `norms` is no vector, `k` is not in [1, groups], `lam` is negative, or `weights` has another shape.

    Example:
        >>> prox_group_envelope(torch.tensor([3.0, 2.0, 0.1]), k=2, lam=0.5)
        tensor([0.6667, 0.6667, 0.0000])
    """
    if not isinstance(norms, Tensor):
        raise TypeError(f"norms must be a tensor, got {type(norms).__name__}")
    if non_negative("lam", lam) == 0:
        _weights(norms, k, weights)
        return torch.ones_like(norms)
    cost = lam * _weights(norms, k, weights).double()
    slope = cost.sqrt() * norms.double()
    live = slope > 0
    # The sum of u is piecewise linear in eta: each group begins to count at one number and is whole at another.
    rises = torch.where(live, slope, 0.0)
    ends = torch.stack([cost, cost + 1])
    turns, slopes, levels = (ends / rises).flatten(), torch.cat([rises, -rises]), torch.cat([-cost, ends[1]])
    enough = k * (1 - 1e-9)  # where the sum stays at k for a while, rounding must not take its last piece for a rise
    before: tuple[Tensor | float, Tensor | float] = (0.0, 0.0)
    if len(norms) > _MANY:
        low, high = _bracket(turns, enough, lambda eta: (eta * slope - cost).clamp_(0, 1).sum())
        begun, whole = turns.view(2, -1) < low
        before = (rises * (begun ^ whole)).sum(), whole.sum() - (cost * (begun ^ whole)).sum()
        near = ((turns >= low) & (turns <= high)).nonzero()[:, 0]
        turns, slopes, levels = turns[near], slopes[near], levels[near]
    turns, order = turns.sort()
    slopes, levels = slopes[order].cumsum(0).add_(before[0]), levels[order].cumsum(0).add_(before[1])
    reached = slopes * turns + levels >= enough
    last = reached.to(torch.uint8).argmax().clamp(min=1) - 1  # the piece that ends where the sum is k
    eta = (k - levels[last]) / slopes[last]
    share = eta * slope - cost
    u = torch.where(live.sum() > k, share.clamp(0, 1) * (share > 1e-12), 1.0) * live
    return (u / (u + cost)).to(norms.dtype)


_MANY = 1 << 14
"""Beyond so many groups only some of the numbers at which they begin and end are sorted."""


def _bracket(turns: Tensor, enough: float, total: Callable[[Tensor], Tensor]) -> tuple[Tensor | float, Tensor | float]:
    """Two of every thousandth of the turns, one after the other, between which the total comes to be enough."""
    marks = turns[:: len(turns) // 1024].sort().values
    first = bisect_left(range(len(marks)), True, key=lambda place: bool(total(marks[place]) >= enough))
    return marks[first - 1] if first else 0.0, marks[first] if first < len(marks) else torch.inf


class GroupEnvelope:
    """The proximal step of the envelope after every optimizer step.

    Momentum can bring a dead group back; the next step decides anew. Each layer has its own.

    Args:
        groups: of one layer, or whatever shares a budget.
        k: how many may live.
        lam: strength of the penalty.
        weights: of the groups, positive; ones if None.
        half_space: zero a group too, after the step, where its product with its former self is below this share of
            the former's square; meant for the end of a training, and may be set there. None leaves it out.

    Raises:
        ValueError: `k` is not in [1, groups], `lam` is negative, `weights` has another shape, or `half_space` is no
            number.

    Example:
        >>> weight = torch.tensor([[3.0], [2.0], [0.1]])
        >>> envelope = GroupEnvelope(ParameterGroups([weight]), k=2, lam=5.0)
        >>> envelope.post_step(lr=0.1)
        >>> weight.flatten(), envelope.kept()
        (tensor([2.0000, 1.3333, 0.0000]), tensor([0, 1]))
    """

    def __init__(
        self,
        groups: ParameterGroups,
        k: int,
        lam: float,
        weights: Float[Tensor, " groups"] | None = None,
        half_space: float | None = None,
    ) -> None:
        self.groups, self.k, self.lam = groups, k, non_negative("lam", lam)
        _weights(groups.norms(), k, weights)
        self.weights = weights
        self.half_space = None if half_space is None else number("half_space", half_space)
        self.former: list[Tensor] = []
        self.steps = 0

    def penalty(self) -> Float[Tensor, ""]:
        """lam times the envelope, with a gradient, where a proximal step is not wanted."""
        return self.lam * group_envelope(self.groups.norms(), self.k, self.weights)

    @torch.no_grad()
    def post_step(self, lr: float = 1.0) -> None:
        """Call after `optimizer.step()`, with its learning rate.

        Raises:
            ValueError: `lr` is negative.
        """
        lam = non_negative("lr", lr) * self.lam
        if lam:
            self.groups.scale_(prox_group_envelope(self.groups.norms(), self.k, lam, self.weights))
        self.steps += 1
        if self.half_space is None:
            self.former = []
            return
        if self.former:
            pairs = list(zip(self.groups.views(), self.former, strict=True))
            turned = sum((now * then).reshape(len(self.groups), -1).sum(1) for now, then in pairs)
            square = sum(then.square().reshape(len(self.groups), -1).sum(1) for _, then in pairs)
            stays = torch.as_tensor(turned) >= self.half_space * torch.as_tensor(square)
            self.groups.scale_(stays.to(self.former[0].dtype))
        self.former = [view.clone() for view in self.groups.views()]

    @torch.no_grad()
    def live(self) -> Int64[Tensor, ""]:
        """How many groups are not zero."""
        return (self.groups.norms() > 0).sum()

    @torch.no_grad()
    def kept(self) -> Int64[Tensor, " k"]:
        """The k groups of the largest weighted norm, in order; of equal ones the first."""
        norms = self.groups.norms()
        order = (_weights(norms, self.k, self.weights).sqrt() * norms).sort(descending=True, stable=True).indices
        return order[: self.k].sort().values

    @torch.no_grad()
    def cut(self) -> Int64[Tensor, " k"]:
        """Zeroes all groups but those of `kept`, and gives those back."""
        kept = self.kept()
        self.groups.scale_(torch.zeros_like(self.groups.norms()).index_fill(0, kept, 1))
        return kept

    def state_dict(self) -> dict[str, Any]:
        """Steps done, and what the groups were, for the half-space rule."""
        return {"steps": self.steps, "former": [value.clone() for value in self.former]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another left off.

        Raises:
            ValueError: the state is of other groups, or of something else.
        """
        if set(state) != {"steps", "former"} or not isinstance(state["former"], list):
            raise ValueError(f"state must have steps and former, got {', '.join(map(str, state)) or 'nothing'}")
        former, views = state["former"], self.groups.views()
        if former and not (len(former) == len(views) and all(map(fits, former, views))):
            raise ValueError("state must be of the same groups, got others")
        self.steps = integer("steps", state["steps"], 0)
        self.former = [value.clone() for value in former]


def _weights(norms: Tensor, k: int, weights: Tensor | None) -> Tensor:
    tensor("norms", norms, ndim=1, floating=True)
    integer("k", k, 1, len(norms))
    if weights is None:
        return torch.ones_like(norms)
    if weights.shape != norms.shape:
        raise ValueError(f"weights must be of shape {tuple(norms.shape)}, got {tuple(weights.shape)}")
    return weights
