r"""What cross-entropy's first and second derivatives in a linear head are, in closed form.

For a head $Wz + b$ over features $z$, with probabilities $p$ and the label's one-hot vector $e_y$,

$$
\nabla_W \ell = (p - e_y)\, z^\top, \qquad \nabla_b \ell = p - e_y, \qquad
\nabla^2_{(W, b)} \ell = \bigl( \operatorname{diag}(p) - p\,p^\top \bigr) \otimes \tilde z \tilde z^\top,
\quad \tilde z = (z, 1),
$$

so that gradients of single samples cost an outer product and no pass through the network, and can be differentiated
again with respect to what made the features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.ops.arguments import class_indices, floating_tensor, looked_at


def head_gradients(
    features: Float[Tensor, "batch dim"], logits: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"]
) -> tuple[Float[Tensor, "batch classes dim"], Float[Tensor, "batch classes"]]:
    """Each sample's gradient of cross-entropy in the head's weight, and in its bias; differentiable.

    Args:
        features: what the head reads.
        logits: what it says.
        targets: labels.

    Raises:
        TypeError: features or logits are not floating point, or targets not int64.
        ValueError: the shapes do not fit, the batch is empty, or a label is out of range.

    Example:
        >>> weight, bias = head_gradients(torch.tensor([[2.0]]), torch.zeros(1, 2), torch.tensor([0]))
        >>> weight.tolist(), bias.tolist()
        ([[[-1.0], [1.0]]], [[-0.5, 0.5]])
    """
    features, logits = floating_tensor("features", features), floating_tensor("logits", logits)
    class_indices("targets", targets)
    if features.ndim != 2 or logits.ndim != 2 or not features.shape[:1] == logits.shape[:1] == targets.shape:
        raise ValueError(
            "features, logits and targets must be (batch, dim), (batch, classes) and (batch,), "
            f"got {tuple(features.shape)}, {tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    if len(targets) == 0:
        raise ValueError("features must hold at least one sample, got none")
    if looked_at(targets) and not ((targets >= 0) & (targets < logits.shape[1])).all():
        raise ValueError(f"targets must be in [0, {logits.shape[1]}), got others")
    residual = logits.softmax(1) - F.one_hot(targets, logits.shape[1]).to(logits)
    return residual[:, :, None] * features[:, None, :], residual


def head_hessian(
    features: Float[Tensor, "batch dim"], logits: Float[Tensor, "batch classes"]
) -> Float[Tensor, "parameters parameters"]:
    """The Hessian of the mean cross-entropy in the head's weight and bias, which no label enters; differentiable.

    Parameters are in the order of `torch.cat([weight, bias[:, None]], 1).flatten()`: for each class its weights and
    then its bias. The matrix has `(classes * (dim + 1)) ** 2` entries: for small heads, and for tests.

    Args:
        features: what the head reads.
        logits: what it says.

    Raises:
        TypeError: features or logits are not floating point.
        ValueError: the shapes do not fit, or the batch is empty.

    Example:
        >>> head_hessian(torch.tensor([[0.0]]), torch.zeros(1, 2)).diagonal().tolist()
        [0.0, 0.25, 0.0, 0.25]
    """
    features, logits = floating_tensor("features", features), floating_tensor("logits", logits)
    if features.ndim != 2 or logits.ndim != 2 or features.shape[:1] != logits.shape[:1] or len(logits) == 0:
        raise ValueError(
            "features and logits must be (batch, dim) and (batch, classes) of at least one sample, "
            f"got {tuple(features.shape)} and {tuple(logits.shape)}"
        )
    probs = logits.softmax(1)
    with_one = torch.cat([features, torch.ones_like(features[:, :1])], 1)
    spread = torch.diag_embed(probs) - probs[:, :, None] * probs[:, None, :]
    size = probs.shape[1] * with_one.shape[1]
    blocks = torch.einsum("ncd,ni,nj->cidj", spread, with_one, with_one) / len(probs)
    return blocks.reshape(size, size)
