"""Variants along one number: which belong together, whose numbers are drawn, and what is left alone."""

from __future__ import annotations

from typing import Any

import pytest

from trimtab.studies.engine import figure
from trimtab.studies.engine.axis import axes_of, venues_along


def board(evaluations: int, accuracy: float = 0.9, budget: str = "laptop") -> dict[str, Any]:
    arms = {
        name: {"paper": paper, "metrics": {"frechet": [level / evaluations, 2 * level / evaluations, None]}}
        for name, paper, level in (("ours", "apg", 1.0), ("CFG", "", 2.0), ("another", "cfgpp", 3.0))
    }
    return {
        "task": "sampling",
        "title": f"sampling: {evaluations} at {accuracy}",
        "budget": budget,
        "settings": {"evaluations": evaluations, "accuracy": accuracy, "shuffled": True},
        "metrics": {"frechet": {"label": "Frechet distance", "best": "min", "percent": False}},
        "arms": arms,
    }


def result(*boards: dict[str, Any], curves: bool = False) -> dict[str, Any]:
    line = {"frechet": {"x": [1.0, 2.0], "y": [0.1, 0.2], "x_label": "evaluations"}}
    venues = [
        {**held, "arms": {name: {**arm, "curves": line if curves else {}} for name, arm in held["arms"].items()}}
        for held in boards
    ]
    claim = {"arm": "ours", "other": "CFG", "on": "frechet", "venue": boards[0]["title"]}
    return {"paper": "apg", "budget": "laptop", "headline": claim, "claims": [], "venues": venues}


BOARDS = [board(50), board(10), board(20), board(10, 0.99), board(5, budget="smoke")]


def test_neighbours_differ_in_one_number_and_stand_in_its_order():
    ((name, along),) = axes_of(BOARDS[0], BOARDS)
    assert (name, list(along)) == ("evaluations", [10, 20, 50])
    assert not list(axes_of(BOARDS[3], BOARDS))  # alone at its accuracy
    assert not list(axes_of(BOARDS[0], BOARDS[:2]))  # two points are no line


def test_the_paper_and_whom_it_faces_are_drawn_over_the_number():
    ((venue, titles),) = venues_along(result(BOARDS[0]), BOARDS)
    assert set(venue["arms"]) == {"ours", "CFG"}
    assert titles == {held["title"] for held in BOARDS[:3]}
    assert venue["title"] == "sampling by evaluations, accuracy 0.9"
    curve = venue["arms"]["CFG"]["curves"]["frechet"]
    assert (curve["x"], curve["x_label"]) == ([10.0, 20.0, 50.0], "evaluations")
    assert curve["y"] == pytest.approx([0.3, 0.15, 0.06])
    assert all(low < mean < high for low, mean, high in zip(curve["low"], curve["y"], curve["high"], strict=True))


def test_runs_with_curves_of_their_own_need_none():
    assert not list(venues_along(result(BOARDS[0], curves=True), BOARDS))


def test_the_line_stands_before_the_headlines_dots_and_in_place_of_its_neighbours():
    held = result(*BOARDS[:3])
    panels = [(panel.venue["title"], panel.curve) for panel in figure._panels(held, BOARDS)]
    assert panels == [("sampling by evaluations, accuracy 0.9", "frechet"), (BOARDS[0]["title"], "")]
    assert len(figure._panels(held)) == 3
