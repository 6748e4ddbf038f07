"""The command's entry point, ``lowrank`` or ``python -m lowrank_helpers``."""

import signal
import sys


def main() -> None:
    """Run the command line; an interruption leaves no traceback, not even while PyTorch is being imported."""
    # nbformat imports jsonschema, which would compile grammars for over a second to check a format no notebook has.
    sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]
    try:
        from lowrank_helpers import cli

        cli.main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
