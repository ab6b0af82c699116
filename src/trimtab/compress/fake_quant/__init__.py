r"""Quantisers that training can pass through: values on a grid, gradients as if they were not.

What the quantisation methods of this area share. Weights are quantised by parametrizations (`LSQWeight`,
`MinMaxWeight`; `torch.nn.utils.parametrize` bakes them in), the inputs of layers by modules (`LSQActivation`,
`MinMaxActivation`), and `prepare_quantized` puts both into a copy of a model.

$$
\hat x = s\, \bigl( \operatorname{clamp}( \lfloor x / s \rceil + z,\; q_{\min},\; q_{\max} ) - z \bigr)
$$

The step $s$ and the zero point $z$ come from the smallest and the largest value (min-max), or the step is learned
(LSQ, with $z = 0$): its gradient, $\lfloor x / s \rceil - x / s$ inside the range and $q_{\min}$ or $q_{\max}$ outside,
is scaled by $1 / \sqrt{n\, q_{\max}}$.

Reference: Steven K. Esser, Jeffrey L. McKinstry, Deepika Bablani, Rathinakumar Appuswamy, Dharmendra S. Modha,
"Learned Step Size Quantization", ICLR 2020, arXiv 1902.08153.
"""

from trimtab.compress.fake_quant.grid import (
    affine_qparams,
    fake_quantize,
    grad_scale,
    lsq_quantize,
    quant_range,
    round_ste,
)
from trimtab.compress.fake_quant.prepare import LAYERS, prepare_quantized, quantizable_layers, recalibrate_bn
from trimtab.compress.fake_quant.quantizers import LSQActivation, LSQWeight, MinMaxActivation, MinMaxWeight

__all__ = [
    "LAYERS",
    "LSQActivation",
    "LSQWeight",
    "MinMaxActivation",
    "MinMaxWeight",
    "affine_qparams",
    "fake_quantize",
    "grad_scale",
    "lsq_quantize",
    "prepare_quantized",
    "quant_range",
    "quantizable_layers",
    "recalibrate_bn",
    "round_ste",
]
