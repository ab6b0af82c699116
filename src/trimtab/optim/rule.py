"""The core that every optimizer of the area stands on: a method is an update rule, the rest is here.

A rule sees one tensor at a time. Run as it stands it is applied tensor by tensor; with `fused=True` it is compiled
over all tensors of a parameter group at once, which makes one pass over memory out of many.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import FunctionType
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.optim import Optimizer

from trimtab.ops.arguments import in_range

Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
State: TypeAlias = dict[str, Tensor]
Hyper: TypeAlias = Mapping[str, Any]
Rule: TypeAlias = Callable[[Tensor, Tensor, State, Hyper], None]
Work: TypeAlias = tuple[Tensor, Tensor, State, dict[str, float | bool]]

# Sets of tensors that an optimizer compiles for before it gives up; a model whose gradients come and go makes many.
_MOST_PLANS = 32

# Counting with a tensor takes a third of the time that counting with a number does.
_ONE = torch.ones((), dtype=torch.float32, device="cpu")


class RuleOptimizer(Optimizer):
    """An optimizer given by the update of one tensor.

    A method defines three static functions, none of which may look at the values of a tensor:

    - `init_state(p, grad, group)`: the state of a tensor, made at its first gradient. An entry `step`, made by
      `step_counter()`, is counted up before every update.
    - `coefficients(group, step)`: the numbers of one step, worked out on the host in double precision: learning
      rate, bias corrections, decay factors. Numbers enter the compiled rule as tensors, so that a schedule never
      makes it compile again; booleans are fixed, and may depend on the group alone.
    - `update(p, grad, state, hyper)`: changes `p` and `state` in place, from the gradient (to be left as it is) and
      the coefficients (`float`, or 0-dim tensors when compiled). Tensors of half precision come as float32.

    Args:
        params: parameters, named parameters or parameter groups.
        defaults: the method's hyper-parameters; those with an entry in `bounds` are checked, in every group.
        fused: compile the rule over all tensors of a group with `torch.compile`. The first step then takes from
            seconds to a minute (about half a second for every tensor); where there is no compiler, a warning says
            so once and the rule runs uncompiled.
        maximize: ascend instead of descend.

    Raises:
        ValueError: a hyper-parameter is out of its range.
        TypeError: a hyper-parameter is not a number.
        RuntimeError: at `step`, for a sparse gradient.

    Example:
        >>> class SignDescent(RuleOptimizer):
        ...     def __init__(self, params, lr=0.1, **kwargs):
        ...         super().__init__(params, {"lr": lr}, **kwargs)
        ...     @staticmethod
        ...     def coefficients(group, step):
        ...         return {"lr": float(group["lr"])}
        ...     @staticmethod
        ...     def update(p, grad, state, hyper):
        ...         p.sub_(grad.sign() * hyper["lr"])
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        >>> (weight**2).sum().backward()
        >>> SignDescent([weight]).step()
        >>> weight.tolist()
        [2.9000000953674316, -1.899999976158142]
    """

    bounds: ClassVar[Mapping[str, tuple[float, float]]] = {
        "lr": (0.0, math.inf),
        "eps": (0.0, math.inf),
        "weight_decay": (0.0, math.inf),
        "momentum": (0.0, 1.0),
        "betas": (0.0, 1.0),
    }
    """Half-open range `[low, high)` of each hyper-parameter that has one; for the two `betas`, of each."""

    def __init__(
        self, params: Params, defaults: dict[str, Any], *, fused: bool = False, maximize: bool = False
    ) -> None:
        self._reset()
        super().__init__(params, {**defaults, "fused": bool(fused), "maximize": bool(maximize)})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._reset()
        super().__setstate__(state)

    def _reset(self) -> None:
        self._may_compile = True
        self._plans: dict[tuple[Any, ...], list[_Call]] = {}

    @staticmethod
    def init_state(p: Tensor, grad: Tensor, group: Mapping[str, Any]) -> State:
        """The state of a tensor at its first gradient; none by default."""
        return {}

    @staticmethod
    def coefficients(group: Mapping[str, Any], step: int) -> dict[str, float | bool]:
        """The numbers that step number `step` (1, 2, …; 0 where the state counts none) needs."""
        raise NotImplementedError("an optimizer must define coefficients(group, step)")

    @staticmethod
    def update(p: Tensor, grad: Tensor, state: State, hyper: Hyper) -> None:
        """Change `p` and `state` in place."""
        raise NotImplementedError("an optimizer must define update(p, grad, state, hyper)")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; its hyper-parameters are checked before it is taken."""
        self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def _check(self, group: Mapping[str, Any]) -> None:
        for name, (low, high) in self.bounds.items():
            value = group.get(name, (low, low) if name == "betas" else low)
            if name == "betas" and not (isinstance(value, (tuple, list)) and len(value) == 2):
                raise ValueError(f"betas must be two numbers, got {value!r}")
            for entry in value if name == "betas" else (value,):
                one = isinstance(entry, Tensor) and entry.numel() == 1
                in_range(name, entry.item() if one else entry, low, high, "left")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient.

        Args:
            closure: evaluates the model again, with gradients, and returns the loss.

        Returns:
            The closure's loss, or None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_sparse()
        for group in self.param_groups:
            work = self._gather(group)
            if group["fused"] and self._may_compile and work:
                self._run_compiled(work, group)
            else:
                for p, grad, state, hyper in work:
                    _apply(self.update, p, grad, state, hyper, group["maximize"])
        return loss

    def _refuse_sparse(self) -> None:
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                if p.grad is not None and p.grad.layout != torch.strided:
                    name = group["param_names"][i] if "param_names" in group else f"number {i}"
                    raise RuntimeError(
                        f"{type(self).__name__} does not take sparse gradients; parameter {name} of shape "
                        f"{tuple(p.shape)} has one"
                    )

    def _gather(self, group: dict[str, Any]) -> list[Work]:
        """What there is to update: tensors, with their state made and their step counted."""
        found: list[tuple[Tensor, Tensor, State]] = []
        for p in group["params"]:
            grad = p.grad
            if grad is None:
                continue
            state = self.state[p]
            if p.is_complex():
                p, grad = torch.view_as_real(p), torch.view_as_real(grad)
            if not state:
                sign = -1 if group["maximize"] else 1
                state.update(self.init_state(_working(p), _working(grad) * sign, group))
            found.append((p, grad, state))
        for *_, state in found:
            if "step" in state:
                state["step"].add_(_ONE)
        numbers = cache(lambda step: self.coefficients(group, step))
        return [(p, grad, state, numbers(int(state["step"]) if "step" in state else 0)) for p, grad, state in found]

    def _run_compiled(self, work: list[Work], group: dict[str, Any]) -> None:
        signature = tuple([id(p) for p in group["params"] if p.grad is not None])
        maximize = group["maximize"]
        plan = self._plans.get(signature)
        if plan is None:
            plan = self._plans[signature] = _planned(work)
        for call in plan:
            items = [work[i] for i in call.positions] if len(plan) > 1 else work
            hyper = items[0][3]
            if all(item[3] is hyper for item in items):  # all have taken as many steps
                call.numbers.copy_(torch.tensor([hyper[name] for name in call.names], dtype=call.numbers.dtype))
            else:
                table = [[hyper[name] for name in call.names] for *_, hyper in items]
                call.numbers.copy_(torch.tensor(table, dtype=call.numbers.dtype))
            flags = (maximize, *[hyper[name] for name in call.flags])
            try:
                if len(self._plans) > _MOST_PLANS:
                    raise _CannotCompileError("the set of tensors that have a gradient keeps changing")
                if (rule := call.rules.get(flags)) is None:
                    named = tuple(zip(call.flags, flags[1:], strict=True))
                    rule = call.rules[flags] = _compiled(
                        self.update, call.keys, call.names, named, maximize, call.shapes
                    )
                rule(
                    call.rows,
                    [p for p, *_ in items],
                    [grad for _, grad, *_ in items],
                    [[state[key] for _, _, state, _ in items] for key in call.keys],
                )
            except (TorchDynamoException, _CannotCompileError) as error:  # raised before anything runs
                told, self._may_compile = not self._may_compile, False
                if not told:
                    reason = str(error).strip().partition("\n")[0]
                    warnings.warn(
                        f"{type(self).__name__}: fused=True needs torch.compile, which failed "
                        f"({type(error).__name__}: {reason}); the steps run uncompiled, with the same result",
                        RuntimeWarning,
                        stacklevel=5,
                    )
                for p, grad, state, hyper in items:
                    _apply(self.update, p, grad, state, hyper, maximize)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state, of this class or of another one whose state is made of the same tensors.

        Hyper-parameters come from the saved groups, where they have them; `fused` says how this optimizer runs, and
        stays. Tensors are kept in the precision that this optimizer works in: at least single, so that the state of
        bfloat16 parameters is taken exactly, and double for parameters in double precision.

        Raises:
            TypeError: a saved hyper-parameter is not a number.
            ValueError: groups, state or a hyper-parameter do not fit this optimizer; it is then as it was.
        """
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self.__setstate__(self._read(state_dict))
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _read(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """Groups and state of a saved state, in copies; nothing changes here."""
        if missing := {"state", "param_groups"} - set(state_dict):
            raise ValueError(
                f"state_dict must be what state_dict() of an optimizer gave, got none of {sorted(missing)}"
            )
        saved_groups, saved_state = state_dict["param_groups"], dict(state_dict["state"])
        sizes, saved_sizes = ([len(group["params"]) for group in of] for of in (self.param_groups, saved_groups))
        if sizes != saved_sizes:
            raise ValueError(f"state_dict must have groups of {sizes} parameters, got {saved_sizes}")
        groups: list[dict[str, Any]] = []
        state: defaultdict[Any, Any] = defaultdict(dict)
        for own, saved in zip(self.param_groups, saved_groups, strict=True):
            given = {name: value for name, value in saved.items() if name not in ("params", "fused", "step")}
            group = {**own, **copy.deepcopy(given)}
            self._check(group)
            groups.append(group)
            for key, p in zip(saved["params"], own["params"], strict=True):
                values = {name: value for name, value in saved_state.pop(key, {}).items() if value is not None}
                if values:
                    # Some packages count the steps once for a group.
                    state[p] = self._fitted(p, values, saved.get("step"), group)
        state.update(saved_state)  # of no parameter, as torch's own optimizers keep it
        return {"state": state, "param_groups": groups}

    def _fitted(self, p: Tensor, values: dict[str, Any], counted: Any, group: Mapping[str, Any]) -> State:
        """The saved state of one parameter, in the form that this optimizer's has."""
        shape = (*p.shape, 2) if p.is_complex() else p.shape
        like = torch.empty(shape, dtype=_precision(p.real.dtype if p.is_complex() else p.dtype), device="meta")
        wanted = self.init_state(like, like, group)
        if "step" in wanted and counted is not None:
            values = {"step": counted, **values}
        if values.keys() != wanted.keys():
            raise ValueError(
                f"state_dict must have the state of {type(self).__name__}, {sorted(wanted)}, got {sorted(values)}"
            )
        found = {}
        for name, want in wanted.items():
            value = torch.as_tensor(values[name]).detach()
            value = torch.view_as_real(value) if value.is_complex() else value
            if value.shape != want.shape:
                raise ValueError(
                    f"state_dict must have {name} of shape {tuple(want.shape)} for its parameter, "
                    f"got {tuple(value.shape)}"
                )
            found[name] = value.to("cpu" if name == "step" else p.device, want.dtype, copy=True)
        return found


def step_counter() -> Tensor:
    """A state's entry `step` at zero. Not of the default type: bfloat16 cannot count beyond 256."""
    return torch.zeros((), dtype=torch.float32, device="cpu")


@dataclass(frozen=True)
class _Call:
    """One call of a compiled rule, over tensors of one device, precision and kind of state."""

    positions: list[int]
    keys: tuple[str, ...]
    names: tuple[str, ...]
    flags: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    numbers: Tensor
    rows: tuple[Tensor, ...]
    rules: dict[tuple[Any, ...], Callable[..., None]] = field(default_factory=dict)


def _planned(work: list[Work]) -> list[_Call]:
    buckets: dict[tuple[Any, ...], list[int]] = {}
    for i, (p, _, state, _) in enumerate(work):
        buckets.setdefault((p.device, p.dtype, tuple(key for key in state if key != "step")), []).append(i)
    calls = []
    for (device, dtype, keys), positions in buckets.items():
        hyper = work[positions[0]][3]
        names = tuple(name for name, value in hyper.items() if not isinstance(value, bool))
        flags = tuple(name for name, value in hyper.items() if isinstance(value, bool))
        numbers = torch.empty(len(positions), len(names), dtype=_precision(dtype), device=device)
        shapes = tuple(work[i][0].shape for i in positions)
        calls.append(_Call(positions, keys, names, flags, shapes, numbers, numbers.unbind()))
    return calls


class _CannotCompileError(RuntimeError):
    """There is no point in compiling."""


def _precision(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _working(tensor: Tensor) -> Tensor:
    """The tensor itself, or a float32 copy of one of half precision."""
    return tensor.to(_precision(tensor.dtype))


def _apply(update: Rule, p: Tensor, grad: Tensor, state: State, hyper: Hyper, maximize: bool) -> None:
    grad = grad.to(_precision(p.dtype))
    work = _working(p)
    update(work, -grad if maximize else grad, state, hyper)
    if work is not p:
        p.copy_(work)


@cache
def _compiled(
    update: Rule,
    keys: tuple[str, ...],
    names: tuple[str, ...],
    flags: tuple[tuple[str, bool], ...],
    maximize: bool,
    shapes: tuple[torch.Size, ...],
) -> Callable[..., None]:
    """The rule over lists of tensors of these shapes, compiled; made once for all optimizers that run it alike."""

    def run(rows: tuple[Tensor, ...], params: list[Tensor], grads: list[Tensor], states: list[list[Tensor]]) -> None:
        # Each tensor reads its own copy of the numbers: shared ones would make the compiler weigh every pair of
        # tensors for fusion, in quadratic time.
        for row, p, grad, *values in zip(rows, params, grads, *states, strict=True):
            hyper = {**dict(zip(names, row.unbind(), strict=True)), **dict(flags)}
            _apply(update, p, grad, dict(zip(keys, values, strict=True)), hyper, maximize)

    # torch limits how often one code object is compiled; each set of shapes gets its own.
    own = FunctionType(run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__)
    try:
        return torch.compile(own, dynamic=False, fullgraph=True)
    except RuntimeError as error:  # this Python or platform is not supported
        raise _CannotCompileError(str(error)) from error
