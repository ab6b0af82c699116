r"""Progressive sparse low-rank adaptation (SaRA): fine-tune the weights that matter least, and no others.

Entries of small magnitude do almost nothing in a pre-trained network, so that training them alone leaves what it knows
in place. A nuclear-norm penalty keeps what is learned of low rank; half-way, training goes on with those entries that
are still small. Gradient and optimizer state are as long as the list of trained entries.

$$
M = \mathbb{1}[\,|W_0| < \theta\,], \qquad
W_{\text{eff}} = (1 - M) \odot W_0 + M \odot V, \qquad
\min_V\; L(W_{\text{eff}}) + \lambda\, \lVert M \odot V \rVert_*, \qquad
M' = M \odot \mathbb{1}[\,|V| < \theta\,]
$$

Teng Hu, Jiangning Zhang, Ran Yi, Hongrui Huang, Yabiao Wang and Lizhuang Ma, "SaRA: High-Efficient Diffusion Model
Fine-tuning with Progressive Sparse Low-Rank Adaptation", ICLR 2025, arXiv 2409.06633. The authors' release penalises
the present values, which are tiny before training, where the paper writes of the learned ones; their change from the
pre-trained values is an option here. Two faults of the release are not followed: in one of its optimizers the
penalty's gradient reaches nothing, and its trained entries start without their signs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.finetune.adapter import AdapterConfig
from trimtab.finetune.applied import applied
from trimtab.ops.arguments import (
    finite_tensor,
    in_range,
    integer,
    non_negative,
    one_of,
    positive,
    tensor_problem,
)

Penalised = Literal["value", "delta"]


def smallest_entries(
    weight: Float[Tensor, "..."], threshold: float = 2e-3, quantile: float | None = None
) -> tuple[Int[Tensor, " n"], float]:
    """Which entries have the least magnitude: their places in the flattened weight, and the threshold they are under.

    Args:
        weight: any floating-point tensor.
        threshold: entries below it in magnitude are taken; `math.inf` for all.
        quantile: if given, the share that is taken instead, in (0, 1]; ties at its edge are left out.

    Raises:
        TypeError: `weight` is not floating-point.
        ValueError: `weight` has NaN or infinite entries, or `threshold` or `quantile` is out of range.

    Example:
        >>> smallest_entries(torch.tensor([[1.0, -0.001], [0.0, 3.0]]))
        (tensor([1, 2]), 0.002)
        >>> smallest_entries(torch.tensor([[1.0, -0.001], [0.0, 3.0]]), quantile=0.75)
        (tensor([0, 1, 2]), 3.0)
    """
    size = finite_tensor("weight", weight, floating=True).detach().flatten().abs()
    if quantile is None:
        threshold = threshold if threshold == math.inf else positive("threshold", threshold)
    else:
        count = round(in_range("quantile", quantile, 0, 1, "right") * len(size))
        threshold = size.kthvalue(count + 1).values.item() if count < len(size) else math.inf
    return (size < threshold).nonzero().squeeze(1), threshold


def sara_lr(threshold: float) -> float:
    """The learning rate the authors take for a threshold: 1e-3 exp(-350 threshold).

    Example:
        >>> f"{sara_lr(2e-3):.4e}"
        '4.9659e-04'
    """
    return 1e-3 * math.exp(-350 * non_negative("threshold", threshold))


class SparseScatter(nn.Module):
    """Parametrization of a weight by its frozen entries and a list of trained ones.

    Args:
        weight: the pre-trained weight.
        index: places of the trained entries in the flattened weight, each once; none freezes the weight.
        threshold: below which `reselect` goes on with an entry.

    Attributes:
        value: the trained entries (n,), in at least float32.
        index: their places (n,).
        active: which of them still train (n,).
        kept: the values of those that do not (n,).

    Raises:
        TypeError: `weight` is not floating-point.
        ValueError: `weight` has NaN or infinite entries.

    Example:
        >>> weight = torch.tensor([[1.0, -0.001], [0.0, 3.0]])
        >>> scatter = SparseScatter(weight, torch.tensor([1, 2]), threshold=2e-3)
        >>> with torch.no_grad():
        ...     _ = scatter.value.add_(0.5)
        >>> scatter(weight).data
        tensor([[1.0000, 0.4990],
                [0.5000, 3.0000]])
    """

    index: Tensor
    active: Tensor
    kept: Tensor

    def __init__(self, weight: Float[Tensor, "..."], index: Int[Tensor, " n"], threshold: float) -> None:
        if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.ndim != 1:
            raise ValueError(f"index must be int64 of shape (n,), got {getattr(index, 'dtype', type(index).__name__)}")
        if len(index) and isinstance(weight, Tensor) and not 0 <= int(index.min()) <= int(index.max()) < weight.numel():
            raise ValueError(f"index must be in [0, {weight.numel()}), got {int(index.min())} to {int(index.max())}")
        if not threshold >= 0:
            raise ValueError(f"threshold must not be negative, got {threshold!r}")
        super().__init__()
        entries = finite_tensor("weight", weight, floating=True).detach().flatten()[index]
        entries = entries.to(torch.promote_types(entries.dtype, torch.float32), copy=True)
        self.threshold = threshold
        self.value = nn.Parameter(entries, requires_grad=len(entries) > 0)
        self.register_buffer("index", index.clone())
        self.register_buffer("active", torch.ones_like(index, dtype=torch.bool))
        self.register_buffer("kept", entries.clone())

    def entries(self) -> Float[Tensor, " n"]:
        """The values at `index` now: trained ones, and those that are kept since they were reselected away."""
        return torch.where(self.active, self.value, self.kept)

    def forward(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The effective weight; backward, the gradient is gathered at `index` alone."""
        flat: Tensor = weight.detach().flatten()
        return flat.scatter(0, self.index, self.entries().to(weight.dtype)).view_as(weight)

    @torch.no_grad()
    def reselect(self) -> int:
        """Go on with those entries alone that are still below the threshold; how many these are."""
        entries = self.entries()
        self.kept.copy_(entries)
        self.value.copy_(entries)
        self.active &= entries.abs() < self.threshold
        return int(self.active.sum())

    def extra_repr(self) -> str:
        return f"entries={len(self.value)}, threshold={self.threshold:g}"


@dataclass(frozen=True, kw_only=True)
class SaRAConfig(AdapterConfig):
    """Which weights SaRA is for, and how many of their entries; for `apply_adapter`.

    The paper adapts every tensor, biases and norms among them: name these modules too, with
    `parameters=("weight", "bias")`. A tensor without an entry below the threshold stays frozen.

    Attributes:
        threshold: entries below it in magnitude are trained.
        quantile: if given, this share of each weight is trained instead, in (0, 1].

    Raises:
        ValueError: `threshold` or `quantile` is out of range.

    Example:
        >>> from trimtab.finetune import apply_adapter
        >>> model = nn.Sequential(nn.Linear(80, 100), nn.ReLU(), nn.Linear(100, 4))
        >>> adapters = apply_adapter(model, SaRAConfig(quantile=0.1, target_modules=["0"]))
        >>> optimizer = torch.optim.AdamW(adapters.trainable_parameters(), lr=sara_lr(2e-3))
        >>> for step in range(4):
        ...     loss = model(torch.ones(4, 80)).square().mean()
        ...     loss = loss + 5e-4 * nuclear_norm_penalty(model, generator=torch.Generator().manual_seed(step))
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     _ = optimizer.step()
        ...     if step == 1:  # half-way
        ...         count = reselect(model, optimizer)
        >>> adapters.num_trainable(), count <= 800
        (800, True)
    """

    threshold: float = 2e-3
    quantile: float | None = None

    def __post_init__(self) -> None:
        if self.threshold != math.inf:
            positive("threshold", self.threshold)
        if self.quantile is not None:
            in_range("quantile", self.quantile, 0, 1, "right")

    def build(self, weight: Float[Tensor, "..."]) -> SparseScatter:
        return SparseScatter(weight, *smallest_entries(weight, self.threshold, self.quantile))


def nuclear_norm(matrix: Float[Tensor, "out in"]) -> Float[Tensor, ""]:
    """Sum of the singular values; its gradient is $U V^T$ over the values that are not zero, zero for a zero matrix.

    Example:
        >>> nuclear_norm(torch.diag(torch.tensor([3.0, 4.0])))
        tensor(7.)
    """
    if problem := tensor_problem(matrix=matrix):
        raise TypeError(problem)
    with torch.autocast(matrix.device.type, enabled=False):
        values = torch.linalg.svdvals(matrix.to(torch.promote_types(matrix.dtype, torch.float32)))
        smallest = torch.finfo(values.dtype).eps * max(matrix.shape) * values.detach().amax()
        return torch.where(values > smallest, values, values.detach()).sum()


def nuclear_norm_penalty(
    model: nn.Module,
    *,
    on: Penalised = "value",
    min_rank_dim: int = 64,
    which: int | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """The nuclear norm of the trained entries of one adapted matrix, all other entries zero.

    Args:
        model: a model with SaRA adapters, not merged.
        on: "value" for the entries as they are, "delta" for their change from the pre-trained ones.
        min_rank_dim: only matrices with both sides longer than this are looked at; 0 without any, where none is.
        which: number of the matrix among these, in the model's order; drawn without it, a new one in every call.
        generator: for that draw.

    Raises:
        ValueError: the model has no SaRA adapter, or `on`, `which` or `min_rank_dim` is out of range.
    """
    one_of("on", on, ("value", "delta"))
    integer("min_rank_dim", min_rank_dim, 0)
    found = [(place.weight, scatter) for place, scatter in applied(model, SparseScatter)]
    long = [(w, s) for w, s in found if w.dim() == 2 and min(w.shape) > min_rank_dim and s.value.requires_grad]
    if not long:
        return found[0][0].new_zeros(())
    if which is None:
        which = int(torch.randint(len(long), (), generator=generator))
    weight, scatter = long[integer("which", which, 0, len(long) - 1)]
    entries = scatter.entries()
    if on == "delta":
        entries = entries - weight.detach().flatten()[scatter.index]
    return nuclear_norm(entries.new_zeros(weight.numel()).scatter(0, scatter.index, entries).view_as(weight))


def reselect(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Go on, half-way through training, with those entries alone that are still small; the others stay as learned.

    Args:
        model: a model with SaRA adapters, not merged.
        optimizer: its moments of the trained entries are forgotten, as they belong to the first half.

    Returns:
        How many entries still train.

    Raises:
        ValueError: the model has no SaRA adapter.
    """
    found = [scatter for _, scatter in applied(model, SparseScatter)]
    if optimizer is not None:
        for scatter in found:
            optimizer.state.pop(scatter.value, None)
    return sum(scatter.reselect() for scatter in found)
