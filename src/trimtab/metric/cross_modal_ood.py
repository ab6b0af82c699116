r"""Cross-modal alignment: contrastive fine-tuning of an image and a text tower that keeps unknown inputs apart.

Use `CrossModalAlignmentLoss` in place of CLIP's loss when an image-text model is fine-tuned on known classes and must
still recognise inputs of other classes afterwards. With $Z = s \, U V^\top$ for normalised embeddings U of the images
and V of their texts, and the energies $E(u_i) = -\log \sum_j e^{Z_{ij}}$ and $E(v_j) = -\log \sum_i e^{Z_{ij}}$, the
mean energy of the known data is added to the symmetric cross-entropy of a batch of B pairs:

$$
L = \frac{1}{2B} \sum_{i=1}^{B} \Bigl[ -\log \frac{e^{Z_{ii}}}{\sum_j e^{Z_{ij}}} + \lambda E(u_i) \Bigr]
+ \frac{1}{2B} \sum_{j=1}^{B} \Bigl[ -\log \frac{e^{Z_{jj}}}{\sum_i e^{Z_{ij}}} + \lambda E(v_j) \Bigr]
= (1 - \lambda) L_{\mathrm{CLIP}} - \frac{\lambda}{B} \sum_{i=1}^{B} Z_{ii}
$$

The attraction within a pair, $-Z_{ii}$, stays whole and the repulsion between pairs is weakened by the factor
$1 - \lambda$, which lets the two modalities come closer (`modality_gap`). After training, `mcm_score` or
`neglabel_score` says how known an image looks; the latter weighs the names of the known classes against words for
other things, which `mine_negative_labels` chooses.

Reference: Jeonghyeon Kim, Sangheum Hwang, "Enhanced OoD Detection through Cross-Modal Alignment of Multi-Modal
Representations", CVPR 2025, arXiv 2503.18817. The scores are those of Yifei Ming et al., "Delving into
Out-of-Distribution Detection with Vision-Language Representations", NeurIPS 2022, arXiv 2211.13445 (MCM), and of Xue
Jiang et al., "Negative Label Guided OOD Detection with Pretrained Vision-Language Models", ICLR 2024, arXiv 2403.20078.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.metric.pairs import checked_embeddings, pair_masks
from trimtab.ops.arguments import floating_tensor, in_range, integer, positive, tensor
from trimtab.ops.pairwise import pairwise_cosine


def cross_modal_alignment(
    image_embeddings: Float[Tensor, "batch dim"],
    text_embeddings: Float[Tensor, "batch dim"],
    scale: float | Float[Tensor, ""] = 100.0,
    labels: Int[Tensor, " batch"] | None = None,
    lam: float = 1e-3,
) -> Float[Tensor, ""]:
    """The loss of a batch (equation in the module's docstring); arguments as in `CrossModalAlignmentLoss`.

    `lam=0` is CLIP's loss, and so FLYP where the texts are the names of the images' classes.

    Raises:
        TypeError: if embeddings are not floating point or `labels` not of integer type.
        ValueError: if shapes disagree, the batch is empty or a number is out of its range.

    Example:
        >>> pairs = torch.eye(2)
        >>> cross_modal_alignment(pairs, pairs, scale=1.0, lam=0.0)  # log(1 + exp(-1))
        tensor(0.3133)
        >>> cross_modal_alignment(pairs, pairs, scale=1.0, lam=1.0)
        tensor(-1.)
    """
    in_range("lam", lam, 0, 1)  # beyond 1, pairs would attract each other
    images, texts = _checked("image_embeddings", image_embeddings, "text_embeddings", text_embeddings)
    if len(images) != len(texts) or len(images) == 0:
        raise ValueError(
            f"text_embeddings must be as many as image_embeddings, and at least one, got {len(texts)} and {len(images)}"
        )
    # On the embeddings the scale spares a pass over the matrix.
    images, texts = _checked_scale(scale) * F.normalize(images, dim=1), F.normalize(texts, dim=1)
    with torch.autocast(images.device.type, enabled=False):  # half precision would tell cosines apart by 0.004
        logits = images @ texts.mT
    if labels is not None:
        checked_embeddings(images, labels)
        logits = logits.masked_fill(pair_masks(labels).positive, -math.inf)
    # Before the others, so that its gradient comes after theirs and needs no matrix of its own beside them.
    attraction = logits.diagonal().mean()
    truth = torch.arange(len(logits), device=logits.device)
    contrast = (F.cross_entropy(logits, truth) + F.cross_entropy(logits.mT, truth)) / 2
    return (1 - lam) * contrast - lam * attraction


class CrossModalAlignmentLoss(nn.Module):
    """The loss as a module: `loss(image_embeddings, text_embeddings, model.logit_scale.exp())`.

    With `lam` above 0 a larger scale lowers the loss for ever, so keep a trained scale at 100 or below, as CLIP does.
    Where the batch is split over processes, gather both embeddings first, in such a way that gradients flow back: the
    other processes' pairs are negatives too.

    Args:
        lam: how much repulsion is weakened, in [0, 1]. 0 is CLIP's loss, at 1 nothing but attraction is left.

    Raises:
        ValueError: if `lam` is out of its range.

    Example:
        >>> loss = CrossModalAlignmentLoss()
        >>> images, texts = torch.eye(3, requires_grad=True), torch.eye(3)
        >>> loss(images, texts, torch.tensor(10.0)).backward()
        >>> images.grad.shape
        torch.Size([3, 3])
    """

    def __init__(self, lam: float = 1e-3) -> None:
        super().__init__()
        self.lam = in_range("lam", lam, 0, 1)

    def forward(
        self,
        image_embeddings: Float[Tensor, "batch dim"],
        text_embeddings: Float[Tensor, "batch dim"],
        scale: float | Float[Tensor, ""] = 100.0,
        labels: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss of a batch.

        Args:
            image_embeddings: one row per image, of any length; they are normalised here.
            text_embeddings: the text of each image, likewise.
            scale: what cosines are multiplied by, above 0: the exponential of CLIP's `logit_scale`.
            labels: classes. Where they are given, pairs of one class are no negatives of each other, in neither of
                the two parts of the loss. Without them (the paper, CLIP, FLYP) all other pairs are.
        """
        return cross_modal_alignment(image_embeddings, text_embeddings, scale, labels, self.lam)

    def extra_repr(self) -> str:
        return f"lam={self.lam:g}"


def mcm_score(
    image_embeddings: Float[Tensor, "n dim"],
    text_embeddings: Float[Tensor, "classes dim"],
    temperature: float = 1.0,
) -> Float[Tensor, " n"]:
    """Maximum concept matching: the largest softmax probability among the known classes; larger for known inputs.

    Args:
        image_embeddings: of any length; they are normalised here.
        text_embeddings: one row for each known class, at least one.
        temperature: divides the cosines, above 0.

    Returns:
        A score for each image, in (0, 1].

    Raises:
        TypeError: if embeddings are not floating point.
        ValueError: if shapes disagree or `temperature` is out of its range.

    Example:
        >>> mcm_score(torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.eye(2))
        tensor([0.7311, 0.5000])
    """
    temperature = positive("temperature", temperature)
    cosine = _cosines("image_embeddings", image_embeddings, "text_embeddings", text_embeddings)
    if cosine.shape[1] == 0:
        raise ValueError("text_embeddings must hold at least one known class, got none")
    return (cosine / temperature).softmax(1).amax(1)


def neglabel_log_odds(
    image_embeddings: Float[Tensor, "n dim"],
    text_embeddings: Float[Tensor, "classes dim"],
    negative_embeddings: Float[Tensor, "negatives dim"],
    temperature: float = 0.01,
) -> Float[Tensor, " n"]:
    r"""Log-odds of `neglabel_score`, which order images alike and do not saturate: rank by them.

    $$ \log \sum_{k} e^{\cos(u, t_k) / T} - \log \sum_{l} e^{\cos(u, n_l) / T} $$

    At the usual temperature the score itself rounds to 1 as soon as the nearest class leads by a cosine of 0.17 in
    float32, so that images known and unknown tie. Arguments and errors as in `neglabel_score`.

    Example:
        >>> known, negatives = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> neglabel_log_odds(torch.tensor([[3.0, 4.0]]), known, negatives)  # (0.6 - 0.8) / 0.01
        tensor([-20.0000])
    """
    temperature = positive("temperature", temperature)
    known = _cosines("image_embeddings", image_embeddings, "text_embeddings", text_embeddings)
    other = _cosines("image_embeddings", image_embeddings, "negative_embeddings", negative_embeddings)
    if known.shape[1] == 0:
        raise ValueError("text_embeddings must hold at least one known class, got none")
    return (known / temperature).logsumexp(1) - (other / temperature).logsumexp(1)


def neglabel_score(
    image_embeddings: Float[Tensor, "n dim"],
    text_embeddings: Float[Tensor, "classes dim"],
    negative_embeddings: Float[Tensor, "negatives dim"],
    temperature: float = 0.01,
) -> Float[Tensor, " n"]:
    """Share of the softmax over known classes and negative labels that the known classes get; larger for known inputs.

    Args:
        image_embeddings: of any length; they are normalised here.
        text_embeddings: one row for each known class, at least one.
        negative_embeddings: texts of other things, one row each; without any, every score is 1.
        temperature: divides the cosines, above 0.

    Returns:
        A score for each image, in [0, 1].

    Raises:
        TypeError: if embeddings are not floating point.
        ValueError: if shapes disagree or `temperature` is out of its range.

    Example:
        >>> known, negatives = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> neglabel_score(torch.tensor([[1.0, 1.0], [1.0, 0.0]]), known, negatives, temperature=1.0)
        tensor([0.5000, 0.7311])
    """
    return neglabel_log_odds(image_embeddings, text_embeddings, negative_embeddings, temperature).sigmoid()


def mine_negative_labels(
    candidate_embeddings: Float[Tensor, "candidates dim"],
    text_embeddings: Float[Tensor, "classes dim"],
    num: int,
    quantile: float = 0.95,
) -> Int[Tensor, " num"]:
    """The candidate words least like the known classes, for `neglabel_score`.

    A candidate is as like them as this quantile of its cosines with the classes: nearly the largest one, which a
    single odd class does not decide.

    Args:
        candidate_embeddings: of any length; they are normalised here.
        text_embeddings: one row for each known class, at least one.
        num: how many to choose.
        quantile: in [0, 1]; 1 looks at the nearest class alone.

    Returns:
        Rows of `candidate_embeddings`, the least like first.

    Raises:
        TypeError: if embeddings are not floating point.
        ValueError: if shapes disagree, an embedding is not finite or an argument is out of its range.

    Example:
        >>> words = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> mine_negative_labels(words, torch.tensor([[2.0, 0.0]]), num=2)
        tensor([1, 2])
    """
    cosine = _cosines("candidate_embeddings", candidate_embeddings, "text_embeddings", text_embeddings)
    if cosine.shape[1] == 0:
        raise ValueError("text_embeddings must hold at least one known class, got none")
    if not cosine.isfinite().all():
        raise ValueError("candidate_embeddings and text_embeddings must be finite, got NaN or infinity")
    num, quantile = integer("num", num, 1, len(cosine)), in_range("quantile", quantile, 0, 1)
    return cosine.quantile(quantile, dim=1).topk(num, largest=False).indices


def modality_gap(
    image_embeddings: Float[Tensor, "images dim"], text_embeddings: Float[Tensor, "texts dim"]
) -> Float[Tensor, ""]:
    """Distance between the mean of the normalised image embeddings and that of the text embeddings, in [0, 2].

    Raises:
        TypeError: if embeddings are not floating point.
        ValueError: if shapes disagree or there are no images or no texts.

    Example:
        >>> modality_gap(torch.tensor([[2.0, 0.0]]), torch.tensor([[-1.0, 0.0]]))
        tensor(2.)
    """
    images, texts = tensor("image_embeddings", image_embeddings), tensor("text_embeddings", text_embeddings)
    images, texts = _checked("image_embeddings", images, "text_embeddings", texts)
    for name, embeddings in (("image_embeddings", images), ("text_embeddings", texts)):
        if len(embeddings) == 0:
            raise ValueError(f"{name} must hold at least one row, got none")
    gap: Tensor = torch.linalg.vector_norm(F.normalize(images, dim=1).mean(0) - F.normalize(texts, dim=1).mean(0))
    return gap


def _cosines(name: str, rows: Tensor, other_name: str, other_rows: Tensor) -> Tensor:
    """Cosines of a score: arrays are taken too."""
    return pairwise_cosine(*_checked(name, tensor(name, rows), other_name, tensor(other_name, other_rows)))


def _checked(name: str, rows: Tensor, other_name: str, other_rows: Tensor) -> tuple[Tensor, Tensor]:
    """Two matrices of one width, in float32 at least, for their cosines will be multiplied by a hundred."""
    for argument, embeddings in ((name, rows), (other_name, other_rows)):
        if floating_tensor(argument, embeddings).ndim != 2:
            raise ValueError(f"{argument} must be (rows, dim), got shape {tuple(embeddings.shape)}")
    if rows.shape[1] != other_rows.shape[1]:
        raise ValueError(f"{other_name} must have {rows.shape[1]} columns as {name}, got {other_rows.shape[1]}")
    dtype = torch.promote_types(torch.promote_types(rows.dtype, other_rows.dtype), torch.float32)
    return rows.to(dtype), other_rows.to(dtype)


def _checked_scale(scale: float | Tensor) -> float | Tensor:
    if isinstance(scale, Tensor):
        if scale.numel() != 1:
            raise ValueError(f"scale must be a single number, got shape {tuple(scale.shape)}")
        return scale.reshape(())
    return positive("scale", scale)
