r"""Distill to delete (D2DGN): two teachers for a graph network, one for what stays and one for what goes.

For the deletion of edges or nodes from a trained graph network without training it anew. The trained network, the
preserver, teaches a student on what is retained; a network that has learnt nothing, the destroyer, teaches it on what
is deleted. Both see the original graph, once; the student sees the graph without what was deleted.

$$
L = \alpha L_{\text{retained}}(P, S) + (1 - \alpha) L_{\text{deleted}}(D, S),
$$

where both losses compare responses by a KL divergence, of softmaxes over classes for nodes and of the probabilities of
pairs for edges, or features by the mean square, summed over layers. Edges come with non-edges in both losses. Do not
expect a retrained network to score deleted edges like an untrained one: it has learnt from the edges around them.

Reference: Yash Sinha, Murari Mandal and Mohan Kankanhalli, "Distill to Delete: Unlearning in Graph Networks with
Knowledge Distillation", arXiv 2309.16173. No code of the authors' was at hand; what the summary leaves open is as in
OpenGU's port, but for the graph that the student sees, which keeps deleted edges there (`message_graph="original"`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from trimtab.ops.arguments import in_range, indices, integer, one_of, real_problem, same_shape, tensor_problem
from trimtab.ops.averaging import frozen_copy
from trimtab.ops.states import fits

Knowledge = Literal["response", "feature"]
MessageGraph = Literal["retained", "original"]
M = TypeVar("M", bound=nn.Module)


class GraphNetwork(Protocol):
    """An `nn.Module` that embeds nodes and scores pairs of them."""

    def layers(
        self, x: Float[Tensor, "nodes features"], edge_index: Int64[Tensor, "2 edges"]
    ) -> Sequence[Float[Tensor, "nodes dim"]]:
        """The embeddings after each layer; the last are the output: for nodes the logits of classes."""
        ...

    def decode(self, h: Float[Tensor, "nodes dim"], pairs: Int64[Tensor, "2 pairs"]) -> Float[Tensor, " pairs"]:
        """Scores of pairs, the log-odds that they are edges; needed for edges alone."""
        ...


def bernoulli_kl(
    logit_p: Float[Tensor, "*batch"], logit_q: Float[Tensor, "*batch"], *, eps: float = 1e-5
) -> Float[Tensor, "*batch"]:
    """KL divergence between events of given log-odds, whose probabilities are kept off 0 and 1 by `eps`.

    Raises:
        ValueError: the shapes differ, or `eps` is outside (0, 0.5).

    Example:
        >>> bernoulli_kl(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0]))
        tensor([0.0000, 0.1201])
    """
    if problem := tensor_problem(logit_p=logit_p, logit_q=logit_q):
        raise TypeError(problem)
    same_shape("logit_q", logit_q, "logit_p", logit_p)
    in_range("eps", eps, 0, 0.5, "neither")
    p, q = (logit.float() if logit.dtype in (torch.float16, torch.bfloat16) else logit for logit in (logit_p, logit_q))
    p, q = p.sigmoid().clamp(eps, 1 - eps), q.sigmoid().clamp(eps, 1 - eps)
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


def sample_non_edges(
    num_nodes: int,
    edge_index: Int64[Tensor, "2 edges"],
    count: int,
    *,
    generator: torch.Generator | None = None,
) -> Int64[Tensor, "2 count"]:
    """Pairs of different nodes with no edge in either direction, drawn at random, perhaps the same one twice.

    Args:
        num_nodes: number of nodes.
        edge_index: all edges, deleted ones too.
        count: how many.
        generator: of the draws.

    Raises:
        ValueError: an edge is out of range, or all nodes are joined.

    Example:
        >>> sample_non_edges(3, torch.tensor([[0, 0], [1, 2]]), 2).sort(0).values
        tensor([[1, 1],
                [2, 2]])
    """
    if problem := tensor_problem(edge_index=edge_index):
        raise TypeError(problem)
    integer("num_nodes", num_nodes)
    integer("count", count, 0)
    _check_pairs("edge_index", edge_index, num_nodes)
    taken = torch.cat([_codes(edge_index.cpu(), num_nodes), torch.arange(num_nodes) * (num_nodes + 1)]).unique()
    if len(taken) == num_nodes * (num_nodes + 1) // 2:
        raise ValueError("edge_index must leave a pair of nodes without an edge, got a complete graph")
    found = torch.empty(2, 0, dtype=torch.int64)
    while found.shape[1] < count:
        pairs = torch.randint(num_nodes, (2, 2 * count), generator=generator)
        found = torch.cat([found, pairs[:, ~torch.isin(_codes(pairs, num_nodes), taken)]], 1)
    return found[:, :count].to(edge_index.device)


def untrained_copy(model: M, *, generator: torch.Generator | None = None) -> M:
    """A copy with new weights, by each layer's own `reset_parameters`: a destroyer, or a student from nothing.

    Args:
        model: any network of layers that have `reset_parameters`, as PyTorch's and PyG's do.
        generator: decides the weights.

    Raises:
        ValueError: a layer with weights of its own has no `reset_parameters`.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> bool((untrained_copy(model).weight == model.weight).any())
        False
    """
    made = copy.deepcopy(model)
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, layer in made.named_modules():
            reset = getattr(layer, "reset_parameters", None)
            if callable(reset):
                reset()
            elif any(True for _ in layer.parameters(recurse=False)):
                raise ValueError(f"layers with weights must have reset_parameters, got {name or type(layer).__name__}")
    return made


@dataclass(frozen=True)
class Request:
    """What is to be deleted, and what both teachers say of it.

    Attributes:
        x: features of nodes.
        messages: edges along which the student's messages go, (2, edges).
        retained: what is compared with the preserver, nodes (count,) or pairs (2, count).
        deleted: what is compared with the destroyer, likewise; may be empty.
        preserved: targets of the preserver, one tensor of each layer that is compared.
        destroyed: targets of the destroyer.
    """

    x: Tensor
    messages: Tensor
    retained: Tensor
    deleted: Tensor
    preserved: tuple[Tensor, ...]
    destroyed: tuple[Tensor, ...]


class D2DGN:
    """Trains a student of two teachers, a step at a time; networks and the optimizer are yours.

    Args:
        preserver: the trained network; a frozen copy of it teaches.
        destroyer: a network that does not know what goes: untrained (`untrained_copy`), or trained on a graph whose
            edges were replaced by as many random ones; a frozen copy of it teaches.
        student: what is trained, of the same layers: untrained, or a copy of the preserver.
        optimizer: of the student.
        knowledge: "response" compares outputs, "feature" embeddings of all layers, of edges their decoded scores.
        alpha: weight of what is retained against what is deleted, in [0, 1].
        message_graph: "retained" keeps the student's messages off deleted edges, "original" does not.

    Raises:
        ValueError: `alpha` is out of range, or a name unknown.

    Example:
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nn.Linear(4, 2)
        ...     def layers(self, x, edge_index):
        ...         mean = torch.zeros_like(x).index_add(0, edge_index[1], x[edge_index[0]])
        ...         return [self.layer(x + mean)]
        ...     def decode(self, h, pairs):
        ...         return (h[pairs[0]] * h[pairs[1]]).sum(1)
        >>> model = Net()
        >>> student = untrained_copy(model)
        >>> rule = D2DGN(model, untrained_copy(model), student, torch.optim.Adam(student.parameters()))
        >>> edges = torch.tensor([[0, 1, 2], [1, 2, 3]])
        >>> request = rule.delete_edges(torch.eye(4), edges, deleted=edges[:, :1])
        >>> sorted(rule.step(request))
        ['deleted', 'retained', 'total']
    """

    def __init__(
        self,
        preserver: nn.Module,
        destroyer: nn.Module,
        student: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        knowledge: Knowledge = "response",
        alpha: float = 0.5,
        message_graph: MessageGraph = "retained",
    ) -> None:
        self.knowledge: Knowledge = one_of("knowledge", knowledge, get_args(Knowledge))
        self.alpha = in_range("alpha", alpha, 0, 1)
        self.message_graph: MessageGraph = one_of("message_graph", message_graph, get_args(MessageGraph))
        self.preserver, self.destroyer = frozen_copy(preserver), frozen_copy(destroyer)
        self.student, self.optimizer = student, optimizer

    def delete_edges(
        self,
        x: Float[Tensor, "nodes features"],
        edge_index: Int64[Tensor, "2 edges"],
        deleted: Int64[Tensor, "2 deleted"],
        *,
        retained: Int64[Tensor, "2 retained"] | None = None,
        negatives: Int64[Tensor, "2 negatives"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Request:
        """A request to forget edges, with the teachers' answers.

        Args:
            x: features of nodes.
            edge_index: the original graph; an undirected one has each edge in both directions.
            deleted: edges to forget, in one direction; they go in both.
            retained: edges to keep, in one direction; by default all others.
            negatives: pairs without an edge, which come with both; drawn by default, as many as retained edges.
            generator: draws them.

        Raises:
            ValueError: pairs are no (2, count) int64 nodes of the graph, an edge to forget is none of it, or an edge is
                both deleted and retained.
        """
        if problem := real_problem(x=x):
            raise TypeError(problem)
        for name, pairs in (("edge_index", edge_index), ("deleted", deleted)):
            _check_pairs(name, pairs, len(x))
        gone = torch.isin(_codes(edge_index, len(x)), _codes(deleted, len(x)))
        if not bool(torch.isin(_codes(deleted, len(x)), _codes(edge_index, len(x))).all()):
            raise ValueError("deleted must be edges of edge_index, got a pair that is none")
        if retained is None:
            kept = edge_index[:, ~gone]
            first = kept[:, kept[0] <= kept[1]]
            backward = kept[:, kept[0] > kept[1]]
            once = ~torch.isin(_codes(backward, len(x)), _codes(first, len(x)))
            retained = torch.cat([first, backward[:, once]], 1)
        _check_pairs("retained", retained, len(x))
        if bool(torch.isin(_codes(retained, len(x)), _codes(deleted, len(x))).any()):
            raise ValueError("retained must have no edge that is deleted, got one")
        if negatives is None:
            negatives = sample_non_edges(len(x), edge_index, retained.shape[1], generator=generator)
        _check_pairs("negatives", negatives, len(x))
        messages = edge_index[:, ~gone] if self.message_graph == "retained" else edge_index
        goes = torch.cat([deleted, negatives], 1) if deleted.shape[1] else deleted
        return self._request(x, edge_index, messages, torch.cat([retained, negatives], 1), goes)

    def delete_nodes(
        self,
        x: Float[Tensor, "nodes features"],
        edge_index: Int64[Tensor, "2 edges"],
        deleted: Int64[Tensor, " deleted"],
        *,
        retained: Int64[Tensor, " retained"] | None = None,
    ) -> Request:
        """A request to forget nodes, and with them all their edges.

        Args:
            x: features of nodes.
            edge_index: the original graph.
            deleted: nodes to forget.
            retained: nodes to keep; by default all others.

        Raises:
            ValueError: nodes are not in the graph, or one is both deleted and retained.
        """
        _check_pairs("edge_index", edge_index, len(x))
        if retained is None:
            retained = torch.arange(len(x), device=x.device)
            retained = retained[~torch.isin(retained, deleted)]
        for name, nodes in (("deleted", deleted), ("retained", retained)):
            if nodes.ndim != 1 or nodes.dtype != torch.int64:
                raise ValueError(f"{name} must be int64 nodes, got {nodes.dtype} of shape {tuple(nodes.shape)}")
            if len(nodes):
                indices(name, nodes, len(x))
        if bool(torch.isin(retained, deleted).any()):
            raise ValueError("retained must have no node that is deleted, got one")
        messages = edge_index[:, ~torch.isin(edge_index, deleted).any(0)]
        return self._request(
            x, edge_index, messages if self.message_graph == "retained" else edge_index, retained, deleted
        )

    @torch.no_grad()
    def _request(self, x: Tensor, edge_index: Tensor, messages: Tensor, retained: Tensor, deleted: Tensor) -> Request:
        preserved = self._told(self.preserver, x, edge_index, retained)
        destroyed = self._told(self.destroyer, x, edge_index, deleted)
        return Request(x, messages, retained, deleted, preserved, destroyed)

    def _told(self, model: Any, x: Tensor, edges: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        """What a network says of nodes or pairs, layer by layer; of several parts, one after the other."""
        layers = list(model.layers(x, edges))
        if self.knowledge == "response":
            layers = layers[-1:]
        return tuple(model.decode(h, at) if at.ndim == 2 else h[at] for at in parts for h in layers)

    def step(self, request: Request) -> dict[str, Tensor]:
        """One step of the student.

        Args:
            request: of `delete_edges` or `delete_nodes`.

        Returns:
            Losses, detached: "retained", "deleted" and their weighted "total".
        """
        found = self.loss(request)
        self.optimizer.zero_grad()
        found["total"].backward()
        self.optimizer.step()
        return {name: value.detach() for name, value in found.items()}

    def loss(self, request: Request) -> dict[str, Tensor]:
        """The losses of the student as it is, with gradients."""
        told = self._told(self.student, request.x, request.messages, request.retained, request.deleted)
        count = len(told) // 2
        kept = self._apart(told[:count], request.preserved)
        gone = self._apart(told[count:], request.destroyed)
        return {"retained": kept, "deleted": gone, "total": self.alpha * kept + (1 - self.alpha) * gone}

    def _apart(self, told: tuple[Tensor, ...], targets: tuple[Tensor, ...]) -> Tensor:
        if not len(told[0]):
            return 0 * sum((one.sum() for one in told), start=torch.zeros((), device=told[0].device))
        if self.knowledge == "feature":
            return torch.stack([F.mse_loss(one, wanted) for one, wanted in zip(told, targets, strict=True)]).sum()
        own, wanted = told[0], targets[0]
        if own.ndim == 1:
            return bernoulli_kl(wanted, own).mean()
        return F.kl_div(own.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True)

    def state_dict(self) -> dict[str, Any]:
        """All three networks and the optimizer."""
        return {name: getattr(self, name).state_dict() for name in ("preserver", "destroyer", "student", "optimizer")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where `state_dict` was called; a state that does not fit is refused and changes nothing.

        Raises:
            ValueError: the state is another rule's or of other networks.
        """
        networks = ("preserver", "destroyer", "student")
        own = {name: getattr(self, name).state_dict() for name in networks}
        if state.keys() != {*networks, "optimizer"} or not fits({name: state[name] for name in networks}, own):
            raise ValueError("state must be of D2DGN with networks of these shapes, got another")
        self.optimizer.load_state_dict(state["optimizer"])  # refuses what does not fit before it changes anything
        for name in networks:
            getattr(self, name).load_state_dict(state[name])


def _codes(pairs: Tensor, num_nodes: int) -> Tensor:
    """A number for each pair, the same in both directions."""
    return pairs.amin(0) * num_nodes + pairs.amax(0)


def _check_pairs(name: str, pairs: Tensor, num_nodes: int) -> None:
    if pairs.ndim != 2 or pairs.shape[0] != 2 or pairs.dtype != torch.int64:
        raise ValueError(f"{name} must be int64 of shape (2, count), got {pairs.dtype} of shape {tuple(pairs.shape)}")
    if pairs.numel():
        indices(name, pairs, num_nodes)
