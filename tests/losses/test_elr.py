from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.losses import ELR, elr_penalty


def batch(size: int = 5, classes: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (size,), generator=generator), torch.arange(size)


def test_without_weight_it_is_cross_entropy() -> None:
    logits, targets, index = batch()
    torch.testing.assert_close(ELR(5, 4, lam=0.0)(logits, targets, index), F.cross_entropy(logits, targets))


def test_first_visit_to_uniform_logits() -> None:
    # t = 0.3 * 0.1, <t, p> = 0.03
    value = ELR(1, 10)(torch.zeros(1, 10), torch.tensor([0]), torch.tensor([0]))
    assert value.item() == pytest.approx(math.log(10) + 3 * math.log(0.97), abs=1e-6)
    uniform = torch.full((1, 10), 0.1)
    assert elr_penalty(uniform, 0.3 * uniform).item() == pytest.approx(-0.0304592, abs=1e-6)


def test_repeated_visits_approach_the_prediction_geometrically() -> None:
    logits, targets, index = batch()
    loss = ELR(5, 4, beta=0.6).double()
    for visit in range(1, 5):
        loss(logits, targets, index)
        torch.testing.assert_close(loss.memory.rows, (1 - 0.6**visit) * logits.softmax(1))


def test_labels_do_not_enter_the_average() -> None:
    logits, targets, index = batch()
    one, other = ELR(5, 4), ELR(5, 4)
    one(logits, targets, index)
    other(logits, (targets + 1) % 4, index)
    assert torch.equal(one.memory.rows, other.memory.rows)


def test_gradient_is_the_papers() -> None:
    # dR/dz_c = p_c / (1 - <p, t>) sum_k (t_k - t_c) p_k, with the average held constant
    logits, targets, index = batch()
    loss = ELR(5, 4, lam=2.5, beta=0.7).double()
    loss(logits.flip(0), targets, index)
    logits.requires_grad_()
    loss(logits, targets, index).backward()
    p, t = logits.detach().softmax(1), loss.memory.rows
    agreement = (t * p).sum(1, keepdim=True)
    regulariser = p / (1 - agreement) * (agreement - t)
    expected = (p - F.one_hot(targets, 4) + 2.5 * regulariser) / 5
    torch.testing.assert_close(logits.grad, expected)


def test_a_wrong_labels_gradient_is_cancelled() -> None:
    # After many right predictions, descent on the loss no longer raises a wrong label's probability as cross-entropy's.
    logits = torch.tensor([[3.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    wrong, index = torch.tensor([1]), torch.tensor([0])
    loss = ELR(1, 3).double()
    for _ in range(50):
        value = loss(logits, wrong, index)
    (gradient,) = torch.autograd.grad(value, logits)
    (plain,) = torch.autograd.grad(F.cross_entropy(logits, wrong), logits)
    assert plain[0, 0] > 0 > gradient[0, 0]
    assert abs(gradient[0, 1]) < abs(plain[0, 1])


def test_value_may_be_negative_and_is_bounded() -> None:
    logits, index = torch.tensor([[50.0, 0.0]]), torch.tensor([0])
    loss = ELR(1, 2)
    for _ in range(100):
        value = loss(logits, torch.tensor([0]), index)
    assert value.item() == pytest.approx(3 * math.log(1e-4), rel=1e-3)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 8), st.integers(2, 12))
def test_penalty_is_never_positive_and_its_reductions_agree(seed: int, size: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probs, past = (torch.rand(size, classes, generator=generator).softmax(1) for _ in range(2))
    each = elr_penalty(probs, past, "none")
    assert each.shape == (size,)
    assert (each <= 0).all()
    torch.testing.assert_close(elr_penalty(probs, past), each.mean())
    torch.testing.assert_close(elr_penalty(probs, past, "sum"), each.sum())


def test_the_past_is_a_constant() -> None:
    probs, past = torch.full((3, 4), 0.25, requires_grad=True), torch.full((3, 4), 0.25, requires_grad=True)
    elr_penalty(probs, past).backward()
    assert past.grad is None
    assert probs.grad is not None


def test_reductions_agree() -> None:
    logits, targets, index = batch()
    each = ELR(5, 4, reduction="none")(logits, targets, index)
    assert each.shape == (5,)
    torch.testing.assert_close(ELR(5, 4)(logits, targets, index), each.mean())
    torch.testing.assert_close(ELR(5, 4, reduction="sum")(logits, targets, index), each.sum())


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"lam": -1.0}, "lam"),
        ({"beta": 1.0}, "beta"),
        ({"beta": -0.1}, "beta"),
        ({"reduction": "max"}, "reduction"),
        ({"num_samples": 0}, "num_samples"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        ELR(**{"num_samples": 5, "num_classes": 4, **options})  # type: ignore[arg-type]


def test_other_number_of_classes_is_refused() -> None:
    logits, targets, index = batch()
    with pytest.raises(ValueError, match="num_classes=3"):
        ELR(5, 3)(logits, targets, index)


def test_penalty_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match="probs and past"):
        elr_penalty(torch.ones(2, 3), torch.ones(3))
