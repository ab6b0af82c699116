"""A memory of feature vectors of length one, each with something attached, and the search for the nearest of them.

Neighbour votes, queues of negatives and graphs of neighbours hold one as a submodule, so that `state_dict()` and
`.to()` carry it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.ops.arguments import indices, integer, looked_at, tensor_problem
from trimtab.ops.states import fits

_AT_ONCE = 1 << 22  # similarities that are held at a time


class FeatureBank(nn.Module):
    """Rows of unit length with a payload each: a queue that forgets the oldest, one row per sample, or a growing list.

    `add` appends; where the bank is full, the oldest rows make room. `write` addresses rows by a sample's index
    instead. A bank is used in one of the two ways. With `capacity` None it starts empty and grows by what is added.

    Rows that are not finite are left out: in a queue they take a place that counts as empty, and in an indexed bank
    the sample keeps what it had. Nothing here makes an accelerator wait, save `len`.

    Args:
        capacity: number of rows; None grows without end.
        dim: width of the features.
        payload: shape of what is attached to a row: `()` for a label, `(classes,)` for probabilities, None for nothing.
        payload_dtype: its type, `torch.int64` for labels.

    Attributes:
        features: (capacity, dim), of length one, or zero where a row is empty.
        payload: (capacity, *payload), or None.
        filled: (capacity,), which rows hold something.
        cursor: where the next row goes, a scalar.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size is not positive.

    Example:
        >>> bank = FeatureBank(3, 2, payload=(), payload_dtype=torch.int64)
        >>> bank.add(torch.tensor([[2.0, 0.0], [0.0, 5.0]]), torch.tensor([7, 8]))
        >>> similarity, row = bank.nearest(torch.tensor([[0.1, 0.9]]), k=1)
        >>> bank.payload[row]
        tensor([[8]])
    """

    features: Tensor
    payload: Tensor | None
    filled: Tensor
    cursor: Tensor

    def __init__(
        self,
        capacity: int | None,
        dim: int,
        payload: Sequence[int] | None = None,
        payload_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.capacity = None if capacity is None else integer("capacity", capacity)
        self.dim = integer("dim", dim)
        rows = self.capacity or 0
        self.register_buffer("features", torch.zeros(rows, self.dim))
        shape = None if payload is None else [integer("payload", size) for size in payload]
        held = None if shape is None else torch.zeros(rows, *shape, dtype=payload_dtype)
        self.register_buffer("payload", held)
        self.register_buffer("filled", torch.zeros(rows, dtype=torch.bool))
        self.register_buffer("cursor", torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        """How many rows hold something; it makes an accelerator wait."""
        return int(self.filled.sum())

    def __bool__(self) -> bool:
        return True  # also while it is empty

    @torch.no_grad()
    def add(self, z: Float[Tensor, "batch dim"], payload: Tensor | None = None) -> None:
        """Appends rows in the order of the batch; of more than the bank holds, the last ones.

        Args:
            z: features, of any length.
            payload: one for each.

        Raises:
            TypeError: `z` is not floating point, or a payload no real tensor.
            ValueError: shapes do not fit, or a payload is missing or not wanted.

        Example:
            >>> bank = FeatureBank(2, 1)
            >>> bank.add(torch.tensor([[1.0], [-3.0], [2.0]]))
            >>> bank.features[:, 0].sort().values
            tensor([-1.,  1.])
        """
        z, finite, payload = self._rows(z, payload)
        if len(z) == 0:
            return
        if self.capacity is None:
            self.features = torch.cat([self.features, z])
            self.filled = torch.cat([self.filled, finite])
            if payload is not None and self.payload is not None:
                self.payload = torch.cat([self.payload, payload])
            self.cursor += len(z)
            return
        skipped = max(0, len(z) - self.capacity)
        place = (self.cursor + torch.arange(skipped, len(z), device=self.cursor.device)) % self.capacity
        self.features[place], self.filled[place] = z[skipped:], finite[skipped:]
        if payload is not None and self.payload is not None:
            self.payload[place] = payload[skipped:]
        self.cursor.add_(len(z)).remainder_(self.capacity)

    @torch.no_grad()
    def write(self, index: Int[Tensor, " batch"], z: Float[Tensor, "batch dim"], payload: Tensor | None = None) -> None:
        """Replaces the rows of these samples.

        Args:
            index: rows, each once; an accelerator refuses others by an assertion of its own.
            z: features, of any length.
            payload: one for each.

        Raises:
            TypeError: `z` is not floating point, or `index` not int64.
            ValueError: shapes do not fit, an index is out of range or repeated, or the bank has no fixed capacity.

        Example:
            >>> bank = FeatureBank(4, 1)
            >>> bank.write(torch.tensor([3, 0]), torch.tensor([[0.5], [-0.5]]))
            >>> bank.features[:, 0]
            tensor([-1.,  0.,  0.,  1.])
        """
        z, finite, payload = self._rows(z, payload)
        self.check(index, len(z))
        if len(index) == 0:
            return
        index = index.to(self.features.device)
        self.features[index] = torch.where(finite[:, None], z, self.features[index])
        if payload is not None and self.payload is not None:
            taken = finite.view(-1, *[1] * (payload.ndim - 1))
            self.payload[index] = torch.where(taken, payload, self.payload[index])
        self.filled[index] |= finite

    def check(self, index: Int[Tensor, " batch"], length: int) -> None:
        """Refuses an index by which `length` rows could not be written; for callers that change something else first.

        Raises:
            TypeError: `index` is not int64.
            ValueError: it is of another length, out of range or repeated, or the bank has no fixed capacity.
        """
        if self.capacity is None:
            raise ValueError("capacity must be a number for rows that are written by index, got None")
        if not isinstance(index, Tensor) or index.dtype != torch.int64:
            raise TypeError(f"index must be int64, got {getattr(index, 'dtype', type(index).__name__)}")
        if index.shape != (length,):
            raise ValueError(f"index must be of shape ({length},), got {tuple(index.shape)}")
        if length == 0:
            return
        indices("index", index, self.capacity)
        ordered = index.sort().values
        single = ordered[1:] != ordered[:-1]
        if not looked_at(index):
            torch._assert_async(single.all(), "index must hold a row once")
        elif not single.all():
            raise ValueError(f"index must hold a row once, got {int(ordered[1:][~single][0])} more than once")

    def nearest(
        self, z: Float[Tensor, "batch dim"], k: int, exclude_self: bool | Int[Tensor, " batch"] = False
    ) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
        """The rows of the largest cosine with each query, nearest first; queries take part in blocks.

        Args:
            z: queries, of any length; similarities carry gradients to them.
            k: how many.
            exclude_self: the rows that the queries themselves hold, to be left out; or True, which leaves out the
                nearest row of all, whichever that is among equal ones.

        Returns:
            Cosines and rows. Where the bank holds fewer than `k` rows, the cosines beyond them are minus infinity.

        Raises:
            TypeError: `z` is not floating point.
            ValueError: shapes do not fit, or `k` is more than there are rows.

        Example:
            >>> bank = FeatureBank(3, 2)
            >>> bank.add(torch.eye(2))
            >>> bank.nearest(torch.tensor([[3.0, 0.0]]), k=3)
            (tensor([[1., 0., -inf]]), tensor([[0, 1, 2]]))
        """
        z = self._query(z)
        dropped = int(exclude_self is True)
        rows = len(self.features)
        if integer("k", k) + dropped > rows:
            raise ValueError(f"k must be at most {rows - dropped}, the rows of the bank, got {k}")
        own = exclude_self if isinstance(exclude_self, Tensor) else None
        if own is not None and own.shape != z.shape[:1]:
            raise ValueError(f"exclude_self must be of shape {tuple(z.shape[:1])}, got {tuple(own.shape)}")
        block = max(1, _AT_ONCE // rows)
        found = [
            torch.topk(self._cosines(part, None if own is None else own[start : start + block]), k + dropped, dim=1)
            for start, part in zip(range(0, len(z), block), z.split(block), strict=False)
        ]
        if not found:
            return z.new_zeros(0, k), torch.zeros(0, k, dtype=torch.int64, device=z.device)
        values, places = (torch.cat(parts)[:, dropped:] for parts in zip(*found, strict=True))
        return values, places

    def cosines(self, z: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch rows"]:
        """Cosines with all rows at once; minus infinity with empty ones.

        Example:
            >>> bank = FeatureBank(2, 2)
            >>> bank.add(torch.tensor([[0.0, 1.0]]))
            >>> bank.cosines(torch.tensor([[0.0, -2.0]]))
            tensor([[-1., -inf]])
        """
        return self._cosines(self._query(z), None)

    @torch.no_grad()
    def reset(self, keep: int = 0) -> None:
        """Forgets all rows but the first `keep`, as if no more had been added.

        Raises:
            ValueError: `keep` is negative, or more than there are rows.

        Example:
            >>> bank = FeatureBank(None, 2)
            >>> bank.add(torch.eye(2))
            >>> bank.reset(keep=1)
            >>> len(bank)
            1
        """
        integer("keep", keep, 0, len(self.features))
        if self.capacity is None:
            self.features, self.filled = self.features[:keep].clone(), self.filled[:keep].clone()
            self.payload = None if self.payload is None else self.payload[:keep].clone()
        else:
            for held in self._kept():
                held[keep:] = 0
        self.cursor.fill_(keep if self.capacity is None else keep % self.capacity)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of any module; a state that does not fit changes nothing.

        Raises:
            ValueError: it is of a bank of another form.
        """
        own = self.state_dict()
        if self.capacity is None:  # any number of rows will do
            own = {name: _resized(held, state_dict.get(name)) for name, held in own.items()}
        if not fits(state_dict, own):
            shapes = {name: tuple(held.shape) for name, held in self.state_dict().items()}
            raise ValueError(f"state_dict must be of a bank of this form, {shapes}, got another")
        return super().load_state_dict(state_dict, strict, assign)

    def extra_repr(self) -> str:
        return f"{self.capacity}, {self.dim}"

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        if self.capacity is None:
            for name in ("features", "payload", "filled"):
                held, found = getattr(self, name), state_dict.get(prefix + name)
                if held is not None:
                    setattr(self, name, _resized(held, found))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _kept(self) -> Iterator[Tensor]:
        yield from (held for held in (self.features, self.payload, self.filled) if held is not None)

    def _query(self, z: Tensor) -> Tensor:
        if not isinstance(z, Tensor) or not z.is_floating_point():
            raise TypeError(f"z must be floating point, got {getattr(z, 'dtype', type(z).__name__)}")
        if z.ndim != 2 or z.shape[1] != self.dim:
            raise ValueError(f"z must be of shape (batch, {self.dim}), got {tuple(z.shape)}")
        return F.normalize(z.to(self.features), dim=1)

    def _rows(self, z: Tensor, payload: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows to be held, which of them are finite, and their payload."""
        if (payload is None) != (self.payload is None):
            wanted = "None" if self.payload is None else "a tensor"
            raise ValueError(f"payload must be {wanted} for this bank, got {type(payload).__name__}")
        if problem := tensor_problem(payload=payload):
            raise TypeError(problem)
        found = self._query(z)
        finite = found.isfinite().all(1)
        found = torch.where(finite[:, None], found, 0)
        if payload is not None and self.payload is not None:
            shape = (len(z), *self.payload.shape[1:])
            if payload.shape != shape:
                raise ValueError(f"payload must be of shape {shape}, got {tuple(payload.shape)}")
            if not self.payload.is_floating_point() and looked_at(payload) and not (payload == payload.long()).all():
                raise ValueError(f"payload must be whole numbers for this bank of {self.payload.dtype}, got others")
            payload = payload.detach().to(self.payload)
            if payload.is_floating_point():
                fine = payload.flatten(1).isfinite().all(1) if payload.ndim > 1 else payload.isfinite()
                finite = finite & fine
                payload = torch.where(fine.view(-1, *[1] * (payload.ndim - 1)), payload, 0)
        return found, finite, payload

    def _cosines(self, z: Tensor, own: Tensor | None) -> Tensor:
        # What is added before the backward pass must not change what the gradient is made of.
        features = self.features.clone() if z.requires_grad and torch.is_grad_enabled() else self.features
        with torch.autocast(z.device.type, enabled=False):
            cosines = (z @ features.mT).masked_fill_(~self.filled, -torch.inf)
        return cosines if own is None else cosines.scatter_(1, own[:, None].to(cosines.device), -torch.inf)


def _resized(held: Tensor, like: Any) -> Tensor:
    """A tensor with as many rows as another; itself where that is none, or has none."""
    if held.ndim == 0 or not isinstance(like, Tensor) or like.ndim == 0:
        return held
    return held.new_zeros(len(like), *held.shape[1:])
