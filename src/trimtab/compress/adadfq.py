r"""AdaDFQ: quantisation-aware training without data, on images that are neither trivial nor hopeless for the student.

For a model whose training data may not be had. A generator makes images from noise and labels for the full-precision
network $P$ and the quantised one $Q$, whose logits are $t$ and $q$. Where $p = \operatorname{softmax}(t - q)$ is flat
the two agree; its entropy $h$, scaled to $h' \in [0, 1]$ between the batch's smallest and $\ln C$, is kept between two
margins, while labels and the statistics of $P$'s batch normalisation keep the images like data:

$$
L_G = \overline{[\lambda_l - h']_+} + \overline{[h' - \lambda_u]_+}
+ \beta \bigl( 0.2\, \mathrm{CE}(t - q, y) + 0.1\, \mathrm{CE}(t + q, y) \bigr) + \gamma\, L_{\mathrm{BN}}, \qquad
L_Q = - T^2\, \overline{H\bigl( \operatorname{softmax}((t - q) / T) \bigr)} .
$$

The generator steps on $L_G$, then $Q$ on $L_Q$ with the same images. $L_Q$ is least where $t - q$ is the same for all
classes.

Reference: Biao Qian, Yang Wang, Richang Hong, Meng Wang, "Adaptive Data-Free Quantization", CVPR 2023,
arXiv 2303.06869.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trimtab.compress.fake_quant import MinMaxActivation
from trimtab.ops.arguments import class_indices, in_range, integer, non_negative, positive, same_shape
from trimtab.ops.averaging import frozen_copy
from trimtab.ops.states import fits

_TINY = 1e-8


def difference_entropy(
    logits: Float[Tensor, "batch classes"], other: Float[Tensor, "batch classes"], temperature: float = 1.0
) -> Float[Tensor, " batch"]:
    """Entropy of the softmax of two networks' difference; `ln classes` where they agree up to a constant.

    Args:
        logits: of the one.
        other: of the other one.
        temperature: divides the difference, positive.

    Raises:
        ValueError: the shapes differ, or the temperature is not positive.

    Example:
        >>> logits = torch.tensor([[1.0, 2.0], [9.0, 0.0]])
        >>> difference_entropy(logits, torch.tensor([[0.0, 1.0], [0.0, 9.0]])).round(decimals=4)
        tensor([0.6931, 0.0000])
    """
    same_shape("other", other, "logits", logits)
    log_probs = ((logits - other).float() / positive("temperature", temperature)).log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def boundary_loss(
    entropy: Float[Tensor, " batch"], num_classes: int, lower: float = 0.1, upper: float = 0.8
) -> Float[Tensor, ""]:
    """How far entropies, scaled between the batch's smallest and the largest there is, lie outside of two margins.

    Args:
        entropy: of each sample, of `difference_entropy`; at least two.
        num_classes: whose logarithm is the largest entropy.
        lower, upper: the margins, `0 <= lower <= upper <= 1`.

    Raises:
        ValueError: there are fewer than two samples, or the margins are out of order.

    Example:
        >>> entropy = torch.tensor([0.0, 0.5, 1.0]) * math.log(10)
        >>> round(boundary_loss(entropy, 10).item(), 4)  # 0.1 below and 0.2 above, of three samples
        0.1
    """
    in_range("lower", lower, 0, 1), in_range("upper", upper, lower, 1)
    if entropy.dim() != 1 or len(entropy) < 2:
        raise ValueError(f"entropy must be of at least two samples, got shape {tuple(entropy.shape)}")
    least = entropy.min()
    scaled = (entropy - least) / (math.log(integer("num_classes", num_classes, 2)) - least).clamp(min=_TINY)
    return (lower - scaled).relu().mean() + (scaled - upper).relu().mean()


class BNStatistics:
    """Within a `with` block, how far the statistics of a network's inputs to batch normalisation are from its own.

    Args:
        model: with batch normalisation, in eval mode; the last forward pass counts.

    Raises:
        ValueError: the model has no batch normalisation with running statistics.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(2)).eval()
        >>> with BNStatistics(model) as statistics:
        ...     _ = model(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
        ...     statistics.loss().item()
        0.0
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        if not self.layers:
            raise ValueError("model must have batch normalisation with running statistics, got none")
        self._seen: dict[nn.Module, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        self._handles = [layer.register_forward_pre_hook(self._keep) for layer in self.layers]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._seen = {}

    def _keep(self, layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        given = cast(Tensor, arguments[0]).transpose(0, 1).flatten(1)
        self._seen[layer] = torch.stack([given.mean(1), given.var(1, unbiased=False)])

    def loss(self) -> Float[Tensor, ""]:
        """Mean over the layers of the mean squared errors of means and (biased) variances.

        Raises:
            RuntimeError: there was no forward pass.
        """
        if not self._seen:
            raise RuntimeError("BNStatistics: run the model within the block first")
        own = [torch.stack([cast(Tensor, m.running_mean), cast(Tensor, m.running_var)]) for m in self._seen]
        errors = [(seen - held).square().mean(1).sum() for seen, held in zip(self._seen.values(), own, strict=True)]
        return torch.stack(errors).mean()


class ConditionalGenerator(nn.Module):
    """Images from noise times a label's embedding, by two doublings of size.

    The last batch normalisation has no weights: images have the mean and the deviation that are named, those of the
    inputs that the networks were trained on.

    Args:
        shape: of an image (channels, height, width).
        num_classes: number of labels.
        latent: length of the noise.
        width: channels inside.
        mean, std: of pixels.

    Example:
        >>> maker = ConditionalGenerator((1, 14, 14), num_classes=10, width=8)
        >>> maker(torch.randn(3, 100), torch.tensor([0, 5, 9])).shape
        torch.Size([3, 1, 14, 14])
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        num_classes: int,
        *,
        latent: int = 100,
        width: int = 64,
        mean: float = 0.0,
        std: float = 1.0,
    ) -> None:
        super().__init__()
        channels, height, breadth = shape
        self.latent, self.num_classes = integer("latent", latent), integer("num_classes", num_classes, 2)
        self.mean, self.std = float(mean), positive("std", std)
        sizes = [(math.ceil(height / part), math.ceil(breadth / part)) for part in (4, 2, 1)]
        self.embed = nn.Embedding(num_classes, latent)
        first = 2 * integer("width", width)
        self.body = nn.Sequential(
            nn.Linear(latent, first * sizes[0][0] * sizes[0][1]),
            nn.Unflatten(1, (first, *sizes[0])),
            nn.BatchNorm2d(first),
            nn.Upsample(sizes[1]),
            nn.Conv2d(first, first, 3, padding=1),
            nn.BatchNorm2d(first),
            nn.LeakyReLU(0.2),
            nn.Upsample(sizes[2]),
            nn.Conv2d(first, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, channels, 3, padding=1),
            nn.Tanh(),
            nn.BatchNorm2d(channels, affine=False),
        )

    def forward(
        self, noise: Float[Tensor, "batch latent"], labels: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch channels height width"]:
        images: Tensor = self.body(noise * self.embed(labels))
        return self.mean + self.std * images


class AdaDFQ:
    """Trains a quantised copy of a network, and the generator of its training images, from the network alone.

    Args:
        teacher: the full-precision network, with batch normalisation; a frozen copy is kept.
        student: its quantised copy, as `prepare_quantized` makes it; it stays in eval mode. Ranges of its
            `MinMaxActivation`s follow the images while it trains.
        maker: the generator; it stays in training mode.
        student_optimizer, maker_optimizer: of the two; the authors take SGD of rate 1e-4 with Nesterov momentum 0.9,
            and Adam of rate 1e-3 with betas (0.5, 0.999).
        lower, upper: margins of the boundary loss.
        disagreement, agreement: weights of the two cross-entropies.
        beta, gamma: weights of both together, and of the statistics.
        temperature: of the student's loss.
        warmup: number of steps at the start in which the generator alone trains.
        generator: for noise and labels.

    Raises:
        ValueError: the teacher has no batch normalisation, or a number is out of range.

    Example:
        >>> from functools import partial
        >>> from trimtab.compress import MinMaxActivation, MinMaxWeight, prepare_quantized
        >>> from trimtab.nets import plain_cnn
        >>> teacher, maker = plain_cnn(), ConditionalGenerator((1, 14, 14), 10, width=4)
        >>> student = prepare_quantized(teacher, torch.rand(8, 1, 14, 14), 3, weight=MinMaxWeight,
        ...                             inputs=partial(MinMaxActivation, pass_clipped=True))
        >>> rule = AdaDFQ(teacher, student, maker, torch.optim.SGD(student.parameters(), lr=1e-4),
        ...               torch.optim.Adam(maker.parameters(), lr=1e-3))
        >>> sorted(rule.step(batch_size=8))
        ['agreement', 'boundary', 'disagreement', 'maker', 'statistics', 'student']
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        maker: ConditionalGenerator,
        student_optimizer: torch.optim.Optimizer,
        maker_optimizer: torch.optim.Optimizer,
        *,
        lower: float = 0.1,
        upper: float = 0.8,
        disagreement: float = 0.2,
        agreement: float = 0.1,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 20.0,
        warmup: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        self.lower, self.upper = in_range("lower", lower, 0, 1), in_range("upper", upper, lower, 1)
        self.disagreement = non_negative("disagreement", disagreement)
        self.agreement = non_negative("agreement", agreement)
        self.beta, self.gamma = non_negative("beta", beta), non_negative("gamma", gamma)
        self.temperature, self.warmup = positive("temperature", temperature), integer("warmup", warmup, 0)
        self.teacher = frozen_copy(teacher)
        self.statistics = BNStatistics(self.teacher)
        self.student, self.maker = student, maker
        self.student_optimizer, self.maker_optimizer = student_optimizer, maker_optimizer
        self.generator = torch.Generator() if generator is None else generator
        self.steps_done = 0

    def maker_losses(
        self,
        taught: Float[Tensor, "batch classes"],
        said: Float[Tensor, "batch classes"],
        labels: Int[Tensor, " batch"],
    ) -> dict[str, Tensor]:
        """The terms of the generator's loss beside the statistics, each with its weight.

        Args:
            taught, said: logits of the teacher and of the student.
            labels: for which the images were made.
        """
        entropy = difference_entropy(taught, said)
        return {
            "boundary": boundary_loss(entropy, taught.shape[1], self.lower, self.upper),
            "disagreement": self.beta * self.disagreement * F.cross_entropy(taught - said, labels),
            "agreement": self.beta * self.agreement * F.cross_entropy(taught + said, labels),
        }

    def student_loss(
        self,
        taught: Float[Tensor, "batch classes"],
        said: Float[Tensor, "batch classes"],
        labels: Int[Tensor, " batch"],
    ) -> Float[Tensor, ""]:
        """What the student minimises on images that stand still.

        Args:
            taught, said: logits of the teacher and of the student.
            labels: for which the images were made; this loss needs none.
        """
        return -(self.temperature**2) * difference_entropy(taught, said, self.temperature).mean()

    def step(
        self,
        batch_size: int = 16,
        *,
        noise: Float[Tensor, "batch latent"] | None = None,
        labels: Int[Tensor, " batch"] | None = None,
    ) -> dict[str, Tensor]:
        """One step of the generator, then one of the student.

        Args:
            batch_size: number of images, at least 2.
            noise, labels: from which they are made, instead of drawn ones; both or neither.

        Returns:
            The terms, the generator's and the student's loss, detached.

        Raises:
            TypeError: `labels` is not int64.
            ValueError: there are fewer than two images, or noise and labels do not fit.
        """
        noise, labels = self._drawn(batch_size, noise, labels)
        self.student.eval()
        images = self.maker.train()(noise, labels)
        with self.statistics as statistics:
            taught = self.teacher(images)
            apart = self.gamma * statistics.loss()
        found = {**self.maker_losses(taught, self.student(images), labels), "statistics": apart}
        total = torch.stack(list(found.values())).sum()
        self.maker_optimizer.zero_grad()
        total.backward()
        self.maker_optimizer.step()

        images, taught = images.detach(), taught.detach()
        if self.steps_done >= self.warmup:
            loss = self.student_loss(taught, self._observed(images), labels)
            self.student_optimizer.zero_grad()
            loss.backward()
            self.student_optimizer.step()
        else:
            with torch.no_grad():
                loss = self.student_loss(taught, self.student(images), labels)
        self.steps_done += 1
        return {name: value.detach() for name, value in {**found, "maker": total, "student": loss}.items()}

    def _drawn(self, batch_size: int, noise: Tensor | None, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        if (noise is None) != (labels is None):
            raise ValueError("noise and labels must be given together, got one of them")
        if noise is None or labels is None:
            count = integer("batch_size", batch_size, 2)
            noise = torch.randn(count, self.maker.latent, generator=self.generator)
            labels = torch.randint(self.maker.num_classes, (count,), generator=self.generator)
        class_indices("labels", labels)
        if noise.shape != (len(labels), self.maker.latent) or len(labels) < 2:
            wanted = f"of shape (batch, {self.maker.latent}) with one label each, at least two"
            raise ValueError(f"noise must be {wanted}, got {tuple(noise.shape)} and {tuple(labels.shape)}")
        device = self.maker.embed.weight.device
        return noise.to(device), labels.to(device)

    def _observed(self, images: Tensor) -> Tensor:
        """The student's logits, while its ranges follow the images."""
        ranges = [m for m in self.student.modules() if isinstance(m, MinMaxActivation)]
        for quantizer in ranges:
            quantizer.observing = True
        try:
            logits: Tensor = self.student(images)
        finally:
            for quantizer in ranges:
                quantizer.observing = False
        return logits

    def state_dict(self) -> dict[str, Any]:
        """All but the teacher, which does not change."""
        return {
            "student": self.student.state_dict(),
            "maker": self.maker.state_dict(),
            "student_optimizer": self.student_optimizer.state_dict(),
            "maker_optimizer": self.maker_optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "steps_done": self.steps_done,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state; one that does not fit changes nothing.

        Raises:
            ValueError: it is not the state of such a rule.
        """
        own = self.state_dict()
        known = isinstance(state, Mapping) and state.keys() == own.keys()
        if not known or not all(fits(state[name], own[name]) for name in ("student", "maker", "generator")):
            raise ValueError("state must be one of AdaDFQ with networks of these shapes, got another")
        steps = integer("steps_done", state["steps_done"], 0)
        before = own["student_optimizer"]
        self.student_optimizer.load_state_dict(state["student_optimizer"])  # refuses before it changes anything
        try:
            self.maker_optimizer.load_state_dict(state["maker_optimizer"])
        except (ValueError, KeyError):
            self.student_optimizer.load_state_dict(before)
            raise
        self.student.load_state_dict(state["student"])
        self.maker.load_state_dict(state["maker"])
        self.generator.set_state(state["generator"])
        self.steps_done = steps
