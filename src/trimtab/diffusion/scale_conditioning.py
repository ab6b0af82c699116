r"""Networks that are told the guidance scale: small modules that add to the outputs of some of their layers.

Distilled guidance needs a network that knows how strongly it is to be guided. `ScaleConditioned` tells any network:
after each layer named, $h \leftarrow h + g(h_{in}, w, t, c)$ with a module $g$ that is given the scale. A module
whose last layer starts at zero leaves the network as it was. `DistilledGuidance` then samples with the result, at
one evaluation a step.

The scale is this library's: 1 is the conditional model and costs no guidance.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.diffusion.denoiser import DenoiserLike
from trimtab.diffusion.guidance import Guidance
from trimtab.ops.arguments import floating_tensor, integer, positive, real_problem, tensor


class FourierFeatures(nn.Module):
    """cos(2 pi (f x + p)) of a number per sample, with fixed random frequencies f and phases p.

    Args:
        count: number of features.
        bandwidth: standard deviation of the frequencies, in cycles per unit.

    Example:
        >>> FourierFeatures(16)(torch.tensor([1.0, 4.5])).shape
        torch.Size([2, 16])
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, count: int, bandwidth: float = 1.0) -> None:
        super().__init__()
        positive("bandwidth", bandwidth)
        self.register_buffer("frequencies", bandwidth * torch.randn(integer("count", count)))
        self.register_buffer("phases", torch.rand(count))

    def forward(self, value: Float[Tensor, " batch"]) -> Float[Tensor, "batch count"]:
        if problem := real_problem(value=value):
            raise TypeError(problem)
        angle = value[:, None].to(self.phases.dtype) * self.frequencies + self.phases
        return torch.cos(2 * math.pi * angle)


class ScaleEmbedding(nn.Module):
    """The guidance scale as a vector that joins a time embedding; zero before training.

    Args:
        width: of the time embedding.
        features: number of Fourier features of the scale, and width of the layer over them.
        bandwidth: standard deviation of their frequencies; scales are of order one.

    Example:
        >>> ScaleEmbedding(32)(torch.zeros(2, 32), torch.tensor([1.0, 4.0]), torch.zeros(2)).abs().sum().item()
        0.0
    """

    def __init__(self, width: int, features: int = 32, bandwidth: float = 0.25) -> None:
        super().__init__()
        self.features = FourierFeatures(features, bandwidth)
        self.first, self.last = nn.Linear(features + 1, features), nn.Linear(features, integer("width", width))
        zero(self.last)

    def forward(
        self, hidden: Tensor, scale: Float[Tensor, " batch"], t: Float[Tensor, " batch"], cond: Any = None
    ) -> Float[Tensor, "batch width"]:
        """What is to be added, whatever the layer's input, the time and the condition are."""
        features = torch.cat([scale[:, None].to(self.first.weight.dtype) - 1, self.features(scale)], dim=1)
        out: Tensor = self.last(nn.functional.silu(self.first(features)))
        return out


class ScaleConditioned(nn.Module):
    """A network some of whose layers add what a module makes of the guidance scale.

    It is called `(x, t, cond, scale)`; without a scale it is the network itself, which is changed in nothing but that
    hooks sit on it. Copies live on their own.

    Args:
        network: called `network(x, t, cond)`.
        residuals: name of a layer of the network -> module, called `(layer's first input, scale, t, cond)`; what it
            returns is added to the layer's output (to its first part, where that is a tuple). A vector per sample is
            added to all of its tokens.

    Raises:
        TypeError: `network` or a residual is no module.
        ValueError: no residual is given, or the network has no layer of such a name.

    Example:
        >>> from trimtab.nets import DenoisingMLP
        >>> net = DenoisingMLP(2, num_classes=3, hidden=16)
        >>> student = ScaleConditioned(net, {"noise_level": ScaleEmbedding(16)})
        >>> x, t, cond, scale = torch.randn(4, 2), torch.rand(4), torch.tensor([0, 1, 2, 0]), torch.full((4,), 3.0)
        >>> torch.equal(student(x, t, cond, scale), net(x, t, cond))
        True
    """

    def __init__(self, network: nn.Module, residuals: Mapping[str, nn.Module]) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(f"network must be a torch.nn.Module, got {type(network).__name__}")
        known = dict(network.named_modules())
        wrong = [name for name in residuals if name not in known or not name]
        if wrong or not residuals:
            raise ValueError(f"residuals must name layers of the network, one or more, got {wrong or 'none'}")
        for name, residual in residuals.items():
            if not isinstance(residual, nn.Module):
                raise TypeError(f"residuals must be modules, got {type(residual).__name__} for {name}")
        self.network = network
        self.residuals = nn.ModuleList(residuals.values())
        self.targets = tuple(residuals)
        self._call: tuple[Tensor, Tensor, Any] | None = None
        for place, name in enumerate(self.targets):
            known[name].register_forward_hook(functools.partial(self._add, place))

    def forward(
        self,
        x: Float[Tensor, "batch ..."],
        t: Float[Tensor, " batch"],
        cond: Any = None,
        scale: Float[Tensor, " batch"] | float | None = None,
    ) -> Tensor:
        """The network's output at a guidance scale, one number or one per sample; the network's own where None."""
        if scale is not None:
            self._call = (per_sample_scale(scale, x), t, cond)
        try:
            out: Tensor = self.network(x, t, cond)
        finally:
            self._call = None
        return out

    def _add(self, place: int, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if self._call is None:
            return output
        change = self.residuals[place](inputs[0], *self._call)
        first = output[0] if isinstance(output, tuple) else output
        if change.ndim < first.ndim:
            change = change.reshape(len(change), *(1,) * (first.ndim - 2), change.shape[-1])
        first = first + change
        return (first, *output[1:]) if isinstance(output, tuple) else first

    def residual_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the modules that were added."""
        return self.residuals.parameters()


class DistilledGuidance(Guidance):
    """Guidance by a denoiser that has learned it: one evaluation a step, at any scale it was trained for.

    Args:
        denoiser: called `denoiser(x, t, cond, scale)`, such as a preconditioned `ScaleConditioned` network.
        cond: the condition guided towards.
        scale: one number, or one per sample; 1 is the conditional model.

    Raises:
        TypeError: `scale` is neither a number nor a tensor.
        ValueError: `scale` is not finite.

    Example:
        >>> from trimtab.diffusion import EDMPreconditioned, ScaleConditioned, ScaleEmbedding, deis, grids
        >>> from trimtab.nets import DenoisingMLP
        >>> net = DenoisingMLP(2, num_classes=3, hidden=16)
        >>> student = EDMPreconditioned(ScaleConditioned(net, {"noise_level": ScaleEmbedding(16)}))
        >>> guided = DistilledGuidance(student, torch.tensor([0, 1, 2]), scale=2.5)
        >>> deis(guided, guided.schedule.prior(3, 2), grids.karras(guided.schedule, 4)).shape
        torch.Size([3, 2])
    """

    def __init__(self, denoiser: DenoiserLike, cond: Any, scale: Float[Tensor, " batch"] | float) -> None:
        super().__init__(denoiser, cond)
        if not isinstance(scale, Tensor | numbers.Real) or isinstance(scale, bool):
            raise TypeError(f"scale must be a number or a tensor, got {type(scale).__name__}")
        if not bool(torch.isfinite(torch.as_tensor(scale)).all()):
            raise ValueError(f"scale must be finite, got {scale}")
        self.scale = scale

    def __call__(self, x: Tensor, t: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
        if problem := real_problem(x=x, t=t):
            raise TypeError(problem)
        out: Tensor = self.denoiser(x, t, self.cond, per_sample_scale(self.scale, x))  # type: ignore[assignment]
        return out


def per_sample_scale(scale: Tensor | float, x: Tensor) -> Float[Tensor, " batch"]:
    """A guidance scale as one number per sample of `x`.

    Raises:
        TypeError: it is neither a number nor a tensor.
        ValueError: it is neither one number nor one per sample.
    """
    if not isinstance(scale, Tensor | numbers.Real) or isinstance(scale, bool):
        raise TypeError(f"scale must be a number or a tensor, got {type(scale).__name__}")
    if not isinstance(scale, Tensor):
        return torch.full((len(x),), float(scale), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    scale = floating_tensor("scale", tensor("scale", scale)).to(x.device)
    if scale.shape not in ((), (len(x),)):
        raise ValueError(f"scale must be one number or one per sample ({len(x)}), got shape {tuple(scale.shape)}")
    return scale.expand(len(x))


def zero(layer: nn.Linear) -> None:
    """Have a layer say nothing until it is trained."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
