r"""AdvStyle: noise on the style of feature maps, as strong as the task can least bear, learned by gradient reversal.

A layer to put after a block of a convolutional network that must work in domains it has not seen; it does something in
training alone, and costs no second pass. Means and deviations of channels are what tells domains apart; the layer
moves them by noise whose strength, one number a channel, climbs the very loss that the network descends:

$$
\mu' = \mu + n_1\, R_w(a_\mu), \qquad \sigma' = \sigma + n_2\, R_w(a_\sigma), \qquad
x' = \frac{x - \mu}{\sigma}\, \sigma' + \mu', \qquad n \sim \mathcal{N}(0, 1),
$$

where $R_w$ is the identity with its gradient times $-w$. A third of the batches is treated so, a third with the
batch's own spread of $\mu$ and $\sigma$ in the place of $a$ (which is DSU, arXiv 2202.03958), and a third is left as
it is. The strengths start from the spread of the first batch seen in training (in the released code, of the first
that is perturbed adversarially); they belong into the optimizer, best without weight decay.

Reference: Yabin Zhang, Bin Deng, Ruihuang Li, Kui Jia and Lei Zhang, "Adversarial Style Augmentation for Domain
Generalization", 2023, arXiv 2301.12643.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.domain.styles import restyle, standardize
from trimtab.ops.arguments import in_range, integer, non_negative, one_of, positive, tensor_problem
from trimtab.ops.gradient_reversal import reverse_gradient
from trimtab.ops.whole_state import WholeState

Branch = Literal["clean", "adversarial", "batch"]


def style_spread(statistic: Float[Tensor, "batch channels 1 1"], eps: float = 1e-6) -> Float[Tensor, "1 channels 1 1"]:
    """How much a mean or a deviation differs from sample to sample: its own deviation over the batch.

    Args:
        statistic: a mean or a deviation of each channel of each sample.
        eps: added to the variance, at least 0.

    Raises:
        TypeError: `statistic` is not floating point.
        ValueError: there are fewer than two samples, or `eps` is negative.

    Example:
        >>> style_spread(torch.tensor([1.0, 3.0]).view(2, 1, 1, 1), eps=0.0).item()
        1.4142...
    """
    if not isinstance(statistic, Tensor) or not statistic.is_floating_point():
        raise TypeError(f"statistic must be a floating-point tensor, got {type(statistic).__name__}")
    if not (isinstance(eps, float | Real) and 0 <= eps < torch.inf):
        raise ValueError(f"eps must be at least 0 and finite, got {eps!r}")
    if len(statistic) < 2:
        raise ValueError(f"statistic must hold at least two samples, got {len(statistic)}")
    return (statistic.var(0, keepdim=True) + eps).sqrt()


class AdvStyle(WholeState, nn.Module):
    """Perturbs the style of feature maps in training; the identity in eval mode.

    Args:
        num_channels: of the maps.
        adv_weight: what the gradient of the strengths is multiplied by, apart from its sign: 10 in the paper, 5 for
            VGG.
        p_clean: share of batches left as they are.
        p_adv: share of batches perturbed with learned strengths; what is left gets the batch's own.
        eps: added to variances.
        positive_std: whether a deviation that noise turns negative is taken as 0; the paper lets it mirror the map.
        generator: decides branches and noise; on the CPU.

    Attributes:
        mean_strength, std_strength: the learned strengths, (1, channels, 1, 1).
        started: whether the strengths have their starting values; a buffer, so that a loaded layer keeps its own.

    Raises:
        ValueError: a number is out of range, or the shares sum to more than 1.

    Example:
        >>> layer = AdvStyle(3)
        >>> x = torch.rand(4, 3, 5, 5)
        >>> layer(x, branch="adversarial").shape
        torch.Size([4, 3, 5, 5])
        >>> torch.equal(layer.eval()(x), x)
        True
    """

    started: Tensor

    def __init__(
        self,
        num_channels: int,
        *,
        adv_weight: float = 10.0,
        p_clean: float = 1 / 3,
        p_adv: float = 1 / 3,
        eps: float = 1e-6,
        positive_std: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        shape = (1, integer("num_channels", num_channels), 1, 1)
        self.adv_weight, self.eps = non_negative("adv_weight", adv_weight), positive("eps", eps)
        self.p_clean, self.p_adv = in_range("p_clean", p_clean, 0, 1), in_range("p_adv", p_adv, 0, 1)
        if p_clean + p_adv > 1 + 1e-9:
            raise ValueError(f"p_clean and p_adv must sum to at most 1, got {p_clean} and {p_adv}")
        self.positive_std, self.generator = positive_std, generator
        self.mean_strength = nn.Parameter(torch.full(shape, 0.1))
        self.std_strength = nn.Parameter(torch.full(shape, 0.1))
        self.register_buffer("started", torch.tensor(False))
        # Read once, here and after loading: looking at the buffer in each step would make a device wait.
        self._started = False
        self.register_load_state_dict_post_hook(_read_start)  # type: ignore[no-untyped-call]

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        *,
        branch: Branch | None = None,
        noise: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        """The maps in another style.

        Args:
            x: feature maps.
            branch: what is done with the batch; drawn where it is None.
            noise: for means and for deviations, each (batch, channels, 1, 1); drawn where it is None.

        Raises:
            TypeError: `x` is not floating point, or noise is no real tensor.
            ValueError: `x` has another shape or number of channels, in training fewer than two samples or pixels, the
                branch is unknown, or the noise has another shape.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"x must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
        if x.ndim != 4 or x.shape[1] != self.mean_strength.shape[1]:
            wanted = f"(batch, {self.mean_strength.shape[1]}, height, width)"
            raise ValueError(f"x must have shape {wanted}, got {tuple(x.shape)}")
        if branch is not None:
            one_of("branch", branch, ("clean", "adversarial", "batch"))
        if not self.training:
            return x
        if len(x) < 2:
            raise ValueError(f"x must hold at least two samples in training, got {len(x)}")
        if x.shape[2] * x.shape[3] < 2:  # before a branch is drawn
            raise ValueError(f"x must have at least two pixels in training, got shape {tuple(x.shape)}")
        statistics = (len(x), x.shape[1], 1, 1)
        if noise is not None and len(noise) != 2:
            raise ValueError(f"noise must be two tensors, got {len(noise)}")
        if noise is not None and (problem := tensor_problem(**{"noise[0]": noise[0], "noise[1]": noise[1]})):
            raise TypeError(problem)
        if noise is not None and any(part.shape != statistics for part in noise):
            raise ValueError(f"noise must be two tensors of shape {statistics}, got {[tuple(p.shape) for p in noise]}")
        if branch is None and self._started:
            branch = self._drawn_branch()
            if branch == "clean":
                return x
        content, mean, std = standardize(x, self.eps)
        if not self._started:
            self._start(style_spread(mean, self.eps), style_spread(std, self.eps))
            branch = branch or self._drawn_branch()
        if branch == "clean":
            return x
        if branch == "batch":
            spreads = style_spread(mean, self.eps), style_spread(std, self.eps)
        else:
            spreads = (
                reverse_gradient(self.mean_strength.to(mean), self.adv_weight),
                reverse_gradient(self.std_strength.to(mean), self.adv_weight),
            )
        first, second = (part.to(mean) for part in noise or self._drawn_noise(statistics))
        moved = std + second * spreads[1]
        if self.positive_std:
            moved = moved.relu()
        return restyle(content, mean + first * spreads[0], moved).to(x.dtype)

    @torch.no_grad()
    def _start(self, mean_spread: Tensor, std_spread: Tensor) -> None:
        spreads = torch.stack([mean_spread, std_spread]).to(self.mean_strength)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast(spreads, 0)
        if not spreads.isfinite().all():  # a batch that diverged; the next one may start them
            return
        self.mean_strength.copy_(spreads[0])
        self.std_strength.copy_(spreads[1])
        self.started.fill_(True)
        self._started = True

    def _drawn_branch(self) -> Branch:
        draw = float(torch.rand((), generator=self.generator))
        return "clean" if draw < self.p_clean else "adversarial" if draw < self.p_clean + self.p_adv else "batch"

    def _drawn_noise(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return torch.randn(shape, generator=self.generator), torch.randn(shape, generator=self.generator)

    def extra_repr(self) -> str:
        return f"{self.mean_strength.shape[1]}, adv_weight={self.adv_weight:g}"


def _read_start(module: AdvStyle, keys: object) -> None:
    module._started = bool(module.started)


def insert_advstyle(
    model: nn.Module,
    after: Mapping[str, int],
    *,
    adv_weight: float = 10.0,
    p_clean: float = 1 / 3,
    p_adv: float = 1 / 3,
    generator: torch.Generator | None = None,
) -> list[AdvStyle]:
    """Puts a layer after each of some blocks of a network, in place, on its device and in its mode.

    Args:
        model: the network.
        after: name of a block, as in `model.get_submodule`, and the number of channels that it gives.
        adv_weight, p_clean, p_adv: see `AdvStyle`.
        generator: decides the draws of all layers.

    Returns:
        The layers, in the order of `after`; give their strengths to the optimizer.

    Raises:
        TypeError: a number of channels is not an integer.
        ValueError: a block is not there or lies within another, or a number is out of range; nothing is inserted then.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten())
        >>> insert_advstyle(model, {"1": 4})
        [AdvStyle(4, adv_weight=10)]
        >>> model(torch.rand(2, 1, 5, 5)).shape
        torch.Size([2, 36])
    """
    known = dict(model.named_modules())
    for name in after:
        if name not in known or not name:
            raise ValueError(f"after must name blocks of the model, got {name!r}")
    if within := [name for name in after if any(name.startswith(f"{other}.") for other in after)]:
        raise ValueError(f"after must name blocks none of which is a part of another, got {within[0]!r}")
    if any(isinstance(width, bool) or not isinstance(width, int | Integral) for width in after.values()):
        raise TypeError(f"after must give numbers of channels, got {list(after.values())}")
    if any(width < 1 for width in after.values()):
        raise ValueError(f"after must give positive numbers of channels, got {list(after.values())}")
    place, layers = next(model.parameters(), torch.zeros(())).device, []
    for name, channels in after.items():
        layer = AdvStyle(channels, adv_weight=adv_weight, p_clean=p_clean, p_adv=p_adv, generator=generator)
        layer.to(place).train(model.training)
        block = nn.Sequential(model.get_submodule(name), layer)
        block.training = model.training  # the parts of the block keep theirs
        model.set_submodule(name, block)
        layers.append(layer)
    return layers
