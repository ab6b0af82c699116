"""The two networks, and the losses that tie the marginals to the conditionals and to a target."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.ops.arguments import integer, looked_at, real_problem, same_shape
from trimtab.ops.callbacks import StepCallback
from trimtab.ops.ordering import (
    MaskedModel,
    any_order_sample,
    checked_tokens,
    hidden_log_prob,
    hide,
    random_ranks,
    scores_of,
)

LogProb = Callable[[Int[Tensor, "batch length"]], Float[Tensor, " batch"]]
"""Maps whole sequences to a log-probability, known up to a constant: minus an energy."""


class Marginals(nn.Module):
    """A network for the conditionals and one for the log-marginals of the same sequences.

    Args:
        conditional: called `conditional(tokens)`, gives scores of shape (batch, length, values).
        marginal: called `marginal(tokens)`, gives one number a sequence, in shape (batch,) or (batch, 1).
        mask_id: what stands at positions that are not known; the values are those below it.

    Example:
        >>> trunk = lambda: nn.Sequential(nn.Embedding(3, 4), nn.Flatten(), nn.Linear(20, 1))
        >>> scores = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 2))
        >>> marginals = Marginals(scores, trunk(), mask_id=2)
        >>> marginals.log_marginal(torch.tensor([[0, 2, 1, 2, 2]])).shape  # of x_0 = 0 and x_2 = 1
        torch.Size([1])
    """

    def __init__(self, conditional: nn.Module, marginal: nn.Module, mask_id: int) -> None:
        super().__init__()
        self.conditional, self.marginal = conditional, marginal
        self.mask_id = integer("mask_id", mask_id, 2)

    def log_marginal(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, " batch"]:
        """The log-probability of what is known, in one evaluation; of a whole sequence where all is.

        Raises:
            TypeError: if tokens are not int64.
            ValueError: if they are not of shape (batch, length), or outside 0 to the mask.
        """
        self._check(tokens)
        value: Tensor = self.marginal(tokens)
        if value.numel() != len(tokens):
            raise ValueError(f"marginal must give one number a sequence, {len(tokens)}, got {tuple(value.shape)}")
        return value.reshape(len(tokens))

    def log_conditional(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length values"]:
        """The log-probabilities of every value at every unknown position, given what is known."""
        self._check(tokens)
        return scores_of(self.conditional, tokens, self.mask_id).log_softmax(2)

    def sample(
        self,
        tokens: Int[Tensor, "batch length"],
        *,
        generator: torch.Generator | None = None,
        callback: StepCallback | None = None,
    ) -> Int[Tensor, "batch length"]:
        """Fill in what is not known, in a random order, by the conditionals.

        Args:
            tokens: with the mask where something is to be drawn.
            generator: of the order and the draws.
            callback: called after every evaluation as `callback(step, time, tokens)`, with the share of the length that
                is still to be revealed as the time; tokens that it returns replace these.

        Raises:
            TypeError: if tokens, or those that the callback returns, are not int64.
            ValueError: if they are not of shape (batch, length), or outside 0 to the mask.
        """
        self._check(tokens)
        return any_order_sample(self.conditional, tokens, self.mask_id, generator=generator, callback=callback)

    def _check(self, tokens: Tensor) -> None:
        checked_tokens(tokens)
        low, high = (int(end) for end in tokens.aminmax())
        if low < 0 or high > self.mask_id:
            raise ValueError(f"tokens must be in [0, {self.mask_id}], got {low if low < 0 else high}")


def marginal_consistency_loss(
    log_marginal: LogProb,
    conditional: MaskedModel,
    tokens: Int[Tensor, "batch length"],
    mask_id: int,
    *,
    ranks: Int[Tensor, "batch length"] | None = None,
    position: Int[Tensor, " batch"] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " batch"]:
    r"""The squared error of a marginal against the marginal before it times a conditional, at a random place.

    $(\ell(x_{S \cup i}) - \ell(x_S) - \log p(x_i \mid x_S))^2$, where S are the first n of a random order and i is the
    next; both sides get gradients.

    Args:
        log_marginal: gives the log-marginals.
        conditional: gives the conditionals' scores.
        tokens: whole sequences.
        mask_id: the mask.
        ranks, position: the order, and n in 0 to length - 1; drawn where they are not given.
        generator: for these.

    Returns:
        The squared error of each sample.

    Raises:
        TypeError: if tokens are not int64, `mask_id` is no integer, or `position` no tensor of integers.
        ValueError: if shapes do not fit; on the CPU, also if a position is none of the sequence or the mask is among
            the tokens.

    Example:
        >>> half = lambda tokens: -torch.tensor(2.0).log() * (tokens != 2).sum(1)
        >>> coin = lambda tokens: torch.zeros(*tokens.shape, 2)
        >>> marginal_consistency_loss(half, coin, torch.tensor([[0, 1, 1]]), mask_id=2).item() < 1e-12
        True
    """
    if not isinstance(mask_id, Integral) or isinstance(mask_id, bool):
        raise TypeError(f"mask_id must be an integer, got {mask_id!r}")
    checked_tokens(tokens)
    if looked_at(tokens) and bool((tokens == mask_id).any()):
        raise ValueError(f"tokens must be whole sequences without the mask, got {mask_id} among them")
    batch, length = tokens.shape
    if position is not None and not isinstance(position, Tensor):
        raise TypeError(f"position must be a tensor, got {type(position).__name__}")
    if position is not None and position.is_floating_point():
        raise TypeError(f"position must be integers, got {position.dtype}")
    if position is not None and position.shape != (batch,):
        raise ValueError(f"position must be of shape ({batch},), one per sequence, got {tuple(position.shape)}")
    if position is not None and looked_at(position) and not bool(((position >= 0) & (position < length)).all()):
        raise ValueError(f"position must be in [0, {length}), got others")
    if ranks is None:
        ranks = random_ranks(torch.zeros_like(tokens, dtype=torch.bool), generator=generator)
    if position is None:
        position = torch.randint(length, (batch,), generator=generator).to(tokens.device)
    same_shape("ranks", ranks, "tokens", tokens)
    before = hide(tokens, ranks < position[:, None], mask_id)
    after = hide(tokens, ranks <= position[:, None], mask_id)
    step = hidden_log_prob(scores_of(conditional, before, mask_id), tokens, ranks == position[:, None])
    both: Tensor = log_marginal(torch.cat([before, after]))
    if both.numel() != 2 * batch:
        raise ValueError(f"log_marginal must give one number a sequence, {2 * batch}, got shape {tuple(both.shape)}")
    first, second = both.reshape(2 * batch).chunk(2)
    return (second - first - step).square()


def reverse_kl_surrogate(
    log_prob: Float[Tensor, " batch"], target: Float[Tensor, " batch"], *, normalize: bool = True
) -> Tensor:
    r"""What has the gradient of the reverse KL divergence on samples of the model (the score-function estimate).

    $\operatorname{mean}(r \cdot \log p_\theta(x))$ with the constant $r = \log p_\theta(x) - f(x)$, centred, and
    divided by its standard deviation over the batch, as the authors do.

    Args:
        log_prob: of the samples, under the model.
        target: f, their log-probability under the target, up to a constant.
        normalize: whether to divide by the standard deviation.

    Raises:
        ValueError: if the shapes differ or there are fewer than two samples.

    Example:
        >>> log_prob = torch.tensor([-1.0, -3.0], requires_grad=True)
        >>> reverse_kl_surrogate(log_prob, torch.tensor([-2.0, -2.0])).backward()
        >>> log_prob.grad  # what is too probable is pushed down
        tensor([ 0.3536, -0.3536])
    """
    if problem := real_problem(log_prob=log_prob, target=target):
        raise TypeError(problem)
    same_shape("target", target, "log_prob", log_prob)
    if log_prob.ndim != 1 or len(log_prob) < 2:
        raise ValueError(f"log_prob must be a vector of at least two, got shape {tuple(log_prob.shape)}")
    excess = log_prob.detach() - target.detach()
    excess = excess - excess.mean()
    if normalize:
        excess = excess / (excess.square().sum() / (len(excess) - 1)).sqrt().clamp_min(torch.finfo(excess.dtype).eps)
    return (excess * log_prob).mean()
