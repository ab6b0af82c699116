"""What every optimizer with a second pass keeps to. A new one joins by a line in MEMBERS."""

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


def network(seed=0, norm=False):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3) if norm else nn.Tanh(), nn.Linear(3, 2))


def from_other_weights(model):
    """TRAM's divergence from fixed weights that are not the model's."""
    anchor = optim.ParameterAnchor(network(seed=5), decay=1.0)
    return lambda x, logits: optim.trust_region_divergence(anchor(x), logits)


def from_other_inputs(model):
    """TRAM's divergence under noise that is the same for a sample in whatever batch it comes."""
    anchor = optim.InputNoiseAnchor(model, std=1.0)
    return lambda x, logits: optim.trust_region_divergence(anchor(x, noise=x.flip(1)), logits, "symmetric")


# Name -> the optimizer from a base and a model; from a model, what else it needs of a batch and its scores, if
# anything.
MEMBERS = {
    "SAM": (lambda base, model: optim.SAM(base, rho=0.2, model=model), None),
    "SAM, adaptive": (lambda base, model: optim.SAM(base, rho=1.0, adaptive=True, model=model), None),
    "TRAM, theta": (optim.TRAM, from_other_weights),
    "TRAM, x": (lambda base, model: optim.TRAM(base, model, scale=2.0), from_other_inputs),
    "TRAM, adaptive, bounded": (
        lambda base, model: optim.TRAM(base, model, adaptive=True, max_radius=0.1),
        from_other_weights,
    ),
}
members = pytest.mark.parametrize("name", MEMBERS)


def sgd(params, lr=0.05):
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


def batch(step, size=8):
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(step))


def loss_of(logits):
    return (logits[:, 0].exp() + logits.square().sum(1)).mean()


class Training:
    """A model, a member of the family, and both forms of its step."""

    def __init__(self, name, model, base=sgd, params=None, **kwargs):
        make, divergence = MEMBERS[name]
        self.model = model
        self.optimizer = make(base(params or model.parameters(), **kwargs), model)
        self.divergence = divergence and divergence(model)

    def closure(self, x):
        def closure():
            self.optimizer.zero_grad()
            logits = self.model(x)
            loss = loss_of(logits)
            loss.backward()
            return loss if self.divergence is None else (loss, self.divergence(x, logits.detach()))

        return closure

    def backward(self, batches, scaler=None, spoil=1.0):
        """Accumulate the gradient of the mean loss over batches, and perturb by what `perturb` needs of them."""
        self.optimizer.zero_grad()
        divergences = []
        for x in batches:
            logits = self.model(x)
            loss = loss_of(logits) / len(batches) * spoil
            (scaler.scale(loss) if scaler else loss).backward()
            if self.divergence is not None:
                divergences.append(self.divergence(x, logits.detach()))
        return [torch.stack(divergences).mean()] if divergences else []

    def manual_step(self, *batches, scaler=None, spoil=(1.0, 1.0)):
        signal = self.backward(batches, scaler, spoil[0])
        if scaler:
            scaler.unscale_(self.optimizer)
        self.optimizer.perturb(*signal)
        with optim.frozen_norm_stats(self.model):
            self.backward(batches, scaler, spoil[1])
        self.optimizer.restore()
        if scaler:
            scaler.step(self.optimizer.base)
            scaler.update()
        else:
            self.optimizer.base.step()


def run(training, steps, first=0):
    for step in range(first, first + steps):
        training.optimizer.step(training.closure(batch(step)))


def values(model):
    return [p.detach().clone() for p in model.state_dict().values()]


def assert_same(one, other, **tolerance):
    for p, q in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        if tolerance:
            torch.testing.assert_close(p, q, **tolerance)
        else:
            assert torch.equal(p, q)


def distance(before, model):
    return torch.stack([(p - q).norm() for p, q in zip(before, values(model), strict=True)]).norm().item()


@members
def test_the_step_is_the_bases_with_the_gradient_uphill(name):
    model = network()
    training = Training(name, model)
    training.optimizer.perturb(*training.backward([batch(0)]))
    uphill = copy.deepcopy(model)
    training.optimizer.restore()
    start = values(model)
    loss_of(uphill(batch(0))).backward()
    below = loss_of(model(batch(0)))
    assert loss_of(uphill(batch(0))) > below
    loss = training.optimizer.step(training.closure(batch(0)))
    assert loss.item() == below.item()
    for p, before, q in zip(model.parameters(), start, uphill.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), before - 0.05 * q.grad, atol=1e-7, rtol=1e-6)


@members
def test_both_forms_of_the_step_agree(name):
    one, other = Training(name, network(norm=True)), Training(name, network(norm=True))
    for step in range(3):
        one.optimizer.step(one.closure(batch(step)))
        other.manual_step(batch(step))
    assert_same(one.model, other.model)


@members
def test_restoring_gives_the_very_same_bits(name):
    training = Training(name, network())
    signal = training.backward([batch(0)])
    before = values(training.model)
    training.optimizer.perturb(*signal)
    assert distance(before, training.model) > 1e-3
    with pytest.raises(RuntimeError, match="restore"):
        training.optimizer.perturb(*signal)
    training.optimizer.restore()
    assert all(torch.equal(p, q) for p, q in zip(before, values(training.model), strict=True))


@members
@pytest.mark.parametrize("base", [torch.optim.AdamW, optim.SGDSaI])
def test_any_base_does(name, base):
    training = Training(name, network(), base, lr=0.02)
    losses = [training.optimizer.step(training.closure(batch(0))).item() for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]


@members
def test_an_error_in_the_second_pass_leaves_everything_in_place(name):
    training = Training(name, network(norm=True))
    good, calls = training.closure(batch(0)), []

    def closure():
        calls.append(1)
        if len(calls) == 2:
            raise ArithmeticError
        return good()

    training.model(batch(0))
    before = [p.detach().clone() for p in training.model.parameters()]
    with pytest.raises(ArithmeticError):
        training.optimizer.step(closure)
    assert all(torch.equal(p, q) for p, q in zip(training.model.parameters(), before, strict=True))
    assert not training.optimizer.state
    assert training.model[1].track_running_stats
    run(training, 1)  # and it can go on


@members
def test_batch_statistics_are_those_of_the_first_pass(name):
    training, plain = Training(name, network(norm=True)), network(norm=True)
    run(training, 1)
    plain(batch(0))
    for statistic in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(training.model[1], statistic), getattr(plain[1], statistic))


@members
def test_the_norm_is_over_all_groups_and_groups_keep_their_learning_rate(name):
    together, apart = network(), network()
    params = list(apart.parameters())
    one = Training(name, together)
    two = Training(name, apart, params=[{"params": params[:1], "lr": 0.2}, {"params": params[1:]}])
    for training in (one, two):
        training.optimizer.perturb(*training.backward([batch(0)]))
    assert_same(together, apart)
    for training in (one, two):
        training.optimizer.restore()
        run(training, 1)
    start = next(network().parameters())
    torch.testing.assert_close(start - params[0], 4 * (start - next(together.parameters())))
    assert torch.equal(params[1], list(together.parameters())[1])


@members
def test_parameters_without_gradient_stay(name):
    training = Training(name, network())
    training.model[0].requires_grad_(False)
    before = values(training.model)
    training.optimizer.perturb(*training.backward([batch(0)]))
    assert torch.equal(training.model[0].weight, before[0])
    assert not torch.equal(training.model[2].weight, before[2])


@members
def test_without_any_gradient_nothing_moves(name):
    training = Training(name, network())
    before = values(training.model)
    training.optimizer.perturb(*([] if training.divergence is None else [0.5]))
    assert distance(before, training.model) == 0.0


@members
def test_scheduler(name):
    training = Training(name, network())
    schedule = torch.optim.lr_scheduler.LambdaLR(training.optimizer, lambda step: float(step == 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(training, 1)
        schedule.step()
    still = values(training.model)
    run(training, 1, first=1)
    assert distance(still, training.model) == 0.0


@members
def test_saved_state_resumes_bit_exactly(name):
    straight, stopped = Training(name, network()), Training(name, network())
    run(straight, 6)
    run(stopped, 3)
    file = io.BytesIO()
    torch.save([stopped.model.state_dict(), stopped.optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed = Training(name, network(seed=9), lr=0.5)
    resumed.model.load_state_dict(weights)
    resumed.optimizer.load_state_dict(state)
    run(resumed, 3, first=3)
    assert_same(straight.model, resumed.model)


@members
def test_goes_on_from_a_run_of_the_base_alone(name):
    plain, training = network(), Training(name, network())
    base = sgd(plain.parameters())
    loss_of(plain(batch(0))).backward()
    base.step()
    training.optimizer.load_state_dict(base.state_dict())
    assert all(state["momentum_buffer"].any() for state in training.optimizer.state.values())
    before = values(training.model)
    run(training, 1)
    assert distance(before, training.model) > 0


@members
def test_copies_go_their_own_way(name):
    training = Training(name, network())
    run(training, 1)
    held = training.model, training.optimizer
    twins = copy.deepcopy(held), pickle.loads(pickle.dumps(held))
    run(training, 1, first=1)
    for model, optimizer in twins:
        twin = Training(name, model)
        twin.optimizer = optimizer
        run(twin, 1, first=1)
        assert_same(training.model, model)


@members
def test_accumulated_gradients_are_those_of_one_large_batch(name):
    whole, parts = Training(name, network()), Training(name, network())
    for step in range(3):
        whole.manual_step(batch(step))
        parts.manual_step(*batch(step).split(2))
    assert_same(whole.model, parts.model, atol=1e-6, rtol=1e-5)


@members
def test_gradient_scaler_gives_the_plain_step(name):
    plain, scaled = Training(name, network()), Training(name, network())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for step in range(4):
        plain.manual_step(batch(step))
        scaled.manual_step(batch(step), scaler=scaler)
    assert_same(plain.model, scaled.model, atol=1e-6, rtol=1e-5)
    assert scaler.get_scale() == 2.0**12


@members
@pytest.mark.parametrize("spoil", [(float("inf"), 1.0), (1.0, float("inf"))], ids=["first", "second"])
def test_an_overflow_in_either_pass_gives_no_step(name, spoil):
    training, plain = Training(name, network(norm=True)), network(norm=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    training.manual_step(batch(0), scaler=scaler, spoil=spoil)
    plain(batch(0))  # the statistics of the batch are taken in, and nothing else has changed
    assert_same(plain, training.model)
    assert not training.optimizer.state
    assert scaler.get_scale() == 2.0**9
    training.manual_step(batch(0), scaler=scaler)
    assert not torch.equal(plain[0].weight, training.model[0].weight)
    assert all(value.isfinite().all() for value in values(training.model))


@members
def test_autocast_around_both_passes(name):
    """Autocast remembers the weights it has cast, and must not take them for the perturbed ones."""
    plain, mixed = Training(name, network()), Training(name, network())
    for step in range(3):
        plain.manual_step(batch(step))
        with torch.autocast("cpu", torch.bfloat16):
            mixed.manual_step(batch(step))
    assert mixed.model[0].weight.dtype == torch.float32
    assert_same(plain.model, mixed.model, atol=0.02, rtol=0.05)


@members
def test_no_closure_and_sparse_gradients_are_refused(name):
    training = Training(name, network())
    with pytest.raises(ValueError, match="closure"):
        training.optimizer.step()
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = MEMBERS[name][0](sgd(table.parameters()), table)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.perturb(*([] if training.divergence is None else [0.5]))
    with pytest.raises(TypeError, match="base"):
        MEMBERS[name][0](network().parameters(), None)


WRAPPERS = {
    **{name: lambda params, name=name: Training(name, network(), params=params).optimizer for name in MEMBERS},
    "PerpGrad": lambda params: optim.PerpGrad(sgd(params)),
}
wrappers = pytest.mark.parametrize("name", WRAPPERS)


@wrappers
def test_state_dict_hooks_fire_on_wrapper_and_base(name):
    optimizer, seen = WRAPPERS[name](network().parameters()), []
    for label, held in (("wrapper", optimizer), ("base", optimizer.base)):
        held.register_state_dict_pre_hook(lambda o, label=label: seen.append(f"{label} saves"))
        held.register_load_state_dict_post_hook(lambda o, label=label: seen.append(f"{label} has loaded"))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "more": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, state: {k: v for k, v in state.items() if k != "more"})
    state = optimizer.state_dict()
    assert state["more"] == 1
    optimizer.load_state_dict(state)
    assert seen == ["wrapper saves", "base saves", "base has loaded", "wrapper has loaded"]


@wrappers
@pytest.mark.parametrize("started", [True, False])
def test_distributed_checkpoints_state_dict(name, started):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    models = [network(), network()]
    optimizers = [WRAPPERS[name](model.parameters()) for model in models]
    if started:
        for p in models[0].parameters():
            p.grad = torch.ones_like(p)
        optimizers[0].base.step()
        optimizers[0].zero_grad()
    before = values(models[1])
    state = get_optimizer_state_dict(models[0], optimizers[0])
    set_optimizer_state_dict(models[1], optimizers[1], state)
    assert distance(before, models[1]) == 0.0
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        for key, value in optimizers[0].state[p].items():
            assert torch.equal(value, optimizers[1].state[q][key])


@wrappers
def test_a_refused_state_leaves_the_wrapper_as_it_was(name):
    model = network()
    optimizer = WRAPPERS[name](model.parameters())
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(WRAPPERS[name]([nn.Parameter(torch.ones(1))]).state_dict())
    assert optimizer.state_dict() == before


def _rank(rank, world, meeting, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    ends = {}
    for name in MEMBERS:
        training = Training(name, nn.parallel.DistributedDataParallel(network()))
        for step in range(3):
            training.optimizer.step(training.closure(batch(step)[rank::world]))
        ends[name] = [p.detach().numpy().copy() for p in training.model.parameters()]
    queue.put((rank, ends))
    dist.barrier()
    os._exit(0)  # gloo's tear-down can wait for ever for a rank that has left already


def test_two_processes_hold_equal_parameters_as_one_would(tmp_path):
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    ranks = [context.Process(target=_rank, args=(rank, 2, tmp_path / "meeting", queue)) for rank in range(2)]
    for process in ranks:
        process.start()
    ends = dict(queue.get() for _ in ranks)
    for process in ranks:
        process.join()
    for name in MEMBERS:
        training = Training(name, network())
        run(training, 3)
        for p, one, two in zip(training.model.parameters(), ends[0][name], ends[1][name], strict=True):
            assert (one == two).all()
            torch.testing.assert_close(p.detach(), torch.from_numpy(one), atol=1e-5, rtol=1e-4)
