r"""GFCG: guidance away from the class a sample is confused with, named by a classifier that needs no gradients.

For models whose samples turn into a neighbouring class. It costs what classifier-free guidance does, two evaluations a
step, and one forward pass of an ordinary classifier of clean samples.

At each step the classifier reads the denoised prediction of the wanted class c; the reference is the class r it gives
the most probability to apart from c, and the guidance is the stronger the more of it r has:

$$
r = \arg\max_{k \ne c} p_k, \qquad q = \frac{p_r}{p_c + p_r}, \qquad
\tilde D = D_r + (1 + s\,q)\,(D_c - D_r).
$$

A sample that is surely of its class is left to the conditional model. With autoguidance $D_r$ is the prediction of a
weaker model, for the reference class, at no further cost.

What is the authors': a classifier that is only run, the reference class and the scale found anew at every step from how
confused the sample is, a class-conditional prediction as what is guided away from, and the union with autoguidance. The
formula of the scale is a reconstruction, since no text of the method was available; `weight` takes another.

Reference: Rahul Shenoy, Zhihong Pan, Kaushik Balakrishnan, Qisen Cheng, Yongmoon Jeon, Heejune Yang and Jaewon Kim,
"Gradient-Free Classifier Guidance for Diffusion Model Sampling", WACV 2026, arXiv 2411.15393.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.diffusion.denoiser import DenoiserLike, Split, form_problem, reset
from trimtab.diffusion.guidance import Guidance, check_classifier
from trimtab.diffusion.prediction import convert
from trimtab.diffusion.schedules import per_sample
from trimtab.ops.arguments import looked_at, non_negative, real_problem


def confusion(
    probabilities: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]
) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"]]:
    """The class each sample is most confused with, and how much: p_r / (p_c + p_r), 0 where surely not.

    Args:
        probabilities: of the classes, at least two.
        labels: the class c that each sample should have.

    Raises:
        TypeError: if `labels` is no tensor of integers.
        ValueError: if `probabilities` is not a row of at least two classes for each label, or a label is none of them.

    Example:
        >>> confusion(torch.tensor([[0.6, 0.1, 0.2]]), torch.tensor([0]))
        (tensor([2]), tensor([0.2500]))
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be integers, int64 or int32, got {labels.dtype}")
    if not isinstance(probabilities, Tensor):
        raise TypeError(f"probabilities must be a tensor, got {type(probabilities).__name__}")
    if not probabilities.is_floating_point():
        raise TypeError(f"probabilities must be floating point, got {probabilities.dtype}")
    if probabilities.ndim != 2 or len(probabilities) != len(labels) or probabilities.shape[1] < 2:
        raise ValueError(
            f"probabilities must have shape ({len(labels)}, classes) with at least 2 classes, got "
            f"{tuple(probabilities.shape)}"
        )
    if looked_at(labels) and not bool(((labels >= 0) & (labels < probabilities.shape[1])).all()):
        raise ValueError(f"labels must be in [0, {probabilities.shape[1]}), got others")
    wanted = labels[:, None]
    own = probabilities.gather(1, wanted)[:, 0]
    most, reference = probabilities.scatter(1, wanted, -1.0).max(dim=1)
    # Both can underflow where a third class has everything: then the sample is as confused as can be.
    both = own + most
    return reference, torch.where(both > 0, most / both.clamp_min(torch.finfo(both.dtype).tiny), 0.5)


class GradientFreeClassifierGuidance(Guidance):
    """GFCG of a denoiser.

    Args:
        denoiser: called `denoiser(x, t, labels)` with int64 labels of shape `(batch,)`.
        cond: the classes guided towards, int64 of shape `(batch,)`.
        uncond: not used.
        classifier: called `classifier(x0)` with denoised predictions; returns logits of shape `(batch, classes)` for
            the classes that the denoiser knows, in their order.
        scale: s; 0 is the conditional model itself.
        weaker: model to evaluate for the reference class, for the union with autoguidance; None for the denoiser.
        weight: the confusion q of shape `(batch,)` mapped to the factor on D_c - D_r, in place of 1 + s q.

    Raises:
        ValueError: for a `scale` that is negative or not finite.
        TypeError: if `classifier` is not callable, `cond` no tensor, or `weaker` lacks the form of a denoiser.

    Example:
        >>> from trimtab.diffusion import AnalyticGMM, deis, degrade, grids, schedules
        >>> mixture = AnalyticGMM.isotropic(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), std=0.2, labels=torch.arange(2))
        >>> denoiser = degrade(mixture.denoiser(schedules.VPLinear()), class_blur=0.5)
        >>> guided = GradientFreeClassifierGuidance(
        ...     denoiser, torch.tensor([0, 0, 1, 1]), classifier=mixture.class_log_posterior, scale=4.0
        ... )
        >>> x = deis(guided, denoiser.schedule.prior(4, 2), grids.power(denoiser.schedule, 20))
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
        scale: float = 4.0,
        weaker: DenoiserLike | None = None,
        weight: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(denoiser, cond, uncond)
        check_classifier(classifier)
        if not isinstance(cond, Tensor):
            raise TypeError(f"cond must be a tensor, got {type(cond).__name__}")
        if weaker is not None and (problem := form_problem(weaker=weaker)):
            raise TypeError(problem)
        self.classifier, self.scale = classifier, non_negative("scale", scale)
        self.weaker, self.weight = denoiser if weaker is None else weaker, weight

    def reset(self) -> None:
        super().reset()
        if self.weaker is not self.denoiser:
            reset(self.weaker)

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
        if problem := real_problem(x=x, t=t):
            raise TypeError(problem)
        cond = self.conditional(x, t)
        if self.scale == 0 and self.weight is None:
            return cond
        (alpha, sigma), kind = self.schedule.alpha_sigma(per_sample(t, x)), self.prediction
        clean = convert(cond, x, alpha, sigma, kind, "x0")
        reference, share = confusion(self.classifier(clean).softmax(dim=1), self.cond.expand(len(x)))
        weight = self.weight(share) if self.weight else 1 + self.scale * share
        away = self.weaker(x, t, reference)
        if isinstance(away, Split):
            raise TypeError("weaker must return one prediction, got a Split")
        if self.weaker.prediction != kind:
            away = convert(away, x, alpha, sigma, self.weaker.prediction, kind)
        return cond + per_sample(weight.to(x.dtype) - 1, x) * (cond - away)
