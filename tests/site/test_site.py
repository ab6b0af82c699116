"""The built site in a real browser: found by search, drawn, quiet, and all from this machine."""

from __future__ import annotations

import functools
import html.parser
import http.server
import json
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from trimtab.catalog import Catalog

pytest.importorskip("mkdocs")
webdriver = pytest.importorskip("selenium.webdriver")

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

from trimtab.site import build  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
SECONDS = 60  # to wait for the page; a busy machine is slow

# One process builds the site for all of these tests.
pytestmark = pytest.mark.xdist_group("site")


SAMPLE = Path(__file__).parents[1] / "sample_results"
MARK = "zq7"
EVIL = (
    f'{MARK}<img src=x onerror=alert(1)> "><script>alert(1)</script> '
    f'[{MARK}](javascript:alert(1)) {{: onclick="alert(1)" }}'
)


def hostile(value: object, path: tuple[str, ...] = ()) -> object:
    """A result or leaderboard whose every word that a page may show is live markup."""
    fixed = {"paper", "area", "relation", "on", "verdict", "best", "log", "budget", "created", "task", "variant"}
    if isinstance(value, dict):
        names = path and path[-1] in ("arms", "standing", "skipped")
        return {
            (f"{key} {EVIL}" if names else key): hostile(held, (*path, "" if names else key))
            for key, held in value.items()
        }
    if isinstance(value, list):
        named = path and path[-1] in ("ahead", "behind", "level", "data")
        return [f"{item} {EVIL}" if named else hostile(item, path) for item in value]
    if isinstance(value, str) and (not path or path[-1] not in fixed):
        return f"{value} {EVIL}"
    return value


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(SAMPLE, folder / "results")
    result = json.loads((SAMPLE / "elr.json").read_text(encoding="utf-8"))
    evil = hostile(result)
    assert isinstance(evil, dict)
    evil |= {"paper": "ldr"}
    (folder / "results" / "ldr.json").write_text(json.dumps(evil), encoding="utf-8")
    board = json.loads((SAMPLE / "tasks" / "label-noise" / "symmetric.json").read_text(encoding="utf-8"))
    evil = hostile(board)
    assert isinstance(evil, dict)
    evil |= {"variant": f"evil {EVIL}", "budget": EVIL}
    (folder / "results" / "tasks" / "label-noise" / "evil.json").write_text(json.dumps(evil), encoding="utf-8")
    (folder / "results" / "ps_kd.json").write_text("{", encoding="utf-8")
    build(folder / "built", Catalog(folder / "results"))
    return folder / "built"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("chromium or chromedriver is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
        *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1280,1000"),
        f"--user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def requests(browser: webdriver.Chrome) -> list[str]:
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]


def elsewhere(urls: list[str], address: str) -> list[str]:
    """Those that are neither the test's own server nor inside the browser."""
    inside = {"data", "blob", "chrome", "about"}
    return [
        url for url in urls if urlsplit(url).netloc != urlsplit(address).netloc and urlsplit(url).scheme not in inside
    ]


def errors(browser: webdriver.Chrome) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_a_reader_finds_elr_by_search_and_sees_its_figure(browser: webdriver.Chrome, address: str) -> None:
    browser.get(address)
    wait = WebDriverWait(browser, SECONDS)
    field = browser.find_element(By.CSS_SELECTOR, "input.md-search__input")
    field.click()
    field.send_keys("noisy labels")
    hits = "a.md-search-result__link[href*='losses/elr/']"
    wait.until(lambda page: page.find_elements(By.CSS_SELECTOR, hits))
    browser.find_element(By.CSS_SELECTOR, hits).click()
    wait.until(lambda page: "/losses/elr/" in page.current_url)
    wait.until(lambda page: page.find_elements(By.CSS_SELECTOR, "img.study"))
    assert "Early-Learning Regularization" in browser.find_element(By.TAG_NAME, "h1").text

    figure = browser.find_element(By.CSS_SELECTOR, "img.study")
    wait.until(lambda page: page.execute_script("return arguments[0].complete", figure))
    assert browser.execute_script("return arguments[0].naturalWidth", figure) > 0
    assert figure.is_displayed()
    verdict = browser.find_element(By.CSS_SELECTOR, ".admonition[class*='verdict-']")
    assert "+15.6 points of final test accuracy over cross-entropy" in verdict.text

    assert not errors(browser)
    urls = requests(browser)
    assert len(urls) > 3
    assert not elsewhere(urls, address)


def test_a_short_word_is_not_the_beginning_of_others(browser: webdriver.Chrome, address: str) -> None:
    browser.get(address)
    field = browser.find_element(By.CSS_SELECTOR, "input.md-search__input")
    field.click()
    field.send_keys("SAM")
    hits = "a.md-search-result__link"
    WebDriverWait(browser, SECONDS).until(lambda page: page.find_elements(By.CSS_SELECTOR, hits))
    found = {urlsplit(link.get_attribute("href")).path for link in browser.find_elements(By.CSS_SELECTOR, hits)}
    assert {"/optim/tram/", "/domain/udim/"} <= found
    told = browser.find_element(By.CSS_SELECTOR, ".md-search-result__meta").text
    assert int(told.split()[0]) < 60, "not every page that says `sample`"


def test_the_script_of_the_search_is_the_one_that_is_edited(site: Path) -> None:
    (script,) = (site / "assets" / "javascripts" / "workers").glob("search.*.js")
    assert "||r.length<4?r:" in script.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "page", ["", "losses/", "leaderboards/", "leaderboards/label-noise/", "choose/", "methods/", "new/"]
)
def test_every_kind_of_page_is_quiet_and_local(browser: webdriver.Chrome, address: str, page: str) -> None:
    browser.get(f"{address}/{page}")
    assert browser.find_element(By.TAG_NAME, "h1").text
    assert not errors(browser)
    assert not elsewhere(requests(browser), address)


def test_there_is_a_card_for_every_paper_and_a_page_for_every_area(site: Path) -> None:
    catalog = Catalog()
    missing = [paper.slug for paper in catalog if not (site / paper.area / paper.slug / "index.html").is_file()]
    assert not missing
    assert all((site / area / "index.html").is_file() for area in catalog.areas)


def test_no_page_names_a_file_of_another_machine(site: Path) -> None:
    away = r"""=["'](?:https?:)?//"""
    fetched = re.compile(rf"<(?:script|img|iframe|source)[^>]+src{away}|<link[^>]+stylesheet[^>]+href{away}")
    assert not [page for page in site.rglob("*.html") if fetched.search(page.read_text(encoding="utf-8"))]


def test_the_leaderboard_has_the_contestants_of_the_task(site: Path) -> None:
    text = (site / "leaderboards" / "label-noise" / "index.html").read_text(encoding="utf-8")
    assert 'id="symmetric"' in text
    assert "ELR" in text
    assert "cross-entropy" in text
    assert (site / "leaderboards" / "label-noise-symmetric.svg").is_file()


class Markup(html.parser.HTMLParser):
    """Collects the elements and attributes that come out of hostile words."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name.startswith("on") or (name in ("href", "src") and "javascript:" in (value or "")):
                self.found.append(f"{tag} {name}={value}")
            if tag == "img" and name == "src" and value == "x":
                self.found.append("img src=x")


def test_a_hostile_result_puts_no_live_markup_on_any_page(site: Path) -> None:
    seen = 0
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        seen += MARK in text
        markup = Markup()
        markup.feed(text)
        assert not markup.found, page
        assert "<script>alert" not in text, page
    assert seen >= 3, "the hostile words are on the card, the area's page and the leaderboard"


def test_a_result_that_cannot_be_read_leaves_its_card(site: Path) -> None:
    text = (site / "losses" / "ps_kd" / "index.html").read_text(encoding="utf-8")
    assert "Not measured yet" in text


def test_equations_need_no_script(site: Path) -> None:
    card = (site / "losses" / "elr" / "index.html").read_text(encoding="utf-8")
    assert '<math display="block">' in card
    assert "arithmatex" not in card


def test_the_card_shows_the_api_and_its_source(site: Path) -> None:
    card = (site / "losses" / "elr" / "index.html").read_text(encoding="utf-8")
    assert 'id="trimtab.losses.elr.ELR"' in card
    assert "pip install" not in card
