"""The encoder of table rows, its averaged copy and the predictor between them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.ops.arguments import in_range, integer, looked_at, real_problem
from trimtab.ops.averaging import Teacher
from trimtab.ops.states import fits
from trimtab.semisup.tjepa.masks import ColumnMasks, Shares, sample_column_masks
from trimtab.semisup.tjepa.tokens import TabularTokenizer


class _Layers(nn.Module):
    """A transformer, a linear layer, and normalisation before and after that."""

    def __init__(self, dim: int, num_layers: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(dim, num_heads, 4 * dim, dropout, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.out = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.LayerNorm(dim))

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.out(self.layers(tokens))
        return found


class TabularEncoder(nn.Module):
    """Codes of the columns of a row, all of them or some, by a transformer over their tokens.

    Args:
        tokenizer: makes the tokens.
        num_layers, num_heads, dropout: of the transformer.

    Raises:
        ValueError: the heads do not divide the width of a token.

    Example:
        >>> encoder = TabularEncoder(TabularTokenizer(5, [], 8), num_layers=1, num_heads=2)
        >>> encoder(torch.zeros(3, 5)).shape, encoder(torch.zeros(3, 5), columns=torch.tensor([[0, 4]] * 3)).shape
        (torch.Size([3, 5, 8]), torch.Size([3, 2, 8]))
    """

    positions: Tensor

    def __init__(
        self, tokenizer: TabularTokenizer, num_layers: int = 4, num_heads: int = 4, dropout: float = 0.01
    ) -> None:
        super().__init__()
        dim = tokenizer.bias.shape[1]
        if dim % integer("num_heads", num_heads) or dim % 2:
            raise ValueError(f"num_heads must divide an even width of tokens, {dim}, got {num_heads}")
        self.tokenizer = tokenizer
        self.transformer = _Layers(
            dim, integer("num_layers", num_layers), num_heads, in_range("dropout", dropout, 0, 1, "left")
        )
        places = torch.arange(tokenizer.num_extra + tokenizer.num_features)
        self.register_buffer("positions", _waves(places, dim, 100.0), persistent=False)

    def forward(
        self,
        x_num: Float[Tensor, "batch numbers"] | None,
        x_cat: Int[Tensor, "batch codes"] | None = None,
        *,
        columns: Int[Tensor, "batch seen"] | None = None,
    ) -> Float[Tensor, "batch seen dim"]:
        """Codes of the columns.

        Args:
            x_num: numbers, standardised; None where there are none.
            x_cat: codes of categories.
            columns: those that each row shows, counted over numbers and then categories; all by default.
        """
        extra = self.tokenizer.num_extra
        tokens = self.tokenizer(x_num, x_cat) + self.positions.to(self.tokenizer.bias)
        if columns is not None:
            tokens = torch.cat([tokens[:, :extra], _picked(tokens[:, extra:], columns)], 1)
        codes: Tensor = self.transformer(tokens)[:, extra:]
        return codes


class _Predictor(nn.Module):
    """Tells codes of columns from codes of others, in a narrow space of its own."""

    positions: Tensor

    def __init__(self, dim: int, width: int, num_features: int, num_layers: int, num_heads: int, dropout: float):
        super().__init__()
        if width % num_heads or width % 2:
            raise ValueError(f"predictor_dim must be even and divisible by the heads, {num_heads}, got {width}")
        self.inward, self.outward = nn.Linear(dim, width), nn.Linear(width, dim)
        self.transformer = _Layers(width, num_layers, num_heads, dropout)
        self.mask = nn.Parameter(torch.empty(width))
        self.register_buffer("positions", _waves(torch.arange(num_features), width, 10_000.0), persistent=False)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)
        nn.init.trunc_normal_(self.mask, std=0.02)

    def forward(self, codes: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        """Codes of the targets, (batch, sets, told, dim)."""
        positions = self.positions.to(self.mask)
        known = self.inward(codes) + positions[context]
        asked = self.mask + positions[targets]
        tokens = torch.cat([known[:, None].expand(-1, targets.shape[1], -1, -1), asked], 2).flatten(0, 1)
        told: Tensor = self.outward(self.transformer(tokens)[:, context.shape[1] :])
        return told.view(*targets.shape, -1)


class TJEPA(nn.Module):
    """An encoder of table rows, its averaged copy, and the predictor between them.

    Minimise `loss` over the module's parameters, and call `update` after each step of the optimizer. What was learnt is
    `encode`, the averaged encoder.

    Args:
        num_numerical: columns of numbers, standardised.
        cardinalities: for each column of categories, how many there are.
        dim: width of a column's code.
        num_layers, num_heads: of the encoder.
        predictor_dim, predictor_layers: width and depth of the predictor, whose heads are the encoder's.
        dropout: of both.
        num_extra: tokens against collapse; 0 leaves them out.
        context_share, target_share, num_targets: see `sample_column_masks`.
        decay: of the averaged encoder at first; it rises to 1.

    Raises:
        ValueError: there are fewer than three columns, or an argument is out of range.

    Example:
        >>> model = TJEPA(4, [3], dim=8, num_layers=1, num_heads=2, predictor_dim=4)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4)
        >>> x_num, x_cat = torch.randn(6, 4), torch.tensor([[0], [1], [2]] * 2)
        >>> loss = model.loss(x_num, x_cat, generator=torch.Generator().manual_seed(0))["total"]
        >>> loss.backward(); optimizer.step(); model.update(progress=0.01)
        >>> model.encode(x_num, x_cat).shape
        torch.Size([6, 5, 8])
    """

    def __init__(
        self,
        num_numerical: int,
        cardinalities: Sequence[int] = (),
        *,
        dim: int = 64,
        num_layers: int = 4,
        num_heads: int = 4,
        predictor_dim: int = 16,
        predictor_layers: int = 4,
        dropout: float = 0.01,
        num_extra: int = 1,
        context_share: Shares = (0.14, 0.37),
        target_share: Shares = (0.16, 0.62),
        num_targets: int = 4,
        decay: float = 0.996,
    ) -> None:
        super().__init__()
        tokenizer = TabularTokenizer(num_numerical, cardinalities, dim, num_extra)
        self.num_features = integer("the number of columns", tokenizer.num_features, 3)
        self.context_share, self.target_share, self.num_targets = context_share, target_share, num_targets
        self._masks(0, torch.Generator())  # refuses shares that leave no room
        self.decay = in_range("decay", decay, 0, 1)
        self.encoder = TabularEncoder(tokenizer, num_layers, num_heads, dropout)
        self.teacher = Teacher(self.encoder, decay)
        self.predictor = _Predictor(
            dim,
            integer("predictor_dim", predictor_dim),
            self.num_features,
            integer("predictor_layers", predictor_layers),
            num_heads,
            dropout,
        )

    def _masks(self, batch: int, generator: torch.Generator | None, device: Any = None) -> ColumnMasks:
        return sample_column_masks(
            batch,
            self.num_features,
            context_share=self.context_share,
            target_share=self.target_share,
            num_targets=self.num_targets,
            generator=generator,
            device=device,
        )

    def loss(
        self,
        x_num: Float[Tensor, "batch numbers"] | None,
        x_cat: Int[Tensor, "batch codes"] | None = None,
        *,
        masks: ColumnMasks | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """How far predicted codes are from the averaged encoder's, for a batch of rows.

        Args:
            x_num: numbers; None where there are none.
            x_cat: codes of categories.
            masks: which columns are seen and told, instead of drawing them.
            generator: decides what is drawn.

        Returns:
            `total`, for the gradient, and `variance`, the mean variance of the target codes over the batch, detached:
            it falls where they collapse.

        Raises:
            TypeError: a dtype is wrong.
            ValueError: the columns do not fit, there is no row, a category is out of range, or masks do not fit.
        """
        batch = self.encoder.tokenizer.check(x_num, x_cat)
        if masks is None:
            masks = self._masks(batch, generator, self.predictor.mask.device)
        elif masks.context.ndim != 2 or masks.targets.ndim != 3 or {len(masks.context), len(masks.targets)} != {batch}:
            raise ValueError(
                f"masks must be of {batch} rows, got {tuple(masks.context.shape)} and {tuple(masks.targets.shape)}"
            )
        if masks.context.shape[1] == 0 or 0 in masks.targets.shape:
            raise ValueError(
                f"masks must show and tell a column, got {tuple(masks.context.shape)} and {tuple(masks.targets.shape)}"
            )
        if {masks.context.dtype, masks.targets.dtype} != {torch.int64}:
            raise TypeError(f"masks must be int64, got {masks.context.dtype} and {masks.targets.dtype}")
        if looked_at(masks.context) and not _apart(masks, self.num_features):
            raise ValueError(
                f"masks must be of columns in [0, {self.num_features}), no target among the seen, got others"
            )
        codes = self.teacher(x_num, x_cat)
        wanted = _picked(codes, masks.targets.flatten(1)).unflatten(1, masks.targets.shape[1:])
        seen = self.encoder(x_num, x_cat, columns=masks.context)
        told = self.predictor(seen, masks.context, masks.targets)
        wide = torch.promote_types(told.dtype, torch.float32)
        return {
            "total": F.mse_loss(told.to(wide), wanted.to(wide)),
            "variance": code_variance(codes),
        }

    def update(self, progress: float = 0.0) -> None:
        """Moves the averaged encoder; after each step of the optimizer.

        Args:
            progress: share of the training that is done, in [0, 1]; the decay rises with it to 1.

        Raises:
            ValueError: `progress` is out of range.
        """
        in_range("progress", progress, 0, 1)
        self.teacher.update(self.encoder, self.decay + (1 - self.decay) * progress)

    @torch.no_grad()
    def encode(
        self, x_num: Float[Tensor, "batch numbers"] | None, x_cat: Int[Tensor, "batch codes"] | None = None
    ) -> Float[Tensor, "batch columns dim"]:
        """Codes of all columns, for what comes after: flatten them for a linear layer.

        Raises:
            TypeError, ValueError: as `loss`.
        """
        found: Tensor = self.teacher(x_num, x_cat)
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As every module's, but a state that does not fit changes nothing.

        Raises:
            ValueError: the state is of another model.
        """
        if strict and not fits(state_dict, self.state_dict()):
            raise ValueError("state_dict must be of a model of the same columns and sizes, got other names or shapes")
        return super().load_state_dict(state_dict, strict, assign)


def code_variance(codes: Float[Tensor, "batch columns dim"]) -> Tensor:
    """The mean variance over a batch of every number of the codes: 0 where all rows have the same.

    Raises:
        ValueError: there is no row.

    Example:
        >>> code_variance(torch.tensor([[[0.0, 1.0]], [[2.0, 1.0]]])).item()  # 1 and 0
        0.5
    """
    if problem := real_problem(codes=codes):
        raise TypeError(problem)
    if codes.ndim != 3 or codes.numel() == 0:
        raise ValueError(f"codes must be of shape (batch, columns, dim) with a row, got {tuple(codes.shape)}")
    return codes.detach().var(0, correction=0).mean()


def _apart(masks: ColumnMasks, num_features: int) -> bool:
    """Whether masks name columns that there are, and no target that is seen."""
    known = all(bool(((columns >= 0) & (columns < num_features)).all()) for columns in (masks.context, masks.targets))
    return known and not (masks.context[:, None, None] == masks.targets[..., None]).any()


def _picked(tokens: Tensor, columns: Tensor) -> Tensor:
    """The tokens of some columns, of each row its own."""
    return tokens.gather(1, columns[:, :, None].expand(-1, -1, tokens.shape[2]))


def _waves(places: Tensor, dim: int, base: float) -> Tensor:
    """Sines and cosines of places, at rates between 1 and 1 / base."""
    rates = torch.exp(torch.arange(0, dim, 2) * (-math.log(base) / dim))
    angles = places[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1)
