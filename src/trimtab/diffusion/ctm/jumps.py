"""The network that jumps between noise levels, and sampling with it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.diffusion.denoiser import StepCallback, after_step, model_times, start
from trimtab.diffusion.preconditioning import EDMPreconditioned
from trimtab.diffusion.prediction import Prediction
from trimtab.diffusion.schedules import EDM, NoiseSchedule, per_sample
from trimtab.ops.arguments import in_range, real_problem


class Jumps(Protocol):
    """What sampling asks of a trajectory model: a denoiser that also jumps."""

    @property
    def schedule(self) -> NoiseSchedule: ...

    @property
    def prediction(self) -> Prediction: ...

    def __call__(self, x: Tensor, t: Tensor, /, *args: Any, **kwargs: Any) -> Tensor: ...

    def jump(self, x: Tensor, t: Tensor, s: Tensor, cond: Any = None) -> Tensor: ...


class CTMPreconditioned(EDMPreconditioned):
    """A network as a trajectory model: a denoiser, called `(x, t, cond)`, that can also `jump` to any lower level.

    Args:
        net: called `net(c_in x, c_noise, cond, extra)`, where `extra`, of shape `(batch, 1)`, is the level aimed at, as
            log(s) / 4, like c_noise.
        sigma_data: standard deviation of the data.
        schedule: the range of noise levels.

    Raises:
        TypeError: `net` is no module or `schedule` is not `EDM`.
        ValueError: `sigma_data` is not positive.

    Example:
        >>> from trimtab.nets import DenoisingMLP
        >>> model = CTMPreconditioned(DenoisingMLP(2, hidden=16, conditions=1))
        >>> x, t = torch.randn(4, 2), torch.full((4,), 5.0)
        >>> torch.equal(model.jump(x, t, t), x)
        True
    """

    def forward(
        self, x: Float[Tensor, "batch ..."], t: Float[Tensor, " batch"], /, cond: Any = None
    ) -> Float[Tensor, "batch ..."]:
        """The clean prediction, g(x, t, t)."""
        return self.towards(x, t, t, cond)

    def towards(
        self, x: Float[Tensor, "batch ..."], t: Float[Tensor, " batch"], s: Float[Tensor, " batch"], cond: Any = None
    ) -> Float[Tensor, "batch ..."]:
        """The point that the jump from `t` to `s` heads for, g(x, t, s); below the least noise all `s` are alike."""
        if problem := real_problem(t=t, s=s):
            raise TypeError(problem)
        aim = s.clamp_min(self.schedule.t_min).log() / 4
        return super().forward(x, t, cond, aim[:, None])

    def jump(
        self, x: Float[Tensor, "batch ..."], t: Float[Tensor, " batch"], s: Float[Tensor, " batch"], cond: Any = None
    ) -> Float[Tensor, "batch ..."]:
        """The state at noise levels `s`, at most `t`, of the trajectory through `x` at `t`."""
        if problem := real_problem(t=t, s=s):
            raise TypeError(problem)
        kept = per_sample(s / t, x)
        return kept * x + (1 - kept) * self.towards(x, t, s, cond)


@torch.no_grad()
def gamma_sampling(
    model: Jumps,
    x: Float[Tensor, "batch ..."],
    times: Float[Tensor, " steps+1"],
    cond: Any = None,
    *,
    gamma: float = 0.0,
    generator: torch.Generator | None = None,
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch ..."]:
    r"""Sample by jumps that go below each time by a share, from where noise leads back up to it.

    The jump goes to $\tilde s = \sqrt{1 - \gamma^2}\,(t_{i+1} - t_N) + t_N$, and noise of variance
    $t_{i+1}^2 - \tilde s^2$ follows. The last jump is to the last time.

    Args:
        model: a trajectory model on the EDM schedule; one evaluation a step.
        x: noise at `times[0]`.
        times: falling times, such as `grids.karras(model.schedule, 4)`.
        cond: the condition.
        gamma: 0 is deterministic, and best in several steps; 1 is the sampling of consistency models.
        generator: decides the noise.
        callback: called after every step as `callback(step, time, x)`; a tensor that it returns replaces x.

    Returns:
        The sample at `times[-1]`.

    Raises:
        TypeError: the model has no `jump`, or its schedule is not `EDM`.
        ValueError: for a `gamma` outside [0, 1] or times that do not fall.

    Example:
        >>> from trimtab.diffusion import grids
        >>> from trimtab.nets import DenoisingMLP
        >>> model = CTMPreconditioned(DenoisingMLP(2, hidden=16, conditions=1))
        >>> gamma_sampling(model, model.schedule.prior(4, 2), grids.karras(model.schedule, 2)).shape
        torch.Size([4, 2])
    """
    in_range("gamma", gamma, 0, 1)
    if not callable(getattr(model, "jump", None)):
        raise TypeError(f"model must have a jump(x, t, s, cond), as CTMPreconditioned has, got {type(model).__name__}")
    if not isinstance(model.schedule, EDM):
        raise TypeError(f"model must be on the EDM schedule, got {type(model.schedule).__name__}")
    times = start(model, x, times)
    t, end = model_times(times, x), times[-1].item()
    for i, after in enumerate(times[1:].tolist()):
        low = (1 - gamma**2) ** 0.5 * (after - end) + end
        x = model.jump(x, t[i], torch.full_like(t[i], low), cond)
        added = max(after**2 - low**2, 0.0) ** 0.5
        if added:
            x = x + added * torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        x = after_step(callback, i, after, x)
    return x
