r"""How near an unlearned model is to one that was trained without what it was to forget.

The model that is retrained without the forget set is the gold standard: nothing is gained by a lower accuracy on the
forget set than it has. `klom` compares many models of each kind, point by point, by the distributions of their
`margins`; `membership_auc` is the simplest attack, which takes for members the samples of low loss. `relearning_steps`
counts how long what was forgotten takes to be learnt again: soon, where it was only hidden.

Reference: Kristian Georgiev, Roy Rinberg, Sung Min Park, Shivam Garg, Andrew Ilyas, Aleksander Madry and Seth Neel,
"Attribute-to-Delete: Machine Unlearning via Datamodel Matching", ICLR 2025, arXiv 2410.23232 (the KL divergence of
margins); Yeom, Giacomelli, Fredrikson and Jha, "Privacy Risk in Machine Learning", CSF 2018, arXiv 1709.01604 (losses
that betray members).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trimtab.ops.arguments import finite_tensor, indices, integer, positive, tensor, tensor_problem


def margins(logits: Float[Tensor, "*batch classes"], targets: Int64[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    r"""How far a sample's class is ahead of all others: $z_y - \log \sum_{c \ne y} e^{z_c}$, the log-odds of the label.

    Args:
        logits: scores of the classes, two or more.
        targets: labels.

    Raises:
        TypeError: `logits` is not floating point, or `targets` not int64.
        ValueError: shapes do not fit, a label is out of range, or there is one class.

    Example:
        >>> margins(torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0]))  # 2 - ln 2
        tensor([1.3069])
    """
    logits = tensor("logits", logits, floating=True)
    if logits.ndim < 1 or logits.shape[-1] < 2:
        raise ValueError(f"logits must have two or more classes in the last dimension, got {tuple(logits.shape)}")
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets must be a tensor, got {type(targets).__name__}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64 (class indices), got {targets.dtype}")
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f"targets must have shape {tuple(logits.shape[:-1])}, got {tuple(targets.shape)}")
    if targets.numel():
        indices("targets", targets, logits.shape[-1])
    own = logits.gather(-1, targets[..., None])
    others = logits.scatter(-1, targets[..., None], -math.inf)
    return own[..., 0] - others.logsumexp(-1)


def klom(
    unlearned: Float[Tensor, "models points"],
    oracle: Float[Tensor, "oracles points"],
    *,
    bins: int = 20,
    clip: tuple[float, float] = (-100.0, 100.0),
    eps: float = 1e-5,
) -> Float[Tensor, " points"]:
    r"""For each point, the KL divergence of unlearned models' margins from those of retrained ones, in nats.

    Margins are counted in bins of equal width over the range of both kinds; $KL = \sum_b p_b \log (p_b / \max(q_b,
    \epsilon))$ with p of the unlearned models. Report the mean over points, and a high quantile. What two sets of
    retrained models have between them is the floor: few models make it high.

    Args:
        unlearned: margins of models that were unlearned, from different seeds.
        oracle: margins of models that were retrained without the forget set, from as different seeds.
        bins: number of bins.
        clip: margins beyond are set to these ends.
        eps: the least share of oracles in a bin.

    Raises:
        TypeError: margins are not floating point, or `bins` is no integer.
        ValueError: the points differ in number, there is no model, a margin is NaN or infinite, or a number is out of
            range.

    Example:
        >>> klom(torch.zeros(8, 1), torch.ones(8, 1))  # nothing in common: ln(1 / eps)
        tensor([11.5129], dtype=torch.float64)
        >>> klom(torch.arange(4.0)[:, None], torch.arange(4.0)[:, None]).item()
        0.0
    """
    integer("bins", bins)
    positive("eps", eps)
    low, high = clip
    if not low < high:
        raise ValueError(f"clip must be two numbers in rising order, got {clip}")
    both = []
    for name, value in (("unlearned", unlearned), ("oracle", oracle)):
        found = finite_tensor(name, value, ndim=2, floating=True)
        if not len(found):
            raise ValueError(f"{name} must hold the margins of one model or more, got none")
        both.append(found.double().clamp(low, high))
    if both[0].shape[1] != both[1].shape[1]:
        raise ValueError(f"oracle must be of {both[0].shape[1]} points as unlearned, got {both[1].shape[1]}")
    least = torch.minimum(both[0].amin(0), both[1].amin(0))
    width = torch.maximum(both[0].amax(0), both[1].amax(0)) - least
    shares = []
    for values in both:
        place = ((values - least) / torch.where(width > 0, width, 1) * bins).long().clamp(max=bins - 1)
        counts = torch.zeros(bins, values.shape[1], dtype=torch.float64, device=values.device)
        shares.append(counts.scatter_add_(0, place, torch.ones_like(values)) / len(values))
    p, q = shares
    given_back: Tensor = torch.special.xlogy(p, p / q.clamp_min(eps)).sum(0)
    return given_back


def membership_auc(members: Float[Tensor, " members"], others: Float[Tensor, " others"]) -> float:
    """How well losses tell members from others: the chance that a member's loss is the lower one, ties counting half.

    0.5 is what an attacker should be left with; for a forget set compare with what the retrained model has.

    Args:
        members: losses of samples that are suspected of having been trained on.
        others: losses of samples that were not.

    Raises:
        TypeError: losses are not floating point.
        ValueError: there are none of a kind, or a loss is NaN or infinite.

    Example:
        >>> membership_auc(torch.tensor([0.1, 0.5]), torch.tensor([0.3, 0.9]))
        0.75
    """
    if problem := tensor_problem(members=members, others=others):
        raise TypeError(problem)
    for name, value in (("members", members), ("others", others)):
        if not len(finite_tensor(name, value, ndim=1, floating=True)):
            raise ValueError(f"{name} must be one loss or more, got none")
    ordered = others.double().sort().values
    own = members.double()
    # Others above each member, and those not below it.
    above = len(ordered) - torch.searchsorted(ordered, own, right=True)
    not_below = len(ordered) - torch.searchsorted(ordered, own)
    return float((above + not_below).double().mean() / (2 * len(ordered)))


def relearning_steps(step: Callable[[], object], known_again: Callable[[], bool], *, limit: int, every: int = 1) -> int:
    """Steps of training on the forget set until a model knows it again; compare with what the retrained model takes.

    Args:
        step: makes one step of training.
        known_again: says whether the model now knows what it was to forget, such as whether the loss is what it was.
        limit: steps after which it is given up; the answer is then this number.
        every: how many steps go by from one look to the next, the first being before any step.

    Raises:
        TypeError, ValueError: `limit` is no integer or negative, or `every` not positive.

    Example:
        >>> losses = [3.0]
        >>> relearning_steps(lambda: losses.append(losses[-1] / 2), lambda: losses[-1] < 0.5, limit=10)
        3
    """
    integer("limit", limit, 0)
    integer("every", every)
    for done in range(0, limit, every):
        if known_again():
            return done
        for _ in range(min(every, limit - done)):
            step()
    return limit
