"""Studies and tasks found by name, and put together into comparisons."""

import math

import pytest

from trimtab.catalog import UnknownPaperError
from trimtab.studies import library, report
from trimtab.studies.outcome import Outcome, write_json
from trimtab.studies.store import Run, RunKey
from trimtab.studies.study import Arm, Claim, Curve, Metric, Result, Study, Trial
from trimtab.studies.tasks.label_noise import LabelNoise


def test_unknown_names():
    with pytest.raises(UnknownPaperError, match="did you mean 'elr'"):
        library.find_study("elrr")
    with pytest.raises(library.NoStudyError, match="no study yet"):
        library.find_study("wgsef")
    with pytest.raises(library.UnknownTaskError, match="did you mean 'label-noise'"):
        library.find_task("label noise")


def test_variants_from_text():
    assert library.variant(LabelNoise, {}) == LabelNoise()
    assert library.variant(LabelNoise, {"rate": "0.2", "kind": "asymmetric"}) == LabelNoise(kind="asymmetric", rate=0.2)
    for settings, named in (({"rte": "1"}, "rte"), ({"rate": "x"}, "rate"), ({"kind": "odd"}, "kind")):
        with pytest.raises(ValueError, match=named):
            library.variant(LabelNoise, settings)


def test_contestants_are_moved_to_the_variant_and_stand_once():
    task = LabelNoise(rate=0.2)
    arms = library.contestants(task, ["elr", "ldr"])
    assert all(arm.task == task for _, arm in arms.values())
    assert arms["cross-entropy"][0] == "", "a baseline belongs to no paper"
    assert arms["ELR"][0] == "elr"
    assert next(iter(arms)) == "cross-entropy"


def test_a_study_must_name_its_arms():
    arm = Arm(lambda trial: Result({}))
    with pytest.raises(ValueError, match="no arm named b"):
        Study("elr", {"a": arm}, [Claim("a", beats="b", on="m")])
    with pytest.raises(ValueError, match="claims is empty"):
        Study("elr", {"a": arm}, [])
    with pytest.raises(ValueError, match="3 points"):
        Curve([1, 2, 3], [1, 2])


def test_trial_draws_by_its_seed():
    first, again, other = (Trial(seed=seed).generator(3).initial_seed() for seed in (1, 1, 2))
    assert first == again != other
    assert Trial(seed=1).generator(0).initial_seed() != Trial(seed=1).generator(1).initial_seed()
    assert Trial(budget="laptop").pick(smoke=1, laptop=2, paper=3) == 2


def runs(values, curve=()):
    return [
        Run(
            RunKey("a", seed, "smoke", "cpu", "c"),
            "who",
            Result({"m": value}, {"line": Curve([1, 2], [value, value + 1])} if curve else {}),
            1.0,
            {"torch": "2", "machine": "here"},
            float(seed),
        )
        for seed, value in enumerate(values)
    ]


def test_outcome_as_json(tmp_path):
    arm = Arm(lambda trial: Result({}))
    study = Study("elr", {"a": arm, "b": arm}, [Claim("a", beats="b", on="m", by=0.5)], log="x")
    outcome = Outcome(study, "smoke", {"a": runs([1.0, 2.0, 3.0], curve="yes"), "b": runs([0.0, 1.0, math.nan])})
    data = outcome.as_json()
    assert data["claims"][0]["verdict"] == "not shown"
    assert data["arms"]["b"]["metrics"]["m"] == [0.0, 1.0, None]
    assert data["arms"]["a"]["curves"]["line"]["y"] == [2.0, 3.0]
    assert (data["area"], data["test"], data["log"]) == ("losses", "tests/losses/test_elr.py", "x")
    write_json(data, tmp_path / "new" / "elr.json")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json({"value": math.nan}, tmp_path / "new" / "bad.json")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["elr.json"]


def test_numbers_in_tables():
    percent, plain = Metric("x", percent=True), Metric("y", best="min")
    assert report.mean_and_interval([0.5, 0.5, 0.5], percent) == "50.0 ± 0.0"
    assert report.mean_and_interval([12345.0], plain) == "12,345"
    assert report.mean_and_interval([math.nan], plain) == "–"
    held = {"a": runs([1.0, 1.0]), "b": runs([3.0, 3.0]), "c": runs([math.nan, math.nan])}
    assert report.ranked(held, {"m": Metric("m")}) == ["b", "a", "c"]
    assert report.ranked(held, {"m": Metric("m", best="min")}) == ["a", "b", "c"]
