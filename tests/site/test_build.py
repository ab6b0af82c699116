"""What the site is made of, without a browser."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("mkdocs")

from trimtab.catalog import Catalog
from trimtab.site import build
from trimtab.site.docstrings import documented, example
from trimtab.site.equations import mathml, on_page_content
from trimtab.site.pages import _board, _choose, _text


def test_a_folder_that_is_not_a_site_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="is not a site"):
        build(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_place_of_the_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "site").write_text("a file")
    with pytest.raises(FileExistsError, match="is not a site"):
        build(tmp_path / "site")
    assert (tmp_path / "site").read_text() == "a file"


def test_latex_of_a_page_becomes_mathml() -> None:
    page = on_page_content(r'<p><span class="arithmatex">\(a &lt; b\)</span></p>', page=None)
    assert "<math>" in page
    assert "<mo>&lt;</mo>" in page
    assert "arithmatex" not in page


def test_two_equations_without_a_line_between_them_are_two() -> None:
    page = on_page_content('<div class="arithmatex">\\[\na\n$$\n$$\nb\n\\]</div>')
    assert page.count("<math") == 2
    assert "$" not in page


def test_an_example_brings_its_imports() -> None:
    script = example("trimtab.losses.ELR")
    assert "from trimtab.losses import ELR" in script
    assert script.count("import torch") == 1
    assert ">>>" not in script
    compile(script, "example", "exec")


def test_a_name_that_is_not_there_has_no_example() -> None:
    assert example("trimtab.losses.Nothing") == ""
    assert not documented("trimtab.losses.Nothing")
    assert documented("trimtab.losses.ELR")


@pytest.mark.parametrize(
    "latex",
    [
        r"\begin{aligned} a &= b \\ c &= d \end{aligned}",
        r"\operatorname*{arg\,min}_x \bigl\lVert x \bigr\rVert_2^2",
        r"\begin{cases} a & x > 0 \\ b & \text{else} \end{cases}",
        r"\mathbb{E}_{x \sim p}\left[\tfrac12 \hat\theta\right]",
    ],
)
def test_the_latex_of_papers_is_understood(latex: str) -> None:
    assert mathml(latex, block=True).startswith('<math display="block">')


def test_latex_that_cannot_be_read_is_shown_as_it_is() -> None:
    assert mathml(r"\frac{1 < 2") == r"<code>\frac{1 &lt; 2</code>"


def test_words_mean_nothing_to_markdown() -> None:
    assert _text("a_b *c* |x| <= $1") == r"a\_b \*c\* \|x\| &lt;= \$1"


def metric(label: str, best: str | None = "max") -> dict[str, object]:
    return {"label": label, "best": best, "percent": False}


def result(paper: str, arms: dict[str, list[float | None]]) -> dict[str, object]:
    held = {arm: {"metrics": {"score": values}, "curves": {}, "seconds": [1.0]} for arm, values in arms.items()}
    return {"paper": paper, "arms": held, "metrics": {"score": metric("score")}, "seeds": [0]}


def test_a_leaderboard_orders_arms_and_shows_a_shared_baseline_once() -> None:
    board = _board(
        Catalog(),
        [
            result("elr", {"cross-entropy": [1.0, 1.2], "ELR": [3.0, 3.2]}),
            result("ldr", {"cross-entropy": [1.0, 1.2], "LDR": [2.0, None]}),
        ],
    )
    rows = [row.split("|")[1].split()[0] for row in board.splitlines()[2:]]
    assert rows == ["ELR", "LDR", "cross-entropy"]
    assert "**3.1 ± " in board
    assert "| 2 |" in board  # one seed has no interval
    assert "[elr](losses/elr.md), [ldr](losses/ldr.md)" in board


def test_methods_stand_by_what_they_are_for_and_those_that_hold_come_first() -> None:
    claim = {"text": "it helps", "verdict": "holds", "effect": 0.05, "interval": [0.04, 0.06]}
    measured = {
        "elr": {"verdict": "partly", "claims": [claim, {**claim, "effect": None, "interval": None, "reason": "a tie"}]},
        "ldr": {"verdict": "holds", "claims": [claim]},
    }
    page = "\n".join(_choose(Catalog(), measured)).partition("## Noisy labels")[2].partition("\n## ")[0]
    assert page.index("losses/ldr.md") < page.index("losses/elr.md")
    assert "it helps: **0.05** (95 % interval 0.04 to 0.06)" in page
    assert "it helps: a tie" in page
    assert "Not measured yet: " in page
    assert "comp\\_sum" in page


@pytest.mark.parametrize("slug", [paper.slug for paper in Catalog() if paper.use])
def test_the_examples_on_a_card_run_as_they_stand(slug: str) -> None:
    for name in Catalog()[slug].use:
        exec(compile(example(name), name, "exec"), {})
