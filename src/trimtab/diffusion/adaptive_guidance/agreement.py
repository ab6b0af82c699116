"""AG: the second evaluation of a sample ends when both predictions agree."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.diffusion.denoiser import DenoiserLike
from trimtab.diffusion.guidance import Guidance, classifier_free_guidance, rows_of
from trimtab.diffusion.prediction import convert
from trimtab.diffusion.schedules import per_sample
from trimtab.ops.arguments import number, one_of, real_problem, same_shape
from trimtab.ops.units import power_of_two_unit

Space = Literal["residual", "eps"]


def agreement(first: Float[Tensor, "batch ..."], second: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
    """The cosine between two predictions, per sample over all other dimensions; half precision in float32.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> agreement(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 2.0]])).tolist()
        [1.0, 0.0]
    """
    if problem := real_problem(first=first, second=second):
        raise TypeError(problem)
    same_shape("second", second, "first", first)
    wide = torch.promote_types(first.dtype, torch.float32)
    first, second = (value.to(wide).flatten(1) for value in (first, second))
    first, second = (value / power_of_two_unit(value) for value in (first, second))
    return torch.nn.functional.cosine_similarity(first, second, dim=1)


class AdaptiveGuidance(Guidance):
    """Classifier-free guidance of each sample until its two predictions agree, the conditional model from then on.

    The step at which they are found to agree is still guided, since both are there; the next ones cost one evaluation.
    Which samples still need the second evaluation is decided by their values, so an accelerator is waited for at each
    step; conditions that have one row a sample are cut accordingly.

    Args:
        denoiser: called `denoiser(x, t, cond)`, also with some rows of the batch alone.
        cond: the condition guided towards.
        uncond: the condition guided away from.
        scale: w; 1 is the conditional model itself.
        threshold: the cosine from which on predictions agree; above 1 is classifier-free guidance. The authors' 0.999
            halves the guided steps of Stable Diffusion with 20; it does not carry over to other models.
        space: what the cosine is of: `residual`, the sample at unit variance less the predicted noise, or the noise
            itself, `eps`, which ends guidance at once for most models.

    Raises:
        ValueError: for a `scale` or `threshold` that is not finite, an unknown `space`, or a batch that changes its
            size within a run.

    Example:
        >>> from trimtab.diffusion import AnalyticGMM, CountNFE, deis, grids, schedules
        >>> mixture = AnalyticGMM.isotropic(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), std=0.2, labels=torch.arange(2))
        >>> counted = CountNFE(mixture.denoiser(schedules.VPLinear()))
        >>> guided = AdaptiveGuidance(counted, torch.tensor([0, 0, 1, 1]), scale=3.0)
        >>> x = deis(guided, counted.schedule.prior(4, 2), grids.power(counted.schedule, 20))
        >>> (x[:, 0] > 0).long().tolist(), 20 < counted.per_sample < 40
        ([0, 0, 1, 1], True)
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        cond: Any,
        uncond: Any = None,
        *,
        scale: float = 7.5,
        threshold: float = 0.999,
        space: Space = "residual",
    ) -> None:
        super().__init__(denoiser, cond, uncond)
        self.scale, self.threshold = number("scale", scale), number("threshold", threshold)
        self.space: Space = one_of("space", space, get_args(Space))
        self._guided: Tensor | None = None

    def reset(self) -> None:
        self._guided = None
        super().reset()

    def agree(self, x: Tensor, t: Tensor, cond: Tensor, uncond: Tensor) -> Float[Tensor, " batch"]:
        """The cosine of two predictions for the same samples."""
        if problem := real_problem(x=x, t=t, cond=cond, uncond=uncond):
            raise TypeError(problem)
        (alpha, sigma), kind = self.schedule.alpha_sigma(per_sample(t, x)), self.prediction
        first, second = (convert(value, x, alpha, sigma, kind, "eps") for value in (cond, uncond))
        if self.space == "residual":
            sample = x / (alpha.square() + sigma.square()).sqrt()
            first, second = sample - first, sample - second
        return agreement(first, second)

    def __call__(self, x: Tensor, t: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
        if problem := real_problem(x=x, t=t):
            raise TypeError(problem)
        if self.scale == 1:
            return self.conditional(x, t)
        before = torch.ones(len(x), dtype=torch.bool, device=x.device) if self._guided is None else self._guided
        if len(before) != len(x):
            raise ValueError(
                f"x must keep {len(before)} samples within a run, got {len(x)}; call reset() before a new run"
            )
        cond = self.conditional(x, t)
        rows = before.nonzero()[:, 0]
        if len(rows) == 0:
            return cond
        if len(rows) == len(x):
            uncond = self.unconditional(x, t)
            self._guided = self.agree(x, t, cond, uncond) < self.threshold
            return classifier_free_guidance(cond, uncond, self.scale)
        uncond, some = self.unconditional(x, t, rows), rows_of(cond, rows, len(x))
        self._guided = before.index_copy(0, rows, self.agree(x[rows], t[rows], some, uncond) < self.threshold)
        return cond.index_copy(0, rows, classifier_free_guidance(some, uncond, self.scale))
