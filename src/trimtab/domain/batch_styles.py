r"""Batch styles standardization: all images of a batch are given the style of one of them.

For self-supervised learning on data from several domains, without domain labels. Where every negative of a contrastive
loss has the anchor's style, nothing is gained by telling styles apart; where every positive has another, style must be
forgotten. An image's style is the low part of its Fourier amplitude. With amplitude $A_i$, phase $P_i$, a window $W$
about the zero frequency and one image $j$ drawn for the whole batch,

$$
x_i' = \mathcal{F}^{-1} \bigl( A_i'\, e^{\mathrm{i} P_i} \bigr), \qquad
A_i' = A_j \text{ in } W, \quad A_i \text{ elsewhere.}
$$

Each view of the batch has another $j$ and another window, whose share of the amplitude's area is drawn anew.
`batch_style_standardize` is the operator, `fourier_augment` the usual one with a style for each image,
`BatchStyleViews` makes the views of a batch, and `same_style_nt_xent` and `same_style_swav` are SimCLR's and SwAV's
losses with comparisons inside a view, so inside a style, alone. Masked siamese networks need the views and nothing
else.

Reference: Marin Scalbert, Maria Vakalopoulou and Florent Couzinié-Devy, "Towards domain-invariant Self-Supervised
Learning with Batch Styles Standardization", ICLR 2024, arXiv 2303.06088. The operator is the paper's; its code was
not at hand, so that the range of areas, the temperatures and how the losses are coupled are reconstructed.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from numbers import Real

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.ops.arguments import (
    floating_tensor,
    in_range,
    integer,
    looked_at,
    non_negative,
    positive,
    real_problem,
)
from trimtab.ops.info_nce import info_nce_of_cosines
from trimtab.ops.sinkhorn import sinkhorn

Images = Float[Tensor, "batch channels height width"]
Transform = Callable[[Tensor], Tensor]


def swap_low_amplitude(x: Images, donors: Images, area: float, *, bounds: tuple[float, float] | None = None) -> Images:
    """Images with the low-frequency amplitude of others and their own phase; differentiable.

    The window is as high and wide a share of the spectrum as the root of `area`, and symmetric about the zero
    frequency, so that images stay real.

    Args:
        x: images.
        donors: as many images of the same size, or one for all.
        area: share of the amplitudes that are replaced, in (0, 1].
        bounds: smallest and largest value of a pixel.

    Raises:
        TypeError: images are not floating point.
        ValueError: the shapes do not fit, the batch is empty, `area` is out of range, or `bounds` are not in order.

    Example:
        >>> x, donor = torch.rand(4, 3, 8, 8), torch.full((1, 3, 8, 8), 0.5)
        >>> swap_low_amplitude(x, donor, area=0.01).mean((2, 3))[0]  # the zero frequency alone
        tensor([0.5000, 0.5000, 0.5000])
    """
    in_range("area", area, 0, 1, "right")
    _check_bounds(bounds)
    images, given = _images("x", x), _images("donors", donors)
    if given.shape[1:] != images.shape[1:] or len(given) not in (1, len(images)):
        raise ValueError(
            f"donors must be 1 or {len(images)} images of shape {tuple(images.shape[1:])}, got shape "
            f"{tuple(given.shape)}"
        )
    spectrum = torch.fft.rfft2(images)
    own, other = spectrum.abs(), torch.fft.rfft2(given).abs()
    tiny = torch.finfo(own.dtype).tiny
    phase = torch.where(own > 0, spectrum / own.clamp(min=tiny), torch.ones_like(spectrum))
    inside = _window(images.shape[2], images.shape[3], area).to(images.device)
    changed = torch.where(inside, other * phase, spectrum)
    found: Tensor = torch.fft.irfft2(changed, s=images.shape[2:])
    return (found if bounds is None else found.clamp(*bounds)).to(x.dtype)


def batch_style_standardize(
    x: Images,
    area: float | tuple[float, float] = (0.02, 1.0),
    *,
    index: int | None = None,
    bounds: tuple[float, float] | None = None,
    generator: torch.Generator | None = None,
) -> Images:
    """All images of a batch in the style of one of them; see the module.

    Args:
        x: images, before they are normalised.
        area: share of the amplitudes that are replaced, or the range it is drawn from.
        index: the image whose style is taken; drawn where it is None.
        bounds: smallest and largest value of a pixel.
        generator: decides the image and the area; on the CPU.

    Raises:
        TypeError: `x` is not floating point.
        ValueError: `x` is not a batch of images, `area` is out of range or `index` is no row.

    Example:
        >>> x = torch.rand(4, 3, 8, 8)
        >>> styled = batch_style_standardize(x, area=0.25, index=2)
        >>> torch.allclose(styled[2], x[2], atol=1e-5)
        True
    """
    _images("x", x)
    share = _checked_area(area)
    if index is not None:
        integer("index", index, 0, len(x) - 1)
    chosen = index if index is not None else int(torch.randint(len(x), (), generator=generator))
    return swap_low_amplitude(x, x[chosen : chosen + 1], _drawn(share, generator), bounds=bounds)


def fourier_augment(
    x: Images,
    area: float | tuple[float, float] = (0.02, 1.0),
    *,
    index: Int[Tensor, " batch"] | None = None,
    bounds: tuple[float, float] | None = None,
    generator: torch.Generator | None = None,
) -> Images:
    """Each image in the style of another one of the batch, drawn for it alone: the usual Fourier augmentation.

    Args:
        x: images.
        area: share of the amplitudes that are replaced, or the range it is drawn from, once for the batch.
        index: each image's donor; drawn where it is None.
        bounds: smallest and largest value of a pixel.
        generator: decides donors and area; on the CPU.

    Raises:
        TypeError: `x` is not floating point, or `index` not int64.
        ValueError: `x` is not a batch of images, `area` is out of range, or `index` is not one row for each image.

    Example:
        >>> x = torch.rand(4, 3, 8, 8)
        >>> torch.allclose(fourier_augment(x, index=torch.arange(4)), x, atol=1e-5)
        True
    """
    _images("x", x)
    share = _checked_area(area)
    if index is not None and (not isinstance(index, Tensor) or index.dtype != torch.int64):
        raise TypeError(f"index must be an int64 tensor, got {getattr(index, 'dtype', type(index).__name__)}")
    if index is not None and index.shape != x.shape[:1]:
        raise ValueError(f"index must be of shape ({len(x)},), got {tuple(index.shape)}")
    if index is not None and looked_at(index) and not ((index >= 0) & (index < len(x))).all():
        raise ValueError(f"index must be in [0, {len(x)}), got others")
    chosen = torch.randint(len(x), (len(x),), generator=generator) if index is None else index
    return swap_low_amplitude(x, x[chosen.to(x.device)], _drawn(share, generator), bounds=bounds)


def batch_color_jitter(
    x: Images,
    strength: float = 0.4,
    *,
    factors: tuple[float, float, float] | None = None,
    generator: torch.Generator | None = None,
) -> Images:
    """Brightness, contrast and saturation of all images of a batch changed by the same factors.

    Args:
        x: images in [0, 1].
        strength: factors are drawn from [1 - strength, 1 + strength].
        factors: the factors themselves, in this order.
        generator: decides the factors; on the CPU.

    Raises:
        TypeError: `x` is not floating point.
        ValueError: `x` is not a batch of images, `strength` is not in [0, 1], or `factors` are not three numbers.

    Example:
        >>> x = torch.full((2, 3, 4, 4), 0.5)
        >>> batch_color_jitter(x, factors=(0.5, 1.0, 1.0)).unique()
        tensor([0.2500])
    """
    _images("x", x)
    in_range("strength", strength, 0, 1)
    if factors is not None and not (
        len(factors) == 3 and all(isinstance(f, float | Real) and isfinite(f) for f in factors)
    ):
        raise ValueError(f"factors must be three finite numbers, got {factors}")
    if factors is None:
        draws = 1 + strength * (2 * torch.rand(3, generator=generator) - 1)
        factors = (float(draws[0]), float(draws[1]), float(draws[2]))
    brightness, contrast, saturation = factors
    lit = (x * brightness).clamp(0, 1)
    # About the mean of each image, as torchvision does.
    seen = (lit.mean((1, 2, 3), keepdim=True).lerp(lit, contrast)).clamp(0, 1)
    return seen.mean(1, keepdim=True).expand_as(seen).lerp(seen, saturation).clamp(0, 1)


class BatchStyleViews:
    """Views of a batch: every sample transformed for itself, the colours and the style of each view shared by all.

    Args:
        n_views: views of each sample.
        transform: makes a view of a batch, such as crops and flips drawn for each sample; nothing where it is None.
        area: share of the amplitudes that are replaced, or the range it is drawn from, anew for each view.
        jitter: strength of the colour jitter shared by a view; 0 for none.
        bounds: smallest and largest value of a pixel.
        generator: decides styles, areas and colours; on the CPU. The transform has its own.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> views = BatchStyleViews(2, generator=torch.Generator().manual_seed(0))
        >>> views(torch.rand(5, 3, 8, 8)).shape  # the whole batch's first views, then its second ones
        torch.Size([10, 3, 8, 8])
    """

    def __init__(
        self,
        n_views: int = 2,
        transform: Transform | None = None,
        *,
        area: float | tuple[float, float] = (0.02, 1.0),
        jitter: float = 0.0,
        bounds: tuple[float, float] | None = (0.0, 1.0),
        generator: torch.Generator | None = None,
    ) -> None:
        self.n_views, self.transform = integer("n_views", n_views), transform
        self.area, self.jitter = _checked_area(area), in_range("jitter", jitter, 0, 1)
        _check_bounds(bounds)
        self.bounds, self.generator = bounds, generator

    def __call__(self, x: Images, *, index: Int[Tensor, " views"] | None = None) -> Float[Tensor, "rows c h w"]:
        """All views, view by view.

        Args:
            x: images.
            index: the image whose style each view has; drawn, different ones where there are enough, where it is
                None.

        Raises:
            TypeError: `x` is not floating point, or `index` not made of integers.
            ValueError: `x` is not a batch of images, there is not one style a view, or a style is no row of `x`.
        """
        _images("x", x)
        if index is None:
            rounds = -(-self.n_views // len(x))
            index = torch.cat([torch.randperm(len(x), generator=self.generator) for _ in range(rounds)])
            index = index[: self.n_views]
        if (
            not isinstance(index, Tensor)
            or index.is_floating_point()
            or index.is_complex()
            or index.dtype == torch.bool
        ):
            raise TypeError(f"index must be a tensor of integers, got {getattr(index, 'dtype', type(index).__name__)}")
        if index.shape != (self.n_views,):
            raise ValueError(f"index must have shape ({self.n_views},), got {tuple(index.shape)}")
        if not ((index >= 0) & (index < len(x))).all():  # before anything is drawn
            raise ValueError(f"index must be in [0, {len(x)}), got {index.tolist()}")
        views = []
        for style in index.tolist():
            view = x if self.transform is None else self.transform(x)
            if self.jitter:
                view = batch_color_jitter(view, self.jitter, generator=self.generator)
            views.append(
                batch_style_standardize(view, self.area, index=style, bounds=self.bounds, generator=self.generator)
            )
        return torch.cat(views)


def same_style_nt_xent(z: Float[Tensor, "rows dim"], n_views: int = 2, temperature: float = 0.5) -> Float[Tensor, ""]:
    r"""SimCLR's loss with negatives of the anchor's own view, which have its style.

    $$
    \mathcal{L} = -\operatorname{mean}_{i,\, v,\, u \ne v} \log
    \frac{e^{z_i^v \cdot z_i^u / \tau}}{e^{z_i^v \cdot z_i^u / \tau} + \sum_{j \ne i} e^{z_i^v \cdot z_j^v / \tau}}
    $$

    Args:
        z: embeddings, view by view, of any length.
        n_views: views of each sample, at least two.
        temperature: divides the cosines.

    Raises:
        TypeError: `z` is not floating point.
        ValueError: the rows are not as many in each view, there is one view, or `temperature` is not positive.

    Example:
        >>> z = torch.eye(2).repeat(2, 1)  # two samples, whose views agree
        >>> round(same_style_nt_xent(z, temperature=1.0).item(), 4)  # log(1 + 1 / e)
        0.3133
    """
    views = _views(z, n_views)
    with torch.autocast(z.device.type, enabled=False):
        unit = F.normalize(views, dim=2)
        within = unit @ unit.mT
        own = torch.eye(unit.shape[1], dtype=torch.bool, device=z.device)
        away = within.masked_fill(own, torch.finfo(within.dtype).min)
        agree = torch.einsum("vnd,und->vun", unit, unit)
        first, second = _pairs(n_views, z.device)
        return info_nce_of_cosines(agree[first, second].flatten(), away[first].flatten(0, 1), temperature)


def same_style_swav(
    scores: Float[Tensor, "rows prototypes"], n_views: int = 2, temperature: float = 0.1, reg: float = 0.05
) -> Float[Tensor, ""]:
    r"""SwAV's loss with prototypes assigned inside each view: a view must predict the assignment of another.

    Assignments are balanced over prototypes by entropic transport, and constants for the gradient.

    Args:
        scores: cosines with the prototypes, view by view.
        n_views: views of each sample, at least two.
        temperature: of the predictions.
        reg: weight of the entropy in the transport.

    Raises:
        TypeError: `scores` is not floating point.
        ValueError: the rows are not as many in each view, there is one view, or a number is not positive.

    Example:
        >>> scores = torch.eye(2).repeat(2, 1)
        >>> bool(same_style_swav(scores) < 1e-3)
        True
    """
    if problem := real_problem(scores=scores):
        raise TypeError(problem)
    views = _views(scores, n_views)
    positive("temperature", temperature), positive("reg", reg)
    count, prototypes = views.shape[1:]
    rows, columns = views.new_full((count,), 1 / count), views.new_full((prototypes,), 1 / prototypes)
    with torch.no_grad():
        assigned = torch.stack(
            [count * torch.as_tensor(sinkhorn(-view, rows, columns, reg, tol=1e-3).plan) for view in views.detach()]
        ).to(views)
    said = (views / temperature).log_softmax(2)
    first, second = _pairs(n_views, scores.device)
    return -(assigned[first] * said[second]).sum(2).mean()


def _images(name: str, value: Tensor) -> Tensor:
    found = floating_tensor(name, value)
    if found.ndim != 4 or len(found) == 0:
        raise ValueError(
            f"{name} must have shape (batch, channels, height, width) with at least one image, got {tuple(found.shape)}"
        )
    return found


def _window(height: int, width: int, area: float) -> Tensor:
    """Which frequencies of a real transform lie in the window."""
    rows = torch.fft.fftfreq(height, 1 / height).abs() <= max(1, round(height * area**0.5)) / 2
    columns = torch.arange(width // 2 + 1) <= max(1, round(width * area**0.5)) / 2
    inside: Tensor = rows[:, None] & columns[None]
    return inside


def _check_bounds(bounds: tuple[float, float] | None) -> None:
    if bounds is not None and not (len(bounds) == 2 and bounds[0] < bounds[1]):
        raise ValueError(f"bounds must be two numbers, the smaller first, got {bounds}")


def _checked_area(area: float | tuple[float, float]) -> tuple[float, float]:
    if isinstance(area, tuple) and len(area) != 2:
        raise ValueError(f"area must be a share or two, the smaller first, got {area}")
    low, high = area if isinstance(area, tuple) else (area, area)
    low, high = in_range("area", low, 0, 1, "right"), in_range("area", high, 0, 1, "right")
    non_negative("the width of area", high - low)
    return low, high


def _drawn(area: tuple[float, float], generator: torch.Generator | None) -> float:
    low, high = area
    return low if low == high else low + (high - low) * float(torch.rand((), generator=generator))


def _views(rows: Tensor, n_views: int) -> Tensor:
    found = floating_tensor("z", rows)
    integer("n_views", n_views, 2)
    if found.ndim != 2 or len(found) == 0 or len(found) % n_views:
        raise ValueError(f"z must be {n_views} views of equally many rows, got shape {tuple(found.shape)}")
    return found.view(n_views, -1, found.shape[1])


def _pairs(n_views: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """All ordered pairs of different views."""
    different = ~torch.eye(n_views, dtype=torch.bool, device=device)
    first, second = different.nonzero(as_tuple=True)
    return first, second
