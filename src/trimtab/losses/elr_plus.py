r"""ELR+: early-learning regularisation with two networks, averaged weights and mixup.

The paper's stronger form, for when wrong labels are many and training two networks is affordable. Each network $a$ is
trained on mixtures of samples, and the running average of a sample's predictions comes from the averaged weights of
the *other* network $b$ on the sample itself:

$$
t_i \leftarrow \beta\, t_i + (1 - \beta)\, p_{\bar\theta_b}(x_i), \qquad
q_i = \ell\, t_i + (1 - \ell)\, t_j, \qquad
\tilde x_i = \ell x_i + (1 - \ell) x_j, \qquad
\tilde y_i = \ell y_i + (1 - \ell) y_j
$$

$$
\mathcal{L}_a = \frac{1}{n} \sum_i \Bigl( -\tilde y_i^{\!\top} \log p_{\theta_a}(\tilde x_i)
+ \lambda \log\bigl(1 - \langle q_i, p_{\theta_a}(\tilde x_i) \rangle\bigr) \Bigr), \qquad
\bar\theta \leftarrow \gamma\, \bar\theta + (1 - \gamma)\, \theta
$$

with $\ell = \max(\ell', 1 - \ell')$, $\ell' \sim \mathrm{Beta}(\alpha, \alpha)$, and $j$ a random partner of $i$.

Reference: Liu, Niles-Weed, Razavian, Fernandez-Granda, "Early-Learning Regularization Prevents Memorization of Noisy
Labels", NeurIPS 2020, arXiv 2007.00151. The authors' release trains one network for an epoch and then the other; here
both step on each batch, each with a mixture of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from trimtab.losses.checks import checked_logits
from trimtab.losses.elr import elr_penalty
from trimtab.losses.two_networks import TwoNetworks
from trimtab.ops.arguments import (
    class_indices,
    in_range,
    indices,
    integer,
    non_negative,
    real_problem,
    same_shape,
    tensor_problem,
)
from trimtab.ops.rampup import sigmoid_rampup
from trimtab.ops.sample_memory import Repeats, SampleMemory


class Mixture(NamedTuple):
    """How a batch is mixed: `weight * x + (1 - weight) * x[partner]`.

    Attributes:
        weight: share of the sample itself, in [0.5, 1].
        partner: positions in the batch, shape `(batch,)`.
    """

    weight: float
    partner: Int[Tensor, " batch"]

    def __call__(self, values: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """The values of the batch, mixed."""
        return self.weight * values + (1 - self.weight) * values[self.partner]


def draw_mixture(batch: int, alpha: float, generator: torch.Generator | None = None) -> Mixture:
    """A mixture as mixup draws it, with the larger share for the sample itself; `alpha=0` mixes nothing.

    Example:
        >>> mixture = draw_mixture(4, alpha=1.0, generator=torch.Generator().manual_seed(0))
        >>> 0.5 <= mixture.weight <= 1, sorted(mixture.partner.tolist())
        (True, [0, 1, 2, 3])
    """
    if non_negative("alpha", alpha) == 0:
        return Mixture(1.0, torch.arange(batch))
    gammas = torch._standard_gamma(torch.full((2,), alpha, dtype=torch.float64), generator=generator)
    # Where both draws have left the range of numbers, for a tiny alpha, so has the smaller share.
    share = float(gammas[0] / gammas.sum()) if gammas.max() > 1e-300 else 1.0
    return Mixture(max(share, 1 - share), torch.randperm(batch, generator=generator))


def elr_plus_loss(
    logits: Float[Tensor, "batch classes"],
    soft_targets: Float[Tensor, "batch classes"],
    past: Float[Tensor, "batch classes"],
    *,
    lam: float = 3.0,
    reweight: bool = False,
) -> Float[Tensor, ""]:
    """Cross-entropy with soft targets and the early-learning regulariser: the objective of one network.

    Args:
        logits: scores on the mixed batch.
        soft_targets: mixed one-hot labels.
        past: mixed averages of past predictions, constants.
        lam: weight of the regulariser.
        reweight: multiply the targets by `past` and normalise them, as the authors' release does on CIFAR-100. A row
            whose product is zero, as on a sample's first visit, keeps its targets.

    Raises:
        TypeError: an argument is no real tensor.
        ValueError: if the shapes differ, the batch is empty, or `lam` is negative or not finite.

    Example:
        >>> uniform = torch.full((1, 10), 0.1)
        >>> elr_plus_loss(torch.zeros(1, 10), uniform, 0.3 * uniform)  # log(10) + 3 log(1 - 0.03)
        tensor(2.2112)
    """
    if problem := tensor_problem(logits=logits, soft_targets=soft_targets, past=past):
        raise TypeError(problem)
    same_shape("soft_targets", soft_targets, "logits", logits)
    if logits.numel() == 0:
        raise ValueError(f"logits must hold at least one sample, got shape {tuple(logits.shape)}")
    non_negative("lam", lam)
    if reweight:
        product = soft_targets * past
        mass = product.sum(1, keepdim=True)
        soft_targets = torch.where(mass > 0, product / torch.where(mass > 0, mass, 1.0), soft_targets)
    return F.cross_entropy(logits, soft_targets) + lam * elr_penalty(logits.softmax(1), past)


class ELRPlus(TwoNetworks):
    """Trains two networks by ELR+; call `step` on each batch and `predict` at the end.

    With `lam=0` and `mixup_alpha=0` each network is trained by plain cross-entropy. The averaged networks run in
    training mode, as in the authors' release, so that batch normalisation sees the unmixed batch.

    Args:
        networks: two networks of independent initialisation, on their device.
        optimizers: one for each network's parameters; their schedules are the caller's.
        num_samples: size of the training set.
        num_classes: number of classes.
        lam: weight of the regulariser; the authors use 3 on CIFAR-10, 7 on CIFAR-100.
        beta: momentum of the averaged predictions, in [0, 1); the authors use 0.7 and 0.9.
        mixup_alpha: parameter of the Beta distribution; 0 for no mixing.
        ema_decay: momentum of the averaged weights, in [0, 1).
        ema_rampup: steps over which `ema_decay` is reached (sigmoid ramp-up).
        lam_rampup: steps over which `lam` is reached; the authors use 0 on CIFAR-10, 40,000 on CIFAR-100.
        reweight: see `elr_plus_loss`.
        repeats: what to do with a sample that comes more than once in a batch, see `SampleMemory`: "refuse", or "mean"
            for samplers with replacement and padded distributed batches.
        generator: source of the mixtures, on the CPU; torch's global one where it is None.

    Attributes:
        averages: the two `torch.optim.swa_utils.AveragedModel` copies.
        memories: per network, the averages of the other one's predictions.

    Raises:
        ValueError: if there are not two of each, or an option is out of range.

    Example:
        >>> networks = [nn.Linear(5, 3), nn.Linear(5, 3)]
        >>> optimizers = [torch.optim.SGD(network.parameters(), lr=0.02) for network in networks]
        >>> rule = ELRPlus(networks, optimizers, num_samples=100, num_classes=3)
        >>> losses = rule.step(torch.randn(8, 5), torch.arange(8) % 3, index=torch.arange(8))
        >>> sorted(losses), rule.predict(torch.randn(2, 5)).shape
        (['loss_0', 'loss_1'], torch.Size([2, 3]))
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
        num_samples: int,
        num_classes: int,
        *,
        lam: float = 3.0,
        beta: float = 0.7,
        mixup_alpha: float = 1.0,
        ema_decay: float = 0.997,
        ema_rampup: int = 40_000,
        lam_rampup: int = 0,
        reweight: bool = False,
        repeats: Repeats = "refuse",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(networks, optimizers)
        if integer("num_classes", num_classes) < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.lam = non_negative("lam", lam)
        self.beta = in_range("beta", beta, 0, 1, "left")
        self.mixup_alpha = non_negative("mixup_alpha", mixup_alpha)
        self.lam_rampup = integer("lam_rampup", lam_rampup, 0)
        update = partial(_ramped, in_range("ema_decay", ema_decay, 0, 1, "left"), integer("ema_rampup", ema_rampup, 0))
        self.averages = [AveragedModel(network, multi_avg_fn=update).train() for network in networks]
        self.memories = [
            SampleMemory(num_samples, num_classes, repeats=repeats).to(next(network.parameters()).device)
            for network in networks
        ]
        self.num_classes = num_classes
        self.reweight = reweight
        self.generator = generator
        self.steps = 0

    def step(
        self,
        x: Float[Tensor, "batch ..."],
        targets: Int[Tensor, " batch"],
        index: Int[Tensor, " batch"],
        mixtures: Sequence[Mixture] | None = None,
    ) -> dict[str, Tensor]:
        """One step of both networks, of their averaged weights and of the memories.

        Args:
            x: inputs, on the networks' device.
            targets: labels, wrong ones among them.
            index: the samples' positions in the training set.
            mixtures: one per network; drawn where they are None.

        Returns:
            The networks' losses, `loss_0` and `loss_1`, detached.

        Raises:
            TypeError: if a dtype is wrong (logits floating point, `targets` and `index` int64).
            ValueError: if shapes do not fit, the batch is empty, a label or an index is out of range, an index is
                repeated where that is refused, or `mixtures` are not two of this batch. Nothing has then changed.
        """
        if problem := real_problem(x=x):
            raise TypeError(problem)
        # All that may be refused is looked at first: the teachers' statistics, the memories and the draws would move.
        class_indices("targets", targets)
        if problem := tensor_problem(index=index):
            raise TypeError(problem)
        if len(x) != len(targets):
            raise ValueError(f"targets must be {len(x)} labels, one per sample of x, got {len(targets)}")
        if index.shape != targets.shape:
            raise ValueError(f"index must be of shape {tuple(targets.shape)} as targets, got {tuple(index.shape)}")
        if mixtures is not None:
            _check_mixtures(mixtures, len(x))
        self.memories[0].check(index)
        indices("targets", targets, self.num_classes)
        if mixtures is None:
            mixtures = [draw_mixture(len(x), self.mixup_alpha, self.generator) for _ in self.networks]
        # Both teachers speak before either network moves.
        pasts = []
        for memory, teacher in zip(self.memories, reversed(self.averages), strict=True):
            with torch.no_grad():
                logits = checked_logits(teacher(x), targets, index=index, num_classes=self.num_classes)
            pasts.append(memory.average(index, logits.softmax(1), self.beta))
        onehot = F.one_hot(targets, self.num_classes).to(logits.dtype)
        lam = self.lam * sigmoid_rampup(self.steps + 1, self.lam_rampup)

        def objective(number: int, network: nn.Module) -> Tensor:
            mix = mixtures[number]
            logits = checked_logits(network(mix(x)), targets, num_classes=self.num_classes)
            return elr_plus_loss(logits, mix(onehot), mix(pasts[number]), lam=lam, reweight=self.reweight)

        result = self.descend(objective)
        for average, network in zip(self.averages, self.networks, strict=True):
            average.update_parameters(network)
        self.steps += 1
        return result

    def state_dict(self) -> dict[str, Any]:
        """All that training needs to go on exactly where it stopped."""
        return {
            **super().state_dict(),
            **{part: [holder.state_dict() for holder in getattr(self, part)] for part in ("averages", "memories")},
            "steps": self.steps,
            "generator": None if self.generator is None else self.generator.get_state(),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        self._restore_parts(state, "averages", "memories")
        self.steps = state["steps"]
        if self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"])


def _check_mixtures(mixtures: Sequence[Mixture], batch: int) -> None:
    if len(mixtures) != 2:
        raise ValueError(f"mixtures must be two, one per network, got {len(mixtures)}")
    for weight, partner in mixtures:
        in_range("mixtures", weight, 0, 1)
        class_indices("mixtures", partner)
        if partner.shape != (batch,):
            raise ValueError(f"mixtures must have a partner for each of {batch} samples, got {tuple(partner.shape)}")
        indices("mixtures", partner, batch)


@torch.no_grad()
def _ramped(decay: float, length: int, averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor) -> None:
    """Exponential averaging whose momentum rises to `decay`, in the form that `AveragedModel` calls."""
    momentum = decay * sigmoid_rampup(int(num_averaged) + 1, length)
    torch._foreach_lerp_(averaged, current, 1 - momentum)
