"""Training on images and their edge maps at once, and answering by both."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.domain.crafting_shifts.edges import EnhancedCanny
from trimtab.ops.arguments import class_indices, floating_tensor, in_range, indices, non_negative, same_shape
from trimtab.ops.attack import eval_mode
from trimtab.ops.whole_state import WholeState


def mix_predictions(
    logits: Float[Tensor, "batch classes"], edge_logits: Float[Tensor, "batch classes"], share: float
) -> Float[Tensor, "batch classes"]:
    """Log-probabilities of the product of two predictions, `p^share q^(1 - share)` over its sum.

    Args:
        logits: of the images.
        edge_logits: of their edge maps.
        share: of the images, in [0, 1]; the authors try 0.25, 0.5 and 0.75.

    Raises:
        TypeError: something is not floating point.
        ValueError: `share` is out of range, or the shapes differ.

    Example:
        >>> mix_predictions(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]), 0.5).exp()
        tensor([[0.5000, 0.5000]])
    """
    logits, edge_logits = floating_tensor("logits", logits), floating_tensor("edge_logits", edge_logits)
    same_shape("edge_logits", edge_logits, "logits", logits)
    in_range("share", share, 0, 1)
    return (share * logits.log_softmax(1) + (1 - share) * edge_logits.log_softmax(1)).log_softmax(1)


class EdgePairLoss(WholeState, nn.Module):
    """Cross-entropy of a network on images and on their inverted edge maps, both in one batch.

    Args:
        model: a classifier of images, x -> logits.
        weight: w, of the edge maps, in [0, 1] with the authors; at 0 they only take part in batch statistics.
        canny: makes the edge maps; an `EnhancedCanny` of the authors' numbers where it is None.
        augment: a function `(x, generator) -> x`, such as one of a fold's; edge maps are those of its images.

    Raises:
        ValueError: `weight` is negative.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        >>> loss = EdgePairLoss(model, weight=0.5)
        >>> sorted(loss(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])))
        ['edge', 'image', 'total']
    """

    def __init__(
        self,
        model: nn.Module,
        weight: float = 1.0,
        canny: EnhancedCanny | None = None,
        augment: Callable[[Tensor, torch.Generator | None], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.weight = model, non_negative("weight", weight)
        self.canny = EnhancedCanny() if canny is None else canny
        self.augment = augment

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        targets: Int[Tensor, " batch"],
        *,
        generator: torch.Generator | None = None,
        edges: Float[Tensor, "batch 1 height width"] | None = None,
    ) -> dict[str, Tensor]:
        """The loss of a batch, `total`, with its parts, detached: mean cross-entropies on images and edge maps.

        Args:
            x: images in [0, 1].
            targets: labels.
            generator: decides the draws.
            edges: edge maps, in place of those that are drawn.

        Raises:
            TypeError: a dtype is wrong.
            ValueError: the shapes do not fit, the batch is empty, or a label is out of range.
        """
        class_indices("targets", targets)
        if len(x) == 0 or targets.shape != x.shape[:1]:
            raise ValueError(f"targets must be ({len(x)},), at least one, got {tuple(targets.shape)}")
        if edges is not None and edges.shape != (len(x), 1, *x.shape[2:]):
            raise ValueError(f"edges must be of shape {(len(x), 1, *x.shape[2:])}, got {tuple(edges.shape)}")
        shown = x if self.augment is None else self.augment(x, generator)
        drawn = self.canny(shown, generator=generator) if edges is None else edges
        logits = floating_tensor("model(x)", self.model(torch.cat([shown, as_input(drawn, x)])))
        indices("targets", targets, logits.shape[1])
        image, edge = (F.cross_entropy(said, targets) for said in logits.split(len(x)))
        return {"total": (image + self.weight * edge) / 2, "image": image.detach(), "edge": edge.detach()}

    @torch.no_grad()
    def predict(
        self, x: Float[Tensor, "batch channels height width"], share: float = 1.0
    ) -> Float[Tensor, "batch classes"]:
        """Log-probabilities by the image (`share` 1), its edge map (0), or the product of both, in eval mode.

        Raises:
            ValueError: `share` is outside [0, 1].
        """
        in_range("share", share, 0, 1)
        with eval_mode(self):
            if share == 1:
                return floating_tensor("model(x)", self.model(x)).log_softmax(1)
            edge_logits = floating_tensor("model(x)", self.model(as_input(self.canny(x), x)))
            return edge_logits.log_softmax(1) if share == 0 else mix_predictions(self.model(x), edge_logits, share)


def as_input(edges: Float[Tensor, "batch 1 height width"], like: Tensor) -> Tensor:
    """Edge maps inverted, dark lines on a light ground, in as many channels as images have."""
    return (1 - edges).to(like.dtype).expand(-1, like.shape[1], -1, -1)
