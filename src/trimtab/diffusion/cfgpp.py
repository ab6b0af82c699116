r"""CFG++: guidance by a scale in [0, 1] that keeps samples on the data's manifold, and DDIM inversion with guidance.

To be used in place of classifier-free guidance where high scales distort samples, and wherever a real image has to be
carried to noise and back with guidance on, as editing does. It costs nothing over classifier-free guidance.

Guidance moves only the clean estimate; the noise that is put back is the unconditional one. From level t to s,

$$
\hat\varepsilon = \varepsilon_u + \lambda\,(\varepsilon_c - \varepsilon_u), \qquad
\hat x_0 = (x_t - \sigma_t\,\hat\varepsilon)/\alpha_t, \qquad
x_s = \alpha_s\,\hat x_0 + \sigma_s\,\varepsilon_u ,
$$

so that $\lambda$ interpolates between two clean estimates, the unconditional and the conditional one, and never leaves
what lies between. With DDIM a step is one of classifier-free guidance at the scale
$\lambda\,\rho_t/(\rho_t - \rho_s)$, $\rho = \sigma/\alpha$, which grows as steps shrink. Multistep samplers keep the
guided clean estimates of earlier steps; the authors' release keeps the unconditional ones.

Reference: Hyungjin Chung, Jeongsol Kim, Geon Yeong Park, Hyelin Nam and Jong Chul Ye, "CFG++: Manifold-constrained
Classifier Free Guidance for Diffusion Models", ICLR 2025, arXiv 2406.08070 (Algorithms 1 and 2).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.diffusion.denoiser import DenoiserLike, Split, levels, model_times, start
from trimtab.diffusion.guidance import Guidance, classifier_free_guidance
from trimtab.diffusion.prediction import convert
from trimtab.diffusion.schedules import per_sample
from trimtab.ops.arguments import in_range, real_problem
from trimtab.ops.callbacks import StepCallback, after_step


class CFGPlusPlus(Guidance):
    """CFG++ of a denoiser; it returns a `Split`, so it is the outermost wrapper.

    Args:
        denoiser: called `denoiser(x, t, cond)`; its prediction may be of any kind.
        cond: the condition guided towards.
        uncond: the condition guided away from, whose noise is put back.
        scale: lambda, in [0, 1]; 0 is the unconditional model itself. The authors' 0.6 follows the condition about as
            closely as classifier-free guidance at 7.5 does in 50 steps.

    Raises:
        ValueError: for a `scale` outside [0, 1].

    Example:
        >>> from trimtab.diffusion import AnalyticGMM, ddim, grids, schedules
        >>> mixture = AnalyticGMM.isotropic(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), std=0.2, labels=torch.arange(2))
        >>> denoiser = mixture.denoiser(schedules.VPLinear())
        >>> guided = CFGPlusPlus(denoiser, torch.tensor([0, 0, 1, 1]), scale=0.6)
        >>> x = ddim(guided, denoiser.schedule.prior(4, 2), grids.power(denoiser.schedule, 20))
        >>> (x[:, 0] > 0).long().tolist()
        [0, 0, 1, 1]
    """

    def __init__(self, denoiser: DenoiserLike, cond: Any, uncond: Any = None, *, scale: float = 0.6) -> None:
        super().__init__(denoiser, cond, uncond)
        self.scale = in_range("scale", scale, 0, 1)

    def __call__(self, x: Tensor, t: Tensor, /, *args: Any, **kwargs: Any) -> Tensor | Split:
        if problem := real_problem(x=x, t=t):
            raise TypeError(problem)
        uncond = self.unconditional(x, t)
        if self.scale == 0:
            return uncond
        guided = classifier_free_guidance(self.conditional(x, t), uncond, self.scale)
        (alpha, sigma), kind = self.schedule.alpha_sigma(per_sample(t, x)), self.prediction
        x0, eps = convert(guided, x, alpha, sigma, kind, "x0"), convert(uncond, x, alpha, sigma, kind, "eps")
        return Split(x0.to(uncond.dtype), eps.to(uncond.dtype))


@torch.no_grad()
def ddim_invert(
    denoiser: DenoiserLike,
    x: Float[Tensor, "batch ..."],
    times: Float[Tensor, " steps+1"],
    *,
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch ..."]:
    """Carry samples to the noise that `ddim` makes them from, approximately: its steps backwards.

    A step back evaluates the denoiser at the lower of its two levels, where the step forward did so at the higher one;
    the two undo each other exactly if the predictions agree, which many small steps bring about. Under CFG++ the noise
    taken out is the unconditional one and the noise put in is the guided one. (The authors' release tells the network
    the time of the higher level instead; here it is the paper's.)

    Args:
        denoiser: the model with its schedule; guided by `CFGPlusPlus` or any other rule, or not guided.
        x: samples at `times[-1]`, such as images.
        times: falling times, those that `ddim` is to be given.
        callback: called after every step back as `callback(step, time, x)`, with the higher level's time; a tensor that
            it returns replaces x.

    Returns:
        Noise at `times[0]`.

    Raises:
        ValueError: for times that do not fall, or alpha or sigma of 0 at one of them.

    Example:
        >>> from trimtab.diffusion import AnalyticGMM, ddim, grids, schedules
        >>> denoiser = AnalyticGMM.ring(dtype=torch.float64).denoiser(schedules.VPLinear())
        >>> x = denoiser.mixture.sample(8, generator=torch.Generator().manual_seed(0))
        >>> times = grids.log_snr(denoiser.schedule, 200)
        >>> bool(torch.allclose(ddim(denoiser, ddim_invert(denoiser, x, times), times), x, atol=0.05))
        True
    """
    times = start(denoiser, x, times)
    alpha, rho = (level.tolist() for level in levels(denoiser.schedule, times))
    model_t = model_times(times, x)
    for step, (i, reached) in enumerate(reversed(list(enumerate(times[:-1].tolist())))):
        sigma = alpha[i + 1] * rho[i + 1]
        value = denoiser(x, model_t[i + 1])
        if isinstance(value, Split):
            taken_out, put_in = value.eps, convert(value.x0, x, alpha[i + 1], sigma, "x0", "eps")
        else:
            taken_out = put_in = convert(value, x, alpha[i + 1], sigma, denoiser.prediction, "eps")
        x = after_step(callback, step, reached, alpha[i] * ((x - sigma * taken_out) / alpha[i + 1] + rho[i] * put_in))
    return x
