"""StableMax and PerpGrad against closed forms and pytorch_optimizer's OrthoGrad."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trimtab.optim import (
    AdaBelief,
    PerpGrad,
    StableMax,
    StableMaxCrossEntropyLoss,
    log_stablemax,
    nlm_alignment,
    orthogonal_gradients,
    softmax_collapse_fraction,
    stablemax,
    stablemax_cross_entropy,
)

logit = st.floats(-1e4, 1e4)


def s(z):
    return z + 1 if z >= 0 else 1 / (1 - z)


@given(st.lists(logit, min_size=2, max_size=6))
@settings(max_examples=50, deadline=None)
def test_stablemax_is_its_definition(values):
    z = torch.tensor(values, dtype=torch.float64)
    expected = torch.tensor([s(v) for v in values], dtype=torch.float64)
    expected /= expected.sum()
    torch.testing.assert_close(stablemax(z), expected)
    torch.testing.assert_close(log_stablemax(z), expected.log())
    assert stablemax(z)[z.argmax()] == stablemax(z).max()


def test_stablemax_is_not_shift_invariant_and_takes_a_dimension():
    z = torch.tensor([[2.0, -1.0], [0.0, 3.0]])
    assert not torch.allclose(stablemax(z), stablemax(z + 1))
    torch.testing.assert_close(StableMax(dim=0)(z), stablemax(z.T).T)
    torch.testing.assert_close(StableMax()(z).sum(-1), torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slope_is_that_of_s_everywhere_with_one_at_zero(dtype):
    # log s has the slope 1 / (1 + |z|); at z = 1 and z = -1 one of the two formulas would divide by zero.
    z = torch.tensor([-1e4, -1.0, -0.5, 0.0, 0.5, 1.0, 1e4], dtype=dtype, requires_grad=True)
    reference = torch.zeros_like(z)  # of a second class, whose logit is zero: s = 1
    (gradient,) = torch.autograd.grad(log_stablemax(torch.stack([z, reference]), 0)[0].sum(), z)
    share = torch.tensor([s(v) / (s(v) + 1) for v in z.tolist()], dtype=dtype)
    torch.testing.assert_close(gradient, (1 - share) / (1 + z.detach().abs()), rtol=1e-3, atol=0)


def test_the_loss_teaches_where_softmax_has_collapsed():
    logits, targets = torch.tensor([[0.0, 30.0]], requires_grad=True), torch.tensor([1])
    assert F.cross_entropy(logits, targets).item() == 0.0
    assert torch.autograd.grad(F.cross_entropy(logits, targets), logits)[0][0, 1] == 0
    loss = stablemax_cross_entropy(logits, targets)
    assert loss.item() == pytest.approx(0.0317487, abs=1e-7)  # log(1 + 1 / 31)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, torch.tensor([[1 / 32, -1 / 32 / 31]]))


def test_precision_of_the_loss():
    """A logit of 1e9: float32 rounds the share of the others away, float64 does not."""
    logits, targets = torch.tensor([[0.0, 1e9]], requires_grad=True), torch.tensor([1])
    for dtype, expected in ((torch.float64, -1e-18), (None, 0.0)):
        (gradient,) = torch.autograd.grad(stablemax_cross_entropy(logits, targets, dtype=dtype), logits)
        assert gradient[0, 1].item() == pytest.approx(expected, rel=1e-3, abs=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(reduction):
    logits, targets = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 1, 0])
    each = -stablemax(logits.double()).log().gather(1, targets[:, None])[:, 0].float()
    expected = each if reduction == "none" else getattr(each, reduction)()
    torch.testing.assert_close(StableMaxCrossEntropyLoss(reduction)(logits, targets), expected)


def test_bad_arguments_of_the_loss_are_named():
    with pytest.raises(ValueError, match="reduction"):
        StableMaxCrossEntropyLoss("average")
    with pytest.raises(ValueError, match="reduction"):
        stablemax_cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1]), "average")
    with pytest.raises(TypeError, match="targets"):
        stablemax_cross_entropy(torch.zeros(2, 3), torch.zeros(2))


@pytest.mark.parametrize(
    ("dtype", "gap"), [(torch.float16, 8.0), (torch.bfloat16, 7.0), (torch.float32, 17.0), (torch.float64, 37.0)]
)
def test_collapse_begins_where_the_other_class_is_below_rounding(dtype, gap):
    targets = torch.tensor([1])
    for distance, collapsed in ((gap + 1, 1.0), (gap - 3, 0.0)):
        for offset in (0.0, 100.0):  # a common shift changes nothing, although it is larger than the gap
            logits = torch.tensor([[offset, offset + distance]], dtype=torch.float64)
            assert softmax_collapse_fraction(logits, targets, dtype).item() == collapsed


def test_collapse_is_cross_entropy_that_is_exactly_zero():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 7, generator=generator) * 12
    targets = logits.argmax(1)
    targets[:50] = (targets[:50] + 1) % 7  # confidently wrong is not collapsed
    losses = F.cross_entropy(logits, targets, reduction="none")
    fraction = softmax_collapse_fraction(logits, targets).item()
    assert 0.05 < fraction < 0.9
    assert fraction == pytest.approx((losses == 0).float().mean().item(), abs=0.01)
    with pytest.raises(ValueError, match="targets"):
        softmax_collapse_fraction(logits, targets[:-1])


def tensors(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@given(seed=st.integers(0, 2**16), scale=st.sampled_from([1e-6, 1.0, 1e6]))
@settings(max_examples=25, deadline=None)
def test_what_is_left_is_orthogonal_and_may_keep_its_length(seed, scale):
    shapes = ((3, 4), (5,), (2, 3, 2))
    weights, grads = tensors(seed, *shapes), [g * scale for g in tensors(seed + 1, *shapes)]
    for rescale in (False, True):
        for g, w, x in zip(grads, weights, orthogonal_gradients(grads, weights, rescale=rescale), strict=True):
            assert abs((w * x).sum()) < 1e-12 * scale * w.norm()
            parallel = (w * g).sum() / w.norm()
            length = g.norm() if rescale else (g.square().sum() - parallel**2).sqrt()
            torch.testing.assert_close(x.norm(), length)
            assert torch.linalg.matrix_rank(torch.stack([x.flatten(), g.flatten(), w.flatten()]), rtol=1e-9) <= 2


def test_global_scope_takes_all_tensors_as_one_vector():
    weights, grads = tensors(0, (3, 4), (5,)), tensors(1, (3, 4), (5,))
    joined = [torch.cat([x.flatten() for x in xs]) for xs in (grads, weights)]
    for rescale in (False, True):
        (whole,) = orthogonal_gradients(joined[:1], joined[1:], rescale=rescale)
        parts = orthogonal_gradients(grads, weights, rescale=rescale, scope="global")
        torch.testing.assert_close(torch.cat([x.flatten() for x in parts]), whole)
        assert not torch.allclose(parts[0], orthogonal_gradients(grads, weights, rescale=rescale)[0])


@pytest.mark.parametrize("rescale", [False, True])
def test_corner_cases(rescale):
    gradient = torch.tensor([1.0, -2.0])
    (kept,) = orthogonal_gradients([gradient], [torch.zeros(2)], rescale=rescale)  # no direction to take out
    torch.testing.assert_close(kept, gradient)
    (gone,) = orthogonal_gradients([torch.tensor([0.3, 0.6])], [torch.tensor([0.1, 0.2])], rescale=rescale)
    assert gone.norm() < 1e-6  # along the weights up to rounding: not stretched
    (still,) = orthogonal_gradients([torch.zeros(2)], [gradient], rescale=rescale)
    assert still.tolist() == [0.0, 0.0]
    assert orthogonal_gradients([], [], rescale=rescale, scope="global") == []


def test_precision_memory_format_and_complex_numbers():
    weights, grads = tensors(0, (2, 3, 4, 4)), tensors(1, (2, 3, 4, 4))
    (expected,) = orthogonal_gradients(grads, weights, rescale=True)
    last = [[x.to(memory_format=torch.channels_last) for x in xs] for xs in (grads, weights)]
    (got,) = orthogonal_gradients(*last, rescale=True)
    assert got.stride() == last[0][0].stride()
    torch.testing.assert_close(got, expected)
    (half,) = orthogonal_gradients([grads[0].bfloat16()], [weights[0].bfloat16()], rescale=True)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), expected, atol=0.05, rtol=0.02)
    pairs = [[torch.view_as_complex(x.reshape(-1, 2)) for x in xs] for xs in (grads, weights)]
    (got,) = orthogonal_gradients(*pairs, rescale=True)
    torch.testing.assert_close(torch.view_as_real(got).flatten(), expected.flatten())


def network(seed=0, bias=True):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 3, bias=bias), nn.Tanh(), nn.Linear(3, 2, bias=bias))


def batch(step):
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(step))


def closure_of(model, optimizer, x):
    def closure():
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    return closure


def adam(params, lr=0.01):
    return torch.optim.Adam(params, lr=lr)


def sgd(params, lr=0.005):
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


@pytest.mark.parametrize("base", [adam, sgd, AdaBelief])
@pytest.mark.parametrize("with_closure", [False, True])
def test_follows_pytorch_optimizer(base, with_closure):
    peer = pytest.importorskip("pytorch_optimizer")
    one, other = network(), network()
    ours, theirs = PerpGrad(base(one.parameters())), peer.OrthoGrad(base(other.parameters()))
    for step in range(20):
        for model, optimizer in ((one, ours), (other, theirs)):
            closure = closure_of(model, optimizer, batch(step))
            if with_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-5)


def test_the_projection_comes_before_the_momentum():
    """By hand: the buffer sums projected gradients, and is itself projected no further."""
    weight = nn.Parameter(torch.tensor([1.0, 0.0], dtype=torch.float64))
    optimizer = PerpGrad(torch.optim.SGD([weight], lr=1.0, momentum=0.5), rescale=False)
    expected, buffer = weight.detach().clone(), torch.zeros(2, dtype=torch.float64)
    for gradient in ([3.0, 4.0], [-1.0, 2.0], [2.0, 2.0]):
        g = torch.tensor(gradient, dtype=torch.float64)
        buffer = 0.5 * buffer + g - (g @ expected) / (expected @ expected) * expected
        expected = expected - buffer
        weight.grad = g
        optimizer.step()
        torch.testing.assert_close(weight.detach(), expected)


def test_small_steps_keep_the_length_of_the_weights():
    model = network(bias=False)
    optimizer = PerpGrad(torch.optim.SGD(model.parameters(), lr=1e-6), rescale=True)
    before = [p.detach().double() for p in model.parameters()]
    optimizer.step(closure_of(model, optimizer, batch(0)))
    for p, q in zip(model.parameters(), before, strict=True):
        moved = (p.detach().double() - q).norm()
        assert moved > 1e-6
        assert abs(p.detach().double().norm() - q.norm()) < 0.02 * moved


@pytest.mark.parametrize("with_closure", [False, True])
def test_gradients_are_left_as_they_were(with_closure):
    model, plain = network(), network()
    optimizer = PerpGrad(sgd(model.parameters()), rescale=True)
    closure = closure_of(model, optimizer, batch(0))
    if with_closure:
        optimizer.step(closure)
    else:
        closure()
        held = [p.grad for p in model.parameters()]
        optimizer.step()
        assert all(p.grad is g for p, g in zip(model.parameters(), held, strict=True))
    closure_of(plain, sgd(plain.parameters()), batch(0))()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


def test_a_base_that_calls_the_closure_often_sees_projected_gradients_each_time():
    model, seen = network(), []

    class Watching(torch.optim.LBFGS):
        def _gather_flat_grad(self):
            for p in model.parameters():
                seen.append(abs((p * p.grad).sum().item()))
            return super()._gather_flat_grad()

    optimizer = PerpGrad(Watching(model.parameters(), lr=0.05, max_iter=4))

    def accumulating():  # gradients that are added to are the plain ones, not what the projection left
        calls.append(1)
        loss = model(batch(0)).square().sum()
        loss.backward()
        return loss

    calls = []
    start = copy.deepcopy(model)
    optimizer.step(accumulating)
    assert len(calls) > 1
    assert max(seen) < 1e-4
    assert not torch.equal(model[0].weight, start[0].weight)


def test_an_error_in_the_base_puts_the_gradients_back():
    model = network()

    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            raise ArithmeticError

    optimizer = PerpGrad(Failing(model.parameters(), lr=0.1))
    closure_of(model, optimizer, batch(0))()
    held = [p.grad for p in model.parameters()]
    with pytest.raises(ArithmeticError):
        optimizer.step()
    assert all(p.grad is g for p, g in zip(model.parameters(), held, strict=True))


def test_groups_and_state_are_the_bases_also_after_loading():
    model = network()
    optimizer = PerpGrad(AdaBelief(model.parameters(), lr=0.1))
    assert isinstance(optimizer, torch.optim.Optimizer)
    optimizer.step(closure_of(model, optimizer, batch(0)))
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups is optimizer.base.param_groups
    assert optimizer.state is optimizer.base.state
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step(closure_of(model, optimizer, batch(1)))
    schedule.step()
    assert optimizer.base.param_groups[0]["lr"] == 0.05
    extra = nn.Parameter(torch.zeros(1))
    optimizer.add_param_group({"params": [extra], "lr": 1.0})
    assert optimizer.base.param_groups[1]["params"] == [extra]


def test_a_loaded_learning_rate_is_the_one_that_steps():
    """A wrapper with groups of its own would go on stepping with the old one."""
    model = network()
    optimizer = PerpGrad(sgd(model.parameters(), lr=0.5))
    still = PerpGrad(sgd(network().parameters(), lr=0.0)).state_dict()
    optimizer.load_state_dict(still)
    before = copy.deepcopy(model)
    optimizer.step(closure_of(model, optimizer, batch(0)))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize("base", [adam, AdaBelief])
def test_saved_state_resumes_bit_exactly_and_copies_go_their_own_way(base):
    model = network()
    optimizer = PerpGrad(base(model.parameters(), lr=0.01), rescale=True, scope="global")
    for step in range(3):
        optimizer.step(closure_of(model, optimizer, batch(step)))
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    resumed = network(seed=9)
    resumed.load_state_dict(model.state_dict())
    second = PerpGrad(base(resumed.parameters(), lr=0.5), rescale=True, scope="global")
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (twin, twin_optimizer), (resumed, second)):
        for step in range(3, 6):
            o.step(closure_of(m, o, batch(step)))
    for other in (twin, resumed):
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_parameters_without_gradient_are_passed_over():
    model = network()
    optimizer = PerpGrad(sgd(model.parameters()))
    closure_of(model, optimizer, batch(0))()
    model[0].weight.grad = None
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert model[0].weight.grad is None
    assert torch.equal(model[0].weight, before)


def test_bad_arguments_are_named():
    model = network()
    with pytest.raises(TypeError, match="base"):
        PerpGrad(model.parameters())
    with pytest.raises(ValueError, match="scope"):
        PerpGrad(sgd(model.parameters()), scope="layer")
    with pytest.raises(ValueError, match="scope"):
        orthogonal_gradients([], [], scope="layer")
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        PerpGrad(sgd(table.parameters())).step()
    with pytest.raises(ValueError, match="parameters"):
        nlm_alignment(nn.Linear(2, 2).parameters())


def test_alignment_is_one_where_descent_only_lengthens_the_weights():
    weights = [nn.Parameter(w) for w in tensors(0, (3, 4), (5,))]
    for w in weights:
        w.grad = -0.3 * w.detach()
    assert nlm_alignment(weights).item() == pytest.approx(1.0)
    for w in weights:
        w.grad = 1e-30 * w.detach()
    assert nlm_alignment(weights).item() == pytest.approx(-1.0)
    for w, g in zip(weights, orthogonal_gradients([torch.ones_like(w) for w in weights], weights), strict=True):
        w.grad = g.detach()
    assert nlm_alignment(weights).item() == pytest.approx(0.0, abs=1e-12)
    weights[1].grad = None  # left out of both vectors
    weights[0].grad = -weights[0].detach()
    assert nlm_alignment(weights).item() == pytest.approx(1.0)
    weights[0].grad = torch.zeros_like(weights[0])
    assert nlm_alignment(weights).item() == 0.0


def test_the_default_is_the_releases():
    """Each tensor on its own, stretched to the length of its gradient."""
    weights = [nn.Parameter(torch.tensor([2.0, 0.0])), nn.Parameter(torch.tensor([[0.0, 1.0]]))]
    optimizer = PerpGrad(torch.optim.SGD(weights, lr=1.0))
    for weight, gradient in zip(weights, ([3.0, 4.0], [[-1.0, 1.0]]), strict=True):
        weight.grad = torch.tensor(gradient)
    optimizer.step()
    torch.testing.assert_close(weights[0].detach(), torch.tensor([2.0, -5.0]))
    torch.testing.assert_close(weights[1].detach(), torch.tensor([[2.0**0.5, 1.0]]))


def _sharded(rank, world, meeting, queue):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    model = _three_rows()
    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
    fully_shard(model, mesh=mesh)  # three rows over two ranks
    optimizer = PerpGrad(torch.optim.SGD(model.parameters(), lr=0.1))
    for p, g in zip(model.parameters(), _gradients(), strict=True):
        p.grad = dist.tensor.distribute_tensor(g, p.device_mesh, p.placements)
    optimizer.step()
    assert all(isinstance(p, DTensor) for p in model.parameters())
    ends = [p.full_tensor().detach().numpy().copy() for p in model.parameters()]
    queue.put(ends if rank == 0 else None)
    dist.barrier()
    os._exit(0)  # gloo's tear-down can wait for ever for a rank that has left already


def _three_rows():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(4, 3)


def _gradients():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(p.shape, generator=generator) for p in _three_rows().parameters()]


def test_unevenly_sharded_tensors_are_projected_as_whole_ones(tmp_path):
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    ranks = [context.Process(target=_sharded, args=(rank, 2, tmp_path / "meeting", queue)) for rank in range(2)]
    for process in ranks:
        process.start()
    ends = next(found for found in (queue.get(), queue.get()) if found is not None)
    for process in ranks:
        process.join()
    model = _three_rows()
    optimizer = PerpGrad(torch.optim.SGD(model.parameters(), lr=0.1))
    for p, g in zip(model.parameters(), _gradients(), strict=True):
        p.grad = g
    optimizer.step()
    for p, end in zip(model.parameters(), ends, strict=True):
        torch.testing.assert_close(p.detach(), torch.from_numpy(end))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("unit", [1e-40, 1e-30, 1e-22, 1.0, 1e25])
def test_alignment_does_not_depend_on_the_gradients_unit(unit, dtype) -> None:
    """Near softmax collapse, which it is there to find, gradients are that small."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(20, generator=generator, dtype=dtype))
    weight.grad = torch.randn(20, generator=generator, dtype=dtype)
    expected = F.cosine_similarity(-weight.grad, weight.detach(), dim=0)
    if not (dtype == torch.float32 and unit == 1e-40):  # beyond that precision
        weight.grad = weight.grad * unit
        torch.testing.assert_close(nlm_alignment([weight]), expected, rtol=1e-6, atol=1e-7)
    weight.grad = -weight.detach() * unit
    torch.testing.assert_close(nlm_alignment([weight]), torch.ones((), dtype=dtype), rtol=1e-4, atol=0)
    weight.grad = torch.zeros(20, dtype=dtype)
    assert nlm_alignment([weight]) == 0


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("scale", [1e-25, 1e-20, 1e20])
def test_gradients_of_any_length_keep_it(scale, scope):
    """Late in a training they are so small that their squares vanish in single precision."""
    grads = [torch.randn(4, 3, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    weights = [torch.randn(4, 3, generator=torch.Generator().manual_seed(n + 2)) for n in range(2)]
    wanted = orthogonal_gradients(grads, weights, rescale=True, scope=scope)
    found = orthogonal_gradients([scale * g for g in grads], weights, rescale=True, scope=scope)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one / scale, other)
    assert orthogonal_gradients([torch.zeros(0)], [torch.zeros(0)], rescale=True, scope=scope)[0].shape == (0,)
