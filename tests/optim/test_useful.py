"""USEFUL against the sets it must find, its invariances, and a sampler's contract."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from trimtab.optim import USEFUL, EarlyOutputs, UpsampledSampler, collect_outputs, find_separating_epoch


def blobs(seed=0, per_class=20, classes=3):
    """Two tight groups of outputs in each class; those nearer to zero have the larger loss."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(per_class)
    slow = torch.rand(len(labels), generator=generator) < 0.3
    slow[::per_class], slow[1::per_class] = True, False
    outputs = torch.where(slow, 0.5, 6.0)[:, None] * F.one_hot(labels, classes)
    outputs = outputs + 0.1 * torch.randn(outputs.shape, generator=generator)
    return EarlyOutputs(outputs, labels, F.cross_entropy(outputs, labels, reduction="none")), slow


@given(seed=st.integers(0, 99), classes=st.integers(2, 5))
@settings(max_examples=10, deadline=None)
def test_finds_the_slow_group_of_each_class(seed, classes):
    early, slow = blobs(seed, classes=classes)
    assert torch.equal(USEFUL().fit(*early).slow_mask_, slow)


def test_the_slow_group_is_the_one_of_higher_loss_wherever_its_outputs_lie():
    early, slow = blobs()
    assert torch.equal(USEFUL().fit(early.outputs, early.labels, -early.losses).slow_mask_, ~slow)


def test_groups_are_found_within_classes():
    """Over all classes together, two groups would part the classes and not the examples of a class."""
    generator = torch.Generator().manual_seed(0)
    labels, slow = torch.tensor([0, 1]).repeat_interleave(20), torch.arange(40) % 4 == 0
    outputs = (100.0 * labels + slow)[:, None] + 0.01 * torch.randn(40, 1, generator=generator)
    assert torch.equal(USEFUL().fit(outputs, labels, slow.float()).slow_mask_, slow)


def test_with_more_groups_all_but_the_fastest_are_repeated():
    outputs = torch.tensor([0.0, 0.1, 5.0, 5.1, 9.0, 9.1])[:, None]
    found = USEFUL(n_clusters=3).fit(outputs, torch.zeros(6, dtype=torch.int64), torch.tensor([1.0, 1, 0, 0, 3, 3]))
    assert found.indices_.tolist() == [0, 0, 1, 1, 2, 3, 4, 4, 5, 5]


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_each_fast_example_stands_once_and_each_slow_one_factor_times(factor):
    early, slow = blobs()
    found = USEFUL(factor=factor).fit(*early)
    assert len(found.indices_) == len(slow) + (factor - 1) * slow.sum()
    assert torch.equal(found.indices_.bincount(), torch.where(slow, factor, 1))


def test_class_sizes_grow_by_the_slow_examples():
    early, slow = blobs()
    found = USEFUL().fit(*early)
    assert torch.equal(early.labels[found.indices_].bincount(), early.labels.bincount() + early.labels[slow].bincount())


def test_names_of_classes_and_order_of_examples_do_not_matter():
    early, _ = blobs()
    mask = USEFUL().fit(*early).slow_mask_
    renamed = torch.tensor([7, -1, 3])[early.labels]
    assert torch.equal(USEFUL().fit(early.outputs, renamed, early.losses).slow_mask_, mask)
    order = torch.randperm(len(mask))
    assert torch.equal(USEFUL().fit(*(values[order] for values in early)).slow_mask_, mask[order])


def test_same_seed_same_examples_where_groups_are_not_clear():
    generator = torch.Generator().manual_seed(0)
    early = torch.randn(60, 5, generator=generator), torch.arange(60) % 3, torch.rand(60, generator=generator)
    first, second = (USEFUL(n_clusters=4, n_init=1, random_state=3).fit(*early).slow_mask_ for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("convert", [torch.Tensor.half, torch.Tensor.double, torch.Tensor.numpy])
def test_takes_any_precision_and_arrays(convert):
    early, slow = blobs()
    found = USEFUL().fit(convert(early.outputs), early.labels.numpy(), convert(early.losses))
    assert torch.equal(found.slow_mask_, slow)


def test_a_class_without_groups_is_left_alone():
    early, slow = blobs()
    early.outputs[early.labels == 1] = 1.0
    with pytest.warns(UserWarning, match="class 1 is not repeated") as caught:
        found = USEFUL().fit(*early)
    assert caught[0].filename == __file__
    assert torch.equal(found.slow_mask_, slow & (early.labels != 1))


def test_two_distinct_outputs_and_three_groups():
    """The group that stays empty is not taken for the fastest."""
    outputs, losses = torch.tensor([0.0, 0, 1, 1])[:, None], torch.tensor([1.0, 1, 2, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's, about the empty group
        found = USEFUL(n_clusters=3).fit(outputs, torch.zeros(4, dtype=torch.int64), losses)
    assert found.slow_mask_.tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("change", "error", "argument"),
    [
        (lambda o, y, v: (o, y.float(), v), TypeError, "labels"),
        (lambda o, y, v: (o[0], y, v), ValueError, "outputs"),
        (lambda o, y, v: (o[:0], y[:0], v[:0]), ValueError, "outputs"),
        (lambda o, y, v: (o, y[1:], v), ValueError, "labels"),
        (lambda o, y, v: (o, y, v[1:]), ValueError, "losses"),
        (lambda o, y, v: (o * torch.nan, y, v), ValueError, "outputs"),
        (lambda o, y, v: (o, y, v / 0), ValueError, "losses"),
        (lambda o, y, v: (o, y.index_fill(0, torch.tensor(0), 9), v), ValueError, "got 1 of class 9"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, argument):
    early, _ = blobs()
    with pytest.raises(error, match=argument):
        USEFUL().fit(*change(*early))


@pytest.mark.parametrize(("argument", "value"), [("n_clusters", 1), ("factor", 0), ("n_init", 0)])
def test_arguments_out_of_range_are_named(argument, value):
    with pytest.raises(ValueError, match=argument):
        USEFUL(**{argument: value})


def test_unfitted():
    with pytest.raises(RuntimeError, match="fit"):
        USEFUL().sampler()


# --- the changed data ---


@pytest.fixture
def fitted():
    return USEFUL().fit(*blobs()[0])


def test_loader_over_the_sampler_sees_the_changed_data(fitted):
    data = TensorDataset(torch.arange(60))
    for loader in (
        DataLoader(data, batch_size=7, sampler=fitted.sampler()),
        DataLoader(fitted.subset(data), batch_size=7, shuffle=True),
    ):
        seen = torch.cat([batch for (batch,) in loader])
        assert torch.equal(seen.sort().values, fitted.indices_)
        assert not torch.equal(seen, fitted.indices_)


def test_two_ranks_share_the_changed_data(fitted):
    subset = fitted.subset(TensorDataset(torch.arange(60)))
    ranks = [DistributedSampler(subset, num_replicas=2, rank=rank, drop_last=True) for rank in range(2)]
    seen = [subset[i][0].item() for sampler in ranks for i in sampler]
    missing = torch.tensor(seen).bincount(minlength=60) - fitted.indices_.bincount(minlength=60)
    assert missing.abs().sum() == len(subset) % 2


def test_passes_differ_and_a_generator_decides_them(fitted):
    def passes():
        sampler = fitted.sampler(generator=torch.Generator().manual_seed(1))
        return [list(sampler) for _ in range(2)]

    first, second = passes(), passes()
    assert first == second
    assert first[0] != first[1]


def test_a_resumed_training_sees_the_epoch_it_would_have_seen(fitted):
    def epoch(number, seed=1, before=0):
        sampler = fitted.sampler(generator=torch.Generator().manual_seed(seed))
        for _ in range(before):
            list(sampler)
        sampler.set_epoch(number)
        return list(sampler)

    assert epoch(3) == epoch(3, before=2)
    assert epoch(3) != epoch(4)
    assert epoch(3) != epoch(3, seed=2)


def test_short_passes_keep_the_number_of_iterations(fitted):
    sampler = fitted.sampler(num_samples=60)
    drawn = torch.tensor(list(sampler))
    assert len(sampler) == len(drawn) == 60
    assert (drawn.bincount(minlength=60) <= fitted.indices_.bincount(minlength=60)).all()


@pytest.mark.parametrize("num_samples", [0, 4])
def test_length_of_a_pass_is_checked(num_samples):
    with pytest.raises(ValueError, match="num_samples"):
        UpsampledSampler(torch.arange(3), num_samples)
    with pytest.raises(ValueError, match="indices"):
        UpsampledSampler(torch.arange(0))


# --- when to look, and what is seen ---


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_separating_epoch_is_the_elbow(scale):
    steep, flat = [0.9, 0.7, 0.5, 0.3, 0.1], [0.09, 0.08, 0.07, 0.06]
    assert find_separating_epoch([scale * error for error in steep + flat]) == 4


@given(rate=st.floats(0.05, 3.0), length=st.integers(5, 40))
@settings(max_examples=30, deadline=None)
def test_separating_epoch_of_exponential_decay(rate, length):
    """There the slope passes its mean, at a place known in closed form."""
    times = torch.arange(length, dtype=torch.float64)
    found = find_separating_epoch((-rate * times).exp().tolist())
    mean_slope = (1 - torch.exp(-rate * times[-1])) / (length - 1)
    assert abs(found - (rate / mean_slope).log() / rate) < 1


@pytest.mark.parametrize("errors", [[0.5, 0.4], [0.5, float("nan"), 0.1], [0.9, 0.6, 0.3], [0.9, 0.8, 0.1]])
def test_curves_without_an_elbow_are_refused(errors):
    with pytest.raises(ValueError, match="train_errors"):
        find_separating_epoch(errors)


def test_outputs_are_collected_in_order_and_in_eval_mode():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 4))
    model[0].eval()
    x, y, kept = torch.randn(10, 3), torch.arange(10) % 4, {k: v.clone() for k, v in model.state_dict().items()}
    early = collect_outputs(model, DataLoader(TensorDataset(torch.arange(10), x, y), batch_size=4))
    assert [module.training for module in model] == [False, True, True]
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())
    expected = model.eval()(x)
    torch.testing.assert_close(early.outputs, expected)
    assert not early.outputs.requires_grad
    assert torch.equal(early.labels, y)
    torch.testing.assert_close(early.losses, F.cross_entropy(expected, y, reduction="none"))


def test_a_loader_that_shuffles_or_holds_nothing_is_refused():
    data = TensorDataset(torch.randn(4, 3), torch.arange(4))
    with pytest.raises(ValueError, match="loader must keep the data"):
        collect_outputs(nn.Linear(3, 4), DataLoader(data, shuffle=True))
    with pytest.raises(ValueError, match="loader must hold a batch"):
        collect_outputs(nn.Linear(3, 4), [])


class TestALoaderThatDoesNotKeepTheOrder:
    data = TensorDataset(torch.eye(4), torch.arange(4))

    @pytest.mark.parametrize(
        "sampler",
        [
            torch.utils.data.RandomSampler(range(4)),
            torch.utils.data.SubsetRandomSampler(range(4)),
            torch.utils.data.WeightedRandomSampler([1.0] * 4, 4),
            UpsampledSampler(torch.arange(4)),
        ],
    )
    def test_every_sampler_that_shuffles_is_refused(self, sampler):
        batches = torch.utils.data.BatchSampler(sampler, 2, drop_last=False)
        for loader in (DataLoader(self.data, 2, sampler=sampler), DataLoader(self.data, batch_sampler=batches)):
            with pytest.raises(ValueError, match="shuffle=False"):
                collect_outputs(nn.Identity(), loader)

    def test_one_that_drops_the_last_batch_is_refused(self):
        with pytest.raises(ValueError, match="drop_last=False"):
            collect_outputs(nn.Identity(), DataLoader(self.data, 3, drop_last=True))


@pytest.mark.parametrize(("epoch", "error"), [(-1, ValueError), (0.5, TypeError), (True, TypeError)])
def test_an_epoch_that_is_none_is_refused(epoch, error) -> None:
    with pytest.raises(error, match="epoch must be"):
        UpsampledSampler(torch.arange(4)).set_epoch(epoch)
