r"""Self-tuning networks: regularisation is tuned by gradient on validation data while the network trains once.

Every layer's weights are an affine function of the hyper-parameters. Trained under perturbed hyper-parameters, they
learn how the best weights respond to them, and the validation loss is descended through that response. It is
for networks on which a search over several regularisation strengths costs too many trainings.

$$
\begin{aligned}
y &= s\,(W x + b) + c_w \odot (V x) + c_b \odot v, \qquad (c_w, c_b) = C h \\
\text{training step:} \quad & \min_{s, W, b, V, v, C} \;
  \mathbb E_{\tilde h}\, L_{\mathrm{train}}\bigl(w(\tilde h), \tilde h\bigr), \qquad
  \tilde h = h + \operatorname{softplus}(\rho) \odot \varepsilon \\
\text{validation step:} \quad & \min_{h, \rho} \;
  \mathbb E_{\tilde h}\, L_{\mathrm{valid}}\bigl(w(\tilde h)\bigr) - \tau\, \mathbb H[\tilde h]
\end{aligned}
$$

Reference: Matthew MacKay, Paul Vicol, Jon Lorraine, David Duvenaud, Roger Grosse, "Self-Tuning Networks: Bilevel
Optimization of Hyperparameters using Structured Best-Response Functions", ICLR 2019, arXiv 1903.03088.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.ops.arguments import integer, real_problem
from trimtab.optim.hyper_parameters import HyperParameters
from trimtab.optim.per_example_dropout import STNDropout, STNDropout2d, TunedDropout


class ResponsiveLayer(nn.Module):
    """What the layers share whose weights answer to hyper-parameters; `weight` and `bias` are the plain layer's."""

    weight: Tensor
    bias: Any  # torch's own annotations of it differ between layers
    scale: nn.Parameter
    response_weight: nn.Parameter
    response_bias: nn.Parameter | None
    gate: nn.Parameter
    h: Tensor | None

    def __init__(self, *args: Any, num_hparams: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_response(num_hparams)

    def add_response(self, num_hparams: int, generator: torch.Generator | None = None) -> None:
        """Give a plain layer the parameters of its response, which is zero where the hyper-parameters are."""
        integer("num_hparams", num_hparams)
        weight, limit = self.weight, self.weight[0].numel() ** -0.5
        self.h = None
        self.scale = nn.Parameter(weight.new_ones(()))
        self.response_weight = nn.Parameter(torch.empty_like(weight).uniform_(-limit, limit, generator=generator))
        self.register_parameter("response_bias", None)
        if self.bias is not None:
            response_bias = torch.empty_like(self.bias).uniform_(-limit, limit, generator=generator)
            self.response_bias = nn.Parameter(response_bias)
        # Without a constant term: what is not the response's is the plain layer's.
        self.gate = nn.Parameter(weight.new_empty(2 * len(weight), num_hparams).normal_(0, 0.01, generator=generator))

    def gates(self, h: Float[Tensor, "*batch hyper"]) -> tuple[Tensor, Tensor]:
        """How strongly the response enters each output, for the weights and for the bias: (*batch, out) each."""
        weight_gate, bias_gate = F.linear(h, self.gate).chunk(2, -1)
        return weight_gate, bias_gate

    def response(self, h: Float[Tensor, " hyper"]) -> tuple[Tensor, Tensor | None]:
        """The plain layer's weight and bias that answer to these hyper-parameters."""
        weight_gate, bias_gate = self.gates(h)
        weight = self.scale * self.weight + weight_gate.view(-1, *[1] * (self.weight.dim() - 1)) * self.response_weight
        if self.bias is None or self.response_bias is None:
            return weight, None
        return weight, self.scale * self.bias + bias_gate * self.response_bias

    def squared_norm(self, h: Float[Tensor, "*batch hyper"]) -> Float[Tensor, "*batch"]:
        """Squared norm of the weight that answers to `h`, of each example without forming that weight."""
        weight, response = self.weight.flatten(1), self.response_weight.flatten(1)
        gate = self.gates(h)[0]
        both = (weight * response).sum(1)
        # |s W + c V|^2, row by row
        plain = self.scale.square() * torch.dot(weight.flatten(), weight.flatten())
        return plain + 2 * self.scale * (gate @ both) + gate.square() @ response.square().sum(1)

    def forward(self, x: Float[Tensor, "batch ..."], h: Tensor | None = None) -> Float[Tensor, "batch ..."]:
        """The layer's output.

        Args:
            x: input.
            h: (batch, hyper) or, equal for all examples, (hyper,); by default what `responding` says, and outside of
                it the response is left out.

        Raises:
            ValueError: the number of examples or of hyper-parameters does not fit.
        """
        h = self.h if h is None else h
        if h is None:
            return self.product(x, self.weight, self.bias) * self.scale
        if h.shape[-1] != self.gate.shape[1] or h.dim() > 2 or (h.dim() == 2 and len(h) != len(x)):
            wanted = f"({len(x)}, {self.gate.shape[1]}) or ({self.gate.shape[1]},)"
            raise ValueError(f"h must be of shape {wanted} for input of shape {tuple(x.shape)}, got {tuple(h.shape)}")
        if h.dim() == 1:
            return self.product(x, *self.response(h))
        weight_gate, bias_gate = self.gates(h)
        out = self.product(x, self.weight, self.bias) * self.scale
        out = out + self.spread(weight_gate, out) * self.product(x, self.response_weight, None)
        return out if self.response_bias is None else out + self.spread(bias_gate * self.response_bias, out)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The plain layer's output with these weights."""
        raise NotImplementedError

    def spread(self, gate: Float[Tensor, "batch out"], output: Tensor) -> Tensor:
        """A number for each example and output, as a shape that multiplies the output."""
        return gate.view(*gate.shape, *[1] * (output.dim() - 2))


class STNLinear(ResponsiveLayer, nn.Linear):
    """A linear layer whose weights are affine in the hyper-parameters; arguments are `nn.Linear`'s and `num_hparams`.

    Example:
        >>> layer = STNLinear(4, 3, num_hparams=2)
        >>> x = torch.ones(5, 4)
        >>> torch.equal(layer(x, torch.zeros(5, 2)), F.linear(x, layer.weight, layer.bias))
        True
    """

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if problem := real_problem(x=x):
            raise TypeError(problem)
        return F.linear(x, weight, bias)

    def spread(self, gate: Float[Tensor, "batch out"], output: Tensor) -> Tensor:
        if problem := real_problem(gate=gate, output=output):
            raise TypeError(problem)
        return gate.view(len(gate), *[1] * (output.dim() - 2), -1)


class STNConv1d(ResponsiveLayer, nn.Conv1d):
    """A convolution whose weights are affine in the hyper-parameters, with a gate for each output channel."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = self._conv_forward(x, weight, bias)
        return out


class STNConv2d(ResponsiveLayer, nn.Conv2d):
    """A convolution whose weights are affine in the hyper-parameters, with a gate for each output channel."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = self._conv_forward(x, weight, bias)
        return out


class STNConv3d(ResponsiveLayer, nn.Conv3d):
    """A convolution whose weights are affine in the hyper-parameters, with a gate for each output channel."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = self._conv_forward(x, weight, bias)
        return out


# Plain class -> the one that answers to hyper-parameters.
LAYERS: dict[type[nn.Module], type[ResponsiveLayer]] = {
    nn.Linear: STNLinear,
    nn.Conv1d: STNConv1d,
    nn.Conv2d: STNConv2d,
    nn.Conv3d: STNConv3d,
}
DROPOUTS: dict[type[nn.Module], type[TunedDropout]] = {nn.Dropout: STNDropout, nn.Dropout2d: STNDropout2d}


def convert_to_stn(
    module: nn.Module,
    hparams: HyperParameters,
    *,
    dropout: Mapping[str, str] | None = None,
    skip: Collection[str] = (),
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Let the layers of a network answer to hyper-parameters, in place.

    Every `nn.Linear` and `nn.Conv1d/2d/3d` gets a response of as many weights again, and keeps its own parameters,
    their names, and its place in the network, so that optimizers and hooks that exist stay valid (the new parameters
    must be given to the optimizer). Where the hyper-parameters are zero in the unbounded space, the output is exactly
    what it was. Layers of other classes, derived ones too, are left as they are.

    Args:
        module: the network.
        hparams: what its layers respond to.
        dropout: name of an `nn.Dropout` or `nn.Dropout2d` in the network -> the hyper-parameter that is its rate.
        skip: names of layers to leave plain: those that no hyper-parameter has an effect on.
        generator: for the initial response.

    Returns:
        The same module.

    Raises:
        ValueError: a name in `dropout` or `skip` does not fit, there is no layer to convert, or one shares its weight
            or bias with another module (name it in `skip`); nothing is changed.

    Example:
        >>> from trimtab.optim import HyperParameter
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 3))
        >>> hparams = HyperParameters({"rate": HyperParameter(0.05, 0.0, 0.9)})
        >>> [type(layer).__name__ for layer in convert_to_stn(net, hparams, dropout={"2": "rate"}, skip=["3"])]
        ['STNLinear', 'ReLU', 'STNDropout', 'Linear']
    """
    modules = dict(module.named_modules())
    dropout = dropout or {}
    for name, hparam in dropout.items():
        if type(modules.get(name)) not in DROPOUTS:
            raise ValueError(f"dropout must name an nn.Dropout or nn.Dropout2d of the network, got {name!r}")
        if hparam not in hparams.specs:
            raise ValueError(f"dropout must map to one of {', '.join(hparams.specs)}, got {hparam!r}")
    chosen = {name: layer for name, layer in modules.items() if type(layer) in LAYERS}
    if stray := set(skip) - set(chosen):
        raise ValueError(f"skip must name plain linear layers or convolutions, got {', '.join(sorted(stray))}")
    chosen = {name: layer for name, layer in chosen.items() if name not in skip}
    holders = Counter(id(p) for part in modules.values() for p in part._parameters.values() if p is not None)
    for name, layer in chosen.items():
        if any(holders[id(p)] > 1 for p in layer._parameters.values()):
            raise ValueError(f"module must not share weights, got those of layer {name!r} in another module as well")
    if not chosen:
        raise ValueError("module must have a plain nn.Linear or nn.Conv1d/2d/3d to convert, got none")
    for layer in chosen.values():
        # The class alone changes, as torch's parametrizations do it: the layer itself may be held in many places.
        layer.__class__ = LAYERS[type(layer)]
        cast(ResponsiveLayer, layer).add_response(len(hparams), generator)
    for name, hparam in dropout.items():
        modules[name].__class__ = DROPOUTS[type(modules[name])]
        cast(TunedDropout, modules[name]).tune(hparam)
    return module


@torch.no_grad()
def collapse_stn(module: nn.Module, hparams: HyperParameters) -> nn.Module:
    """Make a self-tuning network plain again, in place: layers and dropout rates as they are at `hparams.h`.

    Args:
        module: what `convert_to_stn` returned.
        hparams: the hyper-parameters it answers to.

    Returns:
        The same module, whose output in eval mode is what the self-tuning network's was.

    Raises:
        ValueError: the network answers to other hyper-parameters than these; nothing is changed.
    """
    values = hparams.values()
    for layer in module.modules():
        if isinstance(layer, ResponsiveLayer) and layer.gate.shape[1] != len(hparams):
            raise ValueError(
                f"hparams must be the {layer.gate.shape[1]} that the network answers to, got {len(hparams)}"
            )
        if isinstance(layer, TunedDropout) and layer.hparam not in values:
            raise ValueError(f"hparams must hold {layer.hparam!r}, a dropout's rate, got {', '.join(values)}")
    for layer in module.modules():
        if isinstance(layer, ResponsiveLayer):
            weight, bias = layer.response(hparams.h)
            layer.weight.copy_(weight)
            if bias is not None and layer.bias is not None:
                layer.bias.copy_(bias)
            for name in ("scale", "response_weight", "response_bias", "gate", "h"):
                delattr(layer, name)
            plain = next(plain for plain, kind in LAYERS.items() if kind is type(layer))
            cast(nn.Module, layer).__class__ = plain
        elif isinstance(layer, TunedDropout):
            rate = values[layer.hparam].item()
            for name in ("hparam", "rate", "generator"):
                delattr(layer, name)
            plain = next(plain for plain, kind in DROPOUTS.items() if kind is type(layer))
            cast(nn.Module, layer).__class__ = plain
            cast(nn.Dropout, layer).p = rate
    return module


@contextmanager
def responding(
    module: nn.Module,
    h: Float[Tensor, "*batch hyper"],
    values: Mapping[str, Tensor] | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Iterator[None]:
    """Within the block, the network answers to these hyper-parameters.

    Args:
        module: what `convert_to_stn` returned.
        h: in the unbounded space, (batch, hyper) or, equal for all examples, (hyper,).
        values: by name, where dropout in training mode needs its rates: (batch,), or a scalar.
        generator: for dropout.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, ResponsiveLayer)]
    dropouts = [layer for layer in module.modules() if isinstance(layer, TunedDropout)]
    try:
        for layer in layers:
            layer.h = h.view_as(h)  # a parameter itself would be registered as one of the layer's
        for drop in dropouts:
            drop.rate, drop.generator = (values or {}).get(drop.hparam), generator
        yield
    finally:
        for layer in layers:
            layer.h = None
        for drop in dropouts:
            drop.rate, drop.generator = None, None


def per_example_weight_decay(
    module: nn.Module, h: Float[Tensor, "*batch hyper"], rates: Float[Tensor, "*batch"]
) -> Float[Tensor, ""]:
    r"""The L2 term $\tfrac12 \lambda_i \lVert w(h_i) \rVert^2$, each example at its own weights, as a mean over them.

    All weights of linear layers and convolutions count, the plain ones too, biases do not. At equal rates and without a
    response it is what SGD's own does.

    Args:
        module: what `convert_to_stn` returned.
        h: in the unbounded space.
        rates: the strengths, of the shape of `h` without its last dimension.

    Raises:
        ValueError: the shapes do not agree.
    """
    if rates.shape != h.shape[:-1]:
        raise ValueError(f"rates must be of shape {tuple(h.shape[:-1])}, one an example, got {tuple(rates.shape)}")
    norm = h.new_zeros(())
    for layer in module.modules():
        if isinstance(layer, ResponsiveLayer):
            norm = norm + layer.squared_norm(h)
        elif isinstance(layer, tuple(LAYERS)):
            norm = norm + cast(Tensor, layer.weight).square().sum()
    return 0.5 * (rates * norm).mean()
