r"""EQ-Net: one network that works at every number of bits, per tensor or per channel, symmetric or not.

For a model that goes to hardware of several kinds: it is trained once, and each form is cut from it without training
again (batch normalisation's statistics are taken anew). Every quantised layer has a learned step for each number of
bits $b$ and each form, and where it is asymmetric an offset $\beta$ beside it:

$$
\hat x = \beta + s \bigl\lfloor \operatorname{clamp}( (x - \beta) / s,\; q_{\min},\; q_{\max} ) \bigr\rceil
$$

A step of training adds up the gradients of three sub-networks, the largest, a random one and the smallest, each guided
by the one before, $\tfrac12 \mathrm{CE} + \tfrac12 \mathrm{KL}(\operatorname{sg}[p_{j-1}] \,\|\, p_j)$, and the weights
are drawn towards a shape that suffers little from few bits, a flat and symmetric one,

$$
L_{\mathrm{WDR}} = \frac{1}{L} \sum_l \Bigl( 0.015\, \bigl( \operatorname{kurt}(w_l) - 1.8 \bigr)^2
+ \operatorname{skew}(w_l)^2 \Bigr) .
$$

A predictor of the accuracy from the numbers of bits then lets an evolution choose them for a budget. The released code
takes the magnitude of the offset, which loses its sign; here only the step's counts. It also draws a form for each
layer, where a sub-network here has one form, as hardware does, and it shapes the last layer's weights, which here have
8 bits and are left alone.

Reference: Ke Xu, Lei Han, Ye Tian, Shangshang Yang, Xingyi Zhang, "EQ-Net: Elastic Quantization Neural Networks",
ICCV 2023, arXiv 2308.07650.
"""

from trimtab.compress.eqnet.quantizer import ElasticQuantizer, elastic_quantize, searched_range
from trimtab.compress.eqnet.search import AccuracyPredictor, fit_predictor, search_config
from trimtab.compress.eqnet.subnets import (
    ElasticConfig,
    elastic_layers,
    elastic_weights,
    prepare_elastic,
    sample_config,
    set_config,
    uniform_config,
)
from trimtab.compress.eqnet.training import EQNet, guided_loss, weight_distribution_loss

__all__ = [
    "AccuracyPredictor",
    "EQNet",
    "ElasticConfig",
    "ElasticQuantizer",
    "elastic_layers",
    "elastic_quantize",
    "elastic_weights",
    "fit_predictor",
    "guided_loss",
    "prepare_elastic",
    "sample_config",
    "search_config",
    "searched_range",
    "set_config",
    "uniform_config",
    "weight_distribution_loss",
]
