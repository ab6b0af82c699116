"""SAF's memory and term, MESA's average and term."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trimtab.ops.tempered_kl import tempered_kl
from trimtab.optim import MESA, TrajectoryLoss

TARGETS = torch.tensor([0, 2])
INDEX = torch.tensor([4, 1])


def make(**kwargs):
    return TrajectoryLoss(
        **{"num_samples": 6, "num_classes": 3, "start_epoch": 3, "lag": 3, "dtype": torch.float64} | kwargs
    )


def logits_of(epoch):
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(epoch), dtype=torch.float64)


def visit(loss, epoch, logits=None, index=INDEX):
    loss.set_epoch(epoch)
    logits = logits_of(epoch) if logits is None else logits
    return loss(logits, TARGETS, index) - F.cross_entropy(logits, TARGETS)


def test_the_term_reads_what_was_written_lag_epochs_ago_also_after_wrapping_round():
    loss = make(lam=0.7, temperature=2.0)
    for epoch in range(12):
        term = visit(loss, epoch).item()
        if epoch <= 3:
            assert term == 0.0
        else:
            expected = 0.7 * tempered_kl(logits_of(epoch), logits_of(epoch - 3), 2.0).mean()
            assert term == pytest.approx(expected.item(), rel=1e-6)


def test_memory_goes_by_sample():
    loss = make(start_epoch=1, lag=1, lam=1.0, temperature=1.0)
    past, now = logits_of(1), logits_of(2)
    visit(loss, 1, past, torch.tensor([0, 1]))
    term = visit(loss, 2, now, torch.tensor([1, 0])).item()
    assert term == pytest.approx(tempered_kl(now, past.flip(0)).mean().item(), rel=1e-9)


def test_unchanged_predictions_cost_nothing_and_pull_nowhere():
    loss = make()
    for epoch in range(5):
        logits = logits_of(0).requires_grad_()
        term = visit(loss, epoch, logits)
    assert term.item() == pytest.approx(0.0, abs=1e-12)
    (gradient,) = torch.autograd.grad(term, logits)
    assert gradient.abs().max() < 1e-12


def test_gradient_goes_to_the_present_alone():
    loss = make(lam=0.3, temperature=5.0)
    for epoch in range(4):
        visit(loss, epoch)
    logits = logits_of(4).requires_grad_()
    (gradient,) = torch.autograd.grad(visit(loss, 4, logits), logits)
    expected = 0.3 * 5.0 * ((logits / 5).softmax(1) - (logits_of(1) / 5).softmax(1)) / 2
    torch.testing.assert_close(gradient, expected.detach())


def test_a_sample_left_out_then_adds_nothing_now():
    loss = make(lam=1.0, temperature=1.0)
    for epoch in range(9):
        index = torch.tensor([4, 2]) if epoch == 5 else INDEX  # sample 1 is dropped in epoch 5
        term = visit(loss, epoch, index=index)
    expected = tempered_kl(logits_of(8)[:1], logits_of(5)[:1]).sum() / 2
    assert term.item() == pytest.approx(expected.item(), rel=1e-9)


def test_the_term_ends():
    loss = make(end_epoch=5)
    terms = [visit(loss, epoch).item() for epoch in range(7)]
    assert [term > 0 for term in terms] == [False, False, False, False, True, False, False]


def test_half_precision_memory_holds_large_logits():
    loss = make(dtype=torch.float16, start_epoch=1, lag=1)
    for epoch in (0, 1, 2):
        logits = torch.tensor([[1e6, 0.0, 1.0], [-1e6, 3.0, 1e5]], requires_grad=True)
        loss.set_epoch(epoch)
        value = loss(logits, TARGETS, INDEX)
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all()
    assert loss.memory.rows.dtype == torch.float16


def test_half_precision_memory_is_close_to_full():
    terms = []
    for dtype in (torch.float16, torch.float64):
        loss = make(dtype=dtype)
        terms.append([visit(loss, epoch).item() for epoch in range(6)][-1])
    assert terms[0] == pytest.approx(terms[1], rel=1e-2)


def test_evaluation_neither_adds_nor_writes():
    loss = make()
    for epoch in range(5):
        visit(loss, epoch)
    before = loss.memory.rows.clone()
    loss.eval()
    assert loss(logits_of(9), TARGETS, INDEX).item() == F.cross_entropy(logits_of(9), TARGETS).item()
    assert torch.equal(loss.memory.rows, before)


def test_saved_state_resumes_also_within_an_epoch():
    loss = make()
    for epoch in range(6):
        visit(loss, epoch)
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    resumed = make()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    resumed.set_epoch(5)
    other = torch.tensor([0, 2])
    assert resumed(logits_of(1), TARGETS, other) == loss(logits_of(1), TARGETS, other)
    for epoch in (6, 7, 8):
        assert visit(resumed, epoch) == visit(loss, epoch)


def test_order_of_the_batch_does_not_matter():
    one, two = make(), make()
    for epoch in range(5):
        first = visit(one, epoch)
        logits = logits_of(epoch).flip(0)
        two.set_epoch(epoch)
        second = two(logits, TARGETS.flip(0), INDEX.flip(0)) - F.cross_entropy(logits, TARGETS.flip(0))
    torch.testing.assert_close(first, second)


def test_compiles_without_graph_breaks_and_once_for_all_epochs():
    plain, compiled = make(), make()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    call = torch.compile(compiled, backend=backend, fullgraph=True)
    for epoch in range(6):
        compiled.set_epoch(epoch)
        term = call(logits_of(epoch), TARGETS, INDEX) - F.cross_entropy(logits_of(epoch), TARGETS)
        torch.testing.assert_close(term, visit(plain, epoch))
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("lam", -0.1),
        ("temperature", 0.0),
        ("start_epoch", -1),
        ("lag", 0),
        ("lag", 4),
        ("end_epoch", 3),
        ("num_samples", 0),
        ("lam", float("nan")),
    ],
)
def test_arguments_out_of_range_are_named(argument, value):
    with pytest.raises(ValueError, match=argument):
        make(**{argument: value})


def test_bad_calls_are_refused():
    loss = make()
    with pytest.raises(RuntimeError, match="set_epoch"):
        loss(logits_of(0), TARGETS, INDEX)
    with pytest.raises(ValueError, match="epoch"):
        loss.set_epoch(-1)
    loss.set_epoch(0)
    with pytest.raises(ValueError, match="logits"):
        loss(torch.zeros(2, 4), TARGETS, INDEX)
    with pytest.raises(ValueError, match="logits"):
        loss(torch.zeros(0, 3), TARGETS[:0], INDEX[:0])
    with pytest.raises(ValueError, match="targets"):
        loss(logits_of(0), TARGETS[:1], INDEX)
    with pytest.raises(ValueError, match="index"):
        loss(logits_of(0), TARGETS, torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="index"):
        loss(logits_of(0), TARGETS, torch.tensor([1, 1]))
    with pytest.raises(TypeError, match="dtype"):
        make(dtype=torch.int64)


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 3))


def test_the_average_starts_at_the_weights_and_follows_them():
    model = nn.Linear(2, 2)
    start = model.weight.detach().clone()
    mesa = MESA(model, decay=0.75)
    with pytest.raises(ValueError, match="epoch must be"):
        mesa.set_epoch(-1)
    with torch.no_grad():
        model.weight += 4.0
    mesa.update()
    torch.testing.assert_close(mesa.average.module.weight, start + 1.0)
    mesa.update()
    torch.testing.assert_close(mesa.average.module.weight, start + 1.75)


def test_mesas_term_is_the_divergence_from_the_averages_predictions():
    model, x = nn.Linear(4, 3), torch.ones(2, 4)
    mesa = MESA(model, lam=0.5, temperature=2.0, start_epoch=0, decay=0.9)
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        model.weight[0] += 1.0
    logits = model(x)
    mesa.set_epoch(0)
    assert mesa(logits, x).item() == 0.0
    mesa.set_epoch(1)
    expected = 0.5 * tempered_kl(logits, teacher(x), 2.0).mean()
    torch.testing.assert_close(mesa(logits, x), expected)
    mesa(logits, x).backward()
    assert all(p.grad is None for p in mesa.parameters())
    assert model.weight.grad.abs().sum() > 0


def test_the_average_predicts_in_eval_mode_and_averages_batch_statistics():
    model = network()
    mesa = MESA(model, decay=0.5, start_epoch=0)
    model.train()
    mesa.train()
    mesa.set_epoch(1)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)) + 3
    logits = model(x)
    mesa.update()
    torch.testing.assert_close(mesa.average.module[1].running_mean, model[1].running_mean / 2)
    assert mesa(logits, x) == mesa(logits, x)  # no dropout
    assert torch.equal(mesa.average.module[1].running_mean, model[1].running_mean / 2)


def test_mesa_saves_its_average_alone():
    model = network()
    mesa = MESA(model)
    assert all(name.startswith("average.") for name in mesa.state_dict())
    twin = MESA(network())
    twin.load_state_dict(mesa.state_dict())


@pytest.mark.parametrize(("argument", "value"), [("decay", 1.0), ("decay", -0.1), ("lam", -1.0), ("temperature", 0.0)])
def test_mesas_arguments_out_of_range_are_named(argument, value):
    with pytest.raises(ValueError, match=argument):
        MESA(nn.Linear(2, 2), **{argument: value})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_weight_has_the_precision_of_the_logits(dtype):
    """Also where the module itself has been put into half precision."""
    logits = torch.randn(2, 4, 3, dtype=dtype, generator=torch.Generator().manual_seed(0))
    loss = TrajectoryLoss(4, 3, lam=0.3, temperature=1.0, start_epoch=1, lag=1, dtype=dtype).half()
    loss.memory.to(dtype)
    index = torch.arange(4)
    for epoch, scores in ((1, logits[0]), (2, logits[1])):
        loss.set_epoch(epoch)
        term = loss.penalty(scores, index)
    past, now = (x.log_softmax(1) for x in logits)
    assert term.dtype == dtype
    torch.testing.assert_close(term, 0.3 * (past.exp() * (past - now)).sum(1).mean(), rtol=1e-6, atol=0)
    if dtype == torch.float64:
        torch.testing.assert_close(term, 0.3 * (past.exp() * (past - now)).sum(1).mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("memory", [torch.float16, torch.bfloat16, torch.float32])
def test_any_memory_works_under_autocast(memory):
    net, x, index = nn.Linear(4, 3), torch.randn(5, 4), torch.arange(5)
    loss = TrajectoryLoss(8, 3, start_epoch=1, lag=1, dtype=memory)
    for epoch in range(4):
        loss.set_epoch(epoch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(net(x), index % 3, index)
        value.backward()
        assert value.isfinite()
