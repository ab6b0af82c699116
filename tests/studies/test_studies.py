"""Every study runs at the smoke budget, is judged, and its committed result belongs to the code as it stands."""

import json
import math
import platform

import pytest
from rich.console import Console

from trimtab.catalog import CHECKOUT, Catalog
from trimtab.studies.engine import library
from trimtab.studies.engine.identity import describe
from trimtab.studies.engine.outcome import contestants, run_study
from trimtab.studies.engine.plan import Plan
from trimtab.studies.engine.report import read_boards
from trimtab.studies.engine.runner import choose, run_contestants, search_jobs
from trimtab.studies.engine.store import Store
from trimtab.studies.engine.study import Task

RESULTS = Catalog().results


SLUGS = library.slugs()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    # One store for all: what several studies share runs once here too.
    with Store(tmp_path_factory.mktemp("smoke") / "runs.sqlite") as kept:
        yield kept


@pytest.mark.xdist_group("smoke")
@pytest.mark.parametrize("slug", SLUGS)
def test_smoke(slug, store):
    study = library.find_study(slug)
    assert study.paper == slug
    outcome = run_study(study, store, Plan(budget="smoke", jobs=1))
    for claim in (study.headline, *study.claims):
        there = outcome.at(study.venue(claim))
        for name in (claim.arm, claim.other):
            if name in there:
                assert all(map(math.isfinite, there[name].values(claim.on))), (name, claim)
    result = json.loads(json.dumps(outcome.as_json(), allow_nan=False))
    assert result["headline"]["text"]
    assert {claim["verdict"] for claim in result["claims"]} <= {"holds", "fails", "not shown"}


@pytest.fixture(scope="module")
def run_by_studies():
    found = (who for slug in SLUGS for who in contestants(library.find_study(slug)) if not who.obstacle("smoke"))
    return {smoke_job(who).key for who in found}


def smoke_job(who):
    return who.job(0, who.grid("smoke")[0], "smoke", "cpu")


# At the smoke budget a network is trained for four epochs, too few for its errors to fall steeply first.
TOO_SHORT = {"USEFUL", "SAM + USEFUL"}


@pytest.mark.xdist_group("fields")
@pytest.mark.parametrize("name", library.task_names())
def test_who_enters_a_variant_can_run_on_it(name, run_by_studies, tmp_path):
    # Those that a study runs are tested with it.
    with Store(tmp_path / "runs.sqlite") as kept:
        for variant in library.variants_of(library.find_task(name)).values():
            field = library.field_of(variant, "smoke").contestants
            others = [w for w in field if smoke_job(w).key not in run_by_studies and w.name not in TOO_SHORT]
            run_contestants(others, kept, Plan(budget="smoke", jobs=1), Console(quiet=True), "")


@pytest.mark.parametrize("slug", SLUGS)
def test_a_study_compares_different_contestants_on_enough_seeds(slug):
    study = library.find_study(slug)
    for venue in study.venues:
        assert venue.seeds["laptop"] >= 5, venue.name
        # What is the same may choose among different settings.
        bodies = [(describe(b), repr(getattr(b, "search", None))) for b in study.contestants(venue).values()]
        assert len(set(bodies)) == len(bodies), f"two contestants of {venue.name} are the same"
    told = [(claim.sentence(study.venue(claim).metrics), claim.at) for claim in (study.headline, *study.claims)]
    assert all(claim not in told[:place] for place, claim in enumerate(told)), "a claim is made twice"


@pytest.mark.parametrize("name", library.task_names())
def test_a_task_is_work_that_several_papers_meet_on(name):
    task = library.find_task(name)
    assert issubclass(task, Task)
    assert task.name == name
    assert len(library.studies_on(task)) >= 2
    for label, variant in task.variants().items():
        assert variant.label == label
        assert task.references()
        for entrant in task.references().values():
            variant.grid(entrant)


def of_this_python(result):
    """Texts of definitions, and Python's own sources as data, are those of a Python version."""
    if result["versions"]["python"].rpartition(".")[0] != platform.python_version().rpartition(".")[0]:
        pytest.skip(f"the result was made with Python {result['versions']['python']}")


def is_fresh(who, held):
    setting, plan = held["setting"], Plan("laptop")
    assert setting in [dict(one) for one in who.grid("laptop")]
    key = who.job(0, setting, plan.budget, plan.device).key
    return held["key"] == f"{key.arm} {key.sources}"


@pytest.mark.parametrize("slug", [slug for slug in SLUGS if (RESULTS / f"{slug}.json").is_file()])
def test_a_committed_result_belongs_to_the_code_as_it_stands(slug):
    study = library.find_study(slug)
    result = Catalog().result(slug)
    assert result is not None
    of_this_python(result)
    assert result["budget"] == "laptop"
    assert result["headline"]["text"] == study.headline.sentence(study.venue(study.headline).metrics)
    venues = {id(venue): held for venue, held in zip(study.venues, result["venues"], strict=True)}
    for who in contestants(study):
        if not who.obstacle("laptop"):
            assert is_fresh(who, venues[id(who.venue)]["arms"][who.name]), f"{who.name} has changed: run {slug} again"


@pytest.mark.parametrize(
    "path", sorted(RESULTS.glob("tasks/*/*.json")), ids=lambda path: f"{path.parent.name} {path.stem}"
)
def test_a_committed_leaderboard_belongs_to_the_code_as_it_stands(path):
    board = json.loads(path.read_text())
    of_this_python(board)
    variant = library.find_task(board["task"]).variants()[board["variant"]]
    field = {who.name: who for who in library.field_of(variant, "laptop").contestants}
    for name, held in board["arms"].items():
        if name in field:
            assert is_fresh(field[name], held), f"{name} has changed: compare {board['task']} again"


def test_results_are_small():
    large = [path.name for path in RESULTS.rglob("*.json") if path.stat().st_size > 100_000]
    assert not large
    if CHECKOUT is not None:
        papers = len(list(RESULTS.glob("*.json")))
        assert sum(path.stat().st_size for path in RESULTS.rglob("*.json")) < 60_000 * papers


def test_every_committed_leaderboard_can_be_read():
    _, problems = read_boards(RESULTS)
    assert not problems


def test_the_first_of_equal_settings_is_chosen_and_edges_are_flagged():
    from trimtab.studies.engine.contestants import Contestant
    from trimtab.studies.engine.store import Run
    from trimtab.studies.engine.study import Result
    from trimtab.studies.tasks.image_classification import ten_thousand
    from trimtab.studies.tools.training import Training

    who = Contestant("a", "", ten_thousand, Training(search={"lr": (0.01, 0.03, 0.1), "weight_decay": (5e-4, 5e-3)}))
    plan = Plan("laptop")
    jobs = search_jobs(who, plan)

    def scored(values):
        runs = [Run(job.key, "", Result(score=v), 1.0, {}, 0.0) for job, v in zip(jobs, values, strict=True)]
        return choose(who, plan, runs)

    assert scored([0.1, 0.1, 0.5, 0.5, math.nan, None]) == ({"lr": 0.03, "weight_decay": 5e-4}, ())
    assert scored([0.1, 0.9, 0.5, 0.5, 0.2, 0.2])[1] == ("lr",)
