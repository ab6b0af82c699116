r"""Classifier-free guidance, and the form that guidance takes: a denoiser around the user's denoiser.

A guidance rule is built from a denoiser that accepts a condition, `denoiser(x, t, cond)`, and the condition to guide
towards. It is then itself a denoiser `(x, t) -> prediction`, of the same kind of prediction, so it goes into every
sampler, and into other wrappers. Classifier-free guidance extrapolates from what the model says without the condition:

$$ \tilde D = D_u + w\,(D_c - D_u). $$

w = 1 is the conditional model, 0 the unconditional one; both then cost one evaluation and return its very numbers.

Reference: Jonathan Ho and Tim Salimans, "Classifier-Free Diffusion Guidance", 2022, arXiv 2207.12598 (w there
is 1 less).
The rescaling is Eq. 15-16 of Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", WACV 2024,
arXiv 2305.08891.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.diffusion.denoiser import DenoiserLike, Split, form_problem, reset
from trimtab.diffusion.prediction import Prediction, convert
from trimtab.diffusion.schedules import NoiseSchedule, per_sample
from trimtab.ops.arguments import in_range, looked_at, number, real_problem


class Guidance:
    """What guidance rules share: the wrapped denoiser, its two conditions, and the denoiser's form.

    A rule defines `__call__(x, t)`, and `reset()` (calling `super().reset()`) if it remembers anything within a run.

    Args:
        denoiser: called `denoiser(x, t, cond)`.
        cond: the condition guided towards, in whatever form the model takes.
        uncond: the condition guided away from: None, a null class, an empty or negative prompt.
    """

    def __init__(self, denoiser: DenoiserLike, cond: Any, uncond: Any = None) -> None:
        if problem := form_problem(denoiser=denoiser):
            raise TypeError(problem)
        self.denoiser, self.cond, self.uncond = denoiser, cond, uncond

    @property
    def schedule(self) -> NoiseSchedule:
        """The schedule of the wrapped denoiser."""
        return self.denoiser.schedule

    @property
    def prediction(self) -> Prediction:
        """The kind of the wrapped denoiser's prediction."""
        return self.denoiser.prediction

    def conditional(self, x: Tensor, t: Tensor) -> Tensor:
        """The prediction with the condition; one evaluation."""
        return self._evaluate(x, t, self.cond)

    def unconditional(self, x: Tensor, t: Tensor, rows: Tensor | None = None) -> Tensor:
        """The prediction without it; one evaluation, of some rows of the batch alone where they are given."""
        if rows is None:
            return self._evaluate(x, t, self.uncond)
        return self._evaluate(x[rows], t[rows], rows_of(self.uncond, rows, len(x)))

    def _evaluate(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        value = self.denoiser(x, t, cond)
        if isinstance(value, Split):
            raise TypeError("denoiser returned a Split; a rule that renoises differently must be the outermost wrapper")
        return value

    def __call__(self, x: Tensor, t: Tensor, /, *args: Any, **kwargs: Any) -> Tensor | Split:
        raise NotImplementedError(f"{type(self).__name__} must define __call__(x, t)")

    def reset(self) -> None:
        """Forget the state of the last run; samplers call it before each."""
        reset(self.denoiser)


def rows_of(cond: Any, rows: Tensor, batch: int) -> Any:
    """Some rows of a condition: of every tensor in it that has one row a sample; the rest is for all samples alike.

    Example:
        >>> rows_of({"label": torch.arange(3), "style": "ink"}, torch.tensor([2]), batch=3)
        {'label': tensor([2]), 'style': 'ink'}
    """
    if isinstance(cond, Tensor) and cond.ndim and len(cond) == batch:
        return cond[rows]
    if isinstance(cond, Mapping):
        return {name: rows_of(part, rows, batch) for name, part in cond.items()}
    if isinstance(cond, list | tuple) and not hasattr(cond, "_fields"):
        return type(cond)(rows_of(part, rows, batch) for part in cond)
    return cond


def classifier_free_guidance(
    cond: Float[Tensor, "batch ..."], uncond: Float[Tensor, "batch ..."], scale: float
) -> Float[Tensor, "batch ..."]:
    """D_u + scale (D_c - D_u), in any kind of prediction.

    Example:
        >>> classifier_free_guidance(torch.tensor([[2.0]]), torch.tensor([[1.0]]), scale=3.0).tolist()
        [[4.0]]
    """
    if problem := real_problem(cond=cond, uncond=uncond, scale=scale):
        raise TypeError(problem)
    if not isinstance(scale, Tensor) and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    return cond + (scale - 1) * (cond - uncond)


def guidance_rescale(
    guided: Float[Tensor, "batch ..."], cond: Float[Tensor, "batch ..."], amount: float = 0.7
) -> Float[Tensor, "batch ..."]:
    """Bring each sample's standard deviation back to the conditional prediction's, by `amount` in [0, 1].

    A guided sample without spread, a constant one or one of a single number, stays as it is.

    Raises:
        ValueError: `amount` is outside [0, 1], or the shapes differ or have no dimension beside the batch.

    Example:
        >>> guidance_rescale(torch.tensor([[-4.0, 4.0], [3.0, 3.0]]), torch.tensor([[-1.0, 1.0], [0.0, 1.0]]), 1.0)
        tensor([[-1.,  1.],
                [ 3.,  3.]])
    """
    if problem := real_problem(guided=guided, cond=cond):
        raise TypeError(problem)
    if not 0 <= amount <= 1:
        raise ValueError(f"amount must be in [0, 1], got {amount}")
    if guided.shape != cond.shape:
        raise ValueError(f"guided must have the shape of cond, {tuple(cond.shape)}, got {tuple(guided.shape)}")
    if cond.ndim < 2:
        raise ValueError(f"cond must have shape (batch, ...), got {tuple(cond.shape)}")
    dims = tuple(range(1, cond.ndim))
    # The divisor of the variance cancels in the ratio; the plain mean is defined for a single number too.
    have = guided.std(dims, correction=0, keepdim=True)
    spread = have > torch.finfo(have.dtype).eps * guided.abs().amax(dims, keepdim=True)  # and not rounding alone
    ratio = cond.std(dims, correction=0, keepdim=True) / torch.where(spread, have, 1)
    return torch.lerp(guided, guided * torch.where(spread, ratio, 1), amount)


class ClassifierFreeGuidance(Guidance):
    """Classifier-free guidance of a denoiser.

    Args:
        denoiser: called `denoiser(x, t, cond)`.
        cond: the condition guided towards.
        uncond: the condition guided away from.
        scale: w; 1 is the conditional model itself.
        rescale: how far to apply `guidance_rescale`, in [0, 1]; its authors use 0.7.

    Raises:
        ValueError: for a `scale` that is not finite or a `rescale` outside [0, 1].

    Example:
        >>> from trimtab.diffusion import AnalyticGMM, deis, grids, schedules
        >>> mixture = AnalyticGMM.isotropic(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), std=0.2, labels=torch.arange(2))
        >>> denoiser = mixture.denoiser(schedules.VPLinear())
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> guided = ClassifierFreeGuidance(denoiser, labels, scale=3.0)
        >>> x = deis(guided, denoiser.schedule.prior(4, 2), grids.power(denoiser.schedule, 10))
        >>> (x[:, 0] > 0).long().tolist()
        [0, 0, 1, 1]
    """

    def __init__(
        self, denoiser: DenoiserLike, cond: Any, uncond: Any = None, *, scale: float = 7.5, rescale: float = 0.0
    ) -> None:
        super().__init__(denoiser, cond, uncond)
        self.scale = number("scale", scale)
        self.rescale = in_range("rescale", rescale, 0, 1)

    def __call__(self, x: Tensor, t: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
        if problem := real_problem(x=x, t=t):
            raise TypeError(problem)
        if self.scale == 0:
            return self.unconditional(x, t)
        cond = self.conditional(x, t)
        if self.scale == 1:
            return cond
        guided = classifier_free_guidance(cond, self.unconditional(x, t), self.scale)
        return guidance_rescale(guided, cond, self.rescale) if self.rescale else guided


class ClassifierGuidance(Guidance):
    r"""Guidance of a denoiser by the gradient of a classifier of noisy samples.

    To the score of the model it adds $s\,\nabla_x \log p(y \mid x, t)$: with s = 1, an unconditional model and the
    true classifier, the conditional score. One evaluation of the model a step, and one backward pass of the classifier.

    Reference: Prafulla Dhariwal and Alex Nichol, "Diffusion Models Beat GANs on Image Synthesis", NeurIPS 2021, arXiv
    2105.05233 (Sec. 4.2).

    Args:
        denoiser: called `denoiser(x, t, cond)`; it may leave the condition out of account.
        cond: the classes guided towards, int64 of shape `(batch,)`.
        classifier: called `classifier(x, t)` with noisy samples; returns logits of shape `(batch, classes)`.
        scale: s; 0 is the model itself.

    Raises:
        ValueError: for a `scale` that is not finite.
        TypeError: if `classifier` is not callable.

    Example:
        >>> from trimtab.diffusion import AnalyticGMM, Denoiser, deis, grids, schedules
        >>> mixture = AnalyticGMM.isotropic(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), std=0.2, labels=torch.arange(2))
        >>> schedule, model = schedules.VPLinear(), mixture.denoiser(schedules.VPLinear())
        >>> unconditional = Denoiser(lambda x, t, cond: model(x, t), schedule, prediction="x0")
        >>> def classifier(x, t):
        ...     return mixture.class_log_posterior(x, schedule.alpha(t), schedule.sigma(t))
        >>> guided = ClassifierGuidance(unconditional, torch.tensor([0, 0, 1, 1]), classifier=classifier)
        >>> x = deis(guided, schedule.prior(4, 2), grids.power(schedule, 20))
        >>> (x[:, 0] > 0).long().tolist()
        [0, 0, 1, 1]
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        cond: Int[Tensor, " batch"],
        uncond: Any = None,
        *,
        classifier: Callable[[Tensor, Tensor], Tensor],
        scale: float = 1.0,
    ) -> None:
        super().__init__(denoiser, cond, uncond)
        check_classifier(classifier)
        self.classifier, self.scale = classifier, number("scale", scale)

    def __call__(self, x: Tensor, t: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
        if problem := real_problem(x=x, t=t):
            raise TypeError(problem)
        value = self.conditional(x, t)
        if self.scale == 0:
            return value
        gradient = class_gradient(lambda at: self.classifier(at, t.clone()), x, self.cond)
        (alpha, sigma), kind = self.schedule.alpha_sigma(per_sample(t, x)), self.prediction
        score = convert(value, x, alpha, sigma, kind, "score") + self.scale * gradient
        return convert(score, x, alpha, sigma, "score", kind)


def class_gradient(
    classifier: Callable[[Tensor], Tensor],
    x: Float[Tensor, "batch ..."],
    labels: Int[Tensor, " batch"],
    *,
    joint: float = 1.0,
    marginal: float = 1.0,
) -> Float[Tensor, "batch ..."]:
    r"""The gradient in x of $a f_y(x) - \log\sum_k e^{b f_k(x)}$ for logits f, each sample's of its class y.

    With a = `joint` and b = `marginal` both 1 it is that of $\log p(y \mid x)$. It also works where gradients are
    switched off, and in inference mode.

    Raises:
        TypeError: if `labels` is no tensor of integers.
        ValueError: if `classifier` does not return a row of logits for each sample, or a label is none of its classes.

    Example:
        >>> class_gradient(lambda x: x * torch.tensor([1.0, 3.0]), torch.zeros(1, 1), torch.tensor([1]))
        tensor([[1.]])
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be integers, int64 or int32, got {labels.dtype}")
    with torch.inference_mode(False), torch.enable_grad():
        at = x.detach().clone().requires_grad_()
        logits = classifier(at)
        if logits.ndim != 2 or len(logits) != len(x):
            raise ValueError(f"classifier must return logits of shape ({len(x)}, classes), got {tuple(logits.shape)}")
        if looked_at(labels) and not bool(((labels >= 0) & (labels < logits.shape[1])).all()):
            raise ValueError(f"labels must be in [0, {logits.shape[1]}), the classes of classifier, got others")
        # A tensor that was made in inference mode is of use here as a copy alone.
        chosen = logits.gather(1, labels.clone().to(logits.device).expand(len(x))[:, None])[:, 0]
        value = joint * chosen - (marginal * logits).logsumexp(dim=1)
        return torch.autograd.grad(value.sum(), at)[0].to(x.dtype)


def check_classifier(classifier: object) -> None:
    """Refuse what cannot be called."""
    if not callable(classifier):
        raise TypeError(f"classifier must be callable, got {type(classifier).__name__}")
