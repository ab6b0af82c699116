"""The blocks of a network that is searched: mixtures of operations, and the residual branch around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.compress.quantnas.noise import QuantNoiseConv2d
from trimtab.ops.arguments import integer


class MixedOp(nn.Module):
    """All operations of a block, mixed by learned weights over pairs of an operation and a number of bits.

    Args:
        ops: name -> operation, called as `op(x, shares)`; its `QuantNoiseConv2d`s are counted.
        bits: the numbers of bits.

    Attributes:
        logits: the parameter (operations, bits), zero at the start.

    Example:
        >>> op = MixedOp({"3 x 3": QuantNoiseConv2d(2, 2, 3), "1 x 1": QuantNoiseConv2d(2, 2, 1)})
        >>> op(torch.randn(1, 2, 4, 4)).shape, op.choice()
        (torch.Size([1, 2, 4, 4]), ('3 x 3', 4))
    """

    def __init__(self, ops: Mapping[str, nn.Module], bits: Sequence[int] = (4, 8)) -> None:
        super().__init__()
        if not ops:
            raise ValueError("ops must hold at least one operation, got none")
        self.names, self.bits = tuple(ops), tuple(bits)
        self.ops = nn.ModuleList(ops.values())
        self.logits = nn.Parameter(torch.zeros(len(ops), len(self.bits)))

    @property
    def alphas(self) -> Float[Tensor, "ops bits"]:
        """The mixture's weights, which sum to one."""
        return self.logits.flatten().softmax(0).view_as(self.logits)

    def forward(self, x: Float[Tensor, "batch ..."]) -> Tensor:
        alphas = self.alphas
        outputs = [alphas[n].sum() * op(x, alphas[n]) for n, op in enumerate(self.ops)]
        return torch.stack(outputs).sum(0)

    def costs(self) -> Float[Tensor, "ops bits"]:
        """Bit operations per sample of each pair, multiply-adds times the square of its bits, after a forward pass."""
        macs = [sum(m.macs for m in op.modules() if isinstance(m, QuantNoiseConv2d)) for op in self.ops]
        squares = torch.tensor([width**2 for width in self.bits], device=self.logits.device)
        return torch.tensor(macs, dtype=torch.float32, device=self.logits.device)[:, None] * squares

    def choice(self) -> tuple[str, int]:
        """The operation and the number of bits of the largest weight."""
        best = int(self.logits.detach().flatten().argmax())
        return self.names[best // len(self.bits)], self.bits[best % len(self.bits)]


class AdaptiveDeviation(nn.Module):
    """ADQ: a residual branch behind batch normalisation, rescaled by the deviation of each sample's skip connection.

    Args:
        channels: of the branch's input.
        slope, shift: of the learned line from the deviation to the scale, at the start.

    Example:
        >>> block = AdaptiveDeviation(2)
        >>> x = torch.zeros(1, 2, 3, 3)
        >>> torch.equal(block(x, lambda z: z + 1, x), x)  # a skip connection without deviation closes the branch
        True
    """

    def __init__(self, channels: int, slope: float = 1.5, shift: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(integer("channels", channels))
        self.slope, self.shift = nn.Parameter(torch.tensor(float(slope))), nn.Parameter(torch.tensor(float(shift)))

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        function: Callable[[Tensor], Tensor],
        skip: Float[Tensor, "batch out height width"],
    ) -> Float[Tensor, "batch out height width"]:
        """The branch and the skip connection.

        Args:
            x: input of the branch.
            function: the branch.
            skip: what is added.
        """
        scale = self.slope * skip.flatten(1).std(1) + self.shift
        return function(self.norm(x)) * scale.view(-1, 1, 1, 1) + skip


def mixed_ops(model: nn.Module) -> list[MixedOp]:
    """The searched blocks of a model, in order."""
    return [m for m in model.modules() if isinstance(m, MixedOp)]


def weight_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All parameters of a model but the mixtures' logits."""
    logits = {id(block.logits) for block in mixed_ops(model)}
    return [p for p in model.parameters() if id(p) not in logits]
