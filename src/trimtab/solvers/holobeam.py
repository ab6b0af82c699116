r"""Finding the best beam of a metasurface with few pilots, one phase-shifting parameter after the other.

For a gain that is a product of single-peaked functions of two parameters, measured with noise, where pulls are dear: a
search along each axis takes pilots by the logarithm of the beams on it.

With a surface of $K_x \times K_y$ wavelengths and a receiver in the far field at $(\theta, \phi)$, the gain of the beam
$(\beta_1, \beta_2)$ is

$$
|H(\beta_1, \beta_2)|^2 = G_0\, \mathrm{sinc}^2\bigl(K_x (\alpha_1 - \beta_1)\bigr)\,
\mathrm{sinc}^2\bigl(K_y (\alpha_2 - \beta_2)\bigr),
\qquad \alpha = (\sin\theta \cos\phi,\ \sin\theta \sin\phi).
$$

On the grid $\beta = -1 + i / K$ the sines are the same for all $i$, so that the gain is
$\sin^2(\pi\delta) / (\pi (\delta - i))^2$ around its peak: it has no side lobes, and elimination that relies on a
single peak is safe. HoloBeam spends half of the pilots on the first parameter, with the second one fixed, and the other
half on the second, at the first's winner.

Reference:
    Debamita Ghosh, Manjesh Kumar Hanawal and Nikola Zlatanov, "HoloBeam: Learning Optimal Beamforming in Far-Field
    Holographic Metasurface Transceivers", INFOCOM 2024, arXiv 2401.05420.

Built from the abstract, which is all that was to be had: the elimination rule, its shares of the pilots and the start
of the second parameter are our own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Protocol, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.ops.arguments import in_range, integer, number, positive
from trimtab.solvers.bandits import BanditResult, Pull, unimodal_elimination

# Received powers (beams, count) of beams with these parameters.
Measure: TypeAlias = Callable[[Float[Tensor, " beams"], Float[Tensor, " beams"], int], Float[Tensor, "beams count"]]


class Identify(Protocol):
    """An algorithm of `trimtab.solvers.bandits`."""

    def __call__(
        self, pull: Pull, n_arms: int, budget: int, *, generator: torch.Generator | None = None
    ) -> BanditResult: ...


@dataclass(frozen=True)
class BeamResult:
    """The beam chosen.

    Attributes:
        b1, b2: its parameters.
        n_used: pilots sent, never more than the budget.
        axes: the searches along the first and the second parameter.
    """

    b1: float
    b2: float
    n_used: int
    axes: tuple[BanditResult, BanditResult]


def beam_grid(k: float) -> Float[Tensor, " beams"]:
    """Values of a phase-shifting parameter, -1 to 1 in steps of 1/k, on which gains have one peak.

    Example:
        >>> beam_grid(2)
        tensor([-1.0000, -0.5000,  0.0000,  0.5000,  1.0000], dtype=torch.float64)
    """
    if number("k", k) < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    return -1 + torch.arange(int(2 * k) + 1, dtype=torch.float64) / k


def holobeam(
    measure: Measure,
    kx: float,
    ky: float,
    budget: int,
    *,
    b2: float = 0.0,
    init_pilots: int = 0,
    identify: Identify = unimodal_elimination,
    generator: torch.Generator | None = None,
) -> BeamResult:
    """Learns the beam with the largest gain from `budget` pilots.

    Args:
        measure: `measure(b1, b2, count)` sends `count` pilots with each of the beams and returns the received powers.
        kx: length of the surface in wavelengths along the first axis; there are `2 * kx + 1` values of `b1`.
        ky: that along the second axis.
        budget: most pilots.
        b2: where the second parameter stands during the first search; the nearest value on its grid is taken. Far from
            the receiver's, little power is left to search by.
        init_pilots: pilots of the budget that try random beams first, one each; the first search then has the second
            parameter of the strongest of them.
        identify: finds the best value along an axis.
        generator: of what is drawn at random.

    Raises:
        ValueError: a number is out of range, the budget too small, or `measure` returns powers that are not finite.

    Example:
        >>> channel = FarFieldChannel(kx=10, ky=10, a1=0.32, a2=-0.07, snr_db=60)
        >>> generator = torch.Generator().manual_seed(0)
        >>> found = holobeam(channel.pilots(generator), 10, 10, budget=100)
        >>> round(found.b1, 3), round(found.b2, 3), found.n_used <= 100
        (0.3, -0.1, True)
    """
    if number("kx", kx) < 1 or number("ky", ky) < 1:
        raise ValueError(f"kx and ky must be at least 1, got {kx} and {ky}")
    first, second = beam_grid(kx), beam_grid(ky)
    budget = integer("budget", budget)
    init_pilots, b2 = integer("init_pilots", init_pilots, 0, budget - 1), in_range("b2", b2, -1, 1)
    if init_pilots:
        tried = [grid[torch.randint(len(grid), (init_pilots,), generator=generator)] for grid in (first, second)]
        heard = measure(tried[0], tried[1], 1)
        if not isinstance(heard, Tensor) or heard.shape != (init_pilots, 1) or not heard.isfinite().all():
            raise ValueError(f"measure must return finite powers of shape ({init_pilots}, 1), got others")
        start = tried[1][heard[:, 0].argmax()]
    else:
        start = second[(second - b2).abs().argmin()]

    def along_first(arms: Tensor, count: int) -> Tensor:
        return measure(first[arms], start.expand(len(arms)), count)

    def along_second(arms: Tensor, count: int) -> Tensor:
        return measure(best.expand(len(arms)), second[arms], count)

    half = (budget - init_pilots) // 2
    one = identify(along_first, len(first), half, generator=generator)
    best = first[one.arm]
    two = identify(along_second, len(second), budget - init_pilots - half, generator=generator)
    used = init_pilots + one.n_used + two.n_used
    return BeamResult(float(best), float(second[two.arm]), used, (one, two))


@dataclass(frozen=True)
class FarFieldChannel:
    """Line of sight from a surface to a receiver in its far field.

    Attributes:
        kx, ky: lengths of the surface in wavelengths.
        a1, a2: parameters of the perfect beam, in [-1, 1].
        snr_db: power received through that beam over the noise's, in decibels; infinity for no noise.
    """

    kx: float
    ky: float
    a1: float
    a2: float
    snr_db: float = math.inf

    def __post_init__(self) -> None:
        for name in ("a1", "a2"):
            in_range(name, getattr(self, name), -1, 1)
        for name in ("kx", "ky"):
            positive(name, getattr(self, name))
        if isinstance(self.snr_db, bool) or not isinstance(self.snr_db, Real):
            raise TypeError(f"snr_db must be a number, got {self.snr_db!r}")
        if math.isnan(self.snr_db) or self.snr_db == -math.inf:
            raise ValueError(f"snr_db must be a number or infinity, got {self.snr_db}")

    @classmethod
    def towards(cls, theta: float, phi: float, kx: float, ky: float, snr_db: float = math.inf) -> FarFieldChannel:
        """The channel to a receiver at an elevation and an azimuth, in radians."""
        return cls(kx, ky, math.sin(theta) * math.cos(phi), math.sin(theta) * math.sin(phi), snr_db)

    def gain(self, b1: Float[Tensor, " beams"], b2: Float[Tensor, " beams"]) -> Float[Tensor, " beams"]:
        """Power through beams, as a share of that through the perfect one."""
        amplitude: Tensor = torch.sinc(self.kx * (self.a1 - b1)) * torch.sinc(self.ky * (self.a2 - b2))
        return amplitude.square()

    def pilots(self, generator: torch.Generator | None = None) -> Measure:
        """Sends pilots: the squared magnitude of the signal with complex Gaussian noise."""
        noise = 10 ** (-self.snr_db / 20) / math.sqrt(2)

        def measure(b1: Tensor, b2: Tensor, count: int) -> Tensor:
            drawn = noise * torch.randn(2, len(b1), count, generator=generator, dtype=torch.float64)
            return (self.gain(b1, b2).sqrt()[:, None] + drawn[0]).square() + drawn[1].square()

        return measure
