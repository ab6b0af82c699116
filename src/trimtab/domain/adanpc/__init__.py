r"""AdaNPC: classifies by a vote among remembered source features, and remembers what it has classified.

For a trained model whose surroundings change while it runs. In place of the linear head, the nearest entries of a
memory of source features and labels vote, and each confidently classified sample joins the memory, which so drifts
with the data; no weight is changed. With $\mathcal N(z)$ the $k$ entries most similar to a feature $z$,

$$
s_c(z) = \sum_{j \in \mathcal N(z)} \frac{e^{\cos(z, z_j)/T}}{\sum_{l \in \mathcal N(z)} e^{\cos(z, z_l)/T}}
  \; \mathbb 1[y_j = c] .
$$

`NeighbourLoss` trains an encoder for such a vote, over a queue of its own latest features. `AdaNPCBN` is the authors'
variant with a batch normalisation of the features that minimises the entropy of the scores.

Reference: Yi-Fan Zhang, Xue Wang, Kexin Jin, Kun Yuan, Zhang Zhang, Liang Wang, Rong Jin and Tieniu Tan, "AdaNPC:
Exploring Non-Parametric Classifier for Test-Time Adaptation", ICML 2023, arXiv 2304.12566.
"""

from trimtab.domain.adanpc.memory import AdaNPC, neighbour_vote
from trimtab.domain.adanpc.normalised import AdaNPCBN
from trimtab.domain.adanpc.training import NeighbourLoss

__all__ = ["AdaNPC", "AdaNPCBN", "NeighbourLoss", "neighbour_vote"]
