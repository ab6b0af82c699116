"""Retrieval scores against their definitions, by loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.metric import map_at_r, recall_at_k


def ranked_matches(embeddings, labels):
    similarity = torch.nn.functional.normalize(embeddings, dim=1)
    similarity = similarity @ similarity.T
    for i in range(len(labels)):
        others = sorted((j for j in range(len(labels)) if j != i), key=lambda j: -similarity[i, j].item())
        matches = [bool(labels[j] == labels[i]) for j in others]
        if any(matches):
            yield matches


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), samples=st.integers(6, 30), k=st.integers(1, 5))
def test_scores_equal_their_definitions(seed, samples, k):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(samples, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (samples,), generator=generator)
    queries = list(ranked_matches(embeddings, labels))
    recall = sum(any(matches[:k]) for matches in queries) / len(queries)
    precision = 0.0
    for matches in queries:
        relevant = sum(matches)
        precision += sum(sum(matches[: i + 1]) / (i + 1) for i in range(relevant) if matches[i]) / relevant
    assert recall_at_k(embeddings, labels, k) == pytest.approx(recall)
    assert map_at_r(embeddings, labels) == pytest.approx(precision / len(queries))


def test_large_inputs_go_in_chunks():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2500) % 5
    embeddings = torch.eye(5)[labels] + 0.01 * torch.randn(2500, 5, generator=generator)
    assert recall_at_k(embeddings, labels) == 1
    assert map_at_r(embeddings, labels) == 1


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("k", lambda e, y: recall_at_k(e, y, 0)),
        ("k", lambda e, y: recall_at_k(e, y, 4)),
        ("labels", lambda e, y: recall_at_k(e, torch.arange(4))),
        ("labels", lambda e, y: map_at_r(e, torch.arange(4))),
        ("labels", lambda e, y: map_at_r(e, y[:3])),
        ("embeddings", lambda e, y: map_at_r(e * math.inf, y)),
    ],
)
def test_bad_arguments_are_named(name, call):
    with pytest.raises(ValueError, match=name):
        call(torch.ones(4, 2), torch.tensor([0, 0, 1, 1]))
