"""The task of learning features without labels: its samples and views, what features are judged by, and the loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trimtab.studies.engine.study import Trial, settings_of
from trimtab.studies.tasks.representation_learning import Pretraining, incomes, numerals
from trimtab.studies.tools import self_supervised
from trimtab.studies.tools.pretraining import Indicators, Lesson, PreTraining, crop, pretrain, redrawn
from trimtab.studies.tools.probes import effective_rank, linear_accuracy, neighbours_accuracy


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("task", [numerals, incomes])
def test_samples_for_choices_and_tests_are_not_learnt_from(task: Pretraining) -> None:
    data = task.samples(Trial())
    assert torch.equal(data.x[: len(data.x_probe)], data.x_probe)
    rows = {tuple(row) for row in data.x.flatten(1).tolist()}
    shared = sum(tuple(row) in rows for part in (data.x_held, data.x_test) for row in part.flatten(1).tolist())
    assert shared <= 2  # tables of few columns may hold the same row twice
    again, other = task.samples(Trial()), task.samples(Trial(seed=1))
    assert torch.equal(data.x, again.x)
    assert not torch.equal(data.x, other.x)


def test_tables_have_standard_numbers_and_codes() -> None:
    data = incomes.samples(Trial())
    assert len(data.cardinalities) == data.x.shape[1]
    for column, count in zip(data.x.unbind(1), data.cardinalities, strict=True):
        if count:
            assert torch.equal(column, column.round())
            assert column.min() >= 0
            assert column.max() < count
        else:
            assert column.mean().abs() < 0.3


def test_indicators_hold_one_of_each_category() -> None:
    expand = Indicators((0, 3, 0, 2))
    x = torch.tensor([[0.5, 2.0, -1.0, 0.0], [1.5, 0.0, 2.0, 1.0]])
    expected = torch.tensor([[0.5, 0, 0, 1, -1.0, 1, 0], [1.5, 1, 0, 0, 2.0, 0, 1]])
    assert torch.equal(expand(x), expected)
    assert expand.column.tolist() == [0, 1, 1, 1, 2, 3, 3]


def test_a_crop_of_everything_is_the_image_but_for_its_tone() -> None:
    x = draws(6, 1, 8, 8)
    view = crop(x, torch.Generator().manual_seed(0), smallest=1.0)
    for one, other in zip(x.flatten(1), view.flatten(1), strict=True):
        assert torch.corrcoef(torch.stack([one, other]))[0, 1] > 0.9999
    assert not torch.equal(view, x)
    part = crop(x, torch.Generator().manual_seed(0))
    assert torch.equal(part, crop(x, torch.Generator().manual_seed(0)))
    assert part.shape == x.shape


def test_rows_are_redrawn_column_by_column() -> None:
    known = torch.arange(40.0).view(10, 4)
    x = known[:3] + 0.5
    view = redrawn(x.repeat(400, 1), known, torch.Generator().manual_seed(0), share=0.3)
    changed = view != x.repeat(400, 1)
    assert changed.double().mean().item() == pytest.approx(0.3, abs=0.03)
    for j in range(4):
        assert set(view[changed[:, j], j].tolist()) == set(known[:, j].tolist())


def test_features_that_tell_are_told() -> None:
    y = torch.arange(300) % 3
    x = torch.eye(3)[y] + 0.05 * draws(300, 3)
    for accuracy in (linear_accuracy, neighbours_accuracy):
        assert accuracy(x[:100], y[:100], x[100:], y[100:]) == 1.0
        chance = accuracy(draws(100, 5), y[:100], draws(200, 5, seed=1), y[100:])
        assert 0.2 < chance < 0.47
        assert accuracy(torch.ones(100, 4), y[:100], torch.ones(200, 4), y[100:]) < 0.5
    scaled = torch.tensor([1e-4, 1.0, 1e4])
    assert linear_accuracy(scaled * x[:100], y[:100], scaled * x[100:], y[100:]) == 1.0


def test_effective_rank() -> None:
    orthogonal = torch.linalg.qr(draws(50, 6) - draws(50, 6).mean(0)).Q
    assert effective_rank(orthogonal - orthogonal.mean(0)) == pytest.approx(6, abs=0.3)
    assert effective_rank(draws(50, 1) * torch.ones(1, 6) + 3) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.ones(50, 6)) == 1.0
    x = draws(50, 6)
    assert effective_rank(100 * x + 7) == pytest.approx(effective_rank(x), rel=1e-3)


def lesson(task: Pretraining, setting: dict[str, float]) -> Lesson:
    data = task.samples(Trial())
    return Lesson(data.x, data.cardinalities, 4, 32, setting, 0)


@pytest.mark.parametrize("task", [numerals, incomes])
def test_references_learn_and_the_seed_decides(task: Pretraining) -> None:
    for name, entrant in Pretraining.references().items():
        setting = settings_of(task.grid(entrant))[0]
        held = lesson(task, dict(setting))
        done = [pretrain(entrant, held, Trial(setting=setting)) for _ in range(2)]
        features = [one.encode(held.x[:20]) for one in done]
        assert torch.equal(*features), name
        assert features[0].isfinite().all()
        torch.testing.assert_close(done[0].encode(held.x[:5]), features[0][:5], rtol=1e-4, atol=1e-5)
        assert not done[0].learner.training


def test_teachers_and_hidden_parts_take_no_gradient() -> None:
    held = lesson(numerals, {})
    for learner in (self_supervised.MoCo(held), self_supervised.BYOL(held)):
        learner.loss(held.x[:8], torch.arange(8), torch.Generator()).backward()
        assert all(p.grad is None for p in learner.teacher.parameters())
        assert all(p.grad is not None for p in learner.encoder.parameters())


def test_vicreg_is_its_formula() -> None:
    held = lesson(numerals, {"covariance": 0.3})
    learner = self_supervised.VICReg(held).eval()
    learner.project = lambda x: x.flatten(1)[:, :5]  # type: ignore[method-assign]
    one, other = draws(9, 1, 1, 5), draws(9, 1, 1, 5, seed=1)
    expected = (one - other).square().mean()
    for z in (one.flatten(1), other.flatten(1)):
        covariance = torch.cov(z.T)
        expected = expected + nn.functional.relu(1 - (covariance.diagonal() + 1e-4).sqrt()).mean() / 2
        expected = expected + 0.3 * (covariance - covariance.diag().diag()).square().sum() / 5
    torch.testing.assert_close(learner.compare(one, other, torch.arange(9)), expected)


class Seen(nn.Module):
    """Notes which batches it is given."""

    def __init__(self, lesson: Lesson) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.norm = nn.BatchNorm2d(1, affine=False)
        self.index: list[Tensor] = []
        self.shares: list[float] = []

    def loss(self, x: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
        self.index.append(index)
        self.norm(torch.zeros_like(x))
        return self.weight.square()

    def update(self, share: float) -> None:
        self.shares.append(share)

    def encode(self, x: Tensor) -> Tensor:
        return self.norm(x).flatten(1)


def test_the_loop_gives_all_the_same_batches_and_settles_statistics() -> None:
    held = lesson(numerals, {})
    one, other = (pretrain(PreTraining(learner=Seen), held, Trial()).learner for _ in range(2))
    assert [i.tolist() for i in one.index] == [i.tolist() for i in other.index]
    drawn = torch.cat(one.index)
    assert len(drawn.unique()) == len(drawn)  # no sample twice in a pass
    assert one.shares == [0.25, 0.5, 0.75, 1.0]
    torch.testing.assert_close(one.norm.running_mean[0], held.x.mean(), rtol=1e-3, atol=1e-4)
    assert one.weight.item() < 1
