"""Sample in ten steps with DEIS and guide with APG in a diffusers pipeline.

The scheduler goes where diffusers' own go; the guider is the one of its modular pipelines. The network is a small
class-conditional U-Net with random weights: put your own in its place.
"""

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DModel

from trimtab.diffusion.diffusers import APGGuider, DEISScheduler


class ClassPipeline(DiffusionPipeline):
    """Images of a class; class 10 stands for none."""

    def __init__(self, unet, scheduler, guider):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.guider = guider

    @torch.no_grad()
    def __call__(self, labels, num_inference_steps=10, generator=None):
        x = torch.randn(len(labels), 1, 8, 8, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for step, t in enumerate(self.scheduler.timesteps):
            self.guider.set_state(step=step, num_inference_steps=num_inference_steps, timestep=t)
            batches = self.guider.prepare_inputs({"labels": (labels, torch.full_like(labels, 10))})
            for batch in batches:
                self.guider.prepare_models(self.unet)
                batch.noise_pred = self.unet(x, t, class_labels=batch.labels).sample
                self.guider.cleanup_models(self.unet)
            x = self.scheduler.step(self.guider(batches).pred, t, x).prev_sample
        return x


torch.manual_seed(0)
blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
unet = UNet2DModel(8, 1, 1, block_out_channels=(8, 16), norm_num_groups=4, num_class_embeds=11, **blocks).eval()
# what your model was trained with
trained_with = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
scheduler = DEISScheduler.from_config(trained_with.config, timestep_spacing="quadratic")
images = {}
for scale in (1.0, 5.0):
    guider = APGGuider.from_config(trained_with.config, guidance_scale=scale)
    pipeline = ClassPipeline(unet, scheduler, guider)
    images[scale] = pipeline(torch.arange(4), generator=torch.Generator().manual_seed(0))
    print(f"guidance {scale:g}: images of {tuple(images[scale].shape)}, deviation {images[scale].std():.2f}")
