r"""MSBReg: self-supervision in which embeddings move like particles, drawn together, kicked about and spread out.

For learning features from several views of unlabelled samples, with an averaged copy of the network as the target and
no negatives. Views are drawn to the centroid of the target's views; kicks in random directions, the same for all views
of a sample, keep close samples apart; a flat spectrum keeps all from gathering in a few directions. The last two also
serve as regularisers of other methods.

$$
\mathcal{L} = \frac1{nV} \sum_{i,v} \bigl( 2 - 2\, z_{iv}^\top \hat c'_i \bigr)
+ \lambda_B\, \frac{1}{nV} \sum_{i,v} z_{iv}^\top \hat\xi_i
+ \lambda_S\, \frac1d \Bigl\| \frac1n Z^\top Z - I \Bigr\|_F^2
$$

$z_{iv}$ of length one, $\hat c'_i$ the direction of the centroid of the target's views, $\hat\xi_i$ uniform on the
sphere, $Z$ the standardised embeddings. The last term is $\sum_k (\sigma_k - 1)^2 / d$ for the singular values of
$Z^\top Z / n$.

A reconstruction: of the paper's text, abstract and introduction were at hand, and no code of its authors. The centroid
and Brownian terms follow a third party's code, the form of the last term and its weight are ours. Every view is drawn
to the centroid. To compare directions of two centroids of the same views instead would leave the views of a sample
free of each other: a network that agrees with its own average would pay nothing, however far apart it holds them.

Reference: Suhong Moon, Domas Buracas, Seunghyun Park, Jinkyu Kim, John Canny, "An Embedding-Dynamic Approach to
Self-supervised Learning", WACV 2023, arXiv 2207.03552.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.ops.arguments import floating_tensor, non_negative
from trimtab.ops.units import power_of_two_unit


def multiview_centroid_loss(
    z: Float[Tensor, "batch views dim"], z_target: Float[Tensor, "batch target_views dim"]
) -> Tensor:
    """Squared distance of every view from the direction of the target views' centroid, their mean, in [0, 4].

    It is zero only where all views of a sample agree with each other and with the target.

    Args:
        z: embeddings of the views, of any length.
        z_target: those of the averaged network, which take no gradient; their views may be of another number.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: shapes do not fit, or the batch is empty.

    Example:
        >>> target = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]])  # their centroid points to (1, 1)
        >>> multiview_centroid_loss(torch.tensor([[[3.0, 3.0]]]), target).abs() < 1e-6
        tensor(True)
        >>> round(multiview_centroid_loss(target, target).item(), 3)  # each view is 45 degrees away from it
        0.586
    """
    z, z_target = _views("z", z), _views("z_target", z_target)
    if z.shape[::2] != z_target.shape[::2]:
        wanted = f"({len(z)}, views, {z.shape[2]})"
        raise ValueError(f"z_target must be {wanted} as z, got {tuple(z_target.shape)}")
    centroid = F.normalize(F.normalize(z_target.detach(), dim=2).mean(1), dim=1)
    return 2 - 2 * (F.normalize(z, dim=2) * centroid[:, None]).sum(2).mean()


def brownian_loss(
    z: Float[Tensor, "batch views dim"],
    *,
    kicks: Float[Tensor, "batch dim"] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean cosine with random directions; zero on average, its gradient is a random displacement.

    Args:
        z: embeddings of the views, of any length.
        kicks: a direction for each sample, of any length; by default drawn anew from a normal distribution.
        generator: decides what is drawn.

    Raises:
        TypeError: `z` or `kicks` is no floating-point tensor.
        ValueError: shapes do not fit, or the batch is empty.

    Example:
        >>> round(brownian_loss(torch.tensor([[[2.0, 0.0]]]), kicks=torch.tensor([[3.0, 4.0]])).item(), 6)
        0.6
    """
    z = _views("z", z)
    if kicks is None:
        at = z.device if generator is None else generator.device
        kicks = torch.randn(len(z), z.shape[2], generator=generator, device=at, dtype=z.dtype).to(z.device)
    kicks = floating_tensor("kicks", kicks)
    if kicks.shape != z.shape[::2]:
        raise ValueError(f"kicks must be of shape {tuple(z.shape[::2])}, got {tuple(kicks.shape)}")
    directions = F.normalize(kicks.detach().to(z), dim=1)
    return (F.normalize(z, dim=2) * directions[:, None]).sum(2).mean()


def singular_value_loss(z: Float[Tensor, "batch dim"], *, standardize: bool = True) -> Tensor:
    """How far the spectrum of the embeddings' second moments is from flat, over their dimension.

    Args:
        z: embeddings of at least two samples.
        standardize: bring every dimension to mean 0 and deviation 1 first; what counts then are correlations alone.

    Returns:
        0 for uncorrelated dimensions, `dim - 1` where all are the same up to scale.

    Raises:
        TypeError: `z` is no floating-point tensor.
        ValueError: `z` is not two-dimensional, or of fewer than two samples.

    Example:
        >>> z = torch.tensor([[1.0], [2.0], [-3.0]])
        >>> round(singular_value_loss(torch.cat([z, -2 * z, 5 * z], 1)).item(), 3)
        2.0
    """
    z = floating_tensor("z", z)
    if z.ndim != 2 or len(z) < 2 or z.shape[1] == 0:
        raise ValueError(f"z must be (batch, dim) with at least two samples, got shape {tuple(z.shape)}")
    with torch.autocast(z.device.type, enabled=False):
        if standardize:
            z = z / power_of_two_unit(z[None])[0]
            z = z - z.mean(0)
            variance = z.square().mean(0)
            # Relative to the largest, so that no unit counts; a dimension that is constant stays at zero.
            z = z / (variance + 1e-6 * variance.max().detach() + torch.finfo(z.dtype).tiny).sqrt()
        moments = z.mT @ z / len(z)
        return (moments - torch.eye(len(moments), dtype=z.dtype, device=z.device)).square().sum() / len(moments)


class MSBReg(nn.Module):
    """The whole objective, called as `loss(z, z_target)` with all views of a batch; it holds no state.

    The target comes from an averaged copy of encoder and projector (`trimtab.ops.averaging.Teacher`), whose decay goes
    from 0.996 to 1; a predictor on the student's side may be used or not.

    Args:
        lambda_b: weight of the kicks; 0.1 in the third-party code.
        lambda_s: weight of the spectrum; not known from the paper.

    Raises:
        ValueError: a weight is negative.

    Example:
        >>> z = torch.randn(8, 2, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
        >>> loss = MSBReg()
        >>> value = loss(z, z.detach(), generator=torch.Generator().manual_seed(1))
        >>> value.backward()
    """

    def __init__(self, lambda_b: float = 0.1, lambda_s: float = 0.03) -> None:
        super().__init__()
        self.lambda_b = non_negative("lambda_b", lambda_b)
        self.lambda_s = non_negative("lambda_s", lambda_s)

    def forward(
        self,
        z: Float[Tensor, "batch views dim"],
        z_target: Float[Tensor, "batch target_views dim"],
        *,
        kicks: Float[Tensor, "batch dim"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The loss of a batch; the spectrum is taken of each view's embeddings, and the mean of these.

        Args:
            z: embeddings of the views, of any length, at least two samples if `lambda_s` is not zero.
            z_target: those of the averaged network, which take no gradient.
            kicks: as in `brownian_loss`.
            generator: decides what is drawn.

        Raises:
            TypeError: an argument is no floating-point tensor.
            ValueError: shapes do not fit, or there are too few samples.
        """
        value = multiview_centroid_loss(z, z_target)
        if self.lambda_s:
            unit = F.normalize(_views("z", z), dim=2)
            value = value + self.lambda_s * torch.stack([singular_value_loss(view) for view in unit.unbind(1)]).mean()
        if self.lambda_b:
            value = value + self.lambda_b * brownian_loss(z, kicks=kicks, generator=generator)
        return value

    def extra_repr(self) -> str:
        return f"lambda_b={self.lambda_b}, lambda_s={self.lambda_s}"


def _views(name: str, value: Tensor) -> Tensor:
    value = floating_tensor(name, value)
    if value.ndim != 3 or 0 in value.shape:
        wanted = "(batch, views, dim) with at least one sample and one view"
        raise ValueError(f"{name} must be {wanted}, got shape {tuple(value.shape)}")
    return value
