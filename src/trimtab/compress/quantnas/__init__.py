r"""QuantNAS: a search for operations and numbers of bits together, in which cheap noise stands for quantisation.

For a network that will be quantised: which convolution, and how many bits, should each of its blocks have? All choices
are mixed with weights that are learned, and quantisation is imitated by noise of the size of its error, smooth in
those weights and free of learned quantisers. With $f = 1 / (|B| + 1)$ and the shares $a_b$ of each number of bits,

$$
\tilde w = \frac{f\, w + \sum_{b \in B} a_b\, \operatorname{sg}\bigl[ w + \tfrac{\max w - \min w}{2^b - 1}
\tfrac{\epsilon_b}{2} \bigr]}{f + \sum_b a_b}, \qquad \epsilon_b \sim \mathcal{N}(0, 1),
$$

and likewise for the inputs: one convolution for all numbers of bits. Gradients pass through the share $f$ alone. An
entropy of the mixture's weights, which rises in the search, makes every block choose one operation, and a residual
block rescales its branch by the deviation of its skip connection (ADQ), which takes the place of plain batch
normalisation: $y = \phi(\operatorname{std}(s))\, F(\mathrm{BN}(x)) + s$.

In the release the clean part's weight is $f$ itself, so that all weights add up to more than one (`legacy`). Normal
noise of several numbers of bits is drawn as one, of the same distribution.

Reference: Egor Shvetsov, Dmitry Osin, Alexey Zaytsev, Ivan Koryakovskiy, Valentin Buchnev, Ilya Trofimov, Evgeny
Burnaev, "QuantNAS for super resolution: searching for efficient quantization-friendly architectures against
quantization noise", 2022, arXiv 2208.14839.
"""

from trimtab.compress.quantnas.blocks import AdaptiveDeviation, MixedOp, mixed_ops, weight_parameters
from trimtab.compress.quantnas.noise import (
    Noise,
    QuantNoiseConv2d,
    error_scale,
    noisy_mixture,
    quantization_noise,
)
from trimtab.compress.quantnas.search import QuantNAS, architecture_entropy, entropy_weight

__all__ = [
    "AdaptiveDeviation",
    "MixedOp",
    "Noise",
    "QuantNAS",
    "QuantNoiseConv2d",
    "architecture_entropy",
    "entropy_weight",
    "error_scale",
    "mixed_ops",
    "noisy_mixture",
    "quantization_noise",
    "weight_parameters",
]
