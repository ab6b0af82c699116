"""Categorical draws by the Gumbel trick, and the exact law that they have in too little precision."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.ops.arguments import finite_tensor, positive, real_problem, tensor

GUMBEL_LIMIT = -math.log(-math.log1p(-(2.0**-24)))
"""The largest Gumbel variable that a 32-bit uniform number gives."""


def gumbel_categorical(
    scores: Float[Tensor, "... values"],
    *,
    uniform: Float[Tensor, "... values"] | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "..."]:
    """Draws from softmax(scores) by the Gumbel trick, in the precision of the scores.

    Args:
        scores: log-probabilities up to a constant. In float32 the draws are those of `truncated_gumbel_probs`; in
            float64, which this needs for an exact draw, they are right to 2e-16.
        uniform: numbers in [0, 1); drawn in the type of the scores where they are not given.
        generator: for these.

    Raises:
        TypeError: if `scores` are not floating point, or `uniform` is no real tensor.
        ValueError: if there are no values, or `uniform` has not the shape of `scores`.

    Example:
        >>> gumbel_categorical(torch.tensor([0.0, 3.0]), uniform=torch.tensor([0.5, 0.5])).item()
        1
    """
    scores = tensor("scores", scores, floating=True)
    if scores.ndim == 0 or scores.shape[-1] == 0:
        raise ValueError(f"scores must be of at least one value, got shape {tuple(scores.shape)}")
    if uniform is not None and not isinstance(uniform, Tensor):
        raise TypeError(f"uniform must be a tensor, got {type(uniform).__name__}")
    if problem := real_problem(uniform=uniform):
        raise TypeError(problem)
    if uniform is not None and uniform.shape != scores.shape:
        raise ValueError(f"uniform must have the shape of scores, {tuple(scores.shape)}, got {tuple(uniform.shape)}")
    if uniform is None:
        uniform = torch.rand(scores.shape, generator=generator, dtype=scores.dtype).to(scores.device)
    return (scores - (-uniform.log()).log()).argmax(-1)


def truncated_gumbel_probs(
    probs: Float[Tensor, "... values"], limit: float = GUMBEL_LIMIT
) -> Float[Tensor, "... values"]:
    r"""The exact law of the Gumbel trick when no Gumbel variable can exceed a limit M.

    With the probabilities in rising order, $S_i = \sum_{j \ge i} p_j$, $\varepsilon = e^{-M}$ and $p_0 = 0$,

    $$
    P(k) = p_k \sum_{i \le k} \frac{e^{(K-i+1)\varepsilon}}{S_i}
    \bigl(e^{-S_i \varepsilon / p_i} - e^{-S_i \varepsilon / p_{i-1}}\bigr) :
    $$

    the value k wins at a level that the values below i cannot reach. Each factor grows with the probability.

    This is the paper's law. A number of b bits is, besides, rounded down to a multiple of $2^{-b}$, which gives the
    rarest values back about half of what they lose: where truncation leaves $e^{-x} p$ of a probability p, with
    $x = 2^{-b} / p$, rounding leaves $p\, x / (e^x - 1)$.

    Args:
        probs: non-negative, of sum 1 along the last dimension.
        limit: M; 16.64 in 32 bits, 7.6 in 16.

    Returns:
        Probabilities in the order and the type of `probs`, computed in float64.

    Raises:
        ValueError: if they are no probabilities, or the limit is not positive.

    Example:
        >>> truncated_gumbel_probs(torch.tensor([0.9, 0.1], dtype=torch.float64), limit=1.0)
        tensor([0.9947, 0.0053], dtype=torch.float64)
    """
    probs = finite_tensor("probs", probs, floating=True)
    if probs.ndim == 0 or bool((probs < 0).any()) or bool(((probs.double().sum(-1) - 1).abs() > 1e-3).any()):
        raise ValueError("probs must be non-negative and sum to 1 along the last dimension, got others")
    tail = math.exp(-positive("limit", limit))
    p, order = probs.double().sort(-1)
    count = torch.arange(p.shape[-1], 0, -1, dtype=p.dtype, device=p.device)
    above = p.flip(-1).cumsum(-1).flip(-1)
    below = torch.cat([torch.zeros_like(p[..., :1]), p[..., :-1]], -1)
    # A probability of 0 makes its term exp(-inf): such a value never wins.
    terms = ((count - above / p) * tail).exp() - ((count - above / below) * tail).exp()
    found = p * (terms / above).cumsum(-1)
    return torch.zeros_like(found).scatter(-1, order, found).to(probs.dtype)
