"""Two contestants have one identity when they are the same, whoever names them and wherever they stand."""

import functools
from dataclasses import replace

import pytest
import torch

from trimtab import data
from trimtab.studies.engine import identity
from trimtab.studies.engine.contestants import Contestant
from trimtab.studies.engine.identity import describe
from trimtab.studies.tasks.label_noise import LabelNoise, symmetric
from trimtab.studies.tools.training import Training

RATE = 0.5


def job(entrant: Training, task: LabelNoise = symmetric, name: str = "somebody", paper: str = "", seed: int = 0):
    return Contestant(name, paper, task, entrant).job(seed, {"lr": 0.1}, "smoke", "cpu").key


def smoothed(by: float) -> Training:
    return Training(loss=lambda plan: torch.nn.CrossEntropyLoss(label_smoothing=by))


def test_names_papers_and_grids_do_not_matter_and_what_decides_numbers_does():
    plain = job(Training())
    assert plain == job(Training(), LabelNoise(rate=0.4), "another", "elr")
    assert plain == job(Training(search={"lr": (0.1, 0.2)}, requires=("torch",)))
    assert plain.arm != job(Training(), LabelNoise(rate=0.2)).arm
    assert plain.arm != job(smoothed(0.1)).arm
    assert plain.sources == job(Training(), LabelNoise(rate=0.2)).sources
    assert Contestant("a", "", symmetric, Training()).job(0, {"lr": 0.2}, "smoke", "cpu").key.arm != plain.arm


def test_a_try_of_a_setting_is_another_run_than_a_result():
    who = Contestant("a", "", symmetric, Training())
    assert who.job(0, {}, "smoke", "cpu", searching=True).key != who.job(0, {}, "smoke", "cpu").key


def test_lambdas_are_known_by_their_text_and_what_they_capture():
    assert job(smoothed(0.1)) == job(smoothed(0.1))
    assert job(smoothed(0.1)) != job(smoothed(0.2))
    first = [describe(lambda plan, s=s: torch.nn.CrossEntropyLoss(label_smoothing=s)) for s in (0.1, 0.2)]
    assert first[0] != first[1]


def test_layout_does_not_matter():
    one = lambda plan: torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    other = lambda plan: torch.nn.CrossEntropyLoss(
        label_smoothing=0.1
    )  # fmt: skip
    assert describe(one) == describe(other)


def test_partials_functions_and_values():
    part = functools.partial(torch.optim.SGD, lr=0.1)
    assert describe(part) == describe(functools.partial(torch.optim.SGD, lr=0.1))
    assert describe(part) != describe(functools.partial(torch.optim.SGD, lr=0.2))
    assert describe({1, 2, 3}) == describe({3, 2, 1})
    assert describe([1]) != describe((1,))


def test_a_module_that_becomes_a_package_keeps_its_names(monkeypatch):
    before = job(Training())
    monkeypatch.setattr(LabelNoise, "__module__", "trimtab.studies.tasks.label_noise.wrong_labels")
    assert describe(symmetric).startswith("trimtab.studies.tasks.label_noise:LabelNoise(")
    assert job(Training()).arm == before.arm
    monkeypatch.setattr(LabelNoise, "__module__", "trimtab.studies.tasks.other")
    assert job(Training()).arm != before.arm


def test_an_object_has_no_stable_text():
    with pytest.raises(TypeError, match="factory"):
        describe(torch.nn.Linear(1, 1))


def test_data_count_by_what_is_in_them(monkeypatch):
    digits = data.load("digits")
    first = identity.data_hash("digits")
    held = {"name": digits}
    monkeypatch.setattr(data, "load", lambda name: held["name"])

    def hashed(changed):
        held["name"] = changed
        identity.data_hash.cache_clear()
        return identity.data_hash("digits")

    assert hashed(replace(digits, source="somewhere else")) == first
    other = digits.x_train.clone()
    other[0, 0, 0, 0] += 1.0
    assert hashed(replace(digits, x_train=other)) != first
    assert hashed(digits) == first
    identity.data_hash.cache_clear()
