r"""What a denoising or contractive auto-encoder knows of its data: the score, energy differences, and samples.

For reading a density out of a trained auto-encoder, or of any denoiser at one noise level. The vector from a point to
its reconstruction points uphill in log density; the reconstruction error is no energy. With corruption of variance
$\sigma^2$ the best reconstruction has exactly

$$
r(x) = x + \sigma^2\, \nabla \log p_\sigma(x), \qquad p_\sigma = p * N(0, \sigma^2 I),
$$

and where no corruption is added but the whole reconstruction function is kept from bending,

$$
\min_r\ \mathbb{E}\left[\lVert r(x)-x\rVert^2 + \sigma^2 \lVert \tfrac{\partial r}{\partial x}\rVert_F^2\right]
\quad\Rightarrow\quad r(x) = x + \sigma^2\, \nabla\log p(x) + o(\sigma^2).
$$

The line integral of the score between two points estimates the difference of their log densities, which is what
a Metropolis-Hastings chain needs. It can be trusted near the data alone: proposals should be short.

The paper's text was not at hand: the formulas are derived and tested here, and sizes of its experiments are not
followed.

Reference: Guillaume Alain and Yoshua Bengio, "What Regularized Auto-Encoders Learn from the Data Generating
Distribution", JMLR 2014, arXiv 1211.4246 (Theorems 1 to 3, Section 4).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.ops.arguments import finite_tensor, integer, one_of, positive, real_problem, same_shape, tensor

Reconstruct = Callable[[Tensor], Tensor]
"""Maps samples (batch, ...) to their reconstructions."""
Estimator = Literal["exact", "hutchinson"]
LogRatio = Callable[[Tensor, Tensor], Tensor]
"""Maps points a and b (batch, ...) to log p(b) - log p(a), (batch,)."""


def _denoising_loss(reconstruct: Reconstruct, x: Tensor, noise: Tensor) -> Tensor:
    """|r(x + noise) - x|^2, a sum over the numbers of a sample and a mean over samples."""
    same_shape("noise", noise, "x", x)
    return (_same(reconstruct(x + noise), x) - x).square().flatten(1).sum(1).mean()


class DenoisingAutoencoderLoss(nn.Module):
    """The squared error of reconstructing samples from corrupted ones.

    Args:
        sigma: standard deviation of the Gaussian corruption, positive.

    Example:
        >>> loss = DenoisingAutoencoderLoss(sigma=0.5)
        >>> loss(lambda x: x, torch.zeros(2, 3), noise=torch.ones(2, 3))  # 3 numbers, each 0.5 away
        tensor(0.7500)
    """

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = positive("sigma", sigma)

    def forward(
        self,
        reconstruct: Reconstruct,
        x: Float[Tensor, "batch ..."],
        *,
        noise: Float[Tensor, "batch ..."] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            reconstruct: the auto-encoder.
            x: clean samples.
            noise: standard normal, of the shape of `x`; drawn if None.
            generator: of the noise.

        Raises:
            TypeError: `x` is not floating point.
            ValueError: there is no sample, or a shape differs from that of `x`.
        """
        x = _batch("x", x)
        if noise is None:
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        return _denoising_loss(reconstruct, x, self.sigma * noise)


class ReconstructionContractiveLoss(nn.Module):
    """The squared error of reconstructing clean samples, and a penalty on the whole reconstruction's Jacobian.

    Its small-noise limit is that of the denoising loss; the difference is sigma^2 times the mean of
    <r(x) - x, Laplacian of r>, nothing where r is affine.

    Args:
        sigma: square root of the penalty's weight, positive; it stands for the corruption.
        estimator: `exact` goes through the numbers of a sample, one backward pass each; `hutchinson` takes one pass
            with random signs, without bias.

    Example:
        >>> loss = ReconstructionContractiveLoss(sigma=0.5)
        >>> loss(lambda x: 0.5 * x, torch.tensor([[2.0, 0.0]])).detach()  # 1 + 0.25 * (2 * 0.25)
        tensor(1.1250)
    """

    def __init__(self, sigma: float, *, estimator: Estimator = "exact") -> None:
        super().__init__()
        self.sigma = positive("sigma", sigma)
        self.estimator: Estimator = one_of("estimator", estimator, get_args(Estimator))

    def forward(
        self,
        reconstruct: Reconstruct,
        x: Float[Tensor, "batch ..."],
        *,
        signs: Float[Tensor, "batch ..."] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            reconstruct: the auto-encoder; samples must not mix in it, as they do in batch statistics.
            x: clean samples.
            signs: +1 and -1, of the shape of `x`, for `hutchinson`; drawn if None.
            generator: of the signs.

        Raises:
            TypeError: `x` is not floating point.
            ValueError: there is no sample, or a shape differs from that of `x`.
        """
        x = _batch("x", x)
        if self.estimator == "exact":
            directions = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device).reshape(-1, 1, *x.shape[1:])
        else:
            if signs is None:
                signs = torch.randint(0, 2, x.shape, generator=generator, device=x.device).to(x.dtype) * 2 - 1
            if not isinstance(signs, Tensor):
                raise TypeError(f"signs must be a tensor, got {type(signs).__name__}")
            same_shape("signs", signs, "x", x)
            directions = signs[None]
        with torch.inference_mode(False), torch.enable_grad():
            at = x.detach().clone().requires_grad_()
            out = _same(reconstruct(at), x)
            penalty = out.new_zeros(())
            for direction in directions:
                (pulled,) = torch.autograd.grad(out, at, direction.expand_as(out).clone(), create_graph=True)
                penalty = penalty + pulled.square().flatten(1).sum(1).mean()
        return (out - x).square().flatten(1).sum(1).mean() + self.sigma**2 * penalty


def score_from_reconstruction(
    reconstruct: Reconstruct, x: Float[Tensor, "batch ..."], sigma: float
) -> Float[Tensor, "batch ..."]:
    """(r(x) - x) / sigma^2: the gradient of the log density that the auto-encoder learnt.

    Args:
        reconstruct: trained with `sigma`.
        x: where.
        sigma: the corruption (or root of the penalty's weight) that it was trained with.

    Example:
        >>> score_from_reconstruction(lambda x: 0.5 * x, torch.tensor([[2.0, 0.0]]), sigma=0.5)
        tensor([[-4.,  0.]])
    """
    if problem := real_problem(x=x):
        raise TypeError(problem)
    return (_same(reconstruct(x), x) - x) / positive("sigma", sigma) ** 2


def energy_difference(
    reconstruct: Reconstruct,
    a: Float[Tensor, "batch ..."],
    b: Float[Tensor, "batch ..."],
    sigma: float,
    *,
    n_points: int = 64,
) -> Float[Tensor, " batch"]:
    r"""The energy of b less that of a, $\log p(a) - \log p(b)$, by the score's integral along the straight line.

    The midpoint rule; exact for affine reconstructions, which are those of Gaussian data. Where the residual is no
    gradient field the value depends on the path.

    Args:
        reconstruct: trained with `sigma`.
        a: where the line starts.
        b: where it ends.
        sigma: what it was trained with.
        n_points: where the score is evaluated, all in one batch.

    Raises:
        TypeError: `a` or `b` is no tensor, or complex.
        ValueError: the shapes differ, or an argument is out of its range.

    Example:
        >>> r = lambda x: x - 0.25 * x  # a standard normal density, at sigma = 0.5
        >>> energy_difference(r, torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]), sigma=0.5)
        tensor([12.5000])
    """
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        raise TypeError(f"a and b must be tensors, got {type(a).__name__} and {type(b).__name__}")
    if problem := real_problem(a=a, b=b):
        raise TypeError(problem)
    same_shape("b", b, "a", a)
    count = integer("n_points", n_points)
    along = (torch.arange(count, dtype=a.dtype, device=a.device) + 0.5) / count
    step = b - a
    points = a + along.reshape(-1, *(1,) * a.ndim) * step
    score = score_from_reconstruction(reconstruct, points.flatten(0, 1), sigma).reshape(points.shape).mean(0)
    return -(score * step).flatten(1).sum(1)


class Chain(NamedTuple):
    """States of chains that run side by side.

    Attributes:
        states: (steps, chains, ...) after each step.
        acceptance: share of the proposals that were taken.
    """

    states: Float[Tensor, "steps chains ..."]
    acceptance: float


@torch.no_grad()
def metropolis(
    log_ratio: LogRatio,
    x: Float[Tensor, "chains ..."],
    *,
    proposal_std: float,
    n_steps: int,
    generator: torch.Generator | None = None,
) -> Chain:
    """Metropolis-Hastings with Gaussian proposals, of a density of which differences of the logarithm are known.

    Args:
        log_ratio: log p(b) - log p(a) of states a and proposals b.
        x: where the chains start.
        proposal_std: standard deviation of the proposals.
        n_steps: how many.
        generator: of proposals and decisions.

    Raises:
        ValueError: `x` is not finite or an argument is out of its range.

    Example:
        >>> normal = lambda a, b: (a.square() - b.square()).sum(1) / 2
        >>> start, draws = torch.zeros(500, 1), torch.Generator().manual_seed(0)
        >>> chain = metropolis(normal, start, proposal_std=1.0, n_steps=100, generator=draws)
        >>> round(chain.states[-1].std().item(), 1)
        1.0
    """
    x = _batch("x", finite_tensor("x", x))
    positive("proposal_std", proposal_std)
    taken, states = 0.0, []
    for _ in range(integer("n_steps", n_steps)):
        proposal = x + proposal_std * torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        uniform = torch.rand(len(x), generator=generator, dtype=x.dtype, device=x.device)
        accept = uniform.log() < log_ratio(x, proposal)
        x = torch.where(accept.reshape(-1, *(1,) * (x.ndim - 1)), proposal, x)
        taken += float(accept.double().mean())
        states.append(x)
    return Chain(torch.stack(states), taken / n_steps)


def dae_metropolis(
    reconstruct: Reconstruct,
    x: Float[Tensor, "chains ..."],
    sigma: float,
    *,
    proposal_std: float,
    n_steps: int,
    n_points: int = 16,
    generator: torch.Generator | None = None,
) -> Chain:
    """Samples the density that an auto-encoder learnt, approximately, by Metropolis-Hastings.

    Args:
        reconstruct: trained with `sigma`.
        x: where the chains start, such as training samples.
        sigma: what it was trained with.
        proposal_std: standard deviation of the proposals, of the order of the data's smallest scale: away from the
            data the auto-encoder is not to be trusted, and long proposals find spurious modes.
        n_steps: how many.
        n_points: of each energy difference.
        generator: of proposals and decisions.

    Raises:
        ValueError: `x` is not finite or an argument is out of its range.

    Example:
        >>> r = lambda x: x - 0.25 * x  # a standard normal density, at sigma = 0.5
        >>> start, draws = torch.zeros(500, 1), torch.Generator().manual_seed(0)
        >>> chain = dae_metropolis(r, start, 0.5, proposal_std=1.0, n_steps=100, generator=draws)
        >>> round(chain.states[-1].std().item(), 1)
        1.0
    """

    def log_ratio(a: Tensor, b: Tensor) -> Tensor:
        return -energy_difference(reconstruct, a, b, sigma, n_points=n_points)

    return metropolis(log_ratio, x, proposal_std=proposal_std, n_steps=n_steps, generator=generator)


def _batch(name: str, x: Tensor) -> Tensor:
    x = tensor(name, x, floating=True)
    if x.ndim < 2 or len(x) == 0:
        raise ValueError(f"{name} must have shape (batch, ...) with at least one sample, got {tuple(x.shape)}")
    return x


def _same(out: Tensor, x: Tensor) -> Tensor:
    if out.shape != x.shape:
        raise ValueError(f"reconstruct must return the shape of x, {tuple(x.shape)}, got {tuple(out.shape)}")
    return out
