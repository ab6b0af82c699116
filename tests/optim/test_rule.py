"""What the core does beyond the contract that every optimizer keeps."""

import copy
import warnings

import pytest
import torch
from torch import nn

from trimtab.optim import AdaBelief, AdamP, RuleOptimizer, SGDSaI, rule


class Descent(RuleOptimizer):
    """The least there can be: no state, one number."""

    def __init__(self, params, lr=0.5, **kwargs):
        super().__init__(params, {"lr": lr}, **kwargs)

    @staticmethod
    def coefficients(group, step):
        return {"lr": group["lr"]}

    @staticmethod
    def update(p, grad, state, hyper):
        p.sub_(grad * hyper["lr"])


def parameter(*values, dtype=torch.float32):
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def test_a_rule_without_state():
    weight = parameter(1.0, 2.0)
    optimizer = Descent([weight])
    weight.grad = torch.tensor([1.0, -1.0])
    optimizer.step()
    assert weight.tolist() == [0.5, 2.5]
    assert optimizer.state_dict()["state"] == {0: {}} or not optimizer.state_dict()["state"]


@pytest.mark.parametrize("part", ["coefficients", "update"])
def test_an_incomplete_method_says_what_it_lacks(part):
    incomplete = type("Incomplete", (Descent,), {part: staticmethod(getattr(RuleOptimizer, part))})
    weight = parameter(1.0)
    weight.grad = torch.ones(1)
    with pytest.raises(NotImplementedError, match=part):
        incomplete([weight]).step()


def test_half_precision_is_updated_in_float32():
    """256 - 0.75 - 0.75 is 254 in bfloat16 if rounded once, but 256 if each term were rounded by itself."""

    class TwoTerms(Descent):
        @staticmethod
        def update(p, grad, state, hyper):
            p.sub_(grad).sub_(grad)

    weight = parameter(256.0, dtype=torch.bfloat16)
    weight.grad = torch.tensor([0.75], dtype=torch.bfloat16)
    TwoTerms([weight]).step()
    assert weight.item() == 254.0


def test_compiled_tensors_have_their_own_precision_and_their_own_step():
    """Two precisions in a group, of which one joins later."""
    eager, compiled = (
        [nn.Parameter(torch.linspace(1, 2, 3).to(d)) for d in (torch.float64, torch.bfloat16)] for _ in "ab"
    )
    one, two = AdaBelief(eager, lr=1 / 3, betas=(0.7, 0.9)), AdaBelief(compiled, lr=1 / 3, betas=(0.7, 0.9), fused=True)
    for step in range(12):
        for p, q in list(zip(eager, compiled, strict=True))[: 1 if step < 3 else 2]:
            p.grad = torch.sin(torch.arange(3.0) + step).to(p.dtype)
            q.grad = p.grad.clone()
        one.step()
        two.step()
    torch.testing.assert_close(eager[0], compiled[0], atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(eager[1], compiled[1], atol=1e-2, rtol=1e-2)
    assert [two.state[q]["exp_avg"].dtype for q in compiled] == [torch.float64, torch.float32]
    assert [two.state[q]["step"].item() for q in compiled] == [12, 9]


def test_compilation_stops_where_gradients_come_and_go(monkeypatch):
    monkeypatch.setattr(rule, "_compiled", lambda *layout: lambda rows, params, grads, states: None)
    monkeypatch.setattr(rule, "_MOST_PLANS", 2)
    weights = [nn.Parameter(torch.ones(n)) for n in (1, 2, 3)]
    optimizer = Descent(weights, fused=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for p in weights[:2]:
            optimizer.zero_grad()
            p.grad = torch.ones_like(p)
            optimizer.step()
    optimizer.zero_grad()
    weights[2].grad = torch.ones(3)
    with pytest.warns(RuntimeWarning, match="keeps changing"):
        optimizer.step()
    assert weights[2].tolist() == [0.5, 0.5, 0.5]


def test_without_a_working_compiler_the_step_is_still_made(monkeypatch):
    from torch._dynamo.exc import TorchDynamoException

    def broken(*layout):
        def run(*args):
            raise TorchDynamoException("no g++\nmore")

        return run

    monkeypatch.setattr(rule, "_compiled", broken)
    weight = parameter(1.0)
    weight.grad = torch.ones(1)
    with pytest.warns(RuntimeWarning, match=r"Descent: fused=True .* no g\+\+\)"):
        Descent([weight], fused=True).step()
    assert weight.item() == 0.5


def test_loading_rejects_another_model_and_keeps_the_state():
    optimizer = SGDSaI([parameter(1.0, 2.0)])
    other = SGDSaI([parameter(1.0), parameter(2.0)])
    with pytest.raises(ValueError, match=r"groups of \[1\] parameters, got \[2\]"):
        optimizer.load_state_dict(other.state_dict())


def test_steps_without_any_gradient_do_nothing():
    weight = parameter(1.0)
    for fused in (False, True):
        Descent([weight], fused=fused).step()
    assert weight.item() == 1.0


@pytest.mark.parametrize(
    ("package", "cls", "ours", "kwargs"),
    [
        ("adamp", "AdamP", AdamP, {"weight_decay": 0.01}),
        ("adabelief_pytorch", "AdaBelief", AdaBelief, {"rectify": False, "weight_decay": 0.0}),
        ("pytorch_optimizer", "AdamP", AdamP, {"weight_decay": 0.0}),
        ("torch.optim", "Adam", AdamP, {}),
    ],
)
def test_goes_on_from_the_state_of_other_packages(package, cls, ours, kwargs):
    """Where the state is made of the same tensors; settings that their groups lack stay as they are here."""
    module = pytest.importorskip(package)
    one, other = parameter(1.0, -2.0), parameter(1.0, -2.0)
    extra = {"print_change_log": False} if package == "adabelief_pytorch" else {}
    theirs = getattr(module, cls)([one], lr=0.1, **({"weight_decay": 0.0} | kwargs | extra))
    mine = ours([other], lr=0.5, **kwargs)

    def step(optimizer, p, number):
        p.grad = torch.tensor([1.0, 3.0]) * number
        optimizer.step()

    for number in (1, 2, 3):
        step(theirs, one, number)
    with torch.no_grad():
        other.copy_(one)
    mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert mine.param_groups[0]["lr"] == 0.1
    for number in (4, 5):
        step(theirs, one, number)
        step(mine, other, number)
    torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("betas", [0.9, (0.9,), (0.9, 0.9, 0.9), "ab", None])
def test_betas_that_are_not_two_numbers_are_refused(betas) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    for make in (AdaBelief, AdamP):
        with pytest.raises((ValueError, TypeError), match="betas must be"):
            make([weight], betas=betas)
    with pytest.raises(TypeError, match="lr must be a number"):
        AdamP([weight], lr=(0.1, 0.2))


@pytest.mark.parametrize("make", [AdaBelief, AdamP])
def test_steps_are_counted_beyond_what_the_default_type_can_count(make) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float32))
        optimizer = make([weight], lr=1e-6)
        for _ in range(300):
            weight.grad = torch.ones(2, dtype=torch.float32)
            optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert optimizer.state[weight]["step"] == 300


def test_steps_counted_once_for_a_group_are_taken_where_the_state_counts_them_and_else_left() -> None:
    """As pytorch_optimizer saves them."""
    weight = torch.nn.Parameter(torch.ones(3))
    for make, counts in ((AdamP, True), (SGDSaI, False)):
        optimizer = make([weight], lr=0.1)
        weight.grad = torch.tensor([1.0, 2.0, 3.0])
        optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0]["step"] = 7
        saved["state"][0].pop("step", None)
        fresh = make([weight], lr=0.1)
        fresh.load_state_dict(saved)
        assert ("step" in fresh.state[weight]) == counts
        assert not counts or fresh.state[weight]["step"] == 7
