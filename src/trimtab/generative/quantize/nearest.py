"""The nearest entry of a codebook: distances, gradients that pass through the choice, and what a quantizer returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.ops.arguments import real_problem

_HELD = 2**18  # distances that are held at once on a CPU


@dataclass(frozen=True)
class Quantized:
    """What a quantizer makes of a batch.

    Attributes:
        values: the entries taken, of the shape of the input; their gradient goes to the input.
        indices: which entries, int64.
        loss: the codebook's loss and the commitment's, and the entropy's where there is one, weighted.
        codebook_loss: mean squared distance that moves the entries to the input; none of its gradient reaches it.
        commitment_loss: the same number, which moves the input to its entries alone.
        entropy_loss: confidence and diversity of the assignments, see `entropy_loss`; zero where it has no weight.
    """

    values: Tensor
    indices: Tensor
    loss: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor
    entropy_loss: Tensor


def squared_distances(z: Float[Tensor, "... dim"], codes: Float[Tensor, "codes dim"]) -> Float[Tensor, "... codes"]:
    """Squared Euclidean distances of vectors to all codes, by one matrix product."""
    return z.square().sum(-1, keepdim=True) - 2 * z @ codes.T + codes.square().sum(-1)


@torch.no_grad()
def nearest_code(z: Float[Tensor, "... dim"], codes: Float[Tensor, "codes dim"]) -> Int[Tensor, "..."]:
    """Which code is nearest to each vector; some vectors at a time, so that their distances stay in the cache.

    Example:
        >>> nearest_code(torch.tensor([[0.9], [0.2]]), torch.tensor([[0.0], [1.0]]))
        tensor([1, 0])
    """
    rows = z.flatten(0, -2) if z.ndim > 1 else z[None]
    held = _HELD if z.device.type == "cpu" else 2**6 * _HELD
    sizes, found = codes.square().sum(-1), []
    for part in rows.split(max(1, held // len(codes))):
        products = 2 * part @ codes.T
        distances = torch.sub(part.square().sum(-1, keepdim=True), products, out=products).add_(sizes)
        found.append(distances.min(-1).indices)
    return torch.cat(found).view(z.shape[:-1])


def straight_through(z: Float[Tensor, "..."], quantized: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """`quantized` going forward, the identity on `z` going backward.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> z = torch.tensor([0.3], requires_grad=True)
        >>> value = straight_through(z, torch.tensor([1.0]))
        >>> (3 * value).backward()
        >>> value.item(), z.grad.item()
        (1.0, 3.0)
    """
    if problem := real_problem(z=z, quantized=quantized):
        raise TypeError(problem)
    if z.shape != quantized.shape:
        raise ValueError(f"quantized must have the shape of z, {tuple(z.shape)}, got {tuple(quantized.shape)}")
    return z + (quantized - z).detach()


def rotation_trick(z: Float[Tensor, "... dim"], quantized: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
    """`quantized` going forward; going backward the rotation and scaling that take `z` there, as constants.

    The gradient's angle to the input is the one it has to the entry, which straight-through forgets. Fifty et al.,
    "Restructuring Vector Quantization with the Rotation Trick", ICLR 2025, arXiv 2410.06424.

    Example:
        >>> z = torch.tensor([[1.0, 0.0]], requires_grad=True)
        >>> value = rotation_trick(z, torch.tensor([[0.0, 2.0]]))
        >>> value[0, 1].backward()  # along the entry, so along the input, and twice as long
        >>> z.grad.round().tolist()
        [[2.0, 0.0]]
    """
    if problem := real_problem(z=z, quantized=quantized):
        raise TypeError(problem)
    from_norm, to_norm = z.detach().norm(dim=-1, keepdim=True), quantized.detach().norm(dim=-1, keepdim=True)
    tiny = torch.finfo(z.dtype).tiny
    start, end = z.detach() / from_norm.clamp_min(tiny), quantized.detach() / to_norm.clamp_min(tiny)
    middle = F.normalize(start + end, dim=-1)
    along = (z * middle).sum(-1, keepdim=True)
    rotated = z - 2 * along * middle + 2 * (z * start).sum(-1, keepdim=True) * end
    return straight_through(rotated * (to_norm / from_norm.clamp_min(tiny)), quantized)


def entropy_loss(distances: Float[Tensor, "... codes"], temperature: float = 0.01) -> Float[Tensor, ""]:
    r"""How unsure single assignments are, less how varied they are together.

    $\frac1N\sum_n H(p_n) - H\bigl(\frac1N\sum_n p_n\bigr)$ with $p_n = \mathrm{softmax}(-d_n / \tau)$: from
    $-\log K$ for confident assignments spread evenly over K codes to 0 where all inputs are assigned alike.

    Args:
        distances: squared distances to all codes.
        temperature: tau, positive.

    Raises:
        ValueError: the temperature is not positive, or there are no distances.

    Example:
        >>> entropy_loss(1 - torch.eye(4)).item()  # -log 4
        -1.386...
    """
    if problem := real_problem(distances=distances):
        raise TypeError(problem)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if distances.ndim < 2 or not distances.numel():
        raise ValueError(f"distances must have shape (..., codes) and hold something, got {tuple(distances.shape)}")
    log_probs = (-distances.flatten(0, -2) / temperature).log_softmax(-1)
    probs = log_probs.exp()
    unsure = -(probs * log_probs).sum(-1).mean()
    mean = probs.mean(0)
    # Codes that no one is near have a mean of zero, where the logarithm has no gradient.
    return unsure + (mean * mean.clamp_min(torch.finfo(mean.dtype).tiny).log()).sum()
