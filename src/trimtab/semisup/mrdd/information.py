"""What codes hold: their divergence from the prior, and a bound of what they say of another code."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.ops.arguments import integer, real_problem
from trimtab.ops.whole_state import WholeState


def gaussian_kl(mean: Float[Tensor, "batch dim"], log_var: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """Divergence of diagonal Gaussians from the standard one, summed over dimensions, the mean of the batch.

    Args:
        mean: of each Gaussian.
        log_var: logarithms of their variances.

    Raises:
        ValueError: the two are not matrices of one shape.

    Example:
        >>> float(gaussian_kl(torch.ones(3, 2), torch.zeros(3, 2)))
        1.0
    """
    if problem := real_problem(mean=mean, log_var=log_var):
        raise TypeError(problem)
    if mean.ndim != 2 or log_var.shape != mean.shape:
        raise ValueError(f"mean and log_var must be of one shape, got {tuple(mean.shape)} and {tuple(log_var.shape)}")
    divergences: Tensor = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1)
    return divergences.mean()


class CLUB(WholeState, nn.Module):
    """An upper bound of the mutual information of x and y, by a Gaussian q(y | x) of two small networks.

    By turns, `learning_loss` is minimised over this module, and `upper_bound` over what makes x. It bounds the mutual
    information only as well as q is fitted.

    Args:
        x_dim, y_dim: lengths.
        hidden: width of the networks; variances are kept in [1/e, e] by a tanh.

    Raises:
        ValueError: a size is not positive.

    Example:
        >>> club = CLUB(2, 3)
        >>> x, y = torch.zeros(4, 2), torch.ones(4, 3)
        >>> float(club.upper_bound(x, y).detach())  # where y never changes, x says nothing about it
        0.0
    """

    def __init__(self, x_dim: int, y_dim: int, hidden: int = 50) -> None:
        super().__init__()
        x_dim, y_dim, hidden = integer("x_dim", x_dim), integer("y_dim", y_dim), integer("hidden", hidden)
        self.mean = nn.Sequential(nn.Linear(x_dim, hidden), nn.ReLU(), nn.Linear(hidden, y_dim))
        self.log_var = nn.Sequential(nn.Linear(x_dim, hidden), nn.ReLU(), nn.Linear(hidden, y_dim), nn.Tanh())

    def learning_loss(self, x: Float[Tensor, "batch x"], y: Float[Tensor, "batch y"]) -> Float[Tensor, ""]:
        """Minus the log-likelihood of the pairs, but for a factor of two and a constant.

        Raises:
            ValueError: there is not a y for each x, or none at all.
        """
        if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) == 0:
            raise ValueError(f"x and y must be as many rows, at least one, got {tuple(x.shape)} and {tuple(y.shape)}")
        log_var = self.log_var(x)
        losses: Tensor = ((self.mean(x) - y).square() * (-log_var).exp() + log_var).sum(1)
        return losses.mean()

    def upper_bound(
        self,
        x: Float[Tensor, "batch x"],
        y: Float[Tensor, "batch y"],
        permutation: Int[Tensor, " batch"] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, ""]:
        """Log-likelihood of the pairs less that of pairs that are not.

        Args:
            x, y: pairs.
            permutation: which y each x is wrongly paired with; drawn if not given.
            generator: decides what is drawn.

        Raises:
            ValueError: there is not a y for each x, or none at all, or `permutation` is not one index a pair.
        """
        if problem := real_problem(x=x, y=y):
            raise TypeError(problem)
        if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) == 0:
            raise ValueError(f"x and y must be as many rows, at least one, got {tuple(x.shape)} and {tuple(y.shape)}")
        if permutation is not None and permutation.shape != y.shape[:1]:
            raise ValueError(f"permutation must be of shape ({len(y)},), got {tuple(permutation.shape)}")
        if permutation is None:
            permutation = torch.randperm(len(y), generator=generator)
        mean, precision = self.mean(x), (-self.log_var(x)).exp()
        if mean.shape != y.shape:
            raise ValueError(f"y must be of shape {tuple(mean.shape)}, got {tuple(y.shape)}")
        apart = (mean - y[permutation.to(y.device)]).square() - (mean - y).square()
        bounds: Tensor = 0.5 * (apart * precision).sum(1)
        return bounds.mean()
