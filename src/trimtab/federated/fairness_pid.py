r"""Why a federated model may be fair in every client and unfair over all of them, or the other way round, in bits.

A diagnostic for predictions $\hat Y$ on people with a sensitive attribute $Z$ at clients $S$. Global disparity is what
the prediction tells about the attribute, local disparity what it still tells once the client is known. A partial
information decomposition splits both:

$$
\underbrace{I(Z; \hat Y)}_{\text{global}} = \text{unique} + \text{redundant}, \qquad
\underbrace{I(Z; \hat Y \mid S)}_{\text{local}} = \text{unique} + \text{masked}, \qquad
\text{unique} = \min_{q \in Q} I_q(Z; \hat Y \mid S),
$$

where $Q$ holds the joint distributions of which $(Z, \hat Y)$ and $(Z, S)$ are distributed as given. Redundant
disparity is what the client tells as well: no measure inside of clients can remove it. Masked disparity shows only
within clients. `disparities` measures the three; `accuracy_frontier` finds the most accurate prediction that any
strategy could make under limits on both disparities, a convex programme (AGLFOP).

Reference: Faisal Hamman and Sanghamitra Dutta, "Demystifying Local and Global Fairness Trade-offs in Federated
Learning Using Partial Information Decomposition", ICLR 2024, arXiv 2307.11333.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, Shaped
from scipy.linalg import null_space

from trimtab.ops.arguments import non_negative

Array = npt.NDArray[np.float64]

# A limit below this is an equality: independence is linear in the prediction's distribution.
_NOTHING = 1e-9


@dataclass(frozen=True)
class Disparity:
    """How unfair predictions are, over all clients and within them, and why; information in bits.

    Attributes:
        global_: what the prediction tells about the attribute; `unique + redundant`.
        local: what it tells once the client is known; `unique + masked`.
        unique: told by the prediction and not by the client.
        redundant: told by the client as well.
        masked: told only by the prediction and the client together.
        parity_global: P(prediction 1 | attribute 1) - P(prediction 1 | attribute 0), by the larger of their two
            values; None unless both are binary.
        parity_local: the same in each client; NaN where a client has one group alone, None unless both are binary.
    """

    global_: float
    local: float
    unique: float
    redundant: float
    masked: float
    parity_global: float | None
    parity_local: Float[np.ndarray, " clients"] | None


@dataclass(frozen=True)
class FrontierPoint:
    """The most accurate prediction under two limits.

    Attributes:
        accuracy: of the prediction, in [0, 1].
        prediction: (attribute, client, label, prediction), probabilities of each prediction; NaN where the table has
            no such people.
        global_: its global disparity in bits.
        local: its local disparity in bits.
    """

    accuracy: float
    prediction: Float[np.ndarray, "z s y y"]
    global_: float
    local: float


def disparities(
    sensitive: Shaped[np.ndarray, " people"],
    predictions: Shaped[np.ndarray, " people"],
    clients: Shaped[np.ndarray, " people"],
    *,
    weights: Float[np.ndarray, " people"] | None = None,
) -> Disparity:
    """Global and local disparity of predictions, and what they consist of.

    Shares are counted as they are, without smoothing: with few people in a cell, information is overestimated.

    Args:
        sensitive: attribute of each person, of any kind of few values.
        predictions: predicted class.
        clients: where the person is.
        weights: how much a person counts, not negative; equally by default.

    Raises:
        ValueError: lengths differ, there is nobody, a value is NaN, or a weight is negative or not finite.

    Example:
        >>> sensitive, clients = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
        >>> found = disparities(sensitive, predictions=sensitive ^ clients, clients=clients)
        >>> f"global {found.global_:.2f}, local {found.local:.2f}, masked {found.masked:.2f}"
        'global 0.00, local 1.00, masked 1.00'
    """
    codes, sizes = [], []
    for name, value in (("sensitive", sensitive), ("predictions", predictions), ("clients", clients)):
        found = np.asarray(value)
        if found.ndim != 1 or len(found) == 0 or found.shape != np.shape(sensitive):
            raise ValueError(f"{name} must be a value for each person, {np.shape(sensitive)}, got shape {found.shape}")
        if found.dtype.kind == "f" and np.isnan(found).any():
            raise ValueError(f"{name} must not be NaN")
        values, code = np.unique(found, return_inverse=True)
        codes.append(code.reshape(-1))
        sizes.append(len(values))
    counted = np.ones(len(codes[0])) if weights is None else np.asarray(weights, dtype=np.float64)
    if counted.shape != codes[0].shape or not np.isfinite(counted).all() or (counted < 0).any() or not counted.any():
        raise ValueError(f"weights must be one for each person, finite, not negative and not all 0, got {weights!r}")
    table = np.zeros(sizes)
    np.add.at(table, tuple(codes), counted / counted.sum())
    # A value that only people of weight 0 have is none.
    for axis, others in enumerate([(1, 2), (0, 2), (0, 1)]):
        table = table.compress(table.sum(others) > 0, axis)
    return disparities_from_table(table)


def disparities_from_table(table: Float[np.ndarray, "z prediction s"]) -> Disparity:
    """The same of a joint distribution of attribute, prediction and client.

    Args:
        table: probabilities, (attributes, predictions, clients).

    Raises:
        ValueError: it is not three-dimensional, a probability is negative or not finite, or they do not sum to 1.

    Example:
        >>> fair_in_clients = np.zeros((2, 2, 2))
        >>> fair_in_clients[0, 0, 0] = fair_in_clients[1, 1, 1] = 0.5  # each client has one group, and one prediction
        >>> found = disparities_from_table(fair_in_clients)
        >>> f"global {found.global_:.2f}, local {found.local:.2f}, redundant {found.redundant:.2f}"
        'global 1.00, local 0.00, redundant 1.00'
    """
    p = _distribution("table", table)
    total, local = _mutual_information(p.sum(2)), _conditional_information(p)
    # Rounding must not make a part negative.
    unique = min(_unique_information(p), total, local)
    binary = p.shape[:2] == (2, 2)
    return Disparity(
        global_=total,
        local=local,
        unique=unique,
        redundant=total - unique,
        masked=local - unique,
        parity_global=float(_parity(p.sum(2))) if binary else None,
        parity_local=np.array([_parity(p[:, :, s]) for s in range(p.shape[2])]) if binary else None,
    )


def accuracy_frontier(
    table: Float[np.ndarray, "z s y"], eps_global: float, eps_local: float, *, tol: float = 1e-7
) -> FrontierPoint:
    """The largest accuracy of any prediction whose disparities stay within limits.

    The prediction may depend on attribute, client and label, whatever the model: what is found is a bound on all
    strategies. Solved by a barrier method.

    Args:
        table: joint probabilities of attribute, client and label.
        eps_global: limit on the global disparity in bits, not negative.
        eps_local: limit on the local disparity in bits, not negative.
        tol: how far the accuracy may be from the largest one.

    Raises:
        ValueError: `table` is no distribution of three variables, or a limit is negative.

    Example:
        >>> table = np.zeros((2, 1, 2))
        >>> table[0, 0, 0] = table[1, 0, 1] = 0.5  # attribute and label are one
        >>> [round(accuracy_frontier(table, eps, eps).accuracy, 3) for eps in (0.0, 0.1, 1.0)]
        [0.5, 0.684, 1.0]
    """
    if not 0 < tol < float("inf"):
        raise ValueError(f"tol must be finite and positive, got {tol!r}")
    p = _distribution("table", table)
    limits = [math.log(2) * non_negative(name, e) for name, e in (("eps_global", eps_global), ("eps_local", eps_local))]
    cells, labels = np.argwhere(p > 0), p.shape[2]
    mass = p[p > 0]
    # Variables are the joint probabilities of a cell and a prediction; maps add them up to (z, prediction) for the
    # global disparity, and to (z, s, prediction) for the local one.
    at, said = np.repeat(np.arange(len(cells)), labels), np.tile(np.arange(labels), len(cells))
    z, s, y = cells[at].T
    groups = [(z, said), (z, s, said)]
    totals = [(said,), (s, said)]
    start = mass[at] / labels  # a prediction that does not look
    constraints, informations = [_adding((at,))], []
    for group, total, limit in zip(groups, totals, limits, strict=True):
        joint, alone = _adding(group), _adding(total)
        if limit >= _NOTHING:
            informations.append((_Information(joint, alone), limit))
        else:
            # Of every prediction, the attribute has its share of the client's people.
            first = joint.argmax(1)
            of_total = alone[alone[:, first].argmax(0)]
            constraints.append(joint - (joint @ start / (of_total @ start))[:, None] * of_total)
    free = null_space(np.concatenate(constraints))
    error = (said != y).astype(np.float64)
    w = _minimise(error, start, free, informations, tol)
    prediction = np.full((*p.shape, labels), np.nan)
    prediction[tuple(cells.T)] = (w / mass[at]).reshape(len(cells), labels)
    joint_table = np.zeros((p.shape[0], labels, p.shape[1]))
    np.add.at(joint_table, (z, said, s), w)
    return FrontierPoint(
        accuracy=float(1 - error @ w),
        prediction=prediction,
        global_=_mutual_information(joint_table.sum(2)),
        local=_conditional_information(joint_table),
    )


def _unique_information(p: Array) -> float:
    """The least I(Z; prediction | S) in bits over all couplings of prediction and client given the attribute."""
    z, said, s = np.nonzero((p.sum(2) > 0)[:, :, None] & (p.sum(1) > 0)[:, None, :])
    start = p.sum(2)[z, said] * p.sum(1)[z, s] / p.sum((1, 2))[z]
    fixed = np.concatenate([_adding((z, said)), _adding((z, s))])
    free = null_space(fixed)
    if free.shape[1]:
        information = _Information(np.eye(len(start)), _adding((said, s)))
        start = _minimise_information(information, start, free)
    q = np.zeros_like(p)
    q[z, said, s] = start
    return _conditional_information(q)


class _Information:
    """sum m log m - sum a log a of two sums of the variables: an information up to what is fixed, in nats.

    With m the joint distribution of attribute and prediction (and client) and a that of the prediction (and client),
    the attribute's own entropy is fixed by the constraints.
    """

    def __init__(self, joint: Array, alone: Array) -> None:
        self.joint, self.alone = joint, alone
        self.offset = 0.0

    def value(self, w: Array) -> float:
        return float(_entropy_sum(self.joint @ w) - _entropy_sum(self.alone @ w)) - self.offset

    def gradient(self, w: Array) -> Array:
        return self.joint.T @ np.log(self.joint @ w) - self.alone.T @ np.log(self.alone @ w)

    def hessian(self, w: Array) -> Array:
        within, total = self.joint @ w, self.alone @ w
        return (self.joint.T / within) @ self.joint - (self.alone.T / total) @ self.alone


Derivatives = Callable[[Array], tuple[float, Array, Array]]


def _minimise_information(information: _Information, w: Array, free: Array) -> Array:
    """The least information over w + free x, w >= 0, to about 1e-10 nats."""

    def objective(sharpness: float) -> Derivatives:
        def at(w: Array) -> tuple[float, Array, Array]:
            if (w <= 0).any():
                return math.inf, w, free
            value = sharpness * information.value(w) - np.log(w).sum()
            gradient = sharpness * information.gradient(w) - 1 / w
            return float(value), gradient, sharpness * information.hessian(w) + np.diag(w**-2)

        return at

    sharpness = 10.0 * len(w)
    while sharpness < len(w) * 1e10:
        w = _newton(objective(sharpness), w, free)
        sharpness *= 8
    return w


def _minimise(cost: Array, w: Array, free: Array, within: list[tuple[_Information, float]], tol: float) -> Array:
    """The least cost over w + free x, w >= 0, with informations below their limits; `w` is independent of all."""
    for information, _ in within:
        information.offset = information.value(w)  # nothing is told by a prediction that does not look

    def objective(sharpness: float) -> Derivatives:
        def at(w: Array) -> tuple[float, Array, Array]:
            if (w <= 0).any():
                return math.inf, w, free
            value = sharpness * float(cost @ w) - float(np.log(w).sum())
            gradient, hessian = sharpness * cost - 1 / w, np.diag(w**-2)
            for information, limit in within:
                slack = limit - information.value(w)
                if slack <= 0:
                    return math.inf, w, free
                slope = information.gradient(w)
                value -= math.log(slack)
                gradient = gradient + slope / slack
                hessian = hessian + information.hessian(w) / slack + np.outer(slope, slope) / slack**2
            return value, gradient, hessian

        return at

    barriers, sharpness = len(w) + len(within), 10.0
    while True:
        w = _newton(objective(sharpness), w, free)
        if barriers / sharpness <= tol:
            return w
        sharpness *= 8


def _newton(objective: Derivatives, w: Array, free: Array, steps: int = 100) -> Array:
    """Damped Newton steps within `free`, until no more is to be gained than rounding hides."""
    value, gradient, hessian = objective(w)
    for _ in range(steps):
        slope, curvature = free.T @ gradient, free.T @ hessian @ free
        scale = 1 / np.sqrt(np.maximum(np.diag(curvature), np.finfo(np.float64).tiny))
        step = -scale * np.linalg.lstsq(scale[:, None] * curvature * scale, scale * slope, rcond=None)[0]
        gain = -float(slope @ step)
        if not gain > 1e-9 + 1e-12 * abs(value):
            return w
        move, size = free @ step, 1.0
        while size > 1e-12:
            found = objective(w + size * move)
            if found[0] <= value - 0.1 * size * gain:
                break
            size /= 2
        else:
            return w
        w, (value, gradient, hessian) = w + size * move, found
    return w


def _adding(keys: tuple[Any, ...]) -> Array:
    """The matrix that adds up variables of equal keys, a row for each key that occurs."""
    _, code = np.unique(np.stack(keys), axis=1, return_inverse=True)
    code = code.reshape(-1)
    return np.asarray(np.arange(code.max() + 1)[:, None] == code, dtype=np.float64)


def _distribution(name: str, table: Any) -> Array:
    p = np.asarray(table, dtype=np.float64)
    if p.ndim != 3 or 0 in p.shape:
        raise ValueError(f"{name} must be three-dimensional and not empty, got shape {p.shape}")
    if not np.isfinite(p).all() or (p < 0).any() or abs(p.sum() - 1) > 1e-6:
        raise ValueError(f"{name} must hold probabilities that sum to 1, got {p.sum()} in all, {p.min()} the least")
    return np.asarray(p / p.sum())


def _entropy_sum(p: Array) -> float:
    held = p[p > 0]
    return float((held * np.log(held)).sum())


def _mutual_information(p: Array) -> float:
    """Of the two variables of a table, in bits."""
    found = _entropy_sum(p) - _entropy_sum(p.sum(0)) - _entropy_sum(p.sum(1)) + _entropy_sum(p.sum()[None])
    return max(0.0, found / math.log(2))


def _conditional_information(p: Array) -> float:
    """Of the first two variables given the third, in bits."""
    found = _entropy_sum(p) - _entropy_sum(p.sum(0)) - _entropy_sum(p.sum(1)) + _entropy_sum(p.sum((0, 1)))
    return max(0.0, found / math.log(2))


def _parity(p: Array) -> float:
    groups = p.sum(1)
    return float(p[1, 1] / groups[1] - p[0, 1] / groups[0]) if groups.all() else math.nan
