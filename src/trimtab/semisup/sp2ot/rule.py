"""The loss of a batch, and the memory that its plan reaches over."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.ops.arguments import (
    finite_tensor,
    floating_tensor,
    in_range,
    integer,
    non_negative,
    positive,
    same_shape,
)
from trimtab.ops.feature_bank import FeatureBank
from trimtab.ops.states import fits
from trimtab.semisup.sp2ot.plan import knn_gaussian_affinity, progressive_mass, sp2ot


def partial_cross_entropy(
    logits: Float[Tensor, "batch classes"], targets: Float[Tensor, "batch classes"]
) -> Float[Tensor, ""]:
    r"""$-\frac1n \sum_{ik} q_{ik} \log p_{ik}$ for rows that sum to at most one; targets are constants.

    Raises:
        TypeError: `logits` are not floating point, or `targets` no real tensor.
        ValueError: shapes differ, or the batch is empty.

    Example:
        >>> round(float(partial_cross_entropy(torch.zeros(2, 2), torch.tensor([[0.0, 1.0], [0.0, 0.0]]))), 4)
        0.3466
    """
    logits = floating_tensor("logits", logits)
    if logits.ndim != 2 or len(logits) == 0:
        raise ValueError(f"logits must have shape (batch, classes), not empty, got {tuple(logits.shape)}")
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets must be a tensor, got {type(targets).__name__}")
    if targets.is_complex():
        raise TypeError(f"targets must be real, got {targets.dtype}")
    same_shape("targets", targets, "logits", logits)
    return -(targets.detach().to(logits) * logits.log_softmax(1)).sum(1).mean()


class SP2OT(nn.Module):
    """The loss of a batch of two views, with the memory that its plan reaches over.

    The plan of each view, made with the samples of the memory, is the target of the other view. In training mode a call
    remembers its batch; call `update()` after the optimizer's step, which moves the share that takes part.

    Args:
        num_clusters: K.
        feature_dim: length of the frozen features that tell who is like whom.
        total_steps: steps until everyone takes part.
        bank_size: samples in the memory; the authors keep ten batches.
        initial_mass: share that takes part at first, in (0, 1].
        gamma, epsilon: as in `sp2ot`.
        lam: weight of the similarities at the start; it falls with the share that is left out.
        neighbors: of each sample, as far as there are so many.
        max_iter: most rounds of a plan.

    Attributes:
        bank: features and logits of recent samples.
        step: a scalar buffer.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> rule = SP2OT(num_clusters=3, feature_dim=2, total_steps=100, bank_size=8)
        >>> logits = torch.eye(3).repeat(2, 1).requires_grad_()
        >>> found = rule.loss(logits, logits, torch.eye(3)[:, :2].repeat(2, 1))
        >>> found["total"].backward()
        >>> rule.update()
        >>> round(float(found["mass"]), 3)
        0.106
    """

    step: Tensor

    def __init__(
        self,
        num_clusters: int,
        feature_dim: int,
        total_steps: int,
        *,
        bank_size: int = 5120,
        initial_mass: float = 0.1,
        gamma: float = 1.0,
        epsilon: float = 0.1,
        lam: float = 1000.0,
        neighbors: int = 20,
        max_iter: int = 100,
    ) -> None:
        super().__init__()
        self.num_clusters, self.total_steps = (
            integer("num_clusters", num_clusters, 2),
            integer("total_steps", total_steps),
        )
        self.initial_mass = in_range("initial_mass", initial_mass, 0, 1, "right")
        self.gamma = gamma if gamma == math.inf else positive("gamma", gamma)
        self.epsilon, self.lam = positive("epsilon", epsilon), non_negative("lam", lam)
        self.neighbors, self.max_iter = integer("neighbors", neighbors), integer("max_iter", max_iter)
        self.bank = FeatureBank(bank_size, feature_dim, payload=(self.num_clusters,))
        self.register_buffer("step", torch.tensor(0))

    def loss(
        self,
        first: Float[Tensor, "batch clusters"],
        second: Float[Tensor, "batch clusters"],
        features: Float[Tensor, "batch dim"],
    ) -> dict[str, Tensor]:
        """The loss ("total", with a gradient) and the share of the mass that took part ("mass").

        Args:
            first, second: logits of two views.
            features: frozen features of the samples.

        Raises:
            TypeError: an argument is no floating-point tensor.
            ValueError: shapes do not fit, the batch is empty or a value is not finite.
        """
        if not all(isinstance(value, Tensor) for value in (first, second, features)):
            raise TypeError("first, second and features must be tensors, got others")
        batch = len(features)
        for name, value, width in (
            ("first", first, self.num_clusters),
            ("second", second, self.num_clusters),
            ("features", features, self.bank.dim),
        ):
            found = finite_tensor(name, value, ndim=2, floating=True)
            if found.shape != (batch, width) or batch == 0:
                raise ValueError(f"{name} must have shape ({batch or 'batch'}, {width}), got {tuple(found.shape)}")
        held = self.bank.filled
        known, payload = self.bank.features[held], self.bank.payload
        if payload is None:  # pragma: no cover - the bank is made with one
            raise AssertionError
        rho = progressive_mass(int(self.step), self.total_steps, self.initial_mass)
        everyone = torch.cat([F.normalize(features.detach().to(known), dim=1), known])
        lam, similarity = self.lam * (1 - rho), None
        if lam > 0 and len(everyone) > 1:
            similarity = knn_gaussian_affinity(everyone, min(self.neighbors, len(everyone) - 1))
        targets, scaling = [], None
        for logits in (first, second):
            cost = -torch.cat([logits.detach().to(payload), payload[held]]).double().log_softmax(1)
            plan = sp2ot(
                cost,
                similarity,
                rho,
                lam=lam,
                gamma=self.gamma,
                epsilon=self.epsilon,
                max_iter=self.max_iter,
                scaling=scaling,
            )
            scaling = plan.scaling
            targets.append(len(everyone) * plan.plan[:batch])
        total = (partial_cross_entropy(second, targets[0]) + partial_cross_entropy(first, targets[1])) / 2
        if self.training:
            self.bank.add(features, first)
        return {"total": total, "mass": torch.tensor(rho, device=total.device)}

    @torch.no_grad()
    def update(self) -> None:
        """A step has been made: the share that takes part grows."""
        self.step += 1

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of any module; a state that does not fit changes nothing.

        Raises:
            ValueError: it is of a rule of another form.
        """
        if not fits(state_dict, self.state_dict()):
            raise ValueError("state_dict must be of a rule with as many clusters and places, got another")
        return super().load_state_dict(state_dict, strict, assign)


class CosineHead(nn.Module):
    """Clusters as directions: cosines of the features with them, over a temperature.

    Args:
        dim: of the features.
        num_clusters: K.
        temperature: positive.

    Example:
        >>> CosineHead(4, 3)(torch.ones(2, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(self, dim: int, num_clusters: int, temperature: float = 0.1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(integer("num_clusters", num_clusters), integer("dim", dim)))
        self.temperature = positive("temperature", temperature)

    def forward(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch clusters"]:
        """Logits, in [-1, 1] over the temperature."""
        return F.normalize(x, dim=1) @ F.normalize(self.weight, dim=1).T / self.temperature
