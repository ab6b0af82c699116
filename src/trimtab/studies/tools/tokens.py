"""Digits as pyramids of tokens, for generators that work on tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.generative.quantize import MultiScaleQuantizer
from trimtab.studies.tools.digit_generation import Images, Labels, Lesson, train

SCALES = (1, 2, 4)
CODES = 64
CHANNELS = 8


class Pyramid(nn.Module):
    """An auto-encoder of 8 x 8 images whose 4 x 4 feature map is written as 21 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, CHANNELS, 3, padding=1),
        )
        self.quantizer = MultiScaleQuantizer(SCALES, CODES, CHANNELS)
        self.decoder = nn.Sequential(
            nn.Conv2d(CHANNELS, 32, 3, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 1, 3, padding=1),
        )

    def loss(self, images: Images, labels: Labels, generator: torch.Generator) -> Tensor:
        """Squared error of the reconstruction, and the quantizer's loss."""
        found = self.quantizer(self.encoder(images))
        loss: Tensor = F.mse_loss(self.decoder(found.values), images) + found.loss
        return loss

    @torch.no_grad()
    def tokens(self, images: Images) -> Tensor:
        """The tokens of images, coarse to fine."""
        indices: Tensor = self.quantizer(self.encoder(images)).indices
        return indices

    @torch.no_grad()
    def decode(self, features: Tensor) -> Images:
        """The images of feature maps."""
        images: Tensor = self.decoder(features)
        return images


def pyramid(lesson: Lesson, steps: int, batch: int = 64) -> Pyramid:
    """The auto-encoder, trained for so many steps, once for all who want it in a run."""
    trial = lesson.trial
    model = trial.seeded(Pyramid)

    def stepper(parameters: object) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=3e-3, fused=True)  # type: ignore[arg-type]

    def build() -> dict[str, Tensor]:
        return train(lesson, model, model.loss, steps, optimizer=stepper, stream=20, batch=batch).state_dict()

    key = f"tokens of digits, seed {trial.seed}, {steps} steps, searching {trial.searching}"
    model.load_state_dict(trial.cached(build, key=key))
    return model.eval().requires_grad_(False)
