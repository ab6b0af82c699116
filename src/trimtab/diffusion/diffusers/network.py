"""A pipeline's network as a denoiser, for the samplers and guidance of this library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from trimtab.diffusion.denoiser import Denoiser
from trimtab.diffusion.diffusers.levels import PREDICTIONS
from trimtab.diffusion.diffusers.scheduler import DEISScheduler
from trimtab.diffusion.schedules import Discrete, Flow, NoiseSchedule


def network_denoiser(network: nn.Module, scheduler: Any) -> Denoiser:
    """The network of a diffusers pipeline in the form that every sampler and guidance rule here takes.

    The scheduler only says what the network was trained on: the noise levels, and the kind of its prediction. Times are
    those of training, 0 to `num_train_timesteps - 1`, or 0 to 1 for flow matching. What a network predicts beside the
    sample's own channels, such as a learnt variance, is left out.

    Args:
        network: `pipe.unet` or `pipe.transformer`. A condition is a mapping of the arguments by which it is called
            beside sample and time, such as `{"encoder_hidden_states": embeddings}` or `{"class_labels": labels}`.
        scheduler: `pipe.scheduler`, or its config.

    Raises:
        TypeError: `network` is no module, `scheduler` has no config, or, in use, a condition is no mapping.
        ValueError: for noise levels or a kind of prediction that are unknown here.

    Example:
        >>> import diffusers, torch
        >>> from trimtab.diffusion import CFGPlusPlus, dpm_solver, grids
        >>> unet = diffusers.UNet2DModel(
        ...     sample_size=8, block_out_channels=(8,), norm_num_groups=4, num_class_embeds=3, layers_per_block=1,
        ...     down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
        ... )
        >>> denoiser = network_denoiser(unet, diffusers.DDPMScheduler())
        >>> classes, none = {"class_labels": torch.tensor([0, 1])}, {"class_labels": torch.tensor([2, 2])}
        >>> noise, times = denoiser.schedule.prior(2, 3, 8, 8), grids.power(denoiser.schedule, 4)
        >>> dpm_solver(CFGPlusPlus(denoiser, classes, none), noise, times).shape
        torch.Size([2, 3, 8, 8])
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"network must be a torch.nn.Module, got {type(network).__name__}")
    config = getattr(scheduler, "config", scheduler)
    if not isinstance(config, Mapping):
        raise TypeError(f"scheduler must be a diffusers scheduler or its config, got {type(scheduler).__name__}")
    # A config names its class where it was saved; in memory the scheduler itself does.
    named = f"{config.get('_class_name')} {type(scheduler).__name__}"
    total, kind = 1.0, config.get("prediction_type", "epsilon")
    schedule: NoiseSchedule
    if "FlowMatch" in named or config.get("use_flow_sigmas"):
        schedule, total, kind = Flow(), float(config["num_train_timesteps"]), "flow_prediction"
    else:
        schedule = Discrete(DEISScheduler.from_config(config).alphas_cumprod)

    def predict(x: Tensor, t: Tensor, cond: Mapping[str, Any] | None = None) -> Tensor:
        if cond is not None and not isinstance(cond, Mapping):
            raise TypeError(f"cond must be a mapping of the network's arguments, got {type(cond).__name__}")
        found: Tensor = network(x, total * t, **(cond or {}), return_dict=False)[0]
        return found[:, : x.shape[1]]

    return Denoiser(predict, schedule, PREDICTIONS[kind])
