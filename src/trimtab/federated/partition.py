"""How one labelled data set is dealt out to clients whose class proportions differ."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.ops.arguments import in_range, integer, positive, tensor


def dirichlet_partition(
    targets: Int[Tensor, " n"],
    num_clients: int,
    alpha: float,
    *,
    balanced: bool = False,
    min_size: int = 1,
    generator: torch.Generator | None = None,
) -> list[Int[Tensor, " size"]]:
    """Class proportions drawn from a Dirichlet distribution: about one class a client for small alpha, alike for large.

    By default each class is dealt out in proportions over clients, so that sizes differ too. With `balanced` each
    client has proportions over classes and all have the same size; clients served late take what is left of classes
    that ran out.

    Args:
        targets: labels of the data set, in a tensor or an array.
        num_clients: number of parts.
        alpha: concentration, positive.
        balanced: parts of equal size (up to one sample).
        min_size: draw again, up to 1000 times, until each part has this many samples.
        generator: decides the draw.

    Returns:
        The indices of each client, shuffled. Together they are each index once.

    Raises:
        ValueError: an argument is out of range, or no draw gave every client `min_size` samples.

    Example:
        >>> targets = torch.arange(4).repeat(25)
        >>> parts = dirichlet_partition(targets, 5, alpha=0.5, balanced=True)
        >>> [len(part) for part in parts]
        [20, 20, 20, 20, 20]
    """
    targets = _labels(targets, num_clients)
    positive("alpha", alpha)
    if integer("min_size", min_size, 0) * num_clients > len(targets):
        raise ValueError(
            f"min_size must be at most {len(targets) // num_clients} for {len(targets)} samples and {num_clients} "
            f"clients, got {min_size}"
        )
    _, labels, stock = torch.unique(targets.cpu(), return_inverse=True, return_counts=True)
    for _ in range(1000):
        if balanced:
            shares = _dirichlet(num_clients, len(stock), alpha, generator)
            counts = _fill(shares, stock, len(targets), torch.randperm(num_clients, generator=generator).tolist())
        else:
            shares = _dirichlet(len(stock), num_clients, alpha, generator)
            cuts = (shares.cumsum(1) * stock[:, None]).round().long().clamp(max=stock[:, None])
            cuts[:, -1] = stock
            counts = cuts.diff(dim=1, prepend=torch.zeros(len(stock), 1, dtype=torch.long)).T
        if int(counts.sum(1).min()) >= min_size:
            return _deal(labels, counts, generator)
    raise ValueError(
        f"min_size must be reachable in 1000 draws with alpha={alpha:g} and {num_clients} clients, got {min_size}"
    )


def shard_partition(
    targets: Int[Tensor, " n"],
    num_clients: int,
    shards_per_client: int = 2,
    *,
    generator: torch.Generator | None = None,
) -> list[Int[Tensor, " size"]]:
    """Samples sorted by class and cut into shards of equal size, of which each client gets a few.

    The split of the FedAvg paper (McMahan et al., 2017): with 2 shards most clients hold two classes.

    Args:
        targets: labels of the data set, in a tensor or an array, at least one per shard.
        num_clients: number of parts.
        shards_per_client: shards in a part.
        generator: decides which shards, and the order within a class.

    Returns:
        The indices of each client. Together they are each index once.

    Raises:
        ValueError: an argument is out of range, or there are more shards than samples.

    Example:
        >>> parts = shard_partition(torch.arange(10).repeat(20), 10, generator=torch.Generator().manual_seed(0))
        >>> [len(part) for part in parts] == [20] * 10
        True
    """
    targets = _labels(targets, num_clients)
    shards = num_clients * integer("shards_per_client", shards_per_client, 0)
    if shards_per_client < 1 or shards > len(targets):
        raise ValueError(
            f"shards_per_client must be at least 1 and give at most one shard per sample, got {shards_per_client} for "
            f"{num_clients} clients and {len(targets)} samples"
        )
    shuffled = torch.randperm(len(targets), generator=generator)
    order = shuffled[targets.cpu()[shuffled].argsort(stable=True)]
    pieces = order.tensor_split(shards)
    mine = torch.randperm(shards, generator=generator).view(num_clients, shards_per_client).tolist()
    return [torch.cat([pieces[piece] for piece in chosen]) for chosen in mine]


def _labels(targets: Any, num_clients: int) -> Int[Tensor, " n"]:
    found = tensor("targets", targets)
    if found.ndim != 1 or found.is_floating_point():
        raise ValueError(f"targets must be integer labels of shape (n,), got {found.dtype} {tuple(found.shape)}")
    integer("num_clients", num_clients, 1, len(found))
    return found


def _dirichlet(
    rows: int, columns: int, alpha: float, generator: torch.Generator | None
) -> Float[Tensor, "rows columns"]:
    # Gamma(a) = Gamma(a + 1) U^(1/a), in logarithms: a plain Gamma(0.01) draw underflows to zero.
    shape = torch.full((rows, columns), alpha + 1, dtype=torch.float64)
    uniform = torch.rand(rows, columns, dtype=torch.float64, generator=generator).clamp_min(1e-300)
    return (torch._standard_gamma(shape, generator=generator).log() + uniform.log() / alpha).softmax(1)


def _fill(
    shares: Float[Tensor, "clients classes"], stock: Int[Tensor, " classes"], total: int, order: Iterable[int]
) -> Int[Tensor, "clients classes"]:
    counts, left = torch.zeros(shares.shape, dtype=torch.long), stock.clone()
    sizes = [len(part) for part in torch.arange(total).tensor_split(len(shares))]
    for client in order:
        open_slots = sizes[client]
        while open_slots:
            # Wishes among the classes that are left; a client whose own have run out takes from the fullest.
            wish = shares[client] * (left > 0)
            wish = wish / wish.sum() * open_slots if wish.sum() > 0 else left / left.sum() * open_slots
            take = torch.minimum(wish.floor().long(), left)
            if not take.any():
                take[torch.where(left > 0, wish, -1).argmax()] = 1
            counts[client] += take
            left -= take
            open_slots -= int(take.sum())
    return counts


def _deal(
    labels: Int[Tensor, " n"], counts: Int[Tensor, "clients classes"], generator: torch.Generator | None
) -> list[Int[Tensor, " size"]]:
    shuffled = torch.randperm(len(labels), generator=generator)
    by_class = [shuffled[labels[shuffled] == c].split(column) for c, column in enumerate(counts.T.tolist())]
    parts = [torch.cat([pieces[client] for pieces in by_class]) for client in range(len(counts))]
    return [part[torch.randperm(len(part), generator=generator)] for part in parts]


def long_tailed(
    targets: Int[Tensor, " n"],
    imbalance: float,
    *,
    most: int | None = None,
    order: Int[Tensor, " classes"] | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " kept"]:
    r"""A part of a data set in which class sizes fall exponentially, $n_c = n_0\, r^{c / (C - 1)}$.

    Args:
        targets: labels of the data set, in a tensor or an array.
        imbalance: size of the rarest class over that of the most frequent one (r), in (0, 1].
        most: samples of the most frequent class; by default as many as it has.
        order: the labels from the most frequent class to the rarest; ascending by default.
        generator: decides which samples of a class are kept.

    Returns:
        Indices of the samples that are kept, shuffled: at least one of each class.

    Raises:
        ValueError: an argument is out of range, `order` is not each label once, or a class has too few samples.

    Example:
        >>> targets = torch.arange(3).repeat(100)
        >>> torch.bincount(targets[long_tailed(targets, 0.01)])
        tensor([100,  10,   1])
    """
    targets = _labels(targets, 1).cpu()
    in_range("imbalance", imbalance, 0, 1, "right")
    known, stock = torch.unique(targets, return_counts=True)
    order = known if order is None else tensor("order", order).cpu()
    if not torch.equal(order.sort().values, known):
        raise ValueError(f"order must be each of the labels {known.tolist()} once, got {order.tolist()}")
    have = stock[torch.searchsorted(known, order)]
    most = int(have[0]) if most is None else integer("most", most)
    share = torch.arange(len(order), dtype=torch.float64) / max(len(order) - 1, 1)
    sizes = (most * imbalance**share).round().long().clamp_min(1)
    if (short := sizes > have).any():
        label, wanted, found = (int(value[short][0]) for value in (order, sizes, have))
        raise ValueError(f"targets must hold {wanted} samples of class {label} for most={most}, got {found}")
    shuffled = torch.randperm(len(targets), generator=generator)
    kept = [
        shuffled[targets[shuffled] == label][:size] for label, size in zip(order.tolist(), sizes.tolist(), strict=True)
    ]
    together = torch.cat(kept)
    return together[torch.randperm(len(together), generator=generator)]
