"""Small models of pictures and their sentences, trained as CLIP is, and how one of them describes a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.ops.info_nce import info_nce_of_cosines
from trimtab.ops.pairwise import pairwise_cosine
from trimtab.studies.robust.foa_attack.captioned import SIDE, WORDS, Scenes, coded
from trimtab.studies.tools.descent import descent_step

DIM = 48
"""Width of the embeddings that pictures and sentences share."""
_LARGEST_SCALE = 100.0


class ImageTower(nn.Module):
    """Embeds pictures: a few convolutions, and on what they make of each region transformer blocks or a plain layer.

    Args:
        channels: of the convolutions, each with batch normalisation and a ReLU.
        strides: of the convolutions.
        depth: number of transformer blocks over the regions and a class token; with none a layer reads all regions.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], depth: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs, side = 3, SIDE
        for outputs, stride in zip(channels, strides, strict=True):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs, side = outputs, -(-side // stride)
        self.regions = nn.Sequential(*layers)
        self.depth = depth
        width = inputs if depth else 96
        if depth:
            self.start = nn.Parameter(torch.zeros(1, 1, inputs))
            self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + side * side, inputs))
            layer = nn.TransformerEncoderLayer(
                inputs, 4, 2 * inputs, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            self.blocks = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(inputs), enable_nested_tensor=False)
        else:
            self.whole = nn.Sequential(nn.Flatten(), nn.Linear(inputs * side * side, width), nn.ReLU())
        self.head = nn.Linear(width, DIM)

    def look(
        self, x: Float[Tensor, "batch 3 24 24"]
    ) -> tuple[Float[Tensor, "batch width"], Float[Tensor, "batch tokens dim"]]:
        """The feature of the whole picture and those of its regions, as the attack takes them."""
        regions = self.regions(x)
        tokens = regions.flatten(2).mT
        if not self.depth:
            return self.whole(regions), tokens
        tokens = self.blocks(torch.cat([self.start.expand(len(x), -1, -1), tokens], 1) + self.positions)
        return tokens[:, 0], tokens[:, 1:]

    def forward(self, x: Float[Tensor, "batch 3 24 24"]) -> Float[Tensor, "batch 48"]:
        embedding: Tensor = self.head(self.look(x)[0])
        return embedding


class TextTower(nn.Module):
    """Embeds sentences: a layer that reads three words in a row, everywhere in the sentence, and the mean of it all."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.words = nn.Embedding(len(WORDS), width, padding_idx=0)
        self.three = nn.Conv1d(width, 2 * width, 3, padding=1)
        self.head = nn.Linear(2 * width, DIM)

    def forward(self, codes: Int[Tensor, "texts words"]) -> Float[Tensor, "texts 48"]:
        written = (codes > 0)[:, None]
        read = F.relu(self.three(self.words(codes).mT)) * written
        embedding: Tensor = self.head(read.sum(2) / written.sum(2))
        return embedding


class Pair(nn.Module):
    """A tower for pictures, one for sentences, and the scale of their cosines.

    Args:
        design: of the tower for pictures.
    """

    def __init__(self, design: Mapping[str, Any]) -> None:
        super().__init__()
        self.image = ImageTower(**design)
        self.text = TextTower()
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def loss(self, x: Float[Tensor, "batch 3 24 24"], codes: Int[Tensor, "batch words"]) -> Float[Tensor, ""]:
        """InfoNCE in both directions: each picture finds its sentence among the batch's, and the other way round."""
        cosines = self.log_scale.exp() * pairwise_cosine(self.image(x), self.text(codes))
        own = torch.eye(len(x), dtype=torch.bool, device=cosines.device)
        away = cosines.masked_fill(own, torch.finfo(cosines.dtype).min)
        ways = [info_nce_of_cosines(cosines.diagonal(), others, 1.0) for others in (away, away.mT)]
        return sum(ways, cosines.new_zeros(())) / 2

    def train_on(
        self, images: Sequence[Float[Tensor, "k 18 18"]], steps: int, generator: torch.Generator, batch_size: int = 128
    ) -> None:
        """Training on pictures made as it goes; afterwards in eval mode and without gradients.

        Eights of a batch share all but the digit, for digits are learnt last and most slowly.
        """
        device = self.log_scale.device
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1, cycle_momentum=False)
        shared = torch.arange(batch_size) // 8 * 8
        self.train()
        for _ in range(steps):
            drawn = Scenes.drawn(batch_size, generator)
            some = Scenes(drawn.digit, drawn.colour[shared], drawn.pattern[shared], drawn.shade[shared])
            codes, x = coded(some.sentences(generator)), some.pictures(images, generator)
            descent_step(optimizer, self.loss(x.to(device), codes.to(device)))
            schedule.step()
            with torch.no_grad():
                self.log_scale.clamp_(max=torch.tensor(_LARGEST_SCALE).log())
        self.eval().requires_grad_(False)


class Describer:
    """Describes pictures by the sentence, of all there are, that lies nearest by a pair's cosines.

    Args:
        pair: trained, in eval mode.
    """

    def __init__(self, pair: Pair) -> None:
        self.pair, self.scenes = pair, Scenes.every()
        self._sentences = F.normalize(self._embedded(self.scenes), dim=1)

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "n 3 24 24"]) -> Scenes:
        """What it says is to be seen."""
        return self.scenes[(self.pair.image(x) @ self._sentences.T).argmax(1).cpu()]

    @torch.no_grad()
    def cosines(self, x: Float[Tensor, "n 3 24 24"], scenes: Scenes) -> Float[Tensor, " n"]:
        """Of each picture's embedding with that of a sentence about each scene."""
        return F.cosine_similarity(self.pair.image(x), self._embedded(scenes), dim=1)

    @torch.no_grad()
    def _embedded(self, scenes: Scenes) -> Tensor:
        found: Tensor = self.pair.text(coded(scenes.sentences()).to(self.pair.log_scale.device))
        return found
