"""A small transformer in plain parts, each of which can be factorised, sliced or left out."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.ops.arguments import integer


class SelfAttention(nn.Module):
    """Attention over a sequence, of four linear layers.

    Args:
        hidden: width of the tokens.
        heads: number of heads.
        head_dim: width of a head; `heads * head_dim` need not be `hidden`.
        causal: a token sees those before it and itself.

    Example:
        >>> SelfAttention(8, heads=3, head_dim=4)(torch.zeros(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(self, hidden: int, heads: int, head_dim: int, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = integer("heads", heads), causal
        width = heads * integer("head_dim", head_dim)
        self.query, self.key, self.value = (nn.Linear(hidden, width) for _ in range(3))
        self.out = nn.Linear(width, hidden)

    def forward(self, x: Float[Tensor, "batch length hidden"]) -> Float[Tensor, "batch length hidden"]:
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        found: Tensor = self.out(seen.transpose(1, 2).flatten(2))
        return found

    def projections(self, x: Float[Tensor, "batch length hidden"]) -> Float[Tensor, "3 batch length width"]:
        """Queries, keys and values."""
        return torch.stack([self.query(x), self.key(x), self.value(x)])


class Residual(nn.Module):
    """`x + inner(norm(x))`: one branch of a block, which gives back what it gets when its inner part gives zero."""

    def __init__(self, hidden: int, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(hidden), inner

    def forward(self, x: Float[Tensor, "batch length hidden"]) -> Float[Tensor, "batch length hidden"]:
        found: Tensor = x + self.inner(self.norm(x))
        return found


class Block(nn.Module):
    """A branch with attention, and one with two layers."""

    def __init__(self, hidden: int, heads: int, head_dim: int, mlp: int, causal: bool) -> None:
        super().__init__()
        self.attention = Residual(hidden, SelfAttention(hidden, heads, head_dim, causal))
        self.mlp = Residual(hidden, nn.Sequential(nn.Linear(hidden, mlp), nn.GELU(), nn.Linear(mlp, hidden)))

    def forward(self, x: Float[Tensor, "batch length hidden"]) -> Float[Tensor, "batch length hidden"]:
        found: Tensor = self.mlp(self.attention(x))
        return found


class Transformer(nn.Module):
    """A pre-norm transformer over tokens with learned positions.

    Args:
        vocabulary: number of tokens.
        context: longest input.
        depth: number of blocks.
        hidden: width.
        heads: attention heads in a block.
        head_dim: width of a head.
        mlp: inner width of the second branch.
        causal: a position sees those before it; otherwise all.

    Example:
        >>> model = Transformer(96, 32)
        >>> tokens = torch.zeros(2, 10, dtype=torch.int64)
        >>> model(tokens).shape, model(tokens, projections=True).shape
        (torch.Size([2, 10, 96]), torch.Size([3, 2, 10, 48]))
    """

    def __init__(
        self,
        vocabulary: int,
        context: int,
        depth: int = 4,
        hidden: int = 48,
        heads: int = 4,
        head_dim: int = 12,
        mlp: int = 192,
        *,
        causal: bool = True,
    ) -> None:
        super().__init__()
        integer("hidden", hidden)
        self.embed = nn.Embedding(integer("vocabulary", vocabulary), hidden)
        self.positions = nn.Parameter(0.02 * torch.randn(integer("context", context), hidden))
        self.layers = nn.ModuleList(
            Block(hidden, heads, head_dim, integer("mlp", mlp), causal) for _ in range(integer("depth", depth))
        )
        self.norm, self.head = nn.LayerNorm(hidden), nn.Linear(hidden, vocabulary)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, tokens: Int[Tensor, "batch length"], projections: bool = False) -> Float[Tensor, "..."]:
        """Scores of the tokens at each position, (batch, length, vocabulary).

        Args:
            tokens: of one or more sequences.
            projections: give the last block's queries, keys and values instead, (3, batch, length, width).

        Raises:
            ValueError: the input is longer than the context.
        """
        length = tokens.shape[1]
        if length > len(self.positions):
            raise ValueError(f"tokens must be at most {len(self.positions)} long, the context, got {length}")
        x = self.embed(tokens) + self.positions[:length]
        for layer in self.layers[:-1] if projections else self.layers:
            x = layer(x)
        if projections:
            last = cast(Residual, self.layers[-1].attention)
            return cast(SelfAttention, last.inner).projections(last.norm(x))
        scores: Tensor = self.head(self.norm(x))
        return scores
