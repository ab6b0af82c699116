"""Projected gradient ascent stays in its ball and reaches the known worst case."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trimtab.ops.attack import eval_mode, pgd, random_in_ball


def radius(offset: torch.Tensor, norm: str) -> torch.Tensor:
    flat = offset.flatten(1)
    return flat.abs().amax(1) if norm == "inf" else flat.norm(dim=1)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 9999), eps=st.floats(1e-3, 2), norm=st.sampled_from(["inf", "l2"]), steps=st.integers(1, 8))
def test_result_stays_in_the_ball_and_the_box(seed, eps, norm, steps):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(5, 2, 3, generator=generator, dtype=torch.float64)
    weight = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    start = 5 * eps * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    for bounds in (None, (0.0, 1.0)):
        moved = pgd(
            lambda z: (weight * z.sin()).sum((1, 2)), x, eps, norm=norm, steps=steps, start=start, bounds=bounds
        )
        assert (radius(moved - x, norm) <= eps * (1 + 1e-9)).all()
        assert not moved.requires_grad
        if bounds:
            assert moved.min() >= 0
            assert moved.max() <= 1
    assert (radius(random_in_ball(x, eps, norm, generator=generator), norm) <= eps * (1 + 1e-9)).all()


def test_reaches_the_worst_case_of_a_linear_objective():
    weight = torch.tensor([3.0, -4.0], dtype=torch.float64)
    x = torch.zeros(2, 2, dtype=torch.float64)
    torch.testing.assert_close(
        pgd(lambda z: z @ weight, x, 0.5), torch.tensor([[0.5, -0.5]], dtype=torch.float64).expand(2, 2)
    )
    torch.testing.assert_close(
        pgd(lambda z: z @ weight, x, 0.5, norm="l2"), torch.tensor([[0.3, -0.4]], dtype=torch.float64).expand(2, 2)
    )


def test_samples_do_not_mix():
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    together = pgd(lambda z: z.cos().sum(1), x, 0.3, norm="l2", steps=4)
    alone = torch.cat([pgd(lambda z: z.cos().sum(1), row[None], 0.3, norm="l2", steps=4) for row in x])
    torch.testing.assert_close(together, alone)


def test_flat_objective_has_no_nan():
    x = torch.ones(2, 3)
    for norm in ("inf", "l2"):
        assert pgd(lambda z: 0 * z.sum(1), x, 0.1, norm=norm).isfinite().all()


def test_works_without_grad_and_leaves_parameters_alone():
    model = nn.Linear(3, 1)
    with torch.no_grad():
        pgd(lambda z: model(z)[:, 0], torch.zeros(2, 3), 0.1)
    assert model.weight.grad is None


def test_generator_decides():
    x = torch.zeros(3, 4)
    first, second = (random_in_ball(x, 1.0, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)


def test_eval_mode_restores_every_module_even_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2), nn.Dropout())
    model[1].eval()

    def fail() -> None:
        with eval_mode(model):
            assert not any(module.training for module in model.modules())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [module.training for module in model.modules()] == [True, True, False, True]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"norm": "l1"}, "norm"),
        ({"steps": -1}, "steps"),
        ({"bounds": (1.0, 0.0)}, "bounds"),
        ({"step_size": math.nan}, "step_size"),
    ],
)
def test_what_is_no_attack_is_refused_by_name(options, name):
    """A norm that it does not know was taken for the Euclidean one."""
    with pytest.raises(ValueError, match=f"{name} must"):
        pgd(lambda z: z.sum(1), torch.zeros(2, 3), 0.1, **options)
    if name == "norm":
        with pytest.raises(ValueError, match="norm must"):
            random_in_ball(torch.zeros(2, 3), 0.1, **options)


@pytest.mark.parametrize("scale", [1e-35, 1e-25, 1.0, 1e20, 1e37])
def test_a_step_is_as_long_as_asked_however_small_or_large_the_gradient(scale: float) -> None:
    x = torch.zeros(2, 3)
    moved = pgd(lambda z: scale * (z @ torch.tensor([3.0, 4.0, 0.0])), x, 1.0, norm="l2", steps=1, step_size=0.1)
    torch.testing.assert_close(moved, torch.tensor([[0.06, 0.08, 0.0]]).expand(2, 3))


@pytest.mark.parametrize("shape", [(1, 3), (5, 2, 3)])
def test_a_start_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^start must be of shape \(2, 3\)"):
        pgd(lambda z: z.sum(1), torch.zeros(2, 3), 1.0, start=torch.zeros(shape))


def test_integers_and_steps_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(TypeError, match="^x must be floating point"):
        pgd(lambda z: z.sum(1), torch.zeros(2, 3).long(), 1.0)
    with pytest.raises(TypeError, match="^step_size must be a number"):
        pgd(lambda z: z.sum(1), torch.zeros(2, 3), 1.0, step_size="long")  # type: ignore[arg-type]
