"""Training: a teacher's solver, soft consistency, and the balance of its companions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.diffusion import grids
from trimtab.diffusion.adversarial import Scores, generator_score, hinge_discriminator_loss
from trimtab.diffusion.ctm.jumps import CTMPreconditioned, Jumps
from trimtab.diffusion.denoiser import DenoiserLike
from trimtab.diffusion.schedules import per_sample
from trimtab.diffusion.training import denoising_loss, lognormal_levels
from trimtab.ops.arguments import in_range, integer, real_problem
from trimtab.ops.averaging import frozen_copy, move_average
from trimtab.ops.states import fits

Distance = Callable[[Tensor, Tensor], Tensor]
"""Maps two batches to a distance per sample."""


@torch.no_grad()
def heun_path(
    teacher: DenoiserLike,
    x: Float[Tensor, "batch ..."],
    times: Float[Tensor, "steps+1 batch"],
    cond: Any = None,
) -> Float[Tensor, "batch ..."]:
    """Where the ODE of a teacher on the EDM schedule leads, by Heun's method; every sample has its own times.

    Args:
        teacher: called `teacher(x, t, cond)` (without `cond` where that is None), predicting clean samples.
        x: states at `times[0]`.
        times: falling, per sample.
        cond: the condition.

    Raises:
        TypeError: `x` or `times` are a NumPy array or complex.
        ValueError: `times` are not one column per sample.

    Example:
        >>> from trimtab.diffusion import AnalyticGMM, EDM
        >>> point = AnalyticGMM.isotropic(torch.zeros(1, 1), std=0.0).denoiser(EDM())
        >>> heun_path(point, torch.tensor([[3.0], [8.0]]), torch.tensor([[3.0, 4.0], [1.0, 1.0]]))  # a straight line
        tensor([[1.],
                [2.]])
    """
    if problem := real_problem(x=x, times=times):
        raise TypeError(problem)
    if not isinstance(times, Tensor) or times.ndim != 2 or times.shape[1] != len(x):
        raise ValueError(f"times must have shape (steps + 1, {len(x)}), got {getattr(times, 'shape', type(times))}")
    for before, after in itertools.pairwise(times):
        step = per_sample(after - before, x)
        slope = (x - _clean(teacher, x, before, cond)) / per_sample(before, x)
        ahead = x + step * slope
        x = x + step / 2 * (slope + (ahead - _clean(teacher, ahead, after, cond)) / per_sample(after, x))
    return x


def soft_consistency(
    student: Jumps,
    target: Jumps,
    x_t: Float[Tensor, "batch ..."],
    x_u: Float[Tensor, "batch ..."],
    t: Float[Tensor, " batch"],
    u: Float[Tensor, " batch"],
    s: Float[Tensor, " batch"],
    end: float,
    cond: Any = None,
) -> tuple[Float[Tensor, "batch ..."], Float[Tensor, "batch ..."]]:
    """The two ends that should be one: of the student's jump from t to s, and of the target's from u to s.

    From s both go on to the end by the target. Gradients reach the student through what that second jump starts from.

    Args:
        student: the model in training.
        target: its moving average, whose weights take no gradients.
        x_t: states at `t`.
        x_u: states at `u` of the same trajectories.
        t, u, s: falling noise levels per sample; `s` may be `u`.
        end: the least noise level.
        cond: the condition.

    Returns:
        The estimate, and the target, which is without gradient.
    """
    last = torch.full_like(s, end)
    estimate = target.jump(student.jump(x_t, t, s, cond), s, last, cond)
    with torch.no_grad():
        wanted = target.jump(target.jump(x_u, u, s, cond), s, last, cond)
    return estimate, wanted


def adaptive_weight(loss: Tensor, other: Tensor, parameter: Tensor, low: float = 0.0, high: float = 1e4) -> Tensor:
    """How much `other` has to be weighted for its gradient at a parameter to be as long as that of `loss`.

    Args:
        loss, other: scalars that depend on the parameter; their graphs are kept.
        parameter: the weights of the network's last layer.
        low, high: bounds of the result.

    Returns:
        A scalar without gradient.

    Example:
        >>> p = torch.ones(2, requires_grad=True)
        >>> adaptive_weight(6 * p.sum(), 2 * p.sum(), p).round(decimals=2)
        tensor(3.)
    """
    if problem := real_problem(loss=loss, other=other, parameter=parameter):
        raise TypeError(problem)
    if not math.isfinite(low):
        raise ValueError(f"low must be finite, got {low}")
    if not high >= low:
        raise ValueError(f"high must be at least low, {low}, got {high}")
    lengths = [torch.autograd.grad(value, parameter, retain_graph=True)[0].norm() for value in (loss, other)]
    weight: Tensor = (lengths[0] / (lengths[1] + 1e-4)).clamp(low, high).detach()
    return weight


class _Draw(NamedTuple):
    """What a batch is trained with: its noise, and falling levels from t over the solver's to u, then s."""

    noise: Tensor
    path: Tensor
    s: Tensor


class CTM:
    """Consistency trajectory training, for a loop of your own: `losses(x0, cond)`, then `update_target()`.

    Args:
        student: best started from the teacher's weights.
        teacher: called `teacher(x, t, cond)`, without `cond` where that is None; without a teacher the target model
            itself jumps from t to u.
        levels: noise levels of the grid; the paper's 18 are for CIFAR-10, 40 for ImageNet.
        max_steps: the most Heun steps from t to u, drawn per batch from 1 up; None allows any number.
        decay: of the target's moving average.
        last_layer: the weights at which gradients are balanced; None weighs all losses by one.
        distance: per sample; None is the mean squared error.
        discriminator: maps clean samples to scores, of one head or several; it is trained on `discriminator_loss`.
        adversarial_from: steps before it takes part.
        to_end_only: learn jumps to the end alone, which is consistency distillation.
        generator: decides noises and levels.

    Attributes:
        student: the network in training.
        target: its moving average, which is also what to sample with.

    Raises:
        TypeError: `student` is no `CTMPreconditioned`.
        ValueError: a number is out of its range.

    Example:
        >>> from trimtab.diffusion import AnalyticGMM, EDM
        >>> from trimtab.nets import DenoisingMLP
        >>> data = AnalyticGMM.ring(8)
        >>> net = DenoisingMLP(2, hidden=16, conditions=1)
        >>> rule = CTM(CTMPreconditioned(net), data.denoiser(EDM()), last_layer=net.outward.weight)
        >>> optimizer = torch.optim.RAdam(net.parameters(), lr=1e-3)
        >>> losses = rule.losses(data.sample(32))
        >>> losses["total"].backward(); optimizer.step(); rule.update_target()
        >>> sorted(losses)
        ['consistency', 'denoising', 'total']
    """

    def __init__(
        self,
        student: CTMPreconditioned,
        teacher: DenoiserLike | None = None,
        *,
        levels: int = 18,
        max_steps: int | None = None,
        decay: float = 0.999,
        last_layer: Tensor | None = None,
        distance: Distance | None = None,
        discriminator: Callable[[Tensor], Scores] | None = None,
        adversarial_from: int = 0,
        to_end_only: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(student, CTMPreconditioned):
            raise TypeError(f"student must be a CTMPreconditioned, got {type(student).__name__}")
        self.times = grids.karras(student.schedule, integer("levels", levels, 2) - 1)
        self.max_steps = levels - 1 if max_steps is None else integer("max_steps", max_steps, 1, levels - 1)
        self.decay = in_range("decay", decay, 0, 1)
        self.adversarial_from = integer("adversarial_from", adversarial_from, 0)
        self.student, self.target, self.teacher = student, frozen_copy(student), teacher
        self.last_layer, self.distance, self.discriminator = last_layer, distance or _mean_squared, discriminator
        self.to_end_only, self.generator, self.step = to_end_only, generator, 0

    def losses(self, x0: Float[Tensor, "batch ..."], cond: Any = None) -> dict[str, Tensor]:
        """The losses of a batch: `total`, and its parts `consistency`, `denoising` and (with one) `adversarial`.

        Args:
            x0: clean samples.
            cond: their conditions.

        Raises:
            TypeError: `x0` is no floating-point tensor.
            ValueError: there is no sample.
        """
        estimate, wanted = self._pair(x0, cond)
        consistency = self.distance(estimate, wanted).mean()
        t = lognormal_levels(len(x0), generator=self.generator).to(x0)
        noise = torch.randn(x0.shape, generator=self.generator, dtype=x0.dtype).to(x0.device)
        denoising = denoising_loss(self.student, x0, t, noise, cond, weight=self.student.weight(t))
        found = {"consistency": consistency, "denoising": denoising}
        total = consistency + self._balance(consistency, denoising, 0.0, 1e4) * denoising
        if self.discriminator is not None and self.step >= self.adversarial_from:
            found["adversarial"] = generator_score(self.discriminator(estimate))
            total = total + self._balance(consistency, found["adversarial"], 0.01, 10.0) * found["adversarial"]
        return {"total": total, **found}

    def discriminator_loss(self, x0: Float[Tensor, "batch ..."], cond: Any = None) -> Tensor:
        """The hinge loss of the discriminator between clean samples and estimates; the student gets no gradients.

        Raises:
            ValueError: there is no discriminator.
        """
        if self.discriminator is None:
            raise ValueError("discriminator must be given to train it, got None")
        with torch.no_grad():
            estimate, _ = self._pair(x0, cond)
        return hinge_discriminator_loss(self.discriminator(x0), self.discriminator(estimate))

    def update_target(self) -> None:
        """Move the target towards the student; once per step of the optimizer."""
        move_average(self.target, self.student, self.decay)
        self.step += 1

    def _pair(self, x0: Tensor, cond: Any) -> tuple[Tensor, Tensor]:
        if not isinstance(x0, Tensor):
            raise TypeError(f"x0 must be a tensor, got {type(x0).__name__}")
        if not x0.is_floating_point():
            raise TypeError(f"x0 must be floating point, got {x0.dtype}")
        if len(x0) == 0:
            raise ValueError("x0 must have at least one sample, got none")
        noise, path, s = self._draw(x0)
        x_t = x0 + per_sample(path[0], x0) * noise
        if self.teacher is not None:
            x_u = heun_path(self.teacher, x_t, path, cond)
        else:
            with torch.no_grad():
                x_u = self.target.jump(x_t, path[0], path[-1], cond)
        end = float(self.times[-1])
        return soft_consistency(self.student, self.target, x_t, x_u, path[0], path[-1], s, end, cond)

    def _draw(self, x0: Tensor) -> _Draw:
        count, last = len(x0), len(self.times) - 1
        steps = int(torch.randint(1, self.max_steps + 1, (), generator=self.generator))
        first = torch.randint(last + 1 - steps, (count,), generator=self.generator)
        path = first + torch.arange(steps + 1)[:, None]
        below = torch.rand(count, generator=self.generator) * (last + 1 - path[-1])
        s = torch.full_like(first, last) if self.to_end_only else path[-1] + below.long().clamp_max(last - path[-1])
        noise = torch.randn(x0.shape, generator=self.generator, dtype=x0.dtype)
        times = self.times.to(x0.dtype)
        return _Draw(noise.to(x0.device), times[path].to(x0.device), times[s].to(x0.device))

    def _balance(self, loss: Tensor, other: Tensor, low: float, high: float) -> Tensor | float:
        return 1.0 if self.last_layer is None else adaptive_weight(loss, other, self.last_layer, low, high)

    def state_dict(self) -> dict[str, Any]:
        """Student, target, number of steps and the generator's state."""
        return {
            "student": self.student.state_dict(),
            "target": self.target.state_dict(),
            "step": self.step,
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
        self.target.load_state_dict(state["target"])
        self.step = state["step"]
        if self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"])


def _mean_squared(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().flatten(1).mean(1)


def _clean(teacher: DenoiserLike, x: Tensor, t: Tensor, cond: Any) -> Tensor:
    said: Any = teacher(x, t) if cond is None else teacher(x, t, cond)
    found: Tensor = said
    return found
