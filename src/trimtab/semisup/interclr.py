r"""InterCLR: contrastive learning in which other images of the same cluster are positives too.

Added to a contrastive loss between views of one image (MoCo, SimCLR). A memory keeps a feature and a cluster label for
each training image; labels change with every visit, centroids every few steps. A positive is another image of the
label; negatives are drawn from the most similar images of other labels, hard but not the hardest; and the positive's
cosine is given a start, since the label may be wrong.

$$
\mathcal{L} = (1 - \lambda)\, \mathcal{L}_{\text{intra}} + \lambda\, \mathcal{L}_{\text{inter}}, \qquad
\mathcal{L}_{\text{inter}} = -\log
\frac{e^{(q^\top p - m) / \tau}}{e^{(q^\top p - m) / \tau} + \sum_{j} e^{q^\top n_j / \tau}}, \qquad m = -\tfrac12
$$

The authors' code draws negatives of the positive's label anew; here they are left out of the pool before it is made,
so that no cluster is too large.

Reference: Jiahao Xie, Xiaohang Zhan, Ziwei Liu, Yew-Soon Ong, Chen Change Loy, "Delving into Inter-Image Invariance for
Unsupervised Visual Representations", IJCV 2022, arXiv 2008.11702.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.ops.arguments import in_range, integer, looked_at, number, one_of, positive, real_problem
from trimtab.ops.info_nce import info_nce_of_cosines
from trimtab.ops.states import fits
from trimtab.semisup.cluster_memory import ClusterMemory

Sampling = Literal["semihard", "hard", "random", "semieasy"]


@torch.no_grad()
def draw_positives(
    labels: Int[Tensor, " samples"], index: Int[Tensor, " batch"], *, generator: torch.Generator | None = None
) -> Int[Tensor, " batch"]:
    """For each of these samples one drawn evenly from all of its label, itself among them, as in the authors' code.

    Args:
        labels: of all samples.
        index: the samples.
        generator: decides what is drawn.

    Raises:
        TypeError: `labels` or `index` is not int64.
        ValueError: they are no vectors, or an index is out of range.

    Example:
        >>> draw_positives(torch.tensor([7, 3, 5]), torch.tensor([2, 0]))
        tensor([2, 0])
    """
    if not all(isinstance(held, Tensor) and held.dtype == torch.int64 for held in (labels, index)):
        raise TypeError("labels and index must be int64 tensors, got others")
    if labels.ndim != 1 or index.ndim != 1:
        raise ValueError(f"labels and index must be vectors, got {tuple(labels.shape)} and {tuple(index.shape)}")
    if looked_at(index) and not ((index >= 0) & (index < len(labels))).all():
        raise ValueError(f"index must be in [0, {len(labels)}), got others")
    order = labels.argsort(stable=True)
    ordered, own = labels[order], labels[index]
    first = torch.searchsorted(ordered, own)
    count = torch.searchsorted(ordered, own, right=True) - first
    at = labels.device if generator is None else generator.device
    drawn = torch.rand(len(index), generator=generator, device=at).to(labels.device)
    return order[first + (drawn * count).long().clamp(max=count - 1)]


@torch.no_grad()
def draw_negatives(
    cosines: Float[Tensor, "batch samples"],
    same: Tensor,
    num_negatives: int,
    pool: int,
    *,
    sampling: Sampling = "semihard",
    generator: torch.Generator | None = None,
) -> Int[Tensor, "batch negatives"]:
    """For each query some samples of other labels, without repeats.

    Args:
        cosines: of the queries with all samples.
        same: (batch, samples), true where a sample has the query's label. Those come last, when no others are left.
        num_negatives: how many.
        pool: how many candidates "semihard" (the most similar) and "semieasy" (the least similar) draw from.
        sampling: "semihard", "semieasy", "hard" (the most similar, without a draw) or "random" (from all).
        generator: decides what is drawn.

    Raises:
        TypeError: `cosines` is not floating point, or `same` not boolean.
        ValueError: shapes do not fit, `sampling` is unknown, or `num_negatives <= pool <= samples` does not hold.

    Example:
        >>> cosines = torch.tensor([[1.0, 0.9, 0.2, 0.5]])
        >>> same = torch.tensor([[True, False, False, False]])
        >>> draw_negatives(cosines, same, 2, 2, sampling="hard")
        tensor([[1, 3]])
    """
    one_of("sampling", sampling, get_args(Sampling))
    if not isinstance(cosines, Tensor) or not cosines.is_floating_point():
        raise TypeError(f"cosines must be a floating-point tensor, got {type(cosines).__name__}")
    if not isinstance(same, Tensor) or same.dtype != torch.bool:
        raise TypeError(f"same must be a boolean tensor, got {type(same).__name__}")
    if cosines.ndim != 2 or same.shape != cosines.shape:
        raise ValueError(f"cosines and same must be (batch, samples), got {tuple(cosines.shape)}, {tuple(same.shape)}")
    samples = cosines.shape[1]
    integer("num_negatives", num_negatives, 1, samples)
    integer("pool", pool, num_negatives, samples)
    away = cosines.masked_fill(same, -torch.inf)
    if sampling == "hard":
        return away.topk(num_negatives, 1).indices
    at = cosines.device if generator is None else generator.device
    size = samples if sampling == "random" else pool
    keys = torch.rand(len(cosines), size, generator=generator, device=at).to(cosines.device)
    if sampling == "random":
        return keys.masked_fill(same, -1.0).topk(num_negatives, 1).indices
    liked = away if sampling == "semihard" else (-cosines).masked_fill(same, -torch.inf)
    candidates = liked.topk(pool, 1, sorted=False).indices
    keys = keys.masked_fill(same.gather(1, candidates), -1.0)
    return candidates.gather(1, keys.topk(num_negatives, 1).indices)


def inter_image_loss(
    query: Float[Tensor, "batch dim"],
    index: Int[Tensor, " batch"],
    memory: ClusterMemory,
    num_negatives: int,
    pool: int,
    *,
    margin: float = -0.5,
    temperature: float = 0.2,
    sampling: Sampling = "semihard",
    generator: torch.Generator | None = None,
) -> Tensor:
    """InfoNCE against a positive and negatives of a cluster memory, which takes no gradient.

    Args:
        query: embeddings, of any length.
        index: the samples' positions in the training set.
        memory: of all samples.
        num_negatives, pool, sampling: see `draw_negatives`.
        margin: taken from the positive's cosine; below zero the task is easier.
        temperature: divides the cosines.
        generator: decides what is drawn.

    Raises:
        TypeError: `query` is not floating point, or `index` not int64.
        ValueError: shapes do not fit, the batch is empty, an index or a number is out of range.

    Example:
        >>> memory = ClusterMemory(4, 2, num_clusters=2)
        >>> z = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
        >>> memory.start(z, generator=torch.Generator().manual_seed(0))
        >>> value = inter_image_loss(z[:1], torch.tensor([0]), memory, 2, 2, margin=0.0, temperature=1.0)
        >>> round(value.item(), 4)  # log(1 + 2 / e), with two negatives at a right angle
        0.5514
    """
    if problem := real_problem(query=query):
        raise TypeError(problem)
    memory.check(index, query)
    with torch.autocast(query.device.type, enabled=False):
        query = F.normalize(query.to(torch.promote_types(query.dtype, torch.float32)), dim=1)
        features = memory.features.to(query)
        cosines = query.detach() @ features.mT
        same = memory.labels[index][:, None] == memory.labels
        negatives = draw_negatives(cosines, same, num_negatives, pool, sampling=sampling, generator=generator)
        like = draw_positives(memory.labels, index, generator=generator)
        away = (features[negatives] @ query[:, :, None]).squeeze(2)
        # Where a query has not enough samples of other labels, the rest are no negatives.
        away = away.masked_fill(same.gather(1, negatives), -torch.inf)
        return info_nce_of_cosines((query * features[like]).sum(1), away, temperature, margin)


class InterCLR(nn.Module):
    """The inter-image loss beside a contrastive loss of the user's, with its memory.

    Call `memory.start(features)` once before training, `loss(query, index, intra)` in each step, and after the
    optimizer's step `update(index, key)` with the averaged network's embeddings.

    Args:
        memory: of all training images.
        num_negatives, pool: see `draw_negatives`; the authors take 16,384 of 128,000 among 1.28 million images.
        inter_weight: lambda, in [0, 1].
        margin: m, in [-2, 2].
        temperature: tau.
        sampling: of the negatives.
        renew_every: steps between two moves of the centroids.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> rule = InterCLR(ClusterMemory(6, 2, num_clusters=2), num_negatives=2, pool=3)
        >>> z = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
        >>> rule.memory.start(z.detach(), generator=torch.Generator().manual_seed(0))
        >>> found = rule.loss(z, torch.arange(6), intra=z.square().mean())
        >>> found["total"].backward()
        >>> rule.update(torch.arange(6), z.detach())
    """

    def __init__(
        self,
        memory: ClusterMemory,
        num_negatives: int,
        pool: int,
        *,
        inter_weight: float = 0.25,
        margin: float = -0.5,
        temperature: float = 0.2,
        sampling: Sampling = "semihard",
        renew_every: int = 10,
    ) -> None:
        super().__init__()
        samples = len(memory.features)
        self.num_negatives = integer("num_negatives", num_negatives, 1, samples)
        self.pool = integer("pool", pool, num_negatives, samples)
        self.inter_weight = in_range("inter_weight", inter_weight, 0, 1)
        self.margin = in_range("margin", number("margin", margin), -2, 2)
        self.temperature = positive("temperature", temperature)
        self.sampling: Sampling = one_of("sampling", sampling, get_args(Sampling))
        self.renew_every = integer("renew_every", renew_every)
        self.memory = memory
        self.updates = 0

    def loss(
        self,
        query: Float[Tensor, "batch dim"],
        index: Int[Tensor, " batch"],
        intra: Tensor,
        *,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """What a batch costs: "total", "intra" and "inter".

        Args:
            query: embeddings of one view, of any length.
            index: the samples' positions in the training set.
            intra: the contrastive loss between the views of each image.
            generator: decides which positives and negatives are drawn.

        Raises:
            TypeError: `query` is not floating point, or `index` not int64.
            ValueError: shapes do not fit, the batch is empty, or an index is out of range.
        """
        if problem := real_problem(query=query, intra=intra):
            raise TypeError(problem)
        inter = inter_image_loss(
            query,
            index,
            self.memory,
            self.num_negatives,
            self.pool,
            margin=self.margin,
            temperature=self.temperature,
            sampling=self.sampling,
            generator=generator,
        )
        total = (1 - self.inter_weight) * intra + self.inter_weight * inter
        return {"total": total, "intra": intra.detach(), "inter": inter.detach()}

    def update(self, index: Int[Tensor, " batch"], key: Float[Tensor, "batch dim"]) -> None:
        """Writes the batch's embeddings into the memory; from time to time the centroids move.

        Raises:
            TypeError, ValueError: as `ClusterMemory.write`.
        """
        if problem := real_problem(key=key):
            raise TypeError(problem)
        self.memory.write(index, key)
        self.updates += 1
        if self.updates % self.renew_every == 0:
            self.memory.renew()

    def get_extra_state(self) -> dict[str, int]:
        return {"updates": self.updates}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.updates = int(state["updates"])

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As every module's, but a state that does not fit changes nothing.

        Raises:
            ValueError: it is of another form.
        """
        if strict and not fits(state_dict, self.state_dict()):
            raise ValueError("state_dict must be of a rule of this form, got other names or shapes")
        return super().load_state_dict(state_dict, strict, assign)
