"""The training step: one of the generator, then one of the quantised network on the same images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.compress.adadfq.images import BNStatistics, ConditionalGenerator
from trimtab.compress.adadfq.losses import boundary_loss, difference_entropy
from trimtab.compress.fake_quant import MinMaxActivation
from trimtab.ops.arguments import class_indices, in_range, integer, non_negative, positive, real_problem
from trimtab.ops.averaging import frozen_copy
from trimtab.ops.states import fits


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
        if problem := real_problem(taught=taught, labels=labels):
            raise TypeError(problem)
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
        if problem := real_problem(taught=taught):
            raise TypeError(problem)
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
