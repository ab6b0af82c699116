r"""DEPICT: clusters the code of a denoising autoencoder by a softmax head that learns its own balanced, soft targets.

For clustering images or other samples of which raw distances say little, where no label is at hand to tune anything. By
turns, targets are computed in closed form from the clean predictions $p$ of all samples, balanced by the clusters'
sizes, and the noisy predictions $\tilde p$ learn them, with every decoder layer tied to a clean encoder layer:

$$
q_{i k} \propto \frac{p_{i k}}{\bigl(\sum_{j} p_{j k}\bigr)^{1/2}}, \qquad
\mathcal{L} = -\frac1N \sum_{i k} q_{i k} \log \tilde p_{i k}
+ \sum_l \beta_l\, \bigl\lVert \hat h^l_i - h^l_i \bigr\rVert^2 .
$$

The targets are the paper's, by which $\mathrm{KL}(Q \Vert P) + \mathrm{KL}(f \Vert u)$ falls, with $f$ the sizes of the
clusters and $u$ equal ones. The authors' code takes $q \propto p^2 / \sum_j p_{j k}$ instead, which also sharpens
(`targets="dec"`). They find the first clusters by k-means or by agglomeration along a graph, which is not here, and
their kernels differ from one data set to the next.

Reference: Kamran Ghasedi Dizaji, Amirhossein Herandi, Cheng Deng, Weidong Cai and Heng Huang, "Deep Clustering via
Joint Convolutional Autoencoder Embedding and Relative Entropy Minimization", ICCV 2017, arXiv 1704.06327.
"""

from trimtab.semisup.depict.autoencoder import (
    DenoisingAutoencoder,
    Pass,
    conv_autoencoder,
    layerwise_reconstruction_loss,
    mlp_autoencoder,
)
from trimtab.semisup.depict.estimator import DEPICT, Targets, depict_targets

__all__ = [
    "DEPICT",
    "DenoisingAutoencoder",
    "Pass",
    "Targets",
    "conv_autoencoder",
    "depict_targets",
    "layerwise_reconstruction_loss",
    "mlp_autoencoder",
]
