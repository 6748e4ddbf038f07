"""Run the series with its defaults, and write the outputs into notebooks/ and reports/reference/: ``make record``."""

import sys

from lowrank_helpers import cli, data
from lowrank_helpers.data import PROJECT, DatasetError
from lowrank_helpers.report import index
from lowrank_helpers.series import execution

LATEST = PROJECT / "reports" / "latest"


def main() -> None:
    """Record, or end with what failed."""
    try:
        data.resolve("mnist")  # not digits in its place, which a run would take
    except DatasetError as error:
        sys.exit(f"Error: {error}")
    try:
        cli.main(["run", "--output", str(LATEST)])
    except SystemExit as ended:
        if ended.code:
            raise
    execution.record(LATEST)
    index.publish(LATEST, PROJECT / "reports" / "reference")
    print("Recorded in notebooks/ and reports/reference/.")


if __name__ == "__main__":
    main()
