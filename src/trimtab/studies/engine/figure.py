"""The figure of a result: lines with bands where its arms have curves, dots with intervals where they have none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draws a result into a file.

    Args:
        result: a study's outcome or a leaderboard, in the form the runner writes as JSON.
        path: where to; the ending decides the format (`.svg`, `.png`, `.pdf`).

    Raises:
        ValueError: if the result has no arms, no metric to draw, or the format is unknown.
        OSError: if the file cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not result.get("arms"):
        raise ValueError("result: it has no arms to draw")
    curves, metrics = _curves(result), _claimed_metrics(result)
    if not curves and not metrics:
        raise ValueError("result: it has neither curves nor metrics to draw")
    # A figure of its own, so that the state of the caller's pyplot is left alone.
    with mpl.rc_context(_STYLE):
        panels = len(curves or metrics)
        height = 3.5 if curves else 1.3 + 0.34 * len(result["arms"])
        figure = Figure(figsize=(max(6.4, 4.3 * panels), height), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, panels, squeeze=False, sharey=not curves)[0]
        for ax, name in zip(axes, curves or metrics, strict=True):
            (_draw_curve if curves else _draw_dots)(ax, name, result)
        if curves:
            _add_legend(figure, axes)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def _curves(result: Mapping[str, Any]) -> list[str]:
    """Names of the curves to draw: the study's choice, or the first three."""
    held = list(dict.fromkeys(name for arm in result["arms"].values() for name in arm.get("curves", {})))
    chosen = held[:3] if result.get("plot") is None else [name for name in result["plot"] if name in held]
    return [name for name in chosen if any(len(_points(arm, name)) > 1 for arm in result["arms"].values())]


def _points(arm: Mapping[str, Any], name: str) -> list[tuple[float, float]]:
    curve = arm.get("curves", {}).get(name, {"x": [], "y": []})
    return [(x, y) for x, y in zip(curve["x"], curve["y"], strict=True) if x is not None and y is not None]


def _claimed_metrics(result: Mapping[str, Any]) -> list[str]:
    """Names of the metrics to draw: those of the claims, or the task's first, at most three."""
    held = {name for arm in result["arms"].values() for name in arm["metrics"]}
    claimed = dict.fromkeys(claim["on"] for claim in result.get("claims", ()))
    return [name for name in claimed or result.get("metrics", ()) if name in held][:3]


def _looks(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Arm -> its colour and dashes; the arms that claims are about stand out from what they are compared with."""
    claimed = dict.fromkeys(claim["arm"] for claim in result.get("claims", ()))
    looks: dict[str, dict[str, Any]] = {}
    counts = {True: 0, False: 0}
    for arm in result["arms"]:
        ours = arm in claimed or not claimed
        palette, number = CLAIMED if claimed and ours else (*CLAIMED, *COMPARED) if ours else COMPARED, counts[ours]
        looks[arm] = {
            "color": palette[number % len(palette)],
            "linestyle": DASHES[number // len(palette) % len(DASHES)],
            "linewidth": 2.2 if ours else 1.6,
            "zorder": 3 if ours else 2,
        }
        counts[ours] += 1
    return looks


def _scale_and_label(name: str, result: Mapping[str, Any]) -> tuple[float, str]:
    """Factor and axis label of a metric or a curve; a curve takes the unit of the metric that ends in the same word."""
    metrics = result.get("metrics", {})
    if name in metrics:
        return (100.0 if metrics[name]["percent"] else 1.0), metrics[name]["label"]
    words = name.replace("_", " ")
    for other, metric in metrics.items():
        if other.split("_")[-1] == name.split("_")[-1]:
            unit = metric["label"][metric["label"].rfind("(") :] if metric["label"].endswith(")") else ""
            return (100.0 if metric["percent"] else 1.0), f"{words} {unit}".strip()
    return 1.0, words


def _draw_curve(ax: Axes, name: str, result: Mapping[str, Any]) -> None:
    scale, label = _scale_and_label(name, result)
    x_label = ""
    for arm, look in _looks(result).items():
        points = _points(result["arms"][arm], name)
        if not points:
            continue
        x, y = zip(*points, strict=True)
        marker: dict[str, Any] = {"marker": "o", "markersize": 4} if len(x) <= 12 else {}
        ax.plot(x, [scale * value for value in y], label=arm, **look, **marker)
        curve = result["arms"][arm]["curves"][name]
        band = [
            (step, scale * bottom, scale * top)
            for step, bottom, top in zip(curve["x"], curve.get("low") or (), curve.get("high") or (), strict=False)
            if None not in (step, bottom, top) and math.isfinite(bottom) and math.isfinite(top)
        ]
        if band:
            at, low, high = zip(*band, strict=True)
            ax.fill_between(at, low, high, color=look["color"], alpha=0.16, linewidth=0)
        x_label = x_label or curve.get("x_label") or ("epoch" if _counts_from_one(x) else "")
    _set_scales(ax, result.get("log", ""))
    ax.set_xlabel(x_label)
    ax.set_title(label, loc="left", fontsize=10, color="#222222")


def _counts_from_one(x: Sequence[float]) -> bool:
    return list(x) == [float(step) for step in range(1, len(x) + 1)]


def _draw_dots(ax: Axes, name: str, result: Mapping[str, Any]) -> None:
    from trimtab.studies.verdict import interval

    scale, label = _scale_and_label(name, result)
    arms = list(result["arms"])
    for row, (arm, look) in enumerate(_looks(result).items()):
        held = result["arms"][arm]["metrics"].get(name, ())
        values = [scale * value for value in held if value is not None and math.isfinite(value)]
        if not values:
            continue
        mean, low, high = interval(values)
        ax.scatter(values, [row] * len(values), s=16, color=look["color"], alpha=0.35, linewidths=0)
        if len(values) > 1:
            ax.plot([low, high], [row, row], color=look["color"], linewidth=2, solid_capstyle="round")
        ax.scatter([mean], [row], s=52, color=look["color"], zorder=3)
    ax.set_yticks(range(len(arms)), arms)
    ax.set_ylim(len(arms) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    _set_scales(ax, "x" if "y" in result.get("log", "") else "")  # a metric's axis is the y axis of its curve
    ax.set_xlabel(label)


def _set_scales(ax: Axes, log: str) -> None:
    for axis, change in (("x", ax.set_xscale), ("y", ax.set_yscale)):
        if axis in log:
            change("log")


def _add_legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend for all panels, over them, in the order of the arms."""
    handles: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    columns = max(1, min(len(handles), 4))
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=columns, frameon=False)
