"""The command's entry point, ``lowrank`` or ``python -m lowrank_helpers``."""

import signal
import sys
import warnings


def main() -> None:
    """Run the command line; an interruption leaves no traceback, not even while PyTorch is being imported."""
    warnings.formatwarning = lambda message, *_: f"Warning: {message}\n"  # without the source that gives it
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


if __name__ == "__main__":
    main()
