"""Losses of segmentation that everyone would want to see beside a new one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.losses.segmentation import dice_loss


class FocalLoss(nn.Module):
    """Cross-entropy with less weight on what is predicted well (Lin et al., 2017)."""

    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        entropy = F.cross_entropy(logits, targets, reduction="none")
        return ((1 - (-entropy).exp()).clamp_min(0) ** self.gamma * entropy).mean()


class MarginLabelSmoothing(nn.Module):
    """Cross-entropy that keeps all logits within a margin of the largest (MbLS, Liu et al., 2022)."""

    def __init__(self, margin: float, alpha: float = 0.1) -> None:
        super().__init__()
        self.margin, self.alpha = margin, alpha

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        gap = torch.relu(logits.amax(1, keepdim=True) - logits - self.margin)
        return F.cross_entropy(logits, targets) + self.alpha * gap.mean()


class DiceAndCrossEntropy(nn.Module):
    """Half of each."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return (dice_loss(logits, targets) + F.cross_entropy(logits, targets)) / 2
