"""Well-known ways to learn from samples without labels, as the contestants' common references."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.ops.averaging import Teacher
from trimtab.ops.feature_bank import FeatureBank
from trimtab.ops.info_nce import info_nce, nt_xent
from trimtab.ops.patch_masks import hide_patches, patch_grid, spread_patches
from trimtab.studies.tools.pretraining import DIM, Indicators, Lesson

PATCH = 2
"""Side of the patches that are hidden, in pixels."""
GREY = 0.5
"""What is seen in place of a hidden pixel; black would be a background."""


class RawInputs(nn.Module):
    """The samples as they are."""

    def __init__(self, lesson: Lesson) -> None:
        super().__init__()
        self.flatten = Indicators(lesson.cardinalities) if lesson.is_table else nn.Flatten()

    def encode(self, x: Tensor) -> Tensor:
        features: Tensor = self.flatten(x)
        return features


class Untrained(nn.Module):
    """The encoder with the weights that it starts from."""

    def __init__(self, lesson: Lesson) -> None:
        super().__init__()
        self.encoder = lesson.encoder().requires_grad_(False)

    def encode(self, x: Tensor) -> Tensor:
        features: Tensor = self.encoder(x)
        return features


class TwoViews(nn.Module):
    """An encoder and a projector that see two views of each sample; what they are asked for is `compare`'s."""

    def __init__(self, lesson: Lesson) -> None:
        super().__init__()
        self.lesson = lesson
        self.encoder, self.projector = lesson.encoder(), lesson.projector()

    def project(self, x: Tensor) -> Tensor:
        z: Tensor = self.projector(self.encoder(x))
        return z

    def encode(self, x: Tensor) -> Tensor:
        features: Tensor = self.encoder(x)
        return features

    def loss(self, x: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
        first, second = (self.lesson.view(x, generator) for _ in range(2))
        return self.compare(first, second, index)

    def compare(self, first: Tensor, second: Tensor, index: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define compare(first, second, index)")


class SimCLR(TwoViews):
    """Every view must find its partner in the batch (Chen et al., arXiv 2002.05709); on tables this is SCARF."""

    def compare(self, first: Tensor, second: Tensor, index: Tensor) -> Tensor:
        z = torch.cat([self.project(first), self.project(second)])
        return nt_xent(z, 2, self.lesson.option("temperature", 0.5))


class MoCo(TwoViews):
    """A view must find its partner's averaged embedding among those of earlier batches (He et al., arXiv 1911.05722).

    The queue holds as many batches as fit into 1,024 embeddings; two passes for each sample, as everywhere here.
    """

    def __init__(self, lesson: Lesson) -> None:
        super().__init__(lesson)
        self.teacher = Teacher(nn.Sequential(self.encoder, self.projector), lesson.option("decay", 0.99), buffers="own")
        self.queue = FeatureBank(1024, 64)

    def compare(self, first: Tensor, second: Tensor, index: Tensor) -> Tensor:
        return self.contrast(self.project(first), self.teacher(second))

    def contrast(self, query: Tensor, key: Tensor) -> Tensor:
        """The loss of queries, whose keys then join the queue."""
        # Until it is full, empty rows of the queue are zeros, at a cosine of zero with all.
        loss = info_nce(query, key, self.queue.features.clone(), self.lesson.option("temperature", 0.2))
        self.queue.add(key)
        return loss

    def update(self, share: float) -> None:
        self.teacher.update(nn.Sequential(self.encoder, self.projector))


class BYOL(TwoViews):
    """A predictor must tell the averaged network's embedding of the other view (Grill et al., arXiv 2006.07733)."""

    def __init__(self, lesson: Lesson) -> None:
        super().__init__(lesson)
        self.predictor = lesson.projector(64)
        self.decay = lesson.option("decay", 0.99)
        self.teacher = Teacher(nn.Sequential(self.encoder, self.projector), self.decay, buffers="own")

    def compare(self, first: Tensor, second: Tensor, index: Tensor) -> Tensor:
        cosines = [
            F.cosine_similarity(self.predictor(self.project(mine)), self.teacher(its), dim=1)
            for mine, its in ((first, second), (second, first))
        ]
        return 2 - torch.stack(cosines).mean() * 2

    def update(self, share: float) -> None:
        # From the decay to one along half a cosine, as the authors have it.
        decay = 1 - (1 - self.decay) * (1 + float(torch.tensor(torch.pi * share).cos())) / 2
        self.teacher.update(nn.Sequential(self.encoder, self.projector), decay)


class VICReg(TwoViews):
    """Views agree, every dimension keeps its variance, and no two say the same (Bardes et al., arXiv 2105.04906)."""

    def compare(self, first: Tensor, second: Tensor, index: Tensor) -> Tensor:
        one, other = self.project(first), self.project(second)
        spread, shared = torch.zeros(()), torch.zeros(())
        for z in (one, other):
            centred = z - z.mean(0)
            covariance = centred.T @ centred / (len(z) - 1)
            spread = spread + F.relu(1 - (covariance.diagonal() + 1e-4).sqrt()).mean() / 2
            shared = shared + (covariance.square().sum() - covariance.diagonal().square().sum()) / z.shape[1]
        return F.mse_loss(one, other) + spread + self.lesson.option("covariance", 0.04) * shared


class MaskedAutoencoder(nn.Module):
    """Patches or columns that are hidden must be made from the others (He et al., arXiv 2111.06377).

    The encoder is the one of all, which sees grey, or zeros in a table, in place of what is hidden; its features are
    all that the decoder gets. Numbers cost their squared error, categories their cross-entropy.
    """

    encoder: Any

    def __init__(self, lesson: Lesson) -> None:
        super().__init__()
        self.lesson = lesson
        self.encoder = lesson.encoder()
        outputs = int(self.encoder[0].width) if lesson.is_table else lesson.x[0].numel()
        self.decoder = nn.Sequential(nn.Linear(DIM, 256), nn.ReLU(), nn.Linear(256, outputs))

    def encode(self, x: Tensor) -> Tensor:
        features: Tensor = self.encoder(x)
        return features

    def loss(self, x: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
        ratio = self.lesson.option("ratio", 0.5)
        if self.lesson.is_table:
            hidden = hide_patches(torch.rand(x.shape, generator=generator), ratio, exact=True).to(x.device)
            return self._table(x, hidden)
        height, width = x.shape[2:]
        noise = torch.rand(len(x), *patch_grid(height, width, PATCH), generator=generator)
        hidden = spread_patches(hide_patches(noise, ratio, exact=True), height, width).to(x.device).expand_as(x)
        error = self.decoder(self.encoder(x.masked_fill(hidden, 0.0))).view_as(x) - x
        cost: Tensor = error[hidden].square().mean()
        return cost

    def _table(self, x: Tensor, hidden: Tensor) -> Tensor:
        expand = self.encoder[0]
        rows = expand(x)
        made = self.decoder(self.encoder[1:](rows.masked_fill(hidden[:, expand.column], 0.0)))
        sizes = [max(1, count) for count in self.lesson.cardinalities]
        costs = [
            F.cross_entropy(part, x[:, j].long(), reduction="none")
            if self.lesson.cardinalities[j]
            else (part[:, 0] - x[:, j]).square()
            for j, part in enumerate(made.split(sizes, 1))
        ]
        return torch.stack(costs, 1)[hidden].mean()
