"""Pictures of a coloured digit on a patterned ground, and the sentences that say what is on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "red": (1.0, 0.1, 0.1),
    "green": (0.1, 0.9, 0.1),
    "blue": (0.2, 0.3, 1.0),
    "yellow": (1.0, 0.9, 0.1),
    "purple": (0.8, 0.1, 0.9),
    "white": (1.0, 1.0, 1.0),
}
PATTERNS = ("wall", "stripes", "dots", "checks")
# What a sentence says of the digit comes first in the former, of the ground in the latter.
PHRASES = ("{thing} on {ground}", "{ground} behind {thing}")
OPENINGS = ("", "there is", "a picture of")
SIDE = 24
_DIGIT_SIDE = 18
# A ground is darker than what stands on it.
_GROUND = 0.6

WORDS = ("", *sorted({*DIGITS, *COLOURS, *PATTERNS, *" ".join(OPENINGS).split(), "a", "on", "behind"}))
"""All words; the first is none, behind a sentence's end."""


@dataclass(frozen=True)
class Scenes:
    """What is to be seen on pictures, as places in the lists of words.

    Attributes:
        digit: which digit.
        colour: the digit's.
        pattern: the ground's.
        shade: the ground's colour, another than the digit's.
    """

    digit: Int[Tensor, " n"]
    colour: Int[Tensor, " n"]
    pattern: Int[Tensor, " n"]
    shade: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.digit)

    def __getitem__(self, rows: Int[Tensor, " m"] | slice) -> Scenes:
        return Scenes(*(part[rows] for part in self._parts()))

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.digit, self.colour, self.pattern, self.shade

    @classmethod
    def drawn(cls, n: int, generator: torch.Generator) -> Scenes:
        """Scenes at random."""
        colours = torch.rand(n, len(COLOURS), generator=generator).topk(2, dim=1).indices
        digit, pattern = (torch.randint(len(words), (n,), generator=generator) for words in (DIGITS, PATTERNS))
        return cls(digit, colours[:, 0], pattern, colours[:, 1])

    @classmethod
    def every(cls) -> Scenes:
        """All 1,200 scenes there are, each once."""
        spans = (torch.arange(len(words)) for words in (DIGITS, COLOURS, PATTERNS, COLOURS))
        parts = torch.cartesian_prod(*spans)
        return cls(*parts[parts[:, 1] != parts[:, 3]].unbind(1))

    def unlike(self, generator: torch.Generator) -> Scenes:
        """For each scene another that has no word of content in common with it."""

        def others(taken: Tensor, words: Sequence[str], count: int) -> Tensor:
            chance = torch.rand(len(taken), len(words), generator=generator).scatter(1, taken, -1.0)
            return chance.topk(count, dim=1).indices

        colours = others(torch.stack([self.colour, self.shade], 1), tuple(COLOURS), 2)
        digit = others(self.digit[:, None], DIGITS, 1)[:, 0]
        return Scenes(digit, colours[:, 0], others(self.pattern[:, None], PATTERNS, 1)[:, 0], colours[:, 1])

    def agreement(self, other: Scenes) -> Float[Tensor, " n"]:
        """The share of what the four words say that is also true of the other scene."""
        return torch.stack([a == b for a, b in zip(self._parts(), other._parts(), strict=True)]).float().mean(0)

    def sentences(self, generator: torch.Generator | None = None) -> list[str]:
        """What is to be seen; opening and order are drawn, or plain without a generator."""
        n, colours, found = len(self), list(COLOURS), []
        if generator is None:
            phrase, opening = torch.zeros(2, n, dtype=torch.int64)
        else:
            phrase, opening = (torch.randint(len(ways), (n,), generator=generator) for ways in (PHRASES, OPENINGS))
        for digit, colour, pattern, shade, order, begin in torch.stack([*self._parts(), phrase, opening], 1).tolist():
            thing, ground = f"a {colours[colour]} {DIGITS[digit]}", f"{colours[shade]} {PATTERNS[pattern]}"
            found.append(f"{OPENINGS[begin]} {PHRASES[order].format(thing=thing, ground=ground)}".strip())
        return found

    def pictures(
        self, images: Sequence[Float[Tensor, "k 18 18"]], generator: torch.Generator
    ) -> Float[Tensor, "n 3 24 24"]:
        """Pictures of the scenes, in [0, 1].

        Args:
            images: for each digit, some of its images, as `by_digit` cuts them.
            generator: decides which image is taken, where it stands, and how wide the pattern is and where it begins.
        """
        n, draw = len(self), generator
        counts = torch.tensor([len(held) for held in images])
        chosen = (torch.rand(n, generator=draw) * counts[self.digit]).long() + (counts.cumsum(0) - counts)[self.digit]
        top, left = torch.randint(SIDE - _DIGIT_SIDE + 1, (2, n), generator=draw)
        span = torch.arange(_DIGIT_SIDE)
        ink = torch.zeros(n, SIDE, SIDE)
        down, right = (top[:, None] + span)[:, :, None], (left[:, None] + span)[:, None]
        ink[torch.arange(n)[:, None, None], down, right] = torch.cat(list(images))[chosen]
        shades = torch.tensor(list(COLOURS.values()))
        ground = _GROUND * shades[self.shade][:, :, None, None] * self._patterned(draw)[:, None]
        return torch.lerp(ground, shades[self.colour][:, :, None, None].expand_as(ground), ink[:, None]).clamp(0, 1)

    def _patterned(self, generator: torch.Generator) -> Float[Tensor, "n 24 24"]:
        """How bright the ground is."""
        n = len(self)
        period = (4 + 3 * torch.rand(n, generator=generator))[:, None, None]
        y, x = torch.meshgrid(torch.arange(SIDE).float(), torch.arange(SIDE).float(), indexing="ij")
        shift = 6 * torch.rand(2, n, 1, 1, generator=generator)
        down, right = (2 * torch.pi * (axis + off) / period for axis, off in zip((y, x), shift, strict=True))
        waves = torch.stack(
            [
                torch.ones_like(down.expand(n, SIDE, SIDE)),
                (down + right).sin(),
                2 * (down.sin() + right.sin()) - 2,
                down.sin() * right.sin(),
            ],
            1,
        )
        own = waves[torch.arange(n), self.pattern]
        return (2 * own).sigmoid()


def by_digit(x: Float[Tensor, "n 1 side side"], y: Int[Tensor, " n"]) -> Sequence[Float[Tensor, "k 18 18"]]:
    """For each digit its images, without the empty rim that the larger ones have."""
    rim = x.shape[-1] // 7 if x.shape[-1] >= 28 else 0
    inner = x[..., rim : x.shape[-2] - rim, rim : x.shape[-1] - rim]
    small = F.interpolate(inner, (_DIGIT_SIDE, _DIGIT_SIDE), mode="area")[:, 0]
    return [small[y == digit] for digit in range(len(DIGITS))]


def coded(sentences: Sequence[str]) -> Int[Tensor, "n words"]:
    """The numbers of the words, filled up with zeros."""
    place = {word: number for number, word in enumerate(WORDS)}
    rows = [torch.tensor([place[word] for word in sentence.split()]) for sentence in sentences]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
