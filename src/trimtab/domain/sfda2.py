r"""SF(DA)²: adapts a trained classifier to unlabelled data of another domain, without the data it was trained on.

For when a model has to move and its training data may not. Nearest neighbours in feature space stand for augmented
copies of each other, and predictions are clustered on that graph (SNC); covariances of the classes' features stand for
endlessly many more copies, in two terms that cost no further pass (IFA, FD). With $p_i$ the prediction of sample $i$,
$S_j$ the stored ones of its neighbours $\mathcal N_i$, $w_c$ the rows of the head and $\Sigma_c$ the covariances,

$$
\mathcal{L}_{SNC} = -\frac1B \sum_i \sum_{j \in \mathcal N_i} S_j^\top p_i
  + \frac{\alpha_t}{B} \sum_i \sum_{j \ne i} (p_i^\top p_j)^2, \qquad \alpha_t = \alpha_0 (1 + 10\, t/T)^{-\beta}
$$

$$
\mathcal{L}_{IFA} = -\frac2B \sum_i \sum_k \log \frac{e^{l_{ik}}}
  {\sum_c e^{\,l_{ic} + \frac{\lambda_t}{2} (w_c - w_k)^\top \Sigma_{\hat y_i} (w_c - w_k)}}, \qquad
\mathcal{L}_{FD} = -\frac12 \sum_{c \ne c'} \bar s_c^\top \bar s_{c'}
  \bigl(1 - \cos(\Sigma_c, \Sigma_{c'})\bigr)
$$

with $\lambda_t = \lambda_0 t/T$ and $\bar s_c$ the mean stored prediction of the samples that are taken for class $c$.

Reference: Uiwon Hwang, Jonghyun Lee, Juhyeon Shin and Sungroh Yoon, "SF(DA)²: Source-free Domain Adaptation Through
the Lens of Data Augmentation", ICLR 2024, arXiv 2403.10834. The authors' release writes the first term as a divergence
to the neighbours, whose gradient is the same, and counts steps for the strength of the second from 1; here all count
from 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.ops.arguments import (
    class_indices,
    floating_tensor,
    integer,
    looked_at,
    non_negative,
    real_problem,
)
from trimtab.ops.attack import eval_mode
from trimtab.ops.feature_bank import FeatureBank
from trimtab.ops.whole_state import WholeState


def neighbourhood_clustering(
    probs: Float[Tensor, "batch classes"], neighbours: Float[Tensor, "batch k classes"]
) -> tuple[Tensor, Tensor]:
    """The two terms of spectral neighbourhood clustering: agreement with neighbours, and overlap within the batch.

    Args:
        probs: predictions, rows that sum to one.
        neighbours: stored predictions of each sample's neighbours, constants; rows of zeros count for nothing.

    Returns:
        Scalars `-mean_i sum_j S_j . p_i` and `mean_i sum_(j != i) (p_i . p_j)^2`; the second is zero for one sample.

    Raises:
        TypeError: something is not floating point.
        ValueError: the shapes do not fit, or the batch is empty.

    Example:
        >>> probs = torch.eye(2)
        >>> [round(term.item(), 4) for term in neighbourhood_clustering(probs, probs[:, None])]
        [-1.0, 0.0]
    """
    probs, neighbours = floating_tensor("probs", probs), floating_tensor("neighbours", neighbours)
    if probs.ndim != 2 or len(probs) == 0:
        raise ValueError(f"probs must be (batch, classes) with at least one sample, got {tuple(probs.shape)}")
    if neighbours.ndim != 3 or neighbours.shape[::2] != probs.shape:
        wanted = f"({len(probs)}, k, {probs.shape[1]})"
        raise ValueError(f"neighbours must be of shape {wanted}, got {tuple(neighbours.shape)}")
    attraction = -(neighbours.detach().sum(1) * probs).sum(1).mean()
    overlap = (probs @ probs.mT).square()
    return attraction, (overlap.sum() - overlap.diagonal().sum()) / len(probs)


def implicit_feature_augmentation(
    logits: Float[Tensor, "batch classes"],
    weight: Float[Tensor, "classes dim"],
    covariance: Float[Tensor, "classes dim dim"],
    strength: float | Tensor,
) -> Tensor:
    """An upper bound of the clustering loss of endlessly many features, drawn around each with its class's covariance.

    Args:
        logits: scores of the classes.
        weight: rows of the linear head, as they are applied.
        covariance: of the features of each class; the one of the predicted class counts.
        strength: lambda, at least 0; at 0 the loss is twice the sum of the cross-entropies to all classes.

    Raises:
        TypeError: something is not floating point.
        ValueError: the shapes do not fit, the batch is empty, or `strength` is negative.

    Example:
        >>> loss = implicit_feature_augmentation(torch.zeros(1, 2), torch.eye(2), torch.zeros(2, 2, 2), 1.0)
        >>> round(loss.item(), 4)  # 4 log 2
        2.7726
    """
    logits, weight = floating_tensor("logits", logits), floating_tensor("weight", weight)
    covariance = floating_tensor("covariance", covariance)
    if logits.ndim != 2 or len(logits) == 0:
        raise ValueError(f"logits must be (batch, classes) with at least one sample, got {tuple(logits.shape)}")
    classes = logits.shape[1]
    if weight.ndim != 2 or len(weight) != classes:
        raise ValueError(f"weight must be of shape ({classes}, dim), got {tuple(weight.shape)}")
    if covariance.shape != (classes, weight.shape[1], weight.shape[1]):
        wanted = (classes, weight.shape[1], weight.shape[1])
        raise ValueError(f"covariance must be of shape {wanted}, got {tuple(covariance.shape)}")
    if not isinstance(strength, Tensor) and not (isinstance(strength, float | Real) and 0 <= strength < torch.inf):
        raise ValueError(f"strength must be at least 0 and finite, got {strength!r}")
    products = weight @ covariance @ weight.mT  # of pairs of rows, for each class that a sample may belong to
    own = products.diagonal(dim1=1, dim2=2)
    spread = own[:, None, :] + own[:, :, None] - products - products.mT  # [y, k, c]
    raised = logits[:, None, :] + 0.5 * strength * spread[logits.detach().argmax(1)]
    return 2 * (raised.logsumexp(2) - logits).sum(1).mean()


def feature_disentanglement(
    covariance: Float[Tensor, "classes dim dim"], mean_probs: Float[Tensor, "classes classes"]
) -> Tensor:
    """Rewards covariances that differ between classes that are confused; from -classes (classes - 1) / 2 to 0.

    Args:
        covariance: of the features of each class; a class without one, all zero, takes no part.
        mean_probs: mean prediction of the samples taken for each class, constants; zero where there are none.

    Raises:
        TypeError: something is not floating point.
        ValueError: the shapes do not fit.

    Example:
        >>> covariance = torch.diag_embed(torch.eye(2))
        >>> feature_disentanglement(covariance, torch.full((2, 2), 0.5)).item()
        -0.5
    """
    covariance, mean_probs = floating_tensor("covariance", covariance), floating_tensor("mean_probs", mean_probs)
    classes = len(covariance)
    if covariance.ndim != 3 or covariance.shape[1] != covariance.shape[2]:
        raise ValueError(f"covariance must be (classes, dim, dim), got {tuple(covariance.shape)}")
    if mean_probs.shape != (classes, classes):
        raise ValueError(f"mean_probs must be of shape {(classes, classes)}, got {tuple(mean_probs.shape)}")
    flat = covariance.flatten(1)
    products = flat @ flat.mT
    squares = products.diagonal()
    there = squares.detach() > 0
    lengths = torch.where(there, squares, 1).sqrt()
    confused = (mean_probs @ mean_probs.mT).detach() * (there[:, None] & there)
    confused = confused - confused.diagonal().diag()
    return -0.5 * (confused * (1 - products / (lengths[:, None] * lengths))).sum()


class ClassCovariance(WholeState, nn.Module):
    """Means and covariances of the classes' features over all batches so far; the newest batch carries the gradient.

    Args:
        num_classes: number of classes.
        dim: width of the features.

    Attributes:
        covariance: (num_classes, dim, dim), biased, zero for a class never seen.
        mean: (num_classes, dim).
        count: (num_classes,), samples seen.

    Raises:
        ValueError: a size is not positive.

    Example:
        >>> statistics = ClassCovariance(2, 1)
        >>> for z in (torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0]])):
        ...     _ = statistics(z, torch.zeros(len(z), dtype=torch.int64))
        >>> round(statistics.covariance[0].item(), 4), statistics.mean[0].item()
        (2.6667, 2.0)
    """

    covariance: Tensor
    mean: Tensor
    count: Tensor

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        integer("num_classes", num_classes)
        integer("dim", dim)
        self.register_buffer("covariance", torch.zeros(num_classes, dim, dim))
        self.register_buffer("mean", torch.zeros(num_classes, dim))
        self.register_buffer("count", torch.zeros(num_classes))

    def forward(self, z: Float[Tensor, "batch dim"], labels: Int[Tensor, " batch"]) -> Float[Tensor, "classes dim dim"]:
        """Takes a batch in; the covariances with it, whose gradient reaches the batch. Rows not finite are left out.

        Raises:
            TypeError: `z` is not floating point, or `labels` not int64.
            ValueError: the shapes do not fit, or a label is out of range.
        """
        z = floating_tensor("z", z)
        class_indices("labels", labels)
        if z.ndim != 2 or z.shape[1] != self.mean.shape[1] or labels.shape != z.shape[:1]:
            wanted = f"(batch, {self.mean.shape[1]}) and (batch,)"
            raise ValueError(f"z and labels must be {wanted}, got {tuple(z.shape)} and {tuple(labels.shape)}")
        if looked_at(labels) and not ((labels >= 0) & (labels < len(self.count))).all():
            raise ValueError(f"labels must be in [0, {len(self.count)}), got others")
        z = z.to(self.mean.dtype)
        finite = z.detach().isfinite().all(1)
        z = torch.where(finite[:, None], z, 0)
        with torch.autocast(z.device.type, enabled=False):
            member = F.one_hot(labels, len(self.count)).to(z) * finite[:, None]  # (batch, classes)
            count = member.sum(0)
            mean = member.mT @ z / count.clamp_min(1)[:, None]
            apart = (z - mean[labels]) * finite[:, None]
            share = (count / (count + self.count).clamp_min(1))[:, None]
            # A batch's spread about its own mean, and that mean's distance from the one so far as one row more.
            weights = torch.cat([member.mT * (share / count.clamp_min(1)[:, None]), share * (1 - share)], 1)
            rows = torch.cat([apart.expand(len(count), -1, -1), (self.mean - mean)[:, None]], 1)
            covariance = torch.baddbmm((1 - share)[:, :, None] * self.covariance, (weights[:, :, None] * rows).mT, rows)
        self.covariance = covariance.detach()
        self.mean = (self.mean + share * (mean - self.mean)).detach()
        self.count = self.count + count
        return covariance


class SFDA2(WholeState, nn.Module):
    """Source-free adaptation of `head(features(x))`, for the user's own loop.

    Call `fill` once, then for each batch `loss(x, index)["total"].backward()`, the optimizer's step, and `update()`.
    The authors take SGD with Nesterov momentum 0.9, weight decay 1e-3, and a tenth of the rate for the backbone.

    Args:
        features: the trained feature extractor, x -> (batch, dim).
        head: the trained linear head; weight normalisation may be on it.
        num_samples: number of target samples.
        total_steps: length of the adaptation, T.
        k: number of neighbours.
        alpha: alpha_0, the weight of overlap within the batch at first.
        beta: how fast it falls.
        ifa_weight: of implicit feature augmentation; 0 leaves it out.
        ifa_strength: lambda_0, its strength at the end.
        fd_weight: of feature disentanglement; 0 leaves it out.

    Attributes:
        bank: normalised features and predictions of the target samples, a `FeatureBank`.
        statistics: running class covariances of the features, a `ClassCovariance`.
        step: how many steps were made, a scalar buffer.

    Raises:
        TypeError: an argument is of another type.
        ValueError: a size is not positive, a weight is negative, or `k` is not below `num_samples`.

    Example:
        >>> features, head, x = nn.Linear(3, 4), nn.Linear(4, 2), torch.randn(20, 3)
        >>> rule = SFDA2(features, head, num_samples=20, total_steps=10)
        >>> rule.fill(x.split(8))
        >>> sorted(rule.loss(x[:8], torch.arange(8)))
        ['attraction', 'augmentation', 'disentanglement', 'overlap', 'total']
    """

    step: Tensor

    def __init__(
        self,
        features: nn.Module,
        head: nn.Linear,
        num_samples: int,
        total_steps: int,
        *,
        k: int = 5,
        alpha: float = 1.0,
        beta: float = 5.0,
        ifa_weight: float = 1e-4,
        ifa_strength: float = 5.0,
        fd_weight: float = 10.0,
    ) -> None:
        super().__init__()
        if not isinstance(head, nn.Linear):
            raise TypeError(f"head must be an nn.Linear, got {type(head).__name__}")
        self.k = integer("k", k, 1, integer("num_samples", num_samples, 2) - 1)
        self.total_steps = integer("total_steps", total_steps)
        self.alpha, self.beta = non_negative("alpha", alpha), non_negative("beta", beta)
        self.ifa_weight = non_negative("ifa_weight", ifa_weight)
        self.ifa_strength = non_negative("ifa_strength", ifa_strength)
        self.fd_weight = non_negative("fd_weight", fd_weight)
        self.features, self.head = features, head
        self.bank = FeatureBank(num_samples, head.in_features, payload=(head.out_features,))
        self.statistics = ClassCovariance(head.out_features, head.in_features)
        self.register_buffer("step", torch.zeros(()))

    @torch.no_grad()
    def fill(self, batches: Iterable[Float[Tensor, "batch ..."]]) -> None:
        """Stores features and predictions of all target samples, in eval mode; batches in the order of their indices.

        Raises:
            ValueError: there are not `num_samples` of them.
        """
        with eval_mode(self.features):
            z = torch.cat([self.features(x) for x in batches])
        if len(z) != len(self.bank.filled):
            raise ValueError(f"batches must hold {len(self.bank.filled)} samples, got {len(z)}")
        self.bank.write(torch.arange(len(z), device=z.device), z, self.head(z).softmax(1))

    def loss(self, x: Float[Tensor, "batch ..."], index: Int[Tensor, " batch"]) -> dict[str, Tensor]:
        """The loss of a batch, whose features and predictions are stored first; a dict with `total`.

        Args:
            x: inputs.
            index: the samples' positions in the target set, each once.

        Raises:
            TypeError: `index` is not int64.
            ValueError: it does not fit the batch, is out of range or repeated, or the batch is empty.
        """
        if problem := real_problem(x=x):
            raise TypeError(problem)
        if len(x) == 0:
            raise ValueError("x must have at least one sample, got none")
        self.bank.check(index, len(x))  # before batch statistics move
        z = floating_tensor("features(x)", self.features(x))
        logits = floating_tensor("head(features(x))", self.head(z))
        probs = logits.softmax(1)
        self.bank.write(index, z, probs)
        _, near = self.bank.nearest(z.detach(), self.k, exclude_self=index)
        stored = cast(Tensor, self.bank.payload)  # zero where nothing is stored
        attraction, overlap = neighbourhood_clustering(probs, stored[near])
        progress = self.step / self.total_steps
        total = attraction + self.alpha * (1 + 10 * progress) ** -self.beta * overlap
        parts = {"attraction": attraction, "overlap": overlap}
        if self.ifa_weight or self.fd_weight:
            covariance = self.statistics(z, logits.detach().argmax(1))
            augmentation = implicit_feature_augmentation(
                logits, self.head.weight, covariance, self.ifa_strength * progress
            )
            apart = feature_disentanglement(covariance, self._mean_probs(stored))
            total = total + self.ifa_weight * augmentation + self.fd_weight * apart
            parts |= {"augmentation": augmentation, "disentanglement": apart}
        return {"total": total, **{name: value.detach() for name, value in parts.items()}}

    def update(self) -> None:
        """One step done; call it after the optimizer's."""
        self.step += 1

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        logits: Tensor = self.head(self.features(x))
        return logits

    def _mean_probs(self, probs: Tensor) -> Tensor:
        """The mean stored prediction of the samples taken for each class; zero where there are none."""
        member = F.one_hot(probs.argmax(1), probs.shape[1]).to(probs) * self.bank.filled[:, None]
        return member.mT @ probs / member.sum(0).clamp_min(1)[:, None]
