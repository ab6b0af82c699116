r"""Quantizers: continuous features to the nearest entries of learned codebooks, with gradients that pass through.

`VectorQuantizer` has one codebook of vectors, `ScalarQuantizer` a small codebook of numbers for each latent dimension,
`MultiScaleQuantizer` writes a feature map as a pyramid of residuals, coarse to fine. Each returns a `Quantized`, whose
`loss` is to be added to the loss of what uses it.
"""

from trimtab.generative.quantize.codebooks import ScalarQuantizer, VectorQuantizer
from trimtab.generative.quantize.nearest import (
    Quantized,
    entropy_loss,
    rotation_trick,
    squared_distances,
    straight_through,
)
from trimtab.generative.quantize.pyramid import MultiScaleQuantizer, check_scales
from trimtab.generative.quantize.usage import CodebookUse, codebook_use

__all__ = [
    "CodebookUse",
    "MultiScaleQuantizer",
    "Quantized",
    "ScalarQuantizer",
    "VectorQuantizer",
    "check_scales",
    "codebook_use",
    "entropy_loss",
    "rotation_trick",
    "squared_distances",
    "straight_through",
]
