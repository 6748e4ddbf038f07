"""Recorded outputs compared with new ones, and the metadata by which a cell says what may differ.

Outputs must agree in number and kind, in all text outside numbers, in the count of numbers, and in each number.
Runs of spaces count as one, as a table's padding follows the width of its numbers. Images must agree in kind and
pixel size; widgets in being there; any other kind of data exactly. Digits that continue a word (``fc1``) are text.
Of a table, which is there as HTML and as plain text, the HTML is compared: the other breaks its lines as numbers
have more or fewer digits.

What a cell allows stands in its metadata, under ``lowrank``, as at most one of these keys:

``"intervals": {"0 text/html": [null, [97.5, 98.6], …], …}``
    By output and kind of data, for each number in the order of the text the limits between which it must lie, both
    included; null: as recorded. :mod:`lowrank_helpers.checking.tolerances` sets them from other runs.
``"exact": "why"``
    Every number as recorded; other runs, whose seed differs, do not change that.
``"unchecked_numbers": "why"``
    The text must agree, the numbers are free: timings.
``"unchecked": "why"``
    The outputs are not compared: a description of this machine.

A cell with none of them must agree exactly.
"""

import base64
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from nbformat import NotebookNode
from PIL import Image

NUMBER = re.compile(r"(?<![\w.])[-−+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?")
WIDGET = "application/vnd.jupyter.widget-view+json"
CHECKED, TEXT_ONLY, UNCHECKED = "checked", "text only", "unchecked"
KEYS = ("intervals", "exact", "unchecked_numbers", "unchecked")

Limits = list[float] | None  # [low, high], or None for exactly as recorded
Intervals = Mapping[str, Sequence[Limits]]  # by output and kind of data, for each number


class MetadataError(ValueError):
    """A cell's ``lowrank`` metadata is not in the vocabulary; the message says what is."""


@dataclass(frozen=True)
class Treatment:
    """What a cell's metadata asks for: how far it is checked, where its numbers may lie, and why not farther."""

    extent: str = CHECKED
    intervals: Intervals = field(default_factory=dict)
    reason: str = ""


def treatment(cell: NotebookNode) -> Treatment:
    """Read what a cell's metadata allows.

    Raises
    ------
    MetadataError
        A value is not in the vocabulary, a reason is missing, or two keys exclude each other.
    """
    stated = cell.metadata.get("lowrank", {})
    if unknown := stated.keys() - set(KEYS):
        raise MetadataError(f"{min(unknown)!r} is unknown; allowed: {', '.join(KEYS)}")
    if len(stated) > 1:
        raise MetadataError(f"{' and '.join(stated)} exclude each other")
    if not stated:
        return Treatment()
    ((key, value),) = stated.items()
    if key == "intervals":
        return Treatment(intervals=_intervals(value))
    if not isinstance(value, str) or not value.strip():
        raise MetadataError(f"{key} = {value!r} must be the reason, in words")
    extent = {"exact": CHECKED, "unchecked_numbers": TEXT_ONLY, "unchecked": UNCHECKED}[key]
    return Treatment(extent, reason="" if key == "exact" else value)


def _intervals(stated: Any) -> Intervals:
    def is_number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    def is_limits(value: Any) -> bool:
        return value is None or (
            isinstance(value, list) and len(value) == 2 and all(map(is_number, value)) and value[0] <= value[1]
        )

    if not isinstance(stated, Mapping) or not all(
        isinstance(limits, list) and all(map(is_limits, limits)) for limits in stated.values()
    ):
        raise MetadataError(f"intervals = {stated!r} must give by output a list of [low, high] or null, one a number")
    return stated


def differences(recorded: Sequence[NotebookNode], new: Sequence[NotebookNode], treated: Treatment) -> list[str]:
    """Compare a cell's outputs with the recorded ones.

    Returns
    -------
    list of str
        One line a difference, with both values and where the new one might lie; empty where the outputs agree.
    """
    if treated.extent == UNCHECKED:
        return []
    if len(recorded) != len(new):
        return [f"{len(recorded)} outputs recorded ({_kinds(recorded)}), now {len(new)} ({_kinds(new)})"]
    found: list[str] = []
    for i, (old_parts, new_parts) in enumerate(zip(map(_parts, recorded), map(_parts, new), strict=True)):
        if old_parts.keys() != new_parts.keys():
            found.append(f"output {i}: recorded as {', '.join(old_parts)}, now as {', '.join(new_parts)}")
            continue
        for kind, old in old_parts.items():
            place = f"{i} {kind}"
            found += [f"output {place}: {line}" for line in _compare(kind, old, new_parts[kind], treated, place)]
    return found


def texts(outputs: Sequence[NotebookNode]) -> Iterator[tuple[str, str]]:
    """Yield the texts of outputs that are compared number by number, each after its place, such as ``0 text/html``."""
    for i, output in enumerate(outputs):
        for kind, data in _parts(output).items():
            if isinstance(data, str) and kind not in ("image/png", "image/jpeg"):
                yield f"{i} {kind}", data


def _kinds(outputs: Sequence[NotebookNode]) -> str:
    return "; ".join(", ".join(_parts(output)) for output in outputs) or "nothing"


def _parts(output: NotebookNode) -> dict[str, Any]:
    """Return what an output shows, by kind: MIME type or stream; with its metadata, which holds alternative texts."""
    if output.output_type == "stream":
        return {output.name: output.text}
    if output.output_type == "error":
        return {"error": f"{output.ename}: {output.evalue}"}
    data = {
        kind: value for kind, value in output.data.items() if kind != "text/plain" or "text/html" not in output.data
    }
    return {**data, "metadata": json.dumps(output.metadata, sort_keys=True, ensure_ascii=False)}


def _compare(kind: str, recorded: Any, new: Any, treated: Treatment, place: str) -> list[str]:
    if kind == WIDGET:  # its content is a random id
        return []
    if kind in ("image/png", "image/jpeg"):
        old_size, new_size = _pixels(recorded), _pixels(new)
        return [] if old_size == new_size else [f"recorded {old_size} pixels, now {new_size}"]
    if not (isinstance(recorded, str) and isinstance(new, str)):
        return [] if recorded == new else [f"recorded {recorded!r}, now {new!r}"]
    if treated.extent == TEXT_ONLY:
        return compare_words(recorded, new)
    return compare_text(recorded, new, treated.intervals.get(place, ()))


def _pixels(image: str) -> str:
    width, height = Image.open(io.BytesIO(base64.b64decode(image))).size
    return f"{width}×{height}"


def compare_text(recorded: str, new: str, limits: Sequence[Limits] = ()) -> list[str]:
    """Compare two texts: all but the numbers exactly, spaces before numbers aside, and each number by its limits.

    Without limits every number must be as recorded.
    """
    if worded := compare_words(recorded, new):
        return worded
    old_numbers, new_numbers = NUMBER.findall(recorded), NUMBER.findall(new)
    if limits and len(limits) != len(old_numbers):
        return [f"{len(old_numbers)} numbers recorded, but limits for {len(limits)}: set them anew"]
    allowed = limits or [None] * len(old_numbers)
    return [
        f"after {before[-40:]!r}: recorded {old}, now {now}"
        + (f" (allowed: {low} to {high})" if within else " (exact)")
        for old, now, before, within in zip(old_numbers, new_numbers, words(recorded), allowed, strict=False)
        for low, high in [within or (printed_value(old), printed_value(old))]
        if not Decimal(str(low)) <= printed_value(now) <= Decimal(str(high))
    ]


def compare_words(recorded: str, new: str) -> list[str]:
    """Compare the texts outside numbers, and how many numbers there are."""
    old_words, new_words = words(recorded), words(new)
    for old, now in zip(old_words, new_words, strict=False):
        if old != now:
            return [f"recorded text {old!r}, now {now!r}"]
    if len(old_words) != len(new_words):
        return [f"recorded {len(old_words) - 1} numbers, now {len(new_words) - 1}: {recorded!r}, now {new!r}"]
    return []


def words(text: str) -> list[str]:
    """Return the texts between the numbers, without the padding that makes columns of them."""
    return [re.sub(" +", " ", between).rstrip(" ") for between in NUMBER.split(text)]


def printed_value(number: str) -> Decimal:
    """Return the value of a number as printed, with or without commas between thousands."""
    return Decimal(number.replace(",", "").replace("−", "-"))
