"""What memory alone allows: programs that read and write as many arrays as a method must, and compute next to nothing.

A method that is slower than a simpler one because it has more to read is at its best where it takes about as long as
such a program does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sweep:
    """One pass over arrays of the same shapes.

    Attributes:
        reads: arrays that are read.
        writes: arrays that are written.
        exponentials: taken of each entry; a softmax cannot do without one.
        logarithms: of one plus each entry; a softplus cannot do without one.
        roots: square roots taken, and divided by, of each entry; a step of Adam's kind cannot do without one.
    """

    reads: int
    writes: int = 0
    exponentials: int = 0
    logarithms: int = 0
    roots: int = 0

    def __str__(self) -> str:
        """In the words of a note."""
        more = f", {self.exponentials} exponentials" if self.exponentials else ""
        more += f", {self.logarithms} logarithms" if self.logarithms else ""
        more += f", {self.roots} x root and quotient" if self.roots else ""
        return f"{self.reads} read, {self.writes} written{more}"


def sweeps(shapes: Sequence[torch.Size], passes: Sequence[Sweep]) -> Callable[[], None]:
    """A compiled program that makes these passes, one after another, over arrays of each of the shapes.

    Sums over the last dimension stand for what a pass that writes nothing gives.
    """
    held = [[torch.rand(shape) for shape in shapes] for _ in range(max(max(p.reads, p.writes) for p in passes))]
    sums = [torch.zeros(shape[:-1]) for shape in shapes]
    programs = [_program(one) for one in passes]

    def call() -> None:
        for program in programs:
            program(held, sums)

    return call


def _program(one: Sweep) -> Callable[[list[list[Tensor]], list[Tensor]], None]:
    @torch.compile(dynamic=False)
    def run(held: list[list[Tensor]], sums: list[Tensor]) -> None:
        for out, *arrays in zip(sums, *held, strict=True):
            total = arrays[0] * 0.5
            for x in arrays[1 : one.reads]:
                total = total + x * 0.5
            for i in range(one.exponentials):
                total = total + (arrays[0] * 0.5**i).exp()
            for i in range(one.logarithms):
                total = total + (arrays[0] * 0.5**i).log1p()
            for i in range(one.roots):
                total = total / ((arrays[0] * 0.5**i).sqrt() + 1)
            for x in arrays[: one.writes]:
                x.copy_(total)
            if not one.writes:
                out.copy_(total.sum(-1))

    return run
