"""One executed notebook as an HTML page that needs nothing but itself: nbconvert, with the project's template.

Imported only where pages are written: nbconvert takes seconds to import.
"""

import base64
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import pass_context
from jinja2.runtime import Context
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbconvert.filters.strings import html2text

from lowrank_helpers import PROJECT
from lowrank_helpers.series.results import software
from lowrank_helpers.series.store import write_atomically

FORMAT = 1  # of results.json on somebody's own network
TEMPLATES = Path(__file__).parent / "templates"


class PageExporter(HTMLExporter):
    """nbconvert's exporter with formulas as MathML, and no file or address outside the page."""

    @pass_context
    def markdown2html(self, context: Context, source: str) -> str:
        """Render Markdown, and note its headings in ``resources`` for the page's list of contents."""
        renderer = PageRenderer(escape=False, embed_images=True, path=str(PROJECT / "notebooks"))
        html = MarkdownWithMath(renderer=renderer).render(source)
        if "resources" in context:
            context["resources"].setdefault("headings", []).extend(renderer.headings)
        return html


class PageRenderer(IPythonRenderer):
    """Markdown to HTML with formulas in MathML and links to notebooks turned into links to their pages."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.headings: list[tuple[int, str, str]] = []  # level, HTML and anchor of each

    def heading(self, text: str, level: int, **attributes: Any) -> str:
        """Give the heading the anchor that JupyterLab gives it."""
        anchor = html2text(text).replace(" ", "-")
        self.headings.append((level, text, anchor))
        return f'<h{level} id="{anchor}">{text}</h{level}>\n'

    def link(self, text: str, url: str, title: str | None = None) -> str:
        """Lead to the page of a notebook rather than to the notebook."""
        return super().link(text, re.sub(r"^(\w+)\.ipynb(?=#|$)", r"\1.html", url), title)

    def table(self, text: str) -> str:
        """Let a table that is wider than the screen scroll by itself."""
        return f'<div class="scroll"><table>\n{text}</table></div>\n'

    def inline_html(self, html: str) -> str:
        """Leave a tag as it is, such as papermill's link to a failed cell; nbconvert would close it where it opens."""
        return html

    def inline_math(self, body: str) -> str:
        """Render a formula in a line of text."""
        return _mathml(body, "inline")

    def block_math(self, body: str) -> str:
        """Render a formula on a line of its own (nbconvert puts it into a paragraph)."""
        return f'<span class="scroll">{_mathml(body, "block")}</span>'


def _mathml(latex: str, display: str) -> str:
    latex = latex.replace("{aligned}", "{split}")  # the same to TeX; latex2mathml knows only the latter
    try:
        math = convert(latex, display=display)
    except Exception:  # latex2mathml's errors have no common class; a page with one formula in LaTeX beats no page
        return f"<code>{latex}</code>"
    # TeX sets a thin space between log or exp and a letter; latex2mathml sets none.
    return re.sub(r"(<mi>[a-z]{2,}</mi>)(?=<m[^o])", r'\1<mspace width="0.167em"/>', math)


# One for all pages, as making it costs more than a page.
EXPORTER = PageExporter(template_name="lowrank", template_file="page.html.j2", extra_template_basedirs=[str(TEMPLATES)])


def write_index(folder: Path, template: str, **shown: Any) -> None:
    """Write ``index.html``, a page that is no notebook, from the template of this name."""
    html = EXPORTER.environment.get_template(f"{template}.html.j2").render(shown)
    write_atomically(folder / "index.html", html.encode())


def write_network(folder: Path, results: Mapping[str, Any], conditions: Mapping[str, str], **shown: Any) -> None:
    """Write what was measured of somebody's own network: ``results.json`` and ``index.html``."""
    environment = software()
    filed = {"format": FORMAT, **results, "environment": environment}
    content = json.dumps(filed, indent=1, ensure_ascii=False, default=float)  # a score may be a tensor
    write_atomically(folder / "results.json", content.encode())
    made_by = {"PyTorch": environment["versions"]["torch"], "Git revision": environment["revision"]}
    write_index(folder, "network", conditions={**conditions, **made_by}, **shown)


def picture(png: bytes, width: int, height: int, alt: str) -> dict[str, Any]:
    """Return what the templates' macro of this name shows, from a figure that :func:`plots.drawn` drew."""
    return {"png": base64.b64encode(png).decode(), "alt": alt, "width": width, "height": height}
