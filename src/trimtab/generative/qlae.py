r"""QLAE: an auto-encoder whose every latent dimension takes one of few learned values, under strong weight decay.

For representations in which each dimension means one thing, without labels of what there is to mean. The small
codebooks make the encoder combine few values into codes, and the decay keeps encoder and decoder from giving a value
different meanings in different company.

$$
\hat z_j = \arg\min_{v \in V_j} |v - z_j|, \qquad
\mathcal{L} = \mathrm{BCE}(x, \mathrm{dec}(\hat z))
  + \lambda \lVert \mathrm{sg}(z) - \hat z \rVert^2 + \lambda \lVert z - \mathrm{sg}(\hat z) \rVert^2
$$

with means for norms, a codebook $V_j$ of its own for each dimension, $\lambda = 0.01$ and AdamW's weight decay at 0.1
on everything but biases and codebooks. `infomec` measures what comes of it.

Reference: Hsu, Dorrell, Whittington, Wu and Finn, "Disentanglement via Latent Quantization", NeurIPS 2023,
arXiv 2305.18378.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.generative.quantize import Quantized, ScalarQuantizer
from trimtab.ops.arguments import non_negative, real_problem, same_shape


@dataclass(frozen=True)
class Reconstruction:
    """A batch through the auto-encoder.

    Attributes:
        logits: of the reconstruction; their sigmoid is in [0, 1] as the data are.
        code: the quantized latents.
    """

    logits: Tensor
    code: Quantized


class QuantizedAutoencoder(nn.Module):
    """An encoder, a quantizer of its output and a decoder.

    Args:
        encoder: maps a batch to (batch, num_latents); the authors take twice as many latents as they expect factors.
        decoder: maps (batch, num_latents) to logits of the shape of the data.
        quantizer: a `ScalarQuantizer`, or what returns a `Quantized` as it does.

    Example:
        >>> import torch
        >>> encoder, decoder = nn.Linear(8, 4), nn.Linear(4, 8)
        >>> model = QuantizedAutoencoder(encoder, decoder, ScalarQuantizer(4))
        >>> optimizer = torch.optim.AdamW(decay_groups(model, weight_decay=0.1), lr=1e-3)
        >>> loss = model.loss(torch.rand(16, 8))
        >>> loss.backward()
        >>> optimizer.step()
        >>> model.encode(torch.rand(3, 8)).shape  # indices of the values
        torch.Size([3, 4])
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, quantizer: ScalarQuantizer) -> None:
        super().__init__()
        self.encoder, self.decoder, self.quantizer = encoder, decoder, quantizer

    def forward(self, x: Float[Tensor, "batch ..."]) -> Reconstruction:
        """Encode, quantize and decode."""
        code = self.quantizer(self.encoder(x))
        return Reconstruction(self.decoder(code.values), code)

    def loss(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, ""]:
        """Binary cross-entropy of the pixels and the quantizer's own loss.

        Args:
            x: numbers in [0, 1].

        Raises:
            ValueError: if the decoder's output has another shape than `x`.
        """
        if problem := real_problem(x=x):
            raise TypeError(problem)
        found = self(x)
        same_shape("logits", found.logits, "x", x)
        return F.binary_cross_entropy_with_logits(found.logits, x) + found.code.loss  # type: ignore[no-any-return]

    def encode(self, x: Float[Tensor, "batch ..."]) -> Tensor:
        """The indices of the values that each latent takes."""
        indices: Tensor = self.quantizer(self.encoder(x)).indices
        return indices

    def decode(self, indices: Tensor) -> Tensor:
        """What indices stand for, in [0, 1]."""
        return self.decoder(self.quantizer.lookup(indices)).sigmoid()  # type: ignore[no-any-return]


def decay_groups(module: nn.Module, weight_decay: float = 0.1) -> list[dict[str, Any]]:
    """Two groups for an optimizer with decoupled weight decay: what decays, and biases and codebooks, which do not.

    A decayed codebook would shrink towards a single value.

    Args:
        module: the auto-encoder.
        weight_decay: of the first group.

    Raises:
        ValueError: if `weight_decay` is negative or not finite.

    Example:
        >>> model = nn.ModuleDict({"encoder": nn.Linear(8, 4), "quantizer": ScalarQuantizer(4)})
        >>> [[tuple(p.shape) for p in group["params"]] for group in decay_groups(model)]
        [[(4, 8)], [(4,), (4, 10)]]
    """
    non_negative("weight_decay", weight_decay)
    held = [m for m in module.modules() if isinstance(m, ScalarQuantizer)]
    spared = {id(p) for quantizer in held for p in quantizer.parameters()}
    spared |= {id(p) for name, p in module.named_parameters() if name.rpartition(".")[2] == "bias"}
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if id(p) not in spared], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) in spared], "weight_decay": 0.0},
    ]
