"""Grids of settings: where most of those who share one stand at an end, it was extended there, once, for everyone."""

import json
import re
from collections import defaultdict

import pytest

from trimtab.catalog import Catalog
from trimtab.studies.engine import library
from trimtab.studies.engine.outcome import board_path, contestants

RESULTS = Catalog().results
EXTENDED = {
    ("black-box", "steps"),
    ("compress-transformer", "lr"),
    ("dag-recovery", "lambda1"),
    ("digits-generation", "lr"),
    ("discrete-sequences", "lr"),
    ("domain-adaptation", "lr"),
    ("fair-federated", "lr"),
    ("forget-samples", "lr"),
    ("image-classification", "lr"),
    ("label-noise", "lr"),
    ("open-set-retrieval", "scale"),
    ("open-set-retrieval", "weight"),
    ("representation-learning", "lr"),
    ("robust-accuracy", "lr"),
    ("test-functions", "lr"),
    ("transport", "reg"),
    # Larger steps change nothing any more: gradient descent has become the perceptron.
    ("logistic-regression", "lr"),
}
VARIANTS = [
    pytest.param(task, variant, id=f"{task}-{label}")
    for task in library.task_names()
    for label, variant in library.variants_of(library.find_task(task)).items()
]


@pytest.mark.parametrize(("task", "variant"), VARIANTS)
def test_most_of_those_who_share_a_grid_do_not_stand_at_one_end_of_it(task, variant):
    path = board_path(variant, RESULTS)
    if not path.is_file():
        pytest.skip("this variant has no leaderboard")
    arms = json.loads(path.read_text(encoding="utf-8"))["arms"]
    chosen = defaultdict(list)
    for who in library.field_of(variant, "laptop").contestants:
        for name, values in variant.grid(who.body).items():
            if who.name in arms and len(values) > 2 and all(isinstance(value, int | float) for value in values):
                chosen[name, tuple(values)].append(arms[who.name]["setting"].get(name))
    crowded = {
        name
        for (name, values), picks in chosen.items()
        if len(picks) >= 3 and max(picks.count(min(values)), picks.count(max(values))) * 2 >= len(picks)
    }
    assert {(task, name) for name in crowded} <= EXTENDED


NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight")
COUNTED = {
    paper.slug: 2 + NUMBERS.index(found[1])
    for paper in Catalog()
    if (found := re.search(rf"best of (?:at most )?({'|'.join(NUMBERS)}) settings", paper.claim))
}


@pytest.mark.parametrize("slug", COUNTED)
def test_a_claim_that_counts_settings_counts_those_of_the_grid(slug):
    study = library.find_study(slug)
    sides = {study.headline.arm, study.headline.other}
    venue = study.venue(study.headline)
    sizes = [len(who.grid("laptop")) for who in contestants(study) if who.name in sides and who.venue is venue]
    assert max(sizes) == COUNTED[slug]
