"""DEIS as a scheduler of diffusers' pipelines."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin, SchedulerOutput
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.diffusion.deis import Variable, deis_coefficients
from trimtab.diffusion.diffusers.levels import PREDICTIONS, BetaSchedule, Spacing, betas, zero_terminal_snr
from trimtab.diffusion.prediction import convert
from trimtab.diffusion.schedules import Discrete, Flow, NoiseSchedule, per_sample
from trimtab.ops.arguments import in_range, integer, one_of, positive

# A run shorter than this ends on lower orders, as in diffusers: its last steps span most of log(sigma).
_SHORT = 15

# Settings that say how other schedulers step, not what the model was trained on: left out without a word.
_OF_OTHER_SOLVERS = {
    "algorithm_type",
    "clip_sample",
    "clip_sample_range",
    "disable_corrector",
    "euler_at_final",
    "interpolation_type",
    "lambda_min_clipped",
    "predict_x0",
    "set_alpha_to_one",
    "skip_prk_steps",
    "solver_p",
    "solver_type",
    "time_shift_type",
    "timestep_type",
    "use_lu_lambdas",
    "variance_type",
}


class DEISScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """DEIS for diffusers' pipelines: tAB, rhoAB, or the log-rho form that diffusers' own DEIS scheduler has.

    By default it is the paper's strongest form, third order in t on quadratic times. A pipeline's own config sets
    another spacing: hand over `timestep_spacing="quadratic"` beside it, `from_config(config, timestep_spacing=...)`.

    Args:
        num_train_timesteps: number of training times.
        beta_start: beta at the first of them.
        beta_end: beta at the last.
        beta_schedule: how beta runs between: `linear`, `scaled_linear` (linear in the root) or `squaredcos_cap_v2`.
        trained_betas: the betas themselves, in place of the four before.
        prediction_type: `epsilon`, `sample`, `v_prediction`, or `flow_prediction` with `use_flow_sigmas`.
        solver_order: number of evaluations combined, 1 (DDIM) to 4; the paper's order plus 1.
        variable: what the polynomial is in: `t` (tAB), `rho` (rhoAB) or `log_rho`.
        timestep_spacing: `quadratic`, the paper's; `linspace`, `leading` or `trailing` as everywhere in diffusers.
        steps_offset: added to the times of `leading`.
        final_sigmas_type: the last step goes to the first training time (`sigma_min`) or to clean samples (`zero`).
        lower_order_final: in runs of fewer than 15 steps lower the order towards the end, down to 1 in the last step;
            when that goes to clean samples, give it order 1 in any run. Without it, evenly spaced times lose much.
        thresholding: clip each predicted clean sample to its own quantile (Saharia et al., 2022, arXiv 2205.11487).
        dynamic_thresholding_ratio: that quantile of its absolute values.
        sample_max_value: the largest value that it may reach.
        rescale_betas_zero_snr: the model was trained with pure noise at the last time.
        use_karras_sigmas: noise levels of Karras et al. in place of `timestep_spacing`.
        use_exponential_sigmas: evenly spaced logarithms of the noise levels.
        use_beta_sigmas: noise levels by the quantiles of a beta distribution (arXiv 2407.12173); needs SciPy.
        use_flow_sigmas: the straight paths of flow matching, with times `num_train_timesteps * sigma`.
        flow_shift: how far these are moved towards noise, positive.

    Raises:
        ValueError: for a setting not named here, or two of the `use_…_sigmas` at once.

    Example:
        >>> scheduler = DEISScheduler(solver_order=3)
        >>> scheduler.set_timesteps(4)
        >>> scheduler.timesteps.tolist()
        [999, 562, 250, 62]
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
        timestep_spacing: Spacing = "quadratic",
        steps_offset: int = 0,
        final_sigmas_type: Literal["sigma_min", "zero"] = "sigma_min",
        lower_order_final: bool = True,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        rescale_betas_zero_snr: bool = False,
        use_karras_sigmas: bool | None = False,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
        use_flow_sigmas: bool | None = False,
        flow_shift: float | None = 1.0,
    ) -> None:
        one_of("prediction_type", prediction_type, PREDICTIONS)
        one_of("solver_order", solver_order, (1, 2, 3, 4))
        one_of("variable", variable, get_args(Variable))
        one_of("timestep_spacing", timestep_spacing, get_args(Spacing))
        one_of("final_sigmas_type", final_sigmas_type, ("sigma_min", "zero"))
        in_range("dynamic_thresholding_ratio", dynamic_thresholding_ratio, 0, 1)
        positive("sample_max_value", sample_max_value)
        levels = {
            "use_karras_sigmas": use_karras_sigmas,
            "use_exponential_sigmas": use_exponential_sigmas,
            "use_beta_sigmas": use_beta_sigmas,
            "use_flow_sigmas": use_flow_sigmas,
        }
        chosen = [name for name, on in levels.items() if on]
        if len(chosen) > 1:
            raise ValueError(f"{chosen[1]} must be False with {chosen[0]}, got True")
        if bool(use_flow_sigmas) != (prediction_type == "flow_prediction"):
            raise ValueError(
                "prediction_type must be flow_prediction with use_flow_sigmas, and only with it, "
                f"got {prediction_type!r} with use_flow_sigmas={use_flow_sigmas}"
            )
        if rescale_betas_zero_snr and prediction_type not in ("v_prediction", "sample"):
            raise ValueError(
                "prediction_type must be v_prediction or sample with rescale_betas_zero_snr (noise predicted from "
                f"pure noise says nothing of the sample), got {prediction_type!r}"
            )
        self._shift = positive("flow_shift", 1.0 if flow_shift is None else flow_shift)
        self.betas = betas(num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas)
        if rescale_betas_zero_snr:
            self.betas = zero_terminal_snr(self.betas)
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)
        # Times of training are shifted by one: a clean level before the first of them is then time 0.
        clean = torch.ones(1, dtype=torch.float64) - 1e-12
        self._schedule: NoiseSchedule = (
            Flow(t_min=1e-12) if use_flow_sigmas else Discrete(torch.cat([clean, self.alphas_cumprod]))
        )
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)
        self._begin_index: int | None = None
        self._step_index = None

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A scheduler with the settings of another, as diffusers makes it.

        Raises:
            ValueError: for a setting that is in force there and unknown here, unless it only says how the other
                scheduler steps.
        """
        if isinstance(config, Mapping):
            known = {*cls._get_init_keys(cls), *_OF_OTHER_SOLVERS}
            for name, value in config.items():
                if not name.startswith("_") and name not in known and value is not None and value is not False:
                    raise ValueError(
                        f"config must be of a noise schedule that DEISScheduler knows, got {name}={value!r}"
                    )
        return super().from_config(config, return_unused_kwargs, **kwargs)

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

    @property
    def _last(self) -> float:
        """Where the last step ends: the first training time or clean samples, as a time of the schedule."""
        if self.config.final_sigmas_type == "zero":
            return self._schedule.t_min
        return 1 / len(self) if self.config.use_flow_sigmas else 1.0

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
    ) -> None:
        """Lay out the steps of a run; times that repeat, as they do for many steps on few training times, are dropped.

        Args:
            num_inference_steps: number of steps.
            device: where `timesteps` is put.
            timesteps: falling integer times, in a list, array or tensor, in place of the number.
            sigmas: falling noise levels, sigma / alpha (with `use_flow_sigmas`: sigma), likewise; a final 0 is the
                end of the last step.
            mu: logarithm of the shift of this run, in place of `flow_shift`; only with `use_flow_sigmas`.

        Raises:
            ValueError: if not exactly one of the three is given, the number is out of range, or what is given does
                not fall within the schedule's times.
        """
        given = (num_inference_steps is not None, timesteps is not None, sigmas is not None)
        # Pipelines hand over the number beside the noise levels that it belongs to.
        if sum(given[1:]) != 1 and given != (True, False, False):
            raise ValueError(
                f"exactly one of num_inference_steps, timesteps and sigmas must be given, got {sum(given)} of them"
            )
        if mu is not None and not self.config.use_flow_sigmas:
            raise ValueError(f"mu must be None without use_flow_sigmas, got {mu}")
        shift = self._shift if mu is None else math.exp(mu)
        if sigmas is not None:
            ladder = self._of_levels(_sequence("sigmas", sigmas), shift)
        elif timesteps is not None:
            chosen = _sequence("timesteps", timesteps)
            ladder = chosen / len(self) if self.config.use_flow_sigmas else chosen + 1
        else:
            ladder = self._spaced(integer("num_inference_steps", num_inference_steps, 1, len(self)), shift)
        name = "sigmas" if sigmas is not None else "timesteps"
        if not bool(torch.isfinite(ladder).all() & (ladder.diff() <= 0).all()) or len(ladder) == 0:
            raise ValueError(f"{name} must be falling, got {ladder.tolist()[:4]}")
        if float(ladder[0]) > self._schedule.t_max or float(ladder[-1]) < 0:
            raise ValueError(f"{name} must be within the schedule, got from {ladder[0]:g} to {ladder[-1]:g}")
        ladder = ladder[torch.cat([torch.ones(1, dtype=torch.bool), ladder.diff() < 0]) & (ladder > self._last)]
        if len(ladder) == 0:
            raise ValueError(f"{name} must have a time above the last level, got none")
        self._ladder = torch.cat([ladder, torch.tensor([self._last], dtype=torch.float64)])
        self.num_inference_steps = len(ladder)
        self.sigmas = self._ladder if self.config.use_flow_sigmas else self._schedule.rho(self._ladder)
        times = ladder * len(self) if self.config.use_flow_sigmas else (ladder - 1).round().long()
        self.timesteps = (times.float() if self.config.use_flow_sigmas else times).to(device)
        self._begin_index = self._step_index = None

    def _of_levels(self, levels: Tensor, shift: float) -> Tensor:
        """Times of the schedule from given noise levels, without a final 0."""
        levels = levels[:-1] if len(levels) > 1 and float(levels[-1]) == 0 else levels
        if self.config.use_flow_sigmas:
            # At sigma = 1 there is no sample left, and no finite sigma / alpha.
            levels = levels.clamp(max=1 - 1 / len(self))
            return shift * levels / (1 + (shift - 1) * levels)
        most = float(self._schedule.rho(torch.tensor(self._schedule.t_max, dtype=torch.float64)))
        if float(levels.amax()) > most * (1 + 1e-4):
            raise ValueError(f"sigmas must be at most {most:g}, the schedule's largest, got {levels.amax():g}")
        return self._schedule.t_of_rho(levels.clamp(max=most)).clamp(max=self._schedule.t_max)

    def _spaced(self, steps: int, shift: float) -> Tensor:
        """The falling times of this many steps, of the schedule."""
        total, spacing = len(self), self.config.timestep_spacing
        if self.config.use_flow_sigmas:
            return self._of_levels(_ramp(1 - 1 / total, 0.0, steps)[:-1], shift)
        # With a last step of its own to clean samples the levels end at the lowest; without, they would end there
        # twice, and spend an evaluation on standing still.
        points = steps - 1 if self.config.final_sigmas_type == "zero" and steps > 1 else steps
        ends = self._schedule.rho(torch.tensor([float(total), 1.0], dtype=torch.float64))
        if self.config.use_karras_sigmas:
            high, low = (ends ** (1 / 7)).tolist()
            return self._schedule.t_of_rho(_ramp(high, low, points)[:steps] ** 7).clamp(max=total)
        if self.config.use_exponential_sigmas:
            high, low = ends.log().tolist()
            return self._schedule.t_of_rho(_ramp(high, low, points)[:steps].exp()).clamp(max=total)
        if self.config.use_beta_sigmas:
            from scipy.special import betaincinv

            high, low = ends.tolist()
            quantile = torch.from_numpy(betaincinv(0.6, 0.6, _ramp(1.0, 0.0, points)[:steps].numpy()))
            return self._schedule.t_of_rho(low + quantile * (high - low)).clamp(max=total)
        if spacing == "leading":
            times = torch.arange(steps, 0, -1) * (total // (steps + 1)) + self.config.steps_offset
        elif spacing == "trailing":
            times = (total - torch.arange(steps, dtype=torch.float64) * (total / steps)).round() - 1
        elif spacing == "quadratic":
            times = (_ramp(0.0, math.sqrt(total - 1), steps) ** 2).round().flip(0)[:-1]
        else:
            times = _ramp(0.0, total - 1, steps).round().flip(0)[:-1]
        return torch.as_tensor(times).double() + 1

    def scale_model_input(self, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The sample itself: the network takes it at the scale at which it is stepped."""
        return sample

    def add_noise(
        self, original_samples: Float[Tensor, "batch ..."], noise: Tensor, timesteps: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch ..."]:
        """Samples noised to the given training times."""
        times = timesteps.to(original_samples.device, torch.float64)
        times = times / len(self) if self.config.use_flow_sigmas else times + 1
        alpha, sigma = (
            level(times).to(original_samples.dtype) for level in (self._schedule.alpha, self._schedule.sigma)
        )
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

        Half precision is computed in float32.

        Raises:
            ValueError: before `set_timesteps`, after the last step, or for shapes that differ.
        """
        if self.num_inference_steps is None:
            raise ValueError("set_timesteps must be called before step")
        if model_output.shape != sample.shape:
            raise ValueError(
                f"model_output must have the shape of sample, {tuple(sample.shape)}, got {tuple(model_output.shape)}"
            )
        if self._step_index is None:
            self._step_index = self._start(timestep)
        index = self._step_index - self._first
        if index >= len(self._table):
            raise ValueError(f"set_timesteps must be called again after the last of {self.num_inference_steps} steps")
        wide = torch.promote_types(sample.dtype, torch.float32)
        x, alpha, sigma = sample.to(wide), self._alpha[index], self._sigma[index]
        kind = PREDICTIONS[self.config.prediction_type]
        value = model_output.to(wide)
        if self.config.thresholding:
            value, kind = self._threshold(convert(value, x, alpha, sigma, kind, "x0")), "x0"
        self._noises.appendleft(convert(value, x, alpha, sigma, kind, "eps"))
        psi, *weights = self._table[index]
        out = x * psi
        for weight, noise in zip(weights, self._noises, strict=False):
            out.add_(noise, alpha=weight)
        self._step_index += 1
        out = out.to(sample.dtype)
        return SchedulerOutput(prev_sample=out) if return_dict else (out,)

    def _threshold(self, clean: Tensor) -> Tensor:
        flat = clean.flatten(1)
        bound = torch.quantile(flat.abs(), self.config.dynamic_thresholding_ratio, dim=1, keepdim=True)
        bound = bound.clamp(1, max(1.0, self.config.sample_max_value))
        return (flat.clamp(-bound, bound) / bound).view_as(clean)

    def _start(self, timestep: int | Tensor) -> int:
        """Find the first step and work out the coefficients from there on; the only look at a tensor's value."""
        if self._begin_index is not None:
            self._first = self._begin_index
        else:
            found = (self.timesteps.cpu() == torch.as_tensor(timestep).cpu()).nonzero()
            if len(found) == 0:
                raise ValueError(f"timestep must be one of timesteps, got {float(timestep):g}")
            self._first = int(found[0])
        times, degree = self._ladder[self._first :], self.config.solver_order - 1
        self._alpha, self._sigma = self._schedule.alpha(times).tolist(), self._schedule.sigma(times).tolist()
        table = deis_coefficients(self._schedule, times, degree, self.config.variable)
        lowered = 0
        if self.config.lower_order_final:
            lowered = degree if len(self._ladder) <= _SHORT else int(self.config.final_sigmas_type == "zero")
        for lower in range(min(lowered, degree, len(table))):
            last = deis_coefficients(self._schedule, times, lower, self.config.variable)[-1 - lower]
            table[-1 - lower] = torch.nn.functional.pad(last, (0, degree - lower))
        self._table = table.tolist()
        self._noises = deque(maxlen=self.config.solver_order)
        return self._first


def _ramp(first: float, last: float, steps: int) -> Tensor:
    return torch.linspace(first, last, steps + 1, dtype=torch.float64)


def _sequence(name: str, values: Any) -> Tensor:
    found = torch.as_tensor(np.asarray(values) if not isinstance(values, Tensor) else values).to("cpu", torch.float64)
    if found.ndim != 1 or len(found) == 0:
        raise ValueError(f"{name} must be a sequence of at least one number, got shape {tuple(found.shape)}")
    return found
