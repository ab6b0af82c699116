"""The classifier of cosines over known and novel classes, and all losses of a batch."""

from __future__ import annotations

import math

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
    positive,
)
from trimtab.ops.info_nce import nt_xent
from trimtab.ops.pairwise import pairwise_cosine
from trimtab.ops.whole_state import WholeState
from trimtab.semisup.legogcd.terms import LocalEntropyRegularization, check_mask, dual_view_kl, self_distillation


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
        hidden: width of the projector, which has three layers; theirs start from truncated normal draws of deviation
            0.02, these as linear layers do.
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
        check_mask("labelled", labelled, len(first))
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
