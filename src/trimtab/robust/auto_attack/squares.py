"""Random search for squares that lower the margin: an attack that needs no gradient."""

from __future__ import annotations

from numbers import Real

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.ops.arguments import integer, out_of_reach, positive
from trimtab.ops.attack import ball_ends
from trimtab.robust.bounds import in_order


@torch.no_grad()
def square_attack(
    model: nn.Module,
    x: Float[Tensor, "batch channels height width"],
    y: Int[Tensor, " batch"],
    eps: float,
    *,
    num_queries: int = 5000,
    share: float = 0.8,
    bounds: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """Images with stripes and squares of `±eps`, each kept where it lowers the margin of the right class.

    It begins with vertical stripes. A square covers `share` of the image at first, and half as much each time that
    the authors' schedule says. Images that are misclassified are left alone.

    Args:
        model: takes images to logits.
        x: images within `bounds`.
        y: their classes.
        eps: largest change of an entry.
        num_queries: forward passes.
        share: of the image that the first squares cover, in (0, 1].
        bounds: smallest and largest value of an image.
        generator: source of all draws, on the CPU; torch's global one where it is None.

    Raises:
        TypeError: `x` is no floating-point tensor, or `y` not int64.
        ValueError: `eps` or `num_queries` is not positive, `x` is no batch of images, there is not one class for each,
            `share` is not in (0, 1], `bounds` are not two numbers in order, or an image is outside of them by more than
            `eps`.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> x = torch.full((3, 1, 2, 2), 0.5)
        >>> at = square_attack(net, x, torch.zeros(3, dtype=torch.long), 0.1, num_queries=10)
        >>> bool((at - x).abs().max() <= 0.1 + 1e-6)
        True
    """
    eps, num_queries = positive("eps", eps), integer("num_queries", num_queries)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {type(x).__name__}")
    if not isinstance(y, Tensor) or y.dtype != torch.int64:
        raise TypeError(f"y must be int64, got {getattr(y, 'dtype', type(y).__name__)}")
    if not (isinstance(share, float | Real) and 0 < share <= 1):
        raise ValueError(f"share must be in (0, 1], got {share!r}")
    if not in_order(bounds):
        raise ValueError(f"bounds must be two finite numbers in order, got {bounds}")
    if x.ndim != 4:
        raise ValueError(f"x must have shape (batch, channels, height, width), got {tuple(x.shape)}")
    if y.shape != x.shape[:1]:
        raise ValueError(f"y must be of shape ({len(x)},), got {tuple(y.shape)}")
    if out_of_reach(x, eps, bounds):
        raise ValueError(f"x must be within bounds {bounds}, got values from {x.min():g} to {x.max():g}")
    count, channels, height, width = x.shape

    def margin(at: Tensor, own: Tensor) -> Tensor:
        logits = model(at)
        right = logits.gather(1, own[:, None])[:, 0]
        lead: Tensor = right - logits.scatter(1, own[:, None], -torch.inf).amax(1)
        return lead

    def signs(*shape: int) -> Tensor:
        return torch.randint(2, shape, generator=generator).to(x.device) > 0

    def corner(most: int, rows: int) -> Tensor:
        return torch.randint(most + 1, (rows, 1, 1, 1), generator=generator).to(x.device)

    low, high = ball_ends(x, eps, bounds)
    best = torch.where(signs(count, channels, 1, width), high, low)
    lead = margin(best, y)
    down = torch.arange(height, device=x.device).view(1, 1, -1, 1)
    across = torch.arange(width, device=x.device).view(1, 1, 1, -1)
    for query in range(1, num_queries):
        rows = (lead > 0).nonzero().flatten()
        if not len(rows):
            break
        covered = share * halvings(query / num_queries)
        side = max(1, min(round((covered * height * width) ** 0.5), height - 1, width))
        top, left = corner(height - side, len(rows)), corner(width - side, len(rows))
        square = (down >= top) & (down < top + side) & (across >= left) & (across < left + side)
        moved = torch.where(square, torch.where(signs(len(rows), channels, 1, 1), high[rows], low[rows]), best[rows])
        found = margin(moved, y[rows])
        better = found < lead[rows]
        best[rows[better]], lead[rows[better]] = moved[better], found[better]
    return best


def halvings(spent: float) -> float:
    """By what the share is multiplied: of 10,000 queries it is halved after 10, 50, 200, 500, 1000, 2000, 4000 …

    Args:
        spent: share of the queries that are spent.

    Example:
        >>> halvings(0.0), halvings(0.03)
        (1.0, 0.125)
    """
    return 0.5 ** sum(spent > after for after in (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8))
