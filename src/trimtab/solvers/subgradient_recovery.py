r"""Recovery of a low-rank positive semidefinite matrix from linear measurements, many of them grossly wrong.

It needs to know neither the rank nor the outliers: the rank may be over-estimated up to the full size, and a large
share of the measurements may be arbitrary, at the cost of a plain subgradient step per iteration.

With $y_i = \langle A_i, X^\star \rangle + s_i$ and $X = U U^\top$, where $U$ is $d \times r'$, it minimises the L1 loss
by subgradient steps from a start that is tiny and points along the eigenvectors that the signs alone reveal:

$$
Q_t = \frac{1}{m} \sum_{i=1}^m \mathrm{sign}\left(\langle A_i, U_t U_t^\top \rangle - y_i\right)
\frac{A_i + A_i^\top}{2}, \qquad U_{t+1} = U_t - 2 \eta_t Q_t U_t
$$

$$
U_0 = \alpha B, \qquad B B^\top = \left[\frac{C}{\|C\|_F}\right]_{r',\,+}, \qquad
C = \frac{1}{m} \sum_{i=1}^m \mathrm{sign}(y_i) \frac{A_i + A_i^\top}{2}
$$

From a small $\alpha$ the directions of the true matrix grow first, and the excess ones stay small for as long as it
takes. The step is $\eta_t = \eta \rho^t / \|Q_t\|_F$ where measurements are wrong ("geometric"), and
$\eta_t = \frac{\eta}{m} \sum_i |\langle A_i, U_t U_t^\top \rangle - y_i|$ where they are exact ("residual").

Reference:
    Jianhao Ma and Salar Fattahi, "Global Convergence of Sub-gradient Method for Robust Matrix Recovery: Small
    Initialization, Noisy Measurements, and Over-parameterization", JMLR 2023, arXiv 2202.08788.

The paper's guarantee rests on Sign-RIP, which Gaussian measurements have; for single entries or rank-one measurements
the same steps are a heuristic.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.ops.arguments import finite_tensor, in_range, integer, labels, one_of, positive, tensor_problem
from trimtab.ops.sinkhorn import Array

Operator: TypeAlias = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
Schedule = Literal["geometric", "residual"]

_SCALE_SLACK = 1.1  # by how much rescaling the found matrix may fit better before its growth counts as unfinished


@dataclass(frozen=True)
class SubgradientRecoveryResult:
    """A matrix and how it was reached. Arrays are of the kind, dtype and device of the measurements.

    Attributes:
        matrix: (d, d), `factor @ factor.T`.
        factor: (d, rank).
        losses: mean absolute residual at the start and after each step. With outliers it does not tend to zero.
        scale: the number that `matrix` would have to be multiplied by to have the least L1 loss. Far above one, the
            steps became too short before the iterates had grown from their small start.
        n_iter: steps made.
        converged: whether `scale` is within 10 % of one.
    """

    matrix: Array
    factor: Array
    losses: tuple[float, ...]
    scale: float
    n_iter: int
    converged: bool


@torch.no_grad()
def subgradient_recovery(
    measurements: Float[Array, " m"],
    operator: Float[Array, "m d d"] | Operator,
    rank: int,
    *,
    init_scale: float = 1e-6,
    schedule: Schedule = "geometric",
    lr: float = 0.3,
    decay: float = 0.985,
    n_iter: int = 500,
) -> SubgradientRecoveryResult:
    """Recovers a positive semidefinite matrix from linear measurements by the subgradient method (SubGM).

    Args:
        measurements: (m,), finite; a share of them may be arbitrarily wrong.
        operator: the measurement matrices (m, d, d), or a pair `(forward, adjoint)` of functions on tensors, from
            (d, d) matrices to (m,) numbers and back; see `rank_one_operator` and `entry_operator`.
        rank: columns of the factor, at least the rank of the matrix; up to `d`.
        init_scale: alpha, the size of the start. The smaller, the less an over-estimated rank matters; the number of
            steps it costs grows with its logarithm.
        schedule: "geometric" for measurements with outliers or noise, "residual" for exact ones (a linear rate).
        lr: eta. For "geometric" it has no unit; for "residual" it is in units of one over the largest eigenvalue of the
            matrix (for standard Gaussian measurement matrices, anything up to about 1 is stable).
        decay: rho of the geometric schedule, in (0, 1]. The factor grows by at most about
            `exp(2 * lr / (1 - decay))`, so a smaller start or a worse conditioned matrix wants a larger one.
        n_iter: number of steps.

    Raises:
        TypeError: `measurements` are no tensor or array of float32 or float64 numbers.
        ValueError: a shape or value does not fit, no positive semidefinite matrix agrees with the signs of the
            measurements, or the steps diverge.

    Warns:
        sklearn.exceptions.ConvergenceWarning: the iterates had not grown to the size of the matrix at the last step.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> truth = torch.randn(8, 1, generator=generator)
        >>> truth = truth @ truth.T
        >>> A = torch.randn(300, 8, 8, generator=generator)
        >>> y = torch.einsum("mij,ij->m", A, truth)
        >>> y[:100] += 1000 * torch.randn(100, generator=generator)  # a third of them useless
        >>> result = subgradient_recovery(y, A, rank=8)
        >>> bool((result.matrix - truth).norm() < 0.01 * truth.norm())
        True
    """
    y = _read_measurements(measurements)
    forward, adjoint = _read_operator(operator, y)
    init_scale = positive("init_scale", init_scale)
    one_of("schedule", schedule, get_args(Schedule))
    lr, decay = positive("lr", lr), in_range("decay", decay, 0, 1, "right")
    n_iter = integer("n_iter", n_iter)

    factor = init_scale * sign_spectral_start(y, adjoint, rank)
    losses = []
    for step in range(n_iter):
        loss, direction = l1_subgradient(factor, y, forward, adjoint)
        losses.append(loss)
        if schedule == "residual":
            length = lr * loss
        else:
            length = lr * decay**step / direction.norm().clamp_min(torch.finfo(y.dtype).tiny)
        factor = factor - 2 * length * (direction @ factor)

    matrix = factor @ factor.T
    predicted = forward(matrix)
    if not predicted.isfinite().all():
        raise ValueError(f"lr must be smaller for the {schedule} schedule, got {lr}, at which the steps diverged")
    losses.append((predicted - y).abs().mean())
    scale = best_scale(predicted, y)
    converged = 1 / _SCALE_SLACK <= scale <= _SCALE_SLACK
    if not converged:
        _warn_not_grown(n_iter, scale)
    return SubgradientRecoveryResult(
        matrix=_like(matrix, measurements),
        factor=_like(factor, measurements),
        losses=tuple(torch.stack(losses).tolist()),
        scale=scale,
        n_iter=n_iter,
        converged=converged,
    )


def l1_subgradient(
    factor: Float[Tensor, "d r"],
    measurements: Float[Tensor, " m"],
    forward: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
) -> tuple[Float[Tensor, ""], Float[Tensor, "d d"]]:
    """The L1 loss at `factor` and Q, its symmetrised subgradient in X; that in the factor is `2 * Q @ factor`."""
    residual = forward(factor @ factor.T) - measurements
    return residual.abs().mean(), _symmetric(adjoint(residual.sign()) / len(measurements))


def sign_spectral_start(
    measurements: Float[Tensor, " m"], adjoint: Callable[[Tensor], Tensor], rank: int
) -> Float[Tensor, "d r"]:
    """B, whose product B B^T is the nearest positive semidefinite matrix of the rank to the signs' mean, normalised.

    Only the signs of the measurements enter, so that no outlier weighs more than any other measurement.

    Raises:
        ValueError: `rank` is not in [1, d], or the signs' mean has no positive eigenvalue.
    """
    mean = _symmetric(adjoint(measurements.sign()) / len(measurements))
    size = len(mean)
    rank = integer("rank", rank, most=size)
    values, vectors = torch.linalg.eigh(mean)
    if not values[-1] > 0:
        raise ValueError(
            "measurements must agree in sign with a positive semidefinite matrix, got signs that only zero agrees with"
        )
    values, vectors = values[-rank:].flip(0), vectors[:, -rank:].flip(1)
    start: Tensor = vectors * (values.clamp_min(0) / mean.norm()).sqrt()
    return start


def best_scale(predicted: Float[Tensor, " m"], measurements: Float[Tensor, " m"]) -> float:
    """The number c for which `c * predicted` has the least L1 distance from the measurements: a weighted median."""
    used = predicted != 0
    if not used.any():
        return math.inf
    weights, order = predicted[used].abs(), (measurements[used] / predicted[used]).argsort()
    share = weights[order].cumsum(0) / weights.sum()
    middle = int(torch.searchsorted(share, 0.5).clamp_max(len(order) - 1))
    return float((measurements[used] / predicted[used])[order[middle]])


def matrix_operator(matrices: Float[Tensor, "m d d"]) -> Operator:
    """Measurements by the inner product with each of the matrices."""
    flat, size = matrices.flatten(1), matrices.shape[1]
    return lambda x: flat @ x.flatten(), lambda w: (w @ flat).view(size, size)


def rank_one_operator(vectors: Float[Tensor, "m d"]) -> Operator:
    """Measurements `a_i^T X a_i`, as in phase retrieval and covariance sketching, without forming `a_i a_i^T`.

    Raises:
        TypeError: `vectors` is no real tensor.
        ValueError: it is no matrix, empty or not finite.

    Example:
        >>> forward, adjoint = rank_one_operator(torch.tensor([[1.0, 2.0]]))
        >>> forward(torch.eye(2))
        tensor([5.])
    """
    if problem := tensor_problem(vectors=vectors):
        raise TypeError(problem)
    if vectors.ndim != 2 or 0 in vectors.shape or not vectors.isfinite().all():
        raise ValueError(f"vectors must be a finite matrix, not empty, got shape {tuple(vectors.shape)}")
    return lambda x: ((vectors @ x) * vectors).sum(1), lambda w: vectors.T @ (w[:, None] * vectors)


def entry_operator(rows: Int[Tensor, " m"], cols: Int[Tensor, " m"], size: int) -> Operator:
    """Measurements that are single entries of a matrix of `size` rows and columns.

    Raises:
        TypeError: `rows` or `cols` holds no integers, or `size` is none.
        ValueError: they are no vectors of one length, or name an entry that there is not.

    Example:
        >>> forward, adjoint = entry_operator(torch.tensor([0, 1]), torch.tensor([1, 1]), 2)
        >>> adjoint(torch.tensor([3.0, 4.0]))
        tensor([[0., 3.],
                [0., 4.]])
    """
    if problem := tensor_problem(rows=rows, cols=cols):
        raise TypeError(problem)
    if rows.ndim != 1 or rows.shape != cols.shape or integer("size", size) < 1:
        raise ValueError(f"cols must be a vector of {len(rows)} as rows, got shape {tuple(cols.shape)}")
    # As int64, in which the place of an entry overflows for no matrix.
    flat = labels("rows", rows, size) * size + labels("cols", cols, size)
    return (
        lambda x: x.flatten()[flat],
        lambda w: w.new_zeros(size * size).index_add_(0, flat, w).view(size, size),
    )


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def _read_measurements(measurements: Array) -> Tensor:
    y = finite_tensor("measurements", measurements, ndim=1, floating=True).detach()
    if not len(y):
        raise ValueError("measurements must be a non-empty vector, got shape (0,)")
    if y.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"measurements must be float32 or float64, got {y.dtype}")
    return y


def _read_operator(operator: Array | Operator, y: Tensor) -> Operator:
    """The pair of functions, after a look at what they return for a zero matrix and zero measurements."""
    if isinstance(operator, Tensor | np.ndarray):
        matrices = finite_tensor("operator", operator).detach().to(y)
        if matrices.ndim != 3 or matrices.shape[0] != len(y) or matrices.shape[1] != matrices.shape[2]:
            raise ValueError(f"operator must have shape ({len(y)}, d, d), got {tuple(matrices.shape)}")
        return matrix_operator(matrices)
    if not (isinstance(operator, tuple) and len(operator) == 2 and all(callable(part) for part in operator)):
        kind = type(operator).__name__
        raise TypeError(f"operator must be a tensor, an array, or a pair of functions (forward, adjoint), got {kind}")
    forward, adjoint = operator
    image = adjoint(torch.zeros_like(y))
    if image.ndim != 2 or image.shape[0] != image.shape[1]:
        raise ValueError(f"operator's adjoint must return a square matrix, got shape {tuple(image.shape)}")
    back = forward(torch.zeros_like(image))
    if back.shape != y.shape:
        raise ValueError(f"operator's forward must return shape {tuple(y.shape)}, got {tuple(back.shape)}")
    return forward, adjoint


def _like(value: Tensor, given: Array) -> Array:
    return value if isinstance(given, Tensor) else value.cpu().numpy()


def _warn_not_grown(n_iter: int, scale: float) -> None:
    from sklearn.exceptions import ConvergenceWarning

    warnings.warn(
        f"subgradient_recovery stopped after {n_iter} steps with a matrix that fits better if multiplied by "
        f"{scale:.3g}; allow more steps or a decay nearer to one, or use a larger init_scale",
        ConvergenceWarning,
        stacklevel=4,  # past torch.no_grad's wrapper
    )
