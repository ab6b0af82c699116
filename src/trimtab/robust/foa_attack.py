r"""FOA-Attack: a targeted attack on unseen models that matches an image's features with those of a target image.

For images that a model nobody can look into should take for another given one. No query is made and no label is used:
the features of a few open vision transformers (the surrogates) are brought near the target's, coarsely by the class
token, finely by the patch tokens. These are first summed up by $k$ cluster centres, so that a few frequent patches do
not decide alone, and then matched by entropic optimal transport:

$$
s_i = \cos(g_i, g_i^t) + \eta \sum_{ab} T_{ab} \cos(c_{i,a}^t, c_{i,b}), \qquad
T = \operatorname{Sinkhorn}\bigl(1 - \cos(c_i^t, c_i);\ \tfrac{1}{k}, \tfrac{1}{k}\bigr)
$$

$$
w_i = K\,\operatorname{softmax}_i\!\Bigl(\frac{1}{\tau}\,\frac{s_i^{(j)}}{s_i^{(j-1)}}\Bigr), \qquad
\delta \leftarrow \Pi_{\|\delta\|_\infty \le \epsilon}
\Bigl(\delta + \alpha\,\mathrm{sign}\,\nabla_\delta \textstyle\sum_i w_i s_i\Bigr)
$$

over surrogates $i = 1 \dots K$ and steps $j$, each on a fresh random crop of the image and of the target. Neither the
assignment to clusters nor the plan $T$ nor the weights carry gradients. The surrogate whose features have come nearer
since the last step weighs a little more.

The authors' code differs from this: it scales patch tokens along the wrong axis, its k-means starts from random tokens
(here from tokens far from one another), its Sinkhorn sweeps stop early, and its ratio compares a crop with the whole
image of the same step, and the first step of a pair of images with the last of another. Here a ratio is that of two
steps, of a pair of its own, cut off at 10, and is one where the last score was not positive.

Reference: Jia, Gao, Qin, Pang, Du, Huang, Li, Li, Li and Liu, "Adversarial Attacks against Closed-Source MLLMs via
Feature Optimal Alignment", NeurIPS 2025, arXiv 2505.21494.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from numbers import Integral

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from trimtab.ops.arguments import floating_tensor, in_range, integer, non_negative, positive, same_shape
from trimtab.ops.attack import eval_mode
from trimtab.robust.bounds import in_order

Features = tuple[Tensor, Tensor]
"""Of a batch: a global feature each, (batch, dim), and patch tokens, (batch, tokens, dim)."""
Surrogate = Callable[[Tensor], Features]
"""From images to their features. A module is put into eval mode for the attack."""


def cluster_tokens(
    tokens: Float[Tensor, "batch n dim"], num_clusters: int, *, iters: int = 10
) -> Float[Tensor, "batch k dim"]:
    """The centres of each image's tokens, by k-means.

    It starts from a token and those farthest from all chosen before, so that the same tokens in another order have the
    same centres. Assignments are constants for the gradient, which flows through the means. A cluster that nothing is
    assigned to keeps the token that it started from.

    Args:
        tokens: of a batch of images.
        num_clusters: number of centres, at most that of tokens.
        iters: rounds of assignment; all are made, so that nothing waits for a test.

    Raises:
        TypeError: `tokens` is not floating point.
        ValueError: `tokens` has not three dimensions, or there are more clusters than tokens.

    Example:
        >>> tokens = torch.tensor([[[0.0], [1.0], [10.0], [12.0]]])
        >>> cluster_tokens(tokens, 2).flatten().sort().values
        tensor([ 0.5000, 11.0000])
    """
    tokens = floating_tensor("tokens", tokens)
    if tokens.ndim != 3:
        raise ValueError(f"tokens must have shape (batch, n, dim), got {tuple(tokens.shape)}")
    integer("num_clusters", num_clusters, 1, tokens.shape[1])
    integer("iters", iters)
    points = tokens.detach() - tokens.detach().mean(1, keepdim=True)
    start = _far_apart(points, num_clusters)[..., None].expand(-1, -1, tokens.shape[2])
    seeds = tokens.gather(1, start)
    with torch.no_grad():
        centres = points.gather(1, start)
        for _ in range(iters - 1):
            centres = _means(points, _assigned(points, centres), centres)
        member = _assigned(points, centres)
    return _means(tokens, member, seeds)


def _far_apart(tokens: Tensor, count: int) -> Tensor:
    """Indices of tokens, (batch, count): the one farthest from the mean, and each time the one farthest from all."""
    nearest = (tokens - tokens.mean(1, keepdim=True)).square().sum(2)
    chosen: list[Tensor] = []
    for number in range(count):
        chosen.append(nearest.argmax(1))
        here = tokens.gather(1, chosen[-1][:, None, None].expand(-1, 1, tokens.shape[2]))
        distance = (tokens - here).square().sum(2)
        nearest = distance if number == 0 else torch.minimum(nearest, distance)
    return torch.stack(chosen, 1)


def _assigned(points: Tensor, centres: Tensor) -> Tensor:
    """One-hot rows, (batch, n, k)."""
    # A point's own length does not decide which centre is nearest.
    distance = centres.square().sum(2)[:, None] - 2 * points @ centres.mT
    return F.one_hot(distance.argmin(2), centres.shape[1]).to(points)


def _means(points: Tensor, member: Tensor, fallback: Tensor) -> Tensor:
    count = member.sum(1)[..., None]
    return torch.where(count > 0, member.mT @ points / count.clamp_min(1), fallback)


def local_alignment(
    centres: Float[Tensor, "batch k dim"],
    target_centres: Float[Tensor, "batch m dim"],
    *,
    reg: float = 0.1,
    iters: int = 20,
) -> Float[Tensor, " batch"]:
    """The mean cosine of centres matched by an entropic transport plan between them, of uniform marginals.

    The plan is a constant for the gradient.

    Args:
        centres: of each image.
        target_centres: of each image's target.
        reg: weight of the plan's entropy; the cost is one less the cosine.
        iters: Sinkhorn sweeps; the authors make up to 100, and stop where little changes.

    Raises:
        TypeError: one of them is not floating point.
        ValueError: shapes do not fit, or `reg` is not positive.

    Example:
        >>> centres = torch.eye(3)[None]
        >>> local_alignment(centres, centres[:, [2, 0, 1]], reg=0.05)  # the same in another order
        tensor([1.])
    """
    centres, goal = floating_tensor("centres", centres), floating_tensor("target_centres", target_centres)
    if centres.ndim != 3 or goal.ndim != 3 or centres.shape[::2] != goal.shape[::2]:
        raise ValueError(
            "centres and target_centres must have shapes (batch, k, dim) and (batch, m, dim), "
            f"got {tuple(centres.shape)} and {tuple(goal.shape)}"
        )
    positive("reg", reg)
    similarity = F.normalize(goal, dim=2) @ F.normalize(centres, dim=2).mT
    with torch.no_grad():
        kernel = ((similarity - 1) / reg).exp()
        rows, columns = kernel.shape[1:]
        down = kernel.new_full((len(kernel), rows, 1), 1.0)
        for _ in range(integer("iters", iters)):
            across = 1 / (columns * (kernel.mT @ down))
            down = 1 / (rows * (kernel @ across))
        plan = down * kernel * across.mT
    return (plan * similarity).sum((1, 2))


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


def random_boxes(
    batch: int,
    scale: tuple[float, float] = (0.5, 0.9),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch 4"]:
    """Where to crop: for each image top, left, height and width, as shares of its side.

    Area and ratio of sides are drawn as in torchvision's `RandomResizedCrop`: the area uniformly, the ratio of width to
    height uniformly in its logarithm; a box that would not fit is cut to the image.

    Args:
        batch: number of images.
        scale: least and largest area.
        ratio: least and largest ratio of width to height.
        generator: source of the draws; torch's global one where it is None.

    Raises:
        ValueError: `batch` is negative, a range is not one of positive numbers, or of areas not within (0, 1].

    Example:
        >>> random_boxes(2, scale=(1.0, 1.0), ratio=(1.0, 1.0))
        tensor([[0., 0., 1., 1.],
                [0., 0., 1., 1.]])
    """
    if isinstance(batch, bool) or not isinstance(batch, int | Integral) or batch < 0:
        raise ValueError(f"batch must be an integer of at least 0, got {batch!r}")
    if any(not isinstance(pair, tuple | list) or len(pair) != 2 for pair in (scale, ratio)):
        raise ValueError(f"scale and ratio must be two numbers each, got {scale} and {ratio}")
    for name, (low, high), most in (("scale", scale, 1.0), ("ratio", ratio, float("inf"))):
        if not 0 < low <= high <= most:
            raise ValueError(f"{name} must be two numbers above 0 in order, got {(low, high)}")
    device = generator.device if generator is not None else None
    area, shape, top, left = torch.rand(4, batch, generator=generator, device=device)
    area = scale[0] + (scale[1] - scale[0]) * area
    log_low, log_high = torch.tensor(ratio).log()
    root = ((log_low + (log_high - log_low) * shape) / 2).exp()
    height, width = (area.sqrt() / root).clamp_max(1), (area.sqrt() * root).clamp_max(1)
    return torch.stack([top * (1 - height), left * (1 - width), height, width], 1)


def crop_resized(
    x: Float[Tensor, "batch channels height width"], boxes: Float[Tensor, "batch 4"]
) -> Float[Tensor, "batch channels height width"]:
    """What lies in each image's box, resized to the image's size by bilinear interpolation; gradients flow.

    Args:
        x: images.
        boxes: of each image top, left, height and width, as shares of its side.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: `x` is no batch of images, or there is not one box for each.

    Example:
        >>> x = torch.arange(16.0).view(1, 1, 4, 4)
        >>> crop_resized(x, torch.tensor([[0.0, 0.0, 0.5, 0.5]]))[0, 0, 0]
        tensor([0.0000, 0.2500, 0.7500, 1.2500])
    """
    if not all(isinstance(held, Tensor) and held.is_floating_point() for held in (x, boxes)):
        raise TypeError("x and boxes must be floating-point tensors, got others")
    if x.ndim != 4 or len(x) == 0 or boxes.shape != (len(x), 4):
        raise ValueError(
            "x and boxes must be (batch, channels, height, width), not empty, and (batch, 4), got "
            f"{tuple(x.shape)} and {tuple(boxes.shape)}"
        )
    top, left, height, width = boxes.to(x).unbind(1)
    none = torch.zeros_like(top)
    # affine_grid's coordinates run from -1 to 1 across the image.
    across = torch.stack([width, none, 2 * left + width - 1], 1)
    down = torch.stack([none, height, 2 * top + height - 1], 1)
    grid = F.affine_grid(torch.stack([across, down], 1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


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
            ValueError: shapes differ, the batch is empty, or there are not as many boxes as steps.
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
        return moved.clamp(x - self.eps, x + self.eps).clamp(*self.bounds)
