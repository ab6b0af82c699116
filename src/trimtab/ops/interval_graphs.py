"""The graphs of networks that interval bounds walk: traced once, and with what is changed in place told apart."""

from __future__ import annotations

import operator
import weakref
from typing import Any

from torch import Tensor, fx, nn

_VIEWS = (nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
VIEW_NAMES = ("flatten", "view", "reshape", "squeeze", "unsqueeze", "permute", "transpose", "contiguous")
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_GRAPHS: weakref.WeakKeyDictionary[nn.Module, tuple[Any, fx.Graph]] = weakref.WeakKeyDictionary()


def interval_graph(module: nn.Module) -> fx.Graph:
    """The network's graph, traced anew where its parts, their modes or their constants have changed.

    Numbers and switches that `forward` reads from its module stand in the graph as they were when it was traced.

    Raises:
        NotImplementedError: it changes in place what it uses again later.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> [node.op for node in interval_graph(net).nodes]
        ['placeholder', 'call_module', 'call_module', 'output']
        >>> interval_graph(net) is interval_graph(net)
        True
    """
    parts = tuple((name, type(part), _constants(part)) for name, part in module.named_modules())
    held = _GRAPHS.get(module)
    if held is None or held[0] != parts:
        held = (parts, _Tracer().trace(module))
        if name := _overwritten(module, held[1]):
            raise NotImplementedError(f"interval bounds have no rule for {name} in place on what is used again later")
        _GRAPHS[module] = held
    return held[1]


def _name(node: fx.Node) -> str:
    methods = ("call_module", "call_method")
    return str(node.target) if node.op in methods else getattr(node.target, "__name__", "")


def _overwritten(module: nn.Module, graph: fx.Graph) -> str:
    """What changes a tensor in place that is looked at again later, which a walk from node to node would not see."""
    owners: dict[Any, Any] = {}  # of each node the one whose memory it looks at
    for node in graph.nodes:
        part = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        views = isinstance(part, _VIEWS) or (part is None and _name(node) in VIEW_NAMES)
        owners[node] = owners[node.all_input_nodes[0]] if views and node.all_input_nodes else node
    seen: set[Any] = set()
    for node in reversed(graph.nodes):
        name = _name(node)
        part = module.get_submodule(name) if node.op == "call_module" else None
        # Operators such as += are named as theirs; all else that writes in place says so, or ends in an underscore.
        writes = name in ("iadd", "isub", "imul", "itruediv") or (name.endswith("_") and not name.endswith("__"))
        writes = writes or bool(getattr(part, "inplace", False)) or bool(node.kwargs.get("inplace", False))
        if node.op != "output" and writes and node.args and owners.get(node.args[0]) in seen:
            return name
        seen.update(owners[held] for held in node.all_input_nodes)
    return ""


def _constants(part: nn.Module) -> tuple[tuple[str, str], ...]:
    """What a module holds beside tensors and modules, of which the graph knows the names alone."""
    held = {name: value for name, value in vars(part).items() if name not in _OF_EVERY_MODULE or name == "training"}
    return tuple((name, repr(value)) for name, value in held.items() if not isinstance(value, Tensor))


class _Proxy(fx.Proxy):
    """Tells `x += y` from `x = x + y`, which other proxies do not."""

    def _in_place(self, operation: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    def __iadd__(self, other: Any) -> Any:
        return self._in_place(operator.iadd, other)

    def __isub__(self, other: Any) -> Any:
        return self._in_place(operator.isub, other)

    def __imul__(self, other: Any) -> Any:
        return self._in_place(operator.imul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._in_place(operator.itruediv, other)


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)
