r"""Comp-sum losses: one parameter leads from sum-exponential through cross-entropy to mean absolute error.

`CompSumLoss` trades the fast fitting of cross-entropy (`tau=1`) for robustness to wrong labels (`tau` towards 2,
generalised cross-entropy with `q = tau - 1`); `SmoothAdversarialCompSumLoss` trains classifiers against adversarial
inputs. `h_consistency_transform` and `comp_sum_min_risk` give the guarantee in numbers: how much zero-one error an
excess of the loss can hide.

$$
\ell_\tau(h, y) = \Phi_\tau\Bigl(\sum_{k \ne y} e^{h_k - h_y}\Bigr), \qquad
\Phi_\tau(u) = \begin{cases} \dfrac{(1 + u)^{1 - \tau} - 1}{1 - \tau} & \tau \ne 1 \\ \log(1 + u) & \tau = 1
\end{cases}
$$

Reference: Anqi Mao, Mehryar Mohri, Yutao Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications",
ICML 2023, arXiv 2304.07288.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.losses.checks import Reduction, check_reduction, checked_logits, reduce
from trimtab.ops.arguments import integer, non_negative, one_of, positive, real_problem, tensor
from trimtab.ops.attack import Norm, eval_mode, pgd, random_in_ball

# Above this exponent a loss with tau < 1 goes on along its tangent: exp would overflow float32 at 88, and the square
# of its gradient, which gradient clipping takes, at half of that.
_MAX_EXPONENT = 40.0


def comp_sum_loss(
    logits: Float[Tensor, "batch classes"],
    targets: Int[Tensor, " batch"],
    tau: float = 1.0,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""] | Float[Tensor, " batch"]:
    r"""The comp-sum loss (equation in the module's docstring), computed from $a = -\log \mathrm{softmax}(h)_y$.

    With the softmax probability $p = e^{-a}$ of the target: $1/p - 1$ at `tau=0`, $-\log p$ at 1,
    $(1 - p^{q})/q$ with `q = tau - 1` between 1 and 2, and $1 - p$ at 2.

    Args:
        logits: scores of any real value. Half precision is computed in float32.
        targets: class indices.
        tau: member of the family, at least 0.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or shape `(batch,)` with `reduction="none"`. For `tau < 1` and $(1 - \tau) a > 40$ the loss
        continues along its tangent, so that values and gradients stay finite.

    Raises:
        TypeError: if `logits` is not floating point or `targets` not int64.
        ValueError: if shapes disagree, the batch is empty, `tau` is negative or `reduction` is unknown.

    Example:
        >>> logits, targets = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0])
        >>> torch.allclose(comp_sum_loss(logits, targets, tau=2.0), 1 - logits.softmax(1)[0, 0])
        True
    """
    _check_tau(tau)
    check_reduction(reduction)
    logits = checked_logits(logits, targets)
    if tau == 1:
        return F.cross_entropy(logits, targets, reduction=reduction)
    exponent = (1 - tau) * F.cross_entropy(logits, targets, reduction="none")
    if tau < 1:
        tangent = math.exp(_MAX_EXPONENT) * (1 + exponent - _MAX_EXPONENT)
        curve = torch.expm1(exponent.clamp(max=_MAX_EXPONENT))
        loss = torch.where(exponent > _MAX_EXPONENT, tangent, curve) / (1 - tau)
    else:
        loss = torch.expm1(exponent) / (1 - tau)
    return reduce(loss, reduction)


class CompSumLoss(nn.Module):
    """`comp_sum_loss` as a module.

    Args:
        tau: 0 sum-exponential, 1 cross-entropy, 1 to 2 generalised cross-entropy with `q = tau - 1`, 2 mean absolute
            error; at least 0.
        reduction: "mean", "sum" or "none".

    Raises:
        ValueError: if `tau` is negative or `reduction` is unknown.

    Example:
        >>> criterion = CompSumLoss(tau=1.7)
        >>> criterion(torch.zeros(4, 10, requires_grad=True), torch.arange(4)).backward()
    """

    def __init__(self, tau: float = 1.0, reduction: Reduction = "mean") -> None:
        super().__init__()
        _check_tau(tau)
        check_reduction(reduction)
        self.tau = tau
        self.reduction: Reduction = reduction

    def forward(
        self, logits: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"]
    ) -> Float[Tensor, ""] | Float[Tensor, " batch"]:
        """The loss of a batch; see `comp_sum_loss`."""
        return comp_sum_loss(logits, targets, self.tau, self.reduction)

    def extra_repr(self) -> str:
        return f"tau={self.tau:g}, reduction={self.reduction!r}"


class SmoothAdversarialCompSumLoss(nn.Module):
    r"""Comp-sum loss of the clean input plus how far the margins move within a ball around it (Section 5).

    $$
    L(x, y) = \Phi_\tau\Bigl(\sum_{k \ne y} e^{-D_k(x) / \rho}\Bigr)
    + \nu \max_{\|x' - x\| \le \epsilon} \| D(x') - D(x) \|_2, \qquad D_k(x) = h_y(x) - h_k(x)
    $$

    The maximum is approached by projected gradient ascent. The attack runs with the model in eval mode; the two forward
    passes that gradients flow through run in the mode the model is in. With $\nu \ge \sqrt{n - 1}/\rho$ the loss
    bounds the adversarial margin loss from above; in practice smaller values are used. The paper adds weight decay,
    which is the optimizer's.

    Args:
        tau: member of the comp-sum family, at least 0.
        rho: margin scale, positive.
        nu: weight of the smooth term, at least 0.
        eps: radius of the ball, at least 0; 0 leaves the comp-sum loss of `logits / rho`.
        norm: "inf" or "l2".
        steps: ascent steps.
        step_size: length of a step; `2.5 * eps / steps` where it is None.
        bounds: smallest and largest value of an input, such as `(0.0, 1.0)` for images.
        reduction: "mean", "sum" or "none".
        generator: source of the attack's random start; torch's global one where it is None.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> model = nn.Linear(5, 3)
        >>> criterion = SmoothAdversarialCompSumLoss(eps=0.1)
        >>> criterion(model, torch.zeros(4, 5), torch.tensor([0, 1, 2, 0])).backward()
    """

    def __init__(
        self,
        tau: float = 1.0,
        rho: float = 1.0,
        nu: float = 1.0,
        eps: float = 8 / 255,
        norm: Norm = "inf",
        steps: int = 10,
        step_size: float | None = None,
        bounds: tuple[float, float] | None = None,
        reduction: Reduction = "mean",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _check_tau(tau)
        positive("rho", rho)
        non_negative("nu", nu)
        non_negative("eps", eps)
        one_of("norm", norm, ("inf", "l2"))
        integer("steps", steps)
        if step_size is not None:
            positive("step_size", step_size)
        if bounds is not None and (len(bounds) != 2 or not bounds[0] < bounds[1]):
            raise ValueError(f"bounds must be two numbers, the smaller first, got {bounds}")
        check_reduction(reduction)
        self.tau, self.rho, self.nu, self.eps, self.norm = tau, rho, nu, eps, norm
        self.steps, self.step_size, self.bounds = steps, step_size, bounds
        self.reduction: Reduction = reduction
        self.generator = generator

    def forward(
        self,
        model: Callable[[Float[Tensor, "batch ..."]], Float[Tensor, "batch classes"]],
        x: Float[Tensor, "batch ..."],
        targets: Int[Tensor, " batch"],
        start: Float[Tensor, "batch ..."] | None = None,
    ) -> Float[Tensor, ""] | Float[Tensor, " batch"]:
        """The loss of a batch.

        Args:
            model: maps inputs to logits.
            x: clean inputs.
            targets: class indices.
            start: the attack's first offset; drawn from the ball where it is None.

        Returns:
            A scalar, or shape `(batch,)` with `reduction="none"`.

        Raises:
            TypeError: if logits are not floating point or `targets` not int64.
            ValueError: if shapes disagree or the batch is empty.
        """
        if problem := real_problem(x=x):
            raise TypeError(problem)
        logits = model(x)
        clean = comp_sum_loss(logits / self.rho, targets, self.tau, self.reduction)
        if self.eps == 0 or self.nu == 0:
            return clean
        if start is None:
            start = random_in_ball(x, self.eps, self.norm, generator=self.generator)
        with eval_mode(model):
            with torch.no_grad():
                still = margins(model(x), targets)
            attacked = pgd(
                lambda moved: _distance(margins(model(moved), targets), still),
                x,
                self.eps,
                norm=self.norm,
                steps=self.steps,
                step_size=self.step_size,
                start=start,
                bounds=self.bounds,
            )
        drift = _distance(margins(model(attacked), targets), margins(logits, targets))
        return clean + self.nu * reduce(drift, self.reduction)

    def extra_repr(self) -> str:
        return f"tau={self.tau:g}, rho={self.rho:g}, nu={self.nu:g}, eps={self.eps:g}, norm={self.norm!r}"


def margins(logits: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"]) -> Float[Tensor, "batch classes"]:
    """How far the target's score is above each score; zero at the target itself."""
    return logits.gather(1, targets[:, None]) - logits


def comp_sum_min_risk(probs: Float[Tensor, "... classes"], tau: float) -> Float[Tensor, "..."]:
    r"""The smallest expected comp-sum loss under a label distribution, over all scores (Section 4).

    $$
    \inf_h \sum_k q_k \ell_\tau(h, k) = \begin{cases}
    \bigl((\sum_k q_k^{1/(2 - \tau)})^{2 - \tau} - 1\bigr) / (1 - \tau) & \tau < 2, \tau \ne 1 \\
    -\sum_k q_k \log q_k & \tau = 1 \\ (1 - \max_k q_k) / (\tau - 1) & \tau \ge 2 \end{cases}
    $$

    The minimiser has softmax probabilities proportional to $q_k^{1/(2-\tau)}$ for `tau < 2`. Averaged over inputs it
    is the part of the best-in-class risk that no model can avoid; the rest is the minimisability gap.

    Args:
        probs: label distributions along the last dimension.
        tau: member of the family, at least 0.

    Returns:
        The risk, one number per distribution, in float64.

    Raises:
        ValueError: if `tau` is negative or `probs` are not distributions.

    Example:
        >>> comp_sum_min_risk(torch.tensor([0.5, 0.5]), tau=2.0)
        tensor(0.5000, dtype=torch.float64)
    """
    _check_tau(tau)
    probs = tensor("probs", probs).double()
    if probs.ndim == 0 or probs.shape[-1] < 2:
        raise ValueError(f"probs must be (..., classes) with at least two classes, got shape {tuple(probs.shape)}")
    if not bool((probs >= 0).all()) or not bool(((probs.sum(-1) - 1).abs() < 1e-4).all()):
        raise ValueError("probs must be non-negative and sum to one along the last dimension, got others")
    if tau >= 2:
        return (1 - probs.amax(-1)) / (tau - 1)
    if tau == 1:
        entropy: Tensor = torch.special.entr(probs).sum(-1)
        return entropy
    return torch.expm1((2 - tau) * torch.logsumexp(probs.log() / (2 - tau), -1)) / (1 - tau)


def h_consistency_transform(beta: Tensor | float, tau: float, num_classes: int) -> Tensor:
    r"""An excess comp-sum risk that a zero-one excess of `beta` entails at least: $\mathcal{T}_\tau$ of Theorem 3.1.

    $$
    \mathcal{T}_\tau(\beta) = \frac{c}{\tau - 1} \Bigl(\Bigl[
    \tfrac12 (1 + \beta)^{\frac{1}{2 - \tau}} + \tfrac12 (1 - \beta)^{\frac{1}{2 - \tau}} \Bigr]^{2 - \tau} - 1\Bigr),
    \qquad c = \begin{cases} 2^{1 - \tau} & \tau < 1 \\ n^{1 - \tau} & 1 < \tau < 2 \end{cases}
    $$

    and $\beta\, n^{1 - \tau} / (\tau - 1)$ for `tau >= 2`, with the binary relative entropy as the limit at 1.
    It is the least such excess for `tau` up to 1, at 2, and for two classes. For `tau` between 1 and 2 and more classes
    it is a lower bound that is not reached: of the true infimum it is, at `tau` 1.5, about 0.816, 0.447 and 0.141 with
    3, 10 and 100 classes.

    Excess means above the best in class, minimisability gaps counted in, for a hypothesis set that can give any scores.

    Args:
        beta: zero-one excess in [0, 1].
        tau: member of the family, at least 0.
        num_classes: number of classes n, at least 2.

    Returns:
        The transform, of the shape of `beta`, in float64.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> h_consistency_transform(0.6, tau=0.0, num_classes=10)  # 1 - sqrt(1 - beta^2)
        tensor(0.2000, dtype=torch.float64)
    """
    _check_tau(tau)
    num_classes = integer("num_classes", num_classes, 2)
    beta = torch.as_tensor(beta, dtype=torch.float64)
    if not bool(((beta >= 0) & (beta <= 1)).all()):
        raise ValueError("beta must be in [0, 1], as an excess of zero-one error is, got others")
    if tau == 1:
        divergence: Tensor = -(torch.special.entr(1 + beta) + torch.special.entr(1 - beta)) / 2
        return divergence
    if tau >= 2:
        return beta * math.pow(num_classes, 1 - tau) / (tau - 1)
    power = 1 / (2 - tau)
    log_mean = torch.logaddexp(power * torch.log1p(beta), power * torch.log1p(-beta)) - math.log(2)
    scale = math.pow(2 if tau < 1 else num_classes, 1 - tau)
    return scale * torch.expm1(log_mean / power) / (tau - 1)


def h_consistency_bound(excess: Tensor | float, tau: float, num_classes: int) -> Tensor:
    r"""A zero-one excess that an excess comp-sum risk cannot exceed: $\Gamma_\tau = \mathcal{T}_\tau^{-1}$.

    It is reached where `h_consistency_transform` is; for `tau` between 1 and 2 and more than two classes it is loose.

    Args:
        excess: excess comp-sum risk, at least 0.
        tau: member of the family, at least 0.
        num_classes: number of classes, at least 2.

    Returns:
        The bound in [0, 1], of the shape of `excess`, in float64, by bisection.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> h_consistency_bound(0.2, tau=0.0, num_classes=10)
        tensor(0.6000, dtype=torch.float64)
    """
    excess = torch.as_tensor(excess, dtype=torch.float64)
    if not bool((excess >= 0).all()):
        raise ValueError("excess must be at least 0, got negative or NaN values")
    low, high = torch.zeros_like(excess), torch.ones_like(excess)
    for _ in range(60):
        middle = (low + high) / 2
        above = h_consistency_transform(middle, tau, num_classes) > excess
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return high


def _distance(a: Tensor, b: Tensor) -> Tensor:
    # vector_norm has the subgradient zero at zero, where sqrt has an infinite one.
    distance: Tensor = torch.linalg.vector_norm(a - b, dim=1)
    return distance


def _check_tau(tau: float) -> None:
    non_negative("tau", tau)
