r"""SimMatchV2: the views of images are the nodes of a graph, and nodes and edges must agree between weak and strong.

For semi-supervised training with few labels. A node is a view with its class probabilities $p$ and its embedding $e$
(of length one); an edge is the softmax $r$ over a memory of unlabelled nodes of $e^\top u_j / t$. A moving average of
the network sees the weak view (*w*), the network in training the strong one (*s*):

$$
\mathcal{L} = \mathcal{L}_x + \frac1B \sum_i \Bigl(
\lambda_{nn} [\max_c p^w_{ic} \ge \tau] \, H(\hat y_i, p^s_i)
+ \lambda_{ee} H(r^w_i, r^s_i)
+ \lambda_{ne} H(p^w_i, r^s_i P) \Bigr),
$$

with $H(a, b) = -\sum_c a_c \log b_c$ and $P$ the memory's probabilities. The first term is node-node consistency, the
second edge-edge, the third node-edge. The fourth, edge-node, is where the pseudo-label $\hat y$ comes from: the labels
of the nearest labelled nodes are propagated to the weak view,

$$
\hat y = \bigl[(1 - \alpha) (I - \alpha A)^{-1} Y\bigr]_0, \qquad
A = \mathrm{softmax}_{j \ne i}\bigl(e_i^\top e_j / t\bigr),
$$

over the graph of the view and its neighbours. Features are normalised by layer before the heads, which makes their
lengths alike across views. The probabilities $p^w$ are aligned to even classes.

The authors fill the memory with random nodes at first, whose terms they drop where they are not finite; here it starts
empty, and the edge terms begin with the second batch.

Reference: Mingkai Zheng, Shan You, Lang Huang, Chen Luo, Fei Wang, Chen Qian and Chang Xu, "SimMatchV2: Semi-Supervised
Learning with Graph Consistency", ICCV 2023, arXiv 2308.06692.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from trimtab.ops.arguments import (
    class_indices,
    floating_tensor,
    in_range,
    indices,
    integer,
    looked_at,
    non_negative,
    positive,
    real_problem,
)
from trimtab.ops.averaging import Teacher
from trimtab.ops.feature_bank import FeatureBank
from trimtab.ops.sample_memory import SampleMemory
from trimtab.ops.whole_state import WholeState
from trimtab.semisup.alignment import DistributionAlignment
from trimtab.semisup.shrinkmatch import check_views


def graph_propagate(
    features: Float[Tensor, "batch nodes dim"],
    labels: Float[Tensor, "batch nodes classes"],
    alpha: float = 0.1,
    temperature: float = 0.1,
) -> Float[Tensor, "batch classes"]:
    """The label of the first node of each graph, after the labels have flowed along all edges.

    Args:
        features: embeddings of length one; the first node is the one asked for.
        labels: distributions over the classes.
        alpha: share of a node's label that comes from its neighbours, in [0, 1).
        temperature: divides the similarities; the smaller, the more the nearest count.

    Raises:
        TypeError: if a tensor is not floating point.
        ValueError: if shapes do not fit, there are fewer than two nodes, or an option is out of range.

    Example:
        >>> features = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
        >>> labels = torch.tensor([[[0.5, 0.5], [1.0, 0.0]]])
        >>> graph_propagate(features, labels, alpha=0.5)  # two nodes: a third of the label is the neighbour's
        tensor([[0.6667, 0.3333]])
    """
    in_range("alpha", alpha, 0, 1, "left")
    positive("temperature", temperature)
    features, labels = floating_tensor("features", features), floating_tensor("labels", labels)
    if features.ndim != 3 or features.shape[1] < 2:
        raise ValueError(f"features must be (batch, nodes, dim) with two nodes or more, got {tuple(features.shape)}")
    if labels.ndim != 3 or labels.shape[:2] != features.shape[:2]:
        wanted = f"({features.shape[0]}, {features.shape[1]}, classes)"
        raise ValueError(f"labels must be {wanted}, got shape {tuple(labels.shape)}")
    with torch.autocast(features.device.type, enabled=False):
        unit = torch.eye(features.shape[1], dtype=features.dtype, device=features.device)
        edges = (features @ features.mT / temperature).masked_fill(unit.bool(), -torch.inf).softmax(2)
        # Only the first row of the inverse is needed: one vector, of the transposed system.
        row = torch.linalg.solve((unit - alpha * edges).mT, unit[:, :1].expand(len(edges), -1, -1))
        found: Tensor = (1 - alpha) * (row * labels.to(row)).sum(1)
    return found


def edge_edge_loss(
    strong: Float[Tensor, "batch nodes"],
    weak: Float[Tensor, "batch nodes"],
    temperature: float = 0.1,
    filled: Bool[Tensor, " nodes"] | None = None,
) -> Tensor:
    """Cross-entropy between the edges of two views to the same nodes; the mean over the batch.

    Args:
        strong: cosines of the strong views with the nodes of the memory.
        weak: cosines of the weak views; constants for the gradient.
        temperature: divides the cosines.
        filled: which nodes are there; without any the loss is zero.

    Raises:
        TypeError: if a tensor is not floating point.
        ValueError: if shapes do not fit.

    Example:
        >>> round(edge_edge_loss(torch.zeros(1, 2), torch.zeros(1, 2)).item(), 4)  # log(2)
        0.6931
    """
    if problem := real_problem(strong=strong, weak=weak):
        raise TypeError(problem)
    _check_edges(strong, weak)
    target = _edges(weak.detach(), temperature, filled).exp()
    log_edges = _edges(strong, temperature, filled)
    if filled is not None:
        target = target * filled
    return -(target * log_edges).sum(1).mean()


def node_edge_loss(
    strong: Float[Tensor, "batch nodes"],
    node_probs: Float[Tensor, "nodes classes"],
    probs: Float[Tensor, "batch classes"],
    temperature: float = 0.1,
    filled: Bool[Tensor, " nodes"] | None = None,
) -> Tensor:
    """Cross-entropy between a weak view's classes and those that the strong view's edges lead to; the batch's mean.

    Args:
        strong: cosines of the strong views with the nodes of the memory.
        node_probs: classes of those nodes.
        probs: classes of the weak views; constants for the gradient, as `node_probs`.
        temperature: divides the cosines.
        filled: which nodes are there; without any the loss is zero.

    Raises:
        TypeError: if a tensor is not floating point.
        ValueError: if shapes do not fit.

    Example:
        >>> loss = node_edge_loss(torch.zeros(1, 2), torch.eye(2), torch.tensor([[1.0, 0.0]]))  # log(2)
        >>> round(loss.item(), 4)
        0.6931
    """
    if problem := real_problem(strong=strong, node_probs=node_probs):
        raise TypeError(problem)
    probs = floating_tensor("probs", probs)
    if strong.ndim != 2 or node_probs.shape != (strong.shape[1], probs.shape[-1]) or len(probs) != len(strong):
        raise ValueError(
            "strong, node_probs and probs must be (batch, nodes), (nodes, classes) and (batch, classes), got "
            f"{tuple(strong.shape)}, {tuple(node_probs.shape)} and {tuple(probs.shape)}"
        )
    led_to = _edges(strong, temperature, filled).exp() @ node_probs.detach().to(floating_tensor("strong", strong))
    found = -(probs.detach().to(led_to) * led_to.clamp_min(torch.finfo(led_to.dtype).tiny).log()).sum(1).mean()
    return found if filled is None else torch.where(filled.any(), found, 0)


class GraphNet(nn.Module):
    """Features, normalised by layer, with a linear head for classes and two layers for an embedding of length one.

    Args:
        features: from images to `(batch, feature_dim)`.
        head: from features to logits.
        dim: width of the embedding.
        normalize: whether to normalise features.
    """

    def __init__(self, features: nn.Module, head: nn.Linear, dim: int, normalize: bool = True) -> None:
        super().__init__()
        width = head.in_features
        self.features, self.head = features, head
        self.norm = nn.LayerNorm(width) if normalize else nn.Identity()
        self.projector = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, integer("dim", dim)))

    def forward(self, x: Float[Tensor, "batch ..."]) -> tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch d"]]:
        features = self.norm(self.features(x))
        return self.head(features), F.normalize(floating_tensor("features", self.projector(features)), dim=1)


class SimMatchV2(WholeState, nn.Module):
    """Trains a classifier from labelled images and weak and strong views of others; gives losses for any optimizer.

    Call `update()` after each of the optimizer's steps: it moves the average that sees the weak views.

    Args:
        features: from images to `(batch, feature_dim)`.
        head: from features to logits.
        labels: of all labelled images, in their order.
        threshold: least probability of a weak view's class for the node-node term, in [0, 1].
        queue_size: unlabelled nodes that are remembered.
        top_n: nearest labelled nodes in a view's graph; at most as many as there are.
        dim: width of the embedding.
        alpha: share of a label that comes from its neighbours, in [0, 1).
        temperature: of the edges.
        weights: of node-node, edge-edge and node-edge consistency.
        momentum: share of the average that stays, in [0, 1].
        normalize: whether features are normalised by layer.
        align: corrects the weak views' probabilities; None takes `DistributionAlignment`, `nn.Identity()` nothing.

    Attributes:
        net: network in training; its first output are logits.
        teacher: its moving average.

    Raises:
        TypeError: if `head` is no `nn.Linear`, or `labels` is not int64.
        ValueError: if an argument is out of range.

    Example:
        >>> labels = torch.tensor([0, 1, 2])
        >>> rule = SimMatchV2(nn.Flatten(), nn.Linear(16, 3), labels, top_n=3, queue_size=64)
        >>> x, weak, strong = torch.rand(2, 1, 4, 4), torch.rand(8, 1, 4, 4), torch.rand(8, 1, 4, 4)
        >>> index = torch.tensor([0, 2])
        >>> losses = rule.loss(x, labels[index], index, weak, strong)
        >>> losses["edge_edge"].item()  # the memory is still empty
        0.0
        >>> rule.update()
    """

    def __init__(
        self,
        features: nn.Module,
        head: nn.Linear,
        labels: Int[Tensor, " labelled"],
        *,
        threshold: float = 0.7,
        queue_size: int = 256 * 320,
        top_n: int = 128,
        dim: int = 128,
        alpha: float = 0.1,
        temperature: float = 0.1,
        weights: tuple[float, float, float] = (10.0, 5.0, 5.0),
        momentum: float = 0.999,
        normalize: bool = True,
        align: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(head, nn.Linear):
            raise TypeError(f"head must be an nn.Linear, got {type(head).__name__}")
        class_indices("labels", labels)
        if labels.ndim != 1 or len(labels) == 0:
            raise ValueError(f"labels must be a vector of at least one, got shape {tuple(labels.shape)}")
        classes = head.out_features
        indices("labels", labels, classes)
        self.threshold = in_range("threshold", threshold, 0, 1)
        self.top_n = integer("top_n", top_n, 1, len(labels))
        self.alpha = in_range("alpha", alpha, 0, 1, "left")
        self.temperature = positive("temperature", temperature)
        if len(weights) != 3:
            raise ValueError(f"weights must be three numbers, got {len(weights)}")
        self.weights = tuple(non_negative("weights", weight) for weight in weights)
        self.net = GraphNet(features, head, dim, normalize)
        self.teacher = Teacher(self.net, momentum, buffers="average")
        self.align = DistributionAlignment(classes) if align is None else align
        # Labelled nodes start at zero, which is at cosine zero from everything.
        self.labelled = SampleMemory(len(labels), dim, repeats="mean")
        self.register_buffer("label_rows", F.one_hot(labels, classes).float())
        self.queue = FeatureBank(queue_size, dim, payload=(classes,))

    label_rows: Tensor

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        logits: Tensor = self.net(x)[0]
        return logits

    def loss(
        self,
        x: Float[Tensor, "batch ..."],
        targets: Int[Tensor, " batch"],
        index: Int[Tensor, " batch"],
        x_weak: Float[Tensor, "unlabelled ..."],
        x_strong: Float[Tensor, "unlabelled ..."] | Sequence[Float[Tensor, "unlabelled ..."]],
    ) -> dict[str, Tensor]:
        """The losses of a batch, by the memories of the batches before; in training mode it then enters them.

        Args:
            x: labelled images, weakly augmented.
            targets: their classes.
            index: their positions among the labelled images; a repeated one takes the mean.
            x_weak: weak views of unlabelled images.
            x_strong: strong views of the same, or several of them.

        Returns:
            "total" to be minimised; its parts "labelled", "node_node", "edge_edge" and "node_edge" (without weights);
            "used", the share of unlabelled images whose pseudo-label counts.

        Raises:
            TypeError: if `targets` or `index` is not int64, or images are not floating point.
            ValueError: if shapes do not fit, a batch is empty, or a label or an index is out of range.
        """
        views = [x_strong] if isinstance(x_strong, Tensor) else list(x_strong)
        if not views:
            raise ValueError("x_strong must be at least one view, got none")
        for view in views:
            check_views(x, targets, x_weak, view)
        if looked_at(targets) and not ((targets >= 0) & (targets < self.net.head.out_features)).all():
            raise ValueError(f"targets must be in [0, {self.net.head.out_features}), got others")
        class_indices("index", index)
        if index.shape != targets.shape:
            raise ValueError(f"index must be one a sample of x, ({len(x)},), got shape {tuple(index.shape)}")
        self.labelled.check(index)
        with torch.no_grad():
            seen, nodes = self.teacher(torch.cat([x, x_weak]))
            weak = nodes[len(x) :]
            probs = self.align(floating_tensor("logits", seen[len(x) :]).softmax(1))
            pseudo = self.pseudo_labels(weak, probs)
            edges = self.queue.cosines(weak)
        logits, embedded = self.net(torch.cat([x, views[0]]))
        logits = floating_tensor("logits", logits)
        strong = [(logits[len(x) :], embedded[len(x) :])]
        strong += [(floating_tensor("logits", more), z) for more, z in map(self.net, views[1:])]
        labelled = F.cross_entropy(logits[: len(x)], targets)
        used = (probs.amax(1) >= self.threshold).to(probs)
        nn_loss = ee_loss = ne_loss = logits.new_zeros(())
        held, filled = cast(Tensor, self.queue.payload).clone(), self.queue.filled.clone()
        for scores, z in strong:
            mine = self.queue.cosines(z)
            nn_loss = nn_loss - (used * (pseudo * scores.log_softmax(1)).sum(1)).mean() / len(views)
            ee_loss = ee_loss + edge_edge_loss(mine, edges, self.temperature, filled) / len(views)
            ne_loss = ne_loss + node_edge_loss(mine, held, probs, self.temperature, filled) / len(views)
        if self.training:
            self.labelled.write(index, nodes[: len(x)])
            self.queue.add(weak, probs)
        a, b, c = self.weights
        return {
            "total": labelled + a * nn_loss + b * ee_loss + c * ne_loss,
            "labelled": labelled.detach(),
            "node_node": nn_loss.detach(),
            "edge_edge": ee_loss.detach(),
            "node_edge": ne_loss.detach(),
            "used": used.mean(),
        }

    @torch.no_grad()
    def pseudo_labels(
        self, embedding: Float[Tensor, "batch dim"], probs: Float[Tensor, "batch classes"]
    ) -> Float[Tensor, "batch classes"]:
        """Class probabilities after the labels of the nearest labelled nodes have flowed in.

        Args:
            embedding: of weak views, of length one.
            probs: their own classes.
        """
        if problem := real_problem(embedding=embedding, probs=probs):
            raise TypeError(problem)
        known = F.normalize(self.labelled.rows, dim=1).to(embedding)
        nearest = (embedding @ known.T).topk(self.top_n, dim=1, sorted=False).indices
        nodes = torch.cat([embedding[:, None], known[nearest]], 1)
        labels = torch.cat([probs[:, None], self.label_rows.to(probs)[nearest]], 1)
        return graph_propagate(nodes, labels, self.alpha, self.temperature)

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average; for after the optimizer's step."""
        self.teacher.update(self.net)


def _edges(cosines: Tensor, temperature: float, filled: Tensor | None) -> Tensor:
    """Logarithms of a softmax over the nodes that are there; finite also where there are none."""
    scaled = floating_tensor("cosines", cosines) / positive("temperature", temperature)
    if filled is not None and (filled.dtype != torch.bool or filled.shape != scaled.shape[1:]):
        raise ValueError(f"filled must be {scaled.shape[1]} booleans, got {filled.dtype}, {tuple(filled.shape)}")
    if filled is not None:
        scaled = scaled.masked_fill(~filled, torch.finfo(scaled.dtype).min / 4)
    return scaled.log_softmax(1)


def _check_edges(strong: Tensor, weak: Tensor) -> None:
    if strong.ndim != 2 or strong.shape != weak.shape:
        raise ValueError(
            f"strong and weak must both be (batch, nodes), got shapes {tuple(strong.shape)} and {tuple(weak.shape)}"
        )
