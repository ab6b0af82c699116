r"""EluCD: guidance by an ordinary classifier of clean samples, made fit for it without training.

For anyone who has a classifier at hand that never saw noise. It costs one pass through the classifier and back per
step; the model is neither evaluated again nor differentiated.

Four things make such a classifier guide well. It reads the denoised prediction $\hat x_0$, not the noisy sample, and
the gradient is taken there. Its ReLUs give way to softplus, whose gradients are smooth (`smooth_activations`). The
logits $f$ have a temperature for the joint and a smaller one for the marginal part of

$$
d = \nabla_{\hat x_0} \left[\tau_1 f_y(\hat x_0) - \log\sum_k e^{\tau_2 f_k(\hat x_0)}\right] ,
$$

and the guidance is raised in the middle of the run, by a sine: to the score is added $s\,w(t)\,d$ with

$$
w(t) = 1 + \gamma\,\frac{g^2(T)}{g^2(t)}\,\sin\frac{\pi t}{T} .
$$

There $g^2$ is the schedule's squared diffusion. In the paper the mean of an ancestral step moves by
$s\,(\sigma_t^2 + \gamma\sigma_T^2 \sin(\pi t/T))\,d$, with $\sigma_t^2$ the variance of the step; this is the same as
an addition to the score, and works with every sampler. What guides the choice is calibration on denoised predictions:
`trimtab.losses.expected_calibration_error`.

The authors' release for EDM differs: it normalises the gradient and reads the noisy sample, scaled; that form is left
out here.

Reference: Jiajun Ma, Tianyang Hu, Wenjia Wang and Jiacheng Sun, "Elucidating The Design Space of Classifier-Guided
Diffusion Generation", ICLR 2024, arXiv 2310.11311.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.diffusion.denoiser import DenoiserLike
from trimtab.diffusion.guidance import Guidance, check_classifier, class_gradient
from trimtab.diffusion.prediction import convert
from trimtab.diffusion.schedules import NoiseSchedule, per_sample
from trimtab.ops.arguments import non_negative, number, positive, real_problem


class OffTheShelfGuidance(Guidance):
    """Guidance of a denoiser by a classifier of clean samples.

    Args:
        denoiser: called `denoiser(x, t, cond)`; it may leave the condition out of account.
        cond: the classes guided towards, int64 of shape `(batch,)`.
        uncond: not used.
        classifier: called `classifier(x0)` with denoised predictions; returns logits of shape `(batch, classes)`.
            Networks with ReLUs are better given as `smooth_activations(network)`.
        scale: s; 0 is the model itself.
        joint_temperature: factor on the logit of the class.
        marginal_temperature: factor on the logits in the sum over classes; both 1 is the gradient of log p(y | x0), 0
            leaves the sum out. The authors use 0.5 with DDPM and 0 with EDM.
        gamma: height of the sine; 0 is guidance that is as strong at all times. For which schedules it is meant says
            `sine_weight`.

    Raises:
        ValueError: for a `scale`, `gamma` or temperature that is not finite, or negative but for the scale; for a
            schedule without finite g^2(T), such as `Flow()`, unless `gamma` is 0.
        TypeError: if `classifier` is not callable.

    Example:
        >>> from trimtab.diffusion import AnalyticGMM, Denoiser, deis, grids, schedules
        >>> mixture = AnalyticGMM.isotropic(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), std=0.2, labels=torch.arange(2))
        >>> model = mixture.denoiser(schedules.VPLinear())
        >>> unconditional = Denoiser(lambda x, t, cond: model(x, t), model.schedule, prediction="x0")
        >>> classifier = lambda x0: x0[:, :1] * torch.tensor([-4.0, 4.0])
        >>> guided = OffTheShelfGuidance(unconditional, torch.tensor([0, 0, 1, 1]), classifier=classifier)
        >>> x = deis(guided, model.schedule.prior(4, 2), grids.power(model.schedule, 20))
        >>> (x[:, 0] > 0).long().tolist()
        [0, 0, 1, 1]
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        cond: Int[Tensor, " batch"],
        uncond: Any = None,
        *,
        classifier: Callable[[Tensor], Tensor],
        scale: float = 1.0,
        joint_temperature: float = 1.0,
        marginal_temperature: float = 0.5,
        gamma: float = 0.3,
    ) -> None:
        super().__init__(denoiser, cond, uncond)
        check_classifier(classifier)
        self.classifier, self.scale = classifier, number("scale", scale)
        self.joint_temperature = non_negative("joint_temperature", joint_temperature)
        self.marginal_temperature = non_negative("marginal_temperature", marginal_temperature)
        self.gamma = non_negative("gamma", gamma)
        if self.gamma and not math.isfinite(float(self.schedule.g2(torch.tensor(self.schedule.t_max)))):
            raise ValueError(
                f"gamma must be 0 where the squared diffusion is infinite at t_max, as on "
                f"{type(self.schedule).__name__}, got {gamma}; or give the schedule a t_max below"
            )

    def __call__(self, x: Tensor, t: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
        if problem := real_problem(x=x, t=t):
            raise TypeError(problem)
        value = self.conditional(x, t)
        if self.scale == 0:
            return value
        level, kind = per_sample(t, x), self.prediction
        alpha, sigma = self.schedule.alpha_sigma(level)
        gradient = class_gradient(
            self.classifier,
            convert(value, x, alpha, sigma, kind, "x0"),
            self.cond,
            joint=self.joint_temperature,
            marginal=self.marginal_temperature,
        )
        strength = self.scale * sine_weight(self.schedule, level, self.gamma)
        score = convert(value, x, alpha, sigma, kind, "score") + strength * gradient
        return convert(score, x, alpha, sigma, "score", kind).to(value.dtype)


def sine_weight(schedule: NoiseSchedule, t: Float[Tensor, "..."], gamma: float = 0.3) -> Float[Tensor, "..."]:
    """w(t): 1 at the end of the schedule, and more before it.

    It is made for variance-preserving schedules with a linear beta, on which it falls back towards 1 at the beginning.
    On `EDM` it rises there to 1 + pi gamma. Where g^2 grows by orders of magnitude over the run, as on `VE`, `SubVP`,
    `VPCosine` and `Flow`, it is orders of magnitude above 1: take `gamma=0` there.

    Example:
        >>> from trimtab.diffusion.schedules import VPLinear
        >>> sine_weight(VPLinear(), torch.tensor([0.5, 1.0], dtype=torch.float64)).round(decimals=3).tolist()
        [1.597, 1.0]
    """
    if problem := real_problem(t=t):
        raise TypeError(problem)
    if not math.isfinite(gamma):
        raise ValueError(f"gamma must be finite, got {gamma}")
    if gamma == 0:
        return torch.ones_like(t)
    # Both ends of the ratio in one call: a schedule may have to differentiate for it.
    noise = schedule.g2(torch.cat([t.new_full((1,), schedule.t_max), t.reshape(-1)]))
    height = noise[0] / noise[1:].reshape(t.shape).clamp_min(torch.finfo(t.dtype).tiny)
    # The sine of pi is not quite 0 in floating point, nor is anything beyond the schedule's end meant.
    return 1 + gamma * height * torch.sin(math.pi * t / schedule.t_max).clamp_min(0)


def smooth_activations(module: nn.Module, beta: float = 3.0) -> nn.Module:
    """A copy of a network in which every `nn.ReLU` is a softplus, log(1 + exp(beta x)) / beta.

    The larger beta, the closer to ReLU; the authors use 3 with DDPM and 5 with EDM. Parameters keep their names. A
    network that calls `torch.relu` itself has nothing to replace and is refused.

    Raises:
        ValueError: if `module` holds no `nn.ReLU`, or `beta` is not positive and finite.
        TypeError: if `module` is no `nn.Module`.

    Example:
        >>> smooth_activations(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
        Sequential(
          (0): Linear(in_features=2, out_features=3, bias=True)
          (1): Softplus(beta=3.0, threshold=20.0)
        )
    """
    positive("beta", beta)
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    if not any(isinstance(part, nn.ReLU) for part in module.modules()):
        raise ValueError(f"module must hold at least one nn.ReLU, got {type(module).__name__} without any")
    return _smoothed(copy.deepcopy(module), beta)


def _smoothed(module: nn.Module, beta: float) -> nn.Module:
    if isinstance(module, nn.ReLU):
        return nn.Softplus(beta)
    for name, child in list(module._modules.items()):  # under every name, also of one that has several
        if child is not None:
            setattr(module, name, _smoothed(child, beta))
    return module
