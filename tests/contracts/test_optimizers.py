"""What every optimizer of the library keeps to. A new one joins by a line in MEMBERS."""

from __future__ import annotations

import copy
import io
import os
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from trimtab import optim

# Name -> class, arguments, and the learning rates that solve the quadratic and Rosenbrock's valley.
MEMBERS = {
    "AdaBelief": (optim.AdaBelief, {"rectify": False, "weight_decay": 0.01}, (0.05, 0.05)),
    "AdaBelief, rectified": (optim.AdaBelief, {"degenerate_to_sgd": False, "weight_decay": 0.01}, (0.05, 0.05)),
    "AdaBelief, amsgrad, coupled": (
        optim.AdaBelief,
        {"rectify": False, "amsgrad": True, "decoupled_weight_decay": False, "weight_decay": 0.01},
        (0.05, 0.05),
    ),
    "OptimisticGD": (optim.OptimisticGD, {"weight_decay": 0.01}, (0.03, 6e-4)),
    # On the small matrices of these tests, delta decides anew in each step whether there is a projection.
    "AdamP": (optim.AdamP, {"delta": 0.5, "weight_decay": 0.01}, (0.05, 0.05)),
    "AdamP, nesterov": (optim.AdamP, {"delta": 0.5, "weight_decay": 0.01, "nesterov": True}, (0.05, 0.03)),
    "SGDP": (optim.SGDP, {"lr": 0.01, "delta": 0.5, "momentum": 0.9, "weight_decay": 0.01}, (0.01, 1e-3)),
    "SGDP, nesterov": (
        optim.SGDP,
        {"lr": 0.01, "delta": 0.5, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01, "nesterov": True},
        (0.01, 1e-3),
    ),
    "SGDSaI": (optim.SGDSaI, {}, (0.02, 2e-3)),
}

# Names whose compiled form is tested; the others differ from them by arguments alone.
COMPILED = ["AdaBelief, rectified", "AdaBelief, amsgrad, coupled", "OptimisticGD", "AdamP", "SGDP", "SGDSaI"]

# How many times as many steps the floor of Rosenbrock's valley takes; without momentum it is a long way.
PATIENCE = {"OptimisticGD": 8}


def make(name, params, **overrides):
    cls, kwargs, _ = MEMBERS[name]
    return cls(params, **{**kwargs, **overrides})


def network(seed=0, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2, bias=False)).to(dtype)


def set_gradients(model, step, twin=None):
    generator = torch.Generator().manual_seed(step)
    for i, p in enumerate(model.parameters()):
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        if twin is not None:
            list(twin.parameters())[i].grad = p.grad.clone()


def run(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        set_gradients(model, step)
        optimizer.step()


def assert_same(one, other, **tolerance):
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        if tolerance:
            torch.testing.assert_close(p, q, **tolerance)
        else:
            assert torch.equal(p, q)


members = pytest.mark.parametrize("name", MEMBERS)


def descend(name, gradient, start, steps, lr, **overrides):
    point = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = make(name, [point], lr=lr, weight_decay=0.0, **overrides)
    for _ in range(steps):
        point.grad = gradient(point.detach())
        optimizer.step()
    return point.detach()


def quadratic(x):
    return (x - 1) * torch.tensor([1.0, 10.0], dtype=x.dtype)


def rosenbrock(x):
    bend = x[1] - x[0] ** 2
    return torch.stack([2 * (x[0] - 1) - 400 * x[0] * bend, 200 * bend])


@members
@pytest.mark.parametrize(("gradient", "steps"), [(quadratic, 800), (rosenbrock, 2500)])
def test_converges(name, gradient, steps):
    lr = MEMBERS[name][2][gradient is rosenbrock]
    if gradient is rosenbrock:
        steps *= PATIENCE.get(name, 1)
    end = descend(name, gradient, [-1.0, 1.5], steps, lr)
    torch.testing.assert_close(end, torch.ones(2, dtype=end.dtype), atol=0.02, rtol=0)


@members
def test_maximize_ascends_by_the_mirrored_path(name):
    down = descend(name, quadratic, [3.0, -2.0], 20, 0.01)
    up = descend(name, lambda x: -quadratic(x), [3.0, -2.0], 20, 0.01, maximize=True)
    assert torch.equal(down, up)


@members
def test_groups_keep_their_own_learning_rate(name):
    together, apart = network(), [network(), network()]
    params = list(together.parameters())
    optimizer = make(name, [{"params": params[:1], "lr": 0.1}, {"params": params[1:]}], lr=0.01)
    run(together, optimizer, 5)
    for model, lr in zip(apart, (0.1, 0.01), strict=True):
        run(model, make(name, model.parameters(), lr=lr), 5)
    assert torch.equal(params[0], next(apart[0].parameters()))
    for p, q in zip(params[1:], list(apart[1].parameters())[1:], strict=True):
        assert torch.equal(p, q)


@members
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_state_resumes_bit_exactly(name, dtype):
    straight, stopped = network(dtype=dtype), network(dtype=dtype)
    run(straight, make(name, straight.parameters()), 12)
    first = make(name, stopped.parameters())
    run(stopped, first, 5)
    file = io.BytesIO()
    torch.save({"model": stopped.state_dict(), "optimizer": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = network(seed=9, dtype=dtype)
    resumed.load_state_dict(saved["model"])
    second = make(name, resumed.parameters(), lr=0.5)
    second.load_state_dict(saved["optimizer"])
    run(resumed, second, 7, first=5)
    assert_same(straight, resumed)


@members
def test_state_is_tensors_in_at_least_float32(name):
    model = network(dtype=torch.bfloat16)
    optimizer = make(name, model.parameters())
    run(model, optimizer, 2)
    values = [value for state in optimizer.state.values() for value in state.values()]
    assert all(isinstance(value, torch.Tensor) and value.dtype == torch.float32 for value in values)


@members
def test_a_loaded_optimizer_does_not_share_memory_with_the_saved_state(name):
    model = network()
    first = make(name, model.parameters())
    run(model, first, 2)
    second = make(name, model.parameters())
    second.load_state_dict(first.state_dict())
    before = copy.deepcopy(first.state_dict()["state"])
    run(model, second, 2, first=2)
    for key, state in first.state_dict()["state"].items():
        assert all(torch.equal(value, before[key][name]) for name, value in state.items())


def state_of(optimizer):
    return copy.deepcopy(optimizer.state_dict())


def assert_equal_states(one, other):
    assert one["param_groups"] == other["param_groups"]
    assert one["state"].keys() == other["state"].keys()
    for key, held in one["state"].items():
        assert held.keys() == other["state"][key].keys()
        assert all(torch.equal(value, other["state"][key][name]) for name, value in held.items())


def spoilt(state, **group):
    return {"state": state["state"], "param_groups": [{**state["param_groups"][0], **group}]}


@members
def test_a_refused_state_leaves_the_optimizer_as_it_was(name):
    model = network()
    optimizer = make(name, model.parameters())
    run(model, optimizer, 2)
    other = make(name, model.parameters(), lr=0.5)
    run(model, other, 1)
    good = state_of(other)
    first, last = good["state"][0], max(good["state"])
    key = next(name for name in first if name != "step")
    wrong = [
        {},
        {"state": {}},
        {"state": {}, "param_groups": []},
        spoilt(good, params=[0]),
        spoilt(good, lr=float("nan")),
        spoilt(good, lr=-1.0),
        {**good, "state": {**good["state"], last: {"surprise": torch.ones(2)}}},
        {**good, "state": {**good["state"], last: {**good["state"][last], key: torch.ones(7, 7)}}},
        {
            **good,
            "state": {**good["state"], last: {k: v for k, v in good["state"][last].items() if k != key} or {"x": 1}},
        },
    ]
    before = state_of(optimizer)
    for state in wrong:
        with pytest.raises(ValueError, match="must"):
            optimizer.load_state_dict(state)
        assert_equal_states(state_of(optimizer), before)
    with pytest.raises(TypeError, match="lr must be a number"):
        optimizer.load_state_dict(spoilt(good, lr="fast"))
    assert_equal_states(state_of(optimizer), before)


@members
def test_a_checkpoint_without_newer_settings_keeps_this_optimizers(name):
    model = network()
    optimizer = make(name, model.parameters())
    run(model, optimizer, 2)
    state = state_of(optimizer)
    for setting in set(state["param_groups"][0]) - {"params", "lr"}:
        del state["param_groups"][0][setting]
    state["param_groups"][0]["lr"] = 0.125
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.125
    kept = {k: v for k, v in optimizer.param_groups[0].items() if k in optimizer.defaults and k != "lr"}
    assert kept == {k: v for k, v in optimizer.defaults.items() if k != "lr" and k in kept}
    run(model, optimizer, 1)


@members
@pytest.mark.parametrize(("saved", "now"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_a_state_in_another_precision_goes_on(name, saved, now):
    model = network(dtype=saved)
    optimizer = make(name, model.parameters())
    run(model, optimizer, 3)
    other = network(dtype=now)
    resumed = make(name, other.parameters())
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    run(model, optimizer, 2, first=3)
    run(other, resumed, 2, first=3)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.to(now), q, atol=1e-5, rtol=1e-4)
    values = [v for state in resumed.state.values() for k, v in state.items() if k != "step"]
    assert all(value.dtype == now for value in values)


@members
def test_state_dict_hooks_fire(name):
    optimizer, seen = make(name, network().parameters()), []
    optimizer.register_load_state_dict_pre_hook(lambda o, state: {**state, "param_groups": state["renamed"]})
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    state = optimizer.state_dict()
    optimizer.load_state_dict({"state": state["state"], "renamed": state["param_groups"]})
    assert seen == ["loaded"]


@members
def test_closure_is_called_once_with_gradients_and_its_loss_returned(name):
    model, calls = network(), []
    optimizer = make(name, model.parameters())

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).square().sum()
        loss.backward()
        return loss

    before = [p.detach().clone() for p in model.parameters()]
    assert optimizer.step(closure).item() == pytest.approx(network()(torch.ones(2, 4)).square().sum().item())
    assert calls == [True]
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@members
def test_gradients_are_left_as_they_were(name):
    model = network()
    optimizer = make(name, model.parameters(), maximize=True)
    set_gradients(model, 0)
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


@members
def test_parameters_without_gradient_are_skipped_and_may_join_later(name):
    model, alone = network(), network()
    optimizer = make(name, model.parameters())
    for step in range(4):
        set_gradients(model, step)
        if step < 2:
            model[0].weight.grad = None
        optimizer.step()
        if step == 1:
            assert torch.equal(model[0].weight, alone[0].weight)
    late = make(name, [alone[0].weight])
    for step in (2, 3):
        set_gradients(alone, step)
        late.step()
    assert torch.equal(model[0].weight, alone[0].weight)


@members
def test_sparse_gradients_are_refused_by_name_before_anything_changes(name):
    table, other = nn.Embedding(5, 2, sparse=True), nn.Parameter(torch.ones(2))
    optimizer = make(name, [("other", other), ("table", table.weight)])
    (table(torch.tensor([1])).sum() + other.sum()).backward()
    with pytest.raises(RuntimeError, match=r"sparse gradients; parameter table of shape \(5, 2\)"):
        optimizer.step()
    assert torch.equal(other, torch.ones(2))
    assert not optimizer.state[other]


@members
@pytest.mark.parametrize(
    ("argument", "value"),
    [("lr", -1.0), ("lr", float("nan")), ("lr", float("inf")), ("eps", -1e-9), ("weight_decay", -0.1)],
)
def test_hyper_parameters_out_of_range_are_named(name, argument, value):
    if argument not in make(name, network().parameters()).defaults:
        pytest.skip(f"{name} has no {argument}")
    with pytest.raises(ValueError, match=argument):
        make(name, network().parameters(), **{argument: value})
    with pytest.raises(ValueError, match=argument):  # in a group as well
        make(name, [{"params": list(network().parameters()), argument: value}])
    with pytest.raises(TypeError, match=argument):
        make(name, network().parameters(), **{argument: "0.1"})


@members
def test_an_added_group_is_checked_and_trained(name):
    model, extra = network(), nn.Parameter(torch.ones(3))
    optimizer = make(name, model.parameters())
    run(model, optimizer, 2)
    with pytest.raises(ValueError, match="lr"):
        optimizer.add_param_group({"params": [extra], "lr": -1.0})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [extra], "lr": 0.1})
    extra.grad = torch.tensor([1.0, 2.0, 3.0])
    optimizer.step()
    assert not torch.equal(extra, torch.ones(3))


@members
def test_copies_go_their_own_way(name):
    model = network()
    optimizer = make(name, model.parameters())
    run(model, optimizer, 3)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    thawed, thawed_optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    run(model, optimizer, 3, first=3)
    for other, other_optimizer in ((twin, twin_optimizer), (thawed, thawed_optimizer)):
        assert not torch.equal(other[0].weight, model[0].weight)
        run(other, other_optimizer, 3, first=3)
        assert_same(other, model)


@members
def test_scheduler_sets_the_length_of_a_step(name):
    model = network()
    optimizer = make(name, model.parameters(), lr=0.1, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step == 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, optimizer, 1)
        schedule.step()
    still = copy.deepcopy(model)
    run(model, optimizer, 1, first=1)
    assert_same(model, still)


@members
def test_one_cycle_scheduler(name):
    """It also moves the momentum or betas, where there are any, at every step."""
    model = network()
    optimizer = make(name, model.parameters(), lr=0.01)
    cycles = not {"momentum", "betas"}.isdisjoint(optimizer.defaults)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=5, cycle_momentum=cycles)
    for step in range(4):
        run(model, optimizer, 1, first=step)
        schedule.step()
    assert all(p.isfinite().all() for p in model.parameters())


@members
def test_learning_rate_may_be_a_tensor(name):
    one, other = network(), network()
    run(one, make(name, one.parameters(), lr=0.25), 3)
    run(other, make(name, other.parameters(), lr=torch.tensor(0.25)), 3)
    assert_same(one, other)


@members
def test_gradient_scaler(name):
    """Scaled gradients give the plain step; an overflow gives none."""
    plain, scaled = network(), network()
    steps = make(name, plain.parameters()), make(name, scaled.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x = torch.ones(2, 4)
    for _ in range(3):
        for optimizer in steps:
            optimizer.zero_grad()
        plain(x).square().sum().backward()
        steps[0].step()
        scaler.scale(scaled(x).square().sum()).backward()
        scaler.step(steps[1])
        scaler.update()
    assert_same(plain, scaled, atol=1e-6, rtol=1e-5)
    before = copy.deepcopy(scaled)
    scaler.scale(scaled(x * float("inf")).square().sum()).backward()
    scaler.step(steps[1])
    assert_same(before, scaled)


@members
def test_complex_parameters_are_pairs_of_real_ones(name):
    values = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    real, imaginary = nn.Parameter(values.clone()), nn.Parameter(torch.view_as_complex(values.clone()))
    pair = make(name, [real]), make(name, [imaginary])
    for step in range(3):
        real.grad = values * (step + 1)
        imaginary.grad = torch.view_as_complex(real.grad.clone())
        for optimizer in pair:
            optimizer.step()
    assert torch.equal(torch.view_as_real(imaginary), real)


@members
def test_user_compiled_step_equals_plain(name):
    plain, compiled = network(), network()
    run(plain, make(name, plain.parameters()), 3)
    optimizer = make(name, compiled.parameters())
    step = torch.compile(optimizer.step, backend="eager")
    for i in range(3):
        set_gradients(compiled, i)
        step()
    assert_same(plain, compiled, atol=1e-6, rtol=1e-5)


# --- fused=True: one compilation for each member serves all of the tests below ---


compiles = pytest.mark.xdist_group("optimizers-fused")


@pytest.fixture(scope="module", params=COMPILED)
def fused(request):
    """Eager and compiled twins after ten steps of which the last five ran at another learning rate."""
    name, models = request.param, [network(), network()]
    optimizers = [
        make(name, model.parameters(), lr=0.1, fused=on) for model, on in zip(models, (False, True), strict=True)
    ]
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7) for optimizer in optimizers]
    graphs = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for step in range(10):
            set_gradients(models[0], step, twin=models[1])
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return name, models, optimizers, graphs


@compiles
def test_fused_step_equals_eager_step(fused):
    _, (eager, compiled), _, _ = fused
    assert_same(eager, compiled, atol=1e-6, rtol=1e-5)


@compiles
def test_schedules_do_not_compile_again(fused):
    *_, graphs = fused
    assert graphs[0] > 0
    assert graphs[0] == graphs[-1]


@compiles
def test_fused_state_resumes_bit_exactly_and_in_either_form(fused):
    name, (_, compiled), (_, optimizer), _ = fused
    models = [copy.deepcopy(compiled) for _ in range(3)]
    steppers = [make(name, model.parameters(), fused=on) for model, on in zip(models, (True, True, False), strict=True)]
    for stepper, on in zip(steppers, (True, True, False), strict=True):
        stepper.load_state_dict(optimizer.state_dict())
        assert stepper.param_groups[0]["fused"] is on
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for model, stepper in zip(models, steppers, strict=True):
        run(model, stepper, 4, first=10)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
    assert_same(models[0], models[1])
    assert_same(models[0], models[2], atol=1e-6, rtol=1e-5)


def test_where_nothing_compiles_the_steps_are_eager_and_one_warning_says_so(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("torch.compile is not supported here")

    plain, fallen = network(), network()
    run(plain, make("SGDSaI", plain.parameters(), momentum=0.5), 3)
    monkeypatch.setattr(torch, "compile", refuse)
    optimizer = make("SGDSaI", [{"params": [p]} for p in fallen.parameters()], momentum=0.5, fused=True)
    set_gradients(fallen, 0)
    with pytest.warns(RuntimeWarning, match="fused=True needs torch.compile.*not supported here") as caught:
        optimizer.step()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(fallen, optimizer, 2, first=1)
    assert_same(plain, fallen)


def _rank(rank, world, names, meeting, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    ends = {}
    for name in names:
        model = nn.parallel.DistributedDataParallel(network())
        optimizer = make(name, model.parameters(), lr=0.05)
        for step in range(3):
            x = torch.randn(2 * world, 4, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(x[rank::world]).square().mean().backward()
            optimizer.step()
        ends[name] = [p.detach().numpy().copy() for p in model.parameters()]
    queue.put((rank, ends))
    dist.barrier()
    os._exit(0)  # gloo's tear-down can wait for ever for a rank that has left already


def test_two_processes_hold_equal_parameters_as_one_would(tmp_path):
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    ranks = [
        context.Process(target=_rank, args=(rank, 2, list(MEMBERS), tmp_path / "meeting", queue)) for rank in range(2)
    ]
    for process in ranks:
        process.start()
    ends = dict(queue.get() for _ in ranks)
    for process in ranks:
        process.join()
    for name in MEMBERS:
        model = network()
        optimizer = make(name, model.parameters(), lr=0.05)
        for step in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 4, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
        for p, one, two in zip(model.parameters(), ends[0][name], ends[1][name], strict=True):
            assert (one == two).all()
            torch.testing.assert_close(p.detach(), torch.from_numpy(one), atol=1e-5, rtol=1e-4)
