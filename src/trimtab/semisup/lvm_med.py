r"""LVM-Med: an encoder learns that matching two views of a batch as graphs gives every sample its own partner.

A self-supervised objective in which not single samples but the structure among them must agree. The batch is cut into
groups; in each view of a group every sample points to its nearest neighbours, and a small graph network mixes them.
The matching of the two graphs solves

$$
\hat v = \arg\min_{v \text{ permutation}} \sum_{ia} u_{ia} v_{ia} + \sum_{(ij)(ab)} q_{ij,ab}\, v_{ia} v_{jb}, \qquad
u = -c^v + m I, \quad q = -\tfrac12 c^e,
$$

with affinities $c^v$ of samples and $c^e$ of edges (differences of samples), both cosines; the true pairs must win by
the margin $m$.
The loss is the Hamming distance of $\hat v$ from the identity; its gradient passes through the solver as in
`trimtab.semisup.graph_matching`, by a second solution further along the gradient.

Graphs, message passing, costs, margin, loss and defaults follow a draft of the authors' training code; cosine
affinities, the mixture with local ones and Sum-of-Gamma noise are from the paper as we know it, whose text was not at
hand. The draft's own affinities, softplus of plain scalar products less one half, are `affinity="softplus"`; they are
as large as the embeddings make them. Of unit vectors they range over one in all, and no true pair could win by the
draft's margin of one; by cosines it can. The authors' solver is a Lagrange decomposition; here small groups are solved
exactly and larger ones by an assignment that is improved by exchanges.

Reference: Duy M. H. Nguyen and others, "LVM-Med: Learning Large-Scale Self-Supervised Vision Models for Medical Imaging
via Second-order Graph Matching", NeurIPS 2023, arXiv 2306.11925.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.ops.arguments import (
    floating_tensor,
    in_range,
    integer,
    non_negative,
    number,
    one_of,
    positive,
    same_shape,
)
from trimtab.ops.whole_state import WholeState
from trimtab.semisup.graph_matching import Method, black_box_matching

Affinity = Literal["softplus", "cosine"]
Noise = Literal["gumbel", "gamma"]


@torch.no_grad()
def neighbour_edges(z: Float[Tensor, "groups n dim"], k: int) -> Int[Tensor, "groups edges 2"]:
    """Directed edges from every node of a group to its nearest by distance, `n * k` of them, in the order of nodes.

    Args:
        z: positions of the nodes.
        k: neighbours of each, fewer than there are nodes.

    Raises:
        ValueError: `z` is not three-dimensional, or `k` is out of range.

    Example:
        >>> neighbour_edges(torch.tensor([[[0.0], [1.0], [5.0]]]), 1)
        tensor([[[0, 1],
                 [1, 0],
                 [2, 1]]])
    """
    z = floating_tensor("z", z)
    if z.ndim != 3:
        raise ValueError(f"z must be (groups, n, dim), got shape {tuple(z.shape)}")
    groups, n = z.shape[:2]
    integer("k", k, 1, n - 1)
    distance = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")
    distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    targets = distance.topk(k, dim=2, largest=False).indices.flatten(1)
    sources = torch.arange(n, device=z.device).repeat_interleave(k).expand(groups, -1)
    return torch.stack([sources, targets], 2)


def local_similarity(
    local_s: Float[Tensor, "groups n places dim"],
    local_t: Float[Tensor, "groups n places_t dim"],
    positions_s: Float[Tensor, "groups n places 2"] | None = None,
    positions_t: Float[Tensor, "groups n places_t 2"] | None = None,
    *,
    top: int = 4,
) -> Float[Tensor, "groups n n"]:
    """How alike the maps of two samples are where they match best, in [-1, 1].

    Each place of the first map is matched to the place of the second whose feature is nearest, and, where positions
    are given, also to the one whose position is nearest; of each the best `top` matches count.

    Args:
        local_s, local_t: features of the places of each sample's map, in either view.
        positions_s, positions_t: where the places lie in the whole image.
        top: matches that count.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: shapes do not fit, or there are fewer places than `top`.

    Example:
        >>> maps = torch.eye(3)[None, None]
        >>> local_similarity(maps, maps.flip(2), top=2)
        tensor([[[1.]]])
    """
    local_s, local_t = floating_tensor("local_s", local_s), floating_tensor("local_t", local_t)
    if local_s.ndim != 4 or local_t.ndim != 4 or local_s.shape[::3] != local_t.shape[::3]:
        shapes = f"{tuple(local_s.shape)} and {tuple(local_t.shape)}"
        raise ValueError(f"local_s and local_t must be (groups, n, places, dim), got {shapes}")
    integer("top", top, 1, local_s.shape[2])
    if not all(held is None or isinstance(held, Tensor) for held in (positions_s, positions_t)):
        raise TypeError("positions_s and positions_t must be tensors, got others")
    if (positions_s is None) != (positions_t is None):
        raise ValueError("positions_s and positions_t must be given together, got one")
    cosines = torch.einsum("gipd,gard->giapr", _unit(local_s), _unit(local_t))
    of_places = [cosines.amax(4)]
    if positions_s is not None and positions_t is not None:
        for name, value, like in (("positions_s", positions_s, local_s), ("positions_t", positions_t, local_t)):
            if value.shape != (*like.shape[:3], 2):
                raise ValueError(f"{name} must be of shape {(*like.shape[:3], 2)}, got {tuple(value.shape)}")
        away = (positions_s[:, :, None, :, None] - positions_t[:, None, :, None]).square().sum(5)
        of_places.append(cosines.gather(4, away.argmin(4, keepdim=True)).squeeze(4))
    return torch.stack([part.topk(top, 3).values.mean(3) for part in of_places]).mean(0)


class GraphMatchingLoss(WholeState, nn.Module):
    """The objective, called as `loss(z_s, z_t)` with two views' embeddings; its graph network is trained with it.

    Args:
        dim: width of the embeddings.
        k: neighbours of each sample in its group's graph.
        group_size: samples of a group; what is left over of a batch is left out.
        width: of the graph network, by default `dim`.
        dropout: between its two layers, in training mode.
        affinity: "cosine", as in the paper; or "softplus" of scalar products, less one half, as in the draft.
        normalize: bring samples and edges to length one first (for "softplus"; cosines always do).
        lam_local: share of the samples' affinity that is the whole images', in [0, 1], where maps are given.
        margin: by which the true pairs must win.
        edge_weight: of the edges' costs; at 0 the matching is of first order, an assignment.
        lam_grad: see `black_box_matching`.
        noise: added to the affinities, the same in both solutions: "gumbel", or "gamma" for the sum of gammas.
        noise_scale: its scale.
        method: see `match_graphs`.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> z = torch.randn(8, 16, generator=generator, requires_grad=True)
        >>> loss = GraphMatchingLoss(16, k=2, group_size=4).eval()
        >>> loss(z, z.detach().flip(1)).item() >= 0
        True
    """

    def __init__(
        self,
        dim: int,
        *,
        k: int = 5,
        group_size: int = 10,
        width: int | None = None,
        dropout: float = 0.5,
        affinity: Affinity = "cosine",
        normalize: bool = False,
        lam_local: float = 0.8,
        margin: float = 1.0,
        edge_weight: float = 1.0,
        lam_grad: float = 80.0,
        noise: Noise | None = None,
        noise_scale: float = 0.1,
        method: Method = "auto",
    ) -> None:
        super().__init__()
        self.dim = integer("dim", dim)
        self.group_size = integer("group_size", group_size, 2)
        self.k = integer("k", k, 1, group_size - 1)
        self.dropout = in_range("dropout", dropout, 0, 1, "left")
        self.affinity: Affinity = one_of("affinity", affinity, get_args(Affinity))
        self.normalize = normalize
        self.lam_local = in_range("lam_local", lam_local, 0, 1)
        self.margin = number("margin", margin)
        self.edge_weight = non_negative("edge_weight", edge_weight)
        self.lam_grad = positive("lam_grad", lam_grad)
        self.noise: Noise | None = one_of("noise", noise, (None, *get_args(Noise)))
        self.noise_scale = positive("noise_scale", noise_scale)
        self.method: Method = one_of("method", method, get_args(Method))
        hidden = integer("width", dim if width is None else width)
        self.own = nn.ModuleList([nn.Linear(dim, hidden), nn.Linear(hidden, hidden)])
        self.others = nn.ModuleList([nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, hidden, bias=False)])

    def forward(
        self,
        z_s: Float[Tensor, "batch dim"],
        z_t: Float[Tensor, "batch dim"],
        *,
        local: tuple[Float[Tensor, "batch places width"], Float[Tensor, "batch places width"]] | None = None,
        positions: tuple[Float[Tensor, "batch places 2"], Float[Tensor, "batch places 2"]] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Mean over the groups of the Hamming distance from the identity, an even number of at most twice their size.

        Args:
            z_s, z_t: embeddings of two views, row by row of the same samples, at least `group_size` of them.
            local: maps of features of both views, which then have a share in the samples' affinity.
            positions: where the maps' places lie in the whole images.
            generator: decides dropout and noise.

        Raises:
            TypeError: an argument is no floating-point tensor.
            ValueError: shapes do not fit, or there are too few samples.
        """
        u, q, edges_s, edges_t = self.costs(z_s, z_t, local=local, positions=positions, generator=generator)
        v = black_box_matching(u, q, edges_s, edges_t, lam_grad=self.lam_grad, method=self.method)
        true = torch.eye(self.group_size, dtype=v.dtype, device=v.device)
        return (v * (1 - true) + (1 - v) * true).sum((1, 2)).mean()

    def costs(
        self,
        z_s: Float[Tensor, "batch dim"],
        z_t: Float[Tensor, "batch dim"],
        *,
        local: tuple[Tensor, Tensor] | None = None,
        positions: tuple[Tensor, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`u`, `q` and the edges of both views, for `match_graphs`; arguments as in `forward`."""
        z_s, z_t = floating_tensor("z_s", z_s), floating_tensor("z_t", z_t)
        same_shape("z_t", z_t, "z_s", z_s)
        if z_s.ndim != 2 or z_s.shape[1] != self.dim or len(z_s) < self.group_size:
            wanted = f"(batch, {self.dim}) with at least {self.group_size} samples"
            raise ValueError(f"z_s must be {wanted}, got shape {tuple(z_s.shape)}")
        with torch.autocast(z_s.device.type, enabled=False):
            if local is None and positions is not None:
                raise ValueError("positions must come with local, the maps whose places they are, got them alone")
            for name, pair in (("local", local), ("positions", positions)):
                if pair is not None and (len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair)):
                    raise TypeError(f"{name} must be two tensors, got others")
                if pair is not None and any(part.shape[:1] != z_s.shape[:1] for part in pair):
                    shapes = [tuple(part.shape) for part in pair]
                    raise ValueError(f"{name} must be of {len(z_s)} samples as z_s, got shapes {shapes}")
            views = [self._grouped(z) for z in (z_s, z_t)]
            edges = [neighbour_edges(z, self.k) for z in views]
            nodes = [self._mixed(z, pairs, generator) for z, pairs in zip(views, edges, strict=True)]
            ends = [
                _gathered(x, pairs[..., 0]) - _gathered(x, pairs[..., 1]) for x, pairs in zip(nodes, edges, strict=True)
            ]
            of_nodes, of_edges = self._affinity(*nodes), self._affinity(*ends)
            if local is not None:
                maps = [self._grouped(part) for part in local]
                places = [None, None] if positions is None else [self._grouped(part) for part in positions]
                of_nodes = self.lam_local * of_nodes + (1 - self.lam_local) * local_similarity(*maps, *places)
            if self.noise is not None:
                of_nodes, of_edges = (
                    part + _noise(part, self.noise, self.noise_scale, generator) for part in (of_nodes, of_edges)
                )
            margin = self.margin * torch.eye(self.group_size, dtype=of_nodes.dtype, device=of_nodes.device)
            return margin - of_nodes, -self.edge_weight / 2 * of_edges, edges[0], edges[1]

    def _grouped(self, z: Tensor) -> Tensor:
        groups = len(z) // self.group_size
        return z[: groups * self.group_size].view(groups, self.group_size, *z.shape[1:])

    def _mixed(self, z: Tensor, edges: Tensor, generator: torch.Generator | None) -> Tensor:
        """Two layers in which every node adds up what it points to."""
        x = z.to(next(self.parameters()))
        targets = edges[..., 1]
        for layer, (own, others) in enumerate(zip(self.own, self.others, strict=True)):
            if layer:
                x = F.relu(x)
                if self.training and self.dropout:
                    at = x.device if generator is None else generator.device
                    kept = torch.rand(x.shape, generator=generator, device=at).to(x.device) >= self.dropout
                    x = x * kept / (1 - self.dropout)
            gathered = _gathered(x, targets).unflatten(1, (self.group_size, self.k)).sum(2)
            x = own(x) + others(gathered)
        return x

    def _affinity(self, a: Tensor, b: Tensor) -> Tensor:
        if self.affinity == "cosine" or self.normalize:
            a, b = _unit(a), _unit(b)
        products = a @ b.mT
        return products if self.affinity == "cosine" else F.softplus(products) - 0.5


def _gathered(x: Tensor, index: Tensor) -> Tensor:
    """Rows of each group: (groups, n, dim) at (groups, m) to (groups, m, dim)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def _unit(x: Tensor) -> Tensor:
    """To length one; what is zero stays there, and has no large gradient."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-12).rsqrt()


def _noise(like: Tensor, kind: Noise, scale: float, generator: torch.Generator | None, terms: int = 10) -> Tensor:
    at = like.device if generator is None else generator.device
    if kind == "gumbel":
        uniform = torch.rand(like.shape, generator=generator, device=at, dtype=torch.float64)
        drawn = -(-uniform.clamp(min=1e-300).log()).clamp(min=1e-300).log()
        return scale * drawn.to(like)
    # One over the number of ones, here ten, that the sum stands for (Niepert et al., arXiv 2106.01798, section 3.2).
    share = torch.full((terms, *like.shape), 1 / 10, dtype=torch.float64, device=at)
    gammas = torch._standard_gamma(share, generator=generator)
    weights = (10 / torch.arange(1, terms + 1, dtype=torch.float64, device=at)).view(-1, *[1] * like.ndim)
    return (scale / 10 * ((weights * gammas).sum(0) - math.log(terms))).to(like)
