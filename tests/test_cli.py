"""The commands that read the catalogue, and the one that builds the site, as a user meets them."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab import __version__
from trimtab.catalog import Catalog
from trimtab.cli import catalogue, main

SLUGS = set(Catalog().papers)


class Command:
    """Runs `trimtab` in this process and keeps what it says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["trimtab", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = self.capsys.readouterr()
        return int(ended.value.code or 0), out, err


@pytest.fixture
def trimtab(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


def test_list_has_what_works_and_on_demand_every_paper(
    trimtab: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_results(monkeypatch, tmp_path)
    (tmp_path / "elr.json").write_text(json.dumps(RESULT))
    code, out, _ = trimtab("list")
    assert [line.split("\t")[0] for line in out.splitlines()] == ["elr"]
    code, out, err = trimtab("list", "--all")
    rows = [line.split("\t") for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert {row[0] for row in rows} == SLUGS
    assert all(len(row) == 4 and row[2] in ("planned", "partial", "works") for row in rows)


def test_list_by_area_and_state(trimtab: Command) -> None:
    papers = Catalog()
    losses = {paper.slug: papers.status(paper.slug).state for paper in papers.area("losses")}
    listed = {}
    for state in ("planned", "partial", "works"):
        code, out, _ = trimtab("list", "--area", "losses", "--state", state)
        assert code == 0
        listed |= {line.split("\t")[0]: state for line in out.splitlines()}
    assert listed == losses


def test_list_as_json(trimtab: Command) -> None:
    _, out, _ = trimtab("list", "--area", "optim", "--all", "--json")
    papers = json.loads(out)
    assert {paper["area"] for paper in papers} == {"optim"}
    assert {"slug", "title", "state", "use"} <= set(papers[0])


def test_list_of_nothing_is_empty_json(trimtab: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Catalog, "area", lambda self, name: [])
    assert json.loads(trimtab("list", "--area", "losses", "--json")[1]) == []


def test_search_forgives_misspellings_and_says_so(trimtab: Command) -> None:
    code, out, err = trimtab("search", "nosy lables", "--limit", "8")
    assert code == 0
    assert "elr" in [line.split("\t")[0] for line in out.splitlines()]
    assert err == "searched 'noisy' for 'nosy', 'labels' for 'lables'\n"


def test_search_takes_words_with_and_without_quotes(trimtab: Command) -> None:
    assert trimtab("search", "noisy labels", "--json") == trimtab("search", "noisy", "labels", "--json")


def test_search_without_a_hit(trimtab: Command) -> None:
    assert trimtab("search", "xqzwvk") == (1, "", "no paper matches 'xqzwvk'\n")
    assert json.loads(trimtab("search", "xqzwvk", "--json")[1]) == []


def use_results(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(catalogue, "read_catalog", lambda: Catalog(folder))


SAMPLE = Path(__file__).parent / "sample_results"
RESULT = json.loads((SAMPLE / "elr.json").read_text(encoding="utf-8"))


def test_show_a_paper_without_a_result(trimtab: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_results(monkeypatch, tmp_path)
    code, out, err = trimtab("show", "elr", "--json")
    card = json.loads(out)
    assert (code, err) == (0, "")
    assert (card["slug"], card["area"], card["state"]) == ("elr", "losses", "partial")
    assert (card["verdict"], card["headline"], card["claims"], card["standing"]) == (None, None, [], [])
    assert card["signatures"][0].startswith("ELR(num_samples, num_classes")
    text = trimtab("show", "elr")[1]
    assert Catalog()["elr"].title in text
    assert "Claim, not measured yet" in text


def test_show_a_paper_with_a_result(trimtab: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    use_results(monkeypatch, SAMPLE)
    card = json.loads(trimtab("show", "elr", "--json")[1])
    assert card["verdict"] == "holds"
    assert card["measured"] == "+15.6 points of final test accuracy over cross-entropy, 15.0 to 16.2, 5 seeds"
    assert card["further"] == "2 of 3 further claims hold"
    assert card["standing"] == [
        "ELR: 2nd of 3 on label-noise, symmetric; GCE (by 2.5 points) is surely ahead; it is surely ahead of 1 other"
    ]
    text = trimtab("show", "elr")[1]
    assert "\nClaim: holds\n" in text
    assert f"  {card['measured']}\n" in text
    assert "  from trimtab.losses import ELR\n" in text
    assert "fails: ELR has higher final test accuracy than GCE" in text
    assert "2 of 3 further claims hold (below)" in text
    headings = ("Claim: holds", "Standing", "Use", "Example", "Further claims")
    assert sorted(headings, key=lambda heading: text.index(f"\n{heading}\n")) == list(headings)
    assert f"Not when {card['avoid']}." in " ".join(text.split())


@pytest.mark.parametrize("name", ["ELR", "losses.ELR", "trimtab.losses.ELR", "elr", "2007.00151"])
def test_show_takes_public_names(trimtab: Command, name: str) -> None:
    assert json.loads(trimtab("show", name, "--json")[1])["slug"] == "elr"


def test_show_wraps_to_the_terminal_and_flags_what_was_built_from_an_abstract(
    trimtab: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = Catalog.find
    monkeypatch.setattr(Catalog, "find", lambda self, name: dataclasses.replace(find(self, name), source="abstract"))
    use_results(monkeypatch, SAMPLE)
    monkeypatch.setenv("COLUMNS", "60")
    out = trimtab("show", "elr")[1]
    assert "built from the abstract alone" in out
    before = out.partition("Example")[0]
    assert max(map(len, before.splitlines())) <= 60


def test_a_leaderboard_that_is_none_is_told_and_the_card_is_shown(
    trimtab: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "tasks" / "label-noise").mkdir(parents=True)
    (tmp_path / "tasks" / "label-noise" / "symmetric.json").write_text("{")
    use_results(monkeypatch, tmp_path)
    code, _, err = trimtab("show", "elr")
    assert code == 0
    assert "symmetric.json is not a leaderboard" in err


def test_show_a_paper_whose_result_is_damaged(
    trimtab: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "elr.json").write_text("{")
    use_results(monkeypatch, tmp_path)
    card = json.loads(trimtab("show", "elr", "--json")[1])
    assert card["verdict"] is None
    assert any("cannot be read" in reason for reason in card["missing"])


def test_what_is_piped_is_plain(trimtab: Command) -> None:
    for arguments in (("list", "--all"), ("search", "noise"), ("show", "elr"), ("--help",)):
        out = trimtab(*arguments)[1]
        assert "\x1b" not in out
        assert "─" not in out
        assert all(line == line.rstrip() for line in out.splitlines())


@pytest.mark.parametrize("command", ["list", "search", "show", "run", "tasks", "compare", "report", "site"])
def test_help_says_what_an_argument_is_and_has_no_escapes(trimtab: Command, command: str) -> None:
    code, out, _ = trimtab(command, "--help")
    assert code == 0
    assert "\\" not in out
    words = {"show": "A paper's short name", "compare": "The task, such as label-noise", "run": "Papers whose studies"}
    words |= {"search": "Words, such as", "report": "Papers; by default all"}
    assert out.count(words.get(command, "Usage:")) == 1
    if command == "compare":
        assert "[required]" in out
        assert "[default: laptop]" in " ".join(out.split())


def test_every_command_is_told_in_one_line(trimtab: Command) -> None:
    assert "..." not in trimtab("--help")[1].partition("Commands:")[2]


def test_version(trimtab: Command) -> None:
    assert trimtab("--version") == (0, f"trimtab {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "adabelif"), "unknown paper 'adabelif'; did you mean 'adabelief'?"),
        (("show", "zzzzz"), "unknown paper 'zzzzz'; nothing here is near to it in meaning"),
        (("show", "noisy labels"), "unknown paper 'noisy labels'; near to it in meaning: "),
        (("list", "--area", "loses"), "unknown area 'loses'; did you mean 'losses'?"),
        (("list", "--state", "wroks"), "unknown state 'wroks'; did you mean 'works'?"),
        (("list", "--state", "zzz"), "unknown state 'zzz'; there are planned, partial, works"),
        (("search", "!?"), "query must be at least one word, got '!?'"),
        (("lst",), "No such command 'lst'"),
        (("show",), "Missing argument 'NAME'"),
        (("list", "--aera", "losses"), "No such option"),
    ],
)
def test_a_mistake_is_one_line_and_a_non_zero_exit(trimtab: Command, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = trimtab(*arguments)
    assert code != 0
    assert out == ""
    assert err.startswith(f"trimtab: {message}")
    assert len(err.splitlines()) == 1


def test_a_broken_table_is_one_line(trimtab: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.catalog.papers import Paper, read_papers

    read_papers.cache_clear()
    monkeypatch.setattr(Paper, "from_table", lambda *_: (_ for _ in ()).throw(cli_error("[elr]: unknown key status")))
    code, _, err = trimtab("list")
    assert code == 1
    assert err == "trimtab: [elr]: unknown key status\n"


def cli_error(message: str) -> Exception:
    from trimtab.catalog import CatalogError

    return CatalogError(message)


@pytest.mark.parametrize("blocked", ["file", "folder"])
def test_site_into_a_place_that_cannot_be_written(trimtab: Command, tmp_path: Path, blocked: str) -> None:
    pytest.importorskip("mkdocs")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("years of work")
    out = tmp_path / "file" / "site" if blocked == "file" else tmp_path / "folder"
    code, _, err = trimtab("site", "--out", str(out))
    assert code == 1
    assert err.startswith(f"trimtab: the site cannot be built in {out}: ")
    assert len(err.splitlines()) == 1
    assert (tmp_path / "folder" / "thesis.tex").read_text() == "years of work"


def test_site_without_mkdocs_names_the_extra(trimtab: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "mkdocs.config", None)
    code, _, err = trimtab("site", "--out", str(tmp_path / "site"))
    assert code == 1
    assert 'pip install "trimtab[docs]"' in err


@pytest.mark.parametrize("arguments", [("list",), ("search", "nosy lables"), ("show", "elr", "--json"), ("--version",)])
def test_reading_the_catalogue_imports_no_torch(arguments: tuple[str, ...]) -> None:
    code = (
        "import sys; from trimtab.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "print(sorted({'torch', 'numpy', 'scipy', 'matplotlib', 'rich'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


@pytest.mark.skipif(os.name == "nt", reason="pipes of a POSIX system")
def test_a_reader_that_goes_away_is_no_error() -> None:
    trimtab = f"{sys.executable} -c 'from trimtab.cli import main; main()'"
    command = f"{trimtab} list --all --json | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "[\n"
    assert done.stderr == ""
