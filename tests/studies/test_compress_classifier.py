from __future__ import annotations

import copy

import pytest
import torch

from trimtab.compress import model_cost
from trimtab.studies.compress import gaqat
from trimtab.studies.engine.study import Trial
from trimtab.studies.tasks.compress_classifier import (
    CompressClassifier,
    Compression,
    four_bits,
    quarter_operations,
    two_bits,
)
from trimtab.studies.tools.compressing import (
    CompressionData,
    convolutions,
    filters_within,
    fine_tune,
    masks_within,
    thinner,
)

TRIAL = Trial(setting={"lr": 1e-3})


@pytest.fixture(scope="module")
def held() -> tuple[object, CompressionData]:
    images = four_bits.images(TRIAL)
    return four_bits.trained(images, TRIAL), CompressionData(images, 2, 32)


def test_images_are_disjoint_and_the_trained_network_is_the_same(held: tuple) -> None:
    model, data = held
    images = data.images
    rows = [{tuple(row.flatten().tolist()) for row in part} for part in (images.x, images.x_held, images.x_test)]
    assert not rows[0] & rows[1]
    assert not rows[0] & rows[2]
    assert not bool(images.wrong.any())
    again = four_bits.trained(images, TRIAL)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_targets_are_those_of_a_quantised_network(held: tuple) -> None:
    model, data = held
    layers = model_cost(model, data.sample[:1]).layers
    for task, bits, ends in ((four_bits, 4, 8), (two_bits, 2, 8), (quarter_operations, 16, 16)):
        target = task.target(model, data)
        widths = [ends, bits, bits, bits, ends]
        assert target.size == sum(layer.weights * w for layer, w in zip(layers, widths, strict=True))
        operations = sum(layer.dense_multiply_adds * w * w for layer, w in zip(layers, widths, strict=True))
        assert target.operations == pytest.approx(operations)
    assert target.operations == pytest.approx(model_cost(model, data.sample[:1]).operations / 4)


@pytest.mark.parametrize("task", [four_bits, two_bits, quarter_operations])
def test_references_meet_the_target_and_leave_the_model_alone(held: tuple, task: CompressClassifier) -> None:
    model, data = held
    target, before = task.target(model, data), copy.deepcopy(model.state_dict())
    for name, entrant in task.references().items():
        small = entrant.compress(model, data, target, TRIAL)
        spent = target.spent(model_cost(small, data.sample[:32]))
        assert 0.6 < spent <= 1 + 1e-6, name
        assert small(data.sample[:2]).shape == (2, 10)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_too_much_is_refused() -> None:
    with pytest.raises(ValueError, match=r"target's size, got 7\.\d+ times"):
        four_bits.run(TRIAL, Compression(compress=lambda model, data, target, trial: copy.deepcopy(model)))


def test_all_filters_are_the_model_and_some_are_a_part_of_it(held: tuple) -> None:
    model, data = held
    x = data.sample[:8]
    whole = [torch.arange(layer.out_channels) for layer in convolutions(model)]
    torch.testing.assert_close(thinner(model, whole)(x), model(x))
    silent = copy.deepcopy(model)
    with torch.no_grad():  # filters without weight and shift give nothing, so that leaving them out changes nothing
        for layer, norm in ((silent.features[3], silent.features[4]), (silent.features[9], silent.features[10])):
            layer.weight[::2] = 0
            norm.bias[::2] = -norm.weight[::2].abs() * norm.running_mean[::2].abs() - 1
            norm.running_mean[::2] = 0
    kept = [index[1::2] if n in (1, 3) else index for n, index in enumerate(whole)]
    small = thinner(silent, kept)
    torch.testing.assert_close(small.eval()(x), silent.eval()(x))
    assert small.features[3].weight.shape[0] == 12


def test_scores_decide_what_is_kept(held: tuple) -> None:
    model, data = held
    target = four_bits.target(model, data)
    scores = [
        torch.rand(layer.out_channels, generator=torch.Generator().manual_seed(0)) for layer in convolutions(model)
    ]
    for index, score in zip(filters_within(target, model, data, scores), scores, strict=True):
        dropped = torch.ones(len(score), dtype=torch.bool)
        dropped[index] = False
        assert score[index].min() > score[dropped].max()
    weights = [torch.rand_like(p) for p in model.parameters() if p.dim() > 1]
    masks = masks_within(target, model, data, weights)
    kept, lost = (torch.cat([w[m == on] for w, m in zip(weights, masks, strict=True)]) for on in (1, 0))
    assert kept.min() >= lost.max()


def test_fine_tuning_takes_the_steps_that_it_may(held: tuple) -> None:
    model, data = held
    seen: list[int] = []
    small = copy.deepcopy(model)
    fine_tune(small, data, TRIAL, after_step=seen.append, steps=99)
    assert seen == [0, 1]
    assert not small.training
    other = copy.deepcopy(model)
    torch.manual_seed(5)
    fine_tune(other, data, TRIAL)
    assert all(torch.equal(a, b) for a, b in zip(small.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("task", [four_bits, two_bits, quarter_operations])
def test_gaqat_meets_the_target_in_as_many_passes_as_others(held: tuple, task: CompressClassifier) -> None:
    model, data = held
    passes: list[int] = []
    longer = CompressionData(data.images, 8, 32)
    target, before = task.target(model, data), copy.deepcopy(model.state_dict())

    class Counting(type(model)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            passes.append(len(x)) if self.training else None
            found: torch.Tensor = super().forward(x)
            return found

    watched = copy.deepcopy(model)
    watched.__class__ = Counting
    small = gaqat.by_two_gradients(watched, longer, target, TRIAL)
    assert passes[:8] == [32] * 8
    assert all(count != 32 for count in passes[8:])  # the statistics, taken anew
    assert 0.6 < target.spent(model_cost(small, data.sample[:32])) <= 1 + 1e-6
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
