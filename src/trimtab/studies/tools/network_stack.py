"""Many small networks of one kind, trained at once, each on samples of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from trimtab.studies.tools.descent import descend

BATCH = 32


class NetworkStack(nn.Module):
    """Networks of one kind as one: (batch, features), or (batch, models, features), to (batch, models, classes).

    Args:
        build: makes a network without buffers; torch's global state decides its weights.
        models: how many.

    Example:
        >>> NetworkStack(lambda: nn.Linear(3, 2), 5)(torch.zeros(4, 3)).shape
        torch.Size([4, 5, 2])
    """

    def __init__(self, build: Callable[[], nn.Module], models: int) -> None:
        super().__init__()
        networks = [build() for _ in range(models)]
        held, _ = stack_module_state(networks)
        self.models, self.names = models, list(held)
        self.weights = nn.ParameterList(held.values())
        # In a list, so that the layers without weights of their own are no part of this module.
        self.kind = [copy.deepcopy(networks[0]).to("meta")]

    def forward(self, x: Tensor) -> Tensor:
        (kind,) = self.kind

        def one(weights: dict[str, Tensor], given: Tensor) -> Tensor:
            found: Tensor = functional_call(kind, weights, (given,))
            return found

        weights = dict(zip(self.names, self.weights, strict=True))
        found: Tensor = vmap(one, in_dims=(0, None if x.ndim == 2 else 1), out_dims=1)(weights, x)
        return found


def stacked_cross_entropy(
    logits: Float[Tensor, "batch models classes"], targets: Int64[Tensor, " batch"] | Int64[Tensor, "batch models"]
) -> Float[Tensor, ""]:
    """Cross-entropy, the mean over samples and the sum over models, which do not know of one another then.

    Example:
        >>> round(stacked_cross_entropy(torch.zeros(4, 3, 2), torch.zeros(4, dtype=torch.int64)).item(), 4)  # 3 ln 2
        2.0794
    """
    flat = targets if targets.ndim == 2 else targets[:, None].expand(logits.shape[:2])
    return F.cross_entropy(logits.flatten(0, 1), flat.flatten(), reduction="sum") / len(logits)


def train_on_subsets(
    stack: NetworkStack,
    masks: Bool[Tensor, "models samples"],
    x: Float[Tensor, "samples features"],
    y: Int64[Tensor, " samples"],
    *,
    steps: int,
    lr: float,
    generator: torch.Generator,
) -> NetworkStack:
    """Adam at a rate that falls to nothing; each network on the samples in its row, in an order of its own."""
    optimizer = torch.optim.Adam(stack.parameters(), lr=lr)
    drawn = torch.multinomial(masks.float(), steps * BATCH, replacement=True, generator=generator)
    loss = lambda rows: stacked_cross_entropy(stack(x[rows]), y[rows])
    descend(optimizer, loss, drawn.T.split(BATCH), anneal=steps)
    return stack
