"""The figure of a result: what is drawn, and that every form of result can be."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab.studies.engine import figure
from trimtab.studies.engine.figure import draw
from trimtab.studies.engine.picture import Picture
from trimtab.studies.engine.store import Run, RunKey, Store
from trimtab.studies.engine.study import Result


def result(curves: bool = True, venues: int = 1, log: str = "") -> dict[str, Any]:
    def arm(level: float) -> dict[str, Any]:
        y = [level, level + 0.1, None, level + 0.2]
        band = {"low": [level, None, None, -0.1], "high": [level + 0.1, None, None, level + 0.3]}
        curve = {"x": [1.0, 2.0, 3.0, 4.0], "y": y, "x_label": "step", **band}
        metrics = {"accuracy": [level, level + 0.02, None], "seconds": [1.0, 2.0, 3.0]}
        return {"metrics": metrics, "curves": {"test_accuracy": curve} if curves else {}, "seconds": [1.0]}

    venue = {
        "metrics": {
            "accuracy": {"label": "accuracy (%)", "best": "max", "percent": True},
            "seconds": {"label": "time (s)", "best": "min", "percent": False},
        },
        "arms": {"baseline": arm(0.5), "ours": arm(0.7)},
        "log": log,
    }
    claim = {"arm": "ours", "other": "baseline", "on": "accuracy", "venue": "venue 0"}
    return {
        "headline": claim,
        "claims": [],
        "venues": [{"title": f"venue {number}", **deepcopy(venue)} for number in range(venues)],
    }


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Draws a result and gives the axes back."""
    from matplotlib.figure import Figure

    def drawn(*arguments: Any, **keywords: Any) -> list[Any]:
        held: list[Figure] = []
        save = Figure.savefig
        monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (held.append(self), save(self, *a, **k)))
        draw(result(*arguments, **keywords), tmp_path / "figure.png")
        return list(held[0].axes)

    return drawn


@pytest.mark.parametrize("kind", ["svg", "png", "pdf"])
@pytest.mark.parametrize("curves", [True, False])
def test_a_figure_is_written(tmp_path: Path, kind: str, curves: bool) -> None:
    draw(result(curves), tmp_path / f"figure.{kind}")
    start = {"svg": b"<?xml", "png": b"\x89PNG", "pdf": b"%PDF"}[kind]
    assert (tmp_path / f"figure.{kind}").read_bytes().startswith(start)


def test_the_same_result_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        draw(result(), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_lines_are_in_the_unit_of_the_metric_and_leave_gaps_out(axes: Any) -> None:
    (ax,) = axes()
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert list(lines["ours"].get_xdata()) == [1.0, 2.0, 4.0]
    assert list(lines["ours"].get_ydata()) == pytest.approx([70.0, 80.0, 90.0])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "test accuracy (%)")
    assert len(ax.collections) == 2  # a band for each arm


def test_dots_stand_at_the_means_of_the_seeds_that_have_a_number(axes: Any) -> None:
    (ax,) = axes(curves=False)
    means = [points.get_offsets()[0] for points in ax.collections[1::2]]
    assert [tuple(point) for point in means] == [pytest.approx((51.0, 0.0)), pytest.approx((71.0, 1.0))]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["baseline", "ours"]
    assert ax.get_xlabel() == "accuracy (%)"


def test_the_arm_of_the_claim_stands_out(axes: Any) -> None:
    (ax,) = axes()
    colours = {line.get_label(): line.get_color() for line in ax.get_lines()}
    assert colours["ours"] in figure.CLAIMED
    assert colours["baseline"] in figure.COMPARED


def test_no_two_lines_look_alike() -> None:
    board = {"arms": {f"arm {number}": {} for number in range(figure._LEGIBLE)}}
    panels = [figure._Panel(board, "m", "")]
    looks = [(look["color"], look["linestyle"]) for look in figure._looks(board, panels).values()]
    assert len(set(looks)) == len(looks)


def test_many_contestants_are_dots_and_papers_stand_out() -> None:
    line = {"x_label": "epoch", "x": [1.0, 2.0], "y": [0.1, 0.2]}
    arms = {
        f"arm {n}": {"paper": "elr" if n % 2 else "", "metrics": {"accuracy": [0.1 * n]}, "curves": {"accuracy": line}}
        for n in range(figure._LEGIBLE + 1)
    }
    board = {"title": "", "arms": arms, "metrics": {"accuracy": {"label": "accuracy", "percent": False}}}
    (panel,) = figure._panels(board)
    assert not panel.curve
    looks = figure._looks(board, [panel])
    assert looks["arm 1"]["color"] in figure.CLAIMED
    assert looks["arm 0"]["color"] in figure.COMPARED


def test_a_panel_a_venue_and_four_at_most(axes: Any) -> None:
    assert [ax.get_title(loc="left") for ax in axes(venues=3) if ax.get_visible()] == ["venue 0", "venue 1", "venue 2"]
    assert len(axes(venues=6)) == 4


def test_axes_are_logarithmic_where_the_study_says_and_intervals_stay_in_them(axes: Any) -> None:
    (ax,) = axes(log="y")
    assert (ax.get_xscale(), ax.get_yscale()) == ("linear", "log")
    lows = [band.get_paths()[0].vertices[:, 1].min() for band in ax.collections]
    assert all(low > 0 for low in lows)
    (ax,) = axes(curves=False, log="xy")
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "linear")
    assert all(line.get_xdata()[0] > 0 for line in ax.get_lines())


def test_the_metric_of_the_headline_is_drawn(axes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = result(curves=False)
    timed["headline"] = {**timed["headline"], "on": "seconds"}
    monkeypatch.setitem(globals(), "result", lambda: timed)
    (ax,) = axes()
    assert ax.get_xlabel() == "time (s)"


def test_a_leaderboard_is_drawn_like_a_venue(tmp_path: Path) -> None:
    board = {"task": "label-noise", **result()["venues"][0]}
    draw(board, tmp_path / "board.svg")
    assert "baseline" in (tmp_path / "board.svg").read_text() or (tmp_path / "board.svg").stat().st_size > 1000


def test_a_result_without_anything_to_draw_is_refused(tmp_path: Path) -> None:
    empty = result()
    empty["venues"][0]["arms"] = {}
    with pytest.raises(ValueError, match="curves or numbers"):
        draw(empty, tmp_path / "figure.png")


def test_the_state_of_pyplot_is_left_alone(tmp_path: Path) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    draw(result(), tmp_path / "figure.png")
    assert dict(mpl.rcParams) == before


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """The axes and pixels of every picture that is drawn from here on."""
    from matplotlib.axes import Axes

    found: list[tuple[Any, Any]] = []
    draws = Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda self, *a, **k: (found.append((self, a[0])), draws(self, *a, **k)))
    return found


def test_what_the_contestants_made_is_shown_under_the_lines(shown, tmp_path):
    with_pictures = result(venues=2)
    sheet = torch.rand(20, 8, 8)
    arms = with_pictures["venues"][0]["arms"]
    arms["ours"]["pictures"] = {"samples": asdict(Picture.grid(sheet))}
    draw(with_pictures, tmp_path / "figure.svg")
    ((axes, pixels),) = shown
    assert axes.get_title(loc="left") == "ours"
    assert (pixels[:8, :8] == (sheet[0] * 255).round().numpy()).all()


def test_pictures_stand_by_kind_and_by_where_they_were_made(shown, tmp_path):
    with_pictures = result(venues=2)
    first, second = with_pictures["venues"]
    second["title"] = "elsewhere"
    names = [f"contestant {n}" for n in range(6)]
    first["arms"] = {name: deepcopy(first["arms"]["ours"]) for name in ("ours", "base", *names)}
    image = asdict(Picture.of(torch.rand(4, 4)))
    for arm in first["arms"].values():
        arm["pictures"] = {"samples": image, "trajectories": image}
    second["arms"]["ours"]["pictures"] = {"samples": image}
    draw(with_pictures, tmp_path / "figure.svg")
    headings = [axes.figure._suptitle.get_text() for axes, _ in shown]
    title = first["title"]
    assert headings == [f"{title}: samples"] * 8 + [f"{title}: trajectories"] * 4 + ["elsewhere: samples"]


def test_a_picture_survives_the_store(tmp_path):
    picture = Picture.of(torch.linspace(0, 1, 12).reshape(3, 4))
    run = Run(RunKey("arm", 0, "smoke", "cpu", "code"), "arm", Result(pictures={"one": picture}), 1.0, {}, 1.0)
    with Store(tmp_path / "runs.sqlite") as store:
        store.add(run)
        kept = store.get(run.key)
    assert kept is not None
    assert kept.result.pictures == {"one": picture}


@pytest.mark.parametrize("image", [torch.zeros(3), torch.zeros(0, 4), torch.zeros(200, 200)])
def test_a_picture_is_small_and_flat(image):
    with pytest.raises(ValueError, match="image must have shape"):
        Picture.of(image)


def test_a_board_over_what_was_spent_has_its_eight_best_alone() -> None:
    def arm(level: float, megabytes: list[float | None]) -> dict[str, Any]:
        curve = {
            "x": [10.0, 20.0],
            "y": [level, level + 0.1],
            "x_label": "round",
            "low": [0.1, 0.2],
            "high": [0.9, 1.0],
        }
        return {"metrics": {"accuracy": [level], "megabytes": megabytes}, "curves": {"test_accuracy": curve}}

    arms = {f"method {k}": arm(0.5, [40.0, 60.0] if k else [100.0]) for k in range(9)}
    arms["nothing counted"] = arm(0.9, [None])
    board = {
        "metrics": {
            "accuracy": {"label": "accuracy (%)", "best": "max", "percent": True},
            "megabytes": {"label": "data sent (MB)", "best": "min", "percent": False},
        },
        "arms": arms,
        "standing": {name: {"rank": 1, "behind": []} for name in reversed(arms)},
    }
    found = figure.against(board, "megabytes")
    assert found is not None
    assert list(found["arms"]) == [f"method {k}" for k in range(8, 0, -1)]
    curve = found["arms"]["method 3"]["curves"]["test_accuracy"]
    assert (curve["x"], curve["x_label"]) == ([25.0, 50.0], "data sent (MB)")
    assert (curve["y"], curve["low"], curve["high"]) == ([0.5, 0.6], [0.1, 0.2], [0.9, 1.0])
    assert arms["method 3"]["curves"]["test_accuracy"]["x"] == [10.0, 20.0]
    assert figure.against({**board, "arms": {"alone": arms["nothing counted"]}, "standing": {}}, "megabytes") is None


def test_boards_of_federations_are_drawn_over_bytes(tmp_path: Path) -> None:
    from trimtab.catalog import Catalog
    from trimtab.site.boards import over_bytes
    from trimtab.studies.engine.report import read_boards

    boards, _ = read_boards(Catalog().results)
    shown = {(board["task"], board["variant"]): spent for board in boards if (spent := over_bytes(board))}
    assert {task for task, _ in shown} == {board["task"] for board in boards if "megabytes" in board["metrics"]}
    for (task, variant), spent in shown.items():
        draw(spent, tmp_path / f"{task} {variant}.svg")
