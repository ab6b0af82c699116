"""DEIS as a diffusers scheduler and APG as a diffusers guider, and a pipeline's network for all else that is here.

Needs the extra: `pip install "trimtab[diffusers]"`. The mathematics is that of `trimtab.diffusion.deis` and
`trimtab.diffusion.apg`; here it only meets diffusers' conventions. Every other sampler and guidance rule runs with the
network of a pipeline, by `network_denoiser`.

    from trimtab.diffusion.diffusers import APGGuider, DEISScheduler, network_denoiser

    pipe.scheduler = DEISScheduler.from_config(pipe.scheduler.config, timestep_spacing="quadratic")
    modular_pipe.update_components(guider=APGGuider.from_config(modular_pipe.scheduler.config, guidance_scale=10.0))
    denoiser = network_denoiser(pipe.unet, pipe.scheduler)
"""

try:
    import diffusers  # noqa: F401  said by name here, before the modules below need it
except ImportError as error:
    raise ImportError('trimtab.diffusion.diffusers needs diffusers: pip install "trimtab[diffusers]"') from error

from trimtab.diffusion.diffusers.guider import APGGuider
from trimtab.diffusion.diffusers.network import network_denoiser
from trimtab.diffusion.diffusers.scheduler import DEISScheduler

__all__ = ["APGGuider", "DEISScheduler", "network_denoiser"]
