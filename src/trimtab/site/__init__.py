"""The site: a card per paper, a page per area, the leaderboards; made from the catalogue, the docstrings and results.

The pages are written as Markdown and built by MkDocs with its Material theme. Nothing in them comes from another
machine: no web fonts, no scripts from elsewhere, and equations are MathML.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from trimtab.catalog import CHECKOUT, PACKAGE, Catalog
from trimtab.site.pages import write_pages

_HERE = Path(__file__).parent
_MARK = ".trimtab-site"


def build(out: Path, catalog: Catalog | None = None) -> Path:
    """Builds the site.

    Args:
        out: folder of the site; made, or replaced if it is a site that was built before.
        catalog: papers and results; the library's own by default.

    Returns:
        The path of the first page.

    Raises:
        ImportError: if MkDocs is not installed.
        OSError: if the folder cannot be written, or holds something other than a site.
        CatalogError: if a papers.toml or a result cannot be read.
    """
    try:
        from mkdocs.commands.build import build as build_pages
        from mkdocs.config import load_config
    except ImportError as error:
        raise ImportError(f'the site needs MkDocs ({error}): pip install "trimtab[docs]"') from None
    out = out.absolute()
    if out.exists() and not (out / _MARK).exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not a site; choose a new or empty folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    # Built beside its place and then moved there, so that a failed build leaves the old site as it was.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        source, built = Path(scratch, "source"), Path(scratch, "site")
        source.mkdir()
        nav = write_pages(source, catalog or Catalog())
        shutil.copytree(_HERE / "assets", source / "assets")
        config = Path(scratch, "mkdocs.yml")
        config.write_text(json.dumps(_settings(source, built, nav)), encoding="utf-8")  # JSON is YAML
        build_pages(load_config(str(config)))
        _search_short_words_whole(built)
        (built / _MARK).touch()
        if out.exists():
            out.replace(Path(scratch, "old"))
        built.replace(out)
    return out / "index.html"


def _search_short_words_whole(built: Path) -> None:
    """Lets the search take a word of up to three letters as a whole word: "SAM" is not the beginning of "sample".

    Material's search puts an asterisk behind every word; its script has no setting for that, so it is edited here.
    """
    for script in built.glob("assets/javascripts/workers/search.*.js"):
        text = script.read_text(encoding="utf-8")
        script.write_text(text.replace("?r:`${r}*`", "||r.length<4?r:`${r}*`"), encoding="utf-8")


def _settings(source: Path, built: Path, nav: list[object]) -> dict[str, object]:
    """The configuration of MkDocs."""
    day_and_night = [
        {
            "media": f"(prefers-color-scheme: {scheme})",
            "scheme": palette,
            "primary": "indigo",
            "accent": "deep orange",
            "toggle": {"icon": icon, "name": f"Switch to {other}"},
        }
        for scheme, palette, icon, other in (
            ("light", "default", "material/weather-night", "dark"),
            ("dark", "slate", "material/weather-sunny", "light"),
        )
    ]
    api = {
        "docstring_style": "google",
        "docstring_options": {
            "returns_multiple_items": False,
            "returns_named_value": False,
            # `low, high:` describes two arguments at once, of which griffe warns on hundreds of lines.
            "warnings": False,
        },
        "show_source": True,
        "show_root_heading": True,
        "show_root_full_path": True,
        "show_bases": False,
        "merge_init_into_class": True,
        "extensions": ["trimtab.site.examples:PluralExamples"],
        "show_symbol_type_heading": True,
        "heading_level": 3,
        "separate_signature": True,
        "show_signature_annotations": True,
        "line_length": 100,
        "allow_inspection": False,
        "docstring_section_style": "list",
    }
    return {
        "site_name": "trimtab",
        "site_description": "Published methods that steer large models, and whether their papers' claims hold.",
        "docs_dir": str(source),
        "site_dir": str(built),
        "nav": nav,
        "strict": False,
        "theme": {
            "name": "material",
            "font": False,
            "logo": "assets/logo.svg",
            "favicon": "assets/logo.svg",
            "palette": day_and_night,
            "features": [
                "navigation.tabs",
                "navigation.tabs.sticky",
                "navigation.indexes",
                "navigation.prune",
                "navigation.top",
                "search.highlight",
                "search.suggest",
                "content.code.copy",
                "toc.follow",
            ],
        },
        "extra_css": ["assets/style.css"],
        "plugins": [
            "search",
            {"mkdocstrings": {"handlers": {"python": {"paths": [str(PACKAGE.parent)], "options": api}}}},
        ],
        "hooks": [str(_HERE / "equations.py")],
        "markdown_extensions": [
            "admonition",
            "pymdownx.details",
            "attr_list",
            "md_in_html",
            "tables",
            {"toc": {"permalink": True}},
            "pymdownx.superfences",
            "pymdownx.highlight",
            {"pymdownx.arithmatex": {"generic": True}},
            {"pymdownx.snippets": {"base_path": [str(CHECKOUT or PACKAGE)], "check_paths": False}},
        ],
    }
