"""The derivative of a model's output with respect to its weights, for each sample of a batch."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.modules.batchnorm import _BatchNorm

from trimtab.ops.arguments import tensor_problem


def per_sample_gradients(
    model: nn.Module, x: Float[Tensor, "batch ..."], chunk_size: int | None = None
) -> Float[Tensor, "batch *outputs params"]:
    """Gradients of each output of each sample, over all weights that require gradients, in one vectorised pass.

    Args:
        model: maps a batch to (batch,) or (batch, outputs); in eval mode, where it has batch normalisation or dropout.
        x: inputs.
        chunk_size: how many samples at a time; all, if None.

    Returns:
        (batch, params) if a sample has one output, else (batch, outputs, params), in the order of
        `model.parameters()`.

    Raises:
        TypeError: an argument is no real tensor.
        ValueError: the batch is empty, no weight requires a gradient, batch normalisation is in training mode, or
            the output is of another shape.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> per_sample_gradients(model, torch.tensor([[3.0, 4.0]])).tolist()  # with the bias
        [[3.0, 4.0, 1.0]]
    """
    if problem := tensor_problem(x=x):
        raise TypeError(problem)
    if not len(x):
        raise ValueError(f"x must hold at least one sample, got shape {tuple(x.shape)}")
    if any(isinstance(m, _BatchNorm) and m.training for m in model.modules()):
        raise ValueError("model must not mix samples (call model.eval()), got batch normalisation in training mode")
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError("model must have a parameter that requires a gradient, got none")
    rest = {name: p.detach() for name, p in (*model.named_parameters(), *model.named_buffers()) if name not in params}

    def outputs(weights: dict[str, Tensor], sample: Tensor) -> Tensor:
        found: Tensor = functional_call(model, {**rest, **weights}, (sample[None],))
        if len(found) != 1 or found.ndim > 2:
            raise ValueError(f"model must give shape (1,) or (1, outputs) for one sample, got {tuple(found.shape)}")
        return found.reshape(-1)

    rows = vmap(jacrev(outputs), in_dims=(None, 0), chunk_size=chunk_size)(params, x)
    joined = torch.cat([rows[name].flatten(2) for name in params], dim=2)
    return joined[:, 0] if joined.shape[1] == 1 else joined
