"""What must be the same of a recorded output and a new one, on every machine and from every seed: its words.

Numbers in free text may differ; of a claim they are held against evidence instead. Images must agree in kind and pixel
size, widgets in being there. A cell's metadata may say otherwise, under ``lowrank``, by one key and a reason in words:

``"exact": "why"``
    Numbers must agree too: no machine and no seed changes them.
``"unchecked": "why"``
    The outputs are not compared: they describe this machine.
"""

import base64
import io
import json
import re
from collections.abc import Callable
from typing import Any

from nbformat import NotebookNode
from PIL import Image

NUMBER = re.compile(r"(?<![\w.])[-−+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?(?:[eE][-+]?\d+)?")  # not of fc1 or v2.1
KEYS = ("exact", "unchecked")


class MetadataError(ValueError):
    """A cell's ``lowrank`` metadata is not in the vocabulary; the message says what is."""


def treatment(cell: NotebookNode) -> tuple[str, str]:
    """Return which of the keys a cell's metadata has, and the reason; empty where it has none."""
    stated = cell.metadata.get("lowrank", {})
    if len(stated) > 1 or not stated.keys() <= {*KEYS} or not all(str(reason).strip() for reason in stated.values()):
        raise MetadataError(
            f"lowrank metadata {dict(stated)} is not allowed; allowed: {' or '.join(KEYS)}, and a reason"
        )
    return next(iter(stated.items()), ("", ""))


def essence(output: NotebookNode, *, exact: bool = False) -> NotebookNode:
    """Return what must be the same of an output, by kind: MIME type or stream."""
    if output.output_type == "stream":
        shown = {output.name: output.text}
    else:  # a table is there twice: as plain text it breaks its lines where numbers have more digits
        shown = {
            kind: data for kind, data in output.data.items() if kind != "text/plain" or "text/html" not in output.data
        }
        shown["description"] = json.dumps(output.metadata, sort_keys=True, ensure_ascii=False)
    claimed = "claim" in output.get("metadata", {}).get("lowrank", {})
    of_text = of_claim if claimed else str if exact else words
    return NotebookNode({kind: OF_KIND.get(kind, of_text)(data) for kind, data in shown.items()}, output_type="essence")


def words(text: Any) -> str:
    """Return a text with a sign for each number, and without the padding that makes columns of them."""
    return " ".join(NUMBER.sub(" # ", str(text)).split())


def of_claim(markdown: str) -> str:
    """Return a claim's sentence and the names in its table, without how it stands and what was measured."""
    sentence, *parts = markdown.split("\n\n")  # then how it stands, and the table if it has one
    return "\n".join([sentence, *(row.split("|")[1] for table in parts[1:] for row in table.splitlines())])


def _pixels(image: str) -> str:
    width, height = Image.open(io.BytesIO(base64.b64decode(image))).size
    return f"{width}×{height} pixels"


OF_KIND: dict[str, Callable[[Any], str]] = {
    "image/png": _pixels,
    "image/jpeg": _pixels,
    "application/vnd.jupyter.widget-view+json": lambda _: "",  # a random id
}
