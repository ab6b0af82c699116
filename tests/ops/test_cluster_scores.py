from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score, balanced_accuracy_score, normalized_mutual_info_score
from torch import Tensor

from trimtab.ops.cluster_scores import ari, cluster_accuracy, matched_classes, nmi


def draw(seed: int, n: int = 40, classes: int = 4, clusters: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(classes, (n,), generator=generator), torch.randint(clusters, (n,), generator=generator)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 5))
def test_agrees_with_scikit_learn(seed: int, classes: int, clusters: int) -> None:
    y, c = draw(seed, 30, classes, clusters)
    assert nmi(y, c) == pytest.approx(normalized_mutual_info_score(y, c), abs=1e-9)
    assert ari(y, c) == pytest.approx(adjusted_rand_score(y, c), abs=1e-9)


@pytest.mark.parametrize(("classes", "clusters"), [(4, 4), (3, 5), (5, 3)])
def test_accuracy_is_that_of_the_best_of_all_matches(classes: int, clusters: int) -> None:
    y, c = draw(1, 40, classes, clusters)
    size = max(classes, clusters)
    best = max(
        float((torch.tensor(order)[c] == y).float().mean()) for order in itertools.permutations(range(size), size)
    )
    assert cluster_accuracy(y, c) == pytest.approx(best)
    assert float((matched_classes(y, c) == y).float().mean()) == pytest.approx(best)


def test_balanced_accuracy_is_the_mean_of_the_classes() -> None:
    y, c = draw(2)
    y[:25] = 0
    found = matched_classes(y, c)
    assert cluster_accuracy(y, c, balanced=True) == pytest.approx(balanced_accuracy_score(y, found))


@pytest.mark.parametrize("score", [cluster_accuracy, nmi, ari])
def test_names_and_order_do_not_matter(score: Callable[[Tensor, Tensor], float]) -> None:
    y, c = draw(3)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    renamed = torch.tensor([17, -5, 3, 100])
    assert score(y[order], renamed[c[order]]) == pytest.approx(score(y, c))
    assert score(renamed[y].numpy(), c.to(torch.int32)) == pytest.approx(score(y, c))
    assert score(y, y + 9) == pytest.approx(1.0)


def test_single_clusters_and_single_samples() -> None:
    one = torch.zeros(4, dtype=torch.int64)
    assert nmi(one, one) == ari(one, one) == cluster_accuracy(one, one) == 1.0
    assert nmi(torch.arange(4), one) == 0.0
    assert ari(torch.arange(4), torch.arange(4)) == 1.0
    assert ari(torch.arange(4), one) == 0.0
    assert nmi(one[:1], one[:1]) == ari(one[:1], one[:1]) == 1.0
    assert cluster_accuracy(torch.arange(4), one) == 0.25


@pytest.mark.parametrize("score", [cluster_accuracy, nmi, ari, matched_classes])
def test_bad_input_is_refused_by_name(score: Callable[[Tensor, Tensor], object]) -> None:
    y, c = draw(0)
    with pytest.raises(ValueError, match="as many"):
        score(y, c[1:])
    with pytest.raises(ValueError, match="at least one"):
        score(y[:0], c[:0])
    with pytest.raises(TypeError, match="clusters must be integers"):
        score(y, c.float())
    with pytest.raises(ValueError, match="classes must be a vector"):
        score(y[:, None], c)
    with pytest.raises(TypeError, match="classes must be a tensor or a NumPy array"):
        score(y.tolist(), c)  # type: ignore[arg-type]
    assert np.isfinite(cluster_accuracy(y, c))
