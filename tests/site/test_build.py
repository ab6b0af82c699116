"""What the site is made of, without a browser."""

from __future__ import annotations

import ast
import dataclasses
import html
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")

from trimtab.catalog import Catalog
from trimtab.site import build
from trimtab.site.boards import by_task, choose, leaderboards, venue_table
from trimtab.site.card import card
from trimtab.site.docstrings import documented, example
from trimtab.site.equations import mathml, on_page_content
from trimtab.site.fitting import WIDTH, fitted
from trimtab.site.news import feed, newest
from trimtab.site.text import plain
from trimtab.studies.engine.report import read_boards


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


def test_an_example_uses_what_it_makes() -> None:
    assert example("trimtab.semisup.ShrinkMatch").splitlines()[-1].startswith("print(")


@pytest.mark.parametrize("slug", [paper.slug for paper in Catalog() if paper.use])
def test_an_example_fits_into_a_terminal_and_says_the_same(slug: str) -> None:
    for script in filter(None, map(example, Catalog()[slug].use)):
        shown = fitted(script)
        assert max(map(len, shown.splitlines())) <= WIDTH
        assert ast.dump(ast.parse(shown)) == ast.dump(ast.parse(script))


def test_code_that_cannot_be_broken_stays_as_it_is() -> None:
    long = f"name = {'a' * 100!r}"
    assert fitted(long) == long
    assert fitted("call(") == "call("


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


HOSTILE = """# <script>alert(1)</script> [x](javascript:alert(1)) `code` | $a$ **b**
--8<-- "secret" { onclick=alert(1) } !!! note "q" 1. _x_ <img src=x onerror=alert(1)> ::: os"""


def test_words_mean_nothing_to_markdown_or_html() -> None:
    text = plain(HOSTILE)
    assert "\n" not in text
    assert not set('<>[]{}`*_|$!"\\#&') & set(re.sub(r"&#\d+;", "", text))
    assert html.unescape(text) == " ".join(HOSTILE.split())
    assert plain("83.3 ± 0.8") == "83.3 ± 0.8"
    assert plain("1. first") == "1&#46; first"


SAMPLE = Path(__file__).parents[1] / "sample_results"
BOARD = json.loads((SAMPLE / "tasks" / "label-noise" / "symmetric.json").read_text(encoding="utf-8"))
RESULT = json.loads((SAMPLE / "elr.json").read_text(encoding="utf-8"))


def test_a_leaderboard_is_in_the_order_of_the_first_metric_and_links_to_cards() -> None:
    rows = [row.split(" | ") for row in venue_table(BOARD, Catalog(), "../").splitlines()]
    assert rows[0][:3] == ["| rank", "contestant", "final test accuracy (%)"]
    assert [row[1].split()[0] for row in rows[2:]] == ["GCE", "ELR", "cross-entropy"]
    assert "[elr](../losses/elr.md)" in rows[3][1]
    assert rows[2][2] == "83.3&nbsp;±&nbsp;0.8"
    assert "(edge)" in rows[2][-2]
    assert rows[3][-1].startswith("GCE")


def test_an_empty_leaderboard_is_not_shown() -> None:
    empty = {**BOARD, "arms": {}, "standing": {}}
    numberless = {**BOARD, "arms": {name: {**arm, "metrics": {}} for name, arm in BOARD["arms"].items()}}
    assert by_task([empty, numberless]) == {}
    assert "Nothing is measured yet." in list(leaderboards([empty]))


def test_methods_stand_by_what_they_are_for_in_the_order_of_their_shared_task() -> None:
    board = {**BOARD, "arms": dict(BOARD["arms"]), "standing": dict(BOARD["standing"])}
    board["arms"]["LDR-KL"] = {**BOARD["arms"]["ELR"], "paper": "ldr"}
    board["standing"]["LDR-KL"] = {"rank": 4, "ahead": [], "behind": ["GCE", "ELR"], "level": []}
    results = {"elr": RESULT, "ldr": RESULT, "ps_kd": RESULT}
    page = "\n".join(choose(Catalog(), results, [board])).partition("## Noisy labels")[2].partition("\n## ")[0]
    assert page.index("GCE") < page.index("losses/elr.md") < page.index("losses/ldr.md")
    assert "[leaderboard](leaderboards/label-noise.md)" in page
    assert "surely better" in page
    assert Catalog()["ldr"].avoid in page
    assert "training time (s)" in page or "time of a run (s)" in page


def test_methods_for_one_thing_that_meet_on_several_tasks_are_on_each_of_them() -> None:
    """DEIS and DualFast on one, consistency models on another; who is on none comes below."""
    slugs = {"few": ("ict", "ctm"), "mixture": ("deis", "dualfast")}
    boards = []
    for task, entrants in slugs.items():
        arms = {slug: {**BOARD["arms"]["ELR"], "paper": slug} for slug in entrants}
        standing = {slug: {"rank": 1, "ahead": [], "behind": [], "level": []} for slug in entrants}
        boards.append({**BOARD, "task": task, "arms": arms, "standing": standing})
    results = dict.fromkeys(("ict", "ctm", "deis", "dualfast", "guided_distillation"), RESULT)
    page = "\n".join(choose(Catalog(), results, boards)).partition("## Few sampling steps")[2].partition("\n## ")[0]
    assert page.index("leaderboards/few.md") < page.index("leaderboards/mixture.md")
    own = page.partition("Judged on work of their own:")[2]
    assert "guided_distillation" in own
    assert "diffusion/deis.md" not in own


def test_of_equally_full_boards_the_one_of_the_headlines_is_shown() -> None:
    arms = {slug: {**BOARD["arms"]["ELR"], "paper": slug} for slug in ("elr", "ldr")}
    standing = {slug: {"rank": 1, "ahead": [], "behind": [], "level": []} for slug in arms}
    home = {**BOARD, "arms": arms, "standing": standing}
    away = {**home, "task": "elsewhere", "title": "elsewhere: everywhere"}
    results = {"elr": RESULT, "ldr": RESULT}
    assert home["title"] == RESULT["headline"]["venue"]
    for boards in ([home, away], [away, home]):
        page = "\n".join(choose(Catalog(), results, boards)).partition("## Noisy labels")[2].partition("\n## ")[0]
        assert "leaderboards/label-noise.md" in page
        assert "leaderboards/elsewhere.md" not in page


@pytest.mark.parametrize(
    ("words", "task"),
    [
        ("Noisy labels", "label-noise"),
        ("Choosing an optimizer", "image-classification"),
        ("Shifted test data", "domain-generalisation"),
        ("Guided sampling", "guided-sampling"),
    ],
)
def test_methods_are_ranked_by_the_task_that_is_about_what_they_are_for(words: str, task: str) -> None:
    results, _ = Catalog().outcomes()
    boards, _ = read_boards(Catalog().results)
    page = "\n".join(choose(Catalog(), results, boards)).partition(f"## {words}\n")[2].partition("\n## ")[0]
    assert page.partition("leaderboards/")[2].startswith(f"{task}.md")


def test_a_card_says_first_what_was_found() -> None:
    blocks = list(card(Catalog()["elr"], Catalog(SAMPLE), RESULT, [BOARD]))
    verdict = next(block for block in blocks if block.startswith("!!! verdict-holds"))
    assert "**&#43;15.6 points of final test accuracy over cross-entropy, 15.0 to 16.2, 5 seeds**" in verdict
    assert "2nd of 3 on label-noise, symmetric; GCE (by 2.5 points) is surely ahead" in verdict
    code = next(block for block in blocks if "Drop into your loop" in block)
    assert code.count("import torch") == 1
    assert ">>>" not in code
    order = [blocks.index(block) for block in (verdict, code)]
    order += [blocks.index(heading) for heading in ("## The method", "## Evidence", "## API", "## Cite")]
    assert order == sorted(order)
    assert "2 of 3 further claims hold:" in blocks
    assert any("Budget laptop on Fashion-MNIST: mean and 95 % interval" in block for block in blocks)
    entry = next(block for block in blocks if block.startswith("```bibtex"))
    assert "@article{elr," in entry
    assert "eprint = {2007.00151}" in entry


def test_a_card_has_the_short_forms_that_people_search_for_and_says_when_not_to_use_it() -> None:
    blocks = list(card(Catalog()["saf"], Catalog(SAMPLE), None, []))
    assert ", SAM." in blocks[-1]
    assert f"**Not when** {Catalog()['saf'].avoid}." in blocks


def test_a_function_that_bears_its_modules_name_is_shown_as_a_function() -> None:
    blocks = list(card(Catalog()["sinkhorn_newton_sparse"], Catalog(SAMPLE), None, []))
    assert any(
        block.startswith("::: trimtab.solvers.") and block.splitlines()[0].count("sinkhorn_newton_sparse") == 2
        for block in blocks
    )


def test_the_feed_is_atom_with_the_newest_first_and_nothing_live(tmp_path: Path) -> None:
    from xml.etree import ElementTree

    headline = RESULT["headline"] | {"effect": None, "reason": f"{HOSTILE}\x00"}
    results = {"elr": RESULT, "ldr": RESULT | {"created": "2030-01-01T00:00:00+00:00", "headline": headline}}
    root = ElementTree.fromstring(feed(Catalog(tmp_path), {**results, "ps_kd": RESULT | {"created": "<now>"}}))
    name = "{http://www.w3.org/2005/Atom}"
    assert [entry.findtext(f"{name}id") for entry in root.iter(f"{name}entry")] == [
        "tag:trimtab,2026:ldr",
        "tag:trimtab,2026:elr",
    ]
    assert root.findtext(f"{name}updated") == "2030-01-01T00:00:00+00:00"
    assert "15.6 points" in list(root.iter(f"{name}summary"))[1].text
    tags = ("feed", "title", "id", "published", "updated", "author", "name", "entry", "link", "summary")
    assert {element.tag for element in root.iter()} == {name + tag for tag in tags}


def test_a_method_is_new_from_its_first_result_on_and_not_when_it_is_run_again(tmp_path: Path) -> None:
    def git(*command: str, when: str = "2030-01-01T00:00:00Z") -> None:
        dates = {"GIT_AUTHOR_DATE": when, "GIT_COMMITTER_DATE": when}
        names = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(("git", *names, *command), cwd=tmp_path, check=True, capture_output=True, env=os.environ | dates)

    git("init")
    for slug, when in (("elr", "2027-01-01T00:00:00Z"), ("ldr", "2028-01-01T00:00:00Z")):
        tmp_path.joinpath(f"{slug}.json").write_text(when)
        git("add", ".")
        git("commit", "-m", slug, when=when)
    tmp_path.joinpath("elr.json").write_text("again")
    git("commit", "-am", "again", when="2029-01-01T00:00:00Z")
    results = {slug: RESULT | {"created": "2029-01-01T00:00:00+00:00"} for slug in ("elr", "ldr", "ps_kd")}
    assert [(since[:10], slug) for since, slug, _ in newest(Catalog(tmp_path), results)] == [
        ("2029-01-01", "ps_kd"),  # no result of it was committed
        ("2028-01-01", "ldr"),
        ("2027-01-01", "elr"),
    ]


def test_a_paper_built_from_an_abstract_is_flagged() -> None:
    paper = dataclasses.replace(Catalog()["elr"], source="abstract")
    assert any("built from the abstract alone" in block for block in card(paper, Catalog(SAMPLE), None, []))


@pytest.mark.parametrize("slug", [paper.slug for paper in Catalog() if paper.use])
def test_the_examples_on_a_card_run_as_they_stand(slug: str) -> None:
    for name in Catalog()[slug].use:
        exec(compile(example(name), name, "exec"), {})
