"""The source image's features at the bottleneck, let in at high noise."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.diffusion.prediction import PREDICTIONS, Prediction
from trimtab.diffusion.schedules import NoiseSchedule, per_sample
from trimtab.ops.arguments import integer, number, one_of, real_problem, same_shape


def phase_gate(t: Float[Tensor, "*shape"], t_switch: float = 300.0) -> Float[Tensor, "*shape"]:
    """m(t): 1 well above the switch, 0 well below, a half on it; times are counted in steps.

    Example:
        >>> phase_gate(torch.tensor([290.0, 300.0, 310.0])).round(decimals=4)
        tensor([0.0000, 0.5000, 1.0000])
    """
    if problem := real_problem(t=t):
        raise TypeError(problem)
    return torch.sigmoid(t - number("t_switch", t_switch))


class ContentFusion(nn.Module):
    """Three convolutions that merge a bottleneck with the features of a source image, of the same shape.

    Args:
        channels: of the bottleneck.

    Example:
        >>> fusion = ContentFusion(8)
        >>> features = torch.randn(2, 8, 4, 4)
        >>> fusion(features, features, gate=torch.ones(2)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        integer("channels", channels)
        self.layers = nn.Sequential(
            nn.Conv2d(2 * channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(
        self,
        features: Float[Tensor, "batch channels height width"],
        content: Float[Tensor, "batch channels height width"],
        gate: Float[Tensor, " batch"],
        *,
        noise: Float[Tensor, "batch channels height width"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        """The merged bottleneck.

        Args:
            features: of the noisy image.
            content: of the source image; it gets no gradient.
            gate: share of the content, the rest is noise.
            noise: standard normal; drawn if None.
            generator: of the noise.

        Raises:
            ValueError: the shapes differ.
        """
        same_shape("content", content, "features", features)
        if noise is None:
            noise = torch.randn(content.shape, generator=generator, dtype=content.dtype, device=content.device)
        same_shape("noise", noise, "content", content)
        share = per_sample(gate, content)
        mixed = share * content.detach() + (1 - share) * noise
        merged: Tensor = self.layers(torch.cat([features, mixed], dim=1))
        return merged


class HalvedNetwork(Protocol):
    """A network that can be stopped at its bottleneck."""

    def encode(self, x: Tensor, t: Tensor) -> tuple[Tensor, Any]:
        """The bottleneck (batch, channels, height, width), and whatever else the second half needs."""
        ...

    def decode(self, features: Tensor, rest: Any, t: Tensor) -> Tensor:
        """The prediction, of the shape of `x`."""
        ...


class ContentFused(nn.Module):
    """A denoiser that can be shown the source image: `denoiser(x, t, source)`; without one it is the plain network.

    Args:
        network: a module with `encode(x, t) -> (features, rest)` and `decode(features, rest, t)`.
        fusion: merges features.
        schedule: its times must count steps, as those of `Discrete`.
        prediction: what the network predicts.
        t_switch: where the gate is a half.

    Raises:
        TypeError: `network` lacks one of the two methods, or `schedule` is no `NoiseSchedule`.
        ValueError: for an unknown `prediction`.

    Example:
        >>> from trimtab.diffusion import Discrete
        >>> class Halves(nn.Module):
        ...     def encode(self, x, t):
        ...         return x, None
        ...
        ...     def decode(self, features, rest, t):
        ...         return features
        >>> schedule = Discrete(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0))
        >>> denoiser = ContentFused(Halves(), ContentFusion(1), schedule)
        >>> x, t = torch.randn(2, 1, 4, 4), torch.full((2,), 600.0)
        >>> torch.equal(denoiser(x, t), x), torch.equal(denoiser(x, t, x), x)
        (True, False)
    """

    def __init__(
        self,
        network: nn.Module,
        fusion: ContentFusion,
        schedule: NoiseSchedule,
        *,
        prediction: Prediction = "eps",
        t_switch: float = 300.0,
    ) -> None:
        super().__init__()
        for name in ("encode", "decode"):
            if not callable(getattr(network, name, None)):
                raise TypeError(f"network must have encode(x, t) and decode(features, rest, t), got no {name}")
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(f"schedule must be a NoiseSchedule, got {type(schedule).__name__}")
        self.prediction: Prediction = one_of("prediction", prediction, PREDICTIONS)
        self.network, self.fusion, self.schedule = network, fusion, schedule
        self.t_switch = number("t_switch", t_switch)

    def forward(
        self,
        x: Float[Tensor, "batch ..."],
        t: Float[Tensor, " batch"],
        source: Float[Tensor, "batch ..."] | None = None,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch ..."]:
        """The prediction.

        Args:
            x: noisy images.
            t: their times, in steps.
            source: clean images whose content is kept.
            noise: that of the fusion.
            generator: of it.
        """
        network: Any = self.network
        features, rest = network.encode(x, t)
        if source is not None:
            same_shape("source", source, "x", x)
            with torch.no_grad():
                content, _ = network.encode(source, t)
            gate = phase_gate(t, self.t_switch)
            features = self.fusion(features, content, gate, noise=noise, generator=generator)
        predicted: Tensor = network.decode(features, rest, t)
        return predicted
