"""Edge maps whose thresholds follow each image, a whole batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from trimtab.ops.arguments import floating_tensor, non_negative

RULES = ("otsu", "yen", "mean", "isodata", "li")
_GREY = (0.2989, 0.5870, 0.1140)
_BINS = 256
_ROUNDING = 1e-5  # gradients of an image in [0, 1] below it are no edges
_DEFAULT = (0.1, 0.2)  # thresholds of scikit-image, where the adaptive ones leave nothing


def adaptive_thresholds(values: Float[Tensor, "batch pixels"]) -> Float[Tensor, "batch rules"]:
    """The thresholds that each of `RULES` (Otsu, Yen, mean, isodata, Li) finds in each row.

    All but the mean and Li's see a histogram of 256 bins between the row's extremes. A constant row is its own
    threshold.

    Args:
        values: a row for each image, of at least one number.

    Raises:
        TypeError: `values` is not floating point.
        ValueError: it is not a matrix, or has no column.

    Example:
        >>> adaptive_thresholds(torch.tensor([[0.0, 0.0, 0.0, 1.0]]))[0, 2]
        tensor(0.2500)
    """
    if not isinstance(values, Tensor) or not values.is_floating_point():
        raise TypeError(f"values must be a floating-point tensor, got {type(values).__name__}")
    if values.ndim != 2 or values.shape[1] == 0:
        raise ValueError(f"values must have shape (batch, pixels), pixels at least one, got {tuple(values.shape)}")
    low, high, quick = _all_but_li(values)
    return torch.where(high > low, torch.cat([quick, _li(values, low)], 1), low)


def _thresholds_by(values: Float[Tensor, "batch pixels"], rule: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Each row's threshold by a rule of its own; Li's iteration, by far the slowest, runs where it is asked for."""
    low, high, quick = _all_but_li(values)
    last = quick.shape[1]
    found = quick.gather(1, rule[:, None].clamp(max=last - 1))
    if (li := rule == last).any():
        found[li] = _li(values[li], low[li])
    return torch.where(high > low, found, low)[:, 0]


def _all_but_li(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Least and largest value of each row, (batch, 1), and the thresholds of the other `RULES`, (batch, 4)."""
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    width = ((high - low) / _BINS).clamp(min=torch.finfo(values.dtype).tiny)
    place = ((values - low) / width).long().clamp(0, _BINS - 1)
    count = torch.zeros(len(values), _BINS, dtype=values.dtype, device=values.device)
    count.scatter_add_(1, place, torch.ones_like(values))
    centre = low + width * (torch.arange(_BINS, device=values.device) + 0.5)
    below, above = count.cumsum(1), count.flip(1).cumsum(1).flip(1)
    mass = count * centre
    mean_below = mass.cumsum(1) / below.clamp(min=1)
    mean_above = mass.flip(1).cumsum(1).flip(1) / above.clamp(min=1)

    def at(score: Tensor) -> Tensor:
        return centre.gather(1, score.argmax(1, keepdim=True))

    otsu = at(below[:, :-1] * above[:, 1:] * (mean_below[:, :-1] - mean_above[:, 1:]).square())
    share = count / count.sum(1, keepdim=True)
    part, squares = share.cumsum(1)[:, :-1], share.square()
    tiny = torch.finfo(values.dtype).tiny
    spread = squares.cumsum(1)[:, :-1] * squares.flip(1).cumsum(1).flip(1)[:, 1:]
    yen = at(2 * (part * (1 - part)).clamp(min=tiny).log() - spread.clamp(min=tiny).log())
    # Isodata: the least threshold halfway between the means of what it parts, to the width of a bin.
    apart = (mean_below[:, :-1] + mean_above[:, 1:]) / 2 - centre[:, :-1]
    isodata = at(((apart >= 0) & (apart < width)).to(values.dtype))
    return low, high, torch.cat([otsu, yen, values.mean(1, keepdim=True), isodata], 1)


def _li(values: Tensor, low: Tensor) -> Tensor:
    """Least cross-entropy between an image and its two levels, by its fixed-point iteration."""
    shifted = values - low
    threshold, tiny = shifted.mean(1, keepdim=True), torch.finfo(values.dtype).tiny
    for _ in range(20):
        dark = shifted <= threshold
        fore = (shifted * ~dark).sum(1, keepdim=True) / (~dark).sum(1, keepdim=True).clamp(min=1)
        back = (shifted * dark).sum(1, keepdim=True) / dark.sum(1, keepdim=True).clamp(min=1)
        step = (back - fore) / (back.clamp(min=tiny).log() - fore.clamp(min=tiny).log())
        threshold = torch.where((back > 0) & (fore > back), step, threshold)
    return threshold + low


@dataclass(frozen=True)
class EdgeDraws:
    """What is drawn for each image of a batch.

    Attributes:
        sigma: width of the smoothing in pixels.
        rule: which of `RULES` sets the threshold.
        threshold_noise: added to the threshold, where it then lies within the image's gradients.
        hysteresis_noise: by how much the two thresholds of the hysteresis move apart.
    """

    sigma: Float[Tensor, " batch"]
    rule: Int[Tensor, " batch"]
    threshold_noise: Float[Tensor, " batch"]
    hysteresis_noise: Float[Tensor, " batch"]

    @classmethod
    def fixed(cls, batch: int, sigma: float = 1.0) -> EdgeDraws:
        """What is used at test time: Otsu's threshold, and no noise."""
        zeros = torch.zeros(batch)
        return cls(torch.full((batch,), float(sigma)), torch.zeros(batch, dtype=torch.int64), zeros, zeros)


class EnhancedCanny(nn.Module):
    """Canny's edges with thresholds that follow each image; random in training mode, fixed in eval mode.

    Args:
        sigmas: widths of the smoothing, in pixels, of which one is drawn.
        threshold_noise: deviation of what is added to the threshold.
        hysteresis: low and high threshold of the hysteresis, in units of the image's own.
        hysteresis_noise: deviation of their distance.
        test_sigma: width of the smoothing in eval mode.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> x = torch.zeros(1, 1, 8, 8)
        >>> x[..., 4:] = 1.0
        >>> EnhancedCanny().eval()(x)[0, 0, 4]
        tensor([0., 0., 0., 1., 0., 0., 0., 0.])
    """

    def __init__(
        self,
        sigmas: Sequence[float] = (0.0, 1.0, 2.0),
        threshold_noise: float = 10.0,
        hysteresis: tuple[float, float] = (0.5, 1.5),
        hysteresis_noise: float = 0.2,
        test_sigma: float = 1.0,
    ) -> None:
        super().__init__()
        self.sigmas = tuple(non_negative("sigmas", sigma) for sigma in sigmas)
        if not self.sigmas:
            raise ValueError("sigmas must be at least one number, got none")
        self.threshold_noise = non_negative("threshold_noise", threshold_noise)
        if len(hysteresis) != 2 or not hysteresis[0] <= hysteresis[1]:
            raise ValueError(f"hysteresis must be (low, high) thresholds in order, got {hysteresis}")
        self.low, self.high = (non_negative("hysteresis", value) for value in hysteresis)
        self.hysteresis_noise = non_negative("hysteresis_noise", hysteresis_noise)
        self.test_sigma = non_negative("test_sigma", test_sigma)

    def draw(self, batch: int, generator: torch.Generator | None = None) -> EdgeDraws:
        """What is drawn for each image."""
        which = torch.randint(len(self.sigmas), (batch,), generator=generator)
        return EdgeDraws(
            torch.tensor(self.sigmas)[which],
            torch.randint(len(RULES), (batch,), generator=generator),
            self.threshold_noise * torch.randn(batch, generator=generator),
            self.hysteresis_noise * torch.randn(batch, generator=generator),
        )

    @torch.no_grad()
    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        *,
        generator: torch.Generator | None = None,
        draws: EdgeDraws | None = None,
    ) -> Float[Tensor, "batch 1 height width"]:
        """Edges, one for an edge and zero elsewhere; none where an image is constant.

        Args:
            x: images in [0, 1], of one or three channels.
            generator: decides the draws of the training mode.
            draws: in place of them.

        Raises:
            TypeError: `x` is not floating point.
            ValueError: it has another shape, or `draws` is of another batch.
        """
        x = floating_tensor("x", x)
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ValueError(f"x must be (batch, 1 or 3, height, width), got {tuple(x.shape)}")
        if draws is None:
            draws = self.draw(len(x), generator) if self.training else EdgeDraws.fixed(len(x), self.test_sigma)
        elif len(draws.sigma) != len(x):
            raise ValueError(f"draws must be of {len(x)} images, got {len(draws.sigma)}")
        if len(x) == 0:
            return x.new_zeros(0, 1, *x.shape[2:])
        sigma, rule, noise, apart = (
            value.to(x.device) for value in (draws.sigma, draws.rule, draws.threshold_noise, draws.hysteresis_noise)
        )
        grey = x if x.shape[1] == 1 else (x * x.new_tensor(_GREY).view(1, 3, 1, 1)).sum(1, keepdim=True)
        across, down = _sobel(_smoothed(grey, sigma.to(x)))
        size = torch.hypot(across, down)
        size = torch.where(size > _ROUNDING, size, 0)
        flat = size.flatten(1)
        exact = _thresholds_by(flat, rule)
        moved = exact + noise.to(x)
        threshold = torch.where((moved > flat.amin(1)) & (moved < flat.amax(1)), moved, exact)
        ends = torch.stack([(self.low - apart).clamp(min=0.1), (self.high + apart).clamp(max=2.0)]).to(x)
        low, high = ends.amin(0) * threshold, ends.amax(0) * threshold
        ridge = size * _ridges(size, across, down)
        edges = _hysteresis(ridge, low, high)
        flat_edges = edges.flatten(1)
        bare = flat_edges.all(1) | ~flat_edges.any(1)
        if bare.any():
            edges[bare] = _hysteresis(ridge[bare], *(low.new_full((int(bare.sum()),), value) for value in _DEFAULT))
        return edges.to(x.dtype)


def _smoothed(grey: Float[Tensor, "batch 1 height width"], sigma: Float[Tensor, " batch"]) -> Tensor:
    """Each image by a Gaussian of its own width; at the frame, by the part of it that lies within."""

    def along(length: int) -> Tensor:
        at = torch.arange(length, device=grey.device, dtype=grey.dtype)
        apart = (at[:, None] - at) / sigma.clamp(min=1e-3).view(-1, 1, 1)
        kernel = torch.exp(-0.5 * apart.square())
        kernel = torch.where(kernel > torch.finfo(kernel.dtype).tiny, kernel, 0)  # subnormal numbers multiply slowly
        return (kernel / kernel.sum(2, keepdim=True))[:, None]

    return along(grey.shape[2]) @ grey @ along(grey.shape[3]).mT


def _sobel(image: Tensor) -> tuple[Tensor, Tensor]:
    kernel = image.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    both = F.conv2d(F.pad(image, (1,) * 4, mode="replicate"), torch.stack([kernel, kernel.T])[:, None])
    return both[:, :1], both[:, 1:]


def _ridges(size: Tensor, across: Tensor, down: Tensor) -> Bool[Tensor, "batch 1 height width"]:
    """Where the gradient is largest along its own direction, the frame left out; of two equal ones the first."""
    padded = F.pad(size, (1,) * 4)
    height, width = size.shape[2:]

    def shifted(rows: int, columns: int) -> Tensor:
        return padded[:, :, 1 + rows : 1 + rows + height, 1 + columns : 1 + columns + width]

    wide, tall = across.abs(), down.abs()
    flat = wide >= tall
    share = torch.minimum(wide, tall) / torch.maximum(wide, tall).clamp(min=torch.finfo(size.dtype).tiny)
    same = (across * down) >= 0

    def neighbour(sign: int) -> Tensor:
        diagonal = torch.where(same, shifted(sign, sign), torch.where(flat, shifted(-sign, sign), shifted(sign, -sign)))
        straight = torch.where(flat, shifted(0, sign), shifted(sign, 0))
        return share * diagonal + (1 - share) * straight

    # The margin keeps rounding from telling equal pixels apart.
    margin = 1e-5 * size
    largest = (size >= neighbour(-1) + margin) & (size >= neighbour(1) - margin) & (size > 0)
    inner = torch.zeros_like(largest)
    inner[:, :, 1:-1, 1:-1] = largest[:, :, 1:-1, 1:-1]
    return inner


def _hysteresis(ridge: Tensor, low: Tensor, high: Tensor) -> Bool[Tensor, "batch 1 height width"]:
    """Ridges above the low threshold that are connected to one above the high."""
    weak, strong = ((ridge >= threshold.view(-1, 1, 1, 1)) & (ridge > 0) for threshold in (low, high))
    strong = strong & weak
    while True:
        grown = _with_neighbours(strong) & weak
        if torch.equal(grown, strong):
            return strong
        strong = grown


def _with_neighbours(pixels: Bool[Tensor, "batch 1 height width"]) -> Bool[Tensor, "batch 1 height width"]:
    """These pixels and the eight around each."""
    wide = pixels.clone()
    wide[..., 1:] |= pixels[..., :-1]
    wide[..., :-1] |= pixels[..., 1:]
    tall = wide.clone()
    tall[..., 1:, :] |= wide[..., :-1, :]
    tall[..., :-1, :] |= wide[..., 1:, :]
    return tall
