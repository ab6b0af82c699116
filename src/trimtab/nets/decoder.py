"""A small decoder-only transformer."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class Decoder(nn.Module):
    """A causal transformer over tokens with learned positions; pre-norm, GELU.

    Args:
        vocabulary: number of tokens.
        context: longest input.
        dim: width.
        depth: number of blocks.
        heads: attention heads in a block.

    Example:
        >>> Decoder(96)(torch.zeros(2, 10, dtype=torch.int64)).shape
        torch.Size([2, 10, 96])
    """

    mask: Tensor

    def __init__(self, vocabulary: int, context: int = 64, dim: int = 64, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.positions = nn.Parameter(0.02 * torch.randn(context, dim))
        layer = nn.TransformerEncoderLayer(
            dim, heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(dim), enable_nested_tensor=False)
        self.head = nn.Linear(dim, vocabulary)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context), persistent=False)

    def forward(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length vocabulary"]:
        """Scores of the token that follows each position, from the tokens up to it.

        Raises:
            ValueError: the input is longer than the context.
        """
        length = tokens.shape[1]
        if length > len(self.positions):
            raise ValueError(f"tokens must be at most {len(self.positions)} long, the context, got {length}")
        hidden = self.embed(tokens) + self.positions[:length]
        scores: Tensor = self.head(self.blocks(hidden, mask=self.mask[:length, :length], is_causal=True))
        return scores
