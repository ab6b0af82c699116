"""The imputation task: how values are taken away, what is filled in where nothing new is brought, how it is judged."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trimtab.generative import Fillings
from trimtab.studies.engine.study import Trial
from trimtab.studies.tasks.imputation import (
    Holes,
    Imputation,
    Imputer,
    deviation,
    judged,
    ranked_probability_score,
    rows,
    waiting,
)
from trimtab.studies.tools.series import Fitted, Holed, Lesson, one_way
from trimtab.studies.tools.series_imputers import GRUD, interpolated

LAPTOP = Trial(budget="laptop")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def drawn() -> Holed:
    x, mask = torch.randn(4, 9, 3, generator=seeded()), torch.rand(4, 9, 3, generator=seeded(1)) < 0.4
    return Holed(torch.where(mask, x, 0), mask, torch.ones(4, 9, dtype=torch.bool))


@pytest.mark.parametrize("missing", ["large", "random"])
def test_the_share_that_is_missing_and_whether_large_values_are(missing) -> None:
    task = Imputation("digits", missing)
    train, y_train, test, y_test = task.series(LAPTOP)
    assert (len(train.truth), len(y_train), len(test.truth), len(y_test)) == (1198, 1198, 599, 599)
    for part in (train, test):
        assert (~part.mask).float().mean().item() == pytest.approx(0.6, abs=0.01)
    gap = train.truth[~train.mask].mean() - train.truth[train.mask].mean()
    assert bool(gap > 0.3) == (missing == "large")
    # The observed mean of a feature is where zero is.
    seen = torch.where(train.mask, train.truth, torch.nan)
    torch.testing.assert_close(seen.nanmean((0, 1)), torch.zeros(8), atol=1e-4, rtol=0.0)
    assert train.truth.std((0, 1)).max() <= 1.001


def test_holes_are_drawn_by_the_seed_and_steps_past_the_end_are_no_holes() -> None:
    first, *_ = rows.series(LAPTOP)
    other, *_ = rows.series(Trial(seed=1, budget="laptop"))
    assert torch.equal(first.mask, rows.series(LAPTOP)[0].mask)
    assert not torch.equal(first.mask, other.mask)
    x = torch.randn(500, 6, 2, generator=seeded())
    x[:, 4:] = torch.nan
    mask = rows.observed(x, seeded())
    assert not bool(mask[:, 4:].any())
    assert mask[:, :4].float().mean().item() == pytest.approx(0.4, abs=0.03)
    held = Holes(x, mask).holed
    assert torch.equal(held.valid, torch.arange(6).expand(500, 6) < 4)
    assert bool(held.x.isfinite().all())
    assert not bool(held.x[~mask].any())
    torch.testing.assert_close(deviation(x), torch.ones(2), atol=0.05, rtol=0.0)


def test_lines_are_those_of_numpy(drawn: Holed) -> None:
    found = interpolated(drawn)
    for n in range(4):
        for d in range(3):
            at = drawn.mask[n, :, d].nonzero()[:, 0].numpy()
            expected = np.interp(np.arange(9), at, drawn.x[n, at, d]) if len(at) else np.zeros(9)
            np.testing.assert_allclose(found[n, :, d], expected, atol=1e-5)


def test_waiting_counts_from_the_last_value_or_from_before_the_start() -> None:
    mask = torch.tensor([[False, True, False, False, True]])[:, :, None]
    assert waiting(mask)[0, :, 0].tolist() == [1, 0, 1, 2, 0]


def test_the_score_of_fillings_is_that_of_all_pairs_and_of_one_the_absolute_error() -> None:
    samples = torch.randn(7, 2, 3, 4, generator=seeded(), dtype=torch.float64)
    weights = torch.rand(7, 2, generator=seeded(1), dtype=torch.float64)
    weights = weights / weights.sum(0)
    truth = torch.randn(2, 3, 4, generator=seeded(2), dtype=torch.float64)
    pairs = (samples[:, None] - samples[None]).abs()
    spread = torch.einsum("ib,jb,ijbtd->btd", weights, weights, pairs)
    apart = torch.einsum("ib,ibtd->btd", weights, (samples - truth).abs())
    torch.testing.assert_close(ranked_probability_score(Fillings(samples, weights), truth), apart - spread / 2)
    torch.testing.assert_close(ranked_probability_score(one_way(samples[0]), truth), (samples[0] - truth).abs())
    # Of a standard normal at its mean it is (sqrt 2 - 1) / sqrt pi.
    many = Fillings(torch.randn(20_000, 1, 1, 1, generator=seeded(3)), torch.full((20_000, 1), 1 / 20_000))
    exact = (math.sqrt(2) - 1) / math.sqrt(math.pi)
    assert ranked_probability_score(many, torch.zeros(1, 1, 1)).item() == pytest.approx(exact, abs=0.01)


def test_only_what_was_taken_away_is_judged() -> None:
    truth = torch.tensor([[[1.0], [2.0], [3.0], [torch.nan]]])
    test = Holes(truth, torch.tensor([[[True], [False], [False], [False]]]))
    filled = one_way(torch.tensor([[[9.0], [2.0], [7.0], [50.0]]]))
    found = judged(test, [filled], torch.tensor([[0.25, 0.75]]), torch.tensor([1]))
    assert found.metrics["rmse"] == pytest.approx(math.sqrt(8.0))
    assert found.metrics["crps"] == pytest.approx(2.0)
    assert found.metrics["nll"] == pytest.approx(-math.log(0.75))
    assert found.metrics["accuracy"] == 1.0
    assert (found.curves["error"].x, found.curves["error"].y) == ([1, 2], [0.0, 4.0])


def test_a_contestant_sees_no_value_that_is_missing_and_no_test_series() -> None:
    lessons: list[Lesson] = []

    def fit(lesson: Lesson) -> Fitted:
        lessons.append(lesson)
        return Fitted(lambda part: one_way(part.x), lambda part: torch.full((len(part), 10), 0.1))

    rows.run(Trial(), Imputer(fit=fit))
    series = lessons[0].series
    assert len(series) == 60
    assert not bool(series.x[~series.mask].any())


def test_gru_d_reads_nothing_past_the_end_and_decays_to_the_mean(drawn: Holed) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = GRUD(3, 2)
    short = Holed(drawn.x, drawn.mask, torch.arange(9).expand(4, 9) < 5)
    longer = Holed(drawn.x + 0, drawn.mask.clone(), short.valid)
    longer.x[:, 5:] = 7.0
    longer.mask[:, 5:] = True
    assert torch.equal(net(short), net(longer))
    torch.testing.assert_close(net.fill(drawn)[drawn.mask], drawn.x[drawn.mask])
    with torch.no_grad():
        net.input_decay.fill_(50.0)
    assert net.fill(drawn)[~drawn.mask].abs().max() < 1e-6
