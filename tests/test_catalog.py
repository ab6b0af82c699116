"""The catalogue: what it reads, finds and computes; and that the repository's own tables fit together."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab import sources
from trimtab.catalog import CHECKOUT, Catalog, CatalogError, Paper, UnknownNameError, UnknownPaperError, nearest

PAPERS = Catalog()


def test_it_has_all_papers_and_areas() -> None:
    assert len(PAPERS) == 213
    assert len(PAPERS.areas) == 21
    assert all(PAPERS.areas.values())
    assert sum(len(PAPERS.area(area)) for area in PAPERS.areas) == 213


def test_tables_modules_tests_studies_and_results_fit_together() -> None:
    assert PAPERS.integrity() == []


def test_a_slug_is_found_in_any_spelling_of_it() -> None:
    assert PAPERS["sgd_sai"] is PAPERS["SGD-SaI"]
    assert PAPERS["elr"].url == "https://arxiv.org/abs/2007.00151"


def test_an_unknown_slug_suggests_the_nearest() -> None:
    with pytest.raises(UnknownPaperError, match="unknown paper 'adabelif'; did you mean 'adabelief'"):
        PAPERS["adabelif"]
    with pytest.raises(UnknownPaperError) as caught:
        PAPERS["zzzzzz"]
    assert caught.value.nearest is None
    assert "did you mean" not in str(caught.value)


def test_an_unknown_area_suggests_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="unknown area 'loses'; did you mean 'losses'"):
        PAPERS.area("loses")


def test_nearest_of_nothing_is_nothing() -> None:
    assert nearest("elr", []) is None


def found(query: str, limit: int = 5) -> list[str]:
    return [paper.slug for paper in PAPERS.search(query, limit).papers]


@pytest.mark.parametrize(
    ("query", "slug"),
    [
        ("noisy labels", "elr"),
        ("nosy lables", "elr"),
        ("elr", "elr"),
        ("early lerning regularization", "elr"),
        ("early-learning regularisation", "elr"),
        ("adabelif", "adabelief"),
        ("mislabled data", "elr"),
        ("sharpnes aware trainning", "saf"),
        ("sinkhorn newton", "sinkhorn_newton_sparse"),
        ("difusion guidence oversaturation", "apg"),
        ("federatd lerning", "fedspeed"),
    ],
)
def test_a_search_finds_what_is_meant(query: str, slug: str) -> None:
    assert slug in found(query, 10)


def test_the_slug_itself_comes_first() -> None:
    for slug in ("elr", "saf", "apg", "deis", "tcm", "sorsa"):
        assert found(slug)[0] == slug


def test_papers_with_all_words_come_before_papers_with_some() -> None:
    hits = [paper for paper in PAPERS.search("label segmentation", 40).papers if paper.use]
    texts = [" ".join((p.title, p.summary, *p.keywords, *p.helps)).lower() for p in hits]
    both = ["label" in text and "segmentation" in text for text in texts]
    assert both[0]
    assert both == sorted(both, reverse=True)


def test_corrections_are_told_and_right_words_are_left_alone() -> None:
    assert PAPERS.search("nosy lables").corrections == {"nosy": "noisy", "lables": "labels"}
    assert PAPERS.search("noisy labels").corrections == {}


def test_british_and_american_spelling_find_the_same() -> None:
    assert found("regularisation") == found("regularization")
    assert found("quantised") == found("quantized")


def test_words_of_no_language_find_nothing() -> None:
    assert PAPERS.search("xqzwvk").papers == ()


@pytest.mark.parametrize("query", ["", "  ", "!?"])
def test_a_query_without_words_is_refused(query: str) -> None:
    with pytest.raises(ValueError, match="query"):
        PAPERS.search(query)


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="limit"):
        PAPERS.search("noise", 0)


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=40))
def test_any_text_with_a_word_is_searched(query: str) -> None:
    hits = PAPERS.search(f"{query} noise", 7)
    assert len(hits.papers) == len(set(hits.papers)) <= 7


def test_every_paper_that_works_names_its_authors_whole() -> None:
    for paper in PAPERS:
        if paper.use:
            assert paper.authors, paper.slug
            assert all(name == name.strip() and "et al" not in name and "," not in name for name in paper.authors)


def test_an_author_is_found_and_no_word_is_corrected_to_a_name() -> None:
    assert found("MacKay", 1) == ["stn"]
    assert found("Lion optimizer", 1) != ["aaer"]  # by Lin


QUERIES = tomllib.loads(Path(__file__).with_name("search_queries.toml").read_text(encoding="utf-8"))


def test_what_a_practitioner_types_finds_a_right_paper_first() -> None:
    wrong = {}
    for query, right in QUERIES.items():
        first = found(query, 1)
        if not (first[0] in right if first else not right):
            wrong[query] = first
    assert len(QUERIES) >= 360
    assert len(wrong) <= len(QUERIES) // 20, wrong


@pytest.mark.parametrize(
    "query", ["knowledge distillation", "CFG", "sharpness-aware", "optimal transport", "calibration"]
)
def test_papers_that_can_be_used_come_before_papers_that_are_planned(query: str) -> None:
    usable = [bool(PAPERS[slug].use) for slug in found(query, 6)]
    assert any(usable)
    assert usable == sorted(usable, reverse=True)


@pytest.mark.parametrize(
    "query",
    ["saturated images", "reduce hallucination", "bigger batches", "robot arm", "cheap audio", "adaptive speech"],
)
def test_words_that_are_right_are_not_corrected(query: str) -> None:
    assert PAPERS.search(query).corrections == {}


def test_words_that_say_nothing_change_nothing() -> None:
    assert found("how do I get better results with noisy labels in my paper?") != []
    assert found("but I want to use the noisy labels, please") == found("noisy labels")


TABLE: dict[str, Any] = {
    **{"title": "A Method", "year": 2020, "summary": "It does.", "claim": "It wins by 3 %."},
    **{"use": [], "keywords": ["thing"], "related": []},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"year": "2020"}, "year must be int"),
        ({"year": True}, "year must be int"),
        ({"use": "trimtab.losses.ELR"}, "use must be a list of strings"),
        ({"keywords": [1]}, "keywords must be a list of strings"),
        ({"status": "done"}, "unknown key status"),
    ],
)
def test_a_table_with_a_wrong_entry_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CatalogError, match=rf"losses/papers.toml, \[method\]: {message}"):
        Paper.from_table("method", "losses", TABLE | change)


def test_a_table_that_lacks_an_entry_is_refused_by_name() -> None:
    with pytest.raises(CatalogError, match="missing key claim, title"):
        Paper.from_table("method", "losses", {k: v for k, v in TABLE.items() if k not in ("claim", "title")})


def test_a_result_that_is_cut_short_is_refused_and_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / "elr.json").write_text('{"paper": "el')
    papers = Catalog(tmp_path)
    with pytest.raises(CatalogError, match=r"elr\.json cannot be read"):
        papers.result("elr")
    assert any("cannot be read" in reason for reason in papers.status("elr").missing)
    assert any("cannot be read" in problem for problem in papers.integrity())


RESULT: dict[str, Any] = json.loads((Path(__file__).parent / "sample_results" / "elr.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"paper": "ldr"}, "paper must be 'elr', got 'ldr'"),
        ({"area": 3}, "area must be a str, got 3"),
        ({"claims": None}, "claims must be a list, got None"),
        ({"claims": ["holds"]}, "claims must be a table, got 'holds'"),
        ({"headline": RESULT["headline"] | {"verdict": "partly"}}, "headline.verdict must be 'holds' or 'fails' or"),
        ({"headline": RESULT["headline"] | {"effect": "+5"}}, "headline.effect must be an int or a float or nothing"),
        ({"venues": [RESULT["venues"][0] | {"arms": {"ELR": {}}}]}, r"venues.arms.ELR.paper is missing"),
    ],
)
def test_a_result_of_another_form_is_refused_by_name_and_the_rest_goes_on(
    tmp_path: Path, change: dict[str, object], problem: str
) -> None:
    (tmp_path / "elr.json").write_text(json.dumps(RESULT | change))
    (tmp_path / "ldr.json").write_text(json.dumps(RESULT | {"paper": "ldr"}))
    papers = Catalog(tmp_path)
    with pytest.raises(CatalogError, match=rf"elr\.json is not a result of elr: {problem}"):
        papers.result("elr")
    results, problems = papers.outcomes()
    assert list(results) == ["ldr"]
    assert [text.partition(": ")[2].startswith(problem) for text in problems] == [True]
    assert any(problem in reason for reason in papers.status("elr").missing)


@pytest.mark.parametrize("text", ["", "[]", "null", "3", "[" * 100_000, "\x00", '{"paper": NaN}'])
def test_a_file_that_holds_no_result_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "elr.json").write_text(text)
    with pytest.raises(CatalogError, match=r"elr\.json"):
        Catalog(tmp_path).result("elr")
    assert Catalog(tmp_path).search("elr").papers[0].slug == "elr"
    assert Catalog(tmp_path).status("elr").state == "partial"


@pytest.mark.parametrize("place", ["../../outside.txt", "/etc/hostname", "sources/../../outside.txt"])
def test_names_within_a_result_open_no_file(tmp_path: Path, place: str) -> None:
    """Results come from others: whatever paths they hold, only the results' own files are read."""
    results = tmp_path / "results"
    results.mkdir()
    venue = RESULT["venues"][0] | {"title": place, "log": place}
    held = RESULT | {"sources": {place: "0" * 16}, "venues": [venue], "notes": place, "machine": place}
    (results / "elr.json").write_text(json.dumps(held))
    (tmp_path / "outside.txt").write_text("secret")
    script = """
        import sys
        opened = []
        sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
        from pathlib import Path
        from trimtab.catalog import Catalog
        papers = Catalog(Path(sys.argv[1]))
        papers.outcomes(), papers.result("elr"), papers.status("elr"), papers.integrity(), papers.search("elr")
        print("read" if any("elr.json" in path for path in opened) else "not read")
        print([path for path in opened if "outside" in path or "hostname" in path])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(results)], capture_output=True, text=True)
    assert done.stdout.split("\n") == ["read", "[]", ""], done.stderr


def test_the_tables_are_read_once() -> None:
    assert Catalog().papers is Catalog(Path("elsewhere")).papers


@pytest.mark.parametrize(
    ("text", "slug"),
    [
        ("elr", "elr"),
        ("PS-KD", "ps_kd"),
        ("ELR", "elr"),
        ("losses.ELR", "elr"),
        ("trimtab.losses.ELRPlus", "elr"),
        ("TrajectoryLoss", "saf"),
        ("trajectoryloss", "saf"),
        ("EigenPair", None),
        ("optim.SGDSaI", "sgd_sai"),
        ("2007.00151", "elr"),
        ("arXiv:2007.00151", "elr"),
    ],
)
def test_a_paper_is_found_by_slug_public_name_and_identifier(text: str, slug: str | None) -> None:
    if slug is None:
        with pytest.raises(UnknownPaperError):
            PAPERS.find(text)
    else:
        assert PAPERS.find(text).slug == slug


def test_every_public_name_of_a_paper_finds_it() -> None:
    for paper in PAPERS:
        assert all(PAPERS.find(name) is paper for name in paper.use)


def test_what_is_not_found_is_answered_with_what_is_near() -> None:
    with pytest.raises(UnknownPaperError, match=r"unknown paper 'TrajectoryLos'; did you mean 'TrajectoryLoss'\?"):
        PAPERS.find("TrajectoryLos")
    with pytest.raises(UnknownPaperError, match="unknown paper 'CFG'; near to it in meaning: cfgpp, "):
        PAPERS.find("CFG")
    with pytest.raises(UnknownPaperError, match=r"unknown paper '\?!'$"):
        PAPERS.find("?!")


def face(*names: str) -> str:
    imports = "".join(f"    from trimtab.losses.elr import {name} as {name}\n" for name in names)
    return f'"""Losses."""\nif TYPE_CHECKING:\n{imports}'


class Repository:
    """A small repository with one area and one paper, seen by a process of its own."""

    def __init__(self, root: Path, package: str = "src/trimtab") -> None:
        self.root = root
        self.package = package
        files = [sources.PACKAGE / name for name in ("faces.py", "sources.py")]
        for path in (*files, *(sources.PACKAGE / "catalog").glob("*.*")):
            name = path.relative_to(sources.PACKAGE).as_posix()
            self.write(f"{package}/{name}", path.read_text(encoding="utf-8"))
        self.write(f"{package}/__init__.py", "")
        self.write(f"{package}/losses/__init__.py", '"""Losses."""\n')
        self.use()

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")

    def use(self, *names: str, slug: str = "elr", **entries: object) -> None:
        built = {"source": "paper", "avoid": "it is late"} if names else {}
        table = TABLE | built | {"use": [f"trimtab.losses.{name}" for name in names]} | entries
        lines = [f"{key} = {json.dumps(value)}" for key, value in table.items()]
        self.write(f"{self.package}/losses/papers.toml", "\n".join([f"[{slug}]", *lines]))

    def add_method(self) -> None:
        self.write(f"{self.package}/losses/elr.py", "class ELR:\n    pass\n")
        self.write(f"{self.package}/losses/__init__.py", face("ELR"))
        self.use("ELR")

    def add_result(self, folder: str = "results", area: str = "losses") -> None:
        self.write(f"{self.package}/studies/losses/elr.py", "")
        self.write(f"{folder}/elr.json", json.dumps(RESULT | {"area": area}))

    def ask(self, expression: str) -> Any:
        code = f"import json; from trimtab.catalog import *; c = Catalog(); print(json.dumps({expression}))"
        path = str(self.root / Path(self.package).parent)
        done = subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONPATH": path}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def status(self) -> tuple[str, str]:
        state, missing = self.ask("[c.status('elr').state, c.status('elr').missing]")
        return state, "; ".join(missing)


def test_a_paper_goes_from_planned_to_works_step_by_step(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    state, missing = repository.status()
    assert state == "planned"
    assert missing == "no public name yet; no tests/losses/test_elr.py; no result elr.json"
    repository.use("ELR")
    assert repository.status()[0] == "planned"
    repository.add_method()
    assert repository.status() == ("partial", "no tests/losses/test_elr.py; no result elr.json")
    repository.write("tests/losses/test_elr.py", "")
    assert repository.status() == ("partial", "no result elr.json")
    repository.add_result()
    assert repository.status() == ("works", "")
    assert repository.ask("c.integrity()") == []


def test_a_name_counts_only_where_it_is_defined(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    repository.add_method()
    repository.use("ELR", "ELRPlus")
    assert "trimtab.losses.ELRPlus is not exported" in repository.status()[1]
    repository.write("src/trimtab/losses/__init__.py", face("ELR", "ELRPlus"))
    assert "trimtab.losses.ELRPlus is not exported" in repository.status()[1]
    repository.write("src/trimtab/losses/elr.py", "class ELR:\n    pass\n\n\nELRPlus = ELR\n")
    assert "not exported" not in repository.status()[1]


def test_a_name_that_a_package_passes_on_counts_where_it_is_defined(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    repository.write("src/trimtab/losses/__init__.py", face("ELR"))
    repository.write("src/trimtab/losses/elr/__init__.py", "from trimtab.losses.elr.loss import ELR\n")
    repository.write("src/trimtab/losses/elr/loss.py", "")
    repository.use("ELR")
    assert "trimtab.losses.ELR is not exported" in repository.status()[1]
    repository.write("src/trimtab/losses/elr/loss.py", "class ELR:\n    pass\n")
    assert "not exported" not in repository.status()[1]
    assert repository.ask("c.integrity()") == []


def test_an_installed_wheel_knows_what_works_without_the_tests(tmp_path: Path) -> None:
    repository = Repository(tmp_path, package="site-packages/trimtab")
    repository.add_method()
    assert repository.status()[0] == "partial"
    repository.add_result(folder="site-packages/trimtab/results")
    assert repository.status() == ("works", "")


def test_a_paper_that_is_built_says_when_not_to_use_it(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    repository.add_method()
    repository.use("ELR", avoid="")
    problem = "losses/papers.toml, [elr]: use has names and avoid does not say when to leave them"
    assert problem in repository.ask("c.integrity()")


def test_integrity_names_a_built_paper_that_does_not_say_what_it_was_built_from(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    repository.add_method()
    repository.use("ELR", source="")
    problem = "losses/papers.toml, [elr]: source must be one of code, paper, abstract, got ''"
    assert repository.ask("c.integrity()") == [problem]


def test_integrity_names_whatever_has_no_table(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    repository.add_method()
    repository.add_result(area="optim")
    repository.write("src/trimtab/studies/losses/gone.py", "")
    repository.write("tests/losses/test_gone.py", "")
    repository.write("results/gone.json", "{}")
    assert repository.ask("c.integrity()") == [
        "studies/losses/gone.py: losses/papers.toml has no table [gone]",
        "tests/losses/test_gone.py: neither a paper nor a module of the area",
        "results/elr.json: area is 'optim', the table's is 'losses'",
        "results/gone.json: no papers.toml has a table [gone]",
    ]


def test_integrity_names_a_module_that_its_table_does_not_know(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    repository.add_method()
    repository.use()
    assert repository.ask("c.integrity()") == ["losses/papers.toml, [elr]: losses/elr.py exists and use is empty"]


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ({"related": ["nobody"]}, "related 'nobody' is not a paper"),
        ({"related": ["elr"]}, "related 'elr' is itself"),
        ({"keywords": ["a", "a"]}, "keywords has an entry twice"),
        ({"arxiv": "20070.0015"}, "arxiv '20070.0015' is not an identifier"),
        ({"year": 20}, "year 20 is out of range"),
        ({"claim": ""}, "claim is empty"),
        ({"source": "memory"}, "source must be one of code, paper, abstract, got 'memory'"),
    ],
)
def test_integrity_names_a_wrong_entry(tmp_path: Path, entries: dict[str, object], problem: str) -> None:
    repository = Repository(tmp_path)
    repository.use(**entries)
    assert repository.ask("c.integrity()") == [f"losses/papers.toml, [elr]: {problem}"]


def test_a_broken_table_is_one_error_with_its_place(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    repository.write("src/trimtab/losses/papers.toml", "[elr\n")
    path = str(tmp_path / "src")
    done = subprocess.run(
        [sys.executable, "-c", "from trimtab.catalog import Catalog; Catalog().papers"],
        **{"env": {"PYTHONPATH": path}, "capture_output": True, "text": True, "check": False},
    )
    assert done.returncode == 1
    assert "papers.toml cannot be read" in done.stderr
    assert "line 1" in done.stderr


def test_neither_the_package_nor_the_catalogue_imports_a_heavy_library() -> None:
    code = """
        import sys, trimtab
        from trimtab.catalog import Catalog
        papers = Catalog()
        papers.search("nosy lables"), [papers.status(paper.slug) for paper in papers], papers.integrity()
        print(sorted({"torch", "numpy", "scipy", "matplotlib", "rich"} & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_area_is_an_attribute_of_the_package() -> None:
    import trimtab

    assert set(PAPERS.areas) < set(trimtab.__all__)
    assert trimtab.losses.__name__ == "trimtab.losses"
    with pytest.raises(AttributeError, match="nothing"):
        trimtab.nothing


@pytest.mark.skipif(CHECKOUT is None, reason="not in a checkout")
def test_the_type_checker_sees_every_area() -> None:
    text = (sources.PACKAGE / "__init__.py").read_text(encoding="utf-8")
    assert all(f"from trimtab import {area} as {area}\n" in text for area in PAPERS.areas)
