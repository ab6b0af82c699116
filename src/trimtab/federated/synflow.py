r"""Pruning at initialisation by synaptic saliency: which weights of a random network matter, without any data.

$$
R = \mathbf 1^\top \Big( \prod_l |\theta_l| \Big) \mathbf 1, \qquad
S = \Big| \theta \odot \frac{\partial R}{\partial \theta} \Big|
$$

Reference:
    Hidenori Tanaka, Daniel Kunin, Daniel L. K. Yamins, Surya Ganguli: Pruning neural networks without any data by
    iteratively conserving synaptic flow. NeurIPS 2020, arXiv 2006.05467.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from trimtab.ops.arguments import in_range, integer


@torch.enable_grad()
def synflow_scores(model: nn.Module, in_shape: Sequence[int]) -> dict[str, Tensor]:
    """The synaptic saliency of every weight that is a matrix or a kernel and is trained, without any data.

    The network is made linear for it: weights by their size, no biases, no normalisation, an input of ones. In a chain
    of layers the scores of each add up to the same number, the network's output. Of a network with negative parts that
    are no weights (a GELU, say) they are only nearly that.

    Args:
        model: left as it is.
        in_shape: of one sample.

    Returns:
        Scores in float64 by the names of the weights.

    Raises:
        ValueError: no weight is a matrix or a kernel and trained, or what comes out is 0 or overflows, so that scores
            would say nothing.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> model[0].weight.data = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
        >>> model[1].weight.data = torch.tensor([[1.0, -1.0]])
        >>> synflow_scores(model, (2,))["0.weight"]
        tensor([[1., 2.],
                [3., 4.]], dtype=torch.float64)
    """
    linear = _without_normalisation(copy.deepcopy(model).double()).eval()
    with torch.no_grad():
        for p in linear.parameters():
            p.zero_() if p.ndim < 2 else p.abs_()
    named = {name: p for name, p in linear.named_parameters() if prunable(p)}
    if not named:
        raise ValueError("model must have a weight that is trained and is a matrix or a kernel, got none")
    device = next(iter(named.values())).device
    output = linear(torch.ones(1, *in_shape, dtype=torch.float64, device=device)).sum()
    if not 0 < float(output.detach()) < float("inf"):
        wanted = "pass on something finite of an input of ones, its weights taken by their size"
        raise ValueError(f"model must {wanted}, got a sum of {float(output.detach())}")
    gradients = torch.autograd.grad(output, list(named.values()))
    return {name: p.detach() * g for (name, p), g in zip(named.items(), gradients, strict=True)}


def keep_largest(scores: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    """Masks of the weights with the largest scores over all layers together, one in each layer at least.

    Args:
        scores: by name.
        density: share of all weights that is kept, in (0, 1].

    Raises:
        ValueError: `density` is out of range, there are no scores, or one is NaN.

    Example:
        >>> keep_largest({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([0.2, 0.1])}, density=0.5)
        {'a': tensor([ True, False]), 'b': tensor([ True, False])}
    """
    in_range("density", density, 0, 1, "right")
    if not scores or not all(score.numel() for score in scores.values()):
        raise ValueError("scores must be of at least one weight, and none of them empty, got others")
    if any(bool(score.isnan().any()) for score in scores.values()):
        raise ValueError("scores must be numbers, got NaN")
    raised = []
    for score in scores.values():
        flat = score.flatten().clone()
        flat[flat.argmax()] = torch.inf
        raised.append(flat)
    together = torch.cat(raised)
    count = max(round(density * len(together)), len(raised))
    mask = torch.zeros(len(together), dtype=torch.bool, device=together.device)
    mask[together.topk(count).indices] = True
    parts = mask.split([len(part) for part in raised])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def prune_at_init(model: nn.Module, density: float, in_shape: Sequence[int], iterations: int = 1) -> dict[str, Tensor]:
    """Masks by synaptic saliency, in one shot or, with more iterations, at densities that fall exponentially.

    Args:
        model: left as it is.
        density: share of the weights that is kept, in (0, 1].
        in_shape: of one sample.
        iterations: how often scores are taken anew from what is left.

    Raises:
        ValueError: `density` is out of range.

    Example:
        >>> masks = prune_at_init(nn.Linear(10, 10), density=0.3, in_shape=(10,))
        >>> int(masks["weight"].sum())
        30
    """
    in_range("density", density, 0, 1, "right")
    pruned = model if integer("iterations", iterations) == 1 else copy.deepcopy(model)
    for i in range(1, iterations):
        masks = keep_largest(synflow_scores(pruned, in_shape), density ** (i / iterations))
        with torch.no_grad():
            for name, mask in masks.items():
                pruned.get_parameter(name).mul_(mask)
    return keep_largest(synflow_scores(pruned, in_shape), density)


def prunable(p: nn.Parameter) -> bool:
    """Whether a parameter is a matrix or a kernel, and trained."""
    return p.requires_grad and p.ndim > 1


def _without_normalisation(module: nn.Module) -> nn.Module:
    kinds = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    if isinstance(module, kinds):
        return nn.Identity()
    for name, child in module.named_children():
        setattr(module, name, _without_normalisation(child))
    return module
