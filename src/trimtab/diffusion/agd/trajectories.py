"""What adapters learn from: the steps of guided sampling, recorded, and the error to them."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.diffusion.denoiser import DenoiserLike
from trimtab.diffusion.guidance import Guidance, classifier_free_guidance
from trimtab.diffusion.scale_conditioning import per_sample_scale
from trimtab.diffusion.schedules import per_sample
from trimtab.ops.arguments import real_problem


class GuidedTrajectories(NamedTuple):
    """Steps of guided sampling, in any order.

    Attributes:
        x: states, shape `(steps, ...)`.
        t: their times.
        cond: their conditions.
        scale: the guidance scale of their trajectory.
        guided: what guidance said there, of the model's kind of prediction.
    """

    x: Float[Tensor, "steps ..."]
    t: Float[Tensor, " steps"]
    cond: Int[Tensor, " steps"]
    scale: Float[Tensor, " steps"]
    guided: Float[Tensor, "steps ..."]

    def rows(self, index: Tensor) -> GuidedTrajectories:
        """Some of the steps, such as a batch."""
        return GuidedTrajectories(*(part[index] for part in self))

    @classmethod
    def joined(cls, parts: Sequence[GuidedTrajectories]) -> GuidedTrajectories:
        """The steps of several runs."""
        return cls(*(torch.cat(part) for part in zip(*parts, strict=True)))


class TrajectoryRecorder(Guidance):
    """Classifier-free guidance at a scale per sample that remembers where it was and what it said.

    It goes into any sampler; `trajectories()` then has the steps of the last run.

    Args:
        denoiser: called `denoiser(x, t, cond)`.
        cond: a condition per sample.
        scale: one number, or one per sample; the authors draw them from 1 to 6.
        uncond: the condition guided away from.

    Raises:
        TypeError: `scale` is neither a number nor a tensor.
        ValueError: `scale` is not finite.

    Example:
        >>> from trimtab.diffusion import AnalyticGMM, VPLinear, ddim, grids
        >>> exact = AnalyticGMM.isotropic(torch.eye(2), 0.1, labels=torch.arange(2)).denoiser(VPLinear())
        >>> recorder = TrajectoryRecorder(exact, torch.tensor([0, 1, 0]), scale=1 + 5 * torch.rand(3))
        >>> _ = ddim(recorder, exact.schedule.prior(3, 2), grids.power(exact.schedule, 10))
        >>> recorder.trajectories().x.shape
        torch.Size([30, 2])
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        cond: Int[Tensor, " batch"],
        scale: Float[Tensor, " batch"] | float,
        uncond: Any = None,
    ) -> None:
        super().__init__(denoiser, cond, uncond)
        if not isinstance(scale, Tensor | numbers.Real) or isinstance(scale, bool):
            raise TypeError(f"scale must be a number or a tensor, got {type(scale).__name__}")
        if not bool(torch.isfinite(torch.as_tensor(scale)).all()):
            raise ValueError(f"scale must be finite, got {scale}")
        self.scale = scale
        self._steps: list[GuidedTrajectories] = []

    def __call__(self, x: Tensor, t: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
        if problem := real_problem(x=x, t=t):
            raise TypeError(problem)
        scale = per_sample_scale(self.scale, x)
        cond, uncond = self.conditional(x, t), self.unconditional(x, t)
        guided: Tensor = classifier_free_guidance(cond, uncond, per_sample(scale, x))  # type: ignore[arg-type]
        self._steps.append(GuidedTrajectories(x.detach().clone(), t.clone(), self.cond, scale, guided.detach()))
        return guided

    def reset(self) -> None:
        """Forget the last run."""
        self._steps = []
        super().reset()

    def trajectories(self) -> GuidedTrajectories:
        """All steps of the last run.

        Raises:
            ValueError: there was none.
        """
        if not self._steps:
            raise ValueError("trajectories must be recorded by a sampler before they are asked for, got none")
        return GuidedTrajectories.joined(self._steps)


def trajectory_loss(
    student: DenoiserLike, steps: GuidedTrajectories, weight: Float[Tensor, " steps"] | None = None
) -> Tensor:
    """The squared error of a student's prediction to what guidance said, a mean over numbers and steps.

    Args:
        student: called `student(x, t, cond, scale)`, of the recorded model's kind of prediction.
        steps: a batch of recorded steps.
        weight: per step; one where None, as in the paper, whose models predict noise. `EDMPreconditioned.weight(t)` for
            a preconditioned model, which makes it the error of the network's own output as well.

    Raises:
        ValueError: `weight` is not one per step.

    Example:
        >>> from trimtab.diffusion import Denoiser, VPLinear
        >>> student = Denoiser(lambda x, t, cond, scale: x, VPLinear())
        >>> x, one = torch.ones(4, 2), torch.ones(4)
        >>> steps = GuidedTrajectories(x, one, one.long(), one, torch.zeros(4, 2))
        >>> trajectory_loss(student, steps)
        tensor(1.)
    """
    if weight is not None and weight.shape != steps.t.shape:
        raise ValueError(f"weight must have shape {tuple(steps.t.shape)}, one per step, got {tuple(weight.shape)}")
    said: Any = student(steps.x, steps.t, steps.cond, steps.scale)
    error = (said - steps.guided).square().flatten(1).mean(1)
    mean: Tensor = (error if weight is None else weight * error).mean()
    return mean
