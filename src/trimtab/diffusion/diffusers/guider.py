"""APG as a guider of diffusers' modular pipelines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from torch import Tensor

from trimtab.diffusion.apg import adaptive_projected_guidance, check_arguments
from trimtab.diffusion.diffusers.levels import PREDICTIONS, BetaSchedule, betas
from trimtab.diffusion.prediction import convert
from trimtab.diffusion.schedules import Discrete, Flow, NoiseSchedule
from trimtab.ops.arguments import one_of

if TYPE_CHECKING:
    from diffusers.modular_pipelines.modular_pipeline import BlockState


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
        one_of("prediction_type", prediction_type, PREDICTIONS)
        self.guidance_scale, self.eta, self.momentum = guidance_scale, eta, momentum
        self.norm_threshold = norm_threshold
        self._schedule: NoiseSchedule
        if prediction_type == "flow_prediction":
            self._schedule = Flow()
        else:
            found = betas(num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas)
            self._schedule = Discrete(torch.cumprod(1 - found, dim=0))
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
            raise ValueError(
                "prepare_models(network) must be called before the network is evaluated: its input was not seen"
            )
        x, kind = self._sample, PREDICTIONS[self.config.prediction_type]
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
