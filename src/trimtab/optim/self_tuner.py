r"""The alternating loop of self-tuning networks: weights on training batches, hyper-parameters on validation batches.

Reference: Matthew MacKay, Paul Vicol, Jon Lorraine, David Duvenaud, Roger Grosse, "Self-Tuning Networks: Bilevel
Optimization of Hyperparameters using Structured Best-Response Functions", ICLR 2019, arXiv 1903.03088.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.ops.arguments import integer, non_negative, real_problem
from trimtab.optim.hyper_parameters import HyperParameters
from trimtab.optim.stn import responding

Values = dict[str, Tensor]
Augment = Callable[[Tensor, Values], Tensor]
Penalty = Callable[[nn.Module, Tensor, Values], Tensor]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within the block the network is in eval mode; afterwards every part is in the mode it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


class SelfTuner:
    """Trains a network and tunes its hyper-parameters in turns (Algorithm 1).

    A training step draws hyper-parameters for every example around the present ones, regularises each example with
    its own, and moves only the weights. A validation step regularises nothing, and moves only the hyper-parameters,
    through the network's response to them, and the size of the perturbations.

    The defaults are the authors' for convolutional networks, with the entropy's weight of their command line for it;
    the default of that argument in their release is 1e-5.

    Args:
        model: what `convert_to_stn` returned; it maps a batch, whose first dimension is that of the examples.
        hparams: the hyper-parameters it answers to.
        loss_fn: `loss_fn(output, *targets)`, a scalar.
        optimizer: of the model's parameters; by default SGD with learning rate 0.01 and momentum 0.9.
        hyper_optimizer: of the hyper-parameters'; by default Adam with learning rate 3e-3.
        augment: `augment(x, values)` changes training inputs by the examples' hyper-parameters.
        penalty: `penalty(model, h, values)`, a scalar added to the training loss, as `per_example_weight_decay` is.
        train_steps, valid_steps: steps of each kind in a turn.
        warmup: epochs at the start without validation steps.
        tune_scales: also tune the size of the perturbations.
        entropy_weight: how much the entropy of the perturbations counts against the validation loss.
        generator: for perturbations and dropout.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> from trimtab.optim import HyperParameter, convert_to_stn, per_example_weight_decay
        >>> net = nn.Sequential(nn.Dropout(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> hparams = HyperParameters({"rate": HyperParameter(0.05, 0.0, 0.9), "l2": HyperParameter(1e-4, 0.0)})
        >>> tuner = SelfTuner(
        ...     convert_to_stn(net, hparams, dropout={"0": "rate"}),
        ...     hparams,
        ...     penalty=lambda model, h, values: per_example_weight_decay(model, h, values["l2"]),
        ...     warmup=1,
        ... )
        >>> batches = [(torch.randn(32, 8), torch.arange(32) % 3) for _ in range(4)]
        >>> for _ in range(2):
        ...     losses = tuner.epoch(train=batches, valid=batches[:1])
        >>> sorted(losses)
        ['train', 'valid']
    """

    def __init__(
        self,
        model: nn.Module,
        hparams: HyperParameters,
        loss_fn: Callable[..., Tensor] = F.cross_entropy,
        optimizer: torch.optim.Optimizer | None = None,
        hyper_optimizer: torch.optim.Optimizer | None = None,
        *,
        augment: Augment | None = None,
        penalty: Penalty | None = None,
        train_steps: int = 2,
        valid_steps: int = 1,
        warmup: int = 5,
        tune_scales: bool = True,
        entropy_weight: float = 1e-3,
        generator: torch.Generator | None = None,
    ) -> None:
        integer("train_steps", train_steps)
        integer("valid_steps", valid_steps)
        integer("warmup", warmup, 0)
        non_negative("entropy_weight", entropy_weight)
        self.model, self.hparams, self.loss_fn = model, hparams, loss_fn
        self.optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        self.hyper_optimizer = hyper_optimizer or torch.optim.Adam(hparams.parameters(), lr=3e-3)
        self.augment, self.penalty = augment, penalty
        self.train_steps, self.valid_steps, self.warmup = train_steps, valid_steps, warmup
        self.tune_scales, self.entropy_weight = tune_scales, entropy_weight
        self.generator = generator
        self.epochs = self.steps = 0

    def train_step(self, x: Float[Tensor, "batch ..."], *targets: Tensor) -> Float[Tensor, ""]:
        """Move the weights on a training batch; the hyper-parameters stay. Returns the loss, with its penalty."""
        self.model.train()
        with torch.no_grad():
            h = self.hparams.sample(len(x), generator=self.generator)
            values = self.hparams.values(h)
            if self.augment is not None:
                x = self.augment(x, values)
        self.optimizer.zero_grad()
        with responding(self.model, h, values, generator=self.generator):
            loss: Tensor = self.loss_fn(self.model(x), *targets)
        if self.penalty is not None:
            loss = loss + self.penalty(self.model, h, values)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def valid_step(self, x: Float[Tensor, "batch ..."], *targets: Tensor) -> Float[Tensor, ""]:
        """Move the hyper-parameters on a validation batch; the weights stay. Returns the loss without the entropy."""
        if problem := real_problem(x=x):
            raise TypeError(problem)
        tuned = [self.hparams.h, self.hparams.rho] if self.tune_scales else [self.hparams.h]
        h = self.hparams.sample(len(x), generator=self.generator) if self.tune_scales else self.hparams.h
        with evaluating(self.model), responding(self.model, h):
            loss: Tensor = self.loss_fn(self.model(x), *targets)
        objective = loss - self.entropy_weight * self.hparams.entropy() if self.tune_scales else loss
        self.hyper_optimizer.zero_grad()
        # Only these gradients: the weights' are neither needed nor touched.
        for parameter, grad in zip(tuned, torch.autograd.grad(objective, tuned), strict=True):
            parameter.grad = grad
        self.hyper_optimizer.step()
        return loss.detach()

    def epoch(self, train: Iterable[tuple[Tensor, ...]], valid: Iterable[tuple[Tensor, ...]]) -> dict[str, float]:
        """Pass over the training batches once, with validation steps in between after the warm-up.

        Args:
            train: batches, each an input and what `loss_fn` takes after the output.
            valid: batches of the same form, begun anew where they end.

        Returns:
            Mean loss of the steps of each kind: "train", and "valid" where there were any.

        Raises:
            ValueError: there is no validation batch where one is needed.
        """
        losses: dict[str, list[Tensor]] = {"train": [], "valid": []}
        held_out = iter(valid)
        for batch in train:
            losses["train"].append(self.train_step(*batch))
            self.steps += 1
            if self.epochs >= self.warmup and self.steps % self.train_steps == 0:
                for _ in range(self.valid_steps):
                    following = next(held_out, None)
                    if following is None:
                        held_out = iter(valid)
                        following = next(held_out, None)
                    if following is None:
                        raise ValueError("valid must be one that can be begun anew, got one without a batch (left)")
                    losses["valid"].append(self.valid_step(*following))
        self.epochs += 1
        return {kind: torch.stack(held).mean().item() for kind, held in losses.items() if held}

    @torch.no_grad()
    def predict(self, x: Float[Tensor, "batch ..."]) -> Any:
        """The model's output in eval mode, at the present hyper-parameters."""
        with evaluating(self.model), responding(self.model, self.hparams.h):
            return self.model(x)

    def state_dict(self) -> dict[str, Any]:
        """Model, hyper-parameters, both optimizers and the place in the schedule."""
        return {
            "model": self.model.state_dict(),
            "hparams": self.hparams.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "hyper_optimizer": self.hyper_optimizer.state_dict(),
            "epochs": self.epochs,
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken; a state that does not fit is refused and changes nothing.

        Raises:
            KeyError, RuntimeError, ValueError, TypeError: the state is of another model or other hyper-parameters.
        """
        before = copy.deepcopy(self.state_dict())
        try:
            self._restore(state)
        except Exception:
            self._restore(before)
            raise

    def _restore(self, state: Mapping[str, Any]) -> None:
        for part in ("model", "hparams", "optimizer", "hyper_optimizer"):
            getattr(self, part).load_state_dict(state[part])
        self.epochs, self.steps = integer("epochs", state["epochs"], 0), integer("steps", state["steps"], 0)
