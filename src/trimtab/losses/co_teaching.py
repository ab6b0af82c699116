r"""Co-teaching: two networks that learn from the samples the other one finds easy.

For labels of which many are wrong, where two trainings are affordable. A network fits right labels before wrong ones,
so samples of small loss are mostly right; letting the *peer* choose them keeps a network from confirming its own
mistakes.

$$
R_b = \operatorname*{arg\,min}_{S \subset B,\ |S| = \lfloor (1 - r) |B| \rfloor}\ \sum_{i \in S} \ell(f_b(x_i), y_i),
\qquad
\theta_a \leftarrow \theta_a - \eta\, \nabla_{\theta_a} \frac{1}{|R_b|} \sum_{i \in R_b} \ell(f_a(x_i), y_i)
\qquad (a \neq b)
$$

with the forget rate $r$ rising from 0 over the first epochs, or constant where both networks are trained already.

Reference: Han, Yao, Yu, Niu, Xu, Hu, Tsang, Sugiyama, "Co-teaching: Robust Training of Deep Neural Networks with
Extremely Noisy Labels", NeurIPS 2018, arXiv 1804.06872. As in "Compressing Features for Learning with Noisy Labels"
(`trimtab.losses.nested_dropout`), losses are compared in eval mode, before either network moves; there each network
chooses from a half of the batch of its own, here both choose from all of it, as in the first paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trimtab.losses.checks import checked_logits
from trimtab.losses.two_networks import TwoNetworks
from trimtab.ops.arguments import in_range, integer, looked_at, real_problem, tensor
from trimtab.ops.attack import eval_mode


def small_loss_indices(losses: Float[Tensor, " batch"], forget_rate: float) -> Int[Tensor, " kept"]:
    """Positions of the `floor((1 - forget_rate) * batch)` smallest losses, smallest first, and of one at least.

    Args:
        losses: one per sample.
        forget_rate: share of the batch that is left out, in [0, 1).

    Raises:
        ValueError: if `losses` is empty or not one-dimensional, or `forget_rate` is out of range.

    Example:
        >>> small_loss_indices(torch.tensor([0.3, 2.0, 0.1, 0.2]), forget_rate=0.5)
        tensor([2, 3])
    """
    losses = tensor("losses", losses)
    if losses.ndim != 1 or losses.numel() == 0:
        raise ValueError(f"losses must be (batch,), with at least one sample, got shape {tuple(losses.shape)}")
    forget_rate = in_range("forget_rate", forget_rate, 0, 1, "left")
    # 1 - 0.9 is a little less than 0.1, which must not cost a sample.
    kept = max(1, math.floor((1 - forget_rate) * len(losses) + 1e-9))
    return losses.topk(kept, largest=False).indices


class CoTeaching(TwoNetworks):
    """Trains two networks by Co-teaching; call `step` on each batch and `predict` at the end.

    With `forget_rate=0` each network is trained by plain cross-entropy.

    Args:
        networks: two networks of independent initialisation, on their device.
        optimizers: one for each network's parameters; their schedules are the caller's.
        forget_rate: share of a batch that neither network is to learn from, in [0, 1); about the share of wrong
            labels.
        rampup_epochs: epochs over which the forget rate rises from 0, which needs `set_epoch`. Han et al. use 10 of
            200; 0 for networks that are trained already.
        freeze_batch_norm: keep the running statistics of batch normalisation and normalise by them in training too,
            as Chen et al. do when they go on from trained networks.

    Raises:
        ValueError: if there are not two of each, or an option is out of range.

    Example:
        >>> networks = [nn.Linear(5, 3), nn.Linear(5, 3)]
        >>> optimizers = [torch.optim.SGD(network.parameters(), lr=0.02) for network in networks]
        >>> rule = CoTeaching(networks, optimizers, forget_rate=0.25)
        >>> losses = rule.step(torch.randn(8, 5), torch.arange(8) % 3)
        >>> sorted(losses), rule.predict(torch.randn(2, 5)).shape
        (['loss_0', 'loss_1'], torch.Size([2, 3]))
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        forget_rate: float = 0.2,
        rampup_epochs: int = 0,
        freeze_batch_norm: bool = False,
    ) -> None:
        super().__init__(networks, optimizers)
        self.forget_rate = in_range("forget_rate", forget_rate, 0, 1, "left")
        self.rampup_epochs = integer("rampup_epochs", rampup_epochs, 0)
        self.freeze_batch_norm = freeze_batch_norm
        self.epoch: int | None = None if rampup_epochs else 0

    def set_epoch(self, epoch: int) -> None:
        """Call at the start of each epoch (0-based): the forget rate is `forget_rate * min(epoch / rampup_epochs, 1)`.

        Raises:
            ValueError: if `epoch` is negative.
        """
        self.epoch = integer("epoch", epoch, 0)

    def step(self, x: Float[Tensor, "batch ..."], targets: Int[Tensor, " batch"]) -> dict[str, Tensor]:
        """One step of both networks, each on the samples of the batch that the other one chose.

        Args:
            x: inputs, on the networks' device.
            targets: labels, wrong ones among them.

        Returns:
            The networks' losses on those samples, `loss_0` and `loss_1`, detached.

        Raises:
            RuntimeError: if the forget rate is to rise and `set_epoch` has not been called.
            TypeError: if a dtype is wrong (logits floating point, `targets` int64).
            ValueError: if shapes do not fit, the batch is empty or a label is out of range.
        """
        if problem := real_problem(x=x):
            raise TypeError(problem)
        if self.epoch is None:
            raise RuntimeError("CoTeaching: call set_epoch(epoch) before each epoch; the forget rate depends on it")
        forget_rate = self.forget_rate
        if self.epoch < self.rampup_epochs:
            forget_rate *= self.epoch / self.rampup_epochs
        chosen = []
        with torch.no_grad():
            for network in self.networks:
                with eval_mode(network):  # and back, for the step may be refused
                    logits = checked_logits(network(x), targets)
                if looked_at(targets) and ((targets < 0) | (targets >= logits.shape[1])).any():
                    raise ValueError(f"targets must be in [0, {logits.shape[1]}), got {targets.tolist()}"[:200])
                chosen.append(small_loss_indices(F.cross_entropy(logits, targets, reduction="none"), forget_rate))
        chosen.reverse()

        def loss_of_chosen(number: int, network: nn.Module) -> Tensor:
            if self.freeze_batch_norm:
                for layer in network.modules():
                    if isinstance(layer, _BatchNorm):
                        layer.eval()
            kept = chosen[number]
            return F.cross_entropy(checked_logits(network(x[kept]), targets[kept]), targets[kept])

        return self.descend(loss_of_chosen)

    def state_dict(self) -> dict[str, Any]:
        """All that training needs to go on exactly where it stopped."""
        return {**super().state_dict(), "epoch": self.epoch}

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        self.epoch = state["epoch"]
