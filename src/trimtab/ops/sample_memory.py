"""A memory that keeps one row per training sample, addressed by the sample's index in the data set.

Losses that remember samples (past predictions, running averages, temperatures) hold one as a submodule, so that
`state_dict()` and `.to()` carry it, and `.eval()` makes it read-only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from typing import Literal, get_args

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.ops.arguments import indices, integer, looked_at, one_of, tensor_problem

Repeats = Literal["refuse", "mean"]


class SampleMemory(nn.Module):
    """Rows of numbers, one per training sample, written without gradient.

    An index must be in range. One on the CPU is looked at and refused with a ValueError. Looking at an index on an
    accelerator would make the host wait in every step, so there, and inside `torch.compile`, the check is an assertion
    that the device itself makes (`torch._assert_async`): it stops the run, without a pause and with less to read.

    A sample that comes twice in a batch would leave two values to compete for one row. With `repeats="refuse"` that is
    an error; with `repeats="mean"` the row takes the mean of the values, whatever their order, as suits samplers with
    replacement and the padded last batch of `DistributedSampler`.

    Only finite rows are taken: a row that would bring in a NaN or an infinity is left out, and the sample keeps what it
    had, so that a batch that diverges spoils nothing. (An infinity that the row already had, such as `init`, may stay.)

    With `torch.distributed` initialised, writing is collective: the batches of all ranks, of any sizes, are gathered
    before anything is written, so that every rank holds the same memory, and an index that is refused on one rank is
    refused on all. Learning the sizes makes an accelerator wait once a step, and breaks a compiled graph.

    In eval mode nothing is written.

    Args:
        num_samples: number of rows, the size of the training set.
        shape: shape of a row; nothing for one number per sample.
        init: what every row starts from.
        repeats: what to do with a sample that comes more than once in a batch, over all ranks: "refuse" or "mean".

    Raises:
        TypeError: if a size is not an integer, or `init` no number.
        ValueError: if a size is not positive, `init` is NaN, or `repeats` is unknown.

    Example:
        >>> memory = SampleMemory(4, 2)
        >>> memory.write(torch.tensor([3, 1]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> memory.read(torch.tensor([0, 1]))
        tensor([[0., 0.],
                [3., 4.]])
    """

    rows: Tensor

    def __init__(self, num_samples: int, *shape: int, init: float = 0.0, repeats: Repeats = "refuse") -> None:
        super().__init__()
        if not isinstance(init, Real):
            raise TypeError(f"init must be a number, got {init!r}")
        if math.isnan(init):
            raise ValueError("init must be a number or infinite, got NaN")
        sizes = [integer("num_samples", num_samples), *(integer("shape", size) for size in shape)]
        self.repeats: Repeats = one_of("repeats", repeats, get_args(Repeats))
        self.register_buffer("rows", torch.full(sizes, init))

    def read(self, index: Int[Tensor, " batch"]) -> Float[Tensor, "batch *shape"]:
        """A copy of the rows of these samples.

        Raises:
            TypeError: if `index` is not int64.
            ValueError: if it is not one-dimensional, or out of range.
        """
        _check_form(index)
        self._check_values(index, unique=False)
        return self.rows.index_select(0, index.to(self.rows.device))

    def check(self, index: Int[Tensor, " batch"]) -> None:
        """Refuses an index that could not be written; collective, as writing is.

        For callers that change something else before they write.

        Raises:
            TypeError: if `index` is not int64.
            ValueError: if it is not one-dimensional, out of range, or repeated where repeats are refused.
        """
        _check_form(index)
        unique = self.training and self.repeats == "refuse"
        self._check_values(self._everyone(index)[0] if self.training else index, unique)

    def write(self, index: Int[Tensor, " batch"], value: Float[Tensor, "batch *shape"]) -> None:
        """Replaces the rows of these samples.

        Raises:
            TypeError: if `index` is not int64.
            ValueError: if the shapes do not fit, or an index is out of range or, where repeats are refused, repeated.
        """
        self._check_shape(index, value)
        self._exchange(index, lambda rows: value)

    def average(
        self, index: Int[Tensor, " batch"], value: Float[Tensor, "batch *shape"], momentum: float
    ) -> Float[Tensor, "batch *shape"]:
        """Moves the rows of these samples towards `value`, `momentum * row + (1 - momentum) * value`, and returns them.

        In eval mode the rows stay, and are returned, as they are.

        Raises:
            TypeError: if `index` is not int64.
            ValueError: if the shapes do not fit, `momentum` is not in [0, 1], or an index is out of range or, where
                repeats are refused, repeated.
        """
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be in [0, 1], got {momentum}")
        self._check_shape(index, value)
        return self.update(index, lambda rows: rows.lerp(value.detach().to(rows), 1 - momentum))

    def replace(
        self, index: Int[Tensor, " batch"], value: Float[Tensor, "batch *shape"]
    ) -> Float[Tensor, "batch *shape"]:
        """As `write`, and gives back what the rows held before; in eval mode what they hold.

        Raises:
            TypeError, ValueError: as `write`.
        """
        self._check_shape(index, value)
        return self._exchange(index, lambda rows: value)[0]

    def update(self, index: Int[Tensor, " batch"], change: Callable[[Tensor], Tensor]) -> Float[Tensor, "batch *shape"]:
        """Replaces the rows of these samples by `change(rows)`, and returns them.

        In eval mode the rows stay, and are returned, as they are. `change` runs without autocast, for a memory has a
        precision of its own.

        Raises:
            TypeError: if `index` is not int64.
            ValueError: if the shapes do not fit, or an index is out of range or, where repeats are refused, repeated.
        """
        return self._exchange(index, change)[1]

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.rows.shape)) + ("" if self.repeats == "refuse" else f", repeats={self.repeats}")

    def _exchange(self, index: Tensor, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The rows of these samples before and after the change."""
        if not self.training:
            rows = self.read(index)
            return rows, rows
        _check_form(index)
        everyone, sizes = self._everyone(index)
        # All ranks look at the same indices, so that they refuse alike, and before anything is read or written.
        self._check_values(everyone, unique=self.repeats == "refuse")
        device = self.rows.device
        index, everyone = index.to(device), everyone.to(device)
        with torch.no_grad(), _without_autocast(device):
            rows = self.rows.index_select(0, index)
            value = change(rows).detach().to(rows)
            self._check_shape(index, value)
            taken = _taken(value, rows)
            value = torch.where(taken.view(-1, *[1] * (value.ndim - 1)), value, rows)
            if self.repeats == "refuse":
                self.rows.index_copy_(0, everyone, _gathered(value, sizes))
                return rows, value
            held = self.rows.index_select(0, everyone)
            value = _means(everyone, _gathered(value, sizes), held, _gathered(taken, sizes))
            self.rows.index_copy_(0, everyone, value)
            return rows, self.rows.index_select(0, index)

    def _everyone(self, index: Tensor) -> tuple[Tensor, list[int] | None]:
        """The indices of all ranks, one after the other, and how many each has; None without other ranks."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return index, None
        index = index.to(self.rows.device)
        sizes = _sizes(index)
        return _gathered(index, sizes), sizes

    def _check_shape(self, index: Tensor, value: Tensor) -> None:
        if problem := tensor_problem(index=index, value=value):
            raise TypeError(problem)
        wanted = (*index.shape, *self.rows.shape[1:])
        if value.shape != wanted:
            raise ValueError(f"value must be of shape {wanted}, one row per index, got shape {tuple(value.shape)}")

    def _check_values(self, index: Tensor, unique: bool) -> None:
        """Refuses an index out of range or, if asked, with repeats."""
        indices("index", index, len(self.rows))
        if unique:
            ordered = index.sort().values
            repeated = ordered[1:] == ordered[:-1]
            if not looked_at(index):
                torch._assert_async(~repeated.any(), "index must hold a sample once")
            elif repeated.any():
                raise ValueError(
                    f"index must hold a sample once in a batch, got {int(ordered[1:][repeated][0])} more than once; "
                    'repeats="mean" takes their mean'
                )


def _check_form(index: Tensor) -> None:
    if not isinstance(index, Tensor):
        raise TypeError(f"index must be a tensor, got {type(index).__name__}")
    if index.dtype != torch.int64:
        raise TypeError(f"index must be int64 (positions in the training set), got {index.dtype}")
    if index.ndim != 1 or len(index) == 0:
        raise ValueError(f"index must be (batch,) with at least one sample, got shape {tuple(index.shape)}")


def _taken(value: Tensor, rows: Tensor) -> Tensor:
    """Of each row, whether all that it brings in is finite."""
    if value.ndim == 1:
        return value.isfinite()
    # Nothing times a finite number is nothing, times another it is NaN: a sum, which compiled takes a fraction of the
    # time that a test of each entry does.
    nothing: Tensor = torch.where(value == rows, 0.0, value * 0.0).flatten(1).sum(1)
    return nothing == 0


def _means(index: Tensor, value: Tensor, held: Tensor, taken: Tensor) -> Tensor:
    """For each position the mean of the values of its sample that are taken, or what the memory holds without any.

    No shape depends on the values, so that nothing waits and nothing is compiled anew.
    """
    order = index.argsort(stable=True)
    ordered = index[order]
    group = torch.cat([ordered.new_zeros(1), (ordered[1:] != ordered[:-1]).long()]).cumsum(0)
    group = torch.empty_like(group).index_copy_(0, order, group)  # of each position, in the order of the batch
    wide = torch.promote_types(value.dtype, torch.float32)
    weight = taken.view(-1, *[1] * (value.ndim - 1))
    kept = torch.where(weight, value.to(wide), 0)
    total = torch.zeros_like(kept).index_add_(0, group, kept)
    count = torch.zeros_like(weight, dtype=wide).index_add_(0, group, weight.to(wide))
    mean = (total / count.clamp(min=1)).index_select(0, group)
    return torch.where(count.index_select(0, group) > 0, mean.to(value.dtype), held)


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _sizes(tensor: Tensor) -> list[int]:
    """The lengths of a tensor on all ranks."""
    lengths = tensor.new_empty(dist.get_world_size(), dtype=torch.int64)
    dist.all_gather_into_tensor(lengths, tensor.new_tensor([len(tensor)], dtype=torch.int64))
    return [int(length) for length in lengths.tolist()]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _gathered_ranks(tensor: Tensor, sizes: list[int]) -> Tensor:
    longest = max(sizes)
    # Collectives know no bool, and no rows of different number.
    sent = tensor.new_zeros(longest, *tensor.shape[1:], dtype=torch.uint8 if tensor.dtype == torch.bool else None)
    sent[: len(tensor)] = tensor
    everyone = sent.new_empty(len(sizes) * longest, *sent.shape[1:])
    dist.all_gather_into_tensor(everyone, sent)
    parts = [part[:size] for part, size in zip(everyone.split(longest), sizes, strict=True)]
    return torch.cat(parts).to(tensor.dtype)


def _gathered(tensor: Tensor, sizes: list[int] | None) -> Tensor:
    """The tensors of all ranks, one after the other."""
    return tensor if sizes is None else _gathered_ranks(tensor, sizes)
