r"""What a network may predict about a noisy sample, and the conversion between any two kinds.

With $x = \alpha x_0 + \sigma\varepsilon$, each kind is a linear form $p\,x_0 + q\,\varepsilon$:

| kind | value | p | q |
|---|---|---|---|
| `x0` | clean sample | 1 | 0 |
| `eps` | noise | 0 | 1 |
| `v` | $\alpha\varepsilon - \sigma x_0$ | $-\sigma$ | $\alpha$ |
| `score` | $-\varepsilon/\sigma$ | 0 | $-1/\sigma$ |
| `flow` | $\varepsilon - x_0$ | -1 | 1 |

so one kind and $x$ give every other by Cramer's rule: two numbers per conversion.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from trimtab.diffusion.schedules import per_sample
from trimtab.ops.arguments import one_of, real_problem

Prediction = Literal["x0", "eps", "v", "score", "flow"]
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)

_Form = tuple[Tensor | float, Tensor | float]
_FORMS: dict[Prediction, Callable[..., _Form]] = {
    "x0": lambda alpha, sigma: (1.0, 0.0),
    "eps": lambda alpha, sigma: (0.0, 1.0),
    "v": lambda alpha, sigma: (-sigma, alpha),
    "score": lambda alpha, sigma: (0.0, -1 / sigma),
    "flow": lambda alpha, sigma: (-1.0, 1.0),
}


def convert(
    value: Float[Tensor, "batch ..."],
    x: Float[Tensor, "batch ..."],
    alpha: Tensor | float,
    sigma: Tensor | float,
    src: Prediction,
    dst: Prediction,
) -> Float[Tensor, "batch ..."]:
    """One kind of prediction from another.

    Args:
        value: the prediction of kind `src`.
        x: the noisy sample it was made for.
        alpha: factor on the data, a number or of shape `()`, `(batch,)` or `(batch, 1, ...)`, as of `per_sample`.
        sigma: standard deviation of the noise, likewise.
        src: kind of `value`.
        dst: kind wanted.

    Returns:
        The prediction of kind `dst`; `value` itself where the kinds agree.

    Raises:
        TypeError: if `value` or `x` is complex or a NumPy array.
        ValueError: for an unknown kind, where `alpha` or `sigma` is a number that is not finite, or where one is the
            number 0 and that decides the other kind.

    Example:
        >>> import torch
        >>> x0, eps = torch.randn(2, 4, 3, dtype=torch.float64)
        >>> x = 0.6 * x0 + 0.8 * eps
        >>> bool(torch.allclose(convert(eps, x, 0.6, 0.8, "eps", "x0"), x0))
        True
    """
    if problem := real_problem(value=value, x=x):
        raise TypeError(problem)
    if not isinstance(alpha, Tensor) and not math.isfinite(alpha):
        raise ValueError(f"alpha must be finite, got {alpha}")
    if not isinstance(sigma, Tensor) and not math.isfinite(sigma):
        raise ValueError(f"sigma must be finite, got {sigma}")
    for name, kind in (("src", src), ("dst", dst)):
        one_of(name, kind, PREDICTIONS)
    if src == dst:
        return value
    alpha, sigma = per_sample(alpha, x), per_sample(sigma, x)
    given, wanted, noisy = _FORMS[src](alpha, sigma), _FORMS[dst](alpha, sigma), (alpha, sigma)
    determinant = _minor(given, noisy)
    if _is(determinant, 0):
        raise ValueError(f"alpha and sigma must leave {dst} in what {src} and x say, got {alpha} and {sigma}")
    of_value, of_x = _minor(wanted, noisy), _minor(given, wanted)
    converted = value * (of_value / determinant)
    if _is(of_x, 0) and converted.dtype == x.dtype:
        return converted
    return converted + x * (of_x / determinant)


def _minor(first: _Form, second: _Form) -> Tensor | float:
    """q_1 p_2 - p_1 q_2, without arithmetic on tensors for what is the number 0 or 1."""
    plus, minus = _product(first[1], second[0]), _product(first[0], second[1])
    if _is(plus, 0):
        return -minus
    return plus if _is(minus, 0) else plus - minus


def _product(a: Tensor | float, b: Tensor | float) -> Tensor | float:
    if _is(a, 0) or _is(b, 0):
        return 0.0
    return b if _is(a, 1) else a if _is(b, 1) else a * b


def _is(value: Tensor | float, number: int) -> bool:
    return not isinstance(value, Tensor) and value == number


def target(
    x0: Float[Tensor, "batch ..."],
    noise: Float[Tensor, "batch ..."],
    alpha: Tensor | float,
    sigma: Tensor | float,
    kind: Prediction,
) -> Float[Tensor, "batch ..."]:
    """What a perfect prediction of a kind would be, where clean sample and noise are known.

    Args:
        x0: clean samples.
        noise: the noise in them.
        alpha: factor on the data, a number or of shape `()` or `(batch,)`.
        sigma: standard deviation of the noise, likewise.
        kind: kind of the prediction.

    Raises:
        ValueError: for an unknown kind.

    Example:
        >>> import torch
        >>> target(torch.tensor([[1.0]]), torch.tensor([[3.0]]), 0.6, 0.8, "flow")
        tensor([[2.]])
    """
    one_of("kind", kind, PREDICTIONS)
    p, q = _FORMS[kind](per_sample(alpha, x0), per_sample(sigma, x0))
    return p * x0 + q * noise
