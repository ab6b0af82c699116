"""A convolutional network over the steps of a series."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor, nn


class SeriesNet(nn.Module):
    """Residual convolutions over time, with steps past a series' end kept out.

    Args:
        in_features: numbers a step.
        out_features: numbers out, a step or, pooled, a series.
        hidden: width.
        blocks: residual blocks; each looks twice as far as the one before.
        pooled: average over the steps that a series has.

    Example:
        >>> import torch
        >>> valid = torch.tensor([[True, True, False], [True, True, True]])
        >>> SeriesNet(4, 5)(torch.zeros(2, 3, 4), valid).shape, SeriesNet(4, 5, pooled=True)(torch.zeros(2, 3, 4)).shape
        (torch.Size([2, 3, 5]), torch.Size([2, 5]))
    """

    def __init__(
        self, in_features: int, out_features: int, *, hidden: int = 32, blocks: int = 2, pooled: bool = False
    ) -> None:
        super().__init__()
        self.pooled = pooled
        self.embed = nn.Conv1d(in_features, hidden, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Conv1d(hidden, hidden, 3, padding=2**depth, dilation=2**depth) for depth in range(blocks)
        )
        self.head = nn.Linear(hidden, out_features)

    def forward(
        self, x: Float[Tensor, "batch steps features"], valid: Bool[Tensor, "batch steps"] | None = None
    ) -> Tensor:
        present = x.new_ones(x.shape[:2]) if valid is None else valid.to(x)
        present = present[:, None, :]
        h = (self.embed(x.transpose(1, 2) * present)).tanh() * present
        for block in self.blocks:
            h = (h + block(h).relu()) * present
        if self.pooled:
            pooled: Tensor = self.head(h.sum(2) / present.sum(2).clamp_min(1))
            return pooled
        steps: Tensor = self.head(h.transpose(1, 2))
        return steps
