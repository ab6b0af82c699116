r"""Groups of parameters that live and die together: filters, rows, columns, blocks or single weights.

A group's norm is $\|w_j\| = (\sum_{i \in j} w_i^2)^{1/2}$ over all its tensors. A filter has the norm's scale and shift
in its group: with a zero filter but a shift, batch normalisation would still send something on. `without_filters` makes
a smaller plain network out of one whose filters are zero, or may go.
"""

from __future__ import annotations

import copy
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, fx, nn

from trimtab.ops.arguments import integer, tensor_problem

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# What mixes channels, or reads them in another way.
_OTHERS = (
    nn.GroupNorm,
    nn.LayerNorm,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)

M = TypeVar("M", bound=nn.Module)


class ParameterGroups:
    """Groups of equal size: views of parameters whose first dimensions, `depth` of them, tell the groups apart.

    Views are taken anew at every use, so that the parameters may be loaded, moved to a device or cast.

    Args:
        parameters: what the groups are parts of.
        views: for each parameter, the view of it; the parameter itself if None.
        depth: leading dimensions of the views that count groups.

    Raises:
        ValueError: there is no parameter, or the views do not have the same number of groups.

    Example:
        >>> groups = ParameterGroups([torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([0.0, 1.0])])
        >>> len(groups), groups.size, groups.norms()
        (2, 3, tensor([5.0000, 1.4142]))
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        views: Sequence[Callable[[Tensor], Tensor] | None] | None = None,
        depth: int = 1,
    ) -> None:
        self.parameters = list(parameters)
        self.depth = integer("depth", depth)
        self._views: list[Callable[[Tensor], Tensor] | None] = list(views or [None] * len(self.parameters))
        if not self.parameters or len(self._views) != len(self.parameters):
            raise ValueError(f"views must be one for each parameter, got {len(self._views)} of {len(self.parameters)}")
        shapes = {tuple(view.shape[:depth]) for view in self.views()}
        if len(shapes) != 1 or len(next(iter(shapes))) < depth:
            raise ValueError(f"parameters must have equally many groups, got {sorted(shapes)}")
        self.shape = torch.Size(next(iter(shapes)))

    def __len__(self) -> int:
        return self.shape.numel()

    @property
    def size(self) -> int:
        """Numbers in a group."""
        return sum(p.numel() for p in self.parameters) // max(len(self), 1)

    def views(self) -> list[Tensor]:
        """The parameters, groups first; what is written there is written to the parameters."""
        return [p if view is None else view(p) for p, view in zip(self.parameters, self._views, strict=True)]

    def norms(self) -> Float[Tensor, " groups"]:
        """Euclidean norms of the groups, with a gradient; that of a zero group is 0."""
        squares = [
            view.reshape(len(self), -1).float() if _half(view) else view.reshape(len(self), -1) for view in self.views()
        ]
        found: Tensor = torch.linalg.vector_norm(torch.cat(squares, 1), dim=1)
        return found

    @torch.no_grad()
    def scale_(self, factors: Float[Tensor, " groups"]) -> None:
        """Multiplies every group by a number, in place.

        Raises:
            ValueError: there are not as many factors as groups.
        """
        if factors.shape != (len(self),):
            raise ValueError(f"factors must be of shape ({len(self)},), got {tuple(factors.shape)}")
        for view in self.views():
            view.mul_(factors.to(view.dtype).view(*self.shape, *[1] * (view.dim() - self.depth)))


def _half(value: Tensor) -> bool:
    return value.dtype in (torch.float16, torch.bfloat16)


def rows(weight: Tensor, *more: Tensor | None) -> ParameterGroups:
    """What makes one output: rows of a weight, with the numbers of a bias or a norm that belong to them.

    Example:
        >>> len(rows(nn.Linear(3, 2).weight))
        2
    """
    if problem := tensor_problem(weight=weight, **{f"more[{i}]": part for i, part in enumerate(more)}):
        raise TypeError(problem)
    return ParameterGroups([weight, *(p for p in more if p is not None)])


def columns(weight: Tensor) -> ParameterGroups:
    """What reads one input.

    Example:
        >>> len(columns(nn.Linear(3, 2).weight))
        3
    """
    if problem := tensor_problem(weight=weight):
        raise TypeError(problem)
    return ParameterGroups([weight], [lambda w: w.transpose(0, 1)])


def blocks(weight: Float[Tensor, "out in"], height: int, width: int) -> ParameterGroups:
    """Rectangles of a matrix, row by row.

    Raises:
        ValueError: the matrix is not whole blocks.

    Example:
        >>> len(blocks(torch.ones(4, 6), 2, 3))
        4
    """
    if problem := tensor_problem(weight=weight):
        raise TypeError(problem)
    if not all(isinstance(part, numbers.Integral) and part > 0 for part in (height, width)):
        raise ValueError(f"height and width must be whole numbers of at least 1, got {(height, width)}")
    if weight.dim() != 2 or weight.shape[0] % height or weight.shape[1] % width:
        raise ValueError(f"weight must be whole blocks of {height} x {width}, got shape {tuple(weight.shape)}")
    return ParameterGroups(
        [weight], [lambda w: w.unflatten(1, (-1, width)).unflatten(0, (-1, height)).transpose(1, 2)], depth=2
    )


def filter_groups(model: nn.Module) -> dict[str, ParameterGroups]:
    """Convolution -> its filters, each with its bias and with its numbers in the norm that comes next.

    Example:
        >>> groups = filter_groups(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
        >>> groups["0"].size  # 9 weights, a bias, a scale and a shift
        12
    """
    found: dict[str, list[Tensor | None]] = {}
    last = ""
    for name, layer in model.named_modules():
        if isinstance(layer, CONVOLUTIONS):
            found[name], last = [layer.weight, layer.bias], name
        elif isinstance(layer, NORMS) and last and layer.num_features == len(cast(Tensor, found[last][0])):
            found[last] += [layer.weight, layer.bias]
            last = ""
    return {name: ParameterGroups([p for p in parts if p is not None]) for name, parts in found.items()}


@torch.no_grad()
def without_filters(model: M, kept: Mapping[str, Int64[Tensor, " filters"]]) -> M:
    """A smaller copy of a plain chain of layers, in which convolutions have only some of their filters.

    Layers act in the order in which the model lists them; norms and the layer that reads a convolution lose the same
    channels. Where all that was left out was zero, the copy does what the model does.

    Args:
        model: a chain of convolutions, norms, element-wise layers, pooling, flattening and linear layers.
        kept: convolution -> indices of the filters that stay, in order; others stay whole.

    Raises:
        TypeError: indices are not int64 vectors.
        ValueError: a name is none of a convolution, no filter stays, an index is out of range or comes twice,
            convolutions are grouped or transposed, channels are normalised together, a layer does not read what comes
            before it, or filters that go are tied to others: what they make is added to something (a residual
            connection), or read by two layers. That is seen where `torch.fx` can trace the model.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 2))
        >>> without_filters(model, {"0": torch.tensor([0, 3])})[3].in_features
        18
    """
    small = copy.deepcopy(model)
    unknown = kept.keys() - {name for name, layer in small.named_modules() if isinstance(layer, CONVOLUTIONS)}
    if unknown:
        raise ValueError(f"kept must be of convolutions of the model, got {', '.join(sorted(unknown))}")
    for name, filters in kept.items():
        if not isinstance(filters, Tensor) or filters.dtype != torch.int64 or filters.ndim != 1:
            got = getattr(filters, "dtype", type(filters).__name__)
            raise TypeError(f"kept must hold vectors of indices, int64, got {got} for {name}")
        if len(filters.unique()) < len(filters):
            raise ValueError(f"kept must name each filter once, got {filters.tolist()} for {name}")
    if tie := _tie(small, kept):
        raise ValueError(f"model must be a chain where filters go, got {tie}")
    alive: Tensor | None = None
    width = 0
    for name, layer in small.named_modules():
        if isinstance(layer, CONVOLUTIONS):
            weight = layer.weight
            if alive is not None:
                if layer.groups != 1 or layer.in_channels != width:
                    raise ValueError(f"model must be a chain of ungrouped convolutions, got another at {name}")
                weight = _part(weight, (slice(None), alive))
            alive, width = kept.get(name), len(weight)
            if alive is not None:
                if not len(alive) or int(alive.min()) < 0 or int(alive.max()) >= width or layer.groups != 1:
                    raise ValueError(f"kept must be some of {width} ungrouped filters of {name}, got {alive.tolist()}")
                weight = _part(weight, alive)
                if layer.bias is not None:
                    layer.bias = _part(layer.bias, alive)
            layer.weight = weight
            layer.out_channels, layer.in_channels = weight.shape[:2]
        elif isinstance(layer, (*NORMS, nn.modules.instancenorm._InstanceNorm)) and alive is not None:
            for part in ("weight", "bias", "running_mean", "running_var"):
                if (value := getattr(layer, part)) is not None:
                    setattr(layer, part, _part(value, alive) if isinstance(value, nn.Parameter) else value[alive])
            layer.num_features = len(alive)
        elif isinstance(layer, nn.PReLU) and alive is not None and layer.num_parameters > 1:
            layer.weight, layer.num_parameters = _part(layer.weight, alive), len(alive)
        elif isinstance(layer, _OTHERS) and alive is not None:
            kind = type(layer).__name__
            raise ValueError(
                f"model must be a chain of convolutions with norms of one channel each, got a {kind}, {name}"
            )
        elif isinstance(layer, nn.Linear):
            if alive is not None:
                if layer.in_features % width:
                    raise ValueError(f"{name} must read the {width} channels before it, got {layer.in_features} inputs")
                places = layer.in_features // width
                inputs = (alive[:, None] * places + torch.arange(places, device=alive.device)).flatten()
                layer.weight = _part(layer.weight, (slice(None), inputs))
                layer.in_features = len(inputs)
            alive = None
    return small


def _part(whole: Tensor, index: object) -> nn.Parameter:
    """Some of a parameter, trained if it is."""
    return nn.Parameter(whole.detach()[index], requires_grad=whole.requires_grad)  # type: ignore[index]


def _tie(model: nn.Module, kept: Mapping[str, Tensor]) -> str:
    """Where channels that are about to go meet others, in words; empty where none do, as far as can be seen."""
    try:
        graph = fx.symbolic_trace(model).graph
    except Exception:  # a model that decides by values: whether it is a chain cannot be seen
        return ""
    layers = dict(model.named_modules())
    for first in graph.nodes:
        if first.op != "call_module" or first.target not in kept:
            continue
        if len(kept[first.target]) == len(cast(Tensor, layers[first.target].weight)):
            continue
        node = first
        while users := [user for user in node.users if _makes_tensors(user)]:
            if len(users) > 1:
                return f"what {first.target} makes read in {len(users)} places"
            if len([part for part in users[0].all_input_nodes if _makes_tensors(part)]) > 1:
                return f"what {first.target} makes joined with something else"
            node = users[0]
            if node.op == "call_module" and isinstance(layers[node.target], (*CONVOLUTIONS, nn.Linear)):
                break
    return ""


def _makes_tensors(node: fx.Node) -> bool:
    """Whether a step of a traced model gives a tensor, and not a size or a number."""
    if node.op == "call_method":
        return node.target not in ("size", "dim", "numel", "ndimension")
    if node.op == "call_function":
        of_sizes = node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device")
        given = node.all_input_nodes
        return not of_sizes and (not given or any(map(_makes_tensors, given)))
    return node.op != "output"
