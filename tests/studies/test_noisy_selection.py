"""The task whose arms share searches: what is kept changes no number."""

import pytest
import torch

from trimtab.studies.library import find_study
from trimtab.studies.study import Trial
from trimtab.studies.tasks.noisy_selection import Bench, NoisySelection, Trained

ARMS = find_study("nested_dropout").arms


def numbers(name, artifacts):
    metrics = ARMS[name](Trial(seed=1, artifacts=artifacts)).metrics
    return [value for metric, value in metrics.items() if metric != "seconds"]


@pytest.mark.parametrize("name", ["nested dropout", "nested Co-teaching"])
def test_kept_searches_change_no_number(name, tmp_path):
    first = numbers(name, tmp_path)
    assert list(tmp_path.iterdir())
    assert numbers(name, tmp_path) == pytest.approx(first, nan_ok=True)


def test_global_random_state_does_not_matter():
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        found.append(numbers("Dropout", None))
    assert found[0] == pytest.approx(found[1], nan_ok=True)


def test_the_best_setting_on_held_out_images_is_taken():
    asked = []

    def method(bench: Bench, setting: tuple[float, ...]) -> Trained:
        asked.append(setting)
        right = torch.nn.functional.one_hot(bench.y_held, bench.num_classes).float()

        def predict(x: torch.Tensor) -> torch.Tensor:
            held = len(x) == len(right)
            return right if held and setting == (2.0,) else torch.zeros(len(x), bench.num_classes)

        return Trained(predict, 0.0)

    result = NoisySelection().train(method, ((1.0,), (2.0,), (3.0,)))(Trial(seed=0))
    assert asked == [(1.0,), (2.0,), (3.0,)]
    assert result.metrics["knob"] == 2.0
