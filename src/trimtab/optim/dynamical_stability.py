r"""Can SGD stay at this minimum? The stability of its linearised dynamics, and the bounds it puts on the Hessian.

Where every sample is fitted, SGD with learning rate $\eta$ and batch size $B$ stays only if no direction grows in
mean square; that bounds the trace of the Hessian, where full-batch descent bounds only its largest eigenvalue. So it
tells which learning rates and batch sizes could have found a minimum.

$$
T(S) = (I - \eta H)\,S\,(I - \eta H)
     + \frac{\eta^2}{B} \Bigl(\frac1n \sum_i H_i S H_i - H S H\Bigr), \qquad
\rho(T) \le 1 \;\Rightarrow\; \operatorname{tr} H \le \frac{2B}{\eta}, \qquad
H_i = g_i g_i^\top,\quad H = \frac1n \sum_i H_i
$$

Here $g_i$ is the gradient of the output for sample i, the loss is $\frac{1}{2n} \sum_i (f(x_i) - y_i)^2$, and a
batch is B samples drawn with replacement.

Reference: Lei Wu, Weijie J. Su, "The Implicit Regularization of Dynamical Stability in Stochastic Gradient Descent",
ICML 2023, arXiv 2305.17490.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import grad, hessian, vmap

from trimtab.ops.arguments import all_finite, integer, positive, tensor_problem
from trimtab.ops.per_sample_gradients import per_sample_gradients

Loss = Callable[[Tensor, Tensor], Tensor]
Operator = Callable[[Tensor], Tensor]
_ROWS = 64  # directions of Lanczos' method that there is room for at first


def gauss_newton_eigenvalues(gradients: Float[Tensor, "n *outputs params"]) -> Float[Tensor, " rank"]:
    r"""Eigenvalues of $H = \frac1n \sum_i g_i g_i^\top$ in float64, in rising order, zeros left out.

    They are found from the smaller of $H$ and the samples' Gram matrix.

    Args:
        gradients: $g_i$, one row for each sample; or for each sample and output, as `per_sample_gradients` returns.

    Raises:
        ValueError: the shape is wrong, or an entry is not finite.

    Example:
        >>> gauss_newton_eigenvalues(torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
        tensor([2., 8.], dtype=torch.float64)
    """
    return _spectrum(_checked(gradients))[0]


def gauss_newton_trace(gradients: Float[Tensor, "n *outputs params"]) -> float:
    """The trace of H: the mean over samples of the squared norm of the gradient.

    Example:
        >>> gauss_newton_trace(torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
        10.0
    """
    g = _checked(gradients)
    return float(g.double().square().sum() / len(g))


def gauss_newton_frobenius(gradients: Float[Tensor, "n *outputs params"]) -> float:
    """The Frobenius norm of H.

    Example:
        >>> round(gauss_newton_frobenius(torch.tensor([[2.0, 0.0], [0.0, 4.0]])), 4)  # of diag(2, 8)
        8.2462
    """
    return float(gauss_newton_eigenvalues(gradients).norm())


def stability_operator(
    gradients: Float[Tensor, "n *outputs params"], lr: float, batch_size: int | None = 1
) -> tuple[Operator, Float[Tensor, "params rank"]]:
    """The map T of second moments of the weights' distance to the minimum, one step of SGD on.

    It acts on symmetric matrices within the span of the gradients; beyond it nothing moves.

    Args:
        gradients: see `gauss_newton_eigenvalues`.
        lr: learning rate, positive.
        batch_size: samples in a batch, drawn with replacement; all of them once (no noise), if None.

    Returns:
        The map from (rank, rank) to (rank, rank) in float64, and the orthonormal basis it is in, eigenvectors of H.

    Raises:
        ValueError: an argument is out of its range, an entry is not finite, or all gradients are zero.

    Example:
        >>> step, basis = stability_operator(torch.tensor([[2.0]]), lr=0.25)
        >>> step(torch.ones(1, 1, dtype=torch.float64))  # (1 - 0.25 * 4)**2
        tensor([[0.]], dtype=torch.float64)
    """
    values, rows = _reduced(gradients)
    flat = gradients.detach().reshape(-1, gradients.shape[-1]).double().cpu()
    return _operator(values, rows, lr, batch_size), flat.T @ rows.flatten(0, 1) / (len(gradients) * values)


def _operator(values: Tensor, rows: Tensor, lr: float, batch_size: int | None) -> Operator:
    positive("lr", lr)
    second = _curvature_moment(values, rows, batch_size)

    def step(s: Tensor) -> Tensor:
        return s - lr * (values[:, None] + values) * s + lr**2 * second(s)

    return step


def spectral_radius(gradients: Float[Tensor, "n *outputs params"], lr: float, batch_size: int | None = 1) -> float:
    """Growth per step of the mean squared distance to the minimum, in the long run: SGD can stay if it is at most 1.

    Args:
        gradients, lr, batch_size: see `stability_operator`.

    Raises:
        ValueError: see `stability_operator`.

    Example:
        >>> round(spectral_radius(torch.tensor([[2.0]]), lr=0.6), 4)  # (1 - 0.6 * 4)**2
        1.96
    """
    return _radius(*_reduced(gradients), lr, batch_size)


def _radius(values: Tensor, rows: Tensor, lr: float, batch_size: int | None) -> float:
    # T maps covariances to covariances, so that its largest eigenvalue is its radius and belongs to one of them,
    # which the identity cannot be orthogonal to.
    start = torch.eye(len(values), dtype=torch.float64)
    return _largest_eigenvalue(_operator(values, rows, lr, batch_size), start)


def critical_lr(gradients: Float[Tensor, "n *outputs params"], batch_size: int | None = 1) -> float:
    r"""The largest learning rate at which SGD can stay at the minimum.

    With $T = I - \eta L + \eta^2 N$, where $L(S) = HS + SH$, the radius of T is at most 1 just where
    $\eta N \preceq L$: the answer is one over the largest eigenvalue of $L^{-1/2} N L^{-1/2}$.

    Args:
        gradients: see `gauss_newton_eigenvalues`.
        batch_size: samples in a batch, drawn with replacement; all of them once (no noise), if None.

    Raises:
        ValueError: see `stability_operator`.

    Example:
        >>> round(critical_lr(2**0.5 * torch.eye(2)), 4)  # H is the identity; 2 for gradient descent
        1.0
    """
    return _critical(*_reduced(gradients), batch_size)


def _critical(values: Tensor, rows: Tensor, batch_size: int | None) -> float:
    second = _curvature_moment(values, rows, batch_size)
    root = (values[:, None] + values).sqrt()
    start = root * torch.eye(len(values), dtype=torch.float64)
    return 1 / _largest_eigenvalue(lambda s: second(s / root) / root, start)


def gd_critical_lr(gradients: Float[Tensor, "n *outputs params"]) -> float:
    """The largest learning rate at which full-batch gradient descent can stay: 2 over the largest eigenvalue of H.

    Example:
        >>> gd_critical_lr(torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
        0.25
    """
    return 2 / float(_reduced(gradients)[0][-1])


@dataclass(frozen=True)
class StabilityReport:
    """What the linearised dynamics say of a minimum.

    Attributes:
        lr: the learning rate asked about.
        batch_size: the batch size asked about; None for the full batch.
        num_outputs: outputs of a sample.
        trace: of the Hessian.
        frobenius: norm of the Hessian.
        top_eigenvalue: of the Hessian.
        spectral_radius: growth per step of the mean squared distance under SGD.
        critical_lr: largest learning rate at which SGD can stay.
        gd_critical_lr: largest learning rate at which full-batch descent can stay.
        residual: root mean square of the loss's derivative by the outputs; near zero where all samples are fitted.
    """

    lr: float
    batch_size: int | None
    num_outputs: int
    trace: float
    frobenius: float
    top_eigenvalue: float
    spectral_radius: float
    critical_lr: float
    gd_critical_lr: float
    residual: float

    @property
    def trace_bound(self) -> float:
        """What the trace cannot exceed where SGD can stay: 2 B / lr, times the outputs of a sample."""
        return math.inf if self.batch_size is None else 2 * self.batch_size * self.num_outputs / self.lr

    @property
    def passes_trace_test(self) -> bool:
        """Whether the trace is within its bound, without which SGD cannot stay."""
        return self.trace <= self.trace_bound

    @property
    def gd_stable(self) -> bool:
        """Whether the top eigenvalue is at most 2 / lr: full-batch descent can stay."""
        return self.lr <= self.gd_critical_lr

    @property
    def sgd_stable(self) -> bool:
        """Whether SGD can stay."""
        return self.lr <= self.critical_lr


def squared_loss(outputs: Float[Tensor, "..."], targets: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """Half the squared distance, the loss of one sample.

    Example:
        >>> squared_loss(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])).item()
        2.0
    """
    return 0.5 * (outputs - targets).square().sum()


def stability_report(
    model: nn.Module,
    x: Float[Tensor, "n ..."],
    y: Tensor,
    lr: float,
    batch_size: int | None = 1,
    *,
    loss: Loss = squared_loss,
    tolerance: float = 0.05,
    chunk_size: int | None = None,
) -> StabilityReport:
    r"""The stability of a trained model as a minimum of its loss over a data set.

    With a loss of curvature $A_i$ by the outputs, $H_i = J_i^\top A_i J_i$ is the Gauss-Newton part of the Hessian,
    which is all of it where the residuals vanish. Memory: one gradient for each sample and output.

    Args:
        model: maps a batch to (batch,) or (batch, outputs), in eval mode.
        x: the inputs of all samples.
        y: their targets.
        lr: learning rate, for the mean of the samples' losses.
        batch_size: samples in a batch, drawn with replacement; all of them once, if None.
        loss: convex loss of one sample from its outputs and its target. Mind the factor: twice the loss halves every
            critical learning rate.
        tolerance: a `residual` above it is warned about.
        chunk_size: how many samples' gradients are taken at a time.

    Raises:
        TypeError: an argument is no real tensor.
        ValueError: an argument is out of its range, shapes do not fit, an entry is not finite, the loss curves down,
            or no output depends on the weights.

    Example:
        >>> model, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> report = stability_report(model, x, model(x).detach(), lr=0.3)
        >>> round(report.trace, 4), round(report.trace_bound, 4), report.sgd_stable, report.gd_stable
        (5.0, 6.6667, False, True)
    """
    if problem := tensor_problem(x=x, y=y):
        raise TypeError(problem)
    if len(y) != len(x):
        raise ValueError(f"y must hold a target for each of the {len(x)} samples of x, got {len(y)}")
    if not (all_finite(x) and all_finite(y)):
        raise ValueError("x and y must be finite, got NaN or infinity")
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must be at least 0 and finite, got {tolerance}")
    gradients = per_sample_gradients(model, x, chunk_size)
    with torch.no_grad():
        outputs = model(x)
    if loss is squared_loss and y.shape != outputs.shape:
        raise ValueError(f"y must have shape {tuple(outputs.shape)} as the model's outputs, got {tuple(y.shape)}")
    residuals = vmap(grad(loss))(outputs, y)
    curvature = vmap(hessian(loss))(outputs, y)
    num_outputs = 1 if outputs.ndim == 1 else outputs.shape[1]
    gradients = _root(curvature.reshape(len(x), num_outputs, num_outputs)) @ gradients.reshape(len(x), num_outputs, -1)
    residual = float(residuals.square().mean().sqrt())
    if not residual <= tolerance:
        warnings.warn(
            f"stability_report: residuals of {residual:.2g} (above tolerance={tolerance:g}) are not near zero; "
            "this is no minimum that fits every sample, and its stability is not what the numbers say",
            RuntimeWarning,
            stacklevel=2,
        )
    values, rows = _reduced(gradients)
    return StabilityReport(
        lr=lr,
        batch_size=batch_size,
        num_outputs=num_outputs,
        trace=float(values.sum()),
        frobenius=float(values.norm()),
        top_eigenvalue=float(values[-1]),
        spectral_radius=_radius(values, rows, lr, batch_size),
        critical_lr=_critical(values, rows, batch_size),
        gd_critical_lr=2 / float(values[-1]),
        residual=residual,
    )


def _checked(gradients: Tensor) -> Tensor:
    """The gradients as (n, outputs, params)."""
    if problem := tensor_problem(gradients=gradients):
        raise TypeError(problem)
    if gradients.ndim not in (2, 3) or not gradients.numel():
        raise ValueError(
            f"gradients must have shape (n, params) or (n, outputs, params) and entries, got {tuple(gradients.shape)}"
        )
    if not all_finite(gradients):
        raise ValueError("gradients must be finite, got NaN or infinity")
    return gradients.detach().reshape(len(gradients), -1, gradients.shape[-1])


def _spectrum(g: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of H that are not zero, and the gradients (n, outputs, rank) in the basis of its eigenvectors."""
    rows = g.reshape(-1, g.shape[2])
    wide = rows.shape[1] > rows.shape[0]
    gram = (rows @ rows.T if wide else rows.T @ rows).double() / len(g)
    values, vectors = torch.linalg.eigh(gram)
    kept = values > values[-1] * max(rows.shape) * torch.finfo(g.dtype).eps
    values, vectors = values[kept], vectors[:, kept]
    inside = vectors * (len(g) * values).sqrt() if wide else rows.double() @ vectors
    return values.cpu(), inside.reshape(*g.shape[:2], len(values)).cpu()


def _reduced(gradients: Tensor) -> tuple[Tensor, Tensor]:
    values, rows = _spectrum(_checked(gradients))
    if not len(values):
        raise ValueError("gradients must not all be zero, so that a step moves, got zeros")
    return values, rows


def _curvature_moment(values: Tensor, rows: Tensor, batch_size: int | None) -> Operator:
    """The map from S to the mean of H_b S H_b over batches b."""
    if batch_size is not None:
        integer("batch_size", batch_size)
    noise = 0.0 if batch_size is None else 1 / batch_size
    flat = rows.flatten(0, 1)

    def moment(s: Tensor) -> Tensor:
        inner = rows @ s @ rows.mT  # (n, outputs, outputs)
        each = flat.mT @ (inner @ rows).flatten(0, 1) / len(rows)
        return (1 - noise) * values[:, None] * s * values + noise * each

    return moment


def _root(curvature: Float[Tensor, "n outputs outputs"]) -> Float[Tensor, "n outputs outputs"]:
    """Square roots of positive semi-definite matrices."""
    values, vectors = torch.linalg.eigh(curvature)
    if (values < -1e-4 * values.abs().amax()).any():
        raise ValueError("loss must be convex in the outputs, got negative eigenvalues of its second derivative")
    root: Tensor = vectors * values.clamp(min=0).sqrt()[:, None] @ vectors.mT
    return root


def _largest_eigenvalue(operator: Operator, start: Tensor, tolerance: float = 1e-8, iterations: int = 500) -> float:
    """Lanczos' method on symmetric matrices, every new direction made orthogonal to all before."""
    shape, size = start.shape, start.numel()
    held = start.new_empty(min(_ROWS, size), size)  # the basis, one direction a row; it grows where it must
    held[0] = (start / start.norm()).flatten()
    diagonal: list[float] = []
    off: list[float] = []
    while True:
        known = held[: len(diagonal) + 1]
        image = operator(known[-1].view(shape)).flatten()
        diagonal.append(float(image @ known[-1]))
        for _ in range(2):
            image = image - known.T @ (known @ image)
        small = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        if off:
            small += torch.diag(torch.tensor(off, dtype=torch.float64), 1)
            small += torch.diag(torch.tensor(off, dtype=torch.float64), -1)
        values, vectors = torch.linalg.eigh(small)
        left = float(image.norm())
        # The residual bounds the error, which is of second order in it where the eigenvalue stands apart.
        if left * abs(float(vectors[-1, -1])) <= tolerance * abs(float(values[-1])) or len(known) == size:
            return float(values[-1])
        if len(known) == iterations:
            warnings.warn(f"an eigenvalue has not settled after {iterations} iterations", RuntimeWarning, stacklevel=3)
            return float(values[-1])
        off.append(left)
        if len(known) == len(held):
            held = torch.cat([held, held.new_empty(min(len(held), size - len(held)), size)])
        held[len(known)] = image / left
