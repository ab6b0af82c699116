"""What result files hold, of the code as it stands, stands in for runs."""

import json
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest

from trimtab.studies.engine.outcome import board_json, board_path, run_study, stored_outcome, write_json
from trimtab.studies.engine.plan import Plan
from trimtab.studies.engine.recorded import Records
from trimtab.studies.engine.store import Store
from trimtab.studies.engine.study import Claim, Curve, Entrant, Experiment, Metric, Result, Study, Task, Trial

COUNT = []


@dataclass(frozen=True, kw_only=True)
class Rising(Entrant):
    by: float = 1.0


@dataclass(frozen=True)
class Hill(Task[Rising]):
    name: ClassVar[str] = "hill"
    metrics: ClassVar = {"height": Metric("height"), "odd": Metric("odd height")}
    accepts: ClassVar = Rising
    tries: ClassVar[int] = 2
    search: ClassVar = {"step": (1.0, 2.0)}
    seeds: ClassVar = {"smoke": 2, "laptop": 2, "paper": 2}

    def run(self, trial: Trial, entrant: Rising) -> Result:
        COUNT.append(trial.seed)
        height = entrant.by * trial.setting["step"] + trial.seed
        metrics = {"height": height} | ({"odd": math.nan} if trial.seed else {"odd": 1.0})
        return Result(metrics, {"way": Curve([0, 1], [0, height])}, score=height)

    @classmethod
    def variants(cls):
        return {"default": cls()}

    @classmethod
    def references(cls):
        return {"flat": Rising(by=0.0)}


def arm(trial: Trial) -> Result:
    COUNT.append(trial.seed)
    return Result({"height": float(trial.seed)})


HILL = Hill()
TOY = Experiment(
    "toy", {"arm": arm}, {"height": Metric("height")}, seeds=dict.fromkeys(("smoke", "laptop", "paper"), 2)
)
STUDY = Study(
    paper="elr",
    entrants={"steep": Rising(by=3.0)},
    on=[HILL],
    experiments=[TOY],
    headline=Claim("steep", beats="flat", on="height", at=HILL),
)
PLAN = Plan("laptop", jobs=1)


@pytest.fixture
def results(tmp_path):
    COUNT.clear()
    with Store(tmp_path / "first.sqlite") as store:
        outcome = run_study(STUDY, store, PLAN)
    write_json(outcome.as_json(), tmp_path / "results" / "elr.json")
    write_json(board_json(HILL, outcome.ran[:2], "laptop", {}), board_path(HILL, tmp_path / "results"))
    COUNT.clear()
    return tmp_path / "results"


def test_what_is_on_record_is_not_run_again_and_is_written_as_it_was(results, tmp_path):
    with Store(tmp_path / "second.sqlite") as store:
        again = run_study(STUDY, store, PLAN, records=Records(results))
        assert not COUNT
        assert again.as_json() == json.loads((results / "elr.json").read_text())
        assert stored_outcome(STUDY, store, PLAN).ran == []
        held = stored_outcome(STUDY, store, PLAN, Records(results))
        assert held.headline.effect == pytest.approx(6.0)
        board = json.loads(json.dumps(board_json(HILL, held.ran[:2], "laptop", {})))
        assert board == json.loads(board_path(HILL, results).read_text())
    assert held.ran[0].values("odd")[0] == 1.0
    assert math.isnan(held.ran[0].values("odd")[1])
    assert [math.isnan(value) for value in held.ran[0].values("nothing")] == [True, True]


def test_another_setting_budget_number_of_seeds_or_a_wish_to_run_again_runs(results, tmp_path):
    for place, plan in enumerate((Plan("smoke", jobs=1), Plan("laptop", 3, 1), Plan("laptop", jobs=1, rerun=True))):
        COUNT.clear()
        with Store(tmp_path / f"{place}.sqlite") as store:
            run_study(STUDY, store, plan, records=Records(results))
        assert COUNT


@pytest.mark.parametrize(("steps", "edge"), [((0.5, 1.0, 2.0), ["step"]), ((1.0, 2.0, 4.0), [])])
def test_what_lies_at_the_edge_is_judged_by_the_grid_of_today(results, monkeypatch, steps, edge):
    monkeypatch.setattr(Hill, "tries", 3)
    monkeypatch.setattr(Hill, "search", {"step": steps})
    (steep,) = [held for held in stored_outcome_of(Records(results)) if held.who.name == "steep"]
    row = steep.row({})
    assert (row["setting"], row["edge"]) == ({"step": 2.0}, edge)


def test_changed_code_is_not_on_record(results, tmp_path):
    changed = Study("elr", STUDY.headline, {"steep": Rising(by=2.0)}, on=[HILL])
    with Store(tmp_path / "second.sqlite") as store:
        outcome = run_study(changed, store, PLAN, records=Records(results))
    assert outcome.at(HILL)["steep"].values("height") == [4.0, 5.0]
    assert len(COUNT) == 4, "the search and the seeds of who has changed, and nobody else"


def test_files_that_are_no_results_are_passed_over(results):
    (results / "cut.json").write_text('{"venues": [')
    (results / "list.json").write_text("[1]")
    (results / "other.json").write_text('{"venues": 3, "versions": {}, "machine": "", "created": ""}')
    records = Records(results)
    (who,) = [held.who for held in stored_outcome_of(records) if held.who.name == "steep"]
    assert records.find(who, PLAN) is not None


def stored_outcome_of(records):
    with Store(":memory:") as store:
        return stored_outcome(STUDY, store, PLAN, records).ran
