r"""DR-Tune: fine-tuning with distribution regularisation and semantic calibration.

The head that is trained for the new task must also sort pre-trained features of past samples, so that it cannot follow
a few of them anywhere, while the encoder stays free. As the encoder moves away from where it began, the stored
features are first rotated and shifted, class by class, to where its own features are now.

$$
L = \frac{1}{B + K} \Bigl( \sum_{i \le B} \ell\bigl(h(z_i), y_i\bigr)
    + \sum_{k \le K} \ell\bigl(h(\hat x_k), y_k\bigr) \Bigr), \qquad
\hat x_k = s\, \frac{R x_k + \delta_{y_k}}{\lVert R x_k + \delta_{y_k} \rVert}
$$
$$
R = \arg\min_{R \in SO(D)} \sum_k \lVert R (x_k - \bar x) - (z_k - \bar z) \rVert^2, \qquad
\delta_c = \sum_{k: y_k = c} w_k z_k - \operatorname*{mean}_{k: y_k = c} R x_k, \qquad
w_k \propto \exp \bigl( \langle z_k, W_c / \lVert W_c \rVert \rangle \bigr)
$$

with stored features $x_k$ of the pre-trained encoder and $z_k$ of the fine-tuned one, all of length one, the head's
row $W_c$ of class c, and s the mean length of the features of the batch. Centring makes no difference to the result,
as each class is shifted by its own mean.

Nan Zhou, Jiaxin Chen and Di Huang, "DR-Tune: Improving Fine-tuning of Pretrained Visual Models by Distribution
Regularization with Semantic Calibration", ICCV 2023, arXiv 2308.12058. As in the authors' release, the rotation is
found on every tenth step only, for the cost of its decomposition, and on the others there is none.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from trimtab.ops.arguments import (
    class_indices,
    floating_tensor,
    indices,
    integer,
    non_negative,
    real_problem,
    same_shape,
    tensor_problem,
)
from trimtab.ops.feature_bank import FeatureBank
from trimtab.ops.states import fits


def procrustes_rotation(
    source: Float[Tensor, "n dim"], target: Float[Tensor, "n dim"], keep: Bool[Tensor, " n"] | None = None
) -> Float[Tensor, "dim dim"]:
    """The rotation R (determinant 1) for which `source @ R.T` is nearest to `target`, both centred.

    Args:
        source, target: pairs of rows.
        keep: which pairs count; all without it.

    Raises:
        TypeError: they are not floating-point tensors.
        ValueError: the shapes differ.

    Example:
        >>> square = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
        >>> procrustes_rotation(square, 2 * square.roll(1, 0)).round().abs()
        tensor([[0., 1.],
                [1., 0.]])
    """
    x, y = floating_tensor("source", source), floating_tensor("target", target)
    same_shape("target", y, "source", x)
    counted = (torch.ones_like(x[:, :1]) if keep is None else keep[:, None]).to(x.dtype)
    total = counted.sum().clamp(min=1)
    x, y = ((rows - (counted * rows).sum(0) / total) * counted for rows in (x, y))
    with torch.autocast(x.device.type, enabled=False):
        U, _, Vh = torch.linalg.svd(x.T @ y)
        turn = torch.ones_like(U[0])
        turn[-1] = torch.linalg.det(U @ Vh).sign()
        rotation: Tensor = (Vh.T * turn) @ U.T
    return rotation


@torch.no_grad()
def semantic_calibration(
    pretrained: Float[Tensor, "n dim"],
    downstream: Float[Tensor, "n dim"],
    labels: Int[Tensor, " n"],
    class_weights: Float[Tensor, "classes dim"],
    scale: float | Float[Tensor, ""] = 1.0,
    rotate: bool = True,
    keep: Bool[Tensor, " n"] | None = None,
) -> Float[Tensor, "n dim"]:
    """Stored pre-trained features, moved to where the fine-tuned encoder's features of their class are.

    Args:
        pretrained: features of the pre-trained encoder; their lengths do not count.
        downstream: features of the fine-tuned encoder for the same samples; likewise.
        labels: classes of the samples.
        class_weights: the head's weight, a row for each class; features along it count more in their class's centre.
        scale: length of the result.
        rotate: rotate before the shift.
        keep: which rows are filled; all without it.

    Returns:
        Rows of length `scale`, without gradient.

    Raises:
        TypeError: `labels` are not int64.
        ValueError: shapes do not fit, or a label has no row of `class_weights`.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> semantic_calibration(rows, rows.flip(0), torch.tensor([0, 1]), torch.zeros(2, 2), scale=3.0)
        tensor([[0., 3.],
                [3., 0.]])
    """
    if problem := tensor_problem(
        pretrained=pretrained, downstream=downstream, labels=labels, class_weights=class_weights, keep=keep
    ):
        raise TypeError(problem)
    if isinstance(scale, float | int) and not 0 <= scale < float("inf"):
        raise ValueError(f"scale must be finite and not negative, got {scale!r}")
    class_indices("labels", labels)
    same_shape("downstream", downstream, "pretrained", pretrained)
    if pretrained.ndim != 2 or class_weights.shape[1:] != pretrained.shape[1:] or labels.shape != pretrained.shape[:1]:
        raise ValueError(
            f"pretrained must have a row for each of {tuple(labels.shape)} labels, as long as the class weights' of "
            f"shape {tuple(class_weights.shape)}, got shape {tuple(pretrained.shape)}"
        )
    if len(labels):
        indices("labels", labels, len(class_weights))
    with torch.autocast(pretrained.device.type, enabled=False):
        kind = torch.promote_types(pretrained.dtype, torch.float32)
        x, z, along = (F.normalize(t.to(kind)) for t in (pretrained, downstream, class_weights))
        if rotate:
            x = x @ procrustes_rotation(x, z, keep).T
        filled = x.new_ones(len(x)) if keep is None else keep.to(kind)
        member = F.one_hot(labels, len(class_weights)).to(kind) * filled[:, None]
        pull = (z * along[labels]).sum(1).exp() * filled  # a cosine: no overflow
        centre = member.T @ (pull[:, None] * z) / (member.T @ pull)[:, None].clamp(min=1e-12)
        before = member.T @ x / member.sum(0)[:, None].clamp(min=1)
        moved: Tensor = F.normalize(x + (centre - before)[labels]) * scale
    return moved


class DRTune(nn.Module):
    """An encoder and a linear head, trained beside a frozen copy of the encoder and two queues of features.

    The optimizer takes `encoder` and `head` (the authors: SGD with Nesterov momentum, 0.01 and 0.33).

    Args:
        encoder: the pre-trained encoder, from a batch to (batch, dim).
        head: the linear head of the new task.
        queue_size: K, how many past samples are stored.
        rotate_every: on every how many steps the stored features are rotated; 0 for never.
        calibrate: move the stored features at all; without, they keep only the batch's length.
        reg_weight: weight of the mean loss on stored features beside the mean loss on the batch; None takes the mean
            over both together, as the paper does.

    Raises:
        TypeError: `head` is not a linear layer.
        ValueError: a number is out of range.

    Example:
        >>> model = DRTune(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 3), queue_size=64)
        >>> x, y = torch.ones(6, 4), torch.arange(6) % 3
        >>> model.warmup([(x, y)])
        >>> optimizer = torch.optim.SGD([*model.encoder.parameters(), *model.head.parameters()], lr=0.01)
        >>> loss = model.loss(x, y)["total"]
        >>> loss.backward()
        >>> optimizer.step()
        >>> model(x).shape
        torch.Size([6, 3])
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Linear,
        queue_size: int = 2048,
        rotate_every: int = 10,
        calibrate: bool = True,
        reg_weight: float | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(head, nn.Linear):
            raise TypeError(f"head must be a linear layer, got {type(head).__name__}")
        self.rotate_every = integer("rotate_every", rotate_every, 0)
        self.reg_weight = None if reg_weight is None else non_negative("reg_weight", reg_weight)
        self.calibrate = calibrate
        self.downstream = FeatureBank(queue_size, head.in_features, payload=(), payload_dtype=torch.int64)
        self.pretrained = FeatureBank(queue_size, head.in_features)
        self.to(head.weight.device)
        self.encoder, self.head = encoder, head
        self.reference = copy.deepcopy(encoder).eval().requires_grad_(False)
        self.steps = 0

    def train(self, mode: bool = True) -> DRTune:
        """As of any module, but the frozen copy stays in eval mode."""
        super().train(mode)
        self.reference.eval()
        return self

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        logits: Tensor = self.head(self.encoder(x))
        return logits

    @torch.no_grad()
    def warmup(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Fill both queues with pre-trained features, from batches of inputs and targets, until they are full."""
        left = len(self.downstream.filled)
        for x, targets in batches:
            if left <= 0:
                break
            self._check(x, targets)
            features = self.reference(x)
            self._add(features, features, targets)
            left -= len(targets)

    def loss(self, x: Float[Tensor, "batch ..."], targets: Int[Tensor, " batch"]) -> dict[str, Tensor]:
        """The loss of a batch, which is then stored.

        Args:
            x: inputs.
            targets: their classes.

        Returns:
            `total`, to be minimised, and its parts `task` and `queue`, the mean losses on the batch and on the stored
            features (0 while there are none).

        Raises:
            TypeError: `targets` are not int64.
            ValueError: the batch is empty, has not as many targets, or a target is no class of the head.
        """
        if problem := real_problem(x=x):
            raise TypeError(problem)
        self._check(x, targets)
        z = self.encoder(x)
        task = F.cross_entropy(self.head(z), targets)
        # a copy, as the queue is written to before the backward pass
        labels = cast(Tensor, self.downstream.payload).clone()
        filled = self.downstream.filled & self.pretrained.filled
        stored = F.cross_entropy(self.head(self._stored(z.detach(), labels, filled)), labels, reduction="none")
        count = filled.sum()
        queue = (stored * filled).sum() / count.clamp(min=1)
        if self.reg_weight is None:
            total = (len(targets) * task + count * queue) / (len(targets) + count)
        else:
            total = task + self.reg_weight * queue
        with torch.no_grad():
            self._add(z.detach(), self.reference(x), targets)
        self.steps += 1
        return {"total": total, "task": task.detach(), "queue": queue.detach()}

    def _stored(self, z: Tensor, labels: Tensor, filled: Tensor) -> Tensor:
        scale = z.norm(dim=1).mean()
        if not self.calibrate:
            found: Tensor = (self.pretrained.features * scale).to(z.dtype)
            return found
        rotate = bool(self.rotate_every) and self.steps % self.rotate_every == 0
        features = self.pretrained.features, self.downstream.features
        weight = self.head.weight.detach()
        return semantic_calibration(*features, labels, weight, scale, rotate, filled).to(z.dtype)

    def _add(self, z: Tensor, before: Tensor, targets: Tensor) -> None:
        self.downstream.add(z, targets)
        self.pretrained.add(before)

    def _check(self, x: Tensor, targets: Tensor) -> None:
        class_indices("targets", targets)
        if targets.shape != x.shape[:1] or not len(x):
            raise ValueError(f"targets must be one for each of {len(x)} inputs, at least 1, got {tuple(targets.shape)}")
        indices("targets", targets, self.head.out_features)  # one that is none would stay in the queue

    def get_extra_state(self) -> dict[str, int]:
        """The number of steps taken, which says when to rotate."""
        return {"steps": self.steps}

    def set_extra_state(self, state: Any) -> None:
        self.steps = integer("steps", state["steps"], 0)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of any module, but a state that does not fit changes nothing.

        Raises:
            ValueError: it has other parts or shapes.
        """
        if not fits(state_dict, self.state_dict()):
            raise ValueError("state must be of the same encoder, head and queue_size, got other parts or shapes")
        return super().load_state_dict(state_dict, strict, assign)
