r"""What a compressed model learns from the model it came from: its answers, its features, its attention relations.

For rows of scores $z$ and the teacher's $t$, features $f$ of stages $s$, and vectors $x_i$ of the tokens of a sequence,

$$
T^2\, KL\bigl( \operatorname{softmax}(t / T) \,\|\, \operatorname{softmax}(z / T) \bigr), \qquad
\operatorname{mean} \bigl( f^{\text{teacher}}_s - f_s \bigr)^2, \qquad
R = \operatorname{softmax}\bigl( X X^{\top} / \sqrt d \bigr)
$$

No gradient goes to a teacher. The methods of this area weigh and combine these.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trimtab.ops.arguments import floating_tensor, integer, same_shape
from trimtab.ops.tempered_kl import tempered_kl


def soft_target_loss(
    logits: Float[Tensor, "... classes"], teacher_logits: Float[Tensor, "... classes"], temperature: float = 1.0
) -> Float[Tensor, ""]:
    """The tempered divergence of a teacher's answers from a student's, averaged over all rows.

    Args:
        logits: the student's scores, of samples or of positions of sequences.
        teacher_logits: the teacher's.
        temperature: positive; the factor of its square is included.

    Raises:
        TypeError: scores are not floating point.
        ValueError: the shapes differ, there are no scores, or the temperature is not positive and finite.

    Example:
        >>> round(soft_target_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])).item(), 6)
        0.462117
    """
    logits, teacher_logits = floating_tensor("logits", logits), floating_tensor("teacher_logits", teacher_logits)
    same_shape("teacher_logits", teacher_logits, "logits", logits)
    if logits.ndim < 2 or not logits.numel():
        raise ValueError(f"logits must be (..., classes) with at least one row, got shape {tuple(logits.shape)}")
    return tempered_kl(logits.flatten(0, -2), teacher_logits.flatten(0, -2), temperature).mean()


def feature_distances(
    features: Sequence[Float[Tensor, "batch ..."]], teacher_features: Sequence[Float[Tensor, "batch ..."]]
) -> tuple[Float[Tensor, " stages"], Float[Tensor, " stages"]]:
    """The mean squared difference at each stage, and the mean square of the teacher's features there.

    Args:
        features: the student's, one tensor a stage.
        teacher_features: the teacher's, of the same shapes.

    Raises:
        TypeError: features are not floating point.
        ValueError: there are none, their numbers or shapes differ, or the batch is empty.

    Example:
        >>> feature_distances([torch.tensor([[1.0, 3.0]])], [torch.tensor([[1.0, 1.0]])])
        (tensor([2.]), tensor([1.]))
    """
    if not features or len(features) != len(teacher_features):
        wanted = f"as many stages as features ({len(features)}), and at least one"
        raise ValueError(f"teacher_features must be {wanted}, got {len(teacher_features)}")
    distances, energies = [], []
    for own, other in zip(features, teacher_features, strict=True):
        own, other = floating_tensor("features", own), floating_tensor("teacher_features", other).detach()
        same_shape("teacher_features", other, "features", own)
        if not own.numel():
            raise ValueError(f"features must be at least one sample at each stage, got shape {tuple(own.shape)}")
        distances.append((own - other).square().mean())
        energies.append(other.square().mean())
    return torch.stack(distances), torch.stack(energies)


def relation_scores(
    x: Float[Tensor, "batch length width"], relation_heads: int, mask: Bool[Tensor, "batch length"] | None = None
) -> Float[Tensor, "batch heads length length"]:
    r"""$X X^{\top} / \sqrt{d_r}$ of the tokens of each sequence, the width split into heads of $d_r$ numbers.

    Args:
        x: queries, keys, values or other vectors of the tokens.
        relation_heads: how many heads the width is split into, whatever the model's own number is.
        mask: True where there is a token; scores against others are minus infinity. Each sequence must have one.

    Raises:
        TypeError: `x` is not floating point, or `mask` not boolean.
        ValueError: `x` is not (batch, length, width) with at least one token, its width is not a multiple of
            `relation_heads`, or the mask has another shape.

    Example:
        >>> relation_scores(torch.tensor([[[1.0, 2.0], [0.0, 1.0]]]), relation_heads=2).tolist()
        [[[[1.0, 0.0], [0.0, 0.0]], [[4.0, 2.0], [2.0, 1.0]]]]
    """
    x = floating_tensor("x", x)
    integer("relation_heads", relation_heads)
    if x.ndim != 3 or not x.numel():
        raise ValueError(f"x must be (batch, length, width) with at least one token, got shape {tuple(x.shape)}")
    if x.shape[2] % relation_heads:
        raise ValueError(f"relation_heads must be a divisor of the width {x.shape[2]}, got {relation_heads}")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean, got {mask.dtype}")
    if mask is not None and mask.shape != x.shape[:2]:
        raise ValueError(f"mask must be of shape {tuple(x.shape[:2])}, got {tuple(mask.shape)}")
    heads = x.unflatten(2, (relation_heads, -1)).transpose(1, 2)
    with torch.autocast(x.device.type, enabled=False):
        scores: Tensor = heads @ heads.mT / heads.shape[-1] ** 0.5
    return scores if mask is None else scores.masked_fill(~mask[:, None, None], -torch.inf)
