"""Recorded outputs compared with new ones, and the metadata by which a cell says what may differ.

Outputs must agree in number and kind, in all text outside numbers, in the count of numbers, and in each number.
Runs of spaces count as one, as a table's padding follows the width of its numbers. Images must agree in kind and
pixel size; widgets in being there; any other kind of data exactly. Digits that continue a word (``fc1``) are text.

What a cell allows stands in its metadata, under ``lowrank``, as at most one of three keys:

``"tolerance": {"relative": 0.01, "absolute": 0.3, "integers": 2}``
    Numbers with a decimal point or an exponent may differ by 1 % or, in the unit printed, by 0.3; those without
    (ranks, counts) by 2. Each may be left out and is then 0.
``"unchecked_numbers": "why"``
    The text must agree, the numbers are free: timings.
``"unchecked": "why"``
    The outputs are not compared: a description of this machine.

A cell with none of them has the notebook's tolerance (the same key in its metadata), and where there is none, must
agree exactly.
"""

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from typing import Any

from nbformat import NotebookNode
from PIL import Image

NUMBER = re.compile(r"(?<![\w.])[-−+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?")
WIDGET = "application/vnd.jupyter.widget-view+json"
CHECKED, TEXT_ONLY, UNCHECKED = "checked", "text only", "unchecked"


class MetadataError(ValueError):
    """A cell's or notebook's ``lowrank`` metadata is not in the vocabulary; the message says what is."""


@dataclass(frozen=True)
class Tolerance:
    """How far a number may be from the recorded one: the wider of ``relative`` and ``absolute``.

    ``integers`` is for numbers written without decimal point and exponent, which the others leave exact.
    """

    relative: Decimal = Decimal(0)
    absolute: Decimal = Decimal(0)
    integers: Decimal = Decimal(0)

    def allows(self, recorded: str, new: str) -> bool:
        """Say whether a number, as printed, is near enough to the recorded one."""
        old, now = printed_value(recorded), printed_value(new)
        allowed = self.integers if are_whole(recorded, new) else max(self.absolute, self.relative * abs(old))
        return abs(now - old) <= allowed

    def __str__(self) -> str:
        stated = [f"{field.name} {getattr(self, field.name)}" for field in fields(self) if getattr(self, field.name)]
        return ", ".join(stated) or "none"


EXACT = Tolerance()
ANY_NUMBER = Tolerance(absolute=Decimal("Infinity"), integers=Decimal("Infinity"))


@dataclass(frozen=True)
class Treatment:
    """What a cell's metadata asks for: how far it is checked, within which tolerance, and why not farther."""

    extent: str = CHECKED
    tolerance: Tolerance = EXACT
    reason: str = ""


def treatment(cell: NotebookNode, notebook: NotebookNode) -> Treatment:
    """Read what a cell's metadata, or else the notebook's, allows.

    Raises
    ------
    MetadataError
        A value is not in the vocabulary, a reason is missing, or two keys exclude each other.
    """
    stated = cell.metadata.get("lowrank", {})
    chosen = [key for key in ("tolerance", "unchecked_numbers", "unchecked") if key in stated]
    if len(chosen) > 1:
        raise MetadataError(f"{' and '.join(chosen)} exclude each other")
    if not chosen:
        return Treatment(tolerance=_tolerance(notebook.metadata.get("lowrank", {}).get("tolerance", {})))
    value = stated[chosen[0]]
    if chosen == ["tolerance"]:
        return Treatment(tolerance=_tolerance(value))
    if not isinstance(value, str) or not value.strip():
        raise MetadataError(f"{chosen[0]} = {value!r} must be the reason, in words")
    return Treatment(UNCHECKED, reason=value) if chosen == ["unchecked"] else Treatment(TEXT_ONLY, ANY_NUMBER, value)


def _tolerance(stated: Any) -> Tolerance:
    allowed = [field.name for field in fields(Tolerance)]
    valid = isinstance(stated, Mapping) and all(
        name in allowed and isinstance(value, (int, float)) and value >= 0 for name, value in stated.items()
    )
    if not valid:
        raise MetadataError(f"tolerance = {stated!r} must give numbers of 0 or more by name: {', '.join(allowed)}")
    return Tolerance(**{name: Decimal(str(value)) for name, value in stated.items()})


def differences(recorded: Sequence[NotebookNode], new: Sequence[NotebookNode], tolerance: Tolerance) -> list[str]:
    """Compare a cell's outputs with the recorded ones.

    Returns
    -------
    list of str
        One line a difference, with both values and the tolerance; empty where the outputs agree.
    """
    found: list[str] = []
    if len(recorded) != len(new):
        return [f"{len(recorded)} outputs recorded ({_kinds(recorded)}), now {len(new)} ({_kinds(new)})"]
    for i, (old_parts, new_parts) in enumerate(zip(map(_parts, recorded), map(_parts, new), strict=True), start=1):
        if old_parts.keys() != new_parts.keys():
            found.append(f"output {i}: recorded as {', '.join(old_parts)}, now as {', '.join(new_parts)}")
            continue
        for kind, old in old_parts.items():
            found += [f"output {i}, {kind}: {line}" for line in _compare(kind, old, new_parts[kind], tolerance)]
    return found


def _kinds(outputs: Sequence[NotebookNode]) -> str:
    return "; ".join(", ".join(_parts(output)) for output in outputs) or "nothing"


def _parts(output: NotebookNode) -> dict[str, Any]:
    """Return what an output shows, by kind: MIME type or stream; with its metadata, which holds alternative texts."""
    if output.output_type == "stream":
        return {output.name: output.text}
    if output.output_type == "error":
        return {"error": f"{output.ename}: {output.evalue}"}
    return {**output.data, "metadata": json.dumps(output.metadata, sort_keys=True, ensure_ascii=False)}


def _compare(kind: str, recorded: Any, new: Any, tolerance: Tolerance) -> list[str]:
    if kind == WIDGET:  # its content is a random id
        return []
    if kind in ("image/png", "image/jpeg"):
        old_size, new_size = _pixels(recorded), _pixels(new)
        return [] if old_size == new_size else [f"recorded {old_size} pixels, now {new_size}"]
    if isinstance(recorded, str) and isinstance(new, str):
        return compare_text(recorded, new, tolerance)
    return [] if recorded == new else [f"recorded {recorded!r}, now {new!r}"]


def _pixels(image: str) -> str:
    width, height = Image.open(io.BytesIO(base64.b64decode(image))).size
    return f"{width}×{height}"


def compare_text(recorded: str, new: str, tolerance: Tolerance) -> list[str]:
    """Compare two texts: all but the numbers exactly, spaces before numbers aside, and the numbers by tolerance."""
    old_words, new_words = _words(recorded), _words(new)
    for old, now in zip(old_words, new_words, strict=False):
        if old != now:
            return [f"recorded text {old!r}, now {now!r}"]
    if len(old_words) != len(new_words):
        return [f"recorded {len(old_words) - 1} numbers, now {len(new_words) - 1}: {recorded!r}, now {new!r}"]
    numbers = zip(NUMBER.findall(recorded), NUMBER.findall(new), old_words, strict=False)
    return [
        f"after {before[-40:]!r}: recorded {old}, now {now} (tolerance: {tolerance})"
        for old, now, before in numbers
        if not tolerance.allows(old, now)
    ]


def _words(text: str) -> list[str]:
    """Return the texts between the numbers, without the padding that makes columns of them."""
    return [re.sub(" +", " ", words).rstrip(" ") for words in NUMBER.split(text)]


def are_whole(recorded: str, new: str) -> bool:
    """Say whether two numbers are both printed without decimal point and exponent."""
    return not re.search("[.eE]", recorded + new)


def printed_value(number: str) -> Decimal:
    """Return the value of a number as printed, with or without commas between thousands."""
    return Decimal(number.replace(",", "").replace("−", "-"))
