"""A small model of images and texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab import nets

_ALPHABET = " abcdefghijklmnopqrstuvwxyz0123456789-"


class TextTower(nn.Module):
    """Embeds strings: a gated recurrent network over characters, averaged over the string.

    Args:
        dim: width of the embedding.
        width: of the recurrent network.
    """

    def __init__(self, dim: int, width: int = 64) -> None:
        super().__init__()
        self.characters = nn.Embedding(len(_ALPHABET) + 1, 32, padding_idx=len(_ALPHABET))
        self.recurrent = nn.GRU(32, width, batch_first=True)
        self.head = nn.Linear(width, dim)

    def forward(self, texts: Sequence[str]) -> Float[Tensor, "texts dim"]:
        codes = [torch.tensor([_ALPHABET.index(character) for character in text]) for text in texts]
        padded = nn.utils.rnn.pad_sequence(codes, batch_first=True, padding_value=len(_ALPHABET))
        padded = padded.to(self.head.weight.device)
        states, _ = self.recurrent(self.characters(padded))
        written = (padded < len(_ALPHABET)).unsqueeze(2)
        embedding: Tensor = self.head((states * written).sum(1) / written.sum(1))
        return embedding


class TwoTowers(nn.Module):
    """A small CNN for images, a recurrent network for their texts, and the scale of their cosines.

    Args:
        in_shape: of an image.
        dim: width of the embeddings.
    """

    def __init__(self, in_shape: tuple[int, ...], dim: int = 32) -> None:
        super().__init__()
        self.image = nets.small_cnn(in_shape, dim, width=8)
        self.text = TextTower(dim)
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    @property
    def scale(self) -> Float[Tensor, ""]:
        return self.log_scale.exp()
