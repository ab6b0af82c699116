"""What diffusers' own test suite asks of every scheduler and of its own DEIS, asked of ours.

Its `SchedulerCommonTest` is in neither its wheel nor its source archive, so that it is restated here, with what its
`DEISMultistepSchedulerTest` adds. Where `TRIMTAB_DIFFUSERS` names a checkout of diffusers, the two themselves are run.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import types
import unittest
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers")

from trimtab.diffusion.diffusers import DEISScheduler  # noqa: E402

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 2.0}
CONFIGS: list[dict[str, Any]] = [
    {},
    *({"num_train_timesteps": count} for count in (100, 500, 1100)),
    *({"beta_start": start, "beta_end": end} for start, end in ((1e-4, 2e-3), (1e-3, 2e-2), (1e-2, 0.2))),
    *({"beta_schedule": schedule} for schedule in ("scaled_linear", "squaredcos_cap_v2")),
    *({"prediction_type": kind} for kind in ("sample", "v_prediction")),
    *({"solver_order": order, "variable": variable} for order in (1, 2, 3) for variable in ("t", "rho", "log_rho")),
    *({"timestep_spacing": spacing, "steps_offset": 1} for spacing in ("linspace", "leading", "trailing")),
    {"final_sigmas_type": "zero", "lower_order_final": False},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 2.0},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "final_sigmas_type": "zero"},
    *({f"use_{kind}_sigmas": True} for kind in ("karras", "exponential", "beta")),
    FLOW,
]
each_config = pytest.mark.parametrize("config", CONFIGS, ids=str)


def sample() -> Tensor:
    """The suite's own: 4 samples of 3 x 8 x 8, between 0 and 1."""
    size = 4 * 3 * 8 * 8
    return (torch.arange(size).reshape(3, 8, 8, 4) / size).permute(3, 0, 1, 2)


def model(x: Tensor, t: Tensor | float) -> Tensor:
    """The suite's own."""
    return x * t / (t + 1)


def full_loop(scheduler: DEISScheduler, steps: int = 10) -> Tensor:
    scheduler.set_timesteps(steps)
    x = sample()
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x).prev_sample
    return x


def public(scheduler: DEISScheduler) -> dict[str, Any]:
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}


@each_config
def test_saved_and_loaded_it_steps_the_same(config: dict[str, Any], tmp_path: Path) -> None:
    scheduler = DEISScheduler(**config)
    scheduler.save_config(tmp_path)
    loaded = DEISScheduler.from_pretrained(tmp_path)
    assert public(loaded) == public(scheduler)
    assert torch.equal(full_loop(loaded), full_loop(scheduler))


@each_config
def test_made_from_its_config_it_steps_the_same(config: dict[str, Any]) -> None:
    scheduler = DEISScheduler(**config)
    assert torch.equal(full_loop(DEISScheduler.from_config(scheduler.config)), full_loop(scheduler))


@each_config
def test_every_step_keeps_shape_and_dtype(config: dict[str, Any]) -> None:
    scheduler = DEISScheduler(**config)
    for dtype in (torch.float32, torch.float64):
        scheduler.set_timesteps(10)
        x = sample().to(dtype)
        for t in scheduler.timesteps:
            before = x.clone()
            out = scheduler.step(0.1 * x, t, x).prev_sample
            assert (out.shape, out.dtype) == (x.shape, dtype)
            assert torch.equal(x, before)  # not written to
            assert out.isfinite().all()
            x = out


@each_config
def test_times_fall_and_are_as_many_as_asked_for(config: dict[str, Any]) -> None:
    scheduler = DEISScheduler(**config)
    for steps in (1, 2, 5, 10, 25):
        scheduler.set_timesteps(steps)
        assert (scheduler.timesteps.diff() < 0).all()
        assert scheduler.timesteps.min() >= 0
        assert scheduler.timesteps.max() <= scheduler.config.num_train_timesteps
        assert len(scheduler.timesteps) == scheduler.num_inference_steps <= steps
        assert len(scheduler.sigmas) == len(scheduler.timesteps) + 1
        assert (scheduler.sigmas.diff() < 0).all()
    assert scheduler.num_inference_steps > 20


@each_config
def test_tuple_and_dictionary_say_the_same(config: dict[str, Any]) -> None:
    scheduler = DEISScheduler(**config)
    outputs = []
    for return_dict in (True, False):
        scheduler.set_timesteps(10)
        t = scheduler.timesteps[0]
        outputs.append(scheduler.step(0.1 * sample(), t, sample(), return_dict=return_dict))
    assert isinstance(outputs[1], tuple)
    # As many parts and the same ones, in either form.
    assert len(outputs[0]) == len(outputs[1])
    for one, other in zip(outputs[0].to_tuple(), outputs[1], strict=True):
        assert torch.equal(one, other)


@each_config
def test_noise_is_added_at_every_training_time(config: dict[str, Any]) -> None:
    scheduler = DEISScheduler(**config)
    noise = torch.randn(sample().shape, generator=torch.Generator().manual_seed(0))
    last = scheduler.config.num_train_timesteps - 1
    little, much = (scheduler.add_noise(sample(), noise, torch.tensor([t]).expand(4)) for t in (1, last))
    assert little.shape == much.shape == sample().shape
    assert (little - sample()).norm() < (much - sample()).norm()


def test_trained_betas(tmp_path: Path) -> None:
    trained = np.linspace(0.001, 0.1, 50)
    scheduler = DEISScheduler(num_train_timesteps=50, trained_betas=trained)
    np.testing.assert_array_equal(scheduler.betas, trained)
    scheduler.save_pretrained(tmp_path)
    loaded = DEISScheduler.from_pretrained(tmp_path)
    np.testing.assert_array_equal(loaded.betas, trained)
    assert torch.equal(full_loop(loaded), full_loop(scheduler))


def test_trained_betas_fewer_than_the_training_times() -> None:
    """The suite's own two betas, beside the default thousand times."""
    trained = np.array([0.1, 0.3])
    scheduler = DEISScheduler.from_config(DEISScheduler(trained_betas=trained).config)
    assert scheduler.betas.tolist() == trained.tolist()


def test_config_and_attributes_are_kept_apart(recwarn: pytest.WarningsRecorder) -> None:
    scheduler = DEISScheduler()
    scheduler.attribute_of_mine = 5
    scheduler.register_to_config(setting_of_mine=5)
    assert (scheduler.attribute_of_mine, scheduler.config.setting_of_mine) == (5, 5)
    assert not hasattr(scheduler.config, "attribute_of_mine")
    assert scheduler.save_pretrained == getattr(scheduler, "save_pretrained")  # noqa: B009
    assert not recwarn.list
    with pytest.warns(FutureWarning):
        assert scheduler.setting_of_mine == 5
    with pytest.raises(AttributeError, match="'DEISScheduler' object has no attribute 'does_not_exist'"):
        scheduler.does_not_exist
    with pytest.raises(AttributeError):
        DEISScheduler.config.num_train_timesteps


def test_a_saved_config_is_loaded_with_other_settings(tmp_path: Path) -> None:
    """Settings given by name win over those in the file; what is no setting is handed back, or left out."""
    scheduler = DEISScheduler(solver_order=2, timestep_spacing="trailing")
    scheduler.save_pretrained(tmp_path)
    other = DEISScheduler.from_pretrained(tmp_path, solver_order=3, beta_schedule="scaled_linear")
    assert public(other) == public(scheduler) | {"solver_order": 3, "beta_schedule": "scaled_linear"}
    same = DEISScheduler.from_config(scheduler.config, solver_order=3, beta_schedule="scaled_linear")
    assert torch.equal(full_loop(other), full_loop(same))
    loaded, unused = DEISScheduler.from_pretrained(tmp_path, setting_of_nobody=5, return_unused_kwargs=True)
    assert unused["setting_of_nobody"] == 5
    assert public(loaded) == public(scheduler)
    assert not hasattr(loaded.config, "setting_of_nobody")


def test_no_keyword_goes_unnamed() -> None:
    assert "kwargs" not in inspect.signature(DEISScheduler.__init__).parameters
    assert DEISScheduler._deprecated_kwargs == []


def test_every_compatible_scheduler_can_be_made_from_it_and_back() -> None:
    scheduler = DEISScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1)
    assert len(scheduler.compatibles) > 5
    for other in scheduler.compatibles:
        if getattr(other, "_backends", None):  # one that needs a package which is not installed
            continue
        there = other.from_config(scheduler.config)
        if "sigma_data" in there.config:  # EDM's own noise levels, of other models
            with pytest.raises(ValueError, match="config must be of a noise schedule"):
                DEISScheduler.from_config(there.config)
            continue
        back = DEISScheduler.from_config(there.config)
        assert torch.equal(back.betas, scheduler.betas), other
        assert public(back) | public(scheduler) == public(back), other
        new = set(public(back)) - set(public(scheduler))
        assert not new & set(inspect.signature(DEISScheduler).parameters), other


def test_a_run_is_the_same_after_a_way_through_other_schedulers() -> None:
    scheduler = back = DEISScheduler(solver_order=2)
    for other in ("DPMSolverSinglestep", "DPMSolverMultistep", "UniPCMultistep", "DEISMultistep"):
        back = getattr(diffusers, f"{other}Scheduler").from_config(back.config)
    assert torch.equal(full_loop(DEISScheduler.from_config(back.config)), full_loop(scheduler))


@pytest.mark.parametrize("name", ["scale_model_input", "set_timesteps", "step", "add_noise", "set_begin_index"])
def test_what_a_pipeline_calls_is_there(name: str) -> None:
    assert callable(getattr(DEISScheduler(), name))


def test_numpy_and_integer_times_are_taken() -> None:
    outputs = []
    for kind in (lambda t: t, int, lambda t: t.numpy()):
        scheduler = DEISScheduler()
        scheduler.set_timesteps(5)
        x = sample()
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t), kind(t), x).prev_sample
        outputs.append(x)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("count", [25, 50, 100, 999, 1000])
def test_any_number_of_training_times(count: int) -> None:
    assert full_loop(DEISScheduler(num_train_timesteps=count), 10).isfinite().all()


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 50, 100, 999, 1000])
def test_any_number_of_steps(steps: int) -> None:
    assert full_loop(DEISScheduler(), steps).isfinite().all()


def test_one_time_serves_a_batch() -> None:
    scheduler = DEISScheduler()
    scheduler.set_timesteps(100)
    x = scheduler.scale_model_input(sample(), 0.0)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    t = scheduler.timesteps[5]
    noised = scheduler.add_noise(x, noise, t[None])
    assert noised.shape == x.shape
    assert torch.equal(noised, scheduler.add_noise(x, noise, t.expand(4)))


def test_half_precision_stays() -> None:
    scheduler = DEISScheduler(thresholding=True, dynamic_thresholding_ratio=0)
    scheduler.set_timesteps(10)
    x = sample().half()
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x).prev_sample
    assert x.dtype == torch.float16
    assert x.isfinite().all()


def test_noised_images_are_denoised_from_the_middle() -> None:
    scheduler = DEISScheduler()
    scheduler.set_timesteps(10)
    times = scheduler.timesteps[8 * scheduler.order :]
    noise = torch.randn(sample().shape, generator=torch.Generator().manual_seed(0))
    noised = x = scheduler.add_noise(sample(), noise, times[:1])
    for t in times:
        alpha, sigma = scheduler.alphas_cumprod[t].sqrt(), (1 - scheduler.alphas_cumprod[t]).sqrt()
        x = scheduler.step(((x - alpha * sample()) / sigma).float(), t, x).prev_sample
    assert (x - sample()).norm() < 0.1 * (noised - sample()).norm()


CHECKOUT = os.environ.get("TRIMTAB_DIFFUSERS")
# Diffusers' own, by the name of its class: DEIS in log(rho) on evenly spaced times.
THEIRS = {"solver_order": 2, "variable": "log_rho", "timestep_spacing": "linspace"}


def _own_suite(module: str, name: str, config: dict[str, Any]) -> type[unittest.TestCase]:
    """A class of the checkout's tests, turned to our scheduler; its package has another name than ours, `tests`."""
    package = types.ModuleType("diffusers_tests")
    package.__path__ = [str(Path(str(CHECKOUT)) / "tests")]
    with mock.patch.dict(sys.modules, {"diffusers_tests": package}):
        theirs: Any = getattr(importlib.import_module(f"diffusers_tests.schedulers.{module}"), name)

    class Ours(theirs):
        scheduler_classes = (DEISScheduler,)
        forward_default_kwargs = (("num_inference_steps", 25),)

        def get_scheduler_config(self, **options: Any) -> dict[str, Any]:
            # Two settings that only diffusers' own DEIS has, of one choice each.
            known = {name: value for name, value in options.items() if name not in ("algorithm_type", "solver_type")}
            return {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", **config, **known}

        def check_over_forward(self, time_step: Any = 0, **options: Any) -> None:
            """From the first time of the run: 0 is in none, and is refused where diffusers takes the last step."""
            scheduler = DEISScheduler(**self.get_scheduler_config())
            scheduler.set_timesteps(options.get("num_inference_steps", 25))
            super().check_over_forward(time_step=scheduler.timesteps[0], **options)

        @unittest.skip("it makes diffusers' own class of these settings; a test above goes the same way")
        def test_switch(self) -> None: ...

    return Ours


@pytest.mark.skipif(CHECKOUT is None, reason="TRIMTAB_DIFFUSERS must name a checkout of diffusers")
@pytest.mark.parametrize(
    ("module", "name", "config"),
    [
        ("test_schedulers", "SchedulerCommonTest", {}),
        ("test_schedulers", "SchedulerCommonTest", THEIRS),
        ("test_schedulers", "SchedulerCommonTest", {"solver_order": 3, "variable": "rho"}),
        ("test_scheduler_deis", "DEISMultistepSchedulerTest", THEIRS),
    ],
)
def test_diffusers_own_suite_passes(module: str, name: str, config: dict[str, Any]) -> None:
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(_own_suite(module, name, config))
    result = unittest.TestResult()
    made = {other.__name__ for other in DEISScheduler().compatibles if not getattr(other, "_backends", None)}
    with mock.patch.object(DEISScheduler, "_compatibles", sorted(made)), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        suite.run(result)
    assert not [text for _, text in result.errors + result.failures]
    assert result.testsRun - len(result.skipped) >= 10
