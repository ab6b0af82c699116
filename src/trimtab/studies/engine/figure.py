"""The figure of a result: lines with bands where its arms have curves, dots with intervals where they have none."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.studies.engine.axis import venues_along
from trimtab.studies.engine.picture import SHOWN, Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase, SubFigure

# Okabe and Ito's colours, which people with any kind of colour vision can tell apart.
CLAIMED = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
COMPARED = ("#4D4D4D", "#E69F00", "#56B4E9", "#999999", "#B8A900")
DASHES = ("-", "--", "-.", ":")

_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.labelcolor": "#222222",
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "svg.hashsalt": "trimtab",
}

_PANELS = 4
_LEGIBLE = 8
_KINDS = 4
# Letters of an axis' name on one line, along a panel and up it: longer ones would be cut off at the edge.
_LABEL_WIDTH, _LABEL_HEIGHT = 34, 24


def draw(result: Mapping[str, Any], path: Path, boards: Sequence[Mapping[str, Any]] = ()) -> None:
    """Draws a result into a file: one panel a venue, at most four, and under them what the contestants made.

    Lines with bands where at most eight contestants have curves, else dots with intervals. Pictures stand by kind, such
    as samples and then trajectories: at most eight of the first and four of each further one. Variants of a task that
    one number alone sets apart, three or more, are one panel: a line a contestant over that number.

    Args:
        result: a study's outcome or a leaderboard, in the form that the runner writes as JSON.
        path: where to; the ending decides the format (`.svg`, `.png`, `.pdf`).
        boards: the leaderboards, which have the numbers of the variants.

    Raises:
        ValueError: the result has nothing to draw, or the format is unknown.
        OSError: the file cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(result, boards)
    if not panels:
        raise ValueError("result must have curves or numbers to draw, got none")
    # A figure of its own, so that the state of the caller's pyplot is left alone.
    with mpl.rc_context(_STYLE):
        columns = min(len(panels), 2)
        rows = math.ceil(len(panels) / columns)
        heights = [3.4 if panel.curve else 1.4 + 0.3 * len(panel.venue["arms"]) for panel in panels]
        tall = sum(max(heights[columns * row : columns * (row + 1)]) for row in range(rows))
        wide = max(6.4, 5.4 * columns)
        kinds = _pictures(result)
        below = [_height(pictures, wide) + 0.3 * (len(kinds) > 1) for pictures in kinds.values()]
        whole = Figure(figsize=(wide, tall + sum(below)), layout="constrained", facecolor="white")
        FigureCanvasAgg(whole)
        figure: FigureBase = whole
        if kinds:
            figure, *rest = whole.subfigures(1 + len(kinds), 1, squeeze=False, height_ratios=(tall, *below))[:, 0]
            for part, (kind, pictures) in zip(rest, kinds.items(), strict=True):
                _draw_pictures(part, pictures, kind if len(kinds) > 1 else "")
        grid = figure.subplots(rows, columns, squeeze=False)
        axes = [ax for row in grid for ax in row]
        looks = _looks(result, panels)
        for ax, panel in zip(axes, panels, strict=False):
            (_draw_curves if panel.curve else _draw_dots)(ax, panel, looks)
            ax.set_title(panel.venue["title"] if len(panels) > 1 else "", loc="left", fontsize=10, color="#222222")
        for ax in axes[len(panels) :]:
            ax.set_visible(False)
        if any(panel.curve for panel in panels):
            _add_legend(figure, axes, whole)
        whole.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def against(board: Mapping[str, Any], cost: str) -> Mapping[str, Any] | None:
    """A leaderboard with its curves over what was spent until then, or None where it has no such numbers.

    A run spends evenly over the points of its curves, up to the whole that its metric says: so a round of federated
    training sends as much as any other. The first eight by rank are there, as nobody tells more lines apart.

    Args:
        board: in the form that the runner writes as JSON.
        cost: the metric of what is spent, such as megabytes; its mean over seeds counts.
    """
    arms: dict[str, Any] = {}
    for name in board.get("standing") or board["arms"]:
        arm = board["arms"][name]
        spent = _values(arm, cost)
        curves = {
            key: {**curve, "x": [sum(spent) / len(spent) * x / curve["x"][-1] for x in curve["x"]]}
            for key, curve in arm["curves"].items()
            if spent and curve["x"] and curve["x"][-1]
        }
        if any(len(_points({"curves": curves}, key)) > 1 for key in curves) and len(arms) < _LEGIBLE:
            label = board["metrics"][cost]["label"]
            arms[name] = {**arm, "curves": {key: {**curve, "x_label": label} for key, curve in curves.items()}}
    return {**board, "arms": arms} if arms else None


@dataclass(frozen=True)
class _Panel:
    """What is drawn of a venue: a curve, or where there is none a metric."""

    venue: Mapping[str, Any]
    metric: str
    curve: str

    @property
    def label(self) -> str:
        name = self.curve or self.metric
        if name in self.venue["metrics"]:
            return str(self.venue["metrics"][name]["label"])
        return f"{name.replace('_', ' ')} (%)" if self.percent else name.replace("_", " ")

    @property
    def percent(self) -> bool:
        """Whether its numbers are fractions to be shown as per cent; a curve may bear another name than its metric."""
        metrics = self.venue["metrics"]
        name = self.curve or self.metric
        if name in metrics:
            return bool(metrics[name]["percent"])
        kin = [m["percent"] for other, m in metrics.items() if other.split("_")[-1] == name.split("_")[-1]]
        return bool(kin and kin[0])


def _venues(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The venues to draw: that of the headline, then those of the claims, then the others."""
    if "venues" not in result:
        return [result]
    claims = [result["headline"], *result["claims"]]
    order = list(dict.fromkeys(claim["venue"] for claim in claims))
    return sorted(result["venues"], key=lambda v: order.index(v["title"]) if v["title"] in order else len(order))


def _panels(result: Mapping[str, Any], boards: Sequence[Mapping[str, Any]] = ()) -> list[_Panel]:
    claims = [result["headline"], *result["claims"]] if "headline" in result else []
    axes = list(venues_along(result, boards)) if claims and boards else []
    panels = []
    for venue in _venues(result):
        if along := next((found for found, titles in axes if venue["title"] in titles), None):
            panel = _Panel(along, "", next(iter(along["metrics"])))
            panels += [panel] if panel not in panels else []
            # Beside the axis only the headline's own variant is shown, with all that is compared there.
            if venue["title"] != claims[0]["venue"]:
                continue
        held = list(venue["arms"].values())
        claimed = [claim["on"] for claim in claims if claim["venue"] == venue["title"]]
        shown = [n for n in (*claimed, *venue["metrics"]) if any(_values(arm, n) for arm in held)]
        names = list(dict.fromkeys(name for arm in held for name in arm["curves"]))
        curves = [name for name in names if any(len(_points(arm, name)) > 1 for arm in held)]
        if len(held) > _LEGIBLE:
            curves = []  # nobody tells so many lines apart
        # The curve that the claim's metric is the end of, else the first one.
        fitting = [name for name in curves if shown and name.split("_")[-1] == shown[0].split("_")[-1]]
        if curves or shown:
            panels.append(_Panel(venue, (shown or [""])[0], (fitting or curves or [""])[0]))
    # Dots of one contestant alone tell nothing where there is anything else to see.
    compared = [panel for panel in panels if panel.curve or len(panel.venue["arms"]) > 1]
    return (compared or panels)[:_PANELS]


def _pictures(result: Mapping[str, Any]) -> dict[str, dict[str, Picture]]:
    """What is to be shown of what contestants made, by kind and name: those that claims name first."""
    claims = [result["headline"], *result["claims"]] if "headline" in result else []
    order = list(dict.fromkeys(name for claim in claims for name in (claim["arm"], claim.get("other"))))
    kinds: dict[str, dict[str, Picture]] = {}
    for venue in _venues(result):
        arms = sorted(venue["arms"].items(), key=lambda e: order.index(e[0]) if e[0] in order else 99)
        for label in dict.fromkeys(label for _, arm in arms for label in arm.get("pictures", {})):
            found = [(name, arm["pictures"][label]) for name, arm in arms if label in arm.get("pictures", {})]
            shown = found[: SHOWN[bool(kinds)]]
            kinds[f"{venue['title']}: {label}"] = {name: Picture(**picture) for name, picture in shown}
    return dict(list(kinds.items())[:_KINDS])


def _columns(pictures: Mapping[str, Picture]) -> int:
    return 2 if max(picture.width / picture.height for picture in pictures.values()) > 2.5 else 4


def _height(pictures: Mapping[str, Picture], wide: float) -> float:
    """Inches that the pictures of a kind need below the panels."""
    columns = _columns(pictures)
    tallest = max(picture.height / picture.width for picture in pictures.values())
    return math.ceil(len(pictures) / columns) * (wide / columns * tallest + 0.35)


def _draw_pictures(figure: SubFigure, pictures: Mapping[str, Picture], heading: str) -> None:
    columns = _columns(pictures)
    axes = list(figure.subplots(math.ceil(len(pictures) / columns), columns, squeeze=False).flat)
    if heading:
        figure.suptitle(heading, x=0.01, ha="left", fontsize=10, color="#222222")
    for ax in axes:
        ax.set_axis_off()
    for ax, (name, picture) in zip(axes, pictures.items(), strict=False):
        ax.imshow(picture.pixels(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        ax.set_title(name, loc="left", fontsize=9, color="#222222")


def _points(arm: Mapping[str, Any], name: str) -> list[tuple[float, float]]:
    curve = arm["curves"].get(name, {"x": [], "y": []})
    return [(x, y) for x, y in zip(curve["x"], curve["y"], strict=True) if x is not None and y is not None]


def _values(arm: Mapping[str, Any], metric: str) -> list[float]:
    return [value for value in arm["metrics"].get(metric, ()) if value is not None and math.isfinite(value)]


def _looks(result: Mapping[str, Any], panels: Sequence[_Panel]) -> dict[str, dict[str, Any]]:
    """Contestant -> its colour and dashes; the paper's own stand out from what they are compared with."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.venue["arms"]))
    claims = [result["headline"], *result["claims"]] if "headline" in result else []
    claimed = {claim["arm"] for claim in claims}
    if not claims and len(names) > _LEGIBLE:  # a leaderboard: papers stand out from the references
        papers = {n: bool(arm.get("paper")) for panel in panels for n, arm in panel.venue["arms"].items()}
        return {n: {"color": CLAIMED[0] if papers[n] else COMPARED[0]} for n in names}
    looks: dict[str, dict[str, Any]] = {}
    counts = {True: 0, False: 0}
    for name in names:
        ours = name in claimed or not claimed
        palette, number = CLAIMED if claimed and ours else (*CLAIMED, *COMPARED) if ours else COMPARED, counts[ours]
        looks[name] = {
            "color": palette[number % len(palette)],
            "linestyle": DASHES[number // len(palette) % len(DASHES)],
            "linewidth": 2.2 if ours else 1.6,
            "zorder": 3 if ours else 2,
        }
        counts[ours] += 1
    return looks


def _draw_curves(ax: Axes, panel: _Panel, looks: Mapping[str, Mapping[str, Any]]) -> None:
    scale = 100.0 if panel.percent else 1.0
    log, x_label, whole = panel.venue.get("log", ""), "", True
    for name, arm in panel.venue["arms"].items():
        points = _points(arm, panel.curve)
        if not points:
            continue
        x, y = zip(*points, strict=True)
        whole = whole and all(float(step).is_integer() for step in x)
        marker: dict[str, Any] = {"marker": "o", "markersize": 4} if len(x) <= 12 else {}
        ax.plot(x, [scale * value for value in y], label=name, **looks[name], **marker)
        curve = arm["curves"][panel.curve]
        band = [
            (step, scale * bottom, scale * top)
            for step, bottom, top in zip(curve["x"], curve.get("low") or (), curve.get("high") or (), strict=False)
            if None not in (step, bottom, top) and math.isfinite(bottom) and math.isfinite(top)
        ]
        if band:
            at, low, high = zip(*band, strict=True)
            if "y" in log:
                low = tuple(_above_zero(low, [scale * value for value in y]))
            ax.fill_between(at, low, high, color=looks[name]["color"], alpha=0.16, linewidth=0)
        x_label = x_label or curve.get("x_label", "")
    _set_scales(ax, log)
    if "x" not in log and whole:
        ax.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    ax.set_xlabel(textwrap.fill(x_label, _LABEL_WIDTH))
    ax.set_ylabel(textwrap.fill(panel.label, _LABEL_HEIGHT))


def _draw_dots(ax: Axes, panel: _Panel, looks: Mapping[str, Mapping[str, Any]]) -> None:
    from trimtab.studies.engine.verdict import interval

    scale = 100.0 if panel.percent else 1.0
    arms = panel.venue["arms"]
    log = "x" if "y" in panel.venue.get("log", "") else ""  # a metric's axis is the y axis of its curve
    for row, (name, arm) in enumerate(arms.items()):
        values = [scale * value for value in _values(arm, panel.metric)]
        if not values:
            continue
        mean, low, high = interval(values)
        if log:
            (low,) = _above_zero([low], values)
        color = looks[name]["color"]
        ax.scatter(values, [row] * len(values), s=16, color=color, alpha=0.35, linewidths=0)
        if len(values) > 1:
            ax.plot([low, high], [row, row], color=color, linewidth=2, solid_capstyle="round")
        ax.scatter([mean], [row], s=52, color=color, zorder=3)
    ax.set_yticks(range(len(arms)), list(arms))
    ax.set_ylim(len(arms) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    _set_scales(ax, log)
    ax.set_xlabel(textwrap.fill(panel.label, _LABEL_WIDTH))


def _above_zero(low: Sequence[float], values: Sequence[float]) -> list[float]:
    """Ends of intervals for a logarithmic axis: one below zero goes down to a tenth of the smallest value there is."""
    floor = min((value for value in values if value > 0), default=1e-12) / 10
    return [max(end, floor) for end in low]


def _set_scales(ax: Axes, log: str) -> None:
    """Sets the axes that are to be logarithmic; where less than a decade is shown, ticks stand at round numbers."""
    from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

    for name, change, axis in (("x", ax.set_xscale, ax.xaxis), ("y", ax.set_yscale, ax.yaxis)):
        if name not in log:
            continue
        change("log")
        low, high = getattr(ax.dataLim, f"interval{name}")
        if 0 < low <= high < 10 * low:
            axis.set_major_locator(MaxNLocator(4))
            axis.set_major_formatter(ScalarFormatter())
            axis.set_minor_formatter(NullFormatter())


def _add_legend(figure: FigureBase, axes: Sequence[Axes], whole: Figure) -> None:
    """One legend for all panels, over them, in the order of the contestants; as many beside each other as have room."""
    handles: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    for columns in range(max(1, min(len(handles), 4)), 0, -1):
        legend = figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=columns, frameon=False)
        if columns == 1 or legend.get_window_extent().width <= whole.bbox.width:
            break
        legend.remove()
