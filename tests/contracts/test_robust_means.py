"""What every rule that makes one update of many keeps to. A new one joins by one line in MEMBERS."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from trimtab.federated import (
    FlagAggregator,
    bulyan,
    coordinate_median,
    krum,
    multi_krum,
    plain_mean,
    principal_aggregate,
    trimmed_mean,
)
from trimtab.federated.robust_means import RobustMean

WORKERS, SIZE = 11, 30
MEMBERS: dict[str, RobustMean] = {
    "mean": plain_mean,
    "coordinate median": coordinate_median,
    "trimmed mean": partial(trimmed_mean, trim=2),
    "krum": partial(krum, byzantine=2),
    "multi-krum": partial(multi_krum, byzantine=2),
    "bulyan": partial(bulyan, byzantine=2),
    "flag aggregator": FlagAggregator(rescale="median_norm"),
    "flag aggregator, with differences": FlagAggregator(lam=1.0, rescale="median_norm"),
    "principal directions": principal_aggregate,
}
ROBUST = [name for name in MEMBERS if name not in ("mean", "principal directions")]
TRANSLATED = ["mean", "coordinate median", "trimmed mean", "krum", "multi-krum", "bulyan"]


def drawn(seed: int = 0) -> torch.Tensor:
    """Updates that agree in part."""
    draw = torch.Generator().manual_seed(seed)
    common = torch.randn(SIZE, generator=draw, dtype=torch.float64)
    return common + 0.5 * torch.randn(WORKERS, SIZE, generator=draw, dtype=torch.float64)


@pytest.fixture(params=MEMBERS, ids=str)
def rule(request: pytest.FixtureRequest) -> RobustMean:
    return MEMBERS[request.param]


def test_equal_updates_give_themselves(rule: RobustMean) -> None:
    row = drawn()[0]
    torch.testing.assert_close(rule(row.expand(WORKERS, SIZE)), row)


def test_the_order_of_the_workers_does_not_matter(rule: RobustMean) -> None:
    rows = drawn()
    order = torch.randperm(WORKERS, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(rule(rows[order]), rule(rows))


@pytest.mark.parametrize("factor", [1e-4, 1e4, -1.0])
def test_follows_the_unit(rule: RobustMean, factor: float) -> None:
    rows = drawn()
    torch.testing.assert_close(rule(factor * rows), factor * rule(rows))


@pytest.mark.parametrize("name", TRANSLATED)
def test_follows_the_origin(name: str) -> None:
    rows = drawn()
    torch.testing.assert_close(MEMBERS[name](rows + 1e3), MEMBERS[name](rows) + 1e3)


@pytest.mark.parametrize("name", ROBUST)
def test_two_wrong_workers_do_no_harm(name: str) -> None:
    rows = drawn()
    spoilt = rows.clone()
    spoilt[[3, 7]] = 1e6 * torch.randn(2, SIZE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    truth = rows.mean(0)
    got = MEMBERS[name](spoilt)
    assert torch.cosine_similarity(got, truth, dim=0) > 0.9
    assert 0.4 < got.norm() / truth.norm() < 1.6
    assert torch.cosine_similarity(plain_mean(spoilt), truth, dim=0) < 0.5


def test_types(rule: RobustMean) -> None:
    rows = drawn()
    assert rule(rows).dtype == torch.float64
    torch.testing.assert_close(rule(rows.float()), rule(rows).float(), rtol=1e-4, atol=1e-5)
    half = rule(rows.bfloat16())
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()


def test_the_updates_are_left_alone(rule: RobustMean) -> None:
    rows = drawn()
    before = rows.clone()
    rule(rows)
    assert torch.equal(rows, before)


def test_wrong_updates_are_refused_by_name(rule: RobustMean) -> None:
    rows = drawn()
    for wrong in (rows[0], rows[:0], rows[None], *(rows.index_fill(1, torch.tensor([2]), v) for v in (np.nan, np.inf))):
        with pytest.raises(ValueError, match="updates must be"):
            rule(wrong)
    for wrong in (rows.long(), "updates"):
        with pytest.raises(TypeError, match="updates must be"):
            rule(wrong)
