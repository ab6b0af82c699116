"""How outcomes are told: numbers as people write them, a verdict in one sentence, tables for a terminal.

Everything here reads the plain data of `Outcome.as_json` and `board_json`, so that the command line, the site and a
reader of the files in `results/` see the same. Importing it is cheap: neither PyTorch nor NumPy is needed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.catalog.shapes import BOARD, misfit
from trimtab.studies.engine.wording import (
    Data,
    amount,
    bound_of,
    closed,
    directions,
    fixed,
    in_sentence,
    in_unit,
    label,
    number,
    subject,
    together,
)

if TYPE_CHECKING:
    from rich.table import Table

VERDICT_STYLE = {"holds": "green", "fails": "red", "not shown": "yellow"}

_PLAIN: Data = {"label": "", "best": "max", "percent": False}


def mean_and_interval(values: Sequence[float | None], metric: Data = _PLAIN) -> str:
    """`mean ± half-width` of the 95 % interval; the mean alone where there is one value, or no spread to speak of.

    Example:
        >>> mean_and_interval([0.5, 0.51, 0.52], {"percent": True})
        '51.0 ± 2.5'
        >>> mean_and_interval([0.05, 0.05 + 1e-17])
        '0.05'
    """
    from trimtab.studies.engine.verdict import interval

    held = [float(value) for value in values if value is not None and math.isfinite(value)]
    if not held:
        return "–"
    mean, low, high = interval(held)
    half = float(f"{(high - low) / 2:.1e}")  # two digits: 0.00996 is 0.010 and not 0.0100
    if len(held) == 1 or half <= 1e-9 * abs(mean):
        return amount(mean, metric)
    if metric["percent"]:
        mean, half = 100 * mean, 100 * half
        decimals = 1 if half >= 0.05 else 1 - math.floor(math.log10(half))
        return _at(mean, half, min(decimals, 5))
    large = max(abs(mean), half)
    if large < 1e-4 or large >= 1e6:
        return f"{number(mean)} ± {number(half, 2)}"
    # Both to the place of the half-width's second digit, so that no digit is shown that means nothing.
    return _at(mean, half, min(1 - math.floor(math.log10(half)), 5 - math.floor(math.log10(large))))


def _at(mean: float, half: float, decimals: int) -> str:
    values = [f"{round(value, decimals):,.{max(0, decimals)}f}".replace("-", "−") for value in (mean, half)]
    return " ± ".join(values) if float(values[1].replace(",", "")) else number(mean)


def venue_of(result: Data, claim: Data) -> Data:
    """The venue of a result that a claim is judged at; an empty one where the file has none of that name."""
    empty = {"title": claim.get("venue", ""), "metrics": {}, "arms": {}}
    return next((venue for venue in result["venues"] if venue["title"] == claim["venue"]), empty)


def effect_sentence(result: Data, claim: Data) -> str:
    """What was measured for a claim, in one sentence with a human unit.

    Such as "+15.6 points of final test accuracy over cross-entropy, 13.1 to 18.2, 5 seeds".
    """
    metric = {**_PLAIN, "label": str(claim["on"]), **venue_of(result, claim)["metrics"].get(claim["on"], {})}
    if claim["effect"] is None:
        return f"{label(metric)[0]}: {claim['reason'] or 'no number'}"
    if claim["other"] is None:
        main, ends = _of_a_bound(claim, metric)
    elif claim["ratio"]:
        main, ends = _of_a_ratio(claim, metric)
    else:
        main, ends = _of_a_difference(claim, metric)
    count = claim["seeds"]
    if ends is None:
        return f"{main}, {count} seed{'s' * (count != 1)}"
    return f"{main}, {ends[0]} to {ends[1]}, {count} seeds" if ends[0] != ends[1] else f"{main}, on all {count} seeds"


Ends = tuple[str, str] | None


def _interval(claim: Data) -> tuple[float, float] | None:
    held = claim.get("interval")
    return None if not held or None in held else (held[0], held[1])


def _of_a_bound(claim: Data, metric: Data) -> tuple[str, Ends]:
    told, ends = together(claim["effect"], _interval(claim), metric)
    return f"{subject(metric)[0]}: {in_unit(told, metric)} where {bound_of(claim, metric)} is claimed", ends


def _of_a_ratio(claim: Data, metric: Data) -> tuple[str, Ends]:
    """A ratio below one is turned round, so that nothing is "0.4 times higher"."""
    effect, ends, higher = claim["effect"], _interval(claim), claim["relation"] == "beats"
    if 0 < effect < 1:
        effect, higher = 1 / effect, not higher
        ends = None if ends is None else (1 / ends[1], 1 / ends[0]) if ends[0] > 0 else None
    factor, shown = _factors(effect, ends)
    words, other = closed(subject(metric)[0]), in_sentence(claim["other"])
    if factor == "1":
        return f"no difference from {other} in the {words.removeprefix('the ').rstrip(',')}", None
    return f"{words} {directions(metric)[not higher]} than for {other} by a factor of {factor}", shown


def _factors(value: float, ends: tuple[float, float] | None) -> tuple[str, Ends]:
    """A factor and the ends of its interval to the same place, by how far the lower end is and how large."""
    if ends is None or not 0 < ends[0] < value < ends[1] < math.inf:
        return number(value), None if ends is None else (number(ends[0]), number(ends[1]))
    place = min(math.log10(value - ends[0]), math.log10(ends[0]))
    decimals = min(1 - math.floor(place), 4)
    first, low, high = (fixed(one, decimals) for one in (value, *ends))
    return ("1", (low, high)) if not value - 1 >= 5e-5 else (first, (low, high))


def _of_a_difference(claim: Data, metric: Data) -> tuple[str, Ends]:
    """With the sign that the number itself has: a loss that fell shows a minus."""
    effect, ends = claim["effect"], _interval(claim)
    if claim["relation"] == "below":
        effect, ends = -effect, None if ends is None else (-ends[1], -ends[0])
    told, shown = together(effect, ends, metric)
    words, other = closed(subject(metric)[0]).removeprefix("the "), in_sentence(claim["other"])
    if not any(digit in told for digit in "123456789"):
        return f"no difference from {other} in the {words.rstrip(',')}", shown
    joint = "over" if effect > 0 and metric["best"] != "min" else "against"
    what = f"of {words}" if metric["percent"] and not words.startswith("share of") else f"in the {words}"
    return f"{'+' * (effect > 0)}{in_unit(told, metric, difference=True)} {what} {joint} {other}", shown


def claims_sentence(result: Data) -> str:
    """`5 of 7 further claims hold`; empty where there are none."""
    count = len(result["claims"])
    holding = sum(claim["verdict"] == "holds" for claim in result["claims"])
    one = 1 in (count, holding)
    return f"{holding} of {count} further claim{'s' * (count > 1)} hold{'s' * one}" if count else ""


def read_boards(results: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The leaderboards in a folder of results, and what is wrong with the files that were set aside."""
    found, problems = [], []
    for path in sorted((results / "tasks").glob("*/*.json")):
        try:
            board = json.loads(path.read_text(encoding="utf-8"))
            problem = misfit(board, BOARD)
            if problem or set(board["arms"]) != set(board["standing"]):
                raise ValueError(problem or "standing must be of the contestants in arms")
        except (OSError, ValueError, RecursionError) as error:
            problems.append(f"{path} is not a leaderboard: {error}")
        else:
            found.append(board)
    return found, problems


def standing_sentences(boards: Sequence[Data], paper: str) -> Iterator[str]:
    """Where a paper's entrants stand, one sentence a leaderboard.

    Such as "ELR: 3rd of 11 on label-noise, symmetric; GCE (2.2 points) is surely ahead".
    """
    for board in boards:
        for name, arm in board["arms"].items():
            if arm["paper"] != paper:
                continue
            held = board["standing"][name]
            place = f"{ordinal(held['rank'])} of {len(board['arms'])} on {board['task']}, {board['variant']}"
            ahead, count = held["behind"], len(held["ahead"])
            named = [f"{in_sentence(other)}{_lead(board, other, name)}" for other in ahead[:3]]
            shown = _listed(named) if len(ahead) <= 3 else f"{', '.join(named)} and {len(ahead) - 3} more"
            verb = "is" if len(ahead) == 1 else "are"
            better = f"{shown} {verb} surely ahead" if ahead else "nobody is surely ahead"
            others = f"{count} other{'s' * (count > 1)}"
            yield f"{name}: {place}; {better}" + (f"; it is surely ahead of {others}" if count else "")


def _lead(board: Data, first: str, second: str) -> str:
    """By how much one mean is better than another, in brackets; empty where a run has no number."""
    name, metric = next((n, m) for n, m in board["metrics"].items() if m["best"])
    values = [board["arms"][who]["metrics"].get(name, ()) for who in (first, second)]
    if not all(values) or any(v is None for held in values for v in held):
        return ""
    gap = abs(math.fsum(values[0]) / len(values[0]) - math.fsum(values[1]) / len(values[1]))
    return f" (by {in_unit(amount(gap, metric), metric, difference=True)})"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def ordinal(count: int) -> str:
    """`1st`, `2nd`, `11th`."""
    ending = {1: "st", 2: "nd", 3: "rd"}.get(count % 10 if count % 100 not in (11, 12, 13) else 0, "th")
    return f"{count}{ending}"


def shown_metrics(venue: Data) -> list[str]:
    """The metrics that somebody has a number of."""
    held = [arm["metrics"] for arm in venue["arms"].values()]
    return [n for n in venue["metrics"] if any(v is not None for metrics in held for v in metrics.get(n, ()))]


def ranked(venue: Data) -> list[str]:
    """The contestants by the mean of the first metric that has a direction, the best first."""
    first = next((name for name, metric in venue["metrics"].items() if metric["best"]), None)

    def score(name: str) -> float:
        values = [v for v in venue["arms"][name]["metrics"].get(first, ()) if v is not None]
        if not values or first is None:
            return math.inf
        mean = math.fsum(values) / len(values)
        return mean if venue["metrics"][first]["best"] == "min" else -mean

    return sorted(venue["arms"], key=score)


def setting_text(arm: Data) -> str:
    """What a contestant chose, with a mark where the choice sits at the edge of what it could choose from."""
    return ", ".join(
        f"{name} {number(value, 6) if type(value) in (int, float) else value}{' (edge)' * (name in arm['edge'])}"
        for name, value in arm["setting"].items()
    )


_DATA_TITLES = {
    "adult": "Adult",
    "breast_cancer": "breast cancer",
    "captured_motions": "DeepMimic's clips",
    "cifar10": "CIFAR-10",
    "fashion_mnist": "Fashion-MNIST",
    "japanese_vowels": "Japanese vowels",
    "mnist": "MNIST",
    "python_sources": "Python sources",
    "usps": "USPS",
}


def data_sentence(names: Sequence[str]) -> str:
    """On which data sets something ran, as people write their names; nothing where there are none.

    Example:
        >>> data_sentence(["digits", "fashion_mnist"])
        ' on digits, Fashion-MNIST'
    """
    titles = ", ".join(_DATA_TITLES.get(name, name) for name in names)
    return f" on {titles}" if titles else ""


def venue_heading(venue: Data, budget: str) -> str:
    """What a table of a venue is called: where, on which data, at which budget."""
    data = data_sentence(venue["data"])
    return f"{venue['title']}{data} ({budget}, {venue['seeds']} seed{'s' * (venue['seeds'] != 1)})"


def claims_table(result: Data) -> Table:
    """The headline and the further claims of a study, with what was found."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"{result['paper']} ({result['budget']})"), title_justify="left")
    for heading in ("", "claim", "measured", "verdict"):
        table.add_column(heading, overflow="fold")
    for place, claim in enumerate((result["headline"], *result["claims"])):
        where = f" ({claim['venue']})" if len(result["venues"]) > 1 else ""
        word = claim["verdict"] + (f" ({claim['reason']})" if claim["reason"] and claim["effect"] is not None else "")
        cells = ("" if place else "headline", claim["text"] + where, effect_sentence(result, claim))
        table.add_row(*map(Text, cells), Text(word, style=VERDICT_STYLE.get(claim["verdict"], "")))
    return table


_ROOM_FOR_NAMES, _ROOM_FOR_A_METRIC = 72, 15


def venue_table(venue: Data, budget: str, width: int | None = None) -> Table:
    """A venue's contestants by their numbers, mean and 95 % interval, the best first; a leaderboard has ranks too.

    Args:
        venue: of a result, or a leaderboard.
        budget: the budget of its runs.
        width: as many metrics as fit, the others named below; None shows all.
    """
    from rich.table import Table
    from rich.text import Text

    standing = venue.get("standing")
    names = list(standing) if standing else ranked(venue)
    held = shown_metrics(venue)
    room = len(held) if width is None else max(1, (width - _ROOM_FOR_NAMES) // _ROOM_FOR_A_METRIC)
    shown, others = held[:room], held[room:]
    chosen = any(arm["setting"] for arm in venue["arms"].values())
    below = (
        f"also measured: {', '.join(venue['metrics'][name]['label'] for name in others)} (--json)" if others else None
    )
    table = Table(
        title=Text(venue_heading(venue, budget)),
        title_justify="left",
        caption=Text(below) if below else None,
        caption_justify="left",
    )
    if standing:
        table.add_column("rank", justify="right")
    table.add_column("contestant", overflow="fold", min_width=min(24, max(map(len, names), default=1)))
    for name in shown:
        table.add_column(Text(venue["metrics"][name]["label"]), justify="right")
    for heading in (
        *(["chosen setting"] if chosen else []),
        *(["surely ahead of", "surely behind"] if standing else []),
    ):
        table.add_column(heading, overflow="fold")
    for name in names:
        arm = venue["arms"][name]
        cells = [name, *(mean_and_interval(arm["metrics"].get(m, ()), venue["metrics"][m]) for m in shown)]
        cells += [setting_text(arm)] if chosen else []
        if standing:
            place = standing[name]
            cells = [str(place["rank"]), *cells, str(len(place["ahead"])), "; ".join(place["behind"]) or "nobody"]
        table.add_row(*map(Text, cells))
    return table


def overall_table(task: str, places: Mapping[str, Any]) -> Table:
    """Who does well over several variants: mean rank with its interval, and the share of pairwise wins."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"{task}, over all variants"), title_justify="left")
    for heading in ("contestant", "mean rank", "95 % interval", "pairwise wins (%)"):
        table.add_column(heading, overflow="fold", justify="left" if heading == "contestant" else "right")
    for name, held in places.items():
        ends = f"{max(1, held.low):.1f} to {held.high:.1f}" if math.isfinite(held.high) else "–"
        table.add_row(Text(name), f"{held.rank:.1f}", ends, f"{100 * held.wins:.0f}")
    return table
