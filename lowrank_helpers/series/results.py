"""What notebooks claim, on disk: a JSON file with a checksum for each notebook, joined into ``results.json``."""

import json
import platform
import subprocess
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from lowrank_helpers import PROJECT
from lowrank_helpers.series import digest
from lowrank_helpers.series.claims import Claim
from lowrank_helpers.series.store import write_atomically

FORMAT = 3
LIBRARIES = ("torch", "torchvision", "numpy", "scipy", "pandas", "matplotlib", "papermill", "nbconvert")


@dataclass(frozen=True)
class Outcome:
    """How one notebook's execution ended: ``done``, ``kept`` (done in an earlier run) or ``failed``.

    If it failed, ``error`` says why, and first of all in which cell if one raised it: ``cell 3: ValueError: no luck``.
    """

    notebook: str
    status: str
    seconds: float
    error: str = ""


def failures(outcomes: Sequence[Outcome]) -> list[str]:
    """Say which notebooks failed, where and why: ``02_train, cell 3: ValueError: no luck``."""
    return [f"{outcome.notebook}, {outcome.error}" for outcome in outcomes if outcome.error]


def claims_file(folder: Path, notebook: str) -> Path:
    """Return where a notebook's claims lie in a run folder."""
    return folder / "claims" / f"{notebook}.json"


def file_claims(folder: Path, content: Mapping[str, Any]) -> None:
    """File a notebook's name, ``parameters``, ``environment`` and ``claims`` by id."""
    plain = {**content, "claims": {id: asdict(claim) for id, claim in content["claims"].items()}}
    text = json.dumps({"format": FORMAT, "checksum": digest.of_json(plain), **plain}, indent=1, ensure_ascii=False)
    write_atomically(claims_file(folder, content["notebook"]), text.encode())


def read_claims(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what :func:`file_claims` filed in a run folder, by notebook.

    A damaged or foreign file is left out, with a warning that names it.
    """
    filed = {}
    for file in sorted((folder / "claims").glob("*.json")):
        try:
            content = json.loads(file.read_bytes())
            intact = (content.pop("format"), content["notebook"]) == (FORMAT, file.stem)
            intact = intact and content.pop("checksum") == digest.of_json(content)
        except (OSError, ValueError, TypeError, AttributeError, KeyError):
            intact = False
        if intact:
            claims = {id: Claim.from_json(claim) for id, claim in content["claims"].items()}
            filed[file.stem] = content | {"claims": claims}
        else:
            warnings.warn(f"{file.name} among the claims is damaged or of another version; left out", stacklevel=2)
    return filed


def gather(folder: Path, outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """Join the claims of a run folder into ``results.json`` and return them.

    Returns
    -------
    dict
        ``seconds``: on the clock, as given. ``notebooks``: by name, how it ended, in how many seconds, and its
        ``parameters`` and ``environment``. ``claims``: by id, the notebook and the fields of its
        :class:`lowrank_helpers.series.claims.Claim`.
    """
    notebooks: dict[str, Any] = {
        outcome.notebook: {"status": outcome.status, "seconds": outcome.seconds, "error": outcome.error}
        for outcome in outcomes
    }
    claims: dict[str, Any] = {}
    for name, filed in read_claims(folder).items():
        of_run = {part: filed[part] for part in ("parameters", "environment")}
        notebooks.setdefault(name, {"status": "earlier"}).update(of_run)
        claims |= {id: {"notebook": name} | asdict(claim) for id, claim in filed["claims"].items()}
    results = {
        "format": FORMAT,
        "seconds": seconds,
        "notebooks": dict(sorted(notebooks.items())),  # not in the order in which they ended
        "claims": dict(sorted(claims.items())),
    }
    write_atomically(folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False).encode())
    return results


@cache
def software() -> dict[str, Any]:
    """Return what produced a result: the versions of Python and the libraries, and the project's git revision."""
    git = ["git", "describe", "--always", "--dirty"]
    try:
        revision = subprocess.run(git, cwd=PROJECT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        revision = "unknown"
    versions = {library: metadata.version(library) for library in LIBRARIES}
    return {"python": platform.python_version(), "versions": versions, "revision": revision}
