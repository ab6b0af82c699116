r"""Federated learning of image and text encoders of any architecture: only representations of public pairs travel.

Clients may have images, texts or both, and networks of their own; no weights are sent. In each round the server sends
the representations $G^I, G^T$ of $N$ public pairs; clients train on their own data and then towards these; they send
back the representations $Z_k$ of the same pairs, which the server fuses and distils into its model. Representations
have length 1.

*Fusing* (global-local cross-modal aggregation): a client's representation counts the more, the better it finds its
own partner among those of the other modality:

$$
a_{ki} = \mathrm{softmax}_k \log \frac{e^{\langle Z_{ki}, G'_i \rangle}}{\sum_j e^{\langle Z_{ki}, G'_j \rangle}},
\qquad \bar Z_i = \sum_k a_{ki} Z_{ki}.
$$

*Clients* (inter-modal and intra-modal contrast): a representation $z_i$ is to find its partner among the server's of
the other modality, and to lie nearer to the server's own than to what the client's model $z_i^0$ gave before the round:

$$
\ell_\mathrm{inter} = -\log \frac{e^{\langle z_i, G'_i \rangle / \tau}}{\sum_j e^{\langle z_i, G'_j \rangle / \tau}},
\qquad
\ell_\mathrm{intra} = -\log \frac{e^{\langle z_i, G_i \rangle / \tau}}
{e^{\langle z_i, G_i \rangle / \tau} + e^{\langle z_i, z_i^0 \rangle / \tau}}.
$$

`CreamFLServer` and `CreamFLClient` hold what each side needs in a round, around encoders of any kind. A round: the
server trains on the pairs as it likes and calls `share`; each client calls `begin`, trains on its own data, then on
`step` over batches of the pairs, and calls `upload`; the server calls `receive`, and trains on its `step` in a further
pass over the pairs.

The server distils each fused modality once, with weight 0.3. In the authors' release the term of a modality comes a
second time where clients of both modalities take part, see `distillation`.

Reference: Qiying Yu, Yang Liu, Yimu Wang, Ke Xu and Jingjing Liu, "Multimodal Federated Learning via Contrastive
Representation Ensemble", ICLR 2023, arXiv 2302.08888.
"""

from trimtab.federated.creamfl.contrast import (
    client_contrast,
    contrastive_weights,
    distillation,
    ensemble,
    fuse,
    inter_modal_loss,
    intra_modal_loss,
    represent,
)
from trimtab.federated.creamfl.parties import CreamFLClient, CreamFLServer

__all__ = [
    "CreamFLClient",
    "CreamFLServer",
    "client_contrast",
    "contrastive_weights",
    "distillation",
    "ensemble",
    "fuse",
    "inter_modal_loss",
    "intra_modal_loss",
    "represent",
]
