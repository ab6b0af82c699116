"""When a class's masks begin to be memorised, read from its training IoU."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import curve_fit

from trimtab.ops.arguments import in_range, integer

# With fewer, three parameters follow the noise.
_FEWEST_POINTS = 4
# A smaller gain of IoU in an epoch, before any larger one, is not yet learning.
_SMALLEST_RISE = 0.1


class LearningCurve(NamedTuple):
    r"""The curve $f(t) = a (1 - \exp(-t^b / c))$ of a training IoU over epochs.

    Attributes:
        a: the level that it tends to, in [0, 1].
        b: exponent of time, in [0, 1]; the slope never rises.
        c: slowness, positive.
    """

    a: float
    b: float
    c: float

    def value(self, t: ArrayLike) -> NDArray[np.float64]:
        """The IoU at time `t`, not negative; 0 at 0."""
        time = np.asarray(t, dtype=np.float64)
        if not (time >= 0).all():
            raise ValueError(f"t must be at least 0, got {t!r:.60}")
        return _curve(time, *self)

    def slope(self, t: ArrayLike) -> NDArray[np.float64]:
        """Its derivative at time `t`, which must be positive; positive too."""
        time = _after_start(t)
        slope: NDArray[np.float64] = self.a * self.b / self.c * time ** (self.b - 1) * np.exp(-(time**self.b) / self.c)
        return slope

    def deceleration(self, t: ArrayLike) -> NDArray[np.float64]:
        """By which share the slope at `t`, positive, lies below that at 1; it does not depend on the level `a`."""
        time = _after_start(t)
        kept: NDArray[np.float64] = time ** (self.b - 1) * np.exp((1 - time**self.b) / self.c)
        return 1 - kept


def fit_learning_curve(iou: ArrayLike, epochs: ArrayLike | None = None) -> LearningCurve:
    """The learning curve nearest to a training IoU, by weighted least squares; later points weigh more.

    Args:
        iou: measurements in [0, 1], at least 4.
        epochs: when they were made, at least 0; 1, 2, ... where it is None. The authors' release takes equal steps
            from 0 to the number of measurements.

    Raises:
        ValueError: if there are fewer than 4 points, they do not lie in [0, 1], or `epochs` does not fit.
        RuntimeError: if the fit does not converge.

    Example:
        >>> curve = LearningCurve(a=0.8, b=0.9, c=3.0)
        >>> tuple(round(value, 3) for value in fit_learning_curve(curve.value(range(1, 21))))
        (0.8, 0.9, 3.0)
    """
    y = checked_iou(iou)
    t = np.arange(1, len(y) + 1, dtype=np.float64) if epochs is None else np.asarray(epochs, dtype=np.float64)
    if t.shape != y.shape or not (t >= 0).all():
        raise ValueError(f"epochs must be {len(y)} times of at least 0, one per measurement, got {epochs!r:.60}")
    if len(y) < _FEWEST_POINTS:
        raise ValueError(f"iou must be at least {_FEWEST_POINTS} measurements, got {len(y)}")
    found, _ = curve_fit(
        _curve,
        t,
        y,
        p0=(1.0, 1.0, 1.0),
        sigma=np.geomspace(1.0, 0.1, len(y)),
        bounds=([0.0, 0.0, 0.0], [1.0, 1.0, np.inf]),
        method="trf",
    )
    return LearningCurve(*map(float, found))


def memorization_epoch(iou: ArrayLike, r: float = 0.9, total_epochs: int | None = None) -> int | None:
    """The epoch at which a class's masks begin to be memorised: where its learning has slowed down by more than `r`.

    Epochs before the first rise of at least 0.1 (from 0 before training) are not yet learning, and left out of the fit.

    Args:
        iou: the class's training IoU after each epoch, against the labels trained on.
        r: relative fall of the learning curve's slope, in (0, 1).
        total_epochs: how far ahead the curve is followed; None asks only about the epochs measured.

    Returns:
        The number of epochs done when memorisation begins; None where that is later, or fewer than 4 epochs of
        learning have been measured, or no curve fits.

    Raises:
        ValueError: if `iou` does not lie in [0, 1], `r` is out of range, or `total_epochs` is less than what was
            measured.

    Example:
        >>> late = [0.0, 0.01, 0.02, *LearningCurve(a=0.8, b=0.9, c=2.0).value(range(1, 10))]
        >>> memorization_epoch(late), memorization_epoch(late[:8]), memorization_epoch(late[:8], total_epochs=20)
        (10, None, 10)
    """
    y = checked_iou(iou)
    r = in_range("r", r, 0, 1, "neither")
    horizon = len(y) if total_epochs is None else integer("total_epochs", total_epochs, len(y))
    rises = np.flatnonzero(np.diff(y, prepend=0.0) >= _SMALLEST_RISE)
    if not len(rises) or len(y) - rises[0] < _FEWEST_POINTS:
        return None
    start = int(rises[0])
    try:
        curve = fit_learning_curve(y[start:])
    except RuntimeError:
        return None
    slowed = np.flatnonzero(curve.deceleration(np.arange(1, horizon - start + 1)) > r)
    return start + int(slowed[0]) + 1 if len(slowed) else None


def _after_start(t: ArrayLike) -> NDArray[np.float64]:
    time = np.asarray(t, dtype=np.float64)
    if not (time > 0).all():
        raise ValueError(f"t must be positive, got {t!r:.60}")
    return time


def _curve(t: NDArray[np.float64], a: float, b: float, c: float) -> NDArray[np.float64]:
    value: NDArray[np.float64] = -a * np.expm1(-(t**b) / c)
    return value


def checked_iou(iou: ArrayLike) -> NDArray[np.float64]:
    """A training IoU, once it is known to be one.

    Raises:
        ValueError: if it is no vector of values in [0, 1], or empty.
    """
    if np.iscomplexobj(iou):
        raise TypeError("iou must be real, got complex numbers")
    values = np.asarray(iou, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"iou must be a sequence of values in [0, 1], and not empty, got {iou!r:.60}")
    return values
