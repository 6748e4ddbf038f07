"""The command's entry point, ``lowrank`` or ``python -m lowrank_helpers``."""

import signal
import sys
import warnings
from pathlib import Path
from warnings import formatwarning


def main() -> None:
    """Run the command line; an interruption leaves no traceback, not even while PyTorch is being imported."""
    warnings.formatwarning = _formatted
    # nbformat imports jsonschema, which would compile grammars for over a second to check a format no notebook has.
    sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]
    try:
        try:
            from lowrank_helpers import cli
        except ModuleNotFoundError as error:
            sys.exit(
                f"lowrank needs {error.name}, which is not installed: "
                "run `pip install -e '.[series]'` in the project's folder."
            )
        cli.main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _formatted(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Write a warning of this package's, such as one that names a damaged file, without the source that gives it."""
    if Path(filename).is_relative_to(Path(__file__).parent):
        return f"Warning: {message}\n"
    return formatwarning(message, category, filename, lineno, line)


if __name__ == "__main__":
    main()
