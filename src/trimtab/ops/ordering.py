r"""Any-order models of discrete sequences: orders, masks, likelihood, sampling and the loss that trains them.

One form for all: tokens are integers of shape (batch, length); a position that is not known holds `mask_id`. A model is
called `model(tokens)` and gives scores of shape (batch, length, values), of which those at unknown positions are the
conditionals $p(x_i \mid x_{\text{known}})$. Scores may have a column for the mask itself, as many networks do: it is
never drawn. An order is given as *ranks*: `ranks[b, i]` is when position i of sample b is revealed, from 0.

Shared by masked diffusion (`trimtab.diffusion.first_hitting`), by marginalisation models (`trimtab.generative.mam`) and
by whatever else fills in what is masked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.ops.arguments import class_indices, integer, looked_at, same_shape, tensor_problem
from trimtab.ops.callbacks import StepCallback, after_step

MaskedModel = Callable[..., Tensor]
"""Maps tokens, and perhaps times of shape `(batch,)`, to scores of shape `(batch, length, values)`."""


def random_ranks(
    known: Bool[Tensor, "batch length"], *, generator: torch.Generator | None = None
) -> Int[Tensor, "batch length"]:
    """A uniformly random order of each sample, in which what is known comes first.

    Example:
        >>> ranks = random_ranks(torch.tensor([[False, True, False]]))
        >>> ranks[0, 1].item(), sorted(ranks[0].tolist())
        (0, [0, 1, 2])
    """
    if problem := tensor_problem(known=known):
        raise TypeError(problem)
    if known.dtype != torch.bool or known.ndim != 2:
        raise ValueError(f"known must be bool of shape (batch, length), got {known.dtype} {tuple(known.shape)}")
    keys = torch.rand(known.shape, generator=generator, dtype=torch.float64).to(known.device)
    return (keys - known.to(keys.dtype)).argsort(1).argsort(1)


def hide(
    tokens: Int[Tensor, "batch length"], known: Bool[Tensor, "batch length"], mask_id: int
) -> Int[Tensor, "batch length"]:
    """The tokens with the mask wherever they are not known.

    Raises:
        TypeError: `tokens` holds no integers, `known` is not bool, or `mask_id` no integer.

    Example:
        >>> hide(torch.tensor([[0, 1, 1]]), torch.tensor([[True, False, True]]), mask_id=2).tolist()
        [[0, 2, 1]]
    """
    if problem := tensor_problem(tokens=tokens, known=known):
        raise TypeError(problem)
    if isinstance(mask_id, bool) or not isinstance(mask_id, Integral):
        raise TypeError(f"mask_id must be an integer, got {mask_id!r}")
    if known.dtype != torch.bool or tokens.is_floating_point():
        raise TypeError(f"tokens and known must be integers and bool, got {tokens.dtype} and {known.dtype}")
    return tokens.masked_fill(~known, mask_id)


def scores_of(model: MaskedModel, tokens: Int[Tensor, "batch length"], mask_id: int, *args: Tensor) -> Tensor:
    """The model's scores, with the mask itself excluded where they have a column for it.

    Raises:
        ValueError: if they are not of shape (batch, length, values).
    """
    scores = model(tokens, *args)
    if scores.ndim != 3 or scores.shape[:2] != tokens.shape:
        raise ValueError(
            f"model must give scores of shape ({tokens.shape[0]}, {tokens.shape[1]}, values), got {tuple(scores.shape)}"
        )
    if 0 <= mask_id < scores.shape[2]:
        column = torch.arange(scores.shape[2], device=scores.device) == mask_id
        scores = scores.masked_fill(column, -math.inf)
    return scores


def draw(
    scores: Float[Tensor, "... values"],
    *,
    uniform: Float[Tensor, "..."] | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "..."]:
    """Exact draws from softmax(scores), by inversion in float64: one uniform number a draw.

    Args:
        scores: unnormalised log-probabilities; -inf for what cannot be.
        uniform: the numbers in [0, 1) that decide; drawn where they are not given.
        generator: for these.

    Raises:
        TypeError: an argument is no real tensor.
        ValueError: on the CPU, a row of scores holds NaN or infinity, or nothing that can be, or `uniform` is not in
            [0, 1).

    Example:
        >>> draw(torch.tensor([0.5, 0.25, 0.25]).log(), uniform=torch.tensor(0.6)).item()
        1
    """
    if problem := tensor_problem(scores=scores, uniform=uniform):
        raise TypeError(problem)
    if looked_at(scores) and (scores.shape[-1] == 0 or not scores.amax(-1).isfinite().all()):
        raise ValueError(f"scores must have a finite largest entry in each row, got shape {tuple(scores.shape)}")
    if uniform is not None and looked_at(uniform) and not ((uniform >= 0) & (uniform < 1)).all():
        raise ValueError("uniform must be in [0, 1), got others")
    if uniform is None:
        uniform = torch.rand(scores.shape[:-1], generator=generator, dtype=torch.float64).to(scores.device)
    cumulative = scores.double().softmax(-1).cumsum(-1)
    # Rounding leaves the last sum a little off 1; what is wanted is a share of it, strictly below it.
    level = (uniform.double() * cumulative[..., -1]).unsqueeze(-1)
    return torch.searchsorted(cumulative, level, right=True).squeeze(-1).clamp_max(scores.shape[-1] - 1)


@torch.no_grad()
def any_order_sample(
    model: MaskedModel,
    tokens: Int[Tensor, "batch length"],
    mask_id: int,
    *,
    ranks: Int[Tensor, "batch length"] | None = None,
    tokens_per_call: int = 1,
    times: Float[Tensor, "batch length"] | None = None,
    generator: torch.Generator | None = None,
    callback: StepCallback | None = None,
) -> Int[Tensor, "batch length"]:
    """Fill in what is masked, one position of each sample after the other: exact for exact conditionals.

    Args:
        model: gives the conditionals.
        tokens: with the mask where something is to be drawn; what is known is kept.
        mask_id: the mask.
        ranks: the order; random where it is not given. What is known must come first in it.
        tokens_per_call: how many positions are drawn independently from one evaluation; more than one is faster and
            no longer exact.
        times: for models that take one: when the position of each rank is revealed. The model is then called
            `model(tokens, t)`.
        generator: of the draws.
        callback: called after every evaluation as `callback(step, time, tokens)`, with the share of the length that is
            still to be revealed as the time; tokens that it returns replace these.

    Returns:
        Tokens without masks.

    Raises:
        TypeError: if tokens, or those that the callback returns, are not int64.
        ValueError: if shapes do not fit, or something known comes after something masked.

    Example:
        >>> coin = lambda tokens: torch.zeros(*tokens.shape, 2)
        >>> any_order_sample(coin, torch.tensor([[2, 1, 2]]), mask_id=2).shape
        torch.Size([1, 3])
    """
    checked_tokens(tokens)
    integer("tokens_per_call", tokens_per_call)
    if isinstance(mask_id, bool) or not isinstance(mask_id, Integral):
        raise TypeError(f"mask_id must be an integer, got {mask_id!r}")
    length, hidden = tokens.shape[1], tokens == mask_id
    if ranks is None:
        ranks = random_ranks(~hidden, generator=generator)
    same_shape("ranks", ranks, "tokens", tokens)
    order = ranks.argsort(1)
    if not bool((hidden.gather(1, order).to(torch.int8).diff(dim=1) >= 0).all()):
        raise ValueError("ranks must put what is known before what is masked, got another order")
    tokens = tokens.clone()
    # Samples with fewer masks wait for those with more: from column `first` on, somebody has something to reveal.
    first = length - int(hidden.sum(1).max())
    for step, start in enumerate(range(first, length, tokens_per_call)):
        places = order[:, start : start + tokens_per_call]
        args = () if times is None else (times[:, start],)
        scores = scores_of(model, tokens, mask_id, *args)
        chosen = scores.gather(1, places.unsqueeze(2).expand(-1, -1, scores.shape[2]))
        old = tokens.gather(1, places)
        new = torch.where(old == mask_id, draw(chosen, generator=generator), old)
        tokens.scatter_(1, places, new)
        if callback is not None:
            tokens = told_tokens(callback, step, max(0, length - start - tokens_per_call) / length, tokens)
    return tokens


def told_tokens(callback: StepCallback, step: int, time: float, tokens: Tensor) -> Int[Tensor, "batch length"]:
    """What a callback makes of tokens; what it sees and what it gives are copied, since a sampler's change in place.

    Raises:
        TypeError: if it returns tokens that are not int64.
        ValueError: if it returns tokens of another shape.
    """
    found = after_step(callback, step, time, tokens.clone())
    checked_tokens(found, "the callback's tokens")
    return found.clone()


@torch.no_grad()
def any_order_log_prob(
    model: MaskedModel,
    tokens: Int[Tensor, "batch length"],
    mask_id: int,
    *,
    ranks: Int[Tensor, "batch length"] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " batch"]:
    """The log-probability of what is known, revealed in an order: one evaluation of the model a position.

    Exact conditionals give the same for every order.

    Args:
        model: gives the conditionals.
        tokens: positions with the mask are left out: a marginal.
        mask_id: the mask.
        ranks: the order; random where it is not given. What is known must come first in it.
        generator: of the order.

    Raises:
        TypeError: if tokens are not int64.
        ValueError: if shapes do not fit, or ranks do not number what is known from 0, before what is masked.

    Example:
        >>> coin = lambda tokens: torch.zeros(*tokens.shape, 2)
        >>> any_order_log_prob(coin, torch.tensor([[0, 1, 2]]), mask_id=2)  # two fair coins: log 1/4
        tensor([-1.3863])
    """
    checked_tokens(tokens)
    if isinstance(mask_id, bool) or not isinstance(mask_id, Integral):
        raise TypeError(f"mask_id must be an integer, got {mask_id!r}")
    present = tokens != mask_id
    if ranks is None:
        ranks = random_ranks(present, generator=generator)
    same_shape("ranks", ranks, "tokens", tokens)
    if not _numbers_from_zero(ranks, present):
        raise ValueError("ranks must number what is known from 0, before what is masked, got another order")
    total = torch.zeros(len(tokens), device=tokens.device)
    for step in range(int(present.sum(1).max())):
        scores = scores_of(model, hide(tokens, (ranks < step) & present, mask_id), mask_id)
        total = total + hidden_log_prob(scores, tokens, (ranks == step) & present)
    return total


def any_order_loss(
    model: MaskedModel,
    tokens: Int[Tensor, "batch length"],
    mask_id: int,
    *,
    ranks: Int[Tensor, "batch length"] | None = None,
    hidden: Int[Tensor, " batch"] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " batch"]:
    r"""The loss that trains an any-order model: an unbiased estimate of minus its log-probability over random orders.

    $$
    \mathbb{E}_\sigma \bigl[-\log p(x)\bigr] = \sum_{n=1}^{L} \frac{1}{n}\, \mathbb{E}_{|S|=n}
    \sum_{i \in S} -\log p(x_i \mid x_{\setminus S}),
    $$

    with one draw of n, uniform in 1 to L, and one set S of n hidden positions for each sample; the weight is then L/n.

    Args:
        model: gives the conditionals.
        tokens: data, without masks.
        mask_id: the mask.
        ranks, hidden: the order and the number of hidden positions; drawn where they are not given.
        generator: for these.

    Returns:
        The loss of each sample, in nats a sequence.

    Raises:
        TypeError: if tokens are not int64, or `hidden` holds no integers.
        ValueError: if shapes do not fit or, on the CPU, `hidden` is not in [1, length], ranks are no order or tokens
            hold the mask.

    Example:
        >>> coin = lambda tokens: torch.zeros(*tokens.shape, 2)
        >>> any_order_loss(coin, torch.tensor([[0, 1, 1]]), mask_id=2)  # 3 log 2, whatever is hidden
        tensor([2.0794])
    """
    checked_tokens(tokens)
    if isinstance(mask_id, bool) or not isinstance(mask_id, Integral):
        raise TypeError(f"mask_id must be an integer, got {mask_id!r}")
    batch, length = tokens.shape
    if ranks is None:
        ranks = random_ranks(torch.zeros_like(tokens, dtype=torch.bool), generator=generator)
    if hidden is None:
        hidden = torch.randint(1, length + 1, (batch,), generator=generator).to(tokens.device)
    same_shape("ranks", ranks, "tokens", tokens)
    if not isinstance(hidden, Tensor) or hidden.is_floating_point() or hidden.dtype == torch.bool:
        raise TypeError(f"hidden must be integers, got {getattr(hidden, 'dtype', type(hidden).__name__)}")
    if hidden.shape != (batch,):
        raise ValueError(f"hidden must be of shape ({batch},), one number for each sample, got {tuple(hidden.shape)}")
    if looked_at(hidden) and not ((hidden >= 1) & (hidden <= length)).all():
        raise ValueError(f"hidden must be in [1, {length}], got {hidden.tolist()}")
    if looked_at(ranks) and not (ranks.sort(1).values == torch.arange(length, device=ranks.device)).all():
        raise ValueError(f"ranks must be an order of the {length} positions, from 0, got others")
    if looked_at(tokens) and (tokens == mask_id).any():
        raise ValueError(f"tokens must be without the mask, {mask_id}, got some that hold it")
    known = ranks < (length - hidden).unsqueeze(1)
    scores = scores_of(model, hide(tokens, known, mask_id), mask_id)
    return -length / hidden * hidden_log_prob(scores, tokens, ~known)


def hidden_log_prob(
    scores: Float[Tensor, "batch length values"],
    tokens: Int[Tensor, "batch length"],
    hidden: Bool[Tensor, "batch length"],
) -> Float[Tensor, " batch"]:
    """The sum of log-probabilities of the tokens at the hidden positions; 0 where nothing is hidden.

    Raises:
        TypeError: an argument is no real tensor.
        ValueError: shapes do not fit or, on the CPU, a token at a hidden position is none of the values that have
            scores.

    Example:
        >>> hidden_log_prob(torch.zeros(1, 2, 4), torch.tensor([[3, 0]]), torch.tensor([[True, False]]))
        tensor([-1.3863])
    """
    if problem := tensor_problem(scores=scores, tokens=tokens, hidden=hidden):
        raise TypeError(problem)
    if scores.ndim != 3 or scores.shape[:2] != tokens.shape or hidden.shape != tokens.shape:
        raise ValueError(
            "scores, tokens and hidden must be of one batch and length, got shapes "
            f"{tuple(scores.shape)}, {tuple(tokens.shape)} and {tuple(hidden.shape)}"
        )
    if looked_at(tokens) and bool((hidden & ((tokens < 0) | (tokens >= scores.shape[2]))).any()):
        raise ValueError(f"tokens must be in [0, {scores.shape[2]}) where they are hidden, got others")
    # A masked token is no value: it is replaced before the look-up, and left out of the sum after it.
    values = tokens.masked_fill(~hidden, 0).unsqueeze(2)
    chosen = scores.log_softmax(2).gather(2, values).squeeze(2)
    return chosen.masked_fill(~hidden, 0.0).sum(1)


def _numbers_from_zero(ranks: Tensor, present: Tensor) -> bool:
    """Whether ranks number what is present 0, 1, ... in every sample."""
    position = torch.arange(ranks.shape[1], device=ranks.device)
    numbers = ranks.masked_fill(~present, ranks.shape[1]).sort(1).values
    return bool(((numbers == position) | (position >= present.sum(1, keepdim=True))).all())


def checked_tokens(tokens: Tensor, name: str = "tokens") -> None:
    """Refuses what is not int64 of shape (batch, length), both at least 1."""
    class_indices(name, tokens)
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(f"{name} must have shape (batch, length), neither of them 0, got {tuple(tokens.shape)}")
