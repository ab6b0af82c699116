"""A classifier that answers queries and keeps count, and all that an attacker of it has in hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from trimtab.studies.engine.study import Setting
from trimtab.studies.tools.surrogates import TokenTransformer

_ROUNDING = 1e-5


class Oracle:
    """Answers queries about victims, counts them, and remembers the first one that fooled it.

    Called as `oracle(images, rows)` it gives logits; `rows` says which victim each image is a change of (all of them
    in order where it is left out), and a victim may stand there many times. Each image is one query. An image fools if
    it lies within the ball around its victim and in the range of pixels, and is given another class than the victim's
    (or, where the attack is targeted, the goal).

    Attributes:
        queries: queries made about each victim.
        first: the number of the query that fooled, for each victim; 0 where none has.
    """

    def __init__(
        self, network: nn.Module, x: Tensor, y: Tensor, goals: Tensor, eps: float, budget: int, *, targeted: bool
    ) -> None:
        self._network, self._x, self._y, self._goals = network, x, y, goals
        self._eps, self._targeted, self.budget = eps, targeted, budget
        self.queries = torch.zeros(len(x), dtype=torch.int64)
        self.first = torch.zeros(len(x), dtype=torch.int64)

    @torch.no_grad()
    def __call__(
        self, images: Float[Tensor, "m channels height width"], rows: Int[Tensor, " m"] | None = None
    ) -> Float[Tensor, "m classes"]:
        """Logits; one query an image.

        Raises:
            ValueError: a victim's queries are spent; then none is made.
        """
        rows = torch.arange(len(self._x)) if rows is None else rows
        number = self.queries[rows] + _rank(rows) + 1
        if len(rows) and int(number.max()) > self.budget:
            raise ValueError(f"queries must be at most {self.budget} for a victim, got {int(number.max())}")
        logits = torch.cat([self._network(part) for part in images.split(4096)])
        self.queries += rows.bincount(minlength=len(self.queries))
        fooled = self.fools(images, rows, logits)
        found = torch.full_like(self.first, self.budget + 1)
        found.scatter_reduce_(0, rows[fooled], number[fooled], "amin")
        self.first = torch.where((self.first == 0) & (found <= self.budget), found, self.first)
        return logits

    def fools(self, images: Tensor, rows: Tensor, logits: Tensor) -> Bool[Tensor, " m"]:
        """Whether images are allowed and logits are those that the attack wants."""
        near = (images - self._x[rows]).abs().flatten(1).amax(1) <= self._eps + _ROUNDING
        valid = (images >= -_ROUNDING).flatten(1).all(1) & (images <= 1 + _ROUNDING).flatten(1).all(1)
        said = logits.argmax(1)
        wanted = said == self._goals[rows] if self._targeted else said != self._y[rows]
        return near & valid & wanted

    def outcome(
        self, crafted: Float[Tensor, "n channels height width"]
    ) -> tuple[Bool[Tensor, " n"], Int[Tensor, " n"]]:
        """Which victims have fallen, to a query or to the image crafted for them, and after how many queries.

        Looking at what was crafted costs no query.
        """
        rows = torch.arange(len(self._x))
        fallen = (self.first > 0) | self.fools(crafted, rows, self._network(crafted))
        return fallen, torch.where(self.first > 0, self.first, self.queries)

    def open_rows(self) -> Int[Tensor, " open"]:
        """The victims that no query has fooled yet."""
        return (self.first == 0).nonzero()[:, 0]


def _rank(rows: Tensor) -> Tensor:
    """How many equal entries stand before each."""
    order = rows.argsort(stable=True)
    held = rows[order]
    starts = torch.ones_like(held, dtype=torch.bool)
    starts[1:] = held[1:] != held[:-1]
    place = torch.arange(len(rows))
    first = torch.where(starts, place, 0).cummax(0).values if len(rows) else place
    return torch.empty_like(rows).scatter_(0, order, place - first)


@dataclass(frozen=True)
class Scene:
    """What an attacker has. It never sees the network that it attacks.

    Attributes:
        x: victims: images in [0, 1] that the black box classifies rightly.
        y: their classes.
        goals: for each a class to be mistaken for; where the attack is not targeted, only a suggestion.
        examples: for each an image of its goal, from the attacker's own data.
        eps: the largest change of a pixel.
        budget: how many queries may be made about a victim.
        targeted: whether only the goal counts as success.
        oracle: answers queries.
        own_x, own_y: the attacker's own labelled images, which the black box was not trained on.
        cnn: a convolutional network that the attacker has trained on them.
        transformers: vision transformers that it has trained on them; `look(x)` gives class token and patch tokens.
        generator: of all that is drawn.
        setting: the values that the search chose, or tries.
    """

    x: Float[Tensor, "n channels height width"]
    y: Int[Tensor, " n"]
    goals: Int[Tensor, " n"]
    examples: Float[Tensor, "n channels height width"]
    eps: float
    budget: int
    targeted: bool
    oracle: Oracle
    own_x: Float[Tensor, "own channels height width"]
    own_y: Int[Tensor, " own"]
    cnn: nn.Module
    transformers: Sequence[TokenTransformer]
    generator: torch.Generator
    setting: Setting = field(default_factory=dict)

    def inside(
        self, images: Float[Tensor, "m channels height width"], rows: Int[Tensor, " m"] | None = None
    ) -> Float[Tensor, "m channels height width"]:
        """Images brought into the balls around their victims and into [0, 1]."""
        x = self.x if rows is None else self.x[rows]
        return images.clamp(x - self.eps, x + self.eps).clamp(0, 1)

    def margin(self, logits: Float[Tensor, "m classes"], rows: Int[Tensor, " m"] | None = None) -> Float[Tensor, " m"]:
        """What an attack makes small: negative where logits are those that it wants."""
        told = self.goals if self.targeted else self.y
        told = (told if rows is None else told[rows])[:, None]
        one = logits.gather(1, told)[:, 0]
        other = logits.scatter(1, told, -torch.inf).amax(1)
        return other - one if self.targeted else one - other
