"""DEIS and APG inside diffusers: a real pipeline and a real modular block, tiny and with random weights."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from trimtab.diffusion import (  # noqa: E402
    AdaptiveGuidance,
    AnalyticGMM,
    CFGPlusPlus,
    ClassifierFreeGuidance,
    CountNFE,
    Denoiser,
    Discrete,
    DualFast,
    adaptive_projected_guidance,
    convert,
    ddim,
    deis,
    dpm_solver,
    euler,
    grids,
)
from trimtab.diffusion.diffusers import APGGuider, DEISScheduler, network_denoiser  # noqa: E402


@pytest.fixture(scope="module")
def unet():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return diffusers.UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
        ).eval()


def run_pipeline(unet, scheduler, steps: int) -> np.ndarray:
    pipeline = diffusers.DDPMPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    return pipeline(batch_size=2, generator=generator, num_inference_steps=steps, output_type="np").images


def run_by_hand(scheduler, denoiser, x: torch.Tensor) -> torch.Tensor:
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser(x, t), t, x).prev_sample
    return x


def test_in_a_pipeline(unet) -> None:
    scheduler = DEISScheduler(variable="t")
    images = [run_pipeline(unet, scheduler, 6) for _ in range(2)]
    assert images[0].shape == (2, 8, 8, 3)
    assert np.isfinite(images[0]).all()
    assert np.array_equal(*images)


def test_first_order_is_diffusers_ddim(unet) -> None:
    kwargs = {"clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "trailing"}
    theirs = run_pipeline(unet, diffusers.DDIMScheduler(**kwargs), 5)
    ours = run_pipeline(unet, DEISScheduler(solver_order=1, timestep_spacing="trailing", final_sigmas_type="zero"), 5)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("lower", [True, False])
def test_log_rho_is_diffusers_deis(unet, spacing: str, beta_schedule: str, lower: bool) -> None:
    kwargs = {
        "solver_order": 3,
        "timestep_spacing": spacing,
        "beta_schedule": beta_schedule,
        "lower_order_final": lower,
    }
    theirs = diffusers.DEISMultistepScheduler(**kwargs)
    ours = DEISScheduler(variable="log_rho", **kwargs)
    theirs.set_timesteps(7)
    ours.set_timesteps(7)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()

    def denoiser(x, t):
        return torch.tanh(x) * (t / 1000)

    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    # Their levels are float32, which the cosine schedule's first level, of 2e4, shows.
    torch.testing.assert_close(run_by_hand(ours, denoiser, x), run_by_hand(theirs, denoiser, x), rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize(("prediction_type", "kind"), [("epsilon", "eps"), ("sample", "x0"), ("v_prediction", "v")])
@pytest.mark.parametrize("variable", ["t", "rho"])
def test_steps_are_the_samplers(variable, prediction_type: str, kind) -> None:
    scheduler = DEISScheduler(variable=variable, prediction_type=prediction_type, lower_order_final=False)
    scheduler.set_timesteps(8)
    schedule = Discrete(scheduler.alphas_cumprod)
    model = Denoiser(lambda x, t: torch.tanh(x) * t[:, None] / 1000, schedule, kind)
    times = torch.cat([scheduler.timesteps, torch.zeros(1)]).double()
    x = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stepped = run_by_hand(scheduler, lambda x, t: model(x, t.double().expand(2)), x)
    torch.testing.assert_close(stepped, deis(model, x, times, variable=variable), rtol=1e-6, atol=1e-6)


def test_quadratic_spacing_is_the_papers_grid() -> None:
    scheduler = DEISScheduler(timestep_spacing="quadratic")
    scheduler.set_timesteps(10)
    assert (
        scheduler.timesteps.tolist() == grids.power(Discrete(scheduler.alphas_cumprod), 10).round().int()[:-1].tolist()
    )


@pytest.mark.parametrize(("spacing", "bound"), [("quadratic", 0.03), ("linspace", 0.11), ("trailing", 0.11)])
def test_ten_steps_with_the_defaults_are_near_the_solution(spacing: str, bound: float) -> None:
    """Where DDIM's error is 0.138; without lower orders at the end evenly spaced times are no better than that."""
    mixture = AnalyticGMM.isotropic(torch.tensor([[-1.0, 0.5], [1.0, -0.5]], dtype=torch.float64), std=0.2)

    def run(steps: int, **config) -> torch.Tensor:
        scheduler = DEISScheduler(**config)
        scheduler.set_timesteps(steps)
        denoiser = mixture.denoiser(Discrete(scheduler.alphas_cumprod), "eps")
        x = torch.randn(256, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return run_by_hand(scheduler, lambda x, t: denoiser(x, t.double().expand(len(x))), x)

    solution = run(666, timestep_spacing="trailing")
    error = (run(10, timestep_spacing=spacing) - solution).square().mean().sqrt().item()
    assert error < bound
    if spacing == "quadratic":
        assert (run(10) - solution).square().mean().sqrt().item() == error


@pytest.mark.parametrize("steps", [50, 100, 900, 1000])
@pytest.mark.parametrize("spacing", ["linspace", "trailing", "quadratic"])
def test_repeated_times_are_dropped(spacing: str, steps: int) -> None:
    scheduler = DEISScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.tolist()
    assert times == sorted(set(times), reverse=True)
    assert 0.8 * min(steps, 200) < len(times) == scheduler.num_inference_steps <= steps
    scheduler.set_timesteps(timesteps=np.array([900, 500, 500, 1, 0]))
    assert scheduler.timesteps.tolist() == [900, 500, 1]


@pytest.mark.parametrize("kind", ["karras", "exponential", "beta"])
def test_noise_levels_are_diffusers(kind: str) -> None:
    setting = {f"use_{kind}_sigmas": True}
    theirs = diffusers.DPMSolverMultistepScheduler(final_sigmas_type="zero", **setting)
    ours = DEISScheduler.from_config(theirs.config)
    theirs.set_timesteps(8)
    ours.set_timesteps(8)
    torch.testing.assert_close(ours.sigmas[:-1].float(), theirs.sigmas[:-1], rtol=2e-3, atol=1e-4)
    assert (ours.timesteps - theirs.timesteps).abs().max() <= 1
    given = DEISScheduler(final_sigmas_type="zero")
    given.set_timesteps(sigmas=ours.sigmas[:-1].tolist())
    torch.testing.assert_close(given._ladder, ours._ladder)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_models_go_along_their_straight_lines(shift: float) -> None:
    """Where the data are one point, the velocity is constant along a path and every grid ends on the point."""
    scheduler = DEISScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, final_sigmas_type="zero"
    )
    theirs = diffusers.DEISMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(6)
    theirs.set_timesteps(6)
    torch.testing.assert_close(scheduler.sigmas[:-1].float(), theirs.sigmas[:-1], rtol=1e-5, atol=1e-6)
    point, noise = torch.full((1, 4), 0.3, dtype=torch.float64), torch.randn(1, 4, dtype=torch.float64)
    x = scheduler.add_noise(point, noise, scheduler.timesteps[:1])
    sigma = scheduler.sigmas[0]
    torch.testing.assert_close(x, (1 - sigma) * point + sigma * noise, rtol=1e-6, atol=1e-6)
    x = run_by_hand(scheduler, lambda x, t: noise - point, x)
    torch.testing.assert_close(x, point, atol=1e-5, rtol=0)
    scheduler.set_timesteps(sigmas=[1.0, 0.5], mu=0.0)
    assert scheduler.timesteps.tolist() == [999.0, 500.0]


def test_zero_terminal_snr_is_honoured() -> None:
    """Levels of diffusers' own, and on one data point a run that ends there."""
    theirs = diffusers.DDIMScheduler(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"
    )
    ours = DEISScheduler.from_config(theirs.config, final_sigmas_type="zero")
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=1e-3, atol=1e-6)
    assert 0 < ours.alphas_cumprod[-1] < 1e-6
    ours.set_timesteps(10)
    point, x = torch.full((1, 4), 0.3), torch.randn(1, 4)
    for t in ours.timesteps:
        alpha, sigma = ours.alphas_cumprod[t].sqrt().float(), (1 - ours.alphas_cumprod[t]).sqrt().float()
        x = ours.step(convert(point, x, alpha, sigma, "x0", "v"), t, x).prev_sample
    torch.testing.assert_close(x, point, atol=1e-4, rtol=0)


def test_thresholding_keeps_samples_within_range() -> None:
    scheduler = DEISScheduler(prediction_type="sample", thresholding=True, final_sigmas_type="zero")
    scheduler.set_timesteps(5)
    x = run_by_hand(scheduler, lambda x, t: torch.full_like(x, 7.0), torch.randn(2, 3, 4, 4))
    torch.testing.assert_close(x, torch.ones_like(x), atol=1e-4, rtol=0)


def test_settings_of_other_solvers_are_left_out_and_unknown_ones_refused() -> None:
    for other in (diffusers.DDIMScheduler, diffusers.DDPMScheduler, diffusers.PNDMScheduler):
        assert DEISScheduler.from_config(other().config).config.num_train_timesteps == 1000
    with pytest.raises(ValueError, match="got shift="):
        DEISScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config)


def test_half_precision_is_computed_in_single() -> None:
    x = torch.randn(1, 4).to(torch.bfloat16)
    runs = []
    for dtype in (torch.bfloat16, torch.float32):
        scheduler = DEISScheduler()
        scheduler.set_timesteps(1)
        runs.append(scheduler.step(x.to(dtype), 999, x.to(dtype)).prev_sample)
    assert runs[0].dtype == torch.bfloat16
    assert torch.equal(runs[0], runs[1].to(torch.bfloat16))


def test_last_step_to_clean_samples() -> None:
    """A model that knows the one data point ends on it."""
    scheduler = DEISScheduler(prediction_type="sample", final_sigmas_type="zero")
    scheduler.set_timesteps(5)
    point = torch.full((1, 4), 0.3, dtype=torch.float64)
    x = run_by_hand(scheduler, lambda x, t: point, torch.randn(1, 4, dtype=torch.float64))
    torch.testing.assert_close(x, point, atol=1e-5, rtol=0)


def test_config_round_trip_and_from_other_schedulers(tmp_path) -> None:
    scheduler = DEISScheduler(variable="rho", solver_order=2, beta_schedule="scaled_linear", beta_start=0.00085)
    scheduler.save_pretrained(tmp_path)
    loaded = DEISScheduler.from_pretrained(tmp_path)
    saved = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    assert {name: loaded.config[name] for name in saved} == saved
    assert torch.equal(loaded.alphas_cumprod, scheduler.alphas_cumprod)
    other = diffusers.DPMSolverMultistepScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    taken = DEISScheduler.from_config(other.config)
    assert (taken.config.beta_schedule, taken.config.prediction_type) == ("scaled_linear", "v_prediction")
    torch.testing.assert_close(taken.alphas_cumprod.float(), other.alphas_cumprod)


def test_what_pipelines_ask_for() -> None:
    scheduler = DEISScheduler()
    x = torch.randn(2, 3, 4, 4)
    assert scheduler.init_noise_sigma == 1.0
    assert scheduler.order == 1
    assert len(scheduler) == 1000
    assert torch.equal(scheduler.scale_model_input(x, 3), x)
    noise, times = torch.randn_like(x), torch.tensor([10, 990])
    expected = diffusers.DDPMScheduler().add_noise(x, noise, times)
    torch.testing.assert_close(scheduler.add_noise(x, noise, times), expected)
    scheduler.set_timesteps(4)
    out = scheduler.step(x, scheduler.timesteps[0], x, return_dict=False)
    assert isinstance(out, tuple)
    assert scheduler.step_index == 1
    assert out[0].dtype == x.dtype


def test_start_in_the_middle() -> None:
    """Image to image: the first step has no history, whatever its place."""
    by_index, by_time, explicit = (DEISScheduler() for _ in range(3))
    for scheduler in (by_index, by_time):
        scheduler.set_timesteps(8)
    explicit.set_timesteps(timesteps=by_time.timesteps[5:].tolist())
    by_index.set_begin_index(5)
    x = torch.randn(1, 4, dtype=torch.float64)
    runs = []
    for scheduler in (by_index, by_time, explicit):
        sample = x
        for t in by_time.timesteps[5:]:
            sample = scheduler.step(torch.tanh(sample), t, sample).prev_sample
        runs.append(sample)
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


def test_a_new_run_forgets_the_last() -> None:
    scheduler, x = DEISScheduler(), torch.randn(1, 4)
    runs = []
    for _ in range(2):
        scheduler.set_timesteps(5)
        runs.append(run_by_hand(scheduler, lambda x, t: torch.tanh(x), x))
    assert torch.equal(*runs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DEISScheduler(solver_order=5), "solver_order"),
        (lambda: DEISScheduler(variable="time"), "variable"),
        (lambda: DEISScheduler(prediction_type="flow_prediction"), "prediction_type"),
        (lambda: DEISScheduler(beta_schedule="sigmoid"), "beta_schedule"),
        (lambda: DEISScheduler(final_sigmas_type="none"), "final_sigmas_type"),
        (lambda: DEISScheduler(timestep_spacing="random"), "timestep_spacing"),
        (lambda: DEISScheduler().set_timesteps(0), "num_inference_steps"),
        (lambda: DEISScheduler().set_timesteps(2000), r"num_inference_steps must be in \[1, 1000\], got 2000"),
        (lambda: DEISScheduler().set_timesteps(), "exactly one"),
        (lambda: DEISScheduler().set_timesteps(timesteps=[5, 10]), "timesteps must be falling"),
        (lambda: DEISScheduler().set_timesteps(timesteps=[1000, 10]), "timesteps must be within the schedule"),
        (lambda: DEISScheduler().set_timesteps(timesteps=[0]), "timesteps must have a time above"),
        (lambda: DEISScheduler().set_timesteps(timesteps=[]), "timesteps must be a sequence"),
        (lambda: DEISScheduler().set_timesteps(sigmas=[1e4, 1.0]), "sigmas must be at most 157"),
        (lambda: DEISScheduler().set_timesteps(5, mu=1.0), "mu must be None"),
        (lambda: DEISScheduler().set_timesteps(sigmas=[3.0], timesteps=[5]), "exactly one"),
        (lambda: DEISScheduler(rescale_betas_zero_snr=True), "prediction_type must be v_prediction or sample"),
        (lambda: DEISScheduler(use_karras_sigmas=True, use_beta_sigmas=True), "use_beta_sigmas must be False"),
        (lambda: DEISScheduler(use_flow_sigmas=True), "prediction_type must be flow_prediction"),
        (lambda: DEISScheduler(sample_max_value=0.0), "sample_max_value must be positive"),
        (lambda: DEISScheduler.from_config({"use_dynamic_shifting": True}), "got use_dynamic_shifting=True"),
        (lambda: DEISScheduler.from_config({"shift": 3.0}), "got shift=3.0"),
        (lambda: DEISScheduler().step(torch.zeros(1, 1), 5, torch.zeros(1, 1)), "set_timesteps must be called"),
        (lambda: APGGuider(momentum=2.0), "momentum"),
        (lambda: APGGuider(prediction_type="noise"), "prediction_type"),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_steps() -> None:
    scheduler = DEISScheduler()
    scheduler.set_timesteps(2)
    x = torch.zeros(1, 4)
    with pytest.raises(ValueError, match="model_output must have the shape of sample"):
        scheduler.step(torch.zeros(1, 8), scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match="timestep must be one of timesteps, got 7"):
        scheduler.step(x, 7, x)
    for t in scheduler.timesteps:
        scheduler.step(x, t, x)
    with pytest.raises(ValueError, match="after the last of 2 steps"):
        scheduler.step(x, scheduler.timesteps[-1], x)


class Conditional(torch.nn.Module):
    """A network with the call of a diffusers UNet."""

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=False):
        return (0.5 * sample + encoder_hidden_states,)


def guide(guider: APGGuider, network: Conditional, x, embeddings, step: int, t: int, steps: int = 4):
    """What a modular pipeline's denoising block does in one step."""
    guider.set_state(step=step, num_inference_steps=steps, timestep=torch.tensor(t))
    batches = guider.prepare_inputs({"embeds": embeddings})
    for batch in batches:
        guider.prepare_models(network)
        batch.noise_pred = network(x, t, encoder_hidden_states=batch.embeds)[0]
        guider.cleanup_models(network)
    return guider(batches).pred


@pytest.mark.parametrize(
    ("prediction_type", "kind"), [("epsilon", "eps"), ("v_prediction", "v"), ("flow_prediction", "flow")]
)
def test_guider_applies_the_rule_to_clean_predictions(prediction_type: str, kind) -> None:
    guider = APGGuider(guidance_scale=6.0, norm_threshold=2.0, prediction_type=prediction_type)
    network, running = Conditional(), None
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    cond, uncond = torch.randn(2, *x.shape, dtype=torch.float64)
    schedule = Discrete(DEISScheduler().alphas_cumprod)
    for step, t in enumerate((900, 500, 100)):
        pred = guide(guider, network, x, (cond, uncond), step, t)
        level = torch.tensor(float(t), dtype=torch.float64)
        alpha, sigma = (1 - t / 1000, t / 1000) if kind == "flow" else (schedule.alpha(level), schedule.sigma(level))
        clean = [convert(0.5 * x + e, x, alpha, sigma, kind, "x0") for e in (cond, uncond)]
        guided, running = adaptive_projected_guidance(*clean, 6.0, norm_threshold=2.0, momentum=-0.75, previous=running)
        torch.testing.assert_close(pred, convert(guided, x, alpha, sigma, "x0", kind), rtol=1e-5, atol=1e-5)
    assert not network._forward_pre_hooks


def test_guider_starts_each_run_afresh_and_can_be_off() -> None:
    network, x = Conditional(), torch.randn(1, 3, 4, 4)
    embeddings = (torch.randn_like(x), torch.randn_like(x))
    guider = APGGuider(guidance_scale=6.0)
    runs = [[guide(guider, network, x, embeddings, step, t) for step, t in enumerate((900, 500))] for _ in range(2)]
    assert torch.equal(runs[0][1], runs[1][1])
    unguided = network(x, 900, embeddings[0])[0]
    for off in (APGGuider(guidance_scale=1.0), APGGuider(enabled=False), APGGuider(start=0.5)):
        assert off.num_conditions == 1 or off._start
        assert torch.equal(guide(off, network, x, embeddings, 0, 900), unguided)
    assert not torch.equal(guide(APGGuider(start=0.5), network, x, embeddings, 3, 900), unguided)


def test_guider_takes_the_schedulers_config(tmp_path) -> None:
    scheduler = DEISScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    guider = APGGuider.from_config(scheduler.config, guidance_scale=9.0)
    assert (guider.config.beta_schedule, guider.config.prediction_type) == ("scaled_linear", "v_prediction")
    guider.save_pretrained(tmp_path)
    assert APGGuider.from_pretrained(tmp_path).guidance_scale == 9.0


def test_guider_says_what_it_has_not_seen() -> None:
    guider = APGGuider(guidance_scale=6.0)
    guider.set_state(step=0, num_inference_steps=2, timestep=torch.tensor(900))
    with pytest.raises(ValueError, match="prepare_models"):
        guider.forward(torch.zeros(1, 2), torch.zeros(1, 2))


def test_in_a_modular_pipelines_own_block() -> None:
    """The denoising block of Stable Diffusion XL, with a tiny network, against the rule by hand."""
    module = pytest.importorskip("diffusers.modular_pipelines.stable_diffusion_xl.denoise")
    from types import SimpleNamespace

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = diffusers.UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=2,
            cross_attention_dim=6,
        ).eval()
    x, t = torch.randn(1, 4, 8, 8), torch.tensor(700)
    prompts = torch.randn(2, 1, 3, 6)
    state = SimpleNamespace(
        prompt_embeds=prompts[0],
        negative_prompt_embeds=prompts[1],
        scaled_latents=x,
        num_inference_steps=5,
        timestep_cond=None,
        cross_attention_kwargs=None,
    )
    guider = APGGuider(guidance_scale=5.0, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    components = SimpleNamespace(guider=guider, unet=network)
    module.StableDiffusionXLLoopDenoiser()(components, state, i=0, t=t)

    schedule = Discrete(DEISScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod)
    alpha, sigma = schedule.alpha(t.float()), schedule.sigma(t.float())
    with torch.no_grad():
        clean = [convert(network(x, t, e).sample, x, alpha, sigma, "eps", "x0") for e in prompts]
    guided, _ = adaptive_projected_guidance(*clean, 5.0, norm_threshold=15.0)
    torch.testing.assert_close(state.noise_pred, convert(guided, x, alpha, sigma, "x0", "eps"), rtol=1e-4, atol=1e-4)


def test_without_diffusers_the_extra_is_named() -> None:
    """Importing the area does not need diffusers; the adapter says what to install."""
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "import trimtab.diffusion\n"
        "try:\n    import trimtab.diffusion.diffusers\n"
        "except ImportError as error:\n    print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=None)
    assert 'pip install "trimtab[diffusers]"' in out.stdout


@pytest.fixture(scope="module")
def classes_unet():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return diffusers.UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=6,
            layers_per_block=1,
            block_out_channels=(8,),
            norm_num_groups=4,
            num_class_embeds=4,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
        ).eval()


CLASSES, NONE = {"class_labels": torch.tensor([0, 2])}, {"class_labels": torch.tensor([3, 3])}


def start() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def loop_of(scheduler, network) -> torch.Tensor:
    x = start()
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x).prev_sample
    return x


def test_the_samplers_run_with_a_pipelines_network(unet) -> None:
    theirs = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing")
    theirs.set_timesteps(5)
    denoiser = network_denoiser(unet, diffusers.DDPMScheduler())
    # Their last step ends at the first training time.
    times = torch.cat([theirs.timesteps, torch.zeros(1)]).double()
    wanted = loop_of(theirs, lambda x, t: unet(x, t).sample)
    torch.testing.assert_close(ddim(denoiser, start(), times), wanted, rtol=1e-4, atol=1e-4)
    for sample in (dpm_solver, euler, deis):
        assert sample(DualFast(denoiser), start(), times).isfinite().all()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_guidance_runs_with_a_pipelines_network(classes_unet, prediction_type: str) -> None:
    theirs = diffusers.DDIMScheduler(
        clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing", prediction_type=prediction_type
    )
    theirs.set_timesteps(4)
    denoiser = network_denoiser(classes_unet, theirs.config)
    times = torch.cat([theirs.timesteps, torch.zeros(1)]).double()

    def guided(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        cond, uncond = (classes_unet(x, t, **labels).sample[:, :3] for labels in (CLASSES, NONE))
        return uncond + 3 * (cond - uncond)

    ours = ddim(ClassifierFreeGuidance(denoiser, CLASSES, NONE, scale=3.0), start(), times)
    torch.testing.assert_close(ours, loop_of(theirs, guided), rtol=1e-4, atol=1e-4)
    counted = CountNFE(denoiser)
    # Here the predictions agree at once, and conditions are cut to the samples that need them.
    assert ddim(AdaptiveGuidance(counted, CLASSES, NONE, threshold=-1.0), start(), times).isfinite().all()
    assert counted.count == 5
    assert ddim(CFGPlusPlus(denoiser, CLASSES, NONE), start(), times).isfinite().all()


def test_a_flow_matching_pipelines_network(classes_unet) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    denoiser = network_denoiser(classes_unet, scheduler)
    conditional = Denoiser(lambda x, t: denoiser(x, t, CLASSES), denoiser.schedule, denoiser.prediction)
    times, x = grids.power(denoiser.schedule, 5, p=1, t_max=0.99), start()
    with torch.no_grad():
        for t, step in zip(times[:-1].float(), times.diff().float(), strict=True):
            x = x + step * classes_unet(x, scheduler.config.num_train_timesteps * t, **CLASSES).sample[:, :3]
    torch.testing.assert_close(euler(conditional, start(), times), x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda unet: network_denoiser(len, diffusers.DDPMScheduler()), "network must be a torch.nn.Module"),
        (lambda unet: network_denoiser(unet, 3), "scheduler must be a diffusers scheduler or its config, got int"),
        (lambda unet: network_denoiser(unet, {"beta_schedule": "sigmoid"}), "beta_schedule must be one of"),
        (
            lambda unet: network_denoiser(unet, diffusers.DDPMScheduler())(start(), torch.ones(2), torch.arange(2)),
            "cond must be a mapping",
        ),
    ],
)
def test_a_network_that_does_not_fit(unet, call, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call(unet)
