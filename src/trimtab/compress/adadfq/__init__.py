r"""AdaDFQ: quantisation-aware training without data, on images that are neither trivial nor hopeless for the student.

For a model whose training data may not be had. A generator makes images from noise and labels for the full-precision
network $P$ and the quantised one $Q$, whose logits are $t$ and $q$. Where $p = \operatorname{softmax}(t - q)$ is flat
the two agree; its entropy $h$, scaled to $h' \in [0, 1]$ between the batch's smallest and $\ln C$, is kept between two
margins, while labels and the statistics of $P$'s batch normalisation keep the images like data:

$$
L_G = \overline{[\lambda_l - h']_+} + \overline{[h' - \lambda_u]_+}
+ \beta \bigl( 0.2\, \mathrm{CE}(t - q, y) + 0.1\, \mathrm{CE}(t + q, y) \bigr) + \gamma\, L_{\mathrm{BN}}, \qquad
L_Q = - T^2\, \overline{H\bigl( \operatorname{softmax}((t - q) / T) \bigr)} .
$$

The generator steps on $L_G$, then $Q$ on $L_Q$ with the same images. $L_Q$ is least where $t - q$ is the same for all
classes.

Reference: Biao Qian, Yang Wang, Richang Hong, Meng Wang, "Adaptive Data-Free Quantization", CVPR 2023,
arXiv 2303.06869.
"""

from trimtab.compress.adadfq.images import BNStatistics, ConditionalGenerator
from trimtab.compress.adadfq.losses import boundary_loss, difference_entropy
from trimtab.compress.adadfq.training import AdaDFQ

__all__ = ["AdaDFQ", "BNStatistics", "ConditionalGenerator", "boundary_loss", "difference_entropy"]
