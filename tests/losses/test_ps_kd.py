from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.losses import PSKD, pskd_targets

INDEX = torch.arange(5)


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    return logits, torch.randint(4, (5,), generator=generator)


def at_epoch(epoch: int, **options: object) -> PSKD:
    loss = PSKD(5, 4, **{"total_epochs": 10, **options}).double()  # type: ignore[arg-type]
    loss.set_epoch(epoch)
    return loss


def test_first_epoch_is_cross_entropy() -> None:
    logits, targets = batch()
    torch.testing.assert_close(at_epoch(0)(logits, targets, INDEX), F.cross_entropy(logits, targets))


def test_without_the_past_it_stays_cross_entropy() -> None:
    loss = at_epoch(0, alpha_final=0.0)
    for epoch in range(10):
        loss.set_epoch(epoch)
        logits, targets = batch(epoch)
        torch.testing.assert_close(loss(logits, targets, INDEX), F.cross_entropy(logits, targets))


def test_worked_example() -> None:
    past, logits = torch.tensor([[0.6, 0.4]]), torch.zeros(1, 2, requires_grad=True)
    target = pskd_targets(torch.tensor([0]), past, 0.5)
    torch.testing.assert_close(target, torch.tensor([[0.8, 0.2]]))
    loss = PSKD(1, 2, total_epochs=8)  # alpha = 0.8 * 5 / 8 = 0.5
    loss.set_epoch(4)
    loss.memory.write(torch.tensor([0]), past)
    value = loss(logits, torch.tensor([0]), torch.tensor([0]))
    value.backward()
    assert value.item() == pytest.approx(math.log(2))
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.3, 0.3]]))


def test_gradient_shrinks_where_the_past_is_the_present() -> None:
    logits, targets = batch()
    loss = at_epoch(4)  # alpha = 0.4
    loss.memory.write(INDEX, logits.softmax(1))
    logits.requires_grad_()
    loss(logits, targets, INDEX).backward()
    torch.testing.assert_close(logits.grad, 0.6 * (logits.detach().softmax(1) - F.one_hot(targets, 4)) / 5)


def test_an_epochs_targets_rest_on_the_epoch_before() -> None:
    loss, alphas = at_epoch(0), [0.8 * (epoch + 1) / 10 for epoch in range(10)]
    before = None
    for epoch, alpha in enumerate(alphas):
        loss.set_epoch(epoch)
        assert loss.alpha.item() == pytest.approx(alpha)
        logits, targets = batch(epoch)
        onehot = F.one_hot(targets, 4).double()
        soft = onehot if before is None else (1 - alpha) * onehot + alpha * before
        torch.testing.assert_close(
            loss(logits, targets, INDEX), -(soft * logits.log_softmax(1)).sum(1).mean(), rtol=1e-6, atol=1e-6
        )
        before = logits.softmax(1)
        torch.testing.assert_close(loss.memory.rows, before)


def test_the_past_is_a_constant() -> None:
    past = torch.full((1, 2), 0.5, requires_grad=True)
    assert not pskd_targets(torch.tensor([0]), past, 0.5).requires_grad


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1))
def test_targets_are_distributions(seed: int, alpha: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    past = torch.randn(6, 5, generator=generator).softmax(1)
    past[3] = 0  # never seen
    targets = torch.randint(5, (6,), generator=generator)
    soft = pskd_targets(targets, past, alpha)
    torch.testing.assert_close(soft.sum(1), torch.ones(6))
    assert (soft >= 0).all()
    assert soft[3, targets[3]] == 1


def test_epoch_must_be_set() -> None:
    logits, targets = batch()
    with pytest.raises(RuntimeError, match="set_epoch"):
        PSKD(5, 4, total_epochs=3)(logits, targets, INDEX)
    for epoch in (-1, 3):
        with pytest.raises(ValueError, match="epoch"):
            PSKD(5, 4, total_epochs=3).set_epoch(epoch)


@pytest.mark.parametrize(
    ("options", "name"),
    [({"total_epochs": 0}, "total_epochs"), ({"alpha_final": 1.1}, "alpha_final"), ({"reduction": "max"}, "reduction")],
)
def test_bad_options_are_refused_by_name(options: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        at_epoch(0, **options)


def test_targets_refuse_other_shapes() -> None:
    with pytest.raises(ValueError, match="targets and past"):
        pskd_targets(torch.tensor([0, 1]), torch.ones(3, 2), 0.5)


def test_epochs_do_not_recompile() -> None:
    logits, targets = batch()
    loss = at_epoch(0)
    compilations = []

    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        compilations.append(graph)
        return graph

    compiled = torch.compile(loss, fullgraph=True, backend=counting)
    for epoch in range(4):
        loss.set_epoch(epoch)
        compiled(logits, targets, INDEX)
    assert len(compilations) == 1
