r"""AdaMixUp: MixUp whose mixing weights come from intervals that a network learns for each pair of samples.

A mixture that falls among real samples of another class carries a contradictory label ("manifold intrusion"). A policy
network proposes the interval for a pair, and a discriminator tells mixtures from real samples; both share one objective
with the classifier, which drives mixtures off the data. It suits tasks where MixUp underfits or its parameter is hard
to tune. For pairs $(x_i, x_i')$, joined to $u_i$:

$$
(a_i, \Delta_i, 1 - a_i - \Delta_i) = \operatorname{softmax}(g(u_i)), \qquad
\lambda_i = a_i + \Delta_i e_i, \quad e_i \sim U(0, 1)
$$

$$
\tilde x_i = \lambda_i x_i + (1 - \lambda_i) x_i', \qquad \tilde y_i = \lambda_i y_i + (1 - \lambda_i) y_i'
$$

$$
\min_{h, c, d, g} \;\; \operatorname*{mean}_{(z, t) \in \{(\tilde x_i, \tilde y_i)\} \cup \{(x_i, y_i)\}}
\mathrm{CE}\bigl(c(h(z)), t\bigr)
\; + \operatorname*{mean}_{z \in \{\tilde x_i\} \cup \{x_i\} \cup \{x_j^{\text{unseen}}\}}
\mathrm{CE}\bigl(d(h(z)), [z \text{ is real}]\bigr)
$$

with classifier head $c$, discriminator head $d$, their trunk $h$, and policy $g$, a network of its own.

Reference: Hongyu Guo, Yongyi Mao, Richong Zhang, "MixUp as Locally Linear Out-Of-Manifold Regularization", AAAI 2019,
arXiv 1809.02499. `mixup` is the baseline: Hongyi Zhang, Moustapha Cisse, Yann N. Dauphin, David Lopez-Paz, "mixup:
Beyond Empirical Risk Minimization", ICLR 2018, arXiv 1710.09412.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.ops.arguments import integer, looked_at, positive, tensor_problem


def mix(parts: Float[Tensor, "folds batch ..."], weights: Float[Tensor, "batch folds"]) -> Float[Tensor, "batch ..."]:
    """The weighted sum of the samples of each group: inputs, or labels as probabilities.

    Args:
        parts: `parts[j, i]` is sample j of group i.
        weights: weights of each group, summing to one.

    Raises:
        TypeError: an argument is no real tensor, or `parts` not floating point.

    Example:
        >>> mix(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), torch.tensor([[0.25, 0.75]]))
        tensor([[0.2500, 0.7500]])
    """
    if problem := tensor_problem(parts=parts, weights=weights):
        raise TypeError(problem)
    if not parts.is_floating_point():
        raise TypeError(f"parts must be floating point, to be mixed, got {parts.dtype}")
    return torch.einsum("kb...,bk->b...", parts, weights.to(parts))


def mixup(
    x: Float[Tensor, "batch ..."],
    targets: Float[Tensor, "batch classes"],
    alpha: float = 1.0,
    *,
    weights: Float[Tensor, " batch"] | None = None,
    partner: Int[Tensor, " batch"] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "batch ..."], Float[Tensor, "batch classes"]]:
    r"""Plain MixUp: each sample and a random partner, mixed with a weight from $\mathrm{Beta}(\alpha, \alpha)$.

    Args:
        x: inputs.
        targets: labels as probabilities, such as `F.one_hot(y, num_classes).float()`.
        alpha: positive; the smaller, the closer mixtures lie to one of their samples.
        weights: share of the sample itself; drawn for each sample if None.
        partner: positions of the partners in the batch; a random permutation if None.
        generator: source of the draws, on the CPU; torch's global one if None.

    Returns:
        The mixtures and their labels.

    Raises:
        TypeError: `x` or `targets` is not floating point, or `partner` not int64.
        ValueError: `alpha` is not positive, lengths differ or, on the CPU, a partner is out of range.

    Example:
        >>> x, y = mixup(torch.tensor([[0.0], [1.0]]), torch.eye(2), weights=torch.tensor([0.9, 0.6]),
        ...              partner=torch.tensor([1, 0]))
        >>> x.flatten(), y[0]
        (tensor([0.1000, 0.6000]), tensor([0.9000, 0.1000]))
    """
    if problem := tensor_problem(x=x, targets=targets, weights=weights, partner=partner):
        raise TypeError(problem)
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, to be mixed, got {x.dtype}")
    if not targets.is_floating_point():
        raise TypeError(f"targets must be probabilities, such as one_hot(y).float(), got {targets.dtype}")
    positive("alpha", alpha)
    if targets.ndim != 2 or len(targets) != len(x):
        raise ValueError(f"targets must have shape ({len(x)}, classes), got {tuple(targets.shape)}")
    for name, drawn in (("weights", weights), ("partner", partner)):
        if drawn is not None and drawn.shape != (len(x),):
            raise ValueError(f"{name} must have shape ({len(x)},), got {tuple(drawn.shape)}")
    if partner is not None and partner.dtype != torch.int64:
        raise TypeError(f"partner must be int64 (positions in the batch), got {partner.dtype}")
    if partner is not None and looked_at(partner) and not ((partner >= 0) & (partner < len(x))).all():
        raise ValueError(f"partner must be in [0, {len(x)}), got {partner}")
    if weights is None:
        gammas = torch._standard_gamma(torch.full((2, len(x)), alpha, dtype=torch.float64), generator=generator)
        weights = gammas[0] / gammas.sum(0)
        # Both below the smallest number, as for a tiny alpha: one of them is larger by far, and each as often.
        lost = (gammas <= torch.finfo(gammas.dtype).tiny).all(0)
        if lost.any():
            weights = torch.where(lost, torch.randint(2, (len(x),), generator=generator), weights)
    if partner is None:
        partner = torch.randperm(len(x), generator=generator)
    pairs = torch.stack([weights, 1 - weights], 1).to(x.device)
    partner = partner.to(x.device)
    return mix(torch.stack([x, x[partner]]), pairs), mix(torch.stack([targets, targets[partner]]), pairs)


class Region(NamedTuple):
    r"""Where the mixing weights of each group are drawn from: the simplex, shrunk to `width` and shifted by `low`.

    For pairs, the share of the first sample lies in $[a, a + \Delta]$ with $a$ = `low[:, 0]`, $\Delta$ = `width`.

    Attributes:
        low: smallest weights, shape `(batch, folds)`.
        width: extent of the region, shape `(batch,)`; `low.sum(1) + width` is one.
    """

    low: Float[Tensor, "batch folds"]
    width: Float[Tensor, " batch"]

    @classmethod
    def from_logits(cls, logits: Float[Tensor, "batch folds+1"]) -> Region:
        """The softmax of a policy's logits, whose last entry is the width.

        Example:
            >>> Region.from_logits(torch.zeros(1, 3))
            Region(low=tensor([[0.3333, 0.3333]]), width=tensor([0.3333]))
        """
        shares = logits.softmax(1)
        return cls(shares[:, :-1], shares[:, -1])

    def weights(self, e: Float[Tensor, "batch folds"]) -> Float[Tensor, "batch folds"]:
        """The mixing weights at a point of the simplex, differentiable in the region.

        Example:
            >>> Region(torch.tensor([[0.3, 0.3]]), torch.tensor([0.4])).weights(torch.tensor([[0.5, 0.5]]))
            tensor([[0.5000, 0.5000]])
        """
        return self.low + self.width.unsqueeze(1) * e


def _small_linear(in_features: int, out_features: int) -> nn.Linear:
    layer = nn.Linear(in_features, out_features)
    nn.init.normal_(layer.weight, std=1e-3)
    nn.init.zeros_(layer.bias)
    return layer


class MixPolicy(nn.Module):
    """The policy region generator: samples to be mixed in, logits of their `Region` out.

    Args:
        trunk: a feature extractor of its own, `(batch, ...)` to `(batch, feature_dim)`; the authors take the
            classifier's architecture.
        feature_dim: width of its output.
        folds: samples in a mixture.
        hidden: width of the linear layer between.
        gated: as in the authors' release, average the samples under random gates, so that the trunk takes inputs of
            the classifier's shape; if False, the trunk takes them side by side, `folds` times as wide in dim 1.

    Raises:
        TypeError: a size is no integer.
        ValueError: `folds` is below 2, or another size below 1.

    Example:
        >>> policy = MixPolicy(nn.Identity(), feature_dim=5)
        >>> policy(torch.ones(2, 8, 5)).shape
        torch.Size([8, 3])
    """

    def __init__(
        self, trunk: nn.Module, feature_dim: int, folds: int = 2, hidden: int = 100, *, gated: bool = True
    ) -> None:
        super().__init__()
        integer("folds", folds, 2)
        if integer("feature_dim", feature_dim) * integer("hidden", hidden) < 1:
            raise ValueError(f"feature_dim and hidden must be at least 1, got {feature_dim} and {hidden}")
        self.trunk = trunk
        self.head = nn.Sequential(_small_linear(feature_dim, hidden), _small_linear(hidden, folds + 1))
        self.folds = folds
        self.gated = gated

    def forward(
        self,
        parts: Float[Tensor, "folds batch ..."],
        *,
        gates: Float[Tensor, "folds batch ..."] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch folds+1"]:
        """Logits of the regions.

        Args:
            parts: `parts[j, i]` is sample j of group i.
            gates: factors of the average; standard normal, truncated at two deviations, if None.
            generator: source of the gates, on the CPU; torch's global one if None.
        """
        if not self.gated:
            return cast(Tensor, self.head(self.trunk(torch.cat(parts.unbind(), 1))))
        if gates is None:
            gates = torch.empty(parts.shape)
            nn.init.trunc_normal_(gates, generator=generator)
        return cast(Tensor, self.head(self.trunk((gates.to(parts) * parts).mean(0))))


class AdaMixUp(nn.Module):
    """Classifier, intrusion discriminator and policy, trained by one optimizer on one loss that all three minimise.

    Called on inputs it is the classifier. In training, call `loss(x, targets)["total"].backward()` and step an
    optimizer over `parameters()`; the authors add weight decay of 1e-4. Of a batch, the first half is mixed, with
    partners from all of it, and the second half is shown to the discriminator alone. All goes through the trunk at
    once; the authors' release runs it on the classifier's share and on the discriminator's one after the other, which
    differs where batch normalisation or dropout see the batch, and costs more.

    Groups of more than two samples take their weights from the simplex of that dimension, shrunk and shifted; the
    release has pairs only.

    Args:
        trunk: feature extractor, `(batch, ...)` to `(batch, feature_dim)`.
        feature_dim: width of its output.
        num_classes: number of classes.
        policy: a `MixPolicy`, or any module from samples `(folds, batch, ...)` to logits `(batch, folds + 1)` of
            their `Region`, with an attribute `folds`; it is called with a keyword `generator`.

    Raises:
        TypeError: a size is no integer.
        ValueError: `num_classes` is below 2, or `feature_dim` below 1.

    Example:
        >>> def trunk():
        ...     return nn.Sequential(nn.Linear(5, 16), nn.ReLU())
        >>> model = AdaMixUp(trunk(), 16, num_classes=3, policy=MixPolicy(trunk(), 16))
        >>> losses = model.loss(torch.randn(8, 5), torch.arange(8) % 3)
        >>> losses["total"].backward()
        >>> model(torch.randn(2, 5)).shape
        torch.Size([2, 3])
    """

    def __init__(self, trunk: nn.Module, feature_dim: int, num_classes: int, policy: nn.Module) -> None:
        super().__init__()
        integer("num_classes", num_classes, 2)
        if integer("feature_dim", feature_dim) < 1:
            raise ValueError(f"feature_dim must be at least 1, got {feature_dim}")
        self.trunk = trunk
        self.head = _small_linear(feature_dim, num_classes)
        self.discriminator = nn.Sequential(_small_linear(feature_dim, num_classes), _small_linear(num_classes, 2))
        self.policy = policy
        self.num_classes = num_classes

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        """Logits of the classes."""
        return cast(Tensor, self.head(self.trunk(x)))

    def loss(
        self,
        x: Float[Tensor, "batch ..."],
        targets: Int[Tensor, " batch"],
        *,
        partners: Int[Tensor, "folds-1 half"] | None = None,
        e: Float[Tensor, "half folds"] | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """The losses of a batch.

        Args:
            x: inputs, at least four.
            targets: labels.
            partners: positions in the batch of what each sample of the first half is mixed with; random if None.
            e: points of the simplex, uniform if None; for pairs `(e, 1 - e)`.
            generator: source of all draws, on the CPU; torch's global one if None.

        Returns:
            `total`, to be minimised; its terms `classification` and `intrusion`, detached; and, to watch the policy
            (which may come to mix nothing), the `low` and `width` of the regions, detached.

        Raises:
            TypeError: `x` is not floating point, or `targets` not int64.
            ValueError: the batch is too small, a shape does not fit or, on the CPU, a label is out of range.
        """
        if problem := tensor_problem(x=x, targets=targets, partners=partners, e=e):
            raise TypeError(problem)
        if not x.is_floating_point():
            raise TypeError(f"x must be floating point, to be mixed, got {x.dtype}")
        if targets.dtype != torch.int64:
            raise TypeError(f"targets must be torch.int64 (class indices), got {targets.dtype}")
        if targets.numel() and looked_at(targets) and not ((targets >= 0) & (targets < self.num_classes)).all():
            raise ValueError(f"targets must be in [0, {self.num_classes}), got {targets}")
        if len(x) < 4:
            raise ValueError(f"x must hold at least 4 samples, got {len(x)}")
        if targets.shape != x.shape[:1]:
            raise ValueError(f"targets must have shape ({len(x)},), got {tuple(targets.shape)}")
        half, folds = len(x) // 2, cast(int, self.policy.folds)
        if partners is None:
            partners = torch.stack([torch.randperm(len(x), generator=generator)[:half] for _ in range(folds - 1)])
        if e is None:
            e = torch.empty(half, folds).exponential_(generator=generator)
            e = e / e.sum(1, keepdim=True)
        for name, drawn, shape in (("partners", partners, (folds - 1, half)), ("e", e, (half, folds))):
            if drawn.shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(drawn.shape)}")

        own = torch.arange(half, device=x.device).unsqueeze(0)
        groups = torch.cat([own, partners.to(x.device)])
        parts = x[groups]
        region = Region.from_logits(self.policy(parts, generator=generator))
        weights = region.weights(e.to(x))
        onehot = F.one_hot(targets, self.num_classes).to(x)
        features = self.trunk(torch.cat([mix(parts, weights), x]))

        soft = torch.cat([mix(onehot[groups], weights), onehot[:half]])
        classification = F.cross_entropy(self.head(features[: 2 * half]), soft)
        real = (torch.arange(len(features), device=x.device) >= half).long()
        intrusion = F.cross_entropy(self.discriminator(features), real)
        return {
            "total": classification + intrusion,
            "classification": classification.detach(),
            "intrusion": intrusion.detach(),
            "low": region.low.detach(),
            "width": region.width.detach(),
        }
