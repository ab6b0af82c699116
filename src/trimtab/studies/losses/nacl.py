"""Does drawing logits to the classes around a pixel calibrate a segmentation network?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab import losses
from trimtab.studies.study import Claim, Study
from trimtab.studies.tasks.segmentation import Pixelwise, Segmentation
from trimtab.studies.training import Plan

clothes = Segmentation(masks="ambiguous", images=200)


class FocalLoss(nn.Module):
    """Cross-entropy with less weight on what is predicted well (Lin et al., 2017)."""

    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        fit = F.cross_entropy(logits, targets, reduction="none")
        return ((1 - (-fit).exp()).clamp_min(0) ** self.gamma * fit).mean()


class MarginLabelSmoothing(nn.Module):
    """Cross-entropy that keeps all logits within a margin of the largest (MbLS, Liu et al., 2022)."""

    def __init__(self, margin: float, alpha: float = 0.1) -> None:
        super().__init__()
        self.margin, self.alpha = margin, alpha

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        gap = torch.relu(logits.amax(1, keepdim=True) - logits - self.margin)
        return F.cross_entropy(logits, targets) + self.alpha * gap.mean()


def label_smoothing(plan: Plan, mass: float) -> nn.Module:
    """Cross-entropy with this mass spread over all classes, everywhere alike."""
    return Pixelwise(nn.CrossEntropyLoss(label_smoothing=mass))


def focal(plan: Plan, gamma: float) -> nn.Module:
    """Focal loss of this power."""
    return Pixelwise(FocalLoss(gamma))


def mbls(plan: Plan, margin: float) -> nn.Module:
    """Margin-based label smoothing with this margin."""
    return Pixelwise(MarginLabelSmoothing(margin))


def svls(plan: Plan, sigma: float) -> nn.Module:
    """Label smoothing by neighbours with a Gaussian of this width."""
    return Pixelwise(losses.SVLSLoss(plan.num_classes, sigma=sigma))


def nacl(plan: Plan, alpha: float) -> nn.Module:
    """NACL of this weight."""
    return Pixelwise(losses.NACLLoss(plan.num_classes, alpha=alpha))


study = Study(
    paper="nacl",
    arms={
        "cross-entropy": clothes.train(),
        "label smoothing": clothes.train(label_smoothing, knobs=(0.03, 0.1, 0.3)),
        "focal loss": clothes.train(focal, knobs=(1.0, 2.0, 3.0)),
        "MbLS": clothes.train(mbls, knobs=(3.0, 5.0, 10.0)),
        "SVLS": clothes.train(svls, knobs=(0.5, 1.0, 2.0)),
        "NACL": clothes.train(nacl, knobs=(0.03, 0.1, 0.3)),
    },
    claims=[
        Claim(
            "NACL",
            below="cross-entropy",
            on="ece",
            times=1 / 0.7,
            text="NACL: calibration error is at least 30 % below cross-entropy's",
        ),
        Claim("NACL", below="cross-entropy", on="classwise_ece"),
        Claim("NACL", beats="cross-entropy", on="dice", by=-0.005),
        *(Claim("NACL", below=other, on="ece") for other in ("label smoothing", "focal loss", "MbLS", "SVLS")),
    ],
    seeds={"laptop": 6},
    notes=(
        "200 training and 300 test images of 28 x 28 pixels with clothes of Fashion-MNIST, of half size, on textured "
        "ground, blurred; annotators, of the training and of the test "
        "masks, put the border anywhere between a garment's first and last trace, so that near borders no network can "
        "be sure. A small U-Net, Adam, the same for every arm. Cross-entropy has no strength; every other arm chooses "
        "one of three (the smoothed mass, focal's gamma, MbLS's margin at its weight of 0.1, the width of SVLS's "
        "Gaussian, NACL's weight) by the cross-entropy on validation images, in trainings of a third of the length. "
        "NACL has the authors' window of three pixels, L1 distance and raw logits, and counts what lies outside the "
        "image as ground, as their code does."
    ),
)
