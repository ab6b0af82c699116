"""How representations are weighed, fused and drawn together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.ops.arguments import (
    class_indices,
    floating_tensor,
    integer,
    looked_at,
    non_negative,
    one_of,
    positive,
    same_shape,
    tensor_problem,
)
from trimtab.ops.attack import eval_mode

Weighting = Literal["contrast", "mean"]
Representations = Mapping[str, Float[Tensor, "pairs dim"]]


def contrastive_weights(
    Z: Float[Tensor, "clients pairs dim"], G_other: Float[Tensor, "pairs dim"], chunk: int = 4096
) -> Float[Tensor, "clients pairs"]:
    """How much each client counts for each pair; the weights of a pair sum to 1.

    Args:
        Z: representations of one modality, by each client.
        G_other: the server's of the other modality.
        chunk: how many representations are compared with all pairs at a time.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: shapes do not fit, or there is no client or no pair.

    Example:
        >>> G = torch.eye(2)
        >>> contrastive_weights(torch.stack([G, G.flip(0)]), G)
        tensor([[0.7311, 0.7311],
                [0.2689, 0.2689]])
    """
    chunk = integer("chunk", chunk)
    Z, G_other = floating_tensor("Z", Z), floating_tensor("G_other", G_other)
    if Z.ndim != 3 or 0 in Z.shape or Z.shape[1:] != G_other.shape:
        shapes = f"{tuple(Z.shape)} and {tuple(G_other.shape)}"
        raise ValueError(f"Z and G_other must be (clients, pairs, dim) and (pairs, dim), filled, got {shapes}")
    own = (Z * G_other).sum(2)
    among = [(rows @ G_other.mT).logsumexp(1) for rows in Z.flatten(0, 1).split(chunk)]
    return (own - torch.cat(among).view_as(own)).softmax(0)


def ensemble(
    Z: Float[Tensor, "clients pairs dim"], weights: Float[Tensor, "clients pairs"]
) -> Float[Tensor, "pairs dim"]:
    """The clients' representations, averaged by weights; not brought to length 1 again.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> ensemble(torch.eye(2)[:, None], torch.tensor([[0.25], [0.75]]))
        tensor([[0.2500, 0.7500]])
    """
    if problem := tensor_problem(Z=Z, weights=weights):
        raise TypeError(problem)
    if Z.ndim != 3 or weights.shape != Z.shape[:2]:
        raise ValueError(f"weights must be one a representation, {tuple(Z.shape[:2])}, got {tuple(weights.shape)}")
    return torch.einsum("kn,knd->nd", weights.to(Z.dtype), Z)


def inter_modal_loss(
    z: Float[Tensor, "batch dim"],
    G_other: Float[Tensor, "pairs dim"],
    index: Int[Tensor, " batch"],
    temperature: float = 0.5,
) -> Tensor:
    """Cross-entropy of finding the partner among the server's representations of all pairs; the mean over the batch.

    Args:
        z: a client's representations; they alone get a gradient.
        G_other: the server's of the other modality.
        index: which pairs the batch holds.
        temperature: divides inner products.

    Raises:
        TypeError: `index` is not int64, or a representation no floating-point tensor.
        ValueError: shapes do not fit, the batch is empty, an index is out of range, or `temperature` is not positive.

    Example:
        >>> G = torch.eye(3)
        >>> round(inter_modal_loss(G[1:2], G, torch.tensor([1])).item(), 4)  # log(e^2 + 2) - 2
        0.2395
    """
    positive("temperature", temperature)
    z, G_other = floating_tensor("z", z), floating_tensor("G_other", G_other).detach()
    class_indices("index", index)
    if z.ndim != 2 or G_other.ndim != 2 or z.shape[1] != G_other.shape[1] or index.shape != z.shape[:1] or not len(z):
        shapes = f"{tuple(z.shape)}, {tuple(G_other.shape)} and {tuple(index.shape)}"
        raise ValueError(f"z, G_other and index must be (batch, dim), (pairs, dim) and (batch,), filled, got {shapes}")
    if problem := _index_problem(index, len(G_other)):
        raise ValueError(problem)
    with torch.autocast(z.device.type, enabled=False):
        return F.cross_entropy(z @ G_other.mT / temperature, index)


def intra_modal_loss(
    z: Float[Tensor, "batch dim"],
    own: Float[Tensor, "batch dim"],
    old: Float[Tensor, "batch dim"],
    temperature: float = 0.5,
) -> Tensor:
    """Cross-entropy of being nearer to the server's representation than to the client's of before the round.

    Args:
        z: a client's representations; they alone get a gradient.
        own: the server's, of the same modality and the same pairs.
        old: those of the client's model when the round began.
        temperature: divides inner products.

    Raises:
        TypeError: a representation is no floating-point tensor.
        ValueError: shapes differ, the batch is empty, or `temperature` is not positive.

    Example:
        >>> z = torch.tensor([[1.0, 0.0]])
        >>> round(intra_modal_loss(z, z, z).item(), 4)  # log 2
        0.6931
    """
    positive("temperature", temperature)
    z, own, old = floating_tensor("z", z), floating_tensor("own", own).detach(), floating_tensor("old", old).detach()
    same_shape("own", own, "z", z)
    same_shape("old", old, "z", z)
    if z.ndim != 2 or not len(z):
        raise ValueError(f"z must be (batch, dim) with at least one row, got shape {tuple(z.shape)}")
    return F.softplus((z * (old - own)).sum(1) / temperature).mean()


def client_contrast(
    z: Representations,
    shared: Representations,
    old: Representations,
    index: Int[Tensor, " batch"],
    *,
    temperature: float = 0.5,
    weight: float = 0.5,
) -> dict[str, Tensor]:
    """What pulls a client to the server on a batch of public pairs.

    Args:
        z: modality -> representations by the client of the batch, of one modality or of both.
        shared: modality -> the server's, of all pairs, of both modalities.
        old: modality -> those of the client's model when the round began, of all pairs.
        index: which pairs the batch holds.
        temperature: divides inner products.
        weight: of the sum of both terms.

    Returns:
        "intra", the mean over all rows, "inter", summed over modalities, and "total".

    Raises:
        ValueError: `shared` has not two modalities, `z` has one that it or `old` lacks, shapes do not fit, or an index
            is out of range.
        TypeError: an argument has a wrong type.

    Example:
        >>> shared = {"image": torch.eye(3), "text": torch.eye(3)}
        >>> found = client_contrast({"image": torch.eye(3)[:1]}, shared, shared, torch.tensor([0]))
        >>> {name: round(value.item(), 4) for name, value in found.items()}
        {'intra': 0.6931, 'inter': 0.2395, 'total': 0.4663}
    """
    non_negative("weight", weight)
    two_modalities(shared, z)
    if not z or not z.keys() <= old.keys():
        raise ValueError(f"z must have modalities among {sorted(old)}, those of old, got {sorted(z)}")
    class_indices("index", index)
    if problem := _index_problem(index, min(map(len, [*shared.values(), *(old[name] for name in z)]))):
        raise ValueError(problem)
    own, before = (torch.cat([held[name][index] for name in z]) for held in (shared, old))
    intra = intra_modal_loss(torch.cat([z[name] for name in z]), own, before, temperature)
    parts = [inter_modal_loss(z[name], shared[_other(shared, name)], index, temperature) for name in z]
    inter = torch.stack(parts).sum()
    return {"intra": intra, "inter": inter, "total": weight * (intra + inter)}


def fuse(
    uploads: Sequence[Representations], shared: Representations, weighting: Weighting = "contrast", chunk: int = 4096
) -> dict[str, Float[Tensor, "pairs dim"]]:
    """What the clients' representations say together, of each modality that any client has.

    Args:
        uploads: modality -> representations of all pairs, by each client, in the order of clients.
        shared: modality -> the server's, of both modalities.
        weighting: "contrast", or "mean" for equal weights.
        chunk: see `contrastive_weights`.

    Raises:
        ValueError: `shared` has not two modalities, a client has another one, shapes do not fit, or `weighting` is
            unknown.

    Example:
        >>> shared = {"image": torch.eye(2), "text": torch.eye(2)}
        >>> fuse([{"image": torch.eye(2)}, {"image": torch.eye(2).flip(0)}], shared)["image"]
        tensor([[0.7311, 0.2689],
                [0.2689, 0.7311]])
    """
    one_of("weighting", weighting, ("contrast", "mean"))
    two_modalities(shared, *uploads)
    fused = {}
    for name in shared:
        if held := [upload[name] for upload in uploads if name in upload]:
            for part in held:
                same_shape(f"uploads' {name}", part, "the server's", shared[name])
            Z = torch.stack(held)
            weights = torch.full_like(Z[..., 0], 1 / len(Z))
            if weighting == "contrast":
                weights = contrastive_weights(Z, shared[_other(shared, name)], chunk)
            fused[name] = ensemble(Z, weights)
    return fused


def distillation(
    features: Representations, fused: Representations, index: Int[Tensor, " batch"], weight: float = 0.3
) -> Tensor:
    """Mean squared difference of the server's representations from the fused ones, summed over fused modalities.

    A fused modality counts once, whoever sent it. The authors' release adds its term once for the clients that have
    this modality alone and once more for those that have both, against the same fused representations: where clients
    of all three kinds take part, that is twice this loss, `weight=0.6`.

    Args:
        features: modality -> the server's representations of a batch.
        fused: modality -> what `fuse` gave, of all pairs; a modality that no client has is left out.
        index: which pairs the batch holds.
        weight: of the sum.

    Raises:
        ValueError: a fused modality is not among the features, there is none, shapes do not fit, or an index is out of
            range.
        TypeError: `index` is not int64.

    Example:
        >>> round(distillation({"image": torch.ones(1, 2)}, {"image": torch.zeros(3, 2)}, torch.tensor([2])).item(), 2)
        0.3
    """
    non_negative("weight", weight)
    class_indices("index", index)
    if not fused or not fused.keys() <= features.keys():
        raise ValueError(f"fused must have modalities among {sorted(features)}, got {sorted(fused)}")
    terms = []
    if problem := _index_problem(index, min(map(len, fused.values()))):
        raise ValueError(problem)
    for name, target in fused.items():
        wanted = target[index].detach()
        same_shape(f"features' {name}", features[name], "the fused ones", wanted)
        terms.append(
            F.mse_loss(features[name].float() if features[name].element_size() < 4 else features[name], wanted)
        )
    return weight * torch.stack(terms).sum()


@torch.no_grad()
def represent(
    encoder: Callable[[Tensor], Tensor], x: Float[Tensor, "pairs ..."], batch_size: int = 512
) -> Float[Tensor, "pairs dim"]:
    """Representations of length 1, by an encoder in eval mode, which is left as it was.

    Example:
        >>> represent(torch.nn.Identity(), torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """
    if problem := tensor_problem(x=x):
        raise TypeError(problem)
    batch_size = integer("batch_size", batch_size)
    with eval_mode(encoder):
        return torch.cat([F.normalize(encoder(part), dim=1) for part in x.split(batch_size)])


def two_modalities(shared: Mapping[str, object], *others: Mapping[str, object]) -> None:
    """Refuse what has not two modalities, or others among them."""
    if len(shared) != 2:
        raise ValueError(f"shared must have two modalities, got {sorted(shared)}")
    for other in others:
        if not other.keys() <= shared.keys():
            raise ValueError(f"modalities must be among {sorted(shared)}, those of shared, got {sorted(other)}")


def _index_problem(index: Tensor, pairs: int) -> str:
    """What is wrong with positions of pairs, where no device waits for a look at them; empty where nothing is."""
    if not index.numel() or not looked_at(index):
        return ""
    low, high = int(index.min()), int(index.max())
    return "" if 0 <= low <= high < pairs else f"index must be in [0, {pairs}), got {low if low < 0 else high}"


def _other(shared: Representations, name: str) -> str:
    return next(other for other in shared if other != name)
