"""Studies, tasks and contestants by name; a user's own tasks, data and mixtures among them."""

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from trimtab.catalog import Catalog, UnknownNameError, UnknownPaperError
from trimtab.data import DataNotFoundError, load
from trimtab.studies.engine import library
from trimtab.studies.engine.plan import Plan
from trimtab.studies.engine.runner import run_contestants
from trimtab.studies.engine.store import Store
from trimtab.studies.engine.study import Metric, Result, Task, Trial
from trimtab.studies.tasks.compress_classifier import two_bits
from trimtab.studies.tasks.label_noise import LabelNoise, pair_flip, symmetric
from trimtab.studies.tools.training import Training


def test_unknown_names():
    with pytest.raises(UnknownPaperError, match="did you mean 'elr'"):
        library.find_study("elrr")
    with pytest.raises(library.NoStudyError, match="no study yet"):
        library.find_study("solver_regularized_ode")
    with pytest.raises(library.UnknownTaskError, match="did you mean 'label-noise'"):
        library.find_task("label noise")
    with pytest.raises(library.UnknownTaskError, match=r"there are .*label-noise"):
        library.find_task("nope")
    with pytest.raises(UnknownNameError, match=r"there are symmetric, pair flip, instance, human"):
        library.find_variant(LabelNoise, "zzz")


@pytest.mark.parametrize("slug", library.slugs())
def test_a_studys_module_asks_a_question_and_says_below_it_what_a_reader_must_know(slug):
    module = importlib.import_module(f"trimtab.studies.{Catalog()[slug].area}.{slug}")
    question, _, notes = inspect.getdoc(module).partition("\n\n")
    assert "\n" not in question
    assert question.endswith(("?", "."))
    assert module.study.notes == "", "they would stand twice"
    assert library.find_study(slug).notes == " ".join(notes.split()) != ""


def test_variants_by_name_and_from_text():
    assert library.find_variant(LabelNoise, "Pair-Flip") == pair_flip
    assert library.variant(LabelNoise, {}) == symmetric
    assert library.variant(LabelNoise, {"rate": "0.2", "kind": "asymmetric"}) == LabelNoise(kind="asymmetric", rate=0.2)
    assert library.variant(pair_flip, {"rate": "0.2"}) == LabelNoise(kind="asymmetric", rate=0.2)
    for settings, named in (
        ({"rte": "1"}, "rte"),
        ({"rate": "x"}, "rate"),
        ({"kind": "odd"}, "kind"),
        ({"rate": "2"}, r"\[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=named):
            library.variant(LabelNoise, settings)


def names(field: library.Field) -> list[str]:
    return [who.name for who in field.contestants]


def test_the_field_has_the_references_first_and_every_paper_that_enters():
    field = library.field_of(LabelNoise(rate=0.2), "smoke", ["elr"])
    assert names(field)[0] == "cross-entropy"
    assert {who.paper for who in field.contestants} == {"", "elr"}
    assert all(who.venue == LabelNoise(rate=0.2) for who in field.contestants)
    assert {"elr", "ldr"} <= {who.paper for who in library.field_of(symmetric, "smoke").contestants}


def test_who_cannot_enter_is_told():
    with pytest.raises(ValueError, match="sgd_sai cannot enter label-noise: its study enters domain-generalisation, "):
        library.field_of(symmetric, "smoke", ["sgd_sai"])


def test_who_does_not_fit_a_variant_is_skipped_by_name():
    field = library.field_of(two_bits, "smoke")
    assert "LSQ" in names(field)
    assert not {"ISS-P", "FTWT"} & set(names(field))
    assert "positions of its weights" in field.skipped["ISS-P"]


def test_an_entrant_of_a_variant_brings_what_it_has_there():
    chosen = {task: library.find_study("elr").entrants_at(task)["ELR"] for task in (symmetric, pair_flip)}
    assert chosen[symmetric] != chosen[pair_flip]
    assert "ELR+" not in library.find_study("elr").entrants_at(LabelNoise(kind="instance"))


def test_a_combination_has_every_part_and_its_parts_alone():
    parts = library.combine(symmetric, ["elr", "saf", "adabelief"])
    assert [who.name for who in parts] == ["ELR", "SAF", "AdaBelief", "ELR + SAF + AdaBelief"]
    mixed = parts[-1].body
    assert (mixed.loss, mixed.penalty, mixed.optimizer) == (
        parts[0].body.loss,
        parts[1].body.penalty,
        parts[2].body.optimizer,
    )
    assert all(len(who.grid("laptop")) <= symmetric.tries for who in parts)
    with pytest.raises(ValueError, match="elr and ldr both bring loss"):
        library.combine(symmetric, ["elr", "ldr"])
    with pytest.raises(ValueError, match="sface cannot enter label-noise"):
        library.combine(symmetric, ["elr", "sface"])


@dataclass(frozen=True)
class Mine(Task[Training]):
    """A task of a user's own, that takes what the studies of supervised training bring."""

    size: int = 100
    name: ClassVar[str] = "mine"
    metrics: ClassVar[Mapping[str, Metric]] = {"accuracy": Metric("accuracy (%)", percent=True)}
    accepts: ClassVar[type[Training]] = Training
    seeds: ClassVar = {"smoke": 2, "laptop": 2, "paper": 2}

    @classmethod
    def references(cls):
        return {"plain": Training()}

    def run(self, trial: Trial, entrant: Training) -> Result:
        return Result({"accuracy": trial.seed + self.size / 1000 + (entrant.loss is not None)}, score=0.0)


def test_a_task_of_ones_own_takes_every_entrant_of_its_kind(tmp_path):
    field = library.field_of(Mine(), "smoke")
    papers = {who.paper for who in field.contestants}
    assert {"", "elr", "sgd_sai", "saf"} <= papers
    assert all(len(who.grid("laptop")) == 1 for who in field.contestants)
    with Store(tmp_path / "runs.sqlite") as store:
        ran = run_contestants([w for w in field.contestants if w.paper in ("", "elr")], store, Plan("smoke", jobs=1))
    assert {held.who.name: held.values("accuracy")[0] for held in ran}["ELR"] == pytest.approx(1.1)
    assert (Mine().label, Mine(size=3).label) == ("default", "size 3")
    assert library.variants_of(Mine) == {"default": Mine()}


def test_a_task_of_ones_own_by_name(tmp_path, monkeypatch):
    (tmp_path / "of_mine.py").write_text(
        "from trimtab.studies.tasks.label_noise import LabelNoise\n\n\nclass Noisy(LabelNoise):\n    pass\n\n\n"
        "noisy = Noisy(rate=0.1)\nnumber = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    found = library.find_task("of_mine:noisy")
    assert found.rate == 0.1
    assert {"ELR", "ELR+", "cross-entropy"} <= set(names(library.field_of(found, "smoke", ["elr"])))
    for name, named in (("of_mine:number", "int"), ("of_mine:nothing", "nothing"), ("nowhere:x", "nowhere")):
        with pytest.raises(ValueError, match=named):
            library.find_task(name)


def arrays(**changes):
    rng = np.random.default_rng(0)
    held = {
        "x_train": rng.random((40, 1, 8, 8)),
        "y_train": np.arange(40) % 4,
        "x_test": rng.random((20, 1, 8, 8), dtype=np.float32),
        "y_test": np.arange(20) % 4,
    }
    return {name: value for name, value in (held | changes).items() if value is not None}


def test_own_arrays_are_a_data_set(tmp_path):
    path = tmp_path / "mine.npz"
    np.savez(path, **arrays())
    data = load(str(path))
    assert (data.in_shape, data.num_classes, data.x_train.dtype.is_floating_point) == ((1, 8, 8), 4, True)
    task = LabelNoise(dataset=str(path), kind="given")
    assert task.datasets("smoke") == (str(path),)
    (ran, *_) = library.field_of(task, "smoke", ["elr"]).contestants
    assert ran.obstacle("smoke") == ""
    images = task.images(Trial())
    assert len(images.y) == 32
    assert not images.wrong.any()


def test_own_arrays_without_a_test_part_are_split_once_and_for_all(tmp_path):
    path = tmp_path / "mine.npz"
    x = np.arange(200, dtype=np.float64).reshape(100, 2)
    np.savez(path, x=x, y=np.arange(100) % 2)
    data = load(str(path))
    assert (len(data.y_train), len(data.y_test)) == (80, 20)
    rows = np.concatenate([data.x_train.numpy(), data.x_test.numpy()])
    assert sorted(rows[:, 0]) == list(x[:, 0])
    assert (data.x_train[:, 0] / 2 % 2).tolist() == data.y_train.tolist(), "labels stay with their samples"


def test_bytes_of_images_are_scaled_and_those_of_tables_are_not(tmp_path):
    levels = np.arange(256, dtype=np.uint8)
    np.savez(tmp_path / "images.npz", x=levels.reshape(64, 2, 2), y=np.arange(64) % 2)
    images = load(str(tmp_path / "images.npz"))
    seen = torch.cat([images.x_train, images.x_test])
    assert sorted(seen.flatten().tolist()) == pytest.approx([level / 255 for level in range(256)])
    np.savez(tmp_path / "table.npz", x=levels.reshape(64, 4), y=np.arange(64) % 2)
    table = load(str(tmp_path / "table.npz"))
    assert sorted(torch.cat([table.x_train, table.x_test]).flatten().tolist()) == list(range(256))


@pytest.mark.parametrize("names", [["ape", "bee", "cow", "dog"], [3, 7, 20, 21]])
def test_classes_are_numbered_in_sorted_order(tmp_path, names):
    path = tmp_path / "mine.npz"
    held = arrays()
    np.savez(path, **arrays(**{part: np.array(names)[held[part]] for part in ("y_train", "y_test")}))
    data = load(str(path))
    assert data.num_classes == 4
    assert data.y_train.tolist() == held["y_train"].tolist()
    assert data.y_test.tolist() == held["y_test"].tolist()


@pytest.mark.parametrize("task", ["image-classification", "label-noise"])
def test_rows_of_numbers_in_any_units_train_an_mlp(tmp_path, task):
    path = tmp_path / "rows.npz"
    rng = np.random.default_rng(0)
    y = np.arange(300) % 3
    x = np.stack([1e4 + 10 * y + rng.normal(size=300), np.full(300, 7.0), 1e-3 * rng.normal(size=300)], 1)
    np.savez(path, x=x, y=y)
    work = library.variant(library.find_task(task), {"dataset": str(path), "noise" if "image" in task else "rate": "0"})
    who = library.field_of(work, "smoke").contestants[0]
    setting = who.grid("smoke")[-1]
    run = who.job(0, setting, "smoke", "cpu").execute(Trial(budget="smoke", setting=setting))
    images = work.images(Trial(budget="smoke"))
    assert images.x.mean(0).abs().max() < 1e-2
    assert next(iter(run.result.metrics.values())) > 0.6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "data must hold x_train, y_train, x_test, y_test, or x and y, got x_train, y_train, x_test"),
        ({"x_train": np.zeros((40, 1, 8, 8), dtype=complex)}, "x_train must be real numbers, got complex128"),
        ({"x_train": np.full((40, 1, 8, 8), 1e300)}, "x_train must be finite as float32"),
        ({"x_train": np.full((40, 1, 8, 8), np.nan)}, "x_train must be finite"),
        ({"x_train": np.zeros(40)}, "x_train must be two samples or more"),
        ({"x_test": np.zeros((20, 1, 4, 4))}, r"x_test must have samples of shape \(1, 8, 8\)"),
        ({"y_train": np.zeros(40)}, "y_train must be integers or strings, got float64"),
        ({"y_train": np.arange(39)}, "y_train must be one label a sample"),
        ({"y_train": np.arange(40) - 1}, "y_train must be labels from 0, got -1"),
        ({"y_train": np.zeros(40, dtype=int)}, "y_train must have at least two classes"),
        ({"y_test": np.full(20, 4)}, "y_test must be labels that y_train has, got 4"),
        ({"x_train": np.array([{}] * 40)}, "data must be an .npz file of plain arrays"),
    ],
)
def test_a_bad_file_is_told_in_one_sentence(tmp_path, changes, message):
    path = tmp_path / "mine.npz"
    np.savez(path, **arrays(**changes))
    with pytest.raises(ValueError, match=message):
        load(str(path))


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut short"])
def test_a_file_that_is_no_npz(tmp_path, content):
    path = tmp_path / "mine.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"must be an \.npz file of plain arrays"):
        load(str(path))
    with pytest.raises(DataNotFoundError, match=r"must be an \.npz file that is there"):
        load(str(tmp_path / "other.npz"))
