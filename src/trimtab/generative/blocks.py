"""Transformer blocks over tokens, with attention among those that belong together and an optional condition."""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.ops.arguments import integer, number

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps queries, keys and values, each of shape (batch, heads, tokens, width), to what is attended to."""

causal: Attend = partial(F.scaled_dot_product_attention, is_causal=True)
"""Every token attends to itself and those before it."""


def in_groups(
    q: Float[Tensor, "batch heads tokens width"],
    k: Float[Tensor, "batch heads tokens width"],
    v: Float[Tensor, "batch heads tokens width"],
    sizes: Sequence[int],
) -> Float[Tensor, "batch heads tokens width"]:
    """Attention within consecutive groups of tokens, one call a group: no token sees another group.

    It costs the sum of the squares of the sizes, where a mask over all tokens costs the square of their sum.

    Args:
        q, k, v: queries, keys and values.
        sizes: of the groups, which sum to the number of tokens.

    Example:
        >>> q = torch.randn(2, 4, 5, 8)
        >>> in_groups(q, q, q, [1, 4]).shape
        torch.Size([2, 4, 5, 8])
    """
    parts = zip(q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*part) for part in parts], 2)


def up_to_groups(
    q: Float[Tensor, "batch heads tokens width"],
    k: Float[Tensor, "batch heads tokens width"],
    v: Float[Tensor, "batch heads tokens width"],
    sizes: Sequence[int],
) -> Float[Tensor, "batch heads tokens width"]:
    """Attention to one's own group and all before it, one call a group.

    Args:
        q, k, v: queries, keys and values.
        sizes: of the groups, which sum to the number of tokens.
    """
    ends = itertools.accumulate(sizes)
    parts = zip(q.split(sizes, 2), ends, strict=True)
    return torch.cat([F.scaled_dot_product_attention(part, k[:, :, :end], v[:, :, :end]) for part, end in parts], 2)


class Block(nn.Module):
    """A pre-norm block whose normalisation takes scale and shift from a condition, and whose two branches a gate.

    A condition adds to learned values that are its own, so that without one it is an ordinary block.

    Args:
        dim: width of a token.
        heads: attention heads; they divide the width.
        unit_queries: attend by the cosine of queries and keys times a learned factor, as large transformers of images
            do to stay stable.

    Example:
        >>> Block(8, 2)(torch.randn(3, 5, 8)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(self, dim: int, heads: int, *, unit_queries: bool = False) -> None:
        super().__init__()
        if integer("dim", dim) % integer("heads", heads):
            raise ValueError(f"dim must be divisible by heads, {heads}, got {dim}")
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))
        # Scale and shift before each branch, and its gate.
        self.modulation = nn.Parameter(torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])[:, None].repeat(1, dim))
        self.sharpness = nn.Parameter(torch.full((heads, 1, 1), 4.0).log()) if unit_queries else None

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        cond: Float[Tensor, "batch 6 dim"] | None = None,
        attend: Attend = F.scaled_dot_product_attention,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Mix tokens by attention, then change each of them."""
        whole = self.modulation if cond is None else self.modulation + cond
        scale1, shift1, gate1, scale2, shift2, gate2 = whole[..., None, :].unbind(-3)
        x = x + gate1 * self._attention(_norm(x) * scale1 + shift1, attend)
        out: Tensor = x + gate2 * self.mlp(_norm(x) * scale2 + shift2)
        return out

    def _attention(self, x: Tensor, attend: Attend) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.sharpness is not None:
            # Attention divides by the root of the width; queries undo that.
            factor = self.sharpness.exp().clamp_max(100.0) * q.shape[-1] ** 0.5
            q, k = F.normalize(q, dim=-1) * factor, F.normalize(k, dim=-1)
        out: Tensor = self.out(attend(q, k, v).transpose(1, 2).flatten(2))
        return out


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def draw(
    logits: Float[Tensor, "... codes"],
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Codes drawn by their probabilities.

    Args:
        logits: of all codes.
        top_k: draw among so many of the most probable; 0 for all.
        top_p: draw among the fewest most probable codes that together have this probability.
        generator: of randomness.

    Raises:
        TypeError: `top_k` is no integer.
        ValueError: `top_k` is negative, or `top_p` outside [0, 1].

    Example:
        >>> draw(torch.tensor([[0.0, 9.0, 1.0]]), top_k=1)
        tensor([1])
    """
    if not isinstance(top_k, numbers.Integral) or isinstance(top_k, bool):
        raise TypeError(f"top_k must be an integer, got {top_k!r}")
    if top_k < 0:
        raise ValueError(f"top_k must be at least 0, got {top_k}")
    if not 0 <= number("top_p", top_p) <= 1:
        raise ValueError(f"top_p must be in [0, 1], got {top_p}")
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        probs = ordered.softmax(-1)
        # A code is out where those before it have the probability already; the first never is.
        out = probs.cumsum(-1) - probs >= top_p
        out[..., 0] = False
        logits = logits.masked_fill(torch.zeros_like(out).scatter(-1, order, out), -torch.inf)
    probs = logits.softmax(-1).flatten(0, -2)
    return torch.multinomial(probs, 1, generator=generator).view(logits.shape[:-1])
