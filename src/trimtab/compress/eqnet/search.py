"""Which bits a budget should buy: a predictor of the accuracy, and an evolution on it."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.compress.eqnet.subnets import ElasticConfig
from trimtab.compress.evolution import Evolution, evolve
from trimtab.ops.arguments import integer


class AccuracyPredictor(nn.Module):
    """Says how accurate a sub-network will be, from its bits and its form alone.

    Args:
        num_layers: elastic layers of the model.
        bits: the numbers of bits that there are.
        hidden: width of each of three ReLU layers.

    Example:
        >>> predictor = AccuracyPredictor(2, bits=(2, 4, 8), hidden=16)
        >>> predictor(predictor.encode([ElasticConfig((2, 8), (4, 4))])).shape
        torch.Size([1])
    """

    def __init__(self, num_layers: int, bits: Sequence[int] = range(2, 9), hidden: int = 400) -> None:
        if not all(isinstance(part, numbers.Integral) and part > 0 for part in (hidden,)):
            raise ValueError(f"hidden must be a whole number of at least 1, got {hidden!r}")
        super().__init__()
        self.num_layers, self.bits = integer("num_layers", num_layers), tuple(bits)
        width = 2 * num_layers * len(self.bits) + 3
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [nn.Linear(width, hidden), nn.ReLU()]
            width = hidden
        self.net = nn.Sequential(*layers, nn.Linear(hidden, 1))

    def encode(self, configs: Sequence[ElasticConfig]) -> Float[Tensor, "n code"]:
        """One-hot numbers of bits of all layers, and three signs for the form.

        Raises:
            ValueError: a configuration is of another number of layers, or has other bits.
        """
        for config in configs:
            widths = config.weight_bits + config.input_bits
            if len(widths) != 2 * self.num_layers or not set(widths) <= set(self.bits):
                raise ValueError(f"configs must be of {self.num_layers} layers with bits of {self.bits}, got {config}")
        places = torch.tensor([[self.bits.index(w) for w in c.weight_bits + c.input_bits] for c in configs])
        forms = torch.tensor([[c.per_channel, c.weight_symmetric, c.input_symmetric] for c in configs])
        codes = torch.cat([F.one_hot(places, len(self.bits)).flatten(1), forms], dim=1)
        return codes.to(next(self.parameters()))

    def forward(self, codes: Float[Tensor, "n code"]) -> Float[Tensor, " n"]:
        accuracies: Tensor = self.net(codes)
        return accuracies[:, 0]


def fit_predictor(
    predictor: AccuracyPredictor,
    configs: Sequence[ElasticConfig],
    accuracies: Float[Tensor, " n"],
    *,
    steps: int = 300,
    lr: float = 1e-3,
) -> float:
    """Train a predictor on measured accuracies, all at once, by Adam; the mean squared error at the end.

    Args:
        predictor: it is trained in place.
        configs: what was measured, each after its statistics were taken anew.
        accuracies: of each.
        steps: of the optimizer.
        lr: its rate.

    Raises:
        ValueError: there is not one accuracy for each configuration.
    """
    if len(configs) != len(accuracies) or not len(configs):
        raise ValueError(f"accuracies must be {len(configs)} numbers, at least one, got {len(accuracies)}")
    codes = predictor.encode(configs)
    wanted = accuracies.to(codes)
    optimizer = torch.optim.Adam(predictor.parameters(), lr=lr)
    error = codes.new_zeros(())
    for _ in range(integer("steps", steps)):
        error = F.mse_loss(predictor(codes), wanted)
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    return float(error.detach())


@torch.no_grad()
def search_config(
    predictor: AccuracyPredictor,
    mean_bits: float,
    *,
    per_channel: bool = True,
    weight_symmetric: bool = True,
    input_symmetric: bool = True,
    slack: float = 0.5,
    generator: torch.Generator | None = None,
    **options: Any,
) -> tuple[ElasticConfig, Evolution]:
    """The sub-network of the highest predicted accuracy within a budget of bits, by evolution.

    Args:
        predictor: trained.
        mean_bits: over weights and inputs of all layers, at most; at least that less `slack`.
        per_channel, weight_symmetric, input_symmetric: the form that the hardware wants.
        slack: how far below the budget it may stay.
        generator: for the evolution.
        options: of `evolve`, such as `population` and `rounds`.

    Returns:
        The sub-network, and what the evolution found.

    Example:
        >>> predictor = AccuracyPredictor(2, bits=(2, 4, 8), hidden=8)
        >>> draws = torch.Generator().manual_seed(0)
        >>> config, _ = search_config(predictor, 5.0, population=8, rounds=2, generator=draws)
        >>> 4.5 <= config.mean_bits <= 5.0
        True
    """
    if not 0 < mean_bits < float("inf"):
        raise ValueError(f"mean_bits must be finite and positive, got {mean_bits!r}")
    if not 0 <= slack < float("inf"):
        raise ValueError(f"slack must be finite and not negative, got {slack!r}")
    form = per_channel, weight_symmetric, input_symmetric

    def config(bits: tuple[int, ...]) -> ElasticConfig:
        return ElasticConfig(bits[: predictor.num_layers], bits[predictor.num_layers :], *form)

    found = evolve(
        lambda held: predictor(predictor.encode([config(bits) for bits in held])).tolist(),
        [predictor.bits] * (2 * predictor.num_layers),
        feasible=lambda bits: mean_bits - slack <= config(bits).mean_bits <= mean_bits,
        generator=generator,
        **options,
    )
    return config(found.best), found
