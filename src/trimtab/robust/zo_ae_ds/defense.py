"""The denoiser and the code of an auto-encoder in front of a black box, and the loss that trains them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.ops.arguments import (
    class_indices,
    floating_tensor,
    integer,
    non_negative,
    one_of,
    positive,
)
from trimtab.ops.whole_state import WholeState
from trimtab.robust.zo_ae_ds.estimates import Method, zo_gradient, zo_surrogate
from trimtab.robust.zo_ae_ds.smoothing import Logits


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
