r"""Iterative soft shrinkage: prunes while training, by pulling the smallest weights a little towards zero at each step.

For training sparse networks from the start. After every optimizer step the weights of the least magnitude in each
layer, $n_p = \min(\lceil p n \rceil, \lfloor 0.995\, n \rfloor)$ of them, are selected anew and shrunk,

$$
w_i \leftarrow \alpha\, w_i \quad \text{for the } n_p \text{ smallest } |w_i| ,
$$

with $\alpha = 0.99$; gradients stay dense, so that a weight that the loss wants grows back and another takes its place.
A cut by magnitude ends the phase, and the network is fine-tuned with that mask. $\alpha = 0$ is iterative hard
thresholding, $\alpha = 1$ plain training. A few hundred steps want a smaller $\alpha$ than the authors' many thousands.

The release counts the length of the phase by the running value of a penalty schedule, which does nothing else; here it
is a number of steps.

Reference: Jiamian Wang, Huan Wang, Yulun Zhang, Yun Fu and Zhiqiang Tao, "Iterative Soft Shrinkage Learning for
Efficient Image Super-Resolution", ICCV 2023, arXiv 2303.09650.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trimtab.compress.masks import KeepMask, Sparsity, check_sparsity, magnitude_mask
from trimtab.ops.arguments import in_range, integer
from trimtab.ops.states import fits

MOST = 0.995


@torch.no_grad()
def soft_shrink_(weight: Float[Tensor, "..."], sparsity: Sparsity, shrink: float = 0.99) -> Bool[Tensor, "..."]:
    """Shrinks the smallest weights in place, and says which ones were left alone.

    Args:
        weight: of one layer.
        sparsity: the share to shrink, of which 0.995 at most is; or (n, m), by which n of every m weights are left.
        shrink: factor; 0 zeroes them.

    Raises:
        ValueError: `sparsity` or `shrink` is out of range.

    Example:
        >>> weight = torch.tensor([1.0, -2.0, 3.0, -4.0])
        >>> soft_shrink_(weight, 0.5), weight
        (tensor([False, False,  True,  True]), tensor([ 0.9900, -1.9800,  3.0000, -4.0000]))
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    in_range("shrink", shrink, 0, 1)
    mask = magnitude_mask(weight, sparsity, MOST)
    weight.copy_(torch.where(mask, weight, shrink * weight))
    return mask


class SoftShrinkage:
    """Soft shrinkage of a model's weights after every optimizer step, then a fixed mask.

    What is pruned are weights of two or more dimensions, each layer by itself and tied ones once: of linear layers,
    convolutions and attention. Embeddings, and tokens, tables and biases of positions, stay whole unless they are
    named.

    Args:
        model: its weights must not be parametrized.
        sparsity: the share that goes, or (n, m); or a mapping from the names of weights to either, and then only those
            are pruned.
        shrink: factor of the selected weights at each step.
        phase: number of steps after which the masks are fixed; None waits for `finalize`.
        skip: names of weights, or of their layers, that stay whole, such as the first and the last.

    Raises:
        ValueError: `sparsity`, `shrink` or `phase` is out of range, a name is unknown, or nothing is left to prune.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> rule = SoftShrinkage(model, sparsity=0.75, phase=100, skip=["2"])
        >>> rule.post_step()  # after optimizer.step()
        >>> masks = rule.finalize()
        >>> int(masks["0.weight"].sum()), int(model[0].weight.count_nonzero())
        (8, 8)
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: Sparsity | Mapping[str, Sparsity],
        shrink: float = 0.99,
        phase: int | None = None,
        skip: Collection[str] = (),
    ) -> None:
        weights = {name: p for name, p in model.named_parameters() if p.dim() > 1}
        usual = [name for name in weights if _is_layers(model, name)]
        layers = {name: name.rpartition(".")[0] for name in weights}
        if stray := set(skip) - weights.keys() - set(layers.values()):
            raise ValueError(f"skip must be names of weights or layers of the model, got {', '.join(sorted(stray))}")
        chosen = sparsity if isinstance(sparsity, Mapping) else dict.fromkeys(usual, sparsity)
        if stray := chosen.keys() - weights.keys():
            raise ValueError(f"sparsity must be of weights of the model, got {', '.join(sorted(stray))}")
        self.sparsity = {name: of for name, of in chosen.items() if name not in skip and layers[name] not in skip}
        if not self.sparsity:
            raise ValueError("model must have a weight to prune, got none")
        self.model = model
        self.weights = {name: weights[name] for name in self.sparsity}
        for name, of in self.sparsity.items():
            check_sparsity("sparsity", of, self.weights[name])
        self.shrink = in_range("shrink", shrink, 0, 1)
        self.phase = None if phase is None else integer("phase", phase, 0)
        self.steps = 0
        self.masks: dict[str, Tensor] = {}

    @torch.no_grad()
    def selected(self) -> dict[str, Bool[Tensor, "..."]]:
        """Which weights would stay now; two of them tell by `mask_overlap` how much the selection still moves."""
        return {name: magnitude_mask(w, self.sparsity[name], MOST) for name, w in self.weights.items()}

    @torch.no_grad()
    def post_step(self) -> None:
        """Call after `optimizer.step()`: it shrinks, or, once the phase is over, keeps what is pruned at zero."""
        if self.phase is not None and self.steps >= self.phase and not self.masks:
            self.masks = self.selected()
        self.steps += 1
        for name, weight in self.weights.items():
            if self.masks:
                weight.mul_(self.masks[name])
            else:
                soft_shrink_(weight, self.sparsity[name], self.shrink)

    @torch.no_grad()
    def finalize(self) -> dict[str, Bool[Tensor, "..."]]:
        """Cuts now, unless the phase is over, and puts the masks on the model as parametrizations.

        The pruned weights then stay at zero without `post_step`, whatever the optimizer does; bake the masks in by
        `torch.nn.utils.parametrize.remove_parametrizations`.

        Returns:
            Name -> which weights stay.

        Raises:
            RuntimeError: it was called before.
        """
        owners = self._owners()
        layers = {name: self.model.get_submodule(name.rpartition(".")[0]) for name in owners}
        if any(
            parametrize.is_parametrized(self.model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
            for name in self.weights
        ):
            raise RuntimeError("finalize must be called once, on weights without parametrizations")
        self.masks = self.masks or self.selected()
        for name, weight in self.weights.items():
            weight.mul_(self.masks[name])
        for name, first in owners.items():
            parametrize.register_parametrization(layers[name], name.rpartition(".")[2], KeepMask(self.masks[first]))
        return dict(self.masks)

    def _owners(self) -> dict[str, str]:
        """All names that the weights go by, where layers are tied, and which of `weights` each is."""
        first = {id(weight): name for name, weight in self.weights.items()}
        named = self.model.named_parameters(remove_duplicate=False)
        return {name: first[id(weight)] for name, weight in named if id(weight) in first}

    def state_dict(self) -> dict[str, Any]:
        """Steps done, and the masks once they are fixed."""
        return {"steps": self.steps, "masks": {name: mask.clone() for name, mask in self.masks.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another left off.

        Raises:
            ValueError: the state is of another model, or of something else.
        """
        if set(state) != {"steps", "masks"} or not isinstance(state["masks"], Mapping):
            raise ValueError(f"state must have steps and masks, got {', '.join(map(str, state)) or 'nothing'}")
        if state["masks"] and not fits(state["masks"], dict(self.weights)):
            raise ValueError("state must be of the same weights, got masks of others")
        self.steps = integer("steps", state["steps"], 0)
        self.masks = {name: mask.clone() for name, mask in state["masks"].items()}


def _is_layers(model: nn.Module, name: str) -> bool:
    """Whether a parameter multiplies what comes in, such as `fc.weight` or `attn.in_proj_weight`, and is no table."""
    layer, _, own = name.rpartition(".")
    return own.endswith("weight") and not isinstance(model.get_submodule(layer), nn.Embedding | nn.EmbeddingBag)
