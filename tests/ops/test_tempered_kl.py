"""The tempered divergence against closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.ops.tempered_kl import tempered_kl


def pair(seed=0, batch=4, classes=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, classes, generator=generator, dtype=torch.float64) for _ in range(2)]


def test_two_classes():
    value = tempered_kl(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    assert value.item() == pytest.approx(math.tanh(0.5), rel=1e-6)


def test_the_teacher_comes_first():
    student, teacher = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    p = torch.softmax(student, 1)[0]
    assert tempered_kl(student, teacher).item() == pytest.approx((0.5 * (0.5 / p).log()).sum().item(), rel=1e-5)


def test_gradient():
    student, teacher = pair()
    student.requires_grad_()
    teacher.requires_grad_()
    tempered_kl(student, teacher, 3.0).sum().backward()
    torch.testing.assert_close(student.grad, 3.0 * ((student / 3).softmax(1) - (teacher / 3).softmax(1)).detach())
    assert teacher.grad is None


def test_at_high_temperature_it_is_half_the_variance_of_the_difference():
    student, teacher = pair()
    difference = student - teacher
    torch.testing.assert_close(
        tempered_kl(student, teacher, 1e3), 0.5 * difference.var(1, unbiased=False), rtol=1e-2, atol=0
    )


@given(seed=st.integers(0, 999), temperature=st.floats(0.1, 100), shift=st.floats(-1e3, 1e3))
@settings(max_examples=30, deadline=None)
def test_it_is_no_less_than_zero_and_blind_to_shifts(seed, temperature, shift):
    student, teacher = pair(seed)
    value = tempered_kl(student, teacher, temperature)
    assert (value >= -1e-9).all()
    torch.testing.assert_close(tempered_kl(student + shift, teacher, temperature), value, atol=1e-6, rtol=1e-6)


def test_finite_at_extreme_logits():
    wide = torch.tensor([[1e4, -1e4]], requires_grad=True)
    value = tempered_kl(wide, -wide.detach())
    value.sum().backward()
    assert value.isfinite().all()
    assert wide.grad.isfinite().all()


def test_bad_arguments_are_named():
    student, teacher = pair()
    with pytest.raises(ValueError, match="teacher_logits"):
        tempered_kl(student, teacher[:, :2])
    with pytest.raises(ValueError, match="temperature"):
        tempered_kl(student, teacher, 0.0)
