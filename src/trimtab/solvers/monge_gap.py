r"""The Monge gap: how much more a map costs than the best coupling between its inputs and its outputs.

A regulariser for maps of any architecture and any cost: it is zero for the optimal maps between their inputs and
outputs, and for no others. Added to a loss that fits the outputs to a target distribution, such as the Sinkhorn
divergence, it makes a network learn the optimal transport map (`MongeMap`).

$$
\mathcal{M}^c_\rho(T) = \frac{1}{n} \sum_i c(x_i, T(x_i)) - W_{c, \varepsilon}\big(\rho, T_\sharp \rho\big), \qquad
W_{c, \varepsilon} = \min_{P \in U(\rho, T_\sharp \rho)} \langle P, C \rangle
+ \varepsilon\, \mathrm{KL}\big(P \,\|\, \rho \otimes T_\sharp \rho\big)
$$

Reference:
    Théo Uscidda and Marco Cuturi, "The Monge Gap: A Regularizer to Learn All Transport Maps", ICML 2023, arXiv
    2302.04953.
"""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.utils import check_array
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from trimtab.ops.arguments import finite_tensor, floating_tensor, integer, non_negative, positive, same_shape, tensor
from trimtab.ops.point_costs import PointCost, point_costs
from trimtab.ops.sinkhorn import Array, sinkhorn

FittingLoss = Callable[[Tensor, Tensor], Tensor]


def transport_cost(
    cost: Float[Tensor, "n m"], reg: float = 0.05, *, relative: bool = True, tol: float = 1e-3, max_iter: int = 2000
) -> Float[Tensor, ""]:
    r"""The optimal cost between two uniform distributions, $W_{c, \varepsilon}$, differentiable in their cost matrix.

    The gradient is the optimal plan (Danskin's theorem): nothing is unrolled, and it is as exact as the plan is.

    Args:
        cost: (n, m), finite.
        reg: weight of the entropy; with 0 the transport is exact, for n = m, by linear assignment.
        relative: whether `reg` is a share of the mean absolute cost, taken as a constant.
        tol: L1 error of the plan's marginals.
        max_iter: most Sinkhorn sweeps.

    Raises:
        TypeError: the cost is no floating-point matrix, or `max_iter` no integer.
        ValueError: `reg` is negative or no number, or zero for a matrix that is not square, the cost is empty or not
            finite, `tol` not positive or `max_iter` below 1.

    Warns:
        sklearn.exceptions.ConvergenceWarning: `tol` was not reached.

    Example:
        >>> transport_cost(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), reg=0.0)
        tensor(0.)
    """
    reg = non_negative("reg", reg)
    cost = floating_tensor("cost", finite_tensor("cost", cost, ndim=2))
    if cost.numel() == 0:
        raise ValueError(f"cost must hold at least one point of each, got shape {tuple(cost.shape)}")
    if positive("tol", tol) < 0 or integer("max_iter", max_iter) < 1:
        raise ValueError(f"tol and max_iter must be positive, got {tol} and {max_iter}")
    n, m = cost.shape
    fixed = cost.detach()
    eps = reg * float(fixed.abs().mean()) if relative else reg
    if eps == 0:
        if reg > 0:  # all costs are zero, and every plan is optimal
            return cost.mean()
        if n != m:
            raise ValueError(f"reg must be positive for {n} and {m} points, which have no exact pairing, got {reg}")
        from scipy.optimize import linear_sum_assignment

        rows, columns = linear_sum_assignment(fixed.cpu().numpy())
        return cost[torch.as_tensor(rows, device=cost.device), torch.as_tensor(columns, device=cost.device)].mean()
    a, b = fixed.new_full((n,), 1 / n, dtype=torch.float64), fixed.new_full((m,), 1 / m, dtype=torch.float64)
    result = sinkhorn(fixed.double(), a, b, eps, tol=tol, max_iter=max_iter)
    f, g = (torch.as_tensor(potential) for potential in result.potentials)
    # P = exp((f + g - C) / eps): the divergence from a ⊗ b is linear in what the dual knows.
    entropy = float(f.mean() + g.mean()) - result.cost + eps * (math.log(n) + math.log(m))
    return (torch.as_tensor(result.plan).to(cost.dtype) * cost).sum() + entropy


def monge_gap(
    x: Float[Tensor, "n dim"],
    y: Float[Tensor, "n dim"],
    cost: PointCost = "sqeuclidean",
    reg: float = 0.05,
    *,
    relative: bool = True,
    tol: float = 1e-3,
    max_iter: int = 2000,
) -> Float[Tensor, ""]:
    """The gap of the map that takes each `x[i]` to `y[i]` (Definition 3.1 and Equation 8).

    With `reg=0` it is exact: never negative, and zero where the pairing is optimal. The entropy makes it smaller, and
    negative for maps that are optimal or nearly so; compare gaps at the same `reg` only.

    Args:
        x: inputs of the map, at least 2 for a gap above zero.
        y: its outputs, through which gradients flow (and to `x`).
        cost: "sqeuclidean", "euclidean", "sphere", a power of the distance, or a function; see
            `trimtab.ops.point_costs.point_costs`.
        reg, relative, tol, max_iter: see `transport_cost`.

    Raises:
        ValueError: the shapes differ, the points are not finite, or an argument is out of its range.

    Example:
        >>> x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
        >>> monge_gap(x, x + 5, reg=0.0).abs() < 1e-4  # a translation is optimal
        tensor(True)
        >>> monge_gap(x, -x, reg=0.0) > 1  # turning round is not
        tensor(True)
    """
    x, y = tensor("x", x, ndim=2, floating=True), tensor("y", y, ndim=2, floating=True)
    same_shape("y", y, "x", x)
    if not (x.detach().isfinite().all() and y.detach().isfinite().all()):
        raise ValueError("x and y must be finite, got NaN or infinity")
    costs = point_costs(x, y, cost)
    return costs.diagonal().mean() - transport_cost(costs, reg, relative=relative, tol=tol, max_iter=max_iter)


def sinkhorn_divergence(
    x: Float[Tensor, "n dim"],
    y: Float[Tensor, "m dim"],
    cost: PointCost = "sqeuclidean",
    reg: float = 0.05,
    *,
    relative: bool = True,
    tol: float = 1e-3,
    max_iter: int = 2000,
) -> Float[Tensor, ""]:
    r"""$W_\varepsilon(x, y) - \frac{1}{2} W_\varepsilon(x, x) - \frac{1}{2} W_\varepsilon(y, y)$ of two clouds.

    The three share one regularisation, that of `x` and `y`. From Genevay, Peyré and Cuturi, "Learning Generative
    Models with Sinkhorn Divergences", AISTATS 2018, arXiv 1706.00292. Arguments and errors as for `monge_gap`; `reg`
    must be positive where the clouds differ in size.

    Example:
        >>> x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
        >>> sinkhorn_divergence(x, x).abs() < 1e-6, sinkhorn_divergence(x, x + 1) > 1.9
        (tensor(True), tensor(True))
    """
    if tensor("x", x, ndim=2, floating=True).shape[1:] != tensor("y", y, ndim=2, floating=True).shape[1:]:
        raise ValueError(f"x and y must be points of one dimension, got shapes {tuple(x.shape)} and {tuple(y.shape)}")
    if not (torch.as_tensor(x).isfinite().all() and torch.as_tensor(y).isfinite().all()):
        raise ValueError("x and y must be finite, got NaN or infinity")
    across = point_costs(x, y, cost)
    eps = reg * float(across.detach().abs().mean()) if relative else reg

    def value(costs: Tensor) -> Tensor:
        # Where all of one cloud lies where all of the other does, no cost is left to take a share of.
        return transport_cost(costs, eps or reg, relative=eps == 0, tol=tol, max_iter=max_iter)

    return value(across) - (value(point_costs(x, x, cost)) + value(point_costs(y, y, cost))) / 2


class MongeGap(nn.Module):
    """`monge_gap` as a penalty: `loss = fit(net(x), target) + strength * gap(x, net(x))`.

    Args:
        cost, reg, relative, tol, max_iter: see `monge_gap`.

    Raises:
        TypeError: `max_iter` is no integer.
        ValueError: `reg` is negative or no number, `tol` not positive or `max_iter` below 1.

    Example:
        >>> x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
        >>> y = x.flip(1).requires_grad_()
        >>> MongeGap(cost="euclidean")(x, y).backward()
        >>> y.grad.shape
        torch.Size([64, 3])
    """

    def __init__(
        self,
        cost: PointCost = "sqeuclidean",
        reg: float = 0.05,
        *,
        relative: bool = True,
        tol: float = 1e-3,
        max_iter: int = 2000,
    ) -> None:
        super().__init__()
        reg = non_negative("reg", reg)
        if positive("tol", tol) < 0 or integer("max_iter", max_iter) < 1:
            raise ValueError(f"tol and max_iter must be positive, got {tol} and {max_iter}")
        self.cost, self.reg, self.relative, self.tol, self.max_iter = cost, reg, relative, tol, max_iter

    def forward(self, x: Float[Tensor, "n dim"], y: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
        """The gap of the map from `x` to `y`."""
        return monge_gap(x, y, self.cost, self.reg, relative=self.relative, tol=self.tol, max_iter=self.max_iter)

    def extra_repr(self) -> str:
        return f"cost={self.cost!r}, reg={self.reg}, relative={self.relative}"


class ResidualMLP(nn.Module):
    """The identity plus a perceptron: a map that starts near the identity.

    Args:
        dim: of the points.
        hidden: widths of the layers.

    Raises:
        TypeError: a width is no integer.
        ValueError: a width is below 1.

    Example:
        >>> ResidualMLP(2)(torch.zeros(5, 2)).shape
        torch.Size([5, 2])
    """

    def __init__(self, dim: int, hidden: Sequence[int] = (128, 64, 64)) -> None:
        super().__init__()
        if integer("dim", dim) < 1 or min((integer("hidden", width) for width in hidden), default=1) < 1:
            raise ValueError(f"dim and hidden must be at least 1, got {dim} and {hidden}")
        sizes = [dim, *hidden]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Linear(before, after), nn.GELU()]
        self.residual = nn.Sequential(*layers, nn.Linear(sizes[-1], dim))

    def forward(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """The mapped points."""
        return x + self.residual(x)  # type: ignore[no-any-return]


class MongeMap(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    r"""A transport map between two samples, learned as $\min_T \Delta(T_\sharp \mu, \nu) + \lambda \mathcal{M}^c(T)$.

    The default net and `lr` are made for features of about unit scale.

    Args:
        net: the map, a module from (batch, dim) to (batch, dim), copied before it is trained; None is a `ResidualMLP`.
            It is trained in the precision of its parameters.
        cost: whose optimal map is sought; see `monge_gap`. Make `net` end on the sphere for "sphere".
        strength: $\lambda$, at least 0; with 0 the map only fits.
        reg: entropy of the gap and of the default fitting loss, as a share of the mean absolute cost.
        fitting_loss: $\Delta$, a function of mapped and target points; None is `sinkhorn_divergence` with squared
            distances.
        lr: learning rate of Adam.
        max_iter: steps.
        batch_size: points drawn from either sample in a step; at most what the samples have.
        tol: marginal error of the Sinkhorn solutions.
        random_state: draws the net and the batches: an integer or a `numpy.random.RandomState`; None draws a seed.

    Attributes:
        net_: the trained map, on the device of `X`.
        loss_curve_, fit_curve_, gap_curve_: the loss and its two parts at each step.
        n_iter_: steps made.
        n_features_in_: dimensions of the points.
        feature_names_in_: their names, where `X` has any.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> x, y = torch.randn(2, 200, 2, generator=generator)
        >>> model = MongeMap(max_iter=5, batch_size=64, random_state=0).fit(x, y + 2)
        >>> model.transform(x).shape, len(model.loss_curve_)
        (torch.Size([200, 2]), 5)
    """

    def __init__(
        self,
        net: nn.Module | None = None,
        *,
        cost: PointCost = "sqeuclidean",
        strength: float = 1.0,
        reg: float = 0.05,
        fitting_loss: FittingLoss | None = None,
        lr: float = 1e-3,
        max_iter: int = 1000,
        batch_size: int = 256,
        tol: float = 1e-3,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.net = net
        self.cost = cost
        self.strength = strength
        self.reg = reg
        self.fitting_loss = fitting_loss
        self.lr = lr
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.tol = tol
        self.random_state = random_state

    @torch.inference_mode(False)
    @torch.enable_grad()
    def fit(self, X: Float[ArrayLike, "n dim"], y: Float[ArrayLike, "m dim"]) -> Self:
        """Learns a map that takes the sample `X` to the distribution of the sample `y`; the two are not paired.

        Raises:
            TypeError: a sample is a tensor of integers.
            ValueError: a sample is no finite matrix of at least 2 points, their dimensions differ, a constructor
                argument is out of its range, or the map diverges.
        """
        strength, lr = non_negative("strength", self.strength), positive("lr", self.lr)
        max_iter, batch_size = integer("max_iter", self.max_iter), integer("batch_size", self.batch_size, least=2)
        gap = MongeGap(self.cost, self.reg, tol=positive("tol", self.tol))
        if y is None:
            raise ValueError("y must be a sample of the target (requires y to be passed, but the target y is None)")
        source, target = _points("X", X, least=2), _points("y", y, least=2)
        if source.shape[1] != target.shape[1]:
            raise ValueError(f"y must have points of the {source.shape[1]} dimensions of X, got {target.shape[1]}")
        seed = self._seed()
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net = ResidualMLP(source.shape[1]) if self.net is None else copy.deepcopy(self.net)
        net = net.to(source.device).train()
        source, target = (points.to(_precision(net)) for points in (source, target.to(source.device)))
        optimizer = torch.optim.Adam(net.parameters(), lr=lr)
        curves: list[tuple[float, float]] = []
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="sinkhorn stopped")  # one step's gradient is a little off
            for _ in range(max_iter):
                x, goal = (_batch(points, batch_size, generator) for points in (source, target))
                mapped = net(x)
                if not mapped.isfinite().all():
                    raise ValueError(f"lr must be so small that the map stays finite, got {lr}")
                fit = (self.fitting_loss or self._divergence)(mapped, goal)
                penalty = gap(x, mapped) if strength > 0 else fit.new_zeros(())
                optimizer.zero_grad()
                (fit + strength * penalty).backward()
                optimizer.step()
                curves.append((float(fit.detach()), float(penalty.detach())))
        self.net_ = net.eval()
        self.n_iter_ = max_iter
        self.fit_curve_ = [fit for fit, _ in curves]
        self.gap_curve_ = [penalty for _, penalty in curves]
        self.loss_curve_ = [fit + strength * penalty for fit, penalty in curves]
        if isinstance(X, Tensor):
            self.n_features_in_ = source.shape[1]
        else:
            validate_data(self, X, skip_check_array=True)  # notes the number of features and their names
        return self

    def transform(self, X: Float[ArrayLike, "n dim"]) -> Float[Array, "n dim"]:
        """The mapped points, of the dtype of `X`: a tensor on its device where it is one, else an array.

        Raises:
            sklearn.exceptions.NotFittedError: `fit` has not been called.
            ValueError: `X` has other dimensions than the sample that was fitted.
        """
        check_is_fitted(self, "net_")
        if isinstance(X, Tensor):
            points = _points("X", X, least=1)
            if points.shape[1] != self.n_features_in_:
                raise ValueError(f"X must have points of {self.n_features_in_} dimensions, got {points.shape[1]}")
        else:
            points = tensor("X", validate_data(self, X, reset=False, dtype=[np.float64, np.float32]))
        parameter = next(self.net_.parameters(), points)
        # Maps that are gradients of a potential need autograd to be evaluated.
        mapped: Tensor = self.net_(points.to(parameter)).detach().to(points)
        return mapped if isinstance(X, Tensor) else mapped.cpu().numpy()

    def fit_transform(self, X: Float[ArrayLike, "n dim"], y: Float[ArrayLike, "m dim"]) -> Float[Array, "n dim"]:
        """Fits the map and returns where it takes `X`."""
        return self.fit(X, y).transform(X)

    def _seed(self) -> int:
        if self.random_state is None:
            return int(torch.randint(2**31, ()))
        if isinstance(self.random_state, np.random.RandomState):
            return int(self.random_state.randint(2**31 - 1))
        return integer("random_state", self.random_state, least=0)

    def _divergence(self, mapped: Tensor, goal: Tensor) -> Tensor:
        return sinkhorn_divergence(mapped, goal, reg=self.reg, tol=self.tol)


def _points(name: str, value: Any, *, least: int) -> Tensor:
    if not isinstance(value, Tensor):
        read = check_array(value, dtype=[np.float64, np.float32], input_name=name, ensure_min_samples=least)
        return tensor(name, read)
    points = finite_tensor(name, value, ndim=2, floating=True).detach()
    if len(points) < least or not points.shape[1]:
        raise ValueError(f"{name} must be (points, dim) of at least {least} points, got shape {tuple(points.shape)}")
    return points


def _precision(net: nn.Module) -> torch.dtype:
    return next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)


def _batch(points: Tensor, size: int, generator: torch.Generator) -> Tensor:
    index = torch.randperm(len(points), generator=generator)[:size]
    return points[index.to(points.device)]
