"""Adapters put in place on a model, merged into its weights, removed, saved and loaded."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MethodType
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trimtab.finetune.adapter.config import AdapterConfig, LoRADelta
from trimtab.finetune.adapter.low_rank import compute_from_parts

# Set on adapters, so that another one does not freeze them, nor one on a copy of the model.
_MARK = "_trimtab_adapter"
# What `target_modules` says for all linear layers but the output layer, as in peft.
_ALL_LINEAR = "all-linear"
# What the output layer of a classifier is called, as peft has it.
_CLASSIFIER_HEADS = ("classifier", "score")


class _Hold:
    """A frozen parameter, who froze it, and what is given back when the last of them leaves."""

    def __init__(self, parameter: nn.Parameter, required: bool) -> None:
        self.parameter = parameter
        self.required = required
        self.holders: set[AdaptedModel] = set()
        _HOLDS[id(parameter)] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hold:
        """Of a copied model: the handles that are copied with it join by themselves."""
        memo[id(self)] = own = _Hold(copy.deepcopy(self.parameter, memo), self.required)
        return own

    @classmethod
    def on(cls, parameter: nn.Parameter) -> _Hold:
        """The hold on a parameter; the first one freezes it."""
        hold = _HOLDS.get(id(parameter))
        if hold is None:
            hold = cls(parameter, parameter.requires_grad)
            parameter.requires_grad_(False)
        return hold

    def spread(self, parameter: nn.Parameter) -> None:
        """A merged weight has come in the parameter's place, which others that share it may still have."""
        other = _Hold(parameter, self.required)
        for holder in self.holders:
            holder.take(other)

    def absorb(self, other: _Hold) -> None:
        """The parameter is back in the place of a merged weight."""
        del _HOLDS[id(other.parameter)]
        for holder in list(other.holders):
            holder.drop(other)
            holder.take(self)

    def release(self, holder: AdaptedModel) -> None:
        """One holder less; the last one gives back what was."""
        self.holders.discard(holder)
        if not self.holders:
            self.parameter.requires_grad_(self.required)
            _HOLDS.pop(id(self.parameter), None)


# By the parameter's id, which is its own for as long as the hold, and with it the parameter, lives.
_HOLDS: WeakValueDictionary[int, _Hold] = WeakValueDictionary()


@dataclass(frozen=True)
class _Site:
    """One adapted weight."""

    module: nn.Module
    parameter: str
    base: nn.Parameter
    adapter: nn.Module
    followers: tuple[str, ...]  # the module's parameters after this one


class AdaptedModel:
    """Handle on the adapters in a model, made by `apply_adapter`; the model itself is used as before.

    Attributes:
        model: the adapted model.
        config: what was applied.
        merged: whether the adapters are folded into the weights.
    """

    def __init__(
        self, model: nn.Module, config: AdapterConfig, sites: Mapping[str, _Site], holds: Sequence[_Hold]
    ) -> None:
        self.model = model
        self.config = config
        self.merged = False
        self._sites = dict(sites)
        self._holds = list(holds)
        self._join()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._join()

    def _join(self) -> None:
        for hold in self._holds:
            hold.holders.add(self)

    def take(self, hold: _Hold) -> None:
        """Hold one parameter more."""
        if self not in hold.holders:
            hold.holders.add(self)
            self._holds.append(hold)

    def drop(self, hold: _Hold) -> None:
        """Hold one parameter less; it stays frozen."""
        hold.holders.discard(self)
        self._holds.remove(hold)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The adapters' parameters, for the optimizer."""
        return [p for site in self._live().values() for p in site.adapter.parameters() if p.requires_grad]

    def num_trainable(self) -> int:
        """How many numbers the adapters train."""
        return sum(p.numel() for p in self.trainable_parameters())

    def merge(self) -> None:
        """Write the effective weights into plain parameters, so that the model is as fast and as savable as before."""
        if self.merged:
            warnings.warn("the adapters are merged already; nothing is done", stacklevel=2)
            return
        # weights written in inference mode could never train again
        with torch.inference_mode(False), torch.no_grad():
            effective = {name: getattr(site.module, site.parameter).clone() for name, site in self._live().items()}
            merged = {name: nn.Parameter(weight, requires_grad=False) for name, weight in effective.items()}
        for name, site in self._sites.items():
            _take_off(site)
            setattr(site.module, site.parameter, merged[name])
            _HOLDS[id(site.base)].spread(merged[name])
        self.merged = True
        _watch_saving(self.model)

    def unmerge(self) -> None:
        """Take `merge` back: adapters and frozen weights are what they were, bit for bit.

        Raises:
            RuntimeError: a later adapter sits on a merged weight, or the adapters were removed.
        """
        if not self.merged:
            warnings.warn("the adapters are not merged; nothing is done", stacklevel=2)
            return
        self._put_base_back()
        for site in self._sites.values():
            _put_on(site)
        self.merged = False
        _watch_saving(self.model)

    def _put_base_back(self) -> None:
        for name, site in self._live().items():
            if parametrize.is_parametrized(site.module, site.parameter):
                raise RuntimeError(f"{name} has a later adapter on its merged weight; remove that one first")
        for site in self._sites.values():
            merged = getattr(site.module, site.parameter)
            site.adapter.to(merged.device)  # the model may have been moved since, to another type too
            if merged.dtype != site.base.dtype:
                site.adapter.to(torch.promote_types(merged.dtype, torch.float32))
            site.base.data = site.base.data.to(merged)
            setattr(site.module, site.parameter, site.base)
            _HOLDS[id(site.base)].absorb(_HOLDS[id(merged)])

    def remove(self, keep_merged: bool = True) -> None:
        """Leave a plain model and end this handle.

        Parameters require gradients again as they did before, except those that other adapted models keep frozen:
        adapters may be removed in any order.

        Args:
            keep_merged: keep what was learned, in the weights; False gives the pre-trained weights back.

        Raises:
            RuntimeError: a later adapter sits on a merged weight that is to be given back.
        """
        if keep_merged and not self.merged:
            self.merge()
        elif self.merged and not keep_merged:
            self._put_base_back()
        elif not keep_merged:
            for site in self._live().values():
                _take_off(site)
        for hold in self._holds:
            hold.release(self)
        self._holds.clear()
        self._sites.clear()
        self.merged = False
        _watch_saving(self.model)

    def adapter_state_dict(self) -> dict[str, Any]:
        """The adapters alone: `{"adapter": class name, "config": its fields, "tensors": {"<weight>.<tensor>": …}}`.

        It holds tensors and plain values, so `torch.load(..., weights_only=True)` reads it back.
        """
        return {
            "adapter": type(self.config).__name__,
            "config": _plain(self.config),
            "tensors": {
                f"{name}.{key}": tensor
                for name, site in self._live().items()
                for key, tensor in site.adapter.state_dict().items()
            },
        }

    @torch.no_grad()
    def load_adapter_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Read back what `adapter_state_dict` gave, on the same pre-trained weights.

        Args:
            state: the saved adapters.
            strict: refuse missing and unknown tensors; False loads those that both sides have.

        Raises:
            ValueError: no adapter state, another kind of adapter or setting (the rank, say), other tensors or shapes.
            RuntimeError: the adapters are merged.
        """
        if self.merged:
            raise RuntimeError("the adapters are merged; unmerge() before loading others")
        own = self.adapter_state_dict()
        if not isinstance(state, Mapping):
            raise ValueError(f"state must be what adapter_state_dict() gave, got {type(state).__name__}")
        if missing := own.keys() - state.keys():
            raise ValueError(f"state must be what adapter_state_dict() gave, got none of {sorted(missing)}")
        for part in ("config", "tensors"):
            if not isinstance(state[part], Mapping):
                raise ValueError(f"state must have {part} by name, got {type(state[part]).__name__}")
        if state["adapter"] != own["adapter"]:
            raise ValueError(f"state must be of {own['adapter']} as the model, got {state['adapter']}")
        for name in own["config"].keys() - {"target_modules", "parameters"}:
            if (saved := state["config"].get(name)) != own["config"][name]:
                raise ValueError(
                    f"state must be saved with {name}={own['config'][name]} as the model, got {name}={saved}"
                )
        tensors, saved_tensors = own["tensors"], state["tensors"]
        if strict and tensors.keys() != saved_tensors.keys():
            lacking, unknown = sorted(tensors.keys() - saved_tensors), sorted(saved_tensors.keys() - tensors)
            raise ValueError(f"state must be of the adapted weights, got it with missing {lacking}, unknown {unknown}")
        shared = tensors.keys() & saved_tensors.keys()
        for name in shared:
            if not isinstance(saved_tensors[name], Tensor):
                raise ValueError(f"state must have a tensor for {name}, got {type(saved_tensors[name]).__name__}")
            if saved_tensors[name].shape != tensors[name].shape:
                saved, wanted = tuple(saved_tensors[name].shape), tuple(tensors[name].shape)
                raise ValueError(f"state must have shape {wanted} for {name} as the model, got {saved}")
        for name in shared:
            tensors[name].copy_(saved_tensors[name])

    @torch.no_grad()
    def to_lora_delta(self) -> dict[str, LoRADelta]:
        """What was learned, as LoRA factors on the pre-trained weights, by weight name.

        With A as `lora_A.weight` and B as `lora_B.weight` (reshaped for convolutions) of a `peft` LoRA of that rank
        with `lora_alpha` equal to it, the unchanged pre-trained model gives this model's output.

        The factors are copies without a graph, to be saved or handed on: training goes on without changing them. An
        adapter's own `to_lora_delta()` has a graph to its parameters, since a forward pass may be computed from it.

        Raises:
            TypeError: the adapter's change of weight has no low rank.
        """
        deltas = {}
        for name, site in self._live().items():
            factorise = getattr(site.adapter, "to_lora_delta", None)
            if factorise is None:
                raise TypeError(f"adapter must have a low-rank form, got {type(site.adapter).__name__}")
            A, B = factorise()
            # Hugging Face's Conv1D stores its weight as (in, out)
            A, B = (B.T, A.T) if "Conv1D" in type(site.module).__name__ else (A, B)
            deltas[name] = LoRADelta(A.clone(), B.clone())
        return deltas

    def _live(self) -> dict[str, _Site]:
        if not self._sites:
            raise RuntimeError("the adapters were removed; this handle has ended")
        return self._sites


def apply_adapter(model: nn.Module, config: AdapterConfig) -> AdaptedModel:
    """Put adapters on a model, in place, and freeze everything else, but for what earlier adapters train.

    What else is to train may be unfrozen afterwards (`model.head.requires_grad_(True)`); it is not part of the
    adapters' state dict, nor are batch-norm statistics, which go on updating in training mode. Every forward pass
    computes the effective weights anew and keeps them for the backward pass, except in `nn.Linear` layers of 2^18
    entries or more whose adapter has a low-rank form: these add the adapter's products to the frozen layer's, and
    never write the weight out. `merge()` before inference, and use activation checkpointing where memory is short.
    Adapted modules cannot be pickled (a limit of parametrizations): save state dicts, or `merge()` first. A Hugging
    Face model's `save_pretrained` warns while adapters are not merged: a checkpoint of `Trainer` resumes the adapted
    model, but `from_pretrained` would not know its weights.

    Args:
        model: any module.
        config: what is applied, and where.

    Raises:
        ValueError: `target_modules` names what the model does not have, a weight is parametrized already, or the
            config does not fit a weight. The model is then unchanged.

    Example:
        >>> from trimtab.finetune import SORSAConfig
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> adapters = apply_adapter(model, SORSAConfig(r=2, target_modules=["0"]))
        >>> adapters.num_trainable(), sum(p.numel() for p in model.parameters() if p.requires_grad)
        (50, 50)
        >>> adapters.remove()
        >>> model[0]
        Linear(in_features=8, out_features=16, bias=True)
    """
    with torch.inference_mode(False):  # adapters made in inference mode could never train
        sites = _built(model, config)
    _warn_of_ties(model, sites)
    earlier = {id(p) for part in model.modules() if getattr(part, _MARK, False) for p in part.parameters()}
    holds = [_Hold.on(p) for p in model.parameters() if id(p) not in earlier]
    for site in sites.values():
        setattr(site.adapter, _MARK, True)
        _put_on(site)
    _watch_saving(model)
    return AdaptedModel(model, config, sites, holds)


def _built(model: nn.Module, config: AdapterConfig) -> dict[str, _Site]:
    """The adapters, not put on yet; where one does not fit, torch's global generator is as it was."""
    sites, before = {}, torch.get_rng_state()
    for name, module, parameter in _targets(model, config):
        base, names = getattr(module, parameter), list(module._parameters)
        try:
            followers = tuple(names[names.index(parameter) + 1 :])
            sites[name] = _Site(module, parameter, base, config.build(base), followers)
        except (TypeError, ValueError) as error:
            torch.set_rng_state(before)
            raise type(error)(f"{name}: {error}") from error
    return sites


def _unmerged(model: nn.Module) -> list[str]:
    """Names of the weights that have an adapter."""
    return [
        name.replace("parametrizations.", "").rpartition(".")[0]
        for name, module in model.named_modules()
        if getattr(module, _MARK, False)
    ]


def _watch_saving(model: nn.Module) -> None:
    """Have a Hugging Face model's `save_pretrained` warn, as long as there are adapters."""
    if hasattr(type(model), "save_pretrained"):
        if _unmerged(model):
            vars(model)["save_pretrained"] = MethodType(_save_pretrained, model)  # bound: a copy saves itself
        else:
            vars(model).pop("save_pretrained", None)


def _save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's own `save_pretrained`, after a word on what will not come back."""
    if names := _unmerged(self):
        warnings.warn(
            f"from_pretrained would start {', '.join(names[:3])}{', …' * (len(names) > 3)} anew: these have adapters "
            "that are not merged; merge() them before save_pretrained(), or save adapter_state_dict()",
            stacklevel=2,
        )
    return type(self).save_pretrained(self, *args, **kwargs)


def _put_on(site: _Site) -> None:
    """Have the module's weight be what the adapter makes of it."""
    parametrize.register_parametrization(site.module, site.parameter, site.adapter)
    compute_from_parts(site.module, site.parameter)


def _take_off(site: _Site) -> None:
    """Remove the adapter from its module, which has its frozen weight again."""
    # torch deletes the weight's property from the module's class, which deep copies of the module share
    own = type(site.module)
    site.module.__class__ = type(own.__name__, own.__bases__, dict(vars(own)))
    parametrize.remove_parametrizations(site.module, site.parameter, leave_parametrized=False)
    # torch puts the weight last; optimizers and flattened parameters go by the order that the layer had
    held = site.module._parameters
    for name in site.followers:
        if name in held:
            held[name] = held.pop(name)


def _targets(model: nn.Module, config: AdapterConfig) -> list[tuple[str, nn.Module, str]]:
    """Name of the weight, its module and its name there, for every weight that the config names."""
    if isinstance(config.parameters, str):
        raise TypeError(f"parameters must be a sequence of names, got the string {config.parameters!r}")
    wanted = [config.target_modules] if isinstance(config.target_modules, str) else list(config.target_modules)
    regex = isinstance(config.target_modules, str)
    if wanted == [_ALL_LINEAR]:
        wanted, regex = _linear_layers(model), True
    having = {name: module for name, module in model.named_modules() if any(_present(module, config.parameters))}

    def matches(target: str, name: str) -> bool:
        return bool(re.fullmatch(target, name)) if regex else name == target or name.endswith(f".{target}")

    unmatched = [target for target in wanted if not any(matches(target, name) for name in having)]
    if unmatched or not wanted:
        raise ValueError(
            f"target_modules must be names of modules with {' or '.join(config.parameters)}, got {unmatched}; "
            f"the model has {list(having)}"
        )
    found = []
    for name, module in having.items():
        if any(matches(target, name) for target in wanted):
            for parameter in _present(module, config.parameters):
                if parametrize.is_parametrized(module, parameter):
                    raise ValueError(
                        f"target_modules must be without parametrizations, got {name} with one on {parameter}"
                    )
                found.append((f"{name}.{parameter}" if name else parameter, module, parameter))
    return found


def _linear_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers, as regular expressions, without the output layer of a Hugging Face model."""
    find_output = getattr(model, "get_output_embeddings", None)
    outputs = [find_output()] if find_output is not None else []
    if outputs == [None]:
        outputs = [getattr(model, name, None) for name in _CLASSIFIER_HEADS]
    return [
        re.escape(name)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or "Conv1D" in type(module).__name__
        if not any(module is output for output in outputs)
    ]


def _present(module: nn.Module, parameters: Sequence[str]) -> Iterator[str]:
    own = {name for name, value in module.named_parameters(recurse=False) if value is not None}
    return (name for name in parameters if name in own or parametrize.is_parametrized(module, name))


def _warn_of_ties(model: nn.Module, sites: Mapping[str, _Site]) -> None:
    bases = {site.base for site in sites.values()}
    for prefix, module in model.named_modules():
        for parameter, value in module.named_parameters(prefix, recurse=False, remove_duplicate=False):
            if value in bases and parameter not in sites:
                warnings.warn(f"{parameter} shares an adapted weight and stays at its pre-trained value", stacklevel=3)


def _plain(config: AdapterConfig) -> dict[str, Any]:
    """The config's fields as values that a checkpoint can hold."""
    held = {field.name: getattr(config, field.name) for field in fields(config)}
    return {
        name: list(v) if isinstance(v, Sequence | set) and not isinstance(v, str) else v for name, v in held.items()
    }
