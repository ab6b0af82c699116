r"""Feature-selection gates with gradient routing, also called hard-attention gates.

Every channel of a layer's output is scaled by a learned number between 0 and 1, so that a network that is trained on
little data can leave features out. The gates are trained in a forward and backward pass of their own, by their own
optimizer and perhaps another loss; the weights follow in a second pass that sees the new gates.

$$
y_{\cdot c} = x_{\cdot c}\, \sigma(g_c), \qquad
g \leftarrow \operatorname{opt}_g \bigl(\nabla_g L_{\text{gate}}(g, \theta)\bigr), \qquad
\theta \leftarrow \operatorname{opt}_\theta \bigl(\nabla_\theta L_{\text{main}}(g_{\text{new}}, \theta)\bigr)
$$

Giorgio Roffo, Carlo Biffi, Pietro Salvagnini and Andrea Cherubini, "Hard-Attention Gates with Gradient Routing for
Endoscopic Image Computing", MICCAI 2024, arXiv 2407.04400. The gates are soft in spite of their name; a threshold reads
off which features are left out. In the authors' release the weights also step along their gradient of the first pass,
at the old gates: `zero_between=False`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from trimtab.ops.arguments import integer, number, one_of, positive, tensor_problem
from trimtab.optim.two_pass import frozen_norm_stats

Init = Literal["xavier", "he"] | float
_NAME = "feature_gate"


def feature_gate(x: Float[Tensor, "..."], g: Float[Tensor, " channels"], dim: int = 1) -> Float[Tensor, "..."]:
    """The input with each channel scaled by the sigmoid of its gate.

    Args:
        x: any floating-point tensor.
        g: the gates, before the sigmoid.
        dim: where the channels are: 1 for images, -1 for tokens.

    Raises:
        ValueError: there are not as many channels as gates.

    Example:
        >>> feature_gate(torch.ones(2, 3), torch.tensor([0.0, 40.0, -40.0])).round(decimals=4)
        tensor([[0.5000, 1.0000, 0.0000],
                [0.5000, 1.0000, 0.0000]])
    """
    if problem := tensor_problem(x=x, g=g):
        raise TypeError(problem)
    if not -x.ndim <= dim < x.ndim or x.shape[dim] != len(g):
        raise ValueError(f"x must have {len(g)} channels in dimension {dim}, got shape {tuple(x.shape)}")
    shape = [1] * x.ndim
    shape[dim] = len(g)
    return x * g.sigmoid().to(x.dtype).view(shape)


def initial_gates(
    channels: int, init: Init = "xavier", generator: torch.Generator | None = None
) -> Float[Tensor, " channels"]:
    """Gates to start from.

    Args:
        channels: how many.
        init: "xavier" or "he" normal as of a (1, channels) matrix, so that gates are near a half; or a number: 4
            leaves a pre-trained network nearly as it is.
        generator: for the draw.

    Raises:
        ValueError: `channels` or `init` is out of range.

    Example:
        >>> initial_gates(3, 4.0)
        tensor([4., 4., 4.])
    """
    integer("channels", channels)
    if not isinstance(init, str):
        return torch.full((channels,), number("init", init))
    one_of("init", init, ("xavier", "he"))
    std = math.sqrt(2 / (channels + 1)) if init == "xavier" else math.sqrt(2 / channels)
    return std * torch.randn(channels, generator=generator)


class FeatureGate(nn.Module):
    """Gates as a layer, for a network of one's own.

    Args:
        channels: how many.
        dim: where they are in the input.
        init: see `initial_gates`.
        generator: for the draw.

    Raises:
        ValueError: `channels` or `init` is out of range.

    Example:
        >>> FeatureGate(3, init=0.0)(torch.ones(1, 3, 2, 2))[0, :, 0, 0].data
        tensor([0.5000, 0.5000, 0.5000])
    """

    def __init__(
        self, channels: int, dim: int = 1, init: Init = "xavier", *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.dim = dim
        self.feature_gate = nn.Parameter(initial_gates(channels, init, generator))

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return feature_gate(x, self.feature_gate, self.dim)

    def extra_repr(self) -> str:
        return f"channels={len(self.feature_gate)}, dim={self.dim}"


def _gate_output(module: nn.Module, args: Any, output: Tensor, *, dim: int) -> Tensor:
    """A forward hook: it reads the gates of the module that it is called with, so that copies have their own."""
    return feature_gate(output, getattr(module, _NAME), dim)


def insert_gates(
    model: nn.Module,
    target_modules: Sequence[str] | Mapping[str, int],
    dim: int | None = None,
    init: Init = "xavier",
    *,
    generator: torch.Generator | None = None,
) -> list[nn.Parameter]:
    """Put gates on the outputs of modules, in place: each gets a parameter `feature_gate`.

    Args:
        model: any module.
        target_modules: full names; for modules that are neither linear nor convolutions, with their channels.
        dim: where the channels are; by default the last dimension for linear layers, and 1 for all others.
        init: see `initial_gates`.
        generator: for the draws.

    Returns:
        The gates, in order.

    Raises:
        ValueError: a module is not there, is named twice, has gates, is never called (the `out_proj` of
            `nn.MultiheadAttention`), or its channels are not known. The model is then unchanged, and nothing drawn.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> [len(g) for g in insert_gates(model, ["0"])]
        [6]
        >>> before = model(torch.ones(1, 4))
        >>> fold_gates(model)
        >>> torch.allclose(model(torch.ones(1, 4)), before), sorted(model[0].state_dict())
        (True, ['bias', 'weight'])
    """
    modules, known = dict(model.named_modules()), dict(target_modules) if isinstance(target_modules, Mapping) else {}
    if len(set(target_modules)) < len(target_modules):
        raise ValueError(f"target_modules must name each module once, got {list(target_modules)}")
    found = []
    for name in target_modules:
        if name not in modules or hasattr(modules[name], _NAME):
            raise ValueError(f"target_modules must be names of modules without gates, got {name!r}")
        module = modules[name]
        if isinstance(module, NonDynamicallyQuantizableLinear):
            raise ValueError(
                f"target_modules must be modules that are called, got {name!r}, of which attention reads "
                "the weight alone; gate the whole attention layer's output in a block of your own"
            )
        channels = known.get(name, getattr(module, "out_features", getattr(module, "out_channels", None)))
        if channels is None:
            raise ValueError(f"target_modules must give the channels of {name!r}, a {type(module).__name__}")
        found.append((module, integer("channels", channels)))
    initial_gates(1, init, torch.Generator())  # refuses an init that is none before anything is drawn
    gates = [(module, initial_gates(channels, init, generator)) for module, channels in found]
    for module, start in gates:
        like = next(module.parameters(), None)
        module.register_parameter(_NAME, nn.Parameter(start if like is None else start.to(like.device)))
        where = dim if dim is not None else -1 if isinstance(module, nn.Linear) else 1
        module.register_forward_hook(partial(_gate_output, dim=where))
    return [getattr(module, _NAME) for module, _ in gates]


def gate_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All gates of a model by name, those that were inserted and those of its own `FeatureGate` layers."""
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] == _NAME}


def closed_share(model: nn.Module, below: float = 0.1) -> float:
    """Share of the gates whose sigmoid is below a threshold: the features that are left out.

    Raises:
        ValueError: the model has no gates.
    """
    gates = list(gate_parameters(model).values())
    if not gates:
        raise ValueError("model must have gates, got none")
    return torch.cat([g.detach().sigmoid() < below for g in gates]).float().mean().item()


@torch.no_grad()
def fold_gates(model: nn.Module) -> None:
    """Multiply inserted gates into the weights and biases of their layers, and take them off: a plain model is left.

    Raises:
        ValueError: gates are on what is neither a linear layer nor a convolution, or on one whose weight or bias is
            computed from others (by an adapter, say) or shared with another layer. Nothing is then changed.
    """
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    found = []
    places = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    for name, module in model.named_modules():
        for key, hook in module._forward_hooks.items():
            if isinstance(hook, partial) and hook.func is _gate_output:
                linear = isinstance(module, nn.Linear)
                if not isinstance(module, kinds) or hook.keywords["dim"] != (-1 if linear else 1):
                    raise ValueError(
                        f"gates to fold must be on the channels of linear layers and convolutions, got them on "
                        f"{name!r}, a {type(module).__name__}"
                    )
                for part in ("weight", "bias"):
                    held = module._parameters.get(part)
                    if getattr(module, part) is not held or (held is not None and places[id(held)] > 1):
                        raise ValueError(
                            f"gates to fold must be on plain weights that no other layer shares, got {part} of {name!r}"
                        )
                found.append((module, key))
    for module, key in found:
        open_by = getattr(module, _NAME).sigmoid()
        module.weight.mul_(open_by.view(-1, *[1] * (module.weight.ndim - 1)))
        if module.bias is not None:
            module.bias.mul_(open_by)
        del module._forward_hooks[key]
        delattr(module, _NAME)


class GradientRouting:
    """Two passes a step: the first moves the gates alone, the second everything else.

    Args:
        opt_gate: optimizer of the gates (the authors: Adam, 0.01).
        opt_main: optimizer of all else (the authors: Adam, 1e-4).
        model: if given, every parameter that requires a gradient must be with one of them, and its batch-normalisation
            layers keep their running statistics during the first pass.
        zero_between: forget the gradient of the weights in the first pass, as the method says.
        clip_gate, clip_main: longest gradient of either, over all its tensors (the authors: 128 and 10).

    Raises:
        ValueError: a parameter is with both optimizers, or with none; or a length is not positive.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> gates = insert_gates(model, ["0"])
        >>> weights = [p for p in model.parameters() if all(p is not g for g in gates)]
        >>> routing = GradientRouting(torch.optim.Adam(gates, lr=0.01), torch.optim.Adam(weights, lr=1e-4), model)
        >>> found = routing.step(lambda: model(torch.ones(3, 4)).square().mean())
        >>> sorted(found)
        ['gate', 'main']
    """

    def __init__(
        self,
        opt_gate: torch.optim.Optimizer,
        opt_main: torch.optim.Optimizer,
        model: nn.Module | None = None,
        *,
        zero_between: bool = True,
        clip_gate: float | None = None,
        clip_main: float | None = None,
    ) -> None:
        for name, length in (("clip_gate", clip_gate), ("clip_main", clip_main)):
            if length is not None:
                positive(name, length)
        both = {id(p) for p in _parameters(opt_gate)} & {id(p) for p in _parameters(opt_main)}
        if both:
            raise ValueError(f"opt_gate must have no parameter of opt_main, got {len(both)} of them")
        if model is not None:
            held = {id(p) for p in (*_parameters(opt_gate), *_parameters(opt_main))}
            left = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
            if left:
                raise ValueError(f"opt_main must have every parameter that is no gate, got none of {left[:3]}")
        self.opt_gate, self.opt_main, self.model = opt_gate, opt_main, model
        self.zero_between, self.clip_gate, self.clip_main = zero_between, clip_gate, clip_main

    def step(
        self, main_loss: Callable[[], Float[Tensor, ""]], gate_loss: Callable[[], Float[Tensor, ""]] | None = None
    ) -> dict[str, Tensor]:
        """One step.

        Args:
            main_loss: evaluates the model and gives the loss of the weights; `backward` is called here.
            gate_loss: likewise of the gates; the same without it.

        Returns:
            `gate` and `main`, both losses, detached.
        """
        gates, weights = _parameters(self.opt_gate), _parameters(self.opt_main)
        with frozen_norm_stats(self.model) if self.model is not None else nullcontext():
            first = (gate_loss or main_loss)()
        self.opt_gate.zero_grad()
        self.opt_main.zero_grad()
        first.backward(inputs=gates if self.zero_between else [*gates, *weights])
        self._move(self.opt_gate, gates, self.clip_gate)
        second = main_loss()
        second.backward(inputs=weights)
        self._move(self.opt_main, weights, self.clip_main)
        return {"gate": first.detach(), "main": second.detach()}

    @staticmethod
    def _move(optimizer: torch.optim.Optimizer, parameters: list[Tensor], longest: float | None) -> None:
        if longest is not None:
            nn.utils.clip_grad_norm_(parameters, longest)
        optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """The states of both optimizers."""
        return {"gate": self.opt_gate.state_dict(), "main": self.opt_main.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken.

        Raises:
            ValueError: it is no such state, or of other parameters.
        """
        own = self.state_dict()
        if state.keys() != own.keys() or any(_sizes(state[name]) != _sizes(own[name]) for name in own):
            raise ValueError("state must be of optimizers of as many gates and weights, got another")
        self.opt_gate.load_state_dict(state["gate"])
        self.opt_main.load_state_dict(state["main"])


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def _sizes(state: Mapping[str, Any]) -> list[int]:
    return [len(group["params"]) for group in state.get("param_groups", ())]
