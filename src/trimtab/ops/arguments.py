"""Readers of arguments: each gives back a clean value, or says by name what came and what was wanted.

Every message has the form `name must be …, got …`. Readers of numbers take NumPy's as well as Python's; readers of
data take arrays as well as tensors. `labels` and `finite_tensor` look at values, so that a hot path, where looking
would make an accelerator wait, does not call them; `indices` and `assured` are for there.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor

Ends = Literal["both", "left", "right", "neither"]


def number(name: str, value: Any) -> float:
    """A finite real number.

    Raises:
        TypeError: it is no real number (a bool is none).
        ValueError: it is NaN or infinite.

    Example:
        >>> number("lam", np.float32(0.5))
        0.5
    """
    found = _real(name, value)
    if not -math.inf < found < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")
    return found


def positive(name: str, value: Any) -> float:
    """A finite number above 0.

    Example:
        >>> positive("lr", 0.0)
        Traceback (most recent call last):
        ...
        ValueError: lr must be positive and finite, got 0.0
    """
    found = _real(name, value)
    if not 0 < found < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return found


def non_negative(name: str, value: Any) -> float:
    """A finite number of at least 0."""
    found = _real(name, value)
    if not 0 <= found < math.inf:
        raise ValueError(f"{name} must be at least 0 and finite, got {value}")
    return found


def in_range(name: str, value: Any, low: float, high: float, ends: Ends = "both") -> float:
    """A number between two others.

    Args:
        name: of the argument.
        value: what came.
        low, high: the range.
        ends: which of its ends belong to it.

    Example:
        >>> in_range("momentum", 1.0, 0, 1, "left")
        Traceback (most recent call last):
        ...
        ValueError: momentum must be in [0, 1), got 1.0
    """
    found = number(name, value)
    above = low <= found if ends in ("both", "left") else low < found
    below = found <= high if ends in ("both", "right") else found < high
    if not (above and below):
        left, right = "[" if ends in ("both", "left") else "(", "]" if ends in ("both", "right") else ")"
        raise ValueError(f"{name} must be in {left}{low:g}, {high:g}{right}, got {value}")
    return found


def integer(name: str, value: Any, least: int | None = 1, most: int | None = None) -> int:
    """A whole number within bounds, both included.

    Example:
        >>> integer("k", np.int64(3))
        3
        >>> integer("k", 0)
        Traceback (most recent call last):
        ...
        ValueError: k must be at least 1, got 0
    """
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {_shown(value)}")
    found = int(value)
    if least is not None and most is not None and not least <= found <= most:
        raise ValueError(f"{name} must be in [{least}, {most}], got {value}")
    if least is not None and found < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if most is not None and found > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")
    return found


def one_of(name: str, value: Any, choices: Iterable[Any]) -> Any:
    """One of the choices.

    Example:
        >>> one_of("reduction", "men", ["mean", "sum"])
        Traceback (most recent call last):
        ...
        ValueError: reduction must be one of 'mean', 'sum', got 'men'
    """
    known = tuple(choices)
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
    return value


def tensor(name: str, value: Any, *, ndim: int | None = None, floating: bool = False) -> Tensor:
    """A tensor, from a tensor or an array.

    Args:
        name: of the argument.
        value: what came; a tensor is given back as it is.
        ndim: the number of dimensions it must have.
        floating: whether its type must be a floating-point one.

    Raises:
        TypeError: it is neither a tensor nor an array of numbers, complex, or not floating point where it must be.
        ValueError: it has another number of dimensions.
    """
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        # PyTorch shares neither what it may not write to nor what runs backwards.
        shared = value.flags.writeable and min(value.strides, default=0) >= 0
        value = torch.from_numpy(value if shared else value.copy())
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor or a NumPy array, got {_shown(value)}")
    if value.is_complex():
        raise TypeError(f"{name} must be real, got {value.dtype}")
    if floating and not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {value.dtype}")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{name} must be {_dimensions(ndim)}, got shape {tuple(value.shape)}")
    return value


def finite_tensor(name: str, value: Any, *, ndim: int | None = None, floating: bool = False) -> Tensor:
    """A tensor without NaN and infinities. It looks at the values.

    Example:
        >>> finite_tensor("cost", np.array([1.0, np.nan]))
        Traceback (most recent call last):
        ...
        ValueError: cost must be finite, got NaN or infinity
    """
    found = tensor(name, value, ndim=ndim, floating=floating)
    if not all_finite(found):
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return found


def all_finite(value: Tensor) -> bool:
    """Whether a real tensor holds neither NaN nor infinities, in one pass over it and without a mask of its size.

    Example:
        >>> all_finite(torch.tensor([1.0, 2.0])), all_finite(torch.tensor([1.0, -torch.inf]))
        (True, False)
    """
    if not value.is_floating_point() or not value.numel():
        return True
    return bool(torch.isfinite(torch.stack(_of_all_lanes(value.detach()).aminmax())).all())


def labels(name: str, value: Any, num_classes: int | None = None, length: int | None = None) -> Tensor:
    """A vector of class labels, as int64. It looks at the values.

    Args:
        name: of the argument.
        value: integers, in a tensor or an array.
        num_classes: labels must be below it.
        length: how many there must be.

    Example:
        >>> labels("targets", np.array([0, 3]), num_classes=3)
        Traceback (most recent call last):
        ...
        ValueError: targets must be in [0, 3), got 3
    """
    found = tensor(name, value, ndim=1)
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {found.dtype}")
    if length is not None and len(found) != length:
        raise ValueError(f"{name} must be {length} labels, got {len(found)}")
    if len(found):
        low, high = int(found.min()), int(found.max())
        if low < 0 or (num_classes is not None and high >= num_classes):
            wanted = "at least 0" if num_classes is None else f"in [0, {num_classes})"
            raise ValueError(f"{name} must be {wanted}, got {low if low < 0 else high}")
    return found.long()


def floating_tensor(name: str, value: Tensor) -> Tensor:
    """A floating-point tensor of at least float32: half precision is raised to it. Arrays are refused by name.

    For what is differentiated or lies on a hot path, where an array can only be a mistake.

    Raises:
        TypeError: if it is no tensor, or not floating point.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {value.dtype}")
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def tensor_problem(**values: Any) -> str:
    """What is wrong with arguments that must be real tensors; empty where nothing is. None stands for no argument.

    For functions of tensors, where an array or a complex number can only be a mistake.

    Args:
        **values: the arguments by their names.

    Returns:
        The message of the error to raise.

    Example:
        >>> tensor_problem(x=np.zeros(2))
        'x must be a tensor, got ndarray'
    """
    for name, value in values.items():
        if value is not None and not isinstance(value, Tensor):
            return f"{name} must be a tensor, got {type(value).__name__}"
        if value is not None and value.is_complex():
            return f"{name} must be real, got {value.dtype}"
    return ""


def real_problem(**values: Any) -> str:
    """Which argument is a NumPy array or a complex tensor where a real tensor or a number is wanted; empty if none is.

    For functions that have no other reason to look at what they are given.

    Args:
        **values: the arguments by their names.

    Returns:
        The message of the error to raise, a TypeError.

    Example:
        >>> real_problem(t=0.5, x=np.zeros(2))
        'x must be a tensor, got a NumPy array'
        >>> real_problem(t=0.5, x=torch.zeros(2, dtype=torch.complex64))
        'x must be real, got torch.complex64'
    """
    for name, value in values.items():
        if isinstance(value, np.ndarray):
            return f"{name} must be a tensor, got a NumPy array"
        if isinstance(value, Tensor) and value.is_complex():
            return f"{name} must be real, got {value.dtype}"
    return ""


def class_indices(name: str, value: Tensor) -> None:
    """Refuses what is not an int64 tensor.

    Raises:
        TypeError: if it is no tensor, or of another type.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype != torch.int64:
        raise TypeError(f"{name} must be int64 (class indices), got {value.dtype}")


def indices(name: str, value: Tensor, size: int) -> None:
    """Refuses integers outside [0, size), without making an accelerator wait.

    On the CPU they are looked at. On an accelerator, and inside `torch.compile`, the check is an assertion that the
    device itself makes: it stops the run, without a pause and with less to read.

    Args:
        name: of the argument.
        value: integers in a tensor that is not empty.
        size: what they must be below.

    Example:
        >>> indices("targets", torch.tensor([0, 7]), 3)
        Traceback (most recent call last):
        ...
        ValueError: targets must be in [0, 3), got 7
    """
    low, high = (value := _of_all_lanes(value)).aminmax()
    in_range = (low >= 0) & (high < size)
    if looked_at(value):
        if not in_range:
            raise ValueError(f"{name} must be in [0, {size}), got {int(low if low < 0 else high)}")
    else:
        torch._assert_async(in_range, f"{name} must be in [0, {size})")


def assured(holds: Tensor, message: str) -> None:
    """Refuses, with this message, what does not hold everywhere; as `indices`, without making an accelerator wait.

    Example:
        >>> assured(torch.tensor([2.0, -1.0]) > 0, "weights must be positive, got others")
        Traceback (most recent call last):
        ...
        ValueError: weights must be positive, got others
    """
    holds = _of_all_lanes(holds)
    if not looked_at(holds):
        torch._assert_async(holds.all(), message)
    elif not holds.all():
        raise ValueError(message)


def looked_at(value: Tensor) -> bool:
    """Whether values are looked at where nothing may wait: on the CPU, outside compiled code and `torch.func.vmap`."""
    if value.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return value.ndim == _of_all_lanes(value).ndim


def _of_all_lanes(value: Tensor) -> Tensor:
    """The values behind one of `torch.func`'s transforms, those of all lanes of a `vmap`."""
    if not torch.compiler.is_compiling():
        while is_functorch_wrapped_tensor(value):
            value = get_unwrapped(value)
    return value


def out_of_reach(x: Tensor, eps: float, bounds: tuple[float, float] | None) -> bool:
    """Whether no input within `bounds` is as near as `eps` to one of these, as far as they may be looked at.

    So it is for inputs that were normalised, where bounds are those of pixels.

    Example:
        >>> pixels = torch.tensor([0.0, 1.0])
        >>> out_of_reach(pixels, 0.1, (0.0, 1.0)), out_of_reach(4 * pixels - 2, 0.1, (0.0, 1.0))
        (False, True)
    """
    if bounds is None or x.numel() == 0 or not looked_at(x):
        return False
    return bool(((x.detach() < bounds[0] - eps) | (x.detach() > bounds[1] + eps)).any())


def same_shape(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Refuses a tensor that has not the shape of another."""
    if value.shape != other.shape:
        wanted = f"of shape {tuple(other.shape)} as {other_name}"
        raise ValueError(f"{name} must be {wanted}, got shape {tuple(value.shape)}")


def _real(name: str, value: Any) -> float:
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {_shown(value)}")
    return float(value)


def _dimensions(ndim: int) -> str:
    return {0: "a single number", 1: "a vector", 2: "a matrix"}.get(ndim, f"a tensor of {ndim} dimensions")


def _shown(value: Any) -> str:
    kind = type(value).__name__
    return f"{kind} {value!r}" if isinstance(value, bool | str | int | float | type(None)) else kind
