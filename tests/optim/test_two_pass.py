"""The two-pass piece and SAM, against closed forms and pytorch_optimizer's SAM."""

import copy

import pytest
import torch
from torch import nn

from trimtab.optim import SAM, PerpGrad, SGDSaI, TwoPassOptimizer, ascent_direction, frozen_norm_stats


def network(seed=0, norm=False):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3) if norm else nn.Tanh(), nn.Linear(3, 2))


def closure_of(model, optimizer, x):
    def closure():
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    return closure


def batch(step):
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(step))


def sgd(params, lr=0.05):
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


def test_ascent_direction_has_unit_length_over_all_tensors():
    grads = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    torch.testing.assert_close(ascent_direction(grads), [torch.tensor([0.6, 0.0]), torch.tensor([[0.8]])])


def test_adaptive_direction_scales_by_the_weights():
    grads, weights = [torch.tensor([1.0, 2.0])], [torch.tensor([3.0, -2.0])]
    norm = (3.0**2 + 4.0**2) ** 0.5
    torch.testing.assert_close(ascent_direction(grads, weights), [torch.tensor([9.0, 8.0]) / norm])


def test_zero_gradient_moves_nothing():
    assert ascent_direction([torch.zeros(2)])[0].tolist() == [0.0, 0.0]


def test_second_gradient_on_a_quadratic():
    weight, curvature = nn.Parameter(torch.ones(2, dtype=torch.float64)), torch.tensor([1.0, 4.0], dtype=torch.float64)
    optimizer = SAM(torch.optim.SGD([weight], lr=1.0), rho=0.1)

    def closure():
        optimizer.zero_grad()
        loss = 0.5 * (curvature * weight**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2.5
    expected = torch.tensor([1 + 0.0242536, 4 + 0.3880570], dtype=torch.float64)
    torch.testing.assert_close(weight.grad, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(weight.detach(), 1 - expected, atol=1e-6, rtol=0)


def test_restoring_gives_the_very_same_bits():
    model = network()
    optimizer = SAM(sgd(model.parameters()), rho=0.3)
    closure_of(model, optimizer, batch(0))()
    before = copy.deepcopy(model.state_dict())
    optimizer.perturb()
    moved = sum((p.detach() - q).square().sum() for p, q in zip(model.parameters(), before.values(), strict=True))
    assert moved.sqrt().item() == pytest.approx(0.3, rel=1e-5)
    with pytest.raises(RuntimeError, match="restore"):
        optimizer.perturb()
    optimizer.restore()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    optimizer.restore()  # nothing to put back


def test_a_closure_that_fails_leaves_the_weights_in_place():
    model = network()
    optimizer = SAM(sgd(model.parameters()), rho=0.3)
    good, calls = closure_of(model, optimizer, batch(0)), []

    def closure():
        calls.append(1)
        if len(calls) == 2:
            raise ArithmeticError
        return good()

    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArithmeticError):
        optimizer.step(closure)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_radius_zero_is_the_base_optimizer():
    one, other = network(), network()
    sam, base = SAM(sgd(one.parameters()), rho=0.0), sgd(other.parameters())
    for step in range(3):
        sam.step(closure_of(one, sam, batch(step)))
        closure_of(other, base, batch(step))()
        base.step()
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("adaptive", [False, True])
def test_follows_pytorch_optimizer(adaptive):
    peer = pytest.importorskip("pytorch_optimizer")
    one, other = network(), network()
    ours = SAM(sgd(one.parameters()), rho=0.1, adaptive=adaptive)
    theirs = peer.SAM(other.parameters(), torch.optim.SGD, rho=0.1, adaptive=adaptive, lr=0.05, momentum=0.9)
    for step in range(10):
        ours.step(closure_of(one, ours, batch(step)))
        closure_of(other, theirs, batch(step))()
        theirs.step(closure_of(other, theirs, batch(step)))
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


def test_groups_and_state_are_the_bases_also_after_loading():
    model = network()
    optimizer = SAM(SGDSaI(model.parameters(), lr=0.1))
    assert isinstance(optimizer, torch.optim.Optimizer)
    optimizer.step(closure_of(model, optimizer, batch(0)))
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups is optimizer.base.param_groups
    assert optimizer.state is optimizer.base.state
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step(closure_of(model, optimizer, batch(1)))
    schedule.step()
    assert optimizer.base.param_groups[0]["lr"] == 0.05
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 1.0})
    assert optimizer.base.param_groups[1]["rho"] == 0.05


@pytest.mark.parametrize("base", [sgd, SGDSaI])
def test_saved_state_resumes_bit_exactly(base):
    straight, stopped = network(), network()
    optimizers = [SAM(base(m.parameters(), lr=0.01), rho=0.2) for m in (straight, stopped)]
    for model, optimizer in zip((straight, stopped), optimizers, strict=True):
        for step in range(3):
            optimizer.step(closure_of(model, optimizer, batch(step)))
    resumed = SAM(base(stopped.parameters(), lr=0.5), rho=0.9)
    resumed.load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    for model, optimizer in ((straight, optimizers[0]), (stopped, resumed)):
        for step in range(3, 6):
            optimizer.step(closure_of(model, optimizer, batch(step)))
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), stopped.parameters(), strict=True))


def test_a_copy_goes_its_own_way():
    model = network()
    optimizer = SAM(sgd(model.parameters()), rho=0.2, model=model)
    optimizer.step(closure_of(model, optimizer, batch(0)))
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (twin, twin_optimizer)):
        o.step(closure_of(m, o, batch(1)))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_batch_statistics_are_those_of_the_first_pass():
    with_model, plain = network(norm=True), network(norm=True)
    optimizer = SAM(sgd(with_model.parameters()), rho=5.0, model=with_model)
    optimizer.step(closure_of(with_model, optimizer, batch(0)))
    plain(batch(0))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(with_model[1], name), getattr(plain[1], name))
    assert with_model[1].momentum == 0.1


def test_frozen_statistics_thaw_after_an_error():
    model = network(norm=True)

    def fail():
        with frozen_norm_stats(model):
            model(batch(0))
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()
    assert model[1].momentum == 0.1
    assert model[1].running_mean.tolist() == [0.0] * 3


def test_bad_arguments_are_named():
    model = network()
    with pytest.raises(TypeError, match="base"):
        SAM(model.parameters())
    for rho in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="rho"):
            SAM(sgd(model.parameters()), rho=rho)
    with pytest.raises(ValueError, match="closure"):
        SAM(sgd(model.parameters())).step()
    optimizer = TwoPassOptimizer(sgd(model.parameters()))
    with pytest.raises(NotImplementedError, match="perturbation"):
        optimizer.step(closure_of(model, optimizer, batch(0)))


def test_sparse_gradients_are_refused():
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = SAM(sgd(table.parameters()))
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.perturb()


class TestOptionsOfTheGroups:
    """What a wrapper adds to the groups of its base, and what it must not take for its own."""

    def test_a_base_with_a_rho_of_its_own_is_refused(self):
        base = torch.optim.Adadelta([nn.Parameter(torch.ones(2))], rho=0.9)
        before = copy.deepcopy(base.state_dict())
        for wrapped in (base, PerpGrad(base)):
            with pytest.raises(ValueError, match="base must have no hyper-parameter 'rho' of its own.*got"):
                SAM(wrapped, rho=0.05)
        assert base.state_dict() == before

    def test_wrapped_again_the_new_rho_counts_and_a_group_of_its_own_keeps_its_own(self):
        first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
        base = torch.optim.SGD([{"params": [first]}, {"params": [second], "rho": 0.7}], lr=0.1)
        SAM(base, rho=0.05)
        again = SAM(base, rho=0.5)
        assert [group["rho"] for group in again.param_groups] == [0.5, 0.7]
        again.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
        assert again.param_groups[2]["rho"] == 0.5
        copied = SAM(copy.deepcopy(again).base, rho=0.2)
        assert [group["rho"] for group in copied.param_groups] == [0.2, 0.7, 0.2]

    @pytest.mark.parametrize("rho", [-0.1, float("nan"), float("inf")])
    def test_a_rho_out_of_range_is_refused_wherever_it_comes_from(self, rho):
        weight = nn.Parameter(torch.ones(2))
        with pytest.raises(ValueError, match="rho must be"):
            SAM(torch.optim.SGD([{"params": [weight], "rho": rho}], lr=0.1))
        optimizer = SAM(torch.optim.SGD([weight], lr=0.1))
        before, saved = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
        with pytest.raises(ValueError, match="rho must be"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "rho": rho})
        saved["param_groups"][0]["rho"] = rho
        with pytest.raises(ValueError, match="rho must be"):
            optimizer.load_state_dict(saved)
        assert optimizer.state_dict() == before
