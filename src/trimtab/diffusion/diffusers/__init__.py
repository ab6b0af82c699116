"""DEIS as a diffusers scheduler and APG as a diffusers guider: the form that diffusers' pipelines take.

Needs the extra: `pip install "trimtab[diffusers]"`. The mathematics is that of `trimtab.diffusion.deis` and
`trimtab.diffusion.apg`; here it only meets diffusers' conventions.

    from trimtab.diffusion.diffusers import APGGuider, DEISScheduler

    pipe.scheduler = DEISScheduler.from_config(pipe.scheduler.config, timestep_spacing="quadratic")
    modular_pipe.update_components(guider=APGGuider.from_config(modular_pipe.scheduler.config, guidance_scale=10.0))
"""

try:
    import diffusers  # noqa: F401  said by name here, before the modules below need it
except ImportError as error:
    raise ImportError('trimtab.diffusion.diffusers needs diffusers: pip install "trimtab[diffusers]"') from error

from trimtab.diffusion.diffusers.guider import APGGuider
from trimtab.diffusion.diffusers.scheduler import DEISScheduler

__all__ = ["APGGuider", "DEISScheduler"]
