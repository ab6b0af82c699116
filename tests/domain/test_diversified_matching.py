"""Diversified matching: losses against their formulas, and automorphisms that one label lets pass and two do not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.domain import (
    ConditionCritics,
    DiversifiedTranslator,
    conditional_energy_distance,
    mean_by_condition,
    translation_error,
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(conditions: int = 3, n: int = 9, m: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return drawn(n, 2), torch.arange(n) % conditions, drawn(m, 2, seed=1), torch.arange(m) % conditions


def rule(conditions: int = 3, gan: str = "lsgan", **options: float) -> DiversifiedTranslator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        critics = [] if gan == "energy" else [nn.Linear(2, conditions) for _ in range(2)]
        made = DiversifiedTranslator(
            nn.Linear(2, 2), nn.Linear(2, 2), *critics, num_conditions=conditions, gan=gan, **options
        )
    return made.double()


def turned(x: Tensor) -> Tensor:
    return torch.stack([-x[:, 1], x[:, 0]], 1)


class TestLosses:
    def test_one_label_is_cyclegan(self):
        x, u, y, v = batch(1)
        made = rule(1)
        there, back = made.g12(x), made.g21(y)
        cycle = F.mse_loss(made.g21(there), x) + F.mse_loss(made.g12(back), y)
        match = (made.d2(there) - 1).square().mean() + (made.d1(back) - 1).square().mean()
        found = made.generator_loss(x, u, y, v)
        torch.testing.assert_close(found["total"], match + 10 * cycle)
        critic = (made.d1(x) - 1).square().mean() + made.d1(back).square().mean()
        critic = critic + (made.d2(y) - 1).square().mean() + made.d2(there).square().mean()
        torch.testing.assert_close(made.discriminator_loss(x, u, y, v)["total"], critic)

    @pytest.mark.parametrize("gan", ["lsgan", "nsgan"])
    def test_every_label_has_its_own_critic_and_mean(self, gan):
        x, u, y, v = batch(3)
        made = rule(3, gan, cycle_weight=0.0)
        there, back = made.g12(x), made.g21(y)
        real = (lambda s: (s - 1).square()) if gan == "lsgan" else (lambda s: F.softplus(-s))
        fake = torch.square if gan == "lsgan" else F.softplus
        match = critic = torch.zeros((), dtype=torch.float64)
        for k in range(3):
            match = match + real(made.d2(there)[u == k, k]).mean() + real(made.d1(back)[v == k, k]).mean()
            critic = critic + real(made.d1(x)[u == k, k]).mean() + fake(made.d1(back)[v == k, k]).mean()
            critic = critic + real(made.d2(y)[v == k, k]).mean() + fake(made.d2(there)[u == k, k]).mean()
        torch.testing.assert_close(made.generator_loss(x, u, y, v)["total"], match / 3)
        torch.testing.assert_close(made.discriminator_loss(x, u, y, v)["total"], critic)

    def test_translations_are_constants_for_the_critics(self):
        made = rule()
        made.discriminator_loss(*batch())["total"].backward()
        assert all(p.grad is None for p in made.translators())
        assert all(p.grad is not None for p in made.critics())

    def test_a_label_that_is_absent_adds_nothing(self):
        x, u, y, v = batch(2)
        wide, narrow = rule(3, cycle_weight=0.0), rule(2, cycle_weight=0.0)
        for name in ("g12", "g21"):
            getattr(narrow, name).load_state_dict(getattr(wide, name).state_dict())
        for name in ("d1", "d2"):
            state = getattr(wide, name).state_dict()
            getattr(narrow, name).load_state_dict({key: value[:2] for key, value in state.items()})
        torch.testing.assert_close(
            wide.discriminator_loss(x, u, y, v)["total"], narrow.discriminator_loss(x, u, y, v)["total"]
        )
        torch.testing.assert_close(
            3 * wide.generator_loss(x, u, y, v)["total"], 2 * narrow.generator_loss(x, u, y, v)["total"]
        )

    @pytest.mark.parametrize("gan", ["lsgan", "nsgan", "energy"])
    def test_order_of_the_batch_does_not_matter(self, gan):
        x, u, y, v = batch()
        made, order = rule(gan=gan), torch.randperm(9, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(
            made.generator_loss(x[order], u[order], y, v)["total"], made.generator_loss(x, u, y, v)["total"]
        )

    def test_identity_has_no_cycle_error_and_l1_is_absolute(self):
        x, u, y, v = batch()
        same = DiversifiedTranslator(nn.Identity(), nn.Identity(), num_conditions=3, gan="energy")
        assert same.generator_loss(x, u, y, v)["cycle"] == 0
        made = rule(cycle="l1")
        expected = F.l1_loss(made.g21(made.g12(x)), x) + F.l1_loss(made.g12(made.g21(y)), y)
        torch.testing.assert_close(made.generator_loss(x, u, y, v)["cycle"], expected)

    def test_r1_of_linear_critics(self):
        x, u, y, v = batch()
        plain, held = rule(gan="nsgan"), rule(gan="nsgan", r1=0.5)
        term = held.discriminator_loss(x, u, y, v)["total"] - plain.discriminator_loss(x, u, y, v)["total"]
        weights = [(held.d1.weight[u]).square().sum(1).mean(), (held.d2.weight[v]).square().sum(1).mean()]
        torch.testing.assert_close(term, 0.25 * (weights[0] + weights[1]))


class TestEnergy:
    def test_equals_its_definition(self):
        x, u, y, v = batch()
        found = conditional_energy_distance(x, y, u, v, 3)
        for k in range(3):
            a, b = x[u == k], y[v == k]
            expected = 2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()
            torch.testing.assert_close(found[k], expected)

    def test_zero_for_the_same_samples_and_never_negative(self):
        x, u, y, v = batch()
        torch.testing.assert_close(conditional_energy_distance(x, x, u, u, 3), torch.zeros(3, dtype=torch.float64))
        assert (conditional_energy_distance(x, y, u, v, 3) > 0).all()

    def test_one_side_absent_is_zero_and_gradients_are_finite(self):
        x = drawn(4, 2).requires_grad_()
        found = conditional_energy_distance(
            torch.cat([x, x]), drawn(2, 2), torch.zeros(8, dtype=torch.int64), torch.ones(2, dtype=torch.int64), 2
        )
        assert torch.equal(found, torch.zeros(2, dtype=torch.float64))
        conditional_energy_distance(
            torch.cat([x, x]), drawn(2, 2), torch.zeros(8, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), 1
        ).sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()

    def test_a_rotation_passes_for_one_label_and_not_for_two(self):
        centres = torch.tensor([[2.0, 2.0], [-2.0, 2.0], [-2.0, -2.0], [2.0, -2.0]], dtype=torch.float64)
        cluster = torch.arange(400) % 4
        x = centres[cluster] + 0.3 * drawn(400, 2)
        whole, halves = torch.zeros_like(cluster), cluster // 2
        noise = conditional_energy_distance(x, centres[cluster] + 0.3 * drawn(400, 2, seed=1), whole, whole, 1)
        assert conditional_energy_distance(turned(x), x, whole, whole, 1) < 3 * noise + 0.02
        assert (conditional_energy_distance(turned(x), x, halves, halves, 2) > 0.5).all()


def test_means_by_condition_ignore_what_is_absent():
    found = mean_by_condition(torch.tensor([2.0, 4.0, 9.0]), torch.tensor([1, 1, 3]), 4)
    assert torch.equal(found, torch.tensor([0.0, 3.0, 0.0, 9.0]))


def test_translation_error_is_half_the_sum_of_both_directions():
    double, half = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.constant_(double.weight, 2.0)
    nn.init.constant_(half.weight, 1.0)
    x = torch.tensor([[1.0], [3.0]])
    assert translation_error(double, half, x, 2 * x).item() == pytest.approx((1 + 9) / 4)


def test_critics_side_by_side_are_one_with_as_many_outputs():
    critics = ConditionCritics([nn.Linear(2, 1) for _ in range(3)]).double()
    x = drawn(5, 2)
    torch.testing.assert_close(critics(x)[:, 1:2], critics[1](x))


def test_learns_a_shift_that_only_labels_tell_from_a_reflection():
    made = rule(2, "energy", cycle_weight=1.0)
    optimizer = torch.optim.Adam(made.translators(), lr=0.05)
    generator = torch.Generator().manual_seed(0)

    def samples() -> tuple[Tensor, Tensor]:
        labels = torch.randint(2, (60,), generator=generator)
        return torch.stack([4.0 * labels - 2, 0.0 * labels], 1) + 0.3 * torch.randn(60, 2, generator=generator), labels

    for _ in range(150):
        (x, u), (y, v) = samples(), samples()
        optimizer.zero_grad()
        made.generator_loss(x.double(), u, y.double() + 1, v)["total"].backward()
        optimizer.step()
    x = samples()[0].double()
    assert translation_error(made.g12, made.g21, x, x + 1) < 0.5  # the wrong way round it would be above 8


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "error", "name"),
        [
            ({"u": torch.arange(9)}, ValueError, "u must"),
            ({"u": torch.full((9,), -1)}, ValueError, "u must"),
            ({"u": torch.zeros(9)}, TypeError, "u must"),
            ({"v": torch.zeros(3, dtype=torch.int64)}, ValueError, "y and v"),
            ({"x": torch.zeros(0, 2), "u": torch.zeros(0, dtype=torch.int64)}, ValueError, "x and u"),
            ({"y": torch.zeros(7, 2, dtype=torch.int64)}, TypeError, "y must"),
        ],
    )
    def test_batches(self, change, error, name):
        arguments = {**dict(zip("xuyv", batch(), strict=True)), **change}
        made = rule()
        for loss in (made.generator_loss, made.discriminator_loss):
            with pytest.raises(error, match=name):
                loss(**arguments)

    def test_critics(self):
        nets = nn.Linear(2, 2), nn.Linear(2, 2)
        for critics, gan in (((), "lsgan"), ((nn.Linear(2, 1),), "nsgan"), ((nn.Linear(2, 1),) * 2, "energy")):
            with pytest.raises(ValueError, match="d1 and d2"):
                DiversifiedTranslator(*nets, *critics, num_conditions=1, gan=gan)
        with pytest.raises(RuntimeError, match="no critics"):
            rule(gan="energy").discriminator_loss(*batch())
        with pytest.raises(ValueError, match="gan"):
            rule(gan="wgan")
        with pytest.raises(ValueError, match="num_conditions"):
            rule(0)
