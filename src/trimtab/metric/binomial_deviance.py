r"""Binomial deviance: a metric loss of all pairs of a batch, smooth and without margins or mining.

$$
L = \frac{1}{|P|} \sum_{P} \log\bigl(1 + e^{-\alpha (S_{ij} - \beta)}\bigr)
+ \frac{1}{|N|} \sum_{N} \log\bigl(1 + e^{\alpha C (S_{ij} - \beta)}\bigr)
$$

over the positive pairs P and the negative pairs N, S the cosine similarity.

Reference: Dong Yi, Zhen Lei, Stan Z. Li, "Deep Metric Learning for Practical Person Re-Identification", ICPR 2014,
arXiv 1407.4979; with the costs of Opitz, Waltner, Possegger, Bischof, "BIER: Boosting Independent Embeddings
Robustly", ICCV 2017.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.metric.pairs import compared
from trimtab.ops.arguments import in_range, positive


class BinomialDevianceLoss(nn.Module):
    """The loss, called `loss(embeddings, labels)`; a part without pairs is zero.

    Args:
        alpha: steepness, positive.
        beta: similarity between the two sides, in [-1, 1].
        negative_cost: C, steepness of the negative pairs relative to that of the positive ones, positive.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> BinomialDevianceLoss()(embeddings, torch.tensor([0, 0, 1]))  # log(1 + 1/e) + log(1 + e^-25)
        tensor(0.3133)
    """

    def __init__(self, alpha: float = 2.0, beta: float = 0.5, negative_cost: float = 25.0) -> None:
        super().__init__()
        self.alpha = positive("alpha", alpha)
        self.beta = in_range("beta", beta, -1, 1)
        self.negative_cost = positive("negative_cost", negative_cost)

    def forward(
        self,
        embeddings: Float[Tensor, "batch dim"],
        labels: Int[Tensor, " batch"],
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Float[Tensor, "refs dim"] | None = None,
        ref_labels: Int[Tensor, " refs"] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss of a batch.

        Args:
            embeddings: one row per sample, of any length; they are normalised here.
            labels: classes.
            indices_tuple, ref_emb, ref_labels: what the miners, CrossBatchMemory and trainers of
                pytorch-metric-learning pass: the pairs that count, and other samples to compare the batch with.

        Raises:
            TypeError: if `embeddings` is not floating point or `labels` not of integer type.
            ValueError: if shapes disagree or the batch is empty.
        """
        similarity, (positive, negative) = compared(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        offset = self.alpha * (similarity - self.beta)
        return _mean(F.softplus(-offset), positive) + _mean(F.softplus(self.negative_cost * offset), negative)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}, beta={self.beta:g}, negative_cost={self.negative_cost:g}"


def _mean(values: Tensor, pairs: Tensor) -> Tensor:
    return torch.where(pairs, values, 0.0).sum() / pairs.sum().clamp(min=1)
