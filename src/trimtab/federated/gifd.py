r"""How much of a client's images its gradient gives away to someone who holds a generator of such images.

An audit for one's own training set-up: run it on gradients of images that are known, with and without a defence, and
look at what comes back. GIFD searches the code of the generator $G = G_J \circ \dots \circ G_0$ for images whose
gradient matches the shared one, then the feature maps inside of it, one after the other, each in a small ball around
what the search before has found:

$$
h_j = \arg\min_{\|h - h_j^0\|_1 \le r_j} D\bigl(\nabla_\theta \ell(G_J \circ \dots \circ G_j(h)),\, g^\star\bigr)
+ \lambda_{\mathrm{tv}} \mathrm{TV} + \lambda_2 \|x\|_2,
\qquad h_j^0 = G_{j-1}(h_{j-1}),
$$

without a ball for the code $h_0$. $D$ is one minus the cosine of the two gradients. Feature maps can show what no code
can, so that the generator need not have been trained on the same images; the balls keep them near to what it can make.

With a single stage that does nothing (`nn.Identity()`), this is the attack without a generator of Geiping et al.
(NeurIPS 2020); with steps for the code alone it is the usual attack with one.

Reference: Hao Fang, Bin Chen, Xuan Wang, Zhi Wang and Shu-Tao Xia, "GIFD: A Generative Gradient Inversion Method with
Feature Domain Optimization", ICCV 2023, arXiv 2308.04699.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from trimtab.ops.arguments import (
    all_finite,
    class_indices,
    floating_tensor,
    integer,
    non_negative,
    one_of,
    positive,
    tensor_problem,
)
from trimtab.ops.attack import eval_mode
from trimtab.ops.simplex import project_simplex

Distance = Literal["cosine", "l2"]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class AuditResult:
    """What a gradient gave away.

    Attributes:
        images: (clients, batch, ...), of the stage that matches best, for each client.
        distances: (stages, clients), between the gradients of each stage's images and the shared ones.
        best_stage: (clients,), the stage of the smallest distance, the first one if equal.
        stage_images: (stages, clients, batch, ...), the images that each stage ended with.
        inputs: of each stage, (clients, batch, ...), what the search moved it to; the first is the code.
    """

    images: Float[Tensor, "clients batch ..."]
    distances: Float[Tensor, "stages clients"]
    best_stage: Int[Tensor, " clients"]
    stage_images: Float[Tensor, "stages clients batch ..."]
    inputs: tuple[Float[Tensor, "clients batch ..."], ...]


def project_l1_ball(x: Float[Tensor, "batch ..."], radius: float) -> Float[Tensor, "batch ..."]:
    """The nearest point whose absolute entries sum to at most `radius`, for each sample.

    Args:
        x: any points.
        radius: at least 0.

    Raises:
        TypeError: `x` is no floating-point tensor.
        ValueError: `x` has no batch dimension, or `radius` is negative or not finite.

    Example:
        >>> project_l1_ball(torch.tensor([[3.0, 1.0], [-0.5, 1.0]]), 2.0)
        tensor([[ 2.0000,  0.0000],
                [-0.5000,  1.0000]])
    """
    radius = non_negative("radius", radius)
    x = floating_tensor("x", x)
    if not x.ndim:
        raise ValueError("x must have a batch dimension, got a number")
    if radius == 0 or not x.numel():
        return torch.zeros_like(x)
    flat = x.flatten(1) if x.ndim > 1 else x[:, None]
    lengths = flat.abs()
    near = flat.sign() * radius * project_simplex(lengths / radius)
    return torch.where(lengths.sum(1, keepdim=True) <= radius, flat, near).view_as(x)


def gradient_distance(
    gradients: Sequence[Float[Tensor, "clients ..."]],
    target: Sequence[Float[Tensor, "clients ..."]],
    kind: Distance = "cosine",
) -> Float[Tensor, " clients"]:
    """How far gradients are from shared ones, for each client.

    Args:
        gradients: one tensor for each parameter.
        target: of the same shapes.
        kind: "cosine", one minus the cosine over all parameters, in [0, 2], which no scale changes; or "l2", the
            squared distance, its mean over the tensors.

    Raises:
        ValueError: shapes differ, there are no tensors, or `kind` is unknown.

    Example:
        >>> g = [torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0]])]
        >>> gradient_distance(g, [-3 * part for part in g]).item()
        2.0
    """
    one_of("kind", kind, ("cosine", "l2"))
    if not len(gradients) or [g.shape for g in gradients] != [t.shape for t in target]:
        wanted = [tuple(g.shape) for g in gradients]
        raise ValueError(f"target must have shapes {wanted}, got {[tuple(t.shape) for t in target]}")
    ours, theirs = (torch.cat([part.flatten(1) for part in held], 1) for held in (gradients, target))
    if kind == "l2":
        return (ours - theirs).square().sum(1) / len(gradients)
    # In units that are powers of two, each row in its own: no scale makes squares vanish or overflow.
    ours, theirs = (held * _unit(held) for held in (ours, theirs))
    lengths = ours.norm(dim=1) * theirs.norm(dim=1)
    found: Tensor = 1 - (ours * theirs).sum(1) / lengths.clamp_min(torch.finfo(ours.dtype).tiny)
    return found


def _unit(held: Float[Tensor, "clients size"]) -> Float[Tensor, "clients 1"]:
    """The power of two that brings the largest entry of each row near to 1."""
    exponent = torch.frexp(held.detach().abs().amax(1, keepdim=True)).exponent
    return torch.exp2(-exponent.clamp(-120, 120).to(held.dtype))


def client_gradients(
    model: nn.Module,
    images: Float[Tensor, "clients batch ..."],
    labels: Int[Tensor, "clients batch"],
    loss_fn: Loss = F.cross_entropy,
) -> tuple[Float[Tensor, "clients ..."], ...]:
    """The gradient that each of some clients computes on a batch of its own; differentiable by the images.

    Args:
        model: from images to logits, in eval mode where it has batch normalisation or dropout.
        images: batches of equally many.
        labels: of the images.
        loss_fn: mean loss of logits and labels.

    Returns:
        One tensor for each parameter that requires a gradient, in the order of `model.parameters()`.

    Raises:
        TypeError: `labels` is not int64, or `images` no floating-point tensor.
        ValueError: shapes do not fit, there are no images, or no parameter requires a gradient.

    Example:
        >>> model = nn.Linear(2, 3)
        >>> weight, bias = client_gradients(model, torch.ones(4, 1, 2), torch.zeros(4, 1, dtype=torch.int64))
        >>> weight.shape, bias.shape
        (torch.Size([4, 3, 2]), torch.Size([4, 3]))
    """
    if problem := tensor_problem(images=images, labels=labels):
        raise TypeError(problem)
    class_indices("labels", labels)
    if images.ndim < 3 or labels.shape != images.shape[:2] or not labels.numel():
        got = f"{tuple(images.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"images and labels must be (clients, batch, ...) and (clients, batch), filled, got {got}")
    named = dict(model.named_parameters())
    params = {name: p.detach() for name, p in named.items() if p.requires_grad}
    if not params:
        raise ValueError("model must have a parameter that requires a gradient, got none")
    rest = {name: t.detach() for name, t in (*named.items(), *model.named_buffers()) if name not in params}

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss_fn(functional_call(model, {**rest, **weights}, (x,)), y)

    found: dict[str, Tensor] = vmap(grad(loss), in_dims=(None, 0, 0))(params, images, labels)
    return tuple(found.values())


def infer_labels(gradient: Float[Tensor, "clients classes ..."]) -> Int[Tensor, " clients"]:
    """The label of a client's only image, from the gradient of the last layer's bias or weight under cross-entropy.

    Of the bias' gradient, probabilities less one at the label, one entry alone is negative: that is always right. The
    weight's rows are these numbers times the features: right where they have a positive sum, as after a ReLU.

    Args:
        gradient: of the bias, (clients, classes), or of the weight, (clients, classes, features).

    Raises:
        TypeError: it is no floating-point tensor.
        ValueError: it is of another shape.

    Example:
        >>> infer_labels(torch.tensor([[0.2, -0.7, 0.5]]))
        tensor([1])
    """
    gradient = floating_tensor("gradient", gradient)
    if gradient.ndim not in (2, 3) or not gradient.shape[1]:
        raise ValueError(f"gradient must be (clients, classes) or with features, got shape {tuple(gradient.shape)}")
    return (gradient if gradient.ndim == 2 else gradient.sum(2)).argmin(1)


def search_lr(t: float, lr: float) -> float:
    """The learning rate at the share `t` in [0, 1] of a stage: up over the first twentieth, down over the last three
    quarters along a cosine.

    Example:
        >>> [round(search_lr(t, 0.1), 3) for t in (0.0, 0.025, 0.05, 0.25, 0.625, 1.0)]
        [0.0, 0.05, 0.1, 0.1, 0.05, 0.0]
    """
    if not 0 <= t <= 1:
        raise ValueError(f"t must be in [0, 1], got {t!r}")
    if not 0 <= lr < float("inf"):
        raise ValueError(f"lr must be finite and not negative, got {lr!r}")
    down = 0.5 - 0.5 * math.cos(math.pi * min(1.0, (1 - t) / 0.75))
    return float(lr * down * min(1.0, t / 0.05))


def total_variation(images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, " batch"]:
    """How much neighbouring pixels differ: the mean over neighbours in a row, and that over neighbours in a column.

    Where an image is one pixel high or wide there are no neighbours that way, and nothing is added.

    Raises:
        TypeError: `images` is no real tensor.
        ValueError: it has not four dimensions.

    Example:
        >>> total_variation(torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]]))
        tensor([1.])
    """
    if problem := tensor_problem(images=images):
        raise TypeError(problem)
    if images.ndim != 4:
        raise ValueError(f"images must be (batch, channels, height, width), got shape {tuple(images.shape)}")
    total = images.new_zeros(len(images))
    for dim in (3, 2):
        if images.shape[dim] > 1:
            total = total + images.diff(dim=dim).abs().flatten(1).mean(1)
    return total


def code_divergence(z: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
    r"""Of the normal distribution with the mean and spread of a code's entries from the standard one, in nats.

    Example:
        >>> round(code_divergence(torch.tensor([[2.0, 0.0]])).item(), 6)  # mean 1, spread 1
        0.5
    """
    if not isinstance(z, Tensor) or not z.is_floating_point():
        raise TypeError(f"z must be a floating-point tensor, got {getattr(z, 'dtype', type(z).__name__)}")
    mean, variance = z.flatten(1).mean(1), z.flatten(1).var(1, correction=0)
    return -0.5 * (1 + (variance + 1e-10).log() - mean.square() - variance)


class GradientInversionAudit:
    """Looks for the images behind gradients, stage by stage of a generator; clients do not influence each other.

    Nothing of the model and of the stages is changed; both are used in eval mode.

    Args:
        stages: the generator in parts, one after the other; the last one gives images.
        model: the classifier that was trained, at the weights which the clients were sent.
        latent_shape: of the code of one image, what the first stage takes.
        steps: of the search in each stage; 0 leaves a stage out.
        lrs: Adam's learning rate in each stage, which rises and falls over it (`search_lr`).
        radii: of the ball around the start in each stage, in the sum of absolute changes for an image; None sets no
            limit, and 0 holds a stage still.
        loss_fn: mean loss of logits and labels.
        distance: see `gradient_distance`.
        tv, image_norm: weights of the images' total variation and of their length.
        code_weight: weight of `code_divergence`, while the code is searched.
        only_sent: compare only entries that are not 0 in the shared gradient, where clients send their largest alone.
        spherical: keep the code at the length it starts with.
        bounds: smallest and largest value of a pixel, set after each stage.

    Raises:
        ValueError: `steps`, `lrs` and `radii` are not one for each stage, or an argument is out of range.
        TypeError: a number of steps is no integer.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model, image = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), torch.tensor([0.1, 0.9, 0.3, 0.6])
        >>> shared = client_gradients(model, image.view(1, 1, 1, 2, 2), torch.tensor([[2]]))
        >>> audit = GradientInversionAudit([nn.Identity()], model, (1, 2, 2), steps=[100], lrs=[0.1], radii=[None])
        >>> found = audit.run(shared, generator=torch.Generator().manual_seed(0))
        >>> F.cosine_similarity(found.images.flatten(), image, dim=0).item() > 0.99
        True
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        model: nn.Module,
        latent_shape: Sequence[int],
        *,
        steps: Sequence[int],
        lrs: Sequence[float],
        radii: Sequence[float | None],
        loss_fn: Loss = F.cross_entropy,
        distance: Distance = "cosine",
        tv: float = 0.0,
        image_norm: float = 0.0,
        code_weight: float = 0.0,
        only_sent: bool = False,
        spherical: bool = False,
        bounds: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        for name, given in (("steps", steps), ("lrs", lrs), ("radii", radii)):
            if len(given) != len(stages) or not len(stages):
                raise ValueError(f"{name} must be one for each of {len(stages)} stages, got {len(given)}")
        if not bounds[0] < bounds[1]:
            raise ValueError(f"bounds must be a smaller and a larger number, got {bounds}")
        self.stages, self.model, self.loss_fn = tuple(stages), model, loss_fn
        self.latent_shape = tuple(integer("latent_shape", size) for size in latent_shape)
        self.steps = tuple(integer("steps", count, 0) for count in steps)
        self.lrs = tuple(positive("lrs", lr) for lr in lrs)
        self.radii = tuple(None if radius is None else non_negative("radii", radius) for radius in radii)
        self.distance: Distance = one_of("distance", distance, ("cosine", "l2"))
        self.tv, self.image_norm = non_negative("tv", tv), non_negative("image_norm", image_norm)
        self.code_weight = non_negative("code_weight", code_weight)
        self.only_sent, self.spherical, self.bounds = only_sent, spherical, bounds

    def run(
        self,
        target: Sequence[Float[Tensor, "clients ..."]],
        labels: Int[Tensor, "clients batch"] | None = None,
        *,
        start: Float[Tensor, "clients batch ..."] | None = None,
        generator: torch.Generator | None = None,
    ) -> AuditResult:
        """Search for the images of each client.

        Args:
            target: the shared gradients, one tensor for each parameter that requires one, in the model's order; a
                single client too has its dimension.
            labels: of the images; None takes one image a client, its label by `infer_labels` from the last tensor.
            start: first codes; drawn from the standard normal distribution where it is None.
            generator: of that draw.

        Raises:
            TypeError: `labels` is not int64.
            ValueError: shapes do not fit the model, or each other, there is no client, a gradient is not finite, or a
                label is negative.
        """
        wanted = [tuple(p.shape) for p in self.model.parameters() if p.requires_grad]
        got = [tuple(part.shape) for part in target]
        clients = got[0][0] if got and got[0] else 0
        if not clients or got != [(clients, *shape) for shape in wanted]:
            raise ValueError(f"target must be a client dimension before each of {wanted}, got {got}")
        if not all(all_finite(part) for part in target):
            raise ValueError("target must be finite, got NaN or infinity")
        target = [part.detach() for part in target]
        labels = infer_labels(target[-1])[:, None] if labels is None else labels
        class_indices("labels", labels)
        if labels.ndim != 2 or len(labels) != clients or not labels.shape[1]:
            raise ValueError(f"labels must be ({clients}, batch) with at least one image, got {tuple(labels.shape)}")
        if int(labels.min()) < 0:
            raise ValueError(f"labels must be at least 0, got {int(labels.min())}")
        shape, like = (*labels.shape, *self.latent_shape), target[0]
        if start is None:
            start = torch.randn(shape, generator=generator, dtype=like.dtype).to(like.device)
        if start.shape != shape:
            raise ValueError(f"start must have shape {shape}, got {tuple(start.shape)}")
        h, inputs, images, distances = start.detach().flatten(0, 1), list[Tensor](), list[Tensor](), list[Tensor]()
        with ExitStack() as held:
            for module in (self.model, *self.stages):
                held.enter_context(eval_mode(module))
            held.enter_context(torch.autocast(like.device.type, enabled=False))
            for number, stage in enumerate(self.stages):
                h = self._search(h, number, target, labels)
                inputs.append(h.unflatten(0, labels.shape))
                with torch.no_grad():
                    images.append(self._images(h, number).clamp(*self.bounds).unflatten(0, labels.shape))
                    distances.append(self._distance(images[-1], target, labels))
                    h = stage(h)
        shown, apart = torch.stack(images), torch.stack(distances)
        best = apart.argmin(0)
        return AuditResult(shown[best, torch.arange(clients, device=best.device)], apart, best, shown, tuple(inputs))

    @torch.enable_grad()
    def _search(self, start: Tensor, number: int, target: Sequence[Tensor], labels: Tensor) -> Tensor:
        """The input of a stage, moved so that the gradients of the images match."""
        h, count, radius = start.clone().requires_grad_(), self.steps[number], self.radii[number]
        optimizer = torch.optim.Adam([h], lr=self.lrs[number])
        for step in range(count):
            optimizer.param_groups[0]["lr"] = search_lr(step / count, self.lrs[number])
            images = self._images(h, number)
            loss = self._distance(images.unflatten(0, labels.shape), target, labels).sum()
            if self.tv:
                loss = loss + self.tv * total_variation(images).sum()
            if self.image_norm:
                loss = loss + self.image_norm * images.flatten(1).norm(dim=1).sum()
            if self.code_weight and number == 0:
                loss = loss + self.code_weight * code_divergence(h).sum()
            (h.grad,) = torch.autograd.grad(loss, h)
            optimizer.step()
            with torch.no_grad():
                if number == 0 and self.spherical:
                    lengths = [part.flatten(1).norm(dim=1) for part in (start, h)]
                    h *= (lengths[0] / lengths[1].clamp_min(1e-12)).view(-1, *[1] * (h.ndim - 1))
                if radius is not None:
                    h.copy_(start + project_l1_ball(h - start, radius))
        return h.detach()

    def _images(self, h: Tensor, number: int) -> Tensor:
        for stage in self.stages[number:]:
            h = stage(h)
        return h

    def _distance(self, images: Tensor, target: Sequence[Tensor], labels: Tensor) -> Tensor:
        gradients = client_gradients(self.model, images, labels, self.loss_fn)
        if self.only_sent:
            gradients = tuple(g * (sent != 0) for g, sent in zip(gradients, target, strict=True))
        return gradient_distance(gradients, target, self.distance)
