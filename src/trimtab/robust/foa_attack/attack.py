"""The attack: signed steps on the alignment with several surrogates, each weighed by how fast it comes nearer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from trimtab.ops.arguments import (
    floating_tensor,
    in_range,
    integer,
    non_negative,
    out_of_reach,
    positive,
    real_problem,
    same_shape,
)
from trimtab.ops.attack import ball_ends, eval_mode
from trimtab.robust.bounds import in_order
from trimtab.robust.foa_attack.alignment import cluster_tokens, local_alignment
from trimtab.robust.foa_attack.crops import crop_resized, random_boxes

Features = tuple[Tensor, Tensor]
"""Of a batch: a global feature each, (batch, dim), and patch tokens, (batch, tokens, dim)."""
Surrogate = Callable[[Tensor], Features]
"""From images to their features. A module is put into eval mode for the attack."""


def ensemble_weights(
    scores: Float[Tensor, "surrogates ..."],
    previous: Float[Tensor, "surrogates ..."] | None,
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "surrogates ..."]:
    """Weights of surrogates, which sum to their number: more for one whose score has grown more since the last step.

    Args:
        scores: now.
        previous: at the last step; None at the first, where all weigh one.
        temperature: small is nearly the fastest alone, large weighs all alike.

    Raises:
        TypeError: `scores` or `previous` is no floating-point tensor.
        ValueError: `previous` has another shape, or `temperature` is not positive.

    Example:
        >>> ensemble_weights(torch.tensor([0.4, 0.5]), torch.tensor([0.2, 0.5]))
        tensor([1.4621, 0.5379])
    """
    positive("temperature", temperature)
    if not all(
        isinstance(t, Tensor) and t.is_floating_point() for t in (scores, *([] if previous is None else [previous]))
    ):
        raise TypeError("scores and previous must be floating-point tensors, got others")
    scores = scores.detach()
    if previous is None:
        return torch.ones_like(scores)
    same_shape("previous", previous, "scores", scores)
    ratio = torch.where(previous > 0, scores / previous.clamp_min(1e-8), 1.0).clamp(0.0, 10.0)
    return len(scores) * (ratio / temperature).softmax(0)


class FOAAttack:
    """The whole attack; called as `attack(x, targets)` it gives images near `x` whose features are the targets'.

    Args:
        surrogates: from images to `(global, tokens)`, of shapes (batch, dim) and (batch, n, dim).
        eps: largest change of a pixel, in the unit of the pixels; the authors' 16 of 255.
        step_size: of a signed step; the authors' 1 of 255 for `eps` 16: a sixteenth where it is None.
        steps: number of steps.
        num_clusters: centres of an image's tokens; 0 compares the mean tokens in their place.
        local_weight: of the local score; 0 aligns globally alone.
        temperature: of the surrogates' weights; None weighs all alike.
        reg: weight of the entropy in the transport plan.
        crop_scale: least and largest area of the crops, as shares of the image; None crops nothing.
        bounds: smallest and largest value of a pixel.

    Raises:
        TypeError: a surrogate cannot be called.
        ValueError: there is no surrogate, a number is out of its range, or `bounds` are not two numbers in order.

    Example:
        >>> look = lambda x: (x.flatten(1), x.flatten(2).mT)
        >>> attack = FOAAttack([look], eps=0.1, steps=5, num_clusters=2)
        >>> x, targets = torch.full((1, 2, 4, 4), 0.5), torch.rand(1, 2, 4, 4)
        >>> moved = attack(x, targets, generator=torch.Generator().manual_seed(0))
        >>> bool((moved - x).abs().max() <= 0.1 + 1e-6)
        True
    """

    def __init__(
        self,
        surrogates: Sequence[Surrogate],
        *,
        eps: float = 16 / 255,
        step_size: float | None = None,
        steps: int = 300,
        num_clusters: int = 10,
        local_weight: float = 0.2,
        temperature: float | None = 1.0,
        reg: float = 0.1,
        crop_scale: tuple[float, float] | None = (0.5, 0.9),
        bounds: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        self.surrogates = list(surrogates)
        if not self.surrogates:
            raise ValueError("surrogates must be at least one, got none")
        for surrogate in self.surrogates:
            if not callable(surrogate):
                raise TypeError(f"surrogates must be callable, got {type(surrogate).__name__}")
        self.eps = positive("eps", eps)
        self.step_size = self.eps / 16 if step_size is None else positive("step_size", step_size)
        self.steps = integer("steps", steps)
        self.num_clusters = integer("num_clusters", num_clusters, 0)
        self.local_weight = non_negative("local_weight", local_weight)
        self.temperature = None if temperature is None else positive("temperature", temperature)
        self.reg = positive("reg", reg)
        if crop_scale is not None:
            random_boxes(1, crop_scale, generator=torch.Generator().manual_seed(0))
        self.crop_scale = crop_scale
        if not in_order(bounds):
            raise ValueError(f"bounds must be two finite numbers in order, got {bounds}")
        low, high = bounds
        self.bounds = (in_range("bounds", low, -torch.inf, high, "left"), high)

    def scores(
        self, x: Float[Tensor, "batch channels height width"], targets: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "surrogates batch"]:
        """How near the features of images are to those of their targets, by each surrogate; gradients flow to `x`.

        With itself an image has 1 + `local_weight`, or a little less: entropy blurs the plan.

        Raises:
            ValueError: a surrogate's features do not fit, or an image has fewer tokens than clusters.
        """
        if problem := real_problem(x=x, targets=targets):
            raise TypeError(problem)
        found: list[Tensor] = []
        for surrogate in self.surrogates:
            with torch.no_grad():
                wanted, wanted_tokens = surrogate(targets)
            feature, tokens = surrogate(x)
            score = F.cosine_similarity(floating_tensor("global", feature), wanted.to(feature), dim=1)
            if self.local_weight:
                here, there = self._summed_up(tokens), self._summed_up(wanted_tokens)
                score = score + self.local_weight * local_alignment(here, there, reg=self.reg)
            found.append(score)
        return torch.stack(found)

    def _summed_up(self, tokens: Tensor) -> Tensor:
        tokens = F.normalize(floating_tensor("tokens", tokens), dim=-1)
        return cluster_tokens(tokens, self.num_clusters) if self.num_clusters else tokens.mean(1, keepdim=True)

    def __call__(
        self,
        x: Float[Tensor, "batch channels height width"],
        targets: Float[Tensor, "batch channels height width"],
        *,
        start: Float[Tensor, "batch channels height width"] | None = None,
        boxes: Sequence[tuple[Tensor, Tensor]] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        """Attacked images, detached. Gradients of the surrogates' weights are neither computed nor touched.

        Args:
            x: images within `bounds`.
            targets: for each the image it should be taken for.
            start: first change of `x`; zero where it is None.
            boxes: for each step where to crop the images and where the targets, in place of what would be drawn.
            generator: of the crops, on the CPU.

        Raises:
            TypeError: images are not floating point.
            ValueError: shapes differ, the batch is empty, there are not as many boxes as steps, or, on the CPU, a pixel
                is outside of `bounds` by more than `eps`.
        """
        for name, value in (("x", x), ("targets", targets)):
            floating_tensor(name, value)
        if x.ndim != 4 or len(x) == 0:
            raise ValueError(f"x must have shape (batch, channels, height, width), not empty, got {tuple(x.shape)}")
        same_shape("targets", targets, "x", x)
        if start is not None:
            same_shape("start", start, "x", x)
        if boxes is not None and len(boxes) != self.steps:
            raise ValueError(f"boxes must be {self.steps} pairs, one a step, got {len(boxes)}")
        if out_of_reach(x, self.eps, self.bounds):
            raise ValueError(f"x must be within bounds {self.bounds}, got values from {x.min():g} to {x.max():g}")
        x, targets = x.detach(), targets.detach()
        moved, previous = self._inside(x, x if start is None else x + start.detach()), None
        with ExitStack() as modes:
            for surrogate in self.surrogates:
                modes.enter_context(eval_mode(surrogate))
            for ours, theirs in self._crops(len(x), boxes, generator):
                moved.requires_grad_()
                with torch.enable_grad():
                    seen, wanted = moved, targets
                    if ours is not None and theirs is not None:
                        seen, wanted = crop_resized(moved, ours), crop_resized(targets, theirs)
                    scores = self.scores(seen, wanted)
                    weights = self._weights(scores, previous)
                    (slope,) = torch.autograd.grad((weights * scores).sum(), moved)
                previous = scores.detach()
                moved = self._inside(x, moved.detach() + self.step_size * slope.sign())
        return moved

    def _weights(self, scores: Tensor, previous: Tensor | None) -> Tensor:
        if self.temperature is None:
            return torch.ones_like(scores)
        return ensemble_weights(scores, previous, temperature=self.temperature)

    def _crops(
        self, batch: int, boxes: Sequence[tuple[Tensor, Tensor]] | None, generator: torch.Generator | None
    ) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        if boxes is not None:
            yield from boxes
            return
        for _ in range(self.steps):
            if self.crop_scale is None:
                yield None, None
            else:
                ours, theirs = (random_boxes(batch, self.crop_scale, generator=generator) for _ in range(2))
                yield ours, theirs

    def _inside(self, x: Tensor, moved: Tensor) -> Tensor:
        return moved.clamp(*ball_ends(x, self.eps, self.bounds))
