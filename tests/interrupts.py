"""What the tests that interrupt a process give it."""

import signal


def heed_interrupts() -> None:
    """Undo, before a process starts, that programs in the background of a script ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
