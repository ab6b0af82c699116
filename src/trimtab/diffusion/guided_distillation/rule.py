"""The two stages as one rule, for a training loop of the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.diffusion.denoiser import DenoiserLike
from trimtab.diffusion.guided_distillation.objectives import guidance_matching_loss, progressive_loss
from trimtab.ops.arguments import number, real_problem
from trimtab.ops.averaging import frozen_copy
from trimtab.ops.states import fits


class _Draw(NamedTuple):
    """What a batch is trained with."""

    noise: Tensor
    scale: Tensor
    t: Tensor
    middle: Tensor
    end: Tensor


class GuidedDistillation:
    """The two stages as one rule for a training loop of your own: `loss(x0, cond)`, and `halve()` between stages.

    Args:
        student: called `student(z, t, cond, scale)`, best started from the conditional teacher: a preconditioned
            `ScaleConditioned` copy of it.
        teacher: called `teacher(z, t, cond)`.
        times: falling times of as many steps as the teacher of the first halving makes. Stage one trains between them,
            uniformly along the grid.
        scales: range that guidance scales are drawn from; the paper's [0, 4] is (1, 5) here.
        uncond: the condition that the teacher is guided away from.
        generator: decides noises, scales and times.

    Attributes:
        student: the network in training.
        teacher: of the present stage.
        times: where the present teacher steps (in stage one: where the student can).
        stage: 1, and one more with each halving.

    Raises:
        TypeError: `student` is no module.
        ValueError: `times` do not fall or end without noise, or `scales` are not two rising numbers.

    Example:
        >>> import copy
        >>> from trimtab.diffusion import EDMPreconditioned, ScaleConditioned, ScaleEmbedding, grids
        >>> from trimtab.nets import DenoisingMLP
        >>> teacher = EDMPreconditioned(DenoisingMLP(2, num_classes=3, hidden=16))
        >>> net = ScaleConditioned(copy.deepcopy(teacher.net), {"noise_level": ScaleEmbedding(16)})
        >>> student = EDMPreconditioned(net)
        >>> rule = GuidedDistillation(student, teacher, grids.karras(teacher.schedule, 8))
        >>> optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
        >>> for stage in range(3):  # the guidance, then 4 steps, then 2
        ...     rule.loss(torch.randn(6, 2), torch.tensor([0, 1, 2, 0, 1, 2])).backward()
        ...     optimizer.step(); optimizer.zero_grad()
        ...     if stage < 2: rule.halve()
        >>> len(rule.sampling_times) - 1
        2
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: DenoiserLike,
        times: Float[Tensor, " steps+1"],
        *,
        scales: tuple[float, float] = (1.0, 5.0),
        uncond: Any = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(student, nn.Module):
            raise TypeError(f"student must be a torch.nn.Module, got {type(student).__name__}")
        low, high = (number("scales", scale) for scale in scales)
        if not low <= high:
            raise ValueError(f"scales must be two rising numbers, got {scales}")
        times = torch.as_tensor(times).detach().to("cpu", torch.float64)
        if times.ndim != 1 or len(times) < 2 or not bool((times.diff() < 0).all()):
            raise ValueError("times must be a 1-d tensor of at least 2 falling times, got others")
        if times[-1] < 0 or not bool(getattr(student, "schedule", teacher.schedule).sigma(times[-1:]) > 0):
            raise ValueError(f"times must end where noise is left, got {times[-1].item():g}")
        self.student: Any = student
        self.teacher: Any = teacher
        self.times = times
        self.scales, self.uncond, self.generator = (low, high), uncond, generator
        self.stage, self._every = 1, False

    @property
    def sampling_times(self) -> Tensor:
        """Falling times for a sampler of the student: for `ddim`, or after `halve(stochastic=True)` for its own."""
        return self.times if self.stage == 1 or self._every else self.times[::2]

    def halve(self, *, stochastic: bool = False) -> None:
        """Make the student the teacher of the next, which makes half of its steps and starts from its weights.

        Args:
            stochastic: prepare the student for `stochastic_ddim`: it makes the same long steps, but from all times.
                It ends the halvings.

        Raises:
            ValueError: the teacher would make an odd number of steps, or the last halving was stochastic.
        """
        if self._every:
            raise ValueError("a stochastic halving must be the last, got another after it")
        times = self.sampling_times
        if len(times) % 2 == 0:
            raise ValueError(f"times must have an even number of steps to be halved, got {len(times) - 1}")
        self.teacher = frozen_copy(self.student)
        self.times, self.stage, self._every = times, self.stage + 1, stochastic

    def loss(self, x0: Float[Tensor, "batch ..."], cond: Int[Tensor, " batch"] | Any) -> Tensor:
        """The loss of a batch at the present stage.

        Args:
            x0: clean samples.
            cond: their conditions.

        Raises:
            TypeError: `x0` is no floating-point tensor.
            ValueError: there is no sample.
        """
        if problem := real_problem(cond=cond):
            raise TypeError(problem)
        if not isinstance(x0, Tensor):
            raise TypeError(f"x0 must be a tensor, got {type(x0).__name__}")
        if not x0.is_floating_point():
            raise TypeError(f"x0 must be floating point, got {x0.dtype}")
        if len(x0) == 0:
            raise ValueError("x0 must have at least one sample, got none")
        draw = self._draw(x0)
        if self.stage == 1:
            return guidance_matching_loss(
                self.student,
                self.teacher,
                x0,
                draw.t,
                draw.noise,
                cond,
                draw.scale,
                self.uncond,
            )
        return progressive_loss(
            self.student,
            self.teacher,
            x0,
            draw.t,
            draw.middle,
            draw.end,
            draw.noise,
            cond,
            draw.scale,
        )

    def _draw(self, x0: Tensor) -> _Draw:
        count, last = len(x0), len(self.times) - 1

        def uniform() -> Tensor:
            return torch.rand(count, generator=self.generator, dtype=torch.float64)

        noise = torch.randn(x0.shape, generator=self.generator, dtype=x0.dtype).to(x0.device)
        scale = self.scales[0] + (self.scales[1] - self.scales[0]) * uniform()
        where = uniform()
        if self.stage == 1:
            place = (where * last).long()
            t = torch.lerp(self.times[place], self.times[place + 1], where * last - place)
            middle = end = t
        else:
            place = (where * last).long() if self._every else 2 * (where * (last // 2)).long()
            t, middle, end = (self.times[(place + ahead).clamp_max(last)] for ahead in range(3))
        return _Draw(noise, *(v.to(x0.device, x0.dtype) for v in (scale, t, middle, end)))

    def state_dict(self) -> dict[str, Any]:
        """Student, present teacher (after the first halving), stage, times and the generator's state."""
        return {
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict() if self.stage > 1 else None,
            "stage": self.stage,
            "times": self.times,
            "stochastic": self._every,
            "generator": None if self.generator is None else self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Read back what `state_dict` gave.

        Raises:
            ValueError: the state is of another student or another rule, or of stage one where that is past, since the
                first teacher is not in it; nothing is loaded then.
        """
        if not fits(state, {**self.state_dict(), "teacher": None, "times": None}):
            raise ValueError(
                "state must be that of a rule with the same student, and with a generator if this has one, got another"
            )
        if state["stage"] > 1 and not fits(state["teacher"], self.student.state_dict()):
            raise ValueError("state must have a teacher of the student's kind after the first stage, got another")
        if state["stage"] == 1 < self.stage:
            raise ValueError(f"state must be of a later stage than the first in a rule at stage {self.stage}, got 1")
        self.student.load_state_dict(state["student"])
        if state["stage"] > 1:
            teacher = frozen_copy(self.student)
            teacher.load_state_dict(state["teacher"])
            self.teacher = teacher
        self.stage, self.times, self._every = state["stage"], state["times"], state["stochastic"]
        if self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"])
