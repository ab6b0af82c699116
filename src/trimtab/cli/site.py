"""`trimtab site`: the papers, their evidence and the leaderboards as web pages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli import catalogue
from trimtab.cli.errors import fail


def site(
    out: Annotated[Path, typer.Option(help="Folder of the built site.")] = Path("site"),
    results: Annotated[
        Path | None, typer.Option(help="Folder of results; by default the committed ones.", show_default=False)
    ] = None,
) -> None:
    """Build the site.

    A card per paper, a page per area, and the leaderboards.
    """
    from trimtab.catalog import Catalog, CatalogError

    catalog = catalogue.read_catalog() if results is None else Catalog(results)
    try:
        from trimtab.site import build

        build(out, catalog)
    except (ImportError, OSError, CatalogError) as error:
        fail(f"the site cannot be built in {out}: {error}" if isinstance(error, OSError) else str(error))
    print(f"{out / 'index.html'}\nread it with: python -m http.server --bind 127.0.0.1 --directory {out}")
