r"""Domain-specific risk minimisation: a head for every source domain, and the right mixture of them for each sample.

For classifiers that meet domains they were not trained on. One encoder carries a linear head for each of $K$ source
domains and one for all; at test time a gap $g_h(x)$ of each head, by default the entropy of its prediction, says how
far it is from the sample, and either the head of least gap answers or all do, weighted:

$$
\mathcal{L} = \frac1K \sum_{d=1}^K \tfrac12 \bigl[ \ell(h_d f(x_d), y_d) + \ell(h_{K+1} f(x_d), y_d) \bigr],
\qquad
p(x) = \sum_h \frac{g_h(x)^{-\gamma}}{\sum_j g_j(x)^{-\gamma}} \, \mathrm{softmax}\, h(f(x)) .
$$

`DRMSteering` moves the heads, or all weights, on each arriving batch towards pseudo-labels that it is sure of.

Reference: Yi-Fan Zhang, Jindong Wang, Jian Liang, Zhang Zhang, Baosheng Yu, Liang Wang, Dacheng Tao and Xing Xie,
"Domain-Specific Risk Minimization for Out-of-Distribution Generalization", KDD 2023, arXiv 2208.08661. The authors'
release weighs all heads and adds up all but the last; here the weights of those that answer sum to one. Its
confidences are a softmax of probabilities; here they are the probabilities.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.domain.environments import checked_domains
from trimtab.ops.arguments import (
    floating_tensor,
    indices,
    integer,
    non_negative,
    one_of,
    positive,
    real_problem,
)
from trimtab.ops.attack import eval_mode
from trimtab.ops.states import fits
from trimtab.ops.whole_state import WholeState

Gap = Literal["entropy", "discriminator", "prototype"]
_TINY = 1e-12


def head_entropy(logits: Float[Tensor, "... heads classes"]) -> Float[Tensor, "... heads"]:
    """Entropy of each head's prediction, in nats: its gap where nothing else is known.

    Example:
        >>> head_entropy(torch.zeros(1, 2)).exp()
        tensor([2.])
    """
    logits = floating_tensor("logits", logits)
    entropy: Tensor = torch.special.entr(logits.softmax(-1)).sum(-1)
    return entropy


def prototype_gap(
    z: Float[Tensor, "batch dim"], prototypes: Float[Tensor, "domains dim"], p: float | None = None
) -> Float[Tensor, "batch domains"]:
    """Distance of features from the mean feature of each domain.

    Args:
        z: features.
        prototypes: means.
        p: of the norm; None takes one minus the cosine.

    Raises:
        TypeError: features or prototypes are not floating point.
        ValueError: the widths differ, or `p` is below 1.

    Example:
        >>> prototype_gap(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), p=2)
        tensor([[5.]])
    """
    if problem := real_problem(z=z, prototypes=prototypes):
        raise TypeError(problem)
    if not (z.is_floating_point() and prototypes.is_floating_point()):
        raise TypeError(f"z and prototypes must be floating point, got {z.dtype} and {prototypes.dtype}")
    if z.ndim != 2 or prototypes.ndim != 2 or z.shape[1] != prototypes.shape[1]:
        wanted = "(batch, dim) and (domains, dim)"
        raise ValueError(f"z and prototypes must be {wanted}, got {tuple(z.shape)} and {tuple(prototypes.shape)}")
    if p is None:
        return 1 - F.normalize(z, dim=1) @ F.normalize(prototypes, dim=1).mT
    if not (isinstance(p, float | Real) and p >= 1):
        raise ValueError(f"p must be at least 1, got {p!r}")
    return torch.cdist(floating_tensor("z", z), floating_tensor("prototypes", prototypes), p=p)


def head_weights(gaps: Float[Tensor, "... heads"], gamma: float | None = None) -> Float[Tensor, "... heads"]:
    """How much each head has to say.

    Args:
        gaps: at least 0; infinite for a head that has nothing to say.
        gamma: weights are the gaps to the power of minus it, over their sum; 0 is uniform. None takes the head of
            least gap alone.

    Raises:
        TypeError: `gaps` is not floating point.
        ValueError: `gamma` is negative.

    Example:
        >>> head_weights(torch.tensor([0.5, 1.0]), gamma=1.0)
        tensor([0.6667, 0.3333])
        >>> head_weights(torch.tensor([0.5, 1.0]))
        tensor([1., 0.])
    """
    if not isinstance(gaps, Tensor) or not gaps.is_floating_point():
        raise TypeError(f"gaps must be a floating-point tensor, got {type(gaps).__name__}")
    if gamma is None:
        return F.one_hot(gaps.argmin(-1), gaps.shape[-1]).to(gaps)
    if non_negative("gamma", gamma) == 0:
        there = gaps.isfinite().to(gaps)
        return there / there.sum(-1, keepdim=True)
    return (-gamma * gaps.clamp(min=_TINY).log()).softmax(-1)


class DomainHeads(WholeState, nn.Module):
    """An encoder with a head for each source domain and one for all, the last.

    In eval mode a call gives log-probabilities by the gaps; in training mode, the logits of the head for all.

    Args:
        features: the encoder, x -> (batch, dim).
        dim: width of its features.
        num_classes: number of classes.
        num_domains: number of source domains, K.
        gamma: of the weights, see `head_weights`; None picks the best head.
        gap: "entropy" of each head; "discriminator", one over the probability that a domain classifier, trained on
            detached features, gives to the head's domain; or "prototype", the cosine distance from the domain's mean
            feature, after `fit_prototypes`. The latter two leave the head for all out.
        by_batch: whether gaps are averaged over the batch, as in the authors' training code; then all samples of a
            batch are answered by the same weights.

    Attributes:
        heads: one linear map to all heads' logits, (num_domains + 1) x num_classes.
        discriminator: the domain classifier, or None.
        prototypes: (num_domains, dim), a buffer.

    Raises:
        TypeError: an argument is of another type.
        ValueError: a size is not positive, `gamma` is negative, or `gap` is unknown.

    Example:
        >>> model = DomainHeads(nn.Identity(), dim=4, num_classes=3, num_domains=2)
        >>> batches = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(2)]
        >>> sorted(model.loss(batches)), model.eval()(torch.randn(5, 4)).exp().sum(1).round().tolist()
        (['own', 'shared', 'total'], [1.0, 1.0, 1.0, 1.0, 1.0])
    """

    prototypes: Tensor

    def __init__(
        self,
        features: nn.Module,
        dim: int,
        num_classes: int,
        num_domains: int,
        *,
        gamma: float | None = None,
        gap: Gap = "entropy",
        by_batch: bool = False,
    ) -> None:
        super().__init__()
        self.num_classes = integer("num_classes", num_classes, 2)
        self.num_domains = integer("num_domains", num_domains)
        self.gamma = None if gamma is None else non_negative("gamma", gamma)
        self.gap: Gap = one_of("gap", gap, ("entropy", "discriminator", "prototype"))
        self.by_batch = bool(by_batch)
        self.features = features
        self.heads = nn.Linear(integer("dim", dim), (num_domains + 1) * num_classes)
        self.discriminator = nn.Linear(dim, num_domains) if gap == "discriminator" else None
        self.register_buffer("prototypes", torch.zeros(num_domains, dim))

    def logits(self, z: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch heads classes"]:
        """All heads' logits of features, the head for all last."""
        if problem := real_problem(z=z):
            raise TypeError(problem)
        found = floating_tensor("heads(z)", self.heads(z))
        return found.view(len(z), self.num_domains + 1, self.num_classes)

    def loss(self, batches: Sequence[tuple[Float[Tensor, "batch ..."], Int[Tensor, " batch"]]]) -> dict[str, Tensor]:
        """The objective of a batch from each domain, in their order: `total`, and its parts, detached.

        Raises:
            TypeError: an entry is no pair of tensors, or labels are not int64.
            ValueError: there are not `num_domains` entries, one is empty or of another shape, or a label is out of
                range.
        """
        held = checked_domains(batches)
        if len(held) != self.num_domains:
            raise ValueError(f"batches must be of {self.num_domains} domains, got {len(held)}")
        targets = [y for _, y in held]
        for y in targets:
            indices("y", y, self.num_classes)
        sizes = [len(y) for y in targets]
        z = floating_tensor("features(x)", self.features(torch.cat([x for x, _ in held])))
        parts = list(zip(self.logits(z).split(sizes), targets, strict=True))
        own = torch.stack([F.cross_entropy(said[:, d], y) for d, (said, y) in enumerate(parts)]).mean()
        shared = torch.stack([F.cross_entropy(said[:, -1], y) for said, y in parts]).mean()
        total, found = 0.5 * (own + shared), {"own": own.detach(), "shared": shared.detach()}
        if self.discriminator is not None:
            domain = torch.arange(self.num_domains, device=z.device).repeat_interleave(
                torch.tensor(sizes, device=z.device), output_size=sum(sizes)
            )
            apart = F.cross_entropy(self.discriminator(z.detach()), domain)
            total, found["domain"] = total + apart, apart.detach()
        return {"total": total, **found}

    @torch.no_grad()
    def fit_prototypes(self, domains: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Takes the mean feature of each domain; the authors average the last batches of the training.

        Raises:
            TypeError, ValueError: as the loss.
        """
        held = checked_domains(domains)
        if len(held) != self.num_domains:
            raise ValueError(f"domains must be {self.num_domains}, got {len(held)}")
        with eval_mode(self.features):
            self.prototypes.copy_(torch.stack([self.features(x).mean(0) for x, _ in held]))

    def weights(self, z: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch heads"]:
        """How much each head has to say about each sample."""
        return self._weights(z, self.logits(z))

    def _weights(self, z: Tensor, logits: Float[Tensor, "batch heads classes"]) -> Float[Tensor, "batch heads"]:
        if self.gap == "entropy":
            gaps = head_entropy(logits)
        else:
            if self.discriminator is not None:
                gaps = (-self.discriminator(z).log_softmax(1)).exp()
            else:
                gaps = prototype_gap(z, self.prototypes).clamp(min=0)
            gaps = F.pad(gaps, (0, 1), value=math.inf)
        if self.by_batch:
            gaps = gaps.mean(0, keepdim=True).expand_as(gaps)
        return head_weights(gaps, self.gamma)

    def probabilities(self, z: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch classes"]:
        """The heads' mixture on features; rows that sum to one."""
        logits = self.logits(z)
        return (self._weights(z, logits)[:, :, None] * logits.softmax(2)).sum(1)

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        """Log-probabilities of the mixture in eval mode, logits of the head for all in training mode."""
        z = floating_tensor("features(x)", self.features(x))
        return self.logits(z)[:, -1] if self.training else self.probabilities(z).clamp(min=_TINY).log()


class DRMSteering:
    """Online steering: answers a batch, and then moves the heads towards what it is sure of.

    Args:
        model: trained heads; they are changed in place, and `reset` brings them back. The encoder stays in eval mode.
        scheme: whose pseudo-labels: "drm" the mixture's, "last" the head's for all, "uniform" the mean of all heads',
            or "own" each head its own.
        threshold: samples count whose pseudo-label has at least this probability; above 1 nothing is ever learned.
        steps: gradient steps a batch.
        lr: of Adam; the authors try 0.1, 1 and 10 times that of the training.
        params: "heads", or "all" for the encoder as well.

    Raises:
        TypeError: an argument is of another type.
        ValueError: a number is out of range, or a choice unknown.

    Example:
        >>> model = DomainHeads(nn.Identity(), dim=4, num_classes=3, num_domains=2)
        >>> steering = DRMSteering(model, threshold=0.5)
        >>> steering.predict(torch.randn(5, 4)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        model: DomainHeads,
        *,
        scheme: Literal["drm", "last", "uniform", "own"] = "drm",
        threshold: float = 0.75,
        steps: int = 1,
        lr: float = 1e-3,
        params: Literal["heads", "all"] = "heads",
    ) -> None:
        if not isinstance(model, DomainHeads):
            raise TypeError(f"model must be DomainHeads, got {type(model).__name__}")
        self.scheme = one_of("scheme", scheme, ("drm", "last", "uniform", "own"))
        self.threshold = non_negative("threshold", threshold)
        self.steps = integer("steps", steps)
        self.params = one_of("params", params, ("heads", "all"))
        self.model = model
        chosen = [*model.heads.parameters(), *(model.features.parameters() if params == "all" else [])]
        self.optimizer = torch.optim.Adam(chosen, lr=positive("lr", lr))
        self.start = copy.deepcopy(self._state())

    def predict(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        """Probabilities of a batch, by the weights as they were before it."""
        with eval_mode(self.model):
            answer: Tensor | None = None
            for _ in range(self.steps):
                with torch.set_grad_enabled(self.params == "all"):
                    z = floating_tensor("features(x)", self.model.features(x))
                if answer is None:
                    with torch.no_grad():
                        answer = self.model.probabilities(z)
                if len(z) and self.threshold <= 1:
                    self._step(z)
        assert answer is not None
        return answer

    def loss(self, z: Float[Tensor, "batch dim"]) -> Tensor:
        """The objective of a batch of features: each head's cross-entropy to the pseudo-labels, summed over heads."""
        if problem := real_problem(z=z):
            raise TypeError(problem)
        logits = self.model.logits(z)
        heads = logits.shape[1]
        with torch.no_grad():
            each = logits.softmax(2)
            if self.scheme == "own":
                label_probs = each
            else:
                teacher = {
                    "drm": lambda: self.model.probabilities(z),
                    "last": lambda: each[:, -1],
                    "uniform": lambda: each.mean(1),
                }[self.scheme]()
                label_probs = teacher[:, None].expand_as(each)
            sure, label = label_probs.max(2)
            kept = (sure >= self.threshold).to(logits)
        entropy = F.cross_entropy(logits.flatten(0, 1), label.flatten(), reduction="none").view(-1, heads)
        return ((entropy * kept).sum(0) / kept.sum(0).clamp(min=1)).sum()

    def reset(self) -> None:
        """Back to how the model was when steering began."""
        self.load_state_dict(self.start)

    def state_dict(self) -> dict[str, Any]:
        """The model's and the optimizer's."""
        return copy.deepcopy(self._state())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a state of `state_dict`; one that does not fit changes nothing.

        Raises:
            ValueError: it is of another model.
        """
        if state.keys() != {"model", "optimizer"} or not fits(state["model"], self.model.state_dict()):
            raise ValueError("state must be of steering this model, got another")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))

    def _step(self, z: Tensor) -> None:
        with torch.enable_grad():
            loss = self.loss(z)
            if not bool(loss > 0):  # nobody is sure: not even momentum moves anything
                return
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                p.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
