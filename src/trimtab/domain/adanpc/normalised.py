"""The variant that normalises what it asks by the batch's own statistics, and makes its votes more certain."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.domain.adanpc.memory import AdaNPC
from trimtab.ops.arguments import floating_tensor, integer, non_negative, positive
from trimtab.ops.states import fits


class AdaNPCBN:
    """AdaNPC behind a batch normalisation of the features, whose scale and shift learn to make the votes more certain.

    A batch goes through as many rounds as there are steps. In each it is normalised by its own mean and deviation,
    voted on, what is confident joins the memory as it was asked, and Adam makes a step on the scale and the shift by
    the entropy of the softmax of the scores. The last round's votes are the answer. So it is in the authors' program,
    where the source's features stand in the memory as the encoder gives them, and a sample that is confident in
    several rounds joins it as often.

    Args:
        model: a memory of the source; it is changed in place, and `reset` brings it back.
        steps: rounds of a batch; the authors take 3.
        lr: of Adam; the authors take a share of the training's, for them 5e-5.
        weight_decay: of the scale and the shift.

    Attributes:
        norm: the batch normalisation, without running statistics.
        optimizer: Adam on its two parameters.

    Raises:
        TypeError: an argument is of another type.
        ValueError: a number is out of range.

    Example:
        >>> model = AdaNPC(nn.Identity(), dim=2, num_classes=2, k=1)
        >>> model.remember(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), torch.tensor([0, 1]))
        >>> normalised = AdaNPCBN(model, steps=1)
        >>> normalised.predict(torch.tensor([[9.0, 4.0], [8.0, 5.0]])).argmax(1)  # a shift of both does not count
        tensor([0, 1])
    """

    def __init__(self, model: AdaNPC, *, steps: int = 3, lr: float = 5e-5, weight_decay: float = 0.0) -> None:
        if not isinstance(model, AdaNPC):
            raise TypeError(f"model must be AdaNPC, got {type(model).__name__}")
        self.steps = integer("steps", steps)
        self.model = model
        self.norm = nn.BatchNorm1d(model.memory.dim, track_running_stats=False).to(model.memory.features)
        self.optimizer = torch.optim.Adam(
            self.norm.parameters(), lr=positive("lr", lr), weight_decay=non_negative("weight_decay", weight_decay)
        )
        self._start = copy.deepcopy((self.norm.state_dict(), self.optimizer.state_dict()))

    def predict(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        """Scores of a batch, which has then been learnt from.

        Args:
            x: inputs, at least two, since one has no deviation.

        Raises:
            TypeError: the features are not floating point.
            ValueError: there are fewer than two.
            RuntimeError: nothing has been remembered.
        """
        if not isinstance(x, Tensor) or x.ndim == 0 or len(x) < 2:
            found = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must be a batch of at least two inputs, got {found}")
        if len(self.model.memory.filled) == 0:
            raise RuntimeError("AdaNPC: remember(x, y) source samples before anything is predicted")
        with torch.no_grad():
            z = floating_tensor("features(x)", self.model.encoded(x))
        scores = z
        for _ in range(self.steps):
            with torch.enable_grad():
                asked = self.norm(z)
                scores = self.model.scores(asked)
                entropy = -(scores.softmax(1) * scores.log_softmax(1)).sum(1).mean()
                gradients = torch.autograd.grad(entropy, list(self.norm.parameters()))
            self.model.learn(asked.detach(), scores.detach())
            for parameter, gradient in zip(self.norm.parameters(), gradients, strict=True):
                parameter.grad = gradient
            self.optimizer.step()
            self.optimizer.zero_grad()
        return scores.detach()

    def reset(self) -> None:
        """Forgets all but the source samples, and what the normalisation has learned."""
        self.model.reset()
        self.norm.load_state_dict(self._start[0])
        self.optimizer.load_state_dict(copy.deepcopy(self._start[1]))

    def state_dict(self) -> dict[str, Any]:
        """The model's, the normalisation's and the optimizer's."""
        held: dict[str, Any] = {"model": self.model, "norm": self.norm, "optimizer": self.optimizer}
        return copy.deepcopy({name: part.state_dict() for name, part in held.items()})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes a state of `state_dict`; one that does not fit changes nothing.

        Raises:
            ValueError: it is of another model.
        """
        if state.keys() != {"model", "norm", "optimizer"} or not fits(state["norm"], self.norm.state_dict()):
            raise ValueError("state must be of this variant of AdaNPC, got another")
        if not _takes(self.optimizer, state["optimizer"]):
            raise ValueError("state must hold an optimizer of this variant of AdaNPC, got another")
        self.model.load_state_dict(state["model"])
        self.norm.load_state_dict(state["norm"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))


def _takes(optimizer: torch.optim.Optimizer, state: Any) -> bool:
    """Whether a state fits an optimizer, which is left as it is."""
    trial = copy.deepcopy(optimizer)
    try:
        trial.load_state_dict(copy.deepcopy(state))
        moments = [(p, part) for p, held in trial.state.items() for part in held.values() if isinstance(part, Tensor)]
    except (KeyError, ValueError, TypeError, AttributeError):
        return False
    return all(part.ndim == 0 or part.shape == p.shape for p, part in moments)
