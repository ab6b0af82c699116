"""Auto-encoders that everyone would want to see beside a method of representation learning."""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.generative.quantize import VectorQuantizer


class Learner(Protocol):
    """What learns a representation: a module with a loss, a code and a reconstruction."""

    discrete: bool
    """Whether the code takes few values, such as indices of a codebook."""

    def loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """The loss of a batch of images with values in [0, 1], to be minimised."""
        ...

    def code(self, x: Tensor) -> Float[Tensor, "batch latents"]:
        """The representation, without anything random."""
        ...

    def reconstruct(self, x: Tensor) -> Tensor:
        """The images again, values in [0, 1]."""
        ...

    def parameters(self) -> object:
        """As every module has them."""
        ...


class Autoencoder(nn.Module):
    """Trained by binary cross-entropy alone."""

    discrete = False

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return F.binary_cross_entropy_with_logits(self.decoder(self.code(x)), x)

    def code(self, x: Tensor) -> Tensor:
        code: Tensor = self.encoder(x)
        return code

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.decoder(self.code(x)).sigmoid()  # type: ignore[no-any-return]


class BetaVAE(Autoencoder):
    """A variational auto-encoder with a weight on the divergence; the plain one at a weight of 1.

    Higgins et al., "beta-VAE: Learning Basic Visual Concepts with a Constrained Variational Framework", ICLR 2017.

    Args:
        encoder: gives twice as many numbers as the code has, means and logarithms of variances.
        decoder: from a code to logits.
        beta: the weight.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, beta: float) -> None:
        super().__init__(encoder, decoder)
        self.beta = beta

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Means and logarithms of variances."""
        mean, log_var = self.encoder(x).chunk(2, 1)
        return mean, log_var.clamp(-12, 6)

    def code(self, x: Tensor) -> Tensor:
        return self.posterior(x)[0]

    def loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        mean, log_var = self.posterior(x)
        z = mean + (0.5 * log_var).exp() * torch.randn(mean.shape, generator=generator)
        fit = F.binary_cross_entropy_with_logits(self.decoder(z), x)
        return fit + self.divergence(z, mean, log_var).mean() / x[0].numel()

    def divergence(self, z: Tensor, mean: Tensor, log_var: Tensor) -> Float[Tensor, " batch"]:
        """The weighted divergence from the prior."""
        return self.beta * 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1)


class BetaTCVAE(BetaVAE):
    """A variational auto-encoder with a weight on the total correlation of its code.

    Chen et al., "Isolating Sources of Disentanglement in Variational Autoencoders", NeurIPS 2018, arXiv 1802.04942,
    by its minibatch-weighted sampling.

    Args:
        encoder, decoder, beta: as for `BetaVAE`.
        size: of the training set.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, beta: float, size: int) -> None:
        super().__init__(encoder, decoder, beta)
        self.size = size

    def divergence(self, z: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
        def log_normal(at: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
            return -0.5 * ((at - mean).square() / log_var.exp() + log_var + math.log(2 * math.pi))

        own = log_normal(z, mean, log_var).sum(1)
        pairs = log_normal(z[:, None], mean[None], log_var[None])
        among = math.log(len(z) * self.size)
        joint = pairs.sum(2).logsumexp(1) - among
        product = (pairs.logsumexp(1) - among).sum(1)
        prior = log_normal(z, torch.zeros(()), torch.zeros(())).sum(1)
        return (own - joint) + self.beta * (joint - product) + (product - prior)


class VQVAE(Autoencoder):
    """An auto-encoder whose code is several entries of one codebook of vectors.

    Args:
        encoder: gives `latents * dim` numbers.
        decoder: takes as many.
        latents: entries in a code.
        dim: length of an entry.
        num_codes: size of the codebook.
    """

    discrete = True

    def __init__(self, encoder: nn.Module, decoder: nn.Module, latents: int, dim: int, num_codes: int) -> None:
        super().__init__(encoder, decoder)
        self.latents = latents
        self.quantizer = VectorQuantizer(num_codes, dim, normalize=False)

    def loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        found = self.quantizer(self._vectors(x))
        return F.binary_cross_entropy_with_logits(self.decoder(found.values.flatten(1)), x) + found.loss  # type: ignore[no-any-return]

    def code(self, x: Tensor) -> Tensor:
        return self.quantizer(self._vectors(x)).indices  # type: ignore[no-any-return]

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.decoder(self.quantizer(self._vectors(x)).values.flatten(1)).sigmoid()  # type: ignore[no-any-return]

    def _vectors(self, x: Tensor) -> Tensor:
        return self.encoder(x).unflatten(1, (self.latents, -1))  # type: ignore[no-any-return]


def adam(model: nn.Module, weight_decay: float = 0.0, lr: float = 1e-3) -> torch.optim.Optimizer:
    """Adam, with decoupled weight decay on everything but biases."""
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    others = [p for name, p in model.named_parameters() if not name.endswith("bias")]
    groups = [{"params": others, "weight_decay": weight_decay}, {"params": biases, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, fused=True)
