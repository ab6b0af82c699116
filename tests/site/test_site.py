"""The built site in a real browser: found by search, drawn, quiet, and all from this machine."""

from __future__ import annotations

import functools
import http.server
import json
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from trimtab import fingerprint
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


def sample_result() -> dict[str, object]:
    def arm(final: list[float], memorised: list[float], path: list[float]) -> dict[str, object]:
        curve = {"x": [1.0, 2.0, 3.0], "y": path, "low": [y - 0.01 for y in path], "high": [y + 0.01 for y in path]}
        metrics = {"final_accuracy": final, "memorised": memorised}
        return {"metrics": metrics, "curves": {"test_accuracy": curve}, "seconds": [1.0, 1.0, 1.0]}

    claim = {"text": "ELR: final accuracy is above cross-entropy by 0.05 or more", "arm": "ELR"}
    claim |= {"other": "cross-entropy", "on": "final_accuracy", "verdict": "holds", "effect": 0.2}
    claim |= {"interval": [0.17, 0.23], "seeds": 3, "budget": "laptop", "reason": ""}
    percent = {"percent": True}
    return {
        **{"paper": "elr", "area": "losses", "task": "label-noise", "budget": "laptop", "seeds": [0, 1, 2]},
        **{"verdict": "holds", "notes": "A sample.", "claims": [claim], "plot": None, "log": ""},
        "arms": {
            "cross-entropy": arm([0.6, 0.61, 0.62], [0.7, 0.7, 0.7], [0.8, 0.7, 0.6]),
            "ELR": arm([0.8, 0.81, 0.82], [0.1, 0.1, 0.1], [0.5, 0.7, 0.8]),
        },
        "metrics": {
            "final_accuracy": {"label": "final test accuracy (%)", "best": "max", **percent},
            "memorised": {"label": "wrong labels memorised (%)", "best": "min", **percent},
        },
        "sources": fingerprint.describe_sources([fingerprint.PACKAGE / "losses" / "__init__.py"]),
        **{"test": "tests/losses/test_elr.py", "versions": {}, "machine": "", "created": "2026-01-01T00:00:00+00:00"},
    }


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    catalog = Catalog()
    if catalog.result("elr") is None:
        catalog = Catalog(folder / "results")
        catalog.results.mkdir()
        (catalog.results / "elr.json").write_text(json.dumps(sample_result()))
    build(folder / "built", catalog)
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
    assert "95 % interval" in verdict.text

    assert not errors(browser)
    urls = requests(browser)
    assert len(urls) > 3
    assert not elsewhere(urls, address)


@pytest.mark.parametrize("page", ["", "losses/", "leaderboards/", "choose/", "methods/"])
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


def test_the_leaderboard_has_the_arms_of_the_task(site: Path) -> None:
    text = (site / "leaderboards" / "index.html").read_text(encoding="utf-8")
    assert 'id="label-noise"' in text
    assert "ELR" in text
    assert "cross-entropy" in text


def test_equations_need_no_script(site: Path) -> None:
    card = (site / "losses" / "elr" / "index.html").read_text(encoding="utf-8")
    assert '<math display="block">' in card
    assert "arithmatex" not in card
