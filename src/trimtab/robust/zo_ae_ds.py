r"""ZO-AE-DS: defends a classifier that answers queries only, by a denoiser trained without its gradients.

A denoiser in front of a classifier, and Gaussian noise in front of the denoiser, make a classifier that is certifiably
robust (denoised smoothing). Where the classifier is a black box, gradients are estimated from its answers, and an
auto-encoder between the two makes them few enough: they are estimated in its code $z$ of $d$ numbers.

$$
z = E_\psi(D_\theta(x + \sigma n)), \qquad \ell(z) = \mathrm{CE}\bigl(h(G(z)), \arg\max h(x)\bigr), \qquad
L = \tfrac1B \sum_b \langle z_b, \mathrm{sg}(\hat\nabla \ell(z_b)) \rangle
$$

with $h$ the black box, $G$ the frozen decoder, and the gradient estimated coordinate by coordinate (CGE, $2d$ queries)
or along $q$ random directions (RGE, $q + 1$ queries):

$$
\hat g_k = \frac{\ell(z + \mu e_k) - \ell(z - \mu e_k)}{2 \mu}, \qquad
\hat g = \frac{d}{q} \sum_{j=1}^{q} \frac{\ell(z + \mu u_j) - \ell(z)}{\mu}\, u_j, \quad \|u_j\| = 1 .
$$

The auto-encoder is trained first, by the squared error of clean images. One of the two batched estimators in the
authors' code divides the coordinate-wise estimate by $q$; the sum above is the paper's.

Reference: Yimeng Zhang, Yuguang Yao, Jinghan Jia, Jinfeng Yi, Mingyi Hong, Shiyu Chang, Sijia Liu, "How to Robustify
Black-Box ML Models? A Zeroth-Order Optimization Perspective", ICLR 2022, arXiv 2203.14195. Certification is that of
Cohen, Rosenfeld and Kolter, arXiv 1902.02918.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.ops.arguments import (
    class_indices,
    finite_tensor,
    floating_tensor,
    in_range,
    integer,
    non_negative,
    one_of,
    positive,
)
from trimtab.ops.whole_state import WholeState

Method = Literal["cge", "rge"]
Logits = Callable[[Float[Tensor, "m ..."]], Float[Tensor, "m classes"]]
Values = Callable[[Float[Tensor, "copies batch ..."]], Float[Tensor, "copies batch"]]


def num_queries(method: Method, dim: int, q: int | None = None) -> int:
    """How many values of a function one gradient takes, for each sample.

    Example:
        >>> num_queries("cge", 32), num_queries("rge", 784, 64)
        (64, 65)
    """
    one_of("method", method, ("cge", "rge"))
    return 2 * integer("dim", dim) if method == "cge" else integer("q", dim if q is None else q) + 1


@torch.no_grad()
def zo_gradient(
    f: Values,
    z: Float[Tensor, "batch ..."],
    *,
    mu: float = 0.005,
    method: Method = "cge",
    q: int | None = None,
    directions: Float[Tensor, "q batch ..."] | None = None,
    generator: torch.Generator | None = None,
    chunk: int = 64,
) -> Float[Tensor, "batch ..."]:
    """The gradients of a function at each sample of a batch, from its values alone.

    Args:
        f: takes copies of the batch, moved a little, of shape `(copies, batch, ...)`, and gives one value for each. A
            sample's value must not depend on the others.
        z: where gradients are wanted.
        mu: length of the moves, positive.
        method: "cge", coordinate by coordinate, exact for quadratic functions; "rge", along random directions, unbiased
            for linear ones, with a squared error of `(d - 1) / q` of the gradient's.
        q: number of random directions; as many as coordinates where it is None.
        directions: these directions of unit length instead of random ones.
        generator: source of the draw; torch's global one where it is None.
        chunk: copies that `f` is given together.

    Returns:
        The estimate, a constant.

    Raises:
        TypeError: `z` is not floating point, or `directions` no tensor.
        ValueError: `f` gives something else than one value for each sample of each copy, or an argument is out of
            range.

    Example:
        >>> z = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
        >>> zo_gradient(lambda z: z.square().sum(2), z)
        tensor([[2.0000, 4.0000]], dtype=torch.float64)
    """
    floating_tensor("z", z)
    if z.ndim < 2 or z.numel() == 0:
        raise ValueError(f"z must have shape (batch, ...) with at least one sample, got {tuple(z.shape)}")
    positive("mu", mu)
    one_of("method", method, ("cge", "rge"))
    integer("chunk", chunk)
    z = z.detach()
    dim = z[0].numel()
    if method == "cge":
        parts = []
        for rows in torch.eye(dim, dtype=z.dtype, device=z.device).split(max(1, chunk // 2)):
            moves = mu * rows.view(len(rows), 1, *z.shape[1:])
            ahead, behind = _values(f, torch.cat([z + moves, z - moves])).chunk(2)
            parts.append((ahead - behind) / (2 * mu))
        return torch.cat(parts).T.reshape(z.shape)
    count = integer("q", dim if q is None else q)
    if directions is not None and not isinstance(directions, Tensor):
        raise TypeError(f"directions must be a tensor, got {type(directions).__name__}")
    if directions is not None:
        if directions.ndim != z.ndim + 1 or directions.shape[1:] != z.shape or len(directions) == 0:
            raise ValueError(f"directions must be (q, {', '.join(map(str, z.shape))}), got {tuple(directions.shape)}")
        count = len(directions)
    here, total = _values(f, z[None]), torch.zeros_like(z)
    for first in range(0, count, chunk):
        number = min(chunk, count - first)
        if directions is None:
            device = z.device if generator is None else generator.device
            drawn = torch.randn((number, *z.shape), generator=generator, dtype=z.dtype, device=device).to(z.device)
            length = drawn.flatten(2).norm(dim=2).clamp_min(torch.finfo(z.dtype).tiny)
            unit = drawn / length.view(number, len(z), *[1] * (z.ndim - 1))
        else:
            unit = directions[first : first + number].to(z)
        rise = (_values(f, z + mu * unit) - here) / mu
        total += (rise.view(number, len(z), *[1] * (z.ndim - 1)) * unit).sum(0)
    return total * (dim / count)


def _values(f: Values, copies: Tensor) -> Tensor:
    values = f(copies)
    if values.shape != copies.shape[:2]:
        wanted = f"one value for each sample of each copy, {tuple(copies.shape[:2])}"
        raise ValueError(f"f must give {wanted}, got shape {tuple(values.shape)}")
    return values


def zo_surrogate(z: Float[Tensor, "batch ..."], gradient: Float[Tensor, "batch ..."]) -> Float[Tensor, ""]:
    """A loss whose gradient with respect to `z` is the one given, over the batch: backpropagate it into what made `z`.

    Its value means nothing.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: `gradient` has not the shape of `z`.

    Example:
        >>> z = torch.ones(2, 3, requires_grad=True)
        >>> zo_surrogate(z, torch.full((2, 3), 4.0)).backward()
        >>> z.grad
        tensor([[2., 2., 2.],
                [2., 2., 2.]])
    """
    if not all(isinstance(held, Tensor) and held.is_floating_point() for held in (z, gradient)):
        raise TypeError("z and gradient must be floating-point tensors, got others")
    if z.shape != gradient.shape:
        raise ValueError(f"gradient must be of shape {tuple(z.shape)} as z, got {tuple(gradient.shape)}")
    return (z * gradient.detach()).sum() / len(z)


class BlackBoxDefense(WholeState, nn.Module):
    """A denoiser, and the code of an auto-encoder, in front of a classifier that is only asked.

    `loss(x)` trains the denoiser (and the encoder); calling it classifies: `query(decoder(encoder(denoiser(x))))`. Add
    noise and count votes to be certified, see `certify`. Layers must treat samples one by one: batch normalisation in
    training mode does not. Without encoder and decoder gradients are estimated at the denoised image itself (ZO-DS).

    Args:
        query: the black box, images to logits; nothing of it is held, moved or trained.
        denoiser: images to images.
        encoder, decoder: a trained auto-encoder, or None for both; the decoder is frozen and put into eval mode.
        sigma: standard deviation of the noise, at least 0.
        method: "cge" or "rge", see `zo_gradient`.
        q: number of random directions.
        mu: length of the moves.
        train_encoder: whether the encoder learns too, as the paper found best.
        chunk: copies of the batch that are asked about together.

    Attributes:
        queries: how many images the black box has been asked about in training, a buffer.

    Raises:
        ValueError: only one of encoder and decoder is given, or an argument is out of range.

    Example:
        >>> query = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        >>> encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
        >>> decoder = nn.Sequential(nn.Linear(2, 16), nn.Unflatten(1, (1, 4, 4)))
        >>> defense = BlackBoxDefense(query, nn.Conv2d(1, 1, 3, padding=1), encoder, decoder, sigma=0.25)
        >>> defense.loss(torch.rand(5, 1, 4, 4))["total"].backward()
        >>> defense.queries  # for five images a clean answer, and two for each of the code's two numbers
        tensor(25)
    """

    queries: Tensor
    query: Logits

    def __init__(
        self,
        query: Logits,
        denoiser: nn.Module,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        *,
        sigma: float = 0.25,
        method: Method = "cge",
        q: int | None = None,
        mu: float = 0.005,
        train_encoder: bool = True,
        chunk: int = 64,
    ) -> None:
        super().__init__()
        if (encoder is None) != (decoder is None):
            raise ValueError("encoder and decoder must come together, got one without the other")
        self.sigma, self.mu = non_negative("sigma", sigma), positive("mu", mu)
        self.method: Method = one_of("method", method, ("cge", "rge"))
        self.q, self.chunk = None if q is None else integer("q", q), integer("chunk", chunk)
        self.denoiser = denoiser
        self.encoder = nn.Identity() if encoder is None else encoder.requires_grad_(train_encoder)
        self.decoder = nn.Identity() if decoder is None else decoder.requires_grad_(False).eval()
        self.__dict__["query"] = query  # not as a submodule: a black box has no weights to save or to train
        self.register_buffer("queries", torch.zeros((), dtype=torch.int64))

    def train(self, mode: bool = True) -> BlackBoxDefense:
        """As of every module, but for the decoder, which stays in eval mode."""
        super().train(mode)
        self.decoder.eval()
        return self

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        """The black box's logits of what the defence makes of images."""
        logits: Tensor = self.query(self.decoder(self.encoder(self.denoiser(x))))
        return logits

    def loss(
        self,
        x: Float[Tensor, "batch ..."],
        targets: Int[Tensor, " batch"] | None = None,
        *,
        noise: Float[Tensor, "batch ..."] | None = None,
        directions: Float[Tensor, "q batch ..."] | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """What to backpropagate.

        Args:
            x: clean images.
            targets: labels; the black box's own answers on `x` where it is None, as in the paper.
            noise: standard normal, of the shape of `x`; drawn where it is None.
            directions: see `zo_gradient`.
            generator: source of all draws.

        Returns:
            "total", whose gradient is the estimate while its value means nothing, and "cross_entropy", a mean over the
            batch and its moved copies.

        Raises:
            TypeError: `x` is not floating point, or `targets` not int64.
            ValueError: shapes do not fit, or the batch is empty.
        """
        floating_tensor("x", x)
        if x.ndim < 2 or len(x) == 0:
            raise ValueError(f"x must have shape (batch, ...) with at least one sample, got {tuple(x.shape)}")
        if noise is not None and noise.shape != x.shape:
            raise ValueError(f"noise must be of shape {tuple(x.shape)} as x, got {tuple(noise.shape)}")
        if targets is not None:
            class_indices("targets", targets)
            if targets.shape != x.shape[:1]:
                raise ValueError(f"targets must be {len(x)} labels, got shape {tuple(targets.shape)}")
        if noise is None:
            device = x.device if generator is None else generator.device
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)
        asked = 0
        if targets is None:
            with torch.no_grad():
                targets = self.query(x).argmax(1)
            asked += len(x)
        labels = targets
        z = self.encoder(self.denoiser(x + self.sigma * noise))
        seen: list[Tensor] = []

        def values(copies: Tensor) -> Tensor:
            logits = self.query(self.decoder(copies.flatten(0, 1)))
            found = F.cross_entropy(floating_tensor("logits", logits), labels.repeat(len(copies)), reduction="none")
            seen.append(found)
            return found.view(copies.shape[:2]).to(copies.dtype)

        gradient = zo_gradient(
            values,
            z,
            mu=self.mu,
            method=self.method,
            q=self.q,
            directions=directions,
            generator=generator,
            chunk=self.chunk,
        )
        entropies = torch.cat(seen)
        self.queries += asked + len(entropies)
        return {"total": zo_surrogate(z, gradient), "cross_entropy": entropies.mean()}


@dataclass(frozen=True)
class Certificate:
    """What a smoothed classifier says of inputs, and how far around them it is sure to say it.

    Attributes:
        labels: predicted classes; -1 where it abstains.
        radius: radii of the certified balls in the Euclidean norm, 0 where it abstains.
    """

    labels: Int[Tensor, " batch"]
    radius: Float[Tensor, " batch"]

    def accuracy(self, targets: Int[Tensor, " batch"], radius: float = 0.0) -> float:
        """Share of inputs that are rightly classified and certified at a radius.

        Args:
            targets: the right classes.
            radius: at least 0.

        Raises:
            ValueError: there is not one class for each input, or `radius` is negative or NaN.

        Example:
            >>> found = Certificate(torch.tensor([1, 2, -1]), torch.tensor([0.5, 0.1, 0.0]))
            >>> found.accuracy(torch.tensor([1, 2, 0]), radius=0.25)
            0.3333...
        """
        if targets.shape != self.labels.shape:
            raise ValueError(f"targets must be of shape {tuple(self.labels.shape)}, got {tuple(targets.shape)}")
        if not (isinstance(radius, float | Real) and radius >= 0):
            raise ValueError(f"radius must be at least 0, got {radius!r}")
        return ((self.labels == targets) & (self.radius >= radius)).float().mean().item()


@torch.no_grad()
def certify(
    predict: Logits,
    x: Float[Tensor, "batch ..."],
    sigma: float,
    *,
    n0: int = 100,
    n: int = 10_000,
    alpha: float = 0.001,
    batch_size: int = 1000,
    generator: torch.Generator | None = None,
) -> Certificate:
    r"""Randomised smoothing: the class that wins most votes under Gaussian noise, and the ball in which it must win.

    The class is chosen by `n0` votes. Of `n` others the share of its votes is bounded from below (Clopper and Pearson),
    and the radius is $\sigma \Phi^{-1}$ of that bound; at a bound of half or less it abstains.

    Args:
        predict: images to logits; a sample's must not depend on the others'.
        x: images.
        sigma: standard deviation of the noise, positive.
        n0, n: numbers of votes.
        alpha: probability that a certificate is wrong, in (0, 1).
        batch_size: images that `predict` is given together.
        generator: source of the noise, on the CPU; torch's global one where it is None.

    Raises:
        TypeError: `x` is not floating point.
        ValueError: it is empty or not finite, or an argument is out of range.

    Example:
        >>> found = certify(lambda x: F.one_hot(torch.zeros(len(x), dtype=torch.int64), 3), torch.zeros(1, 4), 0.25)
        >>> found.labels, found.radius  # always the same class: 0.25 times the normal quantile of 0.001 ** 1e-4
        (tensor([0]), tensor([0.7996]))
    """
    from scipy.stats import beta, norm

    x = finite_tensor("x", x, floating=True)
    if x.ndim < 2 or len(x) == 0:
        raise ValueError(f"x must have shape (batch, ...) with at least one sample, got {tuple(x.shape)}")
    positive("sigma", sigma)
    in_range("alpha", alpha, 0, 1, "neither")
    integer("n0", n0), integer("n", n), integer("batch_size", batch_size)
    first = _votes(predict, x, sigma, n0, batch_size, generator)
    chosen = first.argmax(1)
    held = _votes(predict, x, sigma, n, batch_size, generator).gather(1, chosen[:, None])[:, 0].cpu().numpy()
    bound = np.where(held > 0, beta.ppf(alpha, held, n - held + 1), 0.0)
    sure = bound > 0.5
    radius = torch.as_tensor(sigma * norm.ppf(bound.clip(0.5, None)), dtype=torch.float32)
    certain = torch.as_tensor(sure)
    labels = torch.where(certain.to(chosen.device), chosen, -1)
    return Certificate(labels, (radius * certain).to(x.device))


def _votes(
    predict: Logits, x: Tensor, sigma: float, n: int, batch_size: int, generator: torch.Generator | None
) -> Int[Tensor, "batch classes"]:
    copies, counts = max(1, batch_size // len(x)), []
    for done in range(0, n, copies):
        number = min(copies, n - done)
        noise = torch.randn((number, *x.shape), generator=generator, dtype=x.dtype).to(x.device)
        logits = torch.cat([predict(part) for part in (x + sigma * noise).flatten(0, 1).split(batch_size)])
        counts.append(F.one_hot(logits.argmax(1), logits.shape[1]).view(number, len(x), -1).sum(0))
    return torch.stack(counts).sum(0)
