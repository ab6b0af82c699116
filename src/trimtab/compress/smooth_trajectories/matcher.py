"""Distillation: synthetic images and a learning rate, updated by one start of one expert at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.compress.smooth_trajectories.experts import without_batch_norm
from trimtab.compress.smooth_trajectories.student import Weigh, balance_factor, perturb, trajectory_loss
from trimtab.ops.arguments import integer, non_negative, positive
from trimtab.ops.states import fits

MakeOptimizer = Callable[[Tensor, Tensor], torch.optim.Optimizer]
"""Of the synthetic images and the student's learning rate."""


class TrajectoryMatcher:
    """Distils a training set into synthetic images, one start of one expert a step.

    Args:
        model: the form of experts and students; it is left as it is.
        trajectories: of the experts, as of `train_expert`.
        images, targets: the first synthetic set, as of `representative_init`; the images are copied.
        lr: the student's first learning rate; it is learned.
        steps: N, of a student.
        length: M, epochs of the expert that they stand for.
        max_start: starts are drawn below it; all that leave M epochs, if None.
        alpha: of `perturb`; 0 leaves it out.
        least_dims: of `perturb`.
        intermediate, momentum, augment: as of `trajectory_loss`.
        balance: whether the student's loss is multiplied by `balance_factor`.
        batch_size: synthetic images a student's step; all, if None.
        optimizer: makes the optimizer of images and rate; the authors' for images of CIFAR's size, if None.
        generator: decides expert, start, perturbation and batches; on the CPU.

    Attributes:
        images: as they are now, requiring a gradient.
        lr: as it is now; it stays above 0.

    Raises:
        ValueError: no start leaves `length` epochs, shapes do not fit, or the model has batch normalisation.

    Example:
        >>> from trimtab.compress import train_expert
        >>> x, y = torch.randn(20, 2), torch.arange(20) % 2
        >>> model = nn.Linear(2, 2)
        >>> paths = torch.stack([train_expert(model, x, y, epochs=4) for _ in range(2)])
        >>> matcher = TrajectoryMatcher(model, paths, x[:2], y[:2], steps=6, generator=torch.Generator().manual_seed(0))
        >>> sorted(matcher.step())
        ['final', 'intermediate', 'total']
    """

    def __init__(
        self,
        model: nn.Module,
        trajectories: Float[Tensor, "experts epochs params"],
        images: Float[Tensor, "synthetic ..."],
        targets: Int[Tensor, " synthetic"],
        *,
        lr: float = 0.01,
        steps: int = 20,
        length: int = 3,
        max_start: int | None = None,
        alpha: float = 1.0,
        least_dims: int = 3,
        intermediate: Weigh | None = "all",
        balance: bool = True,
        momentum: float = 0.9,
        batch_size: int | None = None,
        augment: Callable[[Tensor], Tensor] | None = None,
        optimizer: MakeOptimizer | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if not all(isinstance(part, Tensor) for part in (trajectories, images, targets)):
            raise TypeError(
                f"trajectories, images and targets must be tensors, "
                f"got {[type(part).__name__ for part in (trajectories, images, targets)]}"
            )
        if not images.is_floating_point():
            raise ValueError(f"images must be floating point, got {images.dtype}")
        if not len(images) or targets.shape != images.shape[:1]:
            raise ValueError(
                f"targets must be a label for each of {len(images)} images, got shape {tuple(targets.shape)}"
            )
        without_batch_norm(model)
        count = sum(p.numel() for p in model.parameters())
        if trajectories.ndim != 3 or trajectories.shape[2] != count or not len(trajectories):
            raise ValueError(f"trajectories must be (experts, epochs, {count}), got shape {tuple(trajectories.shape)}")
        latest = trajectories.shape[1] - 1 - integer("length", length)
        if latest < 0:
            raise ValueError(f"length must be at most {trajectories.shape[1] - 1}, as many epochs, got {length}")
        if max_start is not None:
            integer("max_start", max_start, 1, latest + 1)
        self.max_start = latest + 1 if max_start is None else max_start
        self.model, self.trajectories, self.targets = model, trajectories.detach(), targets
        self.steps, self.length = integer("steps", steps, length), length
        self.alpha, self.least_dims = non_negative("alpha", alpha), least_dims
        self.intermediate, self.balance, self.momentum = intermediate, balance, momentum
        self.batch_size = None if batch_size is None else integer("batch_size", batch_size, 1, len(images))
        self.augment, self.generator = augment, generator
        self.images = images.detach().clone().requires_grad_()
        self.lr = torch.tensor(positive("lr", lr), dtype=images.dtype, device=images.device, requires_grad=True)
        self.optimizer = (optimizer or _sgd)(self.images, self.lr)

    def step(
        self, expert: int | None = None, start: int | None = None, noise: Float[Tensor, " params"] | None = None
    ) -> dict[str, Float[Tensor, ""]]:
        """One update of images and rate; the losses, detached.

        Args:
            expert, start, noise: which expert, from which epoch, and the directions of the perturbation; drawn, if
                None.

        Raises:
            ValueError: there is no such expert, or the start leaves fewer than `length` epochs.
        """
        last = self.trajectories.shape[1] - 1 - self.length
        expert = None if expert is None else integer("expert", expert, 0, len(self.trajectories) - 1)
        start = None if start is None else integer("start", start, 0, last)
        if noise is not None and noise.shape != self.trajectories.shape[2:]:
            raise ValueError(f"noise must be {self.trajectories.shape[2]} numbers, got shape {tuple(noise.shape)}")
        expert = self._drawn(len(self.trajectories)) if expert is None else expert
        start = self._drawn(self.max_start) if start is None else start
        segment = self.trajectories[expert, start : start + self.length + 1]
        begin = segment[0]
        if self.alpha:
            begin = perturb(
                begin, self.model, self.alpha, least_dims=self.least_dims, noise=noise, generator=self.generator
            )
        losses = trajectory_loss(
            self.model,
            self.images,
            self.targets,
            segment,
            self.lr,
            steps=self.steps,
            momentum=self.momentum,
            scale=balance_factor(start, self.max_start) if self.balance else 1.0,
            start=begin,
            intermediate=self.intermediate,
            augment=self.augment,
            batches=None if self.batch_size is None else self._batches(self.batch_size),
        )
        self.optimizer.zero_grad()
        losses["total"].backward()
        self.optimizer.step()
        with torch.no_grad():
            self.lr.clamp_(min=1e-6)
        return {name: value.detach() for name, value in losses.items()}

    def state_dict(self) -> dict[str, Any]:
        """Images, rate, optimizer and generator."""
        return {
            "images": self.images.detach().clone(),
            "lr": self.lr.detach().clone(),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "generator": None if self.generator is None else self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes a state over.

        Raises:
            ValueError: it is that of another matcher; nothing is changed then.
        """
        own = self.state_dict()
        groups = [len(group["params"]) for group in own["optimizer"]["param_groups"]]
        if not fits(state, {**own, "optimizer": None}) or groups != [
            len(group["params"]) for group in state["optimizer"].get("param_groups", [])
        ]:
            raise ValueError("state must be that of a matcher of the same images, got another")
        if self.generator is not None:
            self.generator.set_state(state["generator"])
        with torch.no_grad():
            self.images.copy_(state["images"])
            self.lr.copy_(state["lr"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))

    def _drawn(self, below: int) -> int:
        return int(torch.randint(below, (1,), generator=self.generator))

    def _batches(self, size: int) -> list[Tensor]:
        """As many as there are steps, out of shuffles of all images."""
        found: list[Tensor] = []
        while len(found) < self.steps:
            order = torch.randperm(len(self.images), generator=self.generator).to(self.images.device)
            found.extend(part for part in order.split(size) if len(part) == size)
        return found[: self.steps]


def _sgd(images: Tensor, lr: Tensor) -> torch.optim.Optimizer:
    """The authors' rates for CIFAR."""
    return torch.optim.SGD([{"params": [images], "lr": 1000.0}, {"params": [lr], "lr": 1e-5}], momentum=0.5)
