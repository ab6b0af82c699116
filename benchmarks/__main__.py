"""Speed and memory beside what a user would pick today, as one table: `python -m benchmarks [--area optim] [--quick]`.

Every `bench_<area>.py` and `bench_<area>_<topic>.py` here has `rows(quick)`, which measures and yields one flat dict a
row. Each ratio comes from interleaved repeats in one process, so that it holds when the machine's speed drifts.
"""

import argparse
import importlib
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table


def main() -> None:
    names = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    areas = sorted({name.partition("_")[0] for name in names})
    parser.add_argument("--area", choices=[*areas, *(name for name in names if "_" in name)], help="only this area")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs, not how fast")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    console, found = Console(), []
    for area in names:
        if options.area and area != options.area and area.partition("_")[0] != options.area:
            continue
        module = importlib.import_module(f"benchmarks.bench_{area}")
        table = Table("what", "ours", "peer", "ratio", "aim", "met", "note", title=area, title_justify="left")
        with console.status(f"measuring {area}"):
            for row in module.rows(quick=options.quick):
                found.append({"area": area, **row})
                unit = row.get("unit", "")
                table.add_row(
                    str(row["what"]),
                    _number(row.get("ours"), unit),
                    _number(row.get("peer"), unit),
                    _number(row.get("ratio")),
                    str(row.get("aim", "")),
                    {True: "yes", False: "no", None: ""}[row.get("met")],
                    str(row.get("note", "")),
                )
        console.print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def _number(value: object, unit: str = "") -> str:
    if value is None:
        return ""
    return f"{value:.4g} {unit}".strip() if isinstance(value, int | float) else f"{value} {unit}".strip()


if __name__ == "__main__":
    main()
