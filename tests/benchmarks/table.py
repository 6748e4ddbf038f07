"""Turns what pytest-benchmark saved into a page of tables."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

Row = Mapping[str, str | float | bool]


def markdown(saved: Mapping[str, Any]) -> str:
    """Return the page: the machine, the targets, and one table a group of benchmarks.

    Parameters
    ----------
    saved : mapping
        pytest-benchmark's JSON. Each benchmark's ``extra_info`` has ``rows``, its part of the group's table, and
        may have ``targets``, each with its words, what was measured and whether that meets it.
    """
    groups: dict[str, list[Row]] = {}
    targets: list[Row] = []
    for benchmark in sorted(saved["benchmarks"], key=lambda benchmark: benchmark["group"]):
        groups.setdefault(benchmark["group"], []).extend(benchmark["extra_info"]["rows"])
        targets += benchmark["extra_info"].get("targets", [])
    parts = ["# Benchmarks", _machine(saved), "## Targets", _table(targets)]
    for group, rows in groups.items():
        parts += [f"## {group}", _table(rows)]
    return "\n\n".join(parts) + "\n"


def _machine(saved: Mapping[str, Any]) -> str:
    machine, commit = saved["machine_info"], saved["commit_info"]
    return (
        f"{machine['cpu']['brand_raw']}, {machine['cpu']['count']} cores · PyTorch {machine['torch']} · "
        f"precision `auto` is {machine['precision']} · threads: {machine['threads']}, but for the textbook loop and "
        f"the series all cores · {saved['datetime'][:10]} · revision {commit['id'][:7]}"
        f"{' with changes' if commit['dirty'] else ''}"
    )


def _table(rows: Sequence[Row]) -> str:
    table = pd.DataFrame(rows, dtype=object).fillna("")
    return f"```\n{table.to_string(index=False, float_format='{:,.4g}'.format)}\n```"
