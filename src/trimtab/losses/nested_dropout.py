r"""Nested dropout against wrong labels: features cut at a random length in training, at the best length afterwards.

For noisy labels and a network that is a feature extractor with a linear head: features come out in the
order of their importance, the first few carry what most labels agree on, and what was memorised sits in the tail, which
is thrown away. It costs nothing in training and shrinks the head.

$$
k \sim P(k) \propto \exp\Bigl(-\bigl(\tfrac{k - \mu}{\sigma}\bigr)^2\Bigr),\quad k = 1, \dots, D, \qquad
f(x) = W \bigl(m_k \odot h(x)\bigr) + b, \qquad m_k = (\underbrace{1, \dots, 1}_{k}, 0, \dots, 0)
$$

with one $k$ for a whole batch and no rescaling. The length that is kept is
$k^* = \arg\max_k \mathrm{acc}(k) - 10^{-5} (k - 1)$, with the accuracy on held-out samples, whose labels may be noisy
too. `NestedCoTeaching` goes on from two networks trained so: each learns from the samples that the other one, cut at
$k^*$, finds easy, both with the same random $k$.

Reference: Chen, Hu, Shen, Ai, Suykens, "Compressing Features for Learning with Noisy Labels", IEEE TNNLS 2022,
arXiv 2206.13140. Nested dropout is from Rippel, Gelbart, Adams, "Learning Ordered Representations with Nested Dropout",
ICML 2014, arXiv 1402.0915.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.losses.co_teaching import CoTeaching
from trimtab.ops.arguments import (
    finite_tensor,
    integer,
    labels,
    non_negative,
    number,
    positive,
    real_problem,
)
from trimtab.ops.whole_state import WholeState

# Numbers that a block of truncated logits may hold: 64 MB in float32.
_BLOCK = 2**24


def truncation_distribution(num_features: int, sigma: float, mu: float = 0.0) -> Float[Tensor, " features"]:
    r"""Probabilities of the lengths 1 to `num_features`, proportional to $\exp(-((k - \mu) / \sigma)^2)$, in float64.

    Args:
        num_features: the longest length, D.
        sigma: width, positive; `math.inf` for a uniform distribution. (No factor 2: the deviation is sigma / sqrt 2.)
        mu: the length where the density is highest.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> truncation_distribution(3, sigma=3.0)  # exp(-1/9), exp(-4/9) and exp(-1), normalised
        tensor([0.4700, 0.3368, 0.1932], dtype=torch.float64)
    """
    integer("num_features", num_features)
    if sigma != math.inf:
        positive("sigma", sigma)
    number("mu", mu)
    lengths = torch.arange(1, num_features + 1, dtype=torch.float64)
    return (-((lengths - mu) / sigma).square()).softmax(0)


class NestedDropout(WholeState, nn.Module):
    """Keeps the first `k` features and zeroes the rest; put it in front of the last linear layer.

    In training mode one `k` is drawn for the batch; in eval mode it is the chosen `truncation`, at first all features.

    Args:
        num_features: width of the feature layer, D.
        sigma: width of the distribution of `k`. The authors use 10 of 512 features on CIFAR-10, 100 on CIFAR-100.
        mu: where the distribution is highest.
        generator: source of the draws, on the CPU; torch's global one where it is None.

    Attributes:
        truncation: the length in eval mode, an int64 scalar that is saved with the network.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> layer = NestedDropout(4, sigma=2.0)
        >>> layer(torch.ones(1, 4), k=2)
        tensor([[1., 1., 0., 0.]])
        >>> layer.set_truncation(3)
        >>> layer.eval()(torch.ones(1, 4))
        tensor([[1., 1., 1., 0.]])
    """

    truncation: Tensor
    positions: Tensor

    def __init__(
        self, num_features: int, sigma: float = 10.0, mu: float = 0.0, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        # No buffer, for a network in half precision must not round the probabilities; and without the last entry, so
        # that no rounding lets a draw fall beyond it.
        self.cumulative = truncation_distribution(num_features, sigma, mu).cumsum(0)[:-1]
        self.register_buffer("positions", torch.arange(num_features), persistent=False)
        self.register_buffer("truncation", torch.tensor(num_features))
        self.num_features = num_features
        self.sigma = sigma
        self.mu = mu
        self.generator = generator
        self.held: Tensor | None = None

    def set_truncation(self, k: int) -> None:
        """Sets the length that eval mode keeps.

        Raises:
            ValueError: if `k` is outside [1, num_features].
        """
        self.truncation.fill_(integer("k", k, 1, self.num_features))

    def draw(self) -> Int[Tensor, ""]:
        """A random length, on the layer's device; the host does not wait for it."""
        uniform = torch.rand((), generator=self.generator, dtype=torch.float64)
        return (1 + (self.cumulative <= uniform).sum()).to(self.positions.device)

    @contextmanager
    def hold(self, k: Int[Tensor, ""]) -> Iterator[None]:
        """Within this context, training mode keeps the first `k` features instead of drawing."""
        before, self.held = self.held, k
        try:
            yield
        finally:
            self.held = before

    def forward(
        self, features: Float[Tensor, "*batch features"], k: int | Int[Tensor, ""] | None = None
    ) -> Float[Tensor, "*batch features"]:
        """The features, those beyond the length zeroed.

        Args:
            features: in order along the last axis.
            k: the length, instead of the drawn or chosen one.

        Raises:
            TypeError: if `features` is not floating point.
            ValueError: if the last axis has another width, or an integer `k` is outside [1, num_features].
        """
        if not isinstance(features, Tensor):
            raise TypeError(f"features must be a tensor, got {type(features).__name__}")
        if not features.is_floating_point():
            raise TypeError(f"features must be floating point, got {features.dtype}")
        if features.ndim == 0 or features.shape[-1] != self.num_features:
            raise ValueError(
                f"features must be (..., {self.num_features}), one axis of that width last, "
                f"got shape {tuple(features.shape)}"
            )
        if k is not None and not isinstance(k, Tensor):
            k = integer("k", k, 1, self.num_features)
        if k is None:
            k = (self.draw() if self.held is None else self.held) if self.training else self.truncation
        # where, not a product: a dropped feature that is infinite must not become NaN.
        return torch.where(self.positions < k, features, torch.zeros((), dtype=features.dtype, device=features.device))

    def extra_repr(self) -> str:
        return f"{self.num_features}, sigma={self.sigma}, mu={self.mu}"


@torch.no_grad()
def truncated_accuracy(
    features: Float[Tensor, "batch features"] | Sequence[Float[Tensor, "batch features"]],
    head: nn.Linear | Sequence[nn.Linear],
    targets: Int[Tensor, " batch"],
) -> Float[Tensor, " features"]:
    """Accuracy of a linear head on the first 1, 2, ... features; with several networks, of the mean of their logits.

    Prefix sums give all lengths at about the price of the full one, in memory that is bounded by blocks of samples.

    Args:
        features: what the head is applied to, whole, a tensor or an array; a sequence for several networks.
        head: the last layer; a sequence for several networks.
        targets: labels of held-out samples.

    Returns:
        Accuracies in float64; entry `k - 1` is that of the first `k` features.

    Raises:
        TypeError: if `features` is not floating point or `targets` not of integer type.
        ValueError: if shapes do not fit, there is no sample, a label is out of range, or a feature is not finite.

    Example:
        >>> head = nn.Linear(2, 2, bias=False)
        >>> _ = head.weight.data.copy_(torch.tensor([[1.0, -3.0], [0.0, 0.0]]))
        >>> truncated_accuracy(torch.ones(1, 2), head, torch.tensor([0]))  # logits (1, 0), then (-2, 0)
        tensor([1., 0.], dtype=torch.float64)
    """
    inputs = [features] if isinstance(features, Tensor | np.ndarray) else list(features)
    heads = [head] if isinstance(head, nn.Linear) else list(head)
    if len(inputs) != len(heads) or not heads:
        raise ValueError(f"features and head must be as many of both, got {len(inputs)} and {len(heads)}")
    inputs = [finite_tensor("features", part, floating=True).to(heads[0].weight.dtype) for part in inputs]
    targets = labels("targets", targets, heads[0].out_features).to(inputs[0].device)
    wanted = (len(targets), heads[0].in_features)
    for part, layer in zip(inputs, heads, strict=True):
        if part.shape != wanted or layer.weight.shape != heads[0].weight.shape:
            raise ValueError(
                "features, head and targets must be (batch, features), (classes, features) and (batch,), got shapes "
                f"{tuple(part.shape)}, {tuple(layer.weight.shape)} and {tuple(targets.shape)}"
            )
    if len(targets) == 0:
        raise ValueError("features must hold at least one sample, got an empty batch")
    right = torch.zeros(wanted[1], dtype=torch.float64, device=targets.device)
    for block in torch.arange(wanted[0], device=targets.device).split(max(1, _BLOCK // heads[0].weight.numel())):
        logits = _truncated_logits(inputs[0][block], heads[0])
        for part, layer in zip(inputs[1:], heads[1:], strict=True):
            logits += _truncated_logits(part[block], layer)
        right += (logits.argmax(-1) == targets[block, None]).sum(0)
    return right / wanted[0]


def _truncated_logits(features: Tensor, head: nn.Linear) -> Float[Tensor, "batch features classes"]:
    logits = (features[:, :, None] * head.weight.T).cumsum(1)
    return logits if head.bias is None else logits + head.bias


def select_truncation(accuracy: Float[Tensor, " features"], penalty: float = 1e-5) -> int:
    """The length with the best accuracy less `penalty` for each further feature; the shortest of equals.

    Args:
        accuracy: entry `k - 1` is that of length `k`.
        penalty: price of a feature. It breaks ties, and gives up an accuracy of 0.001 to be 100 features shorter.

    Raises:
        ValueError: if `accuracy` is empty, not one-dimensional or not finite, or `penalty` is negative.

    Example:
        >>> select_truncation(torch.tensor([0.5, 0.9, 0.9]))
        2
    """
    accuracy, penalty = finite_tensor("accuracy", accuracy), non_negative("penalty", penalty)
    if accuracy.ndim != 1 or accuracy.numel() == 0:
        raise ValueError(f"accuracy must be (features,), one per length, got shape {tuple(accuracy.shape)}")
    price = penalty * torch.arange(len(accuracy), dtype=torch.float64, device=accuracy.device)
    return 1 + int((accuracy.double() - price).argmax())


class NestedCoTeaching(CoTeaching):
    """Co-teaching of two networks with a `NestedDropout` each, both cut at the same random length in every step.

    The second stage of the method: the networks come from two independent trainings with nested dropout. Losses are
    compared at the chosen length; choose it by `truncated_accuracy` of both networks together before the first epoch
    and after every one, and set it with `set_truncation`. The authors train for 100 epochs at a learning rate of 0.001
    with frozen batch normalisation.

    Args:
        networks: two networks, each with one `NestedDropout` of the same width. The lengths are drawn by the first
            one's.
        optimizers: one for each network's parameters; their schedules are the caller's.
        forget_rate: as in `CoTeaching`.
        rampup_epochs: as in `CoTeaching`.
        freeze_batch_norm: as in `CoTeaching`, here on by default.

    Raises:
        ValueError: if a network has not exactly one `NestedDropout`, or their widths differ; and as `CoTeaching`.

    Example:
        >>> networks = [nn.Sequential(NestedDropout(5), nn.Linear(5, 3)) for _ in range(2)]
        >>> optimizers = [torch.optim.SGD(network.parameters(), lr=0.001) for network in networks]
        >>> rule = NestedCoTeaching(networks, optimizers)
        >>> rule.set_truncation(2)
        >>> sorted(rule.step(torch.randn(8, 5), torch.arange(8) % 3))
        ['loss_0', 'loss_1']
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        forget_rate: float = 0.2,
        rampup_epochs: int = 0,
        freeze_batch_norm: bool = True,
    ) -> None:
        super().__init__(
            networks,
            optimizers,
            forget_rate=forget_rate,
            rampup_epochs=rampup_epochs,
            freeze_batch_norm=freeze_batch_norm,
        )
        found = [[layer for layer in network.modules() if isinstance(layer, NestedDropout)] for network in networks]
        if [len(layers) for layers in found] != [1, 1]:
            counts = [len(layers) for layers in found]
            raise ValueError(f"networks must have one NestedDropout layer each, got {counts}")
        self.layers = [layers[0] for layers in found]
        if self.layers[0].num_features != self.layers[1].num_features:
            widths = [layer.num_features for layer in self.layers]
            raise ValueError(f"networks must have NestedDropout layers of one width, got {widths}")

    def set_truncation(self, k: int) -> None:
        """Sets the length at which both networks choose samples and predict.

        Raises:
            ValueError: if `k` is outside [1, num_features].
        """
        for layer in self.layers:
            layer.set_truncation(k)

    def step(
        self, x: Float[Tensor, "batch ..."], targets: Int[Tensor, " batch"], k: Int[Tensor, ""] | None = None
    ) -> dict[str, Tensor]:
        """One step of both networks, each on the samples that the other one chose; see `CoTeaching.step`.

        Args:
            x: inputs, on the networks' device.
            targets: labels, wrong ones among them.
            k: the length of both; drawn where it is None.
        """
        if problem := real_problem(x=x):
            raise TypeError(problem)
        generator = self.layers[0].generator or torch.default_generator
        before = generator.get_state()
        with ExitStack() as held:
            drawn = self.layers[0].draw() if k is None else k
            for layer in self.layers:
                held.enter_context(layer.hold(drawn))
            try:
                return super().step(x, targets)
            except Exception:  # a refused step draws nothing
                generator.set_state(before)
                raise

    def state_dict(self) -> dict[str, Any]:
        """All that training needs to go on exactly where it stopped, the state of the lengths' generator included."""
        generator = self.layers[0].generator
        return {**super().state_dict(), "generator": None if generator is None else generator.get_state()}

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        if self.layers[0].generator is not None and state["generator"] is not None:
            self.layers[0].generator.set_state(state["generator"])
