"""The networks of a black-box attack: the one that is attacked, and those that the attacker trains for itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab import nets
from trimtab.studies.engine.identity import describe
from trimtab.studies.engine.study import Trial
from trimtab.studies.tools.training import Plan, Supervised, Training, Workbench, fit


class TokenTransformer(nn.Module):
    """A small vision transformer that shows its class token and its patch tokens.

    Images are padded to a side that the patch divides.

    Args:
        in_shape: (channels, side, side).
        num_classes: number of logits.
        patch: side of a patch.
        dim: width of a token.
        depth: number of blocks.
    """

    def __init__(self, in_shape: tuple[int, ...], num_classes: int, patch: int, dim: int, depth: int) -> None:
        super().__init__()
        channels, side, _ = in_shape
        missing = -side % patch
        self.padding = (missing // 2, missing - missing // 2) * 2
        self.embed = nn.Conv2d(channels, dim, patch, stride=patch)
        self.start = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + ((side + missing) // patch) ** 2, dim))
        layer = nn.TransformerEncoderLayer(
            dim, 4, 2 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(dim), enable_nested_tensor=False)
        self.head = nn.Linear(dim, num_classes)

    def look(
        self, x: Float[Tensor, "batch channels side side"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch tokens dim"]]:
        """The class token and the patch tokens of the last layer."""
        patches = self.embed(F.pad(x, self.padding)).flatten(2).transpose(1, 2)
        tokens = self.blocks(torch.cat([self.start.expand(len(x), -1, -1), patches], 1) + self.positions)
        return tokens[:, 0], tokens[:, 1:]

    def features(self, x: Float[Tensor, "batch channels side side"]) -> Float[Tensor, "batch dim"]:
        """The class token."""
        return self.look(x)[0]

    def forward(self, x: Float[Tensor, "batch channels side side"]) -> Float[Tensor, "batch classes"]:
        logits: Tensor = self.head(self.features(x))
        return logits


TRANSFORMERS: tuple[Mapping[str, int], ...] = (
    {"patch": 4, "dim": 48, "depth": 2},
    {"patch": 4, "dim": 32, "depth": 3},
    {"patch": 3, "dim": 32, "depth": 2},
)
"""Patch, width and depth of the attacker's transformers."""


def transformer(in_shape: tuple[int, ...], num_classes: int, design: Mapping[str, int]) -> nn.Module:
    """A transformer of a design: patch, width and depth."""
    return TokenTransformer(in_shape, num_classes, **design)


def trained(
    trial: Trial,
    make: Callable[[], nn.Module],
    x: Float[Tensor, "n channels height width"],
    y: Int[Tensor, " n"],
    num_classes: int,
    *,
    epochs: int,
    lr: float,
    stream: int,
    key: str,
) -> nn.Module:
    """A network trained by Adam on cross-entropy, or read back where a run of the same seed has trained it.

    Args:
        trial: its seed decides the weights and the order of batches.
        make: makes the network from torch's global state.
        x, y: what it is trained on.
        num_classes: number of classes.
        epochs: passes over the data.
        lr: Adam's learning rate.
        stream: tells networks of one trial apart.
        key: names the images.

    Returns:
        It, in eval mode, and without gradients of its weights.
    """
    network = trial.seeded(make, stream)

    def build() -> dict[str, Tensor]:
        whole = Trial(trial.seed * 100 + stream, trial.budget, trial.device, {"lr": lr})
        bench = Workbench(
            Training(optimizer=_adam),
            make,  # held here, so that a network's code counts among what it was trained by
            (x, y),
            (x[:0], y[:0]),
            num_classes=num_classes,
            epochs=epochs,
            trial=whole,
            batch_size=64,
        )
        fit(bench, Supervised(bench, network))
        return network.state_dict()

    whole_key = f"{describe(make)} on {key}, {epochs} epochs, rate {lr}, stream {stream}"
    network.load_state_dict(trial.cached(build, key=whole_key))
    return network.to(trial.device).eval().requires_grad_(False)


def victim(in_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """The network that is attacked."""
    return nets.small_cnn(in_shape, num_classes)


def attackers_cnn(in_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """A convolutional network of the attacker's: narrower, and deeper by a layer."""
    channels, height, width = in_shape
    return nn.Sequential(
        nn.Conv2d(channels, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 24, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 24, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24 * -(-height // 4) * -(-width // 4), 64),
        nn.ReLU(),
        nn.Linear(64, num_classes),
    )


def _adam(parameters: Any, plan: Plan) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=plan.lr)
