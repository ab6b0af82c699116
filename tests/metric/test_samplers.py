"""P classes with K samples each."""

from __future__ import annotations

import pytest
import torch

from trimtab.metric import PKSampler


def test_batches_hold_p_classes_of_k_distinct_samples():
    labels = torch.tensor([3] * 30 + [8] * 20 + [11] * 50)
    sampler = PKSampler(labels, 2, 7, generator=torch.Generator().manual_seed(0))
    batches = list(sampler)
    assert len(batches) == len(sampler) == 100 // 14
    for batch in batches:
        assert len(set(batch)) == 14
        assert labels[batch].unique(return_counts=True)[1].tolist() == [7, 7]


def test_a_deck_is_dealt_out_before_any_sample_comes_again():
    labels = torch.zeros(12, dtype=torch.int64)
    batches = list(PKSampler(labels, 1, 4))
    assert sorted(index for batch in batches for index in batch) == list(range(12))


def test_generator_decides():
    labels = torch.arange(60) % 3
    first, second = (list(PKSampler(labels, 2, 5, generator=torch.Generator().manual_seed(4))) for _ in range(2))
    assert first == second
    assert first != list(PKSampler(labels, 2, 5, generator=torch.Generator().manual_seed(5)))


def test_serves_a_data_loader():
    labels = torch.arange(60) % 3
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(labels), batch_sampler=PKSampler(labels, 3, 4))
    assert [len(batch[0]) for batch in loader] == [12] * 5


@pytest.mark.parametrize(
    ("name", "error", "arguments"),
    [
        ("labels", TypeError, (torch.zeros(4), 1, 1)),
        ("labels", ValueError, (torch.zeros(0, dtype=torch.int64), 1, 1)),
        ("classes_per_batch", ValueError, (torch.arange(6) % 2, 3, 1)),
        ("samples_per_class", ValueError, (torch.arange(6) % 2, 2, 4)),
        ("samples_per_class", ValueError, (torch.arange(6) % 2, 2, 0)),
    ],
)
def test_bad_arguments_are_named(name, error, arguments):
    with pytest.raises(error, match=name):
        PKSampler(*arguments)
