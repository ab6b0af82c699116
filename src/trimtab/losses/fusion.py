r"""Fusions of several modalities that also judge each modality alone, at no extra parameters.

A modality's own logits are those of the fusion with the features of all others at zero. Besides concatenation there are
the sum, FiLM and the gate, in the forms that OGM-GE made usual:

$$
z = \sum_m W_m f_m + b_m, \qquad z = W (\gamma(f_1) \odot f_2 + \beta(f_1)) + b, \qquad
z = W \bigl( \sigma(W_1 f_1 + b_1) \odot (W_2 f_2 + b_2) \bigr) + b
$$

References: Perez, Strub, de Vries, Dumoulin, Courville, "FiLM: Visual Reasoning with a General Conditioning Layer",
AAAI 2018, arXiv 1709.07871; Kiela, Grave, Joulin, Mikolov, "Efficient Large-Scale Multi-Modal Classification", AAAI
2018, arXiv 1802.02892; Peng, Wei, Deng, Wang, Hu, "Balanced Multimodal Learning via On-the-fly Gradient Modulation",
CVPR 2022, arXiv 2203.15332.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.ops.arguments import integer, real_problem


class Fusion(nn.Module):
    """What all fusions share: the masks that leave one modality at a time. A subclass says in `join` how it fuses.

    Args:
        dims: width of each modality's features, of at least two modalities.

    Raises:
        ValueError: if there are fewer than two modalities, or a width is not positive.
    """

    masks: Tensor

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        if len(dims) < 2:
            raise ValueError(f"dims must hold the widths of at least two modalities, got {list(dims)}")
        self.dims = tuple(integer("dims", width) for width in dims)
        own = torch.eye(len(dims)).repeat_interleave(torch.tensor(self.dims), dim=1)
        self.register_buffer("masks", torch.cat([torch.ones_like(own[:1]), own]), persistent=False)

    def join(self, features: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch classes"]:
        """Logits of features that stand side by side."""
        raise NotImplementedError

    def forward(
        self, features: Sequence[Float[Tensor, "batch _"]]
    ) -> tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch modalities classes"]]:
        """The logits of all modalities together, and of each alone.

        Args:
            features: one tensor per modality, shape `(batch, dims[m])`.

        Raises:
            ValueError: if number or shapes of the tensors do not fit.
        """
        shapes = [tuple(part.shape) for part in features]
        if len({shape[:1] for shape in shapes}) != 1 or [shape[1:] for shape in shapes] != [(d,) for d in self.dims]:
            raise ValueError(f"features must be (batch, width) with widths {list(self.dims)}, got shapes {shapes}")
        together = torch.cat(list(features), dim=1)
        logits = self.join(together[:, None] * self.masks.to(together.dtype))
        return logits[:, 0], logits[:, 1:]


class SharedHeadFusion(Fusion):
    """Fusion by concatenation, with one head; its bias is part of each modality's logits.

    Args:
        head: maps the concatenated features, shape `(..., sum(dims))`, to logits, shape `(..., classes)`, such as
            `nn.Linear`. It must treat rows independently: no batch normalisation.
        dims: width of each modality's features, of at least two modalities.

    Raises:
        ValueError: if there are fewer than two modalities, a width is not positive, or a linear head's width is not
            their sum.

    Example:
        >>> fusion = SharedHeadFusion(nn.Linear(24, 10), dims=[16, 8])
        >>> logits, unimodal_logits = fusion([torch.randn(4, 16), torch.randn(4, 8)])
        >>> logits.shape, unimodal_logits.shape
        (torch.Size([4, 10]), torch.Size([4, 2, 10]))
    """

    def __init__(self, head: nn.Module, dims: Sequence[int]) -> None:
        super().__init__(dims)
        if isinstance(head, nn.Linear) and head.in_features != sum(self.dims):
            raise ValueError(f"dims must add up to the {head.in_features} features that head takes, got {list(dims)}")
        self.head = head

    def join(self, features: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch classes"]:
        if problem := real_problem(features=features):
            raise TypeError(problem)
        logits: Tensor = self.head(features)
        return logits


class SumFusion(Fusion):
    """Fusion by adding the logits of one linear head per modality.

    Args:
        dims: width of each modality's features, of at least two modalities.
        num_classes: number of classes.

    Raises:
        ValueError: if there are fewer than two modalities, or a size is not positive.

    Example:
        >>> logits, unimodal_logits = SumFusion([16, 8], num_classes=10)([torch.randn(4, 16), torch.randn(4, 8)])
        >>> unimodal_logits.shape
        torch.Size([4, 2, 10])
    """

    def __init__(self, dims: Sequence[int], num_classes: int) -> None:
        super().__init__(dims)
        num_classes = integer("num_classes", num_classes)
        self.heads = nn.ModuleList(nn.Linear(width, num_classes) for width in self.dims)

    def join(self, features: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch classes"]:
        if problem := real_problem(features=features):
            raise TypeError(problem)
        parts = features.split(self.dims, dim=-1)
        return torch.stack([head(part) for head, part in zip(self.heads, parts, strict=True)]).sum(0)


class FiLMFusion(Fusion):
    """Fusion of two modalities by FiLM: the first one scales and shifts the features of the second.

    Args:
        dims: the two widths.
        num_classes: number of classes.

    Raises:
        ValueError: if there are not two modalities, or a size is not positive.

    Example:
        >>> logits, unimodal_logits = FiLMFusion([16, 8], num_classes=10)([torch.randn(4, 16), torch.randn(4, 8)])
        >>> unimodal_logits.shape
        torch.Size([4, 2, 10])
    """

    def __init__(self, dims: Sequence[int], num_classes: int) -> None:
        super().__init__(_two(dims))
        self.film = nn.Linear(self.dims[0], 2 * self.dims[1])
        self.head = nn.Linear(self.dims[1], integer("num_classes", num_classes))

    def join(self, features: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch classes"]:
        if problem := real_problem(features=features):
            raise TypeError(problem)
        first, second = features.split(self.dims, dim=-1)
        scale, shift = self.film(first).chunk(2, dim=-1)
        logits: Tensor = self.head(scale * second + shift)
        return logits


class GatedFusion(Fusion):
    """Fusion of two modalities by a gate: the first one decides how much of the second passes.

    Args:
        dims: the two widths.
        num_classes: number of classes.
        hidden: width of what is gated.

    Raises:
        ValueError: if there are not two modalities, or a size is not positive.

    Example:
        >>> logits, unimodal_logits = GatedFusion([16, 8], num_classes=10)([torch.randn(4, 16), torch.randn(4, 8)])
        >>> unimodal_logits.shape
        torch.Size([4, 2, 10])
    """

    def __init__(self, dims: Sequence[int], num_classes: int, hidden: int = 512) -> None:
        super().__init__(_two(dims))
        hidden = integer("hidden", hidden)
        self.gate, self.value = nn.Linear(self.dims[0], hidden), nn.Linear(self.dims[1], hidden)
        self.head = nn.Linear(hidden, integer("num_classes", num_classes))

    def join(self, features: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch classes"]:
        if problem := real_problem(features=features):
            raise TypeError(problem)
        first, second = features.split(self.dims, dim=-1)
        logits: Tensor = self.head(self.gate(first).sigmoid() * self.value(second))
        return logits


def _two(dims: Sequence[int]) -> Sequence[int]:
    if len(dims) != 2:
        raise ValueError(f"dims must hold the widths of two modalities, got {list(dims)}")
    return dims
