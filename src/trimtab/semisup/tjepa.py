r"""T-JEPA: learns features of a table by telling the features of some columns from those of others, row by row.

For tables, where nobody knows which changes of a row leave its meaning: there are no augmentations and nothing is
reconstructed. Every row keeps its own random columns as context and others as targets; a predictor gets the context's
codes and the targets' places, and must tell the codes that an averaged encoder makes of the whole row.

$$
\mathcal{L} = \frac{1}{K} \sum_{k=1}^{K} \operatorname{MSE}\Bigl(
    g_\phi\bigl( f_\theta(x_{C}),\ T_k \bigr),\ \bigl[ f_{\bar\theta}(x) \bigr]_{T_k}
\Bigr), \qquad \bar\theta \leftarrow m\, \bar\theta + (1 - m)\, \theta
$$

with $C \cap T_k = \emptyset$ and $m$ rising from 0.996 to 1. A further token that belongs to no column stands before
the columns in both encoders, is never predicted, and is dropped from the codes; without it they collapse more easily.

Reference: Hugo Thimonier, Jose Lucas De Melo Costa, Fabrice Popineau, Arpad Rimmel and Bich-Liên Doan, "T-JEPA:
Augmentation-Free Self-Supervised Learning for Tabular Data", ICLR 2025, arXiv 2410.05016. The authors' code draws the
columns among the first positions of a sequence that the further token leads, so that it may be drawn itself and the
last column never is; here the columns are counted past it, as the paper says.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.ops.arguments import floating_tensor, in_range, indices, integer
from trimtab.ops.averaging import Teacher
from trimtab.ops.states import fits

Shares = tuple[float, float]


@dataclass(frozen=True)
class ColumnMasks:
    """Which columns of each row are seen, and which are told.

    Attributes:
        context: the columns seen, as many in every row.
        targets: sets of columns to tell, none of them seen; two sets may share columns.
    """

    context: Int[Tensor, "batch seen"]
    targets: Int[Tensor, "batch sets told"]


def sample_column_masks(
    batch: int,
    num_features: int,
    *,
    context_share: Shares = (0.14, 0.37),
    target_share: Shares = (0.16, 0.62),
    num_targets: int = 4,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> ColumnMasks:
    """Draws the columns that a batch sees and tells.

    The two numbers of columns are drawn once for the batch, each uniform between its shares of the columns and
    rounded, until both find room in a row; the columns themselves for each row.

    Args:
        batch: number of rows.
        num_features: number of columns, at least 3.
        context_share, target_share: least and largest share of the columns, in (0, 1).
        num_targets: sets of columns to tell.
        generator: decides all draws.
        device: where the masks are wanted.

    Raises:
        ValueError: a number is too small, a share is out of range or out of order, or both find no room.

    Example:
        >>> masks = sample_column_masks(2, 8, generator=torch.Generator().manual_seed(0))
        >>> masks.context.shape[0], masks.targets.shape[:2]
        (2, torch.Size([2, 4]))
        >>> bool((masks.context[:, None, :, None] == masks.targets[:, :, None]).any())
        False
    """
    integer("batch", batch, 0)
    integer("num_features", num_features, 3)
    integer("num_targets", num_targets)
    seen, told = (
        _counts(name, share, num_features)
        for name, share in (("context_share", context_share), ("target_share", target_share))
    )
    pairs = [(c, t) for c, t in itertools.product(seen, told) if c + t <= num_features]
    if not pairs:
        raise ValueError(
            f"context_share and target_share must leave room for both in {num_features} columns, "
            f"got {context_share} and {target_share}"
        )
    odds = torch.tensor([seen[c] * told[t] for c, t in pairs])
    at = None if generator is None else generator.device
    num_seen, num_told = pairs[int(torch.multinomial(odds.to(at), 1, generator=generator))]
    order = torch.rand(batch, num_features, generator=generator, device=at).argsort(1)
    scores = torch.rand(batch, num_targets, num_features, generator=generator, device=at)
    hidden = order[:, :num_seen]
    scores.scatter_(2, hidden[:, None].expand(-1, num_targets, -1), 2.0)  # what is seen comes last
    return ColumnMasks(hidden.to(device), scores.argsort(2)[:, :, :num_told].to(device))


def _counts(name: str, share: Shares, num_features: int) -> dict[int, float]:
    """Numbers of columns with their odds: those of a uniform number, rounded."""
    low, high = (in_range(name, value, 0, 1, "neither") for value in share)
    if low > high:
        raise ValueError(f"{name} must be (least, largest), got {share}")
    least, most = (max(1, round(num_features * value)) for value in (low, high))
    return {n: 0.5 if n in (least, most) and least < most else 1.0 for n in range(least, most + 1)}


class TabularTokenizer(nn.Module):
    """A token for each column of a row: a number times a learned vector, or a learned vector for each category.

    Args:
        num_numerical: columns of numbers; standardise them.
        cardinalities: for each column of categories, how many there are.
        dim: width of a token.
        num_extra: learned tokens that belong to no column, in front.

    Raises:
        ValueError: a number is too small, or there are no columns.

    Example:
        >>> TabularTokenizer(2, [3], 8)(torch.zeros(5, 2), torch.tensor([[0], [1], [2], [0], [1]])).shape
        torch.Size([5, 4, 8])
    """

    offsets: Tensor

    def __init__(self, num_numerical: int, cardinalities: Sequence[int], dim: int, num_extra: int = 1) -> None:
        super().__init__()
        self.num_numerical = integer("num_numerical", num_numerical, 0)
        self.cardinalities = tuple(integer("cardinalities", count) for count in cardinalities)
        self.num_features = num_numerical + len(self.cardinalities)
        self.num_extra = integer("num_extra", num_extra, 0)
        if self.num_features == 0:
            raise ValueError("num_numerical and cardinalities must make at least one column, got none")
        bound = integer("dim", dim) ** -0.5
        self.extra = nn.Parameter(torch.empty(num_extra, dim).uniform_(-bound, bound))
        self.weight = nn.Parameter(torch.empty(num_numerical, dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(self.num_features, dim).uniform_(-bound, bound))
        self.categories = nn.Parameter(torch.empty(sum(self.cardinalities), dim).uniform_(-bound, bound))
        starts = torch.tensor([0, *itertools.accumulate(self.cardinalities)][:-1], dtype=torch.int64)
        self.register_buffer("offsets", starts, persistent=False)

    def check(self, x_num: Tensor | None, x_cat: Tensor | None) -> int:
        """The number of rows, once they are known to suit the columns.

        Raises:
            TypeError: `x_num` is not floating point or `x_cat` not int64.
            ValueError: a part is missing or has other columns, there is no row, or a category is out of range.
        """
        rows = set()
        for name, part, width in (("x_num", x_num, self.num_numerical), ("x_cat", x_cat, len(self.cardinalities))):
            if part is None:
                if width:
                    raise ValueError(f"{name} must be of shape (batch, {width}), got None")
                continue
            if part.ndim != 2 or part.shape[1] != width or len(part) == 0:
                raise ValueError(
                    f"{name} must be of shape (batch, {width}) with at least one row, got {tuple(part.shape)}"
                )
            rows.add(len(part))
        if len(rows) != 1:
            raise ValueError(f"x_num and x_cat must have as many rows, got {sorted(rows)}")
        if x_num is not None:
            floating_tensor("x_num", x_num)
        if x_cat is not None and self.cardinalities:
            if x_cat.dtype != torch.int64:
                raise TypeError(f"x_cat must be int64 (codes of categories), got {x_cat.dtype}")
            for column, count in enumerate(self.cardinalities):
                indices(f"x_cat[:, {column}]", x_cat[:, column], count)
        return rows.pop()

    def forward(
        self, x_num: Float[Tensor, "batch numbers"] | None, x_cat: Int[Tensor, "batch codes"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """The tokens: those of no column, then those of the numbers, then those of the categories.

        Raises:
            TypeError, ValueError: as `check`.
        """
        batch = self.check(x_num, x_cat)
        parts = []
        if x_num is not None:
            parts.append(x_num.to(self.weight)[:, :, None] * self.weight)
        if x_cat is not None and self.cardinalities:
            parts.append(self.categories[x_cat + self.offsets])
        return torch.cat([self.extra.expand(batch, -1, -1), torch.cat(parts, 1) + self.bias], 1)


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
    if codes.ndim != 3 or codes.numel() == 0:
        raise ValueError(f"codes must be of shape (batch, columns, dim) with a row, got {tuple(codes.shape)}")
    return codes.detach().var(0, correction=0).mean()


def _picked(tokens: Tensor, columns: Tensor) -> Tensor:
    """The tokens of some columns, of each row its own."""
    return tokens.gather(1, columns[:, :, None].expand(-1, -1, tokens.shape[2]))


def _waves(places: Tensor, dim: int, base: float) -> Tensor:
    """Sines and cosines of places, at rates between 1 and 1 / base."""
    rates = torch.exp(torch.arange(0, dim, 2) * (-math.log(base) / dim))
    angles = places[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1)
