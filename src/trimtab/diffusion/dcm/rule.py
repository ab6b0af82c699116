"""Training of either expert, for a loop of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.diffusion.adversarial import Scores, hinge_discriminator_loss, hinge_generator_loss
from trimtab.diffusion.dcm.objectives import Velocity, consistency_pair, huber, renoise, temporal_coherence_loss
from trimtab.ops.arguments import in_range, integer, non_negative, one_of
from trimtab.ops.averaging import frozen_copy, move_average
from trimtab.ops.states import fits

Stage = Literal["semantic", "detail"]
Features = Callable[[Tensor, Tensor, Any], Sequence[Tensor]]
"""Maps noisy samples, their levels and the condition to features of the frozen teacher."""

# The weight of the adversarial loss against feature matching, in the authors' release.
_ADVERSARIAL = 5.0


class DCM:
    """Consistency distillation of one expert: `losses(x0, cond)`, then `update_target()` after the optimizer's step.

    First the semantic expert, a copy of the teacher, is trained whole; then a `DualExpert` made of it with the stage
    "detail", in which only `detail_parameters()` train.

    Args:
        student: the semantic expert, or the `DualExpert`, called `(x, t, cond)`.
        teacher: the flow model, called likewise; guided or not.
        stage: "semantic": from high noise to the split; "detail": from the split to clean data.
        levels: rising noise levels of the teacher's steps, such as `shifted_levels()`.
        split: place among `levels` where the phases meet.
        decay: of the target's moving average; None takes the student itself as its target.
        temporal_weight: of the temporal coherence loss of the semantic stage; 0 leaves it out, for what has no frames.
        lag: its distance in frames.
        frames_dim: its dimension of frames.
        features: gives what discriminator and feature matching see in the detail stage, from several layers.
        discriminator: maps features to scores, of one head or several; it is trained on `discriminator_loss`.
        adversarial_weight: of both together.
        generator: decides noises and levels.

    Raises:
        TypeError: `student` is no module.
        ValueError: an unknown stage, levels that do not rise, a number out of its range, or a discriminator without
            features.

    Example:
        >>> from trimtab.diffusion import DualExpert, shifted_levels
        >>> from trimtab.nets import DenoisingMLP
        >>> teacher, levels = DenoisingMLP(8, hidden=16), shifted_levels(10, shift=3.0)
        >>> net = DenoisingMLP(8, hidden=16)
        >>> videos = torch.randn(4, 1, 4, 2)  # batch, channels, frames, pixels
        >>> DCM(net, teacher, "semantic", levels=levels, split=7, lag=1).losses(videos)["total"].backward()
        >>> both = DualExpert(net, float(levels[7]), lora=["blocks.*first"], own=["outward"])
        >>> sorted(DCM(both, teacher, "detail", levels=levels, split=7).losses(videos))
        ['consistency', 'total']
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Velocity,
        stage: Stage,
        *,
        levels: Float[Tensor, " steps+1"],
        split: int = 38,
        decay: float | None = None,
        temporal_weight: float = 1.0,
        lag: int = 3,
        frames_dim: int = 2,
        features: Features | None = None,
        discriminator: Callable[[Sequence[Tensor]], Scores] | None = None,
        adversarial_weight: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(student, nn.Module):
            raise TypeError(f"student must be a torch.nn.Module, got {type(student).__name__}")
        self.stage: Stage = one_of("stage", stage, get_args(Stage))
        self.levels = torch.as_tensor(levels).detach().to("cpu", torch.float64)
        if self.levels.ndim != 1 or not bool((self.levels.diff() > 0).all()):
            raise ValueError("levels must be a 1-d tensor of rising noise levels, got others")
        self.split = integer("split", split, 1, len(self.levels) - 2)
        self.decay = None if decay is None else in_range("decay", decay, 0, 1)
        self.temporal_weight = non_negative("temporal_weight", temporal_weight)
        self.adversarial_weight = non_negative("adversarial_weight", adversarial_weight)
        self.lag, self.frames_dim = integer("lag", lag), integer("frames_dim", frames_dim)
        if discriminator is not None and features is None:
            raise ValueError("features must be given with a discriminator, got None")
        self.student, self.teacher = student, teacher
        self.target = student if decay is None else frozen_copy(student)
        self.features, self.discriminator, self.generator = features, discriminator, generator

    def losses(self, x0: Float[Tensor, "batch ..."], cond: Any = None) -> dict[str, Tensor]:
        """The losses of a batch: `total`, and its parts.

        `consistency` always; `temporal` in the semantic stage; with features `matching`, and with a discriminator
        `adversarial`, in the detail stage.

        Args:
            x0: clean samples.
            cond: their conditions.

        Raises:
            TypeError: `x0` is no floating-point tensor.
            ValueError: there is no sample, or there are too few frames for the temporal loss.
        """
        estimate, wanted = self._pair(x0, cond)
        found = {"consistency": huber(estimate, wanted)}
        total = found["consistency"]
        if self.stage == "semantic" and self.temporal_weight:
            found["temporal"] = temporal_coherence_loss(estimate, wanted, self.lag, self.frames_dim)
            total = total + self.temporal_weight * found["temporal"]
        if self.stage == "detail" and self.features is not None:
            fake, real = self._seen(estimate, wanted, cond)
            pairs = zip(fake, real, strict=True)
            found["matching"] = torch.stack([nn.functional.mse_loss(f, r) for f, r in pairs]).mean()
            total = total + self.adversarial_weight * found["matching"]
            if self.discriminator is not None:
                found["adversarial"] = hinge_generator_loss(self.discriminator(fake))
                total = total + self.adversarial_weight * _ADVERSARIAL * found["adversarial"]
        return {"total": total, **found}

    def discriminator_loss(self, x0: Float[Tensor, "batch ..."], cond: Any = None) -> Tensor:
        """The hinge loss of the discriminator between targets and estimates; the student gets no gradients.

        Raises:
            ValueError: there is no discriminator.
        """
        if self.discriminator is None:
            raise ValueError("discriminator must be given to train it, got None")
        with torch.no_grad():
            fake, real = self._seen(*self._pair(x0, cond), cond)
        return hinge_discriminator_loss(self.discriminator(real), self.discriminator(fake))

    def update_target(self) -> None:
        """Move the target towards the student, where it is an average; once per step of the optimizer."""
        if self.decay is not None:
            move_average(self.target, self.student, self.decay)

    def _pair(self, x0: Tensor, cond: Any) -> tuple[Tensor, Tensor]:
        if not isinstance(x0, Tensor):
            raise TypeError(f"x0 must be a tensor, got {type(x0).__name__}")
        if not x0.is_floating_point():
            raise TypeError(f"x0 must be floating point, got {x0.dtype}")
        if len(x0) == 0:
            raise ValueError("x0 must have at least one sample, got none")
        if (
            self.stage == "semantic"
            and self.temporal_weight
            and (x0.ndim <= self.frames_dim or x0.shape[self.frames_dim] <= self.lag)
        ):
            raise ValueError(f"x0 must have more than {self.lag} frames, got shape {tuple(x0.shape)}")
        first, last = (self.split + 1, len(self.levels) - 1) if self.stage == "semantic" else (1, self.split)
        index = torch.randint(first, last + 1, x0.shape[:1], generator=self.generator)
        noise = torch.randn(x0.shape, generator=self.generator, dtype=x0.dtype).to(x0.device)
        return consistency_pair(self.student, self.target, self.teacher, x0, noise, index, self.levels, self._end, cond)

    @property
    def _end(self) -> float:
        return float(self.levels[self.split if self.stage == "semantic" else 0])

    def _seen(self, estimate: Tensor, wanted: Tensor, cond: Any) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Features of the estimate and of the target, with the same noise of a random level of the phase."""
        assert self.features is not None
        drawn = torch.randint(self.split, wanted.shape[:1], generator=self.generator)
        level = self.levels[drawn].to(wanted)
        noise = torch.randn(wanted.shape, generator=self.generator, dtype=wanted.dtype).to(wanted.device)
        with torch.no_grad():
            real = self.features(renoise(wanted, noise, level, self._end), level, cond)
        return self.features(renoise(estimate, noise, level, self._end), level, cond), real

    def state_dict(self) -> dict[str, Any]:
        """Student, target where it is an average, and the generator's state."""
        return {
            "student": self.student.state_dict(),
            "target": None if self.decay is None else self.target.state_dict(),
            "generator": None if self.generator is None else self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Read back what `state_dict` gave.

        Raises:
            ValueError: the state is of other networks or another rule; nothing is loaded then.
        """
        if not fits(state, self.state_dict()):
            raise ValueError(
                "state must be that of a rule with the same networks, and with a generator if this has one, got another"
            )
        self.student.load_state_dict(state["student"])
        if self.decay is not None:
            self.target.load_state_dict(state["target"])
        if self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"])
