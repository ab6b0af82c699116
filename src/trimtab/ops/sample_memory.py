"""A memory that keeps one row per training sample, addressed by the sample's index in the data set.

Losses that remember samples (past predictions, running averages, temperatures) hold one as a submodule, so that
`state_dict()` and `.to()` carry it, and `.eval()` makes it read-only.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn


class SampleMemory(nn.Module):
    """Rows of numbers, one per training sample, written without gradient.

    The index of a batch must be in range and, where rows are written, free of repeats; otherwise two values would
    compete for one row. An index on the CPU is looked at and refused with a ValueError. Looking at an index on an
    accelerator would make the host wait in every step, so there, and inside `torch.compile`, the check is an assertion
    that the device itself makes (`torch._assert_async`): it stops the run, without a pause and with less to read.

    With `torch.distributed` initialised, rows are gathered over all ranks before they are written, so that every rank
    holds the same memory. All ranks must then write batches of equal size, as `DistributedSampler` hands them out.

    In eval mode nothing is written.

    Args:
        num_samples: number of rows, the size of the training set.
        shape: shape of a row; nothing for one number per sample.
        init: what every row starts from.

    Raises:
        ValueError: if a size is not positive.

    Example:
        >>> memory = SampleMemory(4, 2)
        >>> memory.write(torch.tensor([3, 1]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> memory.read(torch.tensor([0, 1]))
        tensor([[0., 0.],
                [3., 4.]])
    """

    rows: Tensor

    def __init__(self, num_samples: int, *shape: int, init: float = 0.0) -> None:
        super().__init__()
        for name, size in [("num_samples", num_samples), *(("shape", size) for size in shape)]:
            if size < 1:
                raise ValueError(f"{name}: {size}; it must be at least 1")
        self.register_buffer("rows", torch.full((num_samples, *shape), init))

    def read(self, index: Int[Tensor, " batch"]) -> Float[Tensor, "batch *shape"]:
        """A copy of the rows of these samples.

        Raises:
            TypeError: if `index` is not int64.
            ValueError: if it is not one-dimensional, or out of range.
        """
        index = self._checked(index)
        return self.rows.index_select(0, index)

    def write(self, index: Int[Tensor, " batch"], value: Float[Tensor, "batch *shape"]) -> None:
        """Replaces the rows of these samples.

        Raises:
            TypeError: if `index` is not int64.
            ValueError: if the shapes do not fit, or an index is out of range or repeated, over all ranks.
        """
        if value.shape != (*index.shape, *self.rows.shape[1:]):
            raise ValueError(
                f"value: shape {tuple(value.shape)}; for an index of shape {tuple(index.shape)} "
                f"it must be {(*index.shape, *self.rows.shape[1:])}"
            )
        if not self.training:
            return
        value = value.detach().to(self.rows)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            index, value = _gathered(index.to(self.rows.device)), _gathered(value)
        self.rows.index_copy_(0, self._checked(index, unique=True), value)

    def average(
        self, index: Int[Tensor, " batch"], value: Float[Tensor, "batch *shape"], momentum: float
    ) -> Float[Tensor, "batch *shape"]:
        """Moves the rows of these samples towards `value`, `momentum * row + (1 - momentum) * value`, and returns them.

        In eval mode the rows stay, and are returned, as they are.

        Raises:
            TypeError: if `index` is not int64.
            ValueError: if the shapes do not fit, or an index is out of range or repeated, over all ranks.
        """
        rows = self.read(index)
        if value.shape != rows.shape:
            raise ValueError(f"value: shape {tuple(value.shape)}; it must be {tuple(rows.shape)}, one row per index")
        if self.training:
            self.write(index, rows.lerp_(value.detach().to(rows), 1 - momentum))
        return rows

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.rows.shape))

    def _checked(self, index: Tensor, unique: bool = False) -> Tensor:
        """The index on the memory's device, once it is known to be in range and, if asked for, free of repeats."""
        if index.dtype != torch.int64:
            raise TypeError(f"index: dtype {index.dtype}; it must be torch.int64 (positions in the training set)")
        if index.ndim != 1 or len(index) == 0:
            raise ValueError(f"index: shape {tuple(index.shape)}; it must be (batch,) with at least one sample")
        readable = index.device.type == "cpu" and not torch.compiler.is_compiling()
        lowest, highest = index.aminmax()
        in_range = (lowest >= 0) & (highest < len(self.rows))
        if not readable:
            torch._assert_async(in_range, "index: out of the range of the training set")
        elif not in_range:
            raise ValueError(
                f"index: values from {int(lowest)} to {int(highest)}; "
                f"they must lie in [0, {len(self.rows)}), the training set's size"
            )
        if unique:
            ordered = index.sort().values
            repeated = ordered[1:] == ordered[:-1]
            if not readable:
                torch._assert_async(~repeated.any(), "index: a sample may occur once in a batch")
            elif repeated.any():
                raise ValueError(
                    f"index: {int(ordered[1:][repeated][0])} occurs more than once; a sample may occur once in a batch"
                )
        return index.to(self.rows.device)


def _gathered(tensor: Tensor) -> Tensor:
    """The tensors of all ranks, one after the other."""
    everyone = tensor.new_empty(dist.get_world_size() * len(tensor), *tensor.shape[1:])
    dist.all_gather_into_tensor(everyone, tensor.contiguous())
    return everyone
