"""The two kinds of adapter, and the frozen network that they sit on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.diffusion.scale_conditioning import FourierFeatures, ScaleConditioned, zero
from trimtab.ops.arguments import integer, one_of, positive

Kind = Literal["offset", "cross_attention"]


class _Embeddings(nn.Module):
    """Scale, time and class as vectors of one width, shape (batch, 1 to 3, width)."""

    def __init__(self, width: int, num_classes: int, bandwidth: float) -> None:
        super().__init__()
        self.num_classes = integer("num_classes", num_classes, 0)
        self.scale, self.time = self._encoder(width, bandwidth), self._encoder(width, 1.0)
        self.classes = nn.Embedding(num_classes + 1, width) if num_classes else None

    @staticmethod
    def _encoder(width: int, bandwidth: float) -> nn.Module:
        inner = 4 * width
        return nn.Sequential(
            FourierFeatures(width, bandwidth),
            nn.Linear(width, inner),
            nn.ReLU(),
            nn.LayerNorm(inner),
            nn.Linear(inner, width),
            nn.LayerNorm(width),
        )

    def forward(self, scale: Tensor, t: Tensor, cond: Any) -> Float[Tensor, "batch parts width"]:
        found = [self.scale(scale), self.time(t)]
        if self.classes is not None:
            null = torch.full(scale.shape, self.num_classes, dtype=torch.int64, device=scale.device)
            found.append(self.classes(null if cond is None else cond))
        return torch.stack(found, dim=1)


class OffsetAdapter(nn.Module):
    """Adds to all tokens of a layer's output one vector, made of the scale, the time and the class.

    Args:
        width: of the layer's output.
        hidden: width of the adapter.
        num_classes: of the condition; 0 where the adapter is not to be told it.
        bandwidth: of the scale's Fourier features. The authors multiply the scale by 1000, at which features of nearby
            scales are unrelated; 1 lets the adapter interpolate between the scales it was trained at.

    Example:
        >>> adapter = OffsetAdapter(8, hidden=4, num_classes=10)
        >>> adapter(torch.randn(2, 5, 8), torch.tensor([1.5, 4.0]), torch.rand(2), torch.tensor([0, 9])).abs().max()
        tensor(0., grad_fn=<MaxBackward1>)
    """

    def __init__(self, width: int, hidden: int = 256, num_classes: int = 0, bandwidth: float = 1.0) -> None:
        super().__init__()
        hidden = integer("hidden", hidden)
        self.embeddings = _Embeddings(hidden, num_classes, positive("bandwidth", bandwidth))
        self.layers = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.LayerNorm(hidden))
        self.last = nn.Linear(hidden, integer("width", width))
        zero(self.last)

    def forward(
        self, tokens: Tensor, scale: Float[Tensor, " batch"], t: Float[Tensor, " batch"], cond: Any = None
    ) -> Float[Tensor, "batch width"]:
        """What is added; the tokens themselves play no part."""
        out: Tensor = self.last(self.layers(self.embeddings(scale, t, cond).sum(1)))
        return out


class CrossAttentionAdapter(nn.Module):
    """Adds to every token of a layer's output what it reads from the scale, the time and the class by attention.

    The layer's inputs are the queries; keys and values are the embeddings. Unlike `OffsetAdapter` it sees the tokens.

    Args:
        width: of the layer's input and output.
        hidden: width of the adapter.
        num_classes: of the condition; 0 where the adapter is not to be told it.
        heads: of the attention.

    Raises:
        ValueError: `hidden` is no multiple of `heads`.

    Example:
        >>> adapter = CrossAttentionAdapter(8, hidden=4)
        >>> adapter(torch.randn(2, 5, 8), torch.tensor([1.5, 4.0]), torch.rand(2)).shape
        torch.Size([2, 5, 8])
    """

    positions: Tensor

    def __init__(self, width: int, hidden: int = 256, num_classes: int = 0, heads: int = 1) -> None:
        super().__init__()
        width, hidden, self.heads = integer("width", width), integer("hidden", hidden), integer("heads", heads)
        if hidden % heads:
            raise ValueError(f"hidden must be a multiple of heads ({heads}), got {hidden}")
        self.embeddings = _Embeddings(hidden, num_classes, 1.0)
        self.query = nn.Linear(width, hidden, bias=False)
        self.key, self.value = nn.Linear(hidden, hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.last = nn.Linear(hidden, width)
        zero(self.last)
        place = torch.arange(3)[:, None] * torch.exp(-math.log(1e4) * torch.arange(hidden) / max(1, hidden - 1))
        self.register_buffer("positions", place.sin() + place.cos(), persistent=False)

    def forward(
        self, tokens: Tensor, scale: Float[Tensor, " batch"], t: Float[Tensor, " batch"], cond: Any = None
    ) -> Tensor:
        """What is added, of the shape of the tokens, `(batch, tokens, width)` or `(batch, width)`."""
        read = self.embeddings(scale, t, cond)
        read = read + self.positions[: read.shape[1]]
        queries = self.query(tokens if tokens.ndim > 2 else tokens[:, None])
        parts = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (queries, self.key(read), self.value(read))
        )
        found = nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        out: Tensor = self.last(found)
        return out if tokens.ndim > 2 else out[:, 0]


class GuidanceAdapters(ScaleConditioned):
    """A frozen network with adapters, called `(x, t, cond, scale)`; without a scale it is the network as it was.

    Args:
        network: called `network(x, t, cond)`; frozen and kept in eval mode.
        adapters: name of a layer -> adapter.

    Raises:
        TypeError: `network` or an adapter is no module.
        ValueError: no adapter is given, or the network has no layer of such a name.
    """

    def __init__(self, network: nn.Module, adapters: Mapping[str, nn.Module]) -> None:
        super().__init__(network, adapters)
        network.requires_grad_(False)
        network.eval()

    def train(self, mode: bool = True) -> GuidanceAdapters:
        """Set the adapters' mode; the network stays in eval mode."""
        super().train(mode)
        self.network.eval()
        return self

    def adapter_parameters(self) -> Iterator[nn.Parameter]:
        """What is trained."""
        return self.residual_parameters()

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """The adapters alone, by layer: they fit every network that shares the base's structure."""
        return {
            f"{name}.{key}": value
            for name, adapter in zip(self.targets, self.residuals, strict=True)
            for key, value in adapter.state_dict().items()
        }

    @torch.no_grad()
    def load_adapter_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Read back what `adapter_state_dict` gave.

        Raises:
            ValueError: the state is of other adapters; nothing is loaded then.
        """
        own = self.adapter_state_dict()
        if own.keys() != state.keys() or any(own[name].shape != state[name].shape for name in own):
            raise ValueError("state must be of the same adapters on the same layers, got another's")
        for name, value in own.items():
            value.copy_(state[name])


def adapt_to_guidance(
    network: nn.Module,
    widths: Mapping[str, int],
    kind: Kind = "offset",
    *,
    hidden: int = 256,
    num_classes: int = 0,
) -> GuidanceAdapters:
    """Put an adapter behind each of a network's layers.

    Args:
        network: called `network(x, t, cond)`; frozen.
        widths: name of a layer (the attention blocks, in the paper) -> width of its output.
        kind: "offset" (smallest, and as good in the paper) or "cross_attention".
        hidden: width of the adapters.
        num_classes: of the condition; 0 where adapters are not to be told it.

    Raises:
        ValueError: `kind` is unknown, or a layer's name.

    Example:
        >>> from trimtab.nets import DenoisingMLP
        >>> net = DenoisingMLP(2, num_classes=3, hidden=16)
        >>> adapted = adapt_to_guidance(net, {"blocks.0": 16, "blocks.1": 16}, hidden=4, num_classes=3)
        >>> x, t, cond = torch.randn(4, 2), torch.rand(4), torch.tensor([0, 1, 2, 0])
        >>> torch.equal(adapted(x, t, cond, scale=4.0), net(x, t, cond))  # until they are trained
        True
    """
    one_of("kind", kind, get_args(Kind))
    make = OffsetAdapter if kind == "offset" else CrossAttentionAdapter
    return GuidanceAdapters(network, {name: make(width, hidden, num_classes) for name, width in widths.items()})
