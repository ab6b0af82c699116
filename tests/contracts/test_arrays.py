"""What functions and methods do with a NumPy array where a tensor belongs: they take it, or say by name what they want.

The example of each public name shows how it and its methods are called. Here each call is made again with one tensor as
an array, so that a new name is tried as soon as it has an example. Networks and layers are PyTorch's own affair.
"""

from __future__ import annotations

import contextlib
import copy
import doctest
import importlib
import inspect
import io
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from trimtab import sources
from trimtab.catalog import Catalog

AREAS = [area for area in Catalog().areas if sources.exports(f"trimtab.{area}")]


class Call(NamedTuple):
    """A call that an example makes."""

    name: str
    function: Callable[..., Any]
    bound: inspect.BoundArguments

    def tensors(self) -> list[str]:
        return [name for name, value in self.bound.arguments.items() if isinstance(value, Tensor)]

    def with_array(self, name: str) -> None:
        arguments = {key: plain(value) for key, value in self.bound.arguments.items()}
        arguments[name] = arguments[name].numpy()
        bound = inspect.BoundArguments(self.bound.signature, arguments)  # type: ignore[arg-type]
        torch.manual_seed(0)
        self.function(*bound.args, **bound.kwargs)


def plain(value: Any) -> Any:
    """A copy that can be copied again, where there can be one."""
    if isinstance(value, Tensor):
        return value.detach().clone(memory_format=torch.contiguous_format)
    try:
        return copy.deepcopy(value)
    except (TypeError, RuntimeError, AttributeError):
        return value


def methods(held: type) -> list[str]:
    """The methods that take data: public ones, and the call itself."""
    return [
        name
        for name, method in vars(held).items()
        if inspect.isfunction(method) and (not name.startswith("_") or name == "__call__")
    ]


def calls(area: str, name: str) -> Iterator[Call]:
    """The first call of a function, or of each method of a class, in its example."""
    held = getattr(importlib.import_module(f"trimtab.{area}"), name)
    module = sys.modules[held.__module__]
    steps = doctest.DocTestParser().get_examples(inspect.getdoc(held) or "")
    found: dict[str, Call] = {}

    def recorded(told: str, wrapped: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if told not in found:
                bound = inspect.signature(wrapped).bind(*args, **kwargs)
                bound.arguments.update({key: plain(value) for key, value in bound.arguments.items()})
                found[told] = Call(told, wrapped, bound)
            return wrapped(*args, **kwargs)

        return call

    globs = {"__name__": "example", **vars(module)}
    own = {part: vars(held)[part] for part in methods(held)} if inspect.isclass(held) else {}
    for part, method in own.items():
        setattr(held, part, recorded(f"{name}.{part}", method))
    package = importlib.import_module(f"trimtab.{area}")
    if inspect.isfunction(held):
        globs[name] = recorded(name, held)
        setattr(package, name, globs[name])  # an example may import it
    torch.manual_seed(0)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            for step in steps:
                exec(compile(step.source, "<example>", "single"), globs)
    finally:
        for part, method in own.items():
            setattr(held, part, method)
        setattr(package, name, held)
    yield from found.values()


def is_a_network(call: Call) -> bool:
    """Whether it is a layer or a network that is called; a loss has no parameters."""
    held = call.bound.arguments.get("self")
    named = call.name.endswith((".forward", ".right_inverse", ".encode", ".decode"))
    return named and isinstance(held, nn.Module) and any(True for _ in held.parameters())


NAMES = [(area, name) for area in AREAS for name in sorted(sources.exports(f"trimtab.{area}"))]
# Arguments that go by another name in the message.
OTHERWISE = {
    ("AdaDFQ.maker_losses", "said"): "other",
    ("AdaDFQ.student_loss", "said"): "other",
}


def raw(area: str, name: str) -> list[str]:
    """The arguments for which PyTorch's own error comes through, with the error."""
    found = []
    for call in calls(area, name):
        if is_a_network(call):
            continue
        for argument in call.tensors():
            wanted = OTHERWISE.get((call.name, argument), argument)
            try:
                call.with_array(argument)
            except (TypeError, ValueError) as error:
                if not (wanted in str(error) and "must" in str(error)):
                    found.append(f"{call.name}({argument}): {error!r:.160}")
            except (AttributeError, IndexError, RuntimeError) as error:
                found.append(f"{call.name}({argument}): {error!r:.160}")
    return found


@pytest.mark.parametrize(("area", "name"), NAMES, ids=[f"{area}.{name}" for area, name in NAMES])
def test_an_array_is_taken_or_refused_by_name(area: str, name: str) -> None:
    held = getattr(importlib.import_module(f"trimtab.{area}"), name)
    if not (inspect.isfunction(held) or inspect.isclass(held)):
        pytest.skip("it is neither a function nor a class")
    assert raw(area, name) == []
