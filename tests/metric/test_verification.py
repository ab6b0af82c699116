"""Verification scores: by hand, against scikit-learn, and against counting."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from trimtab.metric import auroc, equal_error_rate, pair_scores, tpr_at_far

SCORES = {"tpr_at_far": tpr_at_far, "equal_error_rate": equal_error_rate, "auroc": auroc}


@st.composite
def scored(draw) -> tuple[Tensor, Tensor]:
    """Similarities with ties, of both kinds."""
    number = st.integers(-20, 20).map(lambda value: value / 20)
    genuine = draw(st.lists(number, min_size=1, max_size=30))
    impostor = draw(st.lists(number, min_size=1, max_size=60))
    similarity = torch.tensor(genuine + impostor, dtype=torch.float64)
    order = torch.randperm(len(similarity), generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return similarity[order], (torch.arange(len(similarity)) < len(genuine))[order]


def test_every_pair_once():
    embeddings = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 2])
    similarity, same = pair_scores(embeddings, labels)
    expected = list(itertools.combinations(range(7), 2))
    assert len(similarity) == len(expected) == 21
    for cosine, is_same, (i, j) in zip(similarity, same, expected, strict=True):
        assert cosine.item() == pytest.approx(torch.cosine_similarity(embeddings[i], embeddings[j], dim=0).item())
        assert is_same.item() == (labels[i] == labels[j]).item()


@settings(max_examples=50, deadline=None)
@given(scored(), st.sampled_from([0.0, 0.01, 0.1, 0.29, 0.5, 1.0]))
def test_rate_is_the_best_of_all_thresholds_within_the_limit(pairs, far):
    similarity, same = pairs
    best = 0.0
    for threshold in [-math.inf, *similarity.tolist()]:
        accepted = similarity > threshold
        if accepted[~same].sum().item() <= far * (~same).sum().item() + 1e-9:
            best = max(best, accepted[same].double().mean().item())
    assert tpr_at_far(similarity, same, far) == pytest.approx(best)


@settings(max_examples=50, deadline=None)
@given(scored())
def test_auroc_equals_scikit_learn(pairs):
    similarity, same = pairs
    assert auroc(similarity, same) == pytest.approx(roc_auc_score(same.numpy(), similarity.numpy()))


@settings(max_examples=50, deadline=None)
@given(scored())
def test_equal_error_rate_is_where_the_rates_of_scikit_learn_meet(pairs):
    similarity, same = pairs
    fpr, tpr, _ = roc_curve(same.numpy(), similarity.numpy(), drop_intermediate=False)
    gaps = abs((1 - tpr) - fpr)[1:]
    candidates = ((1 - tpr) + fpr)[1:][gaps <= gaps.min() + 1e-12] / 2
    assert min(abs(candidates - equal_error_rate(similarity, same))) < 1e-9


def test_separated_and_reversed_pairs():
    similarity, same = torch.tensor([0.9, 0.8, 0.1, 0.2]), torch.tensor([True, True, False, False])
    assert (tpr_at_far(similarity, same, 0.0), equal_error_rate(similarity, same), auroc(similarity, same)) == (1, 0, 1)
    assert (tpr_at_far(-similarity, same, 0.0), auroc(-similarity, same)) == (0, 0)


def test_a_tie_with_the_threshold_is_not_accepted():
    assert tpr_at_far(torch.tensor([0.5, 0.5]), torch.tensor([True, False]), far=0.0) == 0


@pytest.mark.parametrize("name", SCORES)
def test_bad_pairs_are_named(name):
    score = SCORES[name]
    similarity, same = torch.tensor([0.1, 0.2]), torch.tensor([True, False])
    with pytest.raises(TypeError, match="similarity"):
        score(similarity.int(), same)
    with pytest.raises(TypeError, match="same"):
        score(similarity, same.int())
    for spoilt, kind in (
        (similarity[:1], "same"),
        (similarity * math.nan, "similarity"),
        (similarity[None], "similarity"),
    ):
        with pytest.raises(ValueError, match=kind):
            score(spoilt, same)
    for one_kind in (torch.ones(2), torch.zeros(2)):
        with pytest.raises(ValueError, match="both kinds"):
            score(similarity, one_kind.bool())


@pytest.mark.parametrize("far", [-0.1, 1.1, math.nan])
def test_a_rate_outside_its_range_is_refused(far):
    with pytest.raises(ValueError, match="far"):
        tpr_at_far(torch.tensor([0.1, 0.2]), torch.tensor([True, False]), far)


@pytest.mark.parametrize("far", [0.29, 0.57, 0.58])
def test_a_rate_counts_the_pairs_that_it_means(far) -> None:
    """Each of these times 100 is just below a whole number in floating point."""
    accepted = round(100 * far)
    assert int(100 * far) == accepted - 1
    impostor = torch.arange(100, dtype=torch.float64)
    genuine = torch.tensor([99.5 - accepted, 98.5 - accepted], dtype=torch.float64)
    same = torch.arange(102) >= 100
    assert tpr_at_far(torch.cat([impostor, genuine]), same, far) == 0.5
