r"""QuantNAS: a search for operations and numbers of bits together, in which cheap noise stands for quantisation.

For a network that will be quantised: which convolution, and how many bits, should each of its blocks have? All choices
are mixed with weights that are learned, and quantisation is imitated by noise of the size of its error, smooth in
those weights and free of learned quantisers. With $f = 1 / (|B| + 1)$ and the shares $a_b$ of each number of bits,

$$
\tilde w = \frac{f\, w + \sum_{b \in B} a_b\, \operatorname{sg}\bigl[ w + \tfrac{\max w - \min w}{2^b - 1}
\tfrac{\epsilon_b}{2} \bigr]}{f + \sum_b a_b}, \qquad \epsilon_b \sim \mathcal{N}(0, 1),
$$

and likewise for the inputs: one convolution for all numbers of bits. Gradients pass through the share $f$ alone. An
entropy of the mixture's weights, which rises in the search, makes every block choose one operation, and a residual
block rescales its branch by the deviation of its skip connection (ADQ), which takes the place of plain batch
normalisation: $y = \phi(\operatorname{std}(s))\, F(\mathrm{BN}(x)) + s$.

In the release the clean part's weight is $f$ itself, so that all weights add up to more than one (`legacy`). Normal
noise of several numbers of bits is drawn as one, of the same distribution.

Reference: Egor Shvetsov, Dmitry Osin, Alexey Zaytsev, Ivan Koryakovskiy, Valentin Buchnev, Ilya Trofimov, Evgeny
Burnaev, "QuantNAS for super resolution: searching for efficient quantization-friendly architectures against
quantization noise", 2022, arXiv 2208.14839.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.compress.fake_quant import quant_range
from trimtab.ops.arguments import integer, non_negative, one_of, positive
from trimtab.ops.states import fits

# The step of the mixture leaves running statistics alone by the same piece as a second pass does.
from trimtab.optim.two_pass import frozen_norm_stats

Noise = Literal["gaussian", "uniform"]
Pair = tuple[Tensor, Tensor]


def error_scale(x: Float[Tensor, "..."], bits: int) -> Float[Tensor, ""]:
    """Standard deviation of the normal noise that stands for quantisation: half a step of the range.

    Example:
        >>> error_scale(torch.tensor([-1.0, 0.5, 2.0]), 2)
        tensor(0.5000)
    """
    quant_range(bits, signed=False)
    low, high = x.detach().aminmax()
    found: Tensor = (high - low) / (2 * (2**bits - 1))
    return found


def quantization_noise(
    x: Float[Tensor, "..."],
    bits: int,
    noise: Noise = "gaussian",
    *,
    eps: Float[Tensor, "..."] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "..."]:
    """What is quantised, and the noise that stands for the error; no gradient passes.

    Args:
        x: what would be quantised.
        bits: of the format.
        noise: normal, of half a step as deviation, or uniform over a step.
        eps: the draw itself, standard normal or uniform in [-1/2, 1/2].
        generator: for the draw, where there is none.

    Example:
        >>> quantization_noise(torch.tensor([0.0, 3.0]), 2, eps=torch.tensor([1.0, -1.0]))
        tensor([0.5000, 2.5000])
    """
    one_of("noise", noise, get_args(Noise))
    eps = _drawn(x, noise, generator) if eps is None else eps
    return x.detach() + error_scale(x, bits) * (1.0 if noise == "gaussian" else 2.0) * eps


def noisy_mixture(
    x: Float[Tensor, "..."],
    shares: Float[Tensor, " bits"],
    bits: Sequence[int],
    noise: Noise = "gaussian",
    *,
    legacy: bool = False,
    eps: Float[Tensor, "..."] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "..."]:
    """Noisy copies for all numbers of bits, mixed by their shares, and the clean one, through which gradients pass.

    Args:
        x: what would be quantised.
        shares: of each number of bits, at least 0; they take gradients.
        bits: the numbers of bits.
        noise: see `quantization_noise`.
        legacy: the clean one's weight is `1 / (len(bits) + 1)` undivided, as in the authors' release.
        eps: the draw itself: one for normal noise, one for each number of bits in front for uniform noise.
        generator: for the draw, where there is none.

    Raises:
        ValueError: there is not one share for each number of bits.

    Example:
        >>> x = torch.tensor([0.0, 3.0], requires_grad=True)
        >>> noisy_mixture(x, torch.tensor([0.5, 0.5]), (2, 8), eps=torch.zeros(2)).sum().backward()
        >>> x.grad  # a third, over four thirds
        tensor([0.2500, 0.2500])
    """
    if shares.shape != (len(bits),):
        raise ValueError(
            f"shares must have shape ({len(bits)},), one for each number of bits, got {tuple(shares.shape)}"
        )
    clean = 1 / (len(bits) + 1)
    total = shares.sum() + clean
    parts = shares / total
    scales = torch.stack([error_scale(x, width) for width in bits])
    held = x.detach()
    mixed = (clean if legacy else clean / total) * x + parts.sum() * held
    if noise == "gaussian":
        eps = _drawn(x, noise, generator) if eps is None else eps
        tiny = torch.finfo(held.dtype).tiny
        return mixed + ((parts * scales).square().sum() + tiny).sqrt() * eps
    one_of("noise", noise, get_args(Noise))
    for n in range(len(bits)):
        mixed = mixed + 2 * parts[n] * scales[n] * (_drawn(x, noise, generator) if eps is None else eps[n])
    return mixed


def _drawn(x: Tensor, noise: str, generator: torch.Generator | None) -> Tensor:
    device = x.device if generator is None else generator.device
    if noise == "gaussian":
        return torch.randn(x.shape, dtype=x.dtype, device=device, generator=generator).to(x.device)
    return torch.rand(x.shape, dtype=x.dtype, device=device, generator=generator).to(x.device) - 0.5


class QuantNoiseConv2d(nn.Conv2d):
    """A convolution of ReLU'd inputs that imitates several numbers of bits at once; size is kept.

    Args:
        in_channels, out_channels, kernel_size: of the convolution.
        bits: the numbers of bits.
        noise, legacy: see `noisy_mixture`.
        groups: of the convolution.

    Attributes:
        generator: for the noise; torch's own where it is None.
        macs: multiply-adds per sample of the last call.

    Example:
        >>> conv = QuantNoiseConv2d(3, 4, 3, bits=(4, 8))
        >>> conv(torch.randn(2, 3, 5, 5), torch.tensor([1.0, 0.0])).shape, conv.macs
        (torch.Size([2, 4, 5, 5]), 2700)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        bits: Sequence[int] = (4, 8),
        *,
        noise: Noise = "gaussian",
        legacy: bool = False,
        groups: int = 1,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, groups=groups, bias=False)
        self.bits = tuple(integer("bits", width, 1, 24) for width in bits)
        if not self.bits:
            raise ValueError("bits must hold at least one number, got none")
        self.noise: Noise = one_of("noise", noise, get_args(Noise))
        self.legacy, self.macs = legacy, 0
        self.generator: torch.Generator | None = None

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "batch channels height width"], shares: Float[Tensor, " bits"]
    ) -> Float[Tensor, "batch out height width"]:
        """The convolution, with weights and inputs of the mixture.

        Args:
            x: inputs, before ReLU.
            shares: of each number of bits.
        """
        weight, given = self.imitate(self.weight, shares), self.imitate(x.relu(), shares)
        out = self._conv_forward(given, weight, None)
        self.macs = out[0].numel() * self.weight[0].numel()
        found: Tensor = out
        return found

    def imitate(self, x: Float[Tensor, "..."], shares: Float[Tensor, " bits"]) -> Float[Tensor, "..."]:
        """What stands for the quantised weights or inputs."""
        return noisy_mixture(x, shares, self.bits, self.noise, legacy=self.legacy, generator=self.generator)


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


def architecture_entropy(alphas: Sequence[Float[Tensor, "..."]]) -> Float[Tensor, ""]:
    """Sum over the blocks of the entropy of their mixtures.

    Args:
        alphas: weights of each block, which sum to one.

    Example:
        >>> round(architecture_entropy([torch.full((2, 2), 0.25)]).item(), 4)  # ln 4
        1.3863
    """
    if not alphas:
        raise ValueError("alphas must hold at least one block, got none")
    return torch.stack([torch.special.entr(a).sum() for a in alphas]).sum()


def entropy_weight(epoch: int, epochs: int) -> float:
    """How much the entropy counts: nothing in the first quarter, then more and more, 1 in the last epoch.

    Args:
        epoch: from 0.
        epochs: of the search, at least 2.

    Example:
        >>> [round(entropy_weight(epoch, 8), 3) for epoch in (0, 1, 2, 4, 7)]
        [0.0, 0.0, 0.102, 0.407, 1.0]
    """
    integer("epochs", epochs, 2), integer("epoch", epoch, 0, epochs - 1)
    quarter = epochs // 4
    if epoch < quarter:
        return 0.0
    return epoch / (epochs - 1) * math.log(epoch - quarter + 2) / math.log(epochs - quarter + 1)


def mixed_ops(model: nn.Module) -> list[MixedOp]:
    """The searched blocks of a model, in order."""
    return [m for m in model.modules() if isinstance(m, MixedOp)]


class QuantNAS:
    """Searches: weights learn on one batch, the mixtures on another, in turns.

    Call `set_epoch(epoch)` before each epoch.

    Args:
        model: with `MixedOp`s.
        weight_optimizer: of all parameters but the mixtures' logits; see `weight_parameters`.
        alpha_optimizer: of the logits.
        epochs: of the search, at least 2.
        loss: of outputs and targets.
        entropy: weight of the entropy at the end.
        cost: weight of the bit operations, of which 0 is the least and 1 the most that could be chosen.
        clip: largest norm of the weights' gradient.
        generator: for the noise.

    Raises:
        ValueError: the model has no `MixedOp`, or a number is out of range.

    Example:
        >>> model = nn.Sequential(MixedOp({"3 x 3": QuantNoiseConv2d(1, 1, 3), "1 x 1": QuantNoiseConv2d(1, 1, 1)}))
        >>> weights, logits = weight_parameters(model), [op.logits for op in mixed_ops(model)]
        >>> search = QuantNAS(model, torch.optim.Adam(weights), torch.optim.Adam(logits), epochs=4)
        >>> search.set_epoch(0)
        >>> pair = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
        >>> sorted(search.step(pair, pair)), len(search.genotype())
        (['cost', 'entropy', 'held_loss', 'loss'], 1)
    """

    def __init__(
        self,
        model: nn.Module,
        weight_optimizer: torch.optim.Optimizer,
        alpha_optimizer: torch.optim.Optimizer,
        epochs: int,
        *,
        loss: Callable[[Tensor, Tensor], Tensor] = F.l1_loss,
        entropy: float = 1e-3,
        cost: float = 0.0,
        clip: float = 5.0,
        generator: torch.Generator | None = None,
    ) -> None:
        self.blocks = mixed_ops(model)
        if not self.blocks:
            raise ValueError("model must have a MixedOp, got none")
        self.epochs = integer("epochs", epochs, 2)
        self.entropy, self.cost = non_negative("entropy", entropy), non_negative("cost", cost)
        self.clip, self.loss, self.model = positive("clip", clip), loss, model
        self.weight_optimizer, self.alpha_optimizer = weight_optimizer, alpha_optimizer
        self.generator = torch.Generator() if generator is None else generator
        self.epoch = 0
        for conv in model.modules():
            if isinstance(conv, QuantNoiseConv2d):
                conv.generator = self.generator

    def set_epoch(self, epoch: int) -> None:
        """Sets the weight of the entropy for this epoch, from 0.

        Raises:
            ValueError: `epoch` is not in [0, epochs).
        """
        self.epoch = integer("epoch", epoch, 0, self.epochs - 1)

    def step(self, train: Pair, held: Pair) -> dict[str, Tensor]:
        """One step of the weights, then one of the mixtures.

        Args:
            train: inputs and targets for the weights.
            held: others for the mixtures.

        Returns:
            Both losses, the entropy, and the cost between 0 and 1, detached.

        Raises:
            ValueError: inputs and targets are not of one number, or there are none.
        """
        for name, (x, y) in (("train", train), ("held", held)):
            if len(x) != len(y) or not len(x):
                raise ValueError(f"{name} must be of one target a sample, at least one, got {len(x)} and {len(y)}")
        self.model.train()
        weights = weight_parameters(self.model)
        loss = self.loss(self.model(train[0]), train[1])
        self.weight_optimizer.zero_grad()
        (loss + self._entropy_term()[0]).backward()
        nn.utils.clip_grad_norm_(weights, self.clip)
        self.weight_optimizer.step()

        with frozen_norm_stats(self.model):
            held_loss = self.loss(self.model(held[0]), held[1])
        term, entropy = self._entropy_term()
        cost = self.relative_cost()
        self.alpha_optimizer.zero_grad()
        (held_loss + term + self.cost * cost).backward()
        self.alpha_optimizer.step()
        found = {"loss": loss, "held_loss": held_loss, "entropy": entropy, "cost": cost}
        return {name: value.detach() for name, value in found.items()}

    def _entropy_term(self) -> tuple[Tensor, Tensor]:
        entropy = architecture_entropy([block.alphas for block in self.blocks])
        return self.entropy * entropy_weight(self.epoch, self.epochs) * entropy, entropy

    def relative_cost(self) -> Float[Tensor, ""]:
        """Expected bit operations, from 0 for the cheapest choice to 1 for the dearest; after a forward pass."""
        tables = [block.costs() for block in self.blocks]
        spent = torch.stack([(b.alphas * table).sum() for b, table in zip(self.blocks, tables, strict=True)]).sum()
        least = torch.stack([table.min() for table in tables]).sum()
        most = torch.stack([table.max() for table in tables]).sum()
        return (spent - least) / (most - least).clamp(min=1.0)

    def genotype(self) -> list[tuple[str, int]]:
        """The operation and the number of bits that each block has chosen."""
        return [block.choice() for block in self.blocks]

    def state_dict(self) -> dict[str, Any]:
        """Weights and mixtures, both optimizers' states, the generator's and the epoch."""
        return {
            "model": self.model.state_dict(),
            "weight_optimizer": self.weight_optimizer.state_dict(),
            "alpha_optimizer": self.alpha_optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "epoch": self.epoch,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state; one that does not fit changes nothing.

        Raises:
            ValueError: it is not the state of such a search.
        """
        own = self.state_dict()
        known = isinstance(state, Mapping) and state.keys() == own.keys()
        if not known or not all(fits(state[name], own[name]) for name in ("model", "generator")):
            raise ValueError("state must be one of QuantNAS with a model of these shapes, got another")
        epoch = integer("epoch", state["epoch"], 0, self.epochs - 1)
        before = own["weight_optimizer"]
        self.weight_optimizer.load_state_dict(state["weight_optimizer"])  # refuses before it changes anything
        try:
            self.alpha_optimizer.load_state_dict(state["alpha_optimizer"])
        except (ValueError, KeyError):
            self.weight_optimizer.load_state_dict(before)
            raise
        self.model.load_state_dict(state["model"])
        self.generator.set_state(state["generator"])
        self.epoch = epoch


def weight_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All parameters of a model but the mixtures' logits."""
    logits = {id(block.logits) for block in mixed_ops(model)}
    return [p for p in model.parameters() if id(p) not in logits]
