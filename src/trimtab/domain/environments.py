"""Batches from several training domains.

A batch of domain generalisation is a list with one `(x, y)` for each source domain, in a fixed order: `DomainBatch`.
`domain_batches` draws such batches without end, as many samples from each domain whatever its size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.ops.arguments import class_indices, integer

DomainBatch = list[tuple[Tensor, Tensor]]
"""One `(x, y)` for each source domain: inputs (batch, ...) and labels (batch,)."""


def checked_domains(
    batches: Sequence[tuple[Float[Tensor, "batch ..."], Int[Tensor, " batch"]]], least: int = 1, *, even: bool = False
) -> DomainBatch:
    """The batch as a list, once its form is known to be right. It looks at shapes and dtypes alone.

    Args:
        batches: one `(x, y)` for each domain.
        least: the number of domains that there must be.
        even: whether all domains must have as many samples.

    Raises:
        TypeError: an entry is no pair of tensors, or labels are not int64.
        ValueError: there are too few domains, a domain is empty or has not one label a sample, samples of two domains
            have other shapes, or, where they must be even, the domains are not.

    Example:
        >>> x, y = torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)
        >>> len(checked_domains([(x, y), (x, y)]))
        2
        >>> checked_domains([(x, y), (x[:3], y[:3])], even=True)
        Traceback (most recent call last):
        ...
        ValueError: batches must be of as many samples in each domain, got 4, 3
    """
    held = list(batches)
    if len(held) < least:
        raise ValueError(f"batches must be of at least {least} domain{'s' * (least > 1)}, got {len(held)}")
    for number, pair in enumerate(held):
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[0], Tensor):
            raise TypeError(f"batches[{number}] must be a pair (x, y) of tensors, got {type(pair).__name__}")
        x, y = pair
        class_indices(f"y of batches[{number}]", y)
        if y.ndim != 1 or len(y) == 0 or x.shape[:1] != y.shape:
            raise ValueError(
                f"batches[{number}] must have x of shape (batch, ...) and y of shape (batch,), at least one sample, "
                f"got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        if x.shape[1:] != held[0][0].shape[1:]:
            raise ValueError(
                f"batches must have samples of one shape, got {tuple(held[0][0].shape[1:])} and {tuple(x.shape[1:])}"
            )
    if even and len({len(y) for _, y in held}) > 1:
        sizes = ", ".join(str(len(y)) for _, y in held)
        raise ValueError(f"batches must be of as many samples in each domain, got {sizes}")
    return [(x, y) for x, y in held]


def domain_batches(
    domains: Sequence[tuple[Float[Tensor, "samples ..."], Int[Tensor, " samples"]]],
    batch_size: int,
    *,
    generator: torch.Generator | None = None,
) -> Iterator[DomainBatch]:
    """Batches without end, `batch_size` samples from each domain.

    Each domain is gone through in an order of its own, drawn anew when its samples run out; the few that do not fill
    a batch are left for the next order. A domain with fewer samples than a batch gives all it has, each time.

    Args:
        domains: all `(x, y)` of each domain.
        batch_size: samples of each domain in a batch.
        generator: decides the orders; on the CPU.

    Raises:
        TypeError: an entry is no pair of tensors, or labels are not int64.
        ValueError: there is no domain, a domain is empty or of another shape, or `batch_size` is not positive.

    Example:
        >>> domains = [(torch.zeros(10, 2), torch.zeros(10, dtype=torch.int64)) for _ in range(3)]
        >>> batch = next(domain_batches(domains, batch_size=4))
        >>> [tuple(x.shape) for x, y in batch]
        [(4, 2), (4, 2), (4, 2)]
    """
    held = checked_domains(domains)
    integer("batch_size", batch_size)

    def endless() -> Iterator[DomainBatch]:
        orders = [_orders(len(y), batch_size, generator) for _, y in held]
        while True:
            rows = [next(order) for order in orders]
            yield [(x[row.to(x.device)], y[row.to(y.device)]) for (x, y), row in zip(held, rows, strict=True)]

    return endless()


def _orders(size: int, batch_size: int, generator: torch.Generator | None) -> Iterator[Tensor]:
    taken = min(batch_size, size)
    while True:
        yield from torch.randperm(size, generator=generator)[: size // taken * taken].split(taken)
