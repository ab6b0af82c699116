"""The command `trimtab`: find papers, see what is known of them, re-run their claims, build the site.

Every command imports what it needs when it runs, so that those that only read the catalogue answer at once.
"""

from __future__ import annotations

import sys
from typing import Annotated, Never

import click
import typer

from trimtab import __version__
from trimtab.cli import card, catalogue, site, studies, tasks

app = typer.Typer(
    name="trimtab",
    help="Published methods that steer large models, and whether their papers' claims hold.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    suggest_commands=False,  # click suggests them already
    pretty_exceptions_enable=False,
)


def main() -> Never:
    """Runs the command line and exits; what a user can put right is one line on stderr and a non-zero exit."""
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        sys.exit(2)
    except click.ClickException as error:
        message, code = error.format_message(), error.exit_code
    except (KeyboardInterrupt, click.Abort):
        message, code = "interrupted", 130
    except (BrokenPipeError, SystemExit) as ended:
        if not any(isinstance(error, BrokenPipeError) for error in (ended, ended.__context__)):
            raise
        # The reader (`head`, a pager) has gone, of which click makes an exit with 1; nobody waits for the rest.
        sys.stdout = None
        sys.exit(0)
    print(f"trimtab: {message}", file=sys.stderr)
    sys.exit(code)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"trimtab {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options of the command as a whole."""


app.command("list")(catalogue.list_papers)
for _command in (catalogue.search, card.show, studies.run, tasks.tasks, tasks.compare, studies.report, site.site):
    app.command()(_command)
