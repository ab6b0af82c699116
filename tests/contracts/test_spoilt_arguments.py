"""What every public function and class does with a number that is none, an array, or a complex tensor: it says so.

The example of each name shows how it is called. Here the same calls are made again with one argument spoilt, so that a
new name is tried as soon as it has an example.
"""

from __future__ import annotations

import contextlib
import copy
import doctest
import importlib
import inspect
import io
import numbers
import pickle
import pkgutil
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from sklearn.base import BaseEstimator
from torch import Tensor

from trimtab import ops

AREAS = (
    "compress",
    "diffusion",
    "domain",
    "federated",
    "finetune",
    "generative",
    "losses",
    "metric",
    "optim",
    "ops",
    "robust",
    "semisup",
    "solvers",
    "unlearning",
)
# Modules of `ops` that only our own functions call, with what they have checked.
WITHIN = {"arguments", "callbacks", "interval_graphs", "units"}
NAN, INF = float("nan"), float("inf")


class Call(NamedTuple):
    """A call that an example makes, with all that it leaves to defaults."""

    function: Callable[..., Any]
    bound: inspect.BoundArguments

    def given(self) -> Iterator[tuple[str, Any]]:
        """Its arguments, defaults among them."""
        for name, parameter in self.bound.signature.parameters.items():
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                yield name, self.bound.arguments.get(name, parameter.default)

    def with_one(self, name: str, value: Any) -> Any:
        """What comes of it with another argument of this name."""
        spoilt = inspect.BoundArguments(self.bound.signature, OrderedDict(self.bound.arguments))
        for key, held in self.bound.arguments.items():
            spoilt.arguments[key] = plain(held)
        spoilt.arguments[name] = value
        torch.manual_seed(0)
        return self.function(*spoilt.args, **spoilt.kwargs)


def public(area: str) -> Iterator[tuple[str, Any]]:
    package = importlib.import_module(f"trimtab.{area}")
    modules = [package]
    if area == "ops":
        found = (info.name for info in pkgutil.iter_modules(ops.__path__) if info.name not in WITHIN)
        modules = [importlib.import_module(f"trimtab.ops.{name}") for name in found]
    for module in modules:
        for name in dir(module):
            held = getattr(module, name)
            own = getattr(held, "__module__", "") or ""
            if name.startswith("_") or not own.startswith("trimtab.") or (area == "ops" and own != module.__name__):
                continue
            if inspect.isfunction(held) or (inspect.isclass(held) and not issubclass(held, BaseEstimator)):
                yield name, held


def plain(value: Any) -> Any:
    """A copy that can be copied again."""
    if isinstance(value, Tensor):
        return value.detach().clone(memory_format=torch.contiguous_format)
    try:
        return copy.deepcopy(value)
    except (TypeError, RuntimeError):
        return value


def first_call(name: str, held: Any) -> Call | None:
    """The first call of a function, or of a constructor, in its example."""
    module = sys.modules[held.__module__]
    examples = doctest.DocTestFinder(recurse=False).find(held, name, module=False, globs=vars(module))
    calls: list[inspect.BoundArguments] = []

    def recorded(wrapped: Callable[..., Any], skip: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not calls:
                bound = inspect.signature(held).bind(*args[skip:], **kwargs)
                bound.arguments = {key: plain(value) for key, value in bound.arguments.items()}
                calls.append(bound)
            return wrapped(*args, **kwargs)

        return call

    is_class = inspect.isclass(held)
    own = vars(held).get("__init__") if is_class else None
    if is_class and own is None:
        return None
    for example in examples:
        if not example.examples:
            continue
        globs = dict(vars(module))
        if is_class:
            held.__init__ = recorded(own, 1)
        else:
            globs[name] = recorded(held, 0)
        example.globs = globs
        torch.manual_seed(0)
        try:
            doctest.DocTestRunner(verbose=False).run(example, out=lambda text: None, clear_globs=False)
        finally:
            if is_class:
                held.__init__ = own
    return Call(held, calls[0]) if calls else None


@cache
def calls() -> dict[str, Call]:
    found = {f"{area}.{name}": first_call(name, held) for area in AREAS for name, held in public(area)}
    return {name: call for name, call in found.items() if call is not None}


def names() -> list[str]:
    return [f"{area}.{name}" for area in AREAS for name, _ in public(area)]


def called(name: str) -> Call:
    if name not in calls():
        pytest.skip("its example does not call it by its name")
    return calls()[name]


def refused(call: Call, argument: str, value: Any) -> None:
    try:
        result = call.with_one(argument, value)
    except (TypeError, ValueError) as error:
        assert argument in str(error), f"{argument}={value!r}: {error}"  # noqa: PT017
    else:
        pytest.fail(f"{argument}={value!r:.80} was taken and gave {result!r:.80}")


# Where infinity is a number like others, and why.
ENDLESS = {
    ("diffusion.adaptive_weight", "high"): "a bound that is none",
    ("domain.prototype_gap", "p"): "the largest difference of an entry",
    ("finetune.smallest_entries", "threshold"): "all entries",
    ("losses.NestedDropout", "sigma"): "all widths alike",
    ("losses.truncation_distribution", "sigma"): "all widths alike",
    ("losses.h_consistency_bound", "excess"): "a bound of infinity",
    ("losses.SampleMemory", "init"): "marks rows without a past",
    ("ops.SampleMemory", "init"): "marks rows without a past",
    ("ops.partial_sinkhorn", "gamma"): "the whole mass",
    ("semisup.sp2ot", "gamma"): "sizes all alike",
    ("metric.UNPGLoss", "whisker"): "keeps all pairs",
    ("metric.unpg_loss", "whisker"): "keeps all pairs",
    ("metric.whisker_filter", "whisker"): "keeps all values",
    **{("optim.constrain", end): "a bound that is none" for end in ("low", "high")},
    **{("optim.unconstrain", end): "a bound that is none" for end in ("low", "high")},
}


def is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


@pytest.mark.parametrize("name", names())
def test_what_is_no_number_is_refused_by_name(name: str) -> None:
    call = called(name)
    for argument, value in call.given():
        if is_number(value):
            for bad in (NAN, INF, -INF):
                if bad == NAN or (name, argument) not in ENDLESS:
                    refused(call, argument, bad)


# Functions whose tensors hang together by a graph, which their copies do not keep.
GRAPHS = {
    "diffusion.adaptive_weight",
    "domain.hutchinson_diagonal",
    "ops.hessian_operator",
    "ops.hvp",
    "optim.nlm_alignment",
}


@pytest.mark.parametrize("name", names())
def test_numbers_of_numpy_are_taken(name: str) -> None:
    call = called(name)
    if name in GRAPHS:
        pytest.skip("copies of its tensors have no graph")
    for argument, value in call.given():
        if is_number(value):
            # Of NumPy's, float64 alone is a float of Python's too.
            call.with_one(argument, np.int64(value) if isinstance(value, int) else np.float32(value))


@pytest.mark.parametrize("name", names())
def test_an_array_is_taken_or_refused_by_name(name: str) -> None:
    call = called(name)
    for argument, value in call.given():
        if isinstance(value, Tensor):
            try:
                call.with_one(argument, value.numpy())
            except TypeError as error:
                assert argument in str(error), f"{argument}: {error}"  # noqa: PT017


# Where a complex tensor means something, and why.
COMPLEX = {
    ("ops.Interval", "lower"): "only holds its ends",
    ("ops.Interval", "upper"): "only holds its ends",
}


@pytest.mark.parametrize("name", names())
def test_a_complex_tensor_is_refused_by_name(name: str) -> None:
    call = called(name)
    for argument, value in call.given():
        if isinstance(value, Tensor) and value.is_floating_point() and (name, argument) not in COMPLEX:
            refused(call, argument, value.to(torch.complex64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", names())
def test_half_precision_is_no_dead_end(name: str, dtype: torch.dtype) -> None:
    call = called(name)
    if name in GRAPHS or name.endswith("Mixin"):
        pytest.skip("copies of its tensors have no graph, or it is mixed into another class")
    halved = {key: plain(value) for key, value in call.bound.arguments.items()}
    for key, value in halved.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            halved[key] = value.to(dtype)
    bound = inspect.BoundArguments(call.bound.signature, OrderedDict(halved))
    torch.manual_seed(0)
    try:
        call.function(*bound.args, **bound.kwargs)
    except (TypeError, ValueError) as error:
        assert "must " in str(error)  # noqa: PT017
    except RuntimeError as error:
        # Models in examples are of float32, and PyTorch says so; what it does not have is ours to get round.
        assert "not implemented for" not in str(error)  # noqa: PT017
        assert "expected scalar type" not in str(error)  # noqa: PT017


# What differentiates a loss that its caller has computed, or is a step of such a computation.
WITHIN_TRAINING = {"domain.hessian_gradient_product", "federated.quasi_gradient", *GRAPHS}


@pytest.mark.parametrize("where", ["no_grad", "autocast"])
@pytest.mark.parametrize("name", names())
def test_works_where_an_evaluation_runs(name: str, where: str) -> None:
    call = called(name)
    if name in WITHIN_TRAINING or name.endswith("Mixin"):
        pytest.skip("it needs its caller's graph, or is mixed into another class")
    bound = inspect.BoundArguments(call.bound.signature, OrderedDict(call.bound.arguments))
    for key, held in call.bound.arguments.items():
        bound.arguments[key] = plain(held)
    torch.manual_seed(0)
    with torch.no_grad() if where == "no_grad" else torch.autocast("cpu", dtype=torch.bfloat16):
        try:
            call.function(*bound.args, **bound.kwargs)
        except (TypeError, ValueError) as error:
            assert "must be" in str(error) or "must have a graph" in str(error)  # noqa: PT017


CLASSES = [f"{area}.{name}" for area in AREAS for name, held in public(area) if inspect.isclass(held)]


@pytest.mark.parametrize("name", [name for name in CLASSES if not name.endswith("Mixin")])
def test_an_object_can_go_to_another_process(name: str) -> None:
    call = called(name)
    bound = inspect.BoundArguments(call.bound.signature, OrderedDict(call.bound.arguments))
    made = call.function(*bound.args, **bound.kwargs)
    try:
        pickle.loads(pickle.dumps(made))
    except (pickle.PicklingError, RuntimeError) as error:
        # The example's own functions are of no module; parametrized modules go by their state, says PyTorch.
        assert "attribute lookup" in str(error) or "parametrized" in str(error)  # noqa: PT017


# PyTorch puts no parametrization on in which a weight changes its type.
PARAMETRIZED = {"compress.LowRank"}


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in PARAMETRIZED])
def test_the_example_of_a_class_runs_under_autocast(name: str) -> None:
    area, _, own_name = name.partition(".")
    held = dict(public(area))[own_name]
    module = sys.modules[held.__module__]
    for example in doctest.DocTestFinder(recurse=True).find(held, own_name, module=False, globs=vars(module)):
        globs = dict(vars(module))
        torch.manual_seed(0)
        for line in example.examples:
            if line.exc_msg is None:
                with torch.autocast("cpu", dtype=torch.bfloat16), contextlib.redirect_stdout(io.StringIO()):
                    try:
                        exec(compile(line.source, name, "single"), globs)
                    except TypeError as error:  # exact computations say that they take no half precision
                        assert "must be float32 or" in str(error)  # noqa: PT017
                        break
