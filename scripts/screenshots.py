"""Photographs the recorded report: ``make screenshots``. The README shows some of the pictures."""

import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.append(str(PROJECT / "tests"))
from chromium import chromium  # noqa: E402 (the tests' own)

PAGES = ("index", "03_rank", "05_approximate")
FIGURES = {"03_rank": "cell-densities", "05_approximate": "cell-accuracy-figure"}
SCREENS = {
    "wide": {"viewport": {"width": 1280, "height": 900}},
    "phone": {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True},
}


def photograph(report: Path, target: Path) -> None:
    """Save the first screen of each page, wide and on a phone, the index in dark mode, and the README's figures."""
    target.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        for screen, options in SCREENS.items():
            context = browser.new_context(offline=True, **options)
            for name in PAGES:
                page = context.new_page()
                page.goto((report / f"{name}.html").as_uri())
                page.screenshot(path=target / f"{name}-{screen}.png")
        dark = browser.new_context(offline=True, color_scheme="dark", **SCREENS["wide"]).new_page()
        dark.goto((report / "index.html").as_uri())
        dark.screenshot(path=target / "index-dark.png")
        for name, cell in FIGURES.items():
            page = browser.new_page(device_scale_factor=2)
            page.goto((report / f"{name}.html").as_uri())
            page.locator(f"#{cell} img").screenshot(path=target / f"{name}-figure.png")


if __name__ == "__main__":
    arguments = [Path(argument).resolve() for argument in sys.argv[1:]]
    photograph(*(arguments or (PROJECT / "reports" / "reference", PROJECT / "docs")))
