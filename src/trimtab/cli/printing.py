"""How commands print: JSON, tables and paragraphs, coloured on a terminal and plain elsewhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

COLOURS = {
    **{"works": "green", "partial": "yellow", "planned": "bright_black"},
    **{"holds": "green", "fails": "red", "not shown": "magenta"},
}


def print_json(value: object) -> None:
    """Prints a value as JSON."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], styles: Mapping[str, str] | None = None) -> None:
    """Prints rows: as a table on a terminal, with tabs between the cells and no heading elsewhere.

    Args:
        columns: the headings.
        rows: the cells, as many in each as there are headings.
        styles: cell -> the rich style it is shown in.
    """
    if not sys.stdout.isatty():
        for row in rows:
            print("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, no_wrap=number == 0)
    for row in rows:
        table.add_row(*(Text(cell, style=(styles or {}).get(cell, "")) for cell in row))
    Console().print(table)


def print_rich_tables(*tables: Table) -> None:
    """Prints tables: as wide as the terminal; in a file or a pipe without a frame, each row on one line."""
    from rich import box
    from rich.console import Console

    if sys.stdout.isatty():
        for table in tables:
            table.box = box.SIMPLE_HEAD
            Console().print(table)
        return
    console = Console(width=1000)
    with console.capture() as text:
        for table in tables:
            table.box, table.pad_edge = None, False
            console.print(table)
    print("\n".join(line.rstrip() for line in text.get().splitlines()))


def terminal_width() -> int | None:
    """Columns of the terminal; None for a file or a pipe, which take all there is."""
    import shutil

    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def page_width() -> int:
    """Columns of a paragraph: those of the terminal, as many as read well at most."""
    import shutil

    return min(100, shutil.get_terminal_size((100, 24)).columns)


def print_paragraph(text: str, indent: int = 0, **style: Any) -> None:
    """Prints a paragraph, wrapped to the terminal; `typer.echo` leaves the colours out where the output is not one."""
    import textwrap

    room = " " * indent
    wrapped = textwrap.fill(text, page_width(), initial_indent=room, subsequent_indent=room, break_on_hyphens=False)
    typer.echo(typer.style(wrapped, **style))


def print_heading(text: str, **style: Any) -> None:
    """Prints an empty line and a heading in bold."""
    typer.echo()
    print_paragraph(text, bold=True, **style)
