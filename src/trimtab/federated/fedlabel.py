r"""FedLabel: pseudo-labels from whichever of the local and the global model is surer of a sample.

For clients with few labels and many samples without. A client first trains the received model on its labelled samples.
That local teacher knows the client's classes, the received one knows everybody's; each unlabelled sample takes its
label from the one whose logits vary more over the classes, and where both agree on the class, the student is also
pulled towards the other's probabilities. The student starts from the received model again, and both moves are sent.

$$
s^* = \begin{cases} s_g & h(s_g) > h(s_l) \\ s_l & \text{else} \end{cases}, \qquad
h(s) = \operatorname{Var}_c(s_c), \qquad \hat y = \arg\max s^*
$$

$$
L = \operatorname{mean}_{\max \operatorname{softmax}(s^*) > \beta} \Big[ \operatorname{CE}(p, \hat y) +
  \mathbf 1[\arg\max s^\circ = \hat y]\; \lambda_0 \frac{h(s^\circ)}{h(s^*)}\, \operatorname{KL}\big(
  \operatorname{softmax}(s^\circ) \,\Vert\, p \big) \Big]
$$

$$
w \leftarrow w + \frac{\sum_k r_k\, (\Delta^L_k + \Delta^U_k)}{\sum_k r_k}
$$

Here $s^\circ$ are the logits of the model that was not chosen, $p$ the student's probabilities on a strong view, and
$r_k$ the labelled and the kept samples of a client.

Reference:
    Yae Jee Cho, Gauri Joshi, Dimitrios Dimitriadis: Local or Global: Selective Knowledge Assimilation for Federated
    Learning with Limited Labels. ICCV 2023, arXiv 2307.08809. There is no code of the authors. The paper counts local
    work in steps where this counts passes, and divides a batch's loss (Eq. 8) by the number of samples without labels,
    of which it discards the unsure; here the mean is over the others, as in a public replication. Of thresholds it
    finds 0.3 to 0.5 best.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from trimtab.federated.fedavg import FedAvg
from trimtab.federated.local_training import Loss, batches, seeded_draws
from trimtab.federated.protocol import Broadcast, ClientState, Update
from trimtab.federated.state_dicts import model_state
from trimtab.ops.arguments import floating_tensor, integer, non_negative, one_of, positive, same_shape, tensor_problem

Criterion = Literal["variance", "entropy", "max_prob"]
Teacher = Literal["surer", "local", "global"]
StrongView = Callable[[Tensor, torch.Generator], Tensor]
"""Maps samples and a generator to distorted ones."""

UNLABELED = -1
"""The target of a sample without a label."""


@dataclass(frozen=True)
class PseudoLabels:
    """What two teachers say about a batch.

    Attributes:
        labels: class of the chosen teacher.
        mask: which samples it is sure enough of.
        from_local: where the local teacher was chosen.
        agree: where the other one names the same class.
        ratio: sureness of the other over that of the chosen, in [0, 1]; 0 where neither is sure of anything.
        other: logits of the one that was not chosen.
    """

    labels: Int[Tensor, " batch"]
    mask: Bool[Tensor, " batch"]
    from_local: Bool[Tensor, " batch"]
    agree: Bool[Tensor, " batch"]
    ratio: Float[Tensor, " batch"]
    other: Float[Tensor, "batch classes"]


def sureness(logits: Float[Tensor, "batch classes"], criterion: Criterion = "variance") -> Float[Tensor, " batch"]:
    """How sure a model is of each sample, at least 0.

    Args:
        logits: outputs.
        criterion: "variance" of the logits over the classes, which knows a model's scale; "entropy", by how much it
            falls short of the uniform one; or "max_prob", the largest probability.

    Raises:
        TypeError: `logits` is no real tensor.
        ValueError: it is no floating-point matrix of two or more classes, or `criterion` is unknown.

    Example:
        >>> sureness(torch.tensor([[2.0, 0.0, -2.0], [1.0, 0.0, -1.0]]))
        tensor([4., 1.])
    """
    if problem := tensor_problem(logits=logits):
        raise TypeError(problem)
    if logits.ndim != 2 or logits.shape[1] < 2 or not logits.is_floating_point():
        got = f"{logits.dtype} of shape {tuple(logits.shape)}"
        raise ValueError(f"logits must be floating point, of shape (batch, two or more classes), got {got}")
    if criterion not in ("variance", "entropy", "max_prob"):
        raise ValueError(f"criterion must be one of 'variance', 'entropy', 'max_prob', got {criterion!r}")
    if criterion == "variance":
        return logits.var(1)
    if criterion == "max_prob":
        return logits.softmax(1).amax(1)
    log_p = logits.log_softmax(1)
    uniform = torch.tensor(float(logits.shape[1]), dtype=logits.dtype).log()
    return ((log_p.exp() * log_p).sum(1) + uniform).clamp_min(0)


def select_pseudo_labels(
    logits_local: Float[Tensor, "batch classes"],
    logits_global: Float[Tensor, "batch classes"],
    threshold: float = 0.5,
    criterion: Criterion = "variance",
    teacher: Teacher = "surer",
) -> PseudoLabels:
    """For each sample the class of the surer teacher; of two that are as sure, of the local one.

    Args:
        logits_local: of the model trained on the client's labels.
        logits_global: of the model received.
        threshold: probability that the chosen one must exceed (beta).
        criterion: how sureness is measured.
        teacher: "local" or "global" always chooses that one, for comparison.

    Raises:
        TypeError: logits are not floating-point tensors.
        ValueError: shapes differ, there are fewer than two classes, or an argument is out of range.

    Example:
        >>> far, near = torch.tensor([[2.0, 0.0, -2.0]]), torch.tensor([[1.0, 0.0, -1.0]])
        >>> found = select_pseudo_labels(near, far, threshold=0.8)
        >>> found.labels, found.mask, found.from_local, found.ratio
        (tensor([0]), tensor([True]), tensor([False]), tensor([0.2500]))
    """
    local, received = floating_tensor("logits_local", logits_local), floating_tensor("logits_global", logits_global)
    if local.ndim != 2 or local.shape[1] < 2:
        raise ValueError(f"logits_local must be of shape (batch, two or more classes), got {tuple(local.shape)}")
    same_shape("logits_global", received, "logits_local", local)
    non_negative("threshold", threshold)
    one_of("criterion", criterion, ("variance", "entropy", "max_prob"))
    one_of("teacher", teacher, ("surer", "local", "global"))
    sure_local, sure_global = sureness(local, criterion), sureness(received, criterion)
    if teacher == "surer":
        from_local = ~(sure_global > sure_local)
    else:
        from_local = torch.full_like(sure_local, teacher == "local", dtype=torch.bool)
    chosen, other = (torch.where(from_local[:, None], *pair) for pair in ((local, received), (received, local)))
    most, least = (torch.where(from_local, *pair) for pair in ((sure_local, sure_global), (sure_global, sure_local)))
    labels = chosen.argmax(1)
    ratio = torch.where(most > 0, least / most, 0.0).clamp_max(1)
    mask = chosen.softmax(1).amax(1) > threshold
    return PseudoLabels(labels, mask, from_local, other.argmax(1) == labels, ratio, other)


def pseudo_label_loss(
    logits: Float[Tensor, "kept classes"], chosen: PseudoLabels, index: Int[Tensor, " kept"], consistency: float = 1.0
) -> Float[Tensor, ""]:
    """The student's loss on strong views of kept samples.

    Args:
        logits: of the student.
        chosen: what the teachers said.
        index: places of these samples in it.
        consistency: weight of the pull towards the other teacher (lambda_0).

    Example:
        >>> teacher = torch.tensor([[4.0, 0.0]])
        >>> pseudo_label_loss(torch.zeros(1, 2), select_pseudo_labels(teacher, teacher), torch.tensor([0]))
        tensor(1.2962)
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(
            f"logits must be a floating-point tensor, got {getattr(logits, 'dtype', type(logits).__name__)}"
        )
    if not 0 <= consistency < float("inf"):
        raise ValueError(f"consistency must be finite and not negative, got {consistency!r}")
    log_p = logits.log_softmax(1)
    loss = nn.functional.nll_loss(log_p, chosen.labels[index], reduction="none")
    if consistency:
        target = chosen.other[index].log_softmax(1)
        apart = (target.exp() * (target - log_p)).sum(1)
        loss = loss + consistency * chosen.agree[index] * chosen.ratio[index] * apart
    return loss.mean()


class FedLabel(FedAvg):
    """FedLabel's clients, with FedAvg's server; a client whose samples all have labels is FedAvg's.

    A client's data are a pair (x, y) as everywhere, with -1 in y for a sample without a label. A batch of which fewer
    than two samples are kept makes no step, for batch normalisation. Teachers are in eval mode, the student in train
    mode; moves of parameters are summed, running statistics are the mean of the student's and the local teacher's.

    Args:
        lr: learning rate of the clients.
        local_epochs: passes over a client's labelled samples in a round.
        batch_size: samples in a step.
        unlabeled_epochs: passes over its samples without labels; 0 leaves them out.
        threshold: probability above which a pseudo-label counts (beta); 1 or more drops them all.
        consistency: weight of the pull towards the other teacher (lambda_0).
        criterion: how sureness is measured, see `sureness`.
        strong: distorts samples for the student; they are taken as they are without it. The paper has RandAugment.
        teacher: "local" or "global" takes all labels from that one, for comparison.
        momentum, weight_decay: of the clients' SGD, which starts anew each round.
        max_norm: bound on the global norm of a client's gradient; none by default.
        lr_decay: factor on the learning rate after each round.
        loss: of labelled samples; cross-entropy by default.

    Raises:
        ValueError: an argument is out of range; later, a client without any labelled sample.

    Example:
        >>> from trimtab.federated import FedLabel, simulate
        >>> y = torch.tensor([0, 1, 2, -1, -1, -1, -1, -1])
        >>> clients = [(torch.randn(8, 4), y) for _ in range(5)]
        >>> history = simulate(FedLabel(lr=0.1, threshold=0.5), nn.Linear(4, 3), clients, rounds=2)
        >>> sorted(history.rounds[0].metrics[0])
        ['from_local', 'gradients', 'kept']
    """

    def __init__(
        self,
        lr: float,
        local_epochs: int = 5,
        batch_size: int = 20,
        *,
        unlabeled_epochs: int = 1,
        threshold: float = 0.5,
        consistency: float = 1.0,
        criterion: Criterion = "variance",
        strong: StrongView | None = None,
        teacher: Teacher = "surer",
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        max_norm: float | None = None,
        lr_decay: float = 1.0,
        loss: Loss = nn.functional.cross_entropy,
    ) -> None:
        super().__init__(
            lr,
            local_epochs,
            batch_size,
            momentum=momentum,
            weight_decay=weight_decay,
            max_norm=max_norm,
            lr_decay=lr_decay,
            loss=loss,
        )
        self.unlabeled_epochs = integer("unlabeled_epochs", unlabeled_epochs, 0)
        self.threshold = positive("threshold", threshold)
        self.consistency = non_negative("consistency", consistency)
        self.criterion: Criterion = one_of("criterion", criterion, ("variance", "entropy", "max_prob"))
        self.strong = strong
        self.teacher: Teacher = one_of("teacher", teacher, ("surer", "local", "global"))

    def client_update(
        self,
        model: nn.Module,
        broadcast: Broadcast,
        client: ClientState,
        data: tuple[Tensor, Tensor],
        *,
        generator: torch.Generator,
    ) -> tuple[Update, ClientState]:
        x, y = data
        if len(x) == 0 or len(x) != len(y):
            raise ValueError(f"data must hold as many targets as inputs, and at least one; got {len(x)} and {len(y)}")
        known = y != UNLABELED
        if not bool(known.any()):
            raise ValueError("data must hold at least one labelled sample, got none")
        unlabeled = x[~known]
        model.load_state_dict(broadcast.params)
        asked = bool(len(unlabeled)) and self.unlabeled_epochs > 0 and self.threshold < 1
        logits_global = logits(model, unlabeled) if asked else None
        steps = self.local.train(model, (x[known], y[known]), generator=generator, round=broadcast.round)
        params, labeled = model_state(model), int(known.sum())
        if logits_global is None:
            metrics = {"gradients": float(steps), "kept": 0.0, "from_local": 0.0}
            return Update(params, labeled, metrics=metrics), client
        chosen = select_pseudo_labels(
            logits(model, unlabeled), logits_global, self.threshold, self.criterion, self.teacher
        )
        model.load_state_dict(broadcast.params)
        more = self._follow(model, unlabeled, chosen, broadcast.round, generator)
        named = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        for name, value in model_state(model).items():
            if name in named:
                params[name] = params[name] + (value - broadcast.params[name])
            elif value.is_floating_point() or value.is_complex():  # a sum of moves may leave no variance at all
                params[name] = (params[name] + value) / 2
        kept = int(chosen.mask.sum())
        local = float((chosen.from_local & chosen.mask).sum()) / max(kept, 1)
        metrics = {"gradients": float(steps + more), "kept": kept / len(unlabeled), "from_local": local}
        return Update(params, labeled + kept, metrics=metrics), client

    def _follow(self, model: nn.Module, x: Tensor, chosen: PseudoLabels, round: int, generator: torch.Generator) -> int:
        """Train the student on the pseudo-labels, in place; the number of steps."""
        params, local, steps = [p for p in model.parameters() if p.requires_grad], self.local, 0
        optimizer = torch.optim.SGD(
            params, lr=local.lr * local.lr_decay**round, momentum=local.momentum, weight_decay=local.weight_decay
        )
        model.train()
        with seeded_draws(params, generator):
            for index in batches(len(x), local.batch_size, self.unlabeled_epochs, generator):
                kept = index.to(x.device)[chosen.mask[index]]
                if len(kept) < 2:
                    continue
                views = x[kept] if self.strong is None else self.strong(x[kept], generator)
                optimizer.zero_grad()
                pseudo_label_loss(model(views), chosen, kept, self.consistency).backward()
                if local.max_norm is not None:
                    nn.utils.clip_grad_norm_(params, local.max_norm)
                optimizer.step()
                steps += 1
        optimizer.zero_grad()
        return steps


@torch.no_grad()
def logits(model: nn.Module, x: Tensor, batch_size: int = 1024) -> Float[Tensor, "n classes"]:
    """A model's outputs in eval mode."""
    model.eval()
    return torch.cat([model(part) for part in x.split(batch_size)])
