"""Outcomes: judged from what ran, written as small files, told in words."""

import json
import math
from dataclasses import replace

import pytest

from trimtab.studies.engine import report
from trimtab.studies.engine.contestants import Contestant
from trimtab.studies.engine.outcome import (
    board_json,
    board_path,
    contestants,
    run_study,
    stored_outcome,
    write_json,
)
from trimtab.studies.engine.plan import Plan
from trimtab.studies.engine.ran import Ran
from trimtab.studies.engine.store import Run, RunKey, Store
from trimtab.studies.engine.study import Claim, Curve, Experiment, Metric, Result, Study, Trial
from trimtab.studies.tasks.label_noise import pair_flip, symmetric
from trimtab.studies.tools.training import Training


def level(trial: Trial, at: float = 0.0) -> Result:
    return Result({"value": at + trial.seed / 100, "share": at / 10}, {"line": Curve([1, 2], [at, at + 1], "step")})


def better(trial: Trial) -> Result:
    return level(trial, 1.0)


metrics = {"value": Metric("height (m)"), "share": Metric("share (%)", best="min", percent=True)}


def toy(**changes) -> Study:
    arms = {"low": level, "high": better}
    options = {"requires": {}} | changes
    return Study(
        paper="elr",
        headline=Claim("high", beats="low", on="value", by=0.5),
        experiments=[Experiment("toy", arms, metrics, seeds={"smoke": 3, "laptop": 3, "paper": 3}, log="y", **options)],
        claims=[Claim("high", below="low", on="value"), Claim("low", at_most=0.5, on="value")],
    )


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "runs.sqlite") as kept:
        yield kept


PLAN = Plan("smoke", jobs=1)


def test_an_outcome_is_judged_and_told(store):
    outcome = run_study(toy(), store, PLAN)
    assert outcome.headline.word == "holds"
    assert [verdict.word for verdict in outcome.verdicts()] == ["fails", "holds"]
    result = outcome.as_json()
    assert result["headline"]["text"] == "The height is at least 0.5 m higher for high than for low"
    assert report.effect_sentence(result, result["headline"]) == "+1 m in the height over low, on all 3 seeds"
    assert report.effect_sentence(result, result["claims"][0]) == "+1 m in the height over low, on all 3 seeds"
    told = report.effect_sentence(result, result["claims"][1])
    assert told.startswith("height: 0.010 m where at most 0.5 m is claimed, ")
    assert report.claims_sentence(result) == "1 of 2 further claims holds"
    assert (result["area"], result["test"]) == ("losses", "tests/losses/test_elr.py")
    (venue,) = result["venues"]
    assert (venue["seeds"], venue["log"], venue["data"]) == (3, "y", [])
    assert venue["arms"]["high"]["curves"]["line"]["x_label"] == "step"


def test_what_is_stored_is_judged_without_running(store):
    assert stored_outcome(toy(), store, PLAN).ran == []
    run_study(toy(), store, PLAN)
    assert stored_outcome(toy(), store, PLAN).headline.word == "holds"


def test_who_cannot_run_is_skipped_by_name_and_its_claims_are_not_shown(store):
    outcome = run_study(toy(requires={"low": ("no_such_package",)}), store, PLAN)
    result = outcome.as_json()
    why = "it needs no_such_package, which is not installed"
    assert result["venues"][0]["skipped"] == {"low": why}
    assert list(result["venues"][0]["arms"]) == ["high"]
    assert (result["headline"]["verdict"], result["headline"]["reason"]) == ("not shown", f"low: {why}")
    assert report.effect_sentence(result, result["headline"]) == f"height: low: {why}"


def test_contestants_are_the_studys_own_and_the_references_that_claims_name():
    study = Study(
        paper="elr",
        entrants={"ELR": {symmetric: Training(), pair_flip: Training()}},
        on=[symmetric, pair_flip],
        headline=Claim("ELR", beats="cross-entropy", on="final_accuracy", at=replace(symmetric)),
    )
    held = [(who.name, who.paper, who.venue) for who in contestants(study)]
    assert held == [
        ("cross-entropy", "", symmetric),
        ("ELR", "elr", symmetric),
        ("ELR", "elr", pair_flip),
    ]


def ran(name: str, values: list[float], points: int = 3, paper: str = "") -> Ran:
    curve = Curve([float(x) for x in range(points)], [0.123456789] * points)
    runs = tuple(
        Run(
            RunKey("arm", seed, "laptop", "cpu", "code"),
            "who",
            Result({"final_accuracy": value}, {"line": curve}),
            1.0,
            {"torch": "2", "machine": "here"},
            float(seed),
        )
        for seed, value in enumerate(values)
    )
    return Ran(Contestant(name, paper, symmetric, Training()), runs, {"lr": 0.05}, ("lr",))


def test_a_board_is_in_order_with_standings(tmp_path):
    board = board_json(
        symmetric,
        [ran("a", [0.1, 0.2, 0.3]), ran("b", [0.8, 0.9, 0.8]), ran("c", [math.nan, 0.9, 0.9])],
        "laptop",
        {"d": "it is ill"},
    )
    assert list(board["arms"]) == list(board["standing"]) == ["b", "a", "c"]
    assert board["arms"]["c"]["metrics"]["final_accuracy"] == [None, 0.9, 0.9]
    assert board["standing"]["b"]["ahead"] == ("a", "c")
    assert board["skipped"] == {"d": "it is ill"}
    assert board["data"] == ["fashion_mnist"]
    path = board_path(pair_flip, tmp_path)
    assert path == tmp_path / "tasks" / "label-noise" / "pair-flip.json"
    write_json(board, board_path(symmetric, tmp_path))
    boards, problems = report.read_boards(tmp_path)
    assert (boards, problems) == ([json.loads(json.dumps(board))], [])


def test_a_board_that_is_none_is_set_aside_by_name(tmp_path):
    for name, text in (("one", "{"), ("two", "[]"), ("three", '{"task": "x"}')):
        path = tmp_path / "tasks" / "label-noise" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    boards, problems = report.read_boards(tmp_path)
    assert boards == []
    assert [any(name in problem for problem in problems) for name in ("one", "two", "three")] == [True] * 3


def test_curves_are_thinned_and_keep_their_ends():
    curve = ran("a", [0.1, 0.2], points=1001).mean_curve("line")
    assert len(curve["x"]) <= 201
    assert (curve["x"][0], curve["x"][-1]) == (0.0, 1000.0)
    assert curve["y"][0] == 0.12346


def test_files_are_written_whole_or_not_at_all(tmp_path):
    write_json({"values": [1.0, 2.0], "held": {"list": []}}, tmp_path / "new" / "elr.json")
    assert '"values": [1.0, 2.0]' in (tmp_path / "new" / "elr.json").read_text()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json({"value": math.nan}, tmp_path / "new" / "elr.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_json({}, tmp_path / "folder")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["elr.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "new"]


def claim(relation: str, effect: float, interval, **changes):
    held = {"venue": "v", "arm": "a", "other": "b", "on": "m", "relation": relation, "margin": 0.0, "ratio": False}
    return held | {"effect": effect, "interval": interval, "seeds": 5, "reason": ""} | changes


@pytest.mark.parametrize(
    ("metric", "held", "told"),
    [
        (
            ("final test accuracy (%)", "max", True),
            claim("beats", 0.156, [0.131, 0.182]),
            "+15.6 points of final test accuracy over b, 13.1 to 18.2, 5 seeds",
        ),
        (
            ("wrong labels memorised (%)", "min", True),
            claim("below", 0.577, [0.48, 0.674]),
            "−57.7 points in the share of wrong labels memorised against b, −67.4 to −48.0, 5 seeds",
        ),
        (
            ("time (s)", "min", False),
            claim("below", 3.0, [2.5, 3.5], ratio=True),
            "time shorter than for b by a factor of 3.00, 2.50 to 3.50, 5 seeds",
        ),
        (
            ("time (s)", "min", False),
            claim("below", 0.5, [0.4, 0.8], ratio=True),
            "time longer than for b by a factor of 2.00, 1.25 to 2.50, 5 seeds",
        ),
        (
            ("error", "min", False),
            claim("at_most", 2.1e-17, [0.0, 3e-17], other=None, margin=1e-6),
            "error: 2.1 × 10⁻¹⁷ where at most 10⁻⁶ is claimed, 0 to 3 × 10⁻¹⁷, 5 seeds",
        ),
        (
            ("queries (thousands)", "min", False),
            claim("below", 3.0, [3.0, 3.0], other="a, tuned"),
            "−3 thousand in the number of queries against a (tuned), on all 5 seeds",
        ),
        (
            ("accuracy (%)", "max", True),
            claim("beats", 1e-17, [-0.016, 0.016]),
            "no difference from b in the accuracy, −1.6 to 1.6, 5 seeds",
        ),
        (
            ("accuracy, mean of 3 rounds (%)", "max", True),
            claim("beats", -0.0002, [-0.0102, 0.0098]),
            "−0.02 points of accuracy, mean of 3 rounds, against b, −1.02 to 0.98, 5 seeds",
        ),
        (
            ("samples accepted (%)", "max", True),
            claim("at_least", 1.0, [1.0, 1.0], other=None, margin=1.0),
            "share of samples accepted: 100 % where 100 % is claimed, on all 5 seeds",
        ),
        (
            ("state (bytes)", "min", False),
            claim("below", 828_900.0, None, seeds=1),
            "−829,000 bytes in the state against b, 1 seed",
        ),
    ],
)
def test_effects_in_human_units(metric, held, told):
    label, best, percent = metric
    venue = {"title": "v", "metrics": {"m": {"label": label, "best": best, "percent": percent}}}
    assert report.effect_sentence({"venues": [venue]}, held) == told


def test_numbers_as_people_write_them():
    percent, plain = {"percent": True}, {"percent": False}
    assert report.mean_and_interval([0.5, 0.5, 0.5], percent) == "50.0"
    assert report.mean_and_interval([12345.0], plain) == "12,300"
    assert report.mean_and_interval([None], plain) == "–"
    assert report.mean_and_interval([0.05, 0.05, 0.05 + 1e-16], plain) == "0.05"
    assert report.mean_and_interval([0.1, 0.12], plain) == "0.11 ± 0.13"
    assert report.mean_and_interval([16212891.5, 60212891.5, 1e6], plain) == "25.8 million ± 76 million"
    assert [report.ordinal(n) for n in (1, 2, 3, 4, 11, 12, 13, 21, 112)] == (
        ["1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "112th"]
    )


def test_standings_in_words():
    values = {"GCE": [0.83, 0.85], "ELR": [0.81, 0.82], "CE": [0.6, 0.7]}
    papers = {"GCE": "", "ELR": "elr", "CE": ""}
    arms = {name: {"paper": papers[name], "metrics": {"m": values[name]}} for name in papers}
    standing = {"GCE": {"rank": 1, "ahead": ["ELR", "CE"], "behind": []}, "CE": {"rank": 3, "ahead": [], "behind": []}}
    standing["ELR"] = {"rank": 2, "ahead": ["CE"], "behind": ["GCE"]}
    board = {"task": "label-noise", "variant": "symmetric", "arms": arms, "standing": standing}
    board["metrics"] = {"m": {"label": "accuracy (%)", "best": "max", "percent": True}}
    assert list(report.standing_sentences([board], "elr")) == [
        "ELR: 2nd of 3 on label-noise, symmetric; GCE (by 2.5 points) is surely ahead; it is surely ahead of 1 other"
    ]
    arms["GCE"]["metrics"]["m"] = [None, 0.9]
    assert "symmetric; GCE is surely ahead" in next(report.standing_sentences([board], "elr"))
