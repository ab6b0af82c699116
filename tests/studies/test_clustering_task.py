from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trimtab.studies.engine.study import Trial
from trimtab.studies.tasks.clustering import Clustering, ImageClustering, Sample, digits, long_tail, unknown_number
from trimtab.studies.tools import deep_clustering
from trimtab.studies.tools.deep_clustering import codes, dec, k_means, pretrained


def test_balanced_classes_have_as_many_images_each() -> None:
    sample, classes = digits.sample(Trial(budget="laptop"))
    assert torch.equal(torch.bincount(classes), torch.full((10,), 150))
    assert sample.x.shape == (1500, 64)
    assert sample.images.shape == (1500, 1, 8, 8)
    assert 0 <= float(sample.x.min()) < float(sample.x.max()) <= 1
    assert sample.num_clusters == 10
    assert len(sample.x.unique(dim=0)) > 1490  # drawn without replacement


def test_a_long_tail_falls_geometrically_and_seeds_change_which_class_is_rare() -> None:
    found = [torch.bincount(long_tail.sample(Trial(seed, "laptop"))[1]) for seed in range(3)]
    for counts in found:
        ordered = counts.sort(descending=True).values
        assert ordered[0] == 170
        assert ordered[-1] == 17
        torch.testing.assert_close(ordered[1:] / ordered[:-1], torch.full((9,), 0.1 ** (1 / 9)), rtol=0.05, atol=0)
    assert len({int(counts.argmax()) for counts in found}) > 1


def test_a_seed_draws_the_same_images_and_they_are_in_no_order() -> None:
    first, second, other = (digits.sample(Trial(seed)) for seed in (0, 0, 1))
    assert torch.equal(first[0].x, second[0].x)
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0].x, other[0].x)
    assert (first[1][1:] != first[1][:-1]).float().mean() > 0.5


def test_more_clusters_than_classes_may_be_allowed() -> None:
    assert unknown_number.sample(Trial())[0].num_clusters == 20


def test_clusters_of_the_classes_score_one_and_a_single_one_scores_little() -> None:
    _, classes = digits.sample(Trial())
    whole = digits.run(Trial(), Clustering(fit=lambda sample: (classes + 3) % 10)).metrics
    assert whole["accuracy"] == whole["balanced_accuracy"] == whole["ari"] == 1.0
    assert whole["nmi"] == pytest.approx(1.0)
    assert whole["clusters"] == 10
    one = digits.run(Trial(), Clustering(fit=lambda sample: torch.zeros(len(sample.x), dtype=torch.int64))).metrics
    assert one["accuracy"] == pytest.approx(0.1, abs=0.02)
    assert one["nmi"] == one["ari"] == 0.0


def test_the_autoencoder_is_trained_once_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample, _ = digits.sample(Trial(artifacts=tmp_path))
    first = sample.autoencoder()
    monkeypatch.setattr(deep_clustering, "DEPICT", None)  # so that none can be trained again
    second = sample.autoencoder()
    assert torch.equal(codes(first, sample.x), codes(second, sample.x))
    assert codes(first, sample.x).abs().max() <= 1


def test_dec_clusters_copies_what_it_starts_from_and_draws_from_its_generator() -> None:
    sample, _ = digits.sample(Trial())
    autoencoder = pretrained(sample.x, sample.trial, sample.key)
    before = codes(autoencoder, sample.x)
    found = [dec(autoencoder, sample.x, 10, epochs=3, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(codes(autoencoder, sample.x), before)
    assert len(found[0].unique()) > 3
    labels, centers = k_means(before, 10, 0)
    assert centers.shape == (10, deep_clustering.CODE)
    assert torch.equal(torch.cdist(before, centers).argmin(1), labels)


@pytest.mark.parametrize("options", [{"tail": 0.5}, {"spare": 0.0}, {"tail": float("inf")}])
def test_bad_variants_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        ImageClustering(**options)  # type: ignore[arg-type]


def test_a_sample_knows_its_seed() -> None:
    sample = Sample(torch.zeros(2, 4), 2, 1, Trial(7), "nothing")
    assert sample.seed == 7
