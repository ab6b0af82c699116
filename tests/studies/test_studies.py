"""Every study runs at the smoke budget, gives finite numbers, and is judged."""

import json
import math

import pytest

from trimtab.studies import library
from trimtab.studies.identity import identity
from trimtab.studies.runner import Plan, run_studies
from trimtab.studies.store import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    # One store for all: what several studies share runs once here too.
    with Store(tmp_path_factory.mktemp("smoke") / "runs.sqlite") as kept:
        yield kept


@pytest.mark.xdist_group("smoke")
@pytest.mark.parametrize("slug", library.slugs())
def test_smoke(slug, store):
    study = library.find_study(slug)
    assert study.paper == slug
    assert len({identity(arm) for arm in study.arms.values()}) == len(study.arms), "two arms are the same contestant"
    (outcome,) = run_studies([study], store, Plan(budget="smoke", jobs=1))
    for claim in study.claims:
        assert all(math.isfinite(value) for value in outcome.values(claim.on)[claim.arm]), claim.sentence()
        if claim.other:
            assert all(math.isfinite(value) for value in outcome.values(claim.on)[claim.other]), claim.sentence()
    result = json.loads(json.dumps(outcome.as_json(), allow_nan=False))
    assert [claim["text"] for claim in result["claims"]] == [claim.sentence() for claim in study.claims]
    assert result["sources"], "the result would never be seen as stale"


@pytest.mark.parametrize("slug", library.slugs())
def test_at_least_three_seeds(slug):
    assert library.find_study(slug).num_seeds("laptop") >= 3


@pytest.mark.parametrize("name", library.task_names())
def test_every_task_compares_methods(name):
    task = library.find_task(name)
    assert task.name == name
    arms = library.contestants(task())
    assert any(slug for slug, _ in arms.values()), "no study has an arm on it"
