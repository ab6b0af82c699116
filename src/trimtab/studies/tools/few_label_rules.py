"""What everyone would want to see beside a semi-supervised method: rules that train from labelled images and views.

Each is a module with `forward(x)`, the logits, and `loss(x, targets, weak, strong)`, a dictionary with "total" and,
where some unlabelled images are left out, "used", the share of those that are not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.optim.adamixup import mixup

Losses = dict[str, Tensor]


class Predictor(nn.Module):
    """A network whose prediction is the rule's.

    Args:
        network: from images to logits.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        logits: Tensor = self.network(x)
        return logits


class LabelledOnly(Predictor):
    """Cross-entropy on the labelled images alone."""

    def loss(self, x: Tensor, targets: Int[Tensor, " batch"], weak: Tensor, strong: Tensor) -> Losses:
        return {"total": F.cross_entropy(self(x), targets), "used": x.new_zeros(())}


class PseudoLabel(Predictor):
    """Takes the confident predictions on weak views for labels of the same views (Lee, 2013).

    Args:
        network: from images to logits.
        threshold: least probability of a prediction that counts.
    """

    def __init__(self, network: nn.Module, threshold: float = 0.95) -> None:
        super().__init__(network)
        self.threshold = threshold

    def loss(self, x: Tensor, targets: Int[Tensor, " batch"], weak: Tensor, strong: Tensor) -> Losses:
        labelled, logits = self(torch.cat([x, weak])).split([len(x), len(weak)])
        sure, guess = logits.detach().softmax(1).max(1)
        used = (sure >= self.threshold).float()
        learned = (used * F.cross_entropy(logits, guess, reduction="none")).mean()
        return {"total": F.cross_entropy(labelled, targets) + learned, "used": used.mean()}


class FixMatch(Predictor):
    """Takes the confident predictions on weak views for labels of the strong views (Sohn et al., NeurIPS 2020).

    Args:
        network: from images to logits.
        threshold: least probability of a prediction that counts.
        align: makes the predictions even over the classes before they count.
    """

    def __init__(self, network: nn.Module, threshold: float = 0.95, align: nn.Module | None = None) -> None:
        super().__init__(network)
        self.threshold, self.align = threshold, align

    def loss(self, x: Tensor, targets: Int[Tensor, " batch"], weak: Tensor, strong: Tensor) -> Losses:
        logits, seen, learning = self(torch.cat([x, weak, strong])).split([len(x), len(weak), len(strong)])
        probs = seen.detach().softmax(1)
        if self.align is not None:
            probs = self.align(probs)
        sure, guess = probs.max(1)
        used = (sure >= self.threshold).float()
        learned = (used * F.cross_entropy(learning, guess, reduction="none")).mean()
        return {"total": F.cross_entropy(logits, targets) + learned, "used": used.mean()}


class MixMatch(Predictor):
    """Sharpens the mean prediction on weak views, and learns from mixtures of everything (Berthelot et al., 2019).

    Its second weak view is the strong one's place: `strong` is another weak view.

    Args:
        network: from images to logits.
        generator: source of the mixtures.
        weight: of the unlabelled images, reached after `rampup` steps.
        rampup: number of steps.
        temperature: of the sharpening.
        alpha: of the mixtures.
    """

    def __init__(
        self,
        network: nn.Module,
        generator: torch.Generator,
        weight: float = 75.0,
        rampup: int = 100,
        temperature: float = 0.5,
        alpha: float = 0.75,
    ) -> None:
        super().__init__(network)
        self.generator, self.weight, self.rampup = generator, weight, rampup
        self.temperature, self.alpha = temperature, alpha
        self.step = 0

    def loss(self, x: Tensor, targets: Int[Tensor, " batch"], weak: Tensor, strong: Tensor) -> Losses:
        with torch.no_grad():
            mean = sum(self(view).softmax(1) for view in (weak, strong)) / 2
            sharp: Tensor = mean ** (1 / self.temperature)
            sharp = sharp / sharp.sum(1, keepdim=True)
        onehot = F.one_hot(targets, sharp.shape[1]).to(sharp)
        everything, labels = torch.cat([x, weak, strong]), torch.cat([onehot, sharp, sharp])
        mixed, soft = mixup(everything, labels, self.alpha, generator=self.generator)
        logits = self(mixed)
        labelled, unlabelled = logits[: len(x)], logits[len(x) :].softmax(1)
        weight = self.weight * min(1.0, self.step / self.rampup)
        self.step += 1
        total = F.cross_entropy(labelled, soft[: len(x)]) + weight * F.mse_loss(unlabelled, soft[len(x) :])
        return {"total": total, "used": x.new_ones(())}
