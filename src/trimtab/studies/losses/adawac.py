"""Does a weight per sample between labels and consistency make use of images that have few labels?

120 images (240 for the whole) of 28 x 28 pixels of Fashion-MNIST garments on textured ground, of which 60 % hold one
garment of a quarter of the area, or none; the test images hold one to three whole garments. AdaWAC and its controls see
two random views of every image (mirrored, shifted, lit anew, with noise) and minimise half the Dice loss and half their
own term; 'two views' has the mean cross-entropy there, and 'consistency' adds that of the features with one weight for
all samples, the strongest baseline that the authors name. 'Dice and cross-entropy' sees the images as they are.

Each contestant with a constant of its own chooses among four values around the authors' for a U-Net. The authors train
for 150 epochs and here it is 20, so the weights, which at first all favour the labels, have an eighth of the updates in
which to separate. Reweighting shares one unit of weight among the samples of a batch; the authors' code divides it once
more by the batch's size, which would leave little but the Dice loss. The rank correlation is that of the final
supervised weight with the share of labelled pixels of the training image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from trimtab import losses
from trimtab.nets.unet import UNet
from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.tasks.segmentation import Batch, Segmenter, ambiguous, coarse, half_sparse, sparse
from trimtab.studies.tools.training import Plan


class TwoViews(nn.Module):
    """Two random views of a batch, and what all contestants make of them: half the Dice loss and half their own term.

    The term is the mean cross-entropy unless a subclass has another; the network sees both views at once.
    """

    def forward(self, net: UNet, batch: Batch) -> Tensor:
        kept = self.kept(batch)
        (x_1, y_1), (x_2, y_2) = batch.view(), batch.view()
        logits, features = net.with_features(torch.cat([x_1[kept], x_2[kept]]))
        targets = torch.cat([y_1[kept], y_2[kept]])
        entropy = F.cross_entropy(logits, targets, reduction="none").mean((1, 2)).view(2, -1).mean(0)
        first, second = features.chunk(2)
        return (losses.dice_loss(logits, targets) + self.term(entropy, first, second, batch)) / 2

    def kept(self, batch: Batch) -> Tensor | slice:
        """Which samples to train on."""
        return slice(None)

    def term(self, entropy: Tensor, features_1: Tensor, features_2: Tensor, batch: Batch) -> Tensor:
        """The part beside the Dice loss, from every sample's cross-entropy and features."""
        return entropy.mean()


class Consistent(TwoViews):
    """Cross-entropy and consistency with equal weights for all samples."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.dac_weight = float(plan.setting["dac_weight"])

    def term(self, entropy: Tensor, features_1: Tensor, features_2: Tensor, batch: Batch) -> Tensor:
        return (entropy + self.dac_weight * losses.augmentation_consistency(features_1, features_2)).mean() / 2


class Reweighted(TwoViews):
    """Samples of high loss weigh more: mirror ascent over the samples, which compete for weight within a batch."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.memory, self.lr = losses.SampleMemory(len(plan)), float(plan.setting["lr_weight"])

    def term(self, entropy: Tensor, features_1: Tensor, features_2: Tensor, batch: Batch) -> Tensor:
        log_weights = self.memory.read(batch.index) + self.lr * entropy.detach()
        self.memory.write(batch.index, log_weights)
        return (log_weights.softmax(0) * entropy).sum()


class Trimmed(TwoViews):
    """Plain training on those samples that have a label at all."""

    def kept(self, batch: Batch) -> Tensor:
        return batch.y.flatten(1).any(1)


class Adaptive(nn.Module):
    """AdaWAC, with the authors' weight of the consistency for a U-Net."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.loss = losses.AdaWAC(len(plan), lr_weight=plan.setting["lr_weight"])

    def forward(self, net: UNet, batch: Batch) -> Tensor:
        (x_1, y_1), (x_2, y_2) = batch.view(), batch.view()
        logits, features = net.with_features(torch.cat([x_1, x_2]))
        value: Tensor = self.loss(*logits.chunk(2), y_1, y_2, *features.chunk(2), batch.index)
        return value

    def measure(self, masks: Tensor) -> dict[str, float]:
        """Rank correlation of the supervised weights with the share of labelled pixels."""
        labelled = (masks > 0).float().mean((1, 2))
        # Of the log-odds, for weights near one are alike in single precision.
        return {"weight_rank": float(spearmanr(self.loss.memory.rows.cpu(), labelled).statistic)}


# Of each contestant's own constant, the authors' value and a tenth of it.
study = Study(
    paper="adawac",
    entrants={"AdaWAC": Segmenter(objective=Adaptive, search={"lr_weight": (0.8, 2.5, 8.0, 25.0)})},
    controls={
        "two views": dict.fromkeys((half_sparse, sparse), Segmenter(objective=lambda plan: TwoViews())),
        "consistency": {half_sparse: Segmenter(objective=Consistent, search={"dac_weight": (0.2, 0.6, 2.0, 6.0)})},
        "empty images trimmed": {half_sparse: Segmenter(objective=lambda plan: Trimmed())},
        "reweighting": {half_sparse: Segmenter(objective=Reweighted, search={"lr_weight": (0.1, 0.3, 1.0, 3.0)})},
    },
    on=[half_sparse, sparse, coarse, ambiguous],
    headline=Claim("AdaWAC", beats="consistency", on="dice", at=half_sparse),
    claims=[
        Claim("AdaWAC", beats="two views", on="dice", by=0.01, at=half_sparse),
        Claim("AdaWAC", beats="two views", on="dice", at=sparse),
        Claim("AdaWAC", beats="empty images trimmed", on="dice", at=half_sparse),
        Claim("AdaWAC", beats="reweighting", on="dice", at=half_sparse),
        Claim("AdaWAC", at_least=0.5, on="weight_rank", at=sparse),
        Claim("AdaWAC", beats="Dice and cross-entropy", on="dice", at=half_sparse),
    ],
)
