"""The 1-D tokenizer and its semantic regularisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.generative.quantize import Quantized, VectorQuantizer
from trimtab.ops.arguments import integer, looked_at, non_negative, real_problem, same_shape, tensor


def semantic_regularization(
    features: Float[Tensor, "batch tokens dim"], target: Float[Tensor, "batch tokens dim"]
) -> Float[Tensor, ""]:
    """The negative cosine between features and those of a frozen encoder, on average: -1 where directions agree.

    Args:
        features: which get the gradient.
        target: constants.

    Raises:
        TypeError: if `features` are not floating point, or `target` is no real tensor.
        ValueError: if the shapes differ.

    Example:
        >>> semantic_regularization(torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[5.0, 0.0]]])).item()
        -1.0
    """
    if problem := real_problem(features=features):
        raise TypeError(problem)
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {type(target).__name__}")
    if target.is_complex():
        raise TypeError(f"target must be real, got {target.dtype}")
    same_shape("features", tensor("features", features, floating=True), "target", target)
    return -F.cosine_similarity(features, target.detach(), dim=-1).mean()


def level_averages(grid: Float[Tensor, "batch dim height width"], num_tokens: int) -> Float[Tensor, "batch tokens dim"]:
    """Averages over ever smaller parts of a grid: all of it, all of it again, halves, quarters and so on.

    Args:
        grid: features by place.
        num_tokens: a power of two; the last half of the tokens are averages over so many parts.

    Raises:
        TypeError: if the grid is no real tensor.
        ValueError: if the grid is no batch of feature maps, `num_tokens` is no power of two, or the grid has fewer
            places than there are parts.

    Example:
        >>> level_averages(torch.tensor([[[[1.0, 3.0]]]]), 4).flatten().tolist()
        [2.0, 2.0, 1.0, 3.0]
    """
    if not isinstance(grid, Tensor):
        raise TypeError(f"grid must be a tensor, got {type(grid).__name__}")
    if grid.is_complex():
        raise TypeError(f"grid must be real, got {grid.dtype}")
    if grid.ndim != 4:
        raise ValueError(f"grid must be of shape (batch, dim, height, width), got {tuple(grid.shape)}")
    levels = integer("num_tokens", num_tokens).bit_length() - 1
    if num_tokens != 1 << levels:
        raise ValueError(f"num_tokens must be a power of two, got {num_tokens}")
    parts = [(1, 1)] + [(2 ** (level // 2), 2 ** ((level + 1) // 2)) for level in range(levels)]
    height, width = grid.shape[-2:]
    if any(rows > height or columns > width for rows, columns in parts):
        raise ValueError(f"num_tokens must be at most twice the parts of a {height} x {width} grid, got {num_tokens}")
    return torch.cat([F.adaptive_avg_pool2d(grid, part).flatten(2) for part in parts], 2).transpose(1, 2)


@dataclass(frozen=True)
class Tokenized:
    """A batch through the tokenizer.

    Attributes:
        images: the reconstruction.
        code: the tokens; `code.indices` of shape (batch, num_tokens).
        features: the aligned layer, projected, of shape (batch, places, target_dim).
    """

    images: Tensor
    code: Quantized
    features: Tensor


class Tokenizer1D(nn.Module):
    """Images to tokens in a row, and back.

    Args:
        encoder: a convolutional network, from images to (batch, width, side, side).
        decoder: one from there back to images.
        side: of the grid between them.
        width: of the transformers.
        num_tokens: a power of two; the authors take 256 for a grid of side 16.
        num_codes, code_dim: of the codebook, which has length one vectors; the authors take 16,384 of 8.
        target_dim: features of the frozen encoder.
        encoder_depth, decoder_depth: layers; the authors grow the decoder first.
        align_depth: after which layer of the decoder features are aligned; at most `decoder_depth`.
        heads: attention heads; they divide the width.
        semantic_weight: weight of `semantic_regularization`; 0 leaves it out.
        entropy_weight: weight of the codebook's entropy loss, for very large tokenizers.

    Raises:
        ValueError: if a number is out of its range, or they do not fit each other.

    Example:
        >>> encoder, decoder = nn.Conv2d(1, 32, 4, stride=4), nn.ConvTranspose2d(32, 1, 4, stride=4)
        >>> model = Tokenizer1D(encoder, decoder, side=4, width=32, num_tokens=8, num_codes=64, target_dim=10)
        >>> images, of_frozen_encoder = torch.rand(2, 1, 16, 16), torch.randn(2, 16, 10)
        >>> model.loss(images, of_frozen_encoder).backward()
        >>> model.encode(images).shape, model.decode(model.encode(images)).shape
        (torch.Size([2, 8]), torch.Size([2, 1, 16, 16]))
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        *,
        side: int,
        width: int,
        num_tokens: int,
        num_codes: int,
        target_dim: int,
        code_dim: int = 8,
        encoder_depth: int = 2,
        decoder_depth: int = 4,
        align_depth: int = 3,
        heads: int = 4,
        semantic_weight: float = 0.5,
        entropy_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if integer("width", width) % integer("heads", heads):
            raise ValueError(f"width must be divisible by heads, {heads}, got {width}")
        self.align_depth = integer("align_depth", align_depth, 1, integer("decoder_depth", decoder_depth))
        self.semantic_weight = non_negative("semantic_weight", semantic_weight)
        self.side, self.num_tokens = integer("side", side), num_tokens
        level_averages(torch.zeros(1, 1, side, side), num_tokens)
        self.encoder, self.decoder = encoder, decoder
        self.quantizer = VectorQuantizer(num_codes, code_dim, entropy_weight=entropy_weight, rotation=True)

        def layers(depth: int) -> nn.ModuleList:
            made = (
                nn.TransformerDecoderLayer(
                    width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
                )
                for _ in range(depth)
            )
            return nn.ModuleList(made)

        def places(count: int) -> nn.Parameter:
            return nn.Parameter(width**-0.5 * torch.randn(count, width))

        self.read, self.write = layers(integer("encoder_depth", encoder_depth)), layers(decoder_depth)
        self.grid_in, self.grid_out, self.row_in, self.row_out = map(places, (side**2, side**2, num_tokens, num_tokens))
        self.start = nn.Linear(width, width)
        self.to_code = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, code_dim))
        self.from_code = nn.Linear(code_dim, width)
        self.leave = nn.LayerNorm(width)
        self.project = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.SiLU(),
            nn.Linear(4 * width, 4 * width),
            nn.SiLU(),
            nn.Linear(4 * width, target_dim),
        )

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Tokenized:
        """Tokenize and reconstruct.

        Raises:
            ValueError: if the encoder's output has not the grid's side.
        """
        code = self._code(images)
        made, features = self._images(code.values)
        return Tokenized(made, code, self.project(features))

    def loss(
        self,
        images: Float[Tensor, "batch channels height width"],
        target: Float[Tensor, "batch places target_dim"] | None = None,
    ) -> Float[Tensor, ""]:
        """Squared error, the codebook's loss and the semantic regularisation.

        Args:
            images: a batch.
            target: features of the frozen encoder, row by row of the grid; may be left out where their weight is 0.

        Raises:
            ValueError: if shapes do not fit, or `target` is missing.
        """
        if problem := real_problem(images=images):
            raise TypeError(problem)
        if target is None and self.semantic_weight:
            raise ValueError("target must be features of a frozen encoder where semantic_weight is not 0, got None")
        found = self(images)
        same_shape("images", images, "their reconstruction", found.images)
        loss = F.mse_loss(found.images, images) + found.code.loss
        if target is None or not self.semantic_weight:
            return loss  # type: ignore[no-any-return]
        return loss + self.semantic_weight * semantic_regularization(found.features, target)  # type: ignore[no-any-return]

    def encode(self, images: Float[Tensor, "batch channels height width"]) -> Int[Tensor, "batch tokens"]:
        """The tokens of images."""
        return self._code(images).indices

    def decode(self, indices: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch channels height width"]:
        """The images of tokens.

        Raises:
            TypeError: if they are no tensor of integers.
            ValueError: if they are not of shape (batch, num_tokens), or one is out of range.
        """
        if not isinstance(indices, Tensor):
            raise TypeError(f"indices must be a tensor, got {type(indices).__name__}")
        if indices.is_floating_point():
            raise TypeError(f"indices must be integers, got {indices.dtype}")
        if indices.ndim != 2 or indices.shape[1] != self.num_tokens:
            raise ValueError(f"indices must be of shape (batch, {self.num_tokens}), got {tuple(indices.shape)}")
        if looked_at(indices) and not bool(((indices >= 0) & (indices < self.quantizer.num_codes)).all()):
            raise ValueError(f"indices must be in [0, {self.quantizer.num_codes}), got others")
        return self._images(self.quantizer.lookup(indices))[0]

    def _code(self, images: Tensor) -> Quantized:
        grid = self.encoder(images)
        if grid.ndim != 4 or grid.shape[-2:] != (self.side, self.side):
            raise ValueError(
                f"encoder must give a grid of shape (batch, width, {self.side}, {self.side}), got {tuple(grid.shape)}"
            )
        tokens = self.start(level_averages(grid, self.num_tokens)) + self.row_in
        memory = grid.flatten(2).transpose(1, 2) + self.grid_in
        for layer in self.read:
            tokens = layer(tokens, memory)
        code: Quantized = self.quantizer(self.to_code(tokens))
        return code

    def _images(self, values: Tensor) -> tuple[Tensor, Tensor]:
        row = self.from_code(values)
        places, memory = row[:, :1] + self.grid_out, row + self.row_out
        features = places
        for depth, layer in enumerate(self.write, 1):
            places = layer(places, memory)
            features = places if depth == self.align_depth else features
        grid = self.leave(places).transpose(1, 2).unflatten(2, (self.side, self.side))
        return self.decoder(grid), features
