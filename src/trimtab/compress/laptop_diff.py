r"""LAPTOP-Diff: removes the layers that a denoiser misses least, and distils the rest, all features counting alike.

For making a diffusion model shallower, or any network of residual branches. Each layer is left out once, and the change
of the output on a fixed calibration set is its loss. These losses nearly add up, so that which layers to remove is a
knapsack: for layers of $p_i$ parameters and $P$ parameters to remove,

$$
L_i = \mathbb{E}\, \bigl\| \varepsilon_\theta(x_t, t) - \varepsilon_{\theta \setminus i}(x_t, t) \bigr\|^2, \qquad
\min_{r \in \{0, 1\}^m} \sum_i r_i L_i \quad \text{subject to} \quad \sum_i r_i p_i \ge P .
$$

What remains is trained on the task, on the output of the whole model, and on its features $f_s$ after each stage, each
stage divided by its energy in the whole model, so that none outweighs the others:

$$
\mathcal{L} = \| \varepsilon - \hat\varepsilon \|^2 + \| \varepsilon_\theta - \hat\varepsilon \|^2
+ \sum_s \frac{\mathbb{E}\, \| f_s - \hat f_s \|^2}{\mathbb{E}\, \| f_s \|^2} .
$$

No code and no full text were at hand: whether the energy is the norm or its square (`power`), and the weights of the
three terms, are reconstructed.

Reference: Dingkun Zhang, Sijia Li, Chen Chen, Qingsong Xie and Haonan Lu, "LAPTOP-Diff: Layer Pruning and Normalized
Distillation for Compressing Diffusion Models", 2024, arXiv 2404.11098.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.compress.distill import feature_distances
from trimtab.compress.replacing import Skip, with_replaced
from trimtab.ops.arguments import finite_tensor, floating_tensor, integer, non_negative, one_of, same_shape

M = TypeVar("M", bound=nn.Module)
Outputs = Callable[[nn.Module], Float[Tensor, "batch ..."]]
"""A model's outputs on the calibration set, with the same noise and times at each call."""
Normalize = Literal["teacher_norm", "max"]


def remove_layers(model: M, names: Iterable[str]) -> M:
    """A copy of the model in which these layers give back their first argument.

    Args:
        model: stays as it is.
        names: of layers whose output has the shape of their input, such as residual blocks and branches.

    Raises:
        ValueError: there is no layer of this name.

    Example:
        >>> remove_layers(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), ["1"])
        Sequential(
          (0): Linear(in_features=2, out_features=2, bias=True)
          (1): Skip()
        )
    """
    return with_replaced(model, {name: Skip() for name in names})


@torch.no_grad()
def removal_losses(model: nn.Module, layers: Sequence[str], outputs: Outputs) -> Float[Tensor, " layers"]:
    """The mean squared change of the output when one layer is left out, for each.

    Args:
        model: in eval mode; it stays as it is.
        layers: names of layers that can be left out.
        outputs: `outputs(model)` on the calibration set.

    Raises:
        ValueError: there are no layers, a name is unknown, or `outputs` differs from one call to the next.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
        >>> for layer, weight in zip(model, (2.0, 3.0)):
        ...     _ = nn.init.constant_(layer.weight, weight)
        >>> removal_losses(model, ["0", "1"], lambda model: model(torch.ones(4, 1)))  # 6 becomes 3, and 2
        tensor([ 9., 16.])
    """
    if not layers:
        raise ValueError("layers must be at least one name, got none")
    whole = outputs(model)
    if not torch.equal(whole, outputs(model)):
        raise ValueError("outputs must be the same at each call (one draw of noise and times, eval mode), got others")
    return torch.stack([(whole - outputs(remove_layers(model, [name]))).square().mean() for name in layers])


def select_layers(
    losses: Float[Tensor, " layers"], sizes: Sequence[float] | Tensor, target: float, *, resolution: int = 4096
) -> list[int]:
    """Which layers to remove: those of the smallest total loss that together are at least so large.

    Solved by dynamic programming over the sets that no other one beats in both size and loss. It is exact as long as
    there are no more of these than `resolution`; of more, the best one is kept in each of as many steps of size.

    Args:
        losses: of removing each layer alone, at least 0.
        sizes: parameters of each layer, at least 0.
        target: how much is to be removed.
        resolution: how many sets are kept at most.

    Returns:
        Indices of the layers, in order.

    Raises:
        ValueError: losses or sizes are negative or not finite, their numbers differ, or all layers together are smaller
            than the target.

    Example:
        >>> losses, sizes = torch.tensor([1.0, 2.0, 4.0, 10.0]), [1, 1, 2, 4]
        >>> [select_layers(losses, sizes, target) for target in (0, 2, 4, 8)]
        [[], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
    """
    cost = finite_tensor("losses", losses, ndim=1).detach().double().cpu().numpy()
    size = finite_tensor("sizes", torch.as_tensor(sizes, dtype=torch.float64), ndim=1).cpu().numpy()
    non_negative("target", target)
    integer("resolution", resolution)
    if len(size) != len(cost):
        raise ValueError(f"sizes must be {len(cost)} numbers as losses, got {len(size)}")
    for name, values in (("losses", cost), ("sizes", size)):
        if (values < 0).any():
            raise ValueError(f"{name} must be at least 0, got {values.min()}")
    if size.sum() < target:
        raise ValueError(f"target must be at most the size of all layers, {size.sum():g}, got {target:g}")
    removed, lost, taken = np.zeros(1), np.zeros(1), np.zeros((1, len(cost)), dtype=bool)
    for i in range(len(cost)):
        more = taken.copy()
        more[:, i] = True
        removed = np.concatenate([removed, np.minimum(removed + size[i], target)])
        lost, taken = np.concatenate([lost, lost + cost[i]]), np.concatenate([taken, more])
        order = np.lexsort((lost, -removed))
        removed, lost, taken = removed[order], lost[order], taken[order]
        # From the largest set down, a smaller one is worth keeping only where it loses less than all before it.
        kept = np.concatenate([[True], lost[1:] < np.minimum.accumulate(lost)[:-1]])
        if kept.sum() > resolution:
            step = np.floor(removed * (resolution / target))
            indices = np.flatnonzero(kept)
            last = np.append(step[indices][1:] != step[indices][:-1], True)
            last[0] = True
            indices = indices[last]
            kept = np.zeros_like(kept)
            kept[indices] = True
        removed, lost, taken = removed[kept], lost[kept], taken[kept]
    return [int(i) for i in np.flatnonzero(taken[0])]


@dataclass(frozen=True)
class Additivity:
    """Whether losses of single layers tell those of several.

    Attributes:
        predicted: sums of the single losses.
        measured: losses of removing the layers together.
        correlation: between the two, -1 to 1; NaN where either is the same for all sets.
    """

    predicted: Float[Tensor, " sets"]
    measured: Float[Tensor, " sets"]
    correlation: float


@torch.no_grad()
def additivity(model: nn.Module, layers: Sequence[str], outputs: Outputs, sets: Sequence[Sequence[int]]) -> Additivity:
    """Compares the sum of single losses with the loss of removing layers together, for several sets of them.

    Args:
        model, layers, outputs: as of `removal_losses`.
        sets: indices of the layers in each set; at least two sets.

    Raises:
        ValueError: there are fewer than two sets, or as `removal_losses`.
    """
    if len(sets) < 2:
        raise ValueError(f"sets must be at least two, got {len(sets)}")
    single, whole = removal_losses(model, layers, outputs), outputs(model)
    predicted = torch.stack([single[list(held)].sum() for held in sets])
    together = (outputs(remove_layers(model, [layers[i] for i in held])) for held in sets)
    measured = torch.stack([(whole - found).square().mean() for found in together])
    correlation = float(torch.corrcoef(torch.stack([predicted, measured]))[0, 1])
    return Additivity(predicted, measured, correlation)


@contextmanager
def recorded_features(model: nn.Module, names: Sequence[str]) -> Iterator[list[Tensor]]:
    """Keeps the outputs of these layers, in their order, at each call of the model within the block.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> with recorded_features(model, ["0", "1"]) as features:
        ...     _ = model(torch.zeros(4, 2))
        >>> [tuple(feature.shape) for feature in features]
        [(4, 3), (4, 3)]
    """
    found: list[Tensor] = [torch.empty(0)] * len(names)

    def keep(place: int, layer: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        found[place] = output

    layers = [model.get_submodule(name) for name in names]
    handles = [layer.register_forward_hook(partial(keep, i)) for i, layer in enumerate(layers)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def normalized_feature_loss(
    features: Sequence[Float[Tensor, "batch ..."]],
    teacher_features: Sequence[Float[Tensor, "batch ..."]],
    *,
    normalize: Normalize | None = "teacher_norm",
    power: Literal[1, 2] = 2,
) -> Float[Tensor, ""]:
    """The squared difference from a teacher's features, summed over stages that are weighed against each other.

    Args:
        features: the student's, after each stage.
        teacher_features: the teacher's there, of the same shapes.
        normalize: `teacher_norm` divides a stage by its energy in the teacher; `max` then multiplies all by the largest
            energy, so that its stage keeps the weight 1; None weighs all alike.
        power: 2 for the mean square as the energy, 1 for its root.

    Raises:
        TypeError: features are not floating point.
        ValueError: shapes or numbers differ, or `normalize` or `power` is unknown.

    Example:
        >>> student, teacher = torch.tensor([[[1.0]], [[30.0]]]), torch.tensor([[[2.0]], [[20.0]]])  # two stages
        >>> [normalized_feature_loss([*student], [*teacher], normalize=n).item() for n in ("teacher_norm", None)]
        [0.5, 101.0]
    """
    if normalize is not None:
        one_of("normalize", normalize, ("teacher_norm", "max"))
    one_of("power", power, (1, 2))
    distances, energies = feature_distances(features, teacher_features)
    if normalize is None:
        return distances.sum()
    scale = energies if power == 2 else energies.sqrt()
    scale = scale.clamp(min=torch.finfo(scale.dtype).eps)
    weighed = (distances / scale).sum()
    return weighed * scale.max() if normalize == "max" else weighed


def distillation_losses(
    prediction: Float[Tensor, "batch ..."],
    teacher_prediction: Float[Tensor, "batch ..."],
    target: Float[Tensor, "batch ..."],
    features: Sequence[Float[Tensor, "batch ..."]],
    teacher_features: Sequence[Float[Tensor, "batch ..."]],
    *,
    normalize: Normalize | None = "teacher_norm",
    power: Literal[1, 2] = 2,
) -> dict[str, Float[Tensor, ""]]:
    """What the shorter model is trained on: `task`, `output` and `feature`, and their sum, `total`.

    Both models must have been given the same noise and times.

    Args:
        prediction, teacher_prediction: of the student and of the teacher.
        target: the noise, or what the denoiser predicts.
        features, teacher_features, normalize, power: as of `normalized_feature_loss`.

    Raises:
        TypeError: predictions are not floating point.
        ValueError: shapes differ, or the batch is empty.

    Example:
        >>> x = torch.zeros(2, 3)
        >>> losses = distillation_losses(x, x + 2, x + 1, [x], [x + 1])
        >>> {name: value.item() for name, value in losses.items()}
        {'task': 1.0, 'output': 4.0, 'feature': 1.0, 'total': 6.0}
    """
    own = floating_tensor("prediction", prediction)
    wanted = {"teacher_prediction": teacher_prediction, "target": target}
    held = {name: floating_tensor(name, value).detach() for name, value in wanted.items()}
    for name, value in held.items():
        same_shape(name, value, "prediction", own)
    if not own.numel():
        raise ValueError(f"prediction must be at least one sample, got shape {tuple(own.shape)}")
    losses = {
        "task": (own - held["target"]).square().mean(),
        "output": (own - held["teacher_prediction"]).square().mean(),
        "feature": normalized_feature_loss(features, teacher_features, normalize=normalize, power=power),
    }
    return {**losses, "total": losses["task"] + losses["output"] + losses["feature"]}
