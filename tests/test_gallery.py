"""Every example of the gallery runs, and shows what it says."""

from __future__ import annotations

import random
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

GALLERY = Path(__file__).parent.parent / "docs" / "gallery"

Shows = Callable[[dict[str, Any]], bool]

# What its names hold in the end, and the packages it needs beside the library's own.
SHOWS: dict[str, tuple[Shows, tuple[str, ...]]] = {
    "noisy_labels": (lambda end: end["accuracy"]["ELR"] > end["accuracy"]["cross-entropy"] + 0.1, ()),
    "lightning_saf_adabelief": (
        lambda end: end["sharpness"]["SAF"] < end["sharpness"]["cross-entropy"],
        ("lightning",),
    ),
    "metric_learning_tcm": (lambda end: min(end["recall"].values()) > 0.75, ("pytorch_metric_learning",)),
    "sklearn_pipeline": (lambda end: end["search"].best_score_ > 0.9, ()),
    "transport": (lambda end: end["plan"].converged and end["after"] < end["before"] / 2, ()),
    "causal_graph": (lambda end: max(end["wrong"].values()) <= 2, ()),
    "quantisation": (
        lambda end: end["worst"]["min-max violation"] < end["worst"]["nearest level"] / 1.5,
        (),
    ),
    "huggingface_sorsa": (
        lambda end: end["losses"][-1] < end["losses"][0] and end["difference"] < 1e-4,
        ("transformers",),
    ),
    "huggingface_trainer": (lambda end: min(end["accuracy"].values()) > 0.7, ("transformers", "accelerate")),
    "diffusers_deis_apg": (lambda end: not torch.equal(end["images"][1.0], end["images"][5.0]), ("diffusers",)),
    "flower_fedspeed": (lambda end: end["accuracy"] > 0.8, ("flwr.supercore.task_identity",)),
}


def test_every_example_is_tested() -> None:
    assert {path.stem for path in GALLERY.glob("*.py")} == SHOWS.keys()


@pytest.mark.parametrize("name", SHOWS)
def test_an_example_runs_and_shows_what_it_says(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    shows, packages = SHOWS[name]
    for package in packages:
        pytest.importorskip(package)
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        end = runpy.run_path(str(GALLERY / f"{name}.py"))
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    assert shows(end)
    assert capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(GALLERY.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_and_introduced(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    title, _, rest = text.removeprefix('"""').partition("\n\n")
    assert title.endswith(".")
    assert len(title) < 80
    code = rest.partition('"""\n')[2]
    assert len([line for line in code.splitlines() if line.strip()]) <= 45
