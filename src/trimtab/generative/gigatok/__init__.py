r"""GigaTok: a tokenizer of images into few 1-D tokens whose codes stay easy to model as it grows.

A larger tokenizer reconstructs better and writes codes that an autoregressive model learns less well. Here a layer
after the quantizer is aligned with a frozen encoder that knows what images mean, which keeps the codes simple.

$$
\mathcal{L} = \lVert x - \hat x \rVert^2 + \mathcal{L}_{VQ} - \lambda \, \frac1T \sum_t
\cos\bigl(\mathrm{mlp}(h_t), f_t(x)\bigr) + \lambda_H \Bigl(\overline{H(p_n)} - H(\overline{p_n})\Bigr)
$$

with $h$ an early layer of the decoder, $f$ the frozen encoder and the last term, for the largest models, spreading
codes. The encoder reads a grid of features into tokens by queries that start from averages of the grid, coarse to fine;
the decoder reads them back by queries for every place. Most of the parameters belong in the decoder. What codes are
worth is measured by a small autoregressive model on them (`AutoregressiveProbe`).

The authors add a perceptual and an adversarial loss, which take networks of their own: add yours to
`Tokenizer1D.loss`, from `Tokenized.images`. Their release also reconstructs from the unquantized grid in early
training, which is left out.

Reference: Xiong, Liew, Huang, Feng and Liu, "GigaTok: Scaling Visual Tokenizers to 3 Billion Parameters for
Autoregressive Image Generation", ICCV 2025, arXiv 2504.08736.
"""

from trimtab.generative.gigatok.probe import AutoregressiveProbe
from trimtab.generative.gigatok.tokenizer import Tokenized, Tokenizer1D, level_averages, semantic_regularization

__all__ = ["AutoregressiveProbe", "Tokenized", "Tokenizer1D", "level_averages", "semantic_regularization"]
