r"""Masked diffusion, its exact sampler in one evaluation a token, and what 32-bit arithmetic does to the usual one.

For models that generate tokens by filling in masks. Neither their training nor their sampling needs a time: the loss is
that of an any-order model, and a sample is made by revealing one position after the other, in random order, at times
that can be drawn beforehand. `first_hitting` does so; `ancestral` is the usual sampler, on a time grid, which is as
good only in the limit of many steps, most of which change nothing.

With the probability $\alpha(t)$ that a token is not masked, n masks left at time t, and u uniform in (0, 1), the next
one falls at the time t' given by

$$
1 - \alpha(t') = (1 - \alpha(t))\, u^{1/n} .
$$

The usual sampler draws tokens by the Gumbel trick. In 32 bits a uniform number is at most $1 - 2^{-24}$, so that a
Gumbel variable is at most M = 16.64; the larger probabilities then gain what the smaller ones lose, as at a lower
temperature (`truncated_gumbel_probs`). Over thousands of steps, where nearly all mass is on staying masked, that shows.

This builds on the any-order models of `trimtab.ops.ordering`: that the two are the same is what the paper shows.

Reference: Kaiwen Zheng, Yongxin Chen, Hanzi Mao, Ming-Yu Liu, Jun Zhu and Qinsheng Zhang, "Masked Diffusion Models are
Secretly Time-Agnostic Masked Models and Exploit Inaccurate Categorical Sampling", ICLR 2025, arXiv 2409.02908.
"""

from __future__ import annotations

import itertools
import math
import numbers
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from trimtab.diffusion.gumbel import gumbel_categorical
from trimtab.diffusion.masking import MaskingSchedule, PolynomialMasking
from trimtab.ops.arguments import integer, looked_at, one_of
from trimtab.ops.callbacks import StepCallback
from trimtab.ops.ordering import (
    MaskedModel,
    any_order_loss,
    any_order_sample,
    checked_tokens,
    hidden_log_prob,
    hide,
    random_ranks,
    scores_of,
    told_tokens,
)

Form = Literal["count", "time"]
Reduction = Literal["none", "mean", "sum"]


class MaskedDiffusionLoss(nn.Module):
    r"""The training loss of masked diffusion, called as `loss(model, tokens)`: a bound on minus the log-likelihood.

    In the count form the number n of masks is uniform in 1 to L, and the weight L/n; in the time form t is uniform in
    (0, 1), each token is masked with probability $1 - \alpha(t)$, and the weight is $-\alpha'/(1 - \alpha)$. For every
    schedule the expectations are the same; the count form has the lower variance.

    Args:
        mask_id: the mask.
        form: "count" or "time".
        schedule: of the time form; linear where it is not given.
        reduction: "none", "mean" or "sum" over the batch, of nats a sequence.

    Raises:
        ValueError: for an unknown form or reduction, or a schedule for the count form, which has none.

    Example:
        >>> coin = lambda tokens: torch.zeros(*tokens.shape, 2)
        >>> MaskedDiffusionLoss(mask_id=2)(coin, torch.tensor([[0, 1, 1]]))  # 3 log 2
        tensor(2.0794)
    """

    def __init__(
        self,
        mask_id: int,
        *,
        form: Form = "count",
        schedule: MaskingSchedule | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.mask_id = integer("mask_id", mask_id, least=None)
        self.form: Form = one_of("form", form, get_args(Form))
        if form == "count" and schedule is not None:
            raise ValueError(f"schedule must be left out with the count form, got {type(schedule).__name__}")
        if schedule is not None and not isinstance(schedule, MaskingSchedule):
            raise TypeError(f"schedule must be a MaskingSchedule, got {type(schedule).__name__}")
        self.schedule = schedule or PolynomialMasking()
        self.reduction: Reduction = one_of("reduction", reduction, get_args(Reduction))

    def forward(
        self,
        model: MaskedModel,
        tokens: Int[Tensor, "batch length"],
        *,
        times: Float[Tensor, " batch"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            model: called `model(tokens)`; it takes no time.
            tokens: data, without masks.
            times: of the time form; drawn where they are not given.
            generator: of the times, of the counts and of what is masked.

        Raises:
            TypeError: if tokens are not int64.
            ValueError: if shapes do not fit, or times are given to the count form; on the CPU, also if the mask is
                among the tokens or a time is not in (0, 1].
        """
        if times is not None and self.form == "count":
            raise ValueError("times must be left out with the count form, got some")
        if times is not None and not isinstance(times, Tensor):
            raise TypeError(f"times must be a tensor, got {type(times).__name__}")
        if times is not None and isinstance(tokens, Tensor) and times.shape != tokens.shape[:1]:
            raise ValueError(f"times must have shape ({len(tokens)},), one per sequence, got {tuple(times.shape)}")
        if times is not None and looked_at(times) and not bool(((times > 0) & (times <= 1)).all()):
            raise ValueError("times must be in (0, 1], since at 0 the weight is infinite, got others")
        if isinstance(tokens, Tensor) and looked_at(tokens) and bool((tokens == self.mask_id).any()):
            raise ValueError(f"tokens must be data without the mask, got {self.mask_id} among them")
        if self.form == "count":
            value = any_order_loss(model, tokens, self.mask_id, generator=generator)
        else:
            checked_tokens(tokens)
            if times is None:
                # 1 - u, since a time of 0 would have an infinite weight.
                times = 1 - torch.rand(len(tokens), generator=generator, dtype=torch.float64)
            times = times.to(tokens.device)
            keys = torch.rand(tokens.shape, generator=generator, dtype=torch.float64).to(tokens.device)
            known = keys < self.schedule.alpha(times)[:, None]
            scores = scores_of(model, hide(tokens, known, self.mask_id), self.mask_id)
            value = -self.schedule.rate(times).to(scores.dtype) * hidden_log_prob(scores, tokens, ~known)
        return value if self.reduction == "none" else getattr(value, self.reduction)()


def hitting_times(
    hidden: Bool[Tensor, "batch length"],
    schedule: MaskingSchedule,
    *,
    uniform: Float[Tensor, "batch length"] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch length"]:
    """When the positions are revealed, in the order of their revelation, known ones (at time 1) first.

    Args:
        hidden: what is masked at time 1.
        schedule: of the masking.
        uniform: numbers in (0, 1] that decide, one a column; drawn where they are not given.
        generator: for these.

    Raises:
        TypeError: if `hidden` is not boolean, `uniform` no real tensor or `schedule` no `MaskingSchedule`.
        ValueError: if it is not of shape (batch, length), or `uniform` of another; on the CPU, also if one of its
            numbers is not in (0, 1].

    Returns:
        Falling times; with L masks the first has the distribution function $(1 - alpha(t))^L$.

    Example:
        >>> uniform = torch.full((1, 2), 0.25, dtype=torch.float64)
        >>> hitting_times(torch.ones(1, 2, dtype=torch.bool), PolynomialMasking(), uniform=uniform).tolist()
        [[0.5, 0.125]]
    """
    if not isinstance(hidden, Tensor):
        raise TypeError(f"hidden must be a tensor, got {type(hidden).__name__}")
    if hidden.dtype != torch.bool:
        raise TypeError(f"hidden must be bool, got {hidden.dtype}")
    if hidden.ndim != 2:
        raise ValueError(f"hidden must have shape (batch, length), got {tuple(hidden.shape)}")
    if not isinstance(schedule, MaskingSchedule):
        raise TypeError(f"schedule must be a MaskingSchedule, got {type(schedule).__name__}")
    if uniform is not None and not isinstance(uniform, Tensor):
        raise TypeError(f"uniform must be a tensor, got {type(uniform).__name__}")
    if uniform is not None and uniform.is_complex():
        raise TypeError(f"uniform must be real, got {uniform.dtype}")
    if uniform is not None and uniform.shape != hidden.shape:
        raise ValueError(f"uniform must have the shape of hidden, {tuple(hidden.shape)}, got {tuple(uniform.shape)}")
    if uniform is not None and looked_at(uniform) and not bool(((uniform > 0) & (uniform <= 1)).all()):
        raise ValueError("uniform must be in (0, 1], got others")
    length = hidden.shape[1]
    if uniform is None:
        uniform = 1 - torch.rand(hidden.shape, generator=generator, dtype=torch.float64)
    left = length - torch.arange(length, device=hidden.device)
    steps = uniform.to(hidden.device).log() / left
    # Columns before the first revelation are those of known positions, for which the clock does not move.
    waiting = left > hidden.sum(1, keepdim=True)
    share = steps.masked_fill(waiting, 0.0).cumsum(1).exp()
    return schedule.t_of_alpha(1 - share)


def first_hitting(
    model: MaskedModel,
    tokens: Int[Tensor, "batch length"],
    mask_id: int,
    *,
    tokens_per_call: int = 1,
    schedule: MaskingSchedule | None = None,
    generator: torch.Generator | None = None,
    callback: StepCallback | None = None,
) -> Int[Tensor, "batch length"]:
    """The first-hitting sampler: exact in as many evaluations as there are masks.

    Args:
        model: called `model(tokens)`, or `model(tokens, t)` where a schedule is given.
        tokens: all masks, or a prompt with masks to be filled in.
        mask_id: the mask.
        tokens_per_call: how many positions are revealed an evaluation; more than one draws them independently.
        schedule: for models that take a time. Without it the times are not even drawn: they decide nothing else.
        generator: of all draws.
        callback: called after every evaluation as `callback(step, time, tokens)`; tokens that it returns replace
            these. Since samples have times of their own, the time is the share of the length that is still to be
            revealed, which is the expected time of the linear schedule.

    Raises:
        TypeError: if tokens, or those that the callback returns, are not int64, `mask_id` is no integer or `schedule`
            no `MaskingSchedule`.
        ValueError: if shapes do not fit.

    Example:
        >>> coin = lambda tokens: torch.zeros(*tokens.shape, 2)
        >>> first_hitting(coin, torch.full((4, 8), 2), mask_id=2).shape
        torch.Size([4, 8])
    """
    if not isinstance(mask_id, numbers.Integral) or isinstance(mask_id, bool):
        raise TypeError(f"mask_id must be an integer, got {mask_id!r}")
    if schedule is not None and not isinstance(schedule, MaskingSchedule):
        raise TypeError(f"schedule must be a MaskingSchedule, got {type(schedule).__name__}")
    checked_tokens(tokens)
    hidden = tokens == mask_id
    return any_order_sample(
        model,
        tokens,
        mask_id,
        ranks=random_ranks(~hidden, generator=generator),
        tokens_per_call=tokens_per_call,
        times=None if schedule is None else hitting_times(hidden, schedule, generator=generator),
        generator=generator,
        callback=callback,
    )


@torch.no_grad()
def ancestral(
    model: MaskedModel,
    tokens: Int[Tensor, "batch length"],
    mask_id: int,
    *,
    steps: int,
    schedule: MaskingSchedule | None = None,
    dtype: torch.dtype = torch.float64,
    generator: torch.Generator | None = None,
    callback: StepCallback | None = None,
) -> Int[Tensor, "batch length"]:
    r"""The usual sampler of masked diffusion, on a uniform grid of times: exact only in the limit of many steps.

    From time t to s < t a mask stays with probability $(1 - \alpha(s)) / (1 - \alpha(t))$, and becomes a token that is
    drawn from the model otherwise. The model takes no time, so that it is called only after something has changed; and
    only masked positions are drawn.

    Args:
        model: called `model(tokens)`.
        tokens: all masks, or a prompt with masks to be filled in.
        mask_id: the mask.
        steps: of the grid.
        schedule: of the masking; linear where it is not given.
        dtype: of the Gumbel variables: `torch.float32` reproduces the usual implementations, and their bias.
        generator: of the draws.
        callback: called after every step as `callback(step, time, tokens)`, until nothing is masked; tokens that it
            returns replace these.

    Raises:
        TypeError: if tokens, or those that the callback returns, are not int64, `mask_id` is no integer, `schedule` no
            `MaskingSchedule` or `dtype` not floating point.
        ValueError: if shapes do not fit or `steps` is not positive.

    Example:
        >>> coin = lambda tokens: torch.zeros(*tokens.shape, 2)
        >>> ancestral(coin, torch.full((4, 8), 2), mask_id=2, steps=16).shape
        torch.Size([4, 8])
    """
    if not isinstance(mask_id, numbers.Integral) or isinstance(mask_id, bool):
        raise TypeError(f"mask_id must be an integer, got {mask_id!r}")
    if schedule is not None and not isinstance(schedule, MaskingSchedule):
        raise TypeError(f"schedule must be a MaskingSchedule, got {type(schedule).__name__}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point type, got {dtype}")
    checked_tokens(tokens)
    grid = torch.linspace(1, 0, integer("steps", steps) + 1, dtype=torch.float64)
    masked_share = (1 - (schedule or PolynomialMasking()).alpha(grid)).tolist()
    tokens, scores = tokens.clone(), None
    hidden = tokens == mask_id
    for step, (before, after) in enumerate(itertools.pairwise(masked_share)):
        if not bool(hidden.any()):
            break
        if scores is None:
            scores = scores_of(model, tokens, mask_id)[hidden].to(dtype).log_softmax(1)
        stay = after / before
        if stay > 0:
            # The mask is one more value, in the last column.
            column = torch.full_like(scores[:, :1], math.log(stay))
            new = gumbel_categorical(torch.cat([scores + math.log1p(-stay), column], 1), generator=generator)
        else:
            new = gumbel_categorical(scores, generator=generator)
        new = new.masked_fill(new == scores.shape[1], mask_id)
        if bool((new != mask_id).any()):
            tokens[hidden] = new
            hidden, scores = tokens == mask_id, None
        if callback is not None and not torch.equal(
            found := told_tokens(callback, step, grid[step + 1].item(), tokens), tokens
        ):
            tokens, hidden, scores = found, found == mask_id, None
    return tokens
