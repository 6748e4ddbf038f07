"""Photographs the recorded report: ``make screenshots``. Two of the pictures are in the README."""

import sys
from pathlib import Path

from chromium import chromium

PROJECT = Path(__file__).resolve().parent.parent
PAGES = ("index", "03_rank", "05_approximate")
SCREENS = {
    "wide": {"viewport": {"width": 1280, "height": 900}},
    "phone": {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True},
}


def photograph(report: Path, target: Path) -> None:
    """Save a picture of the first screen of each page, wide and on a phone, and of the index in dark mode."""
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


if __name__ == "__main__":
    arguments = [Path(argument).resolve() for argument in sys.argv[1:]]
    photograph(*(arguments or (PROJECT / "reports" / "reference", PROJECT / "docs")))
