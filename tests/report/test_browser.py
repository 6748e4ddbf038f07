"""The report and the explorer in a real Chromium: pages from files with the network off, and a real JupyterLab."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import nbformat
import psutil
import pytest
from axe_playwright_python.sync_playwright import Axe
from commands import wait_for
from playwright.sync_api import Browser, Page, expect, sync_playwright
from small_series import explorer_notebook

from lowrank_helpers import PROJECT

EXECUTABLE = shutil.which("chromium")
QUIET = ["quic", "background-networking", "component-update", "sync", "gpu"]  # nothing talks to the network by itself
ARGUMENTS = ["--no-sandbox", "--no-first-run", *(f"--disable-{part}" for part in QUIET)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(not EXECUTABLE, reason="Chromium is not on this machine (Debian: apt-get install chromium)"),
]
PAGES = ("index", "03_rank", "04_overfit")
REFERENCE = PROJECT / "reports" / "reference"  # the pages of all notebooks are made alike
WIDE = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=EXECUTABLE, args=ARGUMENTS)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, file: Path, **options) -> Iterator[Page]:
    """Open a page from its file with the network off; at the end, no complaint and no request may have been made."""
    context = browser.new_context(offline=True, **{"viewport": WIDE} | options)
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(f"failed: {request.url}"))
    page.on("request", lambda request: complaints.append(request.url) if request.url.startswith("http") else None)
    page.goto(file.as_uri())
    yield page
    context.close()
    assert complaints == []


def violations(page: Page) -> list[str]:
    found = Axe().run(page).response["violations"]
    return [
        f"{violation['id']}: {node['html'][:200]}"
        for violation in found
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]


def shown(page: Page, colour: str, element: str = "body") -> float:
    """Return how light a colour of an element is, from 0 (black) to 1 (white)."""
    rgb = page.eval_on_selector(element, "(e, name) => getComputedStyle(e)[name].match(/\\d+/g).map(Number)", colour)
    return sum(rgb[:3]) / 3 / 255


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_page_opens_without_a_complaint_and_is_accessible(browser, small_report, name, scheme):
    with opened(browser, small_report / f"{name}.html", color_scheme=scheme) as page:
        for details in page.locator("details").all():
            details.evaluate("details => details.open = true")
        assert violations(page) == []


@pytest.mark.parametrize("name", ["index", "03_rank"])
def test_recorded_page_opens_without_a_complaint_and_is_accessible(browser, name):
    with opened(browser, REFERENCE / f"{name}.html") as page:
        assert violations(page) == []
        assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0 && image.alt)")


def test_recorded_pages_are_small_enough():
    assert sum(file.stat().st_size for file in REFERENCE.rglob("*.html")) <= 12e6


def test_code_folds_one_by_one_and_all_at_once(browser, small_report):
    with opened(browser, small_report / "03_rank.html") as page:
        code = page.locator("details.code .highlight")
        assert code.count() > 5
        assert not any(cell.is_visible() for cell in code.all())
        page.locator("details.code summary").first.click()
        assert [cell.is_visible() for cell in code.all()].count(True) == 1
        everything = page.get_by_role("button", name="Show all code")
        everything.click()
        assert all(cell.is_visible() for cell in code.all())
        everything.click()
        assert not any(cell.is_visible() for cell in code.all())


def test_dark_mode_is_dark_and_figures_stay_on_white(browser, small_report):
    for scheme, dark in {"light": False, "dark": True}.items():
        with opened(browser, small_report / "03_rank.html", color_scheme=scheme) as page:
            assert (shown(page, "backgroundColor") < 0.2) == dark
            assert (shown(page, "color") > 0.8) == dark
            assert shown(page, "backgroundColor", ".output_png img") == 1


@pytest.mark.parametrize("name", PAGES)
def test_on_a_phone_only_what_is_wide_scrolls(browser, small_report, name):
    with opened(browser, small_report / f"{name}.html", viewport=PHONE, is_mobile=True) as page:
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        for table in page.locator("table.dataframe").all():
            room, reached = table.evaluate("t => (box => [box.clientWidth, !box.tabIndex])(t.closest('.scroll'))")
            assert reached == (table.bounding_box()["width"] > room), "by keyboard, if it scrolls"


def test_print_leaves_out_what_paper_cannot_use(browser, small_report):
    with opened(browser, small_report / "03_rank.html", color_scheme="dark") as page:
        page.emulate_media(media="print")
        expect(page.locator(".contents")).to_be_hidden()
        expect(page.locator("details.code").first).to_be_hidden()
        assert shown(page, "backgroundColor") == 1


def explore(page: Page) -> None:
    """Move the explorer's controls by keyboard, and see that what it shows follows."""
    explorer = page.locator(".explorer")
    numbers, slider, digits = explorer.locator("output"), explorer.locator("input"), explorer.locator(".digits")
    expect(numbers).to_contain_text("Accuracy: train")
    seen = set()
    for change in (
        lambda: slider.press("Home"),
        lambda: slider.press("ArrowRight"),
        lambda: explorer.get_by_label("cut by the").select_option("Fisher-weighted SVD"),
        lambda: explorer.get_by_label("layer").select_option("fc2"),
    ):
        change()
        seen.add(numbers.inner_text())
        drawn = explorer.locator("svg").first.inner_html()
    assert len(seen) == 4
    expect(numbers).to_contain_text("of 16: ")
    slider.press("End")
    assert drawn != explorer.locator("svg").first.inner_html()
    expect(numbers).to_contain_text("Error of the matrix 0 %")
    assert digits.locator(".tile").count() == 16 and explorer.locator(".directions .tile").count() == 6


@pytest.mark.parametrize("viewport", [WIDE, PHONE])
@pytest.mark.parametrize("name", ["index", "03_rank"])
def test_the_explorer_works_in_a_page_from_a_file(browser, small_report, name, viewport):
    with opened(browser, small_report / f"{name}.html", viewport=viewport) as page:
        explore(page)


@contextmanager
def jupyterlab(folder: Path) -> Iterator[str]:
    """Serve a folder with JupyterLab, away from the user's settings, and yield its address with the token."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex()
    own = {f"JUPYTER_{kind}_DIR": str(folder / f".{kind}") for kind in ("CONFIG", "DATA", "RUNTIME")}
    environment = {name: value for name, value in os.environ.items() if name != "LOWRANK_RUN_DIR"} | own
    options = [f"--ServerApp.root_dir={folder}", f"--port={port}", f"--IdentityProvider.token={token}"]
    command = ["jupyter", "lab", "--no-browser", "--allow-root", "--LabApp.expose_app_in_browser=True", *options]
    executable = str(Path(sys.executable).parent / command[0])
    log = (folder / "lab.log").open("w")
    server = subprocess.Popen([executable, *command[1:]], env=environment, stdout=log, stderr=log)
    try:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/api?token={token}"), seconds=60)
        yield f"http://127.0.0.1:{port}/lab/tree/{{}}?token={token}"
    finally:
        for process in (*psutil.Process(server.pid).children(recursive=True), server):
            process.kill()  # asked to end, a server waits for its kernels, for long where a machine is busy
        server.wait()


def answers(address: str) -> bool:
    with suppress(URLError):
        urlopen(address, timeout=5).close()
        return True
    return False


def test_the_explorer_works_in_jupyterlab(browser, tmp_path):
    nbformat.write(explorer_notebook(), tmp_path / "explorer.ipynb")
    with jupyterlab(tmp_path) as address:
        page = browser.new_context(viewport={"width": 1400, "height": 1000}).new_page()
        page.goto(address.format("explorer.ipynb"))
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=60_000)
        page.evaluate("void jupyterapp.commands.execute('notebook:run-all-cells')")
        page.locator(".explorer output").wait_for(timeout=90_000)
        explore(page)
