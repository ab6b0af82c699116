r"""GD-UAP: one small perturbation that fools a network on most images, crafted without a single one of them.

It takes the network alone, and no labels, to make all of its layers fire as strongly as they can; what then stands
above any image is noise to the layers behind. For testing how much a deployed network depends on clean inputs, and as a
baseline for universal attacks that need data.

$$
\min_{\|\delta\|_\infty \le \xi} \; - \sum_l \log \tfrac12 \| a_l(\delta) \|_2^2
$$

with $a_l$ the activations of layer $l$ over the whole batch. Priors help: `prior="range"` adds the perturbation to
Gaussian images of the data's mean and deviation, a tensor adds it to images of any other set.

Reference: Konda Reddy Mopuri, Aditya Ganeshan, R. Venkatesh Babu, "Generalizable Data-free Objective for Crafting
Universal Adversarial Perturbations", TPAMI 2018, arXiv 1801.08092. As in the PyTorch port of the authors' code the
perturbation is clipped after each step; theirs clips it inside the network's graph. The layers that count are
convolutions, as there; theirs are all but pooling, normalisation and the classifier, which `layers` can name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from numbers import Real

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.ops.arguments import finite_tensor, floating_tensor, integer, out_of_reach, positive
from trimtab.ops.attack import eval_mode
from trimtab.robust.bounds import in_order

LayerTypes = type[nn.Module] | tuple[type[nn.Module], ...]
Augment = Callable[[Tensor, torch.Generator | None], Tensor]


def feature_log_norm_loss(
    model: nn.Module, x: Float[Tensor, "batch ..."], layers: LayerTypes = nn.Conv2d, *, eps: float = 1e-12
) -> Float[Tensor, ""]:
    """Minus the logarithms of how strongly layers fire, summed over layers.

    Where a ReLU follows a layer directly, it is the ReLU's output that counts. The model runs in the mode it is in.

    Args:
        model: a network.
        x: its input.
        layers: types of the layers that count.
        eps: least norm that a logarithm is taken of, so that a silent layer stays finite.

    Raises:
        TypeError: `x` is not floating point, or `layers` are no types.
        ValueError: the model has no such layer, or never calls one, or `eps` is not positive.

    Example:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> _ = nn.init.eye_(layer.weight)
        >>> feature_log_norm_loss(layer, torch.tensor([[1.0, 2.0]]), nn.Linear)  # -log(5/2)
        tensor(-0.9163, grad_fn=...)
    """
    floating_tensor("x", x)
    if not (isinstance(eps, float | Real) and 0 < eps < math.inf):
        raise ValueError(f"eps must be positive and finite, got {eps!r}")
    terms: list[Tensor] = []

    def read(module: nn.Module, inputs: object, output: Tensor) -> None:
        # In float32 at least: half precision overflows in a sum of squares.
        squares = floating_tensor("activations", output).square().sum()
        terms.append(-(0.5 * squares).clamp_min(eps).log())

    with ExitStack() as hooks:
        for module in _watched(model, layers):
            hooks.callback(module.register_forward_hook(read).remove)
        model(x)
    if not terms:
        raise ValueError("layers must be called by the model, got none that was")
    return torch.stack(terms).sum()


def _watched(model: nn.Module, layers: LayerTypes) -> list[nn.Module]:
    """The layers of these types, or the ReLU behind where one follows directly."""
    if not all(isinstance(kind, type) for kind in (layers if isinstance(layers, tuple) else (layers,))):
        raise TypeError(f"layers must be a type or a tuple of types, got {layers!r}")
    leaves = [module for module in model.modules() if not any(module.children())]
    found = [
        after if isinstance(after, nn.ReLU) else module
        for module, after in zip(leaves, [*leaves[1:], None], strict=True)
        if isinstance(module, layers)
    ]
    if not found:
        named = ", ".join(kind.__name__ for kind in (layers if isinstance(layers, tuple) else (layers,)))
        raise ValueError(f"layers must be of types that the model has, got {named} and a model without")
    return list(dict.fromkeys(found))  # a ReLU that is used many times is watched once


@torch.no_grad()
def fooling_rate(
    model: nn.Module,
    delta: Float[Tensor, "1 ..."],
    x: Float[Tensor, "n ..."],
    *,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    batch_size: int = 1024,
) -> float:
    """Share of inputs whose predicted class a perturbation changes; the model is asked in eval mode.

    Args:
        model: maps inputs to logits.
        delta: the perturbation.
        x: inputs, at least one.
        bounds: smallest and largest value of an input; None for any.
        batch_size: how many inputs are looked at together.

    Raises:
        TypeError: `x` or `delta` is not floating point.
        ValueError: `x` is empty, or outside of `bounds` by more than the perturbation reaches, `delta` has another
            shape than one input, `bounds` are not two numbers in order, or the model answers with NaN.

    Example:
        >>> fooling_rate(nn.Linear(3, 2), torch.zeros(1, 3), torch.rand(8, 3))
        0.0
    """
    if bounds is not None and not in_order(bounds):
        raise ValueError(f"bounds must be two finite numbers in order, got {bounds}")
    x, delta = finite_tensor("x", x, floating=True), finite_tensor("delta", delta, floating=True)
    if len(x) == 0 or delta.shape != (1, *x.shape[1:]):
        raise ValueError(f"delta must be {(1, *x.shape[1:])} for at least one x, got {tuple(delta.shape)}")
    if out_of_reach(x, float(delta.abs().amax()), bounds):
        raise ValueError(f"x must be within bounds {bounds}, got values from {x.min():g} to {x.max():g}")
    with eval_mode(model):
        changed = [
            _classes(model(part)) != _classes(model(part + delta if bounds is None else (part + delta).clamp(*bounds)))
            for part in x.split(integer("batch_size", batch_size))
        ]
    return torch.cat(changed).float().mean().item()


def _classes(logits: Tensor) -> Tensor:
    if logits.isnan().any():
        raise ValueError("model must give logits, got NaN")
    return logits.argmax(1)


@dataclass(frozen=True)
class UniversalPerturbation:
    """What was crafted.

    Attributes:
        delta: the perturbation, of the shape of a batch of one.
        fooling: its fooling rate on the validation inputs; NaN without them.
        steps: how many steps were made.
        saturation: share of its elements that lie at the ball's edge.
        history: steps and fooling rates, one a check.
    """

    delta: Float[Tensor, "1 ..."]
    fooling: float
    steps: int
    saturation: float
    history: Sequence[tuple[int, float]] = field(default=())


class GDUAP:
    """Crafts universal perturbations of a network: `GDUAP(model, xi).craft(shape)`.

    Adam climbs from a uniform draw. Whenever more than half of the perturbation lies at the ball's edge and no more
    comes to it, it is halved, so that it keeps learning. With validation inputs the best perturbation of all checks is
    kept, and crafting ends after `patience` of them without a gain.

    Args:
        model: maps inputs to outputs; in eval mode while it is attacked, its parameters get no gradient.
        xi: radius of the ball in the largest change of an element, positive; inputs are best in [0, 1] and normalised
            inside the model.
        prior: None for no data, "range" for Gaussian images of `mean` and `std`, or images of another set.
        layers: types of the layers that count.
        background: what the perturbation is added to without a prior: 0, as for networks from whose inputs the mean was
            taken, or that mean.
        mean, std: numbers, or tensors that broadcast to an input, for `prior="range"`.
        augment: changes a batch of prior images at random, called with it and the generator.
        lr: Adam's; a hundredth of `xi`, as the authors', where it is None.
        steps: at most.
        batch_size: prior images in a step.
        check_every: steps between checks; half as many after the perturbation was halved.
        patience: checks without a gain.
        bounds: smallest and largest value of an input, for prior images and the checks; None for any.

    Raises:
        TypeError: `prior` is neither None, a word nor a tensor, or `layers` are no types.
        ValueError: an argument is out of its range, or the model has no layer of these types.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
        >>> found = GDUAP(model, xi=0.1, steps=20).craft((1, 8, 8), generator=torch.Generator().manual_seed(0))
        >>> found.delta.shape, bool(found.delta.abs().max() <= 0.1)
        (torch.Size([1, 1, 8, 8]), True)
    """

    def __init__(
        self,
        model: nn.Module,
        xi: float,
        *,
        prior: str | Float[Tensor, "n ..."] | None = None,
        layers: LayerTypes = nn.Conv2d,
        background: float | Tensor = 0.0,
        mean: float | Tensor = 0.5,
        std: float | Tensor = 0.25,
        augment: Augment | None = None,
        lr: float | None = None,
        steps: int = 10_000,
        batch_size: int = 25,
        check_every: int = 400,
        patience: int = 10,
        bounds: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        self.xi = positive("xi", xi)
        if bounds is not None and not in_order(bounds):
            raise ValueError(f"bounds must be two finite numbers in order, got {bounds}")
        if not all(_finite(value) for value in (background, mean, std)):
            raise ValueError("background, mean and std must be finite numbers or tensors, got others")
        self.lr = self.xi / 100 if lr is None else positive("lr", lr)
        self.steps, self.batch_size = integer("steps", steps), integer("batch_size", batch_size)
        self.check_every, self.patience = integer("check_every", check_every), integer("patience", patience)
        if isinstance(prior, str) and prior != "range":
            raise ValueError(f"prior must be None, 'range' or images, got {prior!r}")
        if prior is not None and not isinstance(prior, str):
            finite_tensor("prior", prior, floating=True)
            if len(prior) == 0:
                raise ValueError("prior must hold at least one image, got none")
        _watched(model, layers)
        self.model, self.prior, self.layers = model, prior, layers
        self.background, self.mean, self.std = background, mean, std
        self.augment, self.bounds = augment, bounds

    def craft(
        self,
        shape: Sequence[int],
        *,
        validation: Float[Tensor, "n ..."] | None = None,
        start: Float[Tensor, "1 ..."] | None = None,
        generator: torch.Generator | None = None,
    ) -> UniversalPerturbation:
        """A perturbation for inputs of a shape.

        Args:
            shape: of one input.
            validation: inputs to check the fooling rate on; None keeps the last perturbation.
            start: the first perturbation; drawn uniformly in the ball where it is None.
            generator: of all draws, on the CPU; torch's global one where it is None.

        Raises:
            TypeError: `start` or `validation` is not floating point.
            ValueError: a shape does not fit, `validation` is empty, `start` is not one finite perturbation, or the
                model has no parameters, from which the perturbation takes its dtype.
        """
        shape = tuple(shape)
        if next(self.model.parameters(), None) is None:
            raise ValueError("model must have parameters, got none")
        if validation is not None and not isinstance(validation, Tensor):
            raise TypeError(f"validation must be a tensor, got {type(validation).__name__}")
        if validation is not None and len(validation) == 0:
            raise ValueError("validation must hold at least one input, got none")
        if isinstance(start, Tensor) and (len(start) != 1 or not start.isfinite().all()):
            raise ValueError(f"start must be one finite perturbation, got shape {tuple(start.shape)} or another value")
        for name, value in (("validation", validation), ("prior", self.prior), ("start", start)):
            if isinstance(value, Tensor) and tuple(value.shape[1:]) != shape:
                raise ValueError(f"{name} must hold inputs of shape {shape}, got {tuple(value.shape[1:])}")
        like = next(self.model.parameters())
        if start is None:
            delta = (2 * torch.rand((1, *shape), generator=generator) - 1).to(like) * self.xi
        else:
            delta = floating_tensor("start", start)[:1].detach().clone().to(like).clamp(-self.xi, self.xi)
        optimizer = torch.optim.Adam([delta], lr=self.lr)
        before, halved = delta.new_zeros(()), delta.new_zeros((), dtype=torch.bool)
        best, rate, waited, since, step = delta.clone(), -1.0, 0, 0, 0
        history: list[tuple[int, float]] = []
        with eval_mode(self.model):
            for step in range(1, self.steps + 1):
                moved = delta.requires_grad_()
                with torch.enable_grad():
                    loss = feature_log_norm_loss(self.model, self._images(shape, like, generator) + moved, self.layers)
                    (gradient,) = torch.autograd.grad(loss, moved)
                delta.requires_grad_(False)
                delta.grad = gradient
                optimizer.step()
                delta.clamp_(-self.xi, self.xi)
                saturation = _saturation(delta, self.xi)
                stuck = ((saturation - before).abs() < 1e-5) & (saturation > 0.5)
                before, halved = saturation, halved | stuck
                delta.mul_(1 - 0.5 * stuck)
                since += 1
                due = since >= self.check_every or (2 * since >= self.check_every and since % 10 == 0 and bool(halved))
                if validation is not None and (due or step == self.steps):
                    found = fooling_rate(self.model, delta, validation, bounds=self.bounds)
                    history.append((step, found))
                    waited = 0 if found > rate else waited + 1
                    if found > rate:
                        best, rate = delta.clone(), found
                    if waited >= self.patience:
                        break
                if due:
                    since, halved = 0, torch.zeros_like(halved)
        if validation is None:
            best, rate = delta, float("nan")
        return UniversalPerturbation(best.detach(), rate, step, float(_saturation(best, self.xi)), tuple(history))

    def _images(self, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
        """What the perturbation is added to in a step."""
        if self.prior is None:
            return torch.as_tensor(self.background).to(like).expand(1, *shape)
        if isinstance(self.prior, str):
            noise = torch.randn((self.batch_size, *shape), generator=generator).to(like)
            images = torch.as_tensor(self.mean).to(like) + torch.as_tensor(self.std).to(like) * noise
            images = images if self.bounds is None else images.clamp(*self.bounds)
        else:
            rows = torch.randint(len(self.prior), (self.batch_size,), generator=generator)
            images = self.prior[rows.to(self.prior.device)].to(like)
        return images if self.augment is None else self.augment(images, generator)


def _finite(value: float | Tensor) -> bool:
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    return isinstance(value, float | Real) and math.isfinite(value)


def _saturation(delta: Tensor, xi: float) -> Tensor:
    return (delta.abs() >= xi * (1 - 1e-6)).to(delta.dtype).mean()
