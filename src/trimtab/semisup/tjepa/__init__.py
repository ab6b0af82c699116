r"""T-JEPA: learns features of a table by telling the features of some columns from those of others, row by row.

For tables, where nobody knows which changes of a row leave its meaning: there are no augmentations and nothing is
reconstructed. Every row keeps its own random columns as context and others as targets; a predictor gets the context's
codes and the targets' places, and must tell the codes that an averaged encoder makes of the whole row.

$$
\mathcal{L} = \frac{1}{K} \sum_{k=1}^{K} \operatorname{MSE}\Bigl(
    g_\phi\bigl( f_\theta(x_{C}),\ T_k \bigr),\ \bigl[ f_{\bar\theta}(x) \bigr]_{T_k}
\Bigr), \qquad \bar\theta \leftarrow m\, \bar\theta + (1 - m)\, \theta
$$

with $C \cap T_k = \emptyset$ and $m$ rising from 0.996 to 1. A further token that belongs to no column stands before
the columns in both encoders, is never predicted, and is dropped from the codes; without it they collapse more easily.

Reference: Hugo Thimonier, Jose Lucas De Melo Costa, Fabrice Popineau, Arpad Rimmel and Bich-Liên Doan, "T-JEPA:
Augmentation-Free Self-Supervised Learning for Tabular Data", ICLR 2025, arXiv 2410.05016. The authors' code draws the
columns among the first positions of a sequence that the further token leads, so that it may be drawn itself and the
last column never is; here the columns are counted past it, as the paper says.
"""

from trimtab.semisup.tjepa.masks import ColumnMasks, Shares, sample_column_masks
from trimtab.semisup.tjepa.model import TJEPA, TabularEncoder, code_variance
from trimtab.semisup.tjepa.tokens import TabularTokenizer

__all__ = [
    "TJEPA",
    "ColumnMasks",
    "Shares",
    "TabularEncoder",
    "TabularTokenizer",
    "code_variance",
    "sample_column_masks",
]
