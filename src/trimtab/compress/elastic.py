"""A transformer with shared weights that can act as any student of a space of depths, widths and heads."""

from __future__ import annotations

import itertools
import numbers
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from trimtab.compress.transformer import Transformer
from trimtab.ops.arguments import integer, positive


@dataclass(frozen=True)
class Subnet:
    """A student, the same in all of its layers.

    Attributes:
        depth: layers.
        hidden: width of the tokens.
        heads: attention heads, each of the width that all students share.
        mlp_ratio: inner width of the second branch of a layer, over `hidden`.
    """

    depth: int
    hidden: int
    heads: int
    mlp_ratio: float

    def __post_init__(self) -> None:
        for name in ("depth", "hidden", "heads"):
            integer(name, getattr(self, name))
        positive("mlp_ratio", self.mlp_ratio)

    @property
    def mlp(self) -> int:
        """Inner width of the second branch."""
        return max(round(self.mlp_ratio * self.hidden), 1)


@dataclass(frozen=True)
class SubspaceSpec:
    """The values that students of a space take on each axis, all combinations of them.

    Example:
        >>> len(BANDS["small"].subnets()), BANDS["small"].largest
        (256, Subnet(depth=12, hidden=352, heads=10, mlp_ratio=4.0))
    """

    depth: tuple[int, ...]
    hidden: tuple[int, ...]
    heads: tuple[int, ...]
    mlp_ratio: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("depth", "hidden", "heads", "mlp_ratio"):
            if not getattr(self, name):
                raise ValueError(f"{name} must be at least one value, got none")

    def subnets(self) -> list[Subnet]:
        """All of its students."""
        return [Subnet(*values) for values in itertools.product(self.depth, self.hidden, self.heads, self.mlp_ratio)]

    @property
    def largest(self) -> Subnet:
        """The largest value on every axis."""
        return Subnet(max(self.depth), max(self.hidden), max(self.heads), max(self.mlp_ratio))


BANDS = {
    "base": SubspaceSpec((9, 10, 11, 12), (544, 576, 608, 640), (9, 10, 11, 12), (2.5, 3.0, 3.5, 4.0)),
    "small": SubspaceSpec((9, 10, 11, 12), (256, 288, 320, 352), (7, 8, 9, 10), (2.5, 3.0, 3.5, 4.0)),
    "tiny": SubspaceSpec((4, 5, 6, 7), (128, 160, 192, 224), (7, 8, 9, 10), (2.0, 2.5, 3.0, 3.5)),
}
"""The authors' three bands, for heads of width 64."""


def parameter_count(subnet: Subnet, vocabulary: int, context: int, head_dim: int = 64) -> int:
    """Parameters of a student as a `Transformer`, without making it.

    Example:
        >>> model = Transformer(10, 6, depth=2, hidden=8, heads=3, head_dim=4, mlp=16)
        >>> parameter_count(Subnet(2, 8, 3, 2.0), 10, 6, head_dim=4) == sum(p.numel() for p in model.parameters())
        True
    """
    if not all(isinstance(part, numbers.Integral) and part > 0 for part in (vocabulary, context, head_dim)):
        raise ValueError(
            "vocabulary, context and head_dim must be whole numbers of at least 1, "
            f"got {(vocabulary, context, head_dim)}"
        )
    h, width, mlp = subnet.hidden, subnet.heads * head_dim, subnet.mlp
    layer = 4 * h + 3 * (h * width + width) + (width * h + h) + (h * mlp + mlp) + (mlp * h + h)
    return (vocabulary + context) * h + subnet.depth * layer + 2 * h + (h * vocabulary + vocabulary)


def slice_parameters(source: Transformer, target: Transformer) -> dict[str, Tensor]:
    """The parameters that a smaller transformer takes from a larger one: views, which share its storage.

    Of every tensor the first numbers on each axis; of the layers, those at the floor of i times the ratio of depths.

    Raises:
        ValueError: the target is larger in some way.

    Example:
        >>> large, small = Transformer(5, 4, depth=4), Transformer(5, 4, depth=2, heads=3)
        >>> found = slice_parameters(large, small)["layers.1.attention.inner.query.weight"]
        >>> torch.equal(found, large.layers[2].attention.inner.query.weight[:36])
        True
    """
    held, depth, own = dict(source.named_parameters()), len(source.layers), len(target.layers)
    if own > depth:
        raise ValueError(f"target must have at most {depth} layers, got {own}")
    found = {}
    for name, wanted in target.named_parameters():
        parts = name.split(".")
        if parts[0] == "layers":
            parts[1] = str(int(parts[1]) * depth // own)
        whole = held[".".join(parts)]
        if any(few > many for few, many in zip(wanted.shape, whole.shape, strict=True)):
            raise ValueError(
                f"target must be no larger than source, got {tuple(wanted.shape)} for {tuple(whole.shape)} at {name}"
            )
        found[name] = whole[tuple(slice(few) for few in wanted.shape)]
    return found


class ElasticTransformer(nn.Module):
    """A transformer that can act as any student of a space, with shared weights; called as the student that is set.

    Norms are taken over the student's own width. Heads are taken whole.

    Args:
        spec: the space; the weights are those of its largest student.
        vocabulary, context, head_dim, causal: as of `Transformer`.

    Attributes:
        whole: the largest student, which holds all weights.
        subnet: the student that is set.

    Example:
        >>> student = ElasticTransformer(SubspaceSpec((2, 4), (8, 16), (1, 2), (2.0, 4.0)), 10, 6, head_dim=4)
        >>> student.set_subnet(Subnet(2, 8, 1, 2.0))
        >>> student(torch.zeros(3, 6, dtype=torch.int64)).shape
        torch.Size([3, 6, 10])
    """

    def __init__(
        self, spec: SubspaceSpec, vocabulary: int, context: int, *, head_dim: int = 64, causal: bool = False
    ) -> None:
        super().__init__()
        self.spec, self.vocabulary, self.context = spec, vocabulary, context
        self.head_dim, self.causal = integer("head_dim", head_dim), causal
        self.subnet = spec.largest
        self.whole = self._made(self.subnet)
        self._shapes: dict[Subnet, Transformer] = {}

    def set_subnet(self, subnet: Subnet) -> None:
        """Acts as this student from now on.

        Raises:
            ValueError: it is larger than the largest student in some way.
        """
        most = self.spec.largest
        for name in ("depth", "hidden", "heads", "mlp"):
            if getattr(subnet, name) > getattr(most, name):
                raise ValueError(f"{name} must be at most {getattr(most, name)}, got {getattr(subnet, name)}")
        self.subnet = subnet

    def inherit(self, teacher: Transformer) -> None:
        """Takes over the first weights of a teacher with heads of the same width.

        Raises:
            ValueError: the teacher is smaller in some way.
        """
        found = slice_parameters(teacher, self.whole)
        self.whole.load_state_dict({name: value.detach() for name, value in found.items()})

    def shared(self, subnet: Subnet) -> dict[str, Tensor]:
        """The parameters of a student: views of the weights that all share."""
        return slice_parameters(self.whole, self._shape(subnet))

    def extract(self, subnet: Subnet) -> Transformer:
        """A plain transformer with a copy of the student's weights."""
        made = self._made(subnet).to(self.whole.positions)
        made.load_state_dict({name: value.detach() for name, value in self.shared(subnet).items()})
        return made.train(self.training)

    def forward(self, tokens: Int[Tensor, "batch length"], projections: bool = False) -> Float[Tensor, "..."]:
        """As of `Transformer`."""
        shape = self._shape(self.subnet)
        found: Tensor = functional_call(shape, self.shared(self.subnet), (tokens, projections))
        return found

    def _made(self, subnet: Subnet) -> Transformer:
        width = {"depth": subnet.depth, "hidden": subnet.hidden, "heads": subnet.heads, "mlp": subnet.mlp}
        return Transformer(self.vocabulary, self.context, head_dim=self.head_dim, causal=self.causal, **width)

    def _shape(self, subnet: Subnet) -> Transformer:
        """The student without weights of its own."""
        if subnet not in self._shapes:
            with torch.device("meta"):
                self._shapes[subnet] = self._made(subnet)
        return self._shapes[subnet]
