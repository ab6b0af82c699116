"""DEIS as a diffusers scheduler and APG as a diffusers guider: the form that diffusers' pipelines take.

Needs the extra: `pip install "trimtab[diffusers]"`. The mathematics is that of `trimtab.diffusion.deis` and
`trimtab.diffusion.apg`; here it only meets diffusers' conventions.

    from trimtab.diffusion.diffusers import APGGuider, DEISScheduler

    pipe.scheduler = DEISScheduler.from_config(pipe.scheduler.config)
    modular_pipe.update_components(guider=APGGuider.from_config(modular_pipe.scheduler.config, guidance_scale=10.0))
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.diffusion.apg import adaptive_projected_guidance, check_arguments
from trimtab.diffusion.deis import Variable, deis_coefficients
from trimtab.diffusion.prediction import Prediction, convert
from trimtab.diffusion.schedules import Discrete, Flow, NoiseSchedule, per_sample

try:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin, SchedulerOutput
except ImportError as error:
    raise ImportError('trimtab.diffusion.diffusers needs diffusers: pip install "trimtab[diffusers]"') from error

if TYPE_CHECKING:
    from diffusers.modular_pipelines.modular_pipeline import BlockState

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
Spacing = Literal["linspace", "leading", "trailing", "quadratic"]

_PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "eps",
    "sample": "x0",
    "v_prediction": "v",
    "flow_prediction": "flow",
}


class DEISScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """DEIS for diffusers' pipelines: tAB, rhoAB, or the log-rho form that diffusers' own DEIS scheduler has.

    Args:
        num_train_timesteps: number of training times.
        beta_start: beta at the first of them.
        beta_end: beta at the last.
        beta_schedule: how beta runs between: `linear`, `scaled_linear` (linear in the root) or `squaredcos_cap_v2`.
        trained_betas: the betas themselves, in place of the four before.
        prediction_type: `epsilon`, `sample` or `v_prediction`.
        solver_order: number of evaluations combined, 1 (DDIM) to 4; the paper's order plus 1.
        variable: what the polynomial is in: `t` (tAB), `rho` (rhoAB) or `log_rho`.
        timestep_spacing: `linspace`, `leading`, `trailing` (as everywhere in diffusers) or `quadratic`, the paper's.
        steps_offset: added to the times of `leading`.
        final_sigmas_type: the last step goes to the first training time (`sigma_min`) or to clean samples (`zero`).

    Raises:
        ValueError: for a setting not named here.

    Example:
        >>> scheduler = DEISScheduler(variable="t", solver_order=3)
        >>> scheduler.set_timesteps(4)
        >>> scheduler.timesteps.tolist()
        [999, 749, 500, 250]
        >>> x = torch.randn(1, 3, 8, 8)
        >>> for t in scheduler.timesteps:
        ...     x = scheduler.step(torch.zeros_like(x), t, x).prev_sample
        >>> x.shape
        torch.Size([1, 3, 8, 8])
    """

    _compatibles = [scheduler.name for scheduler in KarrasDiffusionSchedulers]  # noqa: RUF012  diffusers' own form
    order = 1
    init_noise_sigma = 1.0

    # Of the run under way: its levels and coefficients from the first step on, and the last predicted noises.
    _first: int
    _alpha: list[float]
    _sigma: list[float]
    _table: list[list[float]]
    _noises: deque[Tensor]
    _step_index: int | None

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: BetaSchedule = "linear",
        trained_betas: list[float] | None = None,
        prediction_type: str = "epsilon",
        solver_order: int = 4,
        variable: Variable = "t",
        timestep_spacing: Spacing = "linspace",
        steps_offset: int = 0,
        final_sigmas_type: Literal["sigma_min", "zero"] = "sigma_min",
    ) -> None:
        if prediction_type not in ("epsilon", "sample", "v_prediction"):
            raise ValueError(f"prediction_type must be epsilon, sample or v_prediction, got {prediction_type!r}")
        if solver_order not in (1, 2, 3, 4):
            raise ValueError(f"solver_order must be 1, 2, 3 or 4, got {solver_order}")
        if variable not in ("t", "rho", "log_rho"):
            raise ValueError(f"variable must be t, rho or log_rho, got {variable!r}")
        if final_sigmas_type not in ("sigma_min", "zero"):
            raise ValueError(f"final_sigmas_type must be sigma_min or zero, got {final_sigmas_type!r}")
        betas = _betas(num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas)
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)
        self._begin_index: int | None = None
        self._clear()

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    @property
    def step_index(self) -> int | None:
        """The index of the next step within `timesteps`."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The index of the first step, where a pipeline starts in the middle (image to image)."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this index of `timesteps`."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Lay out the steps of a run.

        Args:
            num_inference_steps: number of steps.
            device: where `timesteps` is put.
            timesteps: falling integer times, in place of the number.

        Raises:
            ValueError: if neither or both are given, or times repeat (as they do for too many steps).
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("give exactly one of num_inference_steps and timesteps")
        if timesteps is not None:
            chosen = torch.tensor(timesteps, dtype=torch.long)
        else:
            chosen = self._spaced(int(num_inference_steps or 0))
        # The level after the last step: the first training time, or time -1 of a schedule that begins clean.
        last = 0 if self.config.final_sigmas_type == "sigma_min" else -1
        ladder = torch.cat([chosen, torch.tensor([last])])
        if len(chosen) < 1 or int(chosen[0]) >= len(self) or bool((ladder.diff() >= 0).any()):
            raise ValueError(
                f"num_inference_steps or timesteps must give falling times between {len(self) - 1} and {last + 1}, "
                f"got {len(chosen)} from {chosen[:1].tolist()} to {chosen[-1:].tolist()}"
            )
        self._ladder, self.num_inference_steps = ladder, len(chosen)
        self.timesteps = chosen.to(device)
        self._begin_index = None
        self._clear()

    def _spaced(self, steps: int) -> Tensor:
        if steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {steps}")
        total, spacing = len(self), self.config.timestep_spacing
        if spacing == "linspace":
            times = torch.linspace(0, total - 1, steps + 1, dtype=torch.float64).round().flip(0)[:-1]
        elif spacing == "leading":
            times = torch.arange(steps, 0, -1) * (total // (steps + 1)) + self.config.steps_offset
        elif spacing == "trailing":
            times = (total - torch.arange(steps, dtype=torch.float64) * (total / steps)).round() - 1
        elif spacing == "quadratic":
            times = (torch.linspace(0, math.sqrt(total - 1), steps + 1, dtype=torch.float64) ** 2).round().flip(0)[:-1]
        else:
            raise ValueError(f"timestep_spacing must be linspace, leading, trailing or quadratic, got {spacing!r}")
        return times.long()

    def scale_model_input(self, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The sample itself: this schedule preserves variance."""
        return sample

    def add_noise(
        self, original_samples: Float[Tensor, "batch ..."], noise: Tensor, timesteps: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch ..."]:
        """Samples noised to the given training times."""
        alpha2 = self.alphas_cumprod.to(original_samples.device)[timesteps.to(original_samples.device)]
        alpha, sigma = alpha2.sqrt().to(original_samples.dtype), (1 - alpha2).sqrt().to(original_samples.dtype)
        return per_sample(alpha, noise) * original_samples + per_sample(sigma, noise) * noise

    def step(
        self,
        model_output: Float[Tensor, "batch ..."],
        timestep: int | Tensor,
        sample: Float[Tensor, "batch ..."],
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """One step of the run laid out by `set_timesteps`; deterministic, `generator` is not used.

        Raises:
            ValueError: before `set_timesteps`, after the last step, or for shapes that differ.
        """
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step")
        if model_output.shape != sample.shape:
            raise ValueError(
                f"model_output must have the shape of sample, {tuple(sample.shape)}, got {tuple(model_output.shape)}"
            )
        if self._step_index is None:
            self._step_index = self._start(timestep)
        index = self._step_index - self._first
        if index >= len(self._table):
            raise ValueError(f"step was called after the last of {self.num_inference_steps} steps; call set_timesteps")
        kind = _PREDICTIONS[self.config.prediction_type]
        self._noises.appendleft(convert(model_output, sample, self._alpha[index], self._sigma[index], kind, "eps"))
        psi, *weights = self._table[index]
        out = sample * psi
        for weight, noise in zip(weights, self._noises, strict=False):
            out.add_(noise, alpha=weight)
        self._step_index += 1
        return SchedulerOutput(prev_sample=out) if return_dict else (out,)

    def _start(self, timestep: int | Tensor) -> int:
        """Find the first step and work out the coefficients from there on; the only look at a tensor's value."""
        if self._begin_index is not None:
            self._first = self._begin_index
        else:
            found = (self._ladder[:-1] == int(timestep)).nonzero()
            if len(found) == 0:
                raise ValueError(f"timestep must be one of timesteps, got {int(timestep)}")
            self._first = int(found[0])
        # Times are shifted by one: a clean level before the first training time is then time 0.
        clean = torch.ones(1, dtype=torch.float64) - 1e-12
        schedule = Discrete(torch.cat([clean, self.alphas_cumprod]))
        times = self._ladder[self._first :].double() + 1
        self._alpha, self._sigma = schedule.alpha(times).tolist(), schedule.sigma(times).tolist()
        self._table = deis_coefficients(schedule, times, self.config.solver_order - 1, self.config.variable).tolist()
        self._noises = deque(maxlen=self.config.solver_order)
        return self._first

    def _clear(self) -> None:
        self._step_index = None


class APGGuider(BaseGuidance):  # type: ignore[misc]
    """APG for diffusers' modular pipelines, on denoised predictions as in the paper.

    diffusers' own guider applies the rule to what the network puts out, usually noise; the paper applies it to x0. For
    that the noisy sample is needed too: it is read from the network's input by a hook that lives for one evaluation.

    Args:
        guidance_scale: w; 1 switches guidance off.
        eta: share of the part along the conditional prediction.
        momentum: beta.
        norm_threshold: r; None for no limit.
        prediction_type: `epsilon`, `sample`, `v_prediction` or `flow_prediction`.
        num_train_timesteps: number of training times; for `flow_prediction`, the time at which all is noise.
        beta_start: beta at the first of them; these five as in the pipeline's scheduler, whose config gives them:
            `APGGuider.from_config(pipe.scheduler.config, guidance_scale=10.0)`.
        beta_end: beta at the last.
        beta_schedule: `linear`, `scaled_linear` or `squaredcos_cap_v2`.
        trained_betas: the betas themselves.
        start: share of the run after which guidance starts.
        stop: share after which it stops.
        enabled: False leaves the conditional prediction.

    Raises:
        ValueError: for arguments out of range.
    """

    _input_predictions = ["pred_cond", "pred_uncond"]  # noqa: RUF012  diffusers' own form

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        guidance_scale: float = 7.5,
        eta: float = 0.0,
        momentum: float = -0.75,
        norm_threshold: float | None = 15.0,
        prediction_type: str = "epsilon",
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: BetaSchedule = "linear",
        trained_betas: list[float] | None = None,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        super().__init__(start, stop, enabled)
        check_arguments(guidance_scale, eta, momentum, norm_threshold)
        if prediction_type not in _PREDICTIONS:
            raise ValueError(f"prediction_type must be one of {', '.join(_PREDICTIONS)}, got {prediction_type!r}")
        self.guidance_scale, self.eta, self.momentum = guidance_scale, eta, momentum
        self.norm_threshold = norm_threshold
        self._schedule: NoiseSchedule
        if prediction_type == "flow_prediction":
            self._schedule = Flow()
        else:
            betas = _betas(num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas)
            self._schedule = Discrete(torch.cumprod(1 - betas, dim=0))
        self._running: Tensor | None = None
        self._sample: Tensor | None = None
        self._hook: Any = None

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        super().prepare_models(denoiser)
        if self._active:
            self._hook = denoiser.register_forward_pre_hook(self._read_sample, with_kwargs=True)

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _read_sample(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = [kwargs[name] for name in ("sample", "hidden_states") if name in kwargs]
        self._sample = args[0] if args else named[0]

    def prepare_inputs(self, data: dict[str, tuple[Any, Any]]) -> list[BlockState]:
        self._begin()
        return [
            self._prepare_batch(data, index, name)
            for index, name in enumerate(self._input_predictions[: self.num_conditions])
        ]

    def prepare_inputs_from_block_state(
        self, data: BlockState, input_fields: dict[str, str | tuple[str, str]]
    ) -> list[BlockState]:
        self._begin()
        return [
            self._prepare_batch_from_block_state(input_fields, data, index, name)
            for index, name in enumerate(self._input_predictions[: self.num_conditions])
        ]

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        """The guided prediction, of the network's own kind."""
        if not self._active or pred_uncond is None:
            return GuiderOutput(pred=pred_cond, pred_cond=pred_cond, pred_uncond=pred_uncond)
        if self._sample is None:
            raise ValueError("the network's input was not seen: call prepare_models(network) before evaluating it")
        x, kind = self._sample, _PREDICTIONS[self.config.prediction_type]
        t = torch.as_tensor(self._timestep, dtype=torch.float32, device=x.device)
        if kind == "flow":
            t = t / self.config.num_train_timesteps
        alpha, sigma = self._schedule.alpha(t).to(x.dtype), self._schedule.sigma(t).to(x.dtype)
        guided, running = adaptive_projected_guidance(
            convert(pred_cond, x, alpha, sigma, kind, "x0"),
            convert(pred_uncond, x, alpha, sigma, kind, "x0"),
            self.guidance_scale,
            eta=self.eta,
            norm_threshold=self.norm_threshold,
            momentum=self.momentum,
            previous=self._running,
        )
        self._running = running if self.momentum else None
        pred = convert(guided, x, alpha, sigma, "x0", kind)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    @property
    def is_conditional(self) -> bool:
        """Whether the evaluation under way is the one with the condition."""
        return bool(self._count_prepared == 1)

    @property
    def num_conditions(self) -> int:
        """Evaluations that this step needs."""
        return 2 if self._active else 1

    @property
    def _active(self) -> bool:
        if not self._enabled or self.guidance_scale == 1:
            return False
        if self._num_inference_steps is None:
            return True
        first, last = (int(share * self._num_inference_steps) for share in (self._start, self._stop))
        return bool(first <= self._step < last)

    def _begin(self) -> None:
        """A run starts at step 0, and with it the momentum."""
        self._sample = None
        if self._step == 0:
            self._running = None


def _betas(
    num_train_timesteps: int, beta_start: float, beta_end: float, beta_schedule: str, trained_betas: list[float] | None
) -> Tensor:
    """The betas of diffusers' usual settings, in float64."""
    if trained_betas is not None:
        return torch.as_tensor(trained_betas, dtype=torch.float64)
    if beta_schedule == "linear":
        return torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
    if beta_schedule == "scaled_linear":
        return torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64) ** 2
    if beta_schedule == "squaredcos_cap_v2":
        time = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
        alpha2 = torch.cos((time + 0.008) / 1.008 * (math.pi / 2)) ** 2
        return (1 - alpha2[1:] / alpha2[:-1]).clamp(max=0.999)
    raise ValueError(f"beta_schedule must be linear, scaled_linear or squaredcos_cap_v2, got {beta_schedule!r}")
