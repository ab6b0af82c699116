"""The command `trimtab`: find papers, see what is known of them, re-run their claims, build the site.

Every command imports what it needs when it runs, so that those that only read the catalogue answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Never, get_type_hints

import click
import typer
import typer.core
import typer.main

from trimtab import __version__
from trimtab.cli import card, catalogue, site, studies, tasks

# As TYPER_USE_RICH=0 does; with rich the help has a backslash before every bracket.
typer.core.HAS_RICH = False

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
        sys.exit(_built()(standalone_mode=False) or 0)
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


def _built() -> click.Command:
    """The command of `app`, with the help of arguments, which click 8.5 drops where typer makes them."""
    command = typer.main.get_command(app)
    assert isinstance(command, click.Group)
    for registered in app.registered_commands:
        assert registered.callback is not None
        hints = get_type_hints(registered.callback, include_extras=True)
        made = command.commands[registered.name or registered.callback.__name__]
        for argument in made.params:
            if isinstance(argument, typer.core.TyperArgument) and not argument.help:
                words = hints[argument.name].__metadata__[0].help
                argument.get_help_record = _with_words(argument, words)  # type: ignore[assignment, method-assign]
    return command


def _with_words(argument: typer.core.TyperArgument, words: str) -> Callable[[click.Context], tuple[str, str] | None]:
    """What a line of the help says of an argument, the words before what typer says of it."""
    record = argument.get_help_record

    def full(ctx: click.Context) -> tuple[str, str] | None:
        found = record(ctx)
        return found and (found[0], f"{words}  {found[1]}".strip())

    return full


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
for _each in (catalogue.search, card.show, studies.run, tasks.tasks, tasks.compare, studies.report, site.site):
    app.command()(_each)
