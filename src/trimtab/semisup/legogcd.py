r"""LegoGCD: keeps a network from forgetting known classes while it discovers new ones.

For generalised category discovery: some images are labelled, of known classes; the rest are of known and novel classes
mixed. SimGCD trains a classifier of cosines over all classes by self-distillation between two views, made even over the
classes by the entropy of the mean prediction, beside cross-entropy on the labelled images and two contrastive terms;
LegoGCD adds two terms, with $o$ the cosines and $p = \mathrm{softmax}(o / 0.1)$:

$$
\mathcal{L}_{\mathrm{LER}} = - \frac{1}{2B} \sum_{i \in M} \hat p_i^\top
\log \mathrm{softmax}\bigl(o_i / 0.05 + 0.4 \log \hat q\bigr), \quad \hat p_i = \mathrm{softmax}(o_i / 0.05),
$$

over the views $M$ of unlabelled images whose $p$ is at least $\delta$ for a known class (local entropy regularisation),
with $\hat q$ the running mean of $\mathrm{softmax}(o)$ as a margin, and

$$
\mathcal{L}_{\mathrm{DKL}} = \frac1B \sum_i \mathrm{KL}\bigl(p_i^{(1)} \,\|\, p_i^{(2)}\bigr)
$$

between the two views, through both of which the gradient flows; the authors' release takes the logarithms of a softmax
of $p$ in place of those of $p$, and its divergence is therefore weak (`softened_dkl`). In total
$(1 - \lambda)(\mathcal{L}_{\mathrm{distil}} + \mathcal{L}_{\mathrm{DKL}} + \varepsilon \mathcal{L}_{\mathrm{even}} +
\mathcal{L}_{\mathrm{con}}) + \lambda (\mathcal{L}_{\mathrm{ce}} + \mathcal{L}_{\mathrm{supcon}}) +
2 \mathcal{L}_{\mathrm{LER}}$.

Reference: Xinzi Cao, Xiawu Zheng, Guanhong Wang, Weijiang Yu, Yunhang Shen, Ke Li, Yutong Lu and Yonghong Tian,
"Solving the Catastrophic Forgetting Problem in Generalized Category Discovery", CVPR 2024, arXiv 2501.05272; the base
is Xin Wen, Bingchen Zhao and Xiaojuan Qi, "Parametric Classification for Generalized Category Discovery: A Baseline
Study", ICCV 2023, arXiv 2211.11727.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from trimtab.ops.arguments import (
    class_indices,
    floating_tensor,
    in_range,
    integer,
    looked_at,
    non_negative,
    number,
    positive,
)
from trimtab.ops.arguments import tensor as read_tensor
from trimtab.ops.cluster_scores import matched_classes
from trimtab.ops.info_nce import nt_xent
from trimtab.ops.pairwise import pairwise_cosine
from trimtab.ops.whole_state import WholeState


def dual_view_kl(
    first: Float[Tensor, "batch classes"],
    second: Float[Tensor, "batch classes"],
    temperature: float = 0.1,
    *,
    softened: bool = False,
) -> Tensor:
    """Kullback-Leibler divergence of two views' predictions, with gradients through both; the batch's mean.

    Args:
        first, second: cosines with the classes.
        temperature: divides them.
        softened: logarithms of a softmax of the predictions instead, as released; bounded then.

    Raises:
        TypeError: if a tensor is not floating point.
        ValueError: if shapes do not fit, or `temperature` is not positive.

    Example:
        >>> same = torch.tensor([[0.3, 0.1]])
        >>> dual_view_kl(same, same).item()
        0.0
    """
    first, second = _scores("first", first), _scores("second", second)
    if first.shape != second.shape:
        raise ValueError(f"second must be of shape {tuple(first.shape)} as first, got shape {tuple(second.shape)}")
    log_p, log_q = ((scores / positive("temperature", temperature)).log_softmax(1) for scores in (first, second))
    p = log_p.exp()
    if softened:
        log_p, log_q = p.log_softmax(1), log_q.exp().log_softmax(1)
    return (p * (log_p - log_q)).sum(1).mean()


def self_distillation(
    first: Float[Tensor, "batch classes"],
    second: Float[Tensor, "batch classes"],
    teacher_temperature: float | Tensor = 0.04,
    temperature: float = 0.1,
) -> Tensor:
    """Cross-entropy of each view with the other one's sharper prediction, a constant; the mean of both directions.

    Args:
        first, second: cosines with the classes.
        teacher_temperature: of the prediction that is the target; a tensor where it changes in compiled code.
        temperature: of the one that learns.

    Raises:
        TypeError: if a tensor is not floating point.
        ValueError: if shapes do not fit, or a temperature is not positive.

    Example:
        >>> round(self_distillation(torch.zeros(1, 2), torch.zeros(1, 2)).item(), 4)  # log(2)
        0.6931
    """
    first, second = _scores("first", first), _scores("second", second)
    if first.shape != second.shape:
        raise ValueError(f"second must be of shape {tuple(first.shape)} as first, got shape {tuple(second.shape)}")
    if not isinstance(teacher_temperature, Tensor):
        positive("teacher_temperature", teacher_temperature)
    positive("temperature", temperature)
    total = first.new_zeros(())
    for taught, teacher in ((first, second), (second, first)):
        target = (teacher.detach() / teacher_temperature).softmax(1)
        total = total - (target * (taught / temperature).log_softmax(1)).sum(1).mean() / 2
    return total


class LocalEntropyRegularization(WholeState, nn.Module):
    """Presses the confident predictions of known classes, among unlabelled samples, to be more so.

    The running mean of the predictions, which is a margin, is read before it takes the batch in; in eval mode it stays.

    Args:
        num_known: classes that are labelled; they come first.
        num_classes: all classes.
        threshold: least probability, at temperature 0.1, of a prediction that counts; above 1 none does.
        margin: weight of the logarithm of the running mean.
        temperature: of the entropy.
        momentum: share of the running mean that stays, in [0, 1].

    Attributes:
        mean: running mean of the predictions at temperature 1, (num_classes,).

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> ler = LocalEntropyRegularization(num_known=1, num_classes=2)
        >>> sure_and_known, labelled = torch.tensor([[0.9, 0.1]]), torch.tensor([False])
        >>> ler(sure_and_known, labelled).item() > ler(sure_and_known.flip(1), labelled).item()
        True
    """

    mean: Tensor

    def __init__(
        self,
        num_known: int,
        num_classes: int,
        *,
        threshold: float = 0.7,
        margin: float = 0.4,
        temperature: float = 0.05,
        momentum: float = 0.999,
    ) -> None:
        super().__init__()
        self.num_classes = integer("num_classes", num_classes, 2)
        self.num_known = integer("num_known", num_known, 1, num_classes)
        self.threshold = non_negative("threshold", threshold)
        self.margin = number("margin", margin)
        self.temperature = positive("temperature", temperature)
        self.momentum = in_range("momentum", momentum, 0, 1)
        self.register_buffer("mean", torch.full((num_classes,), 1 / num_classes))

    def forward(self, logits: Float[Tensor, "views classes"], labelled: Bool[Tensor, " views"]) -> Tensor:
        """The loss, a mean over all views, whether they count or not.

        Args:
            logits: cosines with the classes.
            labelled: which views are of labelled samples.

        Raises:
            TypeError: if `logits` is not floating point, or `labelled` not boolean.
            ValueError: if shapes do not fit.
        """
        logits = _scores("logits", logits, self.num_classes)
        _check_mask("labelled", labelled, len(logits))
        with torch.no_grad():
            sure, guess = (logits / 0.1).softmax(1).max(1)
            counts = (sure >= self.threshold) & (guess < self.num_known) & ~labelled
        scaled = logits / self.temperature
        log_mean = self.mean.clamp_min(torch.finfo(self.mean.dtype).tiny).log().to(scaled)
        entropy = -(scaled.softmax(1) * (scaled + self.margin * log_mean).log_softmax(1)).sum(1)
        if self.training:
            with torch.no_grad():
                now = logits.softmax(1).mean(0).to(self.mean)
                self.mean.copy_(torch.where(now.isfinite().all(), self.mean.lerp(now, 1 - self.momentum), self.mean))
        return (entropy * counts).mean()


class LegoGCD(WholeState, nn.Module):
    """A classifier of cosines over known and novel classes, trained as SimGCD with the two terms; without, SimGCD.

    Args:
        features: from images to `(batch, feature_dim)`.
        feature_dim: width of the features.
        num_known: classes that are labelled; they come first.
        num_classes: all classes.
        ler: weight of local entropy regularisation; 0 leaves it out.
        dkl: weight of the divergence between views, within the unsupervised part; 0 leaves it out.
        softened_dkl: that divergence as it is in the authors' release.
        sup_weight: share of the supervised part, in [0, 1].
        even: weight of the entropy of the mean prediction.
        temperature: of the student, and of the supervised part.
        teacher_temperature: of the targets, first and last.
        warmup: epochs in which it falls from the first to the last.
        con_temperature, sup_con_temperature: of the contrastive terms.
        hidden: width of the projector, which has three layers.
        projection: width of its output.
        threshold, margin, momentum: of local entropy regularisation.

    Attributes:
        prototypes: one direction a class.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> rule = LegoGCD(nn.Flatten(), 16, num_known=2, num_classes=4, hidden=32, projection=8)
        >>> first, second = torch.rand(2, 6, 1, 4, 4)
        >>> targets = torch.tensor([0, 1, 0, 0, 0, 0])  # of unlabelled samples they are not read
        >>> labelled = torch.tensor([True, True, False, False, False, False])
        >>> sorted(rule.loss(first, second, targets, labelled))
        ['contrast', 'cross_entropy', 'distil', 'dkl', 'even', 'ler', 'sup_contrast', 'total']
    """

    def __init__(
        self,
        features: nn.Module,
        feature_dim: int,
        num_known: int,
        num_classes: int,
        *,
        ler: float = 2.0,
        dkl: float = 1.0,
        softened_dkl: bool = False,
        sup_weight: float = 0.35,
        even: float = 2.0,
        temperature: float = 0.1,
        teacher_temperature: tuple[float, float] = (0.07, 0.04),
        warmup: int = 30,
        con_temperature: float = 1.0,
        sup_con_temperature: float = 0.07,
        hidden: int = 2048,
        projection: int = 256,
        threshold: float = 0.7,
        margin: float = 0.4,
        momentum: float = 0.999,
    ) -> None:
        super().__init__()
        integer("feature_dim", feature_dim)
        self.ler, self.dkl = non_negative("ler", ler), non_negative("dkl", dkl)
        self.softened_dkl = softened_dkl
        self.sup_weight, self.even = in_range("sup_weight", sup_weight, 0, 1), non_negative("even", even)
        self.temperature = positive("temperature", temperature)
        if len(teacher_temperature) != 2:
            raise ValueError(f"teacher_temperature must be two numbers, got {len(teacher_temperature)}")
        self.start, self.end = (positive("teacher_temperature", value) for value in teacher_temperature)
        self.warmup = integer("warmup", warmup, 0)
        self.con_temperature = positive("con_temperature", con_temperature)
        self.sup_con_temperature = positive("sup_con_temperature", sup_con_temperature)
        width = integer("hidden", hidden)
        self.local_entropy = LocalEntropyRegularization(
            num_known, num_classes, threshold=threshold, margin=margin, momentum=momentum
        )
        self.features = features
        self.projector = nn.Sequential(
            nn.Linear(feature_dim, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, integer("projection", projection)),
        )
        self.prototypes = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_classes, feature_dim), std=0.02))
        self.register_buffer("teacher_temperature", torch.tensor(self.start if self.warmup else self.end))

    teacher_temperature: Tensor

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        """Cosines with the classes' prototypes."""
        return self._cosines(self.features(x))

    def set_epoch(self, epoch: int) -> None:
        """Sets the targets' temperature for this 0-based epoch: from the first to the last value, linearly.

        Raises:
            ValueError: if `epoch` is negative.
        """
        part = min(1.0, integer("epoch", epoch, 0) / max(1, self.warmup - 1)) if self.warmup else 1.0
        self.teacher_temperature.fill_(self.start + part * (self.end - self.start))

    def loss(
        self,
        first: Float[Tensor, "batch ..."],
        second: Float[Tensor, "batch ..."],
        targets: Int[Tensor, " batch"],
        labelled: Bool[Tensor, " batch"],
    ) -> dict[str, Tensor]:
        """The losses of a batch; both views go through the network at once.

        Args:
            first, second: two views of the same images.
            targets: classes of the labelled ones; what stands elsewhere, in range or not, is not read.
            labelled: which images are labelled; there may be none.

        Returns:
            "total" to be minimised, and its parts without weights.

        Raises:
            TypeError: if `targets` is not int64, `labelled` not boolean, or views are not floating point.
            ValueError: if shapes do not fit, the batch is empty, or the class of a labelled image is out of range.
        """
        for name, view in (("first", first), ("second", second)):
            floating_tensor(name, view)
            if view.ndim < 2 or len(view) == 0 or view.shape != first.shape:
                wanted = f"samples of one shape, at least one, {tuple(first.shape)} as first"
                raise ValueError(f"{name} must be {wanted}, got shape {tuple(view.shape)}")
        class_indices("targets", targets)
        if targets.shape != first.shape[:1]:
            raise ValueError(f"targets must be one an image ({len(first)}), got shape {tuple(targets.shape)}")
        _check_mask("labelled", labelled, len(first))
        if looked_at(targets) and (labelled & ((targets < 0) | (targets >= len(self.prototypes)))).any():
            raise ValueError(f"targets must be in [0, {len(self.prototypes)}) where images are labelled, got others")
        features = self.features(torch.cat([first, second]))
        logits, projected = self._cosines(features), self.projector(features)
        one, two = logits.chunk(2)
        both = labelled.repeat(2)
        # The cross-entropy of what is labelled, without a selection whose size the host would have to wait for.
        known = torch.where(labelled, targets, 0).repeat(2)
        entropies = F.cross_entropy(logits / self.temperature, known, reduction="none")
        found = {
            "cross_entropy": (entropies * both).sum() / both.sum().clamp_min(1),
            "distil": self_distillation(one, two, self.teacher_temperature.to(one), self.temperature),
            "dkl": dual_view_kl(one, two, self.temperature, softened=self.softened_dkl),
            "even": _unevenness((logits / self.temperature).softmax(1)),
            "contrast": nt_xent(projected, 2, self.con_temperature),
            "sup_contrast": _labelled_contrast(projected, known, both, self.sup_con_temperature),
            "ler": self.local_entropy(logits, both),
        }
        unsupervised = found["distil"] + self.dkl * found["dkl"] + self.even * found["even"] + found["contrast"]
        supervised = found["cross_entropy"] + found["sup_contrast"]
        total = (1 - self.sup_weight) * unsupervised + self.sup_weight * supervised + self.ler * found["ler"]
        return {"total": total, **{name: value.detach() for name, value in found.items()}}

    def _cosines(self, features: Tensor) -> Tensor:
        return pairwise_cosine(floating_tensor("features", features), self.prototypes)


@dataclass(frozen=True)
class GCDAccuracy:
    """Shares of right samples under one match of predictions and classes.

    Attributes:
        all: of all samples.
        known: of those of known classes; NaN without any.
        novel: of the others; NaN without any.
    """

    all: float
    known: float
    novel: float


def gcd_accuracy(targets: Int[Tensor, " n"], predicted: Int[Tensor, " n"], known: Bool[Tensor, " n"]) -> GCDAccuracy:
    """How many samples are right, of known and of novel classes, under the one best match over all of them.

    Args:
        targets: true classes.
        predicted: predicted ones, whose names mean nothing.
        known: which samples are of known classes.

    Raises:
        TypeError: if `targets` or `predicted` are no integers, or `known` is not boolean.
        ValueError: if lengths differ, or there are no samples.

    Example:
        >>> targets, predicted = torch.tensor([0, 0, 1, 1]), torch.tensor([5, 5, 7, 5])
        >>> gcd_accuracy(targets, predicted, targets < 1)
        GCDAccuracy(all=0.75, known=1.0, novel=0.5)
    """
    found = matched_classes(targets, predicted)
    right = (found == read_tensor("targets", targets).cpu()).double()
    known = read_tensor("known", known).cpu()
    _check_mask("known", known, len(right))
    return GCDAccuracy(float(right.mean()), float(right[known].mean()), float(right[~known].mean()))


def _unevenness(probs: Tensor) -> Tensor:
    """Logarithm of the number of classes less the entropy of the mean prediction."""
    entropy: Tensor = torch.special.entr(probs.mean(0)).sum()
    return math.log(probs.shape[1]) - entropy


def _labelled_contrast(projected: Tensor, targets: Tensor, labelled: Tensor, temperature: float) -> Tensor:
    """`sup_con` of the labelled views among themselves, without a selection; zero without any."""
    cosines = pairwise_cosine(floating_tensor("projected", projected))
    others = ~torch.eye(len(cosines), dtype=torch.bool, device=cosines.device) & labelled
    log_probs = (cosines / temperature).masked_fill(~others, torch.finfo(cosines.dtype).min / 4).log_softmax(1)
    positives = others & labelled[:, None] & (targets[:, None] == targets)
    count = positives.sum(1)
    of_rows = -torch.where(positives, log_probs, 0).sum(1) / count.clamp(min=1)
    mean: Tensor = of_rows.sum() / (count > 0).sum().clamp(min=1)
    return mean


def _scores(name: str, value: Tensor, classes: int | None = None) -> Tensor:
    value = floating_tensor(name, value)
    if value.ndim != 2 or len(value) == 0 or classes not in (None, value.shape[1]):
        wanted = f"(batch, {classes or 'classes'}) with at least one sample"
        raise ValueError(f"{name} must be {wanted}, got shape {tuple(value.shape)}")
    return value


def _check_mask(name: str, value: Tensor, length: int) -> None:
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        raise TypeError(f"{name} must be a boolean tensor, got {getattr(value, 'dtype', type(value).__name__)}")
    if value.shape != (length,):
        raise ValueError(f"{name} must be ({length},), got shape {tuple(value.shape)}")
