"""The tokenizer on the tasks that it can enter: a code for images of known factors, and digits token by token."""

from __future__ import annotations

from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.generative import AutoregressiveProbe, Tokenizer1D
from trimtab.generative.blocks import draw
from trimtab.studies.generative.gigatok.tokenizers import FEATURES, GRID, contrasted, frozen_network
from trimtab.studies.tasks.digits_generation import Sample
from trimtab.studies.tasks.representation import Lesson as FactorLesson
from trimtab.studies.tools.digit_generation import Images, Labels, Lesson, train
from trimtab.studies.tools.factor_images import shapes


def tokenizer(patch: int, width: int, codes: int, decoder_depth: int) -> Tokenizer1D:
    """Images of a 4 x 4 grid of patches to 8 tokens; torch's global state decides the weights."""
    return Tokenizer1D(
        nn.Conv2d(1, width, patch, stride=patch),
        nn.ConvTranspose2d(width, 1, patch, stride=patch),
        side=GRID,
        width=width,
        num_tokens=8,
        num_codes=codes,
        target_dim=FEATURES,
        encoder_depth=1,
        decoder_depth=decoder_depth,
        align_depth=1,
        heads=2,
        entropy_weight=0.1,
    )


class FactorTokenizer(nn.Module):
    """The tokenizer as the representation task asks for it: eight tokens of sixteen codes, aligned with an encoder that
    learned from the same images to tell views apart."""

    discrete = True

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.model = tokenizer(4, 16, 16, 1)
        self.frozen = frozen_network()
        self.frozen.load_state_dict(views_of_shapes(steps))
        self.frozen.requires_grad_(False)

    def loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """The tokenizer's loss, on images in [0, 1]."""
        features = self.frozen(x * 2 - 1).flatten(2).transpose(1, 2)
        return self.model.loss(x, features - features.mean((0, 1)))

    def code(self, x: Tensor) -> Tensor:
        """The tokens."""
        return self.model.encode(x)

    def reconstruct(self, x: Tensor) -> Tensor:
        """The images of the tokens; the task's error is a logarithm, which pixels of exactly 0 or 1 would not bear."""
        return self.model(x).images.clamp(1e-3, 1 - 1e-3)  # type: ignore[no-any-return]


@cache
def views_of_shapes(steps: int) -> dict[str, Tensor]:
    """Weights of the frozen encoder for images of shapes."""
    return contrasted(shapes().x * 2 - 1, steps)


def factor_tokenizer(lesson: FactorLesson) -> FactorTokenizer:
    """The tokenizer for a lesson on factor images."""
    return FactorTokenizer(max(2, lesson.steps // 20))


def token_by_token(lesson: Lesson) -> Sample:
    """Half of the steps go to a tokenizer of digits, half to an autoregressive model of its tokens."""
    trial = lesson.trial
    steps, batch = trial.pick(smoke=4, laptop=500, paper=10_000), 64
    weights = trial.cached(
        lambda: contrasted(lesson.images, steps // 2), key=f"views of digits, {steps}, searching {trial.searching}"
    )
    frozen = frozen_network(8)
    frozen.load_state_dict(weights)
    frozen.requires_grad_(False)

    def loss(images: Images, labels: Labels, generator: torch.Generator) -> Tensor:
        features = frozen(images).flatten(2).transpose(1, 2)
        return model.loss(images, features - features.mean((0, 1)))

    model = trial.seeded(lambda: tokenizer(2, 32, 64, 2))
    model.load_state_dict(
        train(lesson, model, loss, steps, optimizer=partial(_adamw, lesson.lr), stream=30, batch=batch).state_dict()
    )
    model.eval()

    def of_tokens(images: Images, labels: Labels, generator: torch.Generator) -> Tensor:
        with torch.no_grad():
            codes = model.encode(images)
        return probe.loss(codes, labels, generator=generator)

    probe = trial.seeded(lambda: AutoregressiveProbe(64, 8, lesson.num_classes, dim=48), stream=2)
    probe.load_state_dict(
        train(
            lesson, probe, of_tokens, steps, optimizer=partial(_adamw, lesson.lr), stream=31, batch=batch
        ).state_dict()
    )
    probe.eval()
    with torch.no_grad():
        known = F.one_hot(model.encode(lesson.images), 64).float()
    frequencies = torch.stack([known[lesson.labels == label].mean(0) for label in range(lesson.num_classes)])

    @torch.no_grad()
    def sample(labels: Labels, evaluations: int, generator: torch.Generator) -> Images:
        codes = labels.new_empty(len(labels), 0)
        for place in range(8):
            if place < evaluations:
                logits = probe(codes, labels)[:, -1]
            else:
                # No pass is left for it: by its frequency in the class, whatever the others are.
                logits = frequencies[labels, place].clamp_min(1e-9).log()
            codes = torch.cat([codes, draw(logits, generator=generator)[:, None]], 1)
        return model.decode(codes)

    return sample


def _adamw(lr: float, parameters: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)  # type: ignore[arg-type]
