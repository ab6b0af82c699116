r"""AutoDistil: one weight-sharing transformer a size band learns a teacher's attention; the student is picked from it.

For finding a small transformer under a limit of size or compute without training every candidate. The space of students
is cut into bands of similar size. All students of a band live in one network: a student takes the first numbers of
every weight, the first heads, and layers spread evenly over the depth. Each step trains the largest, the smallest and
two random ones on the relations between tokens in the teacher's last attention layer. For the projections $X$ of
queries, keys and values of student and teacher, both split into $h$ heads of widths $d_r$, over $T$ tokens,

$$
R^X = \operatorname{softmax}\bigl( X X^{\top} / \sqrt{d_r} \bigr), \qquad
\mathcal{L} = \sum_{X \in \{Q, K, V\}} \frac{1}{h T} \sum_{a = 1}^{h} \sum_{t = 1}^{T}
KL\bigl( R^X_{a t}(\text{teacher}) \,\|\, R^X_{a t}(\text{student}) \bigr) .
$$

The same loss on held-out text then ranks the students; only the best one is trained further. The loss is the paper's;
its authors' script matches the scores before the softmax by squared error instead (`kind="mse"`).

Reference: Dongkuan Xu, Subhabrata Mukherjee, Xiaodong Liu, Debadeepta Dey, Wenhui Wang, Xiang Zhang, Ahmed Hassan
Awadallah and Jianfeng Gao, "AutoDistil: Few-shot Task-agnostic Neural Architecture Search for Distilling Large Language
Models", NeurIPS 2022, arXiv 2201.12507.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from trimtab.compress.distill import relation_scores
from trimtab.compress.elastic import ElasticTransformer, Subnet
from trimtab.ops.arguments import integer, one_of, tensor_problem

Kind = Literal["kl", "mse"]


def partition_space(subnets: Sequence[Subnet], bands: int, size: Callable[[Subnet], float]) -> list[list[Subnet]]:
    """Students cut into bands of similar size, as many in each as can be, the smallest band first.

    Args:
        subnets: of the whole space.
        bands: how many bands.
        size: of a student, such as its parameters.

    Raises:
        ValueError: there are fewer students than bands.

    Example:
        >>> from trimtab.compress import SubspaceSpec
        >>> space = SubspaceSpec((2, 4), (8, 16), (2,), (4.0,)).subnets()
        >>> [[s.depth * s.hidden for s in band] for band in partition_space(space, 2, lambda s: s.depth * s.hidden)]
        [[16, 32], [32, 64]]
    """
    integer("bands", bands, 1, max(len(subnets), 1))
    if not subnets:
        raise ValueError("subnets must be at least one, got none")
    ordered = sorted(subnets, key=size)
    ends = [len(ordered) * i // bands for i in range(bands + 1)]
    return [ordered[start:end] for start, end in itertools.pairwise(ends)]


def sandwich(
    subnets: Sequence[Subnet],
    size: Callable[[Subnet], float],
    n: int = 4,
    *,
    generator: torch.Generator | None = None,
) -> list[Subnet]:
    """The students of a step: the largest, the smallest, and others at random.

    Args:
        subnets: of the band.
        size: of a student.
        n: how many, at least 2; all others where the band has fewer.
        generator: decides the draws; on the CPU.

    Raises:
        ValueError: the band is empty, or `n` is below 2.

    Example:
        >>> band = [Subnet(depth, 8, 2, 4.0) for depth in range(1, 9)]
        >>> [s.depth for s in sandwich(band, lambda s: s.depth, generator=torch.Generator().manual_seed(0))][:2]
        [8, 1]
    """
    integer("n", n, 2)
    if not subnets:
        raise ValueError("subnets must be at least one, got none")
    ordered = sorted(dict.fromkeys(subnets), key=size)
    if len(ordered) == 1:
        return ordered
    between = ordered[1:-1]
    drawn = torch.randperm(len(between), generator=generator)[: n - 2].tolist()
    return [ordered[-1], ordered[0], *(between[i] for i in drawn)]


def attention_relation_loss(
    projections: Float[Tensor, "3 batch length width"],
    teacher_projections: Float[Tensor, "3 batch length teacher_width"],
    relation_heads: int,
    mask: Bool[Tensor, "batch length"] | None = None,
    *,
    kind: Kind = "kl",
) -> Float[Tensor, ""]:
    """How far the relations between tokens in a student's last attention layer are from a teacher's.

    Args:
        projections: the student's queries, keys and values.
        teacher_projections: the teacher's, perhaps of another width.
        relation_heads: how many heads both widths are split into; it must divide both.
        mask: True where there is a token, not padding; each sequence must have one.
        kind: `kl` as in the paper, or `mse` of the scores before the softmax.

    Raises:
        TypeError: projections are not floating point, or `mask` not boolean.
        ValueError: shapes do not fit, or a width is not a multiple of `relation_heads`.

    Example:
        >>> x = torch.randn(3, 2, 5, 8)
        >>> attention_relation_loss(x, x, relation_heads=4).item()
        0.0
    """
    if problem := tensor_problem(projections=projections, teacher_projections=teacher_projections, mask=mask):
        raise TypeError(problem)
    one_of("kind", kind, ("kl", "mse"))
    for name, value in (("projections", projections), ("teacher_projections", teacher_projections)):
        if value.ndim != 4 or value.shape[:3] != (3, *projections.shape[1:3]):
            raise ValueError(
                f"{name} must be (3, batch, length, width), of one batch and length, got {tuple(value.shape)}"
            )
    if mask is not None and mask.shape != projections.shape[1:3]:
        raise ValueError(f"mask must be of shape {tuple(projections.shape[1:3])}, got {tuple(mask.shape)}")
    wide = None if mask is None else mask.repeat(3, 1)
    own = relation_scores(projections.flatten(0, 1), relation_heads, wide)
    others = relation_scores(teacher_projections.detach().flatten(0, 1), relation_heads, wide)
    length = own.new_tensor(own.shape[-1]) if wide is None else wide.sum(1).to(own.dtype)
    apart = None if wide is None else ~(wide[:, None, :, None] & wide[:, None, None, :])
    if kind == "kl":
        log_own, log_others = own.log_softmax(-1), others.log_softmax(-1)
        terms = log_others.exp() * _without(log_others - log_own, apart)
        each = _without(terms, apart).sum((1, 2, 3)) / (relation_heads * length)
    else:
        terms = _without(own - others.to(own.dtype), apart).square()
        each = terms.sum((1, 2, 3)) / (relation_heads * length.square())
    return 3 * each.mean()


def _without(terms: Tensor, apart: Tensor | None) -> Tensor:
    """Zero where a token is not there; untouched where all are."""
    return terms if apart is None else terms.masked_fill(apart, 0.0)


@torch.enable_grad()
def distil_subnets(
    student: ElasticTransformer,
    teacher: nn.Module,
    tokens: Int[Tensor, "batch length"],
    subnets: Sequence[Subnet],
    relation_heads: int,
    mask: Bool[Tensor, "batch length"] | None = None,
    *,
    kind: Kind = "kl",
) -> Float[Tensor, " subnets"]:
    """Adds the gradients of these students' relation losses on a batch; the step is the caller's.

    One student at a time, so that no more than one graph is held.

    Args:
        student: its students share the weights that get the gradients; the last one stays set.
        teacher: called `teacher(tokens, projections=True)`, in the mode it is in, without gradients.
        tokens, relation_heads, mask, kind: as of `attention_relation_loss`.
        subnets: of this step, as of `sandwich`.

    Returns:
        The students' losses, detached.

    Raises:
        ValueError: there are no students, or as `attention_relation_loss`.

    Example:
        >>> from trimtab.compress import SubspaceSpec, Transformer
        >>> spec = SubspaceSpec((1, 2), (8, 16), (2,), (2.0,))
        >>> teacher, student = Transformer(10, 6, 2, 16, 2, 4, 32), ElasticTransformer(spec, 10, 6, head_dim=4)
        >>> optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
        >>> losses = distil_subnets(student, teacher, torch.zeros(2, 6, dtype=torch.int64), spec.subnets(), 2)
        >>> optimizer.step()
        >>> losses.shape
        torch.Size([4])
    """
    if problem := tensor_problem(tokens=tokens, mask=mask):
        raise TypeError(problem)
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.is_floating_point():
        raise ValueError(
            f"tokens must be whole numbers of shape (batch, length), got a {type(tokens).__name__} of shape "
            f"{tuple(getattr(tokens, 'shape', ()))}"
        )
    if not subnets:
        raise ValueError("subnets must be at least one, got none")
    with torch.no_grad():
        wanted = teacher(tokens, projections=True)
    losses = []
    for subnet in subnets:
        student.set_subnet(subnet)
        loss = attention_relation_loss(student(tokens, projections=True), wanted, relation_heads, mask, kind=kind)
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses)


@dataclass(frozen=True)
class Ranked:
    """A student, the loss by which it was ranked, and its size."""

    subnet: Subnet
    loss: float
    size: float


@torch.no_grad()
def rank_students(
    student: ElasticTransformer,
    teacher: nn.Module,
    tokens: Int[Tensor, "batch length"],
    subnets: Sequence[Subnet],
    relation_heads: int,
    *,
    size: Callable[[Subnet], float],
    limit: float,
    mask: Bool[Tensor, "batch length"] | None = None,
    kind: Kind = "kl",
) -> list[Ranked]:
    """The students within a limit, the one with the smallest relation loss on held-out text first; none is trained.

    Every one is tried: a band has 256 of them. `trimtab.compress.evolve` searches larger spaces with the same loss.

    Args:
        student, teacher, tokens, relation_heads, mask, kind: as of `distil_subnets`.
        subnets: candidates.
        size: of a candidate: parameters, multiply-adds or milliseconds.
        limit: of the size.

    Raises:
        ValueError: no candidate is within the limit.
    """
    fitting = [subnet for subnet in subnets if size(subnet) <= limit]
    if not fitting:
        smallest = min((size(subnet) for subnet in subnets), default=None)
        raise ValueError(f"limit must be at least the size of the smallest candidate, {smallest}, got {limit}")
    wanted, before = teacher(tokens, projections=True), student.subnet
    found = []
    try:
        for subnet in fitting:
            student.set_subnet(subnet)
            loss = attention_relation_loss(student(tokens, projections=True), wanted, relation_heads, mask, kind=kind)
            found.append(Ranked(subnet, float(loss), size(subnet)))
    finally:
        student.set_subnet(before)
    return sorted(found, key=lambda ranked: ranked.loss)
